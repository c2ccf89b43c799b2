"""Build the model that the section Arch describes."""

from functools import partial
from math import prod

import numpy as np
import torch
from torch import nn

from recnb.data.images import DataError
from recnb.distributed.gradients import share_batches
from recnb.distributed.processes import ranks
from recnb.models.backbones import create_backbone, share_on_gpus
from recnb.models.chunks import recompute_blocks
from recnb.models.cutting import Cut
from recnb.models.heads import HEADS
from recnb.models.necks import NECKS
from recnb.models.recmodel import DistillationModel, RecModel
from recnb.models.weights import check_fits, load_weights, local
from recnb.recipe.data import training_images
from recnb.recipe.schema import architectures, class_num, lookup
from recnb.registry import ConfigError, Registry, check_known


def build_model(cfg: dict, classes: int | None = None) -> RecModel | DistillationModel:
    """Return the model of a configuration, its weights drawn from Global.seed or read from the files it names.

    Sizes that the file leaves out follow from the other parts: the neck's input from the cut backbone, the head's from
    the neck.

    Args:
        cfg: The checked configuration.
        classes: The number of training identities. They are counted in the training list where neither the file nor
            the caller gives it.

    Raises:
        ConfigError: A size of the file disagrees with another; the message names both.
    """
    sections = architectures(cfg)
    classes = count_classes(cfg, classes) if any(section.get("Head") for _, section in sections) else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg["Global"]["seed"])  # torch.manual_seed would reach GPUs too
        models = {where: build_recmodel(cfg, section, where, classes) for where, section in sections}
    model = models.get("Arch") or build_distillation(cfg, {where.split(".")[-1]: m for where, m in models.items()})
    if given := cfg["Global"]["pretrained_model"]:
        print(load_weights(model, given, strict=cfg["Global"]["pretrained_strict"]))
    return model


def build_recmodel(cfg: dict, section: dict, where: str, classes: int | None) -> RecModel:
    """Return the model of one section.

    Args:
        cfg: The checked configuration.
        section: The section.
        where: Its place in the file.
        classes: The number of training identities; None where there is no head.

    Raises:
        ConfigError: A part cannot be built, or does not fit the others.
    """
    backbone = build_backbone(cfg, section, where)
    neck, size = build_neck(section, where, backbone)
    head, given = None, section.get("head_feature_from", "neck")
    if section.get("Head"):
        from_backbone = given == "backbone" or neck is None
        source = f"{where}.{'Backbone' if from_backbone else 'Neck'} gives features of size"
        known: dict[str, tuple] = {"embedding_size": (prod(backbone.out_shape) if from_backbone else size, source)}
        if isinstance(section["Head"].get("margin"), dict):  # by how many images each class has
            known["class_counts"] = (class_counts(cfg), "")
        head = fitting(HEADS, {**section["Head"], "class_num": classes}, f"{where}.Head", **known)
    if cfg["Global"]["grad_checkpointing"]:
        try:
            recompute_blocks(backbone)
        except ValueError as error:
            raise ConfigError(
                f"Global.grad_checkpointing: {where}.Backbone {section['Backbone']['name']} {error}; set "
                "it False, and save memory with Global.grad_cache instead"
            ) from None
    model = RecModel(backbone, neck, head)
    model.sizes = {"backbone": prod(backbone.out_shape), "features": size}
    model.head_feature_from, model.grad_cache = given, cfg["Global"]["grad_cache"]
    model.retrieval_feature_from = cfg["Global"]["retrieval_feature_from"] if neck else "features"
    model.precision = precision(cfg)
    model.half_evaluation = model.precision is not None and (cfg["AMP"]["use_fp16_test"] or cfg["AMP"]["level"] == "O2")
    if ranks()[1] > 1 and (section.get("use_sync_bn") or cfg["Arch"].get("use_sync_bn")):
        on_gpu = cfg["Global"]["device"] != "cpu" and torch.cuda.is_available()
        (share_on_gpus if on_gpu else share_batches)(model)
    model.rests = lookup(cfg, "Retention.batch_norm") == "frozen"
    try:
        model.freeze(section.get("freeze") or ())
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None
    return model


def fitting(registry: Registry, section: dict, where: str, **known) -> nn.Module:
    """Return a part, built on the meta device first, to see whether there is memory for it.

    Args:
        registry: The registry of the part.
        section: The part's section of the file.
        where: The section's place.
        known: As `Registry.build` takes it.

    Raises:
        ConfigError: The section cannot be meant, or needs more memory than there is.
    """
    build = partial(registry.build, section, where, **known)
    check_fits(build, where)
    return build()


def precision(cfg: dict) -> torch.dtype | None:
    """Return the type of autocast, None without it: AMP.dtype, else bfloat16, or float16 on a GPU without bfloat16."""
    amp, on_gpu = cfg.get("AMP"), cfg["Global"]["device"] != "cpu" and torch.cuda.is_available()
    if amp is None or not amp["use_amp"]:
        return None
    fallback = "float16" if on_gpu and not torch.cuda.is_bf16_supported() else "bfloat16"
    return getattr(torch, amp["dtype"] or fallback)


def build_distillation(cfg: dict, models: dict[str, RecModel]) -> DistillationModel:
    """Return models that are trained together, frozen or with weights as Arch says; one of them is used afterwards."""
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
    """Return how many classes the head has: as the file says, as counted, or as the training list has.

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
    """Return the backbone of a model's section, cut where it says.

    Args:
        cfg: The checked configuration.
        section: The model's section.
        where: Its place in the file.

    Raises:
        ConfigError: timm refuses the arguments, or the backbone cannot be cut there.
    """
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
    """Return the neck, None where there is none, and the size of the features.

    Args:
        section: The model's section.
        where: Its place in the file.
        backbone: The backbone, cut.

    Raises:
        ConfigError: The neck cannot take what the backbone gives, or there is none and no vector.
    """
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
