"""The notebooks, run by papermill as a user runs them; what is asserted is what they leave behind."""

import json
import subprocess
import sys
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import ROOT, run_notebook, tiny_config

from recnb import load_config


def train(config: Path, folder: Path, cwd: Path = ROOT, **parameters) -> Path:
    run_notebook("02_train", folder, cwd, config=str(config), run_dir=str(folder), **parameters)
    return folder


def outputs(notebook: Path) -> list[dict]:
    return [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]


def test_the_run_folder_is_whole(trained_run, drawn):
    metrics = json.loads((trained_run / "metrics.json").read_text())
    assert list(metrics) == ["recall1", "recall5", "mAP", "before", "gain", "intervals"]
    assert metrics["gain"]["mAP"] == pytest.approx(metrics["mAP"] - metrics["before"]["mAP"])
    assert pd.read_csv(trained_run / "history.csv").epoch.tolist() == [1, 2]
    assert load_config(trained_run / "config.yaml")["Arch"]["Head"]["class_num"] == 15
    assert {"packages", "device", "seed", "commit"} <= set(json.loads((trained_run / "env.json").read_text()))
    queries = len((drawn / "query.txt").read_text().splitlines())
    assert np.load(trained_run / "embeddings" / "query.npy").shape == (queries, 16)
    page = (trained_run / "gallery.html").read_text()
    assert page.count("<img") >= queries and "http://" not in page and "https://" not in page
    assert (trained_run / "model.safetensors").exists() and (trained_run / "checkpoints" / "latest.pt").exists()


def test_the_executed_notebook_shows_figures_and_no_warnings(trained_run):
    shown = outputs(trained_run / "train.ipynb")
    assert (
        sum("image/png" in output.get("data", {}) for output in shown) == 4
    )  # pairs, the curves, the verdict, the gallery
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
    assert (trained_run / "train.ipynb").stat().st_size < 1_500_000


def test_the_html_of_nbconvert_holds_the_figures(trained_run, tmp_path):
    subprocess.run(
        [sys.executable, "-m", "nbconvert", "--to", "html", "--output-dir", tmp_path, trained_run / "train.ipynb"],
        check=True,
        capture_output=True,
    )
    assert (tmp_path / "train.html").read_text().count('src="data:image/png;base64') >= 3


@pytest.mark.slow
def test_again_from_the_notebooks_folder_gives_the_same_metrics(trained_run, drawn, tmp_path):
    again = train(tiny_config(drawn, tmp_path / "tiny.yaml"), tmp_path / "again", cwd=ROOT / "notebooks", find_lr=True)
    for name in ("metrics.json", "history.csv"):
        assert (again / name).read_bytes() == (trained_run / name).read_bytes()


def test_the_gallery_notebook_shows_the_run_beside_itself(trained_run, tmp_path):
    executed = run_notebook("04_gallery", tmp_path / "look", run=str(trained_run), other=str(trained_run), k=5)
    shown = outputs(executed)
    assert executed.stat().st_size < 1_500_000
    assert sum("image/png" in output.get("data", {}) for output in shown) == 1
    assert (
        sum("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in shown) == 2
    )  # gallery, grid
    pages = [html for output in shown if 'type="radio"' in (html := output.get("data", {}).get("text/html", ""))]
    assert len(pages) == 1 and pages[0].count("<article") > 1 and "http" not in pages[0]
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
