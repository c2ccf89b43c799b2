"""Backbones: any timm model, under timm's name or the original's, cut at any of its layers.

`cut` ends a model at a named layer and drops what comes after; `create_backbone` builds, loads and cuts in one call.
Both return a module that knows the shape and the layout of what it gives. Only this chapter imports timm.
"""

import contextlib
import copy
import difflib
import math
import re
from fnmatch import fnmatch
from pathlib import Path

import huggingface_hub
import timm
import torch
from safetensors.torch import load_file
from timm.layers import SelectAdaptivePool2d
from torch import nn

Size = tuple[int, int, int]

POOLED_MAP = ("avg_pool", "adaptive_avg_pool2d_0")  # the original's names for the (B, C, 1, 1) map
VECTOR = ("flatten", "flatten_0")  # and for the (B, C) vector that the classifier reads
LOCAL_WEIGHTS = "give a local file in Arch.Backbone.pretrained, or False"


class _StopForward(Exception):
    """Carries the output of the layer that a model is cut at out of the model's forward."""


def _stop_forward(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    raise _StopForward(output)


class Cut(nn.Module):
    """A model that ends at one of its layers; `cut` makes it.

    out_shape: shape of the output without the batch; out_channels: its channels; layout: NC, NCHW, NHWC or NLC;
    prefix_tokens: how many tokens of an NLC output come before the image's own (class token, registers);
    stop: the layer as it was asked for; layer: its name inside `model`, "" for the whole of it.
    """

    def __init__(self, model: nn.Module, stop: str, layer: str, input_size: Size, out_shape: tuple[int, ...]):
        super().__init__()
        self.model, self.stop, self.layer = model, stop, layer
        self.input_size, self.out_shape = input_size, out_shape
        self.layout = _layout(out_shape, input_size, getattr(model, "output_fmt", "NCHW"))
        self.out_channels = out_shape[0] if self.layout in ("NC", "NCHW") else out_shape[-1]
        self.prefix_tokens = _prefix_tokens(out_shape[0], input_size) if self.layout == "NLC" else 0
        if layer:  # a plain function as the hook: copies and pickles of this module need no rebinding
            model.get_submodule(layer).register_forward_hook(_stop_forward)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (B, C, H, W) -> (B, *out_shape)
        if not self.layer:
            return self.model(x)
        try:
            self.model(x)
        except _StopForward as stop:
            return stop.args[0]
        raise ValueError(f"'{self.layer}' did not run, so the backbone that is cut there has no output")

    def extra_repr(self) -> str:
        return f"stop='{self.stop}', layer='{self.layer}', out_shape={self.out_shape}, layout={self.layout}"


def cut(model: nn.Module, stop: str, input_size: Size | None = None) -> Cut:
    """A copy of `model` that ends at layer `stop`; nothing after it is stored or executed.

    Gradient checkpointing is off in the copy; `.model.set_grad_checkpointing()` turns it on.
    stop: a module's name ('layer3.2.bn1', 'blocks.7' or 'blocks[7]'), or one of the original's: 'avg_pool' /
    'adaptive_avg_pool2d_0' is the (B, C, 1, 1) pooled map, 'flatten' / 'flatten_0' the (B, C) vector that the
    classifier reads. input_size: (C, H, W) of one image; default: that of the model's pretrained configuration.
    Raises ValueError for a layer that is unknown, not called exactly once, or does not give one tensor per image.
    """
    model = copy.deepcopy(model.model if isinstance(model, Cut) else model)
    if hasattr(model, "set_grad_checkpointing"):
        model.set_grad_checkpointing(False)  # with it some models call the blocks of a stage, never the stage
    layer = _resolve(model, stop)
    input_size = tuple(input_size or _default_input_size(model))
    with torch.random.fork_rng(devices=[]):
        trial = _trial(model)
        x = _three_images(trial, input_size)
        output, finished = _full_output(trial, layer, stop, x)
        result = Cut(model, stop, layer, input_size, tuple(output.shape[1:]))
        _check_alias(result)
        if layer:  # otherwise nothing comes after
            _prune(result, trial, finished, x, output)
    return result


def _resolve(model: nn.Module, stop: str) -> str:
    """The name of the module that `stop` means; takes the classifier off where it means what the classifier reads."""
    if stop in VECTOR:
        if not _remove_classifier(model):
            raise ValueError(f"{_kind(model)} names no classifier, so '{stop}' has no meaning there; name a layer")
        return ""
    if stop in POOLED_MAP:
        pools = [name for name, module in model.named_modules() if isinstance(module, SelectAdaptivePool2d)]
        if not pools:
            raise ValueError(f"{_kind(model)} has no pooling that '{stop}' could mean; try 'flatten', or name a layer")
        flattens = isinstance(model.get_submodule(pools[-1]).flatten, nn.Flatten)
        return f"{pools[-1]}.pool" if flattens else pools[-1]
    names = dict(model.named_modules(remove_duplicate=False))
    path = re.sub(r"\[(\d+)\]", r".\1", str(stop))
    if path in names:
        return path
    close = difflib.get_close_matches(path, names, n=5, cutoff=0.4) or [name for name, _ in model.named_children()]
    raise ValueError(f"{_kind(model)} has no layer '{stop}'; the closest are {_listed(close)}")


def _check_alias(result: Cut) -> None:
    found, kind = ", ".join(map(str, ("B", *result.out_shape))), _kind(result.model)
    if result.stop in POOLED_MAP and (len(result.out_shape) != 3 or result.out_shape[1:] != (1, 1)):
        raise ValueError(f"{kind} has no (B, C, 1, 1) map for '{result.stop}': its pooling gives ({found})")
    if result.stop in VECTOR and len(result.out_shape) != 1:
        raise ValueError(f"{kind} has no (B, C) vector for '{result.stop}': it ends in ({found})")


def _config(model: nn.Module) -> dict:
    return getattr(model, "default_cfg", None) or {}


def _kind(model: nn.Module) -> str:
    return _config(model).get("architecture") or type(model).__name__


def _classifiers(model: nn.Module) -> tuple[str, ...]:
    names, modules = _config(model).get("classifier") or (), dict(model.named_modules())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if name in modules)


