"""Optimizers under the original's names, on torch.optim, and which parameters each of them trains, how strongly.

Parameters come in groups of one optimizer, one share of the learning rate and one weight decay. The shares multiply:
what a parameter was given where it was made (`lr_multiplier`), and a decay by depth (AdamWDL).
"""
from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recnb.config import ConfigError, Registry, optimizers
from recnb.sharding import step_by_rows

BESIDE = {"lr": dict, "regularizer": dict, "scope": str, "clip_norm": float, "no_weight_decay_name": str,
          "one_dim_param_no_weight_decay": bool, "multi_precision": bool}  # torch's parameters are float32 throughout
OPTIMIZERS = Registry("optimizer", "Optimizer", beside=BESIDE)
REGULARIZERS = Registry("regularizer", "Optimizer.regularizer")


def fused(kind: type, groups: list[dict], lr: float, **settings) -> torch.optim.Optimizer:
    """An optimizer of torch that updates everything in one kernel where its parameters allow that.

    They do as plain floating-point tensors on the CPU or on a CUDA GPU. A state that it loads does not change this:
    one that was written without the kernel, or with it on another device, goes on within rounding.
    """
    parameters = [p for group in groups for p in group["params"]]
    able = all(type(p) in (Tensor, nn.Parameter) and p.is_floating_point() and p.device.type in ("cpu", "cuda")
               for p in parameters)
    optimizer = kind(groups, lr=lr, fused=able or None, **settings)
    optimizer.register_load_state_dict_pre_hook(keep_kernel)
    if able:
        optimizer.register_step_pre_hook(lay_out)
    return optimizer


def lay_out(optimizer: torch.optim.Optimizer, *_) -> None:
    "None; gradients that someone has set get the strides of their parameters: the CPU's kernel does not look at them."
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        if not p.grad.is_sparse and p.grad.stride() != p.stride():
            p.grad = torch.empty_like(p).copy_(p.grad)


def keep_kernel(optimizer: torch.optim.Optimizer, state: dict) -> dict:
    "The state to be loaded, its groups with or without the fused kernel as those of the optimizer."
    groups = [{**theirs, "fused": ours["fused"]}
              for theirs, ours in zip(state["param_groups"], optimizer.param_groups, strict=False)]
    return state | {"param_groups": groups + state["param_groups"][len(groups) :]}  # torch counts them


@REGULARIZERS.register
def L2(coeff: float = 0.0) -> dict:
    "`coeff` times each parameter is added to its gradient."
    return {"weight_decay": coeff}


@REGULARIZERS.register
def L1(coeff: float = 0.0) -> dict:
    "`coeff` times the sign of each parameter is added to its gradient."
    return {"l1": coeff}


@OPTIMIZERS.register
def SGD(weight_decay: float = 0.0) -> Callable:
    "Plain stochastic gradient descent."
    return partial(torch.optim.SGD, weight_decay=weight_decay)


@OPTIMIZERS.register
def Momentum(momentum: float = 0.9, use_nesterov: bool = False, weight_decay: float = 0.0) -> Callable:
    "SGD with momentum."
    return partial(fused, torch.optim.SGD, momentum=momentum, nesterov=use_nesterov, weight_decay=weight_decay)


