"""Optimizers and learning-rate schedules under the original's names, on torch.optim.

A schedule here is a plain function from the number of steps taken to the learning rate of the next one. It holds no
state, so there is none to save, and a resumed run continues on the same curve.
"""
from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import pairwise

import torch

from recnb.config import ConfigError, Registry, lookup

OPTIMIZERS = Registry("optimizer", "Optimizer", beside={"lr": dict, "regularizer": dict})
WARMUP = {"warmup_epoch": float, "warmup_start_lr": float, "by_epoch": bool, "last_epoch": int, "verbose": bool}
SCHEDULES = Registry("learning-rate schedule", "Optimizer.lr", beside=WARMUP)
REGULARIZERS = Registry("regularizer", "Optimizer.regularizer")


@REGULARIZERS.register
def L2(coeff: float = 0.0) -> float:
    "The coefficient that is multiplied by each parameter and added to its gradient."
    return coeff


@OPTIMIZERS.register
def SGD(weight_decay: float = 0.0) -> Callable:
    "Plain stochastic gradient descent."
    return partial(torch.optim.SGD, weight_decay=weight_decay)


@OPTIMIZERS.register
def Momentum(momentum: float = 0.9, use_nesterov: bool = False, weight_decay: float = 0.0) -> Callable:
    "SGD with momentum."
    return partial(torch.optim.SGD, momentum=momentum, nesterov=use_nesterov, weight_decay=weight_decay)


@OPTIMIZERS.register
def Adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    "Adam (https://arxiv.org/abs/1412.6980); weight decay is added to the gradient."
    return partial(torch.optim.Adam, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def AdamW(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01) -> Callable:
    "Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."
    return partial(torch.optim.AdamW, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


def build_optimizer(cfg: dict) -> Callable:
    "A function `(parameters, lr) -> torch optimizer`; L2 regularisation becomes its weight decay."
    section = dict(cfg["Optimizer"])
    if section.get("regularizer"):
        if "weight_decay" in section:
            raise ConfigError("Optimizer: gives both 'regularizer' and 'weight_decay'; keep one of them")
        if section.get("name") == "AdamW":
            raise ConfigError("Optimizer.regularizer: AdamW decays weights apart from their gradient, L2 is a part of "
                              "it; give weight_decay instead, or take Adam")
        section["weight_decay"] = REGULARIZERS.build(section["regularizer"], "Optimizer.regularizer")
    return OPTIMIZERS.build(section, "Optimizer")


@SCHEDULES.register
def ConstLR(learning_rate: float) -> Callable:
    "The same learning rate throughout."
    return lambda epoch: learning_rate


@SCHEDULES.register
def Cosine(learning_rate: float, epochs: float, eta_min: float = 0.0) -> Callable:
    "Half a cosine from `learning_rate` to `eta_min` over `epochs` (those that follow the warm-up)."
    def rate(epoch: float) -> float:
        share = min(epoch / epochs, 1.0) if epochs > 0 else float(epoch > 0)
        return eta_min + (learning_rate - eta_min) * (1 + math.cos(math.pi * share)) / 2

    return rate


def check_rising(name: str, epochs: list) -> None:
    "None; raises ValueError where the epochs are not in rising order."
    if any(a >= b for a, b in pairwise(epochs)):
        raise ValueError(f"{name} {epochs} must rise from one to the next")


@SCHEDULES.register
def MultiStepDecay(learning_rate: float, milestones: list, gamma: float = 0.1) -> Callable:
    "`learning_rate` times `gamma` at each milestone (in epochs)."
    check_rising("milestones", milestones)
    return lambda epoch: learning_rate * gamma ** bisect_right(milestones, epoch)


@SCHEDULES.register
def Piecewise(learning_rate: float | None = None, decay_epochs: list | None = None,
              values: list | None = None) -> Callable:
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


def warmed_up(rate: Callable[[float], float], step_each_epoch: int, warmup_epoch: float = 0,
              warmup_start_lr: float = 0.0, by_epoch: bool = False, last_epoch: int = -1,
              verbose: bool = False) -> Callable[[int], float]:
    """The schedule `steps taken -> learning rate`: a linear warm-up to `rate(0)`, then `rate(epochs since)`.

    The rate begins anew behind the warm-up, so milestones come `warmup_epoch` later. With `by_epoch` it changes between
    epochs only. `last_epoch: 0` starts one step (with `by_epoch`: one epoch) into the curve. `verbose` has no effect.
    """
    per_epoch = 1 if by_epoch else step_each_epoch
    warmup = round(warmup_epoch * per_epoch)

    def at(step: int) -> float:
        position = (step // step_each_epoch if by_epoch else step) + last_epoch + 1
        if position < warmup:
            return warmup_start_lr + (rate(0) - warmup_start_lr) * position / warmup
        return rate((position - warmup) / per_epoch)

    return at


def build_schedule(cfg: dict, step_each_epoch: int) -> Callable[[int], float]:
    "The learning rate as a function of the steps taken."
    section = lookup(cfg, "Optimizer.lr") or {}
    SCHEDULES.check(section, "Optimizer.lr")
    warmup = {key: section[key] for key in WARMUP if key in section}
    epochs = cfg["Global"]["epochs"] - warmup.get("warmup_epoch", 0)
    return warmed_up(SCHEDULES.build(section, "Optimizer.lr", epochs=(epochs, "behind the warm-up there are")),
                     step_each_epoch, **warmup)
