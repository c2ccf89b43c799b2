"""The command `recnb`. Its subcommands answer every mistake in one sentence, with exit code 2 and no traceback."""

import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from recnb.cli.check import check
from recnb.cli.convert import convert
from recnb.cli.embed import embed
from recnb.cli.identify import identify
from recnb.cli.report import report
from recnb.cli.run import joined, run
from recnb.cli.start import start
from recnb.cli.sweep import sweep
from recnb.cli.train import train
from recnb.registry import is_own

app = typer.Typer(name="recnb", no_args_is_help=True, pretty_exceptions_enable=False, rich_markup_mode=None)
for command in (start, identify, report, run, train, sweep, check, convert, embed):
    app.command()(command)


@app.callback()
def recnb(
    traceback: Annotated[bool, typer.Option("--traceback", help="Show where an error was raised, too.")] = False,
) -> None:
    """Learn image features for retrieval: from a folder of photos to a model that names new ones.

    Begin with `recnb start FOLDER`. `recnb COMMAND --help` explains a command.
    """


def main(words: Sequence[str] | None = None) -> int:
    """Run the command and return its exit code: 2 where what was asked for cannot be done, and a line says why."""
    words = joined(sys.argv[1:] if words is None else [*words])
    try:
        app([word for word in words if word != "--traceback"], prog_name="recnb")
    except SystemExit as end:
        return int(end.code or 0)
    except Exception as error:
        if "--traceback" in words or not (is_own(error) or isinstance(error, OSError)):
            raise
        said = f"{error.filename}: {error.strerror}" if isinstance(error, OSError) and error.filename else str(error)
        print(f"error: {said}", file=sys.stderr)
        return 1 if type(error).__name__ == "FailedError" else 2  # what was asked for could be done, and was begun
    return 0
