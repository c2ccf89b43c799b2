"""Which image is which row of a run's embeddings: kept beside them, so that a run opens where its lists are not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from recnb.data.lists import ImageList
from recnb.storage import from_root, replacing, resolve

PARTS = ("query", "gallery")


def save_rows(run: Path, lists: Mapping[str, ImageList]) -> None:
    """Write embeddings/query.csv and gallery.csv: of each row the path, the identity's name, the camera and the box."""
    for part, images in lists.items():
        boxes = images.boxes if images.boxes is not None else [()] * len(images)
        columns = {
            "path": [from_root(path) for path in images.paths],
            "label": [*map(images.name, images.labels.tolist())],
            "camera": "" if images.cameras is None else images.cameras,
            "box": [" ".join(map(str, box)) for box in boxes],
        }
        with replacing(run / "embeddings" / f"{part}.csv") as path:
            pd.DataFrame(columns).to_csv(path, index=False, errors="backslashreplace")


def kept_rows(run: Path) -> tuple[ImageList, ImageList] | None:
    """Return the query and the gallery list that `save_rows` wrote, without transforms, or None where it did not."""
    files = [run / "embeddings" / f"{part}.csv" for part in PARTS]
    if not all(path.is_file() for path in files):
        return None
    query, gallery = (pd.read_csv(path, dtype=str, keep_default_na=False) for path in files)
    names = np.unique(np.concatenate([query.label.to_numpy(str), gallery.label.to_numpy(str)]))
    return _images(query, names, files[0]), _images(gallery, names, files[1])


def _images(table: pd.DataFrame, names: np.ndarray, path: Path) -> ImageList:
    boxed, seen = table.box.ne("").all(), table.camera.ne("").all()
    return ImageList(
        [str(resolve(path)) for path in table.path],
        np.searchsorted(names, table.label.to_numpy(str)),
        table.camera.to_numpy(np.int64) if seen else None,
        source=str(path),
        names=names,
        boxes=np.array([box.split() for box in table.box], np.int64) if boxed else None,
    )
