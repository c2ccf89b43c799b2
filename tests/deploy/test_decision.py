"""From the nearest images to a name or to unknown: numbers, curves and rates against plain loops, on vectors alone."""

import numpy as np
import pytest

from recnb.deploy import decision
from recnb.deploy.decision import Items, Judged, Searches, choose, evidence, fitted, judged, probability, searches
from recnb.registry import ConfigError


def clusters(identities=12, each=6, spread=0.35, seed=0) -> tuple[np.ndarray, Items]:
    """Vectors around a centre for each identity, and what is known of them."""
    rng = np.random.default_rng(seed)
    names = np.repeat(np.arange(identities), each)
    vectors = rng.normal(size=(identities, 8))[names] + spread * rng.normal(size=(len(names), 8)) * 3
    return vectors.astype(np.float32), Items(names, np.arange(len(names)), np.full(len(names), -1))


@pytest.fixture(scope="module")
def found():
    vectors, items = clusters()
    return searches(vectors, vectors, items, items, "cosine"), items.identity


def test_evidence_is_what_loops_say():
    rng = np.random.default_rng(1)
    scores = -np.sort(-rng.normal(size=(40, 12)), 1)
    scores[::4, 6:] = -np.inf
    names = np.where(np.isfinite(scores), rng.integers(0, 3, scores.shape), -1)
    names[5] = 1  # nobody else is near
    mates = rng.normal(size=scores.shape)
    first, numbers = evidence(Searches(scores, names, mates))
    for q in range(len(scores)):
        hits = [hit for hit in zip(scores[q], names[q], mates[q], strict=True) if np.isfinite(hit[0])]
        best, wanted, _ = hits[0]
        others = [score for score, name, _ in hits if name != wanted]
        near = [mate for _, name, mate in hits if name == wanted][: decision.NEAR]
        assert first[q] == wanted
        assert numbers[q] == pytest.approx([best, best - max(others, default=hits[-1][0]), best - np.mean(near)])


def test_a_search_finds_neither_itself_nor_copies_nor_its_own_camera():
    vectors, items = clusters(identities=4, each=4)
    content, cameras = items.content.copy(), np.tile([0, 0, 1, -1], 4)
    content[5] = content[4]  # the same picture under another name
    items = Items(items.identity, content, cameras)
    known, unknown, has = searches(vectors, vectors, items, items, "cosine")
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    for q in range(16):
        same = items.identity == items.identity[q]
        hidden = (content == content[q]) | (same & (cameras == cameras[q]) & (cameras >= 0))
        for result, seen in ((known, ~hidden), (unknown, ~same)):
            order = np.flatnonzero(seen)[np.argsort(-(unit @ unit[q])[seen], kind="stable")]
            ended = ~np.isfinite(result.scores[q])
            assert result.identities[q][~ended].tolist() == items.identity[order].tolist()
            assert result.scores[q][~ended] == pytest.approx((unit @ unit[q])[order], abs=1e-6)
            assert (result.identities[q][ended] == -1).all()
        assert has[q] == (same & ~hidden).any()


def test_a_picture_is_no_mate_of_what_it_finds():
    vectors, items = clusters(identities=5, each=4)
    keep = np.flatnonzero((items.identity != 4) | (np.arange(20) < 17))  # the last identity has one image
    vectors, items = vectors[keep], items[keep]
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    alike = unit @ unit.T

    def mate(i: int, without: int | None = None) -> float:
        others = [alike[i, j] for j in np.flatnonzero(items.identity == items.identity[i]) if j not in (i, without)]
        return max(others, default=np.nan)

    usual = np.nanmean([mate(i) for i in range(len(keep))])
    for result in searches(vectors, vectors, items, items, "cosine")[:2]:
        for q in range(len(keep)):
            for score, name, found in zip(result.scores[q], result.identities[q], result.mates[q], strict=True):
                if name >= 0:
                    hit = int(np.abs(alike[q] - score).argmin())
                    wanted = mate(hit, q)
                    assert found == pytest.approx(usual if np.isnan(wanted) else wanted, abs=1e-5)


def test_identities_that_attract_strangers_need_more():
    """Training images lie close together; a stranger near them is as similar to them as a friend is to the others."""
    rng = np.random.default_rng(4)
    identity = np.repeat(np.arange(40), 6)
    tight = rng.random(len(identity)) < 0.5
    own, strange = rng.normal(0.7, 0.02, len(identity)), rng.normal(np.where(tight, 0.7, 0.5), 0.02)

    def made(scores, names, mates):
        return Searches(
            np.stack([scores, scores - 0.1], 1), np.stack([names, names + 100], 1), np.stack([mates] * 2, 1)
        )

    known = made(own, identity, np.full(len(identity), 0.7))
    unknown = made(strange, identity + 200, np.where(tight, 0.9, 0.7))
    point = choose((known, unknown, np.ones(len(identity), bool)), identity, {})
    assert point["probability"]["local"] > 0 and point["points"]["chosen"]["false_accept_rate"]["share"] < 0.05


