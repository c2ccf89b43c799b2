"""Text that a notebook folds behind a click: long listings, and tracebacks of recnb's own errors.

A notebook loads this in its first cell: `%load_ext recnb.runs.notebook`.
"""

import html
import traceback
from types import TracebackType

from IPython.core.interactiveshell import InteractiveShell
from IPython.display import HTML

from recnb.registry import is_own


def load_ipython_extension(shell: InteractiveShell) -> None:
    """Show recnb's own errors in this kernel as sentences."""
    shell.set_custom_exc((Exception,), show)


def folded(title: str, text: str) -> HTML:
    """Return a title as HTML that a click unfolds to the text."""
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
