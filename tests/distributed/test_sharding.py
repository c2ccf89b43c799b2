"""Class weights divided over processes or drawn in part: loss, gradients and steps of one process with all."""

import copy
import math
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from processes import follow, in_processes
from torch import nn

from recnb.distributed.processes import all_rows, gather, share
from recnb.distributed.rows import PartialLogits, collect, draw_rows, sharded_weights, split, step_by_rows
from recnb.losses.combined import CELoss
from recnb.models.chunks import in_chunks
from recnb.models.heads import HEADS, ArcMargin, CosMargin
from recnb.training.optim import clip

CLASSES, STEPS = 11, 3
ARGS = {
    "ArcMargin": {"sub_centers": 2, "margin": {"by": "frequency"}, "class_counts": [1, 50, 3, 7]},
    "CosMargin": {},
    "CircleMargin": {"margin": 0.3, "scale": 16},
    "AdaMargin": {"t_alpha": 0.3},
}
SIZES = {1: [13], 2: [4, 9], 3: [6, 0, 7]}  # rows of each rank's batch
LOSS = CELoss(0.1)


def batch(seed=0):
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(13, 4, generator=draw, dtype=torch.float64)
    return x * torch.linspace(0.1, 30, 13)[:, None], torch.randint(CLASSES, (13,), generator=draw)


class Net(nn.Module):
    """A linear backbone, whose features may be computed in chunks, and a head."""

    grad_cache = None

    def __init__(self, head):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 6), head

    def forward(self, x, y):  # (B, 4), (B,)
        out = in_chunks(lambda x: {"features": self.backbone(x)}, x, self.grad_cache, self)
        return {"logits": self.head(out["features"], y)}


def net(name, **args):
    torch.manual_seed(0)
    return Net(HEADS[name](6, CLASSES, **ARGS[name], **args)).double()


def optimize(model, kind):
    if kind == "AdamW":
        return torch.optim.AdamW(model.parameters(), 0.01)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    optimizer.register_step_pre_hook(partial(clip, 0.1))
    return optimizer


def train(model, optimizer, batches):
    """The losses of some steps."""
    values = []
    for x, y in batches:
        optimizer.zero_grad()
        values.append(LOSS(model(x, y), y))
        follow(values[-1], model.backbone.parameters())
        optimizer.step()
    return torch.stack(values).detach()


def own(x):
    """The rows of this rank's batch."""
    sizes = SIZES[dist.get_world_size()]
    return x.split(sizes)[dist.get_rank()]


def trained(name, kind, chunk):
    """On rank 0 what training a sharded head leaves behind, from the weights of an undivided one."""
    model = net(name, sharded=True)
    model.load_state_dict(split(net(name).state_dict(), sharded_weights(model)))
    model.grad_cache = chunk
    optimizer = optimize(model, kind)
    values = train(model, optimizer, [tuple(map(own, batch(seed))) for seed in range(STEPS)])
    counts, state = sharded_weights(model, optimizer), optimizer.state_dict()
    return values, collect(model.state_dict(), sharded_weights(model)), collect(state["state"], counts)


def one_step(name):
    """(the loss, the gradient of this rank's features over the number of ranks, the gradient of its rows, cosines)."""
    head, whole = net(name, sharded=True).head, net(name).head
    head.load_state_dict(split(whole.state_dict(), sharded_weights(head)))
    x, y = batch()
    features = own(F.pad(x, (0, 2), value=0.5)).clone().requires_grad_()
    value = LOSS({"logits": head(features, own(y))}, own(y))
    value.backward()
    return (
        value.detach(),
        features.grad / dist.get_world_size(),
        head.weight.grad,
        head.eval()(features, own(y)).detach(),
    )


def drawn_part():
    """A step with some of each rank's classes: (loss, all ranks' logits (M, S), own columns, rows with a gradient)."""
    head = net("ArcMargin", sharded=True, sample_rate=0.4).head
    x, y = batch()
    torch.manual_seed(dist.get_rank())
    logits = head(own(F.pad(x, (0, 2))), own(y))
    if dist.get_world_size() == 1:
        assert not logits.sharded
    value = LOSS({"logits": logits}, own(y))
    value.backward()
    columns = torch.cat(all_rows(logits.logits.detach().T)).T
    before = sum(len(part) for part in all_rows(logits.logits.T)[: dist.get_rank()])
    place = torch.where(logits.column >= 0, logits.column + before, 0)
    dist.all_reduce(place)
    return value.detach(), columns, place, head.weight.grad.coalesce().indices()[0] + head.rows.start


