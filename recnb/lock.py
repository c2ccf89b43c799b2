"""One process writes to a run folder: a lock that its owner keeps fresh and that outlives no owner.

The lock names host, process and when that started, so that a dead owner is known on its own host at once. On another
host (a cluster's shared disk) it counts as dead when the lock has not been touched for two minutes.
"""
from __future__ import annotations

import contextlib
import json
import os
import platform
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

TOUCH, STALE, PATIENCE = 15.0, 120.0, 20.0  # seconds: between touches, until it counts as left, to wait for an owner


class LockedError(RuntimeError):
    "Another process writes to this run folder."


def me() -> dict:
    "What a lock says of its owner."
    return {"host": platform.node(), "pid": os.getpid(), "started": psutil.Process().create_time()}


def read(path: Path) -> dict | None:
    "The owner of a lock and the seconds since it was touched, or None where there is none; a torn file has no owner."
    try:
        age = time.time() - path.stat().st_mtime
        return {**json.loads(path.read_text(encoding="utf-8")), "age": age}
    except FileNotFoundError:
        return None
    except (ValueError, TypeError):
        return {"host": platform.node(), "pid": -1, "started": 0.0, "age": age}


def alive(owner: dict) -> bool:
    "Whether the owner of a lock still runs, as far as can be told from here."
    if owner["host"] != platform.node():
        return owner["age"] < STALE
    try:
        process = psutil.Process(owner["pid"])
        return process.status() != psutil.STATUS_ZOMBIE and abs(process.create_time() - owner["started"]) < 1
    except (psutil.NoSuchProcess, ValueError, OverflowError):
        return False


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """The folder's lock is held within the block; a dead owner's is taken over, and a line says so.

    Raises LockedError where the owner lives on after some seconds: a kernel ends a little later than what started it.
    """
    path, own = folder / ".lock", me()
    take(path, own)
    done = threading.Event()

    def touch() -> None:
        while not done.wait(TOUCH):
            with contextlib.suppress(OSError):
                path.touch()

    threading.Thread(target=touch, daemon=True).start()
    try:
        yield
    finally:
        done.set()
        if same(read(path), own):
            path.unlink(missing_ok=True)


def same(owner: dict | None, own: dict) -> bool:
    "Whether the owner of a lock is this process."
    return owner is not None and all(owner[key] == value for key, value in own.items())


def take(path: Path, own: dict) -> None:
    "None; the lock at `path` is this process's, waited for where its owner is about to end."
    path.parent.mkdir(parents=True, exist_ok=True)
    deadline, told = time.monotonic() + PATIENCE, False
    while True:
        with contextlib.suppress(FileExistsError), path.open("x", encoding="utf-8") as file:
            json.dump(own, file)
            return
        owner = read(path)
        if owner is None or same(owner, own):
            if owner is None:
                continue
            return
        if not alive(owner):
            print(f"{path.parent}: took over the lock of process {owner['pid']} on {owner['host']}, which has ended")
            path.unlink(missing_ok=True)
            continue
        if time.monotonic() > deadline:
            raise LockedError(f"{path.parent}: process {owner['pid']} on {owner['host']} is writing to this run folder "
                              f"({owner['age']:.0f} s ago); use another folder, or wait until it has ended")
        if not told:
            print(f"{path.parent}: waiting up to {PATIENCE:.0f} s for process {owner['pid']} on {owner['host']} to end")
            told = True
        time.sleep(0.2)
