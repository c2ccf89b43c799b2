"""What is computed once and kept, in files that all processes map into their memory: resized images, and features.

Training on the features of a frozen part of a network is training on vectors: no image is decoded, and a batch is one
read. View 0 of each image is as the evaluation sees it; further views, where there are any, are augmented.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torchvision.transforms import v2
from tqdm.auto import tqdm

from recnb.data.images import PART, DataError, fingerprint
from recnb.data.lists import ImageList
from recnb.data.pipeline import Pipeline
from recnb.distributed.processes import first_does
from recnb.registry import ConfigError
from recnb.storage import replacing


class Kept:
    """The images (3, H, W) of a list as the first `done` ops of a transform leave them, in a file."""

    def __init__(self, path: Path, transform: Pipeline, done: int):
        self.path, self.transform, self.done = path, transform, done
        self.map: np.ndarray | None = None

    def __getitem__(self, index: int) -> Tensor:
        if self.map is None:
            self.map = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(self.map[index].copy()).permute(2, 0, 1)

    def __getstate__(self) -> dict:  # another process maps the file itself
        return {**vars(self), "map": None}


def fixed_ops(transform: Pipeline) -> int:
    """How many of the first ops make one size of all images, and of an image always the same; 0 where none do."""
    last = 0
    for count, op in enumerate(transform.transforms, 1):
        if not isinstance(op, (v2.Identity, v2.Resize, v2.CenterCrop)):
            break
        if isinstance(op, v2.CenterCrop) or (isinstance(op, v2.Resize) and len(op.size) == 2):
            last = count
    return last


def keep(images: ImageList, folder: Path, where: str) -> None:
    """Decode and resizes the images of a list into a file of the folder, unless it is there, and uses it.

    The file is named by the paths, sizes, dates and boxes of the images, the ops and the decoders. Raises ConfigError
    where the first ops leave no one size to keep, DataError where the disk has no room.
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
    if images.kept.path.exists():  # asked by one process: others might see the file and not wait for it
        return

    def first_part(index: int) -> np.ndarray:  # (H, W, 3)
        image = images.image(index)
        for op in images.transform.transforms[: images.kept.done]:
            image = op(image)
        return image.permute(1, 2, 0).numpy()

    def fill(index: int) -> None:
        file[index] = first_part(index)

    path, parts = images.kept.path, range(0, len(images), PART)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(images), *first_part(0).shape)
    free, wanted = shutil.disk_usage(path.parent).free, int(np.prod(shape))
    if wanted > 0.95 * free:
        raise DataError(
            f"Global.cache_images: {path.parent} has {free / 1e9:.1f} GB free, and the images of "
            f"{images.source} take {wanted / 1e9:.1f} GB; choose another folder, or leave it out"
        )
    with replacing(path) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        file = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        for start in tqdm(parts, "images kept", unit="thousand", leave=False, delay=3):
            list(pool.map(fill, range(start, min(start + PART, len(images)))))
        file.flush()


@dataclass
class Features:
    """Feature maps or vectors, float16 (N, ...) in one file per view; item i is float32.

    An item may be asked for as `(index, seed)`, as samplers do: the seed draws the view.
    """

    files: list[Path]
    maps: list[np.ndarray] | None = field(default=None, repr=False)

    def read(self, items: Sequence[int | tuple[int, int]]) -> Tensor:
        """Return the features (B, ...) of these items."""
        if self.maps is None:
            self.maps = [np.load(file, mmap_mode="r") for file in self.files]
        pairs = np.array([item if isinstance(item, tuple) else (item, 0) for item in items]).reshape(-1, 2)
        views, out = pairs[:, 1] % len(self.maps), np.empty((len(pairs), *self.maps[0].shape[1:]), np.float32)
        for view in np.unique(views):
            out[views == view] = self.maps[view][pairs[views == view, 0]]
        return torch.from_numpy(out)

    def __getstate__(self) -> dict:  # another process maps the files itself
        return {**vars(self), "maps": None}


def with_features(images: ImageList, files: list[Path]) -> ImageList:
    """Return the list with kept features in place of its images: same labels, paths and names."""
    return replace(images, features=Features(files), transform=None, kept=None)
