"""The configurations of the task families: no finding, and each trains and evaluates over a miniature of its set."""

import hashlib
import shutil

import numpy as np
import pytest
import torchvision
import yaml
from paddleclas import metric_names, miniature, over_miniature, run

from recnb import load_config
from recnb.recipe.lint import lint
from recnb.recipe.reading import read_yaml
from recnb.storage import ROOT

FAMILIES = (
    "vehicle_reid",
    "vehicle_model",
    "logo",
    "cartoon_face",
    "product_sop",
    "product_inshop",
    "person_reid",
    "hashing",
    "xbm",
    "distillation",
)
QUICK = ("product_sop", "distillation")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder that is gone behind the test; a miniature of CIFAR-10 in it has the checksums that torchvision wants."""
    miniature("Cifar10", tmp_path)
    batches = tmp_path / "Cifar10" / "cifar-10-batches-py"
    sums = {file.name: hashlib.md5(file.read_bytes()).hexdigest() for file in batches.iterdir()}
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "train_list", [["data_batch_1", sums["data_batch_1"]]])
    monkeypatch.setattr(torchvision.datasets.CIFAR10, "test_list", [["test_batch", sums["test_batch"]]])
    monkeypatch.setattr(
        torchvision.datasets.CIFAR10,
        "meta",
        {"filename": "batches.meta", "key": "label_names", "md5": sums["batches.meta"]},
    )
    yield tmp_path
    shutil.rmtree(tmp_path)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_family_has_no_finding_and_says_how_to_run_it(name):
    path = f"configs/{name}.yaml"
    assert lint(load_config(path)) == []
    text = (ROOT / path).read_text(encoding="utf-8")
    head = "".join(line.lstrip("# ") for line in text.splitlines() if line.startswith("#"))
    assert f"recnb run 02_train -p config {path}" in head


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in FAMILIES]
)
def test_a_family_trains_and_evaluates(name, folder):
    cfg = over_miniature(read_yaml(f"configs/{name}.yaml"), folder, start_iter=1, xbm_size=24)
    history, moved = run(cfg, folder)
    losses = ["train_loss", *(next(iter(entry)) for entry in cfg["Loss"]["Train"])]
    assert np.isfinite(history[losses]).all(axis=None)
    assert history[metric_names(cfg)].stack().between(0, 1).all()
    assert moved and all(moved.values()), f"parts whose weights stand still: {moved}"


def test_the_paths_of_the_families_are_below_data():
    for name in FAMILIES:
        paths = [line for line in yaml.safe_dump(read_yaml(f"configs/{name}.yaml")).splitlines() if "_root:" in line]
        assert paths and all(": ./data/" in line for line in paths), name
