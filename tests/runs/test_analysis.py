"""The analysis of embeddings against plain loops, and its notebook as a user runs it."""

import itertools
import json

import nbformat
import numpy as np
import pandas as pd
import pytest
from conftest import run_notebook
from PIL import Image

from recnb import gallery, retrieval
from recnb.data.prepare import with_tags
from recnb.registry import ConfigError
from recnb.runs import analysis, suspects, tables
from recnb.storage import ROOT, from_root


def synthetic(seed=0, identities=6, each=5, noise=0.6, cameras=True):
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(identities, 16))
    parts = [np.repeat(np.arange(identities), n) for n in (3, each)]
    vectors = [(centres[part] + noise * 2 * rng.normal(size=(len(part), 16))).astype(np.float32) for part in parts]
    seen = [rng.integers(0, 3, len(part)) for part in parts] if cameras else [None, None]
    return analysis.Embeddings(*vectors, *parts, *seen)


def lists_of(data):
    """Per query: (cosines of its positives, of its negatives), by a plain loop."""
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (data.query, data.gallery)]
    for q, row in enumerate(unit[0] @ unit[1].T):
        positive = [
            s
            for s, y, c in zip(row, data.gallery_labels, data.gallery_cameras, strict=True)
            if y == data.query_labels[q] and c != data.query_cameras[q]
        ]
        yield np.array(positive), row[data.gallery_labels != data.query_labels[q]]


def ranks_of(data):
    return [sorted(1 + (neg > s).sum() + (pos > s).sum() for s in pos) for pos, neg in lists_of(data) if len(pos)]


@pytest.mark.parametrize("seed", range(3))
def test_cmc_and_precision_recall_against_loops(seed):
    data = synthetic(seed)
    ranks = ranks_of(data)
    _, arrays = analysis.judge(data)
    expected = [np.mean([r[0] <= k for r in ranks]) for k in range(1, 31)]
    assert retrieval.cmc(arrays, 30) == pytest.approx(expected)
    recall, precision = analysis.precision_recall(data, memory=1 << 14)
    for t, value in zip(recall, precision, strict=True):
        best = [max(j / r for j, r in enumerate(one, 1) if j / len(one) >= t - 1e-9) for one in ranks]
        assert value == pytest.approx(np.mean(best))
    assert precision[0] >= precision[50] >= precision[100]


def test_cmc_beyond_the_gallery_stays_at_one():
    assert retrieval.cmc(analysis.judge(synthetic())[1], 500)[-1] == 1


def test_intervals_hold_the_estimate():
    metrics, arrays = analysis.judge(synthetic())
    assert (metrics.low <= metrics["mean"]).all() and (metrics["mean"] <= metrics.high).all()
    assert metrics["mean"]["mAP"] == pytest.approx(arrays["AP"][arrays["valid"]].mean())
    assert metrics.low["mAP"] < metrics.high["mAP"]


@pytest.mark.parametrize("bins", [1, 7, 100])
def test_the_histogram_counts_every_pair(bins):
    data = synthetic()
    edges, counts = analysis.pair_histogram(data, bins, memory=1 << 14)
    positive, negative = (np.concatenate(part) for part in zip(*lists_of(data), strict=True))
    assert counts.tolist() == [np.histogram(x, edges)[0].tolist() for x in (negative, positive)]


@pytest.mark.parametrize("rate", [0.3, 0.05, 0.01])
def test_the_threshold_against_sorted_negatives(rate):
    data = synthetic()
    point = analysis.operating_point(data, rate)
    positive, negative = (np.concatenate(part) for part in zip(*lists_of(data), strict=True))
    allowed = int(rate * len(negative))  # the next negative would be one too many
    limit = np.sort(negative)[::-1][allowed]
    assert (negative >= point["threshold"]).mean() <= rate
    assert point["TPR"] == pytest.approx((positive > limit).mean(), abs=1.5 / len(positive))
    assert point["threshold"] > limit - 1e-4
    assert point["rate"] == rate and json.dumps(point)


