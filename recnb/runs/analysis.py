"""What embeddings do well and where they fail: curves, errors by identity, suspicious labels, a map.

Everything starts from an `Embeddings`: arrays from a run or from files with their labels, compared by cosine. Tables
are pandas DataFrames, figures are matplotlib's. `recnb.retrieval.protocol` says what counts. Ranks and pairs are
counted block by block, without a (Q, G) matrix; they are exact, none is left out or sampled.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.data.lists import ImageList, own_index
from recnb.data.loaders import ImageLoader
from recnb.gallery.curves import draw_ap, draw_cmc, draw_pairs, plots
from recnb.gallery.pictures import label_text
from recnb.registry import ConfigError, check_known
from recnb.retrieval import verification
from recnb.retrieval.lists import rank
from recnb.retrieval.metrics import STANDARD, per_class, ranking_metrics, retrieval_metrics
from recnb.retrieval.protocol import Protocol, make_protocol
from recnb.retrieval.ranking import TIE, embedding_ranks
from recnb.retrieval.rerank import KReciprocal, alpha_query_expansion, database_augmentation
from recnb.retrieval.scores import MEMORY, exact, pair
from recnb.retrieval.spread import effective_rank, uniformity
from recnb.retrieval.stats import bootstrap_interval, paired_difference
from recnb.runs.folder import Run, below, image_root
from recnb.storage import resolve
from recnb.training.evaluation import embed

FILES = (
    "query",
    "gallery",
    *(f"{side}_{kind}" for side in ("query", "gallery") for kind in ("labels", "cameras", "paths")),
)
OPTIONS = {
    "false_match_rate": 1e-3,
    "neighbours": 5,
    "agreement": 1.0,
    "most_points": 2000,
    "flip": True,
    "shortcuts": True,
    "masks": "",
}
RANGE = 1.00001  # bounds of a cosine: rounding may carry it past 1


@dataclass
class Embeddings:
    """Queries (Q, D) and gallery (G, D) with what is known about them."""

    query: np.ndarray
    gallery: np.ndarray
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    query_cameras: np.ndarray | None = None
    gallery_cameras: np.ndarray | None = None
    exclude_self: bool | np.ndarray = False  # True, or (Q,) the gallery row of each query's own image, -1 for none
    query_paths: Sequence | None = None
    gallery_paths: Sequence | None = None
    names: Any = None  # identity -> text: a sequence, an array or a mapping
    root: str = ""  # the folder that paths are shown relative to

    @property
    def lists(self) -> tuple[Any, Any, Any, Any, Any]:
        """The arguments of `recnb.retrieval` that follow the vectors: labels, cameras, exclude_self."""
        return self.query_labels, self.gallery_labels, self.query_cameras, self.gallery_cameras, self.exclude_self

    @property
    def protocol(self) -> Protocol:
        """Which gallery images count for which query; raises ValueError where the arrays do not fit together."""
        ql, gl, qc, gc, own = self.lists
        return make_protocol(len(self.query), len(self.gallery), own, False, (ql, gl), (qc, gc), (None, None))

    @property
    def same(self) -> bool:
        """Whether queries and gallery are the same images in the same order."""
        return np.array_equal(self.protocol.own, np.arange(len(self.gallery)))

    def union(self) -> tuple[np.ndarray, np.ndarray, list | None]:
        """Return vectors, labels and paths of all images once: the gallery, then the queries that are not in it."""
        new = np.flatnonzero(self.protocol.own < 0)
        paths = None
        if self.query_paths is not None and self.gallery_paths is not None:
            paths = [*self.gallery_paths, *(self.query_paths[i] for i in new.tolist())]
        labels = np.concatenate([self.gallery_labels, np.asarray(self.query_labels)[new]])
        return np.concatenate([self.gallery, self.query[new]]), labels, paths

    def short(self, path) -> str:
        """Return a path relative to the root, or whole where it lies elsewhere."""
        return below(path, self.root)

    def text(self, labels) -> list[str]:
        """Return what each identity is called."""
        return [label_text(label, self.names) for label in np.asarray(labels).tolist()]


def chosen(given: Mapping) -> dict:
    """Return OPTIONS with these values instead of their own; raise ConfigError for an unknown name."""
    check_known(given, OPTIONS, "options")
    return {**OPTIONS, **given}


def of_run(run: Run) -> Embeddings:
    """Return the embeddings of a run."""
    return Embeddings(
        run.query_features,
        run.gallery_features,
        run.query.labels,
        run.gallery.labels,
        run.query.cameras,
        run.gallery.cameras,
        run.exclude_self,
        run.query.pictures,
        run.gallery.pictures,
        run.query.names,
        image_root(run.cfg),
    )


def of_files(files: Mapping[str, str]) -> Embeddings:
    """Return the embeddings of .npy files, or of .txt files with a value a line.

    Without a gallery the queries search each other. Where both have paths, a query's own image in the gallery is known
    by its path, and left out.

    Args:
        files: From names of FILES to paths.

    Raises:
        ConfigError: A name is unknown, or a file is missing, cannot be read or has another length.
    """
    check_known(files, FILES, "embeddings")
    two = any(key.startswith("gallery") for key in files)
    for key in ("query", "query_labels", "gallery", "gallery_labels")[: 4 if two else 2]:
        if key not in files:
            raise ConfigError(f"embeddings: '{key}' is missing")
    values = {key: _read(key, resolve(path)) for key, path in files.items()}
    for key, value in values.items():
        rows = len(values[key.split("_")[0]])
        if len(value) != rows:
            raise ConfigError(f"embeddings: {key} has {len(value)} entries for {rows} vectors")
    if not two:
        both = {key.replace("query", "gallery"): value for key, value in values.items()}
        return Embeddings(**values, **both, exclude_self=True)
    paths = [ImageList(values.get(f"{side}_paths", []), np.empty(0)) for side in ("query", "gallery")]
    return Embeddings(**values, exclude_self=own_index(paths[0], paths[1]) if all(p.paths for p in paths) else False)


def _read(key: str, path: Path):
    if not path.is_file():
        raise ConfigError(f"embeddings: {key}: there is no file {path}")
    if path.suffix == ".npy":  # "c": nothing is written back, yet torch takes it without a warning
        try:
            values = np.load(path, mmap_mode="c" if key in ("query", "gallery") else None, allow_pickle=False)
        except Exception as error:  # a damaged file makes numpy raise anything
            raise ConfigError(f"embeddings: {key}: {path} cannot be read as an array: {error}") from error
        return values.astype(str).tolist() if key.endswith("paths") else values
    lines = path.read_text(encoding="utf-8").splitlines()
    if key.endswith("paths"):
        return lines
    try:
        return np.array([int(line) for line in lines])
    except ValueError:
        return np.array(lines)


# ---- tables ----------------------------------------------------------------------------------------------------------


def judge(data: Embeddings, topk: Sequence[int] = (1, 5, 10)) -> tuple[pd.DataFrame, dict]:
    """Return a row per metric with its 95 % interval, and the arrays of `retrieval_metrics(per_query=True)`.

    The bootstrap resamples identities, not queries, so that the intervals hold for other identities too. Precision and
    NDCG at 1 equal recall1 and are left out.
    """
    scores, arrays = retrieval_metrics(data.query, data.gallery, *data.lists, topk, metrics=STANDARD, per_query=True)
    valid, labels = arrays["valid"], np.asarray(data.query_labels)
    rows = {
        key: bootstrap_interval(arrays[key][valid], labels[valid])
        for key in scores
        if key in arrays and not key.endswith("@1")
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("metric"), arrays


def precision_recall(data: Embeddings, points: int = 101, memory: int = MEMORY) -> tuple[np.ndarray, np.ndarray]:
    """Return recall (P,) and the precision (P,) there, interpolated for each query and averaged over the queries.

    Computed from the ranks of all positives: at recall t, the best precision at any recall of at least t (Manning et
    al., Introduction to Information Retrieval, 2008, 8.4).

    Args:
        data: the embeddings.
        points: P, spread evenly from 0 to 1.
        memory: bytes of working memory.
    """
    protocol = data.protocol
    recall, total = np.linspace(0, 1, points), np.zeros(points)
    query, gallery = pair(data.query, data.gallery)
    with exact(query.device):
        for queries, ranks in embedding_ranks(query, gallery, protocol, np.flatnonzero(protocol.valid), TIE, memory):
            precision = np.divide(np.arange(1, ranks.shape[1] + 1), ranks, where=ranks > 0, out=np.zeros(ranks.shape))
            best = np.maximum.accumulate(precision[:, ::-1], axis=1)[:, ::-1]
            wanted = np.ceil(recall * protocol.positives[queries][:, None] - 1e-9).astype(int)
            total += np.take_along_axis(best, np.maximum(wanted - 1, 0), 1).sum(0)
    return recall, total / protocol.valid.sum()


def pair_histogram(data: Embeddings, bins: int = 100, memory: int = MEMORY) -> tuple[np.ndarray, np.ndarray]:
    """Return a histogram of the cosines of all pairs of a query and a gallery image that count.

    Args:
        data: the embeddings.
        bins: how many there are between -1 and 1.
        memory: bytes of working memory.

    Returns:
        The edges (bins + 1,) of the bins, and the counts (2, bins) of negative (row 0) and positive pairs (row 1).
    """
    protocol, counts = data.protocol, np.zeros((2, bins), np.int64)
    query, gallery = pair(data.query, data.gallery)
    with exact(query.device):
        for kind, scores in verification.pair_scores(query, gallery, protocol, memory):
            counts[kind] += verification.histogram(scores, -RANGE, RANGE, bins)
    return np.linspace(-RANGE, RANGE, bins + 1), counts


def operating_point(data: Embeddings, rate: float = 1e-3) -> dict:
    """Return `verification_metrics`, and under `rate`, `threshold` and `TPR` those of one false-match rate."""
    result = verification.verification_metrics(data.query, data.gallery, *data.lists, fpr=(rate,))
    return {
        "rate": rate,
        "threshold": result[f"threshold@FPR={rate:g}"],
        "TPR": result[f"TPR@FPR={rate:g}"],
        **{key: value for key, value in result.items() if "@FPR" not in key},
    }


def identities(data: Embeddings, arrays: dict) -> pd.DataFrame:
    """Return a row per identity of the queries, the worst AP first."""
    table = per_class(arrays, data.query_labels)
    return table.assign(label=data.text(table.label))


def confused(data: Embeddings) -> pd.DataFrame:
    """Return a row per pair (identity, taken_for): how many queries of the first have the second as first hit.

    `share` is their part of the identity's queries with a positive; `back` counts the queries of taken_for that have
    the identity as first hit.
    """
    pairs = _first_hits(data)
    table = pairs[pairs.identity != pairs.taken_for].value_counts().rename("queries").reset_index()
    back = {(a, b): n for a, b, n in table.itertuples(index=False)}
    table["share"] = table.queries / table.identity.map(pairs.identity.value_counts())
    table["back"] = [back.get((b, a), 0) for a, b in zip(table.identity, table.taken_for, strict=True)]
    table = table.sort_values(["queries", "share", "identity", "taken_for"], ascending=[False, False, True, True])
    return table.reset_index(drop=True)


def _first_hits(data: Embeddings) -> pd.DataFrame:
    """Return the identity of each query with a positive, and that of its first hit."""
    ranking = rank(data.query, data.gallery, *data.lists, k=1, show_excluded=0)
    found = np.asarray(data.gallery_labels)[ranking.ids[:, 0]]
    return pd.DataFrame({"identity": np.asarray(data.query_labels), "taken_for": found})[ranking.valid]


def confusion(data: Embeddings) -> pd.DataFrame:
    """Return how often queries of each identity (rows) have each identity (columns) as their first hit.

    Queries without a positive do not count, as in the metrics; both sides are in the order of the labels.
    """
    found = _first_hits(data)
    names = np.unique(np.concatenate([found.identity, found.taken_for]))
    table = pd.crosstab(found.identity, found.taken_for).reindex(index=np.unique(found.identity), columns=names)
    table = table.fillna(0).astype(int)
    return table.set_axis(data.text(table.index), axis=0).set_axis(data.text(names), axis=1)


def effects(data: Embeddings, others: Mapping[str, tuple] | None = None) -> pd.DataFrame:
    """Return a row per way to search: its metrics, the mAP it gains over plain search, and the gain's 95 % interval.

    The ways are k-reciprocal re-ranking, query expansion, database augmentation, and `others`, which maps a name to
    (query, gallery) vectors.
    """
    gallery = None if data.same else data.gallery
    expanded = alpha_query_expansion(data.query, gallery)
    augmented = database_augmentation(data.gallery)
    ways = {
        "as they are": (data.query, data.gallery),
        "re-ranking": None,
        "query expansion": (expanded, data.gallery),
        "database augmentation": (data.query, augmented),
        "both of these": (expanded, augmented),
        **(others or {}),
    }
    labels, rows, first = np.asarray(data.query_labels), {}, None
    options: dict[str, Any] = {"topk": (1,), "metrics": ("recall{k}", "mAP", "mINP"), "per_query": True}
    for name, vectors in ways.items():
        scores, arrays = (
            retrieval_metrics(vectors[0], vectors[1], *data.lists, **options)
            if vectors
            else ranking_metrics(KReciprocal(data.query, gallery), *data.lists, **options)
        )
        valid, first = arrays["valid"], arrays if first is None else first
        gain = paired_difference(first["AP"][valid], arrays["AP"][valid], labels[valid])
        rows[name] = {key: scores[key] for key in ("recall1", "mAP", "mINP")} | {
            "mAP gain": gain["difference"],
            "low": gain["low"],
            "high": gain["high"],
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def spread(data: Embeddings, most: int = 2000) -> pd.DataFrame:
    """Return the dimensions of the embedding, its effective rank and its uniformity over `most` images, in a row."""
    vectors, _, _ = data.union()
    some = vectors[np.random.default_rng(0).permutation(len(vectors))[:most]]
    row = {"dimensions": some.shape[1], "effective_rank": effective_rank(some), "uniformity": uniformity(some)}
    return pd.DataFrame([row])


def mirrored(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Return the query and gallery vectors of a run, averaged over each image and its mirror image."""
    model = run.model()
    loaders = [ImageLoader(images, batch_size=64) for images in (run.query, run.gallery)]
    query, gallery = (embed(model, loader, flip=True, progress=False).numpy() for loader in loaders)
    return query, gallery


def project(features) -> tuple[np.ndarray, str]:
    """Return points (N, 2) of vectors (N, D) by cosine, and the method: UMAP where it is installed, otherwise PCA."""
    unit = np.asarray(features, np.float32)
    unit = unit / np.maximum(np.linalg.norm(unit, axis=1, keepdims=True), 1e-30)
    if find_spec("umap"):
        from umap import UMAP

        return UMAP(metric="cosine", random_state=0, n_jobs=1).fit_transform(unit), "UMAP"
    centred = unit - unit.mean(0)
    axes = np.linalg.eigh(centred.T @ centred)[1][:, :-3:-1]
    axes = axes * np.where(axes[np.abs(axes).argmax(0), np.arange(axes.shape[1])] < 0, -1, 1)  # either sign would do
    return centred @ axes, "PCA"


def overview_figure(data: Embeddings, rate: float = 1e-3) -> Figure:
    """Draw three panels: CMC, similarities of pairs with the threshold, AP of the queries."""
    _, arrays = judge(data)
    figure, axes = plots(3)
    draw_cmc(axes[0], arrays)
    draw_pairs(axes[1], *pair_histogram(data), operating_point(data, rate))
    draw_ap(axes[2], arrays)
    return figure
