"""Batches hold P identities x K images, epochs follow from (seed, epoch), ranks share them, and nothing is left out."""

import re
from collections import Counter
from itertools import chain

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.data.samplers import (
    SAMPLERS,
    DistributedBatchSampler,
    DistributedRandomIdentitySampler,
    PKSampler,
    deal_groups,
    distinct,
    most_batches,
    picks,
    ratios,
)
from recnb.registry import ConfigError

ARGUMENTS = {
    "PKSampler": {"batch_size": 8, "sample_per_id": 2},
    "DistributedBatchSampler": {"batch_size": 8},
    "DistributedRandomIdentitySampler": {"batch_size": 8, "num_instances": 2},
}
UNEVEN = np.repeat([7, 0, 3, 12, 5, 9, 100], [1, 2, 3, 4, 5, 9, 30])
np.random.default_rng(0).shuffle(UNEVEN)
every_sampler = pytest.mark.parametrize("name", SAMPLERS)
identity_samplers = pytest.mark.parametrize(
    ("sampler", "key"), [(PKSampler, "sample_per_id"), (DistributedRandomIdentitySampler, "num_instances")]
)


def make(name: str, labels=UNEVEN, **changes):
    return SAMPLERS[name](labels, **{**ARGUMENTS[name], **changes})


def epoch(sampler, number: int = 0) -> list[list[tuple[int, int]]]:
    sampler.set_epoch(number)
    return list(sampler)


def indices(batch) -> list[int]:
    return [index for index, _ in batch]


# --- What every sampler promises --------------------------------------------------------------------------------------


@every_sampler
def test_the_length_is_exact(name):
    sampler = make(name)
    assert len(sampler) > 2
    assert all(len(epoch(sampler, n)) == len(sampler) for n in range(5))


@every_sampler
def test_items_are_plain_numbers_within_the_list(name):
    for batch in epoch(make(name)):
        for index, seed in batch:
            assert type(index) is int and type(seed) is int
            assert 0 <= index < len(UNEVEN) and 0 <= seed < 2**62


@every_sampler
def test_an_epoch_follows_from_seed_and_number(name):
    shuffled = {"shuffle": True}
    first, again = make(name, seed=4, **shuffled), make(name, seed=4, **shuffled)
    np.random.seed(1)
    assert epoch(first, 3) == epoch(again, 3) == epoch(first, 3)
    orders = [
        [indices(batch) for batch in epoch(make(name, seed=seed, **shuffled), number)]
        for seed, number in ((4, 3), (4, 4), (5, 3), (3, 4))
    ]
    assert len(set(map(str, orders))) == 4


@every_sampler
def test_an_epoch_may_be_repeated_without_being_set(name):
    sampler = make(name)
    assert list(sampler) == list(sampler)


@every_sampler
@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_have_their_parts_of_the_batches_of_one(name, world_size):
    labels = np.repeat(np.arange(12), 10)
    changes = {"shuffle": True, "seed": 2, "drop_last": True}
    parts = [epoch(make(name, labels, rank=rank, world_size=world_size, **changes), 1) for rank in range(world_size)]
    alone = epoch(make(name, labels, **{**changes, "batch_size": 8 * world_size}), 1)
    assert len(alone) >= 120 // (8 * world_size) - 1
    assert [list(chain(*batches)) for batches in zip(*parts, strict=True)] == alone


@every_sampler
def test_a_list_without_one_batch_for_each_rank(name):
    plain = name == "DistributedBatchSampler"
    wanted = "makes no whole batch of 8 for each of 3" if plain else "batch of 8 in each of 3 processes needs 12 ident"
    with pytest.raises(ValueError, match=wanted):
        make(name, np.repeat(np.arange(11), 2), world_size=3, drop_last=True)


# --- P identities x K images ------------------------------------------------------------------------------------------


