"""Neighbours against plain sorting; the index through its whole life, and what it refuses."""

import json
import re
from pathlib import Path

import faiss
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from recnb.retrieval import exchange, search
from recnb.retrieval.scores import spans
from recnb.retrieval.search import Index, auto_factory, knn, merge, plan


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, items, width = draw(st.integers(1, 7)), draw(st.integers(2, 40)), draw(st.integers(1, 3))
    distance = draw(st.sampled_from(["dot", "euclidean", "hamming"]))
    low, high, kind = (0, 4, np.uint8) if distance == "hamming" else (-2, 3, np.float32)
    query, gallery = (rng.integers(low, high, (n, width)).astype(kind) for n in (queries, items))
    exclude = rng.integers(-1, items, queries) if draw(st.booleans()) else None
    return query, gallery, distance, exclude, draw(st.integers(1, 45)), draw(st.sampled_from([1, 1 << 28]))


@settings(max_examples=200, deadline=None)
@given(problems())
def test_knn_is_a_stable_sort(device, problem):
    query, gallery, distance, exclude, k, memory = problem
    q, g = query.astype(float), gallery.astype(float)
    if distance == "hamming":
        q, g = (np.unpackbits(x, axis=1).astype(float) for x in (query, gallery))
    scores = q @ g.T if distance == "dot" else -((q[:, None] - g[None]) ** 2).sum(-1)
    scores = -np.sqrt(-scores) if distance == "euclidean" else scores
    found, ids = knn(query, gallery, k, distance, exclude, memory=memory, device=device)
    assert found.dtype == np.float32 and ids.dtype == np.int64
    assert ids.shape == (len(query), min(k, len(gallery) - (exclude is not None)))
    for i, row in enumerate(scores):
        order = [j for j in np.argsort(-row, kind="stable") if exclude is None or j != exclude[i]]
        assert list(ids[i]) == order[:k][: ids.shape[1]]
        assert found[i] == pytest.approx(row[ids[i]], abs=1e-5)


@pytest.mark.parametrize("distance", ["cosine", "dot", "euclidean"])
def test_every_way_of_searching_gives_the_same_answer(distance):
    rng = np.random.default_rng(0)
    query, gallery = rng.normal(size=(70, 24)).astype(np.float32), rng.normal(size=(900, 24)).astype(np.float32)
    scores, ids = knn(query, gallery, 9, distance)
    index = Index(distance, "Flat").add(gallery)
    shards = [Index(distance).add(gallery[part], np.arange(900)[part]) for part in (slice(0, 300), slice(300, 900))]
    answers = {
        "tensors": knn(torch.tensor(query), torch.tensor(gallery), 9, distance),
        "blocks": knn(query, gallery, 9, distance, memory=1 << 12),
        "index": index.search(query, 9),
        "two shards": merge([shard.search(query, 9) for shard in shards], 9),
    }
    for name, (other_scores, other_ids) in answers.items():
        assert (other_ids == ids).all(), name
        assert other_scores == pytest.approx(scores, abs=1e-4), name
    own = knn(gallery, None, 3, distance)
    assert (own[1] != np.arange(900)[:, None]).all()


def test_faiss_shards_of_saved_indices_answer_as_one(tmp_path):
    rng = np.random.default_rng(0)
    gallery, query = rng.normal(size=(400, 8)).astype(np.float32), rng.normal(size=(20, 8)).astype(np.float32)
    whole = Index("dot").add(gallery).search(query, 5)
    for shard in range(2):
        Index("dot").add(gallery[shard::2], np.arange(400)[shard::2]).save(tmp_path / str(shard))
    together = faiss.IndexShards(8, True, False)
    parts = [faiss.read_index(str(next((tmp_path / str(shard)).glob("*.faiss")))) for shard in range(2)]
    for part in parts:
        together.add_shard(part)
    scores, ids = together.search(query, 5)
    assert (ids == whole[1]).all() and scores == pytest.approx(whole[0], abs=1e-5)


