"""The galleries show what the metrics count, to the item, and their pages stand alone."""

import base64
import io
import re
from itertools import pairwise

import numpy as np
import pytest
from matplotlib import pyplot as plt
from PIL import Image, ImageDraw

from recnb.gallery import figure as gallery
from recnb.gallery.figure import gallery_figure
from recnb.gallery.page import gallery_html, gallery_static
from recnb.gallery.pictures import read_picture
from recnb.gallery.widget import gallery_widget
from recnb.retrieval.lists import choose_rows, rank
from recnb.retrieval.metrics import ranking_metrics, retrieval_metrics
from recnb.retrieval.ranking import TIE

IDENTITIES, EACH = 12, 6


@pytest.fixture(scope="module")
def data():
    """Seventy-two noisy items of twelve identities, seen by three cameras; two of them are equal but for identity."""
    rng = np.random.default_rng(0)
    labels = np.repeat(np.arange(IDENTITIES) + 100, EACH)
    cameras = np.tile(np.arange(3), len(labels) // 3)
    noise = np.repeat(np.linspace(0.2, 2.5, IDENTITIES), EACH)[:, None]
    embeddings = rng.normal(size=(IDENTITIES, 16))[labels - 100] + noise * rng.normal(size=(len(labels), 16))
    embeddings[30] = 2 * embeddings[40]
    return embeddings.astype(np.float32), labels, cameras


@pytest.fixture(scope="module")
def paths(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("pictures")
    files = []
    for i, label in enumerate(data[1]):
        image = Image.new("RGB", (60 + i % 3 * 20, 60), (40, int(label) * 2, 200))
        ImageDraw.Draw(image).text((20, 20), str(i), fill="white")
        files.append(folder / f"item {i}.png")
        image.save(files[-1])
    return files


@pytest.fixture(scope="module")
def ranking(data):
    embeddings, labels, cameras = data
    return rank(embeddings, embeddings, labels, labels, cameras, cameras, exclude_self=True, k=8)


def whole_list(scores, q, labels, cameras, own):
    """(item, state, rank) down query q's list by plain loops, with ties against the query."""
    items = [i for i in range(len(labels)) if i != own]
    items.sort(key=lambda i: (-(scores[i] - TIE * (labels[i] == labels[q])), labels[i] == labels[q], i))
    position, found = 0, []
    for i in items:
        excluded = labels[i] == labels[q] and cameras is not None and cameras[i] == cameras[q]
        position += not excluded
        state = "excluded" if excluded else "right" if labels[i] == labels[q] else "wrong"
        found.append((i, state, 0 if excluded else position))
    return found


# ---- the ranking -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_cameras", [True, False])
def test_the_ranking_is_the_one_that_the_metrics_count(data, with_cameras):
    embeddings, labels, cameras = data
    cameras = cameras if with_cameras else None
    ranking = rank(embeddings, embeddings, labels, labels, cameras, cameras, exclude_self=True, k=20, show_excluded=99)
    _, arrays = retrieval_metrics(
        embeddings, embeddings, labels, labels, cameras, cameras, exclude_self=True, per_query=True
    )
    unit = embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True)
    for q in range(len(labels)):
        expected = whole_list(unit @ unit[q], q, labels, cameras, own=q)
        shown = list(zip(ranking.ids[q], ranking.state[q], ranking.position[q], strict=True))
        assert shown == expected[:20]
        np.testing.assert_allclose(ranking.scores[q], unit[ranking.ids[q]] @ unit[q], atol=1e-6)
        hits = [(i, position) for i, state, position in expected if state == "right"]
        assert hits == list(zip(ranking.hits[q], ranking.hit_ranks[q], strict=True))[: len(hits)]
        assert ranking.positives[q] == len(hits) == arrays["positives"][q]
        assert ranking.first_hit[q] == hits[0][1] == arrays["first_hit"][q]
        AP = np.mean([(j + 1) / position for j, (_, position) in enumerate(hits)])
        assert ranking.AP[q] == pytest.approx(AP) == arrays["AP"][q]
        missed = [hit for hit in hits if hit[0] not in {i for i, _, _ in expected[:4]}]
        assert [hit[:2] for hit in ranking.missed(q, k=4)] == missed[:3]


def test_ties_stand_against_the_query():
    same = np.ones((4, 3), np.float32)
    ranking = rank(same[:1], same, [1], [1, 0, 0, 1], k=4)
    assert ranking.ids.tolist() == [[1, 2, 0, 3]]
    assert ranking.first_hit.tolist() == [3]
    assert ranking.hit_ranks[0, :2].tolist() == [3, 4]


def test_ready_scores_take_the_place_of_embeddings(data):
    _, labels, cameras = data
    scores = np.random.default_rng(1).normal(size=(len(labels), len(labels))).astype(np.float32)
    ranking = rank(None, None, labels, labels, cameras, cameras, exclude_self=True, scores=scores, show_excluded=0)
    _, arrays = ranking_metrics(scores, labels, labels, cameras, cameras, exclude_self=True, per_query=True)
    assert (ranking.hit_ranks[:, 0] == arrays["first_hit"]).all()
    np.testing.assert_array_equal(ranking.AP, arrays["AP"])
    assert not (ranking.state == "excluded").any()


def test_excluded_items_are_few_and_take_no_rank(data):
    embeddings, labels, cameras = data
    one = np.zeros_like(cameras)
    one[:3] = 1  # the first identity has positives, the others only items of their own camera
    ranking = rank(embeddings, embeddings, labels, labels, one, one, exclude_self=True, k=10)
    assert ((ranking.state == "excluded").sum(1) <= 2).all()
    assert (ranking.position[ranking.state == "excluded"] == 0).all()
    counted = ranking.position[ranking.state == "wrong"]
    assert counted.min() == 1
    assert ranking.valid[:6].all() and not ranking.valid[6:].any()
    assert np.isnan(ranking.AP[6:]).all() and (ranking.left_out[6:] == EACH - 1).all()
    assert not ranking.failed[6:].any()


def test_labels_may_be_text(data, paths):
    embeddings, labels, _ = data
    names = np.array([f"sort {label}" for label in labels])
    ranking = rank(embeddings, embeddings, names, names, exclude_self=True)
    plain = rank(embeddings, embeddings, labels, labels, exclude_self=True)
    np.testing.assert_array_equal(ranking.AP, plain.AP)
    assert "<h2>sort 100</h2>" in gallery_html(ranking, paths, paths)


def test_a_list_shorter_than_k_ends(data):
    embeddings, labels, _ = data
    ranking = rank(embeddings[:2], embeddings[:4], labels[:2], labels[:4], exclude_self=np.array([0, -1]), k=6)
    assert (ranking.ids[0] >= 0).sum() == 3 and (ranking.ids[1] >= 0).sum() == 4
    assert ranking.state[0].tolist() == ["right"] * 3 + [""] * 3
    assert np.isnan(ranking.scores[0, 3:]).all()


def test_choose_rows_gives_successes_and_failures_of_different_identities(ranking):
    rows = choose_rows(ranking, 6)
    assert rows.tolist() == choose_rows(ranking, 6).tolist()
    assert len(set(ranking.query_labels[rows])) == len(rows) == 6
    assert ranking.failed[rows].sum() == 3
    failures = np.flatnonzero(ranking.failed)
    assert rows[0] == failures[np.argmin(ranking.AP[failures])]
    assert all(ranking.AP[a] <= ranking.AP[b] for a, b in pairwise(rows))


@pytest.mark.parametrize("failed", [True, False])
def test_choose_rows_does_with_one_kind(ranking, failed):
    kind = np.flatnonzero(ranking.failed == failed)
    columns = {
        name: value[kind] if name.startswith("query") or name not in ("gallery_labels", "gallery_cameras") else value
        for name, value in vars(ranking).items()
    }
    part = gallery.Ranking(**columns)
    rows = choose_rows(part, 4)
    assert len(rows) == 4 and (part.failed[rows] == failed).all()


# ---- pictures --------------------------------------------------------------------------------------------------------


def test_pictures_are_paths_pil_images_or_arrays(paths):
    clear = Image.new("RGBA", (8, 8), (0, 0, 0, 0))
    assert read_picture(str(paths[0]), 30).size == (30, 30)
    assert read_picture(np.zeros((20, 40, 1), np.uint8), 30).size == (30, 15)
    assert read_picture(Image.new("1", (9, 9), 1), 30).getpixel((0, 0)) == (255, 255, 255)
    assert read_picture(clear, 30).getpixel((0, 0)) == (255, 255, 255)
    with pytest.raises(ValueError, match=r"uint8 array \(H, W\) or \(H, W, 3\), not float32 \(3, 8, 8\)"):
        read_picture(np.zeros((3, 8, 8), np.float32), 30)


@pytest.mark.parametrize("show", [gallery_figure, gallery_html, gallery_widget, gallery_static])
def test_a_missing_or_broken_picture_is_named(ranking, paths, tmp_path, show):
    with pytest.raises(FileNotFoundError, match=r"the picture 'nowhere/gone\.png' does not exist"):
        show(ranking, ["nowhere/gone.png"] * len(paths), ["nowhere/gone.png"] * len(paths))
    (tmp_path / "text.png").write_text("not a picture")
    with pytest.raises(ValueError, match=r"the picture '.*text\.png' cannot be read"):
        show(ranking, [tmp_path / "text.png"] * len(paths), [tmp_path / "text.png"] * len(paths))


# ---- the figure ------------------------------------------------------------------------------------------------------


def test_the_figure_says_and_frames_what_the_ranking_holds(ranking, paths):
    names = {label: f"Sort {label}" for label in range(100, 112)}
    rows = choose_rows(ranking, 4)
    fig = gallery_figure(ranking, paths, paths, rows, k=5, label_names=names, title="Some marks")
    axes = {ax.get_label(): ax for ax in fig.axes}
    assert len(fig.axes) == 1 + len(rows) * 6
    assert "Some marks" in [text.get_text() for text in axes["head"].texts]
    for q in rows:
        notes = " ".join(text.get_text() for text in axes[f"query {q}"].texts)
        assert f"Sort {ranking.query_labels[q]}" in notes
        assert f"AP {ranking.AP[q]:.3f}" in notes and f"rank {ranking.first_hit[q]}" in notes
        for place in range(5):
            ax, state = axes[f"query {q}, hit {place}"], ranking.state[q, place]
            assert ax.get_xlabel() == f"{ranking.position[q, place] or '-'} · {ranking.scores[q, place]:.3f}"
            assert plt.matplotlib.colors.same_color(ax.spines["top"].get_edgecolor(), gallery.COLOURS[state])
            assert ax.lines[1].get_marker() == gallery.SIGNS[state]


def test_the_figure_is_opaque_small_and_shown_once(ranking, paths):
    before = plt.get_fignums()
    with plt.style.context("dark_background"):
        fig = gallery_figure(ranking, paths, paths)
    assert plt.get_fignums() == before
    fig.savefig(file := io.BytesIO(), format="png", bbox_inches="tight")
    image = Image.open(file)
    assert fig.dpi <= 100 and len(file.getvalue()) < 400_000
    assert image.convert("RGBA").getpixel((0, 0)) == (255, 255, 255, 255)
    texts = [text for ax in fig.axes for text in [*ax.texts, ax.xaxis.label] if text.get_text()]
    assert {text.get_color() for text in texts} <= {gallery.INK, gallery.SOFT}


# ---- the page --------------------------------------------------------------------------------------------------------


def articles(page):
    return {int(q): text for q, text in re.findall(r'<article id="q(\d+)"(.*?)</article>', page, re.S)}


def test_the_page_agrees_with_the_ranking(ranking, paths, tmp_path):
    page = gallery_html(ranking, paths, paths, tmp_path / "gallery.html", k=6)
    assert (tmp_path / "gallery.html").read_text(encoding="utf-8") == page
    found = articles(page)
    assert list(found) == ranking.order().tolist()
    for q, text in found.items():
        hits, _, missed = text.partition("First positives missed")
        assert re.findall(r'<li class="(\w+)"', hits) == ranking.state[q, :6].tolist()
        captions = [f"{p or '-'} · {s:.3f}" for p, s in zip(ranking.position[q], ranking.scores[q], strict=True)]
        assert re.findall(r"</i>(.*?)</b>", hits) == captions[:6]
        assert f"<dd>{ranking.AP[q]:.3f}</dd>" in text and f"<dd>rank {ranking.first_hit[q]}</dd>" in text
        assert re.findall(r"</i>(\d+) ·", missed) == [str(place) for _, place, _ in ranking.missed(q, 6)]
    listed = re.findall(r'<li data-q="(\d+)".*?class="(\w+)"', page)
    assert {int(q) for q, state in listed if state == "wrong"} == set(np.flatnonzero(ranking.failed))
    assert f"mAP {ranking.AP.mean():.3f}" in page


def test_the_page_stands_alone_and_holds_each_picture_once(ranking, paths):
    page = gallery_html(ranking, paths, paths, k=8)
    for outside in ("http:", "https:", "//", "@import", "<link", "<script src", "<iframe"):
        assert outside not in re.sub(r"base64,[\w+/=]*", "", page)
    pictures = re.findall(r"url\(data:image/jpeg;base64,([\w+/=]+)\)", page)
    used = set(re.findall(r'<img class="(\w+)"', page))
    assert len(pictures) == len(used) <= len(paths)  # queries are gallery items: one picture for both
    assert max(Image.open(io.BytesIO(base64.b64decode(code))).width for code in pictures) <= 112
    images = re.findall(r"<img [^>]*>", page)
    assert len(images) > len(used) and all(' alt="' in tag for tag in images)
    assert len(re.findall(r'<a href="#q\d+" title=', page)) > 0  # hits lead to their own page


def test_labels_and_paths_cannot_run(ranking, tmp_path):
    evil = '<script>alert("1")</script>\'"><img src=x onerror=alert(1)>'
    file = tmp_path / "<b onclick='run()'>&.png"
    Image.new("RGB", (9, 9)).save(file)
    names = dict.fromkeys(range(100, 112), evil)
    page = gallery_html(ranking, [file] * len(ranking), [file] * len(ranking), label_names=names, title=evil)
    assert page.count("<script") == 1 and "onerror=alert(1)>" not in page and "<b onclick" not in page
    assert "&lt;script&gt;" in page and "&lt;b onclick=" in page


def test_the_page_says_what_it_leaves_out(ranking, paths):
    page = gallery_html(ranking, paths, paths, max_queries=5, order="best")
    assert list(articles(page)) == ranking.order("best")[:5].tolist()
    assert "5 of 72 queries are on this page, the best by AP." in page
    assert "are on this page" not in gallery_html(ranking, paths, paths)
    assert list(articles(gallery_html(ranking, paths, paths, rows=[7, 3]))) == [7, 3]


def test_pictures_must_be_as_many_as_items(ranking, paths):
    with pytest.raises(ValueError, match="72 queries and 72 gallery items, but there are 1 and 72 pictures"):
        gallery_html(ranking, paths[:1], paths)


def test_long_names_break_with_a_sign(ranking, paths):
    names = dict.fromkeys(range(100, 112), "Landwirtschaftsministerium_of_Schleswig")
    page = gallery_html(ranking, paths, paths, label_names=names)
    assert "<h2>Landwirtsch\u00adaftsministe\u00adrium_<wbr>of_<wbr>Schleswig</h2>" in page


# ---- the widget ------------------------------------------------------------------------------------------------------


@pytest.fixture
def widget(ranking, paths):
    return gallery_widget(ranking, paths, paths, k=5)


def shown(widget):
    return next(iter(articles(widget.about.value)))


def items(widget):
    return [place[0].item for place in widget.hits.places]


def test_the_slider_walks_the_order(widget, ranking):
    assert shown(widget) == widget.query == ranking.order()[0]
    widget.place.value = 7
    assert shown(widget) == widget.query == ranking.order()[7]
    widget.order.value = "index"
    assert widget.query == ranking.order()[7] == widget.place.value  # the query stays, its place changes
    widget.place.value = 3
    assert shown(widget) == 3 and widget.where.value == "4 of 72"
    widget.query = 70
    assert shown(widget) == 70 == widget.place.value


def test_failures_only(widget, ranking):
    widget.order.value = "best"
    widget.place.value = 0
    assert not ranking.failed[widget.query]
    widget.failures.value = True
    assert widget.rows == [q for q in ranking.order("best") if ranking.failed[q]]
    assert widget.query == widget.rows[0] and widget.place.max == ranking.failed.sum() - 1
    widget.place.value = widget.place.max  # the filter's last stays the query when the order turns round
    last = widget.query
    widget.order.value = "worst"
    assert widget.query == last == widget.rows[widget.place.value] == shown(widget)
    widget.query = int(np.flatnonzero(~ranking.failed)[0])  # out of the filter: it is lifted, the query is shown
    assert not widget.failures.value and shown(widget) == widget.query


def test_next_failure_goes_round(widget, ranking):
    widget.order.value = "index"
    widget.query = 0
    seen = []
    for _ in range(ranking.failed.sum() + 1):
        widget.next_failure.click()
        seen.append(widget.query)
    failures = np.flatnonzero(ranking.failed).tolist()
    failures = failures[1:] + failures[:1] if failures[0] == 0 else failures
    assert seen == [*failures, failures[0]]


def test_k_and_following_a_hit(widget, ranking):
    widget.k.value = 3
    assert len(widget.hits.row.children) == 3 and items(widget) == ranking.ids[widget.query, :3].tolist()
    target = int(ranking.ids[widget.query, 1])  # query and gallery are one set
    widget.hits.row.children[1].children[0].click()
    assert widget.query == target == shown(widget)
    assert items(widget) == ranking.ids[target, :3].tolist()


def test_thumbnails_are_made_on_demand_and_once(ranking, paths, monkeypatch):
    read, count = gallery.read_picture, []
    monkeypatch.setattr("recnb.gallery.page.read_picture", lambda *a: count.append(a) or read(*a))
    widget = gallery_widget(ranking, paths, paths, k=5)
    assert len(count) <= 1 + 5 + 3
    before = len(count)
    widget.place.value = 1
    widget.place.value = 0
    assert len(count) <= before + 9


def test_no_failure_is_said(data, paths):
    labels = data[1]
    clean = np.eye(IDENTITIES, dtype=np.float32)[labels - 100]
    widget = gallery_widget(rank(clean, clean, labels, labels, exclude_self=True), paths, paths)
    widget.failures.value = True
    widget.next_failure.click()
    assert widget.where.value == "no query is left by the filters"


def test_static_pages_hold_their_queries(ranking, paths):
    page = gallery_static(ranking, paths, paths, rows=[4, 9, 2], k=4).data
    assert [int(q) for q in re.findall(r'<article id="pages-[\w-]+-q(\d+)"', page)] == [4, 9, 2]
    assert page.count('type="radio"') == 3 and len(re.findall("<input [^>]*checked", page)) == 1
    assert "data:image/jpeg" in page and "http" not in page and "<script" not in page
