"""Losses: the original's numbers, plain loops for batches of any make-up, and the weighted sum."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import recnb.losses.memories  # noqa: F401 (CenterLoss)
from recnb.losses import hashing, pairs
from recnb.losses.combined import LOSSES, CELoss, CombinedLoss, SupConLoss
from recnb.recipe.objective import build_loss
from recnb.registry import ConfigError

DATA = Path(__file__).parents[1] / "data"
ARRAYS = np.load(DATA / "oracle.npz")
CASES = [case for case in json.loads((DATA / "oracle.json").read_text()) if case["kind"] == "loss"]
# With add_absolute the original adds 1 for each anchor whose negatives are far enough: absolute_loss_weight 0.1 times
# the share of those anchors (24 of 32), a constant.
OFFSETS = {"loss/5": 0.075}
BATCHES = {
    "in order": [0, 0, 0, 1, 1, 1, 2, 2, 2],
    "mixed": [2, 0, 1, 0, 2, 1, 1, 0, 2],
    "uneven": [5, 1, 5, 5, 3, 1, 5, 3, 5, 5],
    "some once": [4, 0, 1, 0, 2, 3, 0],
    "one identity": [7, 7, 7, 7],
    "a pair": [1, 1],
}


def batch(labels, seed=0, size=6):
    features = torch.randn(len(labels), size, generator=torch.Generator().manual_seed(seed))
    return features.requires_grad_(), torch.tensor(labels)


def plain_supcon(
    features, labels, temperature=0.07, base_temperature=0.07, contrast_mode="all", normalize_feature=True
):
    rows = [x / math.sqrt((x * x).sum()) if normalize_feature else x for x in np.asarray(features, np.float64)]
    terms = []
    for i, anchor in enumerate(rows):
        others = [j for j in range(len(rows)) if j != i]
        positives = [j for j in others if labels[j] == labels[i]]
        if not positives or (contrast_mode == "one" and min(positives) < i):
            continue
        s = {j: anchor @ rows[j] / temperature for j in others}
        log_sum = max(s.values()) + math.log(sum(math.exp(s[j] - max(s.values())) for j in others))
        terms.append(-sum(s[j] - log_sum for j in positives) / len(positives) * temperature / base_temperature)
    return sum(terms) / len(terms) if terms else 0.0


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case['name']}-{case['key'][5:]}")
def test_the_losses_are_the_original(case, device):
    arrays = {
        name: torch.from_numpy(ARRAYS[f"{case['key']}/{name}"]).to(device)
        for name in ("features", "labels", "logits")
        if f"{case['key']}/{name}" in ARRAYS
    }
    labels = arrays.pop("labels")
    for given in arrays.values():
        given.requires_grad_()
    part = LOSSES[case["name"]](**case["args"]).to(device)
    part.load_state_dict({key: torch.from_numpy(ARRAYS[f"{case['key']}/{key}"]) for key in part.state_dict()})
    loss = part(arrays, labels)
    loss.backward()
    assert loss.item() + OFFSETS.get(case["key"], 0) == pytest.approx(case["value"], rel=1e-5)
    for name, given in arrays.items():
        if f"{case['key']}/grad_{name}" in ARRAYS:
            wanted = torch.from_numpy(ARRAYS[f"{case['key']}/grad_{name}"]) / (2 if case["name"] == "MSMLoss" else 1)
            torch.testing.assert_close(given.grad.cpu(), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("epsilon", [None, 0.0, 0.1, 0.5])
def test_ce_loss_is_the_plain_loop(epsilon):
    logits, y = 4 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0)), [3, 0, 6, 2, 2]
    wanted = 0
    for row, label in zip(logits.double().numpy(), y, strict=True):
        log_p = row - math.log(sum(math.exp(v) for v in row))
        target = [(epsilon or 0) / 7 + (1 - (epsilon or 0)) * (j == label) for j in range(7)]
        wanted -= sum(t * p for t, p in zip(target, log_p, strict=True)) / 5
    assert CELoss(epsilon)({"logits": logits}, torch.tensor(y)).item() == pytest.approx(wanted, rel=1e-6)


@pytest.mark.parametrize(
    "args",
    [
        {},
        {"temperature": 0.2},
        {"temperature": 0.2, "base_temperature": 0.5},
        {"contrast_mode": "one"},
        {"normalize_feature": False, "temperature": 1.0},
    ],
    ids=str,
)
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
def test_supcon_is_the_plain_loop(labels, args):
    for seed in range(3):
        features, y = batch(labels, seed)
        value = SupConLoss(**args)({"features": features}, y).item()
        assert value == pytest.approx(plain_supcon(features.detach(), labels, **args), rel=1e-5, abs=1e-6)


@pytest.mark.parametrize("args", [{"temperature": 0.3}, {"temperature": 0.3, "contrast_mode": "one"}], ids=str)
def test_supcon_slopes_as_the_plain_loop(args):
    labels = BATCHES["some once"]
    features, y = batch(labels, size=3)
    SupConLoss(**args)({"features": features}, y).backward()
    moved = features.detach().double().numpy()
    for at in np.ndindex(*moved.shape):
        values = []
        for step in (1e-5, -1e-5):
            moved[at] += step
            values.append(plain_supcon(moved, labels, **args))
            moved[at] -= step
        assert features.grad[at].item() == pytest.approx((values[0] - values[1]) / 2e-5, rel=1e-3, abs=1e-4)


def test_supcon_of_random_make_ups_and_orders():
    draw = np.random.default_rng(0)
    for seed in range(20):
        labels = draw.integers(0, 6, size=draw.integers(1, 14)).tolist()
        features, y = batch(labels, seed)
        loss = SupConLoss()({"features": features}, y)
        assert loss.item() == pytest.approx(plain_supcon(features.detach(), labels), rel=1e-5, abs=1e-6)
        order = torch.from_numpy(draw.permutation(len(labels)))
        again = SupConLoss()({"features": features[order]}, y[order])
        assert again.item() == pytest.approx(loss.item(), rel=1e-5, abs=1e-7)
        gradient, permuted = (torch.autograd.grad(value, features)[0] for value in (loss, again))
        torch.testing.assert_close(gradient, permuted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("labels", [[3], [0, 1, 2, 3]], ids=["batch of one", "no positives"])
@pytest.mark.parametrize("args", [{}, {"contrast_mode": "one"}, {"normalize_feature": False}], ids=str)
def test_supcon_without_a_positive_is_zero(labels, args):
    features, y = batch(labels)
    loss = SupConLoss(**args)({"features": features}, y)
    loss.backward()
    assert loss.item() == 0 and features.grad.eq(0).all()


def test_supcon_leaves_an_identity_seen_once_to_the_negatives():
    features, y = batch([0, 0, 1, 1, 2])
    alone = SupConLoss()({"features": features[:4]}, y[:4])
    loss = SupConLoss()({"features": features}, y)
    loss.backward()
    assert loss > alone and features.grad[4].ne(0).any()


def test_supcon_survives_zero_and_equal_features():
    features, y = batch([0, 0, 1, 1])
    with torch.no_grad():
        features[0] = 0
        features[3] = features[2]
    loss = SupConLoss(temperature=0.01)({"features": features}, y)
    loss.backward()
    assert loss.isfinite() and features.grad.isfinite().all()


def test_supcon_ignores_views_and_reads_the_entry_it_is_told():
    features, y = batch(BATCHES["mixed"])
    loss = SupConLoss(views=16)({"features": features}, y)
    assert torch.equal(loss, SupConLoss(views=2)({"features": features}, y))
    maps = {"features": torch.zeros_like(features), "backbone": features[:, :, None, None]}
    assert torch.equal(loss, SupConLoss(feature_from="backbone")(maps, y))
    with pytest.raises(ValueError, match="contrast_mode is 'both'"):
        SupConLoss(contrast_mode="both")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_losses_are_float32_under_autocast_and_for_half_inputs(dtype):
    features, y = batch(BATCHES["uneven"], size=8)
    out = {"features": features, "logits": features}
    for loss in (CELoss(0.1), SupConLoss(), SupConLoss(normalize_feature=False, temperature=1.0)):
        with torch.autocast("cpu", dtype=dtype):
            value = loss(out, y)
        assert value.dtype == torch.float32 and value.item() == pytest.approx(loss(out, y).item(), rel=1e-6)
        half = {name: x.to(dtype) for name, x in out.items()}
        rounded = {name: x.float() for name, x in half.items()}
        assert torch.equal(loss(half, y), loss(rounded, y))


def test_a_single_loss_is_weighted():
    features, y = batch(BATCHES["mixed"])
    out, plain = {"features": features}, SupConLoss()({"features": features}, y)
    combined = CombinedLoss([(0.25, SupConLoss())])
    assert combined(out, y).item() == pytest.approx(0.25 * plain.item())
    assert combined.terms == {"SupConLoss": plain.detach()} and not combined.terms["SupConLoss"].requires_grad


def test_terms_of_one_class_are_all_kept():
    features, y = batch(BATCHES["mixed"])
    logits = torch.randn(len(y), 3, generator=torch.Generator().manual_seed(1)).requires_grad_()
    out = {"features": features, "logits": logits}
    losses = [(1.0, SupConLoss()), (2.0, CELoss()), (0.5, SupConLoss(temperature=0.5)), (0.0, SupConLoss())]
    combined = CombinedLoss(losses)
    total = combined(out, y)
    assert combined.names == ["SupConLoss", "CELoss", "SupConLoss_2", "SupConLoss_3"] == list(combined.terms)
    values = [loss(out, y) for _, loss in losses]
    assert [v.item() for v in combined.terms.values()] == pytest.approx([v.item() for v in values])
    assert total.item() == pytest.approx(sum(w * v.item() for (w, _), v in zip(losses, values, strict=True)))
    by_hand = values[0] + 2 * F.cross_entropy(logits, y) + values[2] / 2
    for given, wanted in zip(
        torch.autograd.grad(total, [features, logits]), torch.autograd.grad(by_hand, [features, logits]), strict=True
    ):
        torch.testing.assert_close(given, wanted)


def test_parameters_of_a_loss_belong_to_the_sum():
    loss = SupConLoss()
    loss.scale = nn.Parameter(torch.ones(()))
    assert list(CombinedLoss([(1.0, loss)]).state_dict()) == ["losses.0.scale"]


def config(*terms, head=True):
    return {"Arch": {"Head": {"name": "ArcMargin"}} if head else {}, "Loss": {"Train": list(terms)}}


def test_build_loss_reads_weights_and_arguments():
    loss = build_loss(
        config({"CELoss": {"weight": 2, "epsilon": 0.1}}, {"SupConLoss": {"temperature": 0.5}}, {"SupConLoss": None})
    )
    assert loss.weights == [2.0, 1.0, 1.0] and loss.names == ["CELoss", "SupConLoss", "SupConLoss_2"]
    assert loss.losses[0].epsilon == 0.1 and loss.losses[1].temperature == 0.5


@pytest.mark.parametrize(
    ("cfg", "message"),
    [
        (config({"CELoss": {}}, head=False), r"Loss\.Train\.0\.CELoss: CELoss needs logits, and Arch\.Head"),
        (
            config({"CELoss": {"weight": "much"}}),
            r"Loss\.Train\.0\.CELoss\.weight: 'much' is a str, CELoss wants float",
        ),
        (config({"CELos": {}}), r"there is no loss 'CELos'; did you mean 'CELoss'"),
        (config({"SupConLoss": {"temprature": 1.0}}), r"SupConLoss\.temprature: .* did you mean 'temperature'"),
        (config({"SupConLoss": {"contrast_mode": "both"}}), r"Loss\.Train\.0\.SupConLoss: contrast_mode is 'both'"),
    ],
    ids=["no head", "weight", "name", "argument", "value"],
)
def test_build_loss_refuses(cfg, message):
    with pytest.raises(ConfigError, match=message):
        build_loss(cfg)


def plain_masks(labels):
    """For each row that has both: (row, its positives, its negatives)."""
    for i, label in enumerate(labels):
        positives = [j for j in range(len(labels)) if labels[j] == label and j != i]
        negatives = [j for j in range(len(labels)) if labels[j] != label]
        if positives and negatives:
            yield i, positives, negatives


def plain_pairs(name, x, labels):
    """The value of a pair loss by loops over anchors, at the arguments of PAIRS."""
    unit = [row / np.linalg.norm(row) for row in x]
    raw = name in ("TripletLoss", "EmlLoss")
    d = {
        (i, j): np.linalg.norm((x if raw else unit)[i] - (x if raw else unit)[j])
        for i in range(len(x))
        for j in range(len(x))
    }
    s = {(i, j): unit[i] @ unit[j] for i, j in d}
    terms, fars, nears = [], [], []
    for i, positives, negatives in plain_masks(labels):
        far, near = max(d[i, j] for j in positives), min(d[i, j] for j in negatives)
        fars, nears = [*fars, far], [*nears, near]
        if name in ("TripletLoss", "TripletLossV2"):
            terms.append(max(far - near + (1.0 if name == "TripletLoss" else 0.5), 0))
        elif name == "TripletAngularMarginLoss":
            terms.append(max(max(s[i, j] for j in negatives) - min(s[i, j] for j in positives) + 0.5, 0))
        elif name == "TriHardLoss":
            terms.append(max(far**2 - near**2 + 0.1, 0))
        elif name == "PairwiseCosface":
            p, n = (
                math.log(sum(map(math.exp, values)))
                for values in ([-8 * s[i, j] for j in positives], [8 * (s[i, j] + 0.3) for j in negatives])
            )
            terms.append(math.log1p(math.exp(p + n)))
        elif name == "EmlLoss":
            t = np.mean([math.exp(near**2 - d[i, j] ** 2) for j in negatives])
            t *= np.mean([math.exp(d[i, j] ** 2 - far**2) for j in positives])
            gap = far**2 - near**2
            small = math.log1p(1e5 * t * math.exp(min(gap, 20)))
            terms.append((small if gap <= 20 else math.log(t) + gap + math.log(1e5)) / math.log1p(1e5))
    if name == "MSMLoss":
        return max(max(fars) ** 2 - min(nears) ** 2 + 0.1, 0) if fars else 0.0
    if name == "ContrastiveLoss":
        near = sum(1 - s[i, j] for i, j in s if labels[i] == labels[j] and s[i, j] < 1 - 1e-5)
        return (near + sum(v for (i, j), v in s.items() if labels[i] != labels[j] and v > 0.5)) / len(x)
    return float(np.mean(terms)) if terms else 0.0


PAIRS = {
    "TripletLoss": {},
    "TripletLossV2": {},
    "TripletAngularMarginLoss": {},
    "TriHardLoss": {},
    "MSMLoss": {},
    "EmlLoss": {},
    "ContrastiveLoss": {},
    "PairwiseCosface": {"margin": 0.3, "gamma": 8},
}
CODES = {"NpairsLoss": {}, "DSHSDLoss": {"alpha": 0.1}, "LCDSHLoss": {}, "DCHLoss": {"gamma": 20.0, "_lambda": 0.1}}


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", PAIRS)
def test_the_pair_losses_are_the_plain_loop(name, labels):
    for seed in range(3):
        features, y = batch(labels, seed)
        loss = LOSSES[name](**PAIRS[name])({"features": features}, y)
        assert loss.item() == pytest.approx(plain_pairs(name, features.detach().double().numpy(), labels), abs=1e-5)
        loss.backward()
        assert features.grad.isfinite().all()


@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", [*PAIRS, *CODES])
def test_no_pair_loss_depends_on_the_order_of_the_batch(name, labels):
    features, y = batch(labels)
    logits, order = torch.zeros(len(labels), 9, requires_grad=True), torch.arange(len(labels)).roll(2)
    if name == "NpairsLoss":  # which rows make a pair follows their order within the identity
        order = torch.argsort(y, stable=True)
    loss = LOSSES[name](**{**PAIRS, **CODES}[name])
    first = loss({"features": features, "logits": logits}, y)
    second = loss({"features": features[order], "logits": logits[order]}, y[order])
    assert first.item() == pytest.approx(second.item(), rel=1e-5, abs=1e-6)
    first.backward()
    assert features.grad.isfinite().all()


def test_each_registered_loss_of_these_chapters_is_among_them():
    made = {name for name, part in LOSSES.items() if part.__module__ in (pairs.__name__, hashing.__name__)}
    assert made == {*PAIRS, *CODES}


CHUNKED = {
    "SupConLoss": {},
    "SupConLoss one": {"contrast_mode": "one"},
    "TripletLoss": {},
    "TripletLossV2": {},
    "TripletAngularMarginLoss": {"add_absolute": True},
    "PairwiseCosface": {"margin": 0.3, "gamma": 8},
}


@pytest.mark.parametrize("chunk", [1, 3, 4, 100])
@pytest.mark.parametrize("labels", BATCHES.values(), ids=BATCHES)
@pytest.mark.parametrize("name", CHUNKED)
def test_in_blocks_of_rows_value_and_gradient_are_the_same(name, labels, chunk):
    features, y = batch(labels)
    features = features.detach().double().requires_grad_()
    values = [LOSSES[name.split()[0]](**CHUNKED[name], chunk=size)({"features": features}, y) for size in (None, chunk)]
    whole, blocks = (torch.autograd.grad(value, features)[0] for value in values)
    assert values[0].dtype == torch.float64
    torch.testing.assert_close(values[1], values[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(blocks, whole, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", CHUNKED)
def test_in_blocks_no_matrix_of_the_whole_batch_is_kept(name):
    kept, features, y = [], torch.randn(64, 4, requires_grad=True), torch.arange(64) % 16
    for chunk in (None, 8):
        with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
            LOSSES[name.split()[0]](**CHUNKED[name], chunk=chunk)({"features": features}, y)
        assert (max(kept) >= 64 * 64) == (chunk is None)
        kept.clear()


def test_a_block_of_no_rows_is_refused():
    features, y = batch(BATCHES["mixed"])
    with pytest.raises(ValueError, match="chunk is 0: a block has one row at least"):
        SupConLoss(chunk=0)({"features": features}, y)
