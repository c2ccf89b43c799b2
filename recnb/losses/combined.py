"""Losses over the model's output dict: `loss(out, y) -> scalar`, and their weighted sum.

A loss reads the entry of the dict that it needs (`logits` or `features`) and is right for any batch: identities in any
order, in uneven numbers, or seen only once.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from recnb.distributed.processes import everyone, ranks
from recnb.distributed.rows import PartialLogits
from recnb.models.heads import check_labels, precise, unit
from recnb.registry import Positive, Registry

LOSSES = Registry("loss", beside={"weight": float})


@LOSSES.register
class CELoss(nn.Module):
    """Cross entropy of `logits` (B, class_num), averaged.

    PartialLogits, of classes drawn or divided over ranks, say themselves which of their columns a row's class is.

    Args:
        epsilon: smooths the labels: (1 - epsilon) + epsilon / class_num for the own class.
    """

    needs_logits, of_each_image = True, True

    def __init__(self, epsilon: float | None = None):
        super().__init__()
        self.epsilon = epsilon or 0.0

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        if isinstance(out["logits"], PartialLogits):
            return out["logits"].cross_entropy(self.epsilon)
        check_labels(y, out["logits"].shape[1], "the logits")
        return F.cross_entropy(precise(out["logits"]), y, label_smoothing=self.epsilon)


def in_blocks(per_row: Callable, features: Tensor, y: Tensor, chunk: int | None = None) -> tuple[Tensor, ...]:
    """Return what `per_row` makes of the rows of a batch, `chunk` rows at a time: tensors (B,).

    Blocks are computed anew for their gradients, so that memory grows with B x chunk and not with B x B; values and
    gradients are the same.

    Args:
        per_row: of (rows (C, D), features (B, D), positive (C, B), negative (C, B)) gives a tuple of tensors (C,);
            positives are without the row itself.
        features: (B, D).
        y: (B,) labels.
        chunk: rows of a block; None: all at once.

    Raises:
        ValueError: The chunk is below 1.
    """
    if chunk is not None and chunk < 1:
        raise ValueError(f"chunk is {chunk}: a block has one row at least")

    def block(rows: Tensor, first: int) -> tuple[Tensor, ...]:
        own = torch.arange(first, first + len(rows), device=y.device)[:, None]
        same = y[own] == y
        return per_row(rows, features, same & (own != torch.arange(len(y), device=y.device)), ~same)

    if chunk is None or chunk >= len(features):
        return block(features, 0)
    parts = [
        checkpoint(block, rows, i * chunk, use_reentrant=False, preserve_rng_state=False)
        for i, rows in enumerate(features.split(chunk))
    ]
    return tuple(map(torch.cat, zip(*parts, strict=True)))


@LOSSES.register
class SupConLoss(nn.Module):
    """Supervised contrastive loss (https://arxiv.org/abs/2004.11362, equation 2), averaged over anchors.

    For an anchor, minus the mean over its positives of the log-softmax of the similarities to all other items, times
    temperature / base_temperature. Positives are found by label; an anchor that has none does not count, and a batch
    without any gives 0.

    Args:
        views: changes nothing: the original needs to be told how many consecutive rows share an identity.
        temperature: what similarities are divided by.
        contrast_mode: `all` rows are anchors, or `one`, the first of each identity.
        base_temperature: see above.
        normalize_feature: whether features are brought to length 1.
        feature_from: the model's output that is compared.
        chunk: rows of the matrix of similarities (B, B) in memory at a time, by default all.
    """

    def __init__(
        self,
        views: int = 16,
        temperature: Positive = 0.07,
        contrast_mode: str = "all",
        base_temperature: Positive = 0.07,
        normalize_feature: bool = True,
        feature_from: str = "features",
        chunk: int | None = None,
    ):
        super().__init__()
        if contrast_mode not in ("all", "one"):
            raise ValueError(f"contrast_mode is '{contrast_mode}', only 'all' and 'one' exist")
        self.views, self.contrast_mode, self.feature_from = views, contrast_mode, feature_from
        self.temperature, self.base_temperature = temperature, base_temperature
        self.normalize_feature, self.chunk = normalize_feature, chunk

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = precise(out[self.feature_from]).flatten(1)
        features = unit(features) if self.normalize_feature else features
        loss, anchor = in_blocks(self.per_row, features, y, self.chunk)
        if self.contrast_mode == "one":
            anchor = anchor & first_rows(y)
        return torch.where(anchor, loss, 0).sum() / anchor.sum().clamp_min(1) * self.temperature / self.base_temperature

    def per_row(self, rows: Tensor, features: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss of each row as an anchor, whether it is one), in blocks."""
        with torch.autocast(features.device.type, enabled=False):
            similarity = rows @ features.T / self.temperature  # (C, B)
        others = similarity.masked_fill(~(positive | negative), torch.finfo(similarity.dtype).min)
        log_probability = similarity - others.logsumexp(1, keepdim=True)
        count = positive.sum(1)
        return -torch.where(positive, log_probability, 0).sum(1) / count.clamp_min(1), count > 0


def first_rows(y: Tensor) -> Tensor:
    """Return (B,) whether a row is the first of its identity."""
    order = y.argsort(stable=True)
    return torch.ones_like(y, dtype=torch.bool).scatter(0, order[1:], y[order].diff() != 0)


class CombinedLoss(nn.Module):
    """The weighted sum of several losses.

    Of several processes, each averages the losses `of_each_image` over its own batch; the others see the images of all.

    Args:
        weighted: pairs of a weight and a loss.
        kinds: what the losses are called; None: by their classes.

    Attributes:
        names: tell the terms apart (a second SupConLoss is SupConLoss_2).
        terms: the last value of each by its name, before weighting, detached.
        needs_logits: whether any term does; a term that says nothing does not.
    """

    def __init__(self, weighted: list[tuple[float, nn.Module]], kinds: list[str] | None = None):
        super().__init__()
        self.weights = [weight for weight, _ in weighted]
        self.losses = nn.ModuleList(loss for _, loss in weighted)
        kinds = kinds or [type(loss).__name__ for loss in self.losses]
        seen = [kinds[: i + 1].count(kind) for i, kind in enumerate(kinds)]
        self.names = [kind if n == 1 else f"{kind}_{n}" for kind, n in zip(kinds, seen, strict=True)]
        self.terms: dict[str, Tensor] = {}
        self.needs_logits = any(getattr(loss, "needs_logits", False) for loss in self.losses)

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        together = everyone(out, y) if self.training and ranks()[1] > 1 else (out, y)
        values = [loss(out, y) if getattr(loss, "of_each_image", False) else loss(*together) for loss in self.losses]
        self.terms = {name: value.detach() for name, value in zip(self.names, values, strict=True)}
        return sum(weight * value for weight, value in zip(self.weights, values, strict=True))