def test_identities_are_the_means_of_their_queries():
    data = synthetic()
    _, arrays = analysis.judge(data)
    table = analysis.identities(data, arrays)
    assert table.AP.is_monotonic_increasing and table.queries.sum() == arrays["valid"].sum()
    for label, ap in zip(table.label, table.AP, strict=True):
        mine = arrays["valid"] & (data.query_labels == int(str(label).split()[-1]))
        assert ap == pytest.approx(arrays["AP"][mine].mean())


def test_confused_pairs_against_a_loop():
    data, expected = synthetic(noise=1.0), {}
    unit = [x / np.linalg.norm(x, axis=1, keepdims=True) for x in (data.query, data.gallery)]
    for q, row in enumerate(unit[0] @ unit[1].T):
        same = data.gallery_labels == data.query_labels[q]
        counted = ~(same & (data.gallery_cameras == data.query_cameras[q]))
        first = data.gallery_labels[np.where(counted, row, -2).argmax()]
        if (same & counted).any() and first != data.query_labels[q]:
            pair = int(data.query_labels[q]), int(first)
            expected[pair] = expected.get(pair, 0) + 1
    table = analysis.confused(data)
    assert expected
    assert {(r.identity, r.taken_for): r.queries for r in table.itertuples()} == expected
    assert table.queries.is_monotonic_decreasing and table.share.between(0, 1).all()
    assert [expected.get((r.taken_for, r.identity), 0) for r in table.itertuples()] == table.back.tolist()


def test_nobody_is_confused_where_all_is_right():
    assert analysis.confused(synthetic(noise=0.01)).empty


def test_planted_label_errors_are_found_and_clean_data_has_none():
    vectors, labels, _ = synthetic(noise=0.05, each=8, cameras=False).union()
    assert suspects.label_errors(vectors, labels).empty
    wrong = labels.copy()
    planted = {3: 4, 20: 1, 47: 0}
    for item, label in planted.items():
        wrong[item] = label
    table = suspects.label_errors(vectors, wrong)
    assert dict(zip(table["item"], table.suggested, strict=True)) == {i: labels[i] for i in planted}
    assert (table.agreement == 1).all() and (table.similarity > table.own_similarity).all()


def test_labels_may_be_strings_and_the_agreement_lower():
    vectors, labels, _ = synthetic(noise=0.05, each=8, cameras=False).union()
    names = np.array([f"thing {label}" for label in labels])
    names[0] = names[1] = "alone"
    table = suspects.label_errors(vectors, names, k=5, agreement=0.6)
    assert set(table["item"]) == {0, 1} and set(table.suggested) == {f"thing {labels[0]}"}


def labelled_pictures(tmp_path):
    """A set of named drawings in which one of each of three is labelled as another, and what those are."""
    data = synthetic(noise=0.05, each=8, cameras=False)
    labels, planted = data.gallery_labels.copy(), {2: 4, 21: 1, 40: 0}
    for item, label in planted.items():
        labels[item] = label
    paths = [str(tmp_path / "images" / f"{i}.png") for i in range(len(labels))]
    (tmp_path / "images").mkdir()
    for i, path in enumerate(paths):
        Image.new("RGB", (12, 12), (5 * i, 90, 90)).save(path)
    names = [f"Lait entier {i} $" for i in range(6)]
    vectors = data.gallery
    one = analysis.Embeddings(
        vectors, vectors, labels, labels, None, None, True, paths, paths, names, str(tmp_path / "images")
    )
    return one, {f"{item}.png": names[data.gallery_labels[item]] for item in planted}


