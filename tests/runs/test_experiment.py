"""One experiment: what is read, how often, and what the run folder says of each query."""

from collections import Counter

import numpy as np
import pandas as pd
import pytest
from conftest import make

from recnb.data.lists import ImageList
from recnb.recipe import data
from recnb.recipe.schema import load_config
from recnb.runs.experiment import train
from recnb.runs.folder import load_run
from recnb.runs.results import evaluate_start, save_results
from recnb.training.adaptor import Callback


@pytest.fixture
def read(monkeypatch):
    """How often an image of a list has been asked for, by the list's file name."""
    count, one = Counter(), ImageList.__getitem__

    def counted(self, item):
        count[self.source.rpartition("/")[2]] += 1
        return one(self, item)

    monkeypatch.setattr(ImageList, "__getitem__", counted)
    return count


def test_evaluation_images_are_read_once_before_each_epoch_and_at_the_end(config_file, tmp_path, read):
    train(load_config(config_file({"Global.epochs": 1})), tmp_path / "run")
    run = load_run(tmp_path / "run")
    assert read["query.txt"] == 3 * len(run.query) and read["gallery.txt"] == 3 * len(run.gallery)


def test_with_validation_the_test_lists_are_read_before_and_at_the_end_only(config_file, tmp_path, read):
    train(load_config(config_file({"Global.epochs": 3, "DataLoader.Validation.share": 0.3})), tmp_path)
    assert read["query.txt"] == 2 * len(load_run(tmp_path).query)


def test_the_training_list_is_read_once(config_file, tmp_path, monkeypatch):
    reads, one = [], data.read_split
    monkeypatch.setattr(data, "read_split", lambda cfg, where: (reads.append(where), one(cfg, where))[1])
    train(load_config(config_file({"Global.epochs": 0})), tmp_path)
    assert reads == ["DataLoader.Train", "DataLoader.Eval.Query", "DataLoader.Eval.Gallery"]


def test_each_query_has_its_values_before_and_after(config_file, tmp_path):
    cfg = load_config(config_file({"Global.epochs": 1, "Metric.Eval": [{"mAP": {}}, {"Precisionk": {"topk": [2]}}]}))
    result = train(cfg, tmp_path)
    table, run = pd.read_csv(tmp_path / "queries.csv"), load_run(tmp_path)
    both = [f"{name}_{when}" for name in ("mAP", "precision@2") for when in ("before", "after")]
    assert list(table) == ["path", "label", *both]
    assert table.path.tolist() == run.query.paths
    assert table.label.astype(str).tolist() == [run.query.name(label) for label in run.query.labels.tolist()]
    for name in ("mAP", "precision@2"):
        assert table[f"{name}_before"].mean() == pytest.approx(result["before"][name])
        assert table[f"{name}_after"].mean() == pytest.approx(result[name])


class Stop(Callback):
    """Ends training behind the first epoch, when all is saved."""

    order = 100

    def after_epoch(self):
        raise RuntimeError("stopped by the test")


def test_what_was_before_training_is_kept_where_a_run_goes_on(config_file, tmp_path, read):
    learn = make(config_file, tmp_path)
    start = evaluate_start(tmp_path, learn)
    learn.fit(1, 0.01)
    assert evaluate_start(tmp_path, learn).metrics == learn.evaluate().metrics  # nothing to go on from: what it is now
    learn = make(config_file, tmp_path)
    start = evaluate_start(tmp_path, learn)
    with pytest.raises(RuntimeError, match="stopped by the test"):
        learn.add_cb(Stop()).fit_config()
    read.clear()
    again = evaluate_start(tmp_path, learn.remove_cb(Stop))
    assert not read and again.metrics == start.metrics
    for name, values in start.per_query.items():
        assert np.array_equal(values, again.per_query[name], equal_nan=True)
    save_results(tmp_path, learn, again, learn.evaluate())
    assert pd.read_csv(tmp_path / "queries.csv").mAP_before.mean() == pytest.approx(start.metrics["mAP"])
