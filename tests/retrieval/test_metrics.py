"""Retrieval metrics against plain loops, an outside implementation, and the cases other kits get wrong."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from processes import in_processes
from sklearn.metrics import average_precision_score

from recnb.retrieval import ranking
from recnb.retrieval.metrics import DEFINITIONS, per_class, ranking_metrics, retrieval_metrics

ORACLE = np.load(Path(__file__).parents[1] / "data" / "oracle_metrics.npz")
TOPK = (1, 2, 5, 30)


def reference_scores(query, gallery, distance):
    """(Q, G) float64, rounded far below any true difference between small integers' scores."""
    q, g = np.asarray(query, np.float64), np.asarray(gallery, np.float64)
    if distance == "hamming":
        q, g = (np.unpackbits(x.astype(np.uint8), axis=1) for x in (query, gallery))
        return -(q[:, None] != g[None]).sum(-1).astype(np.float64)
    if distance == "euclidean":
        return -((q[:, None] - g[None]) ** 2).sum(-1)
    if distance == "cosine":
        q, g = (x / np.maximum(np.linalg.norm(x, axis=1, keepdims=True), 1e-30) for x in (q, g))
    return np.round(q @ g.T, 8)


def ranked_matches(scores, label, labels, camera, cameras, group, groups, own):
    """A query's ranking as a list of bools, best first, ties with the negatives first."""
    kept = []
    for j, score in enumerate(scores):
        same = labels[j] == label
        if j == own or (camera is not None and same and cameras[j] == camera):
            continue
        if group is not None and groups[j] == group:
            continue
        kept.append((-score, same))
    return [same for _, same in sorted(kept)]


def reference_values(matches, topk):
    """Every metric of one query, each from its definition, by walking down the ranking."""
    ranks = [place for place, match in enumerate(matches, 1) if match]
    count = len(ranks)
    precision = {rank: sum(matches[:rank]) / rank for rank in ranks}
    values = {
        "mAP": sum(precision.values()) / count,
        "R-Precision": sum(matches[:count]) / count,
        "mAP@R": sum(p for r, p in precision.items() if r <= count) / count,
        "mINP": count / ranks[-1],
        "MRR": 1 / ranks[0],
    }
    for k in topk:
        found = sum(p for r, p in precision.items() if r <= k)
        ideal = sum(1 / np.log2(1 + place) for place in range(1, min(k, count) + 1))
        values |= {
            f"recall{k}": float(any(matches[:k])),
            f"precision@{k}": sum(matches[:k]) / k,
            f"NDCG@{k}": sum(1 / np.log2(1 + r) for r in ranks if r <= k) / ideal,
            f"mAP@{k}/R": found / count,
            f"mAP@{k}/min(R,k)": found / min(k, count),
        }
    return values


