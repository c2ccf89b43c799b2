"""Backbones: any timm model, under timm's name or the original's, and those that only torchvision or the original has.

`create_backbone` builds, loads and cuts in one call; `stages` and `layer_depths` sort the parameters of what it returns
from the image to the output, for learning rates that differ by depth. Only this chapter imports timm.
"""

import contextlib
import difflib
import re
from collections.abc import Callable
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Any

import huggingface_hub
import timm
import torchvision
from timm.models import group_parameters
from timm.models._efficientnet_blocks import SqueezeExcite
from timm.models._efficientnet_builder import decode_arch_def
from timm.models.mobilenetv3 import MobileNetV3, _gen_lcnet
from torch import nn

from recnb.models.architectures import PPLCNetV2, SteepGate, TokenMean, WideResNet
from recnb.models.cutting import VECTOR, Cut, Size, classifiers, cut, first_line, kind, listed, remove_classifier
from recnb.models.lora import add_lora
from recnb.models.necks import GeM, Tokens
from recnb.models.weights import LOCAL_WEIGHTS, _load, check_fits

# The original's names for the same architecture.
ALIASES = {
    **{f"ResNet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"ResNet{depth}_vd": f"resnet{depth}d" for depth in (18, 34, 50, 101, 152, 200)},
    "ResNet50_last_stage_stride1": "resnet50",
    "ResNet50_adaptive_max_pool2d": "resnet50",
    "ResNeXt50_32x4d": "resnext50_32x4d",
    "ResNeXt101_64x4d": "resnext101_64x4d",
    "AlexNet": "alexnet",
    **{f"VGG{depth}": f"vgg{depth}" for depth in (11, 13, 16, 19)},
    "VGG19Sigmoid": "vgg19",
    **{f"DenseNet{depth}": f"densenet{depth}" for depth in (121, 161, 169, 201)},
    "MobileNetV1": "mobilenetv1_100",
    "MobileNetV2": "mobilenetv2_100",
    **{f"PPLCNet_x{width}": f"lcnet_{width.replace('_', ''):0<3}" for width in ("0_35", "0_5", "0_75", "1_0", "1_5")},
    "PPLCNet_x2_5_Tanh": "PPLCNet_x2_5",
    **{f"PPHGNet_{size}": f"hgnet_{size}" for size in ("tiny", "small", "base")},
    **{f"PPHGNetV2_B{size}": f"hgnetv2_b{size}" for size in range(7)},
    **{f"EfficientNetB{size}": f"efficientnet_b{size}" for size in range(8)},
    **{
        f"SwinTransformer_{size}_patch4_window7_224": f"swin_{size}_patch4_window7_224"
        for size in ("tiny", "small", "base", "large")
    },
    **{f"ViT_{size}_patch16_224": f"vit_{size}_patch16_224" for size in ("base", "large")},
    "CLIP_vit_base_patch16_224": "vit_base_patch16_clip_quickgelu_224.openai",
    "CLIP_vit_large_patch14_224": "vit_large_patch14_clip_quickgelu_224.openai",
}


def _mobilenetv3(*stages: str, **options) -> MobileNetV3:
    """Return the original's MobileNetV3, of timm's parts.

    Other than timm's, its first block widens too, and the gates of its blocks are steeper and not rounded in width.
    """
    return MobileNetV3(
        decode_arch_def([stage.split() for stage in stages]),
        norm_layer=nn.BatchNorm2d,
        act_layer=nn.Hardswish,
        se_layer=partial(SqueezeExcite, gate_layer=SteepGate, force_act_layer=nn.ReLU),
        head_bias=False,
        **options,
    )


# The original's networks that no library has under any name, widths of PP-LCNet that timm can make and does not list.
NETWORKS: dict[str, Callable] = {
    **{
        f"PPLCNet_x{width}": partial(_gen_lcnet, "lcnet", float(width.replace("_", ".")), pretrained_cfg={"url": ""})
        for width in ("0_25", "2_0", "2_5")
    },
    "MobileNetV3_large_x1_0": partial(
        _mobilenetv3,
        "ir_r1_k3_s1_e1_c16_nre",
        "ir_r1_k3_s2_e4_c24_nre ir_r1_k3_s1_e3_c24_nre",
        "ir_r3_k5_s2_e3_c40_se0.25_nre",
        "ir_r1_k3_s2_e6_c80 ir_r1_k3_s1_e2.5_c80 ir_r2_k3_s1_e2.3_c80",
        "ir_r2_k3_s1_e6_c112_se0.25",
        "ir_r3_k5_s2_e6_c160_se0.25",
        "cn_r1_k1_s1_c960",
    ),
    "MobileNetV3_small_x1_0": partial(
        _mobilenetv3,
        "ir_r1_k3_s2_e1_c16_se0.25_nre",
        "ir_r1_k3_s2_e4.5_c24_nre ir_r1_k3_s1_e3.67_c24_nre",
        "ir_r1_k5_s2_e4_c40_se0.25 ir_r2_k5_s1_e6_c40_se0.25",
        "ir_r2_k5_s1_e3_c48_se0.25",
        "ir_r3_k5_s2_e6_c96_se0.25",
        "cn_r1_k1_s1_c576",
    ),
    "PPLCNetV2_base": PPLCNetV2,
    "PPLCNetV2_base_ShiTu": partial(PPLCNetV2, shitu=True),
    "WideResNet": WideResNet,
}
# GoogLeNet gives a tuple while it trains, SqueezeNet has no linear layer that could be taken off.
TORCHVISION = [
    name
    for name in torchvision.models.list_models(module=torchvision.models)
    if not timm.is_model(name) and not name.startswith(("googlenet", "squeezenet"))
]
# What timm pools a transformer's tokens to, and what follows in place of its classifier, of (channels, prefix tokens).
POOLS = {
    "cls": ("token", lambda channels, prefix: nn.Identity()),
    "avg": ("avg", lambda channels, prefix: nn.Identity()),
    "cls+avg": ("", lambda channels, prefix: Tokens(prefix, "cls+mean")),
    "gem": ("", lambda channels, prefix: GeM(channels, prefix_tokens=prefix)),
}
ENDINGS = {"VGG19Sigmoid": nn.Sigmoid, "PPLCNet_x2_5_Tanh": nn.Tanh}  # what comes behind the class_num outputs
ELSEWHERE = {
    "AdaFace_IR_18": "belongs to the original's AdaFace training (eval_mode: adaface)",
    "ResNet50_metabin": "belongs to the original's MetaBIN training (train_mode: metabin)",
}
REFUSED = {
    "return_patterns": "several outputs are not supported; Arch.BackboneStopLayer.name cuts at one layer",
    "return_stages": "several outputs are not supported; Arch.BackboneStopLayer.name cuts at one layer",
    "stop_after": "give the layer in Arch.BackboneStopLayer.name",
    "freeze_befor": "give lr_mult_list with 0 for each stage that is to stay as it is",
}


def list_backbones(pattern: str = "*") -> list[str]:
    """Return the names that `create_backbone` takes, the original's first, that match a pattern as '*resnet50*'."""
    names = [*ALIASES, *NETWORKS, *timm.list_models(), *TORCHVISION]
    return [name for name in names if fnmatch(name.lower(), pattern.lower())]


def hub_weights(name: str) -> str:
    """Return which file holds the library's weights of a backbone, and where on its hub; empty where there is none."""
    config = timm.get_pretrained_cfg(name) if timm.is_model(name) else None
    if config is None or not config.has_weights:
        return ""
    return f"model.safetensors of {config.hf_hub_id}" if config.hf_hub_id else str(config.url)


def pretrained_images(name: str) -> dict | None:
    """Return how the images were prepared on which timm trained a backbone; None where the model is not one of timm's.

    The keys are mean and std (of an image between 0 and 1), input_size (C, H, W), fixed_input_size, crop_pct and
    interpolation.
    """
    arch = ALIASES.get(name, name)
    if not timm.is_model(arch):
        return None
    keys = ("mean", "std", "input_size", "fixed_input_size", "crop_pct", "interpolation")
    return {key: getattr(timm.get_pretrained_cfg(arch), key) for key in keys}


def create_backbone(
    name: str,
    pretrained: bool | str | Path = False,
    class_num: int | None = None,
    stop: str | None = None,
    input_size: Size | None = None,
    lr_mult_list: list | None = None,
    use_ssld: bool = False,
    pool: str | None = None,
    lora: dict | None = None,
    strict: bool = True,
    **kwargs,
) -> Cut:
    """Return a model cut at a layer; without one, its pooled features, or `class_num` outputs of its last layer.

    Args:
        name: of timm, of torchvision, or the original's.
        pretrained: True for the library's weights from its hub, or the path of a local .pth, .safetensors or, under the
            original's names, .pdparams file of the whole model.
        class_num: size of a last linear layer; None takes the classifier off.
        stop: the layer to cut at, as `cut` takes it. A WideResNet cut at 'bn1' gives the mean of that map, (B, C), as
            the original.
        input_size: (C, H, W) of the images, by default the model's own.
        lr_mult_list: a number for each of the model's stages (5 for a ResNet, 6 for PPLCNet), kept as `lr_multiplier`
            of each parameter; what follows the stages has 1, and 0 freezes.
        use_ssld: which of the original's files to take; has no effect here.
        pool: what becomes of a transformer's tokens, one of POOLS; by default what its weights were trained with, which
            differs: DINOv2 gives its class token, timm's DINOv3 the mean.
        lora: rank, alpha and targets of `add_lora`; all else of the backbone stays as it is.
        strict: whether a file's tensors all have to fit, and to fill all of the model but its classifier.
        **kwargs: go to timm, such as pad_type. With the original's names also stem_act (ResNet), class_expand and
            dropout_prob, default 0.2 (PPLCNet, MobileNetV3; a VGG's drop_rate is 0.5); of CLIP, return_embed for the
            tokens projected to output_dim: 512 numbers, and return_mean_embed for their mean.

    Raises:
        ValueError: A name or argument is unknown, no memory can hold the model, or weights cannot be had or do not fit.
    """
    _check(name, class_num, stop, kwargs)
    if pool is not None and (class_num is not None or stop is not None or kwargs.get("return_embed")):
        raise ValueError("pool makes one vector of the whole backbone: give no class_num, stop layer or return_embed")
    check_fits(lambda: _build(name, False, class_num, input_size, dict(kwargs)), name)
    model = _build(name, pretrained is True, class_num, input_size, dict(kwargs))
    if use_ssld and pretrained is True:
        print("use_ssld has no effect: it picks among the original's files, and 'pretrained: True' takes the library's")
    skipped = _load(model, pretrained, strict) if isinstance(pretrained, str | Path) else []
    for ending in _endings(name, kwargs):
        last = classifiers(model)[0]
        model.set_submodule(last, nn.Sequential(model.get_submodule(last), ending))
    multipliers = {} if lr_mult_list is None else _multipliers(model, lr_mult_list)
    if pool is not None:
        _pool_tokens(model, pool)
    result = cut(model, "" if pool else _end(name, model, class_num, stop, kwargs), input_size)
    kept = dict(result.model.named_parameters())
    for parameter in multipliers.keys() & kept.keys():
        kept[parameter].lr_multiplier = multipliers[parameter]  # type: ignore[attr-defined]
        kept[parameter].requires_grad_(kept[parameter].requires_grad and multipliers[parameter] > 0)
    if strict and stop is not None and set(skipped) & set(result.model.state_dict()):
        raise ValueError(
            f"'{pretrained}' does not fit {kind(model)}, which needs {listed(skipped)} when cut at '{stop}'"
        )
    if lora is not None:
        add_lora(result, **lora)
    return result


def stages(model: nn.Module) -> list[list[str]]:
    """Return the names of all parameters by stage, from the image on: a stem, the stages, then what follows them.

    `model` is what `create_backbone` returns, or any model of timm's. One that does not say its stages is sorted by its
    own submodules, in the order of their registration.
    """
    depths = _depths(model, coarse=True)
    return [[name for name in depths if depths[name] == depth] for depth in sorted(set(depths.values()))]


def layer_depths(model: nn.Module) -> dict[str, int]:
    """Return how deep each parameter lies, counted in blocks from 0 at the image; otherwise as `stages`."""
    return _depths(model, coarse=False)


def share_on_gpus(model: nn.Module) -> nn.Module:
    """Return the model; its batch normalisations share their statistics with all processes while they train on GPUs."""
    model = timm.layers.convert_sync_batchnorm(model)
    for part in model.modules():
        if isinstance(part, Cut):
            part.stop_there()  # the layer may be another now
    return model


def _depths(model: Any, coarse: bool) -> dict[str, int]:
    if isinstance(model, Cut):
        return {f"model.{name}": depth for name, depth in _depths(model.model, coarse).items()}
    names = [name for name, _ in model.named_parameters()]
    if hasattr(model, "group_matcher"):
        matcher = model.group_matcher(coarse=coarse)
        if coarse and kind(model).startswith(("lcnet_", "PPLCNet_")):  # timm's fourth and fifth are one of the original
            matcher["blocks"] = ((r"^blocks\.([0-2])", None), (r"^blocks\.[34]", (3,)), (r"^blocks\.5", (4,)))
        found = group_parameters(model, matcher, reverse=True)
        return {name: found[name] for name in names}
    tops = list(dict.fromkeys(name.split(".")[0] for name in names if "." in name))
    return {name: tops.index(name.split(".")[0]) if "." in name else 0 for name in names}


def _multipliers(model: nn.Module, given: list) -> dict[str, float]:
    """The multiplier of each parameter of the whole model; 1 for those that follow the stages."""
    depths = _depths(model, coarse=True)
    last = [name for name in depths if name.startswith(tuple(f"{layer}." for layer in classifiers(model)))]
    begins = [names[0] for names in stages(model)[: depths[last[0]] if last else None]]
    if not isinstance(given, list | tuple) or not all(isinstance(n, int | float) and n >= 0 for n in given):
        raise ValueError(f"lr_mult_list is {given}, not a list of numbers from 0 on")
    if len(given) != len(begins):
        raise ValueError(
            f"lr_mult_list has {len(given)} numbers, {kind(model)} wants {len(begins)}: one for each of "
            f"the stages that begin at {listed(begins, 8)}"
        )
    return {name: float(given[depth]) if depth < len(given) else 1.0 for name, depth in depths.items()}


def _check(name: str, class_num: int | None, stop: str | None, options: dict) -> None:
    if name in ELSEWHERE:
        raise ValueError(f"{name} {ELSEWHERE[name]}, which recnb does not have; take another backbone")
    arch = ALIASES.get(name, name)
    if not (timm.is_model(arch) or arch in NETWORKS or arch in TORCHVISION):
        close = difflib.get_close_matches(name, list_backbones(), n=5, cutoff=0.4)
        raise ValueError(f"no backbone is called '{name}'; the closest are {listed(close)}")
    for key in options.keys() & REFUSED.keys():
        raise ValueError(f"{key}: {REFUSED[key]}")
    if name in ENDINGS and class_num is None and stop is None:
        raise ValueError(f"{name} ends in a {ENDINGS[name].__name__} behind its class_num outputs: give class_num")
    if options.get("return_mean_embed") and not options.get("return_embed"):
        raise ValueError("return_mean_embed is the mean of what return_embed returns: give return_embed: True as well")
    if options.get("return_embed") and class_num is not None:
        raise ValueError("return_embed gives the projected tokens and class_num a classifier: give one of them")


def _build(name: str, pretrained: bool, class_num: int | None, input_size: Size | None, options: dict) -> nn.Module:
    """The whole model, the original's arguments translated where the name is the original's."""
    arch, expand, stem_act = ALIASES.get(name, name), None, "relu"
    if name.startswith(("PPLCNet_", "MobileNetV3")):
        options["drop_rate"], expand = options.pop("dropout_prob", 0.2), options.pop("class_expand", None)
    elif name.startswith("VGG"):
        options.setdefault("drop_rate", 0.5)
    elif name.startswith("ResNet"):
        stem_act = options.pop("stem_act", "relu")
    elif name.startswith("CLIP_"):
        options = _embedding(**options)
    if name == "MobileNetV1":
        options.setdefault("act_layer", nn.ReLU)  # timm's has ReLU6
    if name == "ResNet50_adaptive_max_pool2d":
        options["global_pool"] = "max"
    model: Any = _create(arch, pretrained, class_num, input_size, options)
    if expand is not None:
        model.conv_head = nn.Conv2d(model.conv_head.in_channels, expand, 1)
        model.classifier = nn.Linear(expand, model.num_classes)
    if stem_act is None:
        _deactivate_stem(model)
    elif stem_act != "relu":
        raise ValueError(f"stem_act is {stem_act!r}, and the stem of a ResNet has 'relu' or null")
    if name == "ResNet50_last_stage_stride1":
        _remove_stride(model.layer4)
    return model


def _embedding(return_embed: bool = False, return_mean_embed: bool = False, output_dim: int = 512, **options) -> dict:
    """timm's arguments for the original's: a projection of every token in place of the classifier."""
    return {**options, **({"num_classes": output_dim, "global_pool": ""} if return_embed else {})}


def _endings(name: str, options: dict) -> list[nn.Module]:
    """What comes behind the last layer."""
    if options.get("return_mean_embed"):  # the original leaves the class token out for one of its two CLIP models only
        return [TokenMean(first=1 if name == "CLIP_vit_base_patch16_224" else 0)]
    return [ENDINGS[name]()] if name in ENDINGS else []


def _deactivate_stem(model: Any) -> None:
    model.act1 = nn.Identity()
    for name, module in model.conv1.named_children():  # three convolutions in the original's vd
        if isinstance(module, nn.ReLU):
            model.conv1.set_submodule(name, nn.Identity())


def _end(name: str, model: nn.Module, class_num: int | None, stop: str | None, options: dict) -> str:
    """The layer to cut at, "" for none; takes off the model what the cut does not."""
    if options.get("return_embed"):  # the projection is no classifier: 'flatten' is what comes out of it
        return "" if stop is None or stop in VECTOR else stop
    if name == "WideResNet" and stop == "bn1":
        model.relu = nn.Identity()
        return "flatten"
    if stop is None and class_num is None:
        remove_classifier(model)
    return stop or ""


def _pool_tokens(model: Any, pool: str) -> None:
    """Put this pooling of the tokens in place of a transformer's own, and nothing in place of its classifier."""
    if pool not in POOLS:
        raise ValueError(f"pool is '{pool}', and there is {listed([*POOLS])}")
    heads, prefix = classifiers(model), getattr(model, "num_prefix_tokens", None)
    if prefix is None or len(heads) != 1 or not hasattr(model, "global_pool"):
        raise ValueError(f"{kind(model)} has no tokens that pool could choose from; a neck such as GeM pools maps")
    if "cls" in pool and getattr(model, "cls_token", None) is None:
        raise ValueError(f"pool is '{pool}', but {kind(model)} has no class token; take 'avg' or 'gem'")
    if getattr(model, "attn_pool", None) is not None:
        model.attn_pool = None
    # Not timm's reset_classifier, which in some models makes a new norm where the pooling changes.
    model.global_pool, make = POOLS[pool]
    model.pool_include_prefix = False
    model.set_submodule(heads[0], make(model.num_features, prefix))


def _input_options(arch: str, input_size: Size | None) -> dict:
    """What timm has to be told of images that are not of the model's own size."""
    try:
        config: Any = timm.get_pretrained_cfg(arch)
    except RuntimeError as error:  # what follows the dot in 'resnet50.a1_in1k' names no weights
        raise ValueError(f"no backbone is called '{arch}': {first_line(error)}") from error
    if input_size is None or tuple(input_size) == tuple(config.input_size):
        return {}
    options = {"img_size": tuple(input_size[1:])} if config.fixed_input_size else {}
    return options if input_size[0] == config.input_size[0] else {**options, "in_chans": input_size[0]}


def _create(arch: str, pretrained: bool, class_num: int | None, input_size: Size | None, options: dict) -> nn.Module:
    library = "timm" if timm.is_model(arch) else "torchvision"
    if pretrained and (
        arch in NETWORKS or (library == "timm" and not getattr(timm.get_pretrained_cfg(arch), "has_weights", False))
    ):
        near = "; mobilenetv3_large_100 is timm's MobileNetV3, and has some" if arch.startswith("MobileNetV3") else ""
        raise ValueError(f"timm has no weights for {arch}: {LOCAL_WEIGHTS}{near}")
    try:
        if library != "timm":
            return _other(arch, pretrained, class_num, options)
        options = {**_input_options(arch, input_size), **options}
        if class_num is not None:
            options["num_classes"] = class_num
        with _no_retries() if pretrained else contextlib.nullcontext():
            return timm.create_model(arch, pretrained=pretrained, **options)
    except OSError as error:
        raise ValueError(f"the weights of {arch} cannot be fetched from {library}'s hub: {LOCAL_WEIGHTS}") from error
    except Exception as error:  # whatever a constructor does with an argument it does not like
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"takes no argument '{unknown[1]}'" if unknown else f"cannot be built: {first_line(error)}"
        raise ValueError(f"{arch} {reason}") from error


def _other(arch: str, pretrained: bool, class_num: int | None, options: dict) -> nn.Module:
    """A network that timm does not list, with the configuration that timm's models have."""
    if arch in NETWORKS:
        model = NETWORKS[arch](**options)
    else:
        model = torchvision.models.get_model(arch, weights="DEFAULT" if pretrained else None, **options)
    last = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)][-1]
    model.default_cfg = {
        "architecture": arch,
        "classifier": last,
        "input_size": (3, 32, 32) if arch == "WideResNet" else (3, 224, 224),
    }
    if class_num is not None:
        model.set_submodule(last, nn.Linear(model.get_submodule(last).in_features, class_num))
    return model


@contextlib.contextmanager
def _no_retries():
    """Without a network the hub's client retries for 46 s; told that it is offline, it looks in its cache at once."""
    constants = huggingface_hub.constants
    before = constants.HF_HUB_OFFLINE
    try:
        huggingface_hub.utils.get_session().head(constants.ENDPOINT, timeout=3)
    except Exception:  # the client has changed its HTTP library before, and the exceptions with it
        constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def _remove_stride(stage: nn.Module) -> None:
    # timm's output_stride would also dilate the convolutions, which the original does not do.
    for module in stage.modules():
        if isinstance(module, nn.Conv2d):
            module.stride = (1, 1)
