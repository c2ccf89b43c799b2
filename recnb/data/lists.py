"""List files and folders become tables of (path, label, camera).

A list file has one image a line, `path label` or `path label camera`, paths relative to `image_root`. Labels are whole
numbers or names, one kind in a file: where all are plain digits, they are numbers, unless the data set's section says
`names: True`. Everything that can be wrong with a list is found here, before training: each error names the file and
the line. Every image is decoded once before training too, and one that cannot be is an error, or is left out
(`Global.on_bad_image`), and never another image. Identities of the training list are numbered 0..N-1 in sorted order
unless they are numbers and the file gives `class_num` (then labels are taken literally) or says `relabel: False`.
"""

import os
import re
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from torch.utils.data import Dataset, get_worker_info

from recnb.data.images import Cropped, DataError, faults, printable, read_pixels, reason
from recnb.data.pipeline import Pipeline
from recnb.registry import Registry
from recnb.storage import as_meant, harmless, replacing, resolve

BESIDE = {"transform_ops": list, "batch_transform_ops": list, "relabel": bool | None}
DATASETS = Registry("dataset", beside=BESIDE)
MOST = 10**8  # classes, more than any head has room for
REPORTED = 20  # how many images a report names
DIGITS = re.compile("[0-9]{1,19}")
NUMERIC = re.compile(r"[-+]?[\d.,_]+(?:[eE][-+]?\d+)?")  # what is meant as a number, be it one or not
ODD = re.compile(r"^/|\.\.|\0")  # what a path may hold that does not simply lead down


