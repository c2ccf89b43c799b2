"""Text that a notebook folds behind a click: long listings, and tracebacks of recnb's own errors.

A notebook loads this in its first cell: `%load_ext recnb.runs.notebook`.
"""

from __future__ import annotations

import html
import traceback
from types import TracebackType
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from IPython.core.interactiveshell import InteractiveShell
    from IPython.display import HTML


def is_own(error: BaseException | type[BaseException]) -> bool:
    """Return whether an error, or its class, is recnb's own, with a message for users."""
    kind = error if isinstance(error, type) else type(error)
    return kind.__module__.partition(".")[0] == "recnb"


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Show recnb's own errors in this kernel as sentences."""
    shell.set_custom_exc((Exception,), show)


def folded(title: str, text: str) -> HTML:
    """Return a title as HTML that a click unfolds to the text."""
    from IPython.display import HTML

    return HTML(f"<details><summary>{html.escape(title)}</summary><pre>{html.escape(text)}</pre></details>")


def show(
    shell: InteractiveShell,
    kind: type[BaseException],
    error: BaseException,
    trace: TracebackType,
    tb_offset: int | None = None,
) -> None:
    """Show an error: recnb's own as a sentence with the traceback folded, any other as usual.

    Args:
        shell: The kernel's shell.
        kind: The class of the error.
        error: The error.
        trace: Its traceback.
        tb_offset: How many frames of it to leave out.
    """
    if not is_own(kind):
        shell.showtraceback((kind, error, trace), tb_offset=tb_offset)
        return
    text = folded("Traceback", "".join(traceback.format_exception(kind, error, trace))).data
    shell.display_pub.publish({"text/html": text, "text/plain": "the traceback is folded away"})
    shell._showtraceback(kind, error, [f"{kind.__name__}: {error}"])  # what kernels send is replaced by nothing public