def test_suspects_have_names_and_paths_and_become_corrections(tmp_path):
    data, planted = labelled_pictures(tmp_path)
    table = suspects.suspects(data)
    assert dict(zip(table.path, table.suggested, strict=True)) == planted
    assert set(table.label) == {data.names[i] for i in (4, 1, 0)}
    tags = suspects.corrections(table)
    assert tags.columns.tolist() == ["path", "action", "label"] and set(tags.action) == {"relabel"}
    assert dict(zip(tags.path, tags.label, strict=True)) == planted
    tags.to_csv(tmp_path / "suspects.csv", index=False)
    found = pd.DataFrame({"path": data.gallery_paths, "label": data.text(data.gallery_labels)})
    mended, left = with_tags(found, tmp_path / "suspects.csv", tmp_path / "images")
    true = synthetic(noise=0.05, each=8, cameras=False).gallery_labels
    assert mended.label.tolist() == data.text(true) and not left


def test_suspects_are_shown_with_their_neighbours(tmp_path):
    data, _ = labelled_pictures(tmp_path)
    table = suspects.suspects(data)
    figure = suspects.suspects_figure(data, table)
    figure.savefig(tmp_path / "suspects.png")
    texts = " ".join(text.get_text() for ax in figure.axes for text in ax.texts)
    assert all(name in texts for name in table.label) and sum("hit" in ax.get_label() for ax in figure.axes) == 18


def test_the_confusion_counts_first_hits(tmp_path):
    data = synthetic(noise=1.0)
    data.names = [f"thing {i}" for i in range(6)]
    table, pairs = analysis.confusion(data), analysis.confused(data)
    assert table.to_numpy().sum() == analysis.judge(data)[1]["valid"].sum()
    for row in pairs.itertuples():
        assert table.loc[f"thing {row.identity}", f"thing {row.taken_for}"] == row.queries
    wrong = sum(table.loc[a, b] for a in table.index for b in table.columns if a != b)
    assert wrong == pairs.queries.sum() > 0
    gallery.confusion_figure(table).savefig(tmp_path / "confusion.png")


def test_a_collapsed_embedding_has_few_directions():
    data = synthetic(noise=1.0)
    whole = analysis.spread(data).iloc[0]
    data.query, data.gallery = (np.outer(x[:, 0], np.ones(16, np.float32)) for x in (data.query, data.gallery))
    flat = analysis.spread(data).iloc[0]
    assert whole.dimensions == flat.dimensions == 16 and whole.effective_rank > 8
    assert flat.effective_rank == pytest.approx(1, abs=1e-3) and flat.uniformity > whole.uniformity


def test_the_rungs_of_a_ladder_in_a_picture(tmp_path):
    rows = [
        {"name": "as it comes $", "value": 0.51, "low": 0.4, "high": 0.6, "kept": False},
        {"name": "probe", "value": 0.62, "low": 0.5, "high": 0.7, "kept": True, "note": "+0.11"},
        {"name": "alone", "value": 0.5, "low": np.nan, "high": np.nan, "kept": False},
    ]
    figure = gallery.ladder_figure(rows)
    figure.savefig(tmp_path / "ladder.png")
    (ax,) = figure.axes
    assert [text.get_text().replace("\\", "") for text in ax.get_yticklabels()] == ["as it comes $", "probe", "alone"]
    said = [text.get_text() for text in ax.texts]
    assert said[1] == "0.620 (0.500 to 0.700)  kept  +0.11" and "kept" not in said[0] and said[2] == "0.500"
    curve = gallery.ladder_figure(rows, way={0.0: 0.51, 0.4: 0.6, 1.0: 0.55}).axes[1]
    assert curve.lines[0].get_xydata().tolist() == [[0.0, 0.51], [0.4, 0.6], [1.0, 0.55]]


def test_tables_are_escaped_and_read_from_the_left():
    table = pd.DataFrame({"name": ["<b>", "b"], "value": [1 / 3, np.nan]})
    page = tables.shown(table, 1).to_html()
    assert "&lt;b&gt;" in page and "0.333" in page and page.count("<tr>") == 2
    assert "col0" in page.split("</style>")[0] and "text-align: left" in page
    assert "nan" not in tables.shown(table).to_html()


