"""Learning-rate schedules under the original's names: what the rate is after so many steps.

A schedule here is a plain function of the number of steps taken (and, for one that waits for a plateau, of what the
evaluations gave so far). It holds no state, so there is none to save, and a resumed run continues on the same curve.
"""

import math
from bisect import bisect_right
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from recnb.registry import Rate, Registry

WARMUP = {"warmup_epoch": float, "warmup_start_lr": float, "by_epoch": bool, "last_epoch": int, "verbose": bool}
SCHEDULES = Registry("learning-rate schedule", beside=WARMUP)


@SCHEDULES.register
def ConstLR(learning_rate: Rate) -> Callable:
    """The same learning rate throughout."""
    return lambda epoch: learning_rate


SCHEDULES["Constant"] = ConstLR


@SCHEDULES.register
def Linear(
    learning_rate: Rate, epochs: float, end_lr: float = 0.0, power: float = 1.0, cycle: bool = False
) -> Callable:
    """From `learning_rate` to `end_lr` over `epochs`, as the `power` of what is left of them.

    `cycle` begins anew then.
    """

    def rate(epoch: float) -> float:
        length = max(epochs * (max(1, math.ceil(epoch / epochs)) if cycle else 1), 1e-9)
        return end_lr + (learning_rate - end_lr) * (1 - min(epoch / length, 1)) ** power

    return rate


@SCHEDULES.register
def Cosine(learning_rate: Rate, epochs: float, eta_min: float = 0.0) -> Callable:
    """Half a cosine from `learning_rate` to `eta_min` over `epochs` (those that follow the warm-up)."""

    def rate(epoch: float) -> float:
        share = min(epoch / epochs, 1.0) if epochs > 0 else float(epoch > 0)
        return eta_min + (learning_rate - eta_min) * (1 + math.cos(math.pi * share)) / 2

    return rate


@SCHEDULES.register
def CosineFixmatch(
    learning_rate: Rate, epochs: float, step_each_epoch: int, num_warmup_steps: int = 0, num_cycles: float = 7 / 16
) -> Callable:
    """`learning_rate` times the cosine of `num_cycles` half turns (arXiv 2001.07685), after a warm-up."""
    warmup = num_warmup_steps / step_each_epoch

    def rate(epoch: float) -> float:
        if epoch < warmup:
            return learning_rate * epoch / warmup
        share = (epoch - warmup) / max(epochs - warmup, 1 / step_each_epoch)
        return learning_rate * max(0.0, math.cos(math.pi * num_cycles * share))

    return rate


@SCHEDULES.register
def OneCycleLR(
    max_learning_rate: Rate,
    epochs: float,
    divide_factor: float = 25.0,
    end_learning_rate: Rate = 0.0001,
    phase_pct: float = 0.3,
    anneal_strategy: str = "cos",
    three_phase: bool = False,
) -> Callable:
    """One cycle (https://arxiv.org/abs/1708.07120): from the maximum / `divide_factor` up to it, down to the end.

    The rise takes `phase_pct` of the epochs; with `three_phase` as much again brings it back to where it began.
    """
    first = max_learning_rate / divide_factor
    points = [(0.0, first), (phase_pct, max_learning_rate), (1.0, end_learning_rate)]
    if three_phase:
        points.insert(2, (2 * phase_pct, first))
    if anneal_strategy not in ("cos", "linear") or not 0 < phase_pct < (0.5 if three_phase else 1):
        raise ValueError(f"anneal_strategy is '{anneal_strategy}' (cos or linear), phase_pct {phase_pct} (a share)")

    def rate(epoch: float) -> float:
        share = min(epoch / max(epochs, 1e-9), 1.0)
        i = min(bisect_right([at for at, _ in points], share), len(points) - 1)
        (begin, low), (end, high) = points[i - 1 : i + 1]
        part = (share - begin) / (end - begin)
        return low + (high - low) * (part if anneal_strategy == "linear" else (1 - math.cos(math.pi * part)) / 2)

    return rate


