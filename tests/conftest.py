"""What the tests share:

    drawn        a folder with images/, train.txt (15 identities x 6), query.txt and gallery.txt (9 others)
    tiny_config  writes a file of the whole schema over that set, small enough to train in seconds; returns its path
    config_file  the same as a fixture, in the test's own folder: config_file({"Global.epochs": 2}) -> path
    run_notebook executes a notebook by papermill as a user does: run_notebook(name, folder, **parameters) -> its file
    make         the learner of a changed tiny configuration: make(config_file, run folder, changes)
    trained_run  the run folder that 02_train makes of the tiny configuration, with train.ipynb in it
    device       where a test computes: "cpu" and, with `pytest -m gpu`, a GPU, which skips where there is none
    gpu          the GPU alone; with `pytest -m gpu --apart` a device of the CPU's own stands for it

The changes are dotted keys as in `load_config`, but they may add what is not there, and `...` removes what is.
"""

import os

os.environ["MPLBACKEND"] = "Agg"
os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # a GPU adds in the same order where a test asks for it
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models on busy cores: threads would wait for each other

import random
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from unittest.mock import patch

import pytest
import yaml
from filelock import FileLock

from recnb.demo.marks import draw_marks

PIXELS = 32
ROOT = Path(__file__).resolve().parents[1]


def made_once(tmp_path_factory, name: str, make) -> Path:
    """A folder that `make(folder)` fills in the first worker of pytest-xdist that wants it; the others wait for it."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    with FileLock(f"{folder}.lock"):
        if not Path(f"{folder}.made").exists():
            folder.mkdir(exist_ok=True)
            make(folder)
            Path(f"{folder}.made").touch()
    return folder


@pytest.fixture(scope="session")
def drawn(tmp_path_factory) -> Path:
    return made_once(tmp_path_factory, "drawn", partial(draw_marks, identities=24, renderings=6, size=48))


def run_notebook(name: str, folder: Path, cwd: Path = ROOT, **parameters) -> Path:
    import papermill  # seconds that other tests, and the processes that import them, need not wait

    folder.mkdir(exist_ok=True)
    with patch.dict(os.environ):
        os.environ.pop("MPLBACKEND", None)  # the notebook's own, which shows figures
        papermill.execute_notebook(
            ROOT / "notebooks" / f"{name}.ipynb",
            folder / f"{name[3:]}.ipynb",
            parameters,
            kernel_name="python3",
            language="python",
            cwd=cwd,
            progress_bar=False,
            execution_timeout=300,
        )
    return folder / f"{name[3:]}.ipynb"


@pytest.fixture(scope="session")
def trained_run(drawn, tmp_path_factory) -> Path:
    def train(folder):
        config = tiny_config(drawn, folder / "tiny.yaml")
        run_notebook("02_train", folder / "run", config=str(config), run_dir=str(folder / "run"))

    return made_once(tmp_path_factory, "trained", train) / "run"


def make(config_file, run, changes: dict | None = None):
    from recnb.recipe.data import build_loaders
    from recnb.recipe.learner import build_learner
    from recnb.recipe.model import build_model
    from recnb.recipe.schema import load_config

    cfg = load_config(config_file(changes))
    return build_learner(cfg, build_model(cfg), build_loaders(cfg), run)


def pytest_addoption(parser):
    parser.addoption(
        "--apart", action="store_true", help="run the tests for a GPU on a device that tests/apart.py makes"
    )


@pytest.fixture(scope="session")
def gpu(request) -> str:
    import torch

    if request.config.getoption("apart"):
        import apart

        apart.install()
        return apart.NAME
    if not torch.cuda.is_available():
        pytest.skip("there is no CUDA GPU here")
    return "cuda"


@pytest.fixture(scope="session", params=["cpu", pytest.param("gpu", marks=pytest.mark.gpu)])
def device(request) -> str:
    return request.getfixturevalue("gpu") if request.param == "gpu" else "cpu"


@pytest.fixture
def config_file(drawn, tmp_path):
    return lambda changes=None: tiny_config(drawn, tmp_path / "config.yaml", changes)


def tiny_config(drawn: Path, path: Path, changes: dict | None = None) -> Path:
    content = {
        "Global": {"device": "cpu", "seed": 0, "epochs": 2, "image_shape": [3, PIXELS, PIXELS], "save_interval": 0},
        "DataLoader": {
            "Train": split(drawn, "train", {"name": "PKSampler", "batch_size": 8, "sample_per_id": 2}),
            "Eval": {"Query": split(drawn, "query"), "Gallery": split(drawn, "gallery")},
        },
        "Arch": {
            "name": "RecModel",
            "Backbone": {"name": "test_resnet", "pretrained": False},
            "BackboneStopLayer": {"name": "flatten"},
            "Neck": {"name": "FC", "class_num": 16},
            "Head": {"name": "ArcMargin", "margin": 0.2, "scale": 16},
        },
        "Loss": {
            "Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 1.0, "views": 2}}],
            "Eval": [{"CELoss": {"weight": 1.0}}],
        },
        "Optimizer": {"name": "AdamW", "lr": {"name": "Cosine", "learning_rate": 0.002}},
        "Metric": {"Eval": [{"Recallk": {"topk": [1, 5]}}, {"mAP": {}}]},
    }
    for key, value in (changes or {}).items():
        change(content, key.split("."), value)
    path.write_text(yaml.safe_dump(content, sort_keys=False, allow_unicode=True), encoding="utf-8")
    return path


def split(drawn: Path, name: str, sampler: dict | None = None) -> dict:
    ops = [{"ResizeImage": {"size": PIXELS}}, {"NormalizeImage": {}}]
    if name == "train":
        ops.insert(1, {"RandFlipImage": {"flip_code": 1}})
    return {
        "dataset": {
            "name": "VeriWild",
            "image_root": str(drawn / "images"),
            "cls_label_path": str(drawn / f"{name}.txt"),
            "transform_ops": ops,
        },
        "sampler": sampler or {"name": "DistributedBatchSampler", "batch_size": 32},
        "loader": {"num_workers": 0},
    }


@contextmanager
def flipped(path: Path, rng: random.Random):
    """Within the block, one bit of a file is another."""
    whole = path.read_bytes()
    content = bytearray(whole)
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)
    try:
        yield
    finally:
        path.write_bytes(whole)


def change(content: dict, steps: list[str], value) -> None:
    node = content
    for step in steps[:-1]:
        node = node[int(step)] if isinstance(node, list) else node.setdefault(step, {})
    step = int(steps[-1]) if isinstance(node, list) else steps[-1]
    if value is ...:
        del node[step]
    else:
        node[step] = value
