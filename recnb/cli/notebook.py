"""Runs a notebook with papermill, after a look at what it is given:

    python -m recnb.cli.notebook notebooks/02_train.ipynb runs/first/train.ipynb -p run_dir runs/first
    python -m recnb.cli.notebook notebooks/06_compare.ipynb runs/compare/compare.ipynb -y "{pattern: 'runs/demo*'}"

A parameter that the notebook does not have, or a value of another type, is an error here; papermill would warn and go
on. The folder of the executed notebook is made. Paths are taken from the folder that this is called in.
"""

import argparse
import subprocess
import sys
from pathlib import Path

import papermill
import yaml

from recnb.recipe.reading import parse
from recnb.registry import ConfigError, fits, suggest
from recnb.storage import resolve

KINDS = {kind.__name__: kind for kind in (str, int, float, bool, dict, list)}


def kinds(notebook: str | Path) -> dict[str, type]:
    """The type of each parameter of a notebook; `object` where the notebook does not tell."""
    path = resolve(notebook)
    if not path.is_file():
        raise ConfigError(
            f"{notebook}: there is no such notebook; "
            f"{suggest(path.name, [other.name for other in path.parent.glob('*.ipynb')])}"
        )
    return {
        name: KINDS.get(entry["inferred_type_name"], object)
        for name, entry in papermill.inspect_notebook(str(path)).items()
    }


def check(notebook: str | Path, parameters: dict) -> None:
    """Raise ConfigError for a parameter that the notebook does not have, or a value of the wrong type."""
    known = kinds(notebook)
    for name, value in parameters.items():
        if name not in known:
            raise ConfigError(f"{notebook}: there is no parameter '{name}'; {suggest(name, known)}")
        if not fits(value, known[name]):
            raise ConfigError(f"{notebook}: {name}: {value!r} is a {type(value).__name__}, not {known[name].__name__}")


def papermill_command(notebook: str | Path, output: str | Path, parameters: dict) -> list[str]:
    """The words of the papermill call, the same from every folder; the parameters are checked."""
    check(notebook, parameters)
    # YAML as yaml writes it: of `1e-05`, which other writers may choose, papermill's YAML would make a string
    text = yaml.safe_dump(parameters, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
    return [
        sys.executable,
        "-m",
        "papermill",
        str(resolve(notebook).absolute()),
        str(Path(output).absolute()),
        "-k",
        "python3",
        "-l",
        "python",
        "--cwd",
        str(Path.cwd()),
        "--autosave-cell-every",
        "30",
        "-y",
        text,
    ]


def parameters_of(notebook: str | Path, pairs: list[list[str]], text: str) -> dict:
    """The parameters that -p and -y give.

    -p is read as the notebook's type asks, so that a str stays as it is written.
    """
    known, given = kinds(notebook), parse(text) or {}
    if not isinstance(given, dict):
        raise ConfigError(f"-y: {text!r} is not a mapping of names to values")
    return {**given, **{name: value if known.get(name) is str else parse(value) for name, value in pairs}}


def main() -> int:
    """Run the command and return its exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("notebook")
    parser.add_argument("output", type=Path)
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), dest="pairs")
    parser.add_argument("-y", default="", metavar="YAML", dest="text", help="parameters as a YAML mapping")
    args = parser.parse_args()
    try:
        command = papermill_command(args.notebook, args.output, parameters_of(args.notebook, args.pairs, args.text))
    except (ConfigError, yaml.YAMLError) as error:
        sys.exit(f"error: {error}")
    args.output.parent.mkdir(parents=True, exist_ok=True)
    return subprocess.call(command)


if __name__ == "__main__":
    sys.exit(main())