def reference(scores, labels, cameras=(None, None), groups=(None, None), own=None, topk=TOPK):
    collected = []
    for i, row in enumerate(scores):
        camera, group = (None if pair[0] is None else pair[0][i] for pair in (cameras, groups))
        matches = ranked_matches(
            row, labels[0][i], labels[1], camera, cameras[1], group, groups[1], -1 if own is None else own[i]
        )
        if any(matches):
            collected.append(reference_values(matches, topk))
    if not collected:
        return None
    means = {key: float(np.mean([values[key] for values in collected])) for key in collected[0]}
    return means | {"queries": len(scores), "queries_without_positive": len(scores) - len(collected)}


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, items, width = draw(st.integers(1, 9)), draw(st.integers(1, 40)), draw(st.integers(1, 4))
    distance = draw(st.sampled_from(["cosine", "dot", "euclidean", "hamming"]))
    low, high, kind = (0, 256, np.uint8) if distance == "hamming" else (-2, 3, np.float32)
    query, gallery = (rng.integers(low, high, (n, width)).astype(kind) for n in (queries, items))
    query[: items // 3] = gallery[: min(queries, items // 3)]

    def pick(high, wanted=True):
        return tuple(rng.integers(0, high, n) for n in (queries, items)) if wanted else (None, None)

    own = rng.integers(-1, items, queries) if draw(st.booleans()) else None
    return {
        "query": query,
        "gallery": gallery,
        "distance": distance,
        "own": own,
        "labels": pick(draw(st.sampled_from([1, 2, 6]))),
        "cameras": pick(3, draw(st.booleans())),
        "groups": pick(8, draw(st.booleans())),
        "compiled": draw(st.booleans()),
        "memory": draw(st.sampled_from([1, 1 << 14, 1 << 28])),
    }


def counted_as_on_a_gpu(block, tile, offset):
    block._count_in_torch(block.keep_negatives(tile, offset))


def evaluate(problem, **options):
    with pytest.MonkeyPatch.context() as patch:
        if not problem["compiled"]:
            patch.setattr(ranking.Block, "_count_compiled", counted_as_on_a_gpu)
        return retrieval_metrics(
            problem["query"],
            problem["gallery"],
            *problem["labels"],
            *problem["cameras"],
            exclude_self=False if problem["own"] is None else problem["own"],
            query_groups=problem["groups"][0],
            gallery_groups=problem["groups"][1],
            distance=problem["distance"],
            memory=problem["memory"],
            topk=TOPK,
            metrics=tuple(DEFINITIONS),
            **options,
        )


@settings(max_examples=300, deadline=None)
@given(problems())
def test_agrees_with_plain_loops(device, problem):
    scores = reference_scores(problem["query"], problem["gallery"], problem["distance"])
    expected = reference(scores, problem["labels"], problem["cameras"], problem["groups"], problem["own"])
    if expected is None:
        with pytest.raises(ValueError, match="no query has a positive"):
            evaluate(problem, device=device)
    else:
        assert evaluate(problem, device=device) == pytest.approx(expected, abs=1e-12)


@settings(max_examples=60, deadline=None)
@given(problems(), st.integers(0, 1000))
def test_order_of_the_gallery_changes_nothing(problem, seed):
    try:
        before = evaluate(problem)
    except ValueError:
        return
    order = np.random.default_rng(seed).permutation(len(problem["gallery"]))
    place = np.append(np.argsort(order), -1)
    shuffled = problem | {"gallery": problem["gallery"][order]}
    shuffled["own"] = None if problem["own"] is None else place[problem["own"]]
    for name in ("labels", "cameras", "groups"):
        left, right = problem[name]
        shuffled[name] = (left, None if right is None else right[order])
    assert evaluate(shuffled) == before


def clustered(count=300, width=16, classes=30, seed=0, noise=1.5):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, count)
    points = rng.normal(size=(classes, width))[labels] + noise * rng.normal(size=(count, width))
    return points.astype(np.float32), labels


def test_many_positives_agree_with_plain_loops():
    x, labels = clustered(400, classes=6)
    x, cameras = np.round(3 * x), np.random.default_rng(1).integers(0, 4, 400)  # whole numbers: no rounding, real ties
    expected = reference(
        reference_scores(x[:80], x, "dot"), (labels[:80], labels), (cameras[:80], cameras), own=np.arange(80)
    )
    found = retrieval_metrics(
        x[:80],
        x,
        labels[:80],
        labels,
        cameras[:80],
        cameras,
        np.arange(80),
        TOPK,
        metrics=tuple(DEFINITIONS),
        distance="dot",
        tie=0,
    )
    assert found == pytest.approx(expected, abs=1e-12)


def test_agrees_with_sklearn_average_precision():
    x, labels = clustered()
    _, arrays = retrieval_metrics(x[:50], x[50:], labels[:50], labels[50:], per_query=True)
    scores = reference_scores(x[:50], x[50:], "cosine")
    for i in np.flatnonzero(arrays["valid"]):
        assert arrays["AP"][i] == pytest.approx(average_precision_score(labels[50:] == labels[i], scores[i]))


