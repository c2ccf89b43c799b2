"""Embeddings to class logits, for training only: ArcMargin and its family.

A head is called with labels while it trains and adds its margin to the true class; in evaluation, or without labels,
it returns the plain cosine. Its weight is kept and used in float32 whatever the precision of the features is, since a
margin of 0.1 rad and a scale of 80 leave no room for half precision.

For very many classes `sample_rate` takes, in each step, the classes of the batch and as many others as make that share
of all (Partial FC, https://arxiv.org/abs/2203.15565), and `sharded` divides the weight over the ranks of
torch.distributed. The logits are then PartialLogits, which CELoss takes.
"""

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.distributed.processes import all_rows, gather, ranks, share
from recnb.distributed.rows import PartialLogits, draw_rows
from recnb.models.necks import FC
from recnb.registry import Count, Registry

HEADS = Registry("head")
HEADS.register(FC)


def precise(x: Tensor) -> Tensor:
    """In float32 what comes in half precision; float64 stays."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def unit(x: Tensor, eps: float = 1e-12) -> Tensor:
    """Rows of length 1, precise; a zero row stays zero and passes no gradient on, where a division would give NaN."""
    x = precise(x)
    length = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return x / length.clamp_min(eps) * (length > eps)


def cosine(features: Tensor, weight: Tensor) -> Tensor:
    """Return the cosines (B, class_num) of features (B, D) and class weights (class_num, D), in float32 at least.

    A weight (class_num, K * D) holds K centres of each class, one behind the other: the nearest of them counts.
    """
    with torch.autocast(features.device.type, enabled=False):
        cosines = unit(features) @ unit(weight.reshape(-1, features.shape[1])).T
    if cosines.shape[1] == len(weight):
        return cosines
    return cosines.unflatten(1, (len(weight), -1)).max(2).values  # not amax(): its result must not be written over


def check_labels(y: Tensor, count: int, owner: str, wait: bool = False) -> None:
    """Raise ValueError unless all labels are classes.

    Args:
        y: (B,) labels.
        count: how many classes there are, from 0 on.
        owner: whose they are, for the message.
        wait: whether to ask on a GPU too, which takes a wait for the device; its own kernels stop at such a label.
    """
    if (wait or y.device.type == "cpu") and not ((y >= 0) & (y < count)).all():
        wrong = y[(y < 0) | (y >= count)][0].item()
        raise ValueError(f"a label is {wrong}, not among the {count} classes of {owner}")


def hold_classes(
    head: Any,
    embedding_size: Count,
    class_num: Count,
    sample_rate: float,
    sharded: bool,
    draw: Callable | None = None,
    sub_centers: int = 1,
) -> None:
    """Give a head its class weights (class_num, sub_centers * embedding_size), or this rank's share of their rows.

    Args:
        head: it also keeps the next four.
        embedding_size: D, the size of the features.
        class_num: how many classes there are.
        sample_rate: the share of the classes that a step takes.
        sharded: whether the rows are divided over the ranks of torch.distributed.
        draw: `draw(weight, generator)` fills the weight, or some of its rows; None: Xavier's normal distribution.
        sub_centers: centres of each class.

    Raises:
        ValueError: There is no centre, or the sample rate is no share.
    """
    if sub_centers < 1:
        raise ValueError(f"sub_centers is {sub_centers}: a class has one centre at least")
    if not 0 < sample_rate <= 1:
        raise ValueError(f"sample_rate is {sample_rate}, not a share of the classes above 0 and up to 1")
    head.class_num, head.sample_rate, head.sharded = class_num, sample_rate, sharded
    head.rows = share(class_num) if sharded else range(class_num)
    draw = draw or partial(xavier, math.sqrt(2 / (class_num + embedding_size)))
    weight = torch.empty(len(head.rows), sub_centers * embedding_size)
    head.weight = nn.Parameter(draw_rows(weight, head.rows, draw) if sharded else draw(weight))
    head.weight.sharded = sharded  # for what looks at a parameter alone, as clipping does


def xavier(std: float, weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The weight, filled with normal numbers of this deviation."""
    return nn.init.normal_(weight, 0, std, generator)


