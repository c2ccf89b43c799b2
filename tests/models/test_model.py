"""RecModel and what is built around it; and every registered part, built from a section, trained, saved and loaded."""

import copy
import json
import pickle
import re
import runpy
from contextlib import ExitStack
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
import yaml
from conftest import ROOT
from safetensors.torch import save_file
from torch import nn

import recnb.losses.pml  # noqa: F401 (registers PML)
from recnb.data.images import DataError
from recnb.losses.combined import LOSSES, CombinedLoss
from recnb.models import weights
from recnb.models.heads import HEADS, ArcMargin, cosine
from recnb.models.necks import FC, NECKS, VehicleNeck
from recnb.models.recmodel import RecModel
from recnb.models.weights import average, interpolate, load_weights
from recnb.recipe.data import build_loaders
from recnb.recipe.model import build_model
from recnb.recipe.objective import build_loss
from recnb.recipe.optimizer import build_optimizer, build_schedules
from recnb.recipe.parts import SLOTS
from recnb.recipe.resolved import resolved
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.folder import open_run
from recnb.storage import replacing, write_json, write_text
from recnb.training.optim import OPTIMIZERS
from recnb.training.schedules import SCHEDULES

CHANNELS, CLASSES, ROWS = 16, 5, 8
EXAMPLES = {  # arguments that a part needs and that the walk below can neither derive nor leave out
    "neck": {
        "VehicleNeck": {"out_channels": 6},
        "FC": {"class_num": 6},
        "MLP": {"class_num": 6},
        "FRFNNeck": {"out_feat": 6},
    },
    "head": {"CircleMargin": {"margin": 0.35, "scale": 64}},
    "loss": {
        "PairwiseCosface": {"margin": 0.35, "gamma": 64},
        "DSHSDLoss": {"alpha": 0.05},
        "DCHLoss": {"gamma": 20.0, "_lambda": 0.1},
        "ContrastiveLoss_XBM": {"xbm_size": 20, "start_iter": 0},
        "TripletAngularMarginLoss_XBM": {"xbm_size": 20, "start_iter": 0, "xbm_weight": 1.0},
        "DistillationGTCELoss": {"model_names": ["One", "Other"]},
        "DistillationDMLLoss": {"model_name_pairs": [["One", "Other"]]},
        "DistillationDistanceLoss": {"model_name_pairs": [["One", "Other"]]},
        "PML": {"loss": "ProxyAnchorLoss", "num_classes": 5, "embedding_size": 16},
    },
    "optimizer": {},
    "learning-rate schedule": {
        "Cosine": {"learning_rate": 0.1},
        "ConstLR": {"learning_rate": 0.1},
        "Constant": {"learning_rate": 0.1},
        "Linear": {"learning_rate": 0.1},
        "Step": {"learning_rate": 0.1, "step_size": 2},
        "CosineFixmatch": {"learning_rate": 0.1},
        "OneCycleLR": {"max_learning_rate": 0.1, "phase_pct": 0.5},
        "ReduceOnPlateau": {"learning_rate": 0.1},
        "Cyclic": {"base_learning_rate": 0.01, "max_learning_rate": 0.1, "step_size_up": 3},
        "MultiStepDecay": {"learning_rate": 0.1, "milestones": [2, 4]},
        "Piecewise": {"decay_epochs": [2, 4], "values": [0.1, 0.01, 0.001]},
    },
}


def example(registry, name, **known):
    """A section that builds the part, as a YAML file would give it."""
    args = EXAMPLES[registry.kind].get(name, {})
    needed = [
        key
        for key, p in registry.parameters(name).items()
        if p.default is p.empty and p.kind is not p.VAR_KEYWORD and key not in args and key not in known
    ]
    if needed:
        pytest.fail(f"{name} needs a value for {', '.join(needed)}: give it one in EXAMPLES['{registry.kind}']")
    return yaml.safe_load(yaml.safe_dump({"name": name, **args}))


