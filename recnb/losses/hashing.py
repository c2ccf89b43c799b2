"""Losses for hashing: the signs of the features are the code, and codes of one identity should agree.

They take the features of a Tanh or sigmoid end as they come.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.losses.combined import LOSSES
from recnb.losses.pairs import rows, squared_distances
from recnb.models.heads import check_labels, precise


@LOSSES.register
class DSHSDLoss(nn.Module):
    """Deep supervised hashing (Liu et al., CVPR 2016) beside the cross entropy of `logits`.

    The mean over all pairs of half the squared distance within an identity, and of half of what is missing to 2 D
    between two, D the length of the code.

    Args:
        alpha: what the pairs count.
        multi_label: an image has one identity here, so that it can only be False.

    Raises:
        ValueError: Several labels are asked for.
    """

    needs_logits = True

    def __init__(self, alpha: float, multi_label: bool = False):
        super().__init__()
        if multi_label:
            raise ValueError("multi_label: an image has one identity here; leave it False")
        self.alpha = alpha

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, "features", False)
        check_labels(y, out["logits"].shape[1], "the logits")
        distance = squared_distances(features)
        missing = (2 * features.shape[1] - distance).clamp_min(0)
        pairs = torch.where(y[:, None] == y, distance, missing) / 2
        return F.cross_entropy(precise(out["logits"]), y) + self.alpha * pairs.mean()


@LOSSES.register
class LCDSHLoss(nn.Module):
    """Locality-constrained deep supervised hashing: likelihood of each pair, and how little the signs change it.

    The mean over pairs of log(1 + exp(-s f.f' / 2)), s 1 within an identity and -1 otherwise, and the mean squared
    difference of the pair's probability by features and by their signs.

    Args:
        n_class: changes nothing: labels are compared.
        _lambda: what the difference counts.
    """

    def __init__(self, n_class: int | None = None, _lambda: float = 3.0):
        super().__init__()
        self._lambda = _lambda

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, "features", False)
        with torch.autocast(features.device.type, enabled=False):
            product, coded = ((x @ x.T / 2).clamp(-50, 50) for x in (features, features.sign()))
        likelihood = F.softplus(torch.where(y[:, None] == y, -product, product)).mean()
        return likelihood + self._lambda * (product.sigmoid() - coded.sigmoid()).square().mean()


@LOSSES.register
class DCHLoss(nn.Module):
    """Deep Cauchy hashing (Cao et al., CVPR 2018): Cauchy cross entropy of pairs and a Cauchy quantisation loss.

    With d = D / 2 (1 - cosine), the weighted mean over pairs of s log(d / gamma) + log(1 + gamma / d), s 1 within an
    identity and else 0, each kind weighing the same, and the mean of log(1 + d(|f|, 1) / gamma).

    Args:
        gamma: the scale of the Cauchy distribution.
        _lambda: what the second mean counts.
        n_class: changes nothing: labels are compared.
    """

    def __init__(self, gamma: float, _lambda: float, n_class: int | None = None):
        super().__init__()
        self.gamma, self._lambda = gamma, _lambda

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features, same = rows(out, "features", False), y[:, None] == y
        distance = self.distance(features[:, None], features)  # (B, B)
        share = same.float().mean()
        weight = torch.where(same, 1 / share, 1 / (1 - share).clamp_min(1 / same.numel()))
        pairs = torch.where(same, (distance / self.gamma).log(), 0) + torch.log1p(self.gamma / distance)
        rounding = torch.log1p(self.distance(features.abs(), torch.ones_like(features)) / self.gamma)
        return (weight * pairs).mean() + self._lambda * rounding.mean()

    def distance(self, a: Tensor, b: Tensor) -> Tensor:
        """D / 2 (1 - cosine) over the last axis; the cosine up to 0.99, so that no logarithm is of 0."""
        return a.shape[-1] / 2 * (1 - F.cosine_similarity(a, b, dim=-1).clamp_max(0.99))