def gathered():
    """The gradient of this rank's rows when every rank computes the same loss of all rows."""
    x = own(batch()[0]).clone().requires_grad_()
    rows = gather(x)
    (rows @ rows.T).square().sum().backward()
    return rows.detach(), x.grad / dist.get_world_size()


def found(rank):
    """What one process of a group finds, for all the tests below."""
    with pytest.raises(ValueError, match="there are 0 classes for"):
        share(0)
    found = {
        "start": collect(net("AdaMargin", sharded=True).state_dict(), {"head.weight": range(CLASSES)}),
        "drawn": drawn_part(),
        "gathered": gathered(),
        "step": {name: one_step(name) for name in ARGS},
    }
    for name, kind, chunk in RUNS:
        found[name, kind, chunk] = trained(name, kind, chunk)
    return found


RUNS = [(name, kind, None) for name in ARGS for kind in ("AdamW", "Momentum")] + [("ArcMargin", "AdamW", 2)]


@pytest.fixture(scope="module", params=[1, 2, 3])
def ranks(request):
    """What each process of 1, 2 or 3 found, in their order."""
    return in_processes(request.param, found)


def assert_close(one, other):
    torch.testing.assert_close(one, other, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ARGS)
def test_loss_and_gradients_are_those_of_one_process(ranks, name):
    head, (x, y) = net(name).head, batch()
    features = F.pad(x, (0, 2), value=0.5).requires_grad_()
    loss = LOSS({"logits": head(features, y)}, y)
    loss.backward()
    values, slopes, weights, cosines = zip(*(found["step"][name] for found in ranks), strict=True)
    for value in values:
        assert_close(value, loss.detach())
    assert_close(torch.cat(slopes), features.grad)
    assert [len(part) for part in weights] == [len(share(CLASSES, r, len(ranks))) for r in range(len(ranks))]
    assert_close(torch.cat(weights), head.weight.grad)
    assert_close(torch.cat(cosines), head.eval()(features).detach())


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_training_is_that_of_one_process(ranks, run):
    name, kind, _ = run
    values, state, moments = ranks[0][run]
    model = net(name)
    optimizer = optimize(model, kind)
    assert_close(values, train(model, optimizer, [batch(seed) for seed in range(STEPS)]))
    assert_close(state, dict(model.state_dict()))
    assert_close(moments, optimizer.state_dict()["state"])


def test_how_a_weight_starts_does_not_depend_on_the_ranks(ranks):
    alone = net("AdaMargin", sharded=True).state_dict()
    assert_close(ranks[0]["start"], dict(alone))
    assert not torch.equal(alone["head.weight"][0], alone["head.weight"][1])


def test_one_softmax_over_the_classes_that_the_ranks_drew(ranks):
    y = batch()[1]
    value, logits, place, _ = ranks[0]["drawn"]
    assert_close(value, F.cross_entropy(logits, place, label_smoothing=0.1))
    rows = torch.cat([found["drawn"][3] for found in ranks])
    assert logits.shape[1] == len(rows) < CLASSES + len(ranks) and set(y.tolist()) <= set(rows.tolist())
    assert torch.equal(rows[place], y)
    assert all(torch.equal(found["drawn"][0], value) for found in ranks)


def test_gathered_rows_have_the_gradient_of_all_ranks(ranks):
    x = batch()[0].requires_grad_()
    (x @ x.T).square().sum().backward()
    assert all(torch.equal(found["gathered"][0], x.detach()) for found in ranks)
    assert_close(torch.cat([found["gathered"][1] for found in ranks]), x.grad)


def joined(entries):
    """One entry of a state from those of all ranks."""
    if isinstance(entries[0], dict):
        return {key: joined([entry[key] for entry in entries]) for key in entries[0]}
    return torch.cat(entries) if entries[0].dim() else entries[0]