def built(registry, name, **known):
    section = example(registry, name, **known)
    return registry.build(section, "here", **{k: (v, "") for k, v in known.items() if k not in section})


def check_saving(part, other, run, path):
    """The state of a part is all there is to it: another one that loads it gives the same."""
    torch.save(part.state_dict(), path)
    other.load_state_dict(torch.load(path, weights_only=True))
    assert torch.equal(run(part.eval()), run(other.eval()))


def check_gradients(part, inputs):
    for tensor in (inputs, *(p for p in part.parameters() if p.requires_grad)):
        assert tensor.grad is not None and tensor.grad.isfinite().all()
        tensor.grad = None


@pytest.mark.parametrize("name", sorted(NECKS))
def test_every_neck(name, tmp_path, device):
    def make():
        return built(
            NECKS, name, in_channels=CHANNELS, num_features=CHANNELS, embedding_size=CHANNELS, prefix_tokens=1
        ).to(device)

    neck = make()
    for shape in ((5, CHANNELS),) if name == "Tokens" else ((CHANNELS,), (CHANNELS, 1, 1)):
        x = torch.randn(ROWS, *shape, device=device, requires_grad=True)
        for autocast in (False, True):
            with torch.autocast(device, torch.bfloat16, enabled=autocast):
                y = neck.train()(x)
            assert y.dim() == 2 and len(y) == ROWS and y.isfinite().all()
            y.float().square().sum().backward()
            check_gradients(neck, x)
    check_saving(neck, make(), lambda part: part(x), tmp_path / "neck.pt")


@pytest.mark.parametrize("name", sorted(HEADS))
def test_every_head(name, tmp_path, device):
    def make():
        return built(HEADS, name, embedding_size=CHANNELS, class_num=CLASSES).to(device)

    head, y = make(), torch.arange(ROWS, device=device) % CLASSES
    x = torch.randn(ROWS, CHANNELS, device=device, requires_grad=True)
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            logits = head.train()(x, y)
        assert logits.shape == head(x).shape == (ROWS, CLASSES) and logits.isfinite().all()
        F.cross_entropy(logits.float(), y).backward()
        check_gradients(head, x)
    check_saving(head, make(), lambda part: part(x, y), tmp_path / "head.pt")


