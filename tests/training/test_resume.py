"""Stopped at any moment and started again, a run ends with the same bits; what a checkpoint refuses, what keeps it."""

import json
import os
import shutil
import signal
import time
from pathlib import Path

import pandas as pd
import pytest
import torch
from conftest import make, run_notebook, tiny_config
from PIL import Image
from processes import start
from safetensors.torch import load_file

from recnb.cli.train import main
from recnb.data.images import DataError
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.experiment import train as trained
from recnb.storage import owner
from recnb.training.adaptor import Callback
from recnb.training.guard import TrainingError

RESULTS = ("history.csv", "model.safetensors")
SECTIONS = {
    "plain": {},
    "dropout and erasing": {
        "Arch.Backbone.drop_rate": 0.3,
        "DataLoader.Train.dataset.transform_ops": [
            {"ResizeImage": {"size": 32}},
            {"AugMix": {}},
            {"NormalizeImage": {}},
            {"RandomErasing": {}},
        ],
    },
    "workers": {"DataLoader.Train.loader.num_workers": 2, "Arch.Backbone.drop_rate": 0.3},
    "centres with an optimizer of their own": {
        "Loss.Train": [{"CELoss": {}}, {"CenterLoss": {"weight": 0.01, "feature_from": "features"}}],
        "Optimizer": [
            {"Adam": {"scope": "RecModel", "lr": {"name": "OneCycleLR", "max_learning_rate": 0.002}}},
            {"SGD": {"scope": "CenterLoss", "lr": {"name": "Constant", "learning_rate": 50.0}}},
        ],
    },
    "cross-batch memory": {"Loss.Train": [{"ContrastiveLoss_XBM": {"xbm_size": 30, "start_iter": 3}}]},
    "moving average": {"EMA": {"decay": 0.9}},
    "scaled losses": {"AMP": {"dtype": "float16"}},
    "accumulation": {"Global.update_freq": 3},
    "plateau": {
        "Optimizer.lr": {
            "name": "ReduceOnPlateau",
            "learning_rate": 0.002,
            "mode": "max",
            "patience": 0,
            "threshold": 10.0,
            "by_epoch": True,
        }
    },
    "blended images": {
        "DataLoader.Train.dataset.batch_transform_ops": [{"MixupOperator": {"alpha": 0.5}}],
        "Arch.Head": {"name": "FC"},
        "Loss.Train": [{"CELoss": {}}],
    },
}


@pytest.fixture
def deterministic(device):
    """On a GPU kernels that add in the same order each time, which the CPU's do anyway."""
    torch.use_deterministic_algorithms(device != "cpu")
    yield
    torch.use_deterministic_algorithms(False)


class Stop(Callback):
    """Ends training behind everything else at one moment: an epoch, or a step in it."""

    order = 100

    def __init__(self, epoch, step=None):
        self.at = epoch, step

    def after_batch(self):
        if self.training and (self.epoch + 1, self.iter + 1) == self.at:
            raise RuntimeError("stopped by the test")

    def after_epoch(self):
        if (self.epoch + 1, None) == self.at:
            raise RuntimeError("stopped by the test")


def interrupted(config_file, run, changes, *moments):
    """The learner of a run that was stopped at these moments, each time started anew, and has ended."""
    for moment in moments:
        with pytest.raises(RuntimeError, match="stopped by the test"):
            make(config_file, run, changes).add_cb(Stop(*moment)).fit_config()
    learn = make(config_file, run, changes)
    learn.fit_config()
    return learn


