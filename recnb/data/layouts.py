"""Data sets in the layout in which they are distributed: nothing has to be listed first.

Identities, cameras and boxes come from the names of the files, from files beside them, or from torchvision. Where a set
has names for its identities, or people as numbers of four digits, these names are the labels, as those of folders are:
training numbers them in sorted order, whatever `class_num` says.
"""

import inspect
import os
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torchvision.datasets
from PIL import Image
from tqdm.auto import tqdm

from recnb.data.images import DataError
from recnb.data.lists import DATASETS, ImageList, below, integer, numbered_lines, read_list
from recnb.data.transforms import Share
from recnb.demo.marks import draw_marks
from recnb.registry import suggest
from recnb.storage import resolve

EXTENSIONS = tuple(ending for ending, kind in Image.registered_extensions().items() if kind in Image.OPEN)
EXTRAS = dict.fromkeys((".heic", ".heif", ".hif"), "pip install 'recnb[heic]'") | {".avif": "pip install -U pillow"}
SYSTEM = ("thumbs.db", "desktop.ini", "__macosx")  # what Windows and macOS leave in folders
JUNK = -1  # the number of detections that show no whole person
SETS = {  # the splits of torchvision's sets of one label an image; with none, the set is in one piece
    "CIFAR10": ("train", "test"),
    "CIFAR100": ("train", "test"),
    "Caltech101": (),
    "Caltech256": (),
    "Country211": ("train", "valid", "test"),
    "DTD": ("train", "val", "test"),
    "EuroSAT": (),
    "FGVCAircraft": ("trainval", "test"),
    "FashionMNIST": ("train", "test"),
    "Flowers102": ("train", "val", "test"),
    "Food101": ("train", "test"),
    "GTSRB": ("train", "test"),
    "Imagenette": ("train", "val"),
    "KMNIST": ("train", "test"),
    "LFWPeople": ("10fold",),
    "MNIST": ("train", "test"),
    "Omniglot": ("background", "evaluation"),
    "OxfordIIITPet": ("trainval", "test"),
    "SUN397": (),
    "STL10": ("train", "test"),
    "SVHN": ("train", "test"),
    "StanfordCars": ("train", "test"),
    "USPS": ("train", "test"),
}


# ---- folders ---------------------------------------------------------------------------------------------------------


@DATASETS.register
def ImageFolder(image_root: str, relabel: bool | None = None) -> ImageList:
    """The images below `image_root`, where each folder of the first level is one identity (of that name)."""
    root = resolve(image_root)
    files, unused = scan(root) if root.is_dir() else ([], [])
    if not files:
        raise DataError(f"image_root: {root} {no_images(unused)}")
    paths, names = zip(*files, strict=True)
    return ImageList(list(paths), np.array(names), source=str(root))


def no_images(unused: list[tuple[str, str]]) -> str:
    """Return the half sentence that says that a folder has no images, and what would let some of its files be read."""
    formats = Counter(why for _, why in unused if "are read after" in why)
    missing = "".join(f"; {count:,} files: {why}" for why, count in formats.items())
    return f"has no folders with images (one folder per identity){missing}"


def scan(root: Path) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
    """Return (path, identity) of each image of a folder of folders, and (path, reason) of whatever is none.

    The identity is the folder of the first level; an image may lie deeper in it. Nothing is opened.
    """
    images, unused = [], []
    with os.scandir(root) as entries, tqdm(desc="files found", unit=" files", leave=False, delay=3) as bar:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if not entry.is_dir():
                unused.append((entry.path, unusable(entry.name) or "lies in no folder, which would be its identity"))
                continue
            found = below_folder(entry.path) if own(entry.name) else ()
            files = sorted(found, key=lambda path: path.split(os.sep))  # noqa: PTH206
            reasons = [unusable(path.rpartition(os.sep)[2]) for path in files]
            images += [(path, entry.name) for path, why in zip(files, reasons, strict=True) if why is None]
            unused += [(path, why) for path, why in zip(files, reasons, strict=True) if why is not None]
            if not files:
                unused.append((entry.path, "an empty folder" if own(entry.name) else "a folder of the system"))
            bar.update(len(files))
    return images, unused


def below_folder(folder: str) -> Iterator[str]:
    """Yield the path of each file of a folder and of those in it, but for folders of the system."""
    for place, folders, files in os.walk(folder):
        folders[:] = filter(own, folders)
        yield from (os.path.join(place, name) for name in files)  # noqa: PTH118 (a Path takes four times as long)


def own(name: str) -> bool:
    """Return whether a file or folder can be meant as a person's own, and is none that the system left there."""
    return not name.startswith(".") and name.lower() not in SYSTEM


