"""Kills short runs with SIGKILL at random moments, starts them again, and counts how many end with the same bits:

    python scripts/soak.py --kills 30               # --kind TEXT: only kinds whose names have the text in them
    python scripts/soak.py --kills 0 --start 30
    python scripts/soak.py --kills 0 --race 200

Each run is small (drawn marks, a tiny network, three epochs) and of one kind: plain, with worker processes, moving
average and half precision, learnt centres, cross-batch memory, accumulated gradients, two processes that share the rows
of the head. Half of the killed runs are killed once more. What has to be the same as in a run that was left alone:
weights, history, metrics, and in the last checkpoint the optimizer, the average, centres, memory and generators.

With --start, `recnb start` climbs a ladder and is killed with its kernels at a random moment of each step, of some
steps again, and goes on until it ends: with the same lists, weights and metrics, and with a recogniser that opens.

With --race, 2, 4 and 8 processes at once want to write to a folder, so many rounds each where nobody has its lock,
where its owner was killed, and where its owner has stopped and goes on a little later: two may never write. Exits with
1 where anything fails.
"""

import argparse
import contextlib
import hashlib
import multiprocessing
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections import Counter
from functools import partial
from pathlib import Path

import psutil
import yaml

from recnb import storage
from recnb.storage import LockedError, locked, owner

os.environ["OMP_NUM_THREADS"] = "1"
FORK = multiprocessing.get_context("fork")  # of this process, which has imported nothing heavy
SERVER = multiprocessing.get_context("forkserver")  # of a process that has
SERVER.set_forkserver_preload(["recnb.cli.train", "recnb.runs.experiment", "recnb.deploy.recognizer"])
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
    "two processes": {"processes": 2, "Head": {"sharded": True}},
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
            "Head": {"name": "ArcMargin", "scale": 16, "margin": 0.2, **kind.get("Head", {})},
        },
        "Loss": {
            "Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 1.0, "views": 2}}, *kind.get("losses", [])]
        },
        "Optimizer": {"name": "AdamW", "lr": kind.get("lr", {"name": "Cosine", "learning_rate": 0.002})},
        "Metric": {"Eval": [{"Recallk": {"topk": [1, 5]}}, {"mAP": {}}]},
    }


def digest(value, key: str = "") -> str:
    """A hash of tensors, numbers and texts, however nested."""
    import torch

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
    import torch

    kept = torch.load(run / "checkpoints" / "latest.pt", weights_only=True)
    return {
        **{name: hashlib.sha256((run / name).read_bytes()).hexdigest() for name in FILES},
        **{name: digest(kept[name]) for name in ("model", "optimizer", "loss", "callbacks", "rng")},
        "rows": digest([(run / "checkpoints" / name).read_bytes() for name in kept.get("apart", ())]),
    }


def start(config: Path, run: Path, count: int = 1) -> list:
    """The processes of a run, each the leader of a group, which a kill ends with its workers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        there = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1]), "WORLD_SIZE": str(count)}
    places = [{**there, "RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    made = [SERVER.Process(target=train, args=(config, run, place if count > 1 else {})) for place in places]
    for process in made:
        process.start()
    return made


def train(config: Path, run: Path, place: dict[str, str]) -> None:
    """`recnb train`, in a process of its own, as torchrun would start it at a place among others."""
    from recnb.cli.train import main as recnb_train

    os.setsid()
    os.environ.update(place)
    log = os.open(run.with_suffix(".log"), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for stream in (1, 2):
        os.dup2(log, stream)
    sys.exit(recnb_train([str(config), "--run-dir", str(run)]))


def ended(processes: list) -> int:
    """The exit code of a run, once its processes have ended; 0 where all are."""
    for process in processes:
        process.join()
    return next((process.exitcode for process in processes if process.exitcode), 0)


def training(processes: list, run: Path) -> bool:
    """Whether one of these processes holds the run's lock."""
    return any(owner(run).startswith(f"process {process.pid} ") for process in processes)


def kill_at(processes: list, run: Path, seconds: float) -> str:
    """Kills the run so many seconds after it began to train, unless it has ended; says where it was."""
    while any(process.is_alive() for process in processes) and not training(processes, run):
        time.sleep(0.01)
    time.sleep(seconds)
    for process in (process for process in processes if process.is_alive()):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    ended(processes)
    log = run / "train.log"
    return log.read_text().splitlines()[-1].partition(" lr ")[0][9:] if log.exists() else "its first steps"


