"""Batches of runs, and the notebook that compares them: recnb/cli/batch.py, recnb/cli/notebook.py, 06_compare."""

import json
import shlex
import shutil
import subprocess
from pathlib import Path

import nbformat
import pandas as pd
import pytest
import yaml
from conftest import tiny_config

from recnb.cli import batch, notebook
from recnb.cli.main import main
from recnb.registry import ConfigError

ROOT = Path(__file__).resolve().parents[2]
TRAIN, COMPARE = ROOT / "notebooks" / "02_train.ipynb", ROOT / "notebooks" / "06_compare.ipynb"


@pytest.fixture
def called(capfd):
    """A function that calls the command as a terminal does: its exit code, and what it printed."""

    def call(*words):
        code = main([*map(str, words)])
        return code, "".join(capfd.readouterr())

    return call


def batch_file(drawn, folder: Path, **content) -> Path:
    config = tiny_config(drawn, folder / "tiny.yaml")
    path = folder / "batch.yaml"
    path.write_text(yaml.safe_dump({"config": str(config), "run_dir": str(folder / "runs"), **content}))
    return path


@pytest.fixture(scope="module")
def second_run(drawn, tmp_path_factory):
    """A run like the trained one with another margin, made without a notebook."""
    folder = tmp_path_factory.mktemp("second")
    config = tiny_config(drawn, folder / "tiny.yaml", {"Arch.Head.margin": 0.3})
    assert main(["train", str(config), "--run-dir", str(folder / "second")]) == 0
    return folder / "second"


def test_grid_and_list_are_combined():
    runs = batch.expand(
        {
            "overrides": {"Global.epochs": 3},
            "grid": {"Arch.Head.margin": [0.1, 0.3], "Arch.Head.scale": [16]},
            "list": [{}, {"Optimizer.lr.learning_rate": 0.001, "Global.image_shape": [3, 64, 64]}],
        }
    )
    assert list(runs) == [
        "margin-0.1",
        "margin-0.3",
        "margin-0.1_learning_rate-0.001_image_shape-3-64-64",
        "margin-0.3_learning_rate-0.001_image_shape-3-64-64",
    ]  # scale is the same in all
    assert runs["margin-0.3"] == {"Global.epochs": 3, "Arch.Head.margin": 0.3, "Arch.Head.scale": 16}
    assert batch.expand({}) == {"base": {}}
    assert list(
        batch.expand(
            {
                "grid": {"Arch.Head.name": ["A", "B"], "Arch.Neck.name": ["C"]},
                "list": [{"Arch.Backbone.name": "x/y"}, {}],
            }
        )
    ) == ["Head.name-A_Backbone.name-y", "Head.name-B_Backbone.name-y", "Head.name-A", "Head.name-B"]


@pytest.mark.parametrize(
    "content, message",
    [
        ({"grid": {"a.b": [1, 1]}}, "two runs are named"),
        ({"list": [{}, {}]}, "two runs are named base"),
        ({"grid": {"a.b": 1}}, "a.b: 1 is not a list"),
        ({"grid": {"a.b": [1]}, "list": [{"a.b": 2}]}, "a.b stands in grid and in overrides or list"),
        ({"list": {"a.b": 1}}, "list: .* is a dict, not list"),
        ({"list": [1]}, "list: 1 is a int, not dict"),
    ],
)
def test_what_cannot_be_meant_is_refused(content, message):
    with pytest.raises(ConfigError, match=message):
        batch.expand(content)


def test_the_example_is_sound_and_print_runs_nothing(called, tmp_path):
    code, printed = called("sweep", "configs/sweeps/demo_margin.yaml", "--run-dir", tmp_path / "runs", "--print")
    lines = printed.splitlines()
    assert code == 0 and len(lines) == 6 and not (tmp_path / "runs").exists()
    for line in lines:
        words = shlex.split(line)
        assert subprocess.run(["bash", "-nc", line]).returncode == 0
        assert words[1:4] == ["-m", "recnb", "run"] and Path(words[4]) == TRAIN
        given = yaml.safe_load(words[words.index("-y") + 1])
        assert set(given) == {"config", "run_dir", "overrides"}
        assert Path(words[words.index("--to") + 1]).parent == Path(given["run_dir"])


