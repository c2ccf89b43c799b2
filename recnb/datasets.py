"""List files and folders become tables of (path, label, camera), and tables become data loaders.

A list file has one image a line, `path label` or `path label camera`, paths relative to `image_root`. Everything that
can be wrong with one is found here, before training: each error names the file and the line. An image that cannot be
read is an error and never another image. Identities of the training list are numbered 0..N-1 in sorted order unless the
file gives `class_num` (then labels are taken literally) or says `relabel: False`.
"""
from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageOps
from torch.utils.data import DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from recnb.config import ConfigError, Registry, lookup, resolve
from recnb.samplers import SAMPLERS
from recnb.transforms import build_transform, output_shape

DATASETS = Registry("dataset", "DataLoader.*.dataset", beside={"transform_ops": list})
EXTENSIONS = tuple(Image.registered_extensions())


class DataError(RuntimeError):
    "Images or list files that cannot be used; the message names the file and the line."


@dataclass
class ImageList(Dataset):
    """Images with an identity each and, where known, a camera: item i is (transformed image (3, H, W), label).

    `names[label]` is what an identity is called in the list file or on disk. An item may also be asked for as
    `(index, seed)`: its random transforms are then drawn from that seed alone.
    """

    paths: list[str]
    labels: np.ndarray  # (N,) int64
    cameras: np.ndarray | None = None  # (N,) int64
    source: str = ""
    lines: np.ndarray | None = None  # (N,) line numbers in `source`
    names: np.ndarray | None = None
    transform: object = field(default=None, repr=False)

    def __len__(self) -> int:
        return len(self.paths)

    def place(self, index: int) -> str:
        "Where an item was declared: `train.txt line 7`, or its path."
        return f"{self.source} line {self.lines[index]}" if self.lines is not None else self.paths[index]

    def image(self, index: int) -> torch.Tensor:
        "uint8 (3, H, W), RGB, EXIF rotation applied; raises DataError naming the file where it cannot be decoded."
        try:
            with Image.open(self.paths[index]) as image:
                return pil_to_tensor(to_rgb(ImageOps.exif_transpose(image)))
        except Exception as error:  # decoders raise whatever a broken file leads them to
            raise DataError(f"{self.place(index)}: the image {self.paths[index]} cannot be decoded: {error}") from error

    def __getitem__(self, item: int | tuple[int, int]):
        index, seed = item if isinstance(item, tuple) else (item, None)
        image = self.image(index)
        if self.transform is not None:
            with seeded(seed):
                image = self.transform(image)
        return image, int(self.labels[index])


@contextmanager
def seeded(seed: int | None):
    "The CPU's random numbers drawn from `seed` within the block and as before behind it; None changes nothing."
    before = torch.get_rng_state()
    if seed is not None:
        torch.default_generator.manual_seed(seed)  # torch.manual_seed would seed all devices, in 2 ms
    try:
        yield
    finally:
        if seed is not None:
            torch.set_rng_state(before)


def to_rgb(image: Image.Image) -> Image.Image:
    "The image in RGB; 16-bit grey is scaled to 8 bits, where Pillow would clip it to white."
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode}, which have no known range; save it with 8 or 16 bits")
    return image.convert("RGB")


def read_list(image_root: str, cls_label_path: str, delimiter: str | None, columns: tuple[int, ...]) -> ImageList:
    "The table of a list file; raises DataError with file and line for whatever is not `path label [camera]`."
    root, path = resolve(image_root), resolve(cls_label_path)
    if not path.is_file():
        raise DataError(f"cls_label_path: there is no file {path}")
    rows, lines = [], []
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {error.object.count(10, 0, error.start) + 1}: is not UTF-8 text") from None
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            row = line.split(delimiter) if delimiter is None else line.strip().rsplit(delimiter, max(columns) - 1)
            if len(row) not in columns or len(row) != len(rows[0] if rows else row):
                wanted = f"{len(rows[0])} as on the lines before" if rows else " or ".join(map(str, columns))
                raise DataError(f"{path} line {number}: {len(row)} columns, not {wanted} (path label [camera])")
            rows.append((row[0], *(integer(cell, path, number) for cell in row[1:])))
            lines.append(number)
    if not rows:
        raise DataError(f"{path}: the list is empty")
    paths, labels, *cameras = zip(*rows, strict=True)
    return ImageList([str(root / p) for p in paths], np.array(labels, np.int64),
                     np.array(cameras[0], np.int64) if cameras else None, str(path), np.array(lines))


