"""Parts of one's own: a file that the command line names, known everywhere, and kept in the run folder."""

import importlib
import json
import os
import re
import sys
from contextlib import ExitStack
from unittest.mock import patch

import pandas as pd
import pytest
import yaml
from conftest import PIXELS, ROOT
from processes import start

from recnb.cli.batch import command_of
from recnb.cli.main import main
from recnb.cli.run import joined
from recnb.recipe import parts
from recnb.recipe.data import build_transform, training_images
from recnb.recipe.model import build_model
from recnb.recipe.objective import build_loss, build_metrics
from recnb.recipe.parts import SLOTS, VARIABLE, use_parts
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.folder import load_run
from recnb.storage import sha256

OPS = [{"ResizeImage": {"size": PIXELS}}, {"Inverted": {"p": 0.5}}, {"NormalizeImage": {}}]


@pytest.fixture(autouse=True)
def forgotten():
    """Leave no part, module or variable of a test behind."""
    with ExitStack() as stack:
        for known in (*SLOTS.values(), parts.IMPORTED, sys.modules, os.environ):
            stack.enter_context(patch.dict(known))
        stack.enter_context(patch.object(sys, "path", [*sys.path]))
        yield


@pytest.fixture
def own(tmp_path):
    """The examples of the docs, one below the other."""
    text = (ROOT / "docs" / "python.md").read_text(encoding="utf-8").partition("## Parts of your own")[2]
    path = tmp_path / "my_parts.py"
    path.write_text("\n".join(re.findall(r"```python\n(.*?)```", text, re.DOTALL)))
    return path


@pytest.fixture
def config(config_file, drawn, tmp_path):
    """A configuration that names all of them."""
    rows = [line.split() for line in (drawn / "train.txt").read_text().splitlines()]
    products = pd.DataFrame({"file": [row[0] for row in rows], "product": [f"no {row[1]}" for row in rows]})
    products.to_csv(tmp_path / "products.csv", index=False)
    return config_file(
        {
            "Global.epochs": 1,
            "DataLoader.Train.dataset.name": "Products",
            "DataLoader.Train.dataset.cls_label_path": str(tmp_path / "products.csv"),
            "DataLoader.Train.dataset.transform_ops": OPS,
            "Arch.Neck.name": "Squashed",
            "Arch.Head": {"name": "NormSoftmax", "scale": 16},
            "Loss.Train": [{"CELoss": {"weight": 1.0}}, {"Spread": {"weight": 0.1}}],
            "Metric.Eval": [{"FoundInTen": {}}, {"mAP": {}}],
        }
    )


def train(*words) -> int:
    return main(["train", *map(str, words)])


def opened(run: str) -> int:
    """What a process that was told of no parts makes of a run."""
    return 0 if type(load_run(run).model().neck).__name__ == "Squashed" else 1


def named(file: str, config: str) -> int:
    """Whether a process that inherits the variable knows the parts, as a kernel and each of several processes do."""
    os.environ[VARIABLE] = file
    importlib.reload(parts)
    return 0 if load_config(config)["Arch"]["Head"]["name"] == "NormSoftmax" else 1


NAMED = {
    "head": ({"Arch.Head": {"name": "NormSoftmax"}}, lambda cfg: type(build_model(cfg).head).__name__),
    "neck": ({"Arch.Neck": {"name": "Squashed", "class_num": 8}}, lambda cfg: type(build_model(cfg).neck).__name__),
    "loss": ({"Loss.Train": [{"Spread": {}}]}, lambda cfg: build_loss(cfg).names[0]),
    "metric": ({"Metric.Eval": [{"FoundInTen": {}}]}, lambda cfg: build_metrics(cfg)[0]),
    "data set": ({"DataLoader.Train.dataset.name": "Products"}, lambda cfg: training_images(cfg).names[0]),
    "transform": (
        {"DataLoader.Train.dataset.transform_ops": OPS},
        lambda cfg: type(build_transform(cfg, "DataLoader.Train.dataset").transforms[1]).__name__,
    ),
}
FOUND = {
    "head": "NormSoftmax",
    "neck": "Squashed",
    "loss": "Spread",
    "metric": "found in ten",
    "data set": "no 0",
    "transform": "RandomInvert",
}


@pytest.mark.parametrize("kind", NAMED)
def test_each_kind_is_named_alone(kind, own, config_file, config, tmp_path):
    changes, made = NAMED[kind]
    if kind == "data set":
        changes = {**changes, "DataLoader.Train.dataset.cls_label_path": str(tmp_path / "products.csv")}
    use_parts(own)
    assert made(load_config(config_file(changes))) == FOUND[kind]


