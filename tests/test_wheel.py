"""The wheel: what it holds, and that it works where there is no clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = ("recnb", "configs", "notebooks")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", str(folder)],
        cwd=ROOT,
        check=True,
        capture_output=True,
    )
    return next(folder.glob("*.whl"))


def run_installed(wheel: Path, folder: Path, code: str) -> str:
    """Return what code prints with the wheel unpacked in front of the path, started from an empty folder."""
    elsewhere, installed = folder / "elsewhere", folder / "installed"
    elsewhere.mkdir()
    zipfile.ZipFile(wheel).extractall(installed)
    result = subprocess.run(
        [sys.executable, "-c", code],
        cwd=elsewhere,
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(installed)},
    )
    assert result.returncode == 0, result.stderr
    return result.stdout.strip()


def test_it_holds_the_package_the_configs_and_the_notebooks(wheel):
    files = {
        path.relative_to(ROOT)
        for folder in FOLDERS
        for path in (ROOT / folder).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts and ".ipynb_checkpoints" not in path.parts
    }
    wanted = {(path if path.parts[0] == "recnb" else "recnb" / path).as_posix() for path in files}
    held = {name for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    assert held == wanted and "recnb/py.typed" in held


def test_it_finds_its_files_and_starts_paths_from_the_working_directory(wheel, tmp_path):
    code = (
        "from recnb.storage import ROOT, resolve; print(ROOT, resolve('configs/demo.yaml'), "
        "resolve('notebooks/02_train.ipynb'), resolve('configs/mine.yaml'), resolve('data/mine'), sep='\\n')"
    )
    here, package = tmp_path / "elsewhere", tmp_path / "installed" / "recnb"
    assert run_installed(wheel, tmp_path, code).splitlines() == [
        str(path)
        for path in (
            here,
            package / "configs/demo.yaml",
            package / "notebooks/02_train.ipynb",
            here / "configs/mine.yaml",
            here / "data/mine",
        )
    ]


@pytest.mark.slow
def test_it_loads_a_config_that_it_ships(wheel, tmp_path):
    code = "import recnb; print(recnb.__version__, recnb.load_config('configs/demo.yaml')['Global']['epochs'])"
    version, epochs = run_installed(wheel, tmp_path, code).split()
    assert f"-{version}-" in wheel.name and int(epochs) > 0


def test_its_command_finds_the_notebooks(wheel, tmp_path):
    code = (
        "from recnb.cli.main import main; from recnb.cli.notebook import find; "
        "print(find('02_train'), main(['run', '02_train', '-p', 'overide', '{}']), sep='\\n')"
    )
    package = tmp_path / "installed" / "recnb"
    assert run_installed(wheel, tmp_path, code).splitlines() == [str(package / "notebooks" / "02_train.ipynb"), "2"]
