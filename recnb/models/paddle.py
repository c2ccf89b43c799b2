"""Weights of the original: `.pdparams` files, read without running anything, under the names and shapes they have here.

A file is a pickle. Of all that a pickle can ask for it gets descriptions of arrays, tuples and ordered dicts; anything
else ends the reading. Linear weights are (in, out) there and (out, in) in torch, and batch statistics are called
otherwise; blocks are matched in the order of their numbers, and the layers in them by the tables below.
"""

import pickle
import re
from collections import OrderedDict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from recnb.models.cutting import Cut, classifiers, first_line, kind
from recnb.registry import ConfigError

NUMBERS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "b1")
BOTTLENECK = {**{f"conv{i}.conv": f"conv{i + 1}" for i in range(3)}, **{f"conv{i}.bn": f"bn{i + 1}" for i in range(3)}}
MOBILE = {
    **{f"{name}.conv": "conv_stem" for name in ("conv", "conv1")},
    **{f"{name}.conv": "conv_dw" for name in ("dw_conv", "depthwise_conv", "bottleneck_conv")},
    **{f"{name}.conv": "conv_pw" for name in ("pw_conv", "pointwise_conv", "expand_conv")},
    **{f"{name}.bn": "bn1" for name in ("conv", "conv1", "dw_conv", "depthwise_conv", "expand_conv")},
    **{f"{name}.bn": "bn2" for name in ("pw_conv", "pointwise_conv", "bottleneck_conv")},
    "linear_conv.conv": "conv_pwl",
    "linear_conv.bn": "bn3",
    "last_second_conv.bn": "last_second_conv.bn1",
    **{f"{name}.conv1": "se.conv_reduce" for name in ("se", "mid_se")},
    **{f"{name}.conv2": "se.conv_expand" for name in ("se", "mid_se")},
    "last_conv": "conv_head",
    "fc": "classifier",
}
# The layers of the original's networks and what they are here, by what a network is called here.
FAMILIES = {
    r"resnet\d+$": {
        **BOTTLENECK,
        "stem.0.conv": "conv1",
        "stem.0.bn": "bn1",
        "short.conv": "downsample.0",
        "short.bn": "downsample.1",
    },
    r"resnet\d+d$": {
        **BOTTLENECK,
        "stem.0.conv": "conv1.0",
        "stem.0.bn": "conv1.1",
        "stem.1.conv": "conv1.3",
        "stem.1.bn": "conv1.4",
        "stem.2.conv": "conv1.6",
        "stem.2.bn": "bn1",
        "short.conv": "downsample.1",
        "short.bn": "downsample.2",
    },
    r"PPLCNetV2_": {
        "se.conv1": "se.fc1",
        "se.conv2": "se.fc2",
        "pw_conv_1": "pw_conv.0",
        "pw_conv_2": "pw_conv.1",
        "dw_conv_list": "dw_conv.0.dw_conv_list",
    },
    r"PPLCNet_|lcnet_|mobilenetv1_|MobileNetV3_": MOBILE,
    r"swin_": {"head": "head.fc", **{f"layers.{i}.downsample": f"layers.{i + 1}.downsample" for i in range(3)}},
    r"vit_": {"ln_pre": "norm_pre", "head.fc_head": "head"},
    r"alexnet$": {"_fc6": "classifier.1", "_fc7": "classifier.4", "_fc8": "classifier.6"},
    r"vgg\d+$": {"fc1": "pre_logits.fc1", "fc2": "pre_logits.fc2", "fc3": "head.fc"},
}
GEARS = {
    "neck.feat_bn": "neck.bn",
    "neck.fc1": "neck.layers.0",
    "neck.fc2": "neck.layers.2",
    "head.kernel": "head.weight",
    "head.batch_mean": "head.mean",
    "head.batch_std": "head.std",
}
STATISTICS = {"_mean": "running_mean", "_variance": "running_var"}
# Layers before the last whose input a dropout thins out, and that dropout.
THINNED = {
    "classifier.1.weight": "classifier.0",
    "classifier.4.weight": "classifier.3",
    "pre_logits.fc2.weight": "pre_logits.drop",
}
# Convolutions that have a bias here and none in the original.
WITHOUT_BIAS = re.compile(r"(vgg\d+ features\.\d+|\S+ conv_head)\.bias")
# What follows from other tensors of the file, and has no place here.
DERIVED = re.compile(r"(^|\.)(relative_position_(index|bias)|attn_mask|dw_conv\.(weight|bias))$|^head\.t$")
THEIR_BLOCK, OWN_BLOCK = (
    re.compile(r"(blocks\d*\.\d+|last_second_conv|conv_block_\d\.conv\d|_conv\d(\._conv)?)\."),
    re.compile(r"((layer\d|blocks\.\d|features)\.\d+)\."),
)


