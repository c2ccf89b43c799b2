"""The demo set: equal arguments give equal bytes, the split does not leak, and both sides of it hold look-alikes."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from recnb.data import layouts
from recnb.data.lists import DATASETS, VeriWild
from recnb.demo import marks
from recnb.demo.marks import VARIED, design_marks, draw_mark, draw_marks
from recnb.demo.photographs import CAMERAS, photograph
from recnb.registry import ConfigError

SMALL = {"identities": 12, "renderings": 6, "size": 32}


def read(path: Path) -> list[tuple[str, int, int]]:
    return [(name, int(label), int(camera)) for name, label, camera in map(str.split, path.read_text().splitlines())]


def contents(root: Path) -> dict[str, bytes]:
    return {str(p.relative_to(root)): p.read_bytes() for p in sorted(root.rglob("*")) if p.is_file()}


@pytest.fixture(scope="module")
def drawn(tmp_path_factory) -> dict[str, Path]:
    return draw_marks(tmp_path_factory.mktemp("marks") / "set", **SMALL)


@pytest.fixture
def copy(drawn, tmp_path) -> dict[str, Path]:
    root = shutil.copytree(drawn["images"].parent, tmp_path / "copy")
    return {name: root / path.name for name, path in drawn.items()}


def test_same_arguments_same_bytes(drawn, tmp_path):
    draw_marks(tmp_path / "again", **SMALL)
    assert contents(tmp_path / "again") == contents(drawn["images"].parent)


def test_another_seed_gives_other_marks_and_pictures(drawn, tmp_path):
    other = draw_marks(tmp_path / "other", **SMALL, seed=1)
    first = [paths["images"] / "0000/camera0_00.jpg" for paths in (drawn, other)]
    assert first[0].read_bytes() != first[1].read_bytes()
    assert [m[:-1] for m in design_marks(12, seed=0)] != [m[:-1] for m in design_marks(12, seed=1)]


def test_lists_name_every_picture_once(drawn):
    assert list(drawn) == ["images", "train", "query", "gallery"]
    lines = [line for name in ("train", "query", "gallery") for line in drawn[name].read_text().splitlines()]
    assert all(len(line.split(" ")) == 3 for line in lines)
    names = [line.split(" ")[0] for line in lines]
    assert sorted(names) == sorted(p.relative_to(drawn["images"]).as_posix() for p in drawn["images"].rglob("*.jpg"))
    assert len(set(names)) == SMALL["identities"] * SMALL["renderings"]


def test_pictures_open_and_have_the_size(drawn):
    for path in drawn["images"].rglob("*.*"):
        with Image.open(path) as picture:
            picture.load()
            assert (picture.format, picture.mode, picture.size) == ("JPEG", "RGB", (32, 32))


def test_labels_are_contiguous_and_test_identities_are_new(drawn):
    labels = {name: {label for _, label, _ in read(drawn[name])} for name in ("train", "query", "gallery")}
    assert labels["train"] == set(range(9))
    assert labels["query"] == labels["gallery"] == set(range(9, 12))


def test_every_query_is_found_in_the_other_cameras_only(drawn):
    gallery = read(drawn["gallery"])
    assert {camera for _, _, camera in read(drawn["query"])} == {camera for _, _, camera in gallery} == {0, 1, 2}
    for _, label, camera in read(drawn["query"]):
        assert {c for _, other, c in gallery if other == label} == {0, 1, 2} - {camera}


def test_a_third_of_the_test_pictures_ask(drawn):
    assert 2 * len(read(drawn["query"])) == len(read(drawn["gallery"]))


@pytest.mark.parametrize("identities", [6, 80, 100, 120])
def test_groups_look_alike_but_for_one_attribute(identities):
    marks = design_marks(identities)
    assert len({mark[:-1] for mark in marks}) == len(marks) == identities
    for group in range(marks[-1].group + 1):
        members = [mark for mark in marks if mark.group == group]
        assert 3 <= len(members) <= 5
        for a, b in combinations(members, 2):
            assert [name for name in VARIED if getattr(a, name) != getattr(b, name)] == [VARIED[group % 4]]


def test_both_splits_hold_whole_groups_of_every_kind(tmp_path):
    paths, marks = draw_marks(tmp_path, identities=36, renderings=3, size=32), design_marks(36)
    groups = {name: {marks[label].group for _, label, _ in read(paths[name])} for name in ("train", "query")}
    assert not groups["train"] & groups["query"]
    assert {g % 4 for g in groups["train"]} == {g % 4 for g in groups["query"]} == {0, 1, 2, 3}


def test_swapped_colours_are_the_same_colours():
    for mark in (mark for mark in design_marks() if VARIED[mark.group % 4] == "colours"):
        assert {frozenset(m.colours) for m in design_marks() if m.group == mark.group} == {frozenset(mark.colours)}


def test_cameras_have_looks_of_their_own():
    arts, rng = [draw_mark(mark) for mark in design_marks(30)], np.random.default_rng(0)
    views = [[np.asarray(photograph(art, c, rng, 32)).mean((0, 1)) for art in arts] for c in range(len(CAMERAS))]
    colours = np.mean(views, axis=1)  # (camera, red-green-blue)
    redness, brightness = colours[:, 0] - colours[:, 2], colours.mean(1)
    assert redness[1] - max(redness[0], redness[2]) > 30
    assert brightness[0] > brightness[1] > brightness[2]


def test_a_whole_set_is_left_alone(copy):
    root = copy["images"].parent
    before = {p: p.stat().st_mtime_ns for p in root.rglob("*")}
    assert draw_marks(root, **SMALL) == copy
    assert {p: p.stat().st_mtime_ns for p in root.rglob("*")} == before


@pytest.mark.parametrize("damage", ["picture", "list", "edit", "unfinished", "version"])
def test_a_damaged_set_is_drawn_again(drawn, copy, damage):
    manifest = copy["images"].parent / "marks.json"
    if damage == "picture":
        (copy["images"] / "0003/camera1_00.jpg").unlink()
    elif damage == "list":
        copy["query"].unlink()
    elif damage == "edit":
        copy["train"].write_text("0000/camera0_00.jpg 5 0\n")
    else:
        change = {"complete": False} if damage == "unfinished" else {"version": 0}
        manifest.write_text(json.dumps({**json.loads(manifest.read_text()), **change}))
        (copy["images"] / "0000/camera0_00.jpg").write_bytes(b"half")
    draw_marks(manifest.parent, **SMALL)
    assert contents(manifest.parent) == contents(drawn["images"].parent)


def test_other_arguments_replace_the_set(copy):
    draw_marks(copy["images"].parent, identities=6, renderings=3, size=48)
    pictures = list(copy["images"].rglob("*.jpg"))
    assert len(pictures) == 18
    assert {Image.open(p).size for p in pictures} == {(48, 48)}


@pytest.mark.parametrize("name", ["holiday.jpg", "marks.json"])
def test_a_folder_that_holds_something_else_is_left_alone(tmp_path, name):
    (tmp_path / name).write_text("[]")
    with pytest.raises(ValueError, match="holds something other than a drawn set"):
        draw_marks(tmp_path, **SMALL)
    assert contents(tmp_path) == {name: b"[]"}


@pytest.mark.parametrize(
    ("name", "value"),
    [("identities", 5), ("identities", 2000), ("identities", 12.0), ("renderings", 2), ("size", 16), ("seed", -1)],
)
def test_wrong_arguments_are_named_in_one_sentence(tmp_path, name, value):
    with pytest.raises(ValueError, match=rf"^{name} must be a whole number from \d+ to \d+, not {value!r}$"):
        draw_marks(tmp_path / "set", **{**SMALL, name: value})
    assert not (tmp_path / "set").exists()


@pytest.fixture
def small_demo(monkeypatch):
    """The data set draws a small set, and counts its pictures."""
    pictures = []

    def counted(*args):
        pictures.append(args)
        return photograph(*args)

    monkeypatch.setattr(marks, "photograph", counted)
    monkeypatch.setattr(layouts, "draw_marks", partial(draw_marks, **SMALL))
    return pictures


def test_the_data_set_draws_itself_where_it_is_missing(tmp_path, small_demo):
    files = {"image_root": str(tmp_path / "set/images"), "cls_label_path": str(tmp_path / "set/query.txt")}
    found = DATASETS.build({"name": "DrawnMarks", **files}, "here")
    drawn = len(small_demo)
    as_listed, again = VeriWild(**files), DATASETS.build({"name": "DrawnMarks", **files}, "here")
    for images in (as_listed, again):
        assert images.paths == found.paths
        assert all(map(np.array_equal, (images.labels, images.cameras), (found.labels, found.cameras)))
    assert drawn == len(small_demo) == SMALL["identities"] * SMALL["renderings"]


def test_two_who_need_the_set_at_once_draw_it_once(tmp_path, small_demo):
    with ThreadPoolExecutor(2) as pool:
        paths = list(pool.map(lambda _: draw_marks(tmp_path / "set", **SMALL), range(2)))
    assert paths[0] == paths[1]
    assert len(small_demo) == SMALL["identities"] * SMALL["renderings"]


def test_a_folder_of_something_else_is_not_drawn_into(tmp_path, small_demo):
    (tmp_path / "holiday.jpg").touch()
    section = {"name": "DrawnMarks", "image_root": str(tmp_path), "cls_label_path": str(tmp_path / "train.txt")}
    with pytest.raises(ConfigError, match=r"^here: .* holds something other than a drawn set"):
        DATASETS.build(section, "here")
