"""An index of very many drawn vectors beside what `recnb.retrieval.plan` says of it: how right, how fast, how large.

    python benchmarks/vectors.py [--count 10000000] [--width 64] [--factory auto] [--effort 0]      a JSON line

Each object has 20 images, and each of 10,000 kinds has as many objects as fall to it: a vector is its kind's, plus 0.8
times a draw for the object, plus half of one for the image. The queries are further images of some objects. They are
asked one at a time and on one core, as a person asks: `ms` is what that core works for one. The index is made on all
cores, in `minutes`, or `core minutes` of work. `recall@10` is how many of the ten exact neighbours are found, `right`
how many of the ten found show the query's object, and `right exact` how many of the exact ten do.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import faiss
import numpy as np

from recnb.retrieval.search import Index, knn, plan

KINDS, IMAGES, BLOCK = 10_000, 20, 25_000  # objects of a block


def objects(count: int, width: int) -> Iterator[np.ndarray]:
    """Yield the middles of `count` objects (B, width), in blocks."""
    rng = np.random.default_rng(0)
    kinds = rng.standard_normal((KINDS, width), dtype=np.float32)
    for start in range(0, count, BLOCK):
        size = min(BLOCK, count - start)
        yield kinds[rng.integers(KINDS, size=size)] + 0.8 * rng.standard_normal((size, width), dtype=np.float32)


def draw(count: int, width: int, queries: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the gallery (count, width), queries (Q, width), and the object that each query shows."""
    rng, gallery, first = np.random.default_rng(1), np.empty((count, width), np.float32), 0
    asked = np.sort(np.random.default_rng(2).choice(count // IMAGES, queries, replace=False))
    probes = []
    for middles in objects(count // IMAGES, width):
        rows = gallery[first * IMAGES : (first + len(middles)) * IMAGES].reshape(len(middles), IMAGES, width)
        rng.standard_normal(out=rows, dtype=np.float32)
        rows *= 0.5
        rows += middles[:, None]
        own = asked[(asked >= first) & (asked < first + len(middles))] - first
        probes.append(middles[own] + 0.5 * rng.standard_normal((len(own), width), dtype=np.float32))
        first += len(middles)
    return gallery, np.concatenate(probes), asked


def measured(count: int, width: int, factory: str, effort: int | None, queries: int = 500) -> dict:
    """Make an index of drawn vectors, ask it, and return what came of it."""
    gallery, probes, asked = draw(count - count % IMAGES, width, queries)
    exact = knn(probes, gallery, 10)[1]
    index, before, began, used = Index(factory=factory, effort=effort), held(), time.perf_counter(), time.process_time()
    index.add(gallery)
    built, worked, grown = time.perf_counter() - began, time.process_time() - used, held() - before
    faiss.omp_set_num_threads(1)
    index.search(probes[:20], 10)
    used = time.process_time()
    found = np.concatenate([index.search(probe[None], 10)[1] for probe in probes])
    asking = time.process_time() - used
    hits = [len({*one} & {*other}) for one, other in zip(found.tolist(), exact.tolist(), strict=True)]
    with tempfile.TemporaryDirectory() as folder:
        size = sum(file.stat().st_size for file in index.save(folder).glob("*.faiss"))
    return {
        "count": len(gallery),
        "width": width,
        "factory": index.factory,
        "recall@10": sum(hits) / (10 * queries),
        "right": float((found // IMAGES == asked[:, None]).mean()),
        "right exact": float((exact // IMAGES == asked[:, None]).mean()),
        "ms": 1e3 * asking / queries,
        "GB": grown / 1e9,
        "GB on disk": size / 1e9,
        "minutes": built / 60,
        "core minutes": worked / 60,
        "peak GB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9,
        "plan": plan(count, width),
    }


def held() -> int:
    """Bytes of memory that this process holds now."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--count", type=int, default=10_000_000)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--factory", default="auto", help="as faiss names a kind of index; auto is what plan says")
    parser.add_argument("--effort", type=int, help="how many lists a query visits")
    given = parser.parse_args()
    machine = {"device": f"{os.cpu_count()} cores, {platform.machine()}", "faiss": faiss.__version__}
    result = machine | measured(given.count, given.width, given.factory, given.effort)
    print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))


if __name__ == "__main__":
    main()