def integer(cell: str, path: Path, number: int) -> int:
    "The label or camera in a cell of a list; raises DataError with file and line where it is none."
    try:
        value = int(cell)
    except ValueError:
        value = -1
    if not 0 <= value < 2**63:
        raise DataError(f"{path} line {number}: '{cell}' is not a label; labels and cameras are whole numbers from 0")
    return value


@DATASETS.register
def VeriWild(image_root: str, cls_label_path: str, relabel: bool | None = None) -> ImageList:
    "The images of a list `path label [camera]`, columns separated by white space."
    return read_list(image_root, cls_label_path, None, (2, 3))


@DATASETS.register
def ImageNetDataset(image_root: str, cls_label_path: str, delimiter: str = " ",
                    relabel: bool | None = None) -> ImageList:
    "The images of a list `path label`; with the default delimiter, paths may hold spaces."
    return read_list(image_root, cls_label_path, delimiter, (2,))


@DATASETS.register
def ImageFolder(image_root: str, relabel: bool | None = None) -> ImageList:
    "The images below `image_root`, where each folder of the first level is one identity (of that name)."
    root = resolve(image_root)
    folders = sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []
    files = [(str(file), folder.name) for folder in folders
             for file in sorted(folder.rglob("*")) if file.suffix.lower() in EXTENSIONS]
    if not files:
        raise DataError(f"image_root: {root} has no folders with images (one folder per identity)")
    paths, names = zip(*files, strict=True)
    return ImageList(list(paths), np.array(names), source=str(root))


def check_images(images: ImageList) -> None:
    "None; raises DataError for the first image (and counts the others) that is missing or not an image."
    def problem(index: int) -> str | None:
        try:
            with Image.open(images.paths[index]):
                return None
        except FileNotFoundError:
            return "there is no image"
        except (OSError, Image.DecompressionBombError):
            return "cannot be read as an image:"

    with ThreadPoolExecutor(8) as pool:
        bad = [(i, text) for i, text in enumerate(pool.map(problem, range(len(images)))) if text]
    if bad:
        others = f" (and {len(bad) - 1} more of {len(images)})" if len(bad) > 1 else ""
        raise DataError(f"{images.place(bad[0][0])}: {bad[0][1]} {images.paths[bad[0][0]]}{others}")


def read_split(cfg: dict, where: str) -> ImageList:
    "The table of the data set section at `where`, labels as the list or the folders give them."
    section = lookup(cfg, f"{where}.dataset")
    if section is None:
        raise ConfigError(f"{where}.dataset: there is no such section")
    try:
        return DATASETS.build(section, f"{where}.dataset")
    except DataError as error:
        raise DataError(f"{where}.dataset: {error}") from None


def training_images(cfg: dict) -> ImageList:
    """The training table, with labels 0..N-1 and their names.

    Raises DataError where a label is not below the class_num that the file gives, naming both and their places.
    """
    images = read_split(cfg, "DataLoader.Train")
    where = "Arch.Head.class_num" if lookup(cfg, "Arch.Head.class_num") else "Global.class_num"
    class_num, relabel = lookup(cfg, where), lookup(cfg, "DataLoader.Train.dataset.relabel")
    ids, labels = np.unique(images.labels, return_inverse=True)
    literal = ids.dtype.kind != "U" and not (class_num is None if relabel is None else relabel)
    if not literal:
        images.labels = labels.reshape(-1)
    if class_num and images.labels.max() >= class_num:
        first = int(np.argmax(images.labels >= class_num))
        raise DataError(f"{images.place(first)}: label {images.labels[first]} is out of range: {where} is {class_num}, "
                        f"the list has {len(ids)} identities up to {ids[-1]}; correct {where} or leave it out")
    images.names = np.arange(ids[-1] + 1) if literal else ids
    return images