@identity_samplers
@pytest.mark.parametrize("k", [2, 4])
def test_batches_hold_p_identities_of_k_images(sampler, key, k):
    drawn = sampler(UNEVEN, batch_size=12, **{key: k}, seed=3)
    for number in range(3):
        for batch in epoch(drawn, number):
            assert len(batch) == 12
            assert sorted(Counter(UNEVEN[indices(batch)].tolist()).values()) == [k] * (12 // k)


@identity_samplers
def test_images_repeat_within_a_batch_only_where_an_identity_has_too_few(sampler, key):
    counts = Counter(UNEVEN.tolist())
    for number in range(10):
        for batch in epoch(sampler(UNEVEN, batch_size=12, **{key: 4}), number):
            for index, times in Counter(indices(batch)).items():
                assert times == 1 or counts[UNEVEN[index]] < 4


@identity_samplers
def test_an_image_that_repeats_is_augmented_anew(sampler, key):
    labels = np.arange(6)
    for batch in epoch(sampler(labels, batch_size=12, **{key: 2})):
        assert len(set(indices(batch))) == 6
        assert len({seed for _, seed in batch}) == 12


@identity_samplers
def test_every_image_is_seen_in_time(sampler, key):
    drawn = sampler(UNEVEN, batch_size=8, **{key: 2})
    seen = {index for number in range(60) for batch in epoch(drawn, number) for index in indices(batch)}
    assert seen == set(range(len(UNEVEN)))


@identity_samplers
@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    labels=st.lists(st.integers(0, 12), min_size=1, max_size=120),
    p=st.integers(1, 6),
    k=st.integers(1, 5),
    seed=st.integers(0, 3),
)
def test_any_labels(sampler, key, labels, p, k, seed):
    labels = np.array(labels)
    if len(set(labels.tolist())) < p:
        with pytest.raises(ValueError, match=f"a batch of {p * k} needs {p} identities"):
            sampler(labels, batch_size=p * k, **{key: k})
        return
    drawn = sampler(labels, batch_size=p * k, **{key: k}, seed=seed)
    batches = epoch(drawn, 1)
    assert len(batches) == len(drawn) >= 1
    for batch in batches:
        images = Counter(indices(batch))
        identities = Counter(labels[indices(batch)].tolist())
        assert sorted(identities.values()) == [k] * p
        assert all(times == 1 or (labels == labels[index]).sum() < k for index, times in images.items())


@identity_samplers
@pytest.mark.parametrize(
    ("batch_size", "k", "message"),
    [
        (9, 2, "batch_size 9 is not divisible by {} 2"),
        (8, 0, "batch_size 8 is not divisible by {} 0"),
        (0, 2, "batch_size 0 is not divisible by {} 2"),
        (16, 2, r"a batch of 16 needs 8 identities \({} 2\), the training list has 7; lower batch_size or raise {}"),
    ],
)
def test_batches_that_cannot_be_made(sampler, key, batch_size, k, message):
    with pytest.raises(ValueError, match=message.replace("{}", key)):
        sampler(UNEVEN, batch_size=batch_size, **{key: k})


# --- Groups of an epoch -----------------------------------------------------------------------------------------------


def test_an_epoch_takes_each_image_at_most_once():
    labels = np.repeat(np.arange(9), 7)
    for number in range(5):
        images = [
            index
            for batch in epoch(make("DistributedRandomIdentitySampler", labels), number)
            for index in indices(batch)
        ]
        assert len(set(images)) == len(images) == 48  # 27 groups of two make 6 batches of four


@settings(max_examples=100, deadline=None, derandomize=True)
@given(groups=st.lists(st.integers(1, 9), min_size=1, max_size=12), p=st.integers(1, 5))
def test_as_many_batches_as_can_be_filled(groups, p):
    groups = np.array(groups + [1] * max(0, p - len(groups)))
    batches = most_batches(groups, p)
    left, filled = sorted(groups.tolist()), 0
    while len([g for g in left if g]) >= p:  # taking from the p largest each time is the best that can be done
        left = sorted(left[:-p] + [g - 1 for g in left[-p:]])
        filled += 1
    assert batches == filled


def test_groups_are_dealt_whole_and_in_number():
    identity, nth = deal_groups(np.array([3, 1, 4]), 6, np.random.default_rng(0))
    assert len(identity) == len(nth) == 6
    for i in range(3):
        assert nth[identity == i].tolist() == list(range((identity == i).sum()))


