"""Build the Learner of a configuration from its model, loaders, loss, optimizers and schedule."""

import json
from functools import cache, partial
from pathlib import Path

import torch
from torch import nn

from recnb.data.lists import seeded
from recnb.data.loaders import Loaders
from recnb.distributed.processes import ranks
from recnb.losses.combined import CombinedLoss
from recnb.models.chunks import divide_blocks
from recnb.models.cutting import Cut
from recnb.models.recmodel import RecModel
from recnb.models.weights import check_room
from recnb.recipe.data import build_batch_transform
from recnb.recipe.model import precision
from recnb.recipe.objective import build_judge, build_loss
from recnb.recipe.optimizer import build_optimizer, build_schedules, parameter_groups
from recnb.recipe.resolved import check_kept, contents, resolved
from recnb.recipe.schema import architectures, items, lookup, optimizers
from recnb.registry import ConfigError
from recnb.storage import resolve
from recnb.training.learner import RetrievalLearner
from recnb.training.loggers import check_installed
from recnb.training.plan import Keeping, Plan, Schedule, Watching
from recnb.training.probe import on_features
from recnb.training.retention import Retention


def build_learner(cfg: dict, model: nn.Module, loaders: Loaders, run_dir: str | Path) -> RetrievalLearner:
    """Return the fastai Learner of a configuration; `learn.fit_config()` runs its whole schedule.

    Args:
        cfg: The checked configuration.
        model: As `build_model` makes it.
        loaders: As `build_loaders` makes them.
        run_dir: The folder that training writes to.

    Raises:
        ConfigError: The configuration asks for what is not installed, or parts of it contradict each other.
    """
    device = pick_device(cfg["Global"]["device"])
    if cfg["Global"]["probe"]:
        if not isinstance(model, RecModel):
            raise ConfigError("Global.probe: keeps the features of one model, and Arch has several; leave it out")
        folder = resolve(cfg["Global"]["probe_cache"])
        loaders = on_features(model.to(device), loaders, folder, cfg["Global"]["probe"], cfg["Global"]["seed"])
    plan = build_plan(cfg, loaders, Path(run_dir))
    with seeded(cfg["Global"]["seed"]):  # centres are drawn
        loss = build_loss(cfg, classes=loaders.classes, sizes=getattr(model, "sizes", None))
    last, divide = cfg["Global"]["channels_last"], cfg["Global"]["fully_shard"]
    if divide:
        check_divisible(cfg)
    attributes = {name: dict(vars(p)) for name, p in model.named_parameters()}
    if divide and ranks()[1] > 1:
        for backbone in [part for part in model.modules() if isinstance(part, Cut)]:
            divide_blocks(backbone, device)
    elif device.type == "cpu" if last is None else last:
        model.to(memory_format=torch.channels_last)
    if cfg["Global"]["compile"]:
        model.compile()  # in place: the names of the weights stay
    if mix := build_batch_transform(cfg, loaders.classes):
        check_mixable(cfg)
    learn = RetrievalLearner(
        loaders,
        model,
        loss,
        evaluation_loss(cfg, loaders),
        build_optimizer(cfg),
        build_judge(cfg, model, device),
        device,
        path=run_dir,
        splitter=partial(parameter_groups, cfg),
        mix=mix,
        plan=plan,
    )
    adam = any("adam" in section["name"].lower() for _, section in optimizers(cfg))
    check_room(model, 4 if adam else 2, device, "Arch")
    for name, p in model.named_parameters():  # lr_multiplier, which neither fully_shard nor a move keeps
        vars(p).update(attributes[name])
    learn.create_opt()  # now, since it finds parameters without an optimizer
    return learn


def check_divisible(cfg: dict) -> None:
    """Raise ConfigError where Global.fully_shard meets what needs the whole weights, or memory of another layout."""
    keys = ["EMA", "Retention.distill", *(f"Global.{k}" for k in ("channels_last", "compile", "grad_cache", "probe"))]
    others = [key for key in keys if lookup(cfg, key)] + ["AMP.dtype: float16"] * (precision(cfg) == torch.float16)
    if others:
        raise ConfigError(
            f"Global.fully_shard: the backbone cannot be divided with {others[0]}; leave one of the two out"
        )


