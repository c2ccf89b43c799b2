"""An exported model in use: the answer to one image, and the items that come and go."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from matplotlib.ticker import PercentFormatter

from recnb.data.images import DataError, printable, reason
from recnb.deploy.decision import HITS, NUMBERS, Searches, evidence, mean_mate, probability
from recnb.deploy.graph import embed_file, open_model
from recnb.gallery.curves import plots
from recnb.gallery.figure import COLOURS, INK, SOFT, panels
from recnb.gallery.pictures import Picture, read_picture, shorten
from recnb.registry import ConfigError
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG
from recnb.retrieval.search import Index
from recnb.storage import check_sums, resolve

UNKNOWN = "unknown"


class Hit(NamedTuple):
    """One of the images that are nearest to a picture: its identity, its file, and how similar it is."""

    name: str
    path: str
    score: float


@dataclass(frozen=True)
class Answer:
    """What a picture shows: `name`, or "unknown"; how probable it is that the nearest identity is the right one.

    The probability is right on average where every second picture shows an identity of the index. `nearest` are the
    three most similar images, best first.
    """

    name: str
    probability: float
    nearest: tuple[Hit, ...]

    def __str__(self) -> str:
        return UNKNOWN if self.name == UNKNOWN else f"{self.name} ({self.probability:.0%})"


def check_threshold(threshold: Any, where: str) -> None:
    """Raise ConfigError unless a probability to accept from can be one."""
    number = isinstance(threshold, int | float | np.floating) and not isinstance(threshold, bool)
    if not number or not -1 <= threshold <= 1:
        raise ConfigError(f"{where}: {threshold!r} is not between -1 and 1; it is the probability that names a picture")


def check_index(index: Index, file: Path) -> None:
    """Raise ConfigError where an index does not say, in `file`, all that an answer takes."""
    info, again = index.info, "export the run again"
    for name in ("label", "path"):
        if not all(isinstance(text, str) for text in index.columns.get(name, [None])):
            raise ConfigError(f"{file}: the column {name} is not a text for each item; {again}")
    if not all(isinstance(alike, float) for alike in index.columns.get("mate", [None])):
        raise ConfigError(f"{file}: the column mate is not a number for each item; {again}")
    curve = info.get("probability")
    if not isinstance(curve, dict) or set(curve) != {*NUMBERS, "bias"} or not np.isfinite([*curve.values()]).all():
        raise ConfigError(f"{file}: probability is {curve!r} and not the four numbers of a curve; {again}")
    if not isinstance(info.get("image_root"), str):
        raise ConfigError(f"{file}: image_root is {info.get('image_root')!r} and not a folder; {again}")
    check_threshold(info.get("threshold"), f"{file}: threshold")


class Recognizer:
    """An export folder in use: `search` and `identify` one image, `add` and `remove` items, `save` them.

    Args:
        folder: an export folder with an index.
        threshold: from which probability on a name is given; by default the calibrated one.
        image_root: where the images of the index lie, if it is not where they lay.

    Raises:
        ConfigError: The folder is no export with an index, or a file of it is damaged.
        ValueError: The index belongs to another model.
    """

    def __init__(self, folder: str | Path, threshold: float | None = None, image_root: str | Path | None = None):
        self.folder = resolve(folder)
        if not (self.folder / "index" / "index.json").is_file():
            raise ConfigError(f"{folder}: holds no index of an exported model; 05_export makes one")
        self.fingerprint = check_sums(self.folder)["model.onnx"]
        self.model = open_model(self.folder / "model.onnx")
        self.index = Index.load(self.folder / "index", self.model.meta["output"]["embedding_size"], self.fingerprint)
        check_index(self.index, self.folder / "index" / "index.json")
        info = self.index.info
        self.curve = info["probability"]
        self.threshold = info["threshold"] if threshold is None else threshold
        check_threshold(self.threshold, "threshold")
        root = self.folder / info["image_root"] if image_root is None else Path(image_root)
        self.root = Path(os.path.normpath(root)) if image_root or info["image_root"] else Path()

    def embed(self, picture: Picture) -> np.ndarray:
        """Return the vector (D,) float32 of a picture.

        Args:
            picture: a path, a Pillow image or a uint8 array (H, W, 3).

        Raises:
            DataError: It cannot be read; the message says why.
        """
        if isinstance(picture, str | Path):
            return embed_file(self.model, picture)
        try:
            if isinstance(picture, np.ndarray):
                picture = read_picture(picture, max(picture.shape))
            return self.model(picture)
        except Exception as error:  # decoders and the runtime raise whatever a broken picture leads them to
            raise DataError(f"the picture {reason(error)}") from error

    def search(self, picture: Picture, k: int = 5, itself: bool = True) -> pd.DataFrame:
        """Return the most similar items, best first.

        Args:
            picture: as `embed` takes it.
            k: how many items.
            itself: whether an item counts that is the picture's own file.

        Returns:
            The columns similarity, accepted (whether the item is of the identity that is the answer), label, path, id.
        """
        answer, table = self._asked(picture, k, itself)
        return table.assign(accepted=table.label == answer.name)[["similarity", "accepted", "label", "path", "id"]]

    def identify(self, picture: Picture, itself: bool = True) -> Answer:
        """Return what a picture shows; the arguments are those of `search`."""
        return self._asked(picture, 3, itself)[0]

    def _asked(self, picture: Picture, k: int, itself: bool) -> tuple[Answer, pd.DataFrame]:
        """Return the answer to a picture and its k most similar items, in one search; the arguments are its."""
        vector, most = self.embed(picture)[None], max(k, HITS) + 1
        scores, ids = (part[0] for part in self.index.search(vector, most, self.fingerprint))
        near = np.flatnonzero(np.isin(self.index.ids, ids))
        place = dict(zip(self.index.ids[near].tolist(), near.tolist(), strict=True))
        rows = [
            (float(score), *(self.index.columns[name][place[item]] for name in ("label", "path", "mate")), int(item))
            for score, item in zip(scores.tolist(), ids.tolist(), strict=True)
            if item >= 0
        ]
        table = pd.DataFrame(rows, columns=["similarity", "label", "path", "mate", "id"])
        table["path"] = [str(self.root / path) for path in table.path]
        if not itself:
            own = os.path.realpath(str(picture))
            table = table[[os.path.realpath(path) != own for path in table.path]].reset_index(drop=True)
        if not len(table):
            return Answer(UNKNOWN, 0.0, ()), table
        name, sure = self.decide(*(table[name].to_numpy()[:HITS] for name in ("similarity", "label", "mate")))
        nearest = tuple(Hit(*row) for row in table[["label", "path", "similarity"]].head(3).itertuples(index=False))
        return Answer(name if sure >= self.threshold else UNKNOWN, sure, nearest), table.head(k)

    def decide(self, scores: np.ndarray, labels: np.ndarray, mates: np.ndarray) -> tuple[str, float]:
        """Return the most probable identity of a search, and the probability that it is right.

        Args:
            scores: (K,) how alike the hits are, best first.
            labels: (K,) their identities.
            mates: (K,) how alike each and the most similar other item of its identity are, nan where there is none.
        """
        names, identities = np.unique(labels.astype(str), return_inverse=True)
        if not np.isfinite(mates).all():
            mates = np.where(np.isfinite(mates), mates, mean_mate(np.array(self.index.columns["mate"])))
        first, numbers = evidence(Searches(scores[None], identities[None], mates[None]))
        return str(names[first[0]]), float(probability(numbers, self.curve)[0])

    def add(self, paths: Sequence[str | Path], labels: Sequence[str]) -> list[int]:
        """Add items to the index and return their ids.

        Args:
            paths: N image files.
            labels: N names that they shall be recognised by.

        Raises:
            DataError: An image cannot be read.
            ValueError: There are not as many labels as images.
        """
        if len(paths) != len(labels):
            raise ValueError(f"each image needs a label; there are {len(paths)} images and {len(labels)} labels")
        vectors = np.stack([self.embed(path) for path in paths])
        self.index.add(
            vectors,
            model=self.fingerprint,
            path=[str(Path(path).absolute()) for path in paths],
            label=[printable(str(label)) for label in labels],
            mate=[np.nan] * len(paths),
        )
        ids, column = self.index.ids.tolist(), self.index.columns
        for place, vector in zip(range(len(ids) - len(paths), len(ids)), vectors, strict=True):
            scores, near = (part[0].tolist() for part in self.index.search(vector[None], HITS))
            for score, item in zip(scores, near, strict=True):
                if item >= 0 and item != ids[place] and self.index.item(item)["label"] == column["label"][place]:
                    column["mate"][place] = score
                    break
        return ids[-len(paths) :]

    def remove(self, *labels: str) -> int:
        """Remove all items of the labels and return how many; raise ValueError for a label that the index lacks."""
        for label in set(map(str, labels)) - set(self.index.columns["label"]):
            raise ValueError(f"the index has no items of the label '{label}'")
        gone = self.index.ids[np.isin(self.index.columns["label"], list(map(str, labels)))]
        self.index.remove(gone)
        return len(gone)

    def save(self) -> Path:
        """Return the folder of the index, written: as a whole, so that readers see the old one or the new one."""
        return self.index.save(self.folder / "index")


# ---- pictures of it --------------------------------------------------------------------------------------------------


def trade_figure(point: dict) -> Figure:
    """Draw what each threshold costs: known images without a name, unknown ones with one, and the chosen point.

    Args:
        point: the content of operating_point.json.
    """
    figure, (ax,) = plots(1, 7)
    curve, chosen = point["curve"], point["points"]["chosen"]
    for name, text, colour in (
        ("known_right", "known images named rightly", COLOURS[RIGHT]),
        ("unknown_rate", "known images answered unknown", SOFT),
        ("false_accept_rate", "unknown images given a name", COLOURS[WRONG]),
    ):
        ax.step(curve["threshold"], curve[name], where="pre", color=colour, linewidth=2, label=text)
        at = chosen[name]
        ends = [[at["share"] - at["low"]], [at["high"] - at["share"]]]
        ax.errorbar(point["threshold"], at["share"], ends, fmt="o", color=colour, capsize=3, markersize=5)
    ax.axvline(point["threshold"], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.set(xlabel="a name is given from this probability on", ylabel="share of searches", xlim=(0, 1), ylim=(0, 1))
    ax.xaxis.set_major_formatter(PercentFormatter(1))
    ax.yaxis.set_major_formatter(PercentFormatter(1))
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=3)
    return figure


def answers_figure(recognizer: Recognizer, pictures: Sequence[Picture], titles: Sequence[str], k: int = 5) -> Figure:
    """Return a figure with a row for each picture: itself and its k most similar items, those of its answer in blue.

    Args:
        recognizer: what answers.
        pictures: N of them; their own files in the index do not count.
        titles: N texts.
        k: how many items a row shows.
    """
    first = 1.7  # columns' width, for the title of a picture holds two names
    figure, axes = panels(
        len(pictures), k + 1, (1.25 * (k + first), 1.55 * len(pictures)), width_ratios=[first, *[1] * k]
    )
    for row, picture, title in zip(axes, pictures, titles, strict=True):
        found = recognizer.search(picture, k, itself=False)
        shown = [
            (picture, "\n".join(shorten(line, 36) for line in title.splitlines()), INK, 1.0),
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
            try:
                ax.imshow(read_picture(image, 160))
            except FileNotFoundError:  # the index was moved without its images
                ax.text(0.5, 0.5, "not here", ha="center", va="center", fontsize=8, color=SOFT)
            ax.set_title(text, fontsize=8, color=INK, parse_math=False)
            ax.set(xticks=[], yticks=[])
            for spine in ax.spines.values():
                spine.set(color=colour, linewidth=width)
    return figure
