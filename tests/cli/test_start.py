"""`recnb start` and the commands around it: what is done once, what is refused in a sentence, whose names come out."""

import contextlib
import errno
import itertools
import json
import os
import random
import shutil
import subprocess
import sys
import time
import tracemalloc
from collections import namedtuple
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, flipped
from PIL import Image, ImageDraw

from recnb.cli import journey, progress
from recnb.cli import notebook as notebooks
from recnb.cli.main import main
from recnb.cli.run import names
from recnb.data import audit, layouts
from recnb.registry import ConfigError
from recnb.retrieval.exchange import unsealed

NAMES = ["Garlic", "Red Beet", "Åpple Äkerö", "檸檬", "Лимон", "Lime", "Mango", "Kiwi", "Plum", "Leek"]


def draw(path: Path, kind: int, view: int) -> None:
    """Draw a photo of a thing: a shape and a colour of its own, in another place and light each time."""
    rng = np.random.default_rng((kind, view))
    hue = tuple(np.random.default_rng(kind).integers(40, 220, 3).tolist())
    image = Image.new("RGB", (120, 96), tuple(rng.integers(200, 255, 3).tolist()))
    x, y, side = (int(v) for v in (*rng.integers(8, 32, 2), rng.integers(40, 56)))
    pen = ImageDraw.Draw(image)
    (pen.ellipse, pen.rectangle)[kind % 2]((x, y, x + side, y + side // (1 + kind % 3)), fill=hue)
    noise = rng.integers(-12, 13, (96, 120, 1))
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray((np.asarray(image, int) + noise).clip(0, 255).astype("uint8")).save(path)


def draw_messy(root: Path) -> None:
    """Draw a folder as people have it: good photos under names of any script, among everything that goes wrong."""
    for kind, name in enumerate(NAMES):
        for view in range(6):
            deeper = "session 2" if view == 5 else ""
            draw(root / name / deeper / f"IMG_{view}.jpg", kind, view)
    draw(root / "Only one" / "IMG_0.jpg", 40, 0)
    draw(root / "loose.jpg", 41, 0)
    shutil.copy(root / "Lime" / "IMG_0.jpg", root / "Lime" / "copy.jpg")
    shutil.copy(root / "Plum" / "IMG_0.jpg", root / "Mango" / "IMG_7.jpg")
    (root / "Kiwi" / "broken.jpg").write_bytes((root / "Kiwi" / "IMG_0.jpg").read_bytes()[:900])
    (root / "Kiwi" / "._IMG_0.jpg").write_bytes(b"\0\5\x16\7")
    (root / "Kiwi" / "notes.txt").write_text("bought on Tuesday", encoding="utf-8")
    Image.open(root / "Leek" / "IMG_0.jpg").convert("RGBA").save(root / "Leek" / "alpha.png")
    (root / "Leek" / "IMG_0.jpg").unlink()
    (root / "Nothing yet").mkdir()


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("messy") / "photos"
    draw_messy(folder)
    return folder


@pytest.fixture
def called(capfd):
    """A function that calls the command as a terminal does: its exit code, and what it printed."""

    def call(*words):
        code = main([*map(str, words)])
        return code, "".join(capfd.readouterr())

    return call


@pytest.fixture
def executed(monkeypatch):
    """The notebooks that were run, by name; running one writes the file that says that it is done."""
    ran = []

    def execute(notebook, output, parameters):
        ran.append(notebook.stem)
        to = output.parent
        made = {step.notebook: step.makes for step in journey.steps(to, to, {})}[notebook.stem]
        made.parent.mkdir(parents=True, exist_ok=True)
        for path in (output, made, *((to / "config.yaml",) if notebook.stem == "02_train" else ())):
            path.write_text(json.dumps(parameters), encoding="utf-8")

    monkeypatch.setattr(journey, "execute", execute)
    monkeypatch.setattr(journey, "check_photos", lambda *_: "")
    return ran


def test_steps_that_are_done_are_not_done_again(executed, photos, tmp_path):
    way = journey.Journey(photos, tmp_path / "mine", {"epochs": 1})
    way.go()
    assert executed == ["01_prepare", "02_train", "03_evaluate", "04_gallery", "05_export"]
    way.go()
    assert len(executed) == 5
    (tmp_path / "mine" / "model.safetensors").write_text("other weights")
    way.go()
    assert executed[5:] == ["03_evaluate", "04_gallery", "05_export"]
    with pytest.raises(ConfigError, match=r"a training on other photos or options \(epochs 1 -> 2\)"):
        journey.Journey(photos, tmp_path / "mine", {"epochs": 2}).go()
    assert len(executed) == 8


def test_a_bit_that_flips_in_what_is_remembered_is_told(executed, photos, tmp_path):
    to, rng = tmp_path / "Äpfel", random.Random(0)
    way = journey.Journey(photos, to, {"epochs": 1})
    way.go()
    for _ in range(40):
        with flipped(to / "start.json", rng), pytest.raises(ConfigError, match=r"start\.json: .* take another folder"):
            way.go()
    (to / "start.json").write_text(json.dumps(unsealed(to / "start.json")))
    with pytest.raises(ConfigError, match=r"start\.json: .* of an earlier version"):
        way.go()
    assert len(executed) == 5


def test_a_table_of_what_was_left_out_that_is_damaged_is_told(tmp_path):
    (tmp_path / "left_out.csv").write_text("path,reason\na,broken\n")
    for content in (b"path,rea\x13on\na,broken\n", b"path,reason\na,br\xefken\n"):
        (tmp_path / "left_out.csv").write_bytes(content)
        with pytest.raises(ConfigError, match=r"left_out\.csv is damaged"):
            journey.left_out(tmp_path / "left_out.csv")


def test_a_step_that_failed_is_run_again_and_those_before_it_are_not(executed, photos, tmp_path, monkeypatch):
    way, execute = journey.Journey(photos, tmp_path / "mine"), journey.execute

    def killed(notebook, output, parameters):
        if notebook.stem == "02_train":
            raise notebooks.FailedError("the kernel has ended")
        execute(notebook, output, parameters)

    monkeypatch.setattr(journey, "execute", killed)
    with pytest.raises(notebooks.FailedError, match="the same command goes on"):
        way.go()
    monkeypatch.setattr(journey, "execute", execute)
    way.go()
    assert executed == ["01_prepare", "02_train", "03_evaluate", "04_gallery", "05_export"]


def test_other_photos_are_prepared_anew_until_there_is_a_training(executed, photos, tmp_path):
    mine = shutil.copytree(photos, tmp_path / "photos")
    way = journey.Journey(mine, tmp_path / "mine")
    way.run(journey.steps(way.source, way.to, {})[0])
    draw(mine / "Garlic" / "new.jpg", 0, 99)
    way.go()
    assert executed[:2] == ["01_prepare", "01_prepare"]
    draw(mine / "Garlic" / "newer.jpg", 0, 100)
    with pytest.raises(ConfigError, match="a training on other photos or options; take another folder"):
        way.go()


def test_the_options_of_the_command_reach_the_steps_and_the_gallery_is_opened(
    called, executed, photos, tmp_path, monkeypatch
):
    opened, to = [], tmp_path / "mine"
    monkeypatch.setattr(journey, "summary", lambda to: ["ten lines"])
    monkeypatch.setattr("typer.launch", opened.append)
    code, printed = called(
        "start",
        photos,
        "--to",
        to,
        "--weights",
        "False",
        "--epochs",
        2,
        "--image-size",
        96,
        "--backbone",
        "resnet18",
        "--open",
    )
    assert code == 0 and printed.endswith("ten lines\n") and opened == [(to / "gallery.html").as_uri()]
    given = unsealed(to / "start.json")["01_prepare"]["parameters"]
    assert given["options"] == {"weights": False, "backbone": "resnet18", "epochs": 2, "image_size": 96}
    assert given["config"] == "auto" and given["source"] == str(photos)


def test_the_summary_says_what_was_found_left_out_and_learnt(tmp_path):
    lists = {"train": "檸檬 檸檬 Kiwi", "query": "Lime Plum", "gallery": "Lime Plum Plum"}
    (tmp_path / "data").mkdir()
    for name, labels in lists.items():
        lines = (f"{i}.jpg\t{label}\t{i}\n" for i, label in enumerate(labels.split()))
        (tmp_path / "data" / f"{name}.txt").write_text("".join(lines), encoding="utf-8")
    (tmp_path / "data" / "left_out.csv").write_text("path,reason\na,broken\nb,a copy\nc,broken\n", encoding="utf-8")
    (tmp_path / "data" / "config.yaml").write_text("# probe, with\n# few photos\nGlobal: {}\n", encoding="utf-8")
    queries = pd.DataFrame({"label": ["Lime", "Plum"]})
    for metric in ("recall1", "mAP"):
        queries = queries.assign(**{f"{metric}_before": [0.0, 0.5], f"{metric}_after": [0.5, 1.0]})
    queries.to_csv(tmp_path / "queries.csv", index=False)
    blank, *lines = journey.summary(tmp_path)
    assert blank == "" and len(lines) == 10
    said = {line[:10].strip(): line[12:] for line in lines}
    assert said["photos"] == "8 of 4 identities, 3 of 2 to train on, 5 of 2 to test on"
    assert said["left out"].startswith("3: 2 broken; 1 a copy (") and said["recipe"] == "probe, with few photos"
    assert said["recall@1"].startswith("0.250 (") and "-> 0.750 (" in said["mAP"]
    assert said["verdict"] == "Training made no difference that 2 queries of 2 identities could show"
    assert said["next"] == f"recnb identify {tmp_path / 'export'} PHOTO"


def test_a_disk_that_fills_is_told_with_the_file(monkeypatch, tmp_path):
    import papermill

    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(papermill, "execute_notebook", full)
    with pytest.raises(
        notebooks.FailedError, match=r"x.ipynb: cannot be written \(No space left on device\); make room"
    ):
        notebooks.execute(notebooks.find("01_prepare"), tmp_path / "x.ipynb", {})


@pytest.mark.parametrize("kind", ["ConfigError", "ValueError"])
def test_a_notebook_that_is_refused_leaves_the_earlier_one(monkeypatch, tmp_path, kind):
    import papermill

    def refused(notebook, output, *_, **__):
        Path(output).write_text("half of another")
        raise papermill.PapermillExecutionError(0, 1, "", kind, "it belongs to another configuration", [])

    monkeypatch.setattr(papermill, "execute_notebook", refused)
    (tmp_path / "x.ipynb").write_text("the result")
    with pytest.raises(notebooks.FailedError, match="it belongs to another configuration"):
        notebooks.execute(notebooks.find("01_prepare"), tmp_path / "x.ipynb", {})
    left = "the result" if kind == "ConfigError" else "half of another"
    assert (tmp_path / "x.ipynb").read_text() == left


@pytest.mark.parametrize("kind", ["ConfigError", "LockedError"])
def test_a_notebook_that_refuses_its_config_leaves_nothing(monkeypatch, tmp_path, kind):
    import papermill

    def refused(notebook, output, *_, **__):
        Path(output).write_text("half of a notebook")
        raise papermill.PapermillExecutionError(0, 1, "", kind, "there is no head 'ArcMagin'", [])

    monkeypatch.setattr(papermill, "execute_notebook", refused)
    (tmp_path / "mine.txt").touch()
    for folder in (tmp_path / "new", tmp_path):
        with pytest.raises(ConfigError, match="there is no head 'ArcMagin'"):
            notebooks.execute(notebooks.find("01_prepare"), folder / "x.ipynb", {})
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_photos_that_change_while_they_are_read_are_told(executed, photos, tmp_path, monkeypatch):
    mine, execute = shutil.copytree(photos, tmp_path / "photos"), journey.execute
    monkeypatch.setattr(journey, "execute", lambda *given: (execute(*given), draw(mine / "Lime" / "new.jpg", 5, 77)))
    with pytest.raises(notebooks.FailedError, match="has changed while 01_prepare read it"):
        journey.Journey(mine, tmp_path / "mine").go()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["none"], "there is no such folder"),
        (["empty"], "empty"),
        (["alone"], "1 identities were found, 1 of them with two images or more, and it takes two of these"),
        (["single"], "4 identities were found, 0 of them with two images or more, and it takes two of these"),
        (["photos", "--to", "photos/out"], "lies among the photos"),
        (["photos", "--weights", "none.pth"], "there is no such file; give a FILE, True for the hub's or False"),
        (["photos", "--backbone", "resnet51"], "there is no network 'resnet51'; did you mean 'resnet5"),
        (["photos", "--to", "photos/Lime/IMG_0.jpg/x"], "cannot be written to"),
    ],
)
def test_bad_input_is_one_sentence_and_nothing_is_written(called, photos, tmp_path, monkeypatch, words, message):
    monkeypatch.chdir(tmp_path)
    if "photos/Lime/IMG_0.jpg/x" in words:  # elsewhere, as this is no folder of photos
        monkeypatch.setattr(journey, "check_photos", lambda *_: "")
    Path("photos").symlink_to(photos)
    Path("empty").mkdir()
    for view in range(3):
        draw(Path("alone", "Garlic", f"{view}.jpg"), 0, view)
    for kind in range(4):
        draw(Path("single", NAMES[kind], "1.jpg"), kind, 0)
    code, printed = called("start", *words)
    assert code == 2 and message in printed
    assert printed.startswith("error: ") and printed.count("\n") == 1
    assert not Path("runs").exists() and not (photos / "out").exists()