def test_states_are_divided_anew(monkeypatch):
    model = net("AdaMargin", sharded=True)
    optimizer = optimize(model, "AdamW")
    train(model, optimizer, [batch()])
    for whole, counts in (
        (dict(model.state_dict()), sharded_weights(model)),
        (optimizer.state_dict()["state"], sharded_weights(model, optimizer)),
    ):
        for world in (1, 2, 5, CLASSES):
            parts = []
            for rank in range(world):
                monkeypatch.setattr("recnb.distributed.rows.share", partial(share, rank=rank, world=world))
                parts.append(split(whole, counts))
            together = parts[0] | {key: joined([part[key] for part in parts]) for key in counts}
            torch.testing.assert_close(together, whole, rtol=0, atol=0)
    assert counts == {2: range(CLASSES)} and sharded_weights(net("ArcMargin")) == {}
    assert parts[3][2]["exp_avg"].shape == (1, 6) and parts[3][0]["exp_avg"].shape == (6, 4)
    with pytest.raises(ValueError, match="a state of 11 rows cannot be divided as one of 12 classes"):
        split(whole, {2: range(12)})


def test_every_row_belongs_to_one_rank():
    for count in (3, 10, 1001):
        parts = [share(count, rank, 3) for rank in range(3)]
        assert [i for part in parts for i in part] == list(range(count)) and len({*map(len, parts)}) <= 2
    with pytest.raises(ValueError, match="there are 2 classes for 3 ranks"):
        share(2, 0, 3)


def test_rows_are_drawn_in_blocks():
    def draw(rows):
        torch.manual_seed(0)
        return draw_rows(torch.empty(len(rows), 2), rows, lambda block, generator: block.normal_(generator=generator))

    whole = draw(range(3000))
    assert torch.equal(whole[1000:2500], draw(range(1000, 2500))) and torch.equal(whole[10:20], draw(range(10, 20)))
    assert whole.unique().numel() > 5900 and abs(whole.std() - 1) < 0.05


def sampled(name="ArcMargin", rate=0.4, classes=50, seed=0):
    torch.manual_seed(seed)
    head = HEADS[name](6, classes, **ARGS[name], sample_rate=rate)
    return head, torch.randn(9, 6).requires_grad_(), torch.tensor([3, 7, 7, 49, 0, 3, 12, 30, 31])


@pytest.mark.parametrize("name", ARGS)
def test_a_drawn_part_has_the_logits_of_the_whole(name):
    head, features, y = sampled(name)
    whole = copy.deepcopy(head)
    whole.sample_rate = 1.0
    torch.manual_seed(5)
    part = head(features, y)
    assert isinstance(part, PartialLogits) and part.logits.shape == (9, 20)
    loss = CELoss(0.1)({"logits": part}, y)
    slope, rows = torch.autograd.grad(loss, [features, head.weight])
    drawn = rows.coalesce().indices()[0]
    assert torch.equal(drawn[part.column], y)
    logits = whole(features, y)[:, drawn]
    torch.testing.assert_close(part.logits, logits)
    wanted = F.cross_entropy(logits, part.column, label_smoothing=0.1)
    slope_wanted, dense = torch.autograd.grad(wanted, [features, whole.weight])
    torch.testing.assert_close((loss, slope, rows.to_dense()), (wanted, slope_wanted, dense), rtol=1e-4, atol=1e-5)
    torch.manual_seed(6)
    assert not torch.equal(head(features, y).logits, part.logits)
    torch.manual_seed(5)
    if name != "AdaMargin":  # which has learnt of the batch
        assert torch.equal(head(features, y).logits, part.logits)


def test_the_others_are_drawn_evenly_and_the_present_always():
    head, features, y = sampled(rate=0.3)
    counts = torch.zeros(50)
    for _ in range(2000):
        drawn = torch.autograd.grad(head(features, y).logits.sum(), head.weight)[0].coalesce().indices()[0]
        assert len(drawn) == 15
        counts[drawn] += 1
    present = y.unique()
    assert (counts[present] == 2000).all()
    others = counts[torch.isin(torch.arange(50), present, invert=True)] / 2000
    assert others.mean().item() == pytest.approx(8 / 43, abs=1e-6) and (others - 8 / 43).abs().max() < 0.04
    head.sample_rate = 0.01  # fewer than the batch has
    assert head(features, y).logits.shape == (9, 7)


def test_evaluation_knows_all_classes():
    head, features, y = sampled()
    assert head(features).shape == head.eval()(features, y).shape == (9, 50)


@pytest.mark.parametrize("label", [-1, 50])
@pytest.mark.parametrize("rate", [0.4, 1.0])
def test_a_label_that_is_no_class_is_refused(label, rate):
    head, features, y = sampled(rate=rate)
    y[2] = label
    with pytest.raises((ValueError, IndexError, RuntimeError), match=r"50|bounds"):
        head(features, y)


