"""A run folder is one writer's, of one configuration over the same files; who is refused has changed nothing in it."""

import hashlib
import random
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import flipped, tiny_config

from recnb import storage
from recnb.data.images import DataError
from recnb.models.recmodel import RecModel
from recnb.models.weights import read_weights
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.experiment import train
from recnb.runs.folder import load_run, open_run, read_lists, told
from recnb.storage import LockedError, check_sums, seal
from recnb.training.checkpoints import kept

HOLD = """
import sys
from pathlib import Path
from recnb.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
STEPS = {"name": "MultiStepDecay", "learning_rate": 0.002, "milestones": [1, 3]}  # does not know the end


def whole(folder: Path) -> dict[str, str]:
    """The SHA-256 of every file of a folder."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture(scope="module")
def finished(drawn, tmp_path_factory):
    """A folder with the lists, a file of weights, and a run over them."""
    folder = tmp_path_factory.mktemp("finished")
    for name in ("train", "query", "gallery"):
        shutil.copy(drawn / f"{name}.txt", folder)
    cfg = load_config(written(drawn, folder))
    torch.manual_seed(0)
    train(cfg, folder / "run")
    return folder


@pytest.fixture
def place(finished, tmp_path):
    """A copy of that folder."""
    return shutil.copytree(finished, tmp_path / "place")


def written(drawn, folder: Path, changes: dict | None = None) -> Path:
    lists = {
        f"DataLoader.{part}.dataset.cls_label_path": str(folder / f"{part.rpartition('.')[2].lower()}.txt")
        for part in ("Train", "Eval.Query", "Eval.Gallery")
    }
    more = {"Global.epochs": 1, "Global.save_interval": 1, "Optimizer.lr": dict(STEPS)}
    return tiny_config(drawn, folder / "config.yaml", {**lists, **more, **(changes or {})})


@pytest.fixture
def again(drawn, finished, place, monkeypatch):
    """Train into the copy with a changed configuration: again(changes)."""

    def run(changes=None, **overrides):
        text = written(drawn, place, changes).read_text().replace(str(place), str(finished))
        (place / "config.yaml").write_text(text)
        return train(load_config(place / "config.yaml", overrides), place / "run")

    return run


def edit(path: Path, change) -> str:
    """Change the lines of a list; returns what it held."""
    before = path.read_text()
    path.write_text("".join(change(before.splitlines(keepends=True))))
    return before


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"Optimizer.lr.learning_rate": 0.5, "Global.seed": 99}, r"latest.pt belongs to another configuration"),
        ({"Optimizer.lr.learning_rate": 0.5, "Global.epochs": 3}, r"latest.pt belongs to another configuration"),
        ({"Global.epoch": 3}, "Global.epoch: there is no such key"),
        ({"Global.devices": 0}, "Global.devices"),
        ({"Loss.Train": [{"CELoss": {"weight": 0}}]}, "every weight is 0"),
    ],
    ids=["configuration", "longer", "key", "value", "finding"],
)
def test_who_asks_for_another_run_is_refused_and_has_changed_nothing(place, again, changes, says):
    before = whole(place / "run")
    with pytest.raises(ConfigError, match=says):
        again(changes)
    assert whole(place / "run") == before


def test_an_image_that_is_missing_is_found_before_anything_is_written(place, finished, again):
    before = whole(place / "run")
    kept_text = edit(finished / "query.txt", lambda lines: [*lines, "nowhere.png 15 0\n"])
    try:
        with pytest.raises(DataError, match=r"nowhere\.png is not there"):
            again()
    finally:
        (finished / "query.txt").write_text(kept_text)
    assert whole(place / "run") == before


def test_a_living_owner_keeps_all_of_its_folder(place, again, monkeypatch):
    monkeypatch.setattr(storage, "PATIENCE", 0.1)
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(place / "run")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    before = whole(place / "run")
    try:
        with pytest.raises(LockedError, match=rf"process {process.pid} on"):
            again()
        assert whole(place / "run") == before
    finally:
        process.communicate()


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        (
            "train",
            lambda lines: lines[:-1],
            r"Train.dataset.cls_label_path .*train.txt: 90 lines then and 89 now, line 90 is",
        ),
        (
            "train",
            lambda lines: lines[::-1],
            r"Train.dataset.cls_label_path .*train.txt: 90 lines then and 90 now, line 1 is",
        ),
        ("gallery", lambda lines: [*lines[:5], lines[6], lines[5], *lines[7:]], r"Gallery.*, line 6 is the first"),
    ],
    ids=["shorter", "reversed", "swapped"],
)
def test_a_list_that_has_changed_is_told_by_its_first_line_that_differs(place, finished, again, name, change, says):
    before, text = whole(place / "run"), edit(finished / f"{name}.txt", change)
    try:
        with pytest.raises(ConfigError, match=says):
            again()
        assert whole(place / "run") == before
        again({"Global.accept_changes": True})
    finally:
        (finished / f"{name}.txt").write_text(text)
    assert kept(place / "run" / "checkpoints" / "latest.pt")["epoch"] == 1


