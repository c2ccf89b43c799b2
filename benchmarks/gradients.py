"""A training step of two processes over a slow link: gradients sent behind the backward pass, during it, by DDP.

    python benchmarks/gradients.py [SECONDS]      how long all gradients of a ResNet-50 take on the link: 0.5

The link is simulated: it carries one bucket at a time, for as long as its bytes take. The three ways take turns, so
that other work on the machine meets all of them.
"""

import json
import os
import platform
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from statistics import median

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from recnb.distributed.gradients import BUCKET, AverageGradients
from recnb.models.backbones import create_backbone

PROCESSES, BATCH, PIXELS, ROUNDS = 2, 16, 64, 11


class Link:
    """Sums vectors over the processes, one at a time, each of which takes so many seconds a byte."""

    def __init__(self, seconds: float):
        self.group, self.line, self.seconds = dist.new_group(), ThreadPoolExecutor(1), seconds

    def start(self, flat: Tensor) -> torch.futures.Future:
        """Put a vector on the line."""
        done: torch.futures.Future = torch.futures.Future()
        self.line.submit(self.carry, flat, done)
        return done

    def carry(self, flat: Tensor, done: torch.futures.Future) -> None:
        """Take a vector to the other side."""
        dist.all_reduce(flat, group=self.group)
        time.sleep(self.seconds * flat.nbytes)
        done.set_result(flat)


class Slowly(AverageGradients):
    """Gradients that travel over a slow link."""

    def __init__(self, link: Link):
        super().__init__()
        self.start = link.start


def behind(model: nn.Module, average: AverageGradients, x: Tensor) -> None:
    """One backward pass, then all gradients travel."""
    model(x).square().mean().backward()
    average.begin([*model.parameters()])
    average.finish()


def during(model: nn.Module, average: AverageGradients, x: Tensor) -> None:
    """One backward pass, during which gradients travel."""
    loss = model(x).square().mean()
    average.begin([*model.parameters()])
    loss.backward()
    average.finish()


def plain(model: nn.Module, x: Tensor) -> None:
    """One backward pass of a model that sends its gradients itself."""
    model(x).square().mean().backward()


def ways(link: Link) -> dict:
    """The same step in three ways, and the model of each."""
    models = []
    for _ in range(3):
        torch.manual_seed(0)
        models.append(create_backbone("resnet50").train())
    ddp = DistributedDataParallel(models[2], bucket_cap_mb=BUCKET >> 20)
    ddp.register_comm_hook(link, lambda link, bucket: link.start(bucket.buffer().div_(PROCESSES)))
    return {
        "behind": (models[0], partial(behind, models[0], Slowly(link))),
        "during": (models[1], partial(during, models[1], Slowly(link))),
        "ddp": (models[2], partial(plain, ddp)),
    }


def measure(rank: int, folder: str, seconds: float) -> None:
    """Print what the first process measures."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=PROCESSES)
    parameters = sum(p.nbytes for p in create_backbone("resnet50").parameters())
    torch.manual_seed(rank)
    steps, x = ways(Link(seconds / parameters)), torch.randn(BATCH, 3, PIXELS, PIXELS)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(ROUNDS + 2):
        for name, (model, step) in steps.items():
            model.zero_grad()
            dist.barrier()
            began = time.perf_counter()
            step(x)
            times[name].append(time.perf_counter() - began)
    for gradients in zip(*([p.grad for p in model.parameters()] for model, _ in steps.values()), strict=True):
        for other in gradients[1:]:
            torch.testing.assert_close(gradients[0], other, rtol=1e-3, atol=1e-6)
    if rank == 0:
        print(json.dumps(result(seconds, {name: found[2:] for name, found in times.items()})))  # the first two warm up
    dist.destroy_process_group()


def result(seconds: float, times: dict[str, list[float]]) -> dict:
    """The medians, and those of the ratios within a round."""
    ratio = {other: median(a / b for a, b in zip(times["during"], times[other], strict=True)) for other in times}
    return {
        "device": f"{os.cpu_count()} cores, {platform.machine()}",
        "torch": torch.__version__,
        "part": "gradients",
        "what": f"ResNet-50, {BATCH} x {PIXELS} px in each of {PROCESSES} processes, {seconds} s on the link",
        **{f"{name}_ms": 1e3 * median(found) for name, found in times.items()},
        "ratio_to_behind": ratio["behind"],
        "ratio_to_ddp": ratio["ddp"],
    }


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 0.5
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(measure, (folder, seconds), PROCESSES)


if __name__ == "__main__":
    main()
