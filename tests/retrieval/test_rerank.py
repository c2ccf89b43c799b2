"""Re-ranking against plain loops in float64 and the original's own output; averaging and whitening against theirs."""

import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from processes import in_processes
from sklearn.decomposition import PCA

from recnb.retrieval.metrics import ranking_metrics, retrieval_metrics
from recnb.retrieval.rerank import (
    KReciprocal,
    alpha_query_expansion,
    database_augmentation,
    fit_whitening,
    k_reciprocal,
)

ORACLE = np.load(Path(__file__).parents[1] / "data" / "oracle_metrics.npz")


def unit(x):
    return x / np.linalg.norm(x, axis=1, keepdims=True)


def plain_k_reciprocal(query, gallery, k1, k2, lambda_value, distance):
    """The paper's algorithm as it is written, with sets and dense matrices."""
    x = np.concatenate([query, gallery]).astype(np.float64)
    if distance == "cosine":
        x = unit(x)
    apart = ((x[:, None] - x[None]) ** 2).sum(-1)
    apart = apart / apart.max(1, keepdims=True)
    order = np.argsort(apart, axis=1, kind="stable")

    def mutual(i, k):
        return {int(j) for j in order[i, : k + 1] if i in order[j, : k + 1]}

    weights = np.zeros_like(apart)
    for i in range(len(x)):
        members = near = mutual(i, k1)
        for j in near:
            further = mutual(j, int(np.around(k1 / 2)))
            if len(further & near) > 2 / 3 * len(further):
                members = members | further
        members = sorted(members)
        weights[i, members] = np.exp(-apart[i, members]) / np.exp(-apart[i, members]).sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(len(x))])
    n = len(query)
    shared = np.minimum(weights[:n, None], weights[None, n:]).sum(-1)
    either = np.maximum(weights[:n, None], weights[None, n:]).sum(-1)
    return (1 - lambda_value) * (1 - shared / either) + lambda_value * apart[:n, n:]


def crowd(queries, items, width=6, classes=8, seed=0):
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, classes, queries + items)
    x = (rng.normal(size=(classes, width))[labels] + 0.7 * rng.normal(size=(queries + items, width))).astype(np.float32)
    return x[:queries], x[queries:], labels[:queries], labels[queries:]


@pytest.mark.parametrize("k1, k2, lambda_value", [(20, 6, 0.3), (7, 1, 0.0), (5, 3, 1.0), (3, 2, 0.5), (60, 6, 0.3)])
@pytest.mark.parametrize("distance", ["cosine", "euclidean"])
def test_agrees_with_plain_loops(k1, k2, lambda_value, distance, device):
    for seed in range(3):
        query, gallery, *_ = crowd(15, 40, seed=seed)
        expected = plain_k_reciprocal(query, gallery, k1, k2, lambda_value, distance)
        for memory in (1, 1 << 28):
            options = {"distance": distance, "memory": memory, "device": device}
            found = k_reciprocal(query, gallery, k1, k2, lambda_value, **options)
            assert found.dtype == np.float32 and found == pytest.approx(expected, abs=2e-5)


def test_agrees_with_the_original():
    found = k_reciprocal(ORACLE["metric_1_query"], ORACLE["metric_1_gallery"])
    assert found == pytest.approx(ORACLE["rerank_distance"], abs=2e-3)  # the original works in float16


def test_without_a_gallery_the_queries_are_counted_once():
    x = crowd(60, 1)[0]
    found = k_reciprocal(x, None, 10, 3)
    assert found.shape == (60, 60) and (found.diagonal() < 1e-5).all()
    twice = k_reciprocal(x[:20], x[20:], 10, 3)  # the same sixty images: the same neighbours, the same distances
    assert found[:20, 20:] == pytest.approx(twice, abs=1e-6)


