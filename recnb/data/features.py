"""What a frozen part of a network gives for the images of a list, kept in files that all processes map into memory.

Training on them is training on vectors: no image is decoded, and a batch is one read. View 0 of each image is as the
evaluation sees it; further views, where there are any, are augmented.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from recnb.data.lists import ImageList


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
