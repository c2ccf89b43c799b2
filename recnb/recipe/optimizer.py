"""Build what the section Optimizer describes: optimizers, groups of parameters and learning-rate schedules."""

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

from recnb.distributed.rows import step_by_rows
from recnb.recipe.schema import optimizers
from recnb.registry import ConfigError
from recnb.training.optim import OPTIMIZERS, REGULARIZERS, Several, add_signs, clip
from recnb.training.schedules import SCHEDULES, WARMUP, warmed_up


def build_optimizer(cfg: dict) -> Callable:
    """Return a function `(groups, lr) -> optimizer`; where the file lists several, they act as one.

    `groups` are those of `parameter_groups`, or anything that torch takes.

    Raises:
        ConfigError: A section contradicts itself.
    """
    makers = [build_entry(section, where) for where, section in optimizers(cfg)]

    def make(groups, lr: float):
        groups = [group if isinstance(group, dict) else {"params": group} for group in groups]
        if isinstance(groups[0]["params"], Tensor):
            groups = [{"params": [group["params"] for group in groups]}]
        made = [
            build([group for group in groups if group.get("entry", 0) == i], lr=lr) for i, build in enumerate(makers)
        ]
        return made[0] if len(made) == 1 else Several(made)

    return make


def build_entry(section: dict, where: str) -> Callable:
    """Return a function `(groups, lr) -> torch optimizer` for one entry, with L1 and clipping before each step."""
    regular = REGULARIZERS.build(section["regularizer"], f"{where}.regularizer") if section.get("regularizer") else {}
    if regular and "weight_decay" in section:
        raise ConfigError(f"{where}: gives both 'regularizer' and 'weight_decay'; keep one of them")
    if "weight_decay" in regular and section["name"].startswith("AdamW"):
        raise ConfigError(
            f"{where}.regularizer: AdamW decays weights apart from their gradient, L2 is a part of it; "
            "give weight_decay instead, or take Adam"
        )
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


def in_backbone(name: str) -> bool:
    """Return whether a parameter of a model, or of one of several distilled together, belongs to its backbone."""
    return re.match(r"(models\.[^.]+\.)?backbone\.", name) is not None


def parameter_groups(cfg: dict, model: nn.Module, loss: nn.Module) -> list[dict]:
    """Return the trainable parameters of model and loss in groups, the backbone's first.

    Args:
        cfg: The checked configuration.
        model: The model.
        loss: The loss.

    Returns:
        Dicts of `params`, `entry` (which optimizer of the file), `lr_scale` (the share of that optimizer's rate),
        `backbone` and, where it differs from the optimizer's, `weight_decay`.

    Raises:
        ConfigError: A parameter has no optimizer, or an optimizer no parameter.
    """
    entries, shares = optimizers(cfg), depth_shares(cfg, model)
    owners = [scope_names(section.get("scope"), where, model, loss) for where, section in entries]
    named = [(name, p) for name, p in [*model.named_parameters(), *loss_parameters(loss)] if p.requires_grad]
    groups: dict[tuple, list] = defaultdict(list)
    for name, p in sorted(named, key=lambda item: not in_backbone(item[0])):
        entry = next((i for i, names in enumerate(owners) if name in names), None)
        if entry is None:
            raise ConfigError(
                f"Optimizer: no entry's scope covers {name}; add one with 'scope: {type(model).__name__}'"
                " or freeze what shall not be trained"
            )
        decay = 0.0 if undecayed(name, p, entries[entry][1]) else getattr(p, "weight_decay", None)
        scale = getattr(p, "lr_multiplier", 1.0) * shares.get(name, 1.0)
        groups[in_backbone(name), entry, scale, decay].append(p)
    for i, (where, section) in enumerate(entries):
        if not any(key[1] == i for key in groups):
            raise ConfigError(
                f"{where}.scope: '{section.get('scope')}' has no trainable parameter that the entries "
                "before it leave; put the narrower scope first"
            )
    return [
        {
            "params": params,
            "entry": entry,
            "lr_scale": scale,
            "backbone": own,
            **({} if decay is None else {"weight_decay": decay}),
        }
        for (own, entry, scale, decay), params in groups.items()
    ]