def margin_logits(head: Any, features: Tensor, y: Tensor | None) -> Tensor | PartialLogits:
    """Return the logits (B, class_num) of a batch; the cosines in evaluation and without labels.

    With a sample_rate below 1 the classes are drawn from torch's generator and the weight's gradient is sparse, of
    their rows alone. With `sharded` each rank gets the gradient of the mean over all ranks' images for its rows, which
    nothing must average again.

    Args:
        head: says what becomes of the cosine with a row's own class (`target`) and of the others (`others`).
        features: (B, D).
        y: (B,) labels.

    Raises:
        ValueError: A label is no class.
    """
    world = ranks()[1] if head.sharded else 1
    if y is None or not head.training:
        return cosine(features, torch.cat(all_rows(head.weight)) if world > 1 else head.weight)
    whole = world == 1 and head.sample_rate == 1
    check_labels(y, head.class_num, type(head).__name__, wait=not whole)
    if whole:
        return with_target(head, features, y, head.weight, y)
    if world > 1:
        features, y = gather(precise(features), factor=world), torch.cat(all_rows(y))
    here = (y >= head.rows.start) & (y < head.rows.stop)
    weight, column = head.weight, y - head.rows.start
    if head.sample_rate < 1:
        weight, column = sampled(head, column, here)
    logits = with_target(head, features, y, weight, torch.where(here, column, 0), here)
    return PartialLogits(logits, torch.where(here, column, -1), world > 1)


def sampled(head: Any, column: Tensor, here: Tensor) -> tuple[Tensor, Tensor]:  # (M,), (M,) -> (S, D), (M,)
    """Return the weights of the batch's classes and of others drawn, and where each row's class stands in them.

    Ranks that all hold the whole weight take the same rows of it, for the classes of all their batches.

    Args:
        head: has the weight (rows, D) and the share to draw.
        column: (M,) which row of the weight is that of each image's class.
        here: (M,) whether this rank has it.
    """
    chance, own = torch.rand(len(head.weight), device=column.device), column[here]
    if ranks()[1] > 1 and not head.sharded:
        dist.broadcast(chance, 0)
        own = torch.cat(all_rows(own))
    own = own.unique()
    chance[own] = 2
    count = max(round(head.sample_rate * len(head.weight)), len(own), 1)
    drawn = chance.topk(count, sorted=False).indices.sort().values
    return F.embedding(drawn, head.weight, sparse=True), torch.searchsorted(drawn, column)


def with_target(
    head: Any, features: Tensor, y: Tensor, weight: Tensor, column: Tensor, here: Tensor | None = None
) -> Tensor:
    """Return the logits (M, S), the target's margin added.

    One matrix serves for cosines and logits, and the margin is computed for one entry of a row.

    Args:
        head: as for `margin_logits`.
        features: (M, D).
        y: (M,) labels.
        weight: (S, D) of the classes.
        column: (M,) where each row's class stands among them.
        here: (M,) False for rows whose class stands elsewhere, which have no target among these; None: all are here.
    """
    cos = cosine(features, weight)
    own = torch.arange(len(cos), device=cos.device), column  # gather() would keep the matrix that is written over
    target = head.target(cos[own][:, None], features, y)
    logits = head.others(cos)
    if here is not None:
        target = torch.where(here[:, None], target, logits[own][:, None])
    return logits.scatter_(1, column[:, None], target)


def frequency_margins(
    counts: list[int], by: str = "frequency", low: float = 0.05, high: float = 0.5, power: float = -0.25
) -> Tensor:
    """Return a margin (class_num,) for each class, as in the Google Landmark recipe (https://arxiv.org/abs/2010.05350).

    Args:
        counts: how many images each class has.
        by: there is frequency only.
        low: the margin of the most frequent class, in radians.
        high: that of the rarest; between the two it goes with count ** power.
        power: see there.

    Raises:
        ValueError: It is to be by something else.
    """
    if by != "frequency":
        raise ValueError(f"a margin by '{by}' does not exist, only one by 'frequency'")
    size = torch.as_tensor(counts, dtype=torch.float64).clamp_min(1) ** power
    return (low + (high - low) * (size - size.min()) / (size.max() - size.min()).clamp_min(1e-12)).float()