@pytest.mark.parametrize(
    "content, message",
    [
        ({"grid": {"Arch.Head.margn": [0.1, 0.3]}}, "margn-0.1: .*did you mean 'margin'"),
        ({"gird": {}}, "gird: there is no such key; did you mean 'grid'"),
        ({"list": [{}, {"Arch.Head.margin": 0.2}]}, "base and margin-0.2 are the same configuration"),
    ],
)
def test_a_batch_is_checked_before_anything_starts(drawn, tmp_path, content, message):
    path = batch_file(drawn, tmp_path, **content)
    with pytest.raises(ConfigError, match=message):
        batch.plan(str(path))
    assert not (tmp_path / "runs").exists()


def test_a_batch_that_is_named_like_a_run_does_not_write_into_it(drawn, tmp_path):
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "config.yaml").write_text("Global: {}\n")
    with pytest.raises(
        ConfigError, match="runs: is a run itself, and no folder of runs; choose another with --run-dir"
    ):
        batch.plan(str(batch_file(drawn, tmp_path)))


def test_a_command_that_fails_stops_no_other(tmp_path, capfd):
    jobs = [
        batch.Job(name, tmp_path / name, {}, ["sh", "-c", text])
        for name, text in (
            ("first", "echo '  epoch 1 of 2: mAP 0.5'"),
            ("second", "echo this is why; exit 3"),
            ("third", "true"),
        )
    ]
    batch.Batch(jobs, 2).run()
    printed = capfd.readouterr().out
    assert [job.state for job in jobs] == ["done", "failed", "done"]
    assert "    this is why" in printed and "first: epoch 1 of 2: mAP 0.5" in printed


@pytest.mark.slow
def test_a_failing_run_keeps_its_notebook_and_the_others_go_on(called, drawn, tmp_path):
    path = batch_file(
        drawn,
        tmp_path,
        list=[
            {"Arch.Head.margin": 0.1},
            {"Arch.Head.margin": 0.3},
            {"DataLoader.Train.dataset.cls_label_path": str(tmp_path / "none.txt")},
        ],
    )
    code, printed = called("sweep", path, "--jobs", 2)
    assert code == 1
    states = {folder.name[:10]: (folder / "metrics.json").exists() for folder in (tmp_path / "runs").iterdir()}
    assert states == {"margin-0.1": True, "margin-0.3": True, "cls_label_": False}
    failed = next((tmp_path / "runs").glob("cls_label_*"))
    cells = nbformat.read(failed / "train.ipynb", 4).cells
    assert any(output.output_type == "error" for cell in cells for output in cell.get("outputs", []))
    assert "failed after" in printed and "there is no file" in printed
    table = printed[printed.rindex("seconds") :]
    assert table.count(" done ") == 2 and table.count(" failed ") == 1 and "mAP" in table


def test_what_is_done_is_skipped_and_another_config_refused(
    called, trained_run, second_run, drawn, tmp_path, monkeypatch
):
    path = batch_file(
        drawn, tmp_path, list=[{"Arch.Head.margin": 0.2}, {"Arch.Head.margin": 0.3}], overrides={"Global.epochs": 2}
    )
    first, second = tmp_path / "runs" / "margin-0.2", tmp_path / "runs" / "margin-0.3"
    shutil.copytree(trained_run, first)
    shutil.copytree(second_run, second)
    assert [job.state for job in batch.plan(str(path))] == ["done", "interrupted"]
    (second / "gallery.html").touch()  # what the notebook writes last
    monkeypatch.setattr(batch.Batch, "run_one", lambda self, job: pytest.fail(f"{job.name} is run again"))
    code, printed = called("sweep", path)
    assert code == 0 and "2 runs, 2 of them done before" in printed
    (first / "metrics.json").unlink()
    assert [job.state for job in batch.plan(str(path))] == ["interrupted", "done"]
    content = yaml.safe_load(path.read_text())
    path.write_text(yaml.safe_dump({**content, "overrides": {"Global.epochs": 2, "Arch.Head.scale": 8}}))
    with pytest.raises(ConfigError, match=r"0.2 holds a run of another configuration \(Arch.Head.scale: 16 -> 8"):
        batch.plan(str(path))