@pytest.mark.parametrize("case", [0, 1])
def test_agrees_with_the_original_where_the_original_is_right(case):
    inputs = [ORACLE[f"metric_{case}_{name}"] for name in ("query", "gallery", "query_labels", "gallery_labels")]
    found = retrieval_metrics(*inputs, topk=(1, 5, 10))
    prefix = f"metric_{case}_value_"
    expected = {name.removeprefix(prefix): float(ORACLE[name]) for name in ORACLE.files if name.startswith(prefix)}
    assert len(expected) == 7
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-6)


def test_self_retrieval_leaves_out_the_query_by_index_even_among_duplicates():
    x = np.array([[1, 0], [1, 0], [0, 1], [0, 1]], np.float32)
    with_duplicates = retrieval_metrics(x, None, [0, 0, 1, 1])
    assert with_duplicates["recall1"] == with_duplicates["mAP"] == with_duplicates["mINP"] == 1
    assert retrieval_metrics(x, x, [0, 0, 1, 1], [0, 0, 1, 1], exclude_self=True) == with_duplicates
    assert retrieval_metrics(x, x, [0, 1, 0, 1], [0, 1, 0, 1], exclude_self=np.arange(4))["recall1"] == 0
    assert retrieval_metrics(x, None, [0, 1, 0, 1])["mINP"] == pytest.approx(1 / 3)


def test_same_identity_and_camera_leaves_the_ranking_rather_than_scoring_zero():
    query, gallery = np.array([[1.0, 0.0]]), np.array([[0.9, 0.1], [-0.5, 0.5], [-1.0, 0.0]])
    found = retrieval_metrics(query, gallery, [7], [7, 7, 8], [0], [0, 1, 1])
    assert found["recall1"] == found["mAP"] == 1


def test_items_of_the_querys_group_leave_the_ranking_whatever_they_show():
    x = np.array([[1, 0], [0.99, 0.1], [0.5, 0.9]], np.float32)
    assert retrieval_metrics(x[:1], x[1:], [0], [1, 0])["recall1"] == 0
    assert retrieval_metrics(x[:1], x[1:], [0], [1, 0], query_groups=["a"], gallery_groups=["a", "b"])["recall1"] == 1


def test_perfect_ranking_gives_one_everywhere():
    centres = np.eye(8, dtype=np.float32)
    x, labels = np.repeat(centres, 4, axis=0), np.repeat(np.arange(8), 4)
    found = retrieval_metrics(x, None, labels, topk=(3,), metrics=tuple(DEFINITIONS))
    assert {key for key, value in found.items() if value != 1} == {"queries", "queries_without_positive"}


def test_one_positive_at_rank_one_has_inverse_penalty_one():
    assert retrieval_metrics([[1.0, 0]], [[1.0, 0], [0, 1.0]], [0], [0, 1])["mINP"] == 1


