"""The starters for foundation models, with random weights of a tiny transformer: what is trained, how fast, exported.

Their real weights are hundreds of megabytes; the recipes themselves are not measured here.
"""

import pytest
import torch
from conftest import ROOT

from recnb.deploy.export import export_model
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.reading import parse
from recnb.recipe.schema import load_config
from recnb.runs.experiment import train
from recnb.runs.folder import load_run

STARTERS = ROOT / "configs" / "starters"
SIZE = {"size": 32}


@pytest.fixture
def starter(drawn, tmp_path):
    """starter(name, changes) -> the starter's configuration over the drawn images and a tiny backbone."""
    parts = {"Train": "train", "Eval.Query": "query", "Eval.Gallery": "gallery"}
    common = {
        "Global.device": "cpu",
        "Global.epochs": 1,
        "Global.image_shape": [3, 32, 32],
        "Global.probe_cache": str(tmp_path / "cache"),
        "Arch.Backbone": {"name": "test_vit", "pretrained": False, "pool": "cls"},
        "DataLoader.Train.sampler.batch_size": 8,
        "DataLoader.Train.dataset.transform_ops.0.RandCropImage.size": 32,
        "DataLoader.Eval.Query.dataset.transform_ops.0.ResizeImage": SIZE,
        "DataLoader.Eval.Gallery.dataset.transform_ops.0.ResizeImage": SIZE,
    }
    for part, name in parts.items():
        common[f"DataLoader.{part}.loader"] = {"num_workers": 0}
        common[f"DataLoader.{part}.dataset.image_root"] = str(drawn / "images")
        common[f"DataLoader.{part}.dataset.cls_label_path"] = str(drawn / f"{name}.txt")
    return lambda name, changes=None: load_config(STARTERS / f"{name}.yaml", common | (changes or {}))


def begun(cfg: dict, run):
    loaders = build_loaders(cfg)
    return build_learner(cfg, build_model(cfg, loaders.classes), loaders, run)


def test_the_whole_network_is_tuned_gently_by_its_class_token(starter, tmp_path):
    cfg = starter("foundation_vit")
    assert cfg["DataLoader"]["Train"]["dataset"]["transform_ops"][2]["NormalizeImage"]["mean"] == [0.5, 0.5, 0.5]
    learn = begun(cfg, tmp_path)
    assert learn.model.neck is None and learn.model.head is None and learn.loaders.validation
    tokens = learn.model.backbone.model.forward_features(x := torch.randn(2, 3, 32, 32))
    assert torch.equal(learn.model.eval()(x)["features"], tokens[:, 0])
    before = [p.detach().clone() for p in learn.model.parameters()]
    learn.fit_config()
    assert {group["lr"] for group in learn.opt.opt.param_groups} == {1e-6}
    assert all(not torch.equal(p, old) for p, old in zip(learn.model.parameters(), before, strict=True) if old.any())


def test_below_a_batch_of_256_the_file_says_what_to_write(starter, tmp_path):
    text = (STARTERS / "foundation_vit.yaml").read_text().split("in place of the above.\n")[1].split("\n\n")[0]
    changes = parse("\n".join(line.removeprefix("# ") for line in text.splitlines()), "foundation_vit.yaml")
    changes["DataLoader.Train.sampler"]["batch_size"] = 8
    learn = begun(starter("foundation_vit", changes), tmp_path)
    _, y = next(iter(learn.loaders.train))
    assert len(y.unique()) == 8
    learn.fit_config()
    rates = {group["lr"]: group["params"] for group in learn.opt.opt.param_groups}
    assert sorted(rates) == [1e-6, 1.0]
    assert rates[1.0] == [learn.model.head.weight]


def test_the_probe_trains_a_linear_layer_and_a_cosine_softmax(starter, tmp_path):
    pytest.importorskip("onnx")
    cfg = starter("foundation_probe")
    train(cfg, tmp_path / "run")
    run = load_run(tmp_path / "run")
    model = run.model()
    torch.manual_seed(0)
    start = build_model(cfg, model.head.weight.shape[0])
    changed = {
        name.split(".")[0] for name, p in model.state_dict().items() if not torch.equal(p, start.state_dict()[name])
    }
    assert changed == {"neck", "head"} and run.query_features.shape[1] == 512
    assert (model.head.margin, model.head.scale) == (0.0, 16)
    assert (export_model(run, formats=["onnx"], images=20) / "parity.json").exists()


def test_lora_is_trained_kept_and_merged_for_the_export(starter, tmp_path):
    pytest.importorskip("peft")
    pytest.importorskip("onnx")
    cfg = starter("foundation_vit", {"Arch.Backbone.lora": {"rank": 2}, "Optimizer.lr.learning_rate": 0.05})
    learn = begun(cfg, tmp_path)
    assert all("lora_" in n for n, p in learn.model.named_parameters() if p.requires_grad)
    train(cfg, tmp_path / "run")
    run = load_run(tmp_path / "run")
    trained = [p for name, p in run.model().named_parameters() if "lora_B" in name]
    assert trained and all(p.any() for p in trained)
    report = export_model(run, formats=["onnx"], images=20)  # an ExportError where it is not the trained one
    assert (report / "model.onnx").exists() and "lora" not in (report / "inference.yml").read_text()
