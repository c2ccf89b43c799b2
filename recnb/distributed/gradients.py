"""Several processes, one training: each takes its share of the batches, all have the same weights after every step.

`torchrun --nproc-per-node N -m recnb.cli.train ...` starts them. Losses of single images are averaged over them;
losses between images see the embeddings of all of them, gathered with their gradients. So N processes with batches of B
make the step of one process with a batch of N x B; of batch normalisation that holds with `Arch.use_sync_bn: True`,
otherwise its statistics are each process's own. The weights of sharded heads stay where they are.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recnb.distributed.processes import all_rows, gather, ranks

BUCKET = 25 << 20  # bytes of gradients that travel at a time


def share_batches(model: nn.Module) -> None:
    """Each batch normalisation of a model sees the rows of all processes while it trains, on any device.

    The whole input travels, in either direction: for the CPU, where torch has no SyncBatchNorm.
    """
    for part in model.modules():
        if isinstance(part, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d):
            part.register_forward_pre_hook(take_all_rows)
            part.register_forward_hook(keep_own_rows, prepend=True)  # before the one that a backbone is cut by


@torch.compiler.disable
def take_all_rows(norm: Any, args: tuple[Tensor]) -> tuple[Tensor] | None:
    """The rows of all processes in place of this one's, while a module trains."""
    if not norm.training or ranks()[1] == 1:
        return None
    counts = torch.cat(all_rows(torch.tensor([len(args[0])], device=args[0].device))).tolist()
    norm.own_rows = slice(sum(counts[: ranks()[0]]), sum(counts[: ranks()[0] + 1]))
    return (gather(args[0]),)  # every process follows the gradients of its own rows through the statistics of all


@torch.compiler.disable
def keep_own_rows(norm: Any, args: tuple, output: Tensor) -> Tensor:
    """This process's rows of what a module has made of all."""
    return output[norm.own_rows] if norm.training and ranks()[1] > 1 else output


def buckets(tensors: Iterable[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in lists of one kind, each of about as many bytes as travel at a time."""
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
    gradients = [p.grad for p in parameters if p.grad is not None]
    for bucket in buckets(gradient.values() if gradient.is_sparse else gradient for gradient in gradients):
        flat = torch.cat([gradient.flatten() for gradient in bucket]) / ranks()[1]
        dist.all_reduce(flat)
        write_back(flat, bucket)


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """The tensors become those of the first process."""
    with torch.no_grad():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            dist.broadcast(flat, 0)
            write_back(flat, bucket)


def write_back(flat: Tensor, tensors: list[Tensor]) -> None:
    """The tensors get their values from one long vector."""
    for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
        tensor.data.copy_(part.view_as(tensor))