@pytest.mark.parametrize("kind", [torch.float16, torch.bfloat16, torch.float32])
def test_collapsed_embeddings_get_the_worst_ranking_not_a_lucky_one(kind):
    x = torch.ones(12, 32, dtype=kind) * 0.3
    _, arrays = retrieval_metrics(x, None, torch.arange(12) // 2, per_query=True)
    assert set(arrays["first_hit"]) == {11}


def test_half_precision_is_computed_in_float32():
    x, labels = clustered(200)
    half = torch.tensor(x).half()
    assert retrieval_metrics(half, None, labels) == retrieval_metrics(half.float(), None, labels)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert retrieval_metrics(half, None, labels) == retrieval_metrics(half.float(), None, labels)
    assert torch.get_float32_matmul_precision() == "highest"


def test_labels_may_be_huge_or_strings_but_never_floats():
    x = np.array([[1, 0], [1, 0.01], [0, 1]], np.float32)
    for one, other in ((2**24, 2**24 + 1), (2**62, 2**62 + 1), ("a" * 20 + "b", "a" * 20 + "c")):
        found = retrieval_metrics(x[:1], x[1:], [one], [other, one])
        assert found["recall1"] == 0 and found["mAP"] == 0.5
    unsigned = np.array([2**53, 2**53 + 1], np.uint64)
    assert retrieval_metrics(x[:1], x[1:], np.array([2**53]), unsigned[::-1])["recall1"] == 0
    with pytest.raises(ValueError, match="integers or strings"):
        retrieval_metrics(x[:1], x[1:], [0.0], [0.0, 1.0])
    with pytest.raises(ValueError, match="same kind"):
        retrieval_metrics(x[:1], x[1:], ["0"], [0, 1])


@pytest.mark.parametrize("memory", [1, 1 << 16, 1 << 30])
@pytest.mark.parametrize("compiled", [True, False])
def test_working_memory_and_code_path_change_no_bit(memory, compiled, monkeypatch):
    x, labels = clustered(700, classes=40)
    expected = retrieval_metrics(x, None, labels, distance="euclidean")
    if not compiled:
        monkeypatch.setattr(ranking.Block, "_count_compiled", counted_as_on_a_gpu)
    monkeypatch.setattr(ranking, "CPU_TILE", (64, 100))
    threads = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        assert retrieval_metrics(x, None, labels, distance="euclidean", memory=memory) == expected
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(threads)


def test_queries_without_positives_are_counted_and_left_out():
    x, labels = clustered(100, classes=5)
    alone = np.concatenate([labels, [99, 98]])
    found, arrays = retrieval_metrics(np.concatenate([x, x[:2]]), x, alone, labels, per_query=True)
    assert found["queries"] == 102 and found["queries_without_positive"] == 2
    assert found["mAP"] == pytest.approx(retrieval_metrics(x, x, labels, labels)["mAP"])
    assert not arrays["valid"][100:].any() and not arrays["first_hit"][100:].any() and arrays["valid"][:100].all()
    assert all(np.isfinite(values).all() for values in arrays.values())


def test_per_query_values_have_the_reported_means_and_make_a_table_by_class():
    x, labels = clustered()
    found, arrays = retrieval_metrics(x, None, labels, per_query=True)
    for key in ("recall1", "mAP", "mINP", "precision@5"):
        assert arrays[key][arrays["valid"]].mean() == found[key]
    assert (arrays["AP"] == arrays["mAP"]).all() and arrays["first_hit"].dtype == np.int64
    assert (arrays["positives"] / arrays["hardest_positive"])[0] == arrays["mINP"][0]
    table = per_class(arrays, labels)
    assert table["queries"].sum() == 300 and table["AP"].is_monotonic_increasing
    row = table[table["label"] == labels[3]].iloc[0]
    assert row["AP"] == pytest.approx(arrays["AP"][labels == labels[3]].mean())


def test_ready_scores_give_the_same_as_embeddings():
    x, labels = clustered()
    cameras = np.arange(300) % 3
    expected = retrieval_metrics(x[:90], x, labels[:90], labels, cameras[:90], cameras, np.arange(90))
    scores = reference_scores(x[:90], x, "cosine")
    options = (labels[:90], labels, cameras[:90], cameras, np.arange(90))
    assert ranking_metrics(scores, *options) == expected
    assert ranking_metrics(lambda queries: torch.tensor(scores[queries]), *options, memory=1) == expected
    assert (scores == reference_scores(x[:90], x, "cosine")).all()
    assert ranking_metrics([[0.5, 0.4999]], [0], [0, 1], tie=1e-3)["recall1"] == 0
    assert ranking_metrics(np.array([[1 + 1e-12, 1]]), [0], [0, 1])["recall1"] == 1
    assert ranking_metrics(torch.tensor([[1, 1.001]]).half(), [0], [0, 1])["recall1"] == 0
    with pytest.raises(ValueError, match="finite"):
        ranking_metrics(np.full((1, 2), np.nan), [0], [0, 1])


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"query": np.zeros((0, 3))}, "0 queries"),
        ({"query": np.zeros((3, 0))}, "query is empty"),
        ({"query": np.zeros(3)}, "two-dimensional"),
        ({"query": np.ones((3, 5))}, "5 dimensions but gallery has 4"),
        ({"query": np.array([[1.0] * 4, [1, np.nan, 1, 1], [1] * 4])}, "query row 1 holds NaN"),
        ({"gallery": np.array([[1.0] * 4, [1] * 4, [1, 1, -np.inf, 1]])}, "gallery row 2 holds NaN, infinity"),
        ({"query_labels": [0, 1]}, "3 queries and 3 gallery items, but 2 query labels"),
        ({"query_labels": [[0], [1], [2]]}, "one-dimensional"),
        ({"query_cameras": [0, 0, 0]}, "cameras must be given for both"),
        ({"query_cameras": [0, 0], "gallery_cameras": [0, 0, 0]}, "2 query cameras"),
        ({"gallery_labels": None}, "labels must be given for both"),
        ({"exclude_self": [0, 1, 3]}, "exclude_self must be"),
        ({"query": np.ones((2, 4)), "query_labels": [0, 1], "exclude_self": True}, "query i to be gallery item i"),
        ({"distance": "cosinus"}, "distance must be one of cosine"),
        ({"distance": "hamming"}, "packed bits"),
        ({"metrics": ("mAP", "recall")}, "no metric 'recall'"),
        ({"topk": (0, 1)}, "topk must hold numbers from 1"),
        ({"query": np.full((3, 4), np.nan), "query_labels": [5, 6, 7]}, "no query has a positive"),
    ],
)
def test_bad_input_gets_one_clear_sentence(bad, message):
    good = {
        "query": np.ones((3, 4)),
        "gallery": np.ones((3, 4)),
        "query_labels": [0, 1, 2],
        "gallery_labels": [0, 1, 2],
    }
    retrieval_metrics(**good)
    with pytest.raises(ValueError, match=message):
        retrieval_metrics(**good | bad)


