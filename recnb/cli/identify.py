"""`recnb identify`: the names of photos, by an exported recogniser."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import typer

from recnb.registry import ConfigError

NEAREST = 3
COLUMNS = ["path", "name", "probability"]


def identify(
    export: Annotated[Path, typer.Argument(help="The folder that 05_export makes.")],
    images: Annotated[list[Path], typer.Argument(help="Photos, or folders of photos.")],
    table: Annotated[Path | None, typer.Option("--csv", help="A CSV file to write the answers to.")] = None,
) -> None:
    """Name photos by an exported recogniser.

    A line a photo: the name, how probable it is, and the three most similar photos that are known. The answer is
    "unknown" where no name is probable enough.
    """
    for path in (path for path in (export, *images) if not path.exists()):
        raise ConfigError(f"{path}: there is no such file or folder")
    from recnb.data.images import DataError
    from recnb.deploy.recognizer import Recognizer

    recognizer, rows, unread = Recognizer(export), [], 0
    for path in files_of(images):
        try:
            answer = recognizer.identify(path)
        except DataError as error:
            unread += 1
            print(error, flush=True)
            continue
        near = [(hit.name, f"{hit.score:.3f}") for hit in answer.nearest]
        print(f"{path}: {answer.name} ({answer.probability:.0%}); nearest", ", ".join(map(" ".join, near)), flush=True)
        rows.append([path, answer.name, f"{answer.probability:.3f}", *(cell for hit in near for cell in hit)])
    if table:
        write(table, rows)
        print(f"{table}: {len(rows)} photos")
    if unread:
        raise typer.Exit(1)


def write(table: Path, rows: Sequence[Sequence]) -> None:
    """Write answers as a CSV: the photo, its name, the probability, and the nearest with their similarities."""
    from recnb.storage import harmless, replacing

    nearest = [text for n in range(1, NEAREST + 1) for text in (f"nearest {n}", f"similarity {n}")]
    with replacing(table) as part, part.open("w", encoding="utf-8", newline="") as file:
        csv.writer(file, lineterminator="\n").writerows([[*COLUMNS, *nearest], *(map(harmless, row) for row in rows)])


def files_of(images: Sequence[Path]) -> Iterator[Path]:
    """Yield the photos that are given, and of a folder all that it holds; raise ConfigError where it holds none."""
    from recnb.data.lists import EXTENSIONS

    for path in images:
        found = [path]
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS)
            found = [file for file in files if not file.name.startswith(".")]
        if not found:
            raise ConfigError(f"{path}: holds no photo")
        yield from found
