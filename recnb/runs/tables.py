"""What a notebook shows beside figures: tables, sentences, and the files that it has made."""

import html
from pathlib import Path

from recnb.gallery.report import shown as shown
from recnb.storage import from_root


def say(*sentences: str) -> None:
    """Display sentences as a paragraph, whose lines break between words, unlike those of printed text."""
    from IPython.display import display  # imported here: tables are also used outside of notebooks

    text = " ".join(sentences)
    display({"text/html": f"<p>{html.escape(text)}</p>", "text/plain": text}, raw=True)


def files(folder: Path) -> str:
    """Return the size in bytes and the path of each file in a folder but notebooks, a line each."""
    made = sorted(path for path in folder.glob("*") if path.is_file() and path.suffix != ".ipynb")
    return "\n".join(f"{path.stat().st_size:>12,}  {from_root(path)}" for path in made)