def _remove_classifier(model: nn.Module) -> bool:
    # Not timm's reset_classifier: in some versions it also puts average pooling in place of what was asked for.
    for name in _classifiers(model):
        model.set_submodule(name, nn.Identity())
    return bool(_classifiers(model))


def _default_input_size(model: nn.Module) -> Size:
    if "input_size" not in _config(model):
        raise ValueError(f"{_kind(model)} does not say what images it takes: give input_size, such as (3, 224, 224)")
    return _config(model)["input_size"]


def _trial(model: nn.Module) -> nn.Module:
    """A copy to run: it may change its batch statistics and fill its caches.

    On the CPU, where a repeated pass is equal to the bit; with gradients for every weight, frozen ones too.
    """
    trial = copy.deepcopy(model).cpu()
    for weight in trial.parameters():
        weight.requires_grad_(weight.is_floating_point())
    return trial


def _three_images(model: nn.Module, input_size: Size) -> torch.Tensor:
    # Three, so that a layer which folds windows or heads into the batch shows it.
    dtype = next((weight.dtype for weight in model.parameters() if weight.is_floating_point()), torch.float32)
    return torch.randn(3, *input_size, generator=torch.Generator().manual_seed(0), device="cpu").to(dtype)


def _full_output(model: nn.Module, layer: str, stop: str, x: torch.Tensor) -> tuple[torch.Tensor, set[nn.Module]]:
    """What the layer gives inside the whole model in eval mode, and the modules that have finished by then."""
    outputs, finished, target = [], set(), model.get_submodule(layer)

    def note(module: nn.Module, args: tuple, output: object) -> None:
        if not outputs:
            finished.add(module)
        if module is target:  # cloned, since a later layer may work in place
            outputs.append(output.clone() if isinstance(output, torch.Tensor) else output)

    for module in model.modules():
        module.register_forward_hook(note)
    try:
        with torch.no_grad(), contextlib.suppress(_StopForward):
            model.eval()(x)
    except Exception as error:
        raise ValueError(f"{_kind(model)} cannot take images of {tuple(x.shape[1:])}: {_first_line(error)}") from error
    if len(outputs) != 1:
        raise ValueError(f"'{stop}' is called {len(outputs)} times in {_kind(model)}; a cut needs a layer called once")
    if not isinstance(outputs[0], torch.Tensor):
        raise ValueError(f"'{stop}' gives a {type(outputs[0]).__name__}, and a cut needs a layer that gives one tensor")
    shape = tuple(outputs[0].shape)
    if shape[:1] != (len(x),) or not 2 <= len(shape) <= 4:
        raise ValueError(f"'{stop}' gives {shape} for {len(x)} images, not one vector, map or token list per image")
    return outputs[0], finished


