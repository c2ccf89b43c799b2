"""What one GPU does, each figure beside a bare loop, a bare product or the measured matrix peak of the same process.

python benchmarks/gpu.py                        all parts, each in a process of its own; a JSON line for each result
python benchmarks/gpu.py --out docs/benchmarks  the same, kept in gpu-<device>.json
python benchmarks/gpu.py fit                    one part: layouts, fit, fed, embedding, heads or ranking
python benchmarks/gpu.py --small                small networks on whatever is there, to see that it runs

layouts    training steps in bfloat16, with and without channels_last and compile; the share of the matrix peak
fit        a step of fit_config and of a bare loop with the same model, precision and layout
fed        fit_config with JPEG files from the loader's workers: how much of the time the GPU computes
embedding  images a second of `embed`
heads      a step of a million identities, all of them and a tenth drawn
ranking    exact metrics of 60,500 x 60,500 embeddings beside the product alone
"""

import argparse
import contextlib
import json
import os
import re
import sys
import tempfile
import time
from pathlib import Path

import torch
from million import head
from retrieval import embeddings
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from training import DEVICE, MODEL, bare_loop, configuration, draw_photographs, gpu_memory, lines, machine, now, step

from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.models.backbones import create_backbone
from recnb.models.heads import ArcMargin
from recnb.models.necks import FC
from recnb.models.recmodel import RecModel
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.retrieval.metrics import retrieval_metrics
from recnb.storage import write_json
from recnb.training.adaptor import Callback
from recnb.training.evaluation import embed

FULL = {"name": "resnet50", "batch": 256, "pixels": 224, "steps": 20, "identities": 10**6, "items": 60_500}
SMALL = {"name": "resnet10t", "batch": 16, "pixels": 64, "steps": 3, "identities": 10**3, "items": 2000}
CLASSES, WARM = 1000, 4  # WARM: steps before a measurement


def recmodel(name: str) -> RecModel:
    """A backbone with neck and head, in bfloat16 while training and evaluating."""
    backbone = create_backbone(name, stop="flatten")
    width = backbone.out_shape[0]
    model = RecModel(backbone, FC(width, 512), ArcMargin(512, CLASSES, margin=0.3, scale=64)).to(DEVICE)
    model.precision, model.half_evaluation = torch.bfloat16, True
    return model


