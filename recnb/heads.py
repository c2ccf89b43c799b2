"""Embeddings to class logits, for training only: ArcMargin and its family.

A head is called with labels while it trains and adds its margin to the true class; in evaluation, or without labels,
it returns the plain cosine. Its weight is kept and used in float32 whatever the precision of the features is, since a
margin of 0.1 rad and a scale of 80 leave no room for half precision.
"""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.config import Registry
from recnb.necks import FC

HEADS = Registry("head", "Arch.Head")
HEADS.register(FC)


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    "float32 rows of length 1; a zero row stays zero and passes no gradient on, where a division would give NaN."
    length = torch.linalg.vector_norm(x.float(), dim=-1, keepdim=True)
    return x.float() / length.clamp_min(eps) * (length > eps)


def cosine(features: Tensor, weight: Tensor) -> Tensor:
    "Cosines (B, class_num) between features (B, D) and class weights (class_num, D), in float32 under autocast too."
    with torch.autocast(features.device.type, enabled=False):
        return unit(features) @ unit(weight).T


@HEADS.register
class ArcMargin(nn.Module):
    """Additive angular margin, ArcFace (https://arxiv.org/abs/1801.07698): (B, embedding_size) -> (B, class_num).

    The target logit is scale * cos(theta + margin), margin in radians; beyond theta = pi - margin, where that would
    rise again, it continues as cosine - margin * sin(margin) (with `easy_margin`: the plain cosine for theta > pi / 2).
    """

    def __init__(self, embedding_size: int, class_num: int, margin: float = 0.5, scale: float = 80.0,
                 easy_margin: bool = False):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(class_num, embedding_size)))
        self.margin, self.scale, self.easy_margin = margin, scale, easy_margin

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:  # (B, D), (B,) -> (B, class_num)
        cos = cosine(features, self.weight)
        if y is None or not self.training:
            return cos
        # 1e-6 as in the original: the square root's slope is infinite at 0, where a feature lies along its weight.
        sin = ((1 - cos.square()).clamp_min(0) + 1e-6).sqrt()
        phi = cos * math.cos(self.margin) - sin * math.sin(self.margin)
        if self.easy_margin:
            phi = torch.where(cos > 0, phi, cos)
        else:
            phi = torch.where(cos > -math.cos(self.margin), phi, cos - self.margin * math.sin(self.margin))
        return self.scale * torch.where(F.one_hot(y, len(self.weight)).bool(), phi, cos)

    def extra_repr(self) -> str:
        classes, size = self.weight.shape
        return f"embedding_size={size}, class_num={classes}, margin={self.margin}, scale={self.scale}"


@HEADS.register
class CosMargin(nn.Module):
    """Additive cosine margin, CosFace (https://arxiv.org/abs/1801.09414): (B, embedding_size) -> (B, class_num).

    The target logit is scale * (cosine - margin).
    """

    def __init__(self, embedding_size: int, class_num: int, margin: float = 0.35, scale: float = 64.0):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(class_num, embedding_size)))
        self.margin, self.scale = margin, scale

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:  # (B, D), (B,) -> (B, class_num)
        cos = cosine(features, self.weight)
        if y is None or not self.training:
            return cos
        return self.scale * (cos - self.margin * F.one_hot(y, len(self.weight)))


@HEADS.register
class CircleMargin(nn.Module):
    """Circle loss at class level (https://arxiv.org/abs/2002.10857): (B, embedding_size) -> (B, class_num).

    Each logit is weighted by how far its cosine is from its optimum, 1 + margin for the target and -margin for the
    others; the weights pass no gradient on.
    """

    def __init__(self, embedding_size: int, class_num: int, margin: float, scale: float):
        super().__init__()
        self.weight = nn.Parameter(nn.init.xavier_normal_(torch.empty(class_num, embedding_size)))
        self.margin, self.scale = margin, scale

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:  # (B, D), (B,) -> (B, class_num)
        cos = cosine(features, self.weight)
        if y is None or not self.training:
            return cos
        positive = (1 + self.margin - cos.detach()).clamp_min(0) * (cos - 1 + self.margin)
        negative = (cos.detach() + self.margin).clamp_min(0) * (cos - self.margin)
        return self.scale * torch.where(F.one_hot(y, len(self.weight)).bool(), positive, negative)


@HEADS.register
class AdaMargin(nn.Module):
    """AdaFace (https://arxiv.org/abs/2204.00964): (B, embedding_size) -> (B, class_num); `m`, `h`, `s` as there.

    The margin grows with the length of the feature, which stands for the quality of the image. `t_alpha` is the rate
    at which mean and deviation of the lengths follow the batches; they are learnt in training only.
    """

    def __init__(self, embedding_size: int, class_num: int, m: float = 0.4, h: float = 0.333, s: float = 64.0,
                 t_alpha: float = 1.0):
        super().__init__()
        weight = torch.empty(class_num, embedding_size).uniform_(-1, 1)
        self.weight = nn.Parameter(F.normalize(weight))
        self.m, self.h, self.s, self.t_alpha = m, h, s, t_alpha
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor:  # (B, D), (B,) -> (B, class_num)
        cos = cosine(features, self.weight)
        if y is None or not self.training:
            return cos
        quality = self.quality(torch.linalg.vector_norm(features.detach().float(), dim=1, keepdim=True))  # (B, 1)
        theta = cos.clamp(-1 + 1e-3, 1 - 1e-3).acos()  # away from the ends, where the slope of acos is infinite
        target = (theta - self.m * quality).clamp(1e-3, math.pi - 1e-3).cos() - self.m * (1 + quality)
        return self.s * torch.where(F.one_hot(y, len(self.weight)).bool(), target, theta.cos())

    @torch.no_grad()
    def quality(self, length: Tensor) -> Tensor:
        "(B, 1) in -1..1: how long a feature is among those seen, after its batch has been counted."
        length = length.clamp(1e-3, 100)
        if len(length) > 1:  # one feature has no deviation
            self.mean.lerp_(length.mean(), self.t_alpha)
            self.std.lerp_(length.std(), self.t_alpha)
        return (self.h * (length - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
