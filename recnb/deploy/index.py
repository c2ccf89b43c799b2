"""Which images does an index hold? Every labelled image of a run, once, however many lists name it.

A picture is known by its content: a copy under another name, or the same file in another spelling, is the same one.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recnb.data.images import DataError, printable, reason
from recnb.data.lists import ImageList, drop_faults
from recnb.recipe.data import training_images
from recnb.recipe.schema import lookup
from recnb.registry import ConfigError, suggest
from recnb.runs.folder import Run
from recnb.storage import resolve, sha256

INDEXES = ("all", "test")


@dataclass
class Labelled:
    """Every labelled image of a run once, N of them, and which rows of these each list names.

    `content` is equal for two rows that are the same picture: rows of one picture under several names are kept.
    """

    paths: list[str]
    names: np.ndarray  # (N,) text
    content: np.ndarray  # (N,) int64
    cameras: np.ndarray  # (N,) int64, -1 where unknown
    boxes: list[list[int] | None]  # N times (left, top, right, bottom) in pixels, or None for the whole image
    rows: dict[str, np.ndarray]  # list -> (n,) rows of its images, in its order
    kept: np.ndarray  # (M,) the rows that the index holds
    root: Path  # what the paths start from

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict:
        """What the index holds: images, identities, images of each list, and how many stand in several."""
        lists = {name: int(np.isin(rows, self.kept).sum()) for name, rows in self.rows.items()}
        lists = {name: count for name, count in lists.items() if count}
        several = np.bincount(np.concatenate([np.unique(self.rows[name]) for name in lists]), minlength=len(self)) > 1
        return {
            "images": len(self.kept),
            "identities": len(np.unique(self.names[self.kept])),
            "lists": lists,
            "in_several_lists": int(several[self.kept].sum()),
        }

    def path(self, row: int) -> str:
        """Return an image's path, from the root where it lies below."""
        path = Path(self.paths[row]).absolute()
        return str(path.relative_to(self.root)) if path.is_relative_to(self.root) else str(path)


def lists_of(run: Run, index: str) -> dict[str, ImageList]:
    """Return a run's labelled lists by what they are for; `index: test` does without the training images.

    Raises:
        ConfigError: `index` is neither all nor test.
        DataError: The training list is not on this machine.
    """
    if index not in INDEXES:
        raise ConfigError(f"index: there is no index '{index}'; {suggest(index, INDEXES)}")
    lists = {"query": run.query, "gallery": run.gallery}
    if index == "test":
        return lists
    try:
        training = training_images(run.cfg)
    except DataError as error:
        raise DataError(f"{error}; index: test leaves the training images out of the index") from None
    if run.cfg["Global"]["on_bad_image"] == "drop":
        drop_faults(training)
    return {"training": training, **lists}


def labelled_images(run: Run, index: str = "all") -> Labelled:
    """Return the labelled images of a run.

    Args:
        run: a finished run.
        index: "all" holds the images of every list, "test" those of the gallery alone, to measure strictly.

    Raises:
        ConfigError: There is no such index.
        DataError: An image or a list cannot be read.
    """
    found: dict[tuple, tuple] = {}  # (content, box, name) -> (row, path, camera)
    digests: dict[str, str] = {}
    rows = {}
    for kind, images in lists_of(run, index).items():
        own = []
        for i, path in enumerate(images.paths):
            box = None if images.boxes is None else tuple(images.boxes[i].tolist())
            camera = -1 if images.cameras is None else int(images.cameras[i])
            key = content(images, i, digests), box, printable(images.name(int(images.labels[i])))
            own.append(found.setdefault(key, (len(found), path, camera))[0])
        rows[kind] = np.array(own)
    pictures = [(digest, box) for digest, box, _ in found]
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    paths = [path for _, path, _ in found.values()]
    return Labelled(
        paths,
        np.array([name for *_, name in found]),
        np.array([numbers[picture] for picture in pictures]),
        np.array([camera for *_, camera in found.values()]),
        [None if box is None else list(box) for _, box, _ in found],
        rows,
        np.unique(rows["gallery"]) if index == "test" else np.arange(len(found)),
        common_root(run, paths),
    )


def content(images: ImageList, i: int, digests: dict[str, str]) -> str:
    """Return the digest of an image's file; `digests` remembers those of files that several lists name."""
    real = os.path.realpath(images.paths[i])
    if real not in digests:
        try:
            digests[real] = sha256(real)
        except OSError as error:
            raise DataError(images.sentence(i, reason(error))) from error
    return digests[real]


def sentence(counts: dict) -> str:
    """Return in words what an index holds, from `Labelled.counts`."""
    *first, last = (f"{name} ({count:,})" for name, count in counts["lists"].items())
    lists = f"{', '.join(first)} and {last} lists" if first else f"{last} list"
    several = f"; {counts['in_several_lists']:,} of them stand in several lists and count once"
    return f"{counts['images']:,} images of {counts['identities']:,} identities, from the {lists}" + several * bool(
        counts["in_several_lists"]
    )


def common_root(run: Run, paths: list[str]) -> Path:
    """Return the gallery's image_root where all images lie below it, otherwise the folder that they share."""
    root = Path(resolve(lookup(run.cfg, "DataLoader.Eval.Gallery.dataset.image_root") or ".")).absolute()
    absolute = [Path(path).absolute() for path in paths]
    if all(path.is_relative_to(root) for path in absolute):
        return root
    return Path(os.path.commonpath([path.parent for path in absolute]))
