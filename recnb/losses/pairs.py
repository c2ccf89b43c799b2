"""Losses over pairs of a batch: triplets, margins between the hardest pairs, N-pairs, and codes for hashing.

All read one B x B matrix and two masks, who is of whose identity, so that batches may hold identities in any order and
number. Where the original demands P identities x K consecutive rows, these agree with it on such a batch and go on
elsewhere: a row without a positive or without a negative is no anchor.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.losses.combined import LOSSES, in_blocks
from recnb.models.heads import precise, unit


def masks(y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(B, B) positives without the row itself, (B, B) negatives, (B,) rows that have one of each."""
    same = y[:, None] == y
    positive = same & ~torch.eye(len(y), dtype=torch.bool, device=y.device)
    return positive, ~same, positive.any(1) & ~same.all(1)


def squared_distances(x: Tensor, to: Tensor | None = None) -> Tensor:  # (B, D), (M, D) -> (B, M)
    """Squared Euclidean distances to the rows of `to`, by default those of `x`, in float32 and never below 0."""
    to = x if to is None else to
    with torch.autocast(x.device.type, enabled=False):
        return (x.square().sum(1)[:, None] + to.square().sum(1) - 2 * x @ to.T).clamp_min(0)


def products(a: Tensor, b: Tensor) -> Tensor:  # (B, D), (M, D) -> (B, M)
    """Inner products in float32 under autocast too: cosines where the rows have length 1."""
    with torch.autocast(a.device.type, enabled=False):
        return a @ b.T


def rows(out: dict[str, Tensor], feature_from: str, normalize: bool) -> Tensor:
    """Return (B, D) of the outputs `out[feature_from]`, in float32 at least, at length 1 with `normalize`."""
    features = precise(out[feature_from]).flatten(1)
    return unit(features) if normalize else features


def mean(values: Tensor, counted: Tensor) -> Tensor:
    """The mean over the rows that count, 0 where none does; the others pass no gradient on."""
    return torch.where(counted, values, 0).sum() / counted.sum().clamp_min(1)


def hardest(matrix: Tensor, mask: Tensor, largest: bool) -> Tensor:  # (B, B) -> (B,)
    """Return the largest or smallest entry of each row under the mask; 0 where the mask is empty."""
    filled = matrix.masked_fill(~mask, -math.inf if largest else math.inf)
    value = filled.amax(1) if largest else filled.amin(1)
    return torch.where(mask.any(1), value, 0)


