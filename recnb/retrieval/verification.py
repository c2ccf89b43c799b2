"""Chapter: same or not?

Verification decides about pairs: accept those that score at least a threshold. Positive pairs share the identity,
negative pairs do not, and pairs that leave the ranking (see `recnb.retrieval.protocol`) are not counted at all.

    FPR            accepted negative pairs / negative pairs (also called FAR, FMR)
    TPR            accepted positive pairs / positive pairs (1 - FNR)
    ROC-AUC        area under TPR over FPR; a tie of a positive and a negative counts half (Fawcett 2006)
    TPR@FPR=x      the largest TPR of any threshold with FPR <= x, nothing interpolated (Klare et al., IJB-A, 2015)
    EER            the rate at which FPR = 1 - TPR, on the straight line between neighbouring thresholds
    threshold@...  the score to accept from, for the rate named
"""

from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from recnb.retrieval.protocol import Protocol, compared
from recnb.retrieval.ranking import Block, label_blocks, share, sum_over_processes, tile_shape, tiles
from recnb.retrieval.scores import MEMORY, Array, Rows, exact, spans, to_numpy

LEVELS = 1 << 20


def verification_metrics(
    query: Array,
    gallery: Array | None,
    query_labels: Array,
    gallery_labels: Array | None = None,
    query_cameras: Array | None = None,
    gallery_cameras: Array | None = None,
    exclude_self: bool | Array = False,
    fpr: Sequence[float] = (1e-2, 1e-3, 1e-4),
    *,
    query_groups: Array | None = None,
    gallery_groups: Array | None = None,
    distance: str = "cosine",
    device: str | torch.device | None = None,
    memory: int = MEMORY,
) -> dict[str, float]:
    """Return how well one threshold tells pairs of one identity from others, in memory that does not grow with them.

    All pairs count. Scores are sorted into 2^20 levels over their possible range (2 parts in a million of a cosine),
    ties within a level.

    Args:
        query: as in `recnb.retrieval.retrieval_metrics`, like all that follows but `fpr`.
        gallery: see there.
        query_labels: see there.
        gallery_labels: see there.
        query_cameras: see there.
        gallery_cameras: see there.
        exclude_self: see there.
        fpr: the false positive rates at which the true positive rate is given.
        query_groups: see there.
        gallery_groups: see there.
        distance: see there.
        device: see there.
        memory: see there.

    Returns:
        "ROC-AUC", "EER", "TPR@FPR=0.01" ..., their thresholds, and the numbers of pairs of each kind. Thresholds are
        scores as `recnb.retrieval.knn` gives them: a minus distance for "euclidean" and "hamming".

    Raises:
        ValueError: There is no positive or no negative pair, or the input is not as `retrieval_metrics` needs it.
    """
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
    low, high, levels = _range(left, right)
    counts = np.zeros((2, levels))
    with exact(left.device):
        for kind, scores in pair_scores(left, right, protocol, memory):
            counts[kind] += histogram(scores, low, high, levels)
    counts = sum_over_processes(counts)
    edges = low + np.arange(levels) * ((high - low) / levels)
    if distance == "euclidean":
        edges = -np.sqrt(np.maximum(-edges, 0))
    edges = np.ceil(edges) if distance == "hamming" else edges
    return roc_metrics(edges, counts[1], counts[0], fpr)


def pair_metrics(scores: Array, same: Array, fpr: Sequence[float] = (1e-2, 1e-3, 1e-4)) -> dict[str, float]:
    """Return the metrics of `verification_metrics`, exact, for a list of pairs.

    Args:
        scores: (n,) higher for better.
        same: (n,) whether the pair is of one identity.
        fpr: as in `verification_metrics`.

    Raises:
        ValueError: There are not as many of both, a score is not finite, or one kind of pairs is missing.
    """
    given, positive = to_numpy(scores), to_numpy(same).astype(bool)
    if given.shape != positive.shape or given.ndim != 1 or not np.isfinite(given).all():
        shapes = f"{given.shape} and {positive.shape}"
        raise ValueError(f"pairs need one finite score and one bool each; got shapes {shapes}")
    levels, place = np.unique(given, return_inverse=True)
    positives, negatives = (np.bincount(place[kind], minlength=len(levels)) for kind in (positive, ~positive))
    return roc_metrics(levels, positives, negatives, fpr)


