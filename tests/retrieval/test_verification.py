"""Verification rates against an outside implementation, and the intervals against theory."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.metrics import roc_auc_score, roc_curve

from recnb.retrieval.stats import bootstrap_interval, paired_difference
from recnb.retrieval.verification import pair_metrics, verification_metrics

FPR = (0.3, 1e-1, 1e-2)


def expected_rates(scores, same):
    fpr, tpr, _ = roc_curve(same, scores, drop_intermediate=False)
    result = {f"TPR@FPR={limit:g}": tpr[fpr <= limit].max() for limit in FPR}
    return result | {"ROC-AUC": roc_auc_score(same, scores)}


@st.composite
def problems(draw):
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    queries, items = draw(st.integers(1, 12)), draw(st.integers(2, 40))
    distance = draw(st.sampled_from(["dot", "euclidean", "hamming"]))
    low, high, kind = (0, 256, np.uint8) if distance == "hamming" else (-3, 4, np.float32)
    query, gallery = (rng.integers(low, high, (n, 3)).astype(kind) for n in (queries, items))
    labels, cameras = (tuple(rng.integers(0, top, n) for n in (queries, items)) for top in (3, 3))
    return query, gallery, labels, cameras, distance, draw(st.sampled_from([1, 1 << 28]))


@settings(max_examples=100, deadline=None)
@given(problems())
def test_agrees_with_sklearn_over_all_pairs_that_count(device, problem):
    query, gallery, labels, cameras, distance, memory = problem
    if distance == "hamming":
        bits = [np.unpackbits(x, axis=1) for x in (query, gallery)]
        scores = -(bits[0][:, None] != bits[1][None]).sum(-1)
    else:
        scores = query @ gallery.T if distance == "dot" else -((query[:, None] - gallery[None]) ** 2).sum(-1)
    same = labels[0][:, None] == labels[1][None]
    counted = ~(same & (cameras[0][:, None] == cameras[1][None]))
    options = {"fpr": FPR, "distance": distance, "memory": memory, "device": device}
    if not (same & counted).any() or not (~same).any():
        with pytest.raises(ValueError, match="positive"):
            verification_metrics(query, gallery, *labels, *cameras, **options)
        return
    found = verification_metrics(query, gallery, *labels, *cameras, **options)
    expected = expected_rates(scores[counted].astype(float), same[counted])
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-12)
    assert (found["positive_pairs"], found["negative_pairs"]) == ((same & counted).sum(), (~same).sum())


def test_self_pairs_do_not_count_and_cosines_agree_with_sklearn():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 10, 200)
    x = rng.normal(size=(10, 8))[labels] + rng.normal(size=(200, 8))
    found = verification_metrics(x, None, labels, fpr=FPR)
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = ~np.eye(200, dtype=bool)
    expected = expected_rates((unit @ unit.T)[pairs], (labels[:, None] == labels)[pairs])
    assert {key: found[key] for key in expected} == pytest.approx(expected, abs=1e-3)
    assert found["ROC-AUC"] == pytest.approx(expected["ROC-AUC"], abs=1e-6)
    assert found["positive_pairs"] + found["negative_pairs"] == 200 * 199


def test_orientation():
    scores, same = [0.9, 0.8, 0.2, 0.1], [True, True, False, False]
    right, wrong = pair_metrics(scores, same), pair_metrics(scores, np.logical_not(same))
    assert right["TPR@FPR=0.001"] == right["ROC-AUC"] == 1 and right["EER"] == 0
    assert wrong["TPR@FPR=0.001"] == wrong["ROC-AUC"] == 0 and wrong["EER"] == 1
    assert 0.2 < right["threshold@FPR=0.001"] <= 0.8 and wrong["threshold@FPR=0.001"] > 0.9


def test_thresholds_give_the_rates_they_are_named_for():
    rng = np.random.default_rng(0)
    same = rng.random(5000) < 0.3
    scores = rng.normal(size=5000) + same
    found = pair_metrics(scores, same)
    for limit in (1e-2, 1e-3):
        accepted = scores >= found[f"threshold@FPR={limit:g}"]
        assert accepted[~same].mean() <= limit and accepted[same].mean() == found[f"TPR@FPR={limit:g}"]
    accepted = scores >= found["threshold@EER"]
    assert accepted[~same].mean() == pytest.approx(found["EER"], abs=2e-3)
    assert 1 - accepted[same].mean() == pytest.approx(found["EER"], abs=2e-3)
    vectors = rng.normal(size=(60, 4)), rng.integers(0, 4, 60)
    found = verification_metrics(vectors[0], None, vectors[1], distance="euclidean")
    apart = np.linalg.norm(vectors[0][:, None] - vectors[0][None], axis=2)
    positive = (vectors[1][:, None] == vectors[1]) & ~np.eye(60, dtype=bool)
    assert (-apart >= found["threshold@FPR=0.01"])[positive].mean() == pytest.approx(found["TPR@FPR=0.01"], abs=1e-2)


def test_equal_scores_are_chance_and_a_missing_kind_is_an_error():
    found = pair_metrics([0.5] * 10, [True, False] * 5)
    assert found["ROC-AUC"] == found["EER"] == 0.5 and found["TPR@FPR=0.01"] == 0
    with pytest.raises(ValueError, match="0 negative pairs"):
        pair_metrics([0.5, 0.4], [True, True])
    with pytest.raises(ValueError, match="one finite score"):
        pair_metrics([0.5, np.nan], [True, False])


def test_bootstrap_interval_is_the_normal_one_for_many_queries_and_is_seeded():
    values = np.random.default_rng(0).random(2000)
    found = bootstrap_interval(values, samples=10_000)
    error = values.std() / 2000**0.5
    assert found["low"] == pytest.approx(values.mean() - 1.96 * error, abs=0.08 * error)
    assert found["high"] == pytest.approx(values.mean() + 1.96 * error, abs=0.08 * error)
    assert bootstrap_interval(values) == bootstrap_interval(values) != bootstrap_interval(values, seed=1)


def test_queries_that_repeat_each_other_are_worth_one():
    values = np.random.default_rng(0).random(200)
    width = lambda found: found["high"] - found["low"]  # noqa: E731
    repeated, clusters = np.repeat(values, 9), np.repeat(np.arange(200), 9)
    assert width(bootstrap_interval(repeated, clusters)) == pytest.approx(width(bootstrap_interval(values)), rel=0.1)
    assert width(bootstrap_interval(repeated)) < 0.5 * width(bootstrap_interval(values))


def test_paired_difference_agrees_with_all_sign_changes():
    change = np.array([0.3, 0.1, -0.05, 0.2, 0.4, -0.1, 0.25, 0.15])
    signs = np.array(np.meshgrid(*[[-1, 1]] * 8)).reshape(8, -1).T
    exact = (np.abs(signs @ change) >= change.sum() - 1e-12).mean()
    found = paired_difference(np.zeros(8), change, samples=20_000)
    assert found["difference"] == pytest.approx(change.mean())
    assert found["p_value"] == pytest.approx(exact, abs=3 * (exact / 20_000) ** 0.5)
    assert found["low"] < found["difference"] < found["high"]


def test_intervals_of_clusters_are_those_of_a_plain_loop():
    rng = np.random.default_rng(1)
    clusters = rng.integers(0, 12, 100)
    values = rng.normal(size=12)[clusters] + rng.normal(size=100)
    groups = [values[clusters == c] for c in range(12)]
    means = [np.concatenate([groups[c] for c in rng.integers(0, 12, 12)]).mean() for _ in range(4000)]
    found = bootstrap_interval(values, [f"identity {c}" for c in clusters], confidence=0.9, samples=4000)
    assert (found["low"], found["high"]) == pytest.approx(np.quantile(means, [0.05, 0.95]), abs=0.03)
    assert found["mean"] == pytest.approx(values.mean())


def test_one_identity_shows_nothing():
    found = paired_difference([0.1, 0.2, 0.3], [0.8, 0.9, 0.9], clusters=[7, 7, 7])
    assert found["difference"] == pytest.approx(2 / 3) and found["p_value"] == 1
    assert np.isnan([found["low"], found["high"]]).all()


def test_a_small_steady_gain_is_seen_although_the_two_intervals_overlap():
    rng = np.random.default_rng(0)
    first = rng.random(1000)
    second = first + 0.01 + 0.02 * rng.normal(size=1000)
    assert bootstrap_interval(second)["low"] < bootstrap_interval(first)["high"]
    assert paired_difference(first, second)["p_value"] < 0.01
    assert paired_difference(first, first) == {"difference": 0, "low": 0, "high": 0, "p_value": 1}
    clusters = np.arange(1000) // 10
    found, swapped = paired_difference(first, second, clusters), paired_difference(second, first, clusters)
    assert 0 < found["low"] < found["difference"] < found["high"]
    assert (found["low"], found["high"]) == pytest.approx((-swapped["high"], -swapped["low"]))
    with pytest.raises(ValueError, match="same queries"):
        paired_difference(first, second[1:])
    with pytest.raises(ValueError, match="finite"):
        bootstrap_interval([])
