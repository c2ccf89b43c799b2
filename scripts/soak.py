"""Kills short runs with SIGKILL at random moments, starts them again, and counts how many end with the same bits:

    python scripts/soak.py --kills 30
    python scripts/soak.py --kills 0 --start 5

Each run is small (drawn marks, a tiny network, three epochs) and of one kind: plain, with worker processes, moving
average and half precision, learnt centres, cross-batch memory, accumulated gradients. Half of the killed runs are
killed once more. What has to be the same as in a run that was left alone: weights, history, metrics, and in the last
checkpoint the optimizer, the average, centres, memory and generators. With --start, `recnb start` is killed with its
kernels at random moments, in whatever step it is, and has to end with the same lists, weights and metrics, and with a
recogniser that can be opened. Exits with 1 where any differs.
"""

import argparse
import contextlib
import hashlib
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import torch
import yaml

from recnb.demo.marks import draw_marks
from recnb.deploy.recognizer import Recognizer
from recnb.storage import owner

FILES = ("model.safetensors", "history.csv", "metrics.json")
OPS = [{"RandFlipImage": {}}, {"AugMix": {"prob": 0.5}}, {"NormalizeImage": {}}, {"RandomErasing": {}}]
STEPS = {"name": "MultiStepDecay", "learning_rate": 0.002, "milestones": [1, 2]}
KINDS = {
    "plain": {},
    "workers": {"loader": {"num_workers": 2}, "lr": STEPS},
    "average, half": {"EMA": {"decay": 0.9}, "AMP": {}},
    "centres": {"losses": [{"CenterLoss": {"weight": 0.01}}], "lr": {"name": "OneCycleLR", "max_learning_rate": 0.002}},
    "memory": {"losses": [{"ContrastiveLoss_XBM": {"weight": 0.1, "xbm_size": 40, "start_iter": 5}}]},
    "accumulation": {"Global": {"update_freq": 3}},
}


def configuration(data: Path, kind: dict) -> dict:
    """The configuration of one kind of run over the marks drawn in `data`."""

    def part(name: str, ops: list, sampler: dict) -> dict:
        return {
            "dataset": {
                "name": "VeriWild",
                "image_root": str(data / "images"),
                "cls_label_path": str(data / f"{name}.txt"),
                "transform_ops": [{"ResizeImage": {"size": 32}}, *ops],
            },
            "sampler": sampler,
            "loader": kind.get("loader", {"num_workers": 0}),
        }

    pairs = {"name": "PKSampler", "batch_size": 12, "sample_per_id": 2}
    return {
        "Global": {
            "device": "cpu",
            "epochs": 3,
            "image_shape": [3, 32, 32],
            "save_steps": 4,
            "print_batch_step": 1,
            **kind.get("Global", {}),
        },
        **{name: kind[name] for name in ("EMA", "AMP") if name in kind},
        "DataLoader": {
            "Train": part("train", OPS, pairs),
            "Eval": {
                name.title(): part(name, [{"NormalizeImage": {}}], {"batch_size": 32}) for name in ("query", "gallery")
            },
        },
        "Arch": {
            "Backbone": {"name": "test_resnet", "pretrained": False, "drop_rate": 0.2},
            "BackboneStopLayer": {"name": "flatten"},
            "Neck": {"name": "FC", "class_num": 16},
            "Head": {"name": "ArcMargin", "scale": 16, "margin": 0.2},
        },
        "Loss": {
            "Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 1.0, "views": 2}}, *kind.get("losses", [])]
        },
        "Optimizer": {"name": "AdamW", "lr": kind.get("lr", {"name": "Cosine", "learning_rate": 0.002})},
        "Metric": {"Eval": [{"Recallk": {"topk": [1, 5]}}, {"mAP": {}}]},
    }


def digest(value, key: str = "") -> str:
    """A hash of tensors, numbers and texts, however nested."""
    made = hashlib.sha256(key.encode())
    if isinstance(value, torch.Tensor):
        made.update(value.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, dict):
        made.update("".join(digest(part, str(name)) for name, part in value.items()).encode())
    elif isinstance(value, list | tuple):
        made.update("".join(map(digest, value)).encode())
    else:
        made.update(repr(value).encode())
    return made.hexdigest()


def result(run: Path) -> dict[str, str]:
    """What a finished run left: a hash of each of its files, and of its last checkpoint's content."""
    kept = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    return {
        **{name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in FILES},
        **{name: digest(kept[name]) for name in ("model", "optimizer", "loss", "callbacks", "rng")},
    }


def start(config: Path, run: Path) -> subprocess.Popen:
    """The run as a process group of its own, which a kill ends with its workers."""
    log = run.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "recnb.cli.train", str(config), "--run-dir", str(run)],
        stdout=log,
        stderr=log,
        start_new_session=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )


