"""A batch computed in parts: the same loss and the same gradients as at once, for losses that see the whole batch."""

import pytest
import torch
from torch import nn

from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.losses.pairs import TripletLossV2
from recnb.models.chunks import in_chunks
from recnb.models.heads import AdaMargin, ArcMargin
from recnb.models.recmodel import RecModel


def model(norm=False, dropout=0.0, head=ArcMargin, **args):
    torch.manual_seed(0)
    layers = [
        nn.Conv2d(3, 6, 3),
        *([nn.BatchNorm2d(6)] if norm else []),
        nn.ReLU(),
        nn.Dropout(dropout),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    ]
    return RecModel(nn.Sequential(*layers), nn.Linear(6, 8), head(8, 5, **args))


def batch(count=11, dtype=torch.float64):
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, 3, 8, 8, generator=draw, dtype=dtype), torch.randint(5, (count,), generator=draw)


LOSS = CombinedLoss(
    [(1.0, CELoss(0.1)), (0.5, SupConLoss()), (0.3, SupConLoss(feature_from="backbone")), (2.0, TripletLossV2())]
)


def step(net, x, y, chunk=None, loss=LOSS):
    """(the loss, the gradients) of one batch."""
    net.grad_cache = chunk
    net.zero_grad()
    value = loss(net(x, y), y)
    value.backward()
    return value.detach(), [p.grad for p in net.parameters()]


def assert_same(one, other, **tolerance):
    torch.testing.assert_close(one, other, **tolerance)


@pytest.mark.parametrize("chunk", [1, 2, 4, 10, 11, 100])
def test_the_gradients_are_those_of_the_undivided_batch(chunk):
    net, (x, y) = model().double(), batch()
    assert_same(step(net, x, y, chunk), step(net, x, y), rtol=1e-9, atol=1e-12)


def test_heads_and_frozen_statistics_see_the_batch_once():
    net, (x, y) = model(norm=True, head=AdaMargin, t_alpha=0.3).double(), batch()
    net.backbone[1].running_mean.uniform_(-1, 1)
    net.frozen = ("backbone",)
    net.train()
    start = {key: value.clone() for key, value in net.state_dict().items()}
    whole, after = step(net, x, y), {key: value.clone() for key, value in net.state_dict().items()}
    net.load_state_dict(start)
    assert_same(step(net, x, y, 3), whole, rtol=1e-9, atol=1e-12)
    assert_same(dict(net.state_dict()), after, rtol=1e-12, atol=1e-12)
    assert after["head.mean"] != start["head.mean"]


def test_batch_statistics_are_those_of_each_chunk_and_count_once():
    net, other, (x, y) = model(norm=True).double(), model(norm=True).double(), batch(12)
    value, gradients = step(net, x, y, 4)
    out = [other.embed(piece) for piece in x.split(4)]
    joined = {key: torch.cat([part[key] for part in out]) for key in out[0]}
    wanted = LOSS(joined | {"logits": other.head(joined["features"], y)}, y)
    wanted.backward()
    assert_same((value, gradients), (wanted.detach(), [p.grad for p in other.parameters()]), rtol=1e-9, atol=1e-12)
    assert net.backbone[1].num_batches_tracked == 3
    assert_same(dict(net.state_dict()), dict(other.state_dict()), rtol=0, atol=0)


def test_no_chunk_is_a_single_image_where_it_need_not_be():
    net, (x, y) = model().double(), batch(9)
    net.neck = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 8)).double()
    assert step(net, x, y, 4)[0].isfinite()  # 3, 3 and 3 images; 4, 4 and 1 have no statistics


def test_dropout_is_drawn_anew_and_the_same():
    net, (x, y) = model(dropout=0.5).double(), batch(12)
    torch.manual_seed(3)
    value, gradients = step(net, x, y, 4)
    following = torch.rand(3)
    torch.manual_seed(3)
    out = [net.embed(piece) for piece in x.split(4)]
    joined = {key: torch.cat([part[key] for part in out]) for key in out[0]}
    net.zero_grad()
    wanted = LOSS(joined | {"logits": net.head(joined["features"], y)}, y)
    wanted.backward()
    assert_same((value, gradients), (wanted.detach(), [p.grad for p in net.parameters()]), rtol=1e-9, atol=1e-12)
    assert torch.equal(following, torch.rand(3))


@pytest.mark.parametrize("around", [False, True], ids=["its own autocast", "within autocast"])
def test_half_precision_is_the_same_both_times(around):
    net, (x, y) = model(), batch(12, torch.float32)
    net.precision = None if around else torch.bfloat16
    with torch.autocast("cpu", torch.bfloat16, enabled=around):
        whole = step(net, x, y)
        value, gradients = step(net, x, y, 5)
    assert all(gradient.isfinite().all() and gradient.any() for gradient in gradients)
    assert_same((value, gradients), whole, rtol=2e-2, atol=2e-2 * max(g.abs().max().item() for g in whole[1]))


class Watched(nn.Module):
    """Remembers how many images each call saw, and whether their graph was being made."""

    def __init__(self):
        super().__init__()
        self.layer, self.calls = nn.Linear(4, 2), []

    def forward(self, x):  # (B, 4) -> (B, 2)
        self.calls.append(len(x))
        return {"features": self.layer(x)}


def test_each_chunk_is_computed_twice_and_alone():
    part, x = Watched(), torch.randn(7, 4)
    out = in_chunks(part, x, 3, part)
    assert part.calls == [3, 2, 2]
    out["features"].square().sum().backward()
    assert sorted(part.calls[3:]) == [2, 2, 3]
    part.calls.clear()
    with torch.no_grad():
        in_chunks(part, x, 3, part)
    assert part.calls == [7]  # nothing would be kept in any case
    with pytest.raises(ValueError, match="chunk is 0: one image at least"):
        in_chunks(part, x, 0, part)


@pytest.mark.parametrize("chunk", [None, 4])
def test_the_first_pass_keeps_nothing_for_the_gradients(chunk):
    kept, net, (x, y) = [], model(), batch(16, torch.float32)
    net.grad_cache = chunk
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):
        net(x, y)
    assert (max(kept) >= 16 * 6 * 36) == (chunk is None)  # the maps of all images


def test_a_compiled_model_is_computed_in_chunks_too():
    net, (x, y) = model(), batch(12, torch.float32)
    whole = step(net, x, y)
    torch.compiler.reset()
    net.compile(backend="aot_eager")
    assert_same(step(net, x, y, 4), whole, rtol=1e-4, atol=1e-4)


def test_evaluation_is_not_divided():
    net, (x, _) = model().double(), batch()
    net.grad_cache = 2
    sizes = []
    net.backbone.register_forward_hook(lambda module, given, out: sizes.append(len(out)))
    net.eval()(x)
    assert sizes == [11]
