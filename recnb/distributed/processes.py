"""The processes of one training: who they are, and what they send each other."""

import contextlib
import datetime
import io
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

TIMEOUT = datetime.timedelta(minutes=30)  # of a process that waits for the others


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    """The process group that torchrun's environment describes, within the block; only its first process prints."""
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks()[1] > 1:
        yield
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    try:
        with contextlib.redirect_stdout(io.StringIO()) if ranks()[0] else contextlib.nullcontext():
            yield
    finally:
        dist.destroy_process_group()


def first_does(work, *args) -> None:
    """The first process does the work, the others wait until it is done."""
    if ranks()[0] == 0:
        work(*args)
    if ranks()[1] > 1:
        dist.barrier()


class Gathered(dict):
    """The entries of an output dict from all processes, each gathered with its gradients when first asked for."""

    def __init__(self, own: dict):
        super().__init__()
        self.own = own

    def __missing__(self, key: str) -> Tensor:
        self[key] = gather(self.own[key])  # (sum of B, ...)
        return self[key]


def everyone(out: dict, y: Tensor) -> tuple[dict, Tensor]:
    """The output dict and the labels of all processes, one behind the other."""
    return Gathered(out), torch.cat(all_rows(y))


def averaged(values: Tensor) -> Tensor:
    """The mean of a tensor over the processes."""
    if ranks()[1] > 1:
        values = values / ranks()[1]
        dist.all_reduce(values)
    return values


def anywhere(flag: bool, device: torch.device) -> bool:
    """Whether the flag is up in any process."""
    if ranks()[1] == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def from_all(own) -> list:
    """The objects of all processes, in their order."""
    found = [own] * ranks()[1]
    if len(found) > 1:
        dist.all_gather_object(found, own)
    return found


def own_part(files: dict) -> dict:
    """The entries that this process takes, where each takes some."""
    return dict([*files.items()][ranks()[0] :: ranks()[1]])


def joined(features: Tensor) -> Tensor:
    """The features (N, D) of a whole list on every process, from each one's share of them, on the CPU."""
    parts = from_all(features)
    whole = features.new_empty(sum(map(len, parts)), *features.shape[1:])
    for number, part in enumerate(parts):
        whole[number :: len(parts)] = part
    return whole


def launch(config: Path, run_dir: Path, count: int) -> Iterator[str]:
    """Train a configuration in `count` processes of this machine and yield the lines that they print."""
    words = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        f"--nproc-per-node={count}",
        "-m",
        "recnb.cli.train",
        str(config),
        "--run-dir",
        str(run_dir),
    ]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield from process.stdout or ()
    if process.returncode:
        raise RuntimeError(
            f"training in {count} processes has ended with an error, shown above; {run_dir} holds its last checkpoint"
        )


def ranks() -> tuple[int, int]:
    """(this process's rank, the number of ranks): (0, 1) where torch.distributed does not run."""
    running = dist.is_available() and dist.is_initialized()
    return (dist.get_rank(), dist.get_world_size()) if running else (0, 1)


def share(count: int, rank: int | None = None, world: int | None = None) -> range:
    """The rows of `count` that a rank (this one) of `world` (as many as run) holds.

    Raises ValueError for too few rows.
    """
    rank, world = (own if given is None else given for given, own in zip((rank, world), ranks(), strict=True))
    if count < world:
        raise ValueError(f"sharded: there are {count} classes for {world} ranks; leave sharded out, or run fewer ranks")
    return range(count * rank // world, count * (rank + 1) // world)


def all_rows(x: Tensor) -> list[Tensor]:
    """The tensors (B, ...) of all ranks in their order, without gradients; their numbers of rows may differ."""
    world = ranks()[1]
    if world == 1:
        return [x]
    counts = [torch.zeros(1, dtype=torch.long, device=x.device) for _ in range(world)]
    dist.all_gather(counts, counts[0] + len(x))
    lengths = torch.cat(counts).tolist()
    padded = x.new_zeros((max(lengths), *x.shape[1:]))
    padded[: len(x)] = x
    parts = [torch.empty_like(padded) for _ in range(world)]
    dist.all_gather(parts, padded)
    return [part[:count] for part, count in zip(parts, lengths, strict=True)]


class Gather(torch.autograd.Function):
    """What `gather` does, to autograd."""

    @staticmethod
    def forward(ctx, x: Tensor, factor: float) -> Tensor:
        parts = all_rows(x)
        first = sum(map(len, parts[: ranks()[0]]))
        ctx.own, ctx.factor = slice(first, first + len(x)), factor
        return torch.cat(parts)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        total = (gradient * ctx.factor).contiguous()
        if ranks()[1] > 1:
            dist.all_reduce(total)
        return total[ctx.own], None


def gather(x: Tensor, factor: float = 1.0) -> Tensor:  # (B, D) -> (sum of B, D)
    """The rows of all ranks, in their order; the gradient of a row is `factor` times the sum of what all ranks ask.

    With DistributedDataParallel, which averages over ranks: 1 where every rank computes the same loss of all rows, the
    number of ranks where each computes a part of it.
    """
    return Gather.apply(x, factor)


class Total(torch.autograd.Function):
    """The sum over ranks of equally shaped tensors; each rank follows the gradient of its own term."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        x = x.clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, gradient: Tensor) -> Tensor:
        return gradient
