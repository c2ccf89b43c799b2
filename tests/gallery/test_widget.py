"""The widget's filters, comparison, searches and files, through its traits; and the heat map."""

from dataclasses import replace
from datetime import datetime, timezone

import numpy as np
import pytest
import torch
from PIL import Image

from recnb.gallery import figure as gallery
from recnb.gallery.page import gallery_html
from recnb.gallery.regions import agreement, as_map, heat
from recnb.gallery.widget import gallery_widget
from recnb.models.backbones import create_backbone
from recnb.models.recmodel import RecModel
from recnb.retrieval.lists import rank
from recnb.retrieval.metrics import retrieval_metrics


def test_heat_is_highest_where_a_shared_patch_lies():
    a, b = torch.zeros(3, 4, 4), torch.zeros(3, 4, 4)
    a[0], b[1] = 1, 1
    a[:, 1, 2] = b[:, 3, 0] = torch.tensor([0.0, 0.0, 1.0])
    assert np.unravel_index(heat(a, b, (4, 4)).argmax(), (4, 4)) == (1, 2)
    assert np.unravel_index(heat(b, a, (4, 4)).argmax(), (4, 4)) == (3, 0)
    assert heat(a, a, (4, 4)).mean() > heat(a, b, (4, 4)).mean()


def test_maps_come_in_every_layout():
    channels_first = torch.rand(5, 2, 2)
    assert torch.equal(as_map(channels_first.permute(1, 2, 0), 1.0), channels_first)
    tokens = torch.cat([torch.zeros(1, 5), channels_first.flatten(1).T])
    assert torch.equal(as_map(tokens, 1.0, prefix=1), channels_first)


@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_agreement_of_real_networks(name):
    model = RecModel(create_backbone(name, pretrained=False, input_size=(3, 160, 160))).eval()
    a, b = torch.rand(2, 3, 160, 160)
    for values in agreement(model, a, b):
        assert values.shape == (160, 160) and 0 <= values.min() and values.max() <= 1


# ---- the widget ------------------------------------------------------------------------------------------------------


def items(widget):
    """The gallery rows of the first ranking shown."""
    return [place[0].item for place in widget.hits.places]


@pytest.fixture(scope="module")
def pictures(drawn):
    """Queries and gallery of the drawn set: (paths, labels, cameras) of each."""
    lists = [
        [line.split() for line in (drawn / f"{name}.txt").read_text().splitlines()] for name in ("query", "gallery")
    ]
    return [
        (
            [str(drawn / "images" / path) for path, _, _ in rows],
            np.array([int(label) for _, label, _ in rows]),
            np.array([int(camera) for _, _, camera in rows]),
        )
        for rows in lists
    ]


def features(labels, noise, seed):
    draw = np.random.default_rng(seed)
    centres = np.random.default_rng(1).normal(size=(100, 8))
    return (centres[labels] + noise * draw.normal(size=(len(labels), 8))).astype(np.float32)


@pytest.fixture(scope="module")
def rankings(pictures):
    (_, ql, qc), (_, gl, gc) = pictures
    return {
        name: rank(features(ql, noise, seed), features(gl, noise, seed + 1), ql, gl, qc, gc, k=8)
        for name, noise, seed in (("first", 1.3, 2), ("second", 1.1, 4))
    }


@pytest.fixture
def widget(rankings, pictures, tmp_path):
    gallery_features = features(pictures[1][1], 1.3, 3)
    return gallery_widget(
        rankings,
        pictures[0][0],
        pictures[1][0],
        k=5,
        gallery_features=gallery_features,
        embed=lambda picture: gallery_features[4],
        export_folder=tmp_path,
        regions=lambda a, b: (np.eye(32, dtype=np.float32), np.zeros((32, 32), np.float32)),
    )


def test_the_hits_shown_agree_with_the_metrics(rankings, pictures, widget):
    (_, ql, qc), (_, gl, gc) = pictures
    _, arrays = retrieval_metrics(features(ql, 1.3, 2), features(gl, 1.3, 3), ql, gl, qc, gc, per_query=True)
    for q in np.flatnonzero(arrays["valid"]).tolist():
        widget.query = q
        assert f"<dd>{arrays['AP'][q]:.3f}</dd>" in widget.about.value
        assert f"<dd>rank {arrays['first_hit'][q]}</dd>" in widget.about.value
        right = [item for item in items(widget) if gl[item] == ql[q] and gc[item] != qc[q]]
        found = (rankings["first"].state[q, :5] == "right").sum()
        assert len(right) == found and f"<dd>{found} of {arrays['positives'][q]}</dd>" in widget.about.value


def test_filters_leave_the_queries_they_name(widget, rankings, pictures):
    ranking, (_, labels, cameras) = rankings["first"], pictures[0]
    widget.identity.value = "id 17"
    assert set(widget.rows) == set(np.flatnonzero(labels == 17).tolist())
    widget.identity.value, widget.camera.value = "", 1
    assert set(widget.rows) == set(np.flatnonzero(cameras == 1).tolist())
    widget.camera.value = "any"
    counts = [int(text.rsplit("(")[-1][:-1]) for text, _ in widget.confused.options[1:]]
    assert counts == sorted(counts, reverse=True) and sum(counts) == ranking.failed.sum()
    pair = widget.confused.options[1][1]
    widget.confused.value = pair
    assert len(widget.rows) == counts[0] and set(labels[widget.rows]) == {pair[0]}
    widget.find.value = "no such name"
    assert widget.rows == [] and widget.where.value == "no query is left by the filters"
    widget.find.value, widget.confused.value = "ID 16", "any"
    assert set(widget.rows) == set(np.flatnonzero(labels == 16).tolist())
    widget.random.click()
    assert widget.query in widget.rows


