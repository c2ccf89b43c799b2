"""Arch, read: its sections become a model."""

from __future__ import annotations

from contextlib import suppress
from math import prod

import numpy as np
import torch
from torch import nn

from recnb.data.images import DataError
from recnb.distributed.gradients import share_batches
from recnb.distributed.processes import ranks
from recnb.models.backbones import create_backbone, share_on_gpus
from recnb.models.chunks import check_room, recompute_blocks
from recnb.models.cutting import Cut
from recnb.models.heads import HEADS
from recnb.models.necks import NECKS
from recnb.models.recmodel import DistillationModel, RecModel
from recnb.models.weights import load_weights, local
from recnb.recipe.data import training_images
from recnb.recipe.schema import architectures, class_num, lookup
from recnb.registry import ConfigError, Registry, check_known


def build_model(cfg: dict, classes: int | None = None) -> RecModel | DistillationModel:
    """The model of a configuration, its weights drawn from Global.seed or read from the files it names.

    Sizes that the file leaves out are derived: the neck's input from the cut backbone, the head's from the neck and
    from `classes`, the number of training identities. These are counted in the training list only where neither the
    file nor the caller says how many there are. Raises ConfigError, naming both numbers and both places, where a given
    size disagrees.
    """
    sections = architectures(cfg)
    classes = count_classes(cfg, classes) if any(section.get("Head") for _, section in sections) else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg["Global"]["seed"])  # torch.manual_seed would reach GPUs too
        models = {where: build_recmodel(cfg, section, where, classes) for where, section in sections}
    model = models.get("Arch") or build_distillation(cfg, {where.split(".")[-1]: m for where, m in models.items()})
    if cfg["Global"]["pretrained_model"]:
        given = cfg["Global"]["pretrained_model"]
        print(load_weights(model, given, strict=cfg["Global"]["pretrained_strict"]))
    return model


def build_recmodel(cfg: dict, section: dict, where: str, classes: int | None) -> RecModel:
    """The model of one section; `classes` is the number of training identities."""
    backbone = build_backbone(cfg, section, where)
    neck, size = build_neck(section, where, backbone)
    head, given = None, section.get("head_feature_from", "neck")
    if section.get("Head"):
        behind = given == "backbone" or neck is None
        source = f"{where}.{'Backbone' if behind else 'Neck'} gives features of size"
        known: dict[str, tuple] = {"embedding_size": (prod(backbone.out_shape) if behind else size, source)}
        if isinstance(section["Head"].get("margin"), dict):  # by how many images each class has
            known["class_counts"] = (class_counts(cfg), "")
        head = fitting(HEADS, {**section["Head"], "class_num": classes}, f"{where}.Head", **known)
    if cfg["Global"]["grad_checkpointing"]:
        try:
            recompute_blocks(backbone)
        except ValueError as error:
            raise ConfigError(
                f"Global.grad_checkpointing: {where}.Backbone {section['Backbone']['name']} {error}; set "
                "it False, and let Global.grad_cache keep less in memory instead"
            ) from None
    model = RecModel(backbone, neck, head)
    model.sizes = {"backbone": prod(backbone.out_shape), "features": size}
    model.head_feature_from, model.grad_cache = given, cfg["Global"]["grad_cache"]
    model.retrieval_feature_from = cfg["Global"]["retrieval_feature_from"] if neck else "features"
    amp = cfg.get("AMP")
    if amp is not None and amp["use_amp"]:
        model.precision = precision(amp, cfg["Global"]["device"])
        model.half_evaluation = amp["use_fp16_test"] or amp["level"] == "O2"
    if ranks()[1] > 1 and (section.get("use_sync_bn") or cfg["Arch"].get("use_sync_bn")):
        on_gpu = cfg["Global"]["device"] != "cpu" and torch.cuda.is_available()
        (share_on_gpus if on_gpu else share_batches)(model)
    model.rests = (cfg.get("Retention") or {}).get("batch_norm") == "frozen"
    try:
        model.freeze(section.get("freeze") or ())
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None
    return model


def fitting(registry: Registry, section: dict, where: str, **known) -> nn.Module:
    """Return a part, built on the meta device first, where it takes no memory: what no memory can hold is told.

    Args:
        registry: Has the part.
        section: The part's section of the file.
        where: The section's place.
        known: As `Registry.build` takes it.

    Raises:
        ConfigError: The section cannot be meant, or needs more memory than there is.
    """
    part = nn.Module()  # stays where a part looks at its numbers, of which there are none yet, while it is built
    with suppress(ConfigError, NotImplementedError), torch.device("meta"):
        part = registry.build(section, where, **known)
    check_room(part, 1, torch.device("cpu"), where)
    return registry.build(section, where, **known)


