"""A batch of configurations: read, checked as a whole, run as child processes, and put into a table."""

import itertools
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import yaml

from recnb.cli.notebook import check
from recnb.data.images import DataError
from recnb.recipe.parts import parts_in_use
from recnb.recipe.reading import read_yaml
from recnb.recipe.resolved import compare, portable, resolved
from recnb.recipe.schema import check_section, load_config, lookup
from recnb.registry import ConfigError
from recnb.runs.compare import short_names
from recnb.storage import ROOT, resolve

NOTEBOOK = resolve("notebooks/02_train.ipynb")
KEYS = {"config": str, "run_dir": str | None, "overrides": dict | None, "grid": dict | None, "list": list[dict] | None}


@dataclass
class Job:
    """One run of a batch: its name, folder, checked configuration and the words that start it."""

    name: str
    folder: Path
    cfg: dict
    command: list[str]
    state: str = ""
    seconds: float | None = None


def expand(batch: dict, where: str = "") -> dict[str, dict]:
    """Return the overrides of every run by its name, which says what differs.

    Raise ConfigError, with the file, for a key or a value that cannot be meant, or where two runs are the same.
    """
    check_section(batch, where, KEYS)
    common: dict = batch.get("overrides") or {}
    grid: dict = batch.get("grid") or {}
    points: list[dict] = batch.get("list") or [{}]
    for key, values in grid.items():
        if not isinstance(values, list) or not values:
            raise ConfigError(f"grid: {key}: {values!r} is not a list of values")
        if key in common or any(key in point for point in points):
            raise ConfigError(f"{key} stands in grid and in overrides or list: which of the values is meant?")
    runs = [
        dict(zip(grid, values, strict=True)) | point for point in points for values in itertools.product(*grid.values())
    ]
    keys = list(dict.fromkeys(key for run in runs for key in run))
    short = dict(zip(keys, short_names((key.split(".") for key in keys), "."), strict=True))
    varying = [key for key in keys if any(key not in run or run[key] != runs[0].get(key) for run in runs)]
    named: dict[str, dict] = {}
    for run in runs:
        name = "_".join(f"{short[key]}-{word(run[key])}" for key in varying if key in run) or "base"
        if name in named:
            raise ConfigError(f"two runs are named {name}: {named[name]} and {run}; leave one out")
        named[name] = run
    return {name: common | run for name, run in named.items()}


def word(value) -> str:
    """Return a value as a part of a folder's name; of a path, its last step."""
    text = json.dumps(value) if isinstance(value, dict | list) else str(value).rpartition("/")[2]
    return re.sub(r"[^\w.+-]+", "-", text).strip("-")


def command_of(folder: Path, parameters: dict) -> list[str]:
    """Return the words that run 02_train, the same from every folder."""
    # YAML as yaml writes it: of `1e-05`, which other writers may choose, a reader of YAML may make a string
    text = yaml.safe_dump(parameters, default_flow_style=True, sort_keys=False, width=float("inf")).strip()
    words = [sys.executable, "-m", "recnb", "run", str(NOTEBOOK.absolute())]
    words += ["--parts", str(own)] if (own := parts_in_use()) else []
    return [*words, "--to", str((folder / "train.ipynb").absolute()), "-y", text]


def plan(path: str | Path, run_dir: str = "") -> list[Job]:
    """Return every run of a batch, checked and with its state.

    Raise ConfigError naming run and key before anything is run.
    """
    batch = read_yaml(path)
    if "config" not in batch:
        raise ConfigError(f"{path}: config: the file does not say which configuration to vary")
    target = ROOT / (run_dir or batch.get("run_dir") or f"runs/{Path(path).stem}")
    if (target / "config.yaml").is_file():
        raise ConfigError(f"{target}: is a run itself, and no folder of runs; choose another with --run-dir")
    jobs: list[Job] = []
    runs = expand(batch, str(path))
    config = str(resolve(batch["config"]).absolute())
    for name, overrides in runs.items():
        folder = target / name
        parameters = {"config": config, "run_dir": str(folder), "overrides": overrides}
        try:
            check(NOTEBOOK, parameters)
            job = Job(name, folder, load_config(config, overrides), command_of(folder, parameters))
            job.state = state(job)
        except (ConfigError, DataError) as error:
            raise ConfigError(f"{name}: {error}") from None
        if same := next((other.name for other in jobs if other.cfg == job.cfg), None):
            raise ConfigError(f"{same} and {name} are the same configuration; leave one out")
        jobs.append(job)
    return jobs