def test_two_rankings_side_by_side(widget, rankings):
    first, second = rankings.values()

    def beside(k: int) -> list[int]:
        return [place[k].item for place in widget.hits.places]

    assert all(len(place) == 1 for place in widget.hits.places)
    widget.compare.value = "second"
    fixed, broken = (np.flatnonzero(a.failed & ~b.failed).tolist() for a, b in ((first, second), (second, first)))
    assert [text for text, _ in widget.change.options] == [
        "all",
        f"fixed by second ({len(fixed)})",
        f"broken by second ({len(broken)})",
    ]
    for value, rows in (("fixed", fixed), ("broken", broken)):
        widget.change.value = value
        assert sorted(widget.rows) == rows
    widget.query = widget.rows[0]
    assert beside(0) == first.ids[widget.query, :5].tolist() and beside(1) == second.ids[widget.query, :5].tolist()
    assert [len(cell.children) for cell in widget.hits.row.children] == [2] * 5  # a rank is a cell, both in it
    assert "above: first, AP" in widget.hits.title.value and "below: second, AP" in widget.hits.title.value
    target = int(second.ids[widget.query, 3])
    widget.hits.row.children[3].children[1].children[0].click()
    assert f"id {second.gallery_labels[target]}" in widget.about.value and target not in items(widget)
    widget.change.value, widget.ranking.value = "all", "second"
    assert items(widget) == second.ids[widget.query, :5].tolist()
    widget.compare.value = "none"
    assert all(len(place) == 1 for place in widget.hits.places) and len(widget.change.options) == 1


def test_any_item_and_any_image_can_be_the_query(widget, pictures, tmp_path):
    item = items(widget)[2]
    widget.hits.row.children[2].children[0].click()
    assert item not in items(widget) and "counts in no metric" in widget.about.value
    path = tmp_path / "own.png"
    Image.new("RGB", (20, 30), "red").save(path)
    widget.path.value = str(path)
    assert items(widget)[0] == 4 and "counts in no metric" in widget.about.value
    widget.path.value = str(tmp_path / "missing.png")
    assert "missing.png cannot be searched: it is not there." in widget.about.value
    assert widget.hits.places == [] and "<img" not in widget.about.value
    upload(widget, "own.png", path.read_bytes())
    assert items(widget)[0] == 4 and "<img" in widget.about.value


def upload(widget, name: str, content: bytes) -> None:
    now = datetime.now(timezone.utc)
    file = {"name": name, "type": "image/png", "size": 1, "content": memoryview(content), "last_modified": now}
    widget.upload.value = (file,)


def test_a_failed_upload_clears_the_picture_and_says_why(widget):
    upload(widget, "holiday.heic", b"no image at all")
    said = "holiday.heic cannot be searched: it is empty or of no known image format."
    assert said in widget.about.value and "<img" not in widget.about.value + widget.later.value
    assert widget.hits.row.children == () and "BytesIO" not in widget.about.value
    widget.place.value = 1
    assert "<article" in widget.about.value and len(widget.hits.places) == 5


def test_one_panel_is_open_at_a_time(widget):
    filters, own, *_ = widget.tabs
    filters.value = True
    assert widget.panels.selected_index == 0
    own.value = True
    assert widget.panels.selected_index == 1 and not filters.value
    own.value = False
    assert widget.panels.selected_index is None


def test_scores_below_zero_are_explained(widget, rankings, pictures):
    distances = replace(rankings["second"], scores=-np.abs(rankings["second"].scores))
    named = {"cosine": rankings["first"], "re-ranked": distances}
    both = gallery_widget(named, pictures[0][0], pictures[1][0], k=5)
    assert "minus a distance" not in both.hits.title.value + widget.hits.title.value
    both.compare.value = "re-ranked"
    assert both.hits.title.value.count("minus a distance") == 1
    assert "minus a distance" in gallery_html(distances, pictures[0][0], pictures[1][0])


def test_without_features_only_queries_can_be_clicked(rankings, pictures):
    plain = gallery_widget(rankings["first"], pictures[0][0], pictures[1][0])
    assert all(tile.children[0].disabled for tile in plain.hits.row.children)
    assert plain.panels.titles == ("filters", "save this view")


def test_the_heat_map_is_made_when_its_panel_is_open(widget):
    assert widget.heat.value == ""
    widget.panels.selected_index = list(widget.panels.titles).index("where two pictures agree")
    before = widget.heat.value
    assert before.count("data:image/jpeg") == 2
    widget.hit.value = items(widget)[1]
    assert widget.heat.value.count("<img") == 2 and widget.heat.value != before


def test_the_view_is_saved(widget, tmp_path):
    widget.failures.value = True
    page = widget.save_html().read_text()
    assert page.count("<article") == len(widget.rows) and str(tmp_path) in widget.saved.value
    widget.as_png.click()
    with Image.open(tmp_path / f"query_{widget.query}.png") as image:
        assert image.width > 500


def test_a_large_gallery_reads_only_what_is_looked_at(pictures, monkeypatch):
    count, labels = 100_000, np.arange(100_000) % 5000
    vectors = np.random.default_rng(0).normal(size=(count, 8)).astype(np.float32)
    read, seen = gallery.read_picture, []
    monkeypatch.setattr("recnb.gallery.page.read_picture", lambda *a: seen.append(a) or read(*a))
    ranking = rank(vectors[:20], vectors, labels[:20], labels, exclude_self=np.arange(20), k=10)
    large = gallery_widget(ranking, [pictures[1][0][0]] * 20, [pictures[1][0][i % 36] for i in range(count)])
    assert len(seen) <= 14
    large.place.value = 5
    assert len(seen) <= 28