@dataclass
class ImageList(Dataset):
    """Images with an identity each and, where known, a camera: item i is (transformed image (3, H, W), label).

    `names[label]` is what an identity is called in the list file or on disk; None where labels are the list's own
    numbers. Labels given as text are numbered in sorted order; `number_alike` gives several tables the same numbers.
    With `boxes`, an image is the part of its file within (left, top, right, bottom), in pixels. An item may also be
    asked for as `(index, seed)`: its random transforms are then drawn from that seed alone.
    """

    paths: list[str]
    labels: np.ndarray  # (N,) int64, or text when it is built
    cameras: np.ndarray | None = None  # (N,) int64
    source: str = ""
    lines: np.ndarray | None = None  # (N,) line numbers in `source`
    names: np.ndarray | None = None
    transform: Any = field(default=None, repr=False)
    begun: torch.Tensor = field(default_factory=lambda: torch.full((64,), -1).share_memory_(), repr=False)
    boxes: np.ndarray | None = None  # (N, 4) int64
    dropped: list[tuple] = field(default_factory=list, repr=False)  # (list, line, path, reason) of what was left out
    kept: Any = field(default=None, repr=False)  # `recnb.data.cache.Kept`: images that need not be decoded again
    features: Any = field(default=None, repr=False)  # `recnb.data.cache.Features` in place of the images

    def __post_init__(self):
        if self.labels.dtype.kind == "U":
            self.names, self.labels = np.unique(self.labels, return_inverse=True)

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def pictures(self) -> list[str]:
        """The paths, each with its box where there are boxes, as galleries show them."""
        return self.paths if self.boxes is None else [*map(Cropped, self.paths, self.boxes.tolist())]

    @property
    def classes(self) -> int:
        """How many identities there are numbers for; 0 where they have no names."""
        return 0 if self.names is None else len(self.names)

    def name(self, label: int) -> str:
        """Return what an identity is called: its name, or its number where it has none."""
        return str(label if self.names is None else self.names[label])

    def place(self, index: int) -> str:
        """Where an item was declared: `train.txt line 7`, or its path."""
        return f"{self.source} line {self.lines[index]}" if self.lines is not None else printable(self.paths[index])

    def image(self, index: int) -> torch.Tensor:
        """uint8 (3, H, W) of `read_pixels`; raises DataError with the file that cannot be decoded and why."""
        box = None if self.boxes is None else self.boxes[index].tolist()
        try:
            return read_pixels(self.paths[index], box)
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise DataError(self.sentence(index, reason(error))) from error

    def sentence(self, index: int, reason: str) -> str:
        """Which image cannot be used, where it was declared, and why."""
        return f"{self.place(index)}: the image {printable(self.paths[index])} {reason}"

    def leave_out(self, reasons: dict[int, str]) -> None:
        """Take the items with a reason out, in place, and notes them in `dropped`; numbers and names stay."""
        lines = [""] * len(self) if self.lines is None else self.lines.tolist()
        self.dropped += [(self.source, lines[i], self.paths[i], why) for i, why in reasons.items()]
        kept = [i for i in range(len(self)) if i not in reasons]
        self.paths = [self.paths[i] for i in kept]
        for name in ("labels", "cameras", "lines", "boxes"):
            if getattr(self, name) is not None:
                setattr(self, name, getattr(self, name)[kept])

    def subset(self, kept: np.ndarray) -> "ImageList":
        """Return the items of a mask as a table of their own, with the names of its own identities."""
        parts = {name: getattr(self, name) for name in ("cameras", "lines", "boxes")}
        parts = {name: part if part is None else part[kept] for name, part in parts.items()}
        labels = self.labels[kept] if self.names is None else self.names[self.labels[kept]]
        return ImageList([self.paths[i] for i in np.flatnonzero(kept)], labels, source=self.source, **parts)

    def being_read(self) -> list[str]:
        """The files that worker processes have begun to read last, one a worker."""
        return [self.paths[i] for i in self.begun.tolist() if i >= 0]

    def __getitems__(self, items: list) -> list | tuple[torch.Tensor, torch.Tensor]:  # torch asks for a batch so
        if self.features is None:
            return [self[item] for item in items]
        places = [item[0] if isinstance(item, tuple) else item for item in items]
        return self.features.read(items), torch.from_numpy(self.labels[places])

    def __getitem__(self, item: int | tuple[int, int]):
        index, seed = item if isinstance(item, tuple) else (item, None)
        if self.features is not None:
            return self.features.read([item])[0], int(self.labels[index])
        if (worker := get_worker_info()) is not None:
            self.begun[worker.id % len(self.begun)] = index
        label, kept = int(self.labels[index]), self.kept
        ready = kept is not None and kept.transform is self.transform
        image = kept[index] if ready else self.image(index)
        with seeded(seed):
            if isinstance(self.transform, Pipeline):
                return Item(*self.transform.before(image, kept.done if ready else 0), label, self.transform)
            return image if self.transform is None else self.transform(image), label


@dataclass
class Item(Sequence):
    """(image (3, H, W), label); the image's last ops run when it is asked for: an `ImageLoader` runs them later."""

    pixels: torch.Tensor
    boxes: torch.Tensor
    label: int
    transform: Pipeline

    def __len__(self) -> int:
        return 2

    def __getitem__(self, i):
        return (self.transform.finish(self.pixels[None], self.boxes[None])[0], self.label)[i]

    def __iter__(self):  # a Sequence's own would run the ops for the label too
        return iter(self[:])


@contextmanager
def seeded(seed: int | None):
    """The CPU's random numbers drawn from `seed` within the block and as before behind it; None changes nothing."""
    before = torch.get_rng_state()
    if seed is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices, in 2 ms
    try:
        yield
    finally:
        if seed is not None:
            torch.set_rng_state(before)