def unusable(name: str) -> str | None:
    """Return why a file cannot be an image, by its name, or None."""
    ending = os.path.splitext(name)[1].lower()  # noqa: PTH122 (a Path takes four times as long)
    if not own(name):
        return "a file of the system"
    if ending in EXTENSIONS:
        return None
    if ending in EXTRAS:
        return f"{ending} images are read after {EXTRAS[ending]}"
    return f"not an image ({ending or 'no ending'})"


# ---- persons ---------------------------------------------------------------------------------------------------------


@DATASETS.register
def Market1501(image_root: str, cls_label_path: str, backend: str = "cv2") -> ImageList:
    """A folder of Market-1501 (Zheng et al., ICCV 2015): `bounding_box_train`, `query` or `bounding_box_test`.

    `image_root` is `Market-1501-v15.09.15`, or holds it, or holds a folder with it (`market1501` in the original).
    Images of the person -1, junk, are left out; those of 0, the distractors, stay. `backend` changes nothing.
    """
    return persons(within(image_root, "Market-1501-v15.09.15", cls_label_path))


@DATASETS.register
def DukeMTMC(image_root: str, cls_label_path: str, backend: str = "cv2") -> ImageList:
    """A folder of DukeMTMC-reID (Zheng et al., ICCV 2017), named as those of Market-1501.

    `image_root` is `DukeMTMC-reID`, or holds it, or holds a folder with it (`dukemtmc` in the original).
    """
    return persons(within(image_root, "DukeMTMC-reID", cls_label_path))


@DATASETS.register
def MSMT17(image_root: str, cls_label_path: str) -> ImageList:
    """A part of MSMT17 (Wei et al., CVPR 2018): one of its own lists, or a folder named as those of Market-1501.

    A list is `list_train.txt`, `list_val.txt`, `list_query.txt` or `list_gallery.txt`; its images lie beside it in
    `train` or `test` (in the second release `mask_train_v2` or `mask_test_v2`). `image_root` is `MSMT17_V1`, or holds
    it, or holds a folder with it (`msmt17` in the original).
    """
    place = within(image_root, "MSMT17_V1", cls_label_path)
    return persons(place) if place.is_dir() else listed_persons(place)


def within(image_root: str, folder: str, name: str) -> Path:
    """Return where a part of a distributed set is.

    Args:
        image_root: the set's folder, or one that holds it, at most one folder further down.
        folder: the name of the set's folder.
        name: the part.

    Raises:
        DataError: It is nowhere or in several places.
    """
    root = resolve(image_root)
    places = [root / name, root / folder / name, *sorted(root.glob(f"*/{folder}/{name}"))]
    found = [place for place in places if place.exists()]
    if len(found) != 1:
        several = f"both {found[0]} and {found[1]}" if found else f"neither {places[0]} nor {places[1]}"
        raise DataError(f"cls_label_path: there is {several}; image_root is {folder}, or a folder that holds it")
    return found[0]


def persons(folder: Path) -> ImageList:
    """The images of a folder, person and camera parsed from their names; raises DataError for a name without them."""
    files = [file for file in sorted(folder.iterdir()) if file.suffix.lower() in EXTENSIONS]
    found = {file: re.match(r"(-1|\d+)_c(\d+)", file.name) for file in files}
    for file in (file for file, match in found.items() if match is None):
        raise DataError(f"{file}: the name does not begin with a person and a camera, as in 0002_c1s1_000451_03.jpg")
    rows = [
        (str(file), int(match[1]), int(match[2])) for file, match in found.items() if match and int(match[1]) != JUNK
    ]
    if not rows:
        raise DataError(f"{folder}: holds no images of persons")
    paths, numbers, cameras = zip(*rows, strict=True)
    return ImageList(list(paths), named(numbers), np.array(cameras, np.int64), str(folder))


def listed_persons(path: Path) -> ImageList:
    """The images of one of MSMT17's lists `path person`; the camera is the third number of a file's name."""
    part = "train" if path.stem in ("list_train", "list_val") else "test"
    masked = path.parent / f"mask_{part}_v2"
    images = read_list(str(masked if masked.is_dir() else path.parent / part), str(path), None, (2,))
    found = [re.match(r"\d+_\d+_(\d+)_", Path(image).name) for image in images.paths]
    if None in found:
        raise DataError(
            f"{images.place(found.index(None))}: the third number of a file's name is its camera, as in "
            f"0000_000_01_0303morning_0008_0.jpg, and {images.paths[found.index(None)]} has none"
        )
    cameras = np.array([int(match[1]) for match in found if match])
    return ImageList(images.paths, named(images.labels), cameras, images.source, images.lines)


def named(numbers: Iterable[int]) -> np.ndarray:
    """Numbers as names that sort as they do, up to 9999: such labels are never taken for those of a classifier."""
    return np.array([f"{number:04d}" for number in numbers])


# ---- vehicles, faces, logos ------------------------------------------------------------------------------------------