def test_a_full_disk_is_said_before_anything_is_written(called, photos, tmp_path, monkeypatch):
    usage = namedtuple("usage", "total used free")(10**9, 10**9, 3_000_000)
    monkeypatch.setattr(journey.shutil, "disk_usage", lambda path: usage)
    monkeypatch.setattr(journey, "check_photos", lambda *_: "")
    code, printed = called("start", photos, "--to", tmp_path / "mine")
    assert code == 2 and "its disk has 3 MB left" in printed and [*(tmp_path / "mine").iterdir()] == []


def test_a_folder_that_cannot_be_written_to_is_said(called, photos, tmp_path, monkeypatch):
    def refused(dir):
        raise OSError(errno.EROFS, "Read-only file system")

    monkeypatch.setattr(journey.tempfile, "TemporaryFile", refused)
    monkeypatch.setattr(journey, "check_photos", lambda *_: "")
    (tmp_path / "mine").mkdir()
    code, printed = called("start", photos, "--to", tmp_path / "mine")
    assert code == 2 and [*(tmp_path / "mine").iterdir()] == []
    assert printed == (
        f"error: --to {tmp_path / 'mine'}: cannot be written to (Read-only file system); choose another folder\n"
    )


def test_a_disk_that_is_full_between_two_steps_leaves_the_earlier_ones(called, executed, photos, tmp_path, monkeypatch):
    real = Path.write_text

    def full(self, text, **options):
        if "start.json" in self.name and "03_evaluate" in text:
            real(self, text[:9], **options)
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, text, **options)

    to = tmp_path / "mine"
    with monkeypatch.context() as disk:
        disk.setattr(Path, "write_text", full)
        code, printed = called("start", photos, "--to", to)
    assert code == 2 and f"error: {to / 'start.json'}: No space left on device\n" in printed
    assert executed == ["01_prepare", "02_train", "03_evaluate"] and (to / "03_evaluate.ipynb").is_file()
    assert set(unsealed(to / "start.json")) == {"01_prepare", "02_train"}
    journey.Journey(photos, to).go()
    assert executed[3:] == ["03_evaluate", "04_gallery", "05_export"] and not [*to.glob(".*.part")]


