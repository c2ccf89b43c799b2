"""What one GPU does: training and embedding images a second, the share of its matrix peak, a million identities.

    python benchmarks/gpu.py              ResNet-50, 224 px, batches of 256, bfloat16; a JSON line for each result
    python benchmarks/gpu.py --small      a small network on whatever is there, to see that it runs

The peak is measured in the same process, as a product of two bfloat16 matrices. The rest of what is worth knowing has a
command of its own: `benchmarks/retrieval.py metrics 512`, `benchmarks/million.py`, `scripts/soak.py --kills 5`.
"""

import argparse
import json
import time

import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.data import DataLoader, TensorDataset
from torch.utils.flop_counter import FlopCounterMode
from training import DEVICE, machine, now

from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.models.backbones import create_backbone
from recnb.models.heads import ArcMargin
from recnb.models.necks import FC
from recnb.models.recmodel import RecModel
from recnb.training.evaluation import embed

CLASSES = 1000


def recmodel(name: str) -> RecModel:
    """A backbone with neck and head, in bfloat16 while training and evaluating."""
    backbone = create_backbone(name, stop="flatten")
    width = backbone.out_shape[0]
    model = RecModel(backbone, FC(width, 512), ArcMargin(512, CLASSES, margin=0.3, scale=64)).to(DEVICE)
    model.precision, model.half_evaluation = torch.bfloat16, True
    return model


def matrix_peak(size: int) -> float:
    """Floating-point operations a second of a bfloat16 matrix product, the best of some."""
    a, b = (torch.randn(size, size, device=DEVICE, dtype=torch.bfloat16) for _ in range(2))
    best = 0.0
    for _ in range(10):
        began = now()
        a @ b
        best = max(best, 2 * size**3 / (now() - began))
    return best


def training(name: str, batch: int, pixels: int, steps: int, channels_last: bool, compiled: bool, peak: float) -> dict:
    """Images a second of training steps whose batches lie on the device, and what share of the peak these use."""
    model, loss = recmodel(name).train(), CombinedLoss([(1.0, CELoss()), (1.0, SupConLoss(views=4))])
    if channels_last:
        model.to(memory_format=torch.channels_last)
    x = torch.randn(batch, 3, pixels, pixels, device=DEVICE)
    y = torch.arange(batch, device=DEVICE) // 4 % CLASSES
    optimizer = torch.optim.AdamW(model.parameters(), 3e-4, fused=True)

    def step() -> None:
        loss(model(x, y), y).backward()
        optimizer.step()
        optimizer.zero_grad()

    with FlopCounterMode(display=False) as counted:
        step()
    if compiled:
        model.compile()
    for _ in range(3):
        step()
    began = now()
    for _ in range(steps):
        step()
    seconds = (now() - began) / steps
    return {
        "part": "train",
        "what": f"{name}, {batch} x {pixels} px, bfloat16",
        "channels_last": channels_last,
        "compile": compiled,
        "images_s": batch / seconds,
        "busy": busy(step, steps),
        "memory_GiB": memory(),
        "share_of_peak": counted.get_total_flops() / seconds / peak,
    }


def busy(step, steps: int) -> float | None:
    """The share of the time in which the GPU computes."""
    if DEVICE.type != "cuda":
        return None
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        began = now()
        for _ in range(steps):
            step()
        seconds = now() - began
    return sum(event.self_device_time_total for event in profiled.key_averages()) / 1e6 / seconds


def memory() -> float | None:
    """The most memory of the GPU that was held since the last call, in GiB."""
    if DEVICE.type != "cuda":
        return None
    most = torch.cuda.max_memory_allocated() / 2**30
    torch.cuda.reset_peak_memory_stats()
    return most


def embedding(name: str, batch: int, pixels: int, images: int) -> dict:
    """Images a second of `embed`, from the processor's memory."""
    model, pinned = recmodel(name), DEVICE.type == "cuda"
    batches = DataLoader(
        TensorDataset(torch.randn(images, 3, pixels, pixels), torch.zeros(images)), batch, pin_memory=pinned
    )
    embed(model, batches, progress=False)
    began = time.perf_counter()
    embed(model, batches, progress=False)
    return {
        "part": "embed",
        "what": f"{name}, {batch} x {pixels} px, bfloat16",
        "images_s": images / (time.perf_counter() - began),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    name, batch, pixels, steps, images, size = (
        ("resnet10t", 16, 64, 2, 64, 512) if small else ("resnet50", 256, 224, 20, 4096, 8192)
    )
    if DEVICE.type == "cpu" and not small:
        raise SystemExit("there is no GPU here: --small tries the code on the processor")
    torch.backends.cudnn.benchmark = True
    peak = matrix_peak(size)
    print(json.dumps({**machine(), "part": "peak", "TFLOPs": peak / 1e12}))
    for channels_last, compiled in ((False, False), (True, False), (False, True), (True, True)):
        result = training(name, batch, pixels, steps, channels_last, compiled, peak)
        print(json.dumps({**machine(), **result}), flush=True)
    print(json.dumps({**machine(), **embedding(name, batch, pixels, images)}))


if __name__ == "__main__":
    main()
