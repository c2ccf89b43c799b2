"""Chapter: nearest neighbours.

`knn` answers exactly, in blocks, whatever the size of the gallery. `Index` keeps a faiss index together with what
faiss forgets: the user's columns (path, label), which model made the vectors, how they are compared, and how much an
approximate index misses. Both give higher scores to better matches: the cosine, the dot product, minus the Euclidean
distance, or minus the number of bits that differ.

Which index suits how many vectors, and what it costs, is told by `sizes.plan`. Past one machine, split the gallery in
shards, search each, and `merge`, or hand it over to an engine: `Index.to_parquet`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import compress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
import torch
from torch import Tensor

from recnb.retrieval.exchange import check_columns, read_parquet, sealed, sha256, unsealed, write_parquet
from recnb.retrieval.scores import DISTANCES, MEMORY, Array, Rows, exact, pair, spans, to_numpy
from recnb.retrieval.sizes import POINTS, auto_factory, probes


def knn(
    query: Array,
    gallery: Array | None = None,
    k: int = 10,
    distance: str = "cosine",
    exclude: Array | None = None,
    device: str | torch.device | None = None,
    memory: int = MEMORY,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the k best matches of each query, exact, best first, equal scores in the order of the gallery.

    Args:
        query: (Q, D) numpy array (memory-mapped too) or tensor.
        gallery: (G, D) likewise; None: the queries are their own gallery, each without itself.
        k: how many; beyond the gallery's size all of it.
        distance: "cosine", "dot", "euclidean" or "hamming".
        exclude: (Q,) one gallery row that each query may not find, -1 for none.
        device: where to compute; by default where the query is.
        memory: bytes of working memory.

    Returns:
        Scores (Q, k) float32, minus the distance for "euclidean" and "hamming", and gallery rows (Q, k) int64.

    Raises:
        ValueError: The input is empty, mismatched or not finite.
    """
    left, right = pair(query, gallery, distance, device)
    if exclude is None and right is left:
        exclude = np.arange(len(left))
    exclude = None if exclude is None else torch.as_tensor(to_numpy(exclude).astype(np.int64), device=left.device)
    if k < 1 or (exclude is not None and exclude.shape != (len(left),)):
        raise ValueError(f"k must be at least 1 (got {k}) and exclude must have one row number for each query")
    k = min(k, len(right) - (exclude is not None))
    if k < 1:
        raise ValueError("the gallery holds nothing but the query itself, so there is no neighbour to find")
    found = []
    with exact(left.device):
        for rows in spans(len(left), max(1, min(1024, memory // (64 * k)))):
            scores, ids, _ = nearest(left, right, rows, k, None if exclude is None else exclude[rows], memory)
            found.append(_user_scores(left, right, rows, scores, ids))
    scores, ids = (torch.cat(part) for part in zip(*found, strict=True))
    return scores.cpu().numpy(), ids.cpu().numpy()


def nearest(
    query: Rows, gallery: Rows, rows: slice, k: int, exclude: Tensor | None, memory: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores (B, k) and gallery rows (B, k) of some queries' best matches, and their lowest scores (B,).

    Args:
        query: the queries, made ready.
        gallery: the gallery, made ready.
        rows: which queries.
        k: how many matches.
        exclude: (B,) one gallery row that each query may not find, or None.
        memory: bytes of working memory.
    """
    left = query.queries(rows)
    best = left.new_zeros(len(left), 0), torch.zeros(len(left), 0, dtype=torch.int64, device=left.device)
    lowest = left.new_full((len(left),), torch.inf)
    width = min(max(2 * k, memory // (16 * len(left))), max(k, memory // (16 * gallery.width)))
    for columns in spans(len(gallery), width):
        tile = left @ gallery.gallery(columns).T
        lowest = torch.minimum(lowest, tile.amin(1))
        if exclude is not None:
            own = exclude - columns.start
            inside = ((own >= 0) & (own < tile.shape[1])).nonzero()[:, 0]
            tile[inside, own[inside]] = -torch.inf
        best = _merged(best, _best(tile, min(k, tile.shape[1]), columns.start), k)
    return *best, lowest


def _best(tile: Tensor, k: int, offset: int) -> tuple[Tensor, Tensor]:
    """The k best columns of each row, equal scores in the order of the columns: topk alone picks any of them."""
    scores, ids = tile.topk(min(k + 1, tile.shape[1]))
    crowded = (scores[:, k - 1] == scores[:, -1]).nonzero()[:, 0] if tile.shape[1] > k else ()
    scores, ids = scores[:, :k], ids[:, :k]
    if len(crowded):
        ranked = tile[crowded].sort(dim=1, descending=True, stable=True)
        scores[crowded], ids[crowded] = ranked.values[:, :k], ranked.indices[:, :k]
    return _in_order(scores, ids + offset)


def _in_order(scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Best score first, equal scores by id."""
    ids, order = ids.sort(dim=1)
    scores, order = scores.gather(1, order).sort(dim=1, descending=True, stable=True)
    return scores, ids.gather(1, order)


def _merged(old: tuple[Tensor, Tensor], new: tuple[Tensor, Tensor], k: int) -> tuple[Tensor, Tensor]:
    scores, order = torch.cat([old[0], new[0]], 1).sort(dim=1, descending=True, stable=True)
    return scores[:, :k], torch.cat([old[1], new[1]], 1).gather(1, order[:, :k])


def _user_scores(query: Rows, gallery: Rows, rows: slice, scores: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    if query.distance == "hamming":
        return (scores - query.width) / 2, ids
    if query.distance != "euclidean":
        return scores, ids
    left, exact = query.raw(rows), torch.empty_like(scores)
    for i in range(scores.shape[1]):  # by subtraction: the product form loses the digits of small distances
        exact[:, i] = 0 - torch.linalg.vector_norm(left - gallery.raw(ids[:, i].cpu().numpy()), dim=1)
    return _in_order(exact, ids)


def merge(results: Iterable[tuple[np.ndarray, np.ndarray]], k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return scores (Q, k) and ids (Q, k) of a gallery split in shards, from each shard's (scores, ids), best first.

    Each shard's k best hold the whole gallery's k best, so shards on any number of machines give the exact answer.
    """
    scores, ids = (np.concatenate(part, axis=1) for part in zip(*results, strict=True))
    order = np.lexsort((ids, -scores), axis=1)[:, :k]
    return np.take_along_axis(scores, order, 1), np.take_along_axis(ids, order, 1)


class Index:
    """A faiss index with the user's ids and columns, that knows which vectors it takes and checks them.

    distance  "cosine" (vectors are normalised on the way in), "dot", "euclidean" or "hamming" (packed bits, uint8)
    factory   a faiss factory string ("Flat", "HNSW32", "IVF1024,PQ16x8", "BFlat" for bits), or "auto", by the size of
              the first `add`, as `sizes.plan` tells; bits are always exact
    model     the fingerprint of the model that made the vectors; info: anything else that JSON can hold
    effort    nprobe of an IVF index (default: a sixteenth of its lists, 8 to 256), efSearch of HNSW (default 128)
    An approximate index measures at its first `add` how many of the 10 nearest neighbours it finds, prints that and
    keeps it as `recall`.
    """

    def __init__(
        self,
        distance: str = "cosine",
        factory: str = "auto",
        model: str | None = None,
        info: dict | None = None,
        effort: int | None = None,
    ):
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
        self.distance, self.factory, self.model, self.info, self.effort = distance, factory, model, info or {}, effort
        self.dimension: int = 0  # until there are vectors
        self.recall: float | None = None
        self.faiss: Any = None
        self.ids = np.zeros(0, np.int64)
        self.columns: dict[str, list] = {}

    def __len__(self) -> int:
        return len(self.ids)

    def add(self, vectors: Array, ids: Array | None = None, model: str | None = None, **columns: Array) -> Index:
        """Add vectors; return the index itself.

        Args:
            vectors: (N, D).
            ids: (N,) integers from 0; None: the next free ones.
            model: the fingerprint of the model that made the vectors, compared with the index's.
            columns: (N,) values of each.

        Raises:
            ValueError: Ids are in use already, dimensions or the model are others, or columns do not fit.
        """
        rows = Rows(vectors, self.distance, "vectors", "cpu")
        ids = self.ids.max(initial=-1) + 1 + np.arange(len(rows)) if ids is None else to_numpy(ids)
        lists = {name: to_numpy(values).tolist() for name, values in columns.items()}
        self._check(rows.array, model)
        self._check_new(len(rows), ids, lists)
        if self.faiss is None:
            self._start(rows)
        for part in spans(len(rows), 1 << 16):
            self.faiss.add_with_ids(self._ready(rows, part), ids[part].astype(np.int64))
        first, self.ids = not len(self.ids), np.concatenate([self.ids, ids.astype(np.int64)])
        self.columns = {name: self.columns.get(name, []) + values for name, values in lists.items()}
        if first and self.factory not in ("Flat", "BFlat") and len(rows) > 10:
            self._measure(rows, ids)
        return self

    def remove(self, ids: Array) -> Index:
        """Remove these ids; return the index itself. HNSW cannot forget: it is built anew from what it keeps."""
        gone = np.isin(self.ids, to_numpy(ids))
        if gone.sum() != len(np.unique(to_numpy(ids))):
            raise ValueError(f"{len(np.unique(to_numpy(ids))) - gone.sum()} of the ids to remove are not in the index")
        if "HNSW" in self.factory and "IVF" not in self.factory:
            kept = self.faiss.index.reconstruct_n(0, len(self))[~gone]
            self.faiss = self._empty()
            self.faiss.add_with_ids(kept, self.ids[~gone])
        else:
            self.faiss.remove_ids(self.ids[gone])
        self.ids = self.ids[~gone]
        self.columns = {name: [*compress(values, ~gone)] for name, values in self.columns.items()}
        return self

    def search(self, query: Array, k: int = 10, model: str | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Return scores (Q, k) and ids (Q, k), best first, equal scores by id; -infinity and -1 where there is none."""
        if not len(self):
            raise ValueError("the index is empty: add vectors before searching")
        rows = Rows(query, self.distance, "query", "cpu")
        self._check(rows.array, model)
        scores, ids = self.faiss.search(self._ready(rows, slice(None)), k)
        if self.distance in ("euclidean", "hamming"):
            scores = 0 - (scores if self.distance == "hamming" else np.sqrt(np.maximum(scores, 0)))
        return merge([(np.where(ids < 0, -np.inf, scores).astype(np.float32), ids)], k)

    def item(self, identity: int) -> dict:
        """Return the columns' values of one id, as a dict."""
        place = np.flatnonzero(self.ids == identity)
        if not len(place):
            raise ValueError(f"there is no id {identity} in the index")
        return {name: values[place[0]] for name, values in self.columns.items()}

    def to_parquet(self, path: str | Path) -> Path:
        """Write id, columns and vector as a Parquet file, in parts, for an engine to take over; return its path.

        Vectors are written as the index keeps them: at length 1 for "cosine", and as its codes say where it has codes.
        """
        lists: Any = None
        if "IVF" in self.factory:  # finds a vector by its id only with a map, and with that it could not remove any
            lists = self.faiss if self.distance == "hamming" else faiss.extract_index_ivf(self.faiss)
            lists.set_direct_map_type(faiss.DirectMap.Hashtable)  # type: ignore[attr-defined]
        try:
            parts = (self.ids[rows].tolist() for rows in spans(len(self), 1 << 14))
            vectors = (np.stack([*map(self.faiss.reconstruct, part)]) for part in parts)
            return write_parquet(path, self.ids, vectors, self.columns, self.model)
        finally:
            if lists is not None:
                lists.set_direct_map_type(faiss.DirectMap.NoMap)  # type: ignore[attr-defined]

    @classmethod
    def from_parquet(cls, path: str | Path, **options) -> Index:
        """Return the index of a Parquet file, or of a folder of them, that `to_parquet` or `recnb embed` has written.

        Args:
            path: the file or folder.
            options: what `Index` takes.
        """
        ids, vectors, columns, model = read_parquet(path)
        return cls(**{"model": model, **options}).add(vectors, ids, **columns)

    def save(self, path: str | Path) -> Path:
        """Write a folder and return it: index.json, and the faiss file it names, which faiss alone can read too.

        A reader sees the old index or the new one, never half of one: index.json is replaced last, in one step.
        """
        if not len(self):
            raise ValueError("the index is empty: there is nothing to save")
        folder = Path(path)
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / ".draft"  # one name, so that what a killed process left is written over
        try:
            self._faiss_io("write")(self.faiss, str(draft))
            digest = sha256(draft)
            draft.replace(folder / f"vectors-{digest[:16]}.faiss")
            state = {name: getattr(self, name) for name in STATE} | {"ids": self.ids.tolist(), "sha256": digest}
            draft.write_text(sealed(state))
            draft.replace(folder / "index.json")
        finally:
            draft.unlink(missing_ok=True)
        for other in folder.glob(f"vectors-{'[0-9a-f]' * 16}.faiss"):
            if other.name != f"vectors-{digest[:16]}.faiss":
                other.unlink()
        return folder

    @classmethod
    def load(cls, path: str | Path, dimension: int | None = None, model: str | None = None) -> Index:
        """Return the index saved in a folder; raise ValueError where it is damaged or of another model or size."""
        folder = Path(path)
        try:
            index = cls._read(folder)
        except Exception as error:  # JSON and faiss raise whatever a damaged file leads them to
            raise ValueError(f"{folder} holds no index that can be read: {error}; save the index again") from error
        if dimension not in (None, index.dimension):
            raise ValueError(f"the index in {folder} holds vectors of {index.dimension} dimensions, not {dimension}")
        index._check_model(model)
        return index

    @classmethod
    def _read(cls, folder: Path) -> Index:
        state = unsealed((folder / "index.json").read_bytes())
        file = folder / f"vectors-{state['sha256'][:16]}.faiss"
        if not file.exists() or sha256(file) != state["sha256"]:
            raise ValueError(f"{file} is missing or damaged")
        index = cls(state["distance"])
        for name in STATE:
            setattr(index, name, state[name])
        index.faiss, index.ids = index._faiss_io("read")(str(file)), np.array(state["ids"], dtype=np.int64)
        width = index.dimension * (8 if index.distance == "hamming" else 1)
        if (index.faiss.ntotal, index.faiss.d) != (len(index.ids), width):
            raise ValueError(f"{file} does not hold what index.json says")
        index._check_relations()
        return index

    def _check_relations(self) -> None:
        """Raise ValueError where ids, columns and vectors, each whole, do not belong together."""
        check_columns(self.columns, self.info, len(self.ids))
        mapped = getattr(self.faiss, "id_map", None)
        if mapped is not None and not np.array_equal(faiss.vector_to_array(mapped), self.ids):
            raise ValueError("index.json: the ids are not those of the vectors")
        if mapped is not None and self.factory == "Flat":
            for part in spans(len(self.ids), 1 << 16):
                if not np.isfinite(self.faiss.index.reconstruct_n(part.start, part.stop - part.start)).all():
                    raise ValueError("the vectors are not all finite")

    def _check(self, array: np.ndarray | Tensor, model: str | None) -> None:
        if self.dimension not in (0, array.shape[1]):
            raise ValueError(f"the index takes vectors of {self.dimension} dimensions; got {array.shape[1]}")
        self._check_model(model)

    def _check_model(self, model: str | None) -> None:
        if model is not None and self.model is not None and model != self.model:
            raise ValueError(f"the index holds vectors of model {self.model}, not of {model}: embed the gallery again")

    def _check_new(self, count: int, ids: np.ndarray, columns: dict[str, list]) -> None:
        if ids.shape != (count,) or ids.dtype.kind not in "iu" or len(np.unique(ids)) != count or ids.min() < 0:
            raise ValueError(f"ids must be {count} different integers from 0; got {ids.dtype} of shape {ids.shape}")
        if np.isin(ids, self.ids).any():
            raise ValueError(f"id {ids[np.isin(ids, self.ids)][0]} is in the index already: remove it first")
        if len(self) and set(columns) != set(self.columns):
            raise ValueError(f"the index has the columns {sorted(self.columns)}; got {sorted(columns)}")
        for name, values in columns.items():
            if len(values) != count:
                raise ValueError(f"column {name} has {len(values)} values for {count} vectors")

    def _start(self, rows: Rows) -> None:
        self.dimension = rows.array.shape[1]
        if self.factory == "auto":
            self.factory = auto_factory(len(rows), self.dimension, self.distance)
        self.faiss = self._empty()
        wanted = max(200_000, POINTS * int((re.findall(r"IVF(\d+)", self.factory) or [0])[0]))
        sample = np.random.default_rng(0).choice(len(rows), min(len(rows), wanted), replace=False)
        self.faiss.train(self._ready(rows, np.sort(sample)))

    def _empty(self) -> Any:
        bits = self.distance == "hamming"
        kind = faiss.METRIC_L2 if self.distance == "euclidean" else faiss.METRIC_INNER_PRODUCT
        index: Any = (
            faiss.index_binary_factory(self.dimension * 8, self.factory)
            if bits
            else faiss.index_factory(self.dimension, self.factory, kind)
        )
        if "IVF" in self.factory:  # keeps ids of its own, and an id map around it would lose count at a removal
            lists: Any = index if bits else faiss.extract_index_ivf(index)
            lists.nprobe = self.effort or probes(lists.nlist)
            if "_HNSW" in self.factory:
                faiss.ParameterSpace().set_index_parameter(index, "quantizer_efSearch", 2 * lists.nprobe)
            return index
        if "HNSW" in self.factory:
            index.hnsw.efSearch = self.effort or 128
        return faiss.IndexBinaryIDMap2(index) if bits else faiss.IndexIDMap2(index)

    def _ready(self, rows: Rows, index: slice | np.ndarray) -> np.ndarray:
        ready = {"hamming": rows.array.__getitem__, "cosine": rows.queries}.get(self.distance, rows.raw)
        return np.ascontiguousarray(to_numpy(ready(index)))

    def _measure(self, rows: Rows, ids: np.ndarray) -> None:
        sample = np.random.default_rng(0).choice(len(rows), min(len(rows), 200), replace=False)
        probe, own = to_numpy(rows.array[sample]), ids[sample][:, None]
        exact = ids[knn(probe, rows.array, 10, self.distance, exclude=sample)[1]]
        found = self.search(probe, 11)[1]
        hits = [len(set(f) - set(o) & set(e)) for f, o, e in zip(found, own, exact, strict=True)]
        self.recall = float(np.mean(hits)) / exact.shape[1]
        print(f"{self.factory}: finds {self.recall:.1%} of the exact {exact.shape[1]} nearest neighbours")

    def _faiss_io(self, verb: str) -> Any:
        return getattr(faiss, f"{verb}_index" + ("_binary" if self.distance == "hamming" else ""))


STATE = ("distance", "factory", "model", "info", "effort", "dimension", "recall", "columns")
