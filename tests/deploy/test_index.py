"""What an index holds and how it decides, on lists and vectors alone: no model is trained here."""

import shutil
from pathlib import Path

import pytest

from recnb import load_config
from recnb.data.images import DataError
from recnb.deploy.index import labelled_images, sentence
from recnb.recipe.data import evaluation_images, training_images
from recnb.registry import ConfigError
from recnb.runs.folder import Run


@pytest.fixture
def run(config_file, tmp_path):
    """A run as far as its lists go."""

    def make(changes=None) -> Run:
        cfg = load_config(config_file(changes))
        lists = evaluation_images(cfg)
        return Run(tmp_path, cfg, lambda: lists, None, None, {}, None)

    return make


def test_an_index_holds_every_labelled_image_once(run):
    made = run()
    known, training = labelled_images(made), training_images(made.cfg)
    assert known.counts == {
        "images": len(training) + len(made.query) + len(made.gallery),
        "identities": 24,
        "lists": {"training": len(training), "query": len(made.query), "gallery": len(made.gallery)},
        "in_several_lists": 0,
    }
    for kind, images in (("training", training), ("query", made.query), ("gallery", made.gallery)):
        assert [known.paths[row] for row in known.rows[kind]] == images.paths
        assert known.names[known.rows[kind]].tolist() == [str(images.names[label]) for label in images.labels]


def test_the_strict_index_holds_the_gallery_alone(run):
    made = run()
    known = labelled_images(made, "test")
    assert [known.paths[row] for row in known.kept] == made.gallery.paths and "training" not in known.rows
    assert known.counts["lists"] == {"gallery": len(made.gallery)}
    with pytest.raises(ConfigError, match="index: there is no index 'tests'; did you mean 'test'"):
        labelled_images(made, "tests")


def test_an_image_of_several_lists_or_spellings_counts_once(run, drawn, tmp_path):
    shutil.copytree(drawn / "images", tmp_path / "images")
    lines = [line.split()[:2] for line in (drawn / "gallery.txt").read_text().splitlines()[:4]]
    (first, label), copy = lines[0], Path(lines[0][0]).with_name("copy.jpg")
    shutil.copy(tmp_path / "images" / first, tmp_path / "images" / copy)
    lines += [[f"./{first}", label], [str(copy), label]]
    (tmp_path / "query.txt").write_text("".join(f"{path} {label}\n" for path, label in lines))
    where = {"image_root": str(tmp_path / "images"), "cls_label_path": str(tmp_path / "query.txt")}
    places = ("Eval.Query", "Eval.Gallery")
    made = run({f"DataLoader.{place}.dataset.{key}": value for place in places for key, value in where.items()})
    known = labelled_images(made)
    assert len(made.query) == 5 and known.counts["lists"]["query"] == 5  # the other spelling is left out of the list
    assert known.counts["images"] == len(training_images(made.cfg)) + 4 and known.counts["in_several_lists"] == 4
    assert len(set(known.rows["query"][[0, 4]])) == 1
    assert "query (5) and gallery (5) lists; 4 of them stand in several lists and count once" in sentence(known.counts)


def test_identities_held_out_for_validation_calibrate_too(run):
    made = run({"DataLoader.Validation": {"share": 0.2}})
    known, plain = labelled_images(made), labelled_images(run())
    held_out = set(known.names[known.rows["validation"]])
    assert len(held_out) == 3 and not held_out & set(known.names[known.rows["training"]])
    assert known.counts["images"] == plain.counts["images"] and not known.trained_on
    assert set(known.asked) == {*known.rows["validation"], *known.rows["query"]}


def test_images_that_training_has_seen_do_not_calibrate(run, drawn, tmp_path):
    """Test identities that were trained on are taken only where there are no others, and their images never."""
    lines = [line.split()[:2] for line in (drawn / "train.txt").read_text().splitlines()]
    seen, fresh = lines[:6], [line.split()[:2] for line in (drawn / "query.txt").read_text().splitlines()]
    cut = [line for line in lines if line not in seen[:3]]
    for name, rows in (("train", cut), ("both", seen + fresh), ("seen", seen)):
        (tmp_path / f"{name}.txt").write_text("".join(f"{path} {label}\n" for path, label in rows))
    changes = {"DataLoader.Train.dataset.cls_label_path": str(tmp_path / "train.txt")}
    places = ("Eval.Query", "Eval.Gallery")
    for name, images, trained_on in (("both", fresh, False), ("seen", seen[:3], True)):
        lists = {f"DataLoader.{place}.dataset.cls_label_path": str(tmp_path / f"{name}.txt") for place in places}
        known = labelled_images(run(changes | lists))
        assert {known.path(row) for row in known.asked} == {path for path, _ in images}
        assert known.trained_on == trained_on


def test_a_missing_training_list_says_what_does_without(run, tmp_path):
    made = run()
    made.cfg["DataLoader"]["Train"]["dataset"]["cls_label_path"] = str(tmp_path / "elsewhere.txt")
    with pytest.raises(DataError, match=r"elsewhere\.txt; index: test leaves the training images out"):
        labelled_images(made)
    assert len(labelled_images(made, "test")) == len(made.query) + len(made.gallery)
