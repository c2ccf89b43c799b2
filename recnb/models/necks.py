"""Layers between the cut backbone and the head: features (B, C) or (B, C, H, W) in, the embedding (B, D) out.

The neck's output is what is retrieved with; the head behind it exists for training only.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.registry import Count, Registry, fits, suggest

NECKS = Registry("neck")
INITIALIZERS: dict[str, Callable] = {
    "Normal": lambda p, mean=0.0, std=1.0: nn.init.normal_(p, mean, std),
    "Constant": lambda p, value=0.0: nn.init.constant_(p, value),
    "KaimingUniform": lambda p, fan_in=None, negative_slope=0.0, nonlinearity="relu": nn.init.uniform_(
        p, -(bound := math.sqrt(3) * kaiming(p, fan_in, negative_slope, nonlinearity)), bound
    ),
    "KaimingNormal": lambda p, fan_in=None, negative_slope=0.0, nonlinearity="relu": nn.init.normal_(
        p, 0, kaiming(p, fan_in, negative_slope, nonlinearity)
    ),
    "XavierNormal": lambda p: nn.init.xavier_normal_(p),
}


def kaiming(p: Tensor, fan_in: int | None, negative_slope: float, nonlinearity: str) -> float:
    """Return the standard deviation that keeps the size of activations (https://arxiv.org/abs/1502.01852).

    Args:
        p: the weight, (out, in, ...).
        fan_in: how many inputs reach an output; None: as many as the weight has.
        negative_slope: of a leaky ReLU.
        nonlinearity: what follows the layer, by torch's name.
    """
    gain = nn.init.calculate_gain(nonlinearity, negative_slope)  # type: ignore[arg-type]
    return gain / math.sqrt(fan_in or p[0].numel())


def initialize(parameter: Any, attr: dict | bool | None, default: dict) -> None:
    """Fill a parameter as its attributes say.

    Args:
        parameter: it also keeps, for the optimizer, what the attributes say of its training.
        attr: `initializer` ({name: Normal, std: 0.01}), `learning_rate`, a share of the optimizer's (0 is no training),
            and `regularizer` (L2), which replaces the optimizer's weight decay.
        default: the initializer where they name none.

    Raises:
        ValueError: A key, name or argument is unknown, or the learning rate is no share.
    """
    attr = attr if isinstance(attr, dict) else {}  # True is the default, as in the original
    unknown = set(attr) - {"initializer", "learning_rate", "regularizer"}
    if unknown:
        raise ValueError(
            f"a parameter attribute has no key '{unknown.pop()}', only initializer, learning_rate and regularizer"
        )
    choose(attr.get("initializer") or default, INITIALIZERS, "initializer", "{name: Normal, std: 0.01}")(parameter)
    if attr.get("learning_rate") is not None:
        if not fits(attr["learning_rate"], float) or attr["learning_rate"] < 0:
            raise ValueError(f"learning_rate is {attr['learning_rate']!r}, not a share of the optimizer's from 0")
        parameter.lr_multiplier = float(attr["learning_rate"])
        parameter.requires_grad_(parameter.lr_multiplier > 0)
    if attr.get("regularizer"):
        known = {"L2": lambda p, coeff=0.0: setattr(p, "weight_decay", coeff)}
        choose(attr["regularizer"], known, "regularizer of a parameter", "{name: L2, coeff: 0.}")(parameter)


def initialize_layer(layer: Any, weight_attr: dict | None, bias_attr: dict | bool | None, default: dict) -> None:
    """Fill a layer's weight and, where it has one, its bias, which is 0 unless its attributes say otherwise.

    Args:
        layer: a convolution, linear layer or normalisation.
        weight_attr: of the weight, as `initialize` takes it.
        bias_attr: of the bias.
        default: the weight's initializer where its attributes name none.

    Raises:
        ValueError: The attributes cannot be meant.
    """
    initialize(layer.weight, weight_attr, default)
    if layer.bias is not None:
        initialize(layer.bias, bias_attr, {"name": "Constant"})


def choose(section: object, known: dict, kind: str, example: str) -> Callable:
    """Return the function of one parameter that a section names, with its arguments.

    Args:
        section: `{name: Normal, std: 0.01}`.
        known: functions of a parameter and of the arguments that a section may give, by their names.
        kind: what they are, for messages.
        example: how a section is written, for messages.

    Raises:
        ValueError: The name or an argument is unknown.
    """
    name = section.get("name") if isinstance(section, dict) else section
    if not isinstance(section, dict) or name not in known:
        raise ValueError(f"there is no {kind} '{name}' (written {example}); {suggest(str(name), known)}")
    args = {k: v for k, v in section.items() if k != "name"}
    accepted = list(inspect.signature(known[name]).parameters)[1:]
    for key in set(args) - set(accepted):
        raise ValueError(f"the {kind} {name} has no argument '{key}'; {suggest(key, accepted)}")
    return lambda parameter: known[name](parameter, **args)


@NECKS.register
class VehicleNeck(nn.Module):
    """A convolution and a flattening: (B, in_channels, H, W) -> (B, out_channels * H' * W').

    Features (B, in_channels) are taken as maps of one pixel.

    Args:
        in_channels: channels of the maps.
        out_channels: channels of the convolution's output.
        kernel_size: this and the following as `torch.nn.Conv2d` takes them.
        stride: see there.
        padding: see there.
        dilation: see there.
        groups: see there.
        padding_mode: see there.
        weight_attr: how the weight starts, by default as N(0, 2 / fan_in); see `initialize`.
        bias_attr: likewise, by default at 0; False leaves the bias out.
    """

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int = 1,
        stride: int = 1,
        padding: int = 0,
        dilation: int = 1,
        groups: int = 1,
        padding_mode: str = "zeros",
        weight_attr: dict | None = None,
        bias_attr: dict | bool | None = None,
    ):
        super().__init__()
        self.conv = nn.Conv2d(
            in_channels,
            out_channels,
            kernel_size,
            stride,
            padding,
            dilation,
            groups,
            bias=bias_attr is not False,
            padding_mode=padding_mode,  # type: ignore[arg-type]
        )
        std = math.sqrt(2 / (kernel_size**2 * in_channels))
        initialize_layer(self.conv, weight_attr, bias_attr, {"name": "Normal", "std": std})

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) or (B, C) -> (B, D)
        return self.conv(x if x.dim() == 4 else x[:, :, None, None]).flatten(1)


class FC(nn.Module):
    """A linear layer, as a neck (B, embedding_size) -> (B, class_num) or as a head that gives logits.

    Args:
        embedding_size: the size of the input; the name is the original's.
        class_num: the size of the output, likewise.
        weight_attr: how the weight starts, by default as Xavier's normal distribution; see `initialize`.
        bias_attr: likewise, by default at 0; False leaves the bias out.
    """

    def __init__(
        self,
        embedding_size: Count,
        class_num: Count,
        weight_attr: dict | None = None,
        bias_attr: dict | bool | None = None,
    ):
        super().__init__()
        self.fc = nn.Linear(embedding_size, class_num, bias=bias_attr is not False)
        initialize_layer(self.fc, weight_attr, bias_attr, {"name": "XavierNormal"})

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # (B, embedding_size) -> (B, class_num)
        return self.fc(x.flatten(1))


NECKS.register(FC)


@NECKS.register
class BNNeck(nn.Module):
    """Batch normalisation of the features before the head (https://arxiv.org/abs/1903.07071): (B, C) -> (B, C).

    Args:
        num_features: C.
        weight_attr: how the factors start, by default at 1; see `initialize`.
        bias_attr: how the shift starts, by default at 0, where it stays as in the paper; `{}` trains it, as the
            original does.
        use_global_stats: whether training too normalises by the running statistics, which then stay as they are.
    """

    def __init__(
        self,
        num_features: int,
        weight_attr: dict | None = None,
        bias_attr: dict | bool | None = None,
        use_global_stats: bool = False,
    ):
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features)
        initialize_layer(self.bn, weight_attr, bias_attr, {"name": "Constant", "value": 1.0})
        if bias_attr is None or bias_attr is False:
            self.bn.bias.requires_grad_(False)
        self.use_global_stats = use_global_stats

    def forward(self, x: Tensor) -> Tensor:  # (B, C) or (B, C, 1, 1) -> (B, C)
        if self.use_global_stats:
            self.bn.eval()
        return self.bn(x.flatten(1))


@NECKS.register
class Whitening(nn.Module):
    """Unit vectors on their principal components, each divided by its deviation: (B, C) -> (B, dimensions).

    It begins where `fit` puts it, on the features of the training images, and is a linear layer that can be trained on
    from there (Jegou and Chum, ECCV 2012).

    Args:
        num_features: C, the size of the backbone's output.
        dimensions: how many components are kept.
        power: by which power of its deviation each is divided: 0 only rotates and cuts, 1 whitens.
    """

    def __init__(self, num_features: int, dimensions: int = 512, power: float = 0.5):
        super().__init__()
        self.project, self.power = nn.Linear(num_features, dimensions), power

    def fit(self, vectors: Tensor) -> None:
        """Fit the projection to vectors (N, C); what these hardly span is divided by no less than 1 % of the most."""
        unit, kept = F.normalize(vectors.float()), self.project.out_features
        mean = unit.mean(0)
        centred = unit - mean
        values, axes = torch.linalg.eigh(centred.T @ centred / len(unit))
        values, axes = values.flip(0)[:kept], axes.flip(1)[:, :kept]
        projection = axes * values.clamp(min=1e-4 * values[0]) ** (-self.power / 2)
        projection /= (centred @ projection).square().sum(1).mean().sqrt()  # lengths of 1, to train on
        with torch.no_grad():
            self.project.weight.copy_(projection.T)
            self.project.bias.copy_(-mean @ projection)

    def forward(self, x: Tensor) -> Tensor:  # (B, C) or (B, C, 1, 1) -> (B, dimensions)
        return self.project(F.normalize(x.flatten(1)))


@NECKS.register
class Tanh(nn.Module):
    """The features (B, D) squashed to -1..1, whose signs are a binary code."""

    def forward(self, x: Tensor) -> Tensor:  # (B, D) or (B, D, 1, 1) -> (B, D)
        return x.flatten(1).tanh()


@NECKS.register
class FRFNNeck(nn.Module):
    """Two linear layers with a leaky ReLU between them, at length 1: (B, num_features) -> (B, out_feat).

    Args:
        num_features: the size of the input, and between the two.
        out_feat: the size of the output.
    """

    def __init__(self, num_features: int, out_feat: int):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(num_features, num_features), nn.LeakyReLU(0.1), nn.Linear(num_features, out_feat)
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, num_features) -> (B, out_feat)
        return F.normalize(self.layers(x.flatten(1)), dim=1)


@NECKS.register
class MLP(nn.Module):
    """Linear, batch normalisation, ReLU, linear: (B, embedding_size) -> (B, class_num).

    Args:
        embedding_size: the size of the input, as for FC.
        class_num: the size of the output.
        hidden: the size between the two; None: that of the input.
    """

    def __init__(self, embedding_size: Count, class_num: Count, hidden: int | None = None):
        super().__init__()
        hidden = hidden or embedding_size
        self.layers = nn.Sequential(
            nn.Linear(embedding_size, hidden, bias=False),
            nn.BatchNorm1d(hidden),
            nn.ReLU(),
            nn.Linear(hidden, class_num),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, embedding_size) -> (B, class_num)
        return self.layers(x.flatten(1))


@NECKS.register
class GeM(nn.Module):
    """Generalised-mean pooling (https://arxiv.org/abs/1711.02512): maps (B, C, H, W) or tokens (B, L, C) -> (B, C).

    The mean of x ** p, to the power of 1 / p.

    Args:
        in_channels: C.
        p: 1 averages, a large number takes the maximum.
        train_p: whether it is learnt.
        eps: smaller values count as this one.
        prefix_tokens: how many tokens come before the image's own, which alone count.
    """

    def __init__(
        self, in_channels: int, p: float = 3.0, train_p: bool = True, eps: float = 1e-6, prefix_tokens: int = 0
    ):
        super().__init__()
        self.p = nn.Parameter(torch.tensor([float(p)]), requires_grad=train_p)
        self.in_channels, self.eps, self.prefix_tokens = in_channels, eps, prefix_tokens

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W), (B, L, C) or (B, C) -> (B, C)
        if x.dim() == 3:
            x = x[:, self.prefix_tokens :].transpose(1, 2)[..., None]
        elif x.dim() == 2:
            x = x[:, :, None, None]
        if x.dim() != 4 or x.shape[1] != self.in_channels:
            channels, shape = self.in_channels, tuple(x.shape)
            raise RuntimeError(f"GeM pools maps (B, {channels}, H, W) or tokens (B, L, {channels}) and got {shape}")
        with torch.autocast(x.device.type, enabled=False):  # powers overflow in half precision
            return x.float().clamp_min(self.eps).pow(self.p).mean((2, 3)).pow(1 / self.p)


@NECKS.register
class Tokens(nn.Module):
    """One vector of a transformer's tokens: (B, prefix_tokens + N, C) -> (B, C), or (B, 2 C) for 'cls+mean'.

    Args:
        prefix_tokens: how many tokens come before the image's own: the class token, where there is one, and registers,
            which do not count.
        pool: 'cls' takes the first token, 'mean' averages those of the image, 'cls+mean' puts one behind the other.

    Raises:
        ValueError: The pool is another, or wants a class token that is not there.
    """

    def __init__(self, prefix_tokens: int, pool: str = "cls"):
        super().__init__()
        if pool not in ("cls", "mean", "cls+mean") or (pool != "mean" and not prefix_tokens):
            raise ValueError(
                f"pool is '{pool}': there is 'mean', and 'cls' or 'cls+mean' where the backbone has a class token "
                f"(it has {prefix_tokens} tokens before the image's)"
            )
        self.prefix_tokens, self.pool = prefix_tokens, pool

    def forward(self, x: Tensor) -> Tensor:  # (B, L, C) -> (B, C) or (B, 2 C)
        if x.dim() != 3:
            raise RuntimeError(f"Tokens takes (B, tokens, C) and got {tuple(x.shape)}")
        if self.pool == "cls":
            return x[:, 0]
        mean = x[:, self.prefix_tokens :].mean(1)
        return mean if self.pool == "mean" else torch.cat([x[:, 0], mean], 1)