@OPTIMIZERS.register
def Adam(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.0) -> Callable:
    "Adam (https://arxiv.org/abs/1412.6980); weight decay is added to the gradient."
    return partial(fused, torch.optim.Adam, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def RMSProp(momentum: float = 0.0, rho: float = 0.95, epsilon: float = 1e-6, weight_decay: float = 0.0) -> Callable:
    "RMSProp; unlike the original torch adds `epsilon` behind the square root."
    return partial(torch.optim.RMSprop, momentum=momentum, alpha=rho, eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def AdamW(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01) -> Callable:
    "Adam with decoupled weight decay (https://arxiv.org/abs/1711.05101)."
    return partial(fused, torch.optim.AdamW, betas=(beta1, beta2), eps=epsilon, weight_decay=weight_decay)


@OPTIMIZERS.register
def AdamWDL(beta1: float = 0.9, beta2: float = 0.999, epsilon: float = 1e-8, weight_decay: float = 0.01,
            layerwise_decay: float = 0.75, filter_bias_and_bn: bool = True) -> Callable:
    """AdamW whose rate shrinks by `layerwise_decay` with each layer from the backbone's end to its beginning.

    As in the fine-tuning of transformers (https://arxiv.org/abs/1906.08237). `filter_bias_and_bn`: parameters of one
    dimension do not decay.
    """
    return AdamW(beta1, beta2, epsilon, weight_decay)


def build_optimizer(cfg: dict) -> Callable:
    """A function `(groups, lr) -> torch optimizer`, or what behaves as one where the file lists several.

    `groups` are those of `parameter_groups`, or anything that torch takes. Raises ConfigError for a section that
    contradicts itself.
    """
    makers = [build_entry(section, where) for where, section in optimizers(cfg)]

    def make(groups, lr: float):
        groups = [group if isinstance(group, dict) else {"params": group} for group in groups]
        if isinstance(groups[0]["params"], Tensor):
            groups = [{"params": [group["params"] for group in groups]}]
        made = [build([group for group in groups if group.get("entry", 0) == i], lr=lr)
                for i, build in enumerate(makers)]
        return made[0] if len(made) == 1 else Several(made)

    return make


def build_entry(section: dict, where: str) -> Callable:
    "A function `(groups, lr) -> torch optimizer` for one entry; L1 and the clipping happen before its steps."
    section = dict(section)
    regular = REGULARIZERS.build(section["regularizer"], f"{where}.regularizer") if section.get("regularizer") else {}
    if regular and "weight_decay" in section:
        raise ConfigError(f"{where}: gives both 'regularizer' and 'weight_decay'; keep one of them")
    if "weight_decay" in regular and section["name"].startswith("AdamW"):
        raise ConfigError(f"{where}.regularizer: AdamW decays weights apart from their gradient, L2 is a part of it; "
                          "give weight_decay instead, or take Adam")
    build = OPTIMIZERS.build({**section, **{k: v for k, v in regular.items() if k == "weight_decay"}}, where)

    def make(groups, lr: float) -> torch.optim.Optimizer:
        optimizer = build(groups, lr=lr)
        step_by_rows(optimizer)  # of a sampled head
        if section.get("clip_norm"):
            optimizer.register_step_pre_hook(partial(clip, section["clip_norm"]))
        if regular.get("l1"):
            optimizer.register_step_pre_hook(partial(add_signs, regular["l1"]))
        return optimizer

    return make


def clip(norm: float, optimizer: torch.optim.Optimizer, *_) -> None:
    "None; scales each parameter's gradient down to `norm` where it is longer, one parameter at a time."
    for gradient in (p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        gradient.mul_(norm / torch.linalg.vector_norm(gradient).clamp_min(norm))


def add_signs(coeff: float, optimizer: torch.optim.Optimizer, *_) -> None:
    "None; adds `coeff` times the parameters' signs to their gradients."
    for p in (p for group in optimizer.param_groups for p in group["params"] if p.grad is not None):
        p.grad.add_(p.detach().sign(), alpha=coeff)


class Several:
    "Optimizers that each train their own parameters, with the interface of one."

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


def in_backbone(name: str) -> bool:
    "Whether a parameter of a model, or of one of the models that are distilled together, belongs to its backbone."
    return re.match(r"(models\.[^.]+\.)?backbone\.", name) is not None


def parameter_groups(cfg: dict, model: nn.Module, loss: nn.Module) -> list[dict]:
    """The trainable parameters of model and loss in groups, the backbone's first.

    Each is a dict of `params`, `entry` (which optimizer of the file), `lr_scale` (its share of that one's rate), and
    `weight_decay` where it is not that one's own. Raises ConfigError where a parameter has no optimizer or the reverse.
    """
    entries, shares = list(optimizers(cfg)), depth_shares(cfg, model)
    owners = [scope_names(section.get("scope"), where, model, loss) for where, section in entries]
    named = [(name, p) for name, p in [*model.named_parameters(), *loss_parameters(loss)] if p.requires_grad]
    groups: dict[tuple, list] = defaultdict(list)
    for name, p in sorted(named, key=lambda item: not in_backbone(item[0])):
        entry = next((i for i, names in enumerate(owners) if name in names), None)
        if entry is None:
            raise ConfigError(f"Optimizer: no entry's scope covers {name}; add one with 'scope: {type(model).__name__}'"
                              " or freeze what shall not be trained")
        decay = 0.0 if undecayed(name, p, entries[entry][1]) else getattr(p, "weight_decay", None)
        scale = getattr(p, "lr_multiplier", 1.0) * shares.get(name, 1.0)
        groups[in_backbone(name), entry, scale, decay].append(p)
    for i, (where, section) in enumerate(entries):
        if not any(key[1] == i for key in groups):
            raise ConfigError(f"{where}.scope: '{section.get('scope')}' has no trainable parameter that the entries "
                              "before it leave; put the narrower scope first")
    return [{"params": params, "entry": entry, "lr_scale": scale, "backbone": own,
             **({} if decay is None else {"weight_decay": decay})}
            for (own, entry, scale, decay), params in groups.items()]


def loss_parameters(loss: nn.Module) -> list[tuple[str, nn.Parameter]]:
    "(name, parameter) of what the terms of a CombinedLoss learn, such as CenterLoss.centers."
    terms = zip(getattr(loss, "names", ["loss"]), getattr(loss, "losses", [loss]), strict=True)
    return [(f"{term}.{name}", p) for term, part in terms for name, p in part.named_parameters()]


def scope_names(scope: str | None, where: str, model: nn.Module, loss: nn.Module) -> set[str]:
    """The names of the parameters in a scope: the model's or a loss's class, a part of the model, or a pattern.

    A pattern is a regular expression that a submodule's or parameter's whole name fits. Raises ConfigError where
    nothing does.
    """
    names = {name for name, _ in model.named_parameters()}
    of_losses = {name for name, _ in loss_parameters(loss)}
    if scope is None:
        return names | of_losses
    if scope == type(model).__name__:
        return names
    found = {name for name in of_losses if name.startswith(f"{scope}.")}
    try:
        prefixes = [name for name, _ in model.named_modules() if name and re.fullmatch(scope, name)]
        found |= {name for name in names if re.fullmatch(scope, name)
                  or any(name.startswith(f"{prefix}.") for prefix in prefixes)}
    except re.error as error:
        raise ConfigError(f"{where}.scope: '{scope}' is no regular expression: {error}") from None
    if not found:
        parts = ", ".join([type(model).__name__, *(n for n, _ in model.named_children()),
                           *sorted({name.split(".")[0] for name in of_losses})])
        raise ConfigError(f"{where}.scope: nothing is called '{scope}'; there is {parts}, or a pattern of names")
    return found


def undecayed(name: str, p: nn.Parameter, section: dict) -> bool:
    "Whether an entry of Optimizer exempts a parameter from weight decay."
    named = any(part in name for part in (section.get("no_weight_decay_name") or "").split())
    flat = section.get("one_dim_param_no_weight_decay") or (
        section["name"] == "AdamWDL" and section.get("filter_bias_and_bn", True))
    return named or (bool(flat) and p.dim() <= 1)


def depth_shares(cfg: dict, model: nn.Module) -> dict[str, float]:
    "For AdamWDL the share of the rate of each parameter of a backbone, by how far it lies before the end."
    decay = next((section.get("layerwise_decay", 0.75) for _, section in optimizers(cfg)
                  if section["name"] == "AdamWDL"), None)
    shares = {}
    if decay:
        from recnb.backbones import layer_depths
    for prefix, part in model.named_modules() if decay else ():
        if re.fullmatch(r"(models\.[^.]+\.)?backbone", prefix):
            depths = layer_depths(part)
            last = max(depths.values(), default=0) + 1  # neck and head are the layer behind the backbone's last
            shares |= {f"{prefix}.{name}": decay ** (last - depth) for name, depth in depths.items()}
    return shares
