"""Write constraints.txt and environment.yml from pyproject.toml, or check that they agree with it.

    python scripts/requirements.py --check
    python scripts/requirements.py --write     # in the environment that the tests have passed in

pyproject.toml says which packages the project needs and in which ranges. constraints.txt adds the exact versions that
it was tested with, those of the packages' own needs included.
"""

from __future__ import annotations

import argparse
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
INSTALLED = ("lab", "test", "export")  # the extras that `make demo` and environment.yml install
PINNED = (*INSTALLED, "browser", "docs", "dev")
LEFT_TO_TORCH = ("nvidia-", "cuda-", "triton")  # what torch itself pins, and only its builds for GPUs need
WRITTEN = "Written by scripts/requirements.py from pyproject.toml: change that, then run it."


def project() -> dict:
    """Return the table [project] of pyproject.toml."""
    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def asked() -> list[Requirement]:
    """Return what pyproject.toml asks for on this Python, the extras of PINNED included."""
    extras = project()["optional-dependencies"]
    lines = [*project()["dependencies"], *(line for name in PINNED for line in extras[name])]
    return [wanted for wanted in map(Requirement, lines) if wanted.marker is None or wanted.marker.evaluate()]


def installed(wanted: list[Requirement]) -> dict[str, str]:
    """Return the installed version of every wanted package and of all that these need, by canonical name."""
    found, todo = {}, [(one, extra) for one in wanted for extra in ("", *one.extras)]
    seen = set()
    while todo:
        one, extra = todo.pop()
        name = canonicalize_name(one.name)
        if (name, extra) in seen:
            continue
        seen.add((name, extra))
        try:
            package = distribution(name)
        except PackageNotFoundError:
            raise SystemExit(f"{one} is not installed: pip install -e '.[{','.join(PINNED)}]' first") from None
        found[name] = Version(package.version).public  # 2.6.0+cpu is 2.6.0
        for need in map(Requirement, package.requires or ()):
            if need.marker is None or need.marker.evaluate({"extra": extra}):
                todo += [(need, more) for more in ("", *need.extras)]
    return found


def constraints() -> str:
    """Return the text of constraints.txt for the versions that are installed now."""
    python, system = platform.python_version(), sys.platform
    head = [
        WRITTEN,
        f"The versions that the project was tested with on Python {python}, {system}. An older Python or",
        "another system may not have them: there the ranges of pyproject.toml hold alone.",
    ]
    marker = f'python_full_version >= "{python}" and sys_platform == "{system}"'
    pins = sorted(
        f"{name}=={version} ; {marker}"
        for name, version in installed(asked()).items()
        if not name.startswith(LEFT_TO_TORCH)
    )
    return "\n".join([*(f"# {line}" for line in head), *pins, ""])


def environment() -> str:
    """Return the text of environment.yml, which leaves the packages to pip."""
    return f"""# {WRITTEN}
# conda env create -f environment.yml && conda activate recnb
name: recnb
channels: [conda-forge]
dependencies:
  - python{project()["requires-python"]}
  - pip
  - pip:
      - -c constraints.txt
      - -e .[{",".join(INSTALLED)}]
"""


def pins() -> dict[str, str]:
    """Return the version that constraints.txt pins each package to."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    pinned = [Requirement(line) for line in lines if line and not line.startswith("#")]
    return {canonicalize_name(one.name): str(one.specifier).removeprefix("==") for one in pinned}


def stale() -> list[str]:
    """Return what does not agree with pyproject.toml, a line each."""
    found, pinned = [], pins()
    for wanted in asked():
        version = pinned.get(canonicalize_name(wanted.name))
        if version is None:
            found.append(f"constraints.txt has no version of {wanted.name}")
        elif not wanted.specifier.contains(version):
            found.append(f"constraints.txt has {wanted.name}=={version}, pyproject.toml wants {wanted.specifier}")
    if (ROOT / "environment.yml").read_text(encoding="utf-8") != environment():
        found.append("environment.yml is not what pyproject.toml gives")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    action = parser.add_mutually_exclusive_group(required=True)
    action.add_argument("--check", action="store_true", help="say what is out of date, and fail if anything is")
    action.add_argument("--write", action="store_true", help="write both files from this environment")
    if parser.parse_args().write:
        (ROOT / "constraints.txt").write_text(constraints(), encoding="utf-8")
        (ROOT / "environment.yml").write_text(environment(), encoding="utf-8")
    elif found := stale():
        raise SystemExit("\n".join([*found, "run: python scripts/requirements.py --write"]))


if __name__ == "__main__":
    main()