def test_the_examples_of_the_docs_train_and_the_run_keeps_them(own, config, tmp_path, capsys):
    run = tmp_path / "run"
    with pytest.raises(ConfigError, match="there is no dataset 'Products'"):
        load_config(config)
    assert train(config, "--parts", own, "--run-dir", run) == 0
    assert 0 < json.loads((run / "metrics.json").read_text())["found in ten"] <= 1
    history = pd.read_csv(run / "history.csv")
    assert history[["Spread", "found in ten"]].notna().all(axis=None)
    kept = json.loads((run / "env.json").read_text())["parts"]
    assert kept == {"file": "my_parts.py", "sha256": sha256(run / "parts.py")} and sha256(own) == kept["sha256"]
    assert os.environ.pop(VARIABLE) == str(own)  # the processes of the tests begin without it
    inherits = start(tmp_path / "log", named, str(own), str(config))
    inherits.join()
    knows_nothing = start(tmp_path / "log", opened, str(run))
    knows_nothing.join()
    assert (inherits.exitcode, knows_nothing.exitcode) == (0, 0), (tmp_path / "log").read_text()
    assert not (run / "__pycache__").exists()

    own.write_text(own.read_text().replace("<= 10", "<= 5"))
    capsys.readouterr()
    assert train(config, "--parts", own, "--run-dir", run) == 2
    said = capsys.readouterr().err
    assert "belongs to other files (parts.py: " in said and "is the first that differs); put them back" in said
    assert sha256(run / "parts.py") != sha256(own)
    assert train(config, "--parts", own, "--run-dir", run, "-o", "Global.accept_changes=True") == 0
    assert sha256(run / "parts.py") == sha256(own)


def test_a_file_is_imported_once_and_the_last_one_counts(tmp_path):
    text = "from recnb.models.necks import NECKS\nNECKS['Mine'] = {}\nprint('imported')\n"
    first, second = tmp_path / "one.py", tmp_path / "two.py"
    first.write_text(text.format("1"))
    second.write_text(text.format("2"))
    for file, value in ((first, 1), (first, 1), (second, 2), (first, 1)):
        use_parts(file)
        assert parts.NECKS["Mine"] == value


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "there is no file"),
        ("a = 1\nb = nothing\n", "line 2: NameError: name 'nothing' is not defined"),
        ("a = (\n", "line 1: SyntaxError"),
    ],
)
def test_a_file_that_cannot_be_used_is_named_with_its_line(text, message, tmp_path, config_file, capsys):
    path = tmp_path / "broken.py"
    if text:
        path.write_text(text)
    assert train(config_file(), "--parts", path) == 2
    assert str(path) in (error := capsys.readouterr().err) and message in error
    assert VARIABLE not in os.environ


def test_a_file_may_not_take_the_name_of_another_module(tmp_path):
    (tmp_path / "json.py").write_text("")
    with pytest.raises(ConfigError, match="there is a module 'json' already; give the file another name"):
        use_parts(tmp_path / "json.py")


def test_notebooks_and_sweeps_are_told_of_the_file(tmp_path):
    assert joined(["run", "03", "-p", "parts", "a.py", "-p", "k", "3"]) == ["run", "03", "--parts", "a.py", "-p", "k=3"]
    assert joined(["run", "03", "-p", "parts=a.py"]) == ["run", "03", "--parts", "a.py"]
    path = tmp_path / "mine.py"
    path.write_text("")
    use_parts(path)
    words = command_of(tmp_path, {})
    assert words[words.index("--parts") + 1] == str(path)


def test_a_config_alone_names_no_code(config_file, own):
    with pytest.raises(ConfigError, match="parts"):
        load_config(config_file({"Global.parts": str(own)}))
    assert not parts.IMPORTED


@pytest.mark.slow
def test_processes_notebooks_and_an_export_know_the_parts(own, config, tmp_path):
    runs = [tmp_path / "several", tmp_path / "notebook"]
    assert train(config, "--parts", own, "--run-dir", runs[0], "-o", "Global.devices=2") == 0
    given = yaml.safe_dump({"config": str(config), "run_dir": str(runs[1])}, default_flow_style=True)
    assert main(["run", "02_train", "-p", "parts", str(own), "-y", given]) == 0
    del os.environ[VARIABLE]  # what follows reads the run's own copy
    for run in runs:
        assert json.loads((run / "env.json").read_text())["parts"]["file"] == own.name
    assert main(["run", "03_evaluate", "-p", "run", str(runs[1])]) == 0
    assert main(["run", "05_export", "-p", "run", str(runs[1])]) == 0
