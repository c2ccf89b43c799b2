"""Which identity, how sure, and from where on? From the nearest images of a search to a name or to "unknown".

Three numbers speak for the best identity of a search: how alike it is, how much more than the next one, and how much
more than its own images are among themselves, since those that training has seen lie close together and attract what is
unknown. A `Rule` says which of them count. A logistic curve makes of them the probability that the name is right, where
known and unknown images are equally frequent (Platt, 1999). A name is given from a threshold of that probability on.
What becomes of whole searches there is measured as in open-set identification (Phillips, Grother and Micheals, Handbook
of Face Recognition, 2011): of images whose identity is in the index, each without itself, and of the same images with
their identity taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest

from recnb.registry import ConfigError
from recnb.retrieval.scores import MEMORY, pair, spans
from recnb.retrieval.stats import paired_difference

MOST = 2000  # images of an identity say how alike these are
HITS = 50  # of a search's nearest images, these decide
FOLDS = 5
SHOWN = (0.01, 0.001)  # false-accept rates that are always shown
POINTS = 200  # of the curve, at most


@dataclass(frozen=True)
class Rule:
    """How a search names: an identity is as alike as its `images` nearest are on average.

    `margin`: how far the next identity stays behind counts; `typical`: how alike its own images are counts.
    """

    images: int = 1
    margin: bool = False
    typical: bool = False

    @property
    def counted(self) -> list[bool]:
        """Which of NUMBERS count."""
        return [True, self.margin, self.typical]


NUMBERS = ("score", "margin", "typical")
RULES = (Rule(), Rule(1, True), Rule(1, True, True), Rule(2, True, True))


@dataclass(frozen=True)
class Items:
    """What is known of N images: integers each; two of the same `content` are the same picture, -1 is no camera."""

    identity: np.ndarray
    content: np.ndarray
    camera: np.ndarray

    def __getitem__(self, rows: np.ndarray) -> Items:
        return Items(self.identity[rows], self.content[rows], self.camera[rows])

    def tensors(self, rows: slice) -> tuple[torch.Tensor, ...]:
        """The three as tensors, for some rows."""
        return tuple(torch.as_tensor(values[rows]) for values in (self.identity, self.content, self.camera))


@dataclass(frozen=True)
class Searches:
    """What Q searches found, best first, (Q, K) each; scores are -infinity and identities -1 where a list has ended.

    `typical` is how alike the images of the hit's identity are among themselves.
    """

    scores: np.ndarray
    identities: np.ndarray
    typical: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> Searches:
        return Searches(self.scores[rows], self.identities[rows], self.typical[rows])


# ---- one search ------------------------------------------------------------------------------------------------------


def evidence(found: Searches, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    """Return the identity (Q,) that each search would name, and the NUMBERS (Q, 3) that speak for it.

    An identity with too few images among the hits has the lowest score of all in the place of the others.
    """
    parts = [_evidence(found[rows], rule) for rows in spans(len(found.scores), 1024)]
    first, numbers = zip(*parts, strict=True)
    return np.concatenate(first), np.concatenate(numbers)


def _evidence(found: Searches, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
    ended, identities = ~np.isfinite(found.scores), found.identities
    lowest = np.where(ended, np.inf, found.scores).min(1, keepdims=True)
    gain = np.where(ended, 0, found.scores - lowest)  # (Q, K)
    same = identities[:, :, None] == identities[:, None, :]  # (Q, K, K)
    counted = gain * (np.tril(same, -1).sum(2) < rule.images)
    alike = lowest + (same * counted[:, None, :]).sum(2) / rule.images
    place, rows = alike.argmax(1), np.arange(len(alike))
    first, best = identities[rows, place], alike[rows, place]
    following = np.where(identities == first[:, None], -np.inf, alike).max(1)
    margin = best - np.where(np.isfinite(following), following, lowest[:, 0])
    return first, np.stack([best, margin, best - found.typical[rows, place]], 1)


def probability(numbers: np.ndarray, curve: Mapping[str, float]) -> np.ndarray:
    """Return the probability (Q,) of a right name from the NUMBERS (Q, 3), by a curve that weighs them."""
    at = numbers @ np.array([curve[name] for name in NUMBERS]) + curve["bias"]
    return np.clip(expit(at), 1e-6, 1 - 1e-6)


# ---- how alike the images of an identity are -------------------------------------------------------------------------


def mates(vectors: np.ndarray, identity: np.ndarray, distance: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return how alike each image and the most similar other one of its identity are.

    Args:
        vectors: (N, D) float32.
        identity: (N,) integers.
        distance: how vectors are compared, "cosine" or "dot".

    Returns:
        (N,) the similarity, (N,) the row of that mate, -1 for none, and (N,) the similarity of the next one; nan for
        none.
    """
    if distance == "cosine":
        vectors = vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-12)
    best, second, mate = np.full(len(vectors), np.nan), np.full(len(vectors), np.nan), np.full(len(vectors), -1)
    order = np.argsort(identity, kind="stable")
    for group in np.split(order, np.flatnonzero(np.diff(identity[order])) + 1):
        rows = group[:MOST]
        scores = vectors[rows] @ vectors[rows].T
        np.fill_diagonal(scores, -np.inf)
        if len(rows) > 1:
            mate[rows], best[rows] = rows[scores.argmax(1)], scores.max(1)
        if len(rows) > 2:
            second[rows] = np.partition(scores, -2, axis=1)[:, -2]
    return best, mate, second


