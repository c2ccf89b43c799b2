"""Batches of P identities x K images, drawn as whole epochs from a seed.

Each sampler here is a batch sampler: iterating gives lists of `(index, seed)`, one list a batch. The seed belongs to
that place in that epoch, so that its augmentation is the same whichever worker process makes it, and another one where
an image is repeated. `len()` is exact, and an epoch depends on `(seed, epoch)` alone. N ranks with a batch_size of B
draw the epoch of one with N x B, and each takes its part of every batch.
"""

from bisect import bisect_left
from collections.abc import Callable, Iterator, Sequence
from itertools import count, islice
from typing import Literal

import numpy as np
from torch.utils.data import Sampler

from recnb.registry import Count, Registry

SAMPLERS = Registry("sampler")


class EpochSampler(Sampler):
    """Batches of (index, seed) of one rank, from a function that draws a whole epoch.

    `draw(rng)` returns the index arrays of at least `length` batches of all ranks together; each takes an equal part.
    Raises ValueError where an epoch has not one.
    """

    def __init__(self, draw: Callable, length: int, batch_size: int, seed: int, rank: int, world_size: int):
        if length < 1:
            raise ValueError(f"the list makes no whole batch of {batch_size} for each of {world_size} processes")
        self.draw, self.length, self.batch_size = draw, length, batch_size
        self.seed, self.rank, self.world_size, self.epoch = seed, rank, world_size, 0
        self.steps: int | None = None  # how many batches an epoch has, where it is not one pass
        self.first = 0  # how many batches an iteration leaves out

    def set_epoch(self, epoch: int) -> None:
        """The next iteration draws this epoch."""
        self.epoch = epoch

    def __len__(self) -> int:
        return self.steps or self.length

    def __iter__(self):
        return islice((batch for again in count() for batch in self.one_pass(again)), self.first, len(self))

    def one_pass(self, again: int) -> Iterator[list[tuple[int, int]]]:
        """The batches of the first pass of the epoch, or of a pass `again` behind it."""
        rng = np.random.default_rng([self.seed, self.epoch, *[again] * (again > 0)])
        batches = self.draw(rng)
        seeds = rng.integers(2**62, size=(len(batches), self.batch_size * self.world_size))
        for batch, seed in zip(batches[: self.length], seeds[: self.length], strict=True):
            each = len(batch) // self.world_size
            own = slice(self.rank * each, (self.rank + 1) * each)
            yield list(zip(batch[own].tolist(), seed[own].tolist(), strict=False))  # the last batch may be shorter


class Identities:
    """The images of each identity in a label array: how many, and in random order within each."""

    def __init__(
        self, labels: Sequence[int] | np.ndarray, batch_size: int, per_identity: int, key: str, world_size: int
    ):
        self.labels = np.asarray(labels)
        if per_identity < 1 or batch_size < 1 or batch_size % per_identity:
            raise ValueError(f"batch_size {batch_size} is not divisible by {key} {per_identity}")
        self.per_batch = batch_size * world_size // per_identity
        ids, self.counts = np.unique(self.labels, return_counts=True)
        if len(ids) < self.per_batch:
            each = f" in each of {world_size} processes" * (world_size > 1)
            raise ValueError(
                f"a batch of {batch_size}{each} needs {self.per_batch} identities ({key} {per_identity}), "
                f"the training list has {len(ids)}; lower batch_size or raise {key}"
            )
        self.start = np.cumsum(self.counts) - self.counts
        self.sorted = np.argsort(self.labels, kind="stable")  # identity i begins at start[i]

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        """All indices, sorted by identity and in random order within each: identity i begins at start[i]."""
        return np.lexsort((rng.random(len(self.labels)), self.labels))