def check_mixable(cfg: dict) -> None:
    """Raise ConfigError where a head or a loss cannot take the labels of blended images."""
    where = "DataLoader.Train.dataset.batch_transform_ops: blends images and their labels, but"
    for place, section in architectures(cfg):
        if lookup(section, "Head.name") not in (None, "FC"):
            raise ConfigError(f"{where} {place}.Head {section['Head']['name']} needs one label each; take FC")
    for place, name, _ in items(cfg, "Loss.Train"):
        if name != "CELoss":
            raise ConfigError(f"{where} {place} needs one label each; only CELoss takes shares of labels")


def build_plan(cfg: dict, loaders: Loaders, folder: Path) -> Plan:
    """Return the plan of a configuration.

    Args:
        cfg: The checked configuration.
        loaders: The loaders, for the length of an epoch and the number of identities.
        folder: The run folder.

    Raises:
        ConfigError: There is no such checkpoint, or a package is missing.
    """
    settings = cfg["Global"]
    flagged = ["visualdl"] if settings["use_visualdl"] else []
    check_installed(flagged, "Global.use_visualdl")
    check_installed(settings["loggers"], "Global.loggers")
    checkpoint = resolve(settings["checkpoints"]) if settings["checkpoints"] else None
    if checkpoint and not checkpoint.is_file():
        raise ConfigError(f"Global.checkpoints: there is no file {checkpoint}")
    steps = -(-len(loaders.train) // settings["update_freq"])
    ours, read = resolved(cfg, loaders.classes), contents(cfg)
    return Plan(
        folder=folder,
        schedule=Schedule(
            epochs=settings["epochs"],
            rates=build_schedules(cfg, steps),
            update_freq=settings["update_freq"],
            decay=lookup(cfg, "EMA.decay"),
            half=precision(cfg),
            skip_nonfinite=settings["on_nonfinite"] == "skip",
        ),
        keeping=Keeping(
            config=json.dumps(ours),
            contents=json.dumps(read),
            check_same=partial(check_kept, ours, read),
            checkpoint=checkpoint,
            **{key: settings[key] for key in ("save_interval", "save_steps", "keep_checkpoints")},
        ),
        evaluation=Watching(
            interval=settings["eval_interval"] if settings["eval_during_train"] else 0,
            first=settings["start_eval_epoch"],
            patience=settings["patience"],
        ),
        retention=Retention(**{k: v for k, v in (cfg.get("Retention") or {}).items() if k != "batch_norm"}),
        log_interval=settings["print_batch_step"],
        loggers=list(dict.fromkeys([*settings["loggers"], *flagged])),
        seed=settings["seed"],
        devices=device_count(settings["devices"]),
    )


def device_count(wanted: int | str) -> int:
    """Return how many processes Global.devices asks for; `auto` is one for each GPU."""
    return wanted if isinstance(wanted, int) else max(1, torch.cuda.device_count())


def pick_device(name: str) -> torch.device:
    """Return the device that Global.device names: a GPU unless it is cpu, or the CPU where there is no GPU.

    Where the file asks for gpu, a line says that there is none.
    """
    if name != "cpu" and torch.cuda.is_available():
        return torch.device(f"cuda:{torch.cuda.current_device()}")
    if name == "gpu":
        say_cpu()
    return torch.device("cpu")


@cache
def say_cpu() -> None:
    """Say once in a process, which may train many models, that it has no GPU."""
    print("Global.device is gpu, and this machine has none: running on the CPU")


def evaluation_loss(cfg: dict, loaders: Loaders) -> CombinedLoss | None:
    """Return Loss.Eval, or None where it lists nothing or needs logits of identities that the head has no class for."""
    loss, watched = build_loss(cfg, "Loss.Eval"), loaders.validation or loaders.test
    if watched is None or not len(loss.losses):
        return None
    identities = max(part.dataset.labels.max() for part in (watched.query, watched.gallery))
    if loss.needs_logits and identities >= loaders.classes:
        print("Loss.Eval has no value: it needs logits, and the evaluation identities are not training classes")
        return None
    return loss
