"""The judged ranking: what each query finds, and which of it is right, wrong or excluded."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain, zip_longest

import numpy as np
import torch
from torch.nn.functional import normalize

from recnb.retrieval.metrics import ranking_metrics, retrieval_metrics
from recnb.retrieval.ranking import TIE
from recnb.retrieval.scores import Array, to_numpy

RIGHT, WRONG, EXCLUDED, END = "right", "wrong", "excluded", ""


@dataclass(repr=False, eq=False)
class Ranking:
    """The first k of each of Q lists, judged.

    `hits` goes further down than k, so that missed positives are known too.
    """

    ids: np.ndarray  # (Q, k) rows of the gallery, most similar first; -1 where the list has ended
    scores: np.ndarray  # (Q, k) similarity; nan where the list has ended
    state: np.ndarray  # (Q, k) "right", "wrong", "excluded", or "" where the list has ended
    position: np.ndarray  # (Q, k) rank from 1 as the metrics count it; 0 for what is excluded
    AP: np.ndarray  # (Q,) average precision; nan for a query without a positive
    first_hit: np.ndarray  # (Q,) rank of the first positive; 0 for a query without one
    positives: np.ndarray  # (Q,) number of positives in the gallery that count
    left_out: np.ndarray  # (Q,) number of same-identity, same-camera items that do not count
    hits: np.ndarray  # (Q, H) the first positives, however far down; -1 where there are no more
    hit_ranks: np.ndarray  # (Q, H)
    hit_scores: np.ndarray  # (Q, H)
    own: np.ndarray  # (Q,) the query's own row in the gallery, -1 where it has none
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    query_cameras: np.ndarray | None = None
    gallery_cameras: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (
            f"Ranking(queries={len(self)}, gallery={len(self.gallery_labels)}, k={self.ids.shape[1]}, "
            f"mAP={np.nanmean(self.AP):.4f})"
        )

    @property
    def valid(self) -> np.ndarray:
        """(Q,) whether the query has a positive at all; the others count in no metric."""
        return self.positives > 0

    @property
    def failed(self) -> np.ndarray:
        """(Q,) whether the first counted item is of another identity, which recall@1 counts as a miss."""
        return self.first_hit > 1

    def order(self, by: str = "worst") -> np.ndarray:
        """The queries by AP, 'worst' or 'best' first (those without a positive last), or as they came ('index')."""
        if by == "index":
            return np.arange(len(self))
        if by not in ("worst", "best"):
            raise ValueError(f"order must be 'worst', 'best' or 'index', not {by!r}")
        return np.argsort(self.AP if by == "worst" else -self.AP, kind="stable")  # nan sorts last

    def missed(self, q: int, k: int, n: int = 3) -> list[tuple[int, int, float]]:
        """Return the first positives of query q that are not among its first k items: (row, rank, similarity).

        Args:
            q: the query's number.
            k: how many items are shown.
            n: how many positives to return at most.
        """
        found = zip(self.hits[q].tolist(), self.hit_ranks[q].tolist(), self.hit_scores[q].tolist(), strict=True)
        shown = set(self.ids[q, :k].tolist())
        return [hit for hit in found if hit[0] >= 0 and hit[0] not in shown][:n]


def rank(
    query: Array | None,
    gallery: Array | None,
    query_labels: Array,
    gallery_labels: Array,
    query_cameras: Array | None = None,
    gallery_cameras: Array | None = None,
    exclude_self: bool | Array = False,
    k: int = 10,
    show_excluded: int = 2,
    missed: int = 3,
    scores: Array | None = None,
) -> Ranking:
    """Return the judged first k of every query's list; a query's own picture is never shown.

    Args:
        query: (Q, D) embeddings, compared by their cosine; or None where scores are given.
        gallery: (G, D) likewise.
        query_labels: (Q,) as in `retrieval_metrics`, like the labels, cameras and `exclude_self` that follow.
        gallery_labels: (G,) see there.
        query_cameras: (Q,) see there.
        gallery_cameras: (G,) see there.
        exclude_self: see there.
        k: how many items of each list.
        show_excluded: so many items of the same identity and camera are shown in their place, marked: enough to see
            them, too few to crowd out the rest.
        missed: so many positives beyond the first k are known.
        scores: (Q, G), higher for better, such as minus a re-ranked distance.
    """
    given = query_labels, gallery_labels, query_cameras, gallery_cameras
    if scores is not None:
        _, arrays = ranking_metrics(scores, *given, exclude_self, metrics=["mAP"], per_query=True)
    elif query is not None:
        _, arrays = retrieval_metrics(query, gallery, *given, exclude_self, metrics=["mAP"], per_query=True)
    else:
        raise ValueError("a ranking needs embeddings or scores")
    ql, gl = to_numpy(query_labels), to_numpy(gallery_labels)
    qc, gc = (None if values is None else to_numpy(values) for values in (query_cameras, gallery_cameras))
    own = to_numpy(exclude_self)
    if own.ndim == 0:
        own = np.arange(len(ql)) if own else np.full(len(ql), -1)
    rows = []
    for q, row in enumerate(_cosines(query, gallery) if scores is None else map(to_numpy, scores)):
        positive = gl == ql[q]
        excluded = positive & (gc == qc[q]) if qc is not None else np.zeros(len(gl), np.bool_)
        # as in the metrics, a positive stands behind the negatives that score as high, or so close that none can tell
        behind = row - np.float32(TIE if scores is None else 0)
        keys = np.where(positive, np.nextafter(behind.astype(float), -np.inf), row)
        if own[q] >= 0:
            keys[own[q]] = -np.inf
        rows.append(_judge(keys, row, positive, excluded, k, show_excluded, k + missed))
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Ranking(
        **columns,
        AP=np.where(arrays["valid"], arrays["AP"], np.nan),
        first_hit=arrays["first_hit"],
        own=own,
        query_labels=ql,
        gallery_labels=gl,
        query_cameras=qc,
        gallery_cameras=gc,
    )


def _cosines(query, gallery) -> Iterator[np.ndarray]:
    """Each query's cosine with every gallery item, (G,)."""
    query, gallery = (normalize(torch.as_tensor(x).detach().float(), eps=1e-30) for x in (query, gallery))
    for block in query.split(max(1, 2**24 // len(gallery))):
        yield from to_numpy(block @ gallery.T)


def _judge(keys, scores, positive, excluded, k: int, show_excluded: int, n_hits: int) -> dict:
    """One query's row of each array of a `Ranking`; keys order the gallery, -infinity for what is never shown."""
    counted = np.where(excluded, -np.inf, keys)
    left_out = _best(np.where(excluded, keys, -np.inf), len(keys))
    visible = counted.copy()
    visible[left_out[:show_excluded]] = keys[left_out[:show_excluded]]
    shown, hits = _best(visible, k), _best(np.where(positive, counted, -np.inf), n_hits)
    negatives = counted[~positive]
    hit_ranks = np.array([np.count_nonzero(negatives > keys[hit]) for hit in hits], int) + np.arange(1, len(hits) + 1)
    state = np.where(excluded[shown], EXCLUDED, np.where(positive[shown], RIGHT, WRONG))
    position = np.where(excluded[shown], 0, np.cumsum(~excluded[shown]))
    return {
        "ids": _pad(shown, k, -1),
        "scores": _pad(scores[shown], k, np.nan),
        "state": _pad(state, k, END),
        "position": _pad(position, k, 0),
        "positives": np.count_nonzero(counted[positive] > -np.inf),
        "left_out": len(left_out),
        "hits": _pad(hits, n_hits, -1),
        "hit_ranks": _pad(hit_ranks, n_hits, 0),
        "hit_scores": _pad(scores[hits], n_hits, np.nan),
    }


def _best(keys: np.ndarray, n: int) -> np.ndarray:
    """The indices of the n highest finite keys, best first, equal ones in their order, without a whole sort."""
    n = min(n, int(np.count_nonzero(keys > -np.inf)))
    if not n:
        return np.zeros(0, int)
    near = np.flatnonzero(keys >= np.partition(keys, len(keys) - n)[len(keys) - n])
    return near[np.argsort(-keys[near], kind="stable")][:n]


def _pad(values: np.ndarray, n: int, fill) -> np.ndarray:
    """The values as an array of n: a list may end before k."""
    return np.concatenate([values, np.full(n - len(values), fill, values.dtype)])


def choose_rows(ranking: Ranking, n: int = 6) -> np.ndarray:
    """Up to n queries of different identities, worst first: half of them failures, half successes, where both exist.

    Each half is spread evenly over its AP, so that the worst, the middling and the best are seen. Deterministic.
    """
    order = [q for q in ranking.order().tolist() if ranking.valid[q]]
    halves = [[q for q in order if ranking.failed[q] == failed] for failed in (True, False)]
    n_failed = min(len(halves[0]), max(n - n // 2, n - len(halves[1])))
    wanted = [
        [(half, t) for t in np.linspace(0, len(half) - 1, count)]
        for half, count in zip(halves, (n_failed, min(len(halves[1]), n - n_failed)), strict=True)
    ]
    labels, chosen = ranking.query_labels, {}
    for half, target in filter(None, chain(*zip_longest(*wanted))):  # in turn, so that both kinds get identities
        free = [i for i, q in enumerate(half) if labels[q] not in chosen]
        if free:
            q = half[min(free, key=lambda i: abs(i - target))]
            chosen[labels[q]] = q
    return np.array(sorted(chosen.values(), key=order.index), dtype=int)


def changed(first: Ranking, second: Ranking) -> tuple[np.ndarray, np.ndarray]:
    """The queries whose first hit only the second has right, and only the first has; the largest change in AP first."""
    order = np.argsort(-np.abs(np.nan_to_num(second.AP - first.AP)), kind="stable")
    return tuple(
        order[(good.first_hit[order] == 1) & bad.failed[order]] for good, bad in ((second, first), (first, second))
    )