@SAMPLERS.register
def DistributedRandomIdentitySampler(
    labels: Sequence[int] | np.ndarray,
    batch_size: Count,
    num_instances: Count,
    drop_last: bool = False,
    shuffle: bool = True,
    max_iters: int | None = None,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> EpochSampler:
    """Each identity's images in groups of `num_instances`, each batch made of groups of different identities.

    An epoch uses every group that can be placed: an identity with fewer than `num_instances` images is filled up by
    drawing some of them again, left-over images wait for another epoch. Unlike in the original, the number of batches
    does not depend on the draw.
    """
    ids = Identities(labels, batch_size, num_instances, "num_instances", world_size)
    groups = np.maximum(ids.counts // num_instances, 1)
    batches = most_batches(groups, ids.per_batch)

    def draw(rng: np.random.Generator) -> np.ndarray:
        identity, nth = deal_groups(np.minimum(groups, batches), batches * ids.per_batch, rng)
        place = nth[:, None] * num_instances + np.arange(num_instances)  # (groups, K) within the identity
        count = ids.counts[identity][:, None]
        place = np.where(place < count, place, rng.integers(count, size=place.shape))
        images = ids.shuffled(rng)[ids.start[identity][:, None] + place]
        # Dealing an identity's groups to successive batches keeps them apart: it has at most one for each batch.
        dealt = images.reshape(ids.per_batch, batches, -1).transpose(1, 0, 2).reshape(batches, -1)
        return dealt[rng.permutation(batches)]

    return EpochSampler(draw, min(batches, max_iters or batches), batch_size, seed, rank, world_size)


def most_batches(groups: np.ndarray, per_batch: int) -> int:
    """The largest T for which T batches of distinct identities can be filled: sum(min(groups, T)) >= T * per_batch."""
    counts = range(1, int(groups.sum()) // per_batch + 1)
    return max(1, bisect_left(counts, True, key=lambda T: np.minimum(groups, T).sum() < T * per_batch))


def deal_groups(taken: np.ndarray, wanted: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Return (identity, n-th group of it) of `wanted` groups, identities in random order.

    Args:
        taken: (identities,) how many groups each offers.
        wanted: how many to take; the surplus is dropped at random.
        rng: what draws them.
    """
    surplus = rng.permutation(np.repeat(np.arange(len(taken)), taken))[wanted:]
    taken = taken - np.bincount(surplus, minlength=len(taken))
    order = rng.permutation(len(taken))
    first = np.cumsum(taken[order]) - taken[order]
    return np.repeat(order, taken[order]), np.arange(wanted) - np.repeat(first, taken[order])


@SAMPLERS.register
def PKSampler(
    labels: Sequence[int] | np.ndarray,
    batch_size: Count,
    sample_per_id: Count,
    sample_method: Literal["sample_avg_prob", "id_avg_prob"] = "sample_avg_prob",
    id_list: list | None = None,
    ratio: list | None = None,
    drop_last: bool = True,
    shuffle: bool = True,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> EpochSampler:
    """P identities drawn without replacement, `sample_per_id` images of each.

    `sample_method` weighs the draw: `sample_avg_prob` by the number of images, `id_avg_prob` evenly. `id_list`, pairs
    of a first and a last identity counted from 0 in sorted order, and `ratio`, one number for each pair, make these
    identities that many times as probable (of pairs that overlap, the first counts). The images of an identity are
    drawn anew each time, without repetition; one with fewer than `sample_per_id` repeats some. An epoch has as many
    batches as the list has whole ones.
    """
    ids = Identities(labels, batch_size, sample_per_id, "sample_per_id", world_size)
    weights = ids.counts if sample_method == "sample_avg_prob" else np.ones(len(ids.counts))
    cumulative = np.cumsum(weights * ratios(len(ids.counts), id_list or [], ratio or []))
    cumulative = cumulative / cumulative[-1]
    length = max(1, len(ids.labels) // (batch_size * world_size))

    def draw(rng: np.random.Generator) -> np.ndarray:
        identity = np.concatenate([distinct(cumulative, ids.per_batch, rng) for _ in range(length)])
        images = ids.start[identity][:, None] + picks(ids.counts[identity], sample_per_id, rng)
        return ids.sorted[images].reshape(length, -1)

    return EpochSampler(draw, length, batch_size, seed, rank, world_size)


def picks(counts: np.ndarray, each: int, rng: np.random.Generator) -> np.ndarray:
    """Return (rows, each) random numbers below each row's count, repeated only once all of them have been drawn.

    Args:
        counts: (rows,) how many numbers there are for a row.
        each: how many to draw.
        rng: what draws them.
    """
    chosen = np.empty((len(counts), each), int)
    for j in range(each):
        before = j % counts  # how many this round has drawn already: these are stepped over
        number = (rng.random(len(counts)) * (counts - before)).astype(int)
        taken = np.where(np.arange(j) >= (j - before)[:, None], chosen[:, :j], np.iinfo(int).max)
        for other in np.sort(taken, axis=1).T:
            number += number >= other
        chosen[:, j] = number
    return chosen


def ratios(identities: int, id_list: list[int], ratio: list[float]) -> np.ndarray:
    """Return (identities,) how many times as often as by default each is drawn.

    Args:
        identities: how many there are.
        id_list: the first and the last identity of each range, one after another.
        ratio: how many times as often each range is drawn.

    Raises:
        ValueError: They are no ranges of identities with a positive number each.
    """
    if len(id_list) != 2 * len(ratio) or not all(number > 0 for number in ratio):
        raise ValueError(
            f"id_list {id_list} needs the first and the last identity for each number of ratio {ratio}, "
            "and these must be positive"
        )
    factors = np.ones(identities)
    for first, last, times in reversed(list(zip(id_list[::2], id_list[1::2], ratio, strict=True))):
        if not 0 <= first <= last < identities:
            raise ValueError(
                f"id_list has the identities {first} to {last}, and the training list those from 0 to "
                f"{identities - 1}; it was made for another list: correct it, or leave out id_list and "
                "ratio"
            )
        factors[first : last + 1] = times
    return factors


def distinct(cumulative: np.ndarray, count: int, rng: np.random.Generator) -> np.ndarray:
    """Return distinct numbers; drawing again what was drawn before equals drawing without replacement.

    Args:
        cumulative: (N,) the sums of the numbers' probabilities.
        count: how many to draw.
        rng: what draws them.
    """
    chosen, tries = np.empty(0, int), count
    while len(chosen) < count:
        tries *= 2  # where few identities hold most images, the others take many
        chosen = np.concatenate([chosen, np.searchsorted(cumulative, rng.random(tries), side="right")])
        chosen = chosen[np.sort(np.unique(chosen, return_index=True)[1])]
    return chosen[:count]


@SAMPLERS.register
def DistributedBatchSampler(
    labels: Sequence[int] | np.ndarray,
    batch_size: Count,
    drop_last: bool = False,
    shuffle: bool = False,
    seed: int = 0,
    rank: int = 0,
    world_size: int = 1,
) -> EpochSampler:
    """The whole list in batches, shuffled or in order, the last of them shorter unless it is dropped.

    Several ranks take equal parts of it: where it does not divide, the first images of the epoch are repeated.
    """
    items, whole = len(labels), batch_size * world_size
    length = items // whole + (items % whole > 0 and not drop_last)

    def draw(rng: np.random.Generator) -> list[np.ndarray]:
        indices = rng.permutation(items) if shuffle else np.arange(items)
        indices = np.resize(indices, -(-items // world_size) * world_size)  # which begins again at its end
        return [indices[i : i + whole] for i in range(0, items, whole)]

    return EpochSampler(draw, length, batch_size, seed, rank, world_size)
