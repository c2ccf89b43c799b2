"""Models trained together: outputs by name, the losses between them against plain formulas, the one that is used."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from recnb.losses.distillation import DistillationDistanceLoss, DistillationDMLLoss, DistillationGTCELoss
from recnb.models.recmodel import DistillationModel
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError


@pytest.fixture
def outputs():
    draw = torch.Generator().manual_seed(0)
    logits = {name: torch.randn(6, 5, generator=draw).requires_grad_() for name in ("Teacher", "Student")}
    return {name: {"logits": values, "features": values[:, :3]} for name, values in logits.items()}


def test_mutual_learning_is_both_divergences(outputs):
    loss = DistillationDMLLoss([["Student", "Teacher"]])(outputs, None)
    p, q = (np.exp(v["logits"].detach().double().log_softmax(1).numpy()) for v in outputs.values())
    wanted = sum((a * np.log(a / b)).sum(1).mean() for a, b in ((p, q), (q, p))) / 2
    assert loss.item() == pytest.approx(wanted, rel=1e-5)
    exact = {name: {"logits": part["logits"].double()} for name, part in outputs.items()}
    assert DistillationDMLLoss([["Student", "Teacher"]])(exact, None).item() == pytest.approx(wanted, rel=1e-12)
    same = dict.fromkeys(outputs, outputs["Teacher"])
    assert DistillationDMLLoss([["Student", "Teacher"]])(same, None).item() == 0


@pytest.mark.parametrize(
    ("mode", "plain"),
    [
        ("l2", lambda d: d**2),
        ("l1", np.abs),
        ("smooth_l1", lambda d: np.where(np.abs(d) < 1, d**2 / 2, np.abs(d) - 0.5)),
    ],
)
def test_distances(outputs, mode, plain):
    loss = DistillationDistanceLoss([["Student", "Teacher"]], mode, "features")(outputs, None)
    a, b = (v["features"].detach().double() for v in outputs.values())
    assert loss.item() == pytest.approx(plain((a - b).numpy()).mean(), rel=1e-5)
    exact = DistillationDistanceLoss([["Student", "Teacher"]], mode)(
        {"Teacher": {"features": a}, "Student": {"features": b}}, None
    )
    assert exact.item() == pytest.approx(plain((a - b).numpy()).mean(), rel=1e-12)


def test_cross_entropies_are_summed(outputs):
    y = torch.tensor([0, 1, 2, 3, 4, 0])
    loss = DistillationGTCELoss(["Student", "Teacher"], epsilon=0.1)(outputs, y)
    assert torch.allclose(loss, sum(F.cross_entropy(v["logits"], y, label_smoothing=0.1) for v in outputs.values()))


def test_an_output_that_does_not_exist_is_named(outputs):
    with pytest.raises(ValueError, match="no output 'neck' of a model 'Student'; there are the models Teacher, St"):
        DistillationDistanceLoss([["Student", "Teacher"]], key="neck")(outputs, None)


def pair(config_file, **changes):
    """The configuration of two of the tiny models that learn from each other."""
    cfg = load_config(config_file())
    one = {key: cfg["Arch"][key] for key in ("Backbone", "BackboneStopLayer", "Neck", "Head")}
    pairs = [["Student", "Teacher"]]
    return load_config(
        config_file(
            {
                "Arch": {
                    "name": "DistillationModel",
                    "models": [{"Teacher": {"name": "RecModel", **one}}, {"Student": {"name": "RecModel", **one}}],
                    "infer_model_name": "Student",
                    **changes,
                },
                "Loss": {
                    "Train": [
                        {"DistillationGTCELoss": {"model_names": ["Student", "Teacher"], "weight": 1.0}},
                        {"DistillationDMLLoss": {"model_name_pairs": pairs, "weight": 1.0}},
                        {"DistillationDistanceLoss": {"model_name_pairs": pairs, "key": "backbone"}},
                    ]
                },
            }
        )
    )


def test_two_models_train_and_one_is_used(config_file, tmp_path):
    cfg = pair(config_file)
    model = build_model(cfg)
    assert isinstance(model, DistillationModel)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    learn = build_learner(cfg, model, build_loaders(cfg), tmp_path / "run")
    learn.fit_config()
    for name in ("Teacher", "Student"):
        assert not torch.equal(model.state_dict()[f"models.{name}.head.weight"], before[f"models.{name}.head.weight"])
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        features = learn.model.eval()(x)["features"]
        assert torch.equal(features, learn.model.models["Student"](x)["features"])
    assert {group["backbone"] for group in learn.opt.opt.param_groups} == {True, False}


def test_a_frozen_teacher_stays_as_it_is(config_file, tmp_path):
    cfg = pair(config_file, freeze_params_list=[True, False])
    model = build_model(cfg)
    before = {key: value.clone() for key, value in model.models["Teacher"].state_dict().items()}
    learn = build_learner(cfg, model, build_loaders(cfg), tmp_path / "run")
    learn.fit_config()
    after = model.models["Teacher"].state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())  # batch statistics too


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"infer_model_name": "Studnet"}, "Arch.infer_model_name: there is no model 'Studnet'; did you mean 'Student'"),
        ({"freeze_params_list": [True]}, "Arch.freeze_params_list: must have one entry for each"),
        ({"pretrained_list": [None, "nowhere.safetensors"]}, "Arch.pretrained_list: .*nowhere"),
    ],
)
def test_what_cannot_be_meant(config_file, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(pair(config_file, **changes))
