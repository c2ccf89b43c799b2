"""Chapter: same or not?

Verification decides about pairs: accept those that score at least a threshold. Positive pairs share the identity,
negative pairs do not, and pairs that leave the ranking (see `recnb.protocol`) are not counted at all.

    FPR            accepted negative pairs / negative pairs (also called FAR, FMR)
    TPR            accepted positive pairs / positive pairs (1 - FNR)
    ROC-AUC        area under TPR over FPR; a tie of a positive and a negative counts half (Fawcett 2006)
    TPR@FPR=x      the largest TPR of any threshold with FPR <= x, nothing interpolated (Klare et al., IJB-A, 2015)
    EER            the rate at which FPR = 1 - TPR, on the straight line between neighbouring thresholds
    threshold@...  the score to accept from, for the rate named
"""

from __future__ import annotations

import numpy as np
import torch

from recnb.retrieval.protocol import embeddings_protocol
from recnb.retrieval.ranking import Block, label_blocks, share, sum_over_processes, tile_shape, tiles
from recnb.retrieval.scores import MEMORY, exact, pair, spans, to_numpy

LEVELS = 1 << 20


def verification_metrics(
    query,
    gallery,
    query_labels,
    gallery_labels=None,
    query_cameras=None,
    gallery_cameras=None,
    exclude_self=False,
    fpr=(1e-2, 1e-3, 1e-4),
    *,
    query_groups=None,
    gallery_groups=None,
    distance="cosine",
    device=None,
    memory=MEMORY,
):
    """A dict of floats: "ROC-AUC", "EER", "TPR@FPR=0.01" ..., their thresholds, and the numbers of pairs of each kind.

    Arguments as for `recnb.retrieval.metrics.retrieval_metrics`. All pairs count, in memory that does not grow with
    them: scores are sorted into 2^20 levels over their possible range (2 parts in a million of a cosine),
    ties within a level. Thresholds are scores as `recnb.retrieval.knn` gives them: a minus distance for "euclidean" and
    "hamming".
    Raises ValueError where there is no positive or no negative pair.
    """
    protocol = embeddings_protocol(
        query,
        gallery,
        exclude_self,
        (query_labels, gallery_labels),
        (query_cameras, gallery_cameras),
        (query_groups, gallery_groups),
    )
    query, gallery = pair(query, gallery, distance, device)
    low, high, levels = _range(query, gallery)
    counts = np.zeros((2, levels))
    with exact(query.device):
        for kind, scores in pair_scores(query, gallery, protocol, memory):
            counts[kind] += histogram(scores, low, high, levels)
    counts = sum_over_processes(counts)
    edges = low + np.arange(levels) * ((high - low) / levels)
    if distance == "euclidean":
        edges = -np.sqrt(np.maximum(-edges, 0))
    edges = np.ceil(edges) if distance == "hamming" else edges
    return roc_metrics(edges, counts[1], counts[0], fpr)


def pair_metrics(scores, same, fpr=(1e-2, 1e-3, 1e-4)):
    """The metrics of `verification_metrics`, exact, for a list of pairs: scores (n,), same (n,) bool."""
    scores, same = to_numpy(scores), to_numpy(same).astype(bool)
    if scores.shape != same.shape or scores.ndim != 1 or not np.isfinite(scores).all():
        raise ValueError(f"pairs need one finite score and one bool each; got shapes {scores.shape} and {same.shape}")
    levels, place = np.unique(scores, return_inverse=True)
    return roc_metrics(levels, *(np.bincount(place[kind], minlength=len(levels)) for kind in (same, ~same)), fpr)


def roc_metrics(levels, positives, negatives, fpr=(1e-2, 1e-3, 1e-4)):
    """The same from counts: positives (L,) and negatives (L,) pairs at each of the ascending score `levels` (L,)."""
    if not (np.sum(positives) and np.sum(negatives)):
        raise ValueError(
            f"verification needs both kinds of pairs; there are {np.sum(positives):.0f} positive and "
            f"{np.sum(negatives):.0f} negative pairs"
        )
    used = np.flatnonzero(np.asarray(positives) + negatives)[::-1]
    tpr, fpr_at = (np.concatenate([[0], np.cumsum(c[used])]) / np.sum(c) for c in (positives, negatives))
    thresholds = np.concatenate([[levels[used[0]] + 1.0], np.asarray(levels, dtype=np.float64)[used]])
    rate, place = _equal_error(tpr, fpr_at)
    result = {
        "ROC-AUC": np.sum(np.diff(fpr_at) * (tpr[1:] + tpr[:-1]) / 2),
        "EER": rate,
        "threshold@EER": thresholds[place],
    }
    for limit in fpr:
        last = np.searchsorted(fpr_at, limit, side="right") - 1
        result |= {f"TPR@FPR={limit:g}": tpr[last], f"threshold@FPR={limit:g}": thresholds[last]}
    result |= {"positive_pairs": np.sum(positives), "negative_pairs": np.sum(negatives)}
    return {key: float(value) for key, value in result.items()}


def histogram(scores, low, high, levels):
    """How many scores lie in each of `levels` equal steps from `low` to `high`, (levels,); -infinity in none."""
    step = (high - low) / levels
    place = scores.clamp_min(low - step).sub_(low).div_(step).add_(1).to(torch.int32)  # -infinity goes to place 0
    return torch.bincount(place.flatten(), minlength=levels + 1)[1:].cpu().numpy()


def _equal_error(tpr, fpr):
    """The rate where FPR meets 1 - TPR, and the place of the first threshold at or past it."""
    excess = fpr + tpr - 1
    i = max(1, int(np.argmax(excess >= 0)))
    weight = -excess[i - 1] / (excess[i] - excess[i - 1])
    return fpr[i - 1] + weight * (fpr[i] - fpr[i - 1]), i


def _range(query, gallery):
    """Lowest and highest possible score, with room for rounding, and how many levels to tell apart between them."""
    if query.distance == "hamming":
        return -query.width - 0.5, 0.5, query.width + 1
    left, right = float(query.norms.max()), float(gallery.norms.max())
    if query.distance == "euclidean":
        return -1.00001 * (left + right) ** 2 - 1e-30, 1e-5 * (left + right) ** 2 + 1e-30, LEVELS
    bound = 1.00001 * (left * right if query.distance == "dot" else 1) + 1e-30
    return -bound, bound, LEVELS


def pair_scores(query, gallery, protocol, memory):
    """Yields (1, scores of positive pairs) and (0, scores of negative pairs, -infinity for all other pairs)."""
    limit, width = tile_shape(gallery, memory, counted=False)
    for queries in label_blocks(share(protocol, np.arange(len(query))), protocol, memory, limit):
        block = Block(protocol, queries, query.queries(queries))
        mask = torch.as_tensor(block.positive_mask(), device=query.device)
        if len(block.rows):
            yield 1, _comparable(block.positive_scores(gallery, width), query, queries)[mask]
        for columns in spans(len(gallery), width):
            for _, tile in tiles([block], gallery.gallery(columns)):
                yield 0, block.keep_negatives(_comparable(tile, query, queries), columns.start)


def _comparable(scores, query, queries):
    """Scores that mean the same for every query: minus the squared distance instead of what merely orders a gallery."""
    if query.distance == "hamming":
        return (scores - query.width) / 2
    if query.distance != "euclidean":
        return scores
    return 2 * scores - query.norms[torch.as_tensor(queries, device=query.device)].square()[:, None]