def typical(alike: np.ndarray, identity: np.ndarray, count: int) -> np.ndarray:
    """Return the mean (C,) over each identity's images of how alike they and their mates are.

    Args:
        alike: (N,) as `mates` gives it.
        identity: (N,) integers below C.
        count: C. An identity without mates has the mean of the others.
    """
    known = np.isfinite(alike)
    sums, counts = (np.bincount(identity[known], w, count) for w in (alike[known], None))
    whole = float(alike[known].mean()) if known.any() else 0.0
    return np.where(counts > 0, sums / np.maximum(counts, 1), whole)


def typical_without(vectors: np.ndarray, items: Items, queries: Items, distance: str) -> tuple[np.ndarray, np.ndarray]:
    """Return how alike the images of each identity (C,) are, and those of each query's own without the query (Q,).

    A picture to be recognised is no part of the index; so it must be no part of what is typical of its identity.

    Args:
        vectors: (N, D) of the index.
        items: what is known of these.
        queries: what is known of the Q queries.
        distance: how vectors are compared.
    """
    best, mate, second = mates(vectors, items.identity, distance)
    count = int(max(items.identity.max(), queries.identity.max())) + 1
    table, own = typical(best, items.identity, count), np.empty(len(queries.identity))
    rows_of = {name: np.flatnonzero(items.identity == name) for name in np.unique(queries.identity)}
    for q, (name, content) in enumerate(zip(queries.identity, queries.content, strict=True)):
        rows = rows_of[name]
        others = rows[items.content[rows] != content]
        hidden = np.isin(mate[others], rows[items.content[rows] == content])
        left = np.where(hidden, second[others], best[others])
        own[q] = left[np.isfinite(left)].mean() if np.isfinite(left).any() else np.nan
    return table, np.where(np.isfinite(own), own, typical(best, np.zeros_like(items.identity), 1)[0])


# ---- the searches of a calibration -----------------------------------------------------------------------------------


def searches(
    asked: np.ndarray, index: np.ndarray, queries: Items, items: Items, distance: str
) -> tuple[Searches, Searches, np.ndarray]:
    """Search with each query twice: as somebody known and, its identity taken out of the index, as somebody unknown.

    Known, it finds neither itself nor what shows its identity by its own camera.

    Args:
        asked: (Q, D) the queries' vectors.
        index: (N, D) those of the index.
        queries: what is known of the queries, Q of them.
        items: the same of the N items.
        distance: how vectors are compared, "cosine" or "dot".

    Returns:
        The searches as known and as unknown, and (Q,) whether there is anything of its identity to find.
    """
    known, unknown, has = zip(*_searched(asked, index, queries, items, distance), strict=True)
    table, own = typical_without(index, items, queries, distance)
    (scores, names), others = joined(known), joined(unknown)
    alike = np.where(names == queries.identity[:, None], own[:, None], table[names])
    return Searches(scores, names, alike), Searches(*others, table[others[1]]), np.concatenate(has)