def test_duplicates_come_in_the_order_of_the_gallery_and_never_hide_the_query():
    x = np.ones((40, 3), np.float32)
    assert (knn(x[:2], x, 5)[1] == np.arange(5)).all()
    assert knn(x, None, 39)[1][7].tolist() == [*range(7), *range(8, 40)]


def test_small_euclidean_distances_keep_their_digits():
    x = np.full((2, 512), 10.0, np.float32)
    x[1, 0] += 1e-3
    assert knn(x, None, 1, "euclidean")[0][0, 0] == pytest.approx(-1e-3, rel=1e-2)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: knn(x, x, 0), "k must be at least 1"),
        (lambda x: knn(x[:1], None, 1), "nothing but the query itself"),
        (lambda x: knn(x, x, 1, exclude=[0]), "one row number for each query"),
        (lambda x: knn(x, x[:, :2], 1), "3 dimensions but gallery has 2"),
        (lambda x: knn(x, np.full((2, 3), np.nan), 1), "gallery row 0 holds NaN"),
        (lambda x: Index().search(x), "index is empty"),
        (lambda x: Index("manhattan"), "distance must be one of"),
        (lambda x: Index().add(x).search(x[:, :2]), "vectors of 3 dimensions; got 2"),
        (lambda x: Index().add(x).add(x[:, :2]), "vectors of 3 dimensions; got 2"),
        (lambda x: Index().add(x, ids=[1, 1, 2, 3]), "4 different integers"),
        (lambda x: Index().add(x, ids=["a", "b", "c", "d"]), "4 different integers"),
        (lambda x: Index().add(x, ids=[1, 2, 3, 4]).add(x, ids=[4, 5, 6, 7]), "id 4 is in the index already"),
        (lambda x: Index().add(x, path=["a"]), "column path has 1 values for 4"),
        (lambda x: Index().add(x, path=list("abcd")).add(x), "has the columns"),
        (lambda x: Index().add(x).remove([9]), "1 of the ids to remove"),
        (lambda x: Index().add(x).item(9), "no id 9"),
        (lambda x: Index(model="a").add(x, model="b"), "model a, not of b"),
        (lambda x: Index(model="a").add(x).search(x, model="b"), "model a, not of b"),
        (lambda x: Index().save("unused"), "nothing to save"),
    ],
)
def test_bad_input_gets_one_clear_sentence(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        call(np.eye(4, 3, dtype=np.float32) + 1)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "distance, factory",
    [
        ("cosine", "Flat"),
        ("dot", "HNSW16"),
        ("euclidean", "IVF4,Flat"),
        ("hamming", "BFlat"),
        ("hamming", "BIVF4"),
        ("hamming", "BHNSW16"),
    ],
)
def test_an_index_through_its_life(distance, factory, tmp_path, capfd):
    rng = np.random.default_rng(0)
    bits = distance == "hamming"
    x = rng.integers(0, 256, (300, 16), dtype=np.uint8) if bits else rng.normal(size=(300, 16)).astype(np.float32)
    names = [f"image{i}.png" for i in range(300)]
    index = Index(distance, factory, model="abc", info={"flip": True}, effort=64)
    index.add(x[:200], np.arange(200) * 10, path=names[:200], label=np.arange(200) % 7)
    printed = capfd.readouterr().out
    assert ("nearest neighbours" in printed) == (index.recall is not None) == (factory not in ("Flat", "BFlat"))
    assert index.recall is None or index.recall > 0.9
    index.add(x[200:], path=names[200:], label=np.arange(200, 300) % 7)
    assert index.ids[200] == 1991 and len(index) == 300
    index.remove([0, 10, 1991])
    assert len(index) == 297
    kept = np.setdiff1d(np.arange(300), [0, 1, 200])
    place = dict(zip(index.ids, kept, strict=True))
    index.save(tmp_path / "index")
    loaded = Index.load(tmp_path / "index", dimension=16, model="abc")
    assert len(loaded) == 297 and loaded.info == {"flip": True} and loaded.recall == index.recall
    exact = knn(x[kept], x[kept], 3, distance)
    for one in (index, loaded):
        scores, ids = one.search(x[kept], 3, model="abc")
        assert (ids[:, 0] == index.ids[exact[1][:, 0]]).mean() > 0.95
        assert scores == pytest.approx(exact[0], abs=1e-3) or factory not in ("Flat", "BFlat")
        assert one.item(ids[5, 0]) == {"path": names[place[ids[5, 0]]], "label": place[ids[5, 0]] % 7}
        assert not {0, 10, 1991} & set(one.search(x[:3], 50)[1].ravel())


