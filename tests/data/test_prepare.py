"""Preparing one's own images: reading, splitting, duplicates, writing, and the notebook that does it all."""

import os
import shutil

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import run_notebook
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recnb import build_loaders, gallery, load_config
from recnb.data.images import DataError
from recnb.data.lists import positives
from recnb.data.prepare import audit, fingerprints, read_table, split, write_lists
from recnb.recipe.data import evaluation_images, training_images
from recnb.recipe.starter import write_config
from recnb.registry import ConfigError

CAMERA = r"camera(\d+)_"


@pytest.fixture(scope="module")
def table(drawn):
    return read_table(drawn / "images", camera_pattern=CAMERA)


@pytest.fixture
def images(drawn, tmp_path):
    shutil.copytree(drawn / "images", tmp_path / "images")
    return tmp_path / "images"


def made(counts, groups=None, cameras=None) -> pd.DataFrame:
    """A table of files that do not exist."""
    labels = [f"id{i:03d}" for i, n in enumerate(counts) for _ in range(n)]
    table = pd.DataFrame({"path": [f"/made/{i:05d}.jpg" for i in range(len(labels))], "label": labels})
    columns = {"group": groups, "camera": cameras}
    return table.assign(**{name: pd.Series(values, dtype=object) for name, values in columns.items() if values})


def sides(splits) -> pd.Series:
    return splits["split"].where(splits["split"] == "train", "test")


# --- Reading --------------------------------------------------------------------------------------------------------


def test_folder_csv_and_list_give_the_same_table(drawn, table, tmp_path):
    own = [os.path.relpath(path, drawn) for path in table.path]
    csv = table.assign(path=own, price="3,50")
    csv.to_csv(tmp_path / "a.csv", index=False)
    csv.rename(columns={"path": "Datei", "label": "Artikel"}).to_csv(tmp_path / "b.csv", index=False, sep=";")
    lines = [f"{row.path} {int(row.label)} {row.camera}\n" for row in csv.itertuples()]
    (tmp_path / "list.txt").write_text("".join(lines))
    pd.testing.assert_frame_equal(read_table(tmp_path / "a.csv", drawn), table, check_dtype=False)
    named = read_table(tmp_path / "b.csv", drawn, columns={"path": "Datei", "label": "Artikel"})
    pd.testing.assert_frame_equal(named, table, check_dtype=False)
    listed = read_table(tmp_path / "list.txt", drawn)
    pd.testing.assert_frame_equal(listed, table.assign(label=[str(int(x)) for x in table.label]), check_dtype=False)


def test_paths_of_a_csv_start_from_its_own_folder(images):
    first = sorted(images.rglob("*.jpg"))[:2]
    lines = [f"{path.relative_to(images)},a,{group}" for path, group in zip(first, ("", "s1"), strict=True)]
    (images / "my.csv").write_text("\n".join(["\ufeffpath,label,group", *lines, "", ""]), encoding="utf-8")
    table = read_table(images / "my.csv")
    assert table.path.tolist() == list(map(str, first)) and table.group.isna().tolist() == [True, False]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("path,name\nx.jpg,1\n", r"line 1: there is no column 'label'"),
        ("path,label\nx.jpg\n", r"line 2: has no path, no label, or not 2 cells"),
        ("path,label\n\nx.jpg,\n", r"line 3: has no path, no label"),
        ("path,label\nx.jpg,1\n", r"line 2: there is no image .*x\.jpg"),
        ("path,label\n{one},1\n{one},2\n", r"line 3: the image .* was given before, in .* line 2"),
        ('path,label\n"x.jpg,1\n', r"line 2: unexpected end of data"),
        ("path,label\n", r"has no rows"),
        ("", r"line 1: there is no column 'path'"),
        (b"path,label\nx\xff.jpg,1\n", r"line 2: is not UTF-8 text"),
    ],
)
def test_a_bad_row_ends_with_one_sentence_that_names_its_line(drawn, tmp_path, text, message):
    one = next((drawn / "images").rglob("*.jpg"))
    (tmp_path / "my.csv").write_bytes(text if isinstance(text, bytes) else text.format(one=one).encode())
    with pytest.raises(DataError, match=message) as caught:
        read_table(tmp_path / "my.csv")
    assert "my.csv" in str(caught.value) and "\n" not in str(caught.value)