class Entry(NamedTuple):
    """A folder as os.scandir lists it."""

    name: str
    path: str

    def is_dir(self) -> bool:
        return True


def listed(monkeypatch, identities: int, each: int) -> None:
    """Let every folder seem to hold so many folders of so many photos."""
    folders = contextlib.nullcontext([Entry(f"{i:05d}", f"/photos/{i:05d}") for i in range(identities)])
    names = [f"IMG_{i:04d}.jpg" for i in range(each)]
    monkeypatch.setattr(layouts.os, "scandir", lambda root: folders)
    monkeypatch.setattr(layouts.os, "walk", lambda folder: [(folder, [], names)])


@pytest.mark.parametrize("identities", [200, pytest.param(20_000, marks=pytest.mark.slow)])
def test_millions_of_photos_are_listed_and_split_in_little_memory_and_their_time_is_told(
    tmp_path, monkeypatch, identities
):
    clock = itertools.count(0.0, 6.4)  # a tenth of a second a photo
    monkeypatch.setattr(audit, "fingerprints", lambda paths: None)
    monkeypatch.setattr(journey.time, "monotonic", lambda: next(clock))
    tracemalloc.start()
    with monkeypatch.context() as disk:
        listed(disk, identities, 100)
        said = journey.check_photos(tmp_path, tmp_path.parent / "mine", {})
    most = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert said.startswith(f"{100 * identities:,} photos of {identities:,} identities, which take about ")
    assert most < 2000 * 100 * identities, f"{most / 100 / identities:.0f} bytes a photo"


