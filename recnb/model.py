"""RecModel: a cut backbone, a neck that makes the embedding, a head that exists while training.

The forward pass returns a dict, so that each loss takes what it needs and so that the same model serves training,
evaluation and export.
"""
from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Callable, Sequence
from fnmatch import fnmatch
from functools import partial
from math import prod
from pathlib import Path
from pickle import UnpicklingError
from posixpath import commonpath

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recnb.backbones import create_backbone, layer_depths, share_on_gpus
from recnb.caching import computed_again, in_chunks
from recnb.config import ConfigError, architectures, class_num, lookup, resolve, suggest
from recnb.cutting import Cut
from recnb.datasets import training_images
from recnb.distillation import DistillationModel
from recnb.distributed import share_batches
from recnb.heads import HEADS
from recnb.necks import NECKS
from recnb.sharding import ranks


class RecModel(nn.Module):
    """`model(x, y=None) -> dict` with `backbone`, `neck` (where there is one), `features` (B, D) and `logits`.

    `features` is the neck's output, or the backbone's; in evaluation, what `retrieval_feature_from` names. Logits, from
    the features or from `head_feature_from`, are computed only when there is a head and labels `y` are given: retrieval
    never needs them. `precision` (float16 or bfloat16) is that of training under autocast, with `half_evaluation` of
    evaluation too. `frozen` names parts whose weights and batch statistics stay as they are.
    """

    retrieval_feature_from, head_feature_from = "features", "neck"
    precision: torch.dtype | None = None
    sizes: dict[str, int] | None = None  # of `backbone` (flat) and `features`, where they are known
    half_evaluation = False
    grad_cache: int | None = None  # images computed at a time while training
    frozen: tuple[str, ...] = ()

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:  # (B, 3, H, W), (B,)
        half = self.precision is not None and (self.training or self.half_evaluation)
        with torch.autocast(x.device.type, self.precision) if half else contextlib.nullcontext():
            return self.parts(x, y)

    def parts(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        "What `forward` gives, in the precision that it is called in."
        out = in_chunks(self.embed, x, self.grad_cache if self.training else None, self)
        if self.head is not None and y is not None:
            out["logits"] = self.head(self.head_input(out), y)  # (B, class_num)
        if not self.training and self.retrieval_feature_from != "features":
            out["features"] = vectors(out[self.retrieval_feature_from])
        return out

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        "What needs no labels: `backbone`, `neck` (where there is one) and `features` (B, D)."
        out = {"backbone": self.backbone(x)}
        if self.neck is not None:
            out["neck"] = self.neck(out["backbone"])
        return out | {"features": vectors(out.get("neck", out["backbone"]))}

    def head_input(self, out: dict[str, Tensor]) -> Tensor:
        """Return what the head reads of the model's outputs, (B, D), in training, evaluation and export alike."""
        behind = self.head_feature_from == "backbone" or self.neck is None
        return vectors(out["backbone" if behind else "neck"])

    def train(self, mode: bool = True) -> RecModel:
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        return self

    def freeze(self, names: Sequence[str]) -> None:
        "None; keeps these parts (patterns of module names such as 'backbone.model.layer1*') as they are from now on."
        known = [name for name, _ in self.named_modules()]
        for pattern in names:
            found = [name for name in known if name and fnmatch(name, pattern)]
            if not found:
                raise ValueError(f"freeze: no part is called '{pattern}'; {suggest(pattern, known)}")
            self.frozen = (*self.frozen, *found)
        for name in self.frozen:
            self.get_submodule(name).eval().requires_grad_(False)

    def describe(self) -> str:
        "A line for each part: what it is, what it gives, how many parameters it has."
        end = getattr(self.backbone, "stop", None) or "its end"
        shape = getattr(self.backbone, "out_shape", None)  # a backbone of one's own need not know it
        parts = {"backbone": f"cut at {end}, gives {shape}" if shape else "not cut",
                 "neck": "makes the embedding", "head": "for training only"}
        rows = [(part, type(getattr(self.backbone, "model", module) if part == "backbone" else module).__name__, text,
                 sum(p.numel() for p in module.parameters()))
                for part, text in parts.items() if (module := getattr(self, part)) is not None]
        return "\n".join(f"{part:<9} {kind:<14} {text:<36} {count:>12,} parameters" for part, kind, text, count in rows)


def vectors(x: Tensor) -> Tensor:
    "(B, D) from maps of one pixel (B, D, 1, 1); anything else as it is."
    return x.flatten(1) if x.shape[2:].numel() == 1 else x


def build_model(cfg: dict, classes: int | None = None) -> RecModel | DistillationModel:
    """The model of a configuration, its weights drawn from Global.seed or read from the files it names.

    Sizes that the file leaves out are derived: the neck's input from the cut backbone, the head's from the neck and
    from `classes`, the number of training identities. These are counted in the training list only where neither the
    file nor the caller says how many there are. Raises ConfigError, naming both numbers and both places, where a given
    size disagrees.
    """
    sections = architectures(cfg)
    classes = class_number(cfg, classes) if any(section.get("Head") for _, section in sections) else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg["Global"]["seed"])  # torch.manual_seed would reach GPUs too
        models = {where: build_recmodel(cfg, section, where, classes) for where, section in sections}
    model = models.get("Arch") or build_distillation(cfg, {where.split(".")[-1]: m for where, m in models.items()})
    if cfg["Global"]["pretrained_model"]:
        print(load_weights(model, cfg["Global"]["pretrained_model"]))
    return model


