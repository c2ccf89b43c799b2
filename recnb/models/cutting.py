"""The cut: a model that ends at any of its layers, with nothing after that layer stored or executed.

The original puts identities in place of what was registered later, which breaks a residual block; here the model runs
up to the layer and stops. Works for any torch model; the result knows the shape and the layout of what it gives.
"""

import contextlib
import copy
import difflib
import math
import re
from typing import Any

import torch
from torch import nn

Size = tuple[int, int, int]
POOLED_MAP = ("avg_pool", "adaptive_avg_pool2d_0")  # the original's names for the (B, C, 1, 1) map
VECTOR = ("flatten", "flatten_0")  # and for the (B, C) vector that the classifier reads


class _StopForward(Exception):
    """Carries the output of the layer that a model is cut at out of the model's forward."""


def _stop_forward(module: nn.Module, args: tuple, output: torch.Tensor) -> None:
    raise _StopForward(output)


class Cut(nn.Module):
    """A model that ends at one of its layers; `cut` makes it.

    Attributes:
        model: what runs, up to the layer.
        stop: the layer as it was asked for.
        layer: its name inside `model`, "" for the whole of it.
        input_size: (C, H, W) of the images that it was tried with.
        out_shape: shape of the output without the batch.
        out_channels: its channels.
        layout: NC, NCHW, NHWC or NLC.
        prefix_tokens: how many tokens of an NLC output come before the image's own (class token, registers).
    """

    def __init__(self, model: nn.Module, stop: str, layer: str, input_size: Size, out_shape: tuple[int, ...]):
        super().__init__()
        self.model, self.stop, self.layer = model, stop, layer
        self.input_size, self.out_shape = input_size, out_shape
        self.layout = _layout(out_shape, input_size, getattr(model, "output_fmt", "NCHW"))
        self.out_channels = out_shape[0] if self.layout in ("NC", "NCHW") else out_shape[-1]
        self.prefix_tokens = _prefix_tokens(out_shape[0], input_size) if self.layout == "NLC" else 0
        self.stop_there()

    def stop_there(self) -> None:
        """The layer ends the forward pass from now on, also where it has been replaced since."""
        if self.layer:
            layer = self.model.get_submodule(self.layer)
            if _stop_forward not in layer._forward_hooks.values():
                layer.register_forward_hook(_stop_forward)  # a plain function: copies and pickles need no rebinding

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
    """Return a copy of `model` that ends at a layer; nothing after it is stored or executed.

    Gradient checkpointing is off in the copy; `.model.set_grad_checkpointing()` turns it on. `torch.export.export`
    takes the copy with `strict=True`.

    Args:
        model: any torch model.
        stop: a module's name ('layer3.2.bn1', 'blocks.7' or 'blocks[7]'), or one of the original's: 'avg_pool' /
            'adaptive_avg_pool2d_0' is the (B, C, 1, 1) pooled map, 'flatten' / 'flatten_0' the (B, C) vector that the
            classifier reads, 'blocks[5]' of a ResNet the sixth block of all its stages, 'blocks' the last.
        input_size: (C, H, W) of one image; by default that of the model's pretrained configuration.

    Raises:
        ValueError: The layer is unknown, is not called exactly once, or does not give one tensor for each image.
    """
    model = copy.deepcopy(model.model if isinstance(model, Cut) else model)
    if (checkpoint := getattr(model, "set_grad_checkpointing", None)) is not None:
        checkpoint(False)  # with it some models call the blocks of a stage, never the stage
    layer = _resolve(model, stop)
    size = input_size or _default_input_size(model)
    input_size = (size[0], size[1], size[2])
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
        if not remove_classifier(model):
            raise ValueError(f"{kind(model)} names no classifier, so '{stop}' has no meaning there; name a layer")
        return ""
    names = dict(model.named_modules(remove_duplicate=False))
    path = re.sub(r"\[(\d+)\]", r".\1", str(stop))
    if path in names:
        return path
    if stop in POOLED_MAP:
        return _pooling(model, stop)
    blocks = [name for name in names if re.fullmatch(r"layer[1-4]\.\d+", name)]  # a ResNet's, all in one row
    numbered = {"blocks": "layer4", **{f"blocks.{i}": name for i, name in enumerate(blocks)}} if blocks else {}
    if path in numbered:
        return numbered[path]
    close = difflib.get_close_matches(path, names, n=5, cutoff=0.4) or [name for name, _ in model.named_children()]
    raise ValueError(f"{kind(model)} has no layer '{stop}'; the closest are {listed(close)}")