@pytest.mark.parametrize(("place", "name"), [("", ""), ("rungs/probe/", "probe: ")])
def test_an_epoch_is_a_line(tmp_path, capsys, monkeypatch, place, name):
    monkeypatch.setattr(progress, "EVERY", 0.01)
    folder = tmp_path / place
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.yaml").write_text("Global: {epochs: 3}\n")
    with progress.epochs_shown(tmp_path, 3):
        time.sleep(0.1)
        (folder / "history.csv").write_text(
            "epoch,lr,train_loss,CELoss,mAP\n1,0.1,2.5,2.5,\n2,0.1,1.25,1.25,0.25\n3,0.1,1.0,1.0,\n"
        )
    assert capsys.readouterr().out.splitlines() == [
        f"  {name}epoch 2 of 3: train_loss 1.250, mAP 0.250",  # the first, which has no metrics, came with it
        f"  {name}epoch 3 of 3: train_loss 1.000",
    ]
    assert [progress.duration(t) for t in (3, 150, 7500)] == ["3 s", "2 min", "2 h 5 min"]


def test_names_are_printed_and_written(called, photos, tmp_path, monkeypatch):
    from recnb.data.images import DataError
    from recnb.deploy import recognizer

    class Known:
        def __init__(self, folder):
            pass

        def identify(self, path):
            if path.stem == "broken":
                raise DataError(f"the image {path} cannot be read")
            name = path.relative_to(photos).parts[0]
            hits = tuple(recognizer.Hit(name, "a.jpg", score) for score in (0.9, 0.8, 0.7))
            return recognizer.Answer(name, 0.93, hits)

    monkeypatch.setattr(recognizer, "Recognizer", Known)
    code, printed = called("identify", tmp_path, photos / "檸檬" / "IMG_1.jpg")
    assert code == 0 and "IMG_1.jpg: 檸檬 (93%); nearest 檸檬 0.900, 檸檬 0.800, 檸檬 0.700" in printed
    code, printed = called("identify", tmp_path, photos / "Kiwi", "--csv", tmp_path / "out.csv")
    assert code == 1 and "broken.jpg cannot be read" in printed  # the others are named, and it is told
    table = pd.read_csv(tmp_path / "out.csv")
    assert set(table.name) == {"Kiwi"} and len(table) == 6 and table["similarity 3"].tolist() == [0.7] * 6
    code, printed = called("identify", tmp_path / "none", photos)
    assert code == 2 and "there is no such file or folder" in printed