@SCHEDULES.register
def Cyclic(
    base_learning_rate: Rate,
    max_learning_rate: Rate,
    step_each_epoch: int,
    step_size_up: int,
    step_size_down: int | None = None,
    mode: str = "triangular",
    exp_gamma: float = 1.0,
) -> Callable:
    """Up and down between two rates (https://arxiv.org/abs/1506.01186), the sizes in steps.

    mode: 'triangular' repeats itself, 'triangular2' halves the height each time, 'exp_range' shrinks it by `exp_gamma`
    a step.
    """
    length = step_size_up + (step_size_down or step_size_up)
    scales = {
        "triangular": lambda step: 1.0,
        "triangular2": lambda step: 0.5 ** (step // length),
        "exp_range": lambda step: exp_gamma**step,
    }
    if mode not in scales:
        raise ValueError(f"mode '{mode}' is none of {', '.join(scales)}")

    def rate(epoch: float) -> float:
        step = epoch * step_each_epoch
        place = step % length
        height = place / step_size_up if place <= step_size_up else (length - place) / (length - step_size_up)
        return base_learning_rate + (max_learning_rate - base_learning_rate) * height * scales[mode](step)

    return rate


@SCHEDULES.register
def ReduceOnPlateau(
    learning_rate: Rate,
    mode: str = "min",
    factor: float = 0.1,
    patience: int = 10,
    threshold: float = 1e-4,
    threshold_mode: str = "rel",
    cooldown: int = 0,
    min_lr: float = 0.0,
    epsilon: float = 1e-8,
) -> Callable:
    """`learning_rate` times `factor` whenever `patience` evaluations have brought nothing better.

    What is watched is the first metric of Metric.Eval, so `mode` is usually max. Computed by torch from all evaluations
    so far, each time anew.
    """
    options = {
        "mode": mode,
        "factor": factor,
        "patience": patience,
        "threshold": threshold,
        "eps": epsilon,
        "threshold_mode": threshold_mode,
        "cooldown": cooldown,
        "min_lr": min_lr,
    }
    plateau = Plateau(learning_rate, options)
    plateau(0)  # torch checks the options
    return plateau


@dataclass
class Plateau:
    """A schedule that asks for the evaluations' results too: `(epochs, results) -> learning rate`."""

    learning_rate: float
    options: dict  # of torch's ReduceLROnPlateau

    def __call__(self, epoch: float, results: Sequence[float] = ()) -> float:
        optimizer = torch.optim.SGD([torch.zeros(1)], lr=self.learning_rate)
        plateau = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, **self.options)
        for result in results:
            plateau.step(result)
        return optimizer.param_groups[0]["lr"]


@SCHEDULES.register
def Step(learning_rate: Rate, step_size: int, gamma: float = 0.1) -> Callable:
    """`learning_rate` times `gamma` every `step_size` epochs."""
    return lambda epoch: learning_rate * gamma ** (epoch // step_size)


def check_rising(name: str, epochs: list) -> None:
    """Raise ValueError where the epochs are not in rising order."""
    if any(a >= b for a, b in pairwise(epochs)):
        raise ValueError(f"{name} {epochs} must rise from one to the next")


@SCHEDULES.register
def MultiStepDecay(learning_rate: Rate, milestones: list, gamma: float = 0.1) -> Callable:
    """`learning_rate` times `gamma` at each milestone (in epochs)."""
    check_rising("milestones", milestones)
    return lambda epoch: learning_rate * gamma ** bisect_right(milestones, epoch)


@SCHEDULES.register
def Piecewise(
    learning_rate: Rate | None = None, decay_epochs: list | None = None, values: list | None = None
) -> Callable:
    """`values[i]` between the i-th and the next of `decay_epochs`; without them, `learning_rate` / 10 every 30 epochs.

    Raises ValueError where `learning_rate` contradicts `values`: the original then drops the values without a word.
    """
    if values is None and decay_epochs is None and learning_rate is not None:
        return lambda epoch: learning_rate * 0.1 ** (epoch // 30)
    if not values or decay_epochs is None or len(values) != len(decay_epochs) + 1:
        raise ValueError("Piecewise needs 'decay_epochs' and one more of 'values', or 'learning_rate' alone")
    if learning_rate is not None and learning_rate != values[0]:
        raise ValueError(f"learning_rate {learning_rate} contradicts values[0] {values[0]}; leave learning_rate out")
    check_rising("decay_epochs", decay_epochs)
    return lambda epoch: values[bisect_right(decay_epochs, epoch)]


def warmed_up(
    rate: Callable[[float], float],
    step_each_epoch: int,
    warmup_epoch: float = 0,
    warmup_start_lr: float = 0.0,
    by_epoch: bool = False,
    last_epoch: int = -1,
    verbose: bool = False,
) -> Callable:
    """Return the schedule `steps taken -> learning rate`: a linear warm-up to `rate(0)`, then `rate(epochs since)`.

    The rate begins anew behind the warm-up, so milestones come `warmup_epoch` later.

    Args:
        rate: The schedule in epochs.
        step_each_epoch: Steps of the optimizer in an epoch.
        warmup_epoch: How many epochs the warm-up has.
        warmup_start_lr: Its first learning rate.
        by_epoch: Whether the rate changes between epochs only.
        last_epoch: 0 starts one step (with `by_epoch` one epoch) into the curve.
        verbose: Without effect.
    """
    per_epoch = 1 if by_epoch else step_each_epoch
    warmup = round(warmup_epoch * per_epoch)

    def at(step: int, results: Sequence[float] = ()) -> float:
        position = (step // step_each_epoch if by_epoch else step) + last_epoch + 1
        if position < warmup:
            return warmup_start_lr + (rate(0) - warmup_start_lr) * position / warmup
        epoch = (position - warmup) / per_epoch
        return rate(epoch, results) if isinstance(rate, Plateau) else rate(epoch)

    return at
