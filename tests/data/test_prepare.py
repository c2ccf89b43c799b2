"""Preparing one's own images: reading, splitting, duplicates, writing, and the notebook that does it all."""

import itertools
import os
import shutil
from pathlib import Path

import nbformat
import numpy as np
import pandas as pd
import papermill
import pytest
from conftest import run_notebook
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from recnb import build_learner, build_loaders, build_model, gallery, load_config, storage
from recnb.cli.notebook import find, parameters_of
from recnb.cli.run import joined
from recnb.data import layouts
from recnb.data.audit import audit, fingerprints
from recnb.data.images import DataError
from recnb.data.lists import positives
from recnb.data.prepare import (
    Options,
    clean,
    images_root,
    list_files,
    read_options,
    read_source,
    used,
    with_groups,
    with_tags,
    write_files,
)
from recnb.data.splits import split
from recnb.recipe import starter
from recnb.recipe.data import evaluation_images, training_images
from recnb.registry import ConfigError


def read_table(*args, **options) -> pd.DataFrame:
    """The table of `read_source`, without the files that are left out."""
    return read_source(*args, **options)[0]


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
    return splits["split"].replace({"query": "test", "gallery": "test"})


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
    assert read_table(tmp_path / "list.txt", drawn / "images").label.tolist() == ["one"]
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
    side, test = sides(splits), splits[splits["split"].isin(["query", "gallery"])]
    assert (side.groupby(splits.label).nunique() == 1).all()
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
        shares = [data.draw(st.floats(0.05, most)) for most in (0.9, 0.95, 0.5)]
        splits = split(table, *shares, seed=images)
    except DataError as error:
        assert "no identity can be tested" in str(error) or "no image can be a query" in str(error)
    else:
        check_split(splits)
        assert sorted(splits.path) == sorted(table.path)


def test_of_few_identities_two_are_trained_on_and_two_tested():
    for count, seed in itertools.product((4, 5, 6, 7), range(20)):
        splits = split(made([3] * count), seed=seed)
        check_split(splits)
        assert splits.label.groupby(sides(splits)).nunique().min() > 1


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


def begun(splits, config="auto", prints=None, **options) -> starter.Start:
    prints = fingerprints(splits.path) if prints is None else prints
    return starter.choose(starter.facts(splits, prints), Options(**{"weights": False, **options}), config)


def test_the_lists_and_the_config_are_read_by_the_loaders(table, tmp_path):
    splits = split(table, 0.4, validation=0.2)
    cfg = load_config(starter.write(tmp_path, begun(splits), splits))
    query, gallery = evaluation_images(cfg)
    assert positives(query, gallery).min() >= 1
    identities = len(training_images(cfg).names)
    assert cfg["DataLoader"]["Train"]["sampler"]["batch_size"] == 4 * identities < 64
    loaders = build_loaders(cfg)
    for name, part in loaders.parts.items():
        mine, images = splits[splits["split"] == name.split()[0]], part.dataset
        assert sorted(images.paths) == mine.path.tolist()
        assert {images.name(label) for label in images.labels} == set(mine.label)
    assert loaders.validation
    assert len(next(iter(loaders.train))[0]) == cfg["DataLoader"]["Train"]["sampler"]["batch_size"]
    lines = (tmp_path / "validation.txt").read_text().splitlines()
    assert len(lines) == (splits["split"] == "validation").sum() and {line.count("\t") for line in lines} == {2}


def test_lists_of_an_earlier_split_go_and_what_is_the_users_own_stays(table, tmp_path):
    whole, parted = split(table, 0.4), split(table, 0.4, validation=0.2)
    for name in ("validation.txt", "train.txt.mine", "notes.csv"):
        (tmp_path / name).write_text("mine")
    starter.write(tmp_path, begun(whole), whole)
    assert [path.read_text() for path in (tmp_path / "validation.txt", tmp_path / "notes.csv")] == ["mine"] * 2
    starter.write(tmp_path, begun(parted), parted)
    starter.write(tmp_path, begun(whole), whole)
    names = {"train.txt", "query.txt", "gallery.txt", "config.yaml", "train.txt.mine", "notes.csv"}
    assert {path.name for path in tmp_path.iterdir()} == names