def state(job: Job) -> str:
    """Return 'done', 'interrupted' or 'new'; raise ConfigError where the folder belongs to another configuration."""
    if not (job.folder / "config.yaml").is_file():
        return "new"
    if differing := compare(portable(load_config(job.folder / "config.yaml")), resolved(job.cfg)):
        raise ConfigError(
            f"{job.folder} holds a run of another configuration ({'; '.join(differing)}); "
            "delete it, or choose another folder with --run-dir"
        )
    last = "gallery.html" if lookup(job.cfg, "DataLoader.Eval") else "model.safetensors"  # what 02 writes at its end
    return "done" if (job.folder / "metrics.json").is_file() and (job.folder / last).is_file() else "interrupted"


class Batch:
    """Runs jobs, each a child process; `stop` ends those that run and starts no more."""

    def __init__(self, jobs: list[Job], at_once: int):
        self.jobs, self.at_once, self.children, self.stopped = jobs, at_once, [], False
        self.threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, (os.cpu_count() or 1) // at_once))

    def run(self) -> None:
        with ThreadPoolExecutor(self.at_once) as pool:
            waiting = [pool.submit(self.run_one, job) for job in self.jobs]
            try:
                for future in waiting:
                    future.result()
            except BaseException:
                self.stop()
                raise

    def run_one(self, job: Job) -> None:
        if self.stopped:
            return
        job.folder.mkdir(parents=True, exist_ok=True)
        started = time.perf_counter()
        child = subprocess.Popen(
            job.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,  # Ctrl-C reaches it through `stop`
            env={**os.environ, "OMP_NUM_THREADS": self.threads},
        )
        self.children.append(child)
        if self.stopped:  # meanwhile
            child.terminate()
        lines = []
        for line in child.stdout or ():
            lines.append(line)
            if line.startswith("  epoch"):
                print(f"{job.name}: {line.strip()}", flush=True)
        code = child.wait()
        job.seconds = time.perf_counter() - started
        job.state = "done" if code == 0 else "stopped" if self.stopped else "failed"
        print(f"{job.name}: {job.state} after {job.seconds:.0f} s", flush=True)
        if job.state == "failed":
            reason = "".join(lines).strip().rpartition("error: ")[2].splitlines()[-2:]
            print("    " + "\n    ".join([*reason, f"see {job.folder}"]), flush=True)

    def stop(self) -> None:
        self.stopped = True
        for sent, patience in ((signal.SIGINT, 10), (signal.SIGTERM, 5), (signal.SIGKILL, 5)):
            running = [child for child in self.children if child.poll() is None]
            for child in running:
                child.send_signal(sent)  # it ends its kernel on the first
            ends = time.monotonic() + patience
            while any(child.poll() is None for child in running) and time.monotonic() < ends:
                time.sleep(0.1)


def table(jobs: list[Job]) -> pd.DataFrame:
    """Return a row per run: state, seconds, and the metrics of those that have any."""
    rows = {}
    for job in jobs:
        path = job.folder / "metrics.json"
        metrics = json.loads(path.read_text()) if job.state == "done" and path.is_file() else {}
        rows[job.name] = {
            "state": job.state,
            "seconds": "" if job.seconds is None else f"{job.seconds:.0f}",
            **{key: value for key, value in metrics.items() if not isinstance(value, dict)},
        }
    return pd.DataFrame.from_dict(rows, orient="index")


def run_all(path: str | Path, run_dir: str = "", at_once: int = 1, printed: bool = False) -> int:
    """Run what a batch has still to do and return the exit code: 1 where a run of it is not done at the end.

    Args:
        path: the file of the batch.
        run_dir: the folder of the runs' folders, by default the batch's own, else runs and the file's name.
        at_once: how many runs at once.
        printed: only print a command for each run still to be done.
    """
    jobs = plan(path, run_dir)
    pending = [job for job in jobs if job.state != "done"]
    if printed:
        print("".join(f"{shlex.join(job.command)}\n" for job in pending), end="")
        return 0
    print(f"{len(jobs)} runs, {len(jobs) - len(pending)} of them done before", flush=True)
    for number in (signal.SIGINT, signal.SIGTERM):  # a scheduler's end is a Ctrl-C; in the background, that is ignored
        signal.signal(number, signal.default_int_handler)
    try:
        Batch(pending, at_once).run()
    except KeyboardInterrupt:
        print("stopped; the same command goes on from the last whole epoch of each run")
    print(table(jobs).to_string(float_format="{:.3f}".format, na_rep=""))
    return int(any(job.state != "done" for job in jobs))
