"""An exported model in use: the gallery's index, the threshold of acceptance, and the answer to one image.

Everything here sees images through the exported model and its own preprocessing, as the application will: a gallery
that was embedded in another way would be searched with vectors that are not quite its own.

Accepting by a threshold is a decision about pairs; a search makes as many of them as the gallery has items. The
calibration therefore also says what becomes of whole searches: how many images of known identities are named rightly,
and how many of unknown ones, whose identity is taken out of the gallery, are named at all (Phillips, Grother and
Micheals, Handbook of Face Recognition, 2011: detection and identification rate, false-alarm rate).
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import torch

from recnb.data.lists import ImageList, own_index
from recnb.deploy.graph import embed_file, open_model
from recnb.deploy.index import Labelled
from recnb.gallery.figure import COLOURS, INK
from recnb.gallery.pictures import Picture, read_picture, shorten
from recnb.registry import ConfigError
from recnb.retrieval.lists import EXCLUDED, RIGHT
from recnb.retrieval.metrics import retrieval_metrics
from recnb.retrieval.scores import MEMORY, pair, spans
from recnb.retrieval.search import Index
from recnb.retrieval.stats import bootstrap_interval
from recnb.retrieval.verification import verification_metrics
from recnb.storage import resolve, sha256

if TYPE_CHECKING:
    from recnb.runs.folder import Run

UNKNOWN = "unknown"
RATES = (1e-2, 1e-3, 1e-4)  # what the calibration shows beside the rate that was asked for


# ---- the threshold ---------------------------------------------------------------------------------------------------


def negative_pairs(query: ImageList, gallery: ImageList) -> int:
    """How many pairs of a query and a gallery image are of different identities."""
    counts = np.bincount(gallery.labels, minlength=query.labels.max() + 1)
    return int((len(gallery) - counts[query.labels]).sum())


def check_rate(rate: float, query: ImageList, gallery: ImageList) -> None:
    """Raise ConfigError for a false-match rate that the pairs of two lists are too few to show."""
    negatives = negative_pairs(query, gallery)
    if not 0 < rate < 1 or rate * negatives < 1:
        raise ConfigError(
            f"false_match_rate: {rate:g} cannot be measured on the {negatives:,} pairs of different "
            f"identities that the run's lists have; give at least {1 / max(1, negatives):.1g}, below 1"
        )


def nearest_scores(query, gallery, lists: tuple, own: np.ndarray, distance: str) -> Iterator[tuple[np.ndarray, ...]]:
    """Blocks of (best, right, other, has), one entry a query: the score of its first hit, whether that is of its
    identity, the score of its first hit of another identity, and whether there is any of its own.
    """
    ql, gl, qc, gc = (None if values is None else torch.as_tensor(values) for values in lists)
    query, gallery = pair(query, gallery, distance)
    for rows in spans(len(query), max(1, MEMORY // (32 * len(gallery)))):
        scores = query.queries(rows) @ gallery.gallery(slice(None)).T
        same = ql[rows, None] == gl
        junk = torch.zeros_like(same) if qc is None or gc is None else same & (qc[rows, None] == gc)
        found = torch.as_tensor(own[rows])
        junk[found >= 0, found[found >= 0]] = True
        best = scores.masked_fill(junk, -torch.inf).max(1)
        right = same.gather(1, best.indices[:, None])[:, 0]
        other = scores.masked_fill(same | junk, -torch.inf).amax(1)
        yield tuple(part.numpy() for part in (best.values, right, other, (same & ~junk).any(1)))


def calibrate(
    query, gallery, lists: tuple, own: np.ndarray, rates: Sequence[float], distance: str = "cosine"
) -> list[dict]:
    """A row for each false-match rate, strictest last: the threshold and what becomes of pairs and of searches there.

    query (Q, D), gallery (G, D); lists and own as in `recnb.retrieval.metrics`. All shares: same_accepted of the pairs
    of one identity, known_right, known_wrong and known_unknown of the queries with something to find, by what they are
    called; unknown_named of all queries, when their identity is not in the gallery.
    """
    pairs = verification_metrics(query, gallery, *lists, own, fpr=rates, distance=distance)
    best, right, other, has = map(
        np.concatenate, zip(*nearest_scores(query, gallery, lists, own, distance), strict=True)
    )
    rows = []
    for rate in sorted(rates, reverse=True):
        threshold = pairs[f"threshold@FPR={rate:g}"]
        accepted = best[has] >= threshold
        rows.append(
            {
                "false_match_rate": rate,
                "threshold": threshold,
                "same_accepted": pairs[f"TPR@FPR={rate:g}"],
                "known_right": float((accepted & right[has]).mean()),
                "known_wrong": float((accepted & ~right[has]).mean()),
                "known_unknown": float((~accepted).mean()),
                "unknown_named": float((other >= threshold).mean()),
            }
        )
    return rows


def intervals(query, gallery, lists: tuple, own: np.ndarray, distance: str) -> dict[str, dict[str, float]]:
    """recall1, recall5 and mAP, each with its 95 % interval over identities."""
    _, arrays = retrieval_metrics(
        query, gallery, *lists, own, distance=distance, metrics=("recall{k}", "mAP"), per_query=True
    )
    valid, labels = arrays["valid"], np.asarray(lists[0])
    return {name: bootstrap_interval(arrays[name][valid], labels[valid]) for name in ("recall1", "recall5", "mAP")}


# ---- the index -------------------------------------------------------------------------------------------------------


def build_index(run: Run, known: Labelled, model_file: Path, folder: Path, rate: float) -> Index:
    """Return the index of a run's labelled images as the exported model sees them, saved in `folder`.

    Its columns are path (below info["image_root"]) and label; info also has what it holds, the threshold at the
    false-match rate, the calibration, and metrics with intervals. Beside it lie embeddings.npy and items.csv, what it
    was first made of.

    Args:
        run: the run that is exported.
        known: its labelled images, and which of them the index holds.
        model_file: the exported ONNX model.
        folder: where the index is written.
        rate: the share of pairs of different identities that the threshold may accept.
    """
    model, query, gallery = open_model(model_file), run.query, run.gallery
    distance = model.meta["compare"]
    vectors = np.stack([embed_file(model, *image) for image in zip(known.paths, known.boxes, strict=True)])
    asked, items = vectors[known.rows["query"]], vectors[known.rows["gallery"]]
    lists, own = (query.labels, gallery.labels, query.cameras, gallery.cameras), own_index(query, gallery)
    rates = {rate, *(r for r in RATES if r * negative_pairs(query, gallery) >= 1)}
    rows = calibrate(asked, items, lists, own, rates, distance)
    info = {
        "image_root": str(known.root),
        "holds": known.counts,
        "false_match_rate": rate,
        "threshold": next(row["threshold"] for row in rows if row["false_match_rate"] == rate),
        "calibration": rows,
        "metrics": intervals(asked, items, lists, own, distance),
    }
    paths, labels = [known.path(row) for row in known.kept], known.names[known.kept].tolist()
    index = Index(distance, model=sha256(model_file)[:16], info=info).add(vectors[known.kept], path=paths, label=labels)
    index.save(folder)
    np.save(folder / "embeddings.npy", vectors[known.kept])
    with (folder / "items.csv").open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows(
            [("id", "label", "path"), *zip(index.ids, labels, paths, strict=True)]
        )
    return index


class Recognizer:
    """An export folder in use: `search` and `identify` one image, `add` and `remove` items, `save` them.

    threshold: from which similarity an answer is accepted, by default the calibrated one. Raises ConfigError where the
    folder is no export with an index, ValueError where the index belongs to another model.
    """

    def __init__(self, folder: str | Path, threshold: float | None = None):
        self.folder = resolve(folder)
        if not (self.folder / "index" / "index.json").is_file():
            raise ConfigError(f"{folder}: holds no index of an exported model; 05_export makes one")
        self.model = open_model(self.folder / "model.onnx")
        self.fingerprint = sha256(self.folder / "model.onnx")[:16]
        self.index = Index.load(self.folder / "index", model=self.fingerprint)
        self.threshold = self.index.info["threshold"] if threshold is None else threshold

    def embed(self, picture: Picture) -> np.ndarray:
        """(D,) float32 of a picture: a path, a Pillow image or a uint8 array."""
        if isinstance(picture, np.ndarray):
            picture = read_picture(picture, max(picture.shape))
        return embed_file(self.model, picture) if isinstance(picture, str | Path) else self.model(picture)

    def search(self, picture: Picture, k: int = 5) -> pd.DataFrame:
        """The k most similar items, best first, in the columns similarity, accepted, label, path and id."""
        scores, ids = (part[0] for part in self.index.search(self.embed(picture)[None], k, self.fingerprint))
        rows = [
            {
                "similarity": float(score),
                "accepted": bool(score >= self.threshold),
                "label": item["label"],
                "path": str(Path(self.index.info["image_root"]) / item["path"]),
                "id": int(place),
            }
            for score, place in zip(scores, ids, strict=True)
            if place >= 0 and (item := self.index.item(place))
        ]
        return pd.DataFrame(rows)

    def identify(self, picture: Picture) -> str:
        """The label of the most similar item where it is accepted, otherwise 'unknown'."""
        first = self.search(picture, 1).iloc[0]
        return first.label if first.accepted else UNKNOWN

    def add(self, paths: Sequence[str | Path], labels: Sequence[str]) -> list[int]:
        """The ids of new items, each an image file and the label that it shall be recognised by."""
        if len(paths) != len(labels):
            raise ValueError(f"each image needs a label; there are {len(paths)} images and {len(labels)} labels")
        vectors = np.stack([self.embed(path) for path in paths])
        self.index.add(
            vectors,
            model=self.fingerprint,
            path=[str(Path(path).absolute()) for path in paths],
            label=[str(label) for label in labels],
        )
        return self.index.ids[-len(paths) :].tolist()

    def remove(self, *labels: str) -> int:
        """How many items went: all those of the labels; raises ValueError for a label that the index does not have."""
        for label in set(map(str, labels)) - set(self.index.columns["label"]):
            raise ValueError(f"the index has no items of the label '{label}'")
        gone = self.index.ids[np.isin(self.index.columns["label"], list(map(str, labels)))]
        self.index.remove(gone)
        return len(gone)

    def save(self) -> Path:
        """The folder of the index, written: as a whole, so that readers see the old one or the new one."""
        return self.index.save(self.folder / "index")


def answers_figure(
    recognizer: Recognizer, pictures: Sequence[Picture], titles: Sequence[str], k: int = 5
) -> plt.Figure:
    """A row for each picture: itself and its k most similar items, framed blue where accepted and grey otherwise."""
    figure, axes = plt.subplots(
        len(pictures),
        k + 1,
        figsize=(1.25 * (k + 1), 1.55 * len(pictures)),
        dpi=100,
        squeeze=False,
        facecolor="white",
        layout="constrained",
    )
    for row, picture, title in zip(axes, pictures, titles, strict=True):
        found = recognizer.search(picture, k)
        shown = [
            (picture, title, INK, 1.0),
            *(
                (
                    hit.path,
                    f"{shorten(hit.label, 16)}\n{hit.similarity:.3f}",
                    COLOURS[RIGHT if hit.accepted else EXCLUDED],
                    2.5,
                )
                for hit in found.itertuples()
            ),
        ]
        for ax in row[len(shown) :]:
            ax.set_axis_off()
        for ax, (image, text, colour, width) in zip(row, shown, strict=False):
            ax.imshow(read_picture(image, 160))
            ax.set_title(text, fontsize=8, color=INK, parse_math=False)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=width)
    plt.close(figure)
    return figure
