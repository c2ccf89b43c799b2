"""Keep what pretraining knew: how far, how early and with what memory the backbone may leave where it starts.

A small set of images teaches a network little and can make it forget much. Each function here is one remedy; each is
off unless the section Retention asks for it.
"""

import copy
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

from recnb.data.loaders import ImageLoader, Loaders, over
from recnb.models.recmodel import RecModel
from recnb.training.adaptor import Callback
from recnb.training.evaluation import embed


@dataclass(kw_only=True)
class Retention:
    """What holds the backbone back while it is trained."""

    thaw_epoch: int = 0  # so many first epochs train only neck and head
    pull: float = 0.0  # how strongly each step pulls the backbone's weights towards the starting ones
    distill: float = 0.0  # weight of the cosine distance to the starting backbone's output for the same images
    imprint: bool = False  # whether the head's weights begin as the classes' mean embeddings


class Thaw(Callback):
    """Trains only what stands behind the backbone in the first `epochs`; its batch statistics rest as well."""

    def __init__(self, epochs: int):
        self.epochs = epochs

    def before_fit(self):
        self.own = [p for p in self.model.backbone.parameters() if p.requires_grad]

    def before_train(self):
        frozen = self.epoch < self.epochs
        for parameter in self.own:
            parameter.requires_grad_(not frozen)
        if frozen:
            self.model.backbone.eval()

    def after_fit(self):
        for parameter in self.own:
            parameter.requires_grad_(True)


class Pull(Callback):
    """L2-SP (https://arxiv.org/abs/1802.01483): weight decay towards the starting weights in place of zero.

    Decoupled from the gradient as AdamW's decay is: after each step, w <- w - lr * strength * (w - start).
    """

    def __init__(self, backbone: nn.Module, strength: float):
        self.strength = strength
        self.start = [(p, p.detach().clone()) for p in backbone.parameters() if p.requires_grad]

    def after_step(self):
        rates = {id(p): group["lr"] for group in self.opt.opt.param_groups for p in group["params"]}
        with torch.no_grad():
            for parameter, start in self.start:
                parameter.lerp_(start, rates[id(parameter)] * self.strength)


class Remember(Callback):
    """Adds `weight` times the mean cosine distance of the backbone's output to what it gave at the start.

    The starting backbone sees the same augmented images (feature distillation, https://arxiv.org/abs/2508.12137).
    """

    def __init__(self, backbone: nn.Module, weight: float):
        self.weight, self.start = weight, copy.deepcopy(backbone).eval().requires_grad_(False)

    def after_loss(self):
        if self.training:
            with torch.no_grad():
                before = self.start(self.xb[0])
            cosines = F.cosine_similarity(*(out.flatten(1).float() for out in (self.pred["backbone"], before)))
            self.learn.loss_grad = self.loss_grad + self.weight * (1 - cosines).mean()


def callbacks_of(model: RecModel, asked: Retention) -> list[Callback]:
    """Return the callbacks that a fit needs, made before its first step."""
    made = [Thaw(asked.thaw_epoch)] if asked.thaw_epoch else []
    made += [Pull(model.backbone, asked.pull)] if asked.pull else []
    return made + ([Remember(model.backbone, asked.distill)] if asked.distill else [])


def imprint(model: RecModel, loaders: Loaders) -> None:
    """Begin the head's class weights as the mean embeddings of the classes (https://arxiv.org/abs/1712.07136).

    They are of length 1, the mean being of normalised embeddings of the training images as the evaluation sees them.
    """
    features = F.normalize(embed(model, as_evaluated(loaders)))  # (N, D)
    means = torch.zeros(loaders.classes, features.shape[1])
    means.index_add_(0, torch.from_numpy(loaders.train.dataset.labels), features)
    head: Any = model.head
    with torch.no_grad():
        head.weight.copy_(F.normalize(means))


def fit_neck(model: RecModel, loaders: Loaders) -> None:
    """Let a neck that has a closed form fit itself to the backbone's outputs for the training images."""
    neck: Any = model.neck
    model.neck = None
    try:
        vectors = embed(model, as_evaluated(loaders))
    finally:
        model.neck = neck
    neck.fit(vectors)


def as_evaluated(loaders: Loaders) -> ImageLoader:
    """Return a loader of the training images in the order of their list, each as the evaluation sees it."""
    images, judged = loaders.train.dataset, loaders.query or loaders.train
    plain = images if images.features is not None else replace(images, transform=judged.dataset.transform)
    return over(judged, plain)
