"""Chapter: search among vectors that stay.

An `Index` keeps a faiss index together with what faiss forgets: the user's columns (path, label), which model made the
vectors, how they are compared, and how much an approximate index misses. Scores are those of `knn`.

`plan` says which index suits so many vectors, and what it holds and reads, by arithmetic; the kinds and their numbers
are those of faiss's own guide (https://github.com/facebookresearch/faiss/wiki, "Guidelines to choose an index"). Past
one machine, hand the vectors over to an engine: `Index.to_parquet`.
"""

from __future__ import annotations

import re
from itertools import compress
from pathlib import Path
from typing import Any

import faiss
import numpy as np
from torch import Tensor

from recnb.retrieval.exchange import read_parquet, sealed, sha256, unsealed, write_parquet
from recnb.retrieval.neighbours import knn, merge
from recnb.retrieval.scores import DISTANCES, Array, Rows, spans, to_numpy

EXACT = 1_000_000  # below, one core compares a query with all of 128 dimensions in 50 ms
WHOLE = 10_000_000  # below, lists hold whole vectors; from here on, codes
POINTS = 40  # vectors for each list to train on: faiss asks for 30 to 256
LINKS = 32  # of a vertex in HNSW
PADDED = 16  # codes that a list lacks on average to blocks of 32, in which they are kept
STREAMED, VISITED = 10e9, 1.5e9  # bytes a second of one core: in a row, and list by list (faiss's log of Deep1B)
WALK = 16  # centres that are looked at to file a vector where a graph finds them, as faiss has it


