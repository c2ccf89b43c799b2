"One process writes to a run folder: who holds the lock, who may take it over, and when."
import json
import os
import subprocess
import sys
import time

import pytest

from recnb import lock
from recnb.lock import LockedError, locked


@pytest.fixture(autouse=True)
def hurry(monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 0.3)


def hold(folder):
    "Another process that holds the lock until it is told to end."
    code = ("import sys; from pathlib import Path; from recnb.lock import locked\n"
            f"with locked(Path({str(folder)!r})): print('held', flush=True); sys.stdin.read()")
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "held\n"
    return process


def test_a_living_owner_keeps_others_out_and_a_dead_one_does_not(tmp_path, capsys):
    process = hold(tmp_path)
    with pytest.raises(LockedError, match=f"process {process.pid} on .* is writing to this run"), locked(tmp_path):
        pytest.fail("the lock was taken from a living owner")
    process.kill()
    process.wait()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    assert f"took over the lock of process {process.pid}" in capsys.readouterr().out
    assert not (tmp_path / ".lock").exists()


def test_an_owner_that_ends_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "PATIENCE", 20)
    process = hold(tmp_path)
    process.stdin.close()
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text())["pid"] == os.getpid()
    process.wait()


def test_a_process_of_the_same_number_is_another_one(tmp_path):
    (tmp_path / ".lock").write_text(json.dumps({**lock.me(), "started": 1.0}))
    with locked(tmp_path):
        assert json.loads((tmp_path / ".lock").read_text()) == lock.me()


@pytest.mark.parametrize(("age", "held"), [(10, True), (500, False)])
def test_on_another_host_only_the_age_tells(tmp_path, age, held):
    (tmp_path / ".lock").write_text(json.dumps({**lock.me(), "host": "elsewhere"}))
    os.utime(tmp_path / ".lock", (time.time() - age,) * 2)
    if held:
        with pytest.raises(LockedError, match="on elsewhere"), locked(tmp_path):
            pass
    else:
        with locked(tmp_path):
            assert json.loads((tmp_path / ".lock").read_text()) == lock.me()


def test_a_torn_lock_has_no_owner_and_a_held_one_is_kept_fresh(tmp_path, monkeypatch):
    monkeypatch.setattr(lock, "TOUCH", 0.02)
    (tmp_path / ".lock").write_text('{"host": ')
    with locked(tmp_path):
        os.utime(tmp_path / ".lock", (0, 0))
        time.sleep(0.3)
        assert time.time() - (tmp_path / ".lock").stat().st_mtime < 5
        with locked(tmp_path):  # the same process, once more
            pass