@pytest.mark.parametrize("changes", SECTIONS.values(), ids=SECTIONS)
def test_every_section_ends_the_same_when_it_is_interrupted(
    config_file, tmp_path, changes, capsys, device, deterministic
):
    changes = {
        "Global.device": "cpu" if device == "cpu" else "gpu",
        "Global.epochs": 3,
        "Global.save_steps": 2,
        **changes,
    }
    make(config_file, tmp_path / "whole", changes).fit_config()
    torch.manual_seed(17)  # a new process would have another random state
    interrupted(config_file, tmp_path / "cut", changes, (1, None), (2, 8), (3, 1))
    printed = capsys.readouterr().out
    assert "resuming behind epoch 1 of 3" in printed and " of 3 and step " in printed
    for file in RESULTS:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    states = [torch.load(tmp_path / run / "checkpoints" / "latest.pt", weights_only=True) for run in ("whole", "cut")]
    for key in ("model", "loss", "optimizer", "callbacks", "rng"):
        torch.testing.assert_close(states[0][key], states[1][key], rtol=0, atol=0)
    assert pd.read_csv(tmp_path / "whole" / "history.csv").train_loss.notna().all()


def test_another_number_of_workers_and_a_clock_that_went_back_change_no_bit(config_file, tmp_path, monkeypatch):
    changes, real = {"Global.epochs": 3, "Global.save_steps": 2, **SECTIONS["dropout and erasing"]}, time.time
    make(config_file, tmp_path / "whole", changes).fit_config()
    for moment, count in (((1, None), 2), ((2, 5), 1), ((3, 4), 0), (None, 2)):
        learn = make(config_file, tmp_path / "cut", {**changes, "DataLoader.Train.loader.num_workers": count})
        if moment is None:
            learn.fit_config()
        else:
            with pytest.raises(RuntimeError, match="stopped by the test"):
                learn.add_cb(Stop(*moment)).fit_config()
        monkeypatch.setattr(time, "time", lambda: real() - 10**7)
        for path in tmp_path.rglob("*"):  # what is there seems to come from the future
            os.utime(path, (real() + 10**7, real() + 10**7))
    for file in RESULTS:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()


