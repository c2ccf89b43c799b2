"""Several processes, one training: each takes its share of the batches, all have the same weights after every step.

`torchrun --nproc-per-node N -m recnb.train ...` starts them. Losses of single images are averaged over the processes;
losses between images see the embeddings of all of them, gathered with their gradients. So N processes with batches of B
make the step of one process with a batch of N x B; of batch normalisation that holds with `Arch.use_sync_bn: True`,
otherwise its statistics are each process's own. The weights of sharded heads stay where they are.
"""
from __future__ import annotations

import contextlib
import datetime
import io
import os
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recnb.sharding import all_rows, gather, ranks

BUCKET = 25 << 20  # bytes of gradients that travel at a time


@contextlib.contextmanager
def processes(device: str) -> Iterator[None]:
    "The process group that torchrun's environment describes, within the block; only its first process prints."
    if int(os.environ.get("WORLD_SIZE", "1")) == 1 or ranks()[1] > 1:
        yield
        return
    on_gpu = device == "gpu" and torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_gpu else "gloo", timeout=datetime.timedelta(minutes=30))
    try:
        with contextlib.redirect_stdout(io.StringIO()) if ranks()[0] else contextlib.nullcontext():
            yield
    finally:
        dist.destroy_process_group()


def first_does(work, *args) -> None:
    "None; the first process does the work, the others wait until it is done."
    if ranks()[0] == 0:
        work(*args)
    if ranks()[1] > 1:
        dist.barrier()


class Gathered(dict):
    "The entries of an output dict from all processes, each gathered, with its gradients, when it is first asked for."

    def __init__(self, own: dict):
        super().__init__()
        self.own = own

    def __missing__(self, key: str) -> Tensor:
        self[key] = gather(self.own[key])  # (sum of B, ...)
        return self[key]


def everyone(out: dict, y: Tensor) -> tuple[dict, Tensor]:
    "The output dict and the labels of all processes, one behind the other."
    return Gathered(out), torch.cat(all_rows(y))


def share_batches(model: nn.Module) -> None:
    """None; each batch normalisation of a model sees the rows of all processes while it trains, on any device.

    The whole input travels, in either direction: for the CPU, where torch has no SyncBatchNorm.
    """
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            part.register_forward_pre_hook(take_all_rows)
            part.register_forward_hook(keep_own_rows, prepend=True)  # before the one that a backbone is cut by


@torch.compiler.disable
def take_all_rows(norm: nn.Module, args: tuple[Tensor]) -> tuple[Tensor] | None:
    "The rows of all processes in place of this one's, while a module trains."
    if not norm.training or ranks()[1] == 1:
        return None
    counts = torch.cat(all_rows(torch.tensor([len(args[0])], device=args[0].device))).tolist()
    norm.own_rows = slice(sum(counts[: ranks()[0]]), sum(counts[: ranks()[0] + 1]))
    return (gather(args[0]),)  # every process follows the gradients of its own rows through the statistics of all


@torch.compiler.disable
def keep_own_rows(norm: nn.Module, args: tuple, output: Tensor) -> Tensor:
    "This process's rows of what a module has made of all."
    return output[norm.own_rows] if norm.training and ranks()[1] > 1 else output


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    "The tensors in lists of one kind, each of about as many bytes as travel at a time."
    held: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = held.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(t.numel() * t.element_size() for t in bucket) > BUCKET:
            yield held.pop(tensor.dtype)
    yield from held.values()


def average_gradients(parameters: Iterable[nn.Parameter]) -> None:
    """Make each gradient its mean over the processes; one that is missing here counts as 0.

    A sparse one has the same rows in all processes, and keeps them.
    """
    for p in (parameters := list(parameters)):
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad.coalesce() if p.grad.is_sparse else p.grad
    for bucket in buckets(p.grad.values() if p.grad.is_sparse else p.grad for p in parameters):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) / ranks()[1]
        dist.all_reduce(flat)
        write_back(flat, bucket)


def averaged(values: Tensor) -> Tensor:
    "The mean of a tensor over the processes."
    if ranks()[1] > 1:
        values = values / ranks()[1]
        dist.all_reduce(values)
    return values


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    "None; the tensors become those of the first process."
    with torch.no_grad():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            dist.broadcast(flat, 0)
            write_back(flat, bucket)


def write_back(flat: Tensor, tensors: list[Tensor]) -> None:
    "None; the tensors get their values from one long vector."
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data.copy_(part.view_as(tensor))


def anywhere(flag: bool, device: torch.device) -> bool:
    "Whether the flag is up in any process."
    if ranks()[1] == 1:
        return flag
    raised = torch.tensor(float(flag), device=device)
    dist.all_reduce(raised, dist.ReduceOp.MAX)
    return bool(raised)


def joined(features: Tensor) -> Tensor:
    "The features (N, D) of a whole list on every process, from each one's share of them, on the CPU."
    world = ranks()[1]
    if world == 1:
        return features
    parts: list = [None] * world
    dist.all_gather_object(parts, features)
    whole = features.new_empty(sum(map(len, parts)), *features.shape[1:])
    for number, part in enumerate(parts):
        whole[number::world] = part
    return whole


def launch(config: Path, run_dir: Path, count: int) -> Iterator[str]:
    "The lines printed by `count` processes of this machine that train a configuration, which it does while iterated."
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m",
             "recnb.train", str(config), "--run-dir", str(run_dir)]
    with subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        yield from process.stdout
    if process.returncode:
        raise RuntimeError(f"training in {count} processes has ended with an error, shown above; "
                           f"{run_dir} holds its last checkpoint")
