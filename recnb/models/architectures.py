"""Networks of the original that neither timm nor torchvision has, in plain torch.

Their outer layers have the original's names, so that a cut at 'avg_pool', 'flatten' or 'stages[3]' means what it meant
there, and `group_matcher` sorts their parameters by stage as that of timm's models does.
"""

from collections import OrderedDict
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import SqueezeExcitation


def _draw(model: nn.Module) -> None:
    # As the original does: variance 2 / fan-in; torch's own draw is six times smaller.
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight)


def _conv(channels: int, out: int, kernel_size: int, stride: int = 1, groups: int = 1, act: bool = True):
    conv = nn.Conv2d(channels, out, kernel_size, stride, kernel_size // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(out), **({"act": nn.ReLU()} if act else {})))


class SteepGate(nn.Module):
    """The gate of the original's MobileNetV3, a line of slope 0.2 between 0 and 1; torch's Hardsigmoid has 1 / 6."""

    def forward(self, x: Tensor) -> Tensor:  # (B, C, 1, 1) -> (B, C, 1, 1)
        return (0.2 * x + 0.5).clamp(0, 1)


class BranchedConv(nn.Module):
    """Depthwise convolutions of each odd kernel size up to `kernel_size`, each with its batch norm, and their sum.

    `reparameterize` makes them one convolution that gives the same in eval mode (https://arxiv.org/abs/2101.03697);
    timm.utils.reparameterize_model does it to a whole model.

    Args:
        channels: of the input and of the output.
        kernel_size: the largest kernel.
        stride: of each convolution.
        smallest: the smallest kernel.
    """

    def __init__(self, channels: int, kernel_size: int, stride: int = 1, smallest: int = 1):
        super().__init__()
        self.dw_conv_list = nn.ModuleList(
            _conv(channels, channels, size, stride, channels, act=False)
            for size in range(kernel_size, smallest - 1, -2)
        )
        self.dw_conv: nn.Module | None = None

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H / stride, W / stride)
        return sum(branch(x) for branch in self.dw_conv_list) if self.dw_conv is None else self.dw_conv(x)

    @torch.no_grad()
    def reparameterize(self) -> None:
        """From now on one convolution in place of the branches; there is no way back."""
        if self.dw_conv is not None:
            return
        branches: Any = self.dw_conv_list
        first, kernel, bias = branches[0].conv, torch.zeros(()), torch.zeros(())
        for branch in branches:
            scale = branch.bn.weight / (branch.bn.running_var + branch.bn.eps).sqrt()
            margin = (first.kernel_size[0] - branch.conv.kernel_size[0]) // 2
            kernel = kernel + F.pad(branch.conv.weight * scale[:, None, None, None], [margin] * 4)
            bias = bias + branch.bn.bias - branch.bn.running_mean * scale
        whole: Any = nn.Conv2d(
            first.in_channels, first.out_channels, first.kernel_size, first.stride, first.padding, groups=first.groups
        ).to(kernel)
        whole.weight.copy_(kernel)
        whole.bias.copy_(bias)
        self.dw_conv = whole
        self.dw_conv_list = nn.ModuleList()