def test_what_cannot_be_read_from_is_named(drawn, tmp_path):
    (tmp_path / "list.txt").write_text("0000/camera0_00.jpg one\n")
    with pytest.raises(DataError, match=r"list.txt line 1: 'one' is not a label"):
        read_table(tmp_path / "list.txt", drawn / "images")
    with pytest.raises(DataError, match="there is no such file or folder"):
        read_table(tmp_path / "none")
    with pytest.raises(DataError, match=r"camera_pattern: .* finds no camera in .*jpg"):
        read_table(drawn / "images", camera_pattern="cam_([0-9])")
    with pytest.raises(DataError, match="does not have one group"):
        read_table(drawn / "images", camera_pattern="camera")
    (tmp_path / "a.csv").write_text("path,label\n")
    with pytest.raises(DataError, match="did you mean 'label'"):
        read_table(tmp_path / "a.csv", columns={"labels": "x"})


# --- Splitting ------------------------------------------------------------------------------------------------------


def check_split(splits: pd.DataFrame) -> None:
    """What must hold of every split."""
    side, test = sides(splits), splits[splits["split"] != "train"]
    assert (side.groupby(splits.label).nunique() == 1).all()
    assert (splits.groupby("label").number.nunique() == 1).all() and splits.number.nunique() == splits.label.nunique()
    assert set(splits.number) == set(range(splits.label.nunique()))
    assert splits.number[side == "train"].max() < test.number.min()
    assert (test.label.isin(splits.label.value_counts()[lambda n: n > 1].index)).all()
    if "group" in splits:
        assert (splits["split"].groupby(splits.group).nunique() == 1).all()
    query, gallery = (test[test["split"] == name] for name in ("query", "gallery"))
    assert len(query)
    for item in query.itertuples():
        findable = gallery[(gallery.label == item.label) & (gallery.source != item.source)]
        assert len(findable)
        camera = getattr(item, "camera", None)
        assert camera is None or pd.isna(camera) or (findable.camera != camera).any()


def test_the_demo_is_split_by_identity_and_again_the_same(table):
    splits = split(table, seed=3)
    check_split(splits)
    pd.testing.assert_frame_equal(splits, split(table.sample(frac=1, random_state=1), seed=3))
    assert (splits.source.astype(str) == splits.camera).all()
    others = [split(table, seed=seed) for seed in range(4)]
    tested = {frozenset(other.label[sides(other) == "test"]) for other in others}
    assert len(tested) > 1
    queries = splits[splits["split"] == "query"].groupby("label").size()
    assert (queries == 2).all() and len(queries) == splits.label[sides(splits) == "test"].nunique()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 7), st.integers(0, 5)), min_size=4, max_size=25), st.data())
def test_every_split_keeps_its_promises(identities, data):
    counts = [n for n, _ in identities]
    images = sum(counts)
    pick = st.lists(st.one_of(st.none(), st.integers(0, images).map(str)), min_size=images, max_size=images)
    table = made(counts, data.draw(st.one_of(st.none(), pick)), data.draw(st.one_of(st.none(), pick)))
    try:
        splits = split(table, data.draw(st.floats(0.05, 0.9)), data.draw(st.floats(0.05, 0.95)), seed=images)
    except DataError as error:
        assert "no identity can be tested" in str(error) or "no image can be a query" in str(error)
    else:
        check_split(splits)
        assert sorted(splits.path) == sorted(table.path)


def test_train_and_test_have_alike_many_images_an_identity():
    table = made([2, 3, 5, 8, 13, 21, 34, 55] * 15)
    for seed in range(5):
        splits = split(table, 0.3, seed=seed)
        counts = splits.groupby([sides(splits).rename("side"), "label"]).size().groupby("side")
        assert 0.27 <= counts.size()["test"] / 120 <= 0.33
        assert counts.mean()["test"] == pytest.approx(counts.mean()["train"], rel=0.2)


