"""What is computed once and kept, in files that all processes map into their memory: resized images, and features.

Training on the features of a frozen part of a network is training on vectors: no image is decoded, and a batch is one
read. View 0 of each image is as the evaluation sees it; further views, where there are any, are augmented.
"""

import hashlib
import os
import shutil
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import cache
from itertools import chain, takewhile
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2
from tqdm.auto import tqdm

from recnb.data.images import fingerprint
from recnb.data.lists import ImageList
from recnb.data.pipeline import Pipeline
from recnb.distributed.processes import first_does
from recnb.registry import ConfigError
from recnb.storage import replacing

TOGETHER = 100  # images that are decoded before they are written


@cache
def mapped(path: Path) -> np.ndarray:
    """Return the array in a file, which each process maps into its memory once."""
    return np.load(path, mmap_mode="r")


class Kept:
    """The images (3, H, W) of a list as the first `done` ops of a transform leave them, in a file."""

    def __init__(self, path: Path, transform: Pipeline, done: int):
        self.path, self.transform, self.done = path, transform, done

    def __getitem__(self, index: int) -> Tensor:
        return torch.from_numpy(mapped(self.path)[index].copy()).permute(2, 0, 1)


def fixed_ops(transform: Pipeline) -> int:
    """How many of the first ops make one size of all images, and of an image always the same; 0 where none do."""
    same = takewhile(lambda op: isinstance(op, (v2.Identity, v2.Resize, v2.CenterCrop)), transform.transforms)
    sized = (isinstance(op, v2.CenterCrop) or (isinstance(op, v2.Resize) and len(op.size) == 2) for op in same)
    return max((count for count, one_size in enumerate(sized, 1) if one_size), default=0)


def keep(images: ImageList, folder: Path, where: str) -> None:
    """Decode and resize the images of a list into a file of the folder, unless it is there, and use it from now on.

    The file is named by the paths, sizes, dates and boxes of the images, the ops and the decoders.

    Args:
        images: the list, changed in place.
        folder: where the file is.
        where: the list's place in the configuration, for messages.

    Raises:
        ConfigError: The first ops leave no one size to keep, or the disk has no room.
    """
    done = fixed_ops(images.transform)
    if not done:
        raise ConfigError(
            f"{where}.dataset.transform_ops: Global.cache_images keeps images of one size, and the first "
            "op makes none; begin with '- ResizeImage: {size: N}', larger than what is cropped later"
        )
    key = [
        fingerprint(images.paths, images.boxes, range(len(images))),
        torchvision.__version__,
        *map(str, images.transform.transforms[:done]),
    ]
    images.kept = Kept(folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy", images.transform, done)
    first_does(write_kept, images)


def write_kept(images: ImageList) -> None:
    """Write the file of `images.kept` where there is none."""
    path, starts = images.kept.path, range(0, len(images), TOGETHER)

    def first_part(index: int) -> np.ndarray:  # (H, W, 3)
        image = images.image(index)
        for op in images.transform.transforms[: images.kept.done]:
            image = op(image)
        return image.permute(1, 2, 0).numpy()

    if path.exists():  # asked by one process: others might see the file and not wait for it
        return
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        parts = (
            np.stack([*pool.map(first_part, range(start, min(start + TOGETHER, len(images))))])
            for start in tqdm(starts, "images kept", unit=" hundred", leave=False, delay=3)
        )
        write_array(path, len(images), parts, "Global.cache_images", f"the images of {images.source}")


def write_array(path: Path, count: int, parts: Iterable[np.ndarray], key: str, what: str) -> None:
    """Write an array (count, ...) part by part, (n, ...) each, holding one of them at a time.

    Args:
        path: the file, which is whole or absent.
        count: how many rows all parts have together.
        parts: of one shape and type but for n.
        key: what names the folder in a configuration, for the message.
        what: what the rows are, for the message.

    Raises:
        ConfigError: The folder has no room.
    """
    rows = iter(parts)
    first = next(rows)
    with replacing(path) as temporary:
        free, wanted = shutil.disk_usage(path.parent).free, count * first[0].nbytes
        if wanted > 0.95 * free:
            raise ConfigError(
                f"{key}: {path.parent} has {free / 1e9:.1f} GB free, and {what} take {wanted / 1e9:.1f} GB; "
                "choose another folder, or leave it out"
            )
        file, start = np.lib.format.open_memmap(temporary, "w+", first.dtype, (count, *first.shape[1:])), 0
        for part in chain([first], rows):
            file[start : start + len(part)] = part
            start += len(part)
        file.flush()


@dataclass
class Features:
    """Feature maps or vectors, float16 (N, ...) in one file per view; item i is float32.

    An item may be asked for as `(index, seed)`, as samplers do: the seed draws the view.
    """

    files: list[Path]

    def read(self, items: Sequence[int | tuple[int, int]]) -> Tensor:
        """Return the features (B, ...) of these items."""
        maps = [mapped(file) for file in self.files]
        pairs = np.array([item if isinstance(item, tuple) else (item, 0) for item in items]).reshape(-1, 2)
        views, out = pairs[:, 1] % len(maps), np.empty((len(pairs), *maps[0].shape[1:]), np.float32)
        for view in np.unique(views):
            out[views == view] = maps[view][pairs[views == view, 0]]
        return torch.from_numpy(out)


def with_features(images: ImageList, files: list[Path]) -> ImageList:
    """Return the list with kept features in place of its images: same labels, paths and names."""
    return replace(images, features=Features(files), transform=None, kept=None)