@HEADS.register
class ArcMargin(nn.Module):
    """Additive angular margin, ArcFace (https://arxiv.org/abs/1801.07698): (B, embedding_size) -> (B, class_num).

    The target logit is scale * cos(theta + margin), margin in radians; beyond theta = pi - margin, where that would
    rise again, it continues as cosine - margin * sin(margin) (with `easy_margin`: the plain cosine for theta > pi / 2).

    Args:
        embedding_size: D, the size of the features.
        class_num: how many classes there are.
        margin: in radians; or `{by: frequency, low: 0.05, high: 0.5, power: -0.25}`, one for each class, larger for
            classes with fewer images (see `frequency_margins`).
        scale: what the cosines are multiplied by.
        easy_margin: whether obtuse angles get no margin.
        sample_rate: the share of the classes that a step takes, those of the batch included.
        sharded: whether the classes are divided over the ranks of torch.distributed.
        sub_centers: centres of each class, of which the nearest counts, for identities with wrong labels or several
            looks (sub-center ArcFace, Deng et al., ECCV 2020).
        class_counts: the number of images of each class, which a margin by frequency needs in training.
    """

    weight: nn.Parameter
    margins: Tensor | None

    def __init__(
        self,
        embedding_size: Count,
        class_num: Count,
        margin: float | dict = 0.5,
        scale: float = 80.0,
        easy_margin: bool = False,
        sample_rate: float = 1.0,
        sharded: bool = False,
        sub_centers: int = 1,
        class_counts: list | None = None,
    ):
        super().__init__()
        hold_classes(self, embedding_size, class_num, sample_rate, sharded, sub_centers=sub_centers)
        self.margin, self.scale, self.easy_margin, self.sub_centers = margin, scale, easy_margin, sub_centers
        margins = None
        if isinstance(margin, dict):
            counts = [*(class_counts or ()), *[0] * (class_num - len(class_counts or ()))]
            margins = frequency_margins(counts, **margin)
        self.register_buffer("margins", margins if class_counts else None, persistent=False)

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor | PartialLogits:  # (B, D), (B,) -> (B, C)
        return margin_logits(self, features, y)

    def margin_of(self, y: Tensor) -> Tensor:
        """Return the margin of labels (M,), in radians: one for all, or (M, 1)."""
        if not isinstance(self.margin, dict):
            return torch.tensor(self.margin, dtype=torch.float64)
        if self.margins is None:
            raise ValueError("a margin by frequency needs class_counts, the number of images of each class")
        return self.margins[y][:, None]

    def target(self, cos: Tensor, features: Tensor, y: Tensor) -> Tensor:  # (M, 1), (M, D), (M,) -> (M, 1)
        """The logit of a row's own class, from its cosine."""
        margin = self.margin_of(y)
        # 1e-6 as in the original: the square root's slope is infinite at 0, where a feature lies along its weight.
        sin = ((1 - cos.square()).clamp_min(0) + 1e-6).sqrt()
        phi = cos * margin.cos() - sin * margin.sin()
        if self.easy_margin:
            return self.scale * torch.where(cos > 0, phi, cos)
        return self.scale * torch.where(cos > -margin.cos(), phi, cos - margin * margin.sin())

    def others(self, cos: Tensor) -> Tensor:  # (M, S) -> (M, S)
        """The logits of the other classes, written over the cosines."""
        return cos.mul_(self.scale)

    def extra_repr(self) -> str:
        size = self.weight.shape[1] // self.sub_centers
        return f"embedding_size={size}, class_num={self.class_num}, margin={self.margin}, scale={self.scale}"


@HEADS.register
class CosMargin(nn.Module):
    """Additive cosine margin, CosFace (https://arxiv.org/abs/1801.09414): (B, embedding_size) -> (B, class_num).

    The target logit is scale * (cosine - margin). `margin: 0` is the normalised softmax, of which `scale: 16` on cached
    features is a strong probe (ILIAS, https://arxiv.org/abs/2502.11748).

    Args:
        embedding_size: D, the size of the features.
        class_num: how many classes there are.
        margin: taken from the cosine with a feature's own class.
        scale: what the cosines are multiplied by.
        sample_rate: the share of the classes that a step takes, those of the batch included.
        sharded: whether the classes are divided over the ranks of torch.distributed.
    """

    def __init__(
        self,
        embedding_size: Count,
        class_num: Count,
        margin: float = 0.35,
        scale: float = 64.0,
        sample_rate: float = 1.0,
        sharded: bool = False,
    ):
        super().__init__()
        hold_classes(self, embedding_size, class_num, sample_rate, sharded)
        self.margin, self.scale = margin, scale

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor | PartialLogits:  # (B, D), (B,) -> (B, C)
        return margin_logits(self, features, y)

    def target(self, cos: Tensor, features: Tensor, y: Tensor) -> Tensor:  # (M, 1), (M, D), (M,) -> (M, 1)
        """The logit of a row's own class, from its cosine."""
        return self.scale * (cos - self.margin)

    def others(self, cos: Tensor) -> Tensor:  # (M, S) -> (M, S)
        """The logits of the other classes, written over the cosines."""
        return cos.mul_(self.scale)