def matrix_peak(size: int = 8192) -> float:
    """Floating-point operations a second of a bfloat16 matrix product, the best of some."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = now()
        a @ b
        best = max(best, 2 * size**3 / (now() - began))
    return best


def layouts(sizes: dict) -> list[dict]:
    """Training steps whose batches lie on the device, in each layout, and what share of the peak these use."""
    peak = matrix_peak(8192 if sizes is FULL else 512)
    found = [{"part": "peak", "TFLOPs": peak / 1e12}]
    for last in (False, True):
        for compiled in (False, True):
            found.append(in_layout(sizes, last, compiled, peak))
    return found


def in_layout(sizes: dict, channels_last: bool, compiled: bool, peak: float) -> dict:
    """Images a second of the plainest loop, and its operations a second as a share of the peak."""
    name, batch, pixels = sizes["name"], sizes["batch"], sizes["pixels"]
    model, loss = recmodel(name).train(), CombinedLoss([(1.0, CELoss()), (1.0, SupConLoss(views=4))])
    if channels_last:
        model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, pixels, pixels, device=DEVICE)
    y = torch.arange(batch, device=DEVICE) // 4 % CLASSES
    with FlopCounterMode(display=False) as counted:
        loss(model(x, y), y).backward()
    if compiled:
        model.compile()
    gpu_memory()
    seconds = bare_loop(model, loss, [(x, y)] * (WARM + sizes["steps"]))
    return {
        "part": "train",
        "what": f"{name}, {batch} x {pixels} px, bfloat16",
        "channels_last": channels_last,
        "compile": compiled,
        "images_s": batch / seconds,
        "share_of_peak": counted.get_total_flops() / seconds / peak,
        "GPU_GiB": gpu_memory(),
    }


def fit(sizes: dict) -> list[dict]:
    """`step` of benchmarks/training.py in bfloat16 and channels_last."""
    half = {"AMP": {"dtype": "bfloat16"}, "Global": {"channels_last": True}}
    return [step(sizes["pixels"], sizes["batch"], WARM + sizes["steps"], 3, sizes["name"], **half)]


class Watch(Callback):
    """Notes when the GPU computes in the steps behind the first ones of an epoch."""

    def before_batch(self):
        if self.iter == WARM:
            on_gpu = DEVICE.type == "cuda"
            self.profile = profile(activities=[ProfilerActivity.CUDA]) if on_gpu else contextlib.nullcontext()
            self.began = now()
            self.profile.__enter__()

    def after_epoch(self):
        self.seconds = now() - self.began
        self.profile.__exit__(None, None, None)
        self.steps = self.n_iter - WARM

    def busy(self) -> float | None:
        """The share of the time in which the GPU computes."""
        if DEVICE.type != "cuda":
            return None
        kernels = [event for event in self.profile.key_averages() if not event.key.startswith("Mem")]  # copies
        return sum(event.self_device_time_total for event in kernels) / 1e6 / self.seconds


def fed(sizes: dict) -> list[dict]:
    """Images a second of fit_config with JPEG files of 500 x 375 decoded, resized and flipped by workers."""
    batch, pixels, workers = sizes["batch"], sizes["pixels"], os.cpu_count() or 1
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        listed = draw_photographs(folder, identities=batch // 4, images=8)  # of four images each: two batches
        listed.write_text(listed.read_text() * ((WARM + sizes["steps"]) // 2 + 1))
        cfg = configuration(
            folder,
            folder,
            listed,
            batch,
            pixels,
            [{"ResizeImage": {"size": pixels}}, {"RandFlipImage": {}}, {"NormalizeImage": {}}],
            Arch={**MODEL["Arch"], "Backbone": {"name": sizes["name"]}},
            AMP={"dtype": "bfloat16"},
            Global={"channels_last": True},
        )
        cfg["DataLoader"]["Train"]["loader"] = {"num_workers": workers}
        loaders, watch = build_loaders(cfg), Watch()
        learn = build_learner(cfg, build_model(cfg, loaders.classes), loaders, folder / "run")
        learn.add_cb(watch)
        with learn.no_bar(), learn.no_logging():
            learn.fit_config()
    return [
        {
            "part": "fed",
            "what": f"{sizes['name']}, {batch} x {pixels} px, bfloat16, {workers} workers",
            "images_s": watch.steps * batch / watch.seconds,
            "busy": watch.busy(),
        }
    ]


def embedding(sizes: dict) -> list[dict]:
    """Images a second of `embed`, from the processor's memory."""
    model, batch, pixels = recmodel(sizes["name"]), sizes["batch"], sizes["pixels"]
    images = 16 * batch
    batches = DataLoader(
        TensorDataset(torch.randn(images, 3, pixels, pixels), torch.zeros(images)),
        batch,
        pin_memory=DEVICE.type == "cuda",
    )
    embed(model, batches, progress=False)
    began = time.perf_counter()
    embed(model, batches, progress=False)
    what, seconds = f"{sizes['name']}, {batch} x {pixels} px, bfloat16", time.perf_counter() - began
    return [{"part": "embed", "what": what, "images_s": images / seconds}]


def heads(sizes: dict) -> list[dict]:
    """`head` of benchmarks/million.py, with a tenth of the classes in each step and with all."""
    return [head(sizes["identities"], share) for share in (0.1, 1.0)]


def ranking(sizes: dict) -> list[dict]:
    """Seconds of eleven exact metrics of a list against itself, and of the product of float32 rows alone."""
    items, (x, labels) = sizes["items"], embeddings(sizes["items"], 512)
    x = torch.from_numpy(x).to(DEVICE)
    times: dict[str, list[float]] = {"bare": [], "recnb": []}
    for _ in range(4):  # the first warms up
        began = now()
        for rows in x.split(4096):
            rows @ x.T
        times["bare"].append(now() - began)
        began = now()
        retrieval_metrics(x, None, labels, topk=(1, 10, 100, 1000))
        times["recnb"].append(now() - began)
    bare, ours = (min(found[1:]) for found in times.values())
    what = f"{items:,} x {items:,}, d = 512, exact"
    return [{"part": "ranking", "what": what, "bare_s": bare, "recnb_s": ours, "ratio": ours / bare}]


PARTS = {"layouts": layouts, "fit": fit, "fed": fed, "embedding": embedding, "heads": heads, "ranking": ranking}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("part", nargs="?", choices=PARTS)
    parser.add_argument("--small", action="store_true")
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    if DEVICE.type == "cpu" and not given.small:
        raise SystemExit("there is no GPU here: --small tries the code on the processor")
    if given.part:
        torch.backends.cudnn.benchmark = True
        for result in PARTS[given.part](SMALL if given.small else FULL):
            print(json.dumps({**machine(), **result}))
        return
    results = []
    for part in PARTS:
        for result in lines(sys.argv[0], part, *["--small"] * given.small):
            print(json.dumps(result), flush=True)
            results.append(result)
    if given.out:
        device = re.sub(r"\W+", "-", machine()["device"]).strip("-").lower()
        write_json(given.out / f"gpu-{device}.json", results)


if __name__ == "__main__":
    main()
