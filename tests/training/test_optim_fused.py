"""The fused kernels of torch: the same steps as without, of scaled gradients, some rows, and after a resume."""

import copy
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from processes import in_processes
from torch import nn

from recnb.recipe.optimizer import build_optimizer
from recnb.training.adaptor import CancelStepException
from recnb.training.steps import ScaleLoss

SECTIONS = {
    "Momentum": {"name": "Momentum", "weight_decay": 0.01, "use_nesterov": True},
    "Adam": {"name": "Adam", "regularizer": {"name": "L2", "coeff": 0.01}},
    "AdamW": {"name": "AdamW"},
}


def parameters(dtype=torch.float32, device="cpu"):
    generator = torch.Generator().manual_seed(0)
    shapes = (6, 3), (5, 4, 3, 3), (7,)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype).to(device)) for shape in shapes]


def follow(params, step):
    """None; sets gradients that differ by step."""
    for p in params:
        p.grad = torch.sin(p.detach() * 3 + step)


def unfused(optimizer):
    """The same optimizer, every parameter updated by itself."""
    for group in optimizer.param_groups:
        group.update(fused=None, foreach=False)
    return optimizer


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_the_kernel_makes_the_same_steps(section, device):
    if device not in ("cpu", "cuda"):
        pytest.skip("this device has no such kernel")
    one, other = parameters(torch.float64, device), parameters(torch.float64, device)
    fused, plain = (build_optimizer({"Optimizer": section})(params, lr=0.1) for params in (one, other))
    assert all(group["fused"] for group in fused.param_groups)
    unfused(plain)
    for step in range(5):
        follow(one, step), follow(other, step)
        one[1].grad = one[1].grad.to(memory_format=torch.channels_last)  # laid out in another way than its parameter
        fused.step(), plain.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", ["SGD", "RMSProp"])
def test_what_gains_nothing_or_has_none_is_left_to_torch(name):
    optimizer = build_optimizer({"Optimizer": {"name": name}})(parameters(), lr=0.1)
    assert not optimizer.param_groups[0].get("fused")


@pytest.mark.parametrize(
    "params",
    [
        [torch.ones(3, dtype=torch.complex64)],
        [torch.ones(3, device="meta")],
        [torch.ones(3), torch.ones(3, dtype=torch.complex64)],
    ],
    ids=["complex", "no device", "one of two"],
)
def test_parameters_that_the_kernel_does_not_take_are_stepped_without(params):
    params = [nn.Parameter(p) for p in params]
    optimizer = build_optimizer({"Optimizer": {"name": "AdamW"}})(params, lr=0.1)
    for p in params:
        p.grad = torch.ones_like(p)
    optimizer.step()
    assert not optimizer.param_groups[0]["fused"] and all(optimizer.state[p]["step"] == 1 for p in params)


def scaled_step(scaling, optimizer, loss):
    """None; what fit_config does of a batch with scaled losses."""
    scaling.learn = SimpleNamespace(opt=SimpleNamespace(opt=optimizer), loss_grad=loss)
    optimizer.zero_grad()
    scaling.before_backward()
    scaling.learn.loss_grad.backward()
    with pytest.raises(CancelStepException):
        scaling.before_step()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("name", SECTIONS)
def test_hooks_see_true_gradients_and_overflow_leaves_everything(name, count):
    section, seen, results = {"clip_norm": 0.5, "regularizer": {"name": "L1", "coeff": 0.1}}, [], []
    for alone in (False, True):
        params, scaling = parameters(torch.float64), ScaleLoss(torch.device("cpu"))
        made = build_optimizer({"Optimizer": [{name: section}] * count})(
            [{"params": params[:2], "entry": 0}, {"params": params[2:], "entry": count - 1}], lr=0.1
        )
        for part in getattr(made, "optimizers", [made]):
            part.register_step_pre_hook(
                lambda part, *_: seen.append(
                    max(p.grad.abs().max().item() for group in part.param_groups for p in group["params"])
                )
            )
        if alone:
            unfused(made)
        scaled_step(scaling, made, sum((p * torch.inf).sum() for p in params))
        assert not seen and all(map(torch.equal, params, parameters(torch.float64)))
        assert not any(part.state for part in getattr(made, "optimizers", [made]))
        for step in range(3):
            scaled_step(scaling, made, sum((p * (step + 2)).sin().sum() for p in params))
        assert max(seen) <= 0.6 and scaling.scaler.get_scale() == 2.0**15  # clipped to 0.5, plus 0.1 of the signs
        seen.clear()
        results.append(params)
    torch.testing.assert_close(*results, rtol=1e-12, atol=1e-12)


def overflow_on_one(rank):
    """(Whether a process has stepped its own share of a weight, the scale) behind an overflow on the second alone."""
    share, scaling = nn.Parameter(torch.ones(2)), ScaleLoss(torch.device("cpu"))
    scaled_step(scaling, torch.optim.SGD([share], 0.1), (share * (torch.inf if rank else 1)).sum())
    return bool((share != 1).any()), scaling.scaler.get_scale()


def test_an_overflow_on_one_process_leaves_out_the_step_of_all():
    assert in_processes(2, overflow_on_one) == [(False, 2.0**15)] * 2


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_rows_of_a_sampled_head_are_stepped_by_the_kernel(section):
    runs = []
    for alone in (False, True):
        table, dense, *_ = parameters(torch.float64)
        optimizer = build_optimizer({"Optimizer": {**section, "clip_norm": 1.0}})([table, dense], lr=0.1)
        if alone:
            unfused(optimizer)
        for rows in ([0, 3], [3, 4], [1], [0, 4]):
            optimizer.zero_grad()
            loss = (F.embedding(torch.tensor(rows), table, sparse=True) - 1).square().sum()
            (loss + dense.square().sum()).backward()
            assert table.grad.is_sparse
            optimizer.step()
        runs.append([table, dense, *optimizer.state[table].values()])
    torch.testing.assert_close(*([p.detach().double() for p in run] for run in runs), rtol=1e-12, atol=1e-12)
    assert torch.equal(runs[0][0][[2, 5]], parameters(torch.float64)[0][[2, 5]])


@pytest.mark.parametrize("section", SECTIONS.values(), ids=SECTIONS)
def test_a_state_written_without_the_kernel_goes_on_with_it(section):
    one, other = parameters(torch.float64), parameters(torch.float64)
    old, plain = (build_optimizer({"Optimizer": section})(params, lr=0.1) for params in (one, other))
    for optimizer, params in ((old, one), (plain, other)):
        unfused(optimizer)
        follow(params, 0)
        optimizer.step()
    state = copy.deepcopy(old.state_dict())
    for group in state["param_groups"]:
        del group["fused"]  # older still
    new = build_optimizer({"Optimizer": section})(one, lr=0.1)
    new.load_state_dict(state)
    assert new.param_groups[0]["fused"]
    for step in (1, 2):
        follow(one, step), follow(other, step)
        new.step(), plain.step()
    torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)
    with pytest.raises(ValueError, match="different number of parameter groups"):
        new.load_state_dict({**state, "param_groups": state["param_groups"] * 2})
