"""Which identity, how sure, and from where on? From the nearest images of a search to a name or to "unknown".

Three numbers speak for the first identity of a search: how alike its nearest image is, how much more than that of the
next identity, and how much more than its nearest images are to their own nearest. The last is what the local outlier
factor compares (Breunig et al., SIGMOD 2000): images that lie close together, as those do that training has seen,
attract what is unknown. A logistic curve makes of them the probability that the name is right, where known and unknown
images are equally frequent (Platt, 1999). A name is given from a threshold of that probability on. What becomes of
whole searches there is measured as in open-set identification (Phillips, Grother and Micheals, Handbook of Face
Recognition, 2011): of images whose identity is in the index, each without itself, and of the same images with their
identity taken out.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.optimize import minimize
from scipy.special import expit
from scipy.stats import binomtest

from recnb.registry import ConfigError
from recnb.retrieval.scores import MEMORY, pair, spans

MOST = 2000  # images of an identity say how alike these are
HITS = 50  # of a search's nearest images, these decide
NEAR = 5  # of those of the first identity, these are compared with their own nearest
FOLDS = 5
SHOWN = (0.01, 0.001)  # false-accept rates that are always shown
POINTS = 200  # of the curve, at most


NUMBERS = ("score", "margin", "local")


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

    `mates` is how alike the hit and the most similar other image of its identity are.
    """

    scores: np.ndarray
    identities: np.ndarray
    mates: np.ndarray

    def __getitem__(self, rows: slice | np.ndarray) -> Searches:
        return Searches(self.scores[rows], self.identities[rows], self.mates[rows])


# ---- one search ------------------------------------------------------------------------------------------------------


def evidence(found: Searches) -> tuple[np.ndarray, np.ndarray]:
    """Return the identity (Q,) that each search would name, and the NUMBERS (Q, 3) that speak for it.

    Where there is no other identity among the hits, the last of them takes its place.
    """
    first, best = found.identities[:, 0], found.scores[:, 0]
    same, there = found.identities == first[:, None], np.isfinite(found.scores)
    following = np.where(same, -np.inf, found.scores).max(1)
    last = np.where(there, found.scores, np.inf).min(1)
    margin = best - np.where(np.isfinite(following), following, last)
    near = same & (same.cumsum(1) <= NEAR)
    local = best - (found.mates * near).sum(1) / near.sum(1)
    return first, np.stack([best, margin, local], 1)


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


def mean_mate(alike: np.ndarray) -> float:
    """Return the mean of how alike (N,) images and their mates are: what stands for images that have no mate."""
    known = np.isfinite(alike)
    return float(alike[known].mean()) if known.any() else 0.0


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
    return joined(known), joined(unknown), np.concatenate(has)


