"""Run folders: what cannot be true is refused, and what was moved opens where it is now."""

import copy
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import yaml

from recnb import storage
from recnb.data.lists import ImageList
from recnb.gallery.pictures import read_picture
from recnb.recipe.reading import as_yaml
from recnb.recipe.resolved import check_same, resolved
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.experiment import train
from recnb.runs.folder import kept_rows, load_run
from recnb.runs.results import save_rows

QUERIES, GALLERY = 18, 36  # of the drawn set


def written(run, config, query=None, gallery=None, metrics='{"mAP": 0.5}', history="epoch,mAP\n1,0.5\n"):
    """A finished run, made by hand."""
    (run / "embeddings").mkdir(parents=True)
    (run / "config.yaml").write_text(config)
    (run / "metrics.json").write_text(metrics)
    (run / "history.csv").write_text(history)
    rng = np.random.default_rng(0)
    for name, rows, values in (("query", QUERIES, query), ("gallery", GALLERY, gallery)):
        drawn = rng.normal(size=(rows, 4)).astype(np.float32)
        np.save(run / "embeddings" / f"{name}.npy", drawn if values is None else values)
    return run


NAN = np.zeros((QUERIES, 4), np.float32)
NAN[7, 1] = np.nan


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"query": NAN}, "embeddings/query.npy is damaged: row 7 is not finite"),
        ({"query": np.zeros(5, np.float32)}, r"query.npy is damaged: it holds float32 \(5,\), not floats"),
        ({"gallery": np.zeros((36, 4), int)}, r"gallery.npy is damaged: it holds int64 \(36, 4\), not floats"),
        ({"gallery": np.zeros((36, 4, 1), np.float32)}, r"it holds float32 \(36, 4, 1\), not floats"),
        ({"gallery": np.zeros((36, 4), complex)}, r"it holds complex128 \(36, 4\), not floats"),
        ({"gallery": np.zeros((36, 5), np.float32)}, "are of two runs, with 4 and 5 dimensions"),
        ({"metrics": "[1]"}, "metrics.json is damaged: it is not a mapping"),
        ({"metrics": '{"mAP": "high"}'}, "metrics.json is damaged: mAP is 'high', not a finite number"),
        ({"metrics": '{"mAP": NaN}'}, "metrics.json is damaged: mAP is nan"),
        ({"history": "mAP\n1\n"}, "history.csv is damaged: it has no column of epochs"),
        ({"history": "epoch\n"}, "history.csv is damaged: it has no column of epochs"),
    ],
)
def test_what_cannot_be_true_is_refused_when_a_run_is_opened(config_file, tmp_path, changes, message):
    run = written(tmp_path / "run", config_file().read_text(), **changes)
    with pytest.raises(ConfigError, match=message):
        load_run(run)


@pytest.fixture
def project(drawn, tmp_path, monkeypatch, config_file):
    """A project folder with the drawn images in it, and a run over them as it is written there."""
    shutil.copytree(drawn, tmp_path / "project" / "data")
    monkeypatch.setattr(storage, "ROOT", tmp_path / "project")
    config = config_file().read_text().replace(str(drawn), str(tmp_path / "project" / "data"))
    (tmp_path / "config.yaml").write_text(config)
    written(tmp_path / "project" / "runs" / "a", as_yaml(resolved(load_config(tmp_path / "config.yaml"))))
    return tmp_path / "project"


def test_a_run_of_a_moved_project_opens_where_it_is_now(project, monkeypatch):
    config = yaml.safe_load((project / "runs" / "a" / "config.yaml").read_text())
    assert config["DataLoader"]["Train"]["dataset"]["image_root"] == "data/images"
    assert str(project) not in (project / "runs" / "a" / "config.yaml").read_text()
    moved = project.rename(project.with_name("elsewhere"))
    monkeypatch.setattr(storage, "ROOT", Path("/nowhere"))
    run = load_run(moved / "runs" / "a")
    assert run.query.paths[0].startswith(str(moved)) and len(run.gallery) == GALLERY
    assert run.content("query")[0][0] == run.query.paths[0].removeprefix(f"{moved}/data/images/")


def test_no_file_of_a_run_tells_where_its_project_lies(project):
    train(load_config(project.parent / "config.yaml"), project / "runs" / "b")
    files = [path for path in (project / "runs" / "b").rglob("*") if path.is_file()]
    assert {"config.yaml", "latest.pt", "query.csv", "queries.csv"} <= {path.name for path in files}
    assert [path.name for path in files if str(project).encode() in path.read_bytes()] == []


def test_a_moved_project_resumes_the_same_configuration(project):
    ours = load_config(project / "runs" / "a" / "config.yaml")
    theirs = json.loads(json.dumps(resolved(ours)).replace("data/", f"{project}/data/"))  # as older checkpoints say it
    check_same(ours, theirs, Path("latest.pt"))
    theirs["DataLoader"]["Train"]["dataset"]["image_root"] = str(project / "other")
    with pytest.raises(ConfigError, match="image_root: other -> data/images"):
        check_same(ours, theirs, Path("latest.pt"))


def test_what_an_older_checkpoint_leaves_out_had_its_default(config_file):
    sections = {"AMP": {"level": "O2"}, "Retention": {"pull": 0.1}, "DataLoader.Validation": {"share": 0.4}}
    ours = resolved(load_config(config_file(sections)))
    theirs = copy.deepcopy(ours) | {"AMP": {"level": "O2"}, "Retention": {"pull": 0.1}}
    del theirs["DataLoader"]["Validation"]["seed"]
    check_same(ours, theirs, Path("latest.pt"))


def test_a_run_without_its_lists_and_images_opens_until_a_picture_is_asked_for(project):
    run = load_run(project / "runs" / "a")
    save_rows(run.folder, {"query": run.query, "gallery": run.gallery})
    content, ranked = [run.content(part) for part in ("query", "gallery")], run.rank(5)
    shutil.rmtree(project / "data")
    alone = load_run(run.folder)
    assert [alone.content(part) for part in ("query", "gallery")] == content
    assert (alone.rank(5).ids == ranked.ids).all() and np.allclose(alone.rank(5).AP, ranked.AP)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        read_picture(alone.query.pictures[0], 20)


def test_rows_are_kept_as_they_are(tmp_path):
    def images(part, labels, **more):
        return ImageList([f"/there/{part}/{i}.jpg" for i in range(len(labels))], np.array(labels), names=names, **more)

    names = np.array(["NA", "Crème, double", "=1+1"])
    boxes = {"boxes": np.arange(12).reshape(3, 4)}
    lists = {"query": images("q", [0, 1, 2], **boxes), "gallery": images("g", [2, 2], cameras=np.array([4, 5]))}
    assert kept_rows(tmp_path) is None
    save_rows(tmp_path, lists)
    for before, after in zip(lists.values(), kept_rows(tmp_path), strict=True):
        assert after.paths == before.paths
        assert [after.name(x) for x in after.labels] == [before.name(x) for x in before.labels]
        for field in ("cameras", "boxes"):
            assert np.array_equal(getattr(after, field), getattr(before, field))
