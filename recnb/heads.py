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