def loss_parameters(loss: nn.Module) -> list[tuple[str, nn.Parameter]]:
    """Return (name, parameter) of what the terms of a CombinedLoss learn, such as CenterLoss.centers."""
    terms = zip(getattr(loss, "names", ["loss"]), getattr(loss, "losses", [loss]), strict=True)
    return [(f"{term}.{name}", p) for term, part in terms for name, p in part.named_parameters()]


def scope_names(scope: str | None, where: str, model: nn.Module, loss: nn.Module) -> set[str]:
    """Return the names of the parameters in a scope.

    Args:
        scope: The model's or a loss's class, a part of the model, or a regular expression that a submodule's or
            parameter's whole name fits; None is everything.
        where: The entry's place in the file.
        model: The model.
        loss: The loss.

    Raises:
        ConfigError: Nothing has such a name.
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
        found |= {
            name
            for name in names
            if re.fullmatch(scope, name) or any(name.startswith(f"{prefix}.") for prefix in prefixes)
        }
    except re.error as error:
        raise ConfigError(f"{where}.scope: '{scope}' is no regular expression: {error}") from None
    if not found:
        parts = ", ".join(
            [
                type(model).__name__,
                *(n for n, _ in model.named_children()),
                *sorted({name.split(".")[0] for name in of_losses}),
            ]
        )
        raise ConfigError(f"{where}.scope: nothing is called '{scope}'; there is {parts}, or a pattern of names")
    return found


def undecayed(name: str, p: nn.Parameter, section: dict) -> bool:
    """Return whether an entry of Optimizer takes weight decay off a parameter.

    Args:
        name: The parameter's name.
        p: The parameter.
        section: The entry.
    """
    named = any(part in name for part in (section.get("no_weight_decay_name") or "").split())
    flat = section.get("one_dim_param_no_weight_decay") or (
        section["name"] == "AdamWDL" and section.get("filter_bias_and_bn", True)
    )
    return named or (bool(flat) and p.dim() <= 1)


def depth_shares(cfg: dict, model: nn.Module) -> dict[str, float]:
    """Return AdamWDL's share of the rate for each parameter of a backbone: the further from the end, the smaller."""
    decays = [s.get("layerwise_decay", 0.75) for _, s in optimizers(cfg) if s["name"] == "AdamWDL"]
    if not decays:
        return {}
    from recnb.models.backbones import layer_depths  # timm, which takes seconds

    shares: dict[str, float] = {}
    for prefix, part in model.named_modules():
        if re.fullmatch(r"(models\.[^.]+\.)?backbone", prefix):
            depths = layer_depths(part)
            last = max(depths.values(), default=0) + 1  # neck and head count as the layer after the backbone's last
            shares |= {f"{prefix}.{name}": decays[0] ** (last - depth) for name, depth in depths.items()}
    return shares


def build_schedules(cfg: dict, step_each_epoch: int) -> list[Callable]:
    """Return each entry's learning rate as a function of the steps taken and the evaluations' results."""
    return [
        build_schedule(section.get("lr") or {}, f"{where}.lr", cfg["Global"]["epochs"], step_each_epoch)
        for where, section in optimizers(cfg)
    ]


def build_schedule(section: dict, where: str, epochs: int, step_each_epoch: int) -> Callable:
    """Return the schedule of one section `lr`.

    Args:
        section: The section.
        where: Its place in the file.
        epochs: How many epochs are trained.
        step_each_epoch: Steps of the optimizer in an epoch.

    Raises:
        ConfigError: The section cannot be meant.
    """
    SCHEDULES.check(section, where)
    warmup = {key: section[key] for key in WARMUP if key in section}
    known = {
        "epochs": (epochs - warmup.get("warmup_epoch", 0), "after the warm-up there are"),
        "step_each_epoch": (step_each_epoch, "the training list makes"),
    }
    return warmed_up(SCHEDULES.build(section, where, **known), step_each_epoch, **warmup)
