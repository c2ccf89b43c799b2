"""Chapter: how good is a ranking?

One call gives every ranking metric, exact, under one stated definition, in bounded memory. With R the number of
positives of a query, r_1 < r_2 < ... < r_R their ranks (1-based), the value of one query is

    recall{k}      1 if r_1 <= k else 0: CMC@k, "Recall@k" of the metric-learning papers (Jegou et al. 2011)
    precision@{k}  positives with r_j <= k, over k, also where k is larger than R or than the gallery
    mAP            mean over all R positives of j / r_j: the full ranking, rectangle rule (Manning et al. 2008, 8.4)
    mAP@R          sum of j / r_j over the positives with r_j <= R, over R (Musgrave et al., arXiv 2003.08505)
    R-Precision    positives with r_j <= R, over R (Manning et al. 2008, 8.4)
    mINP           R / r_R: the hardest positive (Ye et al., arXiv 2001.04193)
    MRR            1 / r_1 (Voorhees 1999)
    NDCG@{k}       sum of 1 / log2(1 + r_j), r_j <= k, over its largest possible value (Jarvelin and Kekalainen 2002)
    mAP@{k}/R, mAP@{k}/min(R,k)   sum of j / r_j over r_j <= k, over the denominator named

and the metric is the mean over the queries that have a positive. `recnb.retrieval.protocol` says what a positive is and
what leaves the ranking, `recnb.retrieval.ranking` how ties are ranked.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from recnb.retrieval.protocol import Protocol, compared, make_protocol
from recnb.retrieval.ranking import TIE, embedding_ranks, score_ranks, share, sum_over_processes
from recnb.retrieval.scores import MEMORY, Array, exact, to_numpy

if TYPE_CHECKING:
    import pandas as pd

Values = dict[str, float]
Arrays = dict[str, np.ndarray]  # one entry per query
STANDARD = ("recall{k}", "mAP", "mAP@R", "R-Precision", "mINP", "MRR", "precision@{k}", "NDCG@{k}")


def retrieval_metrics(
    query: Array,
    gallery: Array | None,
    query_labels: Array,
    gallery_labels: Array | None = None,
    query_cameras: Array | None = None,
    gallery_cameras: Array | None = None,
    exclude_self: bool | Array = False,
    topk: Sequence[int] = (1, 5),
    *,
    query_groups: Array | None = None,
    gallery_groups: Array | None = None,
    distance: str = "cosine",
    metrics: str | Sequence[str] = STANDARD,
    per_query: bool = False,
    tie: float = TIE,
    device: str | torch.device | None = None,
    memory: int = MEMORY,
) -> Any:  # Values, with per_query (Values, Arrays)
    """Return every metric asked for, exact, over the queries that have a positive.

    Where torch.distributed is initialised, every process must call this with the same arguments; each does its share
    of the queries and all get the whole result.

    Args:
        query: (Q, D) embeddings, numpy arrays (memory-mapped too) or tensors, on any device, of any float type
            (computed in float32), or packed bits (uint8) where the distance is "hamming".
        gallery: (G, D) likewise; None: the queries are their own gallery, each without itself.
        query_labels: (Q,) identities, integers of any size or strings.
        gallery_labels: (G,) likewise; none where the gallery is None.
        query_cameras: (Q,) cameras: items of the same identity and camera leave the ranking.
        gallery_cameras: (G,) likewise.
        exclude_self: True: query i is gallery item i; or (Q,) the gallery row of each query's own image, -1 for none.
        topk: the k of the metrics that have one.
        query_groups: (Q,) items of the same group (a source photo, a sequence) leave each other's ranking.
        gallery_groups: (G,) likewise.
        distance: "cosine", "dot", "euclidean" or "hamming".
        metrics: names as in this chapter's list.
        per_query: whether the values of each query are returned as well.
        tie: scores closer than this times the product of the norms are ties, ranked against the query.
        device: where to compute; by default where the query is.
        memory: bytes of working memory; results do not depend on it.

    Returns:
        A number for each metric, "queries" and "queries_without_positive". With `per_query` also arrays (Q,): "valid"
        (where it is False all others are 0), "positives", "first_hit" and "hardest_positive" (1-based ranks), "AP",
        and each metric's value under the metric's key.

    Raises:
        ValueError: Before any work: no query has a positive, shapes disagree, a metric is unknown, or a row holds NaN
            or infinity.
    """
    functions = _functions(metrics, topk)
    left, right, protocol = compared(
        query,
        gallery,
        distance,
        device,
        exclude_self,
        (query_labels, gallery_labels),
        (query_cameras, gallery_cameras),
        (query_groups, gallery_groups),
    )
    queries = share(protocol, np.flatnonzero(protocol.valid))
    workers = torch.get_num_threads() if left.device.type == "cpu" else 1
    with exact(left.device, threads=1):
        ranks = embedding_ranks(left, right, protocol, queries, tie, memory, workers)
        return _report(ranks, protocol, functions, per_query)


def ranking_metrics(
    scores: Array | Callable,
    query_labels: Array,
    gallery_labels: Array,
    query_cameras: Array | None = None,
    gallery_cameras: Array | None = None,
    exclude_self: bool | Array = False,
    topk: Sequence[int] = (1, 5),
    *,
    query_groups: Array | None = None,
    gallery_groups: Array | None = None,
    metrics: str | Sequence[str] = STANDARD,
    per_query: bool = False,
    tie: float = 0.0,
    memory: int = MEMORY,
) -> Any:  # Values, with per_query (Values, Arrays)
    """Return the metrics of `retrieval_metrics` from ready scores, higher for better (of a distance: minus it).

    Args:
        scores: (Q, G), or a function from query numbers (B,) to their scores (B, G), so that the matrix need not exist.
        query_labels: as in `retrieval_metrics`, like all that follows but `tie`.
        gallery_labels: see there.
        query_cameras: see there.
        gallery_cameras: see there.
        exclude_self: see there.
        topk: see there.
        query_groups: see there.
        gallery_groups: see there.
        metrics: see there.
        per_query: see there.
        tie: scores closer than this are ties.
        memory: see there.

    Returns:
        As `retrieval_metrics`.

    Raises:
        ValueError: As there, or where scores are not finite.
    """
    protocol = make_protocol(
        len(query_labels),
        len(gallery_labels),
        exclude_self,
        False,
        labels=(query_labels, gallery_labels),
        cameras=(query_cameras, gallery_cameras),
        groups=(query_groups, gallery_groups),
    )
    table = scores if callable(scores) or isinstance(scores, torch.Tensor) else np.asarray(scores)
    blocks = table if callable(table) else table.__getitem__
    ranks = score_ranks(blocks, protocol, share(protocol, np.flatnonzero(protocol.valid)), tie, memory)
    return _report(ranks, protocol, _functions(metrics, topk), per_query)


def per_class(arrays: Arrays, query_labels: Array, columns: Sequence[str] = ("AP", "recall1")) -> pd.DataFrame:
    """Return a table with a row per query label, worst AP first: the mean of each column over its valid queries.

    Args:
        arrays: what `retrieval_metrics(per_query=True)` returned.
        query_labels: (Q,) the labels given there.
        columns: which arrays; "queries" is added, the number of the label's queries with a positive.
    """
    import pandas as pd  # a fifth of the time that the rest of this chapter takes to load

    valid = arrays["valid"]
    table = pd.DataFrame({name: arrays[name][valid] for name in columns}).groupby(to_numpy(query_labels)[valid])
    result = table.mean().assign(queries=table.size())
    return result.rename_axis("label").sort_values(columns[0], kind="stable").reset_index()


def _report(
    blocks: Iterable[tuple[np.ndarray, np.ndarray]], protocol: Protocol, functions: dict[str, Callable], per_query: bool
) -> Any:  # Values, with per_query (Values, Arrays)
    """Means over the valid queries, from (queries, ranks) blocks; ranks (B, R) int64, best first, padded with 0."""
    keys = ["first_hit", "hardest_positive", *functions]
    values = np.zeros((len(keys), len(protocol.valid)))
    for queries, ranks in blocks:
        count = protocol.positives[queries]
        values[:2, queries] = ranks[:, 0], ranks[np.arange(len(ranks)), count - 1]
        for i, function in enumerate(functions.values(), 2):
            values[i, queries] = function(ranks, count)
    values = sum_over_processes(values)
    result = {key: float(row[protocol.valid].mean()) for key, row in zip(keys[2:], values[2:], strict=True)}
    result |= {"queries": float(len(protocol.valid)), "queries_without_positive": float((~protocol.valid).sum())}
    if not per_query:
        return result
    arrays = dict(zip(keys, values, strict=True)) | {"valid": protocol.valid, "positives": protocol.positives}
    arrays |= {key: arrays[key].astype(np.int64) for key in keys[:2]}
    return result, arrays | ({"AP": arrays["mAP"]} if "mAP" in arrays else {})


def _functions(metrics: str | Sequence[str], topk: Sequence[int]) -> dict[str, Callable]:
    """Return {key: function of (ranks (B, R), R (B,)) that returns (B,)} for every metric asked for."""
    if any(k < 1 for k in topk):
        raise ValueError(f"topk must hold numbers from 1; got {tuple(topk)}")
    functions: dict[str, Callable] = {}
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if name not in DEFINITIONS:
            raise ValueError(f"there is no metric {name!r}; there are {', '.join(DEFINITIONS)}")
        for k in topk if "{k}" in name else [None]:
            function = DEFINITIONS[name]
            functions[name.replace("{k}", str(k))] = functools.partial(function, k=k) if k else function
    return functions


def _hits(ranks: np.ndarray, k: int | np.ndarray) -> np.ndarray:
    return ((ranks > 0) & (ranks <= k)).sum(1)


def _precisions(ranks: np.ndarray, k: float | np.ndarray) -> np.ndarray:
    """Sum of j / r_j over the positives with r_j <= k, (B,)."""
    places = np.arange(1, ranks.shape[1] + 1)
    return _sum(np.divide(places, ranks, where=(ranks > 0) & (ranks <= k), out=np.zeros(ranks.shape)))


def _ndcg(ranks: np.ndarray, count: np.ndarray, k: int) -> np.ndarray:
    gains = 1 / np.log2(1 + np.maximum(ranks, 1))
    ideal = np.cumsum(1 / np.log2(np.arange(2, min(k, count.max()) + 2)))
    return _sum(np.where((ranks > 0) & (ranks <= k), gains, 0)) / ideal[np.minimum(k, count) - 1]


def _sum(terms: np.ndarray) -> np.ndarray:
    """Row sums, added from left to right: padding changes no bit, so neither do the blocks or the processes."""
    return np.cumsum(terms, axis=1)[:, -1]


DEFINITIONS: dict[str, Callable] = {  # of the ranks (B, R) of the positives, best first and padded with 0, and R (B,)
    "recall{k}": lambda ranks, count, k: (ranks[:, 0] <= k).astype(float),
    "mAP": lambda ranks, count: _precisions(ranks, np.inf) / count,
    "mAP@R": lambda ranks, count: _precisions(ranks, count[:, None]) / count,
    "R-Precision": lambda ranks, count: _hits(ranks, count[:, None]) / count,
    "mINP": lambda ranks, count: count / ranks.max(1),
    "MRR": lambda ranks, count: 1 / ranks[:, 0],
    "precision@{k}": lambda ranks, count, k: _hits(ranks, k) / k,
    "NDCG@{k}": _ndcg,
    "mAP@{k}/R": lambda ranks, count, k: _precisions(ranks, k) / count,
    "mAP@{k}/min(R,k)": lambda ranks, count, k: _precisions(ranks, k) / np.minimum(count, k),
}


def cmc(arrays: Arrays, most: int = 50) -> np.ndarray:
    """Return (most,) the share of queries whose first positive is among the first 1, 2, ... `most`."""
    first = arrays["first_hit"][arrays["valid"]]
    return np.cumsum(np.bincount(np.minimum(first, most + 1), minlength=most + 2)[1 : most + 1]) / len(first)