@HEADS.register
class CircleMargin(nn.Module):
    """Circle loss at class level (https://arxiv.org/abs/2002.10857): (B, embedding_size) -> (B, class_num).

    Each logit is weighted by how far its cosine is from its optimum, 1 + margin for the target and -margin for the
    others; the weights pass no gradient on.

    Args:
        embedding_size: D, the size of the features.
        class_num: how many classes there are.
        margin: how far from 1 and from 0 the optima and the boundaries lie.
        scale: what the weighted differences are multiplied by.
        sample_rate: the share of the classes that a step takes, those of the batch included.
        sharded: whether the classes are divided over the ranks of torch.distributed.
    """

    def __init__(
        self,
        embedding_size: Count,
        class_num: Count,
        margin: float,
        scale: float,
        sample_rate: float = 1.0,
        sharded: bool = False,
    ):
        super().__init__()
        hold_classes(self, embedding_size, class_num, sample_rate, sharded)
        self.margin, self.scale = margin, scale

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor | PartialLogits:  # (B, D), (B,) -> (B, C)
        return margin_logits(self, features, y)

    def target(self, cos: Tensor, features: Tensor, y: Tensor) -> Tensor:  # (M, 1), (M, D), (M,) -> (M, 1)
        """The logit of a row's own class, from its cosine."""
        return self.scale * (1 + self.margin - cos.detach()).clamp_min(0) * (cos - 1 + self.margin)

    def others(self, cos: Tensor) -> Tensor:  # (M, S) -> (M, S)
        """The logits of the other classes."""
        return self.scale * (cos.detach() + self.margin).clamp_min(0) * (cos - self.margin)


def uniform_directions(weight: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """The weight, filled with directions of uniform entries, at length 1."""
    return F.normalize(weight.uniform_(-1, 1, generator=generator))


@HEADS.register
class AdaMargin(nn.Module):
    """AdaFace (https://arxiv.org/abs/2204.00964): (B, embedding_size) -> (B, class_num).

    The margin grows with the length of the feature, which stands for the quality of the image.

    Args:
        embedding_size: D, the size of the features.
        class_num: how many classes there are.
        m: the margin, as in the paper.
        h: how much of it goes by the quality, likewise.
        s: what the cosines are multiplied by, likewise.
        t_alpha: the rate at which mean and deviation of the lengths follow the batches, in training only.
        sample_rate: the share of the classes that a step takes, those of the batch included.
        sharded: whether the classes are divided over the ranks of torch.distributed.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        embedding_size: Count,
        class_num: Count,
        m: float = 0.4,
        h: float = 0.333,
        s: float = 64.0,
        t_alpha: float = 1.0,
        sample_rate: float = 1.0,
        sharded: bool = False,
    ):
        super().__init__()
        hold_classes(self, embedding_size, class_num, sample_rate, sharded, uniform_directions)
        self.m, self.h, self.s, self.t_alpha = m, h, s, t_alpha
        self.register_buffer("mean", torch.tensor(20.0))
        self.register_buffer("std", torch.tensor(100.0))

    def forward(self, features: Tensor, y: Tensor | None = None) -> Tensor | PartialLogits:  # (B, D), (B,) -> (B, C)
        return margin_logits(self, features, y)

    def target(self, cos: Tensor, features: Tensor, y: Tensor) -> Tensor:  # (M, 1), (M, D), (M,) -> (M, 1)
        """The logit of a row's own class, from its cosine."""
        quality = self.quality(torch.linalg.vector_norm(precise(features.detach()), dim=1, keepdim=True))  # (M, 1)
        theta = cos.clamp(-1 + 1e-3, 1 - 1e-3).acos()  # away from the ends, where the slope of acos is infinite
        return self.s * ((theta - self.m * quality).clamp(1e-3, math.pi - 1e-3).cos() - self.m * (1 + quality))

    def others(self, cos: Tensor) -> Tensor:  # (M, S) -> (M, S)
        """The logits of the other classes, kept from the ends as well."""
        return self.s * cos.clamp(-1 + 1e-3, 1 - 1e-3)

    @torch.no_grad()
    def quality(self, length: Tensor) -> Tensor:
        """Return (B, 1) in -1..1, how long a feature is among those seen, its own batch included; lengths (B, 1)."""
        length = length.clamp(1e-3, 100)
        if len(length) > 1:  # one feature has no deviation
            self.mean.lerp_(length.mean(), self.t_alpha)
            self.std.lerp_(length.std(), self.t_alpha)
        return (self.h * (length - self.mean) / (self.std + 1e-3)).clamp(-1, 1)
