"""Losses that remember: class centres that are learnt, and the embeddings of earlier batches.

What they remember is in parameters and buffers, so it moves to the device, is optimised and is kept in checkpoints with
the rest of the run.
"""

import torch
from torch import Tensor, nn

from recnb.losses.combined import LOSSES
from recnb.losses.pairs import ContrastiveLoss, TripletAngularMarginLoss, products, rows
from recnb.models.heads import check_labels


@LOSSES.register
class CenterLoss(nn.Module):
    """The mean squared distance of features to the learnt centre of their class (Wen et al., ECCV 2016).

    Centres of classes that no image has stay where they are. A distance counts up to 1e12.

    Args:
        num_classes: how many centres; left out in a config, the number of training identities.
        feat_dim: the size of the features, which may be left out likewise.
        feature_from: the model's output that is compared.
    """

    def __init__(self, num_classes: int, feat_dim: int, feature_from: str = "features"):
        super().__init__()
        self.feature_from = feature_from
        self.centers = nn.Parameter(torch.randn(num_classes, feat_dim))

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, self.feature_from, False)
        check_labels(y, len(self.centers), "CenterLoss")
        return (features - self.centers[y]).square().sum(1).clamp(1e-12, 1e12).mean()


class CrossBatchMemory(nn.Module):
    """The last `size` embeddings (size, D) with their labels, a ring (https://arxiv.org/abs/1912.06798).

    Rows not yet written have the label -1. Unlike in the original, a label of 0 is as good as any, a batch that does
    not fit goes round the end, and where it goes on is a part of the state.
    """

    features: Tensor
    labels: Tensor
    position: Tensor

    def __init__(self, size: int, feat_dim: int):
        super().__init__()
        if size < 1:
            raise ValueError(f"xbm_size is {size}: a memory holds one embedding at least")
        self.register_buffer("features", torch.zeros(size, feat_dim))
        self.register_buffer("labels", torch.full((size,), -1))
        self.register_buffer("position", torch.tensor(0))

    def add(self, features: Tensor, y: Tensor) -> None:
        """Write the rows (B, D) over the oldest ones, without their gradients."""
        features, y = features.detach()[-len(self.labels) :], y[-len(self.labels) :]
        places = (self.position + torch.arange(len(y), device=y.device)) % len(self.labels)
        self.features[places], self.labels[places] = features.to(self.features.dtype), y
        self.position.copy_((self.position + len(y)) % len(self.labels))

    def written(self) -> tuple[Tensor, Tensor]:
        """(features (M, D), labels (M,)) of all rows written so far."""
        known = self.labels >= 0
        return self.features[known], self.labels[known]

    def forward(self, x: Tensor) -> Tensor:  # (B, D) -> (B, M)
        return products(x, self.written()[0])


class AcrossBatches(nn.Module):
    """A pair loss within the batch and, weighted, between the batch and a memory of the batches before it.

    The batch is added to the memory before it is compared.

    Args:
        loss: what compares two sets of features.
        memory: of the batches before.
        xbm_weight: what the comparison with the memory counts.
        start_iter: so many training steps the memory is neither filled nor used, while embeddings still move fast.
    """

    steps: Tensor

    def __init__(
        self,
        loss: ContrastiveLoss | TripletAngularMarginLoss,
        memory: CrossBatchMemory,
        xbm_weight: float,
        start_iter: int,
    ):
        super().__init__()
        self.loss, self.memory, self.xbm_weight, self.start_iter = loss, memory, xbm_weight, start_iter
        self.register_buffer("steps", torch.tensor(0))

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        value = self.loss(out, y)
        if not self.training:
            return value
        self.steps += 1
        if self.steps <= self.start_iter:
            return value
        features = rows(out, self.loss.feature_from, self.loss.normalize_feature)
        self.memory.add(features, y)
        similarity, same = self.memory(features), y[:, None] == self.memory.written()[1]
        return value + self.xbm_weight * self.loss.between(similarity, same, ~same)


@LOSSES.register
def ContrastiveLoss_XBM(
    xbm_size: int,
    embedding_size: int,
    xbm_weight: float = 1.0,
    start_iter: int = 1000,
    margin: float = 0.5,
    epsilon: float = 1e-5,
    normalize_feature: bool = True,
    feature_from: str = "features",
) -> AcrossBatches:
    """ContrastiveLoss within the batch and with a memory (https://arxiv.org/abs/1912.06798).

    Args:
        xbm_size: how many embeddings the memory holds.
        embedding_size: their size; left out in a config, that of the features.
        xbm_weight: what the comparison with the memory counts.
        start_iter: so many training steps the memory is neither filled nor used.
        margin: as for ContrastiveLoss.
        epsilon: as there.
        normalize_feature: as there.
        feature_from: as there.
    """
    loss = ContrastiveLoss(margin, None, normalize_feature, epsilon, feature_from)
    return AcrossBatches(loss, CrossBatchMemory(xbm_size, embedding_size), xbm_weight, start_iter)


@LOSSES.register
def TripletAngularMarginLoss_XBM(
    start_iter: int,
    xbm_size: int,
    xbm_weight: float,
    feat_dim: int,
    margin: float = 0.5,
    normalize_feature: bool = True,
    add_absolute: bool = False,
    absolute_loss_weight: float = 1.0,
    ap_value: float = 0.9,
    an_value: float = 0.5,
    feature_from: str = "features",
) -> AcrossBatches:
    """TripletAngularMarginLoss within the batch and with a memory (https://arxiv.org/abs/1912.06798).

    Args:
        start_iter: so many training steps the memory is neither filled nor used.
        xbm_size: how many embeddings the memory holds.
        xbm_weight: what the comparison with the memory counts.
        feat_dim: the size of the embeddings; left out in a config, that of the features.
        margin: as for TripletAngularMarginLoss.
        normalize_feature: as there.
        add_absolute: as there.
        absolute_loss_weight: as there.
        ap_value: as there.
        an_value: as there.
        feature_from: as there.
    """
    loss = TripletAngularMarginLoss(
        feature_from, margin, normalize_feature, add_absolute, absolute_loss_weight, ap_value, an_value
    )
    return AcrossBatches(loss, CrossBatchMemory(xbm_size, feat_dim), xbm_weight, start_iter)
