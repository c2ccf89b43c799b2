"""`recnb embed`: shards that are whole or absent, whatever ends it and however many processes there are."""

import csv
import shutil

import numpy as np
import pytest

from recnb.cli import shards
from recnb.cli.main import main
from recnb.registry import ConfigError
from recnb.retrieval.exchange import read_parquet
from recnb.retrieval.search import Index

pytest.importorskip("pyarrow", reason="the extra parquet is not installed")


@pytest.fixture
def embed(config_file, drawn, tmp_path):
    """Write the shards of a list of 14 images, one of them damaged, into a folder, and return the folder."""
    config = config_file({"Arch.Head.class_num": 15})
    rows = [line.split() for line in (drawn / "query.txt").read_text().splitlines()[:14]]
    for name, *_ in rows:
        (tmp_path / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(drawn / "images" / name, tmp_path / "images" / name)
    (tmp_path / "images" / rows[6][0]).write_bytes(b"no image")
    (tmp_path / "images" / "list.txt").write_text("".join(f"{row[0]} {row[1]}\n" for row in rows))

    def run(out: str, size: int = 5):
        shards.embed_list(config, tmp_path / "images/list.txt", tmp_path / out, tmp_path / "images", size)
        return tmp_path / out

    return run


def contents(folder):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_what_was_killed_goes_on_and_any_number_of_processes_write_the_same(embed, monkeypatch):
    whole = embed("whole")
    assert sorted(contents(whole)) == [
        "000000000000-000000000005.parquet",
        "000000000005-000000000010.parquet",
        "000000000010-000000000015.parquet",
        "left_out.csv",
    ]
    index = Index.from_parquet(whole)
    assert index.ids.tolist() == [i for i in range(14) if i != 6] and index.dimension == 16
    assert [*index.columns] == ["path", "label"] and all(isinstance(label, str) for label in index.columns["label"])
    (left,) = csv.DictReader((whole / "left_out.csv").open())
    assert left["line"] == "7" and left["reason"] == "is empty or of no known image format"

    written = shards.write

    def killed(file, start, *rest):
        if start:
            (file.parent / f".{file.name}.1.part").write_bytes(b"half of one")
            raise KeyboardInterrupt
        written(file, start, *rest)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(shards, "write", killed)
        embed("killed")
    assert len(contents(whole.parent / "killed")) == 2  # the first shard, and half of the second
    assert contents(embed("killed")) == contents(whole)

    monkeypatch.setenv("WORLD_SIZE", "2")
    for rank in "01":
        monkeypatch.setenv("RANK", rank)
        embed("two")
        assert (whole.parent / "two/left_out.csv").exists() == (rank == "1")
    assert contents(whole.parent / "two") == contents(whole)


def test_shards_of_another_size_list_or_model_are_refused(embed, config_file, tmp_path):
    folder = embed("out")
    with pytest.raises(ConfigError, match=r"000000000000-000000000005.parquet: is no shard of .* by 7 lines"):
        embed("out", 7)
    config_file({"Arch.Head.class_num": 15, "Global.seed": 1})
    with pytest.raises(ConfigError, match="is of another model or list"):
        embed("out")
    assert Index.from_parquet(folder).model


def test_a_shard_without_a_readable_image_is_not_fatal(embed, tmp_path):
    embed("first")
    for line in (tmp_path / "images/list.txt").read_text().splitlines()[10:]:
        (tmp_path / "images" / line.split()[0]).unlink()
    assert Index.from_parquet(embed("second")).ids.tolist() == [0, 1, 2, 3, 4, 5, 7, 8, 9]


def test_a_run_gives_the_vectors_that_it_was_judged_by(trained_run, drawn, tmp_path, capsys):
    words = [trained_run, drawn / "gallery.txt", "--out", tmp_path / "out", "--root", drawn / "images", "--shard", 20]
    assert main(["embed", *map(str, words)]) == 0
    assert "0 images are left out" in capsys.readouterr().out
    _, vectors, columns, _ = read_parquet(tmp_path / "out")
    assert np.allclose(vectors, np.load(trained_run / "embeddings/gallery.npy"), atol=1e-5)
    assert columns["label"][0] == (drawn / "gallery.txt").read_text().split()[1]


def test_the_command_names_what_is_not_there(tmp_path, capsys):
    assert main(["embed", str(tmp_path / "no.yaml"), str(tmp_path), "--out", str(tmp_path)]) == 2
    assert "no.yaml: there is no such file" in capsys.readouterr().err
