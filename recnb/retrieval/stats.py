"""Chapter: is the difference real?

A metric over a few thousand queries is an estimate. These functions say how sure one can be of it, from the per-query
values that `retrieval_metrics(per_query=True)` returns: `arrays["AP"][arrays["valid"]]`. Queries of one identity rise
and fall together, so that resampling single queries promises too much: give the identities as `clusters`.
"""

from __future__ import annotations

import numpy as np

from recnb.retrieval.scores import spans, to_numpy


def bootstrap_interval(values, clusters=None, confidence=0.95, samples=2000, seed=0):
    """A dict with "mean", "low" and "high": the mean and its percentile bootstrap interval (Efron 1979).

    values (n,): one number per query. clusters (n,): resampled whole; None: every query is its own.
    Raises ValueError where there is no value, or one that is not finite.
    """
    means = _resampled_means(_checked(values), clusters, samples, seed)
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return {"mean": float(np.mean(to_numpy(values))), "low": float(low), "high": float(high)}


def paired_difference(first, second, clusters=None, confidence=0.95, samples=2000, seed=0):
    """A dict with "difference" (mean of second - first), "low", "high" and "p_value", for two models, same queries.

    The interval is the bootstrap's; the two-sided p-value is the paired randomisation test's, which swaps the models
    at random within each query or cluster (Smucker, Allan and Carterette, CIKM 2007).
    Raises ValueError where the two do not have the same queries, or a value is not finite.
    """
    first, second = _checked(first), _checked(second)
    if first.shape != second.shape:
        raise ValueError(f"a paired comparison needs the same queries: got {len(first)} and {len(second)} values")
    change = second - first
    interval = bootstrap_interval(change, clusters, confidence, samples, seed)
    sums, _ = _by_cluster(change, clusters)
    rng, extreme = np.random.default_rng(seed), 0
    for part in _parts(samples, len(sums)):
        signs = rng.integers(0, 2, (part, len(sums)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ sums) >= abs(sums.sum()) - 1e-9 * np.abs(sums).sum()).sum())
    return {
        "difference": interval["mean"],
        "low": interval["low"],
        "high": interval["high"],
        "p_value": (extreme + 1) / (samples + 1),
    }


def _resampled_means(values, clusters, samples, seed):
    sums, counts = _by_cluster(values, clusters)
    rng, means = np.random.default_rng(seed), []
    for part in _parts(samples, len(sums)):
        picked = rng.integers(0, len(sums), (part, len(sums)))
        means.append(sums[picked].sum(1) / counts[picked].sum(1))
    return np.concatenate(means)


def _parts(samples, width):
    return [part.stop - part.start for part in spans(samples, max(1, (1 << 20) // width))]


def _by_cluster(values, clusters):
    if clusters is None:
        return values, np.ones(len(values))
    clusters = np.unique(to_numpy(clusters), return_inverse=True)[1]
    if len(clusters) != len(values):
        raise ValueError(f"there are {len(values)} values but {len(clusters)} clusters: one is needed for each value")
    return np.bincount(clusters, values), np.bincount(clusters)


def _checked(values):
    values = to_numpy(values).astype(np.float64)
    if values.ndim != 1 or not len(values) or not np.isfinite(values).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, one per query; got shape {values.shape}")
    return values