def read_list(
    image_root: str,
    cls_label_path: str,
    delimiter: str | None,
    columns: tuple[int, ...],
    allow_outside: bool = False,
    names: bool | None = None,
    some: Iterable[tuple[int, str]] | None = None,
) -> ImageList:
    """Return the table of a list file.

    Args:
        image_root: the folder that the paths start from.
        cls_label_path: the list file.
        delimiter: what separates the columns, counted from the right; None is white space, however much.
        columns: how many columns a list may have; all its lines have equally many.
        allow_outside: whether a path may leave `image_root`, being absolute or by `..`; links are fine in any case.
        names: whether labels are names, also where they look like numbers; None is as the first line has it.
        some: (number, text) of the lines that are meant; None is all.

    Raises:
        DataError: A line is not `path label [camera]`, with its file and number.
    """
    root, path = str(resolve(image_root)), resolve(cls_label_path)
    paths, cells, cameras, lines, width, most = [], [], array("q"), array("q"), 0, max(columns) - 1
    forced, known = bool(names), {}  # one text for each name, however many lines it stands on
    for number, line in numbered_lines(path) if some is None else some:
        row = line.split() if delimiter is None else line.strip().rsplit(delimiter, most)
        if len(row) != width:
            if width or len(row) not in columns:
                wanted = f"{width} as on the lines before" if width else " or ".join(map(str, columns))
                raise DataError(f"{path} line {number}: {len(row)} columns, not {wanted} (path label [camera])")
            width = len(row)
        paths.append(below(root, row[0], allow_outside, path, number))
        label = row[1].strip()
        names = not NUMERIC.fullmatch(label) if names is None else names
        if names:
            check_name(label, path, number, forced)
        cells.append(known.setdefault(label, label) if names else integer(label, path, number))
        cameras.extend(integer(camera, path, number) for camera in row[2:])
        lines.append(number)
    if not paths:
        raise DataError(f"{path}: the list is empty")
    labels = np.array(cells) if names else np.array(cells, np.int64)
    return ImageList(paths, labels, np.array(cameras) if cameras else None, str(path), np.array(lines))


def check_name(label: str, path: Path, number: int, forced: bool) -> None:
    """Raise DataError unless a label can be a name beside the names on the lines before.

    Args:
        label: the cell.
        path: the list, for the message.
        number: the line, for the message.
        forced: whether the data set's section says that labels are names.
    """
    if not label or printable(label) != label:
        raise DataError(f"{path} line {number}: '{printable(label)}' is no name, which is text without control signs")
    if not forced and NUMERIC.fullmatch(label):
        raise DataError(
            f"{path} line {number}: the label '{label}' is a number, and those before it are names; correct it, or "
            "write names: True in the data set's section, where it is a name too"
        )


def below(root: str, name: str, allow_outside: bool, path: Path, number: int) -> str:
    """Return the file that a list names.

    Args:
        root: the folder that paths start from.
        name: the path in the list.
        allow_outside: whether it may lead out of `root`.
        path: the list, for the message.
        number: the line, for the message.

    Raises:
        DataError: It is no path, or leads out of `root`.
    """
    file = os.path.join(root, name)  # noqa: PTH118 (a Path takes four times as long)
    if ODD.search(name):
        if "\0" in name:
            raise DataError(f"{path} line {number}: '{printable(name)}' is no path")
        if not allow_outside:  # without its dots: behind a link, the system would take them another way
            file = os.path.normpath(file)
            whole, top = (os.path.normpath(Path(place).absolute()) for place in (file, root))
            if not Path(whole).is_relative_to(top):
                raise DataError(
                    f"{path} line {number}: '{printable(name)}' leaves image_root, {root}; correct it, "
                    "take a higher image_root, or write allow_outside: True in the data set's section"
                )
    return file


def numbered_lines(path: Path) -> Iterator[tuple[int, str]]:
    """(number from 1, text) of the lines of a list that are not blank; raises DataError where there is no such text."""
    if not path.is_file():
        raise DataError(f"cls_label_path: there is no file {path}")
    try:
        with path.open(encoding="utf-8-sig") as file:
            for number, line in enumerate(file, 1):
                if not line.isspace():
                    yield number, line
    except UnicodeDecodeError:
        raise DataError(f"{path} line {undecodable(path)}: is not UTF-8 text") from None


def undecodable(path: Path) -> int:
    """The number of the first line that is not UTF-8: reading a file in parts tells the place within a part only."""
    with path.open(encoding="utf-8", errors="surrogateescape") as file:
        return next(number for number, line in enumerate(file, 1) if re.search("[\udc80-\udcff]", line))


