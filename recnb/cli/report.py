"""`recnb report`: a run on one page."""

from pathlib import Path
from typing import Annotated

import typer


def report(run: Annotated[Path, typer.Argument(help="The folder of a finished run.")]) -> None:
    """Write a run as one HTML page.

    It holds the verdict, metrics with intervals, curves, a gallery, the worst identities and the environment.
    """
    from recnb.runs.report import report as page

    print(page(run))
