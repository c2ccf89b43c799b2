"""What exact retrieval costs here, as ratios to the bare matrix product in the same process.

    python benchmarks/retrieval.py                  all parts, each in a process of its own (about 10 minutes, 2 cores)
    python benchmarks/retrieval.py metrics 128      one part, with its numbers

Run it on an idle machine: beside other work the ratios are worthless. Times are the best of three, in seconds; memory
is what the process grew by over its inputs, in MB.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from recnb.retrieval.metrics import ranking_metrics, retrieval_metrics
from recnb.retrieval.rerank import KReciprocal
from recnb.retrieval.search import Index, knn
from recnb.retrieval.verification import verification_metrics

ITEMS, IDENTITIES = 60_500, 11_318  # Stanford Online Products' test set


def embeddings(count, width, noise=1.5, dtype=np.float32):
    """Unit vectors around one centre per identity, as hard as a good model's on products; and their labels."""
    rng = np.random.default_rng(0)
    labels = np.arange(count) % max(1, count * IDENTITIES // ITEMS)
    centres = rng.standard_normal((labels.max() + 1, width), dtype=np.float32)
    x = centres[labels] + noise * rng.standard_normal((count, width), dtype=np.float32)
    return (x / np.linalg.norm(x, axis=1, keepdims=True)).astype(dtype), labels


def bare_product(x, queries=256, columns=None):
    """All scores, a block at a time into one buffer, and nothing done with them."""
    x = torch.from_numpy(x)
    columns = columns or len(x)
    buffer = torch.empty(queries * columns)
    for i in range(0, len(x), queries):
        for j in range(0, len(x), columns):
            left, right = x[i : i + queries], x[j : j + columns]
            torch.mm(left, right.T, out=buffer[: len(left) * len(right)].view(len(left), len(right)))


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def metrics(width, items=ITEMS, rounds=3):
    """Self-retrieval of SOP's shape: eleven metrics against the bare product, taken in turns."""
    x, labels = embeddings(items, width)
    run = lambda: retrieval_metrics(x, None, labels, topk=(1, 10, 100, 1000))  # noqa: E731
    retrieval_metrics(x[:2000], None, labels[:2000] // 2)
    before = peak()
    found = run()
    memory = peak() - before
    ours, bare = [], []
    for _ in range(rounds):
        bare.append(min(seconds(lambda: bare_product(x)), seconds(lambda: bare_product(x, 512, 4096))))
        ours.append(seconds(run))
    return {
        "bare": min(bare),
        "recnb": min(ours),
        "ratio": min(ours) / min(bare),
        "MB": memory,
        "recall1": found["recall1"],
        "mAP": found["mAP"],
    }


def neighbours(width, items=ITEMS):
    """The 10 nearest of each, torch and faiss, and verification over all pairs."""
    x, labels = embeddings(items, width)
    return {
        "bare": seconds(lambda: bare_product(x)),
        "knn": seconds(lambda: knn(x, None, 10)),
        "knn faiss": seconds(lambda: Index(factory="Flat").add(x).search(x, 11)),
        "verification": seconds(lambda: verification_metrics(x, None, labels)),
    }


def accuracy_calculator(width, items=ITEMS):
    """pytorch-metric-learning's four metrics with k = max_bin_count, where it is installed."""
    try:
        from pytorch_metric_learning.utils.accuracy_calculator import AccuracyCalculator
    except ImportError:
        return {"skipped": "pytorch-metric-learning is not installed"}
    x, labels = embeddings(items, width)
    calculator = AccuracyCalculator(
        k="max_bin_count",
        include=("precision_at_1", "r_precision", "mean_average_precision_at_r", "mean_average_precision"),
    )
    before = peak()
    took = seconds(lambda: calculator.get_accuracy(torch.from_numpy(x), torch.from_numpy(labels)))
    memory = peak() - before
    return {
        "pytorch-metric-learning": took,
        "MB": memory,
        "recnb": min(seconds(lambda: retrieval_metrics(x, None, labels)) for _ in range(2)),
    }


def streamed(width=128, queries=10_000, items=1_000_000):
    """A gallery of a million read from a file: the whole process stays under 2 GB."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "gallery.npy")
        gallery = np.lib.format.open_memmap(path, "w+", np.float32, (items, width))
        for start in range(0, items, 50_000):
            gallery[start : start + 50_000] = embeddings(50_000, width)[0]
        gallery.flush()
        gallery = np.load(path, mmap_mode="r")
        labels = np.arange(items) // 5
        took = seconds(
            lambda: retrieval_metrics(
                gallery[:queries], gallery, labels[:queries], labels, exclude_self=np.arange(queries)
            )
        )
    return {"seconds": took, "process MB": peak()}


def rerank(count=10_000, width=128):
    """k-reciprocal distances of all against all, in blocks."""
    x, _ = embeddings(count, width)
    KReciprocal(x[:100]).distances(np.arange(3))
    before = peak()
    took = seconds(lambda: _all_distances(x))
    return {
        "recnb": took,
        "MB": peak() - before,
        "best of three": min(took, *(seconds(lambda: _all_distances(x)) for _ in range(2))),
    }


def _all_distances(x):
    lazy = KReciprocal(x)
    for start in range(0, len(x), 500):
        lazy.distances(np.arange(start, min(start + 500, len(x))))


def rerank_dense(count=10_000, width=128):
    """The same as it is usually written: dense matrices of all pairs, loops over images."""
    x, _ = embeddings(count, width)
    before = peak()
    return {"dense numpy": seconds(lambda: dense_k_reciprocal(x, 20, 6, 0.3)), "MB": peak() - before}


def dense_k_reciprocal(x, k1, k2, lambda_value):
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017) with N x N matrices in float32."""
    apart = 2 - 2 * x @ x.T
    apart /= apart.max(axis=1, keepdims=True)
    order = np.argsort(apart, axis=1).astype(np.int32)
    weights, half = np.zeros_like(apart), int(np.around(k1 / 2))
    mutual = lambda i, k: order[i, : k + 1][(order[order[i, : k + 1], : k + 1] == i).any(1)]  # noqa: E731
    for i in range(len(x)):
        near = mutual(i, k1)
        members = [near]
        for j in near:
            further = mutual(j, half)
            if len(np.intersect1d(further, near)) > 2 / 3 * len(further):
                members.append(further)
        members = np.unique(np.concatenate(members))
        weight = np.exp(-apart[i, members])
        weights[i, members] = weight / weight.sum()
    weights = np.stack([weights[order[i, :k2]].mean(0) for i in range(len(x))])
    owners = [np.flatnonzero(weights[:, j]) for j in range(len(x))]
    result = np.empty_like(apart)
    for i in range(len(x)):
        shared = np.zeros(len(x), np.float32)
        for j in np.flatnonzero(weights[i]):
            shared[owners[j]] += np.minimum(weights[i, j], weights[owners[j], j])
        result[i] = (1 - lambda_value) * (1 - shared / (2 - shared)) + lambda_value * apart[i]
    return result


def rerank_large(queries=11_659, items=82_161, width=256):
    """MSMT17's size: re-ranked metrics without a matrix of all pairs."""
    x, labels = embeddings(queries + items, width)
    before = peak()
    start = time.perf_counter()
    lazy = KReciprocal(x[:queries], x[queries:])
    built = time.perf_counter() - start
    found = ranking_metrics(lazy, labels[:queries], labels[queries:])
    plain = retrieval_metrics(x[:queries], x[queries:], labels[:queries], labels[queries:])
    return {
        "build": built,
        "build and evaluate": time.perf_counter() - start,
        "MB": peak() - before,
        "mAP before": plain["mAP"],
        "mAP after": found["mAP"],
    }


PARTS = {
    part.__name__: part
    for part in (metrics, neighbours, accuracy_calculator, streamed, rerank, rerank_dense, rerank_large)
}
ALL = [
    ("metrics", 128),
    ("metrics", 512),
    ("neighbours", 128),
    ("accuracy_calculator", 128),
    ("streamed",),
    ("rerank", 10_000),
    ("rerank_dense", 10_000),
    ("rerank", 20_000),
    ("rerank_large",),
]


def main(arguments):
    if arguments:
        result = PARTS[arguments[0]](*map(int, arguments[1:]))
        print(json.dumps({key: round(v, 4) if isinstance(v, float) else v for key, v in result.items()}))
        return
    load = Path("/proc/loadavg")
    print(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads,",
        f"load before: {load.read_text().split()[0]}" if load.exists() else "",
    )
    for part in ALL:
        command = [sys.executable, __file__, *map(str, part)]
        print(" ".join(map(str, part)), flush=True, end=": ")
        print(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip().split("\n")[-1])


if __name__ == "__main__":
    main(sys.argv[1:])