@pytest.mark.parametrize("name", sorted(LOSSES))
def test_every_loss(name, tmp_path, device):
    def make():
        return built(LOSSES, name, num_classes=CLASSES, embedding_size=CHANNELS, feat_dim=CHANNELS).to(device)

    loss, y = make(), torch.arange(ROWS, device=device) % 3
    given = torch.randn(ROWS, CHANNELS + CLASSES, device=device, requires_grad=True)
    features, logits = given.split((CHANNELS, CLASSES), 1)
    out = {"backbone": features[:, :, None, None], "features": features}
    out |= {"logits": logits} if getattr(loss, "needs_logits", False) else {}
    if name.startswith("Distillation"):
        out |= {
            "One": {"features": features, "logits": logits},
            "Other": {"features": features.flip(0), "logits": logits.flip(0)},
        }
    for autocast in (False, True):
        with torch.autocast(device, torch.bfloat16, enabled=autocast):
            value = loss.train()(out, y)
        assert value.shape == () and value.isfinite()
        value.backward(retain_graph=True)
        check_gradients(loss, given)
    check_saving(loss, make(), lambda part: part(out, y), tmp_path / "loss.pt")


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
def test_every_optimizer(name, tmp_path, device):
    layers = [nn.Linear(4, 2, device=device), nn.Linear(4, 2, device=device)]
    make = build_optimizer({"Optimizer": {**example(OPTIMIZERS, name), "lr": {"name": "ConstLR"}}})
    first, second = (make(layer.parameters(), lr=0.1) for layer in layers)

    def step(layer, optimizer, x):
        with torch.autocast(device, torch.bfloat16):
            layer(x).float().square().sum().backward()
        before = layer.weight.detach().clone()
        optimizer.step()
        optimizer.zero_grad()
        assert layer.weight.isfinite().all() and not torch.equal(layer.weight, before)

    x = torch.randn(3, 4, device=device)
    step(layers[0], first, x)
    torch.save({"model": layers[0].state_dict(), "optimizer": first.state_dict()}, tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    layers[1].load_state_dict(state["model"])
    second.load_state_dict(state["optimizer"])
    for layer, optimizer in zip(layers, (first, second), strict=True):
        step(layer, optimizer, x + 1)
    assert torch.equal(layers[0].weight, layers[1].weight)


@pytest.mark.parametrize("name", sorted(SCHEDULES))
@pytest.mark.parametrize(
    "shared",
    [{}, {"warmup_epoch": 2, "warmup_start_lr": 0.001, "by_epoch": True, "last_epoch": 0, "verbose": False}],
    ids=["plain", "warm-up"],
)
def test_every_schedule(name, shared):
    section = {**example(SCHEDULES, name, epochs=6, step_each_epoch=3), **shared}
    rate = build_schedules({"Global": {"epochs": 6}, "Optimizer": {"name": "SGD", "lr": section}}, 3)[0]
    rates = [rate(step) for step in range(18)]
    assert max(rates) == pytest.approx(0.1) and min(rates) >= 0 and all(isinstance(value, float) for value in rates)


def test_the_neck_and_the_loss_of_the_docs_pass_what_every_part_does(tmp_path, monkeypatch):
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("## Parts of your own")[2]
    assert all("# (" in line for line in re.findall(r"def forward\(self, (?!out: dict).*", text))
    (tmp_path / "own.py").write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    monkeypatch.setitem(EXAMPLES["neck"], "Squashed", {"class_num": 6})
    with ExitStack() as stack:
        for known in SLOTS.values():
            stack.enter_context(patch.dict(known))
        runpy.run_path(str(tmp_path / "own.py"))
        test_every_neck("Squashed", tmp_path, "cpu")
        test_every_loss("Spread", tmp_path, "cpu")


def test_a_part_without_an_example_is_told_apart():
    with pytest.raises(pytest.fail.Exception, match=r"VehicleNeck needs a value for in_channels.*EXAMPLES\['neck'\]"):
        example(NECKS, "VehicleNeck")


@pytest.fixture
def config(tmp_path, monkeypatch):
    """config({'Arch.Head': None, ...}) -> the checked configuration of a tiny model for five identities."""
    monkeypatch.chdir(tmp_path)
    lines = [f"{i}.jpg {10 * (i % CLASSES)} {i % 2}" for i in range(ROWS)]
    write_text("train.txt", "\n".join(lines) + "\n")
    content = {
        "Global": {"device": "cpu", "eval_during_train": False, "epochs": 1, "image_shape": [3, 32, 32], "seed": 3},
        "DataLoader": {
            "Train": {
                "dataset": {"name": "VeriWild", "image_root": ".", "cls_label_path": "train.txt"},
                "sampler": {"name": "PKSampler", "batch_size": 4, "sample_per_id": 2},
            }
        },
        "Arch": {
            "name": "RecModel",
            "Backbone": {"name": "test_efficientnet", "pretrained": False},
            "BackboneStopLayer": {"name": "avg_pool"},
            "Neck": {"name": "VehicleNeck", "out_channels": 12},
            "Head": {"name": "ArcMargin", "margin": 0.2},
        },
        "Loss": {"Train": [{"SupConLoss": {"weight": 1.0}}]},
        "Optimizer": {"name": "Momentum", "lr": {"name": "ConstLR", "learning_rate": 0.01}},
    }

    def write(changes=None):
        write_text("config.yaml", yaml.safe_dump(content))
        return load_config("config.yaml", changes)

    return write


def by_hand(neck=True, head=True):
    backbone = nn.Sequential(nn.Conv2d(3, CHANNELS, 3), nn.AdaptiveAvgPool2d(1))
    return RecModel(
        backbone,
        VehicleNeck(CHANNELS, 6) if neck else None,
        ArcMargin(6 if neck else CHANNELS, CLASSES) if head else None,
    )


@pytest.mark.parametrize("labels", [False, True])
@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("neck", [False, True])
def test_output_keys(neck, head, labels):
    out = by_hand(neck, head)(torch.randn(2, 3, 8, 8), torch.tensor([0, 1]) if labels else None)
    assert set(out) == {"backbone", "features", *["neck"] * neck, *["logits"] * (head and labels)}
    assert out["backbone"].shape == (2, CHANNELS, 1, 1)
    assert torch.equal(out["features"], out["neck"] if neck else out["backbone"].flatten(1))
    assert "logits" not in out or out["logits"].shape == (2, CLASSES)


def test_maps_without_a_neck_stay_maps():
    assert RecModel(nn.Conv2d(3, 4, 3))(torch.randn(2, 3, 8, 8))["features"].shape == (2, 4, 6, 6)


def test_labels_add_the_margin_in_training_only():
    model, x, y = by_hand(), torch.randn(2, 3, 8, 8), torch.tensor([0, 1])
    trained, evaluated = model(x, y), model.eval()(x, y)
    torch.testing.assert_close(evaluated["logits"], cosine(evaluated["features"], model.head.weight))
    assert (trained["logits"] - model.head.scale * evaluated["logits"]).abs()[[0, 1], [0, 1]].gt(1).all()


def test_describe_says_what_each_part_is(config):
    model = build_model(config())
    backbone, neck, head = model.describe().splitlines()
    sizes = [f"{sum(p.numel() for p in part.parameters()):,}" for part in (model.backbone, model.neck, model.head)]
    assert "cut at avg_pool" in backbone and str(model.backbone.out_shape) in backbone and "EfficientNet" in backbone
    assert "VehicleNeck" in neck and "ArcMargin" in head and "training only" in head
    assert [line.split()[-2] for line in (backbone, neck, head)] == sizes
    assert by_hand(neck=False, head=False).describe().split() == [
        "backbone",
        "Sequential",
        "not",
        "cut",
        "448",
        "parameters",
    ]


def test_sizes_are_derived(config):
    model = build_model(config())
    assert model.backbone.out_shape == (256, 1, 1) and model.neck.conv.in_channels == 256
    assert model.head.weight.shape == (CLASSES, 12) and model.head.margin == 0.2
    assert all(module.training for module in model.modules())
    out = model(torch.randn(2, 3, 32, 32), torch.tensor([0, 4]))
    assert out["features"].shape == (2, 12) and out["logits"].shape == (2, CLASSES)


@pytest.mark.parametrize("neck", [None, {"name": "BNNeck"}], ids=["none", "BNNeck"])
@pytest.mark.parametrize("stop", ["avg_pool", "flatten"])
def test_the_head_takes_the_size_of_what_comes_before(config, neck, stop):
    model = build_model(config({"Arch.Neck": neck, "Arch.BackboneStopLayer.name": stop}))
    assert model.head.weight.shape == (CLASSES, 256)
    assert model(torch.randn(2, 3, 32, 32))["features"].shape == (2, 256)


def test_a_neck_on_maps(config):
    model = build_model(config({"Arch.BackboneStopLayer.name": "blocks.2", "Arch.Head": None}))
    channels, height, width = model.backbone.out_shape
    assert height * width > 1 and model.neck.conv.in_channels == channels
    assert model(torch.randn(2, 3, 32, 32))["features"].shape == (2, 12 * height * width)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"Arch.Neck.in_channels": 2048},
            r"Arch\.Neck\.in_channels is 2048, but the backbone cut at avg_pool gives 256",
        ),
        ({"Arch.Head.embedding_size": 512}, r"Arch\.Head\.embedding_size is 512, but Arch\.Neck gives .* 12"),
        (
            {"Arch.Neck": None, "Arch.Head.embedding_size": 512},
            r"embedding_size is 512, but Arch\.Backbone gives .* 256",
        ),
        ({"Arch.Neck": None, "Arch.BackboneStopLayer.name": "blocks.2"}, r"Arch\.Neck: is missing, .* gives maps"),
        ({"Arch.Neck.kernel_size": 3}, r"Arch\.Neck: cannot take the \(256, 1, 1\)"),
        ({"Arch.BackboneStopLayer.name": "blokcs.2"}, r"Arch\.BackboneStopLayer: .*blocks\.2"),
        ({"Arch.Backbone.name": "test_eficientnet"}, r"Arch\.Backbone: no backbone .*test_efficientnet"),
        ({"Arch.Backbone.widht": 2}, r"Arch\.Backbone: .*widht"),
        ({"Arch.Backbone.stop": "flatten"}, r"Arch\.Backbone.*: .*stop"),
        ({"Arch.name": "RecModell"}, r"Arch\.name: there is no model 'RecModell'; did you mean 'RecModel'"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_sizes_and_names_that_conflict(config, changes, message):
    with pytest.raises(ConfigError, match=message):
        build_model(config(changes))


def test_class_num_below_the_labels_of_the_list(config):
    with pytest.raises(DataError, match=r"line 2: label 10 is out of range: Global\.class_num is 4, .* 5 identities"):
        build_loaders(config({"Global.class_num": 4}))


@pytest.mark.parametrize(
    "changes, classes", [({"Arch.Head.class_num": 60}, None), ({"Global.class_num": 60}, 41), ({}, 60)], ids=str
)
def test_no_list_is_read_where_the_number_of_classes_is_given(config, tmp_path, changes, classes):
    (tmp_path / "train.txt").unlink()
    assert len(build_model(config(changes), classes).head.weight) == 60
    with pytest.raises(DataError, match=r"^DataLoader\.Train\.dataset: cls_label_path: there is no file .*train\.txt$"):
        build_model(config())


def test_a_margin_by_frequency_counts_the_training_list(config, tmp_path):
    cfg = config({"Arch.Head.margin": {"by": "frequency", "low": 0.1, "high": 0.3}})
    margins = build_model(cfg).head.margins  # of eight images, the first three identities have two each
    assert margins.tolist() == pytest.approx([0.1, 0.1, 0.1, 0.3, 0.3])
    (tmp_path / "train.txt").unlink()
    assert build_model(cfg, CLASSES).head.margins is None
    with pytest.raises(ConfigError, match=r"^Arch\.Head\.class_counts: comes from the data"):
        build_model(config({"Arch.Head.margin": {"by": "frequency"}, "Arch.Head.class_counts": [1]}), CLASSES)


def test_interpolated_weights_are_on_the_line_between():
    start, trained = (nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)) for _ in range(2))
    trained(torch.randn(8, 3))
    before, after = start.state_dict(), trained.state_dict()
    for alpha in (0.0, 0.4, 1.0):
        state = interpolate(before, after, alpha)
        assert state.keys() == after.keys() and state["1.num_batches_tracked"] == 1
        for name in ("0.weight", "0.bias", "1.running_mean", "1.running_var"):
            torch.testing.assert_close(state[name], (1 - alpha) * before[name] + alpha * after[name])
    assert all(torch.equal(value, after[name]) for name, value in interpolate(before, after, 1.0).items())
    start.load_state_dict(interpolate(before, after, 0.5))
    with pytest.raises(ValueError, match=r"'0\.weight' is \(4, 3\) before and \(5, 3\) after: only weights of one"):
        interpolate(before, after | {"0.weight": torch.zeros(5, 3)}, 0.5)
    with pytest.raises(ValueError, match=r"'head\.weight' is absent before and \(2,\) after"):
        interpolate(before, after | {"head.weight": torch.zeros(2)}, 0.5)


