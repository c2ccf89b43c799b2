"""What the terminal shows while a notebook trains: a line an epoch, with its metrics and the time that is left."""

import contextlib
import csv
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import yaml

SPOKEN = re.compile("^recall(?=[0-9])")
EVERY = 0.5  # seconds between two looks at a run's history.csv


@dataclass
class Followed:
    """One history.csv that is being written: of a run, or of a rung of its ladder."""

    path: Path
    epochs: int
    name: str = ""  # of the rung
    first: int = 0  # rows that were there before
    shown: int = 0
    began: float | None = None  # when the first new row was seen: what comes before it is no training

    def show(self) -> None:
        """Print a line for each row that is new, with the time that is left.

        Of epochs that pass in no time, the last one and those with metrics are enough.
        """
        now = rows(self.path)
        for number, row in enumerate(now[self.shown :], self.shown + 1):
            if number < len(now) and "," not in values(row):
                continue
            left = ""
            passed = time.monotonic() - self.began if self.began else 0.0
            if passed > EVERY:  # not of two rows that were read at once
                each = passed / (len(now) - self.first - 1)
                left = f"; about {duration(each * (self.epochs - len(now)))} left" * (len(now) < self.epochs)
            self.began = self.began or time.monotonic()
            place = f"epoch {row['epoch']} of {self.epochs}: " if self.epochs and row["epoch"] != "0" else ""
            print(f"  {self.name}{': ' * bool(self.name)}{place}{values(row)}{left}", flush=True)
        self.shown = max(self.shown, len(now))


@contextlib.contextmanager
def epochs_shown(run: Path, epochs: int) -> Iterator[None]:
    """Print a line for each epoch that ends within the block, of the run or of the rungs of its ladder.

    Args:
        run: the run folder, which need not exist yet.
        epochs: how many epochs the training has.
    """
    ended = threading.Event()
    watch = threading.Thread(target=follow, args=(run, epochs, ended), daemon=True)
    watch.start()
    try:
        yield
    finally:
        ended.set()
        watch.join()


def follow(run: Path, epochs: int, ended: threading.Event) -> None:
    """Print what the histories of a run get behind their first rows until `ended` is set."""
    count = len(rows(run / "history.csv"))
    own = Followed(run / "history.csv", epochs, first=count, shown=count)
    rungs: dict[Path, Followed] = {}
    for path in run.glob("rungs/**/history.csv"):
        rungs[path] = rung(run, path, len(rows(path)))
    while True:
        last = ended.wait(EVERY)
        for path in sorted(run.glob("rungs/**/history.csv"), key=lambda path: path.stat().st_mtime):
            rungs.setdefault(path, rung(run, path, 0)).show()
        if not rungs:  # a ladder's own history is that of a rung
            own.show()
        if last:
            return


def rung(run: Path, path: Path, count: int) -> Followed:
    """Return the history of a rung to follow, `count` rows of which are there already."""
    with contextlib.suppress(OSError, AttributeError, yaml.YAMLError):
        epochs = yaml.safe_load((path.parent / "config.yaml").read_text(encoding="utf-8"))["Global"].get("epochs", 0)
        return Followed(path, epochs, path.parent.relative_to(run / "rungs").as_posix(), count, count)
    return Followed(path, 0, path.parent.name, count, count)


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