def test_an_epoch_may_be_cut_short():
    sampler = make("DistributedRandomIdentitySampler", max_iters=2)
    assert len(sampler) == len(epoch(sampler)) == 2


@pytest.mark.parametrize(("method", "share"), [("sample_avg_prob", 30 / 54), ("id_avg_prob", 1 / 7)])
def test_how_often_an_identity_is_drawn(method, share):
    sampler = PKSampler(UNEVEN, batch_size=2, sample_per_id=2, sample_method=method)
    drawn = [UNEVEN[batch[0][0]] for number in range(60) for batch in epoch(sampler, number)]
    assert abs(np.mean(np.array(drawn) == 100) - share) < 4 * np.sqrt(share * (1 - share) / len(drawn))


@pytest.mark.parametrize(
    ("id_list", "ratio", "factors"),
    [
        ([1, 2], [4], [1, 4, 4, 1, 1, 1, 1]),
        ([0, 0, 5, 6], [3, 0.5], [3, 1, 1, 1, 1, 0.5, 0.5]),
        ([1, 4, 3, 6], [2, 7], [1, 2, 2, 2, 2, 7, 7]),
        ([], [], [1] * 7),
    ],
)
def test_how_often_identities_of_a_range_are_drawn(id_list, ratio, factors):
    assert ratios(7, id_list, ratio).tolist() == factors
    ranges = {"sample_method": "id_avg_prob", "id_list": id_list, "ratio": ratio}
    sampler = PKSampler(UNEVEN, batch_size=1, sample_per_id=1, **ranges)
    drawn = [UNEVEN[batch[0][0]] for number in range(60) for batch in epoch(sampler, number)]
    for label, factor in zip(np.unique(UNEVEN), factors, strict=True):
        share = factor / sum(factors)
        assert abs(np.mean(np.array(drawn) == label) - share) < 4 * np.sqrt(share * (1 - share) / len(drawn))


