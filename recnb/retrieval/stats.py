"""Chapter: is the difference real?

A metric over a few thousand queries is an estimate. These functions say how sure one can be of it, from the values per
query that `retrieval_metrics(per_query=True)` returns: `arrays["AP"][arrays["valid"]]`. Queries of one identity rise
and fall together, so that resampling single queries promises too much: give the identities as `clusters`.
"""

import numpy as np
from scipy import stats

from recnb.retrieval.scores import Array, to_numpy


def bootstrap_interval(
    values: Array, clusters: Array | None = None, confidence: float = 0.95, samples: int = 2000, seed: int = 0
) -> dict[str, float]:
    """Return a mean and its percentile bootstrap interval (Efron, Annals of Statistics 1979).

    Args:
        values: (n,) one number per query.
        clusters: (n,) integers or strings, drawn whole; None: every query is its own cluster.
        confidence: share of the resampled means that the interval holds.
        samples: how often the clusters are drawn.
        seed: of the draws; the same seed gives the same interval.

    Returns:
        "mean", "low" and "high"; the last two are nan where one cluster is all there is, which says nothing about
        others.

    Raises:
        ValueError: There is no value, one is not finite, or the clusters are not as many.
    """
    checked = _checked(values)
    sums, counts = _by_cluster(checked, clusters)
    low = high = np.nan
    if len(sums) > 1:
        low, high = stats.bootstrap(
            (sums, counts),
            lambda sums, counts, axis: sums.sum(axis) / counts.sum(axis),
            n_resamples=samples,
            batch=max(1, (1 << 20) // len(sums)),  # scipy's default draws all at once
            paired=True,
            confidence_level=confidence,
            method="percentile",
            rng=np.random.default_rng(seed),
        ).confidence_interval
    return {"mean": float(checked.mean()), "low": float(low), "high": float(high)}


def paired_difference(
    before: Array,
    after: Array,
    clusters: Array | None = None,
    confidence: float = 0.95,
    samples: int = 2000,
    seed: int = 0,
) -> dict[str, float]:
    """Return how much better `after` is than `before` on the same queries, with an interval and a p-value.

    The interval is the bootstrap's. The two-sided p-value is the paired randomisation test's, which swaps the two
    models at random within each query or cluster (Smucker, Allan and Carterette, CIKM 2007).

    Args:
        before: (n,) one number per query, such as its average precision under the first model.
        after: (n,) the same of the second model, in the same order.
        clusters: (n,) integers or strings, such as the queries' identities, drawn and swapped whole.
        confidence: as in `bootstrap_interval`; `samples` and `seed` too.
        samples: see `confidence`.
        seed: see `confidence`.

    Returns:
        "difference" (mean of after - before), "low", "high" and "p_value". The difference is shown at this confidence
        where low > 0 or high < 0; of a single cluster nothing is shown: low and high are nan and p_value is 1.

    Raises:
        ValueError: The two do not have the same queries, or a value is not finite.
    """
    first, second = _checked(before), _checked(after)
    if first.shape != second.shape:
        raise ValueError(f"a paired comparison needs the same queries: got {len(first)} and {len(second)} values")
    change = second - first
    interval = bootstrap_interval(change, clusters, confidence, samples, seed)
    sums, _ = _by_cluster(change, clusters)
    p_value = 1.0 if len(sums) == 1 else _swapping_test(sums, samples, seed)
    return {"difference": interval.pop("mean"), **interval, "p_value": p_value}


def _swapping_test(sums: np.ndarray, samples: int, seed: int) -> float:
    """Return the two-sided p-value of changes whose signs could as well be the other way round."""
    test = stats.permutation_test(
        (sums,),
        lambda sums, axis: sums.sum(axis),
        permutation_type="samples",
        n_resamples=samples,
        batch=max(1, (1 << 20) // len(sums)),
        rng=np.random.default_rng(seed),
    )
    return float(test.pvalue)


def _by_cluster(values: np.ndarray, clusters: Array | None) -> tuple[np.ndarray, np.ndarray]:
    """Return the sum and the number of the values of each cluster."""
    if clusters is None:
        return values, np.ones(len(values))
    codes = np.unique(to_numpy(clusters), return_inverse=True)[1]
    if len(codes) != len(values):
        raise ValueError(f"there are {len(values)} values but {len(codes)} clusters: one is needed for each value")
    return np.bincount(codes, values), np.bincount(codes)


def _checked(values: Array) -> np.ndarray:
    found = to_numpy(values).astype(np.float64)
    if found.ndim != 1 or not len(found) or not np.isfinite(found).all():
        raise ValueError(f"values must be a non-empty list of finite numbers, one per query; got shape {found.shape}")
    return found