def test_paths_are_shown_from_the_project_on(tmp_path):
    assert from_root(ROOT / "runs" / "a") == "runs/a" and from_root(tmp_path) == str(tmp_path)
    (tmp_path / "a.csv").write_text("12345")
    (tmp_path / "a.ipynb").write_text("{}")
    assert tables.files(tmp_path).split() == ["5", str(tmp_path / "a.csv")]


def test_effects_compare_with_the_plain_search():
    data = synthetic()
    table = analysis.effects(data, {"halved": (data.query[:, :8], data.gallery[:, :8])})
    assert table.index[0] == "as they are" and table["mAP gain"].iloc[0] == 0
    assert "halved" in table.index and "re-ranking" in table.index
    assert table["mAP gain"].to_numpy() == pytest.approx((table.mAP - table.mAP.iloc[0]).to_numpy())
    assert table.mAP.iloc[0] == pytest.approx(analysis.judge(data)[0]["mean"]["mAP"])


def test_one_set_that_searches_itself():
    data = synthetic(cameras=False)
    both = analysis.Embeddings(data.gallery, data.gallery, data.gallery_labels, data.gallery_labels, exclude_self=True)
    assert both.same and len(both.union()[0]) == len(data.gallery) and not data.same
    assert len(analysis.effects(both)) == 5


def test_the_principal_components_spread_the_points():
    vectors = synthetic().union()[0]
    points, method = analysis.project(vectors)
    assert points.shape == (len(vectors), 2) and method in ("PCA", "UMAP")
    if method == "PCA":
        unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
        spread = np.linalg.svd(unit - unit.mean(0), compute_uv=False)[:2]
        assert np.linalg.norm(points, axis=0) == pytest.approx(spread, rel=1e-4)


def test_pictures_on_the_map_stand_apart():
    points = np.random.default_rng(0).normal(size=(300, 2))
    labels = (np.arange(300) == 77).astype(int)
    figure = gallery.map_figure(points, labels, [Image.new("RGB", (20, 20))] * 300, [1], most=40)
    taken = [artist.xy for artist in figure.axes[0].artists]
    assert tuple(taken[0]) == tuple(points[77]) and 10 < len(taken) <= 40
    place = (np.array(taken) - points.min(0)) / np.ptp(points, axis=0) * (18, 14)  # in pictures
    assert all(np.abs(a - b).max() >= 1 for a, b in itertools.combinations(place, 2))


def test_figures_are_white_and_small(tmp_path):
    data = synthetic()
    pictures = [Image.new("RGB", (20, 20), "red")] * len(data.gallery)
    points, _ = analysis.project(data.gallery)
    figures = [
        analysis.overview_figure(data),
        analysis.overview_figure(data, rate=1e-9),
        gallery.map_figure(points, data.gallery_labels, pictures, [0, 1]),
        gallery.map_figure(points, data.gallery_labels),
    ]
    for i, figure in enumerate(figures):
        figure.savefig(tmp_path / f"{i}.png")
        assert figure.dpi <= 100
        assert Image.open(tmp_path / f"{i}.png").convert("RGB").getpixel((0, 0)) == (255, 255, 255)


def written(data, folder):
    folder.mkdir(exist_ok=True)
    files = {}
    for key in ("query", "gallery", "query_cameras", "gallery_cameras"):
        np.save(folder / f"{key}.npy", getattr(data, key))
        files[key] = str(folder / f"{key}.npy")
    for key in ("query_labels", "gallery_labels"):
        (folder / f"{key}.txt").write_text("\n".join(f"thing {label}" for label in getattr(data, key)) + "\n")
        files[key] = str(folder / f"{key}.txt")
    return files


def test_files_give_the_same_as_arrays(tmp_path):
    data = synthetic()
    read = analysis.of_files(written(data, tmp_path))
    assert read.query_labels[0] == "thing 0"
    pd.testing.assert_frame_equal(analysis.judge(read)[0], analysis.judge(data)[0])