def _pooling(model: nn.Module, stop: str) -> str:
    # By the class's name: a model need not be timm's to be cut, but the pooling of timm's models is of one class.
    pools = [name for name, module in model.named_modules() if type(module).__name__ == "SelectAdaptivePool2d"]
    if not pools:
        raise ValueError(f"{kind(model)} has no pooling that '{stop}' could mean; try 'flatten', or name a layer")
    return f"{pools[-1]}.pool" if isinstance(model.get_submodule(pools[-1]).flatten, nn.Flatten) else pools[-1]


def _check_alias(result: Cut) -> None:
    found, model = ", ".join(map(str, ("B", *result.out_shape))), kind(result.model)
    if result.stop in POOLED_MAP and (len(result.out_shape) != 3 or result.out_shape[1:] != (1, 1)):
        raise ValueError(f"{model} has no (B, C, 1, 1) map for '{result.stop}': its pooling gives ({found})")
    if result.stop in VECTOR and len(result.out_shape) != 1:
        raise ValueError(f"{model} has no (B, C) vector for '{result.stop}': it ends in ({found})")


def _config(model: nn.Module) -> dict:
    return getattr(model, "default_cfg", None) or {}


def kind(model: nn.Module) -> str:
    """What a model is called in messages: its architecture's name, or its class's."""
    return _config(model).get("architecture") or type(model).__name__


def classifiers(model: nn.Module) -> tuple[str, ...]:
    """The names of the layers that a model's configuration calls its classifier, as far as the model has them."""
    names, modules = _config(model).get("classifier") or (), dict(model.named_modules())
    return tuple(name for name in ((names,) if isinstance(names, str) else names) if name in modules)


def remove_classifier(model: nn.Module) -> bool:
    """Whether there was a classifier; an identity takes its place."""
    # Not timm's reset_classifier: in some versions it also puts average pooling in place of what was asked for.
    for name in classifiers(model):
        model.set_submodule(name, nn.Identity())
    return bool(classifiers(model))


def _default_input_size(model: nn.Module) -> Size:
    if "input_size" not in _config(model):
        raise ValueError(f"{kind(model)} does not say what images it takes: give input_size, such as (3, 224, 224)")
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
        raise ValueError(f"{kind(model)} cannot take images of {tuple(x.shape[1:])}: {first_line(error)}") from error
    if len(outputs) != 1:
        raise ValueError(f"'{stop}' is called {len(outputs)} times in {kind(model)}; a cut needs a layer called once")
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
    nodes: list[Any] = [output.grad_fn]
    seen: set[Any] = {None}
    found = set()
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
        if child is None:
            continue
        parameters = list(child.parameters())
        if parameters and not any(id(p) in used for p in parameters) and finished.isdisjoint(child.modules()):
            names.append(prefix + name)
        elif parameters:
            names += _unused(child, used, finished, f"{prefix}{name}.")
    return names


def _drop(result: Cut, names: list[str], x: torch.Tensor, expected: dict[bool, torch.Tensor]) -> bool:
    trial = _trial(result)
    _remove(trial.get_submodule("model"), names)
    try:
        same = all(torch.equal(_output(trial, x, train), wanted) for train, wanted in expected.items())
    except Exception:  # a forward that reads what was dropped can fail in any way
        same = False
    if same:
        _remove(result.model, names)
    return same


def _remove(model: nn.Module, names: list[str]) -> None:
    for name in names:
        path, _, last = name.rpartition(".")
        parent = model.get_submodule(path)
        setattr(parent, last, nn.Identity() if isinstance(getattr(parent, last), nn.Module) else None)


def listed(names: list[str], most: int = 5) -> str:
    """The first names in quotes, for a message."""
    return ", ".join(f"'{name}'" for name in names[:most]) + (", ..." if len(names) > most else "")


def first_line(error: Exception) -> str:
    """What an error says in one line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