def build_recmodel(cfg: dict, section: dict, where: str, classes: int | None) -> RecModel:
    "The model of one section; `classes` is the number of training identities."
    backbone = build_backbone(cfg, section, where)
    neck, size = build_neck(section, where, backbone)
    head, given = None, section.get("head_feature_from", "neck")
    if section.get("Head"):
        behind = given == "backbone" or neck is None
        source = f"{where}.{'Backbone' if behind else 'Neck'} gives features of size"
        head = HEADS.build({**section["Head"], "class_num": classes}, f"{where}.Head",
                           embedding_size=(prod(backbone.out_shape) if behind else size, source))
    if cfg["Global"]["grad_checkpointing"]:
        try:
            recompute_blocks(backbone)
        except ValueError as error:
            raise ConfigError(f"Global.grad_checkpointing: {where}.Backbone {section['Backbone']['name']} {error}; set "
                              "it False, and let Global.grad_cache keep less in memory instead") from None
    model = RecModel(backbone, neck, head)
    model.sizes = {"backbone": prod(backbone.out_shape), "features": size}
    model.head_feature_from, model.grad_cache = given, cfg["Global"]["grad_cache"]
    model.retrieval_feature_from = cfg["Global"]["retrieval_feature_from"] if neck else "features"
    amp = cfg.get("AMP")
    if amp is not None and amp.get("use_amp", True):
        model.precision = precision(amp, cfg["Global"]["device"])
        model.half_evaluation = amp.get("use_fp16_test", False) or amp.get("level") == "O2"
    if ranks()[1] > 1 and (section.get("use_sync_bn") or cfg["Arch"].get("use_sync_bn")):
        on_gpu = cfg["Global"]["device"] == "gpu" and torch.cuda.is_available()
        (share_on_gpus if on_gpu else share_batches)(model)
    try:
        model.freeze(section.get("freeze") or ())
    except ValueError as error:
        raise ConfigError(f"{where}.{error}") from None
    return model


def precision(amp: dict, device: str) -> torch.dtype:
    "What autocast computes in: as AMP.dtype says, otherwise bfloat16 where it is fast or the only one, else float16."
    on_gpu = device == "gpu" and torch.cuda.is_available()
    fallback = "float16" if on_gpu and not torch.cuda.is_bf16_supported() else "bfloat16"
    return getattr(torch, amp.get("dtype") or fallback)


def build_distillation(cfg: dict, models: dict[str, RecModel]) -> DistillationModel:
    "The models trained together, some frozen or with weights of their own; `infer_model_name` or the last is used."
    section, names = cfg["Arch"], list(models)
    chosen = section.get("infer_model_name") or names[-1]
    if chosen not in models:
        raise ConfigError(f"Arch.infer_model_name: there is no model '{chosen}'; {suggest(chosen, names)}")
    for key in ("freeze_params_list", "pretrained_list"):
        given = section.get(key) or [None] * len(names)
        if not isinstance(given, list) or len(given) != len(names):
            raise ConfigError(f"Arch.{key}: must have one entry for each of the models {', '.join(names)}")
        for name, value in zip(names, given, strict=True):
            if value and key == "pretrained_list":
                print(load_weights(models[name], value, f"Arch.{key}"))
            elif value:
                models[name].freeze([part for part, _ in models[name].named_children()])
    return DistillationModel(models, chosen)


def class_number(cfg: dict, counted: int | None) -> int:
    """Return how many classes the head tells apart: as the file says, as counted, or as the training list has.

    Raise ConfigError where the file gives fewer than were counted.
    """
    where, given = class_num(cfg)
    if given and counted and given < counted:
        raise ConfigError(f"{where} is {given}, but there are {counted} training identities; correct {where} or leave "
                          "it out")
    return given or counted or len(training_images(cfg).names)