def test_an_image_that_has_changed_when_a_run_goes_on_is_read_anew_and_a_broken_one_is_named(drawn, tmp_path):
    data = shutil.copytree(drawn, tmp_path / "data")
    image = data / "images" / (data / "train.txt").read_text().split()[0]
    before, weights, config = image.read_bytes(), [], tmp_path / "config.yaml"
    for cached in (None, str(tmp_path / "cache")):
        run = tmp_path / f"run {cached is None}"
        image.write_bytes(before)
        with pytest.raises(RuntimeError, match="stopped by the test"):
            make(lambda changes: tiny_config(data, config, changes), run, {"Global.cache_images": cached}).add_cb(
                Stop(1, None)
            ).fit_config()
        image.write_bytes(before[: len(before) // 2])
        held = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        with pytest.raises(DataError, match=image.name):
            trained(load_config(config), run)
        assert held == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
        Image.new("RGB", (48, 48), "red").save(image)
        trained(load_config(config), run)
        weights.append((run / "model.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_at_most_save_steps_are_repeated(config_file, tmp_path):
    changes, seen = {"Global.save_steps": 4}, []

    class Watch(Callback):
        def before_batch(self):
            if self.training:
                seen.append((self.epoch + 1, self.iter + 1))

    with pytest.raises(RuntimeError):
        make(config_file, tmp_path, changes).add_cbs([Watch(), Stop(1, 7)]).fit_config()
    make(config_file, tmp_path, changes).add_cb(Watch()).fit_config()
    assert seen == [(1, step) for step in [*range(1, 8), *range(5, 12)]] + [(2, step) for step in range(1, 12)]


def test_global_checkpoints_resumes_into_another_folder(config_file, tmp_path):
    make(config_file, tmp_path / "a", {"Global.save_interval": 1}).fit_config()
    first = tmp_path / "a" / "checkpoints" / "epoch_1.pt"
    make(config_file, tmp_path / "b", {"Global.checkpoints": str(first), "Global.save_interval": 1}).fit_config()
    assert (tmp_path / "a" / "history.csv").read_bytes() == (tmp_path / "b" / "history.csv").read_bytes()


def test_a_checkpoint_of_another_configuration_is_refused(config_file, tmp_path):
    make(config_file, tmp_path).fit_config()
    with pytest.raises(ConfigError, match=r"another configuration \(Arch.Head.margin: 0.2 -> 0.3\)"):
        make(config_file, tmp_path, {"Arch.Head.margin": 0.3}).fit_config()


def test_more_epochs_only_where_no_rate_depends_on_them(config_file, tmp_path):
    make(config_file, tmp_path / "cosine").fit_config()
    with pytest.raises(ConfigError, match=r"Global.epochs: 2 -> 4\) \(Cosine runs over Global.epochs"):
        make(config_file, tmp_path / "cosine", {"Global.epochs": 4}).fit_config()
    steps = {"Optimizer.lr": {"name": "MultiStepDecay", "learning_rate": 0.002, "milestones": [1, 3]}}
    make(config_file, tmp_path / "more", steps).fit_config()
    make(config_file, tmp_path / "more", {**steps, "Global.epochs": 4}).fit_config()
    make(config_file, tmp_path / "whole", {**steps, "Global.epochs": 4}).fit_config()
    for file in RESULTS:
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "more" / file).read_bytes()


def test_checkpoints_load_with_weights_only(config_file, tmp_path):
    make(config_file, tmp_path).fit_config()
    state = torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)
    assert state["epoch"] == 2 and json.loads(state["config"])["Global"]["seed"] == 0


def test_missing_and_foreign_checkpoints_are_named(config_file, tmp_path):
    with pytest.raises(ConfigError, match=r"Global.checkpoints: there is no file .*nowhere.pt"):
        make(config_file, tmp_path, {"Global.checkpoints": "nowhere.pt"})
    (tmp_path / "text.pt").write_text("no checkpoint")
    with pytest.raises(ConfigError, match="is not a checkpoint of a run"):
        make(config_file, tmp_path / "run", {"Global.checkpoints": str(tmp_path / "text.pt")}).fit_config()


def test_only_the_last_numbered_checkpoints_are_kept_also_by_a_run_that_ends_before_it_keeps_one(
    config_file, tmp_path, monkeypatch
):
    changes, real = {"Global.epochs": 4, "Global.save_interval": 1, "Global.keep_checkpoints": 2}, os.link

    def killed(source, path, **options):
        if Path(path).name == "epoch_3.pt":
            raise KeyboardInterrupt
        real(source, path, **options)

    with monkeypatch.context() as third, pytest.raises(KeyboardInterrupt):
        third.setattr(os, "link", killed)
        make(config_file, tmp_path, changes).fit_config()
    make(config_file, tmp_path, changes).fit_config()
    assert {path.name for path in (tmp_path / "checkpoints").glob("*.pt")} == {"latest.pt", "epoch_3.pt", "epoch_4.pt"}


def test_without_hard_links_numbered_checkpoints_are_copies(config_file, tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(1, "Operation not permitted")  # as exFAT says it

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    make(config_file, tmp_path, {"Global.epochs": 2, "Global.save_interval": 1}).fit_config()
    first, second, latest = (tmp_path / "checkpoints" / f"{name}.pt" for name in ("epoch_1", "epoch_2", "latest"))
    assert second.read_bytes() == latest.read_bytes() != first.read_bytes()


def test_a_full_disk_leaves_the_checkpoint_before(config_file, tmp_path, monkeypatch):
    save, calls = torch.save, []

    def full(state, path):
        calls.append(path)
        if len(calls) == 2:
            Path(path).write_bytes(b"half of it")
            raise OSError(28, "No space left on device")
        save(state, path)

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(TrainingError, match=r"^\S+latest.pt: the checkpoint cannot be written, the one before it is"):
        make(config_file, tmp_path).fit_config()
    assert torch.load(tmp_path / "checkpoints" / "latest.pt", weights_only=True)["epoch"] == 1
    assert {path.name for path in (tmp_path / "checkpoints").iterdir()} == {"latest.pt", "best.safetensors"}


# What follows runs in processes of its own, which are killed.
def train(config, run, prepare=None) -> int:
    if prepare:
        prepare()
    return main([str(config), "--run-dir", str(run)])


def die_in_a_checkpoint():
    """None; the fifth checkpoint will be half of one, and the process killed while it writes."""
    save, count = torch.save, [0]

    def dying(state, path):
        count[0] += 1
        save(state, path)
        if count[0] == 5:
            os.truncate(path, 1000)
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = dying


def ended(process) -> int:
    process.join()
    return process.exitcode


@pytest.fixture(scope="module")
def whole(drawn, tmp_path_factory):
    """A configuration, and the folder of its run that was left alone."""
    folder = tmp_path_factory.mktemp("whole")
    config = tiny_config(
        drawn,
        folder / "tiny.yaml",
        {"Global.epochs": 4, "Global.save_steps": 3, "Global.print_batch_step": 1, "EMA": {"decay": 0.9}},
    )
    assert ended(start(folder / "log", train, config, folder / "run")) == 0, (folder / "log").read_text()
    return config, folder / "run"


def same(one: Path, other: Path) -> None:
    for file in (*RESULTS, "metrics.json"):
        assert (one / file).read_bytes() == (other / file).read_bytes(), file


def wait_for_line(run: Path, text: str, process) -> None:
    """None; returns once train.log holds the text."""
    log = run / "train.log"
    while not (log.exists() and text in log.read_text()):
        assert process.is_alive(), "the run ended too early"
        time.sleep(0.01)


def test_killed_in_a_step_and_while_a_checkpoint_is_written(whole, tmp_path):
    config, alone = whole
    run = tmp_path / "run"
    process = start(tmp_path / "log", train, config, run)
    wait_for_line(run, "epoch 1/4 step 8", process)
    os.killpg(process.pid, signal.SIGKILL)
    assert ended(process) == -signal.SIGKILL
    assert ended(start(tmp_path / "log", train, config, run, die_in_a_checkpoint)) == -signal.SIGKILL
    assert torch.load(run / "checkpoints" / "latest.pt", weights_only=True)["epoch"] < 4
    assert ended(start(tmp_path / "log", train, config, run)) == 0, (tmp_path / "log").read_text()
    same(run, alone)
    assert "took over the lock of process" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
def test_asked_to_stop_it_saves_and_goes_on_later(whole, tmp_path, number):
    config, alone = whole
    run = tmp_path / "run"
    process = start(tmp_path / "log", train, config, run)
    wait_for_line(run, "epoch 2/4 step 5", process)
    os.kill(process.pid, number)
    assert ended(process) == 130
    assert "all saved: the same command goes on from there" in (tmp_path / "log").read_text()
    assert not owner(run)
    assert ended(start(tmp_path / "log", train, config, run)) == 0, (tmp_path / "log").read_text()
    same(run, alone)


def notebook(config, run) -> None:
    run_notebook("02_train", run.parent / "out", config=str(config), run_dir=str(run))


@pytest.mark.slow
def test_a_notebook_killed_with_its_kernel_goes_on(whole, tmp_path):
    config, alone = whole
    run = tmp_path / "run"
    process = start(tmp_path / "log", notebook, config, run)
    wait_for_line(run, "epoch 2/4 step 2", process)
    os.killpg(process.pid, signal.SIGKILL)  # the kernel ends some seconds later, the lock waits for it
    ended(process)
    notebook(config, run)
    same(run, alone)


def test_the_resolved_configuration_gives_the_same_metrics(whole, tmp_path):
    _, alone = whole
    process = start(tmp_path / "log", train, alone / "config.yaml", tmp_path / "run")
    assert ended(process) == 0, (tmp_path / "log").read_text()
    same(tmp_path / "run", alone)
    assert load_file(alone / "model.safetensors").keys() == load_file(alone / "checkpoints" / "best.safetensors").keys()
