"""`recnb identify`: the names of photos, by an exported recogniser."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recnb.registry import ConfigError

if TYPE_CHECKING:
    from recnb.deploy.recognizer import Answer

NEAREST = [f"{what} {n}" for n in (1, 2, 3) for what in ("nearest", "similarity")]
COLUMNS = ["path", "name", "probability", *NEAREST]


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
    import pandas as pd

    from recnb.data.images import DataError
    from recnb.data.lists import write_csv
    from recnb.deploy.recognizer import Recognizer

    recognizer, rows, unread = Recognizer(export), [], 0
    for path in files_of(images):
        try:
            answer = recognizer.identify(path)
        except DataError as error:
            unread += 1
            print(error, flush=True)
            continue
        near = ", ".join(f"{hit.name} {hit.score:.3f}" for hit in answer.nearest)
        print(f"{path}: {answer.name} ({answer.probability:.0%}); nearest {near}", flush=True)
        rows.append(row_of(path, answer))
    if table:
        write_csv(pd.DataFrame(rows, columns=COLUMNS), table)
        print(f"{table}: {len(rows)} photos")
    if unread:
        raise typer.Exit(1)


def row_of(path: Path, answer: Answer) -> dict[str, object]:
    """Return the row of an answer in the table: the photo, its name, the probability, and the nearest."""
    row: dict[str, object] = {"path": str(path), "name": answer.name, "probability": f"{answer.probability:.3f}"}
    for n, hit in enumerate(answer.nearest, 1):
        row |= {f"nearest {n}": hit.name, f"similarity {n}": f"{hit.score:.3f}"}
    return row


def files_of(images: Sequence[Path]) -> Iterator[Path]:
    """Yield the photos that are given, and of a folder all that it holds; raise ConfigError where it holds none."""
    from recnb.data.layouts import EXTENSIONS

    for path in images:
        found = [path]
        if path.is_dir():
            files = (file for file in sorted(path.rglob("*")) if file.suffix.lower() in EXTENSIONS)
            found = [file for file in files if not file.name.startswith(".")]
        if not found:
            raise ConfigError(f"{path}: holds no photo")
        yield from found