def precision(amp: dict, device: str) -> torch.dtype:
    """The type of autocast: as AMP.dtype says, otherwise bfloat16 where it is fast or the only one, else float16."""
    on_gpu = device != "cpu" and torch.cuda.is_available()
    fallback = "float16" if on_gpu and not torch.cuda.is_bf16_supported() else "bfloat16"
    return getattr(torch, amp["dtype"] or fallback)


def build_distillation(cfg: dict, models: dict[str, RecModel]) -> DistillationModel:
    """The models trained together, some frozen or with weights of their own; `infer_model_name` or the last is used."""
    section, names = cfg["Arch"], list(models)
    chosen = section.get("infer_model_name") or names[-1]
    check_known([chosen], names, "Arch.infer_model_name", "model")
    for key in ("freeze_params_list", "pretrained_list"):
        given = section.get(key) or [None] * len(names)
        if not isinstance(given, list) or len(given) != len(names):
            raise ConfigError(f"Arch.{key}: must have one entry for each of the models {', '.join(names)}")
        for name, value in zip(names, given, strict=True):
            if value and key == "pretrained_list":
                print(load_weights(models[name], value, f"Arch.{key}", cfg["Global"]["pretrained_strict"]))
            elif value:
                models[name].freeze([part for part, _ in models[name].named_children()])
    return DistillationModel(models, chosen)


def count_classes(cfg: dict, counted: int | None) -> int:
    """Return how many classes the head tells apart: as the file says, as counted, or as the training list has.

    Raise ConfigError where the file gives fewer than were counted.
    """
    where, given = class_num(cfg)
    if given and counted and given < counted:
        raise ConfigError(
            f"{where} is {given}, but there are {counted} training identities; correct {where} or leave it out"
        )
    return given or counted or training_images(cfg).classes


def class_counts(cfg: dict) -> list[int] | None:
    """Return the number of training images of each class, None where the training list is not on this machine."""
    try:
        return np.bincount(training_images(cfg).labels).tolist()
    except DataError:
        return None


def build_backbone(cfg: dict, section: dict, where: str) -> Cut:
    """The backbone of a model's section, cut where it says; raises ConfigError for what timm or the cut refuse."""
    given, stop = dict(section["Backbone"]), section.get("BackboneStopLayer") or {}
    if isinstance(given.get("pretrained"), str):
        given["pretrained"] = local(given["pretrained"])
    name, size = stop.get("name"), stop.get("output_dim")
    try:
        backbone = create_backbone(**given, stop=name, input_size=tuple(cfg["Global"]["image_shape"]))
    except (ValueError, TypeError) as error:
        part = "BackboneStopLayer" if str(name) in str(error) else "Backbone"
        raise ConfigError(f"{where}.{part}: {error}") from error
    if size and size != backbone.out_channels:
        raise ConfigError(
            f"{where}.BackboneStopLayer.output_dim is {size}, but {given['name']} cut at {name} gives "
            f"{backbone.out_channels} channels"
        )
    return backbone


def build_neck(section: dict, where: str, backbone: Cut) -> tuple[nn.Module | None, int]:
    """(the neck or None, the size of the features); the backbone's output is checked to suit it."""
    shape, stop = backbone.out_shape, lookup(section, "BackboneStopLayer.name") or "its end"
    if not section.get("Neck"):
        if len(shape) > 1 and prod(shape[1:]) > 1:
            raise ConfigError(
                f"{where}.Neck: is missing, and the backbone cut at {stop} gives maps {shape}, no "
                "vector; add a neck or cut at 'flatten'"
            )
        return None, prod(shape)
    source = f"the backbone cut at {stop} gives"
    neck = fitting(
        NECKS,
        section["Neck"],
        f"{where}.Neck",
        in_channels=(backbone.out_channels, source),
        num_features=(prod(shape), source),
        embedding_size=(prod(shape), source),
        prefix_tokens=(backbone.prefix_tokens, source),
    )
    try:
        with torch.no_grad():
            features = neck.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ConfigError(f"{where}.Neck: cannot take the {shape} that {source}: {error}") from error
    neck.train()
    return neck, features.shape[1]