class _Type:
    """Stands for numpy's dtype: its code and byte order, a text."""

    def __init__(self, code: str, *flags: bool):
        self.code = code

    def __setstate__(self, state: tuple) -> None:
        self.code = state[1] + self.code


class _Array:
    """Stands for numpy's array, whose own constructor never sees a file's arguments."""

    def __init__(self, *ignored: object):
        self.value = np.empty(0)

    def __setstate__(self, state: tuple) -> None:
        _, shape, kind_, by_columns, content = state
        if kind_.code.lstrip("<>|=") not in NUMBERS:
            raise pickle.UnpicklingError(f"an array of '{kind_.code}' is not one of numbers")
        content = content.encode("latin1") if isinstance(content, str) else content
        flat = np.frombuffer(content, kind_.code).astype(np.dtype(kind_.code).newbyteorder("="))
        self.value = flat.reshape(shape, order="F" if by_columns else "C")


class _Reader(pickle.Unpickler):
    """A pickle's reader that gives what describes arrays, and nothing that could do anything else."""

    def find_class(self, module: str, name: str) -> Any:
        known = {
            "numpy.ndarray": _Array,
            "numpy.dtype": _Type,
            "collections.OrderedDict": OrderedDict,
            **{f"{place}.tuple": tuple for place in ("builtins", "__builtin__")},
            **{f"numpy.{place}.multiarray._reconstruct": _Array for place in ("core", "_core")},
            # How an old protocol writes bytes; made anew each time, as a pickle may write to what it is given.
            "_codecs.encode": lambda text, encoding: text.encode("latin1"),
        }
        if f"{module}.{name}" not in known:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}, which is neither an array nor a container")
        return known[f"{module}.{name}"]


def read_pdparams(path: str | Path) -> dict[str, np.ndarray]:
    """Return the arrays of a file that paddle.save has written, by the original's names; nothing in it is run.

    Raises:
        ConfigError: The file cannot be read, asks for something else than arrays, or holds something else.
    """
    try:
        with Path(path).open("rb") as file:
            content = _Reader(file, encoding="latin1").load()
        for wrapper in ("state_dict", "model"):
            content = content.get(wrapper, content) if isinstance(content, dict) else content
        if not isinstance(content, dict) or not content:
            raise ValueError(f"it holds a {type(content).__name__}, no arrays by their names")
        content.pop("StructuredToParameterName@@", None)  # what Paddle calls the arrays inside
        # A tensor that does not stand at the top of what was saved is the pair of its inner name and the array.
        arrays = {name: array[-1] if isinstance(array, tuple) else array for name, array in content.items()}
        for name in (name for name, array in arrays.items() if not isinstance(array, _Array)):
            raise ValueError(f"'{name}' is a {type(arrays[name]).__name__}, no array")
        return {str(name): array.value for name, array in arrays.items()}
    except Exception as error:  # each kind of broken file fails in its own way
        raise ConfigError(f"'{path}' cannot be read as weights of Paddle: {first_line(error)}") from error


def converted(arrays: dict[str, np.ndarray], model: Any) -> dict[str, Tensor]:
    """Return the original's arrays as the tensors of a model's state dict; those without a place keep their names.

    Args:
        arrays: as `read_pdparams` gives them, of a backbone or of a whole RecModel.
        model: a backbone that is not cut, a RecModel or a DistillationModel, whose names and shapes they shall have.

    Raises:
        ConfigError: The backbone is none whose names in the original are known here.
    """
    if isinstance(getattr(model, "models", None), nn.ModuleDict):
        found = {name: _tensor(name, a) for name, a in arrays.items() if name.split(".")[0] not in model.models}
        for part, own in model.models.items():
            found |= {f"models.{part}.{name}": t for name, t in converted(below(arrays, part), own).items()}
        return found
    if hasattr(model, "backbone"):
        return _recmodel(arrays, model)
    return _backbone(below(arrays, "backbone") or arrays, model)


def below(arrays: dict[str, np.ndarray], part: str) -> dict[str, np.ndarray]:
    """Return the arrays of a part, by their names in it."""
    return {name.removeprefix(f"{part}."): array for name, array in arrays.items() if name.startswith(f"{part}.")}


def _recmodel(arrays: dict[str, np.ndarray], model: Any) -> dict[str, Tensor]:
    backbone, where = model.backbone, "backbone."
    if isinstance(backbone, Cut):
        backbone, where = backbone.model, "backbone.model."
    found = {f"{where}{name}": tensor for name, tensor in _backbone(below(arrays, "backbone"), backbone).items()}
    others = {name: array for name, array in arrays.items() if not name.startswith("backbone.")}
    found |= {_renamed(name, GEARS): _tensor(name, array) for name, array in others.items() if not DERIVED.search(name)}
    for name in {"head.mean", "head.std"} & found.keys():
        found[name] = found[name].reshape(())
    last = [name for name in backbone.state_dict() if name.startswith(tuple(f"{n}." for n in classifiers(backbone)))]
    if getattr(model.backbone, "layer", "") == "" and not last:
        _shrink(found, model, _kept(backbone))
    return found