def integer(cell: str, path: Path, number: int) -> int:
    """Return the label or camera in a cell of a list.

    Args:
        cell: its text.
        path: the list, for the message.
        number: the line, for the message.

    Raises:
        DataError: It is no whole number from 0.
    """
    if DIGITS.fullmatch(cell.strip()) and int(cell) < 2**63:
        return int(cell)
    raise DataError(
        f"{path} line {number}: '{printable(cell)}' is not a label; labels and cameras are whole numbers from 0, and "
        "labels may all be names instead (names: True in the data set's section says so)"
    )


@DATASETS.register
def VeriWild(
    image_root: str,
    cls_label_path: str,
    relabel: bool | None = None,
    backend: str = "cv2",
    allow_outside: bool = False,
    names: bool | None = None,
    delimiter: str | None = None,
) -> ImageList:
    """The images of a list `path label [camera]`, columns separated by white space or by `delimiter`.

    With a delimiter such as a tab, paths and names may hold blanks. `names: True` takes all labels as names; `backend`
    changes nothing.
    """
    return read_list(image_root, cls_label_path, delimiter, (2, 3), allow_outside, names)


@DATASETS.register
def ImageNetDataset(
    image_root: str,
    cls_label_path: str,
    delimiter: str | None = " ",
    relabel: bool | None = None,
    allow_outside: bool = False,
    names: bool | None = None,
) -> ImageList:
    """The images of a list `path label`; with the default delimiter, paths may hold spaces."""
    return read_list(image_root, cls_label_path, delimiter or " ", (2,), allow_outside, names)


def check_images(*tables: ImageList) -> None:
    """Raise DataError, one report over all tables, naming the first images that cannot be used."""
    bad = [table.sentence(i, why) for table in tables for i, why in faults(table.paths, table.boxes).items()]
    if bad:
        more = [f"and {len(bad) - REPORTED} more"] * (len(bad) > REPORTED)
        lines = "\n".join([*bad[:REPORTED], *more])
        raise DataError(
            f"{len(bad)} of {sum(map(len, tables))} images cannot be used; mend them, take them out of "
            f"their lists, or leave them out with Global.on_bad_image: drop\n{lines}"
        )


def drop_faults(images: ImageList) -> None:
    """Leave out, in place, the images that cannot be used, and says so; raises DataError where none is left."""
    found, identities = faults(images.paths, images.boxes), set(images.labels.tolist())
    if not found:
        return
    first = images.sentence(*next(iter(found.items())))
    images.leave_out(found)
    if not len(images):
        raise DataError(f"{images.source}: none of the {len(found)} images can be used; {first}")
    lost = len(identities - set(images.labels.tolist()))
    print(
        f"{images.source}: {len(found)} images are left out (Global.on_bad_image), and {lost} identities have none "
        f"left; {first}"
    )


def save_dropped(rows: Iterable[tuple], path: str | Path) -> None:
    """Write `Loaders.dropped`, what was left out and why, as CSV, `list,line,path,reason`."""
    table = pd.DataFrame(rows, columns=["list", "line", "path", "reason"], dtype=object)
    write_csv(table, path)


def as_csv(table: pd.DataFrame, index: bool = False) -> str:
    """Return a table as CSV, no cell of which a spreadsheet would run."""
    table = table.apply(lambda column: column if is_numeric_dtype(column) else column.map(harmless))
    return table.rename(index=harmless, columns=harmless).to_csv(index=index, lineterminator="\n")


def write_csv(table: pd.DataFrame, path: str | Path, index: bool = False) -> None:
    """Write a table as CSV in UTF-8; bytes of a file name that are no text become escapes.

    Args:
        table: the rows.
        path: the file.
        index: whether the index is the first column.
    """
    with replacing(path) as temporary:
        temporary.write_text(as_csv(table, index), encoding="utf-8", errors="backslashreplace", newline="\n")