def roc_metrics(
    levels: Array, positives: Array, negatives: Array, fpr: Sequence[float] = (1e-2, 1e-3, 1e-4)
) -> dict[str, float]:
    """Return the metrics of `verification_metrics` from counts of pairs.

    Args:
        levels: (L,) ascending scores.
        positives: (L,) how many pairs of one identity have each score.
        negatives: (L,) how many other pairs.
        fpr: as in `verification_metrics`.

    Raises:
        ValueError: One kind of pairs is missing.
    """
    levels, positives, negatives = (np.asarray(values) for values in (levels, positives, negatives))
    if not (np.sum(positives) and np.sum(negatives)):
        raise ValueError(
            f"verification needs both kinds of pairs; there are {np.sum(positives):.0f} positive and "
            f"{np.sum(negatives):.0f} negative pairs"
        )
    used = np.flatnonzero(positives + negatives)[::-1]
    tpr, fpr_at = (np.concatenate([[0], np.cumsum(c[used])]) / np.sum(c) for c in (positives, negatives))
    thresholds = np.concatenate([[levels[used[0]] + 1.0], levels[used].astype(np.float64)])
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


def histogram(scores: Tensor, low: float, high: float, levels: int) -> np.ndarray:
    """Return how many scores lie in each of `levels` equal steps from `low` to `high`, (levels,); -infinity in none.

    Args:
        scores: of any shape, used up.
        low: the lowest possible score.
        high: the highest possible score.
        levels: how many steps.
    """
    step = (high - low) / levels
    place = scores.clamp_min(low - step).sub_(low).div_(step).add_(1).to(torch.int32)  # -infinity goes to place 0
    return torch.bincount(place.flatten(), minlength=levels + 1)[1:].cpu().numpy()


def _equal_error(tpr: np.ndarray, fpr: np.ndarray) -> tuple[float, int]:
    """Return the rate where FPR meets 1 - TPR, and the place of the first threshold at or past it."""
    excess = fpr + tpr - 1
    i = max(1, int(np.argmax(excess >= 0)))
    weight = -excess[i - 1] / (excess[i] - excess[i - 1])
    return fpr[i - 1] + weight * (fpr[i] - fpr[i - 1]), i


def _range(query: Rows, gallery: Rows) -> tuple[float, float, int]:
    """Return the lowest and highest possible score, with room for rounding, and how many levels lie between them."""
    if query.distance == "hamming":
        return -query.width - 0.5, 0.5, query.width + 1
    left, right = float(query.norms.max()), float(gallery.norms.max())
    if query.distance == "euclidean":
        return -1.00001 * (left + right) ** 2 - 1e-30, 1e-5 * (left + right) ** 2 + 1e-30, LEVELS
    bound = 1.00001 * (left * right if query.distance == "dot" else 1) + 1e-30
    return -bound, bound, LEVELS


def pair_scores(query: Rows, gallery: Rows, protocol: Protocol, memory: int) -> Iterator[tuple[int, Tensor]]:
    """Yield (1, scores of positive pairs) and (0, scores of negative pairs, -infinity for all other pairs).

    Args:
        query: the queries, made ready.
        gallery: the gallery, made ready.
        protocol: who matches whom.
        memory: bytes of working memory.
    """
    limit, width = tile_shape(gallery, memory, counted=False)
    for queries in label_blocks(share(protocol, np.arange(len(query))), protocol, memory, limit):
        block = Block(protocol, queries, query.queries(queries))
        mask = torch.as_tensor(block.positive_mask(), device=query.device)
        if len(block.rows):
            yield 1, _comparable(block.positive_scores(gallery, width), query, queries)[mask]
        for columns in spans(len(gallery), width):
            for _, tile in tiles([block], gallery.gallery(columns)):
                yield 0, block.keep_negatives(_comparable(tile, query, queries), columns.start)


def _comparable(scores: Tensor, query: Rows, queries: np.ndarray) -> Tensor:
    """Return scores that mean the same for every query: minus the squared distance, not what orders one gallery."""
    if query.distance == "hamming":
        return (scores - query.width) / 2
    if query.distance != "euclidean":
        return scores
    return 2 * scores - query.norms[torch.as_tensor(queries, device=query.device)].square()[:, None]