def test_the_average_of_weights_is_their_mean():
    states = [{"w": torch.full((2,), value), "count": torch.tensor(i)} for i, value in enumerate((1.0, 2.0, 6.0))]
    mean = average(iter(states))
    assert torch.allclose(mean["w"], torch.full((2,), 3.0)) and mean["count"] == 2 and states[0]["w"][0] == 1
    with pytest.raises(ValueError, match=r"'w' is \(2,\) before and \(3,\) after"):
        average([states[0], {**states[1], "w": torch.zeros(3)}])
    with pytest.raises(ValueError, match="no weights to take the mean of"):
        average([])


def test_more_classes_than_the_file_says(config):
    with pytest.raises(ConfigError, match=r"^Global\.class_num is 4, but there are 5 training identities; correct"):
        build_model(config({"Global.class_num": 4}), 5)


def test_the_seed_alone_decides_the_weights(config):
    cfg = config()
    kept, state = copy.deepcopy(cfg), torch.get_rng_state()
    first = build_model(cfg).state_dict()
    assert torch.equal(torch.get_rng_state(), state) and cfg == kept
    torch.manual_seed(11)
    again, other = build_model(cfg).state_dict(), build_model(config({"Global.seed": 4})).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    for part in ("backbone.model.conv_stem.weight", "neck.conv.weight", "head.weight"):
        assert not torch.equal(first[part], other[part])


