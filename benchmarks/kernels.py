"""What numba saves: evaluation and re-ranking with its kernels and with torch and numpy alone, in one process.

    python benchmarks/kernels.py [--threads 1] [--large]

Synthetic embeddings of 128 dimensions with about ten positives a query. `first` holds the loading of the kernels, and
their compilation where they have not been compiled on this machine before.
"""

from __future__ import annotations

import argparse
import time
from functools import partial

import numpy as np
import torch

from recnb.retrieval import ranking, rerank
from recnb.retrieval.metrics import retrieval_metrics


def embeddings(queries: int, items: int, size: int = 128) -> tuple[np.ndarray, ...]:
    """Return queries, gallery and the labels of both, ten gallery items an identity."""
    rng = np.random.default_rng(0)
    labels = rng.integers(0, items // 10, queries + items)
    vectors = rng.normal(size=(items // 10, size))[labels] + 1.6 * rng.normal(size=(queries + items, size))
    vectors = vectors.astype(np.float32)
    return vectors[:queries], vectors[queries:], labels[:queries], labels[queries:]


def seconds(work, kernels, times: int) -> list[float]:
    """Return how long `work()` takes, a number each time, with these kernels or with None."""
    ranking.njit = rerank.njit = kernels
    took = []
    for _ in range(times):
        start = time.perf_counter()
        work()
        took.append(time.perf_counter() - start)
    return took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--large", action="store_true", help="10,000 x 50,000 as well")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    njit = ranking.njit
    sizes = [(3_000, 10_000), (10_000, 50_000)] if given.large else [(3_000, 10_000)]
    works = {f"metrics {q:,} x {g:,}": partial(retrieval_metrics, *embeddings(q, g)) for q, g in sizes}
    query, gallery, *_ = embeddings(1_000, 5_000)
    works["re-ranking 1,000 x 5,000"] = partial(rerank.k_reciprocal, query, gallery)
    for name, work in works.items():
        first, *later = seconds(work, njit, 3)
        alone = min(seconds(work, None, 2))
        print(f"{name}: first {first:.2f} s, then {min(later):.2f} s; without numba {alone:.2f} s", flush=True)


if __name__ == "__main__":
    main()