@DATASETS.register
def CompCars(
    image_root: str,
    cls_label_path: str,
    label_root: str | None = None,
    bbox_crop: bool = False,
    relabel: bool | None = None,
    allow_outside: bool = False,
) -> ImageList:
    """The images of a list `path label` of CompCars (Yang et al., CVPR 2015), with `bbox_crop` cropped to the car.

    The box of `a/b.jpg` is the third line, `left top right bottom`, of `a/b.txt` below `label_root`.
    """
    images = read_list(image_root, cls_label_path, None, (2,), allow_outside)
    if bbox_crop:
        if label_root is None:
            raise ValueError("bbox_crop needs label_root, the folder of the files with the boxes")
        boxes, root = resolve(label_root), resolve(image_root)
        images.boxes = np.array(
            [
                read_box((boxes / os.path.relpath(path, root)).with_suffix(".txt"), images.place(i))
                for i, path in enumerate(images.paths)
            ]
        )
    return images


def read_box(path: Path, place: str) -> list[int]:
    """[left, top, right, bottom] of a box file of CompCars; `place` is where its image is listed."""
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{place}: the file with its box, {path}, cannot be read: {error}") from None
    text = lines[2] if len(lines) > 2 else ""
    if not re.fullmatch(r"\s*\d+(\s+\d+){3}\s*", text):
        raise DataError(f"{path} line 3: '{text}' is not a box; it is four whole numbers, left top right bottom")
    return [int(cell) for cell in text.split()]


@DATASETS.register
def ICartoonDataset(
    image_root: str, cls_label_path: str, relabel: bool | None = None, allow_outside: bool = False
) -> ImageList:
    """The images of a list of iCartoonFace (Zheng et al., 2020): path and label, separated by a tab."""
    return read_list(image_root, cls_label_path, "\t", (2,), allow_outside)


@DATASETS.register
def LogoDataset(
    image_root: str, cls_label_path: str, relabel: bool | None = None, allow_outside: bool = False
) -> ImageList:
    """The images of a table of logos: columns separated by tabs, a first line that begins with `image_id`.

    The second column is the label, counted from 1, and the fourth the path. Labels here count from 0, as the
    original's: label 1 of the table is 0.
    """
    path, root, rows = resolve(cls_label_path), str(resolve(image_root)), []
    for number, line in numbered_lines(path):
        cells = line.strip().split("\t")
        if cells[0] == "image_id":
            continue
        if len(cells) < 4:
            raise DataError(f"{path} line {number}: {len(cells)} columns between tabs, not 4 (label 2nd, path 4th)")
        label = integer(cells[1], path, number)
        if label == 0:
            raise DataError(f"{path} line {number}: the label is 0, and labels of this table count from 1")
        rows.append((below(root, cells[3], allow_outside, path, number), label - 1, number))
    if not rows:
        raise DataError(f"{path}: the list is empty")
    paths, labels, lines = zip(*rows, strict=True)
    return ImageList(list(paths), np.array(labels, np.int64), source=str(path), lines=np.array(lines))


# ---- the demo --------------------------------------------------------------------------------------------------------


@DATASETS.register
def DrawnMarks(image_root: str, cls_label_path: str, relabel: bool | None = None) -> ImageList:
    """The demo's drawn marks, `path label camera`; they are drawn where they are missing.

    Args:
        image_root: `images` in the folder of the set.
        cls_label_path: `train.txt`, `query.txt` or `gallery.txt` in the folder of the set.
        relabel: Whether the identities of the training list are numbered anew.
    """
    folder = resolve(cls_label_path).parent
    try:
        draw_marks(folder)
    except OSError as error:
        raise DataError(f"the drawn marks cannot be written to {folder}: {error.strerror}") from None
    return read_list(image_root, cls_label_path, None, (3,))


# ---- torchvision's sets ----------------------------------------------------------------------------------------------


@DATASETS.register
def Cifar10(image_root: str, mode: str = "train", download: bool = False, backend: str = "cv2") -> ImageList:
    """All ten classes of CIFAR-10 (Krizhevsky, 2009), `mode` train or test; written once as files (`Torchvision`)."""
    return Torchvision(image_root, "CIFAR10", "train", 1.0, mode, download)


@DATASETS.register
def Cifar100(image_root: str, mode: str = "train", download: bool = False, backend: str = "cv2") -> ImageList:
    """All hundred classes of CIFAR-100 (Krizhevsky, 2009), `mode` train or test.

    Written once as files (`Torchvision`).
    """
    return Torchvision(image_root, "CIFAR100", "train", 1.0, mode, download)