@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".pth"])
def test_load_weights_counts_what_fits(tmp_path, suffix):
    model, other, path = by_hand(), by_hand(), tmp_path / f"weights{suffix}"
    state = {k: v for k, v in other.state_dict().items() if k != "neck.conv.bias"}
    state |= {"head.weight": torch.zeros(7, 6), "unknown": torch.zeros(1)}
    kept = model.head.weight.clone()
    save_file(state, path) if suffix == ".safetensors" else torch.save({"model": state, "epoch": 3}, path)
    assert load_weights(model, path) == (
        f"{path}: 3 of the model's 5 tensors loaded; left as they were: head.weight, neck.conv.bias"
    )
    assert torch.equal(model.neck.conv.weight, other.neck.conv.weight) and torch.equal(model.head.weight, kept)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"neck.conv.weight": torch.zeros(2, 2)}, r"nothing in .* fits this model .*neck.conv.weight \(2, 2\)"),
        ({"epoch": 3}, "nothing in .* fits this model .*begins with no tensor"),
        ([torch.zeros(1)], "nothing in .* fits this model"),
        ({"model": nn.Linear(1, 1)}, "holds other things than tensors"),
    ],
    ids=["shape", "no tensors", "no mapping", "objects"],
)
def test_load_weights_refuses(tmp_path, content, message):
    torch.save(content, tmp_path / "weights.pt")
    with pytest.raises(ConfigError, match=rf"Global\.pretrained_model: .*{message}"):
        load_weights(by_hand(), tmp_path / "weights.pt")