@pytest.mark.parametrize("sealed", [False, True], ids=["as it is", "with a checksum that is right"])
@pytest.mark.parametrize(
    "change", [{"rng": ...}, {"history": "none"}, {"epoch": -5}, {"batch": "2"}, {"best": []}], ids=str
)
def test_a_checkpoint_that_was_edited_is_refused_and_nothing_has_changed(place, again, change, sealed):
    latest = place / "run" / "checkpoints" / "latest.pt"
    state = {**torch.load(latest, weights_only=True), **change}
    torch.save({name: value for name, value in state.items() if value is not ...}, latest)
    if sealed:
        seal(latest)
    before = whole(place / "run")
    with pytest.raises(ConfigError, match=r"latest.pt: .*delete it to begin anew"):
        again()
    assert whole(place / "run") == before


def test_a_list_of_the_evaluation_that_is_no_longer_what_was_judged_is_told_when_the_run_is_opened(finished, place):
    for name, change in (
        ("query", lambda lines: [lines[1], lines[0], *lines[2:]]),
        ("gallery", lambda lines: [*lines[:-1], lines[-1].replace(lines[-1].split()[1], "99")]),
        ("gallery", lambda lines: [*lines[:-1], lines[-1].rstrip() + "9\n"]),
    ):
        text = edit(finished / f"{name}.txt", change)
        try:
            with pytest.raises(ConfigError, match=rf"{name}.txt has .* where embeddings has .*the list has changed"):
                load_run(place / "run").lists()
        finally:
            (finished / f"{name}.txt").write_text(text)
    opened, rng = load_run(place / "run"), random.Random(0)
    judged = [[*told(images)] for images in opened.lists()]
    features = opened.query_features, opened.gallery_features
    for _ in range(40):  # a list that is told, or cannot be read and is taken as the run kept it
        path = finished / rng.choice(("query.txt", "gallery.txt"))
        with flipped(path, rng):
            try:
                assert [[*told(images)] for images in read_lists(place / "run", opened.cfg, features)] == judged
            except ConfigError as error:
                assert path.name in str(error)


def test_weights_that_have_changed_are_named(config_file, tmp_path):
    def start(seed):
        torch.manual_seed(seed)
        torch.save({"head.weight": torch.randn(15, 16)}, tmp_path / "weights.pth")
        cfg = load_config(config_file({"Global.pretrained_model": str(tmp_path / "weights.pth"), "Global.epochs": 1}))
        return train(cfg, tmp_path / "run")

    start(0)
    with pytest.raises(
        ConfigError, match=r"belongs to other files \(Global.pretrained_model .*weights.pth: the weights have changed"
    ):
        start(1)


@pytest.mark.parametrize("seed", range(3))
def test_a_bit_that_flips_is_told_with_the_name_of_its_file(place, seed):
    rng, run = random.Random(seed), place / "run"
    apart = {".ipynb", ".html", ".log"}  # which nothing reads back
    files = [path for path in sorted(run.rglob("*")) if path.is_file() and path.suffix not in apart]
    names = {str(path.relative_to(run)) for path in files}
    assert {"config.yaml", "contents.json", "SHA256SUMS", "model.safetensors", "embeddings/query.npy"} <= names
    for path in (path for path in files if path.stat().st_size):
        with flipped(path, rng), pytest.raises(ConfigError, match=path.name):
            read_all(run)
    read_all(run)


def read_all(run: Path) -> RecModel:
    """Read every file of a run."""
    for path in (run / "checkpoints").glob("*.pt"):
        kept(path)
    read_weights(run / "checkpoints" / "best.safetensors")
    return load_run(run).model()


def test_a_run_does_not_go_on_from_values_before_training_that_are_damaged(finished, place, again):
    for seed in range(6):
        if seed == 3:  # from here on it is one that has not ended
            open_run(place / "run", load_config(finished / "config.yaml"))
        with flipped(place / "run" / "queries.csv", random.Random(seed)):
            before = whole(place / "run")
            with pytest.raises(ConfigError, match=r"queries.csv: .* not as it was written"):
                again()
            assert whole(place / "run") == before
    (place / "run" / "metrics.json").write_text("{}")
    again()
    assert load_run(place / "run").metrics["mAP"], "what is not read is written anew"


def test_a_run_that_goes_on_is_not_measured_by_the_checksums_of_what_it_was(finished, place, monkeypatch):
    open_run(place / "run", load_config(finished / "config.yaml"))
    assert check_sums(place / "run").keys() == {"queries.csv"}
    assert load_run(place / "run").metrics