def test_names_come_out_as_they_went_in(images, tmp_path):
    names = ["the first one", "7", "007", "7-Up, 1.5 l", "红旗", "NaN", "Ångström"]
    for number, name in enumerate(names):
        (images / f"{number:04d}").rename(images / name)
    splits = split(read_table(images, camera_pattern=CAMERA), 0.4)
    cfg = load_config(starter.write(tmp_path / "lists", begun(splits), splits))
    lists = [training_images(cfg), *evaluation_images(cfg)]
    assert {table.name(label) for table in lists for label in table.labels} == set(splits.label) >= set(names)
    for table in lists:
        assert [table.name(label) for label in table.labels] == [path.split("/")[-2] for path in table.paths]
        assert table.cameras is not None


@pytest.mark.parametrize("name", ["two\nlines", "a\ttab"])
def test_names_that_no_list_can_hold(images, tmp_path, name):
    (images / "0000").rename(images / name)
    with pytest.raises(DataError, match=r"no list can hold this name, which is"):
        list_files(split(read_table(images)))
    assert not list(tmp_path.glob("*.txt"))


def test_lists_have_a_third_column_only_where_images_share_a_source():
    """Else every photo of a folder would seem to have been taken by a camera of its own."""
    for groups, width in ((None, 2), (["a", "a", *[None] * 10], 3)):
        lists = list_files(split(made([4, 4, 4], groups)))[1]
        assert {len(line.split("\t")) for text in lists.values() for line in text.splitlines()} == {width}


def test_names_that_look_the_same_are_one_identity(images):
    (images / "0000").rename(images / "Café ")
    (images / "0001").rename(images / "Cafe\u0301")
    assert read_table(images).label.value_counts()["Café"] == 12


def test_what_was_made_before_stays_where_nothing_can_be_written(table, tmp_path, monkeypatch):
    write_files(tmp_path, {"a.txt": "old", "b.txt": "old"})
    real = Path.write_text

    def full(self, text, **options):
        if ".b.txt" in self.name:
            raise OSError(28, "No space left on device")
        return real(self, text, **options)

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(DataError, match=r"cannot be written to: No space left on device; nothing was changed$"):
        write_files(tmp_path, {"a.txt": "new", "b.txt": "new"})
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"a.txt": "old", "b.txt": "old"}


def test_a_base_without_evaluation_is_refused(table, config_file, tmp_path):
    base = config_file({"DataLoader.Eval": ..., "Global.eval_during_train": False})
    with pytest.raises(ConfigError, match=r"there is no DataLoader\.Eval\.Query"):
        starter.write(tmp_path, begun(split(table), base), split(table))


# --- The recipe -----------------------------------------------------------------------------------------------------


SEEN = {"images": 1000, "identities": 40, "each": 25, "side": 400, "gpu": False}
LEAN = {"name": "mobilenetv2_100", "pretrained": True}


@pytest.mark.parametrize(
    ("changes", "backbone", "name", "why"),
    [
        ({}, None, "scratch_small", "without pretrained weights"),
        ({}, LEAN, "finetune_cnn", "gently"),
        ({"images": 60}, LEAN, "probe", "60 images are too few"),
        ({"identities": 3}, LEAN, "probe", "3 identities are too few"),
        ({"each": 2}, LEAN, "probe", "2 images of an identity are too few"),
        ({"images": 10**6}, LEAN, "probe", "without a GPU"),
        ({"images": 10**6, "gpu": True}, LEAN, "finetune_cnn", "gently"),
        ({}, {"name": "test_vit", "pretrained": True}, "probe", "test_vit is no network of the kind"),
    ],
)
def test_a_recipe_is_chosen_by_the_images_and_says_why(changes, backbone, name, why):
    chosen, said = starter.recipe(starter.Facts(**{**SEEN, **changes}), backbone)
    assert chosen == name and why in said


