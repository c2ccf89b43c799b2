"""Draws the gallery of a run that has embeddings/ to a PNG file:

python scripts/gallery_picture.py runs/demo docs/gallery.png
"""

import sys
from pathlib import Path

from recnb.gallery.figure import gallery_figure
from recnb.retrieval.lists import choose_rows
from recnb.runs.folder import load_run


def main(folder: str, picture: str) -> None:
    run = load_run(folder)
    ranking = run.rank()
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    gallery_figure(
        ranking, run.query.paths, run.gallery.paths, rows=choose_rows(ranking, 6), label_names=run.query.names
    ).savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
