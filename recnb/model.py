"""RecModel: a cut backbone, a neck that makes the embedding, a head that exists while training.

The forward pass returns a dict, so that each loss takes what it needs and so that the same model serves training,
evaluation and export.
"""
from __future__ import annotations

from math import prod
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from recnb.backbones import create_backbone
from recnb.config import ConfigError, lookup, resolve
from recnb.datasets import training_images
from recnb.heads import HEADS
from recnb.necks import NECKS


class RecModel(nn.Module):
    """`model(x, y=None) -> dict` with `backbone`, `neck` (where there is one), `features` (B, D) and `logits`.

    `features` is the neck's output, or the backbone's. Logits are computed only when there is a head and labels `y` are
    given: retrieval never needs them.
    """

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:  # (B, 3, H, W), (B,)
        out = {"backbone": self.backbone(x)}
        if self.neck is not None:
            out["neck"] = self.neck(out["backbone"])
        features = out.get("neck", out["backbone"])
        out["features"] = features.flatten(1) if features.shape[2:].numel() == 1 else features  # (B, D)
        if self.head is not None and y is not None:
            out["logits"] = self.head(out["features"], y)  # (B, class_num)
        return out

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


def build_model(cfg: dict) -> RecModel:
    """The model of a configuration, its weights drawn from Global.seed or read from the files it names.

    Sizes that the file leaves out are derived: the neck's input from the cut backbone, the head's from the neck and
    from the training list. Raises ConfigError, naming both numbers and both places, where a given size disagrees.
    """
    if cfg["Arch"].get("name", "RecModel") != "RecModel":
        raise ConfigError(f"Arch.name: '{cfg['Arch']['name']}' is not supported, only 'RecModel'")
    classes = class_number(cfg) if cfg["Arch"].get("Head") else None
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(cfg["Global"]["seed"])  # torch.manual_seed would reach GPUs too
        backbone = build_backbone(cfg)
        neck, size = build_neck(cfg, backbone)
        head = None
        if classes:
            source = f"Arch.{'Neck' if neck else 'Backbone'} gives features of size"
            head = HEADS.build({**cfg["Arch"]["Head"], "class_num": classes}, "Arch.Head",
                               embedding_size=(size, source))
    model = RecModel(backbone, neck, head)
    if cfg["Global"]["pretrained_model"]:
        print(load_weights(model, cfg["Global"]["pretrained_model"]))
    return model


def class_number(cfg: dict) -> int:
    "How many classes the head tells apart: as the file says, otherwise the identities of the training list."
    given = lookup(cfg, "Arch.Head.class_num") or cfg["Global"]["class_num"]
    listed = len(training_images(cfg).names)  # raises where `given` is too small for the list
    if given and given > listed:
        print(f"class_num is {given}, the training list has {listed} identities: the others will never be seen")
    return given or listed


def build_backbone(cfg: dict) -> nn.Module:
    "The backbone of a configuration, cut where it says; raises ConfigError for what timm or the cut refuse."
    section = dict(cfg["Arch"]["Backbone"])
    if isinstance(section.get("pretrained"), str):
        section["pretrained"] = resolve(section["pretrained"])
    stop = lookup(cfg, "Arch.BackboneStopLayer.name")
    try:
        return create_backbone(**section, stop=stop, input_size=tuple(cfg["Global"]["image_shape"]))
    except (ValueError, TypeError) as error:
        raise ConfigError(f"Arch.{'BackboneStopLayer' if str(stop) in str(error) else 'Backbone'}: {error}") from error


def build_neck(cfg: dict, backbone: nn.Module) -> tuple[nn.Module | None, int]:
    "(the neck or None, the size of the features); the backbone's output is checked to suit it."
    shape, stop = backbone.out_shape, lookup(cfg, "Arch.BackboneStopLayer.name") or "its end"
    if not cfg["Arch"].get("Neck"):
        if len(shape) > 1 and prod(shape[1:]) > 1:
            raise ConfigError(f"Arch.Neck: is missing, and the backbone cut at {stop} gives maps {shape}, no vector; "
                              "add a neck or cut at 'flatten'")
        return None, prod(shape)
    source = f"the backbone cut at {stop} gives"
    neck = NECKS.build(cfg["Arch"]["Neck"], "Arch.Neck", in_channels=(backbone.out_channels, source),
                       num_features=(prod(shape), source), embedding_size=(prod(shape), source),
                       prefix_tokens=(backbone.prefix_tokens, source))
    try:
        with torch.no_grad():
            features = neck.eval()(torch.zeros(1, *shape))
    except RuntimeError as error:
        raise ConfigError(f"Arch.Neck: cannot take the {shape} that {source}: {error}") from error
    neck.train()
    return neck, features.shape[1]


def load_weights(model: nn.Module, path: str | Path) -> str:
    """A sentence that says what was loaded; tensors that are missing or of another shape keep their values.

    Reads .safetensors and weights-only .pth / .pt files (also checkpoints of a run). Raises ConfigError where the file
    cannot be read or where nothing in it fits.
    """
    path = resolve(path)
    try:
        state = load_file(path) if path.suffix == ".safetensors" else torch.load(path, "cpu", weights_only=True)
    except UnpicklingError as error:
        raise ConfigError(f"Global.pretrained_model: {path} holds other things than tensors, and is not read since "
                          "that could run code; save a state_dict, best as .safetensors") from error
    except Exception as error:  # a broken file can fail in any way
        raise ConfigError(f"Global.pretrained_model: {path} cannot be read as weights: {error}") from error
    state, own = state.get("model", state) if isinstance(state, dict) else {}, model.state_dict()
    state = {k: v for k, v in state.items() if isinstance(v, Tensor)} if isinstance(state, dict) else {}
    fitting = {k: v for k, v in state.items() if k in own and own[k].shape == v.shape}
    if not fitting:
        first = [next((f"{k} {tuple(v.shape)}" for k, v in tensors.items()), "no tensor") for tensors in (state, own)]
        raise ConfigError(f"Global.pretrained_model: nothing in {path} fits this model (the file begins with "
                          f"{first[0]}, the model with {first[1]})")
    model.load_state_dict(fitting, strict=False)
    others = sorted(set(own) - set(fitting))
    left = f"; left as they were: {', '.join(others[:5])}{' ...' if len(others) > 5 else ''}" if others else ""
    return f"{path}: {len(fitting)} of the model's {len(own)} tensors loaded{left}"