def test_probabilities_are_shares_of_right_names():
    rng = np.random.default_rng(2)
    numbers = rng.normal(size=(4000, 3))
    right = rng.random(4000) < 1 / (1 + np.exp(-(3 * numbers[:, 0] + numbers[:, 1] - 1)))
    curve = fitted(numbers, right, np.arange(4000) < 2000)
    assert [curve[name] for name in (*decision.NUMBERS, "bias")] == pytest.approx([3, 1, 0, -1], abs=0.4)
    sure = probability(numbers, curve)
    for low in (0.0, 0.25, 0.5, 0.75):
        inside = (sure >= low) & (sure < low + 0.25)
        assert right[inside].mean() == pytest.approx(sure[inside].mean(), abs=0.05)


def test_no_curve_falls_and_few_searches_are_not_certain():
    numbers = np.array([[0.1], [0.2], [0.8], [0.9]]) * np.ones(3)
    upside_down = fitted(numbers, np.array([True, True, False, False]), np.array([True, True, False, False]))
    assert upside_down["score"] == 0
    curve = fitted(numbers, np.array([False, False, True, True]), np.array([False, False, True, True]))
    assert 0.6 < probability(numbers, curve)[-1] < 0.95


def test_rates_are_counted_and_thresholds_keep_them(found):
    given = judged(*found)
    for name, rate in (("false_accept_rate", 0.1), ("false_accept_rate", 0.0), ("unknown_rate", 0.2)):
        threshold = given.threshold(name, rate)
        values = given.unknown if name == "false_accept_rate" else given.known
        share = np.mean([(v >= threshold) == (name == "false_accept_rate") for v in values])
        assert share <= rate and given.point(threshold)[name]["share"] == pytest.approx(share)
        stricter = given.thresholds[given.thresholds < threshold] if name == "false_accept_rate" else []
        assert all(np.mean(given.unknown >= other) > rate for other in stricter)
    accuracies = [
        (np.mean((given.known >= t) & given.right) + np.mean(given.unknown < t)) / 2 for t in given.thresholds
    ]
    best = given.threshold()
    assert max(accuracies) == pytest.approx(
        (np.mean((given.known >= best) & given.right) + np.mean(given.unknown < best)) / 2
    )
    assert given.shares(given.thresholds)["balanced_accuracy"] == pytest.approx(accuracies)


def test_intervals_are_wilsons():
    assert [decision.share(np.arange(10) < 5)[key] for key in ("low", "high")] == pytest.approx(
        [0.2366, 0.7634], abs=1e-4
    )
    assert decision.share(np.zeros(312, bool))["high"] == pytest.approx(0.0122, abs=1e-4)


def test_each_identity_is_judged_by_a_curve_of_others(found, monkeypatch):
    fits = []

    def watched(numbers, right, known):
        fits.append(len(numbers))
        return fitted(numbers, right, known)

    monkeypatch.setattr(decision, "fitted", watched)
    given = judged(*found)
    assert isinstance(given, Judged) and len(fits) == decision.FOLDS + 1
    assert all(size < fits[-1] for size in fits[:-1]) and fits[-1] == len(given.known) + len(given.unknown)


def test_the_lead_over_the_next_identity_counts_where_likeness_says_nothing():
    rng = np.random.default_rng(3)
    identity = np.repeat(np.arange(30), 8)
    base = rng.uniform(0.3, 0.9, len(identity))

    def made(margin, shift):
        scores = np.stack([base, base - margin, base - 0.5], 1)
        return Searches(scores, identity[:, None] + shift + np.array([0, 100, 200]), np.zeros(scores.shape))

    margins = rng.normal([[0.2], [0.05]], 0.03, (2, len(identity)))
    point = choose((made(margins[0], 0), made(margins[1], 300), np.ones(len(identity), bool)), identity, {})
    assert point["probability"]["margin"] > 10 > point["probability"]["score"]
    assert point["points"]["chosen"]["false_accept_rate"]["share"] < 0.1 and set(point) == {
        "probability",
        "wanted",
        "threshold",
        "points",
        "curve",
    }


def test_what_cannot_be_measured_is_refused(found):
    with pytest.raises(
        ConfigError, match=r"unknown_rate: 0.001 cannot be measured on the 72 searches .* at least 0.01"
    ):
        decision.check_wanted({"unknown_rate": 0.001}, 72)
    for value in (0, 1, "much", True, float("nan")):
        with pytest.raises(ConfigError, match=r"false_accept_rate: .* cannot be measured"):
            decision.check_wanted({"false_accept_rate": value}, 1000)
    vectors, items = clusters(identities=1)
    with pytest.raises(ConfigError, match="label images of at least two identities"):
        choose(searches(vectors, vectors, items, items, "cosine"), items.identity, {})
    vectors, items = clusters(each=1)
    with pytest.raises(ConfigError, match="two of one of them"):
        choose(searches(vectors, vectors, items, items, "cosine"), items.identity, {})