@settings(max_examples=40, deadline=None)
@given(
    st.sampled_from(["scratch_small", "finetune_cnn", "probe"]),
    st.integers(2, 5000),
    st.integers(2, 200),
    st.integers(1, 500),
)
def test_sizes_follow_from_the_numbers(name, identities, each, side):
    cfg = load_config(f"configs/starters/{name}.yaml", {"Arch.Backbone.pretrained": False})
    seen = starter.Facts(identities * each, identities, each, side, False)
    starter.fit(cfg, seen, Options(), *starter.STEPS[name])
    sampler, size = cfg["DataLoader"]["Train"]["sampler"], cfg["Global"]["image_shape"][-1]
    assert sampler["batch_size"] % sampler["sample_per_id"] == 0
    assert 2 <= sampler["batch_size"] // sampler["sample_per_id"] <= identities and sampler["batch_size"] <= 64
    assert 32 <= size <= 160 and (size <= max(32, side)) and cfg["Global"]["epochs"] >= 1
    ops = [args for op in cfg["DataLoader"]["Train"]["dataset"]["transform_ops"] for args in op.values()]
    assert {args["size"] for args in ops if "size" in args} == {size}


@pytest.mark.parametrize("name", ["finetune_cnn", "probe", "scratch_small"])
def test_a_recipe_trains(table, tmp_path, monkeypatch, name):
    backbone = None if name == "scratch_small" else {"name": "test_resnet", "pretrained": False}
    monkeypatch.setattr(starter, "pretrained", lambda options: (backbone, ""))
    monkeypatch.setattr(starter, "recipe", lambda seen, backbone: (name, ""))
    splits = split(table, 0.4, validation=0.25)
    start = begun(splits, epochs=1, image_size=32)
    cfg = load_config(starter.write(tmp_path, start, splits), {"Global.probe_cache": str(tmp_path / "cache")})
    ops = [op for op in cfg["DataLoader"]["Train"]["dataset"]["transform_ops"] if "NormalizeImage" in op]
    assert ops == [{"NormalizeImage": {"mean": [0.5] * 3, "std": [0.5] * 3}}], "of the backbone that was chosen"
    loaders = build_loaders(cfg)
    learn = build_learner(cfg, build_model(cfg), loaders, run_dir=tmp_path / "run")
    learn.fit_config()
    assert (tmp_path / "run" / "model.safetensors").is_file() and set(learn.evaluate().metrics) == {
        "recall1",
        "recall5",
        "mAP",
    }
    rows = (tmp_path / "run" / "labels.csv").read_text().splitlines()
    assert rows[1:] == [f"{i},{label}" for i, label in enumerate(sorted(set(splits.label[splits["split"] == "train"])))]


def test_what_is_given_is_taken(table):
    options = {"backbone": "test_resnet", "epochs": 1, "image_size": 48, "weights": False}
    cfg = begun(split(table), **options).cfg
    assert cfg["Arch"]["Backbone"] == {"name": "test_resnet", "pretrained": False}
    assert cfg["Global"]["epochs"] == 1 and cfg["Global"]["image_shape"] == [3, 48, 48]
    assert cfg["Optimizer"]["lr"]["warmup_epoch"] == 0


def test_weights_are_taken_from_where_they_are(monkeypatch, tmp_path):
    def offline(name, pretrained=False, **options):
        raise ValueError("cannot be fetched")

    monkeypatch.setattr(starter, "create_backbone", offline)
    for module in (starter, storage):
        monkeypatch.setattr(module, "ROOT", tmp_path)
    assert starter.pretrained(Options(weights=False))[0] is None
    backbone, why = starter.pretrained(Options())
    assert backbone is None and "model.safetensors of timm/mobilenetv2_100.ra_in1k" in why and "a FILE" in why
    with pytest.raises(ConfigError, match=r"cannot be reached .*mobilenetv2_100\.ra_in1k.*True.*FILE.*False"):
        starter.pretrained(Options(weights=True))
    file = tmp_path / "weights" / "mobilenetv2_100_imagenetnorm_fp16.pth"
    file.parent.mkdir()
    file.write_bytes(b"")
    section = {"name": "mobilenetv2_100", "pretrained": f"weights/{file.name}", "pad_type": "same"}
    assert starter.pretrained(Options(weights=str(file)))[0] == section
    assert starter.pretrained(Options())[0] == section
    with pytest.raises(ConfigError, match="there is no weights file"):
        starter.pretrained(Options(weights="none.pth"))
    with pytest.raises(ConfigError, match="begins with no backbone's; write backbone, too"):
        starter.section_of(tmp_path / "best.pth", None)