def test_load_weights_runs_no_code(tmp_path):
    (tmp_path / "weights.pt").write_bytes(pickle.dumps({"head.weight": Touch(tmp_path / "touched")}, 2))
    with pytest.raises(ConfigError, match="could run code"):
        load_weights(by_hand(), tmp_path / "weights.pt")
    assert not (tmp_path / "touched").exists()


class Touch:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (type(self.path).touch, (self.path,))


@pytest.mark.parametrize("name", ["weights.safetensors", "weights.pt"])
def test_load_weights_names_a_file_that_is_missing_or_broken(tmp_path, name):
    for content in (None, b"", b"no weights"):
        if content is not None:
            (tmp_path / name).write_bytes(content)
        with pytest.raises(ConfigError, match=rf"Global\.pretrained_model: .*{name}"):
            load_weights(by_hand(), tmp_path / name)


def test_pretrained_model_and_pretrained_backbone_come_from_files(config, tmp_path, monkeypatch, capsys):
    trained = build_model(config({"Global.seed": 9}))
    save_file(trained.state_dict(), "model.safetensors")
    model = build_model(config({"Global.pretrained_model": "model.safetensors"}))
    assert torch.equal(model.head.weight, trained.head.weight) and "tensors loaded" in capsys.readouterr().out
    whole = {k.removeprefix("backbone.model."): v for k, v in trained.state_dict().items() if k.startswith("backbone")}
    (tmp_path / "weights").mkdir()
    save_file(whole, "weights/backbone.safetensors")
    cfg = config(
        {
            "Arch.Backbone.pretrained": "weights/backbone.safetensors",
            "DataLoader.Train.dataset.cls_label_path": str(tmp_path / "train.txt"),
        }
    )
    (tmp_path / "notebooks").mkdir()
    monkeypatch.chdir(tmp_path / "notebooks")
    monkeypatch.setattr("recnb.storage.ROOT", tmp_path)
    assert torch.equal(build_model(cfg).state_dict()["backbone.model.conv_stem.weight"], whole["conv_stem.weight"])


