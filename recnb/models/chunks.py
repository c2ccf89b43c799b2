"""Batches larger than the device: a part of the batch at a time, with the gradients of the whole.

A loss that compares the images of a batch cannot be summed over smaller batches. Here the features of all images are
computed without keeping what their gradients need, the head and the loss see them together, and the backward pass
computes one part after the other anew and follows the features' gradients through it: gradient caching
(https://arxiv.org/abs/2101.06983). Memory is that of one part, time that of a second forward pass, and
more for parts so small that the device is not busy.
"""

import contextlib
from collections import defaultdict
from collections.abc import Callable, Iterator
from functools import partial
from posixpath import commonpath

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recnb.distributed.processes import ranks
from recnb.models.backbones import layer_depths
from recnb.models.cutting import Cut


def in_chunks(part: Callable[[Tensor], dict[str, Tensor]], x: Tensor, chunk: int | None, module: nn.Module) -> dict:
    """Return `part(x)`, a dict of tensors (B, ...), from up to `chunk` rows of `x` at a time.

    Each is computed again when its gradients are asked for, with the same random numbers, in the same precision and
    without touching the module's buffers: batch statistics count once. A batch normalisation that trains still
    normalises each chunk by itself; without one, or with one in evaluation, the gradients are those of the undivided
    batch.

    Args:
        part: what is computed.
        x: (B, ...) images.
        chunk: rows at a time; None: all.
        module: whose buffers are kept while a part is computed again.

    Raises:
        ValueError: The chunk is below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: one image at least is computed at a time")
    if chunk is None or chunk >= len(x) or not torch.is_grad_enabled():
        return part(x)
    pieces = x.tensor_split(-(-len(x) // chunk))  # of about one size: batch statistics need more than one image
    parts = [computed_again(part, piece, module) for piece in pieces]
    return {key: torch.cat([out[key] for out in parts]) for key in parts[0]}


@torch.compiler.disable(recursive=False)  # the part itself may be compiled, what surrounds it cannot
def computed_again(part: Callable[[Tensor], dict[str, Tensor]], x: Tensor, module: nn.Module) -> dict[str, Tensor]:
    """Return `part(x)`, of which nothing is kept but the input.

    Args:
        part: what is computed, and again for its gradients.
        x: (B, ...) images or maps.
        module: whose buffers are kept the second time.
    """
    return checkpoint(part, x, use_reentrant=False, context_fn=partial(contexts, module))


def contexts(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    """What the first and the second computation of a part run in."""
    return contextlib.nullcontext(), buffers_kept(module)


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """What runs inside changes none of the module's buffers, such as running means."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:  # the second computation ends with an exception as soon as it has what is needed
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)


def recompute_blocks(backbone: Cut) -> None:
    """Each block of a backbone keeps nothing but its input while it trains, and runs again in the backward pass.

    Gradient checkpointing (https://arxiv.org/abs/1604.06174) of the blocks by which timm counts a model's depth, with
    the same random numbers and batch statistics that count once. `set_grad_checkpointing` of timm's models would count
    them twice, and calls the blocks of stages that a cut has taken off; here a block with the cut inside is left as it
    is.

    Raises:
        ValueError: The backbone is not made of blocks.
    """
    blocks = blocks_of(backbone)
    if len(blocks) < 2:
        raise ValueError("is not made of blocks that could be computed again")
    for name, block in blocks.items():
        if not f"model.{backbone.layer}".startswith(f"{name}."):
            block.forward = partial(computed_when_needed, block, block.forward)


def blocks_of(backbone: Cut) -> dict[str, nn.Module]:
    """Return the blocks by which timm counts a model's depth, by name; none where timm has not made it."""
    layers: dict[int, list] = defaultdict(list)
    for name, depth in layer_depths(backbone).items() if hasattr(backbone.model, "group_matcher") else ():
        layers[depth].append(name.rpartition(".")[0].replace(".", "/"))
    names = {commonpath(parts).replace("/", ".") for parts in layers.values()} - {"model"}
    return {name: part for name in names if [*(part := backbone.get_submodule(name)).children()]}


def divide_blocks(backbone: Cut, device: torch.device) -> None:
    """Divide a backbone's weights over the processes: those of a block are whole only while it is computed.

    By torch's fully_shard (ZeRO, https://arxiv.org/abs/1910.02054), which averages their gradients as well. Each
    forward pass is made by all processes. The optimizer is to be made behind it.

    Args:
        backbone: it is changed in place and gets to the device, one block at a time.
        device: where it is going to be.
    """
    from torch.distributed.device_mesh import init_device_mesh  # seconds, which one process need not wait
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (ranks()[1],))
    for name, block in sorted(blocks_of(backbone).items(), key=lambda item: -len(item[0])):  # inner ones first
        if not f"model.{backbone.layer}.".startswith(f"{name}."):  # the cut ends it before fully_shard sees its output
            fully_shard(block, mesh=mesh)
    fully_shard(backbone, mesh=mesh, reshard_after_forward=True)


def computed_when_needed(block: nn.Module, forward: Callable, x: Tensor, *args, **kwargs):  # (B, ...) -> (B, ...)
    """Return what a block's forward gives, computed again for its gradients while the block trains.

    Args:
        block: whose buffers are kept the second time.
        forward: its own forward.
        x: (B, ...), or a list of such maps.
        *args: for `forward`.
        **kwargs: likewise.
    """
    if not (block.training and torch.is_grad_enabled()):
        return forward(x, *args, **kwargs)
    given = x if isinstance(x, Tensor) else [*x]  # the list of maps that a DenseNet's layer gets grows until then
    return computed_again(lambda x: forward(x, *args, **kwargs), given, block)
