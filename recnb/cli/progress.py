"""What the terminal shows while a notebook trains: a line an epoch, with its metrics and the time that is left."""

from __future__ import annotations

import contextlib
import csv
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path

SPOKEN = re.compile("^recall(?=[0-9])")
EVERY = 0.5  # seconds between two looks at a run's history.csv


@contextlib.contextmanager
def epochs_shown(run: Path, epochs: int) -> Iterator[None]:
    """Print a line for each epoch that ends within the block.

    Args:
        run: the run folder, which need not exist yet.
        epochs: how many epochs the training has.
    """
    ended = threading.Event()
    history = run / "history.csv"
    watch = threading.Thread(target=follow, args=(history, len(rows(history)), epochs, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def follow(history: Path, first: int, epochs: int, ended: threading.Event) -> None:
    """Print the rows that a history.csv gets behind the first ones until `ended` is set."""
    shown = first
    began = None  # counted from the first row on: what comes before it is no training
    while True:
        last = ended.wait(EVERY)
        now = rows(history)
        for row in now[shown:]:
            left = ""
            passed = time.monotonic() - began if began else 0.0
            if passed > EVERY:  # not of two rows that were read at once
                each = passed / (len(now) - first - 1)
                left = f"; about {duration(each * (epochs - len(now)))} left" * (len(now) < epochs)
            began = began or time.monotonic()
            print(f"  epoch {row['epoch']} of {epochs}: {values(row)}{left}", flush=True)
        shown = max(shown, len(now))
        if last:
            return


def rows(history: Path) -> list[dict[str, str]]:
    """Return the rows of a history.csv, none where there is none yet."""
    try:
        with history.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    except OSError:
        return []


def values(row: dict[str, str]) -> str:
    """Return the training loss and the metrics of a row as text; its terms are left to the notebook."""
    hidden = ("epoch", "lr", "valid_loss")
    found = {name: text for name, text in row.items() if text and name not in hidden and "Loss" not in name}
    return ", ".join(f"{SPOKEN.sub('recall@', name)} {float(text):.3f}" for name, text in found.items())


def duration(seconds: float) -> str:
    """Return a time as a person says it: '40 s', '3 min', '2 h 5 min'."""
    if seconds < 100:
        return f"{max(0, seconds):.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 100 else f"{minutes // 60} h {minutes % 60} min"