def test_a_configuration_is_checked_and_nothing_written(called, config_file, tmp_path):
    config = config_file()
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    code, printed = called("check", config)
    assert code == 0 and printed.endswith("sound: it can be trained\n")
    assert (
        "train: 90 images of 15 identities" in printed and "one batch of the evaluation: features (32, 16)" in printed
    )
    code, printed = called("check", config, "-o", "Global.epohcs=2")
    assert (code, printed) == (2, "error: Global.epohcs: there is no such key; did you mean 'epochs'?\n")
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_the_help_loads_nothing_heavy():
    heavy = "{'torch', 'numpy', 'pandas', 'papermill', 'PIL', 'matplotlib'}"
    code = (
        "import sys\nfrom recnb.cli.main import main\nassert main(['--help']) == 0\n"
        f"assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("start", "identify", "report", "run", "train", "sweep", "check", "convert"):
        assert f"\n  {command} " in result.stdout


def test_a_traceback_is_shown_where_it_is_asked_for(called):
    with pytest.raises(ConfigError):
        main(["run", "02_train", "-p", "overide", "{}", "--traceback"])
    code, printed = called("run", "02_train", "-p", "overide", "{}")
    assert code == 2 and "Traceback" not in printed


def test_what_a_shell_completes():
    words = [sys.executable, "-m", "recnb", "--show-completion", "bash"]
    shell = {**os.environ, "_TYPER_COMPLETE_TEST_DISABLE_SHELL_DETECTION": "1"}  # there is none around a daemon
    result = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env=shell)
    assert result.returncode == 0 and "complete" in result.stdout
    assert names("02") == ["02_train"] and len(names("")) == 7