def auto_factory(count: int, dimension: int, distance: str = "cosine") -> str:
    """Return the faiss factory string that suits so many vectors: exact, then lists of vectors, then lists of codes.

    Args:
        count: how many vectors.
        dimension: of a vector; of bits, in bytes.
        distance: as in `recnb.retrieval.Index`.
    """
    if distance == "hamming":
        return "BFlat"
    if count < EXACT:
        return "Flat"
    if count < WHOLE:
        return f"IVF{int(4 * count**0.5)},Flat"
    pieces = max(1, min(64, dimension // 2))  # of 4 bits each
    width = pieces * max(1, min(4, dimension // pieces))
    lists = 1 << int(16 * count**0.5).bit_length()
    return f"OPQ{pieces}_{width},IVF{lists}_HNSW{LINKS},PQ{pieces}x4fsr"


def probes(lists: int) -> int:
    """Return how many of an index's lists a query visits unless `effort` says otherwise."""
    return min(lists, max(8, min(256, lists // 16)))


def plan(count: int, dimension: int) -> dict[str, str | float]:
    """Return what an index of so many float32 vectors costs, by arithmetic.

    Args:
        count: how many vectors.
        dimension: of a vector.

    Returns:
        The `factory`; `GB` of memory, ids included and the user's columns not; `MB read` for a query; `ms` of one
        core for it where all is in memory.
    """
    factory, size = auto_factory(count, dimension), 4 * dimension
    if factory == "Flat":
        return costs(factory, count * (size + 8), count * size, STREAMED)
    lists = int(re.findall(r"IVF(\d+)", factory)[0])
    share = count * probes(lists) / lists  # vectors in the lists that are visited
    if factory.endswith("Flat"):
        return costs(factory, count * (size + 8) + lists * size, lists * size + share * size, STREAMED)
    pieces, width = map(int, re.findall(r"OPQ(\d+)_(\d+)", factory)[0])
    centre = 4 * width + 8 * LINKS + PADDED * pieces / 2
    walked = 2 * probes(lists) * LINKS * 4 * width
    return costs(factory, count * (pieces / 2 + 8) + lists * centre, walked + share * pieces / 2, VISITED)


def costs(factory: str, held: float, read: float, speed: float) -> dict[str, str | float]:
    """Return a row of `plan`.

    Args:
        factory: the kind of index.
        held: bytes of memory.
        read: bytes that a query reads.
        speed: bytes that a core reads in a second.
    """
    return {"factory": factory, "GB": held / 1e9, "MB read": read / 1e6, "ms": 1e3 * read / speed}


def centres_of(x: np.ndarray, count: int, spherical: bool) -> np.ndarray:
    """Return the centres (count, D) of clusters of vectors, found in two steps: groups, then the clusters of each.

    With 65,536 clusters that is a hundredth of the work of one step.

    Args:
        x: (N, D) float32, at least as many as clusters.
        count: how many clusters.
        spherical: whether centres are of length 1.
    """

    def clustered(part: np.ndarray, k: int) -> Any:
        found = faiss.Kmeans(x.shape[1], k, spherical=spherical, min_points_per_centroid=1)
        found.train(part)
        return found

    group = clustered(x, int(count**0.5)).assign(x)[1]
    ends = np.cumsum(np.bincount(group))
    parts = np.split(np.argsort(group, kind="stable"), ends[:-1])
    shares = np.diff(ends * count // len(x), prepend=0)  # a group gets its share of the clusters
    return np.concatenate([clustered(x[part], k).centroids for part, k in zip(parts, shares, strict=True) if k])


class Index:
    """A faiss index with the user's ids and columns, that knows which vectors it takes and checks them.

    distance  "cosine" (vectors are normalised on the way in), "dot", "euclidean" or "hamming" (packed bits, uint8)
    factory   a faiss factory string ("Flat", "HNSW32", "IVF1024,PQ16x8", "BFlat" for bits), or "auto", by the size of
              the first `add`, as `plan` tells; bits are always exact
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
        self._walk(WALK)
        for part in spans(len(rows), 1 << 16):
            self.faiss.add_with_ids(self._ready(rows, part), ids[part].astype(np.int64))
        self._walk()
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
        """Return scores (Q, k) and ids (Q, k), best first, equal scores by id; -infinity and -1 where there is none.

        Args:
            query: (Q, D).
            k: how many neighbours.
            model: the fingerprint of the model that made the queries, compared with the index's.

        Raises:
            ValueError: The index is empty, or dimensions or the model are others.
        """
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
        """Return the index saved in a folder.

        Args:
            path: the folder.
            dimension: of the vectors that are going to be searched, where that is known.
            model: the fingerprint of the model that makes them, where that is known.

        Raises:
            ValueError: The index is damaged, or of another dimension or model.
        """
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
        state = unsealed(folder / "index.json")
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
        if not isinstance(self.columns, dict) or not isinstance(self.info, dict):
            raise ValueError("index.json: columns and info must be mappings")
        for name, values in self.columns.items():
            if not isinstance(values, list) or len(values) != len(self.ids):
                raise ValueError(f"index.json: column {name} does not have a value for each of the {len(self.ids)} ids")
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
        vectors = self._ready(rows, np.sort(sample))
        if "_HNSW" in self.factory:
            self._find_centres(vectors)
        self.faiss.train(vectors)

    def _find_centres(self, x: np.ndarray) -> None:
        """Give the lists their centres, which faiss would look for by comparing each vector with each of them."""
        lists: Any = faiss.extract_index_ivf(self.faiss)
        before: Any = getattr(self.faiss, "chain", None)  # what is done to vectors first
        for step in () if before is None else map(before.at, range(before.size())):
            step.train(x)
            x = step.apply(x)
        lists.quantizer.add(centres_of(x, lists.nlist, spherical=self.distance != "euclidean"))

    def _walk(self, width: int | None = None) -> None:
        """Set how many centres are looked at where a graph finds them; None: twice as many as lists are visited."""
        if "_HNSW" in self.factory:
            width = width or 2 * faiss.extract_index_ivf(self.faiss).nprobe
            faiss.ParameterSpace().set_index_parameter(self.faiss, "quantizer_efSearch", width)

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
