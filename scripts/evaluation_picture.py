"""Draws the evaluation of a run that has embeddings/ to a PNG file: found by rank, similarities of pairs, AP:

python scripts/evaluation_picture.py runs/demo docs/evaluation.png
"""

import sys
from pathlib import Path

from recnb.runs.analysis import of_run, overview_figure
from recnb.runs.folder import load_run


def main(folder: str, picture: str) -> None:
    figure = overview_figure(of_run(load_run(folder)))
    Path(picture).parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(picture)


if __name__ == "__main__":
    main(*sys.argv[1:])