def test_identities_of_one_group_stay_together_and_single_images_are_trained_on():
    groups = [None] * 40 + ["video"] * 4
    splits = split(made([1] * 10 + [3] * 10 + [2, 2], groups), 0.5)
    check_split(splits)
    assert set(splits["split"][splits.label < "id010"]) == {"train"}
    assert splits.source.is_unique is False and splits.source[splits.group.isna()].is_unique


def test_a_query_needs_another_camera_to_find():
    splits = split(made([4] * 10, cameras=["a", "a", "a", "b"] * 9 + ["a"] * 4), 0.9, 0.9)
    check_split(splits)
    last = splits[splits.label == "id009"]
    assert set(last["split"]) <= {"train", "gallery"}


def test_impossible_splits_say_why():
    with pytest.raises(DataError, match="no identity can be tested"):
        split(made([1, 1, 1]))
    with pytest.raises(DataError, match="no identity can be tested"):
        split(made([2, 2], ["a", "b", "a", "c"]))
    with pytest.raises(DataError, match="no image can be a query"):
        split(made([2, 2], cameras=["a"] * 4))
    with pytest.raises(ValueError, match="test_share is 1"):
        split(made([2, 2]), test_share=1)


# --- Duplicates -----------------------------------------------------------------------------------------------------


def test_different_pictures_are_no_duplicates(table):
    report = audit(table)
    assert len(report["duplicates"]) == len(report["leaks"]) == len(report["unreadable"]) == 0
    assert report["identities"].images.tolist() == [6] * 24 and report["identities"].cameras.tolist() == [3] * 24
    assert report["sizes"].values.tolist() == [[48, 48, 144]]


def test_copies_are_found_and_those_under_another_identity_are_leaks(images):
    first = {name: images / f"{name:04d}" / "camera0_00.jpg" for name in range(4)}
    shutil.copy(first[0], images / "0020" / "exact.jpg")
    Image.open(first[1]).save(images / "0001" / "saved.jpg", quality=40)
    Image.open(first[2]).resize((131, 120), Image.Resampling.BICUBIC).save(images / "0021" / "resized.png")
    turned = Image.open(first[3]).transpose(Image.Transpose.ROTATE_90)
    turned.save(images / "0003" / "exif.jpg", exif=orientation(6), quality=95)  # shown upright by its EXIF
    report = audit(read_table(images))
    pairs = set(map(tuple, report["duplicates"][["label a", "label b"]].values))
    assert pairs == {("0000", "0020"), ("0001", "0001"), ("0002", "0021"), ("0003", "0003")}
    assert report["duplicates"].kind.tolist() == ["same file"] + ["looks alike"] * 3
    assert report["leaks"]["label b"].tolist() == ["0020", "0021"] and set(report["leaks"].leak) == {"two identities"}


def orientation(value: int) -> Image.Exif:
    exif = Image.Exif()
    exif[0x0112] = value
    return exif


def test_leaks_across_the_split_are_found(images):
    for folder in images.iterdir():
        Image.open(folder / "camera0_00.jpg").save(folder / "camera0_90.jpg", quality=60)
    splits = split(read_table(images), seed=1)
    report = audit(splits)
    assert len(report["duplicates"]) == 24
    leaks = report["leaks"]
    assert 1 <= len(leaks) < 24 and set(leaks.leak) == {"two splits"}
    assert {frozenset(pair) for pair in leaks[["split a", "split b"]].values} == {frozenset(("query", "gallery"))}


def test_flat_pictures_and_other_colours_are_not_alike(tmp_path):
    grid = np.kron(np.indices((4, 4)).sum(0) % 2, np.ones((12, 12)))[..., None]
    pictures = {f"flat{i}": np.full((48, 48, 3), 40 * i) for i in range(4)}
    pictures |= {"red": grid * (200, 40, 40), "blue": grid * (40, 40, 200)}
    for name, pixels in pictures.items():
        (tmp_path / name).mkdir()
        Image.fromarray(pixels.astype(np.uint8)).save(tmp_path / name / "a.jpg")
    shutil.copy(tmp_path / "flat1" / "a.jpg", tmp_path / "flat1" / "b.jpg")
    assert audit(read_table(tmp_path))["duplicates"].kind.tolist() == ["same file"]