def joined(parts: Sequence[Searches]) -> Searches:
    """Return blocks of searches as one."""
    return Searches(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def _searched(asked: np.ndarray, index: np.ndarray, queries: Items, items: Items, distance: str) -> Iterator[tuple]:
    """Yield block by block the (scores, identities) found as known, as unknown, and whether there is a right one.

    The arguments are those of `searches`.
    """
    query, gallery = pair(asked, index, distance)
    theirs, (best, mate, second) = items.tensors(slice(None)), mates(index, items.identity, distance)
    usual = mean_mate(best)
    for rows in spans(len(query), max(1, MEMORY // (32 * len(gallery)))):
        scores = query.queries(rows) @ gallery.gallery(slice(None)).T
        identity, itself, camera = (
            own[:, None] == other for own, other in zip(queries.tensors(rows), theirs, strict=True)
        )
        hidden = itself | (identity & camera & (theirs[2] >= 0))
        found = []
        for mask in (hidden, identity | itself):
            top = scores.masked_fill(mask, -torch.inf).topk(min(HITS, len(gallery)), dim=1)
            names, hits = theirs[0][top.indices].masked_fill(top.values.isinf(), -1), top.indices.numpy()
            asks = (items.content[mate[hits]] == queries.content[rows, None]) & (mate[hits] >= 0)
            alike = np.where(asks, second[hits], best[hits])  # a picture that is searched is no mate of what it finds
            found.append(Searches(top.values.numpy(), names.numpy(), np.where(np.isfinite(alike), alike, usual)))
        yield (*found, (identity & ~hidden).any(1).numpy())


# ---- the choice ------------------------------------------------------------------------------------------------------


def fitted(numbers: np.ndarray, right: np.ndarray, known: np.ndarray) -> dict[str, float]:
    """Return the logistic curve of the numbers of searches that named rightly or not.

    Known and unknown searches weigh the same together, however many there are. No weight is negative: what is more
    alike is never less sure. The goals are Platt's, a little off 0 and 1, so that few searches give no certainty.

    Args:
        numbers: (n, 3) the NUMBERS of n searches.
        right: (n,) whether the name is right.
        known: (n,) whether the identity is in the index.
    """
    goal = np.where(right, (right.sum() + 1) / (right.sum() + 2), 1 / ((~right).sum() + 2))
    weight = np.where(known, 1 / max(1, known.sum()), 1 / max(1, (~known).sum()))
    centre, spread = numbers.mean(0), numbers.std(0) + 1e-9
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
    """What curves say of the same Q images, known (K of them, with something to find) and unknown.

    The probabilities are those of curves that were fitted without the identity in question.
    """

    known: np.ndarray  # (K,) probabilities
    right: np.ndarray  # (K,) whether the name was right
    unknown: np.ndarray  # (Q,) probabilities
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


def share(which: np.ndarray) -> dict[str, float]:
    """Return how many of some searches, as a share with its 95 % Wilson interval."""
    count, of = int(which.sum()), len(which)
    interval = binomtest(count, of).proportion_ci(method="wilson")
    return {"share": count / of, "low": float(interval.low), "high": float(interval.high), "count": count, "of": of}


def judged(found: tuple[Searches, Searches, np.ndarray], identity: np.ndarray) -> Judged:
    """Return what is said of searches of known and unknown, each by a curve fitted on other identities.

    Args:
        found: as `searches` gives it.
        identity: (Q,) the queries' identities.
    """
    known, unknown, has = found
    (first, numbers), (_, others) = evidence(known), evidence(unknown)
    first, numbers = first[has], numbers[has]
    right, asked = first == identity[has], np.concatenate([identity[has], identity])
    both, answers = np.concatenate([numbers, others]), np.concatenate([right, np.zeros(len(others), bool)])
    kind = np.arange(len(both)) < len(numbers)
    names = np.random.default_rng(0).permutation(np.unique(identity))
    given = np.empty(len(both))
    for fold in range(min(FOLDS, len(names))):
        inside = np.isin(asked, names[fold :: min(FOLDS, len(names))])
        outside = ~inside if len(names) > 1 else inside
        given[inside] = probability(both[inside], fitted(both[outside], answers[outside], kind[outside]))
    return Judged(given[kind], right, given[~kind], fitted(both, answers, kind))


def choose(found: tuple[Searches, Searches, np.ndarray], identity: np.ndarray, wanted: Mapping[str, float]) -> dict:
    """Return the content of operating_point.json: the curve, the threshold, and what each point comes to.

    The rates are of the images that chose the threshold, so they are a little too good; the curves at least are those
    of other identities.

    Args:
        found: as `searches` gives it.
        identity: (Q,) the queries' identities.
        wanted: {"false_accept_rate": x}, {"unknown_rate": x}, or nothing for the best balanced accuracy.

    Raises:
        ConfigError: There is no search of a known identity, or of an unknown one.
    """
    check_searches(found)
    given = judged(found, identity)
    name, rate = next(iter(wanted.items()), ("balanced_accuracy", 1.0))
    points = {"chosen": given.threshold(name, rate), "best balance": given.threshold()}
    points |= {f"false accepts {share:.1%}": given.threshold("false_accept_rate", share) for share in SHOWN}
    edges = given.thresholds
    edges = edges[np.unique(np.linspace(0, len(edges) - 1, POINTS).astype(int))]
    return {
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
