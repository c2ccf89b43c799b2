"""Runs side by side, against plain loops; runs are made by hand, from drawn features, so that nothing is trained."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest

from recnb.data.lists import ImageList
from recnb.gallery.curves import history_figure
from recnb.gallery.figure import _wrap
from recnb.registry import ConfigError
from recnb.runs import compare
from recnb.runs.folder import Run


def images(part, identities, each, first=0):
    labels = np.repeat(np.arange(first, first + identities), each)
    return ImageList([f"{part}/{i}.jpg" for i in range(len(labels))], labels)


def made(tmp_path, name, noise, seed=0, margin=0.3, **changes):
    """A run whose features are one direction per identity with noise."""
    query, gallery = images("query", 8, 3), images("gallery", 8, 4)
    centres, rng = np.random.default_rng(7).normal(size=(8, 16)), np.random.default_rng(seed)
    features = [
        (centres[part.labels] + noise * rng.normal(size=(len(part), 16))).astype("float32") for part in (query, gallery)
    ]
    cfg = {"Global": {"re_ranking": False, "device": "cpu"}, "Arch": {"Head": {"name": "ArcMargin", "margin": margin}}}
    lists = changes.get("query", query), changes.get("gallery", gallery)
    return Run(
        tmp_path / name,
        cfg,
        lambda: lists,
        *features,
        {"recall1": 0.5, "mAP": 0.5 - noise / 10, "gain": {}},
        pd.DataFrame(
            {
                "epoch": [1, 2, 3],
                "lr": 0.1,
                "train_loss": [3.0, 2, 1],
                "recall1": [0.2, 0.6, 0.6],
                "mAP": [0.2, np.nan, 0.4],
            }
        ),
    )


@pytest.fixture
def pair(tmp_path):
    return {name: made(tmp_path, name, noise, seed) for name, noise, seed in (("plain", 2.0, 1), ("better", 1.2, 2))}


def average_precisions(run):
    """(AP, whether the first is right) of each query, by sorting and counting."""
    values = []
    for feature, label in zip(run.query_features, run.query.labels, strict=True):
        cosines = [feature @ item / np.linalg.norm(feature) / np.linalg.norm(item) for item in run.gallery_features]
        right = [run.gallery.labels[i] == label for i in np.argsort(cosines)[::-1]]
        places = [rank for rank, good in enumerate(right, 1) if good]
        values.append((np.mean([found / rank for found, rank in enumerate(places, 1)]), right[0]))
    return values


def test_paired_differences_are_those_of_a_loop(pair):
    rankings = {name: compare.judge(run) for name, run in pair.items()}
    table = compare.paired(rankings, "plain").set_index("metric")
    both = list(zip(*map(average_precisions, pair.values()), strict=True))
    assert table.difference["mAP"] == pytest.approx(np.mean([b[0] - a[0] for a, b in both]), abs=1e-6)
    assert table.difference["recall1"] == pytest.approx(np.mean([float(b[1]) - float(a[1]) for a, b in both]))
    assert (table.low < table.difference).all() and (table.difference < table.high).all()
    fixed = {q for q, (a, b) in enumerate(both) if b[1] and not a[1]}
    broken = {q for q, (a, b) in enumerate(both) if a[1] and not b[1]}
    assert fixed and (table.fixed == len(fixed)).all() and (table.broken == len(broken)).all()
    gained, lost = compare.changed(rankings["plain"], rankings["better"])
    assert (set(gained.tolist()), set(lost.tolist())) == (fixed, broken)
    changes = [abs(both[q][1][0] - both[q][0][0]) for q in gained]
    assert changes == sorted(changes, reverse=True)


def test_a_single_run_has_nothing_to_pair(pair):
    table = compare.paired({"plain": compare.judge(pair["plain"])}, "plain")
    assert len(table) == 0 and "p_value" in table


def test_runs_over_other_lists_are_not_paired(tmp_path, pair):
    plain = pair["plain"]
    assert compare.unpaired(plain, pair["better"]) == ""
    other = made(tmp_path, "other", 1.0, query=images("query", 8, 2))
    assert "the query lists of plain (24 images) and other (16 images)" in compare.unpaired(plain, other)
    other = made(tmp_path, "other", 1.0, gallery=images("gallery", 8, 4, first=1))
    assert "the gallery lists of plain and other give the same files other labels" in compare.unpaired(plain, other)


def moved(tmp_path, name, root, **changes):
    """A run whose lists lie below `root` and say what those of the others say."""
    lists = {part: images(part, 8, n) for part, n in (("query", 3), ("gallery", 4))}
    for part in lists.values():
        part.paths = [f"{root}/{path}" for path in part.paths]
    run = made(tmp_path, name, 1.0, **{**lists, **changes})
    run.cfg["DataLoader"] = {"Eval": {part: {"dataset": {"image_root": root}} for part in ("Query", "Gallery")}}
    return run


def test_lists_are_compared_by_what_they_say_wherever_they_lie(tmp_path):
    first, copied = moved(tmp_path, "first", "/here/images"), moved(tmp_path, "copied", "/there/pictures")
    assert compare.unpaired(first, copied) == ""
    copied.query.names = first.query.names = np.array([f"thing {i}" for i in range(8)])
    assert compare.unpaired(first, copied) == ""
    copied.query.labels = 7 - copied.query.labels  # numbered otherwise, with the names to match
    copied.query.names = copied.query.names[::-1]
    assert compare.unpaired(first, copied) == ""
    copied.query.names = copied.query.names[::-1]
    assert "other labels" in compare.unpaired(first, copied)
    other = made(tmp_path, "other", 1.0, query=images("elsewhere", 8, 3))
    assert "do not name the same files" in compare.unpaired(first, other)


def test_runs_are_grouped_by_test_set_and_the_baseline_is_one_of_them(tmp_path, pair):
    """Two runs over one set, one over another that looks far better: it is no baseline and leads nothing."""
    easy = made(tmp_path, "easy", 0.1, query=images("query", 4, 2))
    easy.metrics = {"recall1": 1.0, "mAP": 1.0}
    runs = {"easy": easy, **pair}
    sets = compare.test_sets(runs)
    assert sets.test_set.to_dict() == {"easy": 2, "plain": 1, "better": 1}
    assert sets.loc["easy"].tolist() == [2, 8, 32, 4]
    board = compare.leaderboard(runs, by="mAP")
    assert board.index.tolist() == ["better", "plain", "easy"]
    reference, comparable = compare.comparable(board, runs)
    assert reference == "plain" and list(comparable) == ["better", "plain"]
    reference, comparable = compare.comparable(board, runs, "easy")
    assert reference == "easy" and list(comparable) == ["easy"]
    with pytest.raises(ConfigError, match="did you mean 'better'"):
        compare.comparable(board, runs, "beter")


def test_a_copied_project_does_not_differ(tmp_path):
    def run(project, margin):
        dataset = {"image_root": str(project / "data" / "images"), "cls_label_path": str(project / "data" / "q.txt")}
        cfg = {"DataLoader": {"Eval": {"Query": {"dataset": dataset}}}, "Arch": {"Head": {"margin": margin}}}
        return SimpleNamespace(cfg=cfg, folder=project / "runs" / "a")

    runs = {"here": run(tmp_path / "here", 0.1), "there": run(tmp_path / "there", 0.3)}
    assert compare.differences(runs).columns.tolist() == ["Arch.Head.margin"]


def test_who_finds_what_is_said_in_the_row(pair):
    rankings = {name: compare.judge(run) for name, run in pair.items()}
    entries = compare.versus(rankings, "plain", "better", 1)
    fixed, broken = compare.changed(*rankings.values())
    assert [title for _, _, title in entries[:2]] == ["plain misses", "better finds"]
    assert [q for _, q, _ in entries] == [q for q in (*fixed[:1], *broken[:1]) for _ in range(2)]
    assert all((ranking.first_hit[q] == 1) == title.endswith("finds") for ranking, q, title in entries)


def test_lines_break_at_spaces_before_they_break_at_signs():
    assert _wrap("margin-0.3 finds Garlic", 19) == ["margin-0.3 finds", "Garlic"]
    assert _wrap("Arla-Lactose-Medium-Fat-Milk", 19) == ["Arla-Lactose-", "Medium-Fat-Milk"]


def test_one_epoch_has_one_tick(tmp_path):
    run = made(tmp_path, "short", 1.0)
    run.history = run.history.head(1)
    for figure in (compare.curves({"short": run}), history_figure(run.history)):
        figure.canvas.draw()
        for ax in figure.axes:
            low, high = ax.get_xlim()
            assert [tick for tick in ax.get_xticks() if low <= tick <= high] == [1]


def test_the_leaderboard(pair):
    table = compare.leaderboard(pair, {"broken": "metrics.json is missing"}, by="mAP")
    assert table.index.tolist() == ["better", "plain", "broken"] and table.index.name == "run"
    assert table.state.tolist() == ["finished", "finished", "metrics.json is missing"]
    assert table.loc["plain", ["epochs", "best_epoch", "last mAP"]].tolist() == [3, 3, 0.4]  # of equals, the later
    assert table.mAP["better"] == pytest.approx(0.38) and "gain" not in table
    assert compare.leaderboard({}, {"broken": "no"}).state.tolist() == ["no"]


def test_differences_name_only_what_differs():
    first = {
        "Global": {"device": "cpu", "seed": 0},
        "Arch": {"Head": {"margin": 0.1, "scale": 16}},
        "Loss": {"Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 0.5}}]},
    }
    second = {
        "Global": {"device": "gpu", "seed": 0},
        "Arch": {"Head": {"margin": 0.3, "scale": 16, "easy": True}},
        "Loss": {"Train": [{"SupConLoss": {"weight": 0.5}}, {"CELoss": {"weight": 2.0}}]},
    }
    runs = {name: SimpleNamespace(cfg=cfg, folder=Path("/runs") / name) for name, cfg in (("a", first), ("b", second))}
    table = compare.differences(runs)
    assert table.to_dict("index") == {
        "a": {
            "Arch.Head.margin": "0.1",
            "Loss.Train": "CELoss, SupConLoss",
            "Loss.Train.CELoss.weight": "1.0",
            "Arch.Head.easy": "-",
        },
        "b": {
            "Arch.Head.margin": "0.3",
            "Loss.Train": "SupConLoss, CELoss",
            "Loss.Train.CELoss.weight": "2.0",
            "Arch.Head.easy": "True",
        },
    }
    assert compare.differences({"a": runs["a"], "b": runs["a"]}).size == 0


def test_entries_without_a_name_of_their_own_are_values():
    twice = [{"Crop": {"size": 1}}, {"Crop": {"size": 2}}]
    assert compare.flat({"ops": twice, "shape": [3, 4], "none": {}}) == {"ops": twice, "shape": [3, 4], "none": {}}


def test_short_names_are_as_long_as_they_must_be():
    keys = ["Arch.Head.margin", "Loss.Train.margin", "Optimizer.lr.name"]
    assert compare.short_names([key.split(".") for key in keys], ".") == ["Head.margin", "Train.margin", "name"]


def test_the_curves_of_many_runs(tmp_path):
    runs = {f"run-{i:02d}": made(tmp_path, f"run-{i:02d}", 1.0) for i in range(16)}
    figure = compare.curves(runs)
    loss, metric = figure.axes
    assert [len(ax.lines) for ax in (loss, metric)] == [16, 16] and metric.get_title() == "recall1"
    assert len({(line.get_color(), line.get_linestyle()) for line in loss.lines}) == 16
    assert [text.get_text() for text in figure.legends[0].get_texts()] == list(runs)
    assert compare.curves(runs, "mAP").axes[1].lines[0].get_xydata().tolist() == [[1, 0.2], [3, 0.4]]


def test_stacked_lists_are_the_lists_of_their_runs(pair):
    first, second = (compare.judge(run) for run in pair.values())
    both = compare.stacked([(first, 5, "before"), (second, 5, "after")], [f"mark {i}" for i in range(8)])
    assert both.query_labels.tolist() == ["before mark 1", "after mark 1"] and len(both) == 2
    assert (both.ids == [first.ids[5], second.ids[5]]).all() and (both.AP == [first.AP[5], second.AP[5]]).all()
    assert both.gallery_labels[0] == "mark 0" and both.query_cameras is None


def test_folders_are_found_and_those_unfinished_have_their_reason(tmp_path):
    for name in ("a", "b", "compare"):
        (tmp_path / name).mkdir()
    for name in ("a", "b"):
        (tmp_path / name / "config.yaml").write_text("Global: {}\n")
    found = compare.find_runs([tmp_path / "a"], str(tmp_path / "*"))
    assert [path.name for path in found] == ["a", "b"]  # a once; compare is no run
    finished, unusable = compare.load_runs([*found, tmp_path / "compare"])
    assert not finished and list(unusable) == ["a", "b", "compare"] and "metrics.json" in unusable["a"]
    with pytest.raises(ConfigError, match="there is no run folder"):
        compare.find_runs([], str(tmp_path / "z*"))