def test_loading_for_another_dimension_or_model_is_an_error(tmp_path):
    Index(model="abc").add(np.eye(3, dtype=np.float32)).save(tmp_path)
    with pytest.raises(ValueError, match="3 dimensions, not 4"):
        Index.load(tmp_path, dimension=4)
    with pytest.raises(ValueError, match="model abc, not of xyz"):
        Index.load(tmp_path, model="xyz")


def test_missing_neighbours_are_minus_one():
    scores, ids = Index("euclidean").add(np.eye(3, dtype=np.float32)).search(np.eye(3, dtype=np.float32)[:1], 5)
    assert ids.tolist() == [[0, 1, 2, -1, -1]] and np.isneginf(scores[0, 3:]).all()


def test_an_interrupted_save_leaves_the_old_index(tmp_path, monkeypatch):
    Index().add(np.eye(3, dtype=np.float32)).save(tmp_path)
    new = Index().add(np.eye(5, dtype=np.float32))
    with monkeypatch.context() as patch, pytest.raises(OSError, match="disk is full"):
        patch.setattr(exchange.json, "dumps", lambda *_: (_ for _ in ()).throw(OSError("disk is full")))
        new.save(tmp_path)
    assert len(Index.load(tmp_path)) == 3
    new.save(tmp_path)
    assert len(Index.load(tmp_path)) == 5
    assert sorted(path.suffix for path in tmp_path.iterdir()) == [".faiss", ".json"]


def test_a_save_removes_only_what_a_save_has_made(tmp_path):
    (tmp_path / "vectors-mine.faiss").write_text("mine")
    (tmp_path / ".draft").write_text("left by a process that was killed")
    for size in (3, 5):
        Index().add(np.eye(size, dtype=np.float32)).save(tmp_path)
    assert (tmp_path / "vectors-mine.faiss").read_text() == "mine" and not (tmp_path / ".draft").exists()
    assert len(list(tmp_path.iterdir())) == 3 and len(Index.load(tmp_path)) == 5


def test_a_damaged_file_is_noticed(tmp_path):
    Index().add(np.eye(3, dtype=np.float32)).save(tmp_path)
    file = next(tmp_path.glob("*.faiss"))
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(ValueError, match="missing or damaged"):
        Index.load(tmp_path)
    assert json.loads((tmp_path / "index.json").read_text())["distance"] == "cosine"


def test_the_kind_of_index_follows_the_size():
    assert auto_factory(999_999, 128) == "Flat"
    assert auto_factory(1_000_000, 128) == "IVF4000,Flat"
    assert auto_factory(10_000_000, 128) == "OPQ64_128,IVF65536_HNSW32,PQ64x4fsr"
    assert auto_factory(100_000_000, 512) == "OPQ64_256,IVF262144_HNSW32,PQ64x4fsr"
    assert auto_factory(10_000_000, 16, "hamming") == "BFlat"
    for dimension in (1, 7, 16, 100):
        faiss.index_factory(dimension, re.sub(r"IVF\d+", "IVF4", auto_factory(1 << 40, dimension)))


def test_the_plan_grows_with_the_vectors_and_codes_take_less_than_vectors():
    rows = [plan(10**power, 128) for power in range(4, 10)]
    assert rows[0] == {"factory": "Flat", "GB": 0.0052, "MB read": 5.12, "ms": 0.512}
    assert plan(10**9, 128)["GB"] == pytest.approx(40.7, abs=0.1)
    assert plan(10**7, 128)["GB"] < plan(10**7 - 1, 128)["GB"] / 10
    assert rows[-1]["ms"] < rows[2]["ms"] * 10


