"""Losses that remember: the ring against a list, the losses over it against plain loops, moving centres."""

import numpy as np
import pytest
import torch

from recnb.losses.memories import CenterLoss, ContrastiveLoss_XBM, CrossBatchMemory, TripletAngularMarginLoss_XBM
from recnb.recipe.objective import build_loss


def batches(sizes, dimensions=4, labels=3, seed=0):
    draw = np.random.default_rng(seed)
    for size in sizes:
        y = torch.from_numpy(draw.integers(0, labels, size))
        yield torch.from_numpy(draw.normal(size=(size, dimensions))).float().requires_grad_(), y


@pytest.mark.parametrize("size", [1, 5, 7, 100])
def test_the_memory_holds_the_last_rows(size):
    memory, seen = CrossBatchMemory(size, 4), []
    for x, y in batches([3, 3, 2, 6, 1, 9]):  # among them one longer than the smaller memories
        memory.add(x, y)
        seen += [(tuple(row), int(label)) for row, label in zip(x.detach().tolist(), y, strict=True)]
        features, labels = memory.written()
        assert sorted(zip(map(tuple, features.tolist()), labels.tolist(), strict=True)) == sorted(seen[-size:])
        assert not features.requires_grad


def test_a_memory_goes_on_where_its_state_stopped():
    one, other = CrossBatchMemory(7, 4), CrossBatchMemory(7, 4)
    steps = list(batches([3, 3, 2, 4]))
    for x, y in steps[:3]:
        one.add(x, y)
    other.load_state_dict(one.state_dict())
    for memory in (one, other):
        memory.add(*steps[3])
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


def unit(rows):
    return rows / np.linalg.norm(rows, axis=1, keepdims=True)


def plain_contrastive(x, y, others, labels, margin=0.5):
    total = 0
    for row, label in zip(x, y, strict=True):
        for other, its in zip(others, labels, strict=True):
            s = row @ other
            total += (1 - s) * (s < 1 - 1e-5) if its == label else s * (s > margin)
    return total / len(x)


def plain_angular(x, y, others, labels, margin=0.5, own=False):
    terms = []
    for i, (row, label) in enumerate(zip(x, y, strict=True)):
        near = [row @ other for other, its in zip(others, labels, strict=True) if its != label]
        far = [
            row @ other
            for j, (other, its) in enumerate(zip(others, labels, strict=True))
            if its == label and not (own and i == j)
        ]
        if near and far:
            terms.append(max(0, max(near) - min(far) + margin))
    return sum(terms) / len(terms) if terms else 0


@pytest.mark.parametrize(
    ("make", "plain"),
    [
        (lambda: ContrastiveLoss_XBM(10, 4, 0.7, 2), plain_contrastive),
        (lambda: TripletAngularMarginLoss_XBM(2, 10, 0.7, 4), plain_angular),
    ],
    ids=["contrastive", "triplet"],
)
def test_losses_across_batches_are_the_plain_loops(make, plain):
    loss, kept = make(), []
    for step, (x, y) in enumerate(batches([4, 5, 4, 4, 6])):
        rows, labels = unit(x.detach().double().numpy()), y.tolist()
        wanted = plain(rows, labels, rows, labels, **({"own": True} if plain is plain_angular else {}))
        if step >= 2:  # only now the memory is filled and used
            kept = [*kept, *zip(rows, labels, strict=True)][-10:]
            wanted += 0.7 * plain(rows, labels, [row for row, _ in kept], [label for _, label in kept])
        value = loss({"features": x}, y)
        assert value.item() == pytest.approx(wanted, abs=1e-5)
        value.backward()
        assert x.grad.isfinite().all()


def test_evaluation_neither_fills_nor_uses_the_memory():
    loss = ContrastiveLoss_XBM(10, 4, 1.0, 0)
    (x, y), (other, _) = batches([4, 4])
    loss.train()({"features": x}, y)
    before = {key: value.clone() for key, value in loss.state_dict().items()}
    alone = loss.loss({"features": other}, y)
    assert torch.equal(loss.eval()({"features": other}, y), alone)
    assert all(torch.equal(value, before[key]) for key, value in loss.state_dict().items())


def test_centres_move_towards_their_features():
    torch.manual_seed(0)
    loss, y = CenterLoss(5, 4), torch.tensor([0, 0, 3])
    x = torch.randn(3, 4)
    wanted = sum(((x[i] - loss.centers[label]) ** 2).sum() for i, label in enumerate(y)) / 3
    value = loss({"features": x}, y)
    assert value.item() == pytest.approx(wanted.item(), rel=1e-6)
    value.backward()
    assert loss.centers.grad[[1, 2, 4]].eq(0).all() and loss.centers.grad[[0, 3]].ne(0).any(1).all()


def test_sizes_are_filled_in_or_compared():
    cfg = {"Arch": {}, "Loss": {"Train": [{"CenterLoss": {"weight": 1.0, "feature_from": "backbone"}}]}}
    (loss,) = build_loss(cfg, classes=6, sizes={"backbone": 9, "features": 4}).losses
    assert loss.centers.shape == (6, 9)
    cfg["Loss"]["Train"][0]["CenterLoss"]["num_classes"] = 751  # a smoke run on a part of the identities
    (loss,) = build_loss(cfg, classes=6, sizes={"backbone": 9, "features": 4}).losses
    assert loss.centers.shape == (751, 9)
    cfg["Loss"]["Train"][0]["CenterLoss"]["num_classes"] = 5
    with pytest.raises(ValueError, match="num_classes is 5, but the training identities are 6"):
        build_loss(cfg, classes=6, sizes={"backbone": 9, "features": 4})