def test_every_definition_stays_between_zero_and_one():
    x, labels = clustered()
    found = retrieval_metrics(x, None, labels, topk=TOPK, metrics=tuple(DEFINITIONS))
    assert len(found) == 5 + 5 * len(TOPK) + 2
    assert all(0 < value <= 1 for key, value in found.items() if "queries" not in key)
    assert all(type(value) is float for value in found.values())
    assert set(retrieval_metrics(x, None, labels, metrics="mAP")) == {"mAP", "queries", "queries_without_positive"}


def megabytes():
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


def streamed(rank, path):
    """The number of queries judged, and by how many megabytes the memory has grown."""
    gallery = np.load(path, mmap_mode="r")
    labels = np.arange(len(gallery)) % 50_000
    retrieval_metrics(np.array(gallery[:9]), np.array(gallery[:50]), labels[:9], labels[:50])
    before = megabytes()
    found = retrieval_metrics(
        gallery[:1000], gallery, labels[:1000], labels, exclude_self=np.arange(1000), memory=32 << 20
    )
    return found["queries"], megabytes() - before


def test_a_memory_mapped_gallery_streams_in_bounded_memory(tmp_path):
    np.save(tmp_path / "gallery.npy", np.random.default_rng(0).normal(size=(100_000, 32)).astype(np.float16))
    ((queries, grown),) = in_processes(1, streamed, tmp_path / "gallery.npy")
    assert queries == 1000
    assert grown < 7 + 80  # the file's own pages, and the working memory; all scores together are 400


def judged(rank):
    x, labels = clustered(200)
    return retrieval_metrics(x, None, labels, per_query=True)


def test_two_processes_share_the_queries_and_get_the_single_process_result():
    found, arrays = judged(0)
    for shared, queries in in_processes(2, judged):
        assert shared["mAP"] == found["mAP"] and shared["recall1"] == found["recall1"]
        assert (queries["AP"] == arrays["AP"]).all()
