"""The notebooks, run by papermill as a user runs them; what is asserted is what they leave behind."""
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import tiny_config

from recnb import load_config

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ROOT / "notebooks" / "02_train.ipynb"


def run(config: Path, folder: Path, cwd: Path = ROOT, overrides: dict | None = None) -> Path:
    folder.mkdir()
    parameters = {"config": str(config), "run_dir": str(folder), "overrides": overrides or {}}
    with patch.dict(os.environ):
        os.environ.pop("MPLBACKEND", None)  # the notebook's own, which shows figures
        papermill.execute_notebook(TRAIN, folder / "train.ipynb", parameters, kernel_name="python3", language="python",
                                   cwd=cwd, progress_bar=False, execution_timeout=300)
    return folder


@pytest.fixture(scope="module")
def trained(drawn, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("notebooks")
    return run(tiny_config(drawn, folder / "tiny.yaml"), folder / "run")


def outputs(notebook: Path) -> list[dict]:
    return [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]


def test_the_run_folder_is_whole(trained, drawn):
    metrics = json.loads((trained / "metrics.json").read_text())
    assert list(metrics) == ["recall1", "recall5", "mAP", "before", "gain"]
    assert metrics["gain"]["mAP"] == pytest.approx(metrics["mAP"] - metrics["before"]["mAP"])
    assert pd.read_csv(trained / "history.csv").epoch.tolist() == [1, 2]
    assert load_config(trained / "config.yaml")["Arch"]["Head"]["class_num"] == 15
    assert {"packages", "device", "seed", "commit"} <= set(json.loads((trained / "env.json").read_text()))
    queries = len((drawn / "query.txt").read_text().splitlines())
    assert np.load(trained / "embeddings" / "query.npy").shape == (queries, 16)
    page = (trained / "gallery.html").read_text()
    assert page.count("<img") >= queries and "http://" not in page and "https://" not in page
    assert (trained / "model.safetensors").exists() and (trained / "checkpoints" / "latest.pt").exists()


def test_the_executed_notebook_shows_figures_and_no_warnings(trained):
    shown = outputs(trained / "train.ipynb")
    assert sum("image/png" in output.get("data", {}) for output in shown) == 3  # a batch, the curves, the gallery
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
    assert (trained / "train.ipynb").stat().st_size < 1_500_000


def test_the_html_of_nbconvert_holds_the_figures(trained, tmp_path):
    subprocess.run([sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", tmp_path,
                    trained / "train.ipynb"], check=True, capture_output=True)
    assert (tmp_path / "train.html").read_text().count('src="data:image/png;base64') >= 3


def test_again_from_the_notebooks_folder_gives_the_same_metrics(trained, drawn, tmp_path):
    again = run(tiny_config(drawn, tmp_path / "tiny.yaml"), tmp_path / "again", cwd=TRAIN.parent)
    for name in ("metrics.json", "history.csv"):
        assert (again / name).read_bytes() == (trained / name).read_bytes()


def test_a_misspelt_override_stops_in_the_first_cell(drawn, tmp_path):
    config = tiny_config(drawn, tmp_path / "tiny.yaml")
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'margin'"):
        run(config, tmp_path / "run", overrides={"Arch.Head.margn": 0.3})
    assert not (tmp_path / "run" / "metrics.json").exists()