def test_the_runs_are_compared(called, trained_run, second_run, tmp_path):
    executed, pair = tmp_path / "new" / "compare.ipynb", {"run": trained_run, "second": second_run}
    code, _ = called(
        "run",
        COMPARE,
        "--to",
        executed,
        "-p",
        "run_dirs",
        json.dumps([*map(str, pair.values())]),
        "-p",
        "pattern",
        "",
        "-p",
        "out_dir",
        tmp_path / "out",
    )
    assert code == 0
    board = pd.read_csv(tmp_path / "out" / "leaderboard.csv")
    assert set(board.run) == set(pair) and (board.state == "finished").all()
    scores = [json.loads((pair[name] / "metrics.json").read_text())["mAP"] for name in board.run]
    assert board.mAP.tolist() == pytest.approx(scores)
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    assert [output.text for output in outputs if output.get("name") == "stderr"] == []
    assert any("Arch.Head.margin" in str(output.get("data")) for output in outputs)
    assert executed.stat().st_size < 1_500_000


@pytest.mark.slow
def test_a_single_run_is_a_leaderboard_of_one(called, trained_run, tmp_path):
    code, _ = called(
        "run",
        COMPARE,
        "--to",
        tmp_path / "compare.ipynb",
        "-y",
        json.dumps({"run_dirs": [str(trained_run)], "pattern": "", "out_dir": str(tmp_path)}),
    )
    assert code == 0 and "nothing to pair" in (tmp_path / "compare.ipynb").read_text()


def test_unknown_parameters_and_wrong_types_are_refused(called, tmp_path):
    for words, message in (
        (["-p", "overide", "{}"], "there is no parameter 'overide'; did you mean 'overrides'?"),
        (["-p", "overrides", "[1]"], "overrides: [1] is a list, not dict"),
        (["-y", "{overrides: {Global.epoch: 1}}"], "Global.epoch: there is no such key; did you mean 'epochs'?"),
        (["-p", "config", "configs/dmo.yaml"], "there is no such file; did you mean 'demo.yaml'?"),
        (["-p", "overrides", "{"], "-p overrides line 1: "),
        (["-p", "options", "{test_shar: 0.2}"], "options: there is no 'test_shar'; did you mean 'test_share'?"),
    ):
        notebook_name = "01_prepare" if "options" in words else "02_train"
        code, printed = called("run", notebook_name, "--to", tmp_path / "x" / "out.ipynb", *words)
        assert code == 2 and message in printed and printed.startswith("error: ") and printed.count("\n") == 1
    assert not (tmp_path / "x").exists()
    with pytest.raises(ConfigError, match=r"there is no such notebook; did you mean '02_train'"):
        notebook.find(ROOT / "notebooks" / "02_trian.ipynb")


def test_values_arrive_as_they_were_meant(tmp_path):
    given = notebook.parameters_of(TRAIN, [("run_dir", "1e-3"), ("overrides", "{Optimizer.lr.learning_rate: 1e-5}")])
    assert given == {"run_dir": "1e-3", "overrides": {"Optimizer.lr.learning_rate": 1e-5}}
    words = batch.command_of(tmp_path, given)
    assert yaml.safe_load(words[words.index("-y") + 1]) == given
