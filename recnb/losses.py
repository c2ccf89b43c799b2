"""Losses over the model's output dict: `loss(out, y) -> scalar`, and their weighted sum.

A loss reads the entry of the dict that it needs (`logits` or `features`) and is right for any batch: identities in any
order, in uneven numbers, or seen only once.
"""
from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.config import Registry, check_logits, items
from recnb.heads import unit

LOSSES = Registry("loss", "Loss.Train[]", "Loss.Eval[]", beside={"weight": float})


@LOSSES.register
class CELoss(nn.Module):
    "Cross entropy of `logits` (B, class_num), averaged; `epsilon` smooths the labels: (1 - epsilon) + epsilon / C."

    needs_logits = True

    def __init__(self, epsilon: float | None = None):
        super().__init__()
        self.epsilon = epsilon or 0.0

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        return F.cross_entropy(out["logits"].float(), y, label_smoothing=self.epsilon)


@LOSSES.register
class SupConLoss(nn.Module):
    """Supervised contrastive loss (https://arxiv.org/abs/2004.11362, equation 2), averaged over anchors.

    For an anchor, minus the mean over its positives of the log-softmax of the similarities to all other items, times
    temperature / base_temperature. Positives are found by label; an anchor that has none does not count, and a batch
    without any gives 0. `contrast_mode: one` takes each identity's first row as its only anchor. `views` changes
    nothing: the original needs to be told how many consecutive rows share an identity.
    """

    needs_logits = False

    def __init__(self, views: int = 16, temperature: float = 0.07, contrast_mode: str = "all",
                 base_temperature: float = 0.07, normalize_feature: bool = True, feature_from: str = "features"):
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode is '{contrast_mode}', only 'all' and 'one' exist")
        self.views, self.contrast_mode, self.feature_from = views, contrast_mode, feature_from
        self.temperature, self.base_temperature = temperature, base_temperature
        self.normalize_feature = normalize_feature

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = out[self.feature_from].float().flatten(1)
        with torch.autocast(features.device.type, enabled=False):
            features = unit(features) if self.normalize_feature else features
            similarity = features @ features.T / self.temperature  # (B, B)
        own = torch.eye(len(y), dtype=torch.bool, device=y.device)
        positive = (y[:, None] == y) & ~own
        others = similarity.masked_fill(own, torch.finfo(torch.float32).min)
        log_probability = similarity - others.logsumexp(1, keepdim=True)
        count = positive.sum(1)
        loss = -torch.where(positive, log_probability, 0).sum(1) / count.clamp_min(1)
        anchor = count > 0
        if self.contrast_mode == "one":
            anchor &= (positive.tril(-1).sum(1) == 0)
        return loss[anchor].sum() / anchor.sum().clamp_min(1) * self.temperature / self.base_temperature


class CombinedLoss(nn.Module):
    """The weighted sum of (weight, loss) pairs.

    `names` tells the terms apart (a second SupConLoss is SupConLoss_2) and `terms` holds the last value of each,
    before weighting, detached.
    """

    def __init__(self, weighted: list[tuple[float, nn.Module]], kinds: list[str] | None = None):
        super().__init__()
        self.weights = [weight for weight, _ in weighted]
        self.losses = nn.ModuleList(loss for _, loss in weighted)
        kinds = kinds or [type(loss).__name__ for loss in self.losses]
        seen = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
        self.names = [kind if n == 1 else f"{kind}_{n}" for kind, n in zip(kinds, seen, strict=True)]
        self.terms: dict[str, Tensor] = {}

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        values = [loss(out, y) for loss in self.losses]
        self.terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))


def build_loss(cfg: dict, where: str = "Loss.Train", classes: int | None = None,
               sizes: dict[str, int] | None = None) -> CombinedLoss:
    """The weighted sum of the losses at `where`; raises ConfigError where one needs a head and there is none.

    `classes` and `sizes` (of `features` and `backbone`, flat) fill in what a loss with centres or a memory leaves out.
    """
    weighted, kinds = [], []
    for place, name, args in items(cfg, where):
        known = {"num_classes": (classes, "the training identities are")} if classes else {}
        size = (sizes or {}).get(args.get("feature_from", "features"))
        if size:
            known |= dict.fromkeys(("feat_dim", "embedding_size"), (size, "the model gives features of size"))
        loss = LOSSES.build({"name": name, **args}, place, **known)
        if loss.needs_logits:
            check_logits(cfg, place, name)
        weighted.append((float(args.get("weight", 1.0)), loss))
        kinds.append(name)
    return CombinedLoss(weighted, kinds)
