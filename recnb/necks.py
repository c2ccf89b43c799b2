"""Layers between the cut backbone and the head: features (B, C) or (B, C, H, W) in, the embedding (B, D) out.

The neck's output is what is retrieved with; the head behind it exists for training only.
"""
from __future__ import annotations

import inspect
import math

from torch import Tensor, nn

from recnb.config import Registry, suggest

NECKS = Registry("neck", "Arch.Neck")
INITIALIZERS = {
    "Normal": lambda p, mean=0.0, std=1.0: nn.init.normal_(p, mean, std),
    "Constant": lambda p, value=0.0: nn.init.constant_(p, value),
    "KaimingUniform": lambda p, fan_in=None: nn.init.uniform_(p, -(b := math.sqrt(6 / (fan_in or fan(p)))), b),
    "KaimingNormal": lambda p, fan_in=None: nn.init.normal_(p, 0, math.sqrt(2 / (fan_in or fan(p)))),
    "XavierNormal": lambda p: nn.init.xavier_normal_(p),
}


def fan(p: Tensor) -> int:
    "How many inputs reach one output of a weight."
    return p[0].numel()


def initialize(parameter: nn.Parameter, attr: dict | bool | None, default: dict) -> None:
    "None; fills a parameter as `attr` (`{initializer: {name: Normal, std: 0.01}}`) says, otherwise as `default` does."
    attr = attr if isinstance(attr, dict) else {}  # True is the default, as in the original
    unknown = set(attr) - {"initializer"}
    if unknown:
        raise ValueError(f"a parameter attribute has no key '{unknown.pop()}', only 'initializer'")
    section = attr.get("initializer") or default
    if not isinstance(section, dict) or section.get("name") not in INITIALIZERS:
        name = section.get("name") if isinstance(section, dict) else section
        raise ValueError(f"there is no initializer '{name}' (written {{name: Normal, std: 0.01}}); "
                         f"{suggest(name, INITIALIZERS)}")
    initializer, args = INITIALIZERS[section["name"]], {k: v for k, v in section.items() if k != "name"}
    known = list(inspect.signature(initializer).parameters)[1:]
    for key in set(args) - set(known):
        raise ValueError(f"the initializer {section['name']} has no argument '{key}'; {suggest(key, known)}")
    initializer(parameter, **args)


@NECKS.register
class VehicleNeck(nn.Module):
    """A convolution and a flattening: (B, in_channels, H, W) -> (B, out_channels * H' * W').

    Features (B, in_channels) are taken as maps of one pixel. Weights start as N(0, 2 / fan_in), biases at 0;
    `bias_attr: False` leaves the bias out.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int = 1, stride: int = 1, padding: int = 0,
                 dilation: int = 1, groups: int = 1, padding_mode: str = "zeros", weight_attr: dict | None = None,
                 bias_attr: dict | bool | None = None):
        super().__init__()
        self.conv = nn.Conv2d(in_channels, out_channels, kernel_size, stride, padding, dilation, groups,
                              bias=bias_attr is not False, padding_mode=padding_mode)
        std = math.sqrt(2 / (kernel_size**2 * in_channels))
        initialize(self.conv.weight, weight_attr, {"name": "Normal", "std": std})
        if self.conv.bias is not None:
            initialize(self.conv.bias, bias_attr, {"name": "Constant"})

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) or (B, C) -> (B, D)
        return self.conv(x if x.dim() == 4 else x[:, :, None, None]).flatten(1)


class FC(nn.Module):
    """A linear layer, as a neck (B, embedding_size) -> (B, class_num) or as a head that gives logits.

    The names are the original's: `embedding_size` is the size of the input, `class_num` that of the output.
    """

    def __init__(self, embedding_size: int, class_num: int, weight_attr: dict | None = None,
                 bias_attr: dict | bool | None = None):
        super().__init__()
        self.fc = nn.Linear(embedding_size, class_num, bias=bias_attr is not False)
        initialize(self.fc.weight, weight_attr, {"name": "XavierNormal"})
        if self.fc.bias is not None:
            initialize(self.fc.bias, bias_attr, {"name": "Constant"})

    def forward(self, x: Tensor, y: Tensor | None = None) -> Tensor:  # (B, embedding_size) -> (B, class_num)
        return self.fc(x.flatten(1))


NECKS.register(FC)


@NECKS.register
class BNNeck(nn.Module):
    """Batch normalisation of the features before the head (https://arxiv.org/abs/1903.07071): (B, C) -> (B, C).

    As in the paper the shift stays at zero and is not trained; `bias_attr: {}` trains it, as the original does.
    """

    def __init__(self, num_features: int, weight_attr: dict | None = None, bias_attr: dict | bool | None = None,
                 use_global_stats: bool = False):
        super().__init__()
        self.bn = nn.BatchNorm1d(num_features)
        initialize(self.bn.weight, weight_attr, {"name": "Constant", "value": 1.0})
        initialize(self.bn.bias, bias_attr, {"name": "Constant"})
        self.bn.bias.requires_grad_(bias_attr is not None and bias_attr is not False)
        self.use_global_stats = use_global_stats

    def forward(self, x: Tensor) -> Tensor:  # (B, C) or (B, C, 1, 1) -> (B, C)
        if self.use_global_stats:
            self.bn.eval()
        return self.bn(x.flatten(1))
