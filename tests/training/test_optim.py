"""Optimizers and schedules: the original's learning rates step by step, and one step of each rule by hand."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch

from recnb.losses.combined import CombinedLoss
from recnb.losses.memories import CenterLoss
from recnb.recipe.optimizer import build_optimizer, build_schedules, loss_parameters, parameter_groups
from recnb.registry import ConfigError

ORACLE = json.loads((Path(__file__).parents[1] / "data" / "oracle.json").read_text())
CASES = [case for case in ORACLE if case["kind"] == "lr"]


def schedule(**section):
    """The schedule of twelve epochs of five steps."""
    return build_schedules({"Global": {"epochs": 12}, "Optimizer": {"name": "SGD", "lr": section}}, 5)[0]


def descend(section, gradients, lr=0.1, start=1.0):
    """The values of one parameter under an optimizer that is given these gradients one after another."""
    parameter = torch.nn.Parameter(torch.tensor(start, dtype=torch.float64))
    optimizer, values = build_optimizer({"Optimizer": section})([parameter], lr=lr), []
    for gradient in gradients:
        parameter.grad = torch.tensor(gradient, dtype=torch.float64)
        optimizer.step()
        values.append(parameter.item())
    return values


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_schedules_are_the_original(case):
    args = dict(case["args"])
    assert (args.pop("epochs"), args.pop("step_each_epoch")) == (12, 5)
    rate, steps_each_value = schedule(name=case["name"], **args), 5 if case["steps"] == "epoch" else 1
    for step in range(60):
        assert rate(step) == pytest.approx(case["values"][step // steps_each_value], rel=1e-9, abs=1e-15), step


def test_the_schedules_with_cases():
    assert {case["name"] for case in CASES} == {"MultiStepDecay", "Cosine", "Piecewise", "ConstLR", "Step", "Linear"}


def test_warm_up_by_step_and_by_epoch():
    rate = schedule(name="ConstLR", learning_rate=0.8, warmup_epoch=2, warmup_start_lr=0.2)
    assert [rate(step) for step in (0, 5, 9, 10, 59)] == pytest.approx([0.2, 0.5, 0.74, 0.8, 0.8])
    rate = schedule(name="ConstLR", learning_rate=0.8, warmup_epoch=2, warmup_start_lr=0.2, by_epoch=True)
    assert [rate(step) for step in (0, 4, 5, 9, 10)] == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8])


def test_cosine_ends_at_its_lowest_and_stays_there():
    rate = schedule(name="Cosine", learning_rate=0.4, eta_min=0.1)
    assert [rate(step) for step in (0, 30, 60, 90)] == pytest.approx([0.4, 0.25, 0.1, 0.1])
    with pytest.raises(ConfigError, match=r"Optimizer\.lr\.epochs is 5, but after the warm-up there are 10"):
        schedule(name="Cosine", learning_rate=0.4, warmup_epoch=2, epochs=5)


def test_piecewise_alone_divides_by_ten_every_thirty_epochs():
    rate = schedule(name="Piecewise", learning_rate=0.1)
    assert [rate(5 * epoch) for epoch in (0, 29, 30, 60)] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_piecewise_with_a_learning_rate_that_agrees():
    assert schedule(name="Piecewise", learning_rate=0.1, decay_epochs=[3], values=[0.1, 0.02])(15) == 0.02


@pytest.mark.parametrize(
    ("section", "message"),
    [
        (
            {"name": "Piecewise", "learning_rate": 0.1, "decay_epochs": [4], "values": [0.2, 0.1]},
            "0.1 contradicts values",
        ),
        ({"name": "Piecewise", "decay_epochs": [4, 8], "values": [0.2, 0.1]}, "one more of 'values'"),
        ({"name": "Piecewise", "decay_epochs": [8, 4], "values": [0.3, 0.2, 0.1]}, r"decay_epochs \[8, 4\] must rise"),
        ({"name": "Piecewise"}, "'learning_rate' alone"),
        ({"name": "MultiStepDecay", "learning_rate": 0.1, "milestones": [6, 3]}, r"milestones \[6, 3\] must rise"),
        ({"name": "ConstLR"}, "ConstLR needs a value for 'learning_rate'"),
        ({"name": "Cosin", "learning_rate": 0.1}, "did you mean 'Cosine'"),
        ({"name": "ConstLR", "learning_rate": 0.1, "warmup_epoch": "two"}, r"lr\.warmup_epoch: 'two' is a str"),
        (
            {"name": "ConstLR", "learning_rate": 0.1, "by_epoch": "yes"},
            r"lr\.by_epoch: 'yes' is a str, ConstLR wants bool",
        ),
    ],
    ids=lambda value: value["name"] if isinstance(value, dict) else "",
)
def test_schedules_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        schedule(**section)


def test_a_missing_schedule_is_named():
    with pytest.raises(ConfigError, match=r"Optimizer\.lr: holds .*not a mapping with a 'name'"):
        build_schedules({"Global": {"epochs": 1}, "Optimizer": {"name": "SGD"}}, 5)


@pytest.mark.parametrize("nesterov", [False, True])
def test_momentum_by_hand(nesterov):
    values = descend({"name": "Momentum", "momentum": 0.5, "use_nesterov": nesterov}, [2.0, 1.0])
    w, v = 1.0, 0.0
    for gradient, value in zip([2.0, 1.0], values, strict=True):
        v = 0.5 * v + gradient
        w -= 0.1 * (gradient + 0.5 * v if nesterov else v)
        assert value == pytest.approx(w)


def test_sgd_by_hand():
    assert descend({"name": "SGD"}, [2.0, 1.0]) == pytest.approx([0.8, 0.7])


@pytest.mark.parametrize("name", ["Adam", "AdamW"])
def test_adam_by_hand(name):
    decay = 0.2
    section = {"name": name, "beta1": 0.8, "beta2": 0.9, "epsilon": 0.01, "weight_decay": decay}
    w, m, v = 1.0, 0.0, 0.0
    for t, (gradient, value) in enumerate(zip([2.0, 1.0], descend(section, [2.0, 1.0]), strict=True), 1):
        gradient += decay * w if name == "Adam" else 0
        w *= 1 - 0.1 * decay if name == "AdamW" else 1
        m, v = 0.8 * m + 0.2 * gradient, 0.9 * v + 0.1 * gradient**2
        w -= 0.1 * (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)) ** 0.5 + 0.01)
        assert value == pytest.approx(w)


@pytest.mark.parametrize("name", ["SGD", "Momentum", "Adam"])
def test_l2_adds_to_the_gradient(name):
    section = {"name": name, "regularizer": {"name": "L2", "coeff": 0.3}}
    (first,) = descend(section, [2.0], start=1.5)
    assert first == pytest.approx(descend({"name": name}, [2.0 + 0.3 * 1.5], start=1.5)[0])
    second = descend(section, [2.0, 1.0], start=1.5)[1]
    assert second == pytest.approx(descend({"name": name}, [2.0 + 0.3 * 1.5, 1.0 + 0.3 * first], start=1.5)[1])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "Adam", "regularizer": {"name": "L2", "coeff": 0.1}, "weight_decay": 0.1}, "keep one of them"),
        ({"name": "AdamW", "regularizer": {"name": "L2", "coeff": 0.1}}, "give weight_decay instead"),
        ({"name": "SGD", "regularizer": {"name": "L3", "coeff": 0.1}}, "no regularizer 'L3'"),
        ({"name": "Momentum", "momentun": 0.9}, r"Optimizer\.momentun: .*did you mean 'momentum'"),
        ({"name": "Adagrad"}, "there is no optimizer 'Adagrad'"),
    ],
    ids=["both", "AdamW", "name of the regularizer", "argument", "name"],
)
def test_optimizers_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer({"Optimizer": section})


class Two(torch.nn.Module):
    """A model of two parts, and a loss that learns."""

    def __init__(self):
        super().__init__()
        self.backbone, self.head = torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)


def groups(section, model=None, loss=None):
    """What parameter_groups makes of a section, as {(backbone, entry, lr_scale, weight_decay): names}."""
    model = model or Two()
    loss = loss or CombinedLoss([(1.0, CenterLoss(5, 4))])
    names = {id(p): name for name, p in [*model.named_parameters(), *loss_parameters(loss)]}
    return {
        (group["backbone"], group["entry"], group["lr_scale"], group.get("weight_decay")): [
            names[id(p)] for p in group["params"]
        ]
        for group in parameter_groups({"Optimizer": section}, model, loss)
    }


def test_one_optimizer_takes_model_and_loss():
    assert [name for names in groups({"name": "SGD"}).values() for name in names] == [
        "backbone.weight",
        "backbone.bias",
        "head.weight",
        "head.bias",
        "CenterLoss.centers",
    ]


def test_scopes_by_class_attribute_and_pattern():
    made = groups([{"Adam": {"scope": "backbone"}}, {"SGD": {"scope": ".*bias"}}, {"SGD": {}}])
    assert made == {
        (True, 0, 1.0, None): ["backbone.weight", "backbone.bias"],
        (False, 1, 1.0, None): ["head.bias"],
        (False, 2, 1.0, None): ["head.weight", "CenterLoss.centers"],
    }


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ([{"Adam": {"scope": "Two"}}], "no entry's scope covers CenterLoss.centers"),
        (
            [{"Adam": {"scope": "neck"}}],
            "Optimizer.0.Adam.scope: nothing is called 'neck'; there is Two, backbone, head, ",
        ),
        ([{"Adam": {"scope": "(head"}}], "is no regular expression"),
        ([{"Adam": {}}, {"SGD": {"scope": "head"}}], "Optimizer.1.SGD.scope: 'head' has no trainable parameter"),
    ],
    ids=["left over", "unknown", "pattern", "nothing left"],
)
def test_scopes_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        groups(section)


def test_frozen_parameters_have_no_group_and_shares_make_their_own():
    model = Two()
    model.head.bias.requires_grad_(False)
    model.head.weight.lr_multiplier, model.backbone.bias.weight_decay = 0.5, 0.0
    assert groups({"name": "SGD", "weight_decay": 0.1}, model) == {
        (True, 0, 1.0, None): ["backbone.weight"],
        (True, 0, 1.0, 0.0): ["backbone.bias"],
        (False, 0, 0.5, None): ["head.weight"],
        (False, 0, 1.0, None): ["CenterLoss.centers"],
    }


@pytest.mark.parametrize(
    ("extra", "exempt"),
    [
        ({"one_dim_param_no_weight_decay": True}, {"backbone.bias", "head.bias"}),
        ({"no_weight_decay_name": "head centers"}, {"head.weight", "head.bias", "CenterLoss.centers"}),
    ],
    ids=["1-d", "name"],
)
def test_what_does_not_decay(extra, exempt):
    made = groups({"name": "AdamW", **extra})
    assert {name for (*_, decay), names in made.items() if decay == 0 for name in names} == exempt


def test_several_optimizers_step_their_own_and_are_kept_together():
    def make():
        torch.manual_seed(0)
        model, loss = Two(), CombinedLoss([(1.0, CenterLoss(5, 4))])
        cfg = {"Optimizer": [{"Adam": {"scope": "Two"}}, {"Momentum": {"scope": "CenterLoss", "momentum": 0.5}}]}
        return model, loss, build_optimizer(cfg)(parameter_groups(cfg, model, loss), lr=0.1)

    def step(model, loss, optimizer):
        loss({"features": model.backbone(torch.ones(2, 3))}, torch.tensor([1, 2])).backward()
        optimizer.step()
        optimizer.zero_grad()

    one, other = make(), make()
    for _ in range(2):
        step(*one)
    for ours, theirs in zip(other, one, strict=True):
        ours.load_state_dict(copy.deepcopy(theirs.state_dict()))
    step(*one), step(*other)
    assert all(
        torch.equal(a, b) for i in (0, 1) for a, b in zip(one[i].parameters(), other[i].parameters(), strict=True)
    )
    assert {type(part).__name__ for part in one[2].optimizers} == {"Adam", "SGD"}


def test_clipping_is_by_parameter_and_comes_before_the_regularizer():
    assert descend({"name": "SGD", "clip_norm": 0.5}, [3.0, 0.2], start=1.0) == pytest.approx([0.95, 0.93])
    section = {"name": "SGD", "clip_norm": 0.5, "regularizer": {"name": "L1", "coeff": 0.25}}
    assert descend(section, [3.0], start=1.0) == pytest.approx([1 - 0.1 * 0.75])


def test_rmsprop_by_hand():
    assert descend({"name": "RMSProp", "rho": 0.9, "epsilon": 1e-12}, [2.0]) == pytest.approx([1 - 0.1 / 0.1**0.5])


@pytest.mark.parametrize("three_phase", [False, True])
def test_one_cycle_rises_and_falls(three_phase):
    rate = schedule(
        name="OneCycleLR",
        max_learning_rate=1.0,
        divide_factor=10.0,
        end_learning_rate=0.01,
        phase_pct=0.25,
        three_phase=three_phase,
    )
    assert [rate(step) for step in (0, 15, 30, 60)] == pytest.approx(
        [0.1, 1.0, 0.1, 0.01] if three_phase else [0.1, 1.0, 0.7525, 0.01]
    )


def test_cyclic_goes_up_and_down():
    rate = schedule(
        name="Cyclic",
        base_learning_rate=0.1,
        max_learning_rate=0.5,
        step_size_up=4,
        step_size_down=8,
        mode="triangular2",
    )
    assert [rate(step) for step in (0, 2, 4, 8, 12, 16)] == pytest.approx([0.1, 0.3, 0.5, 0.3, 0.1, 0.3])


def test_a_plateau_lowers_the_rate():
    rate = schedule(name="ReduceOnPlateau", learning_rate=0.1, mode="max", patience=1, factor=0.5, by_epoch=True)
    assert [rate(0, values) for values in ([], [0.2, 0.3], [0.2, 0.3, 0.3, 0.3], [0.2, 0.3, 0.3, 0.3, 0.4])] == [
        0.1,
        0.1,
        0.05,
        0.05,
    ]


def test_fixmatch_ends_at_seven_sixteenths_of_a_turn():
    rate = schedule(name="CosineFixmatch", learning_rate=0.2, num_warmup_steps=10)
    assert [rate(step) for step in (0, 5, 10, 60)] == pytest.approx([0, 0.1, 0.2, 0.2 * math.cos(math.pi * 7 / 16)])
