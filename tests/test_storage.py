"""One process writes to a run folder: who holds the lock, who may take it over, and when."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
import soak

from recnb import storage as files
from recnb.storage import LockedError, as_meant, harmless, locked, owner

ROOT = Path(__file__).resolve().parents[1]

HOLD = """
import sys
from pathlib import Path
from recnb.storage import locked
with locked(Path(sys.argv[1])):
    print("held", flush=True)
    sys.stdin.read()
"""
RACE = """
import sys, time
from pathlib import Path
from recnb.storage import locked
folder = Path(sys.argv[1])
print("ready", flush=True)
while not (folder / "go").exists():  # all at once
    pass
with locked(folder):
    (folder / "inside").touch(exist_ok=False)
    time.sleep(0.1)
    (folder / "inside").unlink()
"""


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(files, "PATIENCE", 0.3)


def start(code, folder):
    """Another process that runs the code and has printed its first line."""
    process = subprocess.Popen(
        [sys.executable, "-c", code, str(folder)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() in ("held\n", "ready\n")
    return process


def killed(folder):
    """A process that held the lock and was killed."""
    process = start(HOLD, folder)
    process.kill()
    process.wait()
    return process


def test_a_living_owner_keeps_others_out_and_a_dead_one_does_not(tmp_path, capsys):
    process = start(HOLD, tmp_path)
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    with pytest.raises(LockedError, match=f"process {process.pid} on .* is writing to this run"), locked(tmp_path):
        pytest.fail("the lock was taken from a living owner")
    assert before == {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in tmp_path.iterdir()}
    process.kill()
    process.wait()
    with locked(tmp_path):
        assert owner(tmp_path) == files.me()
    assert f"took over the lock of process {process.pid}" in capsys.readouterr().out
    assert not owner(tmp_path)


def test_an_owner_that_ends_is_waited_for(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(files, "PATIENCE", 20)
    process = start(HOLD, tmp_path)
    process.stdin.close()
    with locked(tmp_path):
        assert owner(tmp_path) == files.me()
    process.wait()
    assert "took over" not in capsys.readouterr().out


def test_processes_that_start_at_once_on_a_dead_owners_lock_hold_it_one_after_another(tmp_path):
    killed(tmp_path)
    processes = [start(RACE, tmp_path) for _ in range(4)]
    (tmp_path / "go").touch()
    printed = "".join(process.communicate(timeout=30)[0] for process in processes)
    assert [process.returncode for process in processes] == [0, 0, 0, 0]
    assert printed.count("took over the lock of process") == 1


def test_eight_processes_at_once_never_write_together_whoever_owned_the_folder_before():
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "soak.py", "--kills", "0", "--race", "2"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(r"^18 of 18 rounds had one owner at a time", done.stdout, re.MULTILINE)
    assert "2 rounds of 8 processes, a stopped owner before them" in done.stdout


def test_the_command_that_kills_recnb_start_counts_what_did_not_end_the_same(tmp_path, monkeypatch, capsys):
    def journey(photos, weights, to):
        log = to.with_suffix(".log").open("w")
        code = "import time; print('[1/5] 01_prepare: lists', flush=True); time.sleep(0.3)"
        return subprocess.Popen([sys.executable, "-c", code], stdout=log)

    monkeypatch.setattr(soak, "journey", journey)
    monkeypatch.setattr(soak, "drawn_photos", lambda folder: (folder, folder))
    monkeypatch.setattr(soak, "arrived", lambda to: {"model.safetensors": "the same"})
    journeys, failed = soak.soak_start(tmp_path, 3, 0)
    printed = capsys.readouterr().out
    assert journeys >= 1 and failed == 0 and "recnb start killed in 01_prepare" in printed
    assert printed.endswith("3 in 01_prepare\n")
    monkeypatch.setattr(soak, "arrived", lambda to: {"model.safetensors": to.name})
    (tmp_path / "other").mkdir()
    journeys, failed = soak.soak_start(tmp_path / "other", 2, 0)
    assert failed == journeys >= 1 and "DIFFERS in model.safetensors" in capsys.readouterr().out


def test_what_a_killed_owner_had_begun_to_write_goes_with_its_lock(tmp_path, capsys):
    process = killed(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    left = [tmp_path / "checkpoints" / f".latest.pt.{process.pid}.part", tmp_path / f".config.yaml.{process.pid}.part"]
    others = [tmp_path / ".mine.part", tmp_path / f"config.yaml.{process.pid}.part"]
    for path in (*left, *others):
        path.touch()
    with locked(tmp_path):
        assert not any(path.exists() for path in left) and all(path.exists() for path in others)


def test_a_lock_within_a_lock_leaves_the_outer_one(tmp_path):
    with locked(tmp_path):
        with locked(tmp_path):
            pass
        assert owner(tmp_path) == files.me()
        process = subprocess.run(
            [
                sys.executable,
                "-c",
                HOLD.replace("with locked", "import recnb.storage\nrecnb.storage.PATIENCE = 0.1\nwith locked"),
                str(tmp_path),
            ],
            input="",
            text=True,
            capture_output=True,
        )
        assert process.returncode and "LockedError" in process.stderr and files.me() in process.stderr


def test_an_error_within_frees_the_lock(tmp_path):
    with pytest.raises(ValueError), locked(tmp_path):
        raise ValueError
    process = start(HOLD, tmp_path)
    process.communicate()
    assert process.returncode == 0


def test_a_full_disk_names_the_file_and_leaves_what_was_there(tmp_path, monkeypatch):
    files.write_text(tmp_path / "a.txt", "before")

    def full(self, text, **options):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as disk, pytest.raises(OSError, match=r"No space left on device: '.*a\.txt'"):
        disk.setattr(files.Path, "write_text", full)
        files.write_text(tmp_path / "a.txt", "after")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["before"]


@pytest.mark.parametrize("text", ["=cmd()", "+1", "-1", "@a", "\ta", "'=a", "''+", "a=b", "'a", "'", ""])
def test_a_cell_that_a_spreadsheet_would_run_is_text_there_and_itself_again_when_read(text):
    assert not harmless(text).startswith(("=", "+", "-", "@", "\t", "\r"))
    assert as_meant(harmless(text)) == text
