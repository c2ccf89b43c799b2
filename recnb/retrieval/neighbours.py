"""Chapter: nearest neighbours, exactly.

`knn` compares every query with the whole gallery, in blocks, whatever its size. Higher scores are better matches: the
cosine, the dot product, minus the Euclidean distance, or minus the number of bits that differ. Past one machine, split
the gallery in shards, search each, and `merge`.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from recnb.retrieval.scores import MEMORY, Array, Rows, exact, pair, spans, to_numpy


def knn(
    query: Array,
    gallery: Array | None = None,
    k: int = 10,
    distance: str = "cosine",
    exclude: Array | None = None,
    device: str | torch.device | None = None,
    memory: int = MEMORY,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best matches of each query, exact, best first, equal scores in the order of the gallery.

    Args:
        query: (Q, D) numpy array (memory-mapped too) or tensor.
        gallery: (G, D) likewise; None: the queries are their own gallery, each without itself.
        k: how many; beyond the gallery's size all of it.
        distance: "cosine", "dot", "euclidean" or "hamming".
        exclude: (Q,) one gallery row that each query may not find, -1 for none.
        device: where to compute; by default where the query is.
        memory: bytes of working memory.

    Returns:
        Scores (Q, k) float32, minus the distance for "euclidean" and "hamming", and gallery rows (Q, k) int64.

    Raises:
        ValueError: The input is empty, mismatched or not finite.
    """
    left, right = pair(query, gallery, distance, device)
    if exclude is None and right is left:
        exclude = np.arange(len(left))
    exclude = None if exclude is None else torch.as_tensor(to_numpy(exclude).astype(np.int64), device=left.device)
    if k < 1 or (exclude is not None and exclude.shape != (len(left),)):
        raise ValueError(f"k must be at least 1 (got {k}) and exclude must have one row number for each query")
    k = min(k, len(right) - (exclude is not None))
    if k < 1:
        raise ValueError("the gallery holds nothing but the query itself, so there is no neighbour to find")
    found = []
    with exact(left.device):
        for rows in spans(len(left), max(1, min(1024, memory // (64 * k)))):
            scores, ids, _ = nearest(left, right, rows, k, None if exclude is None else exclude[rows], memory)
            found.append(_user_scores(left, right, rows, scores, ids))
    scores, ids = (torch.cat(part) for part in zip(*found, strict=True))
    return scores.cpu().numpy(), ids.cpu().numpy()


def nearest(
    query: Rows, gallery: Rows, rows: slice, k: int, exclude: Tensor | None, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores (B, k) and gallery rows (B, k) of some queries' best matches, and their lowest scores (B,).

    Args:
        query: the queries, made ready.
        gallery: the gallery, made ready.
        rows: which queries.
        k: how many matches.
        exclude: (B,) one gallery row that each query may not find, or None.
        memory: bytes of working memory.
    """
    left = query.queries(rows)
    best = left.new_zeros(len(left), 0), torch.zeros(len(left), 0, dtype=torch.int64, device=left.device)
    lowest = left.new_full((len(left),), torch.inf)
    width = min(max(2 * k, memory // (16 * len(left))), max(k, memory // (16 * gallery.width)))
    for columns in spans(len(gallery), width):
        tile = left @ gallery.gallery(columns).T
        lowest = torch.minimum(lowest, tile.amin(1))
        if exclude is not None:
            own = exclude - columns.start
            inside = ((own >= 0) & (own < tile.shape[1])).nonzero()[:, 0]
            tile[inside, own[inside]] = -torch.inf
        found = _best(tile, min(k, tile.shape[1]), columns.start)
        scores, ids = _in_order(*(torch.cat(both, 1) for both in zip(best, found, strict=True)))
        best = scores[:, :k], ids[:, :k]
    return *best, lowest


def _best(tile: Tensor, k: int, offset: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores in the order of the columns: topk alone picks any of them."""
    scores, ids = tile.topk(min(k + 1, tile.shape[1]))
    crowded = (scores[:, k - 1] == scores[:, -1]).nonzero()[:, 0] if tile.shape[1] > k else ()
    scores, ids = scores[:, :k], ids[:, :k]
    if len(crowded):
        ranked = tile[crowded].sort(dim=1, descending=True, stable=True)
        scores[crowded], ids[crowded] = ranked.values[:, :k], ranked.indices[:, :k]
    return _in_order(scores, ids + offset)


def _in_order(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Best score first, equal scores by id."""
    ids, order = ids.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, ids.gather(1, order)


def _user_scores(query: Rows, gallery: Rows, rows: slice, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    if query.distance == "hamming":
        return (scores - query.width) / 2, ids
    if query.distance != "euclidean":
        return scores, ids
    left, exact = query.raw(rows), torch.empty_like(scores)
    for i in range(scores.shape[1]):  # by subtraction: the product form loses the digits of small distances
        exact[:, i] = 0 - torch.linalg.vector_norm(left - gallery.raw(ids[:, i].cpu().numpy()), dim=1)
    return _in_order(exact, ids)


def merge(results: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (Q, k) and ids (Q, k) of a gallery split in shards, from each shard's (scores, ids), best first.

    Each shard's k best hold the whole gallery's k best, so shards on any number of machines give the exact answer.
    """
    scores, ids = (np.concatenate(part, axis=1) for part in zip(*results, strict=True))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)
