"""`recnb sweep`: many configurations, each a run of its own."""

from pathlib import Path
from typing import Annotated

import typer

from recnb.cli.train import Parts, use


def sweep(
    batch: Annotated[Path, typer.Argument(help="The YAML file of the batch.")],
    run_dir: Annotated[
        str, typer.Option(help="The folder of the runs' folders; by default runs and the file's name.")
    ] = "",
    parts: Parts = "",
    jobs: Annotated[int, typer.Option(metavar="N", min=1, help="How many runs at once.")] = 1,
    printed: Annotated[
        bool, typer.Option("--print", help="Print a command for each run still to be done; run nothing.")
    ] = False,
) -> None:
    """Train many configurations, described in one file.

    Each is run through 02_train into a folder of its own. The file names a config, `overrides` for all runs, and what
    differs: `grid` (key: values, every combination) and `list` (mappings of overrides). All are checked before the
    first one starts. Called again, it leaves out what is done and goes on with what was interrupted. A run that
    fails does not stop the others.
    """
    from recnb.cli.batch import run_all

    use(parts)
    raise typer.Exit(run_all(batch, run_dir, jobs, printed))