def test_the_table_in_the_docs_is_the_plan():
    page = (Path(__file__).parents[2] / "docs/searching.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| ([\d,]+) \| `(.*)` \| (.*) \| (.*) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) == 5
    for count, *row in rows:
        found = plan(int(count.replace(",", "")), 128)
        assert row == [found["factory"], f"{found['GB']:.3g}", f"{found['MB read']:.3g}", f"{found['ms']:.2g}"]


def test_what_was_measured_is_as_large_as_planned():
    file = Path(__file__).parents[2] / "docs/benchmarks/vectors-2-cores-x86_64.json"
    rows = [row for row in json.loads(file.read_text()) if row["factory"] == row["plan"]["factory"]]
    assert [row["count"] for row in rows] == [1_000_000, 10_000_000]
    for row in rows:
        assert plan(row["count"], row["width"])["GB"] == pytest.approx(row["GB on disk"], rel=0.01)


LISTS_OF_CODES = "IVF16_HNSW32,PQ12x4fsr"


@pytest.mark.parametrize(
    "distance, factory",
    [
        ("cosine", "Flat"),
        ("dot", "HNSW16"),
        ("euclidean", "IVF4,Flat"),
        ("cosine", LISTS_OF_CODES),
        ("hamming", "BIVF4"),
    ],
)
def test_an_index_goes_to_parquet_and_comes_back(distance, factory, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    monkeypatch.setattr(search, "spans", lambda count, _: spans(count, 100))  # three parts, and the last is short
    rng = np.random.default_rng(0)
    x = rng.normal(size=(250, 24)).astype(np.float32)
    x = rng.integers(0, 256, (250, 24), dtype=np.uint8) if distance == "hamming" else x
    names = [f"{i}.png" for i in range(250)]
    index = Index(distance, factory, model="abc").add(x, np.arange(250) * 10, path=names, label=np.arange(250) % 7)
    index.remove([20]).to_parquet(tmp_path / "all.parquet")
    back = Index.from_parquet(tmp_path, distance=distance)
    assert back.model == "abc" and back.ids.tolist() == index.ids.tolist() and back.columns == index.columns
    found, exact = back.search(x, 5), Index(distance).add(x, np.arange(250) * 10).remove([20]).search(x, 5)
    if factory == LISTS_OF_CODES:
        assert (found[1][:, 0] == exact[1][:, 0]).mean() > 0.9
    else:
        assert (found[1] == exact[1]).mean() > 0.999 and np.allclose(found[0], exact[0], atol=1e-5)
    index.remove([30])  # the index itself works as before
    with pytest.raises(ValueError, match="no vectors to write"):
        Index().to_parquet(tmp_path / "none.parquet")


def test_lists_of_codes_find_their_centres_by_a_graph():
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    for index, visited in (
        (Index(factory="IVF32_HNSW32,PQ8x4fsr"), 8),
        (Index(factory="IVF32_HNSW32,PQ8x4fsr", effort=12), 12),
    ):
        lists = faiss.extract_index_ivf(index.add(x).faiss)
        assert lists.nprobe == visited and faiss.downcast_index(lists.quantizer).hnsw.efSearch == 2 * visited


def test_centres_are_found_in_two_steps_also_among_copies():
    x = np.random.default_rng(0).normal(size=(2000, 16)).astype(np.float32)
    crowded = np.concatenate([np.ones((1900, 16), np.float32), x[:100]])
    for vectors in (x, crowded):
        once = faiss.Kmeans(16, 64, min_points_per_centroid=1)
        once.train(vectors)
        centres = search.centres_of(vectors, 64, spherical=False)
        assert centres.shape == (64, 16) and np.isfinite(centres).all()
        found, expected = (-knn(vectors, each, 1, "euclidean")[0].mean() for each in (centres, once.centroids))
        assert found < 1.15 * expected + 0.2  # a few of the hundred that are no copies get no centre of their own
    assert np.linalg.norm(search.centres_of(x, 64, spherical=True), axis=1) == pytest.approx(np.ones(64), abs=1e-5)
    index = Index("cosine", "OPQ4_16,IVF64_HNSW16,PQ4x4fsr").add(crowded)
    assert len(index) == 2000 and index.search(x[:5], 3)[1].shape == (5, 3)


def handed_over(folder) -> tuple[np.ndarray, Path]:
    """Vectors of 300 things, ten of each, and the Parquet file that an index of them writes."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(300, 32))[np.arange(3000) % 300] + 0.7 * rng.normal(size=(3000, 32))
    x, path = x.astype(np.float32), [f"{i}.png" for i in range(3000)]
    Index().add(x, np.arange(3000) * 2, path=path).to_parquet(folder / "all.parquet")
    return x, folder / "all.parquet"


def recall(x: np.ndarray, found: list[list[int]]) -> float:
    """The share of the ten nearest of the first vectors that an engine has found."""
    exact = knn(x[: len(found)], x, 10)[1] * 2
    return np.mean([len({*ids} & {*row}) / 10 for ids, row in zip(found, exact.tolist(), strict=True)])


def test_lancedb_takes_the_vectors_over(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    lancedb = pytest.importorskip("lancedb", reason="the extra lance is not installed")
    from lancedb.index import IvfPq
    from pyarrow import dataset

    x, file = handed_over(tmp_path)
    parts = dataset.dataset(file).to_batches()
    table = lancedb.connect(tmp_path / "lance").create_table("photos", parts)
    config = IvfPq(distance_type="cosine", num_partitions=8, num_sub_vectors=16)
    table.create_index("vector", config=config)

    def search(vector):
        query = table.search(vector).distance_type("cosine").nprobes(8).refine_factor(10).limit(10)
        return query.to_arrow()["id"].to_pylist()

    assert recall(x, [search(vector) for vector in x[:50]]) >= 0.95
    table.delete("id = 0")
    assert table.count_rows() == 2999 and 0 not in search(x[0])


def test_milvus_takes_the_vectors_over(tmp_path):
    pytest.importorskip("pyarrow", reason="the extra parquet is not installed")
    pytest.importorskip("milvus_lite", reason="the extra milvus is not installed")
    from pyarrow import dataset
    from pymilvus import DataType, MilvusClient

    x, file = handed_over(tmp_path)
    schema = MilvusClient.create_schema()
    schema.add_field("id", DataType.INT64, is_primary=True)
    schema.add_field("path", DataType.VARCHAR, max_length=4096)
    schema.add_field("vector", DataType.FLOAT_VECTOR, dim=32)
    client = MilvusClient(str(tmp_path / "photos.db"))
    index = client.prepare_index_params()
    index.add_index("vector", index_type="AUTOINDEX", metric_type="COSINE")
    client.create_collection("photos", schema=schema, index_params=index)
    rows = [batch.to_pylist() for batch in dataset.dataset(file).to_batches(batch_size=1000)]
    for batch in rows:
        client.insert("photos", batch)

    def search(vectors):
        return [[hit["id"] for hit in hits] for hits in client.search("photos", data=vectors.tolist(), limit=10)]

    assert recall(x, search(x[:50])) >= 0.95
    client.delete("photos", ids=[0])
    assert 0 not in search(x[:1])[0]
    client.close()
    for package in ("minio", "azure"):
        pytest.importorskip(package, reason="what pymilvus writes files to import with is not installed")
    from pymilvus.bulk_writer import BulkFileType, LocalBulkWriter

    writer = LocalBulkWriter(schema, str(tmp_path / "bulk"), file_type=BulkFileType.PARQUET)
    for row in (row for batch in rows for row in batch):
        writer.append_row(row)  # which checks it against the schema
    writer.commit()
    theirs = dataset.dataset(writer.batch_files[0]).to_table()
    assert theirs.num_rows == 3000 and theirs.column_names == dataset.dataset(file).schema.names
