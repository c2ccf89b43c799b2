"""Chapter: who matches whom?

The protocol, for a query with identity y:
    positives   gallery items with identity y, less those that leave the ranking
    negatives   gallery items with another identity, less those that leave the ranking
    leaving     the query's own image (by index, never by position); items with the same identity AND the same camera;
                items of the query's group (any identity), where groups are given
A query without a positive is left out of every mean, and counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from recnb.retrieval.scores import Array, Rows, pair, to_numpy

Pair = tuple[np.ndarray, np.ndarray]  # integer codes of the queries (Q,) and of the gallery (G,)
Given = tuple[Array | None, Array | None]  # what a caller gave for the queries and for the gallery


def codes(query: Array | None, gallery: Array | None, name: str) -> Pair | None:
    """Return integer codes (Q,) and (G,) of values that are integers of any size or strings; None for None.

    Args:
        query: (Q,) values, or None.
        gallery: (G,) values, or None.
        name: what messages call them.

    Raises:
        ValueError: One side alone is given, or the two are not of one kind.
    """
    if query is None and gallery is None:
        return None
    if query is None or gallery is None:
        raise ValueError(f"{name} must be given for both the queries and the gallery, or for neither")
    both = [_labels(values, name) for values in (query, gallery)]
    if both[0].dtype != object and both[1].dtype != object and np.result_type(*both).kind == "f":
        both = [values.astype(object) for values in both]  # int64 beside uint64: numpy would make floats of them
    text = {v.dtype.kind in "US" or (v.dtype == object and isinstance(v[0], str)) for v in both if len(v)}
    if len(text) == 2:
        raise ValueError(f"{name} are strings on one side and integers on the other: give both sides the same kind")
    return _numbered(*both)


def _numbered(query: np.ndarray, gallery: np.ndarray) -> Pair:
    flat = np.unique(np.concatenate([query, gallery]), return_inverse=True)[1].reshape(-1)
    return flat[: len(query)], flat[len(query) :]


def _labels(values: Array, name: str) -> np.ndarray:
    values = to_numpy(values)
    if values.ndim != 1:
        raise ValueError(f"{name} must be one-dimensional; got shape {values.shape}")
    whole = values.dtype.kind in "iubUS" or (
        values.dtype == object
        and len({isinstance(v, str) for v in values}) < 2
        and all(isinstance(v, (str, int, np.integer)) for v in values)
    )
    if not whole and len(values):
        raise ValueError(f"{name} must be integers or strings; got {values.dtype} (floats lose large integers)")
    return values


def compared(
    query: Array,
    gallery: Array | None,
    distance: str,
    device: str | torch.device | None,
    exclude_self: bool | Array,
    labels: Given,
    cameras: Given,
    groups: Given,
) -> tuple[Rows, Rows, Protocol]:
    """Return both sides of a comparison, made ready and checked, and who matches whom.

    Args:
        query: (Q, D) embeddings.
        gallery: (G, D) embeddings; None: the queries are it, with their own values.
        distance: as in `Rows`; `device` too.
        device: see `distance`.
        exclude_self: as in `recnb.retrieval.retrieval_metrics`.
        labels: (of the queries, of the gallery), each a sequence or None; `cameras` and `groups` likewise.
        cameras: see `labels`.
        groups: see `labels`.

    Raises:
        ValueError: Numbers or dimensions disagree, labels are missing, or a row is not finite.
    """
    if gallery is None:
        labels, cameras, groups = ((own, own) for own, _ in (labels, cameras, groups))
    items = len(query if gallery is None else gallery)
    protocol = make_protocol(len(query), items, exclude_self, gallery is None, labels, cameras, groups)
    return *pair(query, gallery, distance, device), protocol


def make_protocol(
    queries: int,
    items: int,
    exclude_self: bool | Array,
    same: bool,
    labels: Given,
    cameras: Given = (None, None),
    groups: Given = (None, None),
) -> Protocol:
    """Return the `Protocol` of so many queries and gallery items.

    Args:
        queries: Q.
        items: G.
        exclude_self: as in `retrieval_metrics`.
        same: whether the queries are the gallery, each then without itself.
        labels: (of the queries, of the gallery); `cameras` and `groups` likewise, each None where there are none.
        cameras: see `labels`.
        groups: see `labels`.

    Raises:
        ValueError: Numbers disagree, labels are missing, or no query has a positive.
    """
    given = {"labels": labels, "cameras": cameras, "groups": groups}
    pairs = {name: codes(*values, name) for name, values in given.items()}
    for name, values in pairs.items():
        if values is not None and (len(values[0]), len(values[1])) != (queries, items):
            raise ValueError(
                f"there are {queries} queries and {items} gallery items, but {len(values[0])} query {name}"
                f" and {len(values[1])} gallery {name}"
            )
    label, camera, group = pairs.values()
    if label is None or not queries or not items:
        raise ValueError(
            f"query_labels and gallery_labels are needed, and images on both sides: there are {queries} "
            f"queries and {items} gallery items"
        )
    return Protocol(label, camera, group, _own_rows(exclude_self, queries, items, same))


def _own_rows(exclude_self: bool | Array, queries: int, items: int, same: bool) -> np.ndarray:
    """The gallery row of each query's own image (Q,), -1 for none, from what the caller gave as `exclude_self`."""
    if not isinstance(exclude_self, (bool, np.bool_)):
        own = to_numpy(exclude_self)
        if own.shape != (queries,) or own.dtype.kind not in "iu" or own.min() < -1 or own.max() >= items:
            raise ValueError(f"exclude_self must be True, False or {queries} gallery rows from -1 to {items - 1}")
        return own.astype(np.int64)
    if exclude_self and queries != items:
        raise ValueError(
            f"exclude_self=True needs query i to be gallery item i, but there are {queries} queries and "
            f"{items} gallery items: give the row number of each query's own image instead (-1: none)"
        )
    return np.arange(queries) if exclude_self or same else np.full(queries, -1)