def _renamed(name: str, rules: dict[str, str]) -> str:
    rules = {**rules, **STATISTICS}
    pattern = "|".join(re.escape(layer) for layer in rules)
    return re.sub(rf"(?<![^.])({pattern})(?![^.])", lambda found: rules[found[0]], name)


def _tensor(name: str, array: np.ndarray) -> Tensor:
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    return tensor.T.contiguous() if tensor.dim() == 2 and name.endswith(("weight", "kernel", "proj")) else tensor


def _backbone(arrays: dict[str, np.ndarray], model: Any) -> dict[str, Tensor]:
    rules = next((rules for pattern, rules in FAMILIES.items() if re.match(pattern, kind(model))), None)
    if rules is None:
        raise ConfigError(f"the names that the original's weights have are not known for {kind(model)}")
    named = {name.replace(".origin_layer.", "."): a for name, a in arrays.items() if not DERIVED.search(name)}
    own, last = model.state_dict(), next(iter(classifiers(model)), "")
    found = _in_blocks({_renamed(name, rules): _tensor(name, array) for name, array in named.items()}, own)
    if re.match("vit_", kind(model)):
        _transformer(found, model)
    if f"{last}.0.weight" in own:  # something stands behind the last layer
        found = {re.sub(rf"^{last}\.", f"{last}.0.", name): tensor for name, tensor in found.items()}
    for name in {f"{last}.weight", f"{last}.0.weight"} & found.keys():
        found[name] = found[name] * _kept(model)
    for name in THINNED.keys() & found.keys() & own.keys():
        found[name] = found[name] * (1 - model.get_submodule(THINNED[name]).p)
    for name in (name for name in found.keys() & own.keys() if name.startswith("pre_logits.")):
        found[name] = found[name].reshape(own[name].shape)  # a VGG's linear layers are convolutions here
    zeros = {name: torch.zeros_like(own[name]) for name in own if WITHOUT_BIAS.fullmatch(f"{kind(model)} {name}")}
    return zeros | found


def _in_blocks(given: dict[str, Tensor], own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors under the names that a model's own blocks have, the first of theirs in the first, and so on."""
    theirs = {match[1] for name in given if (match := THEIR_BLOCK.match(name))}
    numbers = sorted(theirs, key=lambda block: [int(number) for number in re.findall(r"\d+", block)] or [99])
    blocks = dict(zip(numbers, dict.fromkeys(m[1] for name in own if (m := OWN_BLOCK.match(name))), strict=False))
    return {
        f"{blocks[m[1]]}.{name[m.end() :]}" if (m := THEIR_BLOCK.match(name)) and m[1] in blocks else name: tensor
        for name, tensor in given.items()
    }


def _transformer(found: dict[str, Tensor], model: Any) -> None:
    """Put what the original's transformer adds or projects elsewhere where it belongs here."""
    projection, bias = found.pop("proj", None), found.get("patch_embed.proj.bias")
    if projection is not None and model.global_pool == "":  # every token is projected, in place of a classifier
        found |= {"head.weight": projection, "head.bias": torch.zeros(len(projection))}
    if bias is not None and model.patch_embed.proj.bias is None and "pos_embed" in found:
        del found["patch_embed.proj.bias"]
        found["pos_embed"] = torch.cat([found["pos_embed"][:, :1], found["pos_embed"][:, 1:] + bias], 1)


def _kept(model: Any) -> float:
    """The share of its input that the dropout before the last layer leaves.

    In evaluation the original multiplies by it, torch does not: what reads the features has to be so much smaller.
    """
    if not re.match("PPLCNet|lcnet_|MobileNetV3_|vgg", kind(model)):
        return 1.0
    return 1 - getattr(getattr(model, "dropout", None), "p", getattr(model, "drop_rate", 0.0))


def _shrink(found: dict[str, Tensor], model: Any, share: float) -> None:
    readers = {"neck.fc.weight", "neck.conv.weight", "neck.layers.0.weight"} if model.neck is not None else set()
    if model.neck is None or model.head_feature_from == "backbone":
        readers.add("head.fc.weight")
    for name in readers & found.keys():
        found[name] = found[name] * share
    if "neck.bn.running_var" in found:
        eps = model.neck.bn.eps
        found["neck.bn.running_mean"] = found["neck.bn.running_mean"] / share
        found["neck.bn.running_var"] = (found["neck.bn.running_var"] + eps) / share**2 - eps