def test_unreadable_images_are_listed(images):
    (images / "0005" / "broken.jpg").write_bytes(b"no picture")
    half = (images / "0006" / "camera0_00.jpg").read_bytes()
    (images / "0006" / "half.jpg").write_bytes(half[: len(half) // 2])
    table = read_table(images)
    prints = fingerprints(table.path)
    found = audit(table, prints)["unreadable"]
    assert [path[-10:] for path in found.path] == ["broken.jpg", "6/half.jpg"] and found.problem.str.len().min() > 10
    assert len(audit(table[~table.path.isin(found.path)], prints)["unreadable"]) == 0


def test_the_page_of_samples(table):
    figure = gallery.samples_figure(split(table), rows=5, columns=4)
    assert figure.get_facecolor() == (1, 1, 1, 1) and len(figure.axes) == 25
    assert sum(len(ax.images) for ax in figure.axes) == 20


# --- Writing --------------------------------------------------------------------------------------------------------


def test_the_lists_and_the_config_are_read_by_the_loaders(table, tmp_path):
    splits = split(table, 0.4)
    cfg = load_config(write_config(tmp_path, write_lists(splits, tmp_path)))
    query, gallery = evaluation_images(cfg)
    assert positives(query, gallery).min() >= 1
    assert cfg["DataLoader"]["Train"]["sampler"]["batch_size"] == 4 * training_images(cfg).labels.max() + 4 < 64
    loaders = build_loaders(cfg)
    for name, part in loaders.parts.items():
        assert sorted(part.dataset.paths) == splits.path[splits["split"] == name].tolist()
    assert len(next(iter(loaders.train))[0]) == cfg["DataLoader"]["Train"]["sampler"]["batch_size"]


def test_paths_with_spaces_are_written_with_tabs_or_refused(images, tmp_path):
    (images / "0000").rename(images / "the first one")
    plain = read_table(images)
    cfg = load_config(write_config(tmp_path, write_lists(split(plain), tmp_path)))
    assert cfg["DataLoader"]["Eval"]["Query"]["dataset"]["name"] == "ImageNetDataset"
    assert build_loaders(cfg).query.dataset.cameras is None
    with pytest.raises(DataError, match=r"the first one/camera0_00.jpg: white space in a path"):
        write_lists(split(read_table(images, camera_pattern=CAMERA)), tmp_path)


def test_a_base_without_evaluation_is_refused(table, config_file, tmp_path):
    root = write_lists(split(table), tmp_path)
    base = config_file({"DataLoader.Eval": ..., "Global.eval_during_train": False})
    with pytest.raises(ConfigError, match=r"there is no DataLoader\.Eval\.Query"):
        write_config(tmp_path, root, base)


# --- The notebook ---------------------------------------------------------------------------------------------------


def test_prepare_notebook(images, config_file, tmp_path):
    shutil.copy(images / "0000" / "camera0_00.jpg", images / "0020" / "camera0_77.jpg")
    (images / "0005" / "camera1_77.jpg").write_bytes(b"no picture")
    executed = run_notebook(
        "01_prepare",
        tmp_path / "run",
        source=str(images),
        out_dir=str(tmp_path / "lists"),
        config=str(config_file()),
        options={"camera_pattern": CAMERA, "test_share": 0.4},
    )
    lists = {
        name: [line.split() for line in (tmp_path / "lists" / f"{name}.txt").read_text().splitlines()]
        for name in ("train", "query", "gallery")
    }
    assert sum(map(len, lists.values())) == len({row[0] for rows in lists.values() for row in rows}) == 145
    labels = {name: {row[1] for row in rows} for name, rows in lists.items()}
    assert not labels["train"] & (labels["query"] | labels["gallery"]) and labels["query"] <= labels["gallery"]
    assert build_loaders(load_config(tmp_path / "lists" / "config.yaml")).query.dataset.cameras is not None
    pairs = pd.read_csv(tmp_path / "lists" / "duplicates.csv", dtype=str)
    assert pairs[["label a", "label b"]].values.tolist() == [["0000", "0020"]]
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.get("name") == "stderr"]


@pytest.mark.slow
def test_an_unknown_option_stops_the_notebook(images, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'test_share'"):
        run_notebook("01_prepare", tmp_path / "run", source=str(images), options={"tets_share": 0.4})
