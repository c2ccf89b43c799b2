"""Class weights too many for one step or one device: some of their rows, and rows divided over ranks.

Where torch.distributed runs, each rank holds a contiguous share of the rows, sees the features of all ranks and makes
the logits of its own classes only; two numbers for each image travel to make one softmax of them. On one process all of
this is the plain thing.
"""

import types
from collections.abc import Callable, Hashable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn

from recnb.distributed.processes import Total, ranks, share

BLOCK = 1024  # rows drawn by one generator
JOINED = 1 << 27  # bytes up to which a sharded weight is kept as one
PIECE = 1 << 24  # bytes of rows read at a time


def draw_rows(weight: Tensor, rows: range, draw: Callable) -> Tensor:
    """`weight` (len(rows), D), filled with what these rows are in a whole matrix, however it is divided.

    `draw(block, generator)` fills a block in place. Every block has a generator of its own, seeded from the global one,
    which must stand at the same place on all ranks.
    """
    seed = int(torch.randint(2**62, ()))
    for start in range(rows.start // BLOCK * BLOCK, rows.stop, BLOCK):
        block = draw(weight.new_empty(BLOCK, weight.shape[1]), torch.Generator(weight.device).manual_seed(seed + start))
        first, last = max(start, rows.start), min(start + BLOCK, rows.stop)
        weight[first - rows.start : last - rows.start] = block[first - start : last - start]
    return weight


class PartialLogits(NamedTuple):
    """Logits (M, S) of some of the classes: of those drawn in this step, or (`sharded`) of this rank's.

    `column` (M,) is where a row's own class stands, -1 where another rank has it. Sharded, the rows are those of all
    ranks' batches.
    """

    logits: Tensor
    column: Tensor
    sharded: bool = False

    def cross_entropy(self, epsilon: float = 0.0) -> Tensor:
        """The mean cross entropy over the classes that are there, on all ranks; `epsilon` smooths the labels over them.

        Every rank gets the same value. As log-sum-exps of log-sum-exps, no rank needs another's logits.
        """
        if not self.sharded:
            return F.cross_entropy(self.logits, self.column, label_smoothing=epsilon)
        own = self.logits.gather(1, self.column.clamp_min(0)[:, None]).squeeze(1)
        own = torch.where(self.column >= 0, own, 0)
        part = self.logits.logsumexp(1)
        top = part.detach().clone()
        dist.all_reduce(top, dist.ReduceOp.MAX)
        terms = [(part - top).exp(), own]
        if epsilon:
            terms += [self.logits.sum(1), torch.full_like(own, self.logits.shape[1])]
        exponentials, own, *rest = Total.apply(torch.stack(terms))
        smooth = rest[0] / rest[1] if epsilon else 0
        return (exponentials.log() + top - (1 - epsilon) * own - epsilon * smooth).mean()


def step_by_rows(optimizer: torch.optim.Optimizer) -> None:
    """Let any optimizer of torch take the sparse gradients of parameters (C, D) of which some rows are used.

    It steps a copy of those rows with their rows of its state; momentum, moments and weight decay of the other rows
    stand still until they are used again. Its hooks see the rows and their gradients. A step that raises leaves the
    parameters where they were.
    """
    whole = optimizer.step

    def by_rows(self, *args, **kwargs):
        held = []
        try:
            for group in self.param_groups:
                for i, p in enumerate(group["params"]):
                    if p.grad is not None and p.grad.is_sparse:
                        gradient, state = p.grad.coalesce(), self.state.get(p, {})
                        index = gradient.indices()[0]
                        rows = nn.Parameter(p.detach()[index])
                        rows.grad, rows.sharded = gradient.values(), getattr(p, "sharded", False)
                        used = {k: v[index] if per_row(v, p) else v for k, v in state.items()}
                        held.append((group["params"], i, p, rows, index))
                        group["params"][i], self.state[rows] = rows, used
            return whole(*args, **kwargs)
        finally:
            for params, i, p, *_ in held:
                params[i] = p
            for _, _, p, rows, index in held:
                put_back(rows, self.state.pop(rows, {}), p, self.state[p], index)

    # a method, as torch's schedulers want it
    optimizer.step = types.MethodType(by_rows, optimizer)  # type: ignore[method-assign]


def put_back(rows: Tensor, used: dict, p: Tensor, state: dict, index: Tensor) -> None:
    """Write the rows and their state into a parameter and its own."""
    p.detach()[index] = rows.detach()
    for k, v in used.items():
        if not per_row(v, rows):
            state[k] = v
            continue
        if state.get(k) is None:
            state[k] = torch.zeros_like(p)
        state[k][index] = v


def per_row(value, p: Tensor) -> bool:
    """Whether an entry of an optimizer's state, or of a state dict, has a row for each row of a parameter."""
    return isinstance(value, Tensor) and value.dim() > 0 and len(value) == len(p)


def sharded_weights(model: nn.Module, optimizer: torch.optim.Optimizer | None = None) -> dict[Hashable, Any]:
    """All rows of each sharded weight, as something of their length, by its name in the model's `state_dict()`.

    With an optimizer by its number in `optimizer.state_dict()["state"]`. What torch's fully_shard has divided stands
    for itself. `split` and `collect` take either.
    """
    held: dict[Hashable, Any] = {
        f"{name}.weight".lstrip("."): range(part.class_num)
        for name, part in model.named_modules()
        if getattr(part, "sharded", False)
    }
    held |= {name: p for name, p in model.named_parameters() if is_divided(p)}
    if optimizer is None:
        return held
    named = {model.get_parameter(str(name)): rows for name, rows in held.items()}
    order = [p for group in optimizer.param_groups for p in group["params"]]
    return {i: named[p] for i, p in enumerate(order) if p in named}


def is_divided(tensor) -> bool:
    """Whether torch's fully_shard has divided the rows of a tensor over the ranks."""
    return hasattr(tensor, "to_local")  # a DTensor, whose module takes half a second to import


def on_this_rank(tensor: Any) -> Tensor:
    """The part of a tensor that is on this rank, all of it where it is not divided."""
    return tensor.to_local() if is_divided(tensor) else tensor


def own_rows(held: Any) -> range:
    """The rows that this rank holds of a sharded weight, of which `sharded_weights` gives all."""
    if not is_divided(held):
        return share(len(held))
    first = min(ranks()[0] * -(-len(held) // ranks()[1]), len(held))  # as Tensor.chunk divides: the last may have none
    return range(first, first + len(held.to_local()))


class OwnRows(NamedTuple):
    """This rank's rows of a tensor that no process can hold, to be written where they are."""

    tensor: Tensor


class Rows:
    """All rows of such a tensor, to be read in part: one file behind the other holds some of them, under one name."""

    def __init__(self, name: str, files: Sequence[Path]):
        self.name, self.files = name, files

    def __len__(self) -> int:
        return sum(self.part(path).get_shape()[0] for path in self.files)

    def part(self, path: Path) -> Any:
        """The rows of a file, not read yet. What is read of them stays in memory until they are let go."""
        return safe_open(path, "pt").get_slice(self.name)

    def read(self, rows: range, into: Tensor | None = None) -> Tensor:
        """Some of all rows (len(rows), ...), written over `into` where that is given; only they are read."""
        one = self.part(self.files[0])[:1]
        found = one.new_empty(len(rows), *one.shape[1:]) if into is None else on_this_rank(into)
        start, piece = 0, max(PIECE // one.nbytes, 1)
        for path in self.files:
            stop = start + self.part(path).get_shape()[0]
            for first in range(max(start, rows.start), min(stop, rows.stop), piece):
                last = min(first + piece, stop, rows.stop)
                found[first - rows.start : last - rows.start] = self.part(path)[first - start : last - start]
            start = stop
        return found


def split(state: dict, held: Mapping[Hashable, Any], into: Mapping[Any, Tensor] | None = None) -> dict:
    """Return the state of this rank from that of all rows.

    Args:
        state: A tensor of it may be `Rows`.
        held: All rows, as `sharded_weights` gives them. `Rows` of other weights are read whole.
        into: Tensors that rows are written over, where there is one of their name.

    Raises:
        ValueError: A tensor has another number of rows.
    """

    def cut(key: Hashable, entry, _: str):
        if not has_rows(entry) or not (key in held or isinstance(entry, Rows)):
            return entry
        every = held.get(key, range(len(entry)))
        if len(entry) != len(every):
            raise ValueError(f"a state of {len(entry)} rows cannot be divided as one of {len(every)} classes")
        rows = own_rows(every) if key in held else every
        if isinstance(entry, Rows):
            own = entry.read(rows, (into or {}).get(key))
        else:
            own = entry[rows.start : rows.stop].clone()  # a view would keep all rows in memory
        return like(every, own) if is_divided(every) else own

    return {key: changed(value, partial(cut, key)) for key, value in state.items()}


def like(weight: Any, own: Tensor) -> Tensor:
    """This rank's rows as a tensor that is divided as a weight is."""
    from torch.distributed.tensor import DTensor

    place, shape = (weight.device_mesh, weight.placements), {"shape": weight.shape, "stride": weight.stride()}
    return DTensor.from_local(own.to(weight.device), *place, run_check=False, **shape)


def collect(state: dict, held: Mapping[Hashable, Any]) -> dict:
    """On rank 0 the state of all rows, on the CPU; elsewhere that of the rank. Every rank has to call it.

    One rank's rows travel at a time, so that no device needs room for more than two shares. Of tensors too large for
    one process each rank gets its `OwnRows`.
    """
    rank, world = ranks()

    def fetch(every, entry, _: str):
        if not has_rows(entry) or world == 1:
            return entry
        if entry.shape[1:].numel() * entry.element_size() * len(every) > JOINED:
            return OwnRows(on_this_rank(entry))
        if is_divided(entry):
            whole = entry.full_tensor()
            return entry if rank else whole.cpu()
        if rank:
            dist.send(entry.detach().contiguous(), 0)
            return entry
        whole = torch.empty(len(every), *entry.shape[1:], dtype=entry.dtype)
        whole[: len(entry)] = entry
        for other in range(1, world):
            rows = share(len(every), other, world)
            part = entry.new_empty(len(rows), *entry.shape[1:])
            dist.recv(part, other)
            whole[rows.start : rows.stop] = part
        return whole

    return state | {key: changed(state[key], partial(fetch, every)) for key, every in held.items() if key in state}


def has_rows(entry) -> bool:
    """Whether an entry of a state is one of rows, here or in files."""
    return isinstance(entry, Rows) or (isinstance(entry, Tensor) and entry.dim() > 0)


def changed(entry, change: Callable, place: str = ""):
    """Nested dicts and lists with `change(entry, its keys with dots between)` in place of each entry."""
    if isinstance(entry, dict):
        return {key: changed(value, change, f"{place}.{key}".lstrip(".")) for key, value in entry.items()}
    if isinstance(entry, list):
        return [changed(value, change, f"{place}.{i}") for i, value in enumerate(entry)]
    return change(entry, place)