def test_ranks_better_than_the_distance_and_needs_no_matrix():
    query, gallery, query_labels, gallery_labels = crowd(60, 300)
    lazy = KReciprocal(torch.tensor(query), torch.tensor(gallery))
    found = ranking_metrics(lazy, query_labels, gallery_labels)
    assert found == ranking_metrics(-k_reciprocal(query, gallery), query_labels, gallery_labels)
    assert found["mAP"] > retrieval_metrics(query, gallery, query_labels, gallery_labels)["mAP"] + 0.02


def test_identical_images_give_finite_distances():
    assert np.isfinite(k_reciprocal(np.ones((3, 4)), np.ones((9, 4)))).all()


@pytest.mark.parametrize(
    "bad, message",
    [
        ({"k1": 0}, "k1 and k2 must be at least 1"),
        ({"lambda_value": 1.5}, "lambda_value in 0..1"),
        ({"distance": "dot"}, "cosine or euclidean"),
        ({"gallery": np.ones((2, 3))}, "4 dimensions but gallery has 3"),
        ({"query": np.ones((1, 4)), "gallery": None}, "at least two images"),
    ],
)
def test_bad_input_gets_one_clear_sentence(bad, message):
    with pytest.raises(ValueError, match=message):
        k_reciprocal(**{"query": np.ones((2, 4)), "gallery": np.ones((2, 4))} | bad)


def grown(rank):
    """By how many megabytes memory grows with 5000 images."""
    rng = np.random.default_rng(0)
    x = (rng.normal(size=(1000, 64))[np.arange(5000) % 1000] + rng.normal(size=(5000, 64))).astype(np.float32)
    KReciprocal(x[:100]).distances(np.arange(3))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    found = KReciprocal(x, memory=32 << 20)
    for start in range(0, 5000, 500):
        found.distances(np.arange(start, start + 500))
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024


def test_memory_grows_with_the_images_not_with_their_pairs():
    assert in_processes(1, grown)[0] < 80  # a float32 matrix of all pairs would be 95, and the dense way has five


def plain_expansion(query, gallery, k, alpha):
    query, gallery = unit(query.astype(float)), unit(gallery.astype(float))
    result = []
    for q in query:
        cosines = gallery @ q
        best = np.argsort(-cosines)[:k]
        result.append(q + sum(max(cosines[j], 0) ** alpha * gallery[j] for j in best if cosines[j] > 0))
    return unit(np.array(result))


@pytest.mark.parametrize("k, alpha", [(1, 0), (5, 3), (100, 1.5)])
def test_query_expansion_and_database_augmentation_agree_with_plain_loops(k, alpha, device):
    query, gallery, *_ = crowd(20, 50)
    assert alpha_query_expansion(query, gallery, k, alpha, device=device) == pytest.approx(
        plain_expansion(query, gallery, k, alpha), abs=1e-5
    )
    expected = [plain_expansion(gallery[i : i + 1], np.delete(gallery, i, 0), k, alpha)[0] for i in range(50)]
    assert database_augmentation(gallery, k, alpha, device=device) == pytest.approx(np.array(expected), abs=1e-5)


def test_whitening_is_pca_up_to_sign_and_decorrelates():
    train = np.random.default_rng(0).normal(size=(500, 12)) @ np.random.default_rng(1).normal(size=(12, 12)) + 5
    for whiten in (True, False):
        ours = fit_whitening(train, 5, whiten)(train[:50], memory=1 << 10)
        theirs = unit(PCA(5, whiten=whiten, svd_solver="full").fit(train).transform(train[:50]))
        assert np.abs(ours) == pytest.approx(np.abs(theirs), abs=1e-3)
    fitted = fit_whitening(train)
    values = (train - fitted.mean) @ fitted.projection
    assert np.cov(values.T) == pytest.approx(np.eye(12), abs=1e-2)
    with pytest.raises(ValueError, match="ask for fewer"):
        fit_whitening(train[:4], 12)
    with pytest.raises(ValueError, match="fitted on 12 dimensions; got 3"):
        fitted(train[:, :3])
