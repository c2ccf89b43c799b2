"The files that install the project agree with each other."
import re
from itertools import chain
from pathlib import Path

import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
ENVIRONMENT = yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]


def requirements(lines):
    return {canonicalize_name(r.name): r for r in map(Requirement, lines)}


def pins():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return requirements(line for line in lines if line.strip() and not line.startswith("#"))


def test_environment_installs_what_the_project_asks_for():
    (pip,) = [entry["pip"] for entry in ENVIRONMENT if isinstance(entry, dict)]
    packages = [line for line in pip if not line.startswith("-")]
    wanted = [*PROJECT["dependencies"], *EXTRAS["lab"], *EXTRAS["test"], *EXTRAS["export"]]
    assert sorted(packages) == sorted(wanted) and len(set(packages)) == len(packages)
    assert {"-c constraints.txt", "-e ."} == set(pip) - set(packages)
    assert f"python{PROJECT['requires-python']}" in ENVIRONMENT and "pip" in ENVIRONMENT


def test_every_package_is_pinned_within_its_range():
    pinned = pins()
    asked = requirements(chain(PROJECT["dependencies"], *(EXTRAS[name] for name in ("lab", "test", "export"))))
    for name, wanted in asked.items():
        assert name in pinned, f"{name} has no pin in constraints.txt"
        (pin,) = pinned[name].specifier
        assert pin.operator == "==" and wanted.specifier.contains(pin.version), f"{name}: {pin} is not {wanted}"


def test_every_pin_is_exact():
    assert not [str(pin) for pin in pins().values() if [s.operator for s in pin.specifier] != ["=="]]


def test_python_is_the_one_that_ruff_and_make_check():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


def test_make_has_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    assert {"demo", "test", "test-browser", "lab", "pictures"} <= set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for file in ("constraints.txt", "notebooks/02_train.ipynb", "configs/demo.yaml"):
        assert file in makefile and (ROOT / file).is_file()
    assert "make test" in (ROOT / ".ci" / "run").read_text()


def test_the_readme_says_how_to_begin():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text


def test_the_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Version 2.0" in (ROOT / "LICENSE").read_text()
