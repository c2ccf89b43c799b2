"""What a notebook says beside its figures: tables, sentences, and which files it has made."""

from __future__ import annotations

import html
from pathlib import Path

from recnb.gallery.report import shown as shown
from recnb.storage import from_root


def say(*sentences: str) -> None:
    """Display sentences as a paragraph, which a page breaks between words only, unlike printed text."""
    from IPython.display import display  # what only writes tables needs no notebook

    text = " ".join(sentences)
    display({"text/html": f"<p>{html.escape(text)}</p>", "text/plain": text}, raw=True)


def files(folder: Path) -> str:
    """Return the files of a folder but notebooks, a line each: size in bytes, path."""
    made = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".ipynb")
    return "\n".join(f"{path.stat().st_size:>12,}  {from_root(path)}" for path in made)