class SeparableBlock(nn.Module):
    """A depthwise and a pointwise convolution, with what PP-LCNetV2 adds in its later stages.

    Args:
        channels: of the input.
        out: of the output.
        kernel_size: of the depthwise convolution.
        stride: of the depthwise convolution.
        branched: whether the depthwise one has branches.
        excited: whether there is squeeze-and-excitation between the two.
        split: whether there are two pointwise convolutions, with half the channels between them.
        shortcut: whether the input is added where the shapes allow it.
        smallest: the smallest kernel among the branches.
    """

    def __init__(
        self,
        channels: int,
        out: int,
        kernel_size: int,
        stride: int = 1,
        branched: bool = False,
        excited: bool = False,
        split: bool = False,
        shortcut: bool = False,
        smallest: int = 1,
    ):
        super().__init__()
        self.dw_conv = (
            nn.Sequential(BranchedConv(channels, kernel_size, stride, smallest), nn.ReLU())
            if branched
            else _conv(channels, channels, kernel_size, stride, channels)
        )
        self.se = SqueezeExcitation(channels, channels // 4) if excited else nn.Identity()
        self.pw_conv = (
            nn.Sequential(_conv(channels, out // 2, 1), _conv(out // 2, out, 1)) if split else _conv(channels, out, 1)
        )
        self.shortcut = shortcut and stride == 1 and channels == out

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, out, H / stride, W / stride)
        y = self.pw_conv(self.se(self.dw_conv(x)))
        return x + y if self.shortcut else y


def _stage(channels: int, depth: int, kernel_size: int, stride: int = 2, **options) -> nn.Sequential:
    # The first block's branches are those that go with stride 2, whatever its stride is: none of kernel size 1.
    first = SeparableBlock(channels, 2 * channels, kernel_size, stride, smallest=3, **options)
    return nn.Sequential(
        first, *(SeparableBlock(2 * channels, 2 * channels, kernel_size, **options) for _ in range(depth - 1))
    )


class PPLCNetV2(nn.Module):
    """PP-LCNetV2 base, the successor of PP-LCNet (https://arxiv.org/abs/2109.15099): (B, 3, H, W) -> (B, class_num).

    Args:
        class_num: outputs of the last layer.
        class_expand: channels of the convolution behind the pooling, which are what 'flatten' gives.
        use_last_conv: whether there is that convolution; without it 'flatten' gives 1024.
        dropout_prob: of the dropout behind it.
        shitu: the variant of PP-ShiTuV2, whose last stage keeps the size of its maps (14 x 14 at 224) and whose last
            convolution has no activation behind it, so that it can be the embedding.
    """

    def __init__(
        self,
        class_num: int = 1000,
        class_expand: int = 1280,
        use_last_conv: bool = True,
        dropout_prob: float = 0.2,
        shitu: bool = False,
    ):
        super().__init__()
        self.stem = nn.Sequential(_conv(3, 32, 3, 2), SeparableBlock(32, 64, 3))
        self.stages = nn.Sequential(
            _stage(64, 2, 3),
            _stage(128, 2, 3),
            _stage(256, 6, 5, branched=True, excited=True, split=True),
            _stage(512, 2, 5, stride=1 if shitu else 2, branched=True, shortcut=True),
        )
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        last = use_last_conv
        self.last_conv = nn.Conv2d(1024, class_expand, 1, bias=False) if last else nn.Identity()
        self.act = nn.ReLU() if last and not shitu else nn.Identity()
        self.dropout = nn.Dropout(dropout_prob) if last else nn.Identity()
        self.flatten = nn.Flatten()
        self.fc = nn.Linear(class_expand if use_last_conv else 1024, class_num)
        _draw(self)

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, class_num)
        x = self.last_conv(self.avg_pool(self.stages(self.stem(x))))
        return self.fc(self.flatten(self.dropout(self.act(x))))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong to which stage, or block, as timm's models say it."""
        return {"stem": r"^stem", "blocks": r"^stages\.(\d+)" if coarse else r"^stages\.(\d+)\.(\d+)"}


class PreActivationBlock(nn.Module):
    """Two 3 x 3 convolutions, each behind a batch norm and a leaky ReLU, and a shortcut.

    Args:
        channels: of the input.
        out: of the output.
        stride: of the first convolution.
        dropout: between the two.
        activated: whether convolution and shortcut, where the channels change, both start behind the first activation;
            otherwise both start before it there, as in the original.
    """

    def __init__(self, channels: int, out: int, stride: int, dropout: float, activated: bool):
        super().__init__()
        self.changes = channels != out
        self.before = (
            nn.Sequential(nn.BatchNorm2d(channels, momentum=0.001), nn.LeakyReLU(0.1))
            if activated or not self.changes
            else nn.Identity()
        )
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.between = nn.Sequential(nn.BatchNorm2d(out, momentum=0.001), nn.LeakyReLU(0.1), nn.Dropout(dropout))
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.short = nn.Conv2d(channels, out, 1, stride, bias=False) if self.changes else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:  # (B, channels, H, W) -> (B, out, H / stride, W / stride)
        y = self.before(x)
        return self.short(y if self.changes else x) + self.conv2(self.between(self.conv1(y)))


class WideResNet(nn.Module):
    """A wide residual network for 32 x 32 images (https://arxiv.org/abs/1605.07146): (B, 3, H, W) -> (B, num_classes).

    Args:
        depth: 6 n + 4 layers.
        widen_factor: the three stages have 16, 32 and 64 times as many channels and keep, halve and halve the size.
        dropout: between the two convolutions of a block.
        num_classes: outputs of the last layer.
        proj: would add a second output, for which a neck is the place here.
        proj_after: belongs to it.
        low_dim: belongs to it, and has no effect.

    Raises:
        ValueError: The depth is another, or a second output is asked for.
    """

    def __init__(
        self,
        depth: int = 28,
        widen_factor: int = 2,
        dropout: float = 0.0,
        num_classes: int = 10,
        proj: bool = False,
        proj_after: bool = False,
        low_dim: int = 64,
    ):
        super().__init__()
        if (depth - 4) % 6 or depth < 10:
            raise ValueError(f"depth is {depth}, and a WideResNet has 6 n + 4 layers: 16, 22, 28, ...")
        if proj or proj_after:
            raise ValueError("proj: a second output is not supported; its layers are those of the neck FRFNNeck")
        count, (first, second, third) = (depth - 4) // 6, (16 * widen_factor, 32 * widen_factor, 64 * widen_factor)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.block1 = self._stage(16, first, count, 1, dropout, activated=True)
        self.block2 = self._stage(first, second, count, 2, dropout)
        self.block3 = self._stage(second, third, count, 2, dropout)
        self.bn1, self.relu = nn.BatchNorm2d(third, momentum=0.001), nn.LeakyReLU(0.1)
        self.avg_pool, self.flatten = nn.AdaptiveAvgPool2d(1), nn.Flatten()
        self.fc = nn.Linear(third, num_classes)
        _draw(self)

    @staticmethod
    def _stage(channels: int, out: int, count: int, stride: int, dropout: float, activated: bool = False):
        return nn.Sequential(
            PreActivationBlock(channels, out, stride, dropout, activated),
            *(PreActivationBlock(out, out, 1, dropout, activated) for _ in range(count - 1)),
        )

    def forward(self, x: Tensor) -> Tensor:  # (B, 3, H, W) -> (B, num_classes)
        x = self.relu(self.bn1(self.block3(self.block2(self.block1(self.conv1(x))))))
        return self.fc(self.flatten(self.avg_pool(x)))

    def group_matcher(self, coarse: bool = False) -> dict:
        """Which parameters belong to which stage, or block, as timm's models say it; `bn1` to the last."""
        return {
            "stem": r"^conv1",
            "blocks": [(r"^block(\d)" if coarse else r"^block(\d)\.(\d+)", None), (r"^bn1", (99999,))],
        }


class TokenMean(nn.Module):
    """The mean of the tokens from `first` on: (B, N, C) -> (B, C)."""

    def __init__(self, first: int = 0):
        super().__init__()
        self.first = first

    def forward(self, x: Tensor) -> Tensor:  # (B, N, C) -> (B, C)
        return x[:, self.first :].mean(1)