@pytest.mark.parametrize("count, what", [(2, "train"), (3, "test")])
def test_one_identity_is_nothing_to_learn_from_nor_to_judge_by(images, count, what):
    for folder in sorted(images.iterdir())[count:]:
        shutil.rmtree(folder)
    splits = split(read_table(images), 0.3)
    with pytest.raises(DataError, match=f"there is one identity to {what} on"):
        starter.facts(splits, fingerprints(splits.path))


@pytest.mark.parametrize(
    ("out_dir", "run"),
    [("data/prepared", "runs/prepared"), ("runs/mine/data", "runs/mine"), ("runs/mine", "runs/mine")],
)
def test_which_run_folder_belongs_to_the_lists(out_dir, run):
    assert starter.run_folder(out_dir) == run


# --- What is used and what is not -----------------------------------------------------------------------------------


def test_whatever_is_not_used_is_said_with_its_reason(images, monkeypatch):
    first = images / "0000" / "camera0_00.jpg"
    for name in (
        "loose.jpg",
        ".DS_Store",
        "0001/._camera0_00.jpg",
        "0001/notes.txt",
        "0002/photo.heic",
        "__MACOSX/a/b.jpg",
    ):
        (images / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(first, images / name)
    (images / "empty").mkdir()
    (images / "0003" / "broken.jpg").write_bytes(b"no picture")
    shutil.copy(first, images / "0000" / "zcopy.jpg")
    shutil.copy(images / "0004" / "camera0_00.jpg", images / "0005" / "same.jpg")
    monkeypatch.setattr(layouts, "EXTENSIONS", tuple(e for e in layouts.EXTENSIONS if e != ".heic"))
    table, left = read_source(images)
    table, unfit = clean(table, fingerprints(table.path))
    found = {os.path.relpath(path, images): why for path, why in left + unfit}
    same = "the same file stands under 0004 and 0005"
    assert found == {
        "loose.jpg": "lies in no folder, which would be its identity",
        ".DS_Store": "a file of the system",
        "0001/._camera0_00.jpg": "a file of the system",
        "0001/notes.txt": "not an image (.txt)",
        "0002/photo.heic": ".heic images are read after pip install 'recnb[heic]'",
        "__MACOSX": "a folder of the system",
        "empty": "an empty folder",
        "0003/broken.jpg": "is empty or of no known image format",
        "0000/zcopy.jpg": "a copy of camera0_00.jpg",
        "0004/camera0_00.jpg": same,
        "0005/same.jpg": same,
    }
    shown = used(table, left + unfit, images)
    assert shown.files.tolist()[0] == len(table) == 143 and shown.files.sum() == 143 + len(found)


def test_a_folder_of_photographs_that_need_an_extra(tmp_path, monkeypatch):
    monkeypatch.setattr(layouts, "EXTENSIONS", (".jpg",))
    for name in ("a/1.HEIC", "b/2.heic"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_bytes(b"x")
    with pytest.raises(DataError, match=r"has no folders with images .*; 2 files: .heic images are read after"):
        read_source(tmp_path)


def test_photographs_of_phones_are_read(tmp_path):
    heif = pytest.importorskip("pillow_heif")
    (tmp_path / "a").mkdir()
    heif.from_pillow(Image.new("RGB", (64, 48), (200, 30, 30))).save(tmp_path / "a" / "1.HEIC")
    Image.new("RGB", (64, 48), (30, 200, 30)).save(tmp_path / "a" / "2.avif")
    images = layouts.ImageFolder(str(tmp_path))
    assert [tuple(images.image(i).shape) for i in range(2)] == [(3, 48, 64)] * 2
    assert images.image(0)[0].float().mean() > 150 and images.image(1)[1].float().mean() > 150


def test_tags_mend_labels(images):
    table = read_table(images)
    rows = ["path,action,label", "0000/camera0_00.jpg,exclude,", f"{images}/0001/camera0_00.jpg,relabel,Pear"]
    (images / "tags.csv").write_text("\n".join(rows))
    mended, left = with_tags(table, images / "tags.csv", images_root(images))
    assert left == [(str(images / "0000" / "camera0_00.jpg"), "excluded in tags.csv")]
    assert len(mended) == len(table) - 1
    assert mended.path[mended.label == "Pear"].tolist() == [str(images / "0001" / "camera0_00.jpg")]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ("0000/none.jpg,exclude,", r"tags\.csv line 2: there is no image .*none\.jpg among those that were found"),
        ("0000/camera0_00.jpg,delete,", r"tags\.csv line 2: 'delete' is no action"),
        ("0000/camera0_00.jpg,relabel,", r"tags\.csv line 2: 'relabel' is no action with what it needs"),
        (",exclude,", r"tags\.csv line 2: has no path, no action"),
    ],
)
def test_tags_that_cannot_be_meant(images, row, message):
    (images / "tags.csv").write_text(f"path,action,label\n{row}\n")
    with pytest.raises(DataError, match=message):
        with_tags(read_table(images), images / "tags.csv", images)