def read_csv(path: str | Path) -> pd.DataFrame:
    """Return a table that `write_csv` has written, every cell as its text."""
    return pd.read_csv(path, dtype=str, keep_default_na=False).map(as_meant)


def save_label_map(images: ImageList, path: str | Path) -> None:
    """Write which label each identity has as CSV, `label,name`, in the order of the labels."""
    write_csv(pd.DataFrame({"name": images.names}, dtype=object).rename_axis("label"), path, index=True)


def number_alike(*tables: ImageList, first: np.ndarray | None = None) -> None:
    """Give equal names equal numbers in several tables, in place.

    Args:
        tables: lists that are compared with one another, such as query and gallery.
        first: (N,) the names of the training identities, which keep their numbers 0..N-1; other names follow in sorted
            order.

    Raises:
        DataError: The labels of one table are names and those of another are numbers.
    """
    known = [np.unique(table.labels) if table.names is None else table.names for table in tables]
    for table, names in zip(tables, known, strict=True):
        if names.dtype.kind != known[0].dtype.kind:
            raise DataError(
                f"the labels of {tables[0].source} and of {table.source} are numbers in one and names in the other; "
                "write them alike, or names: True in the data set's section of both"
            )
    names = np.unique(np.concatenate(known))
    if first is not None and first.dtype.kind == names.dtype.kind:
        names = np.concatenate([first, np.setdiff1d(names, first)])
    order = np.argsort(names, kind="stable")
    for table, own in zip(tables, known, strict=True):
        numbers = order[np.searchsorted(names, own, sorter=order)]
        table.labels = numbers[table.labels if table.names is not None else np.searchsorted(own, table.labels)]
        table.names = names


def same_list(one: ImageList, other: ImageList) -> bool:
    """Return True if two tables hold the same images, seen by equal transforms, with the same labels and cameras."""
    arrays = ([table.labels, table.cameras, table.boxes, table.names] for table in (one, other))
    return one.paths == other.paths and str(one.transform) == str(other.transform) and all(map(np.array_equal, *arrays))


def own_index(query: ImageList, gallery: ImageList) -> np.ndarray:
    """(Q,) where each query's own image, its file and box, stands in the gallery, -1 where it does not."""
    places = {image: i for i, image in enumerate(images_of(gallery))}
    return np.array([places.get(image, -1) for image in images_of(query)])


def images_of(table: ImageList) -> list[tuple]:
    """Return (file, *box) of each row, the same in whatever spelling, and through links."""
    boxes = [()] * len(table) if table.boxes is None else table.boxes.tolist()
    return [(os.path.realpath(path), *box) for path, box in zip(table.paths, boxes, strict=True)]


def drop_repeated(table: ImageList) -> None:
    """Leave out, in place, rows whose image stands in the list already, and say how many: it would find itself."""
    first: dict[tuple, int] = {}
    again = {i: first[image] for i, image in enumerate(images_of(table)) if first.setdefault(image, i) != i}
    if again:
        i, before = next(iter(again.items()))
        print(
            f"{table.source}: {len(again)} rows name an image that the list has already, and are left out; the first "
            f"is {table.place(i)}, the image of {table.place(before)}"
        )
        table.leave_out({i: f"is the image of {table.place(before)}" for i, before in again.items()})


def positives(query: ImageList, gallery: ImageList) -> np.ndarray:
    """(Q,) how many gallery images each query can find: its identity, not its own file, not its own camera."""
    identity = Counter(gallery.labels.tolist())
    if query.cameras is not None and gallery.cameras is not None:
        same = Counter(zip(gallery.labels.tolist(), gallery.cameras.tolist(), strict=True))
        junk = [same[pair] for pair in zip(query.labels.tolist(), query.cameras.tolist(), strict=True)]
    else:
        own = own_index(query, gallery)
        junk = (own >= 0) & (gallery.labels[own] == query.labels)
    return np.array([identity[label] for label in query.labels.tolist()]) - np.asarray(junk, int)
