"""The 36 configurations of PaddleClas with a RecModel: what trains and evaluates as written, and what does not."""

import re
import shutil
from collections import Counter

import numpy as np
import pytest
from conftest import ROOT
from paddleclas import CONFIGS, compose, metric_names, run, written

from recnb.models.backbones import ALIASES
from recnb.models.paddle import FAMILIES
from recnb.recipe.lint import lint
from recnb.recipe.schema import architectures
from recnb.registry import ConfigError

REFUSED = {  # what each wants and this has not
    "GeneralRecognition/Gallery2FC_PPLCNet_x2_5": "IndexProcess: it configures a tool",
    "metric_learning/adaface_ir18": "Global.eval_mode: 'adaface' is not supported",
    "reid/MetaBIN_ResNet50_cross_domain": "Global.train_mode: other training loops (metabin",
    "ssl/CCSSL/FixMatchCCSSL_cifar100_10000_4gpu": "semi-supervised training",
    "ssl/CCSSL/FixMatchCCSSL_cifar10_4000_4gpu": "semi-supervised training",
}
MENDED = {  # what the original could not mean either: (key, the value that mends it, the sentence without it)
    "ResNet50_UReID_infer": [("DataLoader.Train.dataset.transform_ops.RandomCrop.size", [64, 32], "crop size")]
}
OTHERWISE = {  # backbones that differ from another in layers without weights
    "VGG19Sigmoid": "VGG19",
    "PPLCNet_x2_5_Tanh": "PPLCNet_x2_5",
    "ResNet50_adaptive_max_pool2d": "ResNet50",
}
QUICK = ("reid/strong_baseline/softmax_triplet_with_center", "slim/ResNet50_vehicle_reid_prune", "DeepHash/DCH")
RUNNING = [
    pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in CONFIGS if name not in REFUSED
]


@pytest.fixture
def folder(tmp_path):
    """A folder that is gone behind the test: the weights of 31 networks would fill a disk."""
    yield tmp_path
    shutil.rmtree(tmp_path)


def changed(cfg: dict, key: str, value) -> None:
    """None; sets a dotted key in place, an entry of a list by its name."""
    *steps, last = key.split(".")
    for step in steps:
        cfg = cfg[step] if isinstance(cfg, dict) else next(entry[step] for entry in cfg if step in entry)
    cfg[last] = value


def count(names) -> dict[str, int]:
    """How often each name occurs."""
    return dict(Counter(names))


def test_the_facts_agree_with_a_count_over_the_original_files():
    assert len(CONFIGS) == 36 and len(CONFIGS) - len(REFUSED) == 31
    loaders = [cfg.get("DataLoader", {}).get("Train", {}) for cfg in CONFIGS.values()]
    assert count(cfg["Global"].get("eval_mode") for cfg in CONFIGS.values()) == {
        "retrieval": 27,
        None: 7,
        "classification": 1,
        "adaface": 1,
    }
    assert count(loader.get("dataset", {}).get("name") for loader in loaders) == {
        "ImageNetDataset": 16,
        "VeriWild": 7,
        "Market1501": 5,
        "CompCars": 3,
        "ICartoonDataset": 1,
        None: 1,
        "AdaFaceDataset": 1,
        "Cifar100": 1,
        "Cifar10": 1,
    }
    losses = count(name for cfg in CONFIGS.values() for entry in cfg.get("Loss", {}).get("Train", ()) for name in entry)
    assert (losses["CELoss"], losses["SupConLoss"], losses["TripletLossV2"], len(losses)) == (28, 8, 6, 17)
    ops = count(
        name
        for loader in loaders
        for name in {name for op in loader.get("dataset", {}).get("transform_ops", ()) for name in op}
    )
    assert {name: ops[name] for name in ("RandFlipImage", "NormalizeImage", "RandomErasing", "AugMix", "Pad")} == {
        "RandFlipImage": 30,
        "NormalizeImage": 29,
        "RandomErasing": 14,
        "AugMix": 8,
        "Pad": 6,
    }


@pytest.mark.parametrize("name", [name for name in CONFIGS if name not in REFUSED])
def test_every_word_of_the_file_itself_is_known(name, folder):
    written(CONFIGS[name], folder)


def test_the_docs_compare_the_weights_of_every_backbone():
    page = (ROOT / "docs" / "paddleclas.md").read_text(encoding="utf-8")
    names = {
        section["Backbone"]["name"]
        for name in set(CONFIGS) - set(REFUSED)
        for _, section in architectures(CONFIGS[name])
    }
    assert len(names) == 13
    for name in names:
        assert f"| {OTHERWISE.get(name, name)} | 1.00000000 |" in page
        assert any(re.match(family, ALIASES.get(name, name)) for family in FAMILIES)


@pytest.mark.parametrize("name", RUNNING)
def test_it_trains_and_evaluates(name, folder):
    cfg = compose(name, folder)
    for key, value, sentence in MENDED.get(name, ()):
        with pytest.raises(ConfigError) as error:
            run(cfg, folder)
        assert sentence in str(error.value)
        changed(cfg, key, value)
    history, moved = run(cfg, folder)
    losses = ["train_loss", *(next(iter(entry)) for entry in cfg["Loss"]["Train"])]
    assert history["epoch"].tolist() == [1]
    assert np.isfinite(history[losses]).all(axis=None)
    assert history[metric_names(cfg)].stack().between(0, 1).all()
    assert moved and all(moved.values()), f"parts whose weights stand still: {moved}"
    assert ("Slim" in [finding.place for finding in lint(written(cfg, folder))]) == ("Slim" in cfg)


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_not_here_is_named_in_one_sentence(name, folder):
    with pytest.raises(ConfigError) as error:
        written(CONFIGS[name], folder)
    assert REFUSED[name] in str(error.value) and "\n" not in str(error.value)