def test_groups_by_folder_and_by_time(images):
    exif = Image.Exif()
    details = exif.get_ifd(0x8769)
    (images / "0000" / "session 2").mkdir()
    for second, name in ((0, "a"), (50, "b"), (300, "c")):
        details[0x9003] = f"2024:05:31 10:{second // 60:02d}:{second % 60:02d}"
        Image.effect_noise((40, 40), 90).convert("RGB").save(images / "0000" / "session 2" / f"{name}.jpg", exif=exif)
    table = read_table(images)
    taken = fingerprints(table.path).taken
    folders = with_groups(table, "folder", images, taken)
    assert folders.group.dropna().unique().tolist() == ["0000/session 2"] and folders.group.notna().sum() == 3
    times = with_groups(table, "time", images, taken)
    assert times.path.tolist() == table.path.tolist() and times.group.notna().sum() == 3
    assert (
        times.group.dropna().nunique() == 2
        and times[times.path.str.endswith(("2/a.jpg", "2/b.jpg"))].group.nunique() == 1
    )
    assert with_groups(table, "none", images, taken) is table


def test_options_are_checked():
    assert read_options({"test_share": 0.4, "weights": "a.pth"}) == Options(test_share=0.4, weights="a.pth")
    with pytest.raises(ConfigError, match="options: there is no 'tets_share'; did you mean 'test_share'"):
        read_options({"tets_share": 0.4})
    with pytest.raises(ConfigError, match=r"options\.epochs: 'many' is a str, not int"):
        read_options({"epochs": "many"})
    with pytest.raises(ConfigError, match=r"options\.group_by: 'hour' is not supported; there is folder, none, time"):
        read_options({"group_by": "hour"})


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
        options={"camera_pattern": CAMERA, "test_share": 0.4, "drop_leaks": False},
    )
    written = {
        name: [line.split("\t") for line in (tmp_path / "lists" / f"{name}.txt").read_text().splitlines()]
        for name in ("train", "query", "gallery", "validation")
    }
    assert sum(map(len, written.values())) == len({row[0] for rows in written.values() for row in rows}) == 145
    labels = {name: {row[1] for row in rows} for name, rows in written.items()}
    assert set().union(*labels.values()) == {f"{number:04d}" for number in range(24)}
    assert labels["query"] <= labels["gallery"]
    assert sum(map(len, labels.values())) == 24 + len(labels["query"])  # otherwise nobody stands in two lists
    left = pd.read_csv(tmp_path / "lists" / "left_out.csv")
    assert left.path.tolist() == ["0005/camera1_77.jpg"]
    assert build_loaders(load_config(tmp_path / "lists" / "config.yaml")).query.dataset.cameras is not None
    pairs = pd.read_csv(tmp_path / "lists" / "duplicates.csv", dtype=str)
    assert pairs[["label a", "label b"]].values.tolist() == [["0000", "0020"]]
    outputs = [output for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    assert not [output for output in outputs if output.get("name") == "stderr"]
    words = next(text for text in map(printed, outputs) if text.startswith("recnb run")).split()[1:]
    assert joined(words)[:2] == ["run", "02_train"]
    pairs = [pair.split("=") for pair in joined(words)[3::2]]
    assert parameters_of(find("02_train"), pairs) == {
        "config": str(tmp_path / "lists" / "config.yaml"),
        "run_dir": "runs/lists",
    }


def printed(output: dict) -> str:
    return output.get("text", "") if output.get("name") == "stdout" else ""


@pytest.mark.slow
def test_an_unknown_option_stops_the_notebook(images, tmp_path):
    with pytest.raises(papermill.PapermillExecutionError, match="did you mean 'test_share'"):
        run_notebook("01_prepare", tmp_path / "run", source=str(images), options={"tets_share": 0.4})
