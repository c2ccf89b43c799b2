"""How are tables shown? Three decimals, text to the left, and paths from the project's folder on."""

from __future__ import annotations

import html
from pathlib import Path

import pandas as pd
from pandas.api.types import is_numeric_dtype
from pandas.io.formats.style import Styler

from recnb.storage import from_root


def shown(table: pd.DataFrame, most: int | None = None, index: bool = False) -> Styler:
    """Return a table as a notebook shows it.

    Args:
        table: any DataFrame; text in it is escaped.
        most: how many rows are shown, the first; None: all.
        index: whether the rows are named by the index.
    """
    table = table if most is None else table.head(most)
    left = {"selector": "", "props": [("text-align", "left")]}
    text = {column: [left] for column in table if not is_numeric_dtype(table[column])}
    rows = [
        {
            "selector": "th.row_heading, th.index_name, th.blank",
            "props": [("text-align", "left"), ("white-space", "nowrap")],
        }
    ]
    styled = table.style.format(precision=3, na_rep="-", escape="html").set_table_styles(text)
    styled = styled if index else styled.hide(axis="index")
    return styled.set_table_styles(rows, overwrite=False)


def say(*sentences: str) -> None:
    """Display sentences as a paragraph, which a page breaks between words only, unlike printed text."""
    from IPython.display import display  # what only writes tables needs no notebook

    text = " ".join(sentences)
    display({"text/html": f"<p>{html.escape(text)}</p>", "text/plain": text}, raw=True)


def files(folder: Path) -> str:
    """Return the files of a folder but notebooks, a line each: size in bytes, path."""
    made = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".ipynb")
    return "\n".join(f"{path.stat().st_size:>12,}  {from_root(path)}" for path in made)
