"What the lint finds, each finding planted and then taken away again; the shipped configurations are free of them."
import pytest

from recnb import build_loaders, load_config
from recnb.lint import lint

PLANTED = [
    ("DataLoader.Train.sampler", {"name": "DistributedBatchSampler", "batch_size": 8}, "take PKSampler"),
    ("Loss.Train.1.SupConLoss.views", 3, "write views: 2"),
    ("Loss.Train", [{"CELoss": {"weight": 0.5}}], "write weight: 1.0 for the original's behaviour"),
    ("Arch.infer_add_softmax", True, "write infer_add_softmax: False"),
    ("Optimizer.lr.warmup_epoch", 2, "lower it or raise Global.epochs"),
]


def mends(config) -> list[str]:
    return [finding.mend for finding in lint(load_config(config))]


def test_an_ordinary_configuration_has_no_finding(config_file):
    assert mends(config_file()) == []


@pytest.mark.parametrize(("key", "value", "mend"), PLANTED)
def test_each_finding_names_what_would_mend_it(config_file, key, value, mend):
    assert mends(config_file({key: value})) == [mend]


@pytest.mark.parametrize(("ops", "mend"), [
    ([{"RandomErasing": {}}, {"NormalizeImage": {}}], "move it behind NormalizeImage"),
    ([{"NormalizeImage": {}}, {"RandomErasing": {"mean": [0.5, 0.5, 0.5]}}], "write mean: [0., 0., 0.]"),
    ([{"NormalizeImage": {}}, {"RandomErasing": {}}], None),
])
def test_erasing_belongs_behind_the_normalisation(config_file, ops, mend):
    found = mends(config_file({"DataLoader.Train.dataset.transform_ops": [{"ResizeImage": {"size": 32}}, *ops]}))
    assert found == ([mend] if mend else [])


def test_test_identities_that_are_trained_on_are_counted(config_file, drawn):
    cfg = load_config(config_file())
    assert lint(cfg, build_loaders(cfg)) == []
    cfg = load_config(config_file({"DataLoader.Train.dataset.cls_label_path": str(drawn / "gallery.txt")}))
    assert "9 of 9 identities" in lint(cfg, build_loaders(cfg))[0].what


@pytest.mark.parametrize("name", ["demo", "grocery", "omniglot"])
def test_the_shipped_configurations_have_no_finding(name):
    assert mends(f"configs/{name}.yaml") == []