def evaluation_images(cfg: dict) -> tuple[ImageList, ImageList]:
    """The query and the gallery tables, labelled alike.

    Raises DataError where no query has anything to find, or where only one of the lists has cameras.
    """
    query, gallery = (read_split(cfg, f"DataLoader.Eval.{part}") for part in ("Query", "Gallery"))
    if (query.cameras is None) != (gallery.cameras is None):
        with_cameras, without = (query, gallery) if gallery.cameras is None else (gallery, query)
        raise DataError(f"{with_cameras.source} has a third column, the camera, and {without.source} has none: give "
                        "it in both lists or in neither")
    names = np.unique(np.concatenate([query.labels, gallery.labels]))
    for images in (query, gallery):
        images.names, images.labels = names, np.searchsorted(names, images.labels)
    if not positives(query, gallery).any():
        raise DataError(f"{query.source}: no query has an image of its identity in {gallery.source} "
                        "(its own file, and images of its own camera, do not count)")
    return query, gallery


def own_index(query: ImageList, gallery: ImageList) -> np.ndarray:
    "(Q,) where each query's own file stands in the gallery, -1 where it does not."
    places = {os.path.realpath(path): i for i, path in enumerate(gallery.paths)}
    return np.array([places.get(os.path.realpath(path), -1) for path in query.paths])


def positives(query: ImageList, gallery: ImageList) -> np.ndarray:
    "(Q,) how many gallery images each query can find: its identity, not its own file, not its own camera."
    identity = Counter(gallery.labels.tolist())
    if query.cameras is not None and gallery.cameras is not None:
        same = Counter(zip(gallery.labels.tolist(), gallery.cameras.tolist(), strict=True))
        junk = [same[pair] for pair in zip(query.labels.tolist(), query.cameras.tolist(), strict=True)]
    else:
        own = own_index(query, gallery)
        junk = (own >= 0) & (gallery.labels[own] == query.labels)
    return np.array([identity[label] for label in query.labels.tolist()]) - np.asarray(junk, int)


@dataclass
class Loaders:
    "The data loaders of a run; query and gallery are None where nothing is evaluated."

    train: DataLoader
    query: DataLoader | None = None
    gallery: DataLoader | None = None


def build_loaders(cfg: dict) -> Loaders:
    """The data loaders of a configuration, all images checked to exist and to open.

    Raises ConfigError or DataError, before anything is trained, for whatever would fail or mislead later.
    """
    images = {"Train": training_images(cfg)}
    if cfg["Global"]["eval_during_train"] or lookup(cfg, "DataLoader.Eval"):
        images["Eval.Query"], images["Eval.Gallery"] = evaluation_images(cfg)
    loaders = {}
    for part, table in images.items():
        where = f"DataLoader.{part}"
        table.transform = build_transform(cfg, f"{where}.dataset")
        shape, wanted = output_shape(table.transform, where), tuple(cfg["Global"]["image_shape"])
        if part != "Train" and shape != wanted:
            raise ConfigError(f"{where}.dataset.transform_ops make images of {shape}, Global.image_shape is {wanted}")
        loaders[part] = build_loader(cfg, where, table)
    for table in {(t.source, t.paths[0]): t for t in images.values()}.values():
        check_images(table)
    return Loaders(*loaders.values())


def build_loader(cfg: dict, where: str, images: ImageList) -> DataLoader:
    "The loader of one split: training batches from its sampler, evaluation images in the order of their list."
    section, options = lookup(cfg, f"{where}.sampler"), dict(lookup(cfg, f"{where}.loader") or {})
    if section is None or section.get("batch_size", 0) < 1:
        raise ConfigError(f"{where}.sampler: must name a sampler and its batch_size, at least 1")
    options.pop("use_shared_memory", None)
    workers, seed = options.setdefault("num_workers", 0), cfg["Global"]["seed"]
    if not workers:
        options.pop("prefetch_factor", None)
    # An own generator keeps the loader from drawing on the global random state, which belongs to the model.
    options |= {"persistent_workers": workers > 0, "pin_memory": torch.cuda.is_available(),
                "generator": torch.Generator().manual_seed(seed)}
    if where == "DataLoader.Train":
        known = {"labels": (images.labels, ""), "seed": (seed, "Global.seed is")}
        return DataLoader(images, batch_sampler=SAMPLERS.build(section, f"{where}.sampler", **known), **options)
    if section.get("drop_last"):
        raise ConfigError(f"{where}.sampler.drop_last: True would leave images out of the evaluation")
    return DataLoader(images, batch_size=section["batch_size"], **options)