def training(process: subprocess.Popen, run: Path) -> bool:
    """Whether this process holds the run's lock."""
    return owner(run).startswith(f"process {process.pid} ")


def kill_at(process: subprocess.Popen, run: Path, seconds: float) -> str:
    """Kills the run so many seconds after it began to train, unless it has ended; says where it was."""
    while process.poll() is None and not training(process, run):
        time.sleep(0.01)
    time.sleep(seconds)
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    log = run / "train.log"
    return log.read_text().splitlines()[-1].partition(" lr ")[0][9:] if log.exists() else "its first steps"


def soak(folder: Path, kills: int, seed: int) -> int:
    """How many runs did not end as one that was left alone."""
    draw, failed = random.Random(seed), 0
    draw_marks(folder / "marks", identities=24, renderings=6, size=48)
    wanted, lengths = {}, {}
    for number in range(kills):
        name = list(KINDS)[number % len(KINDS)]
        config = folder / f"{name.replace(', ', '-')}.yaml"
        if name not in wanted:
            config.write_text(yaml.safe_dump(configuration(folder / "marks", KINDS[name]), sort_keys=False))
            alone = start(config, config.with_suffix(""))
            held = []  # the moments at which it was training
            while alone.poll() is None:
                held += [time.monotonic()] * training(alone, config.with_suffix(""))
                time.sleep(0.02)
            if alone.returncode:
                sys.exit(f"{name}: the run that was left alone failed, see {config.with_suffix('.log')}")
            wanted[name], lengths[name] = result(config.with_suffix("")), held[-1] - held[0]
        run = folder / f"{config.stem}-{number}"
        places = [kill_at(start(config, run), run, draw.uniform(0, lengths[name])) for _ in range(draw.choice((1, 2)))]
        code = start(config, run).wait()
        left = {} if code else result(run)
        differs = [key for key, value in wanted[name].items() if left.get(key) != value]
        failed += bool(differs)
        print(
            f"{number + 1:>3} {name:<14} killed behind {', '.join(places)}: "
            f"{'DIFFERS in ' + ', '.join(differs) if differs else 'the same'}",
            flush=True,
        )
    return failed


def journey(photos: Path, to: Path) -> subprocess.Popen:
    """`recnb start`, without pretrained weights."""
    words = ["start", str(photos), "--to", str(to), "--weights", "False", "--epochs", "2"]
    log = to.with_suffix(".log").open("a")
    return subprocess.Popen(
        [sys.executable, "-m", "recnb", *words], stdout=log, stderr=log, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )


def arrived(to: Path) -> dict[str, str]:
    """What `recnb start` left: a hash of each of its files that repeat; opening the recogniser proves the export."""
    Recognizer(to / "export")
    files = [*sorted((to / "data").glob("*.txt")), *(to / name for name in FILES)]
    return {str(file.relative_to(to)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started: a kernel is in a group of its own."""
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def soak_start(folder: Path, kills: int, seed: int) -> int:
    """How many journeys from photos to a recogniser did not end as one that was left alone."""
    draw, failed = random.Random(seed), 0
    photos = draw_marks(folder / "drawn", identities=18, renderings=6, size=48)["images"]
    begun = time.monotonic()
    if journey(photos, folder / "alone").wait():
        sys.exit(f"recnb start that was left alone failed, see {folder / 'alone.log'}")
    wanted, length = arrived(folder / "alone"), time.monotonic() - begun
    for number in range(kills):
        to = folder / f"start-{number}"
        process = journey(photos, to)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0, length))
        if process.poll() is None:
            kill_all(process)
        log = to.with_suffix(".log")
        step = [line for line in log.read_text().splitlines() if line.startswith("[")][-1:]
        left = {} if journey(photos, to).wait() else arrived(to)
        differs = [key for key, value in wanted.items() if left.get(key) != value]
        failed += bool(differs)
        end = "DIFFERS in " + ", ".join(differs) if differs else "the same"
        print(f"{number + 1:>3} recnb start killed in {step or 'its first steps'}: {end}", flush=True)
    return failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=30, help="how many runs to kill")
    parser.add_argument("--start", type=int, default=0, help="how many times to kill `recnb start`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; by default a temporary folder")
    given, begun = parser.parse_args(), time.monotonic()
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        failed = soak(folder, given.kills, given.seed) if given.kills else 0
        failed += soak_start(folder, given.start, given.seed) if given.start else 0
    count = given.kills + given.start
    print(f"{count - failed} of {count} killed runs ended the same, in {time.monotonic() - begun:.0f} s")
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
