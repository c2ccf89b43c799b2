"""`recnb embed` over very many small images: images a second, and the memory that it holds while the list goes on.

    python benchmarks/embedding.py [--images 1000000] [--shard 50000]      a JSON line

A thousand drawn images of 32 pixels get a thousand names each, by links to their folder, so that each line of the list
has a path of its own. The network is timm's smallest. `curve` has, for each file of vectors that is written, the images
behind it and the most megabytes that all processes held together until then, each page that they share counted once.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

DRAWN, PIXELS = 1000, 32
OPS = [{"ResizeImage": {"size": PIXELS}}, {"NormalizeImage": {}}]
SPLIT = {
    "dataset": {"name": "VeriWild", "image_root": ".", "cls_label_path": "list.txt", "transform_ops": OPS},
    "sampler": {"name": "DistributedBatchSampler", "batch_size": 256},
}
CONFIG = {
    "Global": {"image_shape": [3, PIXELS, PIXELS], "class_num": 10},
    "DataLoader": {"Train": SPLIT, "Eval": {"Query": SPLIT}},
    "Arch": {
        "name": "RecModel",
        "Backbone": {"name": "test_resnet", "pretrained": False},
        "BackboneStopLayer": {"name": "flatten"},
        "Neck": {"name": "FC", "class_num": 64},
        "Head": {"name": "ArcMargin", "margin": 0.2, "scale": 16},
    },
    "Loss": {"Train": [{"CELoss": {"weight": 1.0}}]},
    "Optimizer": {"name": "AdamW", "lr": {"name": "ConstLR", "learning_rate": 0.001}},
}


def draw(folder: Path, images: int) -> None:
    """Draw the images, link them under further names, and write the list."""
    rng = np.random.default_rng(0)
    (folder / "drawn").mkdir()
    for number in range(min(DRAWN, images)):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        coarse.resize((PIXELS, PIXELS), Image.Resampling.BICUBIC).save(folder / "drawn" / f"{number}.jpg", quality=90)
    with (folder / "list.txt").open("w") as lines:
        for number in range(images):
            group = f"{number // DRAWN:05d}"
            if not number % DRAWN:
                (folder / group).symlink_to("drawn")
            lines.write(f"{group}/{number % DRAWN}.jpg {number % 10}\n")


def held(process: int) -> float:
    """Megabytes that a process and those below it hold, a page that several share counted once."""
    try:
        below = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        rows = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    except OSError:  # it has ended
        return 0.0
    own = next((int(row.split()[1]) / 1024 for row in rows if row.startswith("Pss:")), 0.0)
    return own + sum(held(int(each)) for each in below)


def embed(folder: Path, images: int, shard: int) -> dict:
    """Embed the list and return how long it took and what memory it held on the way."""
    (folder / "config.yaml").write_text(json.dumps(CONFIG))
    words = ["embed", "config.yaml", "list.txt", "--out", "out", "--shard", str(shard)]
    environment = {**os.environ, "XDG_CACHE_HOME": str(folder)}  # what has been decoded is not remembered here
    curve: dict[int, float] = {}
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, "-m", "recnb", *words], cwd=folder, env=environment, stdout=subprocess.DEVNULL
    ) as process:
        while process.poll() is None:
            done = len(list((folder / "out").glob("*.parquet")))
            curve[done] = max(curve.get(done, 0.0), held(process.pid))
            time.sleep(0.5)
    seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit(process.returncode)
    most = [round(value) for _, value in sorted(curve.items())][: -(-images // shard)]
    return {
        "images": images,
        "shard": shard,
        "minutes": round(seconds / 60, 1),
        "images_s": round(images / seconds),
        "MB": max(most),
        "curve": [[min(images, (i + 1) * shard), value] for i, value in enumerate(most)],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--shard", type=int, default=50_000)
    given = parser.parse_args()
    machine = {"device": f"{os.cpu_count()} cores, {platform.machine()}"}
    with tempfile.TemporaryDirectory() as folder:
        draw(Path(folder), given.images)
        print(json.dumps(machine | embed(Path(folder), given.images, given.shard)))


if __name__ == "__main__":
    main()
