"""The comparison of benchmarks/quality.py: its arithmetic on values made by hand, and a short run of it (slow)."""

import json
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from conftest import ROOT


@pytest.fixture
def quality(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    return pytest.importorskip("quality")


def test_methods_are_compared_query_by_query_over_the_mean_of_seeds(quality, tmp_path):
    labels, values = np.repeat(np.arange(10), 4), np.random.default_rng(0).uniform(0.2, 0.6, 40)
    for method, seed, gain in (("as it comes", 0, 0.0), ("ladder", 0, 0.1), ("ladder", 1, 0.3)):
        figure = quality.Figure(tmp_path, method, seed)
        table = pd.DataFrame({"label": labels, "recall1": values, "mAP": values + gain})
        table.to_csv(figure.path, index=False)
        figure.keep_cost()
    start, ladder = quality.summary(tmp_path)
    assert (start["method"], start["seeds"], ladder["method"], ladder["seeds"]) == ("as it comes", 1, "ladder", 2)
    assert start["against"] == {} and start["mAP"] == pytest.approx(values.mean())
    assert ladder["against"]["as it comes"]["mAP"] == pytest.approx({"difference": 0.2, "low": 0.2, "high": 0.2})
    assert ladder["each_seed"]["mAP"] == pytest.approx([values.mean() + 0.1, values.mean() + 0.3])


def test_the_table_names_every_method_and_the_picture_stands_beside_it(quality, tmp_path):
    row = {"seeds": 3, "minutes": 1.0, "recall1": 0.9, "mAP": 0.5, "mAP_low": 0.4, "mAP_high": 0.6, "against": {}}
    change = {"mAP": {"difference": 0.1, "low": -0.02, "high": 0.22}}
    rows = [{**row, "method": "ladder", "against": {"as it comes": change}}, {**row, "method": "as it comes"}]
    (tmp_path / "quality-grocery.json").write_text(json.dumps({"rows": rows}))
    text = quality.report(tmp_path, tmp_path / "quality.png")
    assert "| as it comes | 0.900 | 0.500 (0.400 to 0.600) |  | 3 | 1.00 |" in text
    assert "| ladder | 0.900 | 0.500 (0.400 to 0.600) | +0.100 (-0.020 to +0.220) | 3 | 1.00 |" in text
    assert "(quality.png)" in text and (tmp_path / "quality.png").stat().st_size > 5000


@pytest.mark.slow
def test_a_short_comparison_runs_and_goes_on_where_it_was(drawn, tmp_path):
    data = tmp_path / "data" / "omniglot"
    data.mkdir(parents=True)
    (data / "images").symlink_to(drawn / "images")
    for name, file in (("train", "train"), ("query", "test")):
        rows = [line.split()[:2] for line in (drawn / f"{name}.txt").read_text().splitlines()]
        (data / f"{file}.txt").write_text("".join(f"images/{path} {label}\n" for path, label in rows))
    command = [sys.executable, ROOT / "benchmarks" / "quality.py", "omniglot", "--quick"]
    command += ["--data", tmp_path / "data", "--out", tmp_path / "out"]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert "from scratch, seed 0: recall1" in said[0] and "pytorch-metric-learning, seed 0: recall1" in said[0]
    assert "recall1" not in said[1], "what is there is not trained again"
    rows = json.loads((tmp_path / "out" / "quality-omniglot.json").read_text())["rows"]
    assert [row["method"] for row in rows] == ["from scratch", "pytorch-metric-learning"]