def build_backbone(cfg: dict, section: dict, where: str) -> nn.Module:
    "The backbone of a model's section, cut where it says; raises ConfigError for what timm or the cut refuse."
    given, stop = dict(section["Backbone"]), section.get("BackboneStopLayer") or {}
    if isinstance(given.get("pretrained"), str):
        given["pretrained"] = resolve(given["pretrained"])
    name, size = stop.get("name"), stop.get("output_dim")
    try:
        backbone = create_backbone(**given, stop=name, input_size=tuple(cfg["Global"]["image_shape"]))
    except (ValueError, TypeError) as error:
        part = "BackboneStopLayer" if str(name) in str(error) else "Backbone"
        raise ConfigError(f"{where}.{part}: {error}") from error
    if size and size != backbone.out_channels:
        raise ConfigError(f"{where}.BackboneStopLayer.output_dim is {size}, but {given['name']} cut at {name} gives "
                          f"{backbone.out_channels} channels")
    return backbone


def recompute_blocks(backbone: Cut) -> None:
    """None; each block of a backbone keeps nothing but its input while it trains, and runs again in the backward pass.

    Gradient checkpointing (https://arxiv.org/abs/1604.06174) of the blocks by which timm counts a model's depth, with
    the same random numbers and batch statistics that count once. `set_grad_checkpointing` of timm's models would count
    them twice, and calls the blocks of stages that a cut has taken off; here a block with the cut inside is left as it
    is. Raises ValueError for a backbone that is not made of blocks.
    """
    layers: dict[int, list] = defaultdict(list)
    for name, depth in layer_depths(backbone).items() if hasattr(backbone.model, "group_matcher") else ():
        layers[depth].append(name.rpartition(".")[0].replace(".", "/"))
    names = {commonpath(parts).replace("/", ".") for parts in layers.values()} - {"model"}
    blocks = {name: part for name in names if [*(part := backbone.get_submodule(name)).children()]}
    if len(blocks) < 2:
        raise ValueError("is not made of blocks that could be computed again")
    for name, block in blocks.items():
        if not f"model.{backbone.layer}".startswith(f"{name}."):
            block.forward = partial(computed_when_needed, block, block.forward)


def computed_when_needed(block: nn.Module, forward: Callable, x: Tensor, *args, **kwargs):  # (B, ...) -> (B, ...)
    "What a block's forward gives, computed again for its gradients while the block trains."
    if not (block.training and torch.is_grad_enabled()):
        return forward(x, *args, **kwargs)
    given = x if isinstance(x, Tensor) else [*x]  # the list of maps that a DenseNet's layer gets grows until then
    return computed_again(lambda x: forward(x, *args, **kwargs), given, block)


def build_neck(section: dict, where: str, backbone: nn.Module) -> tuple[nn.Module | None, int]:
    "(the neck or None, the size of the features); the backbone's output is checked to suit it."
    shape, stop = backbone.out_shape, lookup(section, "BackboneStopLayer.name") or "its end"
    if not section.get("Neck"):
        if len(shape) > 1 and prod(shape[1:]) > 1:
            raise ConfigError(f"{where}.Neck: is missing, and the backbone cut at {stop} gives maps {shape}, no "
                              "vector; add a neck or cut at 'flatten'")
        return None, prod(shape)
    source = f"the backbone cut at {stop} gives"
    neck = NECKS.build(section["Neck"], f"{where}.Neck", in_channels=(backbone.out_channels, source),
                       num_features=(prod(shape), source), embedding_size=(prod(shape), source),
                       prefix_tokens=(backbone.prefix_tokens, source))
    try:
        with torch.no_grad():
            features = neck.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ConfigError(f"{where}.Neck: cannot take the {shape} that {source}: {error}") from error
    neck.train()
    return neck, features.shape[1]


def load_weights(model: nn.Module, path: str | Path, where: str = "Global.pretrained_model") -> str:
    """A sentence that says what was loaded; tensors that are missing or of another shape keep their values.

    Reads .safetensors and weights-only .pth / .pt files (also checkpoints of a run). Raises ConfigError where the file
    cannot be read or where nothing in it fits.
    """
    path = resolve(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(f"{where}: {path} holds other things than tensors, and is not read since "
                          "that could run code; save a state_dict, best as .safetensors") from error
    except Exception as error:  # a broken file can fail in any way
        raise ConfigError(f"{where}: {path} cannot be read as weights: {error}") from error
    state, own = state.get("model", state) if isinstance(state, dict) else {}, model.state_dict()
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        first = [next((f"{k} {tuple(v.shape)}" for k, v in tensors.items()), "no tensor") for tensors in (state, own)]
        raise ConfigError(f"{where}: nothing in {path} fits this model (the file begins with "
                          f"{first[0]}, the model with {first[1]})")
    model.load_state_dict(fitting, strict=False)
    others = sorted(set(own) - set(fitting))
    left = f"; left as they were: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    return f"{path}: {len(fitting)} of the model's {len(own)} tensors loaded{left}"