@pytest.mark.parametrize(
    ("id_list", "ratio", "message"),
    [
        (
            [50030, 80700],
            [4],
            "id_list has the identities 50030 to 80700, and the training list those from 0 to 6; it was "
            "made for another list: correct it, or leave out id_list and ratio",
        ),
        ([0, 7], [4], "id_list has the identities 0 to 7"),
        ([3, 2], [4], "id_list has the identities 3 to 2"),
        ([-1, 2], [4], "id_list has the identities -1 to 2"),
        ([0, 2, 4], [4, 4], "id_list [0, 2, 4] needs the first and"),
        (None, [4], "id_list [] needs the first and the last identity for each number of ratio [4]"),
        ([0, 2], None, "id_list [0, 2] needs"),
        ([0, 2], [0], "ratio [0], and these must be positive"),
    ],
)
def test_ranges_that_cannot_be_meant(id_list, ratio, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        make("PKSampler", id_list=id_list, ratio=ratio)


def test_identities_are_drawn_without_replacement_by_weight():
    labels = np.repeat([0, 1, 2], [6, 3, 1])
    sampler = PKSampler(labels, batch_size=2, sample_per_id=1)
    pairs = Counter(tuple(labels[indices(batch)].tolist()) for n in range(1000) for batch in epoch(sampler, n))
    total = sum(pairs.values())
    for (first, second), times in pairs.items():
        weight = [0.6, 0.3, 0.1]
        expected = weight[first] * weight[second] / (1 - weight[first])
        assert abs(times / total - expected) < 5 * np.sqrt(expected / total)


def test_rare_identities_are_found_in_few_steps():
    class Counting:
        rng, calls = np.random.default_rng(0), 0

        def random(self, size):
            self.calls += 1
            return self.rng.random(size)

    counting, counts = Counting(), np.array([1_000_000, 1, 1, 1])
    assert sorted(distinct(np.cumsum(counts) / counts.sum(), 4, counting)) == [0, 1, 2, 3]
    assert counting.calls < 30


def test_an_unknown_way_to_draw():
    section = {"name": "PKSampler", "batch_size": 8, "sample_per_id": 4, "sample_method": "id"}
    with pytest.raises(ConfigError, match=r"sampler\.sample_method: 'id' is not supported; there is id_avg_prob"):
        SAMPLERS.build(section, "sampler", labels=(UNEVEN, ""))


# --- The whole list ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("drop_last", "sizes"), [(False, [8] * 6 + [6]), (True, [8] * 6)])
@pytest.mark.parametrize("shuffle", [False, True])
def test_the_whole_list_in_batches(drop_last, sizes, shuffle):
    batches = epoch(DistributedBatchSampler(UNEVEN, batch_size=8, drop_last=drop_last, shuffle=shuffle))
    assert sorted(map(len, batches), reverse=True) == sizes
    images = [index for batch in batches for index in indices(batch)]
    assert len(set(images)) == len(images)
    assert (images == list(range(len(images)))) != shuffle


@pytest.mark.parametrize(("items", "ranks", "batch"), [(95, 2, 4), (95, 3, 5), (96, 2, 4), (1, 2, 4), (7, 3, 8)])
def test_several_ranks_take_as_many_steps_as_one_and_see_every_image(items, ranks, batch):
    options = {"labels": range(items), "shuffle": True, "seed": 3}
    alone = epoch(DistributedBatchSampler(batch_size=batch * ranks, **options))
    parts = [
        epoch(DistributedBatchSampler(batch_size=batch, rank=rank, world_size=ranks, **options))
        for rank in range(ranks)
    ]
    assert {len(part) for part in parts} == {len(alone)} == {-(-items // (batch * ranks))}
    for step in zip(*parts, strict=True):
        assert len({len(own) for own in step}) == 1
    seen = [index for part in parts for own in part for index, _ in own]
    assert set(seen) == set(range(items)) and len(seen) - items < ranks


def test_the_pairs_of_an_identity_are_drawn_at_random():
    labels = np.repeat(np.arange(4), 1000)
    batches = epoch(PKSampler(labels, batch_size=8, sample_per_id=2, seed=1))
    pairs = {tuple(sorted((batch[i][0], batch[i + 1][0]))) for batch in batches for i in range(0, 8, 2)}
    assert len(pairs) > 0.99 * 4 * len(batches)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 40])
def test_picks_are_even_and_repeat_only_where_they_must(count):
    drawn = picks(np.full(6000, count), 4, np.random.default_rng(0))
    for row in drawn[:200].tolist():
        times = np.bincount(row, minlength=count)
        assert times.max() - times.min() <= 1
    share = np.bincount(drawn.ravel(), minlength=count) / drawn.size
    assert abs(share - 1 / count).max() < 0.02


def test_a_batch_larger_than_the_list():
    assert [len(batch) for batch in epoch(DistributedBatchSampler(range(5), batch_size=8))] == [5]
    with pytest.raises(ValueError, match="the list makes no whole batch of 8"):
        DistributedBatchSampler(range(5), batch_size=8, drop_last=True)


# --- Size -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@identity_samplers
def test_a_million_images_of_a_hundred_thousand_identities(sampler, key):
    labels = np.random.default_rng(0).integers(100_000, size=1_000_000)
    drawn = sampler(labels, batch_size=128, **{key: 4})
    batches = np.array([indices(batch) for batch in epoch(drawn)])
    assert batches.shape == (len(drawn), 128) and len(drawn) > 5000
    identities = labels[batches].reshape(len(drawn), 32, 4)
    assert (identities == identities[..., :1]).all()
    assert (np.diff(np.sort(identities[..., 0], 1), axis=1) > 0).all()


@pytest.mark.parametrize("steps", [1, 5, 23])
def test_an_epoch_may_have_any_number_of_batches(steps):
    sampler = DistributedBatchSampler(np.arange(20), 4, shuffle=True)
    sampler.steps = steps
    batches = list(sampler)
    assert len(sampler) == len(batches) == steps and batches == list(sampler)
    drawn = [index for batch in batches for index, _ in batch]
    for first in range(0, 4 * steps, 20):  # pass after pass, each in an order of its own
        assert sorted(drawn[first : first + 20]) == list(range(20)) or first + 20 > 4 * steps
    assert steps < 10 or drawn[:20] != drawn[20:40]
    assert len({seed for batch in batches for _, seed in batch}) == 4 * steps
