"""`recnb run`: a notebook with other parameters, from the terminal, into an executed notebook."""

import time
from typing import Annotated

import typer

from recnb.cli.train import Parts, use
from recnb.storage import resolve


def names(incomplete: str) -> list[str]:
    """Return the notebooks in notebooks/ whose names begin like a word, for the shell to complete it."""
    return sorted(path.stem for path in resolve("notebooks").glob(f"{incomplete}*.ipynb"))


def run(
    notebook: Annotated[
        str, typer.Argument(help="A file, or the name of one in notebooks/ such as 02_train.", autocompletion=names)
    ],
    pairs: Annotated[
        list[str] | None, typer.Option("-p", metavar="NAME VALUE", help="A parameter; may be repeated.")
    ] = None,
    parts: Parts = "",
    text: Annotated[str, typer.Option("-y", metavar="YAML", help="Parameters as a YAML mapping.")] = "",
    to: Annotated[
        str, typer.Option(metavar="PATH", help="The executed notebook; by default in the folder that it writes to.")
    ] = "",
) -> None:
    """Run a notebook with other parameters.

    The result is an executed notebook. A parameter that the notebook does not have, a value of another type, a misspelt
    key of the config: each is an error before the notebook starts. A part that does not exist is one in its first cell.
    """
    from recnb.cli import notebook as notebooks
    from recnb.cli.progress import duration

    use(parts)
    path = notebooks.find(notebook)
    given = notebooks.parameters_of(path, [pair.partition("=")[::2] for pair in pairs or ()], text)
    output, began = to or notebooks.output_of(path, given), time.monotonic()
    notebooks.execute(path, output, given)
    print(f"{output}: done after {duration(time.monotonic() - began)}")


def joined(words: list[str]) -> list[str]:
    """Return the words of a call of `recnb run` with each `-p NAME VALUE` as `-p NAME=VALUE`, others as they are.

    `-p parts FILE` is `--parts FILE`, for every notebook.
    """
    if words[:1] != ["run"]:
        return words
    found, rest = [], iter(words)
    for word in rest:
        found.append(word)
        if word == "-p" and (name := next(rest, None)) is not None:
            value = None if "=" in name else next(rest, None)
            found.append(name if value is None else f"{name}={value}")
            if found[-1].startswith("parts="):
                found[-2:] = ["--parts", found[-1].removeprefix("parts=")]
    return found