@dataclass
class Members:
    """Gallery rows by code: those of code c are order[start[c]:start[c + 1]], ascending."""

    order: np.ndarray
    start: np.ndarray

    @classmethod
    def of(cls, pair: Pair) -> Members:
        """Return the members of each code of the gallery."""
        query, gallery = pair
        count = max(query.max(initial=0), gallery.max(initial=0)) + 1
        start = np.concatenate([[0], np.cumsum(np.bincount(gallery, minlength=count))])
        return cls(np.argsort(gallery, kind="stable"), start)

    def bounds(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return order, and the first and last + 1 place in it of each code."""
        return self.order, self.start[wanted], self.start[wanted + 1]

    def rows(self, wanted: np.ndarray) -> np.ndarray:
        """Return the rows of several codes, one after another."""
        return np.concatenate([self.order[self.start[c] : self.start[c + 1]] for c in wanted])


@dataclass
class Protocol:
    """Who is whose positive: pairs of integer codes ((Q,), (G,)) or None, and own images (Q,), rows or -1."""

    label: Pair
    camera: Pair | None
    group: Pair | None
    own: np.ndarray
    positives: np.ndarray = field(init=False)  # (Q,) how many each query has
    valid: np.ndarray = field(init=False)  # (Q,) has it any

    def __post_init__(self) -> None:
        self.by_label = Members.of(self.label)
        self.by_group = Members.of(self.group) if self.group else None
        self.positives = self._count()
        self.valid = self.positives > 0
        if not self.valid.any():
            raise ValueError(
                "no query has a positive in the gallery (same identity, another image, another camera): "
                "check the labels, the cameras and how the data were split"
            )

    def _count(self) -> np.ndarray:
        """Positives by counting codes: same label, less same camera, less same group, less the own image."""
        count = _matches(self.label)
        own_counts = (self.own >= 0) & (self.label[0] == self.label[1][self.own])
        for other in filter(None, (self.camera, self.group)):
            count -= _matches(_joint(self.label, other))
            own_counts &= other[0] != other[1][self.own]
        if self.camera and self.group:
            count += _matches(_joint(_joint(self.label, self.camera), self.group))
        return count - own_counts


def _matches(pair: Pair) -> np.ndarray:
    query, gallery = pair
    return np.bincount(gallery, minlength=query.max() + 1)[query]


def _joint(first: Pair, second: Pair) -> Pair:
    width = max(second[0].max(), second[1].max()) + 1
    return _numbered(first[0] * width + second[0], first[1] * width + second[1])
