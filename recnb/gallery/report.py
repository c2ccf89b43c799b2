"""A run as one page: words, figures, tables and the gallery, in a single HTML file."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
from IPython.display import HTML
from markupsafe import Markup
from matplotlib.figure import Figure
from pandas.api.types import is_numeric_dtype
from pandas.io.formats.style import Styler

from recnb.gallery.page import TEMPLATES
from recnb.storage import write_text


@dataclass
class Section:
    """A part of a report, in the order in which it is shown."""

    title: str
    text: str = ""
    figure: Figure | None = None
    alt: str = ""  # what the figure shows, in words
    gallery: HTML | None = None  # of `gallery_static`
    table: pd.DataFrame | None = None  # text is escaped, numbers have three decimals
    code: str = ""  # folded


def report_html(
    title: str, sections: Sequence[Section], summary: str = "", verdict: str = "", path: str | Path | None = None
) -> str:
    """Return a self-contained HTML page of a run's results.

    Args:
        title: the heading.
        sections: what stands below it, in this order.
        summary: a line of facts below the heading.
        verdict: the sentence that a reader sees first.
        path: where the page is also written.
    """
    page = TEMPLATES.get_template("report.html").render(
        title=title, sections=sections, summary=summary, verdict=verdict
    )
    page = page.encode("utf-8", "backslashreplace").decode()  # a file's name may hold bytes that are no text
    if path is not None:
        write_text(path, page)
    return page


def figure_uri(figure: Figure) -> str:
    """Return the figure as a PNG in a data URI, sharp on screens of twice the pixels."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=160, bbox_inches="tight", facecolor="white")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def shown(table: pd.DataFrame, most: int | None = None, index: bool = False) -> Styler:
    """Return a table as a notebook or a page shows it: three decimals, text to the left.

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


TEMPLATES.filters |= {"figure_uri": figure_uri, "table_html": lambda table: Markup(shown(table).to_html())}
