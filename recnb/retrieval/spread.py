"""Chapter: does the embedding use its space?

A collapsed model puts all images in the same few directions, which the loss alone may not show. Both numbers need no
label: compare them between epochs, or with those of the untrained network.
"""

import torch

from recnb.retrieval.scores import MEMORY, Array, Rows, exact, spans


def effective_rank(vectors: Array, memory: int = MEMORY) -> float:
    """Return how many directions the vectors use, from 1 to their number of dimensions.

    The exponential of the entropy of the singular values, as shares of their sum (Roy and Vetterli, EUSIPCO 2007).

    Args:
        vectors: (N, D) embeddings, as they come: neither centred nor normalised.
        memory: bytes of working memory.

    Raises:
        ValueError: A row holds NaN or infinity, or all are 0.
    """
    rows = Rows(vectors, "dot", "vectors", "cpu")
    parts = (rows.raw(part).double() for part in spans(len(rows), max(1, memory // (16 * rows.width))))
    values = torch.linalg.eigvalsh(sum(part.T @ part for part in parts)).clamp_min(0).sqrt()
    if not values.sum() > 0:
        raise ValueError("all vectors are 0: they have no rank")
    return float(torch.special.entr(values / values.sum()).sum().exp())


def uniformity(vectors: Array, t: float = 2.0, memory: int = MEMORY) -> float:
    """Return how evenly unit vectors cover the sphere: 0 where all are the same, lower the better.

    The logarithm of the mean over pairs of exp(-t squared distance) (Wang and Isola, ICML 2020,
    https://arxiv.org/abs/2005.10242).

    Args:
        vectors: (N, D) embeddings, brought to unit length here.
        t: how fast distance counts.
        memory: bytes of working memory; time grows with N x N.

    Raises:
        ValueError: There are fewer than two vectors, or one holds NaN or infinity.
    """
    rows = Rows(vectors, "cosine", "vectors")
    if len(rows) < 2:
        raise ValueError("uniformity is a mean over pairs: two vectors are needed at least")
    unit = rows.queries(slice(None))
    total = unit.new_zeros((), dtype=torch.float64)
    with exact(rows.device):
        for part in spans(len(rows), max(1, memory // (16 * len(rows)))):
            potential = (2 * t * (unit[part] @ unit.T - 1)).exp_()
            potential[torch.arange(len(potential)), torch.arange(part.start, part.stop)] = 0  # a vector and itself
            total += potential.sum(dtype=torch.float64)
    return float((total / (len(rows) * (len(rows) - 1))).log())
