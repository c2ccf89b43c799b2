"""The files that install the project agree with each other."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10
    import tomli as tomllib

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def check(root: Path) -> list[str]:
    """Return the lines of `requirements.py --check` for a project in root, none where it is in order."""
    result = subprocess.run(
        [sys.executable, str(root / "scripts" / "requirements.py"), "--check"], capture_output=True, text=True
    )
    assert (result.returncode == 0) == (not result.stderr), result.stderr
    return result.stderr.splitlines()


@pytest.fixture
def project(tmp_path):
    """A copy of the files that say what to install."""
    (tmp_path / "scripts").mkdir()
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "scripts/requirements.py"):
        (tmp_path / name).write_bytes((ROOT / name).read_bytes())
    return tmp_path


def test_constraints_and_environment_are_up_to_date():
    assert check(ROOT) == []


@pytest.mark.parametrize(
    ("file", "old", "new", "complaint"),
    [
        ("pyproject.toml", '"tqdm>=4.66"', '"tqdm>=99"', "constraints.txt has tqdm=="),
        ("pyproject.toml", '"tqdm>=4.66"', '"no-such-package"', "constraints.txt has no version of no-such-package"),
        ("pyproject.toml", 'requires-python = ">=3.10"', 'requires-python = ">=3.11"', "environment.yml is not"),
        ("environment.yml", "-c constraints.txt", "-c other.txt", "environment.yml is not"),
    ],
)
def test_what_is_stale_is_named(project, file, old, new, complaint):
    text = (project / file).read_text()
    assert old in text
    (project / file).write_text(text.replace(old, new))
    first, last = check(project)
    assert first.startswith(complaint) and last == "run: python scripts/requirements.py --write"


def test_every_pin_is_exact():
    lines = (line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#"))
    assert not [line for line in lines if [one.operator for one in Requirement(line).specifier] != ["=="]]


def test_environment_and_make_install_the_same_extras():
    (pip,) = [
        entry["pip"]
        for entry in yaml.safe_load((ROOT / "environment.yml").read_text())["dependencies"]
        if isinstance(entry, dict)
    ]
    extras = re.search(r"^EXTRAS := (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)[1]
    assert pip == ["-c constraints.txt", f"-e .[{extras}]"] and set(extras.split(",")) <= {
        *PROJECT["optional-dependencies"]
    }


def test_no_file_names_the_host_of_an_index():
    for name in ("pyproject.toml", "constraints.txt", "environment.yml", "Makefile"):
        assert not re.search(r"https?://|@ file:", (ROOT / name).read_text()), name


def test_python_is_the_one_that_ruff_and_make_check():
    oldest = PROJECT["requires-python"].removeprefix(">=")
    ruff = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["ruff"]
    assert ruff["target-version"] == f"py{oldest.replace('.', '')}"
    assert f"({oldest.replace('.', ', ')})" in (ROOT / "Makefile").read_text()


NAMED = ("constraints.txt", "configs/demo.yaml")


def test_make_has_its_targets():
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([\w-]+):", makefile, re.MULTILINE))
    for file in ("README.md", "CONTRIBUTING.md", ".github/workflows/ci.yml", ".ci/run"):
        asked = re.findall(r"(?:`|run: |^)make ([a-z][\w-]*)", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE)
        assert asked and set(asked) <= targets, f"{file}: make has no {', '.join(set(asked) - targets)}"
    for word, file in (("02_train", "notebooks/02_train.ipynb"), *((name, name) for name in NAMED)):
        assert word in makefile and (ROOT / file).is_file()


def test_the_workflow_begins_with_the_oldest_python():
    jobs = yaml.safe_load((ROOT / ".github" / "workflows" / "ci.yml").read_text())["jobs"]
    assert f">={jobs['test']['strategy']['matrix']['python'][0]}" == PROJECT["requires-python"]


def test_the_readme_says_how_to_begin():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert "make demo" in text and "make test" in text


def test_the_licence_is_the_one_declared():
    assert PROJECT["license"] == "Apache-2.0"
    assert "Apache License" in (ROOT / "LICENSE").read_text() and "Version 2.0" in (ROOT / "LICENSE").read_text()