@pytest.mark.slow
def test_from_a_messy_folder_to_names(called, photos, tmp_path):
    run = tmp_path / "mine"
    words = ("start", photos, "--to", run, "--epochs", 1, "--weights", False)
    code, printed = called(*words)
    assert code == 0, printed
    assert all(f"[{number}/5]" in printed for number in range(1, 6)) and "epoch 1 of 1: " in printed
    assert "60 of 11 identities" in printed and "recnb identify" in printed.splitlines()[-1]
    left = pd.read_csv(run / "data" / "left_out.csv").set_index("path").reason
    assert {"loose.jpg", "Kiwi/broken.jpg", "Kiwi/._IMG_0.jpg", "Kiwi/notes.txt", "Nothing yet"} <= set(left.index)
    assert len({"Lime/copy.jpg", "Lime/IMG_0.jpg"} & set(left.index)) == 1
    names = set(pd.read_csv(run / "labels.csv").name)
    tested = {line.split("\t")[1] for line in (run / "data" / "query.txt").read_text(encoding="utf-8").splitlines()}
    assert names | tested <= {*NAMES, "Only one"} and not names & tested
    assert all(name in (run / "gallery.html").read_text(encoding="utf-8") for name in tested)
    assert set(pd.read_csv(run / "evaluation" / "ap_per_identity.csv").label) == tested
    assert {path.name for path in run.glob("*.ipynb")} == {
        f"{step.notebook}.ipynb" for step in journey.steps(run, run, {})
    }
    code, printed = called("identify", run / "export", photos / "檸檬", photos / "Leek", "--csv", run / "named.csv")
    table = pd.read_csv(run / "named.csv")
    assert code == 0 and len(table) == 12
    assert (table["nearest 1"] == [Path(path).relative_to(photos).parts[0] for path in table.path]).all()
    assert set(table.name) <= {"檸檬", "Leek", "unknown"}
    again = called(*words)[1].splitlines()[:5]
    assert {line.rpartition(": ")[2] for line in again} == {"done before"}