def test_a_new_head_takes_ten_lines(config):
    try:

        @HEADS.register
        class CosineSoftmax(nn.Module):
            """Scaled cosines without a margin."""

            def __init__(self, embedding_size: int, class_num: int, scale: float = 16.0):
                super().__init__()
                self.weight, self.scale = nn.Parameter(torch.randn(class_num, embedding_size)), scale

            def forward(self, features, y=None):  # (B, D), (B,) -> (B, class_num)
                return cosine(features, self.weight) * (self.scale if self.training and y is not None else 1)

        cfg = config({"Arch.Head": {"name": "CosineSoftmax", "scale": 8}, "Loss.Train": [{"CELoss": {}}]})
        model, loss = build_model(cfg), build_loss(cfg)
        optimizer = build_optimizer(cfg)(model.parameters(), lr=0.01)
        x, y = torch.randn(4, 3, 32, 32), torch.tensor([0, 1, 2, 4])
        before = model.head.weight.detach().clone()
        value = loss(model(x, y), y)
        value.backward()
        optimizer.step()
        assert model.head.scale == 8 and not torch.equal(model.head.weight, before) and value.isfinite()
        with pytest.raises(ConfigError, match="did you mean 'CosineSoftmax'"):
            config({"Arch.Head.name": "CosinSoftmax"})
    finally:
        HEADS.pop("CosineSoftmax", None)


def test_a_model_composed_by_hand_trains():
    model = RecModel(nn.Sequential(nn.Flatten(), nn.Linear(12, 8)), FC(8, 4), ArcMargin(4, 2, margin=0.1, scale=8))
    loss = CombinedLoss([(1.0, LOSSES["CELoss"]()), (0.5, LOSSES["SupConLoss"]())])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    x, y = torch.randn(8, 3, 2, 2, generator=torch.Generator().manual_seed(0)), torch.arange(8) % 2
    values = []
    for _ in range(30):
        optimizer.zero_grad()
        value = loss(model(x, y), y)
        value.backward()
        optimizer.step()
        values.append(value.item())
    assert values[-1] < 0.7 * values[0] and set(loss.terms) == {"CELoss", "SupConLoss"}


def test_a_replaced_file_is_whole_or_the_old_one(tmp_path):
    path = tmp_path / "new" / "file.txt"
    write_text(path, "old\n")
    with pytest.raises(KeyError), replacing(path) as temporary:
        temporary.write_text("half")
        assert path.read_text() == "old\n"
        raise KeyError
    assert path.read_text() == "old\n" and list(path.parent.iterdir()) == [path]
    with replacing(str(path)) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new" and list(path.parent.iterdir()) == [path]


def test_a_file_that_was_never_written_stays_absent(tmp_path):
    with pytest.raises(KeyError), replacing(tmp_path / "file") as temporary:
        temporary.write_text("half")
        raise KeyError
    with pytest.raises(FileNotFoundError), replacing(tmp_path / "file"):
        pass
    assert not list(tmp_path.iterdir())


