"""Does the model look at the object, or at its background? Retrieval with one of the two blanked out.

A model that finds nearly as much by backgrounds alone has learnt where the pictures were taken, and will fail elsewhere
(arXiv 2604.09690).
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor
from torch.utils.data import Dataset

from recnb.data.images import read_pixels
from recnb.data.lists import ImageList
from recnb.data.loaders import ImageLoader
from recnb.registry import ConfigError
from recnb.runs.analysis import Embeddings, judge, of_run
from recnb.runs.folder import Run
from recnb.storage import resolve
from recnb.training.evaluation import embed

Mask = Callable[[str, Tensor], Tensor]  # the path of an image and its pixels (3, H, W) -> bool (H, W), the foreground
FILL = (124, 116, 104)  # the mean colour of ImageNet, which is 0 once normalised


class Blanked(Dataset):
    """The images of a list, with their backgrounds filled with grey, or their foregrounds."""

    def __init__(self, images: ImageList, mask: Mask, foreground: bool):
        self.images, self.mask, self.foreground = images, mask, foreground
        self.whole: Any = images.transform  # not called `transform`, whose last ops a loader would run by itself

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        pixels = self.images.image(index)
        kept = self.mask(self.images.pictures[index], pixels) == self.foreground
        filled = torch.where(kept, pixels, torch.tensor(FILL, dtype=torch.uint8)[:, None, None])
        return self.whole(filled), int(self.images.labels[index])


def centre(share: float = 0.6) -> Mask:
    """Return the mask whose foreground is the middle of an image, `share` of each side."""

    def mask(path: str, pixels: Tensor) -> Tensor:
        sides = [((torch.arange(n) + 0.5) / n - 0.5).abs() < share / 2 for n in pixels.shape[1:]]
        return sides[0][:, None] & sides[1][None]

    return mask


def from_folder(folder: str | Path, data: Embeddings) -> Mask:
    """Return the masks of a folder with `a/b.png` for `a/b.jpg` below the image root; what is not black is foreground.

    The mask raises ConfigError for an image whose file is missing or has another size.
    """
    root = resolve(folder)

    def mask(path: str, pixels: Tensor) -> Tensor:
        place = (root / data.short(path)).with_suffix(".png")
        if not place.is_file():
            raise ConfigError(f"masks: there is no {place}; each image needs one, in a PNG file of its own size")
        foreground = read_pixels(str(place), list(getattr(path, "box", ())) or None).amax(0) > 0
        if foreground.shape != pixels.shape[1:]:
            raise ConfigError(f"masks: {place} is {tuple(foreground.shape)} and its image {tuple(pixels.shape[1:])}")
        return foreground

    return mask


def shortcut_table(run: Run, masks: str = "") -> pd.DataFrame:
    """Return recall@1, mAP and its 95 % interval of whole images, of foregrounds alone and of backgrounds alone.

    Args:
        run: the run; its model embeds queries and gallery twice more, both blanked in the same way.
        masks: a folder of masks as for `from_folder`; empty: the middle of each image is its foreground.
    """
    data, model = of_run(run), run.model()
    mask = from_folder(masks, data) if masks else centre()
    rows = {"whole image": _row(data)}
    for name, foreground in (("foreground only", True), ("background only", False)):
        parts = (Blanked(images, mask, foreground) for images in (run.query, run.gallery))
        query, gallery = (embed(model, ImageLoader(part, batch_size=64), progress=False).numpy() for part in parts)
        rows[name] = _row(replace(data, query=query, gallery=gallery))
    return pd.DataFrame.from_dict(rows, orient="index")


def _row(data: Embeddings) -> dict:
    table, _ = judge(data, (1,))
    return {"recall1": table["mean"]["recall1"], "mAP": table["mean"]["mAP"], **table.loc["mAP", ["low", "high"]]}
