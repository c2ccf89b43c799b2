"""What starting takes: seconds until a name can be used, what is loaded for it, and how long 02_train is under way.

    python benchmarks/imports.py            a JSON line for each; those of the names alone with --names

Run it on an idle machine; `core seconds` are what a core works, whatever else it has to do. Each name is asked for in
interpreters of its own, the best of three. `loaded` has the packages that take most of it, in percent, each without
those that it imports, by Python's option -X importtime. The training is that of the demo, one epoch of it, whose images
have been drawn before: `first step` is when the first step of the optimizer has been made, and `cells` is how long each
cell before it has run.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections import Counter
from datetime import datetime
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
NAMES = {
    "import recnb": ["-c", "import recnb"],
    "recnb --help": ["-m", "recnb", "--help"],
    "retrieval_metrics": ["-c", "from recnb import retrieval_metrics"],
    "load_config": ["-c", "from recnb import load_config; load_config('configs/demo.yaml')"],
    "build_learner": ["-c", "from recnb import build_learner"],
}
LEAST = 2  # percent that are worth naming


def named(words: list[str]) -> dict:
    """Seconds that an interpreter takes with these words, and what it loads."""
    times, worked = [], []
    for _ in range(3):
        began, before = time.perf_counter(), os.times()
        subprocess.run([sys.executable, *words], cwd=ROOT, check=True, capture_output=True)
        times.append(time.perf_counter() - began)
        worked.append(sum(os.times()[2:4]) - sum(before[2:4]))
    told = subprocess.run([sys.executable, "-X", "importtime", *words], cwd=ROOT, capture_output=True, text=True).stderr
    loaded: Counter = Counter()
    for own, module in re.findall(r"^import time: +(\d+) \| +\d+ \| +([\w.]+)$", told, re.MULTILINE):
        loaded[two_levels(module)] += int(own) / 1e6
    shares = [(name, 100 * took / loaded.total()) for name, took in loaded.most_common()]
    return {
        "seconds": round(min(times), 2),
        "core seconds": round(min(worked), 2),
        "loaded": {name: round(share) for name, share in shares if share >= LEAST and loaded.total() > 0.1},
    }


def two_levels(module: str) -> str:
    """The package of a module; of torch, which is large, and of recnb, the part of it."""
    parts = module.split(".")
    return ".".join(parts[:2]) if parts[0] in ("torch", "recnb") else parts[0]


def first_step() -> dict:
    """Seconds from the command to the first step of 02_train, and what they go to."""
    with tempfile.TemporaryDirectory() as folder:
        run, log = Path(folder, "run"), Path(folder, "run", "train.log")
        overrides = "{Global.epochs: 1, Global.print_batch_step: 1}"
        words = ["-m", "recnb", "run", "02_train", "-p", f"run_dir={run}", "-p", f"overrides={overrides}"]
        began, clock = time.perf_counter(), time.time()
        with subprocess.Popen([sys.executable, *words], cwd=ROOT, stdout=subprocess.DEVNULL) as process:
            while process.poll() is None and not (log.is_file() and log.stat().st_size):
                time.sleep(0.02)
            seconds, worked = time.perf_counter() - began, work(process.pid)
        cells = json.loads((run / "train.ipynb").read_text())["cells"]
    took, start = {}, None
    for cell in cells:
        about = cell["metadata"].get("papermill", {})
        if about.get("start_time") and cell["cell_type"] == "code":
            start = start or datetime.fromisoformat(about["start_time"]).timestamp()
            took[cell["id"]] = round(about["duration"], 2)
    before = [*took][: [*took].index("train")]
    return {
        "what": "02_train on the demo",
        "first step": round(seconds, 1),
        "core seconds": round(worked, 1),
        "until its kernel runs": round(start - clock, 1),
        "cells": {name: took[name] for name in before},
    }


def work(process: int) -> float:
    """Seconds of a core that a process and those below it have taken."""
    try:
        below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        fields = Path(f"/proc/{process}/stat").read_text().rpartition(") ")[2].split()
    except OSError:  # it has ended
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(work(int(each)) for each in below)


def main() -> None:
    machine = {"device": f"{os.cpu_count()} cores, {platform.machine()}", "python": platform.python_version()}
    for what, words in NAMES.items():
        print(json.dumps({**machine, "what": what, **named(words)}), flush=True)
    if "--names" not in sys.argv:
        first_step()
        print(json.dumps({**machine, **first_step()}))


if __name__ == "__main__":
    main()