def soak(folder: Path, kills: int, seed: int, kinds: list[str]) -> tuple[int, int]:
    """How many runs were killed, and how many did not end as one that was left alone."""
    from recnb.demo.marks import draw_marks

    draw, failed = random.Random(seed), 0
    draw_marks(folder / "marks", identities=24, renderings=6, size=48)
    wanted, lengths = {}, {}
    for number in range(kills):
        name = kinds[number % len(kinds)]
        config, count = folder / f"{name.replace(', ', '-').replace(' ', '-')}.yaml", KINDS[name].get("processes", 1)
        if name not in wanted:
            config.write_text(yaml.safe_dump(configuration(folder / "marks", KINDS[name]), sort_keys=False))
            alone = start(config, config.with_suffix(""), count)
            held = []  # the moments at which it was training
            while any(process.is_alive() for process in alone):
                held += [time.monotonic()] * training(alone, config.with_suffix(""))
                time.sleep(0.02)
            if ended(alone):
                sys.exit(f"{name}: the run that was left alone failed, see {config.with_suffix('.log')}")
            wanted[name], lengths[name] = result(config.with_suffix("")), held[-1] - held[0]
        run = folder / f"{config.stem}-{number}"
        moments = [draw.uniform(0, lengths[name]) for _ in range(draw.choice((1, 2)))]
        places = [kill_at(start(config, run, count), run, moment) for moment in moments]
        left = {} if ended(start(config, run, count)) else result(run)
        differs = [key for key, value in wanted[name].items() if left.get(key) != value]
        failed += bool(differs)
        print(
            f"{number + 1:>3} {name:<14} killed behind {', '.join(places)}: "
            f"{'DIFFERS in ' + ', '.join(differs) if differs else 'the same'}",
            flush=True,
        )
    return kills, failed


def journey(photos: Path, weights: Path, to: Path) -> subprocess.Popen:
    """`recnb start` with weights that were drawn, so that it climbs a ladder; its log is that of the last call."""
    given = {"--to": to, "--weights": weights, "--backbone": "test_resnet", "--epochs": 2, "--image-size": 32}
    words = [str(word) for pair in given.items() for word in pair]
    with to.with_suffix(".log").open("w") as log:
        return subprocess.Popen([sys.executable, "-m", "recnb", "start", str(photos), *words], stdout=log, stderr=log)


