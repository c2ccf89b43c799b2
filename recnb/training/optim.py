"""Optimizers under the original's names, on torch.optim, and which parameters each of them trains, how strongly.

Parameters come in groups of one optimizer, one share of the learning rate and one weight decay. The shares multiply:
what a parameter was given where it was made (`lr_multiplier`), and a decay by depth (AdamWDL).
"""

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recnb.distributed.processes import Total, ranks
from recnb.registry import Registry

BESIDE = {
    "lr": dict,
    "regularizer": dict,
    "scope": str,
    "clip_norm": float,
    "no_weight_decay_name": str,
    "one_dim_param_no_weight_decay": bool,
    "multi_precision": bool,
}  # torch's parameters are float32 throughout
OPTIMIZERS = Registry("optimizer", beside=BESIDE)
REGULARIZERS = Registry("regularizer")


def fused(kind: type, groups: list[dict], lr: float, **settings) -> torch.optim.Optimizer:
    """Return an optimizer of torch that updates everything in one kernel where its parameters allow that.

    They do as plain floating-point tensors on the CPU or on a CUDA GPU. A state that it loads does not change this:
    one that was written without the kernel, or with it on another device, goes on within rounding.

    Args:
        kind: The optimizer's class.
        groups: Its groups of parameters.
        lr: The learning rate to begin with.
        settings: Its other arguments.
    """
    parameters = [p for group in groups for p in group["params"]]
    able = all(
        type(p) in (Tensor, nn.Parameter) and p.is_floating_point() and p.device.type in ("cpu", "cuda")
        for p in parameters
    )
    optimizer = kind(groups, lr=lr, fused=able or None, **settings)
    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    if able:
        optimizer.register_step_pre_hook(lay_out)
    return optimizer


def lay_out(optimizer: torch.optim.Optimizer, *_) -> None:
    """Give gradients that someone has set the strides of their parameters: the CPU's kernel does not look at them."""
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if not p.grad.is_sparse and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)


def keep_kernel(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    """Return the state to be loaded, its groups with or without the fused kernel as those of the optimizer."""
    groups = [
        {**theirs, "fused": ours["fused"]}
        for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False)
    ]
    return state | {"param_groups": groups + state["param_groups"][len(groups) :]}  # torch counts them


@REGULARIZERS.register
def L2(coeff: float = 0.0) -> dict:
    """`coeff` times each parameter is added to its gradient."""
    return {"weight_decay": coeff}


@REGULARIZERS.register
def L1(coeff: float = 0.0) -> dict:
    """`coeff` times the sign of each parameter is added to its gradient."""
    return {"l1": coeff}


@OPTIMIZERS.register
def SGD(weight_decay: float = 0.0) -> Callable:
    """Plain stochastic gradient descent."""
    return partial(torch.optim.SGD, weight_decay=weight_decay)


@OPTIMIZERS.register
def Momentum(momentum: float = 0.9, use_nesterov: bool = False, weight_decay: float = 0.0) -> Callable:
    """SGD with momentum."""
    return partial(fused, torch.optim.SGD, momentum=momentum, nesterov=use_nesterov, weight_decay=weight_decay)


@OPTIMIZERS.register
def Adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    """Adam (https://arxiv.org/abs/1412.6980); weight decay is added to the gradient."""
    return partial(fused, torch.optim.Adam, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def RMSProp(momentum: float = 0.0, rho: float = 0.95, epsilon: float = 1e-6, weight_decay: float = 0.0) -> Callable:
    """RMSProp; unlike the original torch adds `epsilon` behind the square root."""
    return partial(torch.optim.RMSprop, momentum=momentum, alpha=rho, eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def AdamW(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01) -> Callable:
    """Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."""
    return partial(fused, torch.optim.AdamW, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def AdamWDL(
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
    weight_decay: float = 0.01,
    layerwise_decay: float = 0.75,
    filter_bias_and_bn: bool = True,
) -> Callable:
    """AdamW whose rate shrinks by `layerwise_decay` with each layer from the backbone's end to its beginning.

    As in the fine-tuning of transformers (https://arxiv.org/abs/1906.08237). `filter_bias_and_bn`: parameters of one
    dimension do not decay.
    """
    return AdamW(beta1, beta2, epsilon, weight_decay)


def clip(norm: float, optimizer: torch.optim.Optimizer, *_) -> None:
    """Scale each parameter's gradient down to `norm` where it is longer, one parameter at a time.

    The rows of all processes are one parameter where a head is sharded.
    """
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        length = torch.linalg.vector_norm(p.grad)
        if ranks()[1] > 1 and getattr(p, "sharded", False):
            length = Total.apply(length.square()).sqrt()
        p.grad.mul_(norm / length.clamp_min(norm))


def add_signs(coeff: float, optimizer: torch.optim.Optimizer, *_) -> None:
    """Add `coeff` times the parameters' signs to their gradients."""
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        p.grad.add_(p.detach().sign(), alpha=coeff)


class Several:
    """Optimizers that each train their own parameters, with the interface of one."""

    def __init__(self, optimizers: list[torch.optim.Optimizer]):
        self.optimizers, self.state = optimizers, {}

    @property
    def param_groups(self) -> list[dict]:
        return [group for optimizer in self.optimizers for group in optimizer.param_groups]

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def step(self) -> None:
        for optimizer in self.optimizers:
            optimizer.step()

    def state_dict(self) -> dict:
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state: dict) -> None:
        for optimizer, own in zip(self.optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(own)
