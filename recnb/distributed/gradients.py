"""Several processes, one training: each takes its share of the batches, all have the same weights after every step.

`torchrun --nproc-per-node N -m recnb.cli.train ...` starts them. Losses of single images are averaged over them;
losses between images see the embeddings of all of them, gathered with their gradients. So N processes with batches of B
make the step of one process with a batch of N x B; of batch normalisation that holds with `Arch.use_sync_bn: True`,
otherwise its statistics are each process's own. The weights of sharded heads stay where they are.
"""

from collections.abc import Iterable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from recnb.distributed.processes import TIMEOUT, all_rows, gather, ranks

BUCKET, LAST = 25 << 20, 1 << 20  # bytes of gradients that travel at a time, and behind the backward pass


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


def buckets(tensors: Iterable[Tensor], first: int | None = None) -> Iterator[list[Tensor]]:
    """The tensors in lists of one kind, each of about as many bytes as travel at a time, or `first` of the first."""
    limit = first or BUCKET
    held: dict[torch.dtype, list[Tensor]] = {}
    for tensor in tensors:
        bucket = held.setdefault(tensor.dtype, [])
        bucket.append(tensor)
        if sum(t.numel() * t.element_size() for t in bucket) > limit:
            yield held.pop(tensor.dtype)
            limit = BUCKET
    yield from held.values()


class AverageGradients:
    """Makes each gradient its mean over the processes, and sends it while the backward pass still runs.

    A bucket travels when all its gradients are there and the buckets before it are on their way: in one order, the
    reverse of registration, however the gradients come. The last one is small, since nothing is computed meanwhile.
    The process group is one of its own, since gathered features communicate in the backward pass too. A gradient that
    is missing here counts as 0; a sparse one has the same rows in all processes, and keeps them.
    """

    def __init__(self) -> None:
        group = cast(dist.ProcessGroup, dist.new_group(timeout=TIMEOUT))
        self.start = partial(dist.all_reduce, group=group, async_op=True)
        self.buckets: list[list[Tensor]] = []
        self.number: dict[Tensor, int] = {}  # of a parameter's bucket
        self.hooks: list[RemovableHandle] = []
        self.waiting, self.sent = False, []

    def begin(self, parameters: Sequence[nn.Parameter]) -> None:
        """Take the next backward pass as the last one before the step: what gradients are then, is averaged."""
        if self.number.keys() != set(parameters):
            self.close()
            self.buckets = [*buckets(parameters, LAST)][::-1]
            self.flat = [bucket[0].new_empty(0) for bucket in self.buckets]  # memory that is new takes time
            self.number = {p: number for number, bucket in enumerate(self.buckets) for p in bucket}
            self.hooks = [p.register_post_accumulate_grad_hook(self.arrived) for p in self.number]
        self.missing, self.sent, self.waiting = [len(bucket) for bucket in self.buckets], [], True

    def arrived(self, p: Tensor) -> None:
        """Send what is complete with the gradient of this parameter."""
        if not self.waiting:
            return
        if self.number[p] < len(self.sent):
            raise RuntimeError("a gradient has come twice: of several processes, a batch has one backward pass")
        self.missing[self.number[p]] -= 1
        while len(self.sent) < len(self.buckets) and not self.missing[len(self.sent)]:
            self.send(self.buckets[len(self.sent)])

    def send(self, bucket: list[Tensor]) -> None:
        """Start to sum the gradients of a bucket over the processes."""
        for p in bucket:
            p.grad = torch.zeros_like(p) if p.grad is None else p.grad.coalesce() if p.grad.is_sparse else p.grad
        found = (p.grad for p in bucket if p.grad is not None)
        gradients = [gradient.values() if gradient.is_sparse else gradient for gradient in found]
        memory = self.flat[len(self.sent)].resize_(0)
        flat = torch.cat([gradient.flatten() for gradient in gradients], out=memory)
        self.sent.append((flat, gradients, self.start(flat)))

    def finish(self) -> None:
        """Send what is left, and wait until each gradient is its mean; all processes have to call it."""
        for bucket in self.buckets[len(self.sent) :]:
            self.send(bucket)
        for flat, gradients, work in self.sent:
            work.wait()
            for gradient, part in zip(gradients, parts(flat, gradients), strict=True):
                torch.div(part, ranks()[1], out=gradient)
        self.sent, self.waiting = [], False

    def close(self) -> None:
        """Let go of the parameters."""
        for hook in self.hooks:
            hook.remove()


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """The tensors become those of the first process."""
    with torch.no_grad():
        for bucket in buckets(tensors):
            flat = torch.cat([tensor.detach().flatten() for tensor in bucket])
            dist.broadcast(flat, 0)
            for tensor, part in zip(bucket, parts(flat, bucket), strict=True):
                tensor.copy_(part)


def parts(flat: Tensor, tensors: list[Tensor]) -> list[Tensor]:
    """The parts of one long vector that stand for these tensors, in their shapes."""
    sizes = [tensor.numel() for tensor in tensors]
    return [part.view_as(tensor) for part, tensor in zip(flat.split(sizes), tensors, strict=True)]