def arrived(to: Path) -> dict[str, str]:
    """What `recnb start` left: a hash of each of its files that repeat; opening the recogniser proves the export."""
    from recnb.deploy.recognizer import Recognizer

    Recognizer(to / "export")
    files = [*sorted((to / "data").glob("*.txt")), *(to / name for name in FILES)]
    return {str(file.relative_to(to)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def step(to: Path) -> str:
    """The step that `recnb start` is in, or was."""
    lines = [line for line in to.with_suffix(".log").read_text().splitlines() if line.startswith("[")]
    return lines[-1].partition(":")[0].partition("] ")[2] if lines else ""


def place(to: Path) -> str:
    """The step that `recnb start` was in, and the rung that was written to last where it trained."""
    rungs = sorted((to / "rungs").glob("*"), key=lambda rung: rung.stat().st_mtime)
    return f"{step(to)} at {rungs[-1].name}" if rungs and step(to) == "02_train" else step(to)


def kill_all(process: subprocess.Popen) -> None:
    """Kill a process with all that it has started: a kernel is in a group of its own."""
    for one in [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]:
        with contextlib.suppress(psutil.NoSuchProcess):
            one.kill()
    process.wait()


def seconds_of_steps(process: subprocess.Popen, to: Path) -> dict[str, float]:
    """How long each step of a journey took that is left alone."""
    taken: dict[str, float] = {}
    while process.poll() is None:
        began, name = time.monotonic(), step(to)
        time.sleep(0.05)
        taken[name] = taken.get(name, 0.0) + time.monotonic() - began
    if process.returncode:
        sys.exit(f"recnb start that was left alone failed, see {to.with_suffix('.log')}")
    return {name: seconds for name, seconds in taken.items() if name}


def kill_in(name: str, process: subprocess.Popen, to: Path, seconds: float) -> str:
    """Kill a journey so long after it came to a step; where it was then, nothing where it had ended."""
    while process.poll() is None and step(to) < name:
        time.sleep(0.05)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(seconds)
        return ""
    kill_all(process)
    return place(to)


def soak_start(folder: Path, kills: int, seed: int) -> tuple[int, int]:
    """How many journeys from photos to a recogniser there were, and how many did not end as one left alone.

    Each is killed once in every step, and twice more in steps that are drawn.
    """
    draw, journeys, failed, where = random.Random(seed), 0, 0, Counter()
    begin = partial(journey, *drawn_photos(folder))
    lengths = seconds_of_steps(begin(folder / "alone"), folder / "alone")
    wanted = arrived(folder / "alone")
    while where.total() < kills:
        journeys += 1
        to, places = folder / f"start-{journeys}", []
        for name in sorted([*lengths, *draw.choices([*lengths], k=2)])[: kills - where.total()]:
            places.append(kill_in(name, begin(to), to, draw.uniform(0, lengths[name])))
        where.update(name for name in places if name)
        left = {} if begin(to).wait() else arrived(to)
        differs = [key for key, value in wanted.items() if left.get(key) != value]
        failed += bool(differs)
        end = "DIFFERS in " + ", ".join(differs) if differs else "the same"
        print(f"{journeys:>3} recnb start killed in {', '.join(filter(None, places))}: {end}", flush=True)
    print(", ".join(f"{number} in {name}" for name, number in sorted(where.items())))
    return journeys, failed


def drawn_photos(folder: Path) -> tuple[Path, Path]:
    """A folder of small photos, enough of them that a ladder is climbed, and a file of weights to begin with."""
    import timm
    import torch

    from recnb.demo.marks import draw_marks

    torch.manual_seed(0)
    photos = draw_marks(folder / "drawn", identities=32, renderings=6, size=32)["images"]
    torch.save(timm.create_model("test_resnet").state_dict(), folder / "weights.pth")
    return photos, folder / "weights.pth"


# ---- who may write to a folder ---------------------------------------------------------------------------------------

REFUSED = 3  # the exit code of a process that was told that another writes
OWNERS = ("nobody", "a killed owner", "a stopped owner")


def hold(folder: Path, pipe) -> None:
    """Owns the folder until the pipe says so."""
    with locked(folder):
        (folder / "inside").touch(exist_ok=False)
        pipe.send("held")
        pipe.recv()
        (folder / "inside").unlink()


def contend(folder: Path, gate: int, opener: int, patience: float) -> None:
    """Wants to write to the folder once the gate opens; an error where another process writes at the same time."""
    storage.PATIENCE = patience
    os.close(opener)
    os.read(gate, 1)
    with Path(os.devnull).open("w") as nowhere, contextlib.redirect_stdout(nowhere):
        try:
            with locked(folder):
                (folder / "inside").touch(exist_ok=False)
                time.sleep(0.002)
                (folder / "inside").unlink()
        except LockedError:
            sys.exit(REFUSED)


def race_once(folder: Path, before: str, count: int, draw: random.Random) -> list[int]:
    """The exit codes of so many processes that want to write at once, and of the owner where it goes on."""
    ours, theirs = FORK.Pipe()
    holder, patience = FORK.Process(target=hold, args=(folder, theirs)), 20.0
    if before != "nobody":
        holder.start()
        ours.recv()
    if before == "a killed owner":
        holder.kill()
        holder.join()
        (folder / "inside").unlink()
    elif before == "a stopped owner":
        os.kill(holder.pid, signal.SIGSTOP)
        patience = draw.uniform(0.05, 0.3)
    gate, opener = os.pipe()
    made = [FORK.Process(target=contend, args=(folder, gate, opener, patience)) for _ in range(count)]
    for process in made:
        process.start()
    os.close(opener)  # which opens the gate
    if before == "a stopped owner":
        time.sleep(draw.uniform(0, 0.3))
        os.kill(holder.pid, signal.SIGCONT)
        ours.send("end")
        made.append(holder)
    for process in made:
        process.join()
    os.close(gate)
    return [process.exitcode for process in made]


def race(folder: Path, rounds: int, seed: int) -> tuple[int, int]:
    """How many rounds there were, and in how many two owned the folder or something was left in it."""
    draw, count, failed = random.Random(seed), 0, 0
    for before in OWNERS:
        for number in (2, 4, 8):
            codes = []
            for turn in range(rounds):
                place = folder / f"race-{before}-{number}-{turn}"
                place.mkdir()
                codes.append(race_once(place, before, number, draw))
                left = [path.name for path in place.iterdir() if path.name != ".lock"]
                may = {0, REFUSED} if before == "a stopped owner" else {0}
                failed += bool(left or set(codes[-1]) - may)
            count += rounds
            refused = sum(each.count(REFUSED) for each in codes)
            print(f"{rounds} rounds of {number} processes, {before} before them: {refused} were refused", flush=True)
    return count, failed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30, help="how many runs to kill")
    parser.add_argument("--kind", default="", help="a part of the name of the kinds of runs to kill")
    parser.add_argument("--start", type=int, default=0, help="how many times to kill `recnb start`")
    parser.add_argument("--race", type=int, default=0, help="how many rounds of each kind processes race for a lock")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    parser.add_argument("--folder", type=Path, help="where to keep the runs; by default a temporary folder")
    given, failed = parser.parse_args(), 0
    kinds = [name for name in KINDS if given.kind in name] or parser.error(f"--kind: there are {', '.join(KINDS)}")
    jobs = {
        "rounds had one owner at a time": (given.race, race),
        "killed runs ended the same": (given.kills, partial(soak, kinds=kinds)),
        f"journeys that `recnb start` was killed on, {given.start} times in all, ended the same": (
            given.start,
            soak_start,
        ),
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        for what, (number, work) in jobs.items():
            if number:
                begun = time.monotonic()
                count, lost = work(folder, number, given.seed)
                failed += lost
                print(f"{count - lost} of {count} {what}, in {time.monotonic() - begun:.0f} s", flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    sys.exit(main())