def joined(parts: Sequence[tuple[np.ndarray, np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Return blocks of (scores, identities) as one."""
    scores, identities = zip(*parts, strict=True)
    return np.concatenate(scores), np.concatenate(identities)


def _searched(asked: np.ndarray, index: np.ndarray, queries: Items, items: Items, distance: str) -> Iterator[tuple]:
    """Yield block by block the (scores, identities) found as known, as unknown, and whether there is a right one.

    The arguments are those of `searches`.
    """
    query, gallery = pair(asked, index, distance)
    theirs = items.tensors(slice(None))
    for rows in spans(len(query), max(1, MEMORY // (32 * len(gallery)))):
        scores = query.queries(rows) @ gallery.gallery(slice(None)).T
        identity, itself, camera = (
            own[:, None] == other for own, other in zip(queries.tensors(rows), theirs, strict=True)
        )
        hidden = itself | (identity & camera & (theirs[2] >= 0))
        found = []
        for mask in (hidden, identity | itself):
            top = scores.masked_fill(mask, -torch.inf).topk(min(HITS, len(gallery)), dim=1)
            names = theirs[0][top.indices].masked_fill(top.values.isinf(), -1)
            found.append((top.values.numpy(), names.numpy()))
        yield (*found, (identity & ~hidden).any(1).numpy())


# ---- the choice ------------------------------------------------------------------------------------------------------


def fitted(numbers: np.ndarray, right: np.ndarray, known: np.ndarray, rule: Rule = RULES[-1]) -> dict[str, float]:
    """Return the logistic curve of the numbers of searches that named rightly or not.

    Known and unknown searches weigh the same together, however many there are. No weight is negative: what is more
    alike is never less sure. The goals are Platt's, a little off 0 and 1, so that few searches give no certainty.

    Args:
        numbers: (n, 3) the NUMBERS of n searches.
        right: (n,) whether the name is right.
        known: (n,) whether the identity is in the index.
        rule: which numbers count; the others weigh nothing.
    """
    goal = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    weight = np.where(known, 1 / max(1, known.sum()), 1 / max(1, (~known).sum()))
    centre, spread = numbers.mean(0), np.where(rule.counted, numbers.std(0) + 1e-9, np.inf)
    scaled = np.c_[(numbers - centre) / spread, np.ones(len(numbers))]

    def loss(curve: np.ndarray) -> float:
        at = scaled @ curve
        return float((weight * (np.logaddexp(0, at) - goal * at)).sum())

    bounds = [(0, None)] * len(NUMBERS) + [(None, None)]
    found = minimize(loss, np.zeros(scaled.shape[1]), method="L-BFGS-B", bounds=bounds).x
    slopes = found[:-1] / spread
    return {**dict(zip(NUMBERS, slopes.tolist(), strict=True)), "bias": float(found[-1] - slopes @ centre)}


@dataclass(frozen=True)
class Judged:
    """What a rule says of the same Q images, known (K of them, with something to find) and unknown.

    The probabilities are those of curves that were fitted without the identity in question.
    """

    known: np.ndarray  # (K,) probabilities
    right: np.ndarray  # (K,) whether the name was right
    unknown: np.ndarray  # (Q,) probabilities
    has: np.ndarray  # (Q,) which of the images are among the K
    curve: dict[str, float]  # of all

    @property
    def thresholds(self) -> np.ndarray:
        """Probabilities to accept from: one between any two neighbours, and one above them all."""
        levels = np.unique(np.concatenate([self.known, self.unknown]))
        return np.concatenate([[0.0], (levels[1:] + levels[:-1]) / 2, [(levels[-1] + 1) / 2]])

    def shares(self, thresholds: np.ndarray) -> dict[str, np.ndarray]:
        """The share of searches that end in each way, at each threshold."""

        def accepted(values: np.ndarray) -> np.ndarray:
            return 1 - np.searchsorted(np.sort(values), thresholds) / max(1, len(values))

        right = accepted(self.known[self.right]) * self.right.mean()
        return {
            "known_right": right,
            "unknown_rate": 1 - accepted(self.known),
            "false_accept_rate": accepted(self.unknown),
            "balanced_accuracy": (right + 1 - accepted(self.unknown)) / 2,
        }

    def threshold(self, name: str = "balanced_accuracy", rate: float = 1.0) -> float:
        """The threshold of the best balanced accuracy, or the most useful one within a rate."""
        edges = self.thresholds
        shares = self.shares(edges)
        if name == "balanced_accuracy":
            return float(edges[shares[name].argmax()])
        within = np.flatnonzero(shares[name] <= rate)
        return float(edges[within[0] if name == "false_accept_rate" else within[-1]])

    def point(self, threshold: float) -> dict:
        """What becomes of the searches at a threshold: shares with their 95 % intervals (Wilson, 1927)."""
        accepted = self.known >= threshold
        return {
            "threshold": threshold,
            "known_right": share(accepted & self.right),
            "known_wrong": share(accepted & ~self.right),
            "unknown_rate": share(~accepted),
            "false_accept_rate": share(self.unknown >= threshold),
        }

    def correct(self, threshold: float) -> np.ndarray:
        """(Q,) how well each image fares at a threshold, between 0 and 1; the mean is about the balanced accuracy."""
        known = np.zeros(len(self.has))
        known[self.has] = (self.known >= threshold) & self.right
        return np.where(self.has, (known + (self.unknown < threshold)) / 2, self.unknown < threshold)


def share(which: np.ndarray) -> dict[str, float]:
    """Return how many of some searches, as a share with its 95 % Wilson interval."""
    count, of = int(which.sum()), len(which)
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {"share": count / of, "low": float(interval.low), "high": float(interval.high), "count": count, "of": of}


def judged(rule: Rule, found: tuple[Searches, Searches, np.ndarray], identity: np.ndarray) -> Judged:
    """Return what a rule says of searches of known and unknown, each by a curve fitted on other identities.

    Args:
        rule: what makes numbers of a search.
        found: as `searches` gives it.
        identity: (Q,) the queries' identities.
    """
    known, unknown, has = found
    (first, numbers), (_, others) = evidence(known, rule), evidence(unknown, rule)
    first, numbers = first[has], numbers[has]
    right, asked = first == identity[has], np.concatenate([identity[has], identity])
    both, answers = np.concatenate([numbers, others]), np.concatenate([right, np.zeros(len(others), bool)])
    kind = np.arange(len(both)) < len(numbers)
    names = np.random.default_rng(0).permutation(np.unique(identity))
    given = np.empty(len(both))
    for fold in range(min(FOLDS, len(names))):
        inside = np.isin(asked, names[fold :: min(FOLDS, len(names))])
        outside = ~inside if len(names) > 1 else inside
        given[inside] = probability(both[inside], fitted(both[outside], answers[outside], kind[outside], rule))
    return Judged(given[kind], right, given[~kind], has, fitted(both, answers, kind, rule))


def choose(found: tuple[Searches, Searches, np.ndarray], identity: np.ndarray, wanted: Mapping[str, float]) -> dict:
    """Return the content of operating_point.json: the rule, its curve, the threshold, and what each point comes to.

    The nearest single image decides unless another rule is better by an amount that these images can show: the 95 %
    interval of the difference, over identities, lies above 0. The rates are of the images that chose the threshold, so
    they are a little too good; the curves at least are those of other identities.

    Args:
        found: as `searches` gives it.
        identity: (Q,) the queries' identities.
        wanted: {"false_accept_rate": x}, {"unknown_rate": x}, or nothing for the best balanced accuracy.

    Raises:
        ConfigError: There is no search of a known identity, or of an unknown one.
    """
    check_searches(found)
    rows = []
    for rule in RULES:
        given = judged(rule, found, identity)
        rows.append((rule, given, given.correct(given.threshold())))
    base, table, best = rows[0][2], [], 0
    for i, (rule, given, fares) in enumerate(rows):
        same = {"difference": 0.0, "low": 0.0, "high": 0.0}
        difference = paired_difference(base, fares, identity, samples=1000) if i else same
        accuracy = float(given.shares(given.thresholds)["balanced_accuracy"].max())
        table.append({**asdict(rule), "balanced_accuracy": accuracy, **difference})
        if i and difference["low"] > 0 and accuracy > table[best]["balanced_accuracy"]:
            best = i
    rule, given, _ = rows[best]
    name, rate = next(iter(wanted.items()), ("balanced_accuracy", 1.0))
    points = {"chosen": given.threshold(name, rate), "best balance": given.threshold()}
    points |= {f"false accepts {share:.1%}": given.threshold("false_accept_rate", share) for share in SHOWN}
    edges = given.thresholds
    edges = edges[np.unique(np.linspace(0, len(edges) - 1, POINTS).astype(int))]
    return {
        "rule": asdict(rule),
        "rules": table,
        "probability": given.curve,
        "wanted": dict(wanted) or "the best balanced accuracy",
        "threshold": points["chosen"],
        "points": {name: given.point(threshold) for name, threshold in points.items()},
        "curve": {"threshold": edges.tolist(), **{k: v.tolist() for k, v in given.shares(edges).items()}},
    }


def check_searches(found: tuple[Searches, Searches, np.ndarray]) -> None:
    """Raise ConfigError where there is nothing to calibrate on."""
    _, unknown, has = found
    if not has.any() or not (unknown.identities >= 0).any():
        raise ConfigError(
            "the lists give no search of a known identity or none of an unknown one, so no operating point can be "
            "measured; label images of at least two identities, two of one of them"
        )


def check_wanted(wanted: Mapping[str, float], searches: int) -> None:
    """Raise ConfigError for a rate that so many searches cannot show, or for two rates at once."""
    if len(wanted) > 1:
        raise ConfigError(f"{' and '.join(wanted)}: only one of them can be chosen; leave out the other")
    for name, rate in wanted.items():
        number = isinstance(rate, int | float) and not isinstance(rate, bool) and 0 < rate < 1
        if not number or rate * searches < 1:
            raise ConfigError(
                f"{name}: {rate} cannot be measured on the {searches:,} searches that the run's lists allow; give at "
                f"least {1 / max(1, searches):.1g}, below 1"
            )