def test_without_a_gallery_the_queries_search_each_other(tmp_path):
    files = written(synthetic(), tmp_path)
    read = analysis.of_files({"query": files["query"], "query_labels": files["query_labels"]})
    assert read.same and len(read.gallery) == len(read.query)


def test_paths_tell_whose_picture_is_whose(tmp_path):
    files = written(synthetic(cameras=True), tmp_path)
    for side, count in (("query", 18), ("gallery", 30)):
        (tmp_path / f"{side}.list").write_text("\n".join(f"{(i * 7) % count}.jpg" for i in range(count)))
        files[f"{side}_paths"] = str(tmp_path / f"{side}.list")
    read = analysis.of_files(files)
    assert all(read.query_paths[q] == read.gallery_paths[g] for q, g in enumerate(read.protocol.own) if g >= 0)
    assert (read.protocol.own >= 0).all() and len(read.union()[0]) == 30


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"gallery_label": "x.npy"}, "did you mean 'gallery_labels'"),
        ({"query": ...}, "'query' is missing"),
        ({"gallery": ...}, "'gallery' is missing"),
        ({"query_labels": "nowhere.txt"}, "there is no file"),
        ({"gallery_labels": "short.txt"}, "gallery_labels has 1 entries for 30 vectors"),
    ],
)
def test_what_is_wrong_with_files_is_said(tmp_path, change, message):
    files = written(synthetic(), tmp_path)
    (tmp_path / "short.txt").write_text("1\n")
    files |= {key: str(tmp_path / value) for key, value in change.items() if value is not ...}
    files = {key: value for key, value in files.items() if change.get(key) is not ...}
    with pytest.raises(ConfigError, match=message):
        analysis.of_files(files)


def test_an_unknown_option_is_refused():
    assert analysis.chosen({"neighbours": 3})["neighbours"] == 3
    with pytest.raises(ConfigError, match="did you mean 'neighbours'"):
        analysis.chosen({"neighbors": 3})


def check_results(folder, notebook):
    report = json.loads((folder / "evaluation.json").read_text())
    assert report["metrics"]["mAP"]["low"] <= report["metrics"]["mAP"]["mean"] <= report["metrics"]["mAP"]["high"]
    assert {"threshold", "TPR", "rate", "EER"} <= set(report["verification"])
    assert pd.read_csv(folder / "ap_per_identity.csv").AP.is_monotonic_increasing
    assert "taken_for" in pd.read_csv(folder / "confused.csv")
    errors = pd.read_csv(folder / "label_errors.csv")
    assert "suggested" in errors and (folder / "suspects.csv").exists() == ("path" in errors)
    shown = [output for cell in nbformat.read(notebook, 4).cells for output in cell.get("outputs", [])]
    figures = sum("image/png" in output.get("data", {}) for output in shown)
    assert figures == 4 + ("path" in errors and len(errors) > 0)  # curves, pairs, confusion, map; suspects
    assert [output.text for output in shown if output.get("name") == "stderr"] == []
    assert notebook.stat().st_size < 1_500_000
    return report


@pytest.mark.slow
def test_the_notebook_on_files(tmp_path):
    files = written(synthetic(), tmp_path / "files")
    notebook = run_notebook("03_evaluate", tmp_path / "run", embeddings=files, out_dir=str(tmp_path / "out"))
    report = check_results(tmp_path / "out", notebook)
    assert report["metrics"] == analysis.judge(synthetic())[0].to_dict("index")


def test_the_notebook_on_a_run(trained_run, tmp_path):
    notebook = run_notebook("03_evaluate", tmp_path / "run", run=str(trained_run), out_dir=str(tmp_path / "out"))
    report = check_results(tmp_path / "out", notebook)
    metrics = json.loads((trained_run / "metrics.json").read_text())
    assert report["metrics"]["mAP"]["mean"] == pytest.approx(metrics["mAP"], abs=1e-6)