@LOSSES.register
class TripletLossV2(nn.Module):
    """Batch-hard triplet loss (https://arxiv.org/abs/1703.07737): the farthest positive against the nearest negative.

    The mean over anchors of [d(anchor, positive) - d(anchor, negative) + margin]+, d the Euclidean distance.

    Args:
        margin: by how much a negative shall be farther.
        normalize_feature: whether features are brought to length 1.
        feature_from: the model's output that is compared.
        chunk: rows of the matrix of pairs (B, B) in memory at a time; None: all.
    """

    def __init__(
        self,
        margin: float = 0.5,
        normalize_feature: bool = True,
        feature_from: str = "features",
        chunk: int | None = None,
    ):
        super().__init__()
        self.margin, self.normalize_feature, self.feature_from = margin, normalize_feature, feature_from
        self.chunk = chunk

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, self.feature_from, self.normalize_feature)
        gap, anchor = in_blocks(self.gaps, features, y, self.chunk)
        return mean((gap + self.margin).clamp_min(0), anchor)

    @staticmethod
    def gaps(x: Tensor, features: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """(how much farther each row's farthest positive is than its nearest negative, whether it has both)."""
        distance = squared_distances(x, features).clamp_min(1e-12).sqrt()
        gap = hardest(distance, positive, True) - hardest(distance, negative, False)
        return gap, positive.any(1) & negative.any(1)


@LOSSES.register
def TripletLoss(margin: float = 1.0, feature_from: str = "features", chunk: int | None = None) -> TripletLossV2:
    """TripletLossV2 over features as they come, not normalised.

    Args:
        margin: by how much a negative shall be farther.
        feature_from: the model's output that is compared.
        chunk: rows of the matrix of pairs (B, B) in memory at a time; None: all.
    """
    return TripletLossV2(margin, False, feature_from, chunk)


@LOSSES.register
class TripletAngularMarginLoss(nn.Module):
    """Batch-hard triplets in cosines: the mean of [s(anchor, negative) - s(anchor, positive) + margin]+.

    The original counts 1 instead of 0 for the last of the absolute terms where it is satisfied: a constant without a
    gradient, left out here.

    Args:
        feature_from: the model's output that is compared.
        margin: by how much a positive shall be more alike.
        normalize_feature: whether features are brought to length 1.
        add_absolute: whether [ap_value - s(anchor, positive)]+ and [s(anchor, negative) - an_value]+ are added.
        absolute_loss_weight: what these count.
        ap_value: the least cosine of a positive.
        an_value: the largest cosine of a negative.
        reduction: there is mean only.
        chunk: rows of the matrix of pairs (B, B) in memory at a time; None: all.

    Raises:
        ValueError: The reduction is another.
    """

    def __init__(
        self,
        feature_from: str = "features",
        margin: float = 0.5,
        normalize_feature: bool = True,
        add_absolute: bool = False,
        absolute_loss_weight: float = 1.0,
        ap_value: float = 0.9,
        an_value: float = 0.5,
        reduction: str = "mean",
        chunk: int | None = None,
    ):
        super().__init__()
        if reduction != "mean":
            raise ValueError(f"reduction is '{reduction}', only 'mean' makes one number of a batch")
        self.feature_from, self.margin, self.normalize_feature = feature_from, margin, normalize_feature
        self.absolute_loss_weight = absolute_loss_weight if add_absolute else 0.0
        self.ap_value, self.an_value, self.chunk = ap_value, an_value, chunk

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, self.feature_from, self.normalize_feature)

        def block(x: Tensor, to: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
            return self.per_row(products(x, to), positive, negative)

        return mean(*in_blocks(block, features, y, self.chunk))

    def between(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of the rows of a matrix of similarities (B, M), with the masks of its positives and negatives."""
        return mean(*self.per_row(similarity, positive, negative))

    def per_row(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss of each row as an anchor, whether it is one)."""
        near, far = hardest(similarity, negative, True), hardest(similarity, positive, False)
        loss = (near - far + self.margin).clamp_min(0)
        absolute = (self.ap_value - far).clamp_min(0) + (near - self.an_value).clamp_min(0)
        return loss + self.absolute_loss_weight * absolute, positive.any(1) & negative.any(1)


@LOSSES.register
class PairwiseCosface(nn.Module):
    """Softplus of the log-sum-exps over positive and negative cosines, with a margin (as in fast-reid's pairwise form).

    The mean over anchors of softplus(LSE(-gamma s_p) + LSE(gamma (s_n + margin))).

    Args:
        margin: by how much a positive shall be more alike.
        gamma: what the cosines are multiplied by.
        feature_from: the model's output that is compared.
        chunk: rows of the matrix of pairs (B, B) in memory at a time; None: all.
    """

    def __init__(self, margin: float, gamma: float, feature_from: str = "features", chunk: int | None = None):
        super().__init__()
        self.margin, self.gamma, self.feature_from, self.chunk = margin, gamma, feature_from, chunk

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        return mean(*in_blocks(self.per_row, rows(out, self.feature_from, True), y, self.chunk))

    def per_row(self, x: Tensor, features: Tensor, positive: Tensor, negative: Tensor) -> tuple[Tensor, Tensor]:
        """(the loss of each row as an anchor, whether it is one), in blocks."""
        anchor, similarity = positive.any(1) & negative.any(1), products(x, features)
        least = torch.finfo(similarity.dtype).min
        near = (-self.gamma * similarity).masked_fill(~positive, least).logsumexp(1)
        far = (self.gamma * (similarity + self.margin)).masked_fill(~negative, least).logsumexp(1)
        return F.softplus(torch.where(anchor, near + far, 0)), anchor


@LOSSES.register
class TriHardLoss(nn.Module):
    """Batch-hard triplets of squared distances of unit features: mean [max d2(a, p) - min d2(a, n) + margin]+.

    Args:
        batch_size: changes nothing: the original needs to be told.
        samples_each_class: likewise.
        margin: by how much a negative shall be farther, in squared distance.
    """

    def __init__(self, batch_size: int = 120, samples_each_class: int = 2, margin: float = 0.1):
        super().__init__()
        self.margin = margin

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        positive, negative, anchor = masks(y)
        distance = squared_distances(rows(out, "features", True))
        gap = hardest(distance, positive, True) - hardest(distance, negative, False)
        return mean((gap + self.margin).clamp_min(0), anchor)


@LOSSES.register
class MSMLoss(nn.Module):
    """Margin sample mining (https://arxiv.org/abs/1710.00478), over squared distances of normalised features.

    [largest of all positive pairs - smallest of all negative pairs + margin]+, one value a batch.
    The original's gradient is twice this one: it counts a pair's two entries in the matrix of distances.

    Args:
        batch_size: changes nothing: the original needs to be told.
        samples_each_class: likewise.
        margin: by how much the nearest negative shall be farther, in squared distance.
    """

    def __init__(self, batch_size: int = 120, samples_each_class: int = 2, margin: float = 0.1):
        super().__init__()
        self.margin = margin

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        positive, negative, anchor = masks(y)
        distance = squared_distances(rows(out, "features", True))
        far, near = hardest(distance, positive, True).max(), distance.masked_fill(~negative, math.inf).min()
        return mean((far - near + self.margin).clamp_min(0).expand(len(y)), anchor.any().expand(len(y)))


@LOSSES.register
class EmlLoss(nn.Module):
    """A smooth bound on the gap of the hardest pairs over squared distances of features as they come.

    With b the gap and t the product of the means of exp(min - d2) over negatives and of exp(d2 - max) over positives,
    the mean over anchors of log(1 + beta t exp(b)) / log(1 + beta).

    Args:
        batch_size: changes nothing: the original needs to be told.
        samples_each_class: likewise.
        thresh: the gap beyond which the exponential is not taken.
        beta: how near the bound is.
    """

    def __init__(self, batch_size: int = 40, samples_each_class: int = 2, thresh: float = 20.0, beta: float = 100000.0):
        super().__init__()
        self.thresh, self.beta = thresh, beta

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        positive, negative, anchor = masks(y)
        distance = squared_distances(rows(out, "features", False))
        far, near = hardest(distance, positive, True), hardest(distance, negative, False)
        gap = far - near
        behind = torch.where(negative, (near[:, None] - distance).clamp_max(0).exp(), 0).sum(1)
        before = torch.where(positive, (distance - far[:, None]).clamp_max(0).exp(), 0).sum(1)
        pairs = (negative.sum(1) * positive.sum(1)).clamp_min(1)
        spread = torch.where(anchor, behind * before / pairs, 1)
        small = torch.log1p(self.beta * spread * gap.clamp_max(self.thresh).exp())
        large = spread.log() + gap + math.log(self.beta)
        return mean(torch.where(gap <= self.thresh, small, large) / math.log1p(self.beta), anchor)


@LOSSES.register
class NpairsLoss(nn.Module):
    """Multi-class N-pair loss (Sohn, NIPS 2016): cross entropy of each anchor's products with all pairs' positives.

    Rows of an identity are paired in their order, an odd one is left out. Two pairs of one identity are negatives of
    each other, as in the original.

    Args:
        reg_lambda: half of it, times the mean squared length of the features, is added.
    """

    def __init__(self, reg_lambda: float = 0.01):
        super().__init__()
        self.reg_lambda = reg_lambda

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, "features", False)
        order = torch.argsort(y, stable=True)
        nth = (y[order] == y[order][:, None]).tril(-1).sum(1)  # how many rows of the identity came before
        paired = (nth % 2 == 1).nonzero().flatten()
        anchors, positives = features[order[paired - 1]], features[order[paired]]
        regular = self.reg_lambda / 2 * features.square().sum(1).mean()
        if not len(paired):
            return regular
        return F.cross_entropy(products(anchors, positives), torch.arange(len(paired), device=y.device)) + regular


@LOSSES.register
class ContrastiveLoss(nn.Module):
    """Per row, the sum of 1 - s over positives and of s over negatives with a cosine s above the margin; their mean.

    As in cross-batch memory (https://arxiv.org/abs/1912.06798). The original mistakes the shape of the labels here.

    Args:
        margin: negatives below it count nothing.
        embedding_size: changes nothing: the original needs to be told.
        normalize_feature: whether features are brought to length 1.
        epsilon: positives within it of 1 count nothing.
        feature_from: the model's output that is compared.
    """

    def __init__(
        self,
        margin: float = 0.5,
        embedding_size: int | None = None,
        normalize_feature: bool = True,
        epsilon: float = 1e-5,
        feature_from: str = "features",
    ):
        super().__init__()
        self.margin, self.normalize_feature, self.epsilon = margin, normalize_feature, epsilon
        self.feature_from = feature_from

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, self.feature_from, self.normalize_feature)
        same = y[:, None] == y
        return self.between(products(features, features), same, ~same)

    def between(self, similarity: Tensor, positive: Tensor, negative: Tensor) -> Tensor:
        """The loss of the rows of a matrix of similarities (B, M), with the masks of its positives and negatives."""
        near = torch.where(positive & (similarity < 1 - self.epsilon), 1 - similarity, 0)
        far = torch.where(negative & (similarity > self.margin), similarity, 0)
        return (near + far).sum() / len(similarity)
