"""Chapter: the loops that numba compiles, once on a machine, and that torch alone takes two to four times as long for.

Whoever needs one imports this module then: numba takes half a second to load.
"""

import numpy as np
from numba import njit


@njit(nogil=True, cache=True)
def count_rows(offset, tile, thresholds, ahead, sizes, own, order, first, last, group_order, group_first, group_last):
    """Add to `ahead` (B, R) how many negatives of a tile reach each threshold (B, R); the tile is used up.

    Args:
        offset: the gallery row of the tile's first column.
        tile: (B, C) scores.
        thresholds: (B, R), highest first.
        ahead: (B, R) int64.
        sizes: (B,) how many thresholds each query has.
        own: (B,) the gallery row of each query's own image, or -1.
        order: gallery rows by label; those of query i are order[first[i]:last[i]], ascending.
        first: (B,) see `order`.
        last: (B,) see `order`.
        group_order: gallery rows by group, likewise.
        group_first: (B,) see `group_order`.
        group_last: (B,) see `group_order`.
    """
    for i in range(len(tile)):
        _strike(tile[i], offset, order, first[i], last[i])
        _strike(tile[i], offset, group_order, group_first[i], group_last[i])
        if 0 <= own[i] - offset < tile.shape[1]:
            tile[i, own[i] - offset] = -np.inf
        if sizes[i] <= 48:
            _count_few(tile[i], thresholds[i, : sizes[i]], ahead[i])
        else:
            _count_many(tile[i], thresholds[i, : sizes[i]], ahead[i])


@njit(nogil=True, cache=True)
def _strike(scores, offset, order, first, last):
    rows = order[first:last]
    for row in rows[np.searchsorted(rows, offset) : np.searchsorted(rows, offset + len(scores))]:
        scores[row - offset] = -np.inf


@njit(nogil=True, cache=True)
def _count_few(scores, thresholds, ahead):
    for j in range(len(thresholds) - 1, -1, -1):
        threshold, count = thresholds[j], 0
        for i in range(len(scores)):  # by index: a loop over the scores themselves takes seven times as long
            if scores[i] >= threshold:
                count += 1
        if count == 0:
            break  # the thresholds before this one are higher
        ahead[j] += count


@njit(nogil=True, cache=True)
def _count_many(scores, thresholds, ahead):
    rising, reached = -thresholds, np.zeros(len(thresholds), np.int64)
    for x in scores:
        if x >= thresholds[-1]:
            reached[np.searchsorted(rising, -x)] += 1  # the first threshold, the highest, that it reaches
    ahead[: len(thresholds)] += np.cumsum(reached)


@njit(nogil=True, cache=True)
def subtract_shared(starts, columns, values, item_starts, items, item_values, weight, result):
    """Turn Jaccard distances of 1, times weight, in `result` (B, G) into those of sparse rows, in place.

    Args:
        starts: with `columns` and `values` the sparse rows (B, N) of the queries, as scipy's CSR has them.
        columns: see `starts`.
        values: see `starts`.
        item_starts: with `items` and `item_values` the sparse rows (G, N) of the gallery, as scipy's CSC has them.
        items: see `item_starts`.
        item_values: see `item_starts`.
        weight: of the Jaccard distance.
        result: (B, G) float32.
    """
    for i in range(len(result)):
        shared = np.zeros(result.shape[1], np.float32)
        for place in range(starts[i], starts[i + 1]):
            column, value = columns[place], values[place]
            for j in range(item_starts[column], item_starts[column + 1]):
                shared[items[j]] += min(value, item_values[j])
        result[i] -= weight * shared / (np.float32(2) - shared)
