"""Prints how many lines of code each folder of recnb has:

    python scripts/size.py              --modules: each module

A line of code is neither blank nor comment nor docstring.
"""

import argparse
import ast
from collections import Counter
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "recnb"


def lines_of_code(path: Path) -> int:
    """Return how many lines of a Python file are neither blank nor comment nor docstring."""
    source = path.read_text(encoding="utf-8")
    documented = [
        node.body[0]
        for node in ast.walk(ast.parse(source))
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(node)
    ]
    texts = {number for node in documented for number in range(node.lineno, node.end_lineno + 1)}
    return sum(
        1
        for number, line in enumerate(source.splitlines(), 1)
        if line.strip() and not line.strip().startswith("#") and number not in texts
    )


def sizes(each_module: bool = False) -> dict[str, int]:
    """Return the lines of code of every folder of the package (or module), largest first, and their sum as `total`."""
    counts = Counter()
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        name = inside.as_posix() if each_module or len(inside.parts) == 1 else f"{inside.parts[0]}/"
        counts[name] += lines_of_code(path)
    return {**dict(counts.most_common()), "total": counts.total()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--modules", action="store_true", help="a line for each module")
    for name, lines in sizes(parser.parse_args().modules).items():
        print(f"{lines:>7,}  {name}")


if __name__ == "__main__":
    main()
