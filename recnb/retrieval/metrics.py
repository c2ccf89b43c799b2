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

and the metric is the mean over the queries that have a positive. `recnb.protocol` says what a positive is and what
leaves the ranking, `recnb.ranking` how ties are ranked.
"""

from __future__ import annotations

import functools

import numpy as np
import pandas as pd
import torch

from recnb.retrieval.protocol import embeddings_protocol, make_protocol
from recnb.retrieval.ranking import TIE, embedding_ranks, score_ranks, share, sum_over_processes
from recnb.retrieval.scores import MEMORY, exact, pair, to_numpy

STANDARD = ("recall{k}", "mAP", "mAP@R", "R-Precision", "mINP", "MRR", "precision@{k}", "NDCG@{k}")


def retrieval_metrics(
    query,
    gallery,
    query_labels,
    gallery_labels=None,
    query_cameras=None,
    gallery_cameras=None,
    exclude_self=False,
    topk=(1, 5),
    *,
    query_groups=None,
    gallery_groups=None,
    distance="cosine",
    metrics=STANDARD,
    per_query=False,
    tie=TIE,
    device=None,
    memory=MEMORY,
):
    """A dict of floats: every metric asked for, "queries" and "queries_without_positive".

    query (Q, D), gallery (G, D): numpy arrays (memory-mapped too) or tensors, on any device, of any float type
    (computed in float32), or packed bits (uint8) where distance="hamming". gallery None: the queries are their own
    gallery, each without itself. Labels, cameras, groups: integers of any size, or strings.

    exclude_self    True: query i is gallery item i; or (Q,) the gallery row of each query's own image, -1 for none
    query_groups    items of the same group (a source photo, a sequence) leave each other's ranking
    distance        "cosine", "dot", "euclidean" or "hamming"
    topk, metrics   the k of the metrics that have one; which metrics (names as in this chapter's list)
    per_query       True returns (dict, arrays): numpy arrays with one entry per query: "valid" (bool; where it is
                    False all others are 0), "positives", "first_hit" and "hardest_positive" (1-based ranks), "AP",
                    and each metric's value under the metric's key
    tie             scores closer than this times the product of the norms are ties, ranked against the query
    memory          bytes of working memory; results do not depend on it
    Where torch.distributed is initialised, every process must call this with the same arguments; each does its share
    of the queries and all get the whole result. Raises ValueError, before any work, where no query has a positive,
    where shapes disagree, or where a row holds NaN or infinity.
    """
    functions = _functions(metrics, topk)
    protocol = embeddings_protocol(
        query,
        gallery,
        exclude_self,
        (query_labels, gallery_labels),
        (query_cameras, gallery_cameras),
        (query_groups, gallery_groups),
    )
    query, gallery = pair(query, gallery, distance, device)
    queries = share(protocol, np.flatnonzero(protocol.valid))
    workers = torch.get_num_threads() if query.device.type == "cpu" else 1
    with exact(query.device, threads=1):
        ranks = embedding_ranks(query, gallery, protocol, queries, tie, memory, workers)
        return _report(ranks, protocol, functions, per_query)


def ranking_metrics(
    scores,
    query_labels,
    gallery_labels,
    query_cameras=None,
    gallery_cameras=None,
    exclude_self=False,
    topk=(1, 5),
    *,
    query_groups=None,
    gallery_groups=None,
    metrics=STANDARD,
    per_query=False,
    tie=0.0,
    memory=MEMORY,
):
    """The metrics of `retrieval_metrics` from ready scores, higher for better (a re-ranked distance: minus it).

    scores: an array or tensor (Q, G), or a function from query numbers (B,) to their scores (B, G), so that the
    matrix need not exist. tie: scores closer than this are ties. The rest as for `retrieval_metrics`.
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
    scores = scores if callable(scores) or isinstance(scores, torch.Tensor) else np.asarray(scores)
    blocks = scores if callable(scores) else lambda queries: scores[queries]
    ranks = score_ranks(blocks, protocol, share(protocol, np.flatnonzero(protocol.valid)), tie, memory)
    return _report(ranks, protocol, _functions(metrics, topk), per_query)


def per_class(arrays, query_labels, columns=("AP", "recall1")):
    """A pandas table with a row per query label, worst AP first: the mean of each column over its valid queries.

    arrays: what `retrieval_metrics(per_query=True)` returned. "queries" counts the label's queries with a positive.
    """
    valid = arrays["valid"]
    table = pd.DataFrame({name: arrays[name][valid] for name in columns}).groupby(to_numpy(query_labels)[valid])
    result = table.mean().assign(queries=table.size())
    return result.rename_axis("label").sort_values(columns[0], kind="stable").reset_index()


def _report(blocks, protocol, functions, per_query):
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


def _functions(metrics, topk):
    """{key: function of (ranks (B, R), R (B,)) that returns (B,)} for every metric asked for."""
    if any(k < 1 for k in topk):
        raise ValueError(f"topk must hold numbers from 1; got {tuple(topk)}")
    functions = {}
    for name in [metrics] if isinstance(metrics, str) else metrics:
        if name not in DEFINITIONS:
            raise ValueError(f"there is no metric {name!r}; there are {', '.join(DEFINITIONS)}")
        for k in topk if "{k}" in name else [None]:
            functions[name.replace("{k}", str(k))] = functools.partial(DEFINITIONS[name], k=k)
    return functions


def _hits(ranks, k):
    return ((ranks > 0) & (ranks <= k)).sum(1)


def _precisions(ranks, k):
    """Sum of j / r_j over the positives with r_j <= k, (B,)."""
    places = np.arange(1, ranks.shape[1] + 1)
    return _sum(np.divide(places, ranks, where=(ranks > 0) & (ranks <= k), out=np.zeros(ranks.shape)))


def _ndcg(ranks, count, k):
    gains = 1 / np.log2(1 + np.maximum(ranks, 1))
    ideal = np.cumsum(1 / np.log2(np.arange(2, min(k, count.max()) + 2)))
    return _sum(np.where((ranks > 0) & (ranks <= k), gains, 0)) / ideal[np.minimum(k, count) - 1]


def _sum(terms):
    """Row sums, added from left to right: padding changes no bit, so neither do the blocks or the processes."""
    return np.cumsum(terms, axis=1)[:, -1]


DEFINITIONS = {
    "recall{k}": lambda ranks, count, k: (ranks[:, 0] <= k).astype(float),
    "mAP": lambda ranks, count, k: _precisions(ranks, np.inf) / count,
    "mAP@R": lambda ranks, count, k: _precisions(ranks, count[:, None]) / count,
    "R-Precision": lambda ranks, count, k: _hits(ranks, count[:, None]) / count,
    "mINP": lambda ranks, count, k: count / ranks.max(1),
    "MRR": lambda ranks, count, k: 1 / ranks[:, 0],
    "precision@{k}": lambda ranks, count, k: _hits(ranks, k) / k,
    "NDCG@{k}": _ndcg,
    "mAP@{k}/R": lambda ranks, count, k: _precisions(ranks, k) / count,
    "mAP@{k}/min(R,k)": lambda ranks, count, k: _precisions(ranks, k) / np.minimum(count, k),
}


def cmc(arrays: dict, most: int = 50) -> np.ndarray:
    """(most,) the share of queries whose first positive is among the first 1, 2, ... `most`."""
    first = arrays["first_hit"][arrays["valid"]]
    return np.cumsum(np.bincount(np.minimum(first, most + 1), minlength=most + 2)[1 : most + 1]) / len(first)
