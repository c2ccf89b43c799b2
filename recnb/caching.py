"""Batches larger than the device: a part of the batch at a time, with the gradients of the whole.

A loss that compares the images of a batch cannot be summed over smaller batches. Here the features of all images are
computed without keeping what their gradients need, the head and the loss see them together, and the backward pass
computes one part after the other anew and follows the features' gradients through it: gradient caching
(https://arxiv.org/abs/2101.06983). Memory is that of one part, time that of a second forward pass, and
more for parts so small that the device is not busy.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def in_chunks(part: Callable[[Tensor], dict[str, Tensor]], x: Tensor, chunk: int | None, module: nn.Module) -> dict:
    """`part(x)`, a dict of tensors (B, ...), from up to `chunk` rows of `x` at a time.

    Each is computed by `module` again when its gradients are asked for, with the same random numbers, in the same
    precision and without touching the module's buffers: batch statistics count once. A batch normalisation that trains
    still normalises each chunk by itself; without one, or with one in evaluation, the gradients are those of the
    undivided batch. Raises ValueError for a chunk below 1.
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
    "`part(x)`, of which nothing is kept but the input."
    return checkpoint(part, x, use_reentrant=False, context_fn=partial(contexts, module))


def contexts(module: nn.Module) -> tuple[contextlib.AbstractContextManager, contextlib.AbstractContextManager]:
    "What the first and the second computation of a part run in."
    return contextlib.nullcontext(), buffers_kept(module)


@contextlib.contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    "What runs inside changes none of the module's buffers, such as running means."
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:  # the second computation ends with an exception as soon as it has what is needed
        with torch.no_grad():
            for buffer, value in kept:
                buffer.copy_(value)
