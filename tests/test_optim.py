"Optimizers and schedules: the original's learning rates step by step, and one step of each rule by hand."
import json
from pathlib import Path

import pytest
import torch

from recnb.config import ConfigError
from recnb.optim import build_optimizer, build_schedule

CASES = [case for case in json.loads((Path(__file__).parent / "data/oracle.json").read_text()) if case["kind"] == "lr"]


def schedule(**section):
    "The schedule of twelve epochs of five steps."
    return build_schedule({"Global": {"epochs": 12}, "Optimizer": {"name": "SGD", "lr": section}}, 5)


def descend(section, gradients, lr=0.1, start=1.0):
    "The values of one parameter under an optimizer that is given these gradients one after another."
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


def test_all_four_schedules_have_cases():
    assert {case["name"] for case in CASES} == {"MultiStepDecay", "Cosine", "Piecewise", "ConstLR"}


def test_warm_up_by_step_and_by_epoch():
    rate = schedule(name="ConstLR", learning_rate=0.8, warmup_epoch=2, warmup_start_lr=0.2)
    assert [rate(step) for step in (0, 5, 9, 10, 59)] == pytest.approx([0.2, 0.5, 0.74, 0.8, 0.8])
    rate = schedule(name="ConstLR", learning_rate=0.8, warmup_epoch=2, warmup_start_lr=0.2, by_epoch=True)
    assert [rate(step) for step in (0, 4, 5, 9, 10)] == pytest.approx([0.2, 0.2, 0.5, 0.5, 0.8])


def test_cosine_ends_at_its_lowest_and_stays_there():
    rate = schedule(name="Cosine", learning_rate=0.4, eta_min=0.1)
    assert [rate(step) for step in (0, 30, 60, 90)] == pytest.approx([0.4, 0.25, 0.1, 0.1])
    with pytest.raises(ConfigError, match=r"Optimizer\.lr\.epochs is 5, but behind the warm-up there are 10"):
        schedule(name="Cosine", learning_rate=0.4, warmup_epoch=2, epochs=5)


def test_piecewise_alone_divides_by_ten_every_thirty_epochs():
    rate = schedule(name="Piecewise", learning_rate=0.1)
    assert [rate(5 * epoch) for epoch in (0, 29, 30, 60)] == pytest.approx([0.1, 0.1, 0.01, 0.001])


def test_piecewise_with_a_learning_rate_that_agrees():
    assert schedule(name="Piecewise", learning_rate=0.1, decay_epochs=[3], values=[0.1, 0.02])(15) == 0.02


@pytest.mark.parametrize(("section", "message"), [
    ({"name": "Piecewise", "learning_rate": 0.1, "decay_epochs": [4], "values": [0.2, 0.1]}, "0.1 contradicts values"),
    ({"name": "Piecewise", "decay_epochs": [4, 8], "values": [0.2, 0.1]}, "one more of 'values'"),
    ({"name": "Piecewise", "decay_epochs": [8, 4], "values": [0.3, 0.2, 0.1]}, r"decay_epochs \[8, 4\] must rise"),
    ({"name": "Piecewise"}, "'learning_rate' alone"),
    ({"name": "MultiStepDecay", "learning_rate": 0.1, "milestones": [6, 3]}, r"milestones \[6, 3\] must rise"),
    ({"name": "ConstLR"}, "ConstLR needs a value for 'learning_rate'"),
    ({"name": "Cosin", "learning_rate": 0.1}, "did you mean 'Cosine'"),
    ({"name": "ConstLR", "learning_rate": 0.1, "warmup_epoch": "two"}, r"lr\.warmup_epoch: 'two' is a str"),
    ({"name": "ConstLR", "learning_rate": 0.1, "by_epoch": "yes"}, r"lr\.by_epoch: 'yes' is a str, ConstLR wants bool"),
], ids=lambda value: value["name"] if isinstance(value, dict) else "")
def test_schedules_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        schedule(**section)


def test_a_missing_schedule_is_named():
    with pytest.raises(ConfigError, match=r"Optimizer\.lr: holds .*not a mapping with a 'name'"):
        build_schedule({"Global": {"epochs": 1}, "Optimizer": {"name": "SGD"}}, 5)


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


@pytest.mark.parametrize(("section", "message"), [
    ({"name": "Adam", "regularizer": {"name": "L2", "coeff": 0.1}, "weight_decay": 0.1}, "keep one of them"),
    ({"name": "AdamW", "regularizer": {"name": "L2", "coeff": 0.1}}, "give weight_decay instead"),
    ({"name": "SGD", "regularizer": {"name": "L1", "coeff": 0.1}}, "no regularizer 'L1'"),
    ({"name": "Momentum", "momentun": 0.9}, r"Optimizer\.momentun: .*did you mean 'momentum'"),
    ({"name": "Adagrad"}, "there is no optimizer 'Adagrad'"),
], ids=["both", "AdamW", "name of the regularizer", "argument", "name"])
def test_optimizers_that_cannot_be_meant(section, message):
    with pytest.raises(ConfigError, match=message):
        build_optimizer({"Optimizer": section})