@DATASETS.register
def Torchvision(
    image_root: str,
    set: str,
    part: Literal["train", "test"] = "train",
    train_share: Share = 0.5,
    split: str | None = None,
    download: bool = False,
) -> ImageList:
    """A set of torchvision's, divided by class: nothing of a class that is trained on is searched for.

    The first `train_share` of the classes, in the order in which the set numbers them, are the part `train`, the
    others the part `test` (0.5 is the custom); all images of a class count, or those of one `split` of the set. What
    is not kept as files is written once, as `recnb_png/<set>/<split>/<class>/<number>.png` below `image_root`.
    `download` fetches the set. Raises ValueError or DataError for arguments that choose nothing.
    """
    if set not in SETS:
        raise ValueError(f"set: torchvision has no '{set}' of one label an image; {suggest(set, SETS)}")
    if split is not None and split not in SETS[set]:
        raise ValueError(f"split: {set} has no '{split}'; {suggest(split, SETS[set])}")
    root = resolve(image_root)
    rows = list(
        chain.from_iterable(stored(set, root, one, download) for one in ([split] if split else SETS[set] or [None]))
    )
    identities = list(dict.fromkeys(identity for _, identity in rows))
    first = round(train_share * len(identities))
    chosen = dict.fromkeys(identities[:first] if part == "train" else identities[first:])
    if not chosen:
        raise DataError(f"train_share: {train_share} of {len(identities)} classes leaves none for the part {part}")
    paths, names = zip(*(row for row in rows if row[1] in chosen), strict=True)
    return ImageList(list(paths), np.array(names), source=f"{root} ({set})")


def stored(name: str, root: Path, split: str | None, download: bool) -> list[tuple[str, str]]:
    """Return (path, class) of every image of one split, class by class.

    Args:
        name: torchvision's name of the set.
        root: the folder of the data.
        split: one of the set's splits, or None.
        download: whether to fetch the set.

    Raises:
        DataError: torchvision does not find the set.
    """
    made = getattr(torchvision.datasets, name)
    options = {
        "train": split == "train",
        "background": split == "background",
        "split": split,
        "download": download,
        "loader": str,
    }  # a loader that opens nothing: items are then paths
    try:
        data = made(str(root), **{k: v for k, v in options.items() if k in inspect.signature(made).parameters})
    except (RuntimeError, OSError) as error:
        raise DataError(f"image_root: torchvision does not find {name} in {root}: {error}") from None
    names, rows = class_names(data), []
    with written_once(root / "recnb_png" / name / (split or "all")) as (folder, write):
        for number, (picture, label) in enumerate(items(data)):
            identity = names.get(int(label), f"{int(label):04d}")
            if not isinstance(picture, Image.Image):
                path = picture
            elif path := getattr(picture, "filename", ""):
                picture.close()
            else:
                path = Path(identity.replace(os.sep, "_"), f"{number:05d}.png")
                write(picture, path)
                path = folder / path
            rank = identity if name == "Omniglot" else int(label)  # its numbers follow the order of the file system
            rows.append((rank, str(path), identity))
    return [row[1:] for row in sorted(rows)]


def class_names(data) -> dict[int, str]:
    """What a set of torchvision's calls each label, as far as it says."""
    if getattr(data, "class_to_idx", None):
        return {index: str(name) for name, index in data.class_to_idx.items()}
    lists = (getattr(data, name, None) for name in ("classes", "categories", "_characters"))
    return dict(enumerate(map(str, next(filter(None, lists), ()))))


def items(data) -> Iterable:
    """The (path or picture, label) of each image; paths that a set keeps are taken without opening the images."""
    if hasattr(data, "_samples"):
        return data._samples
    if hasattr(data, "_images"):
        return zip(data._images, data._labels, strict=True)
    return (data[i] for i in range(len(data)))


@contextmanager
def written_once(folder: Path) -> Iterator[tuple]:
    """(folder, function that writes a picture into it); the folder appears when the block has ended without an error.

    Where it is there already, it is whole, and nothing is written.
    """
    temporary, there = folder.with_name(f".{folder.name}.{os.getpid()}.part"), folder.is_dir()

    def write(picture: Image.Image, path: Path) -> None:
        if not there:
            (temporary / path).parent.mkdir(parents=True, exist_ok=True)
            picture.save(temporary / path)

    try:
        yield folder, write
        if temporary.is_dir() and not folder.is_dir():  # another process may have been faster
            temporary.rename(folder)
    except OSError as error:
        raise DataError(f"image_root: the images of the set cannot be written to {folder}: {error}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def register_set(name: str) -> None:
    """Make a set of torchvision's known by its own name, as well as by `Torchvision` with `set`."""

    def dataset(
        image_root: str,
        part: Literal["train", "test"] = "train",
        train_share: Share = 0.5,
        split: str | None = None,
        download: bool = False,
    ) -> ImageList:
        return Torchvision(image_root, name, part, train_share, split, download)

    dataset.__name__, dataset.__doc__ = name, f"{name} by its own name: see `Torchvision`."
    DATASETS.register(dataset)


for _name in SETS:
    register_set(_name)
