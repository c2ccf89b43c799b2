"""How long the checksums take that are verified when a run, a checkpoint, an index or an export is opened:

    python benchmarks/checksums.py --export runs/demo/export

A line each says how long opening it takes, and which part of that the verification is: of a ResNet-50 with embeddings
of 20,000 images, by a program that runs already and by one that is started for it, as the commands are; of its
checkpoint with the optimizer's state, an index of as many vectors, and the export named. All files are in the system's
cache, so nothing waits for a disk, which would make the share smaller.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from recnb import storage
from recnb.deploy.recognizer import Recognizer
from recnb.models.weights import checksum, read_weights, save_weights
from recnb.recipe.model import build_model
from recnb.recipe.reading import as_yaml
from recnb.recipe.resolved import resolved
from recnb.recipe.schema import load_config
from recnb.retrieval.search import Index
from recnb.runs.folder import SUMMED, load_run
from recnb.training.checkpoints import kept

COUNT, SIZE = 20_000, 512
CHANGES = {
    "Arch.Backbone": {"name": "resnet50", "pretrained": False},
    "Arch.BackboneStopLayer": {"name": "flatten"},
    "Arch.Neck": {"name": "FC", "class_num": SIZE},
    "Global.class_num": 1000,
}


def write_run(run: Path) -> None:
    """A run as training leaves it, with numbers drawn at random."""
    rng = np.random.default_rng(0)
    cfg = load_config("configs/demo.yaml", CHANGES)
    state = build_model(cfg, 1000).state_dict()
    moments = {i: {"exp_avg": value, "exp_avg_sq": value} for i, value in enumerate(state.values())}
    (run / "embeddings").mkdir(parents=True)
    for name, count in (("query", COUNT // 10), ("gallery", COUNT)):
        np.save(run / "embeddings" / f"{name}.npy", rng.normal(size=(count, SIZE)).astype(np.float32))
    storage.write_text(run / "config.yaml", as_yaml(resolved(cfg, 1000)))
    storage.write_json(run / "metrics.json", {"mAP": 0.5})
    storage.write_text(run / "history.csv", "epoch,mAP\n1,0.5\n")
    save_weights(state, run / "model.safetensors")
    storage.write_sums(run, [name for name in SUMMED if (run / name).is_file()])
    content = {"model": state, "optimizer": moments, "config": json.dumps(cfg), "contents": "{}"}
    torch.save(content, run / "latest.pt")
    storage.seal(run / "latest.pt")


def write_index(folder: Path) -> Path:
    """An index of vectors drawn at random; the path of its faiss file."""
    index = Index().add(np.random.default_rng(1).normal(size=(COUNT, SIZE)).astype(np.float32))
    return next(index.save(folder).glob("*.faiss"))


def opened(run: Path) -> None:
    """Open a run and its model in a new process."""
    code = "import sys; from recnb.runs.folder import load_run; load_run(sys.argv[1]).model()"
    subprocess.run([sys.executable, "-c", code, str(run)], check=True)


def seconds(work: Callable) -> float:
    """The least time of three."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--export", type=Path, help="an export folder")
    export = parser.parse_args().export
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        run = Path(temporary) / "run"
        write_run(run)
        file = write_index(Path(temporary) / "index")
        state = read_weights(run / "model.safetensors")
        jobs: dict[str, tuple[Callable, Callable]] = {
            "run and model": (lambda: load_run(run).model(), lambda: (storage.check_sums(run), checksum(state))),
            "by a command": (lambda: opened(run), lambda: (storage.check_sums(run), checksum(state))),
            "checkpoint": (lambda: kept(run / "latest.pt"), lambda: storage.check_seal(run / "latest.pt")),
            "index": (lambda: Index.load(file.parent), lambda: storage.sha256(file)),
        }
        if export:
            jobs["export"] = (lambda: Recognizer(export), lambda: storage.check_sums(export))
        for name, (work, check) in jobs.items():
            whole, part = seconds(work), seconds(check)
            print(f"{name:<14} opened in {whole:.3f} s, of which {part:.3f} s ({part / whole:.0%}) verify its files")


if __name__ == "__main__":
    main()
