"""Draws the gallery of a run that has embeddings/ to a PNG file:

    python scripts/gallery_picture.py runs/demo docs/gallery.png
"""
import sys
from pathlib import Path

import numpy as np

from recnb import load_config
from recnb.datasets import evaluation_images, own_index
from recnb.gallery import choose_rows, gallery_figure, rank


def main(run: str, picture: str) -> None:
    query, items = evaluation_images(load_config(Path(run) / "config.yaml"))
    features = [np.load(Path(run) / "embeddings" / f"{name}.npy") for name in ("query", "gallery")]
    ranking = rank(*features, query.labels, items.labels, query.cameras, items.cameras,
                   exclude_self=own_index(query, items), k=10)
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    gallery_figure(ranking, query.paths, items.paths, rows=choose_rows(ranking, 6)).savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