def test_written_text_is_utf8(tmp_path):
    write_json(tmp_path / "a.json", {"name": "tête", "values": [1, 0.5]})
    write_text(tmp_path / "a.txt", "tête")
    assert json.loads((tmp_path / "a.json").read_text()) == {"name": "tête", "values": [1, 0.5]}
    assert (tmp_path / "a.txt").read_bytes() == "tête".encode()


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"Arch.Head": None},
        {"Global.class_num": 41},
        {"Arch.Head.class_num": 60, "Global.seed": 7},
        {"DataLoader.Train.dataset.relabel": False},
        {"Optimizer.lr.learning_rate": 1e-5},
    ],
    ids=str,
)
def test_the_written_configuration_gives_the_same_run(config, tmp_path, monkeypatch, changes):
    cfg = config(changes)
    kept, model = copy.deepcopy(cfg), build_model(cfg)
    run = open_run(tmp_path / "run", cfg)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    again = load_config(run / "config.yaml")
    assert cfg == kept and again == resolved(again) == yaml.safe_load((run / "config.yaml").read_text())
    assert again["DataLoader"]["Train"]["dataset"]["cls_label_path"] == str(tmp_path / "train.txt")
    state, repeated = model.state_dict(), build_model(again).state_dict()
    assert state.keys() == repeated.keys() and all(torch.equal(state[name], repeated[name]) for name in state)
    assert (
        open_run(tmp_path / "run again", again).joinpath("config.yaml").read_text() == (run / "config.yaml").read_text()
    )


def test_the_resolved_configuration_holds_what_was_derived(config, tmp_path):
    cfg = config({"Arch.Backbone.pretrained": "weights.pth", "Global.pretrained_model": "model.safetensors"})
    for file in ("weights.pth", "model.safetensors"):
        write_text(file, "")
    full = resolved(cfg)
    assert full["Arch"]["Head"]["class_num"] == CLASSES and full["DataLoader"]["Train"]["dataset"]["relabel"] is True
    assert full["Arch"]["Backbone"]["pretrained"] == str(tmp_path / "weights.pth")
    assert full["Global"]["pretrained_model"] == str(tmp_path / "model.safetensors")


def test_the_run_folder_says_what_it_was_made_with(config, tmp_path):
    environment = json.loads((open_run(tmp_path / "run", config()) / "env.json").read_text())
    assert environment["seed"] == 3 and environment["device"] == "cpu"
    assert environment["packages"]["torch"] == torch.__version__.split("+")[0]
    write_text(tmp_path / "file", "")
    with pytest.raises(ConfigError, match=r"run_dir: .*file/run cannot be made"):
        open_run(tmp_path / "file" / "run", config())


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Global.class_num": 10**9}, r"^Arch.Head: its weights need [\d,.]+ GiB of memory, and there are [\d.,]+;"),
        ({"Arch.Neck.out_channels": 10**6}, r"^Arch.Neck: its weights need .* GiB of memory"),
        (
            {
                "Arch.Backbone": {"name": "test_vit", "embed_dim": 300_000, "num_heads": 3},
                "Arch.BackboneStopLayer": None,
            },
            r"^Arch.Backbone: test_vit: its weights need [\d,.]+ GiB of memory",
        ),
    ],
    ids=["head", "neck", "backbone"],
)
def test_what_no_memory_can_hold_is_told_before_it_is_built(config, changes, says, monkeypatch):
    monkeypatch.setattr(weights.os, "sysconf", lambda name: 4000)  # 16 MB
    with pytest.raises(ConfigError, match=says):
        build_model(config(changes))


def test_the_optimizer_s_state_is_counted_too(monkeypatch):
    part = nn.Linear(1024, 1024, bias=False)  # 4 MiB
    monkeypatch.setattr(weights.os, "sysconf", lambda name: 10 * 2**20 if name == "SC_PHYS_PAGES" else 1)
    weights.check_room(part, 2, torch.device("cpu"), "Arch")
    with pytest.raises(ConfigError, match=r"Arch: its weights, their gradients and the optimizer's state need 0.0 GiB"):
        weights.check_room(part, 4, torch.device("cpu"), "Arch")
    weights.check_room(part.requires_grad_(False), 4, torch.device("cpu"), "Arch")
