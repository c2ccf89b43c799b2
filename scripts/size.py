"""Prints how much code each folder of recnb has:

    python scripts/size.py              --modules: each module

The first column counts statements: what a formatter breaks over several lines counts once. The second counts lines.
Neither counts blank lines, comments and docstrings.
"""

import argparse
import io
import token
import tokenize
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "recnb"
LAYOUT = {tokenize.COMMENT, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.ENCODING, tokenize.ENDMARKER}


def statements(source: str) -> list[list[tokenize.TokenInfo]]:
    """Return the statements of a Python source, each as its tokens; a text alone, such as a docstring, is none."""
    found, current = [], []
    for piece in tokenize.generate_tokens(io.StringIO(source).readline):
        if piece.type == token.NEWLINE:
            if any(each.type != token.STRING for each in current):
                found.append(current)
            current = []
        elif piece.type not in LAYOUT:
            current.append(piece)
    return found


def sizes(each_module: bool = False, lines: bool = False) -> dict[str, int]:
    """Return the size of every folder of the package (or module), largest first, and the sum as `total`.

    Args:
        each_module: one entry per module in place of one per folder.
        lines: count lines of code; otherwise statements.
    """
    counts = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        name = inside.as_posix() if each_module or len(inside.parts) == 1 else f"{inside.parts[0]}/"
        found = statements(path.read_text(encoding="utf-8"))
        spans = {number for each in found for part in each for number in range(part.start[0], part.end[0] + 1)}
        counts[name] += len(spans) if lines else len(found)
    return {**dict(counts.most_common()), "total": counts.total()}


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", action="store_true", help="a line for each module")
    modules = parser.parse_args().modules
    lines = sizes(modules, lines=True)
    print(" statements  lines")
    for name, count in sizes(modules).items():
        print(f"{count:>11,} {lines[name]:>6,}  {name}")


if __name__ == "__main__":
    main()