@pytest.mark.parametrize("rate", [0, -0.1, 1.5])
def test_a_share_that_is_none_is_refused(rate):
    with pytest.raises(ValueError, match=f"sample_rate is {rate}, not a share"):
        CosMargin(6, 5, sample_rate=rate)


def step(optimizer, table, index):
    """None; one step towards 1 of some rows, with a sparse gradient."""
    optimizer.zero_grad()
    (F.embedding(torch.tensor(index), table, sparse=True) - 1).square().sum().backward()
    optimizer.step()


def table():
    return nn.Parameter(torch.randn(5, 3, generator=torch.Generator().manual_seed(0)))


@pytest.mark.parametrize(
    "make",
    [
        lambda p: torch.optim.SGD(p, 0.1, weight_decay=0.1),
        lambda p: torch.optim.SGD(p, 0.1, 0.9, nesterov=True),
        lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.9, weight_decay=0.1),
    ],
    ids=["SGD", "Momentum", "RMSprop"],
)
def test_a_row_is_stepped_when_it_is_used_and_as_if_it_were_alone(make):
    together, alone = table(), [nn.Parameter(row.detach().clone()) for row in table()]
    optimizer, others = make([together]), [make([row]) for row in alone]
    step_by_rows(optimizer)
    for index in ([0, 3], [3, 4], [3], [0, 4]):
        step(optimizer, together, index)
        for i in index:
            others[i].zero_grad()
            (alone[i] - 1).square().sum().backward()
            others[i].step()
        torch.testing.assert_close(together.detach(), torch.stack([row.detach() for row in alone]))
    assert optimizer.param_groups[0]["params"][0] is together and set(optimizer.state) <= {together}


def test_adam_by_rows_is_the_lazy_one_of_torch():
    one, other = table(), table()
    optimizer, lazy = torch.optim.Adam([one], 0.01), torch.optim.SparseAdam([other], 0.01)
    step_by_rows(optimizer)
    for index in ([0, 3], [3, 4], [3], [0, 4]):
        step(optimizer, one, index)
        step(lazy, other, index)
    torch.testing.assert_close(one, other)
    torch.testing.assert_close(optimizer.state[one]["exp_avg_sq"], lazy.state[other]["exp_avg_sq"])
    resumed, again = torch.optim.Adam([other], 0.01), copy.deepcopy(optimizer.state_dict())
    resumed.load_state_dict(again)
    step_by_rows(resumed)
    for part, rows in ((optimizer, one), (resumed, other)):
        step(part, rows, [1, 3])
    torch.testing.assert_close(one, other)


def test_hooks_and_dense_gradients_are_left_as_they_are():
    rows, plain = table(), table()
    optimizer = torch.optim.SGD([{"params": [plain, rows]}], 1.0)
    step_by_rows(optimizer)

    def halve(*_):
        for p in optimizer.param_groups[0]["params"]:
            p.grad = p.grad / 2

    optimizer.register_step_pre_hook(halve)
    plain.square().sum().backward()
    F.embedding(torch.tensor([2, 2, 1]), rows, sparse=True).square().sum().backward()
    optimizer.step()
    assert plain.eq(0).all() and rows[1].eq(0).all() and torch.equal(rows[[0, 3, 4]], table()[[0, 3, 4]])
    torch.testing.assert_close(rows[2], -table()[2])  # used twice


def test_a_step_that_fails_leaves_the_real_table():
    rows = table()
    optimizer = torch.optim.SGD([rows], 0.1, 0.9)
    step_by_rows(optimizer)

    def fail(*_):
        once.remove()
        raise MemoryError

    once = optimizer.register_step_pre_hook(fail)
    with pytest.raises(MemoryError):
        step(optimizer, rows, [1, 3])
    assert optimizer.param_groups[0]["params"][0] is rows and torch.equal(rows, table())
    step(optimizer, rows, [1, 3])
    assert (rows != table()).any(1).tolist() == [False, True, False, True, False]


def test_sharded_rows_start_with_the_deviation_of_all_classes():
    head = ArcMargin(4, 10_000, sharded=True)
    assert head.weight.std().item() == pytest.approx(math.sqrt(2 / 10_004), rel=0.05)