def _layout(shape: tuple[int, ...], input_size: Size, output_fmt: str) -> str:
    if len(shape) < 3:
        return "NC" if len(shape) == 1 else "NLC"
    # Modules do not say their layout, and it changes inside a model; but a map keeps the proportions of the image.
    aspect = input_size[2] / input_size[1]
    nchw = abs(math.log(shape[2] / shape[1] / aspect))
    nhwc = abs(math.log(shape[1] / shape[0] / aspect))
    if nchw == nhwc:
        return output_fmt if output_fmt in ("NCHW", "NHWC") else "NCHW"
    return "NCHW" if nchw < nhwc else "NHWC"


def _prefix_tokens(tokens: int, input_size: Size) -> int:
    height, width = input_size[1:]
    grids = [(height // patch) * (width // patch) for patch in range(1, min(height, width) + 1)]
    return tokens - max((grid for grid in grids if grid <= tokens), default=tokens)


def _prune(result: Cut, trial: nn.Module, finished: set[nn.Module], x: torch.Tensor, output: torch.Tensor) -> None:
    """Drop what comes after the cut, as far as the output stays equal to the bit in eval and in train mode."""
    trained = _output(Cut(trial, result.stop, result.layer, result.input_size, result.out_shape), x, train=True)
    used = _parameters_behind(trained)
    expected = {False: output, True: trained.detach()}  # eval and train: a model may use a parameter in one only
    unused = _unused(trial, used, finished)
    if not _drop(result, unused, x, expected):
        for name in unused:
            _drop(result, [name], x, expected)
    # A branch that ran before the cut without reaching it stays; DDP would wait for its gradients in vain.
    unreached = {name for name, weight in trial.named_parameters() if id(weight) not in used}
    for name, weight in result.model.named_parameters():
        weight.requires_grad_(weight.requires_grad and name not in unreached)


def _output(module: nn.Module, x: torch.Tensor, train: bool) -> torch.Tensor:
    # Gradients are on whenever the model trains: attention kernels, and with them the last bits, depend on it.
    torch.default_generator.manual_seed(0)  # torch.manual_seed would reach the generators of GPUs too
    with torch.set_grad_enabled(train):
        return module.train(train)(x)


def _parameters_behind(output: torch.Tensor) -> set[int]:
    """The ids of all parameters that the output depends on, read off the autograd graph without a backward pass."""
    nodes, seen, found = [output.grad_fn], {None}, set()
    while nodes:
        node = nodes.pop()
        if node not in seen:
            seen.add(node)
            found.add(id(getattr(node, "variable", None)))
            nodes.extend(following for following, _ in node.next_functions)
    return found


def _unused(module: nn.Module, used: set[int], finished: set[nn.Module], prefix: str = "") -> list[str]:
    """The names of the largest submodules, and of the single parameters, that come after the cut."""
    own = [] if module in finished else module.named_parameters(recurse=False)
    names = [prefix + name for name, parameter in own if id(parameter) not in used]
    for name, child in module._modules.items():  # named_children would give a shared submodule only once
        # A submodule without parameters stays: others may read its settings (timm's attn_drop.p) without calling it.
        # One that ran stays even where the output does not need it: behind an Identity, an in-place activation
        # would write into what the output does need.
        parameters = [] if child is None else list(child.parameters())
        if parameters and not any(id(p) in used for p in parameters) and finished.isdisjoint(child.modules()):
            names.append(prefix + name)
        elif parameters:
            names += _unused(child, used, finished, f"{prefix}{name}.")
    return names


def _drop(result: Cut, names: list[str], x: torch.Tensor, expected: dict[bool, torch.Tensor]) -> bool:
    trial = _trial(result)
    _remove(trial.model, names)
    try:
        same = all(torch.equal(_output(trial, x, train), wanted) for train, wanted in expected.items())
    except Exception:  # a forward that reads what was dropped can fail in any way
        same = False
    if same:
        _remove(result.model, names)
    return same


def _remove(model: nn.Module, names: list[str]) -> None:
    for name in names:
        parent, _, last = name.rpartition(".")
        parent = model.get_submodule(parent)
        setattr(parent, last, nn.Identity() if isinstance(getattr(parent, last), nn.Module) else None)


def _listed(names: list[str], most: int = 5) -> str:
    return ", ".join(f"'{name}'" for name in names[:most]) + (", ..." if len(names) > most else "")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


# The original's names for the same architecture; MobileNetV1 has ReLU6 in timm and ReLU in the original.
ALIASES = {
    **{f"ResNet{depth}": f"resnet{depth}" for depth in (18, 34, 50, 101, 152)},
    **{f"ResNet{depth}_vd": f"resnet{depth}d" for depth in (18, 34, 50, 101, 152, 200)},
    "ResNet50_last_stage_stride1": "resnet50",
    "ResNet50_adaptive_max_pool2d": "resnet50",
    "ResNeXt50_32x4d": "resnext50_32x4d",
    "ResNeXt101_64x4d": "resnext101_64x4d",
    **{f"VGG{depth}": f"vgg{depth}" for depth in (11, 13, 16, 19)},
    **{f"DenseNet{depth}": f"densenet{depth}" for depth in (121, 161, 169, 201)},
    "MobileNetV1": "mobilenetv1_100",
    "MobileNetV2": "mobilenetv2_100",
    "MobileNetV3_large_x1_0": "mobilenetv3_large_100",
    "MobileNetV3_small_x1_0": "mobilenetv3_small_100",
    **{f"PPLCNet_x{width}": f"lcnet_{width.replace('_', ''):0<3}" for width in ("0_35", "0_5", "0_75", "1_0", "1_5")},
    **{f"PPHGNet_{size}": f"hgnet_{size}" for size in ("tiny", "small", "base")},
    **{f"PPHGNetV2_B{size}": f"hgnetv2_b{size}" for size in range(7)},
    **{f"EfficientNetB{size}": f"efficientnet_b{size}" for size in range(8)},
    **{f"SwinTransformer_{size}_patch4_window7_224": f"swin_{size}_patch4_window7_224"
       for size in ("tiny", "small", "base", "large")},
    **{f"ViT_{size}_patch16_224": f"vit_{size}_patch16_224" for size in ("base", "large")},
    "CLIP_vit_base_patch16_224": "vit_base_patch16_clip_quickgelu_224",
    "CLIP_vit_large_patch14_224": "vit_large_patch14_clip_quickgelu_224",
}


def list_backbones(pattern: str = "*") -> list[str]:
    """Names that `create_backbone` takes, the original's first, that match a pattern such as '*resnet50*'."""
    return [name for name in [*ALIASES, *timm.list_models()] if fnmatch(name.lower(), pattern.lower())]


def create_backbone(
    name: str,
    pretrained: bool | str | Path = False,
    class_num: int | None = None,
    stop: str | None = None,
    input_size: Size | None = None,
    **kwargs,
) -> Cut:
    """The model `name` cut at `stop`; without `stop`, its pooled features, or `class_num` outputs of a last layer.

    pretrained: True for timm's weights from its hub, or the path of a local .pth or .safetensors file of the whole
    model. input_size: (C, H, W) of the images, default the model's own. kwargs: passed to timm, such as pad_type.
    Raises ValueError for an unknown name or argument, and for weights that cannot be had or do not fit.
    """
    arch = ALIASES.get(name, name)
    if not timm.is_model(arch):
        close = difflib.get_close_matches(name, list_backbones(), n=5, cutoff=0.4)
        raise ValueError(f"no backbone is called '{name}'; the closest are {_listed(close)}")
    options = {**_input_options(arch, input_size), **kwargs}
    if name == "ResNet50_adaptive_max_pool2d":
        options["global_pool"] = "max"
    if class_num is not None:
        options["num_classes"] = class_num
    model = _create(arch, pretrained is True, options)
    if name == "ResNet50_last_stage_stride1":
        _remove_stride(model.layer4)
    skipped = _load(model, pretrained) if isinstance(pretrained, str | Path) else []
    if stop is None and class_num is None:
        _remove_classifier(model)
    result = cut(model, stop or "", input_size)
    if stop is not None and set(skipped) & set(result.model.state_dict()):
        raise ValueError(f"'{pretrained}' does not fit {arch}, which needs {_listed(skipped)} when cut at '{stop}'")
    return result


def _input_options(arch: str, input_size: Size | None) -> dict:
    """What timm has to be told of images that are not of the model's own size."""
    try:
        config = timm.get_pretrained_cfg(arch)
    except RuntimeError as error:  # what follows the dot in 'resnet50.a1_in1k' names no weights
        raise ValueError(f"no backbone is called '{arch}': {_first_line(error)}") from error
    if input_size is None or tuple(input_size) == tuple(config.input_size):
        return {}
    options = {"img_size": tuple(input_size[1:])} if config.fixed_input_size else {}
    return options if input_size[0] == config.input_size[0] else {**options, "in_chans": input_size[0]}


def _create(arch: str, pretrained: bool, options: dict) -> nn.Module:
    if pretrained and not timm.get_pretrained_cfg(arch).has_weights:
        raise ValueError(f"timm has no weights for {arch}: {LOCAL_WEIGHTS}")
    try:
        with _no_retries() if pretrained else contextlib.nullcontext():
            return timm.create_model(arch, pretrained=pretrained, **options)
    except OSError as error:
        raise ValueError(f"the weights of {arch} cannot be fetched from timm's hub: {LOCAL_WEIGHTS}") from error
    except Exception as error:  # whatever a constructor does with an argument it does not like
        unknown = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        reason = f"takes no argument '{unknown[1]}'" if unknown else f"cannot be built: {_first_line(error)}"
        raise ValueError(f"{arch} {reason}") from error


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


def _read_weights(path: str | Path) -> dict[str, torch.Tensor]:
    if not Path(path).is_file():
        raise ValueError(f"there is no weights file '{path}': {LOCAL_WEIGHTS}")
    try:
        safe = str(path).endswith(".safetensors")
        state = load_file(path) if safe else torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # each kind of broken file fails in its own way
        raise ValueError(f"'{path}' cannot be read as a file of weights: {_first_line(error)}") from error
    for wrapper in ("state_dict", "model"):
        state = state.get(wrapper, state) if isinstance(state, dict) else state
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise ValueError(f"'{path}' holds no state dict, bare or under 'state_dict' or 'model'")
    return {name.removeprefix("module."): value for name, value in state.items()}


def _load(model: nn.Module, path: str | Path) -> list[str]:
    """Load a file into the whole model; returns the classifier's tensors that do not fit and were left out."""
    given = {name: value for name, value in _read_weights(path).items() if not name.endswith("num_batches_tracked")}
    own = {name: value for name, value in model.state_dict().items() if not name.endswith("num_batches_tracked")}
    wrong = {
        "missing": own.keys() - given.keys(),
        "unexpected": given.keys() - own.keys(),
        "of another shape": {name for name in own.keys() & given.keys() if own[name].shape != given[name].shape},
    }
    names = sorted(set().union(*wrong.values()))
    classifier = tuple(f"{name}." for name in _classifiers(model))
    wrong = {kind: sorted(name for name in group if not name.startswith(classifier)) for kind, group in wrong.items()}
    parts = [f"{len(group)} are {kind} ({_listed(group, 3)})" for kind, group in wrong.items() if group]
    if parts:
        raise ValueError(f"'{path}' does not fit {_kind(model)}: of {len(own)} tensors " + ", ".join(parts))
    model.load_state_dict({name: given[name] for name in own.keys() - set(names)}, strict=False)
    return names
