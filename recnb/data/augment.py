"""Augmentation by policy, and of whole batches: more transform_ops, and the batch_transform_ops that blend two images.

A policy draws a few of some fifteen ops and their strengths for each image; torchvision.transforms.v2 has them, and
the levels 0 to 10 of the original are mapped onto its magnitudes. What turning and shearing leave empty is filled with
grey, interpolated at best bilinearly, the finest that tensors have there. AugMix alone is written out, since
torchvision's takes three times as long and at the original's severity moves nothing; timm's shorthand, which has more
ops in it, gets torchvision's. All draws are on torch's global generator.

Left out: RandAugmentV2 and its ops SolarizeAdd and Cutout, the policies 'v0', 'v0r' and 'originalr', and FmixOperator,
none of which torchvision has and no feature-learning file of the original uses.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from statistics import NormalDist

import torch
from torch.nn.functional import one_hot
from torchvision.transforms import AutoAugmentPolicy, v2

from recnb.data.transforms import INTERPOLATION, MEAN, TRANSFORMS, affine_mode, of_bytes, per_channel, sometimes
from recnb.registry import Registry, Side, entry, fits, suggest

MIXING = "DataLoader.Train.dataset.batch_transform_ops"
BATCH_TRANSFORMS = Registry("batch transform")
COUNTED = "the number of training identities is"
GREY = [128, 128, 128]
RESAMPLING = [("nearest", False), ("bilinear", False), ("bicubic", False), ("bilinear", True)]  # True: antialiased
SETTINGS = {
    "rand": {"m": 10.0, "n": 2.0, "mstd": 0.0, "inc": 0.0},
    "original": {},  # timm's letters and defaults
    "augmix": {"m": 3.0, "w": 3.0, "d": -1.0, "a": 1.0},
}


# --- Policies ---------------------------------------------------------------------------------------------------------


@TRANSFORMS.register
def RandAugment(
    num_layers: int = 2, magnitude: int = 5, fillcolor: list | None = None, interpolation: str = "bicubic"
) -> v2.Transform:
    """RandAugment (https://arxiv.org/abs/1909.13719): `num_layers` random ops, each at level `magnitude` of 0 to 10.

    Strengths grow with the level for each op, as in the paper; the original's Posterize and Solarize weaken.
    """
    if not 0 <= magnitude <= 10 or num_layers < 1:
        raise ValueError(f"magnitude is {magnitude} and num_layers {num_layers}, not a level of 0 to 10 and 1 or more")
    fill = per_channel("fillcolor", fillcolor or GREY)
    return of_bytes("RandAugment", v2.RandAugment(num_layers, magnitude, 11, affine_mode(interpolation), fill))


@TRANSFORMS.register
def AutoAugment(fillcolor: list | None = None) -> v2.Transform:
    """The policy that AutoAugment found for ImageNet (https://arxiv.org/abs/1805.09501): one of its 25 pairs of ops."""
    fill = per_channel("fillcolor", fillcolor or GREY)
    return of_bytes("AutoAugment", v2.AutoAugment(AutoAugmentPolicy.IMAGENET, INTERPOLATION["bilinear"], fill))


@TRANSFORMS.register
def TrivialAugment(num_magnitude_bins: int = 31) -> v2.Transform:
    """TrivialAugment (https://arxiv.org/abs/2103.10158): one random op at one of `num_magnitude_bins` strengths."""
    if num_magnitude_bins < 2:
        raise ValueError(f"num_magnitude_bins is {num_magnitude_bins}, and there must be 2 strengths or more")
    return of_bytes("TrivialAugment", v2.TrivialAugmentWide(num_magnitude_bins, INTERPOLATION["bilinear"], GREY))


@TRANSFORMS.register
def TimmAutoAugment(
    config_str: str = "rand-m9-mstd0.5-inc1",
    interpolation: str = "bicubic",
    img_size: Side | list[Side] = 224,
    mean: list | None = None,
    prob: float = 1.0,
) -> v2.Transform:
    """A policy in timm's shorthand, with probability `prob`.

    rand-m9-n2-mstd0.5-inc1: n ops, each with probability 0.5, at a level drawn from the normal distribution of mean m
    and deviation mstd, within 0 to 10. augmix-m3-w3-d2-a1: AugMix of severity m, width w, depth d (1 to 3 at random
    where left out) and coefficient a. original: AutoAugment's policy for ImageNet. `mean` (0 to 1) is the fill colour.
    Translations go by the image itself, so that `img_size` has no effect.
    """
    kind, numbers = shorthand(config_str)
    look = {
        "interpolation": affine_mode(interpolation),
        "fill": [min(255, round(255 * m)) for m in per_channel("mean", mean or MEAN)],
    }
    if kind == "rand":
        policy = layers(config_str, look, **numbers)
    elif kind == "augmix":
        policy = v2.AugMix(int(numbers["m"]), int(numbers["w"]), int(numbers["d"]), numbers["a"], **look)
    else:
        policy = v2.AutoAugment(AutoAugmentPolicy.IMAGENET, **look)
    return of_bytes("TimmAutoAugment", policy, prob)


def shorthand(text: str) -> tuple[str, dict]:
    """('rand', {'m': 9.0, ...}) of 'rand-m9'; raises ValueError for a part that is unknown here."""
    kind, *parts = text.split("-")
    if kind not in SETTINGS:
        raise ValueError(f"config_str '{text}' begins with '{kind}'; {suggest(kind, SETTINGS)}")
    numbers = dict(SETTINGS[kind])
    for part in parts:
        match = re.fullmatch(r"([a-z]+)(\d+(?:\.\d+)?)", part)
        if match is None or match[1] not in numbers:
            raise ValueError(
                f"config_str '{text}': '{part}' has no meaning here after '{kind}'; "
                f"{suggest('', (f'{key}NUMBER' for key in numbers))}"
            )
        numbers[match[1]] = float(match[2])
    return kind, numbers


def layers(text: str, look: dict, m: float, n: float, mstd: float, inc: float) -> v2.Transform:
    """timm's RandAugment: a normal distribution of levels is 21 equally likely ones, in steps of a tenth."""
    if inc == 0 or not 0 <= m <= 10 or n < 1:
        raise ValueError(
            f"config_str '{text}': write inc1, since torchvision's ops always grow with their level, "
            "a level m from 0 to 10 and n of 1 or more"
        )
    drawn = [NormalDist(m, mstd).inv_cdf((i + 0.5) / 21) for i in range(21)] if mstd else [m]
    steps = [round(10 * min(10, max(0, level))) for level in drawn]
    layer = v2.RandomChoice([v2.RandAugment(1, step, 101, **look) for step in steps])
    return v2.Compose([sometimes(0.5, layer)] * int(n))


# --- Single ops -------------------------------------------------------------------------------------------------------


@TRANSFORMS.register
def RandomApply(transforms: list, p: float = 0.5) -> v2.Transform:
    """A list of transforms, `- Name: {arguments}` each, applied all together with probability `p`."""
    ops = [
        TRANSFORMS.build({"name": name, **args}, place)
        for place, name, args in (entry(item, f"transforms.{i}") for i, item in enumerate(transforms))
    ]
    return sometimes(p, *ops, key="p")


@TRANSFORMS.register
def RandomInterpolationAugment(prob: float = 1.0) -> v2.Transform:
    """With probability `prob`, shrunk to a square of 0.2 to 1 times the height and back, each by a random filter.

    From AdaFace (https://arxiv.org/abs/2204.00964): low resolution. OpenCV's Lanczos filter is not among them.
    """
    return sometimes(prob, v2.Lambda(resampled))


def resampled(image: torch.Tensor) -> torch.Tensor:
    """(3, H, W) of the same size, after a smaller one."""
    height, width = image.shape[-2:]
    side = max(1, int(height * (0.2 + 0.8 * torch.rand(()).item())))
    for size in ([side, side], [height, width]):
        name, antialias = RESAMPLING[int(torch.randint(len(RESAMPLING), ()))]
        image = v2.functional.resize(image, size, INTERPOLATION[name], antialias=antialias)
    return image


@TRANSFORMS.register
def Cutout(n_holes: int = 1, length: int = 112) -> v2.Transform:
    """Cutout (https://arxiv.org/abs/1708.04552): `n_holes` squares of `length` pixels set to 0, around random pixels.

    A hole near the border loses what is outside. 0 is black, after NormalizeImage the data set's mean colour.
    """
    if n_holes < 1 or length < 1:
        raise ValueError(f"n_holes is {n_holes} and length {length}, and both must be at least 1")
    return v2.Lambda(partial(with_holes, n_holes, length))


def with_holes(n_holes: int, length: int, image: torch.Tensor) -> torch.Tensor:
    """A copy of the image (3, H, W) with the holes in it."""
    image = image.clone()
    for _ in range(n_holes):
        top, left = (int(torch.randint(side, ())) - length // 2 for side in image.shape[-2:])
        image[..., max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = 0
    return image


# --- Batches ----------------------------------------------------------------------------------------------------------


@BATCH_TRANSFORMS.register
def MixupOperator(class_num: int, alpha: float = 1.0) -> Callable:
    """Mixup (https://arxiv.org/abs/1710.09412): the mean of two images and labels, weighted by Beta(alpha, alpha)."""
    return partial(shuffled, v2.MixUp(alpha=positive(alpha), num_classes=class_num))


@BATCH_TRANSFORMS.register
def CutmixOperator(class_num: int, alpha: float = 0.2) -> Callable:
    """CutMix (https://arxiv.org/abs/1905.04899): a rectangle of another image, and of its label as large a share."""
    return partial(shuffled, v2.CutMix(alpha=positive(alpha), num_classes=class_num))


@BATCH_TRANSFORMS.register
def OpSampler(class_num: int, MixupOperator: dict | None = None, CutmixOperator: dict | None = None) -> Callable:
    """One of the operators for each batch, with the probability `prob` that stands among its arguments.

    What the probabilities leave of 1 is the share of batches that are not mixed, their labels one-hot.
    """
    given = {"MixupOperator": MixupOperator, "CutmixOperator": CutmixOperator}
    ops, weights = [], []
    for name, args in ((name, dict(args)) for name, args in given.items() if args is not None):
        prob = args.pop("prob", None)
        if not fits(prob, float) or not 0 <= prob <= 1:
            raise ValueError(f"{name}.prob is {prob}, not the probability, from 0 to 1, with which OpSampler takes it")
        ops.append(BATCH_TRANSFORMS.build({"name": name, **args}, name, class_num=(class_num, COUNTED)))
        weights.append(prob)
    rest = 1 - sum(weights)
    if not ops or rest < -1e-6:
        raise ValueError(f"the probabilities are {weights}, and OpSampler needs at least one, of 1 together at most")
    return v2.RandomChoice([*ops, partial(unmixed, class_num)], [*weights, max(0.0, rest)])


def positive(alpha: float) -> float:
    """The parameter of a Beta distribution; raises ValueError where there is no such distribution."""
    if alpha <= 0:
        raise ValueError(f"alpha is {alpha}, and must be above 0")
    return alpha


def shuffled(mix: Callable, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Images (B, 3, H, W) and labels (B,) mixed with those of a random other row; row i stays row i.

    torchvision mixes each row with the one before it, which in the batch of an identity sampler has the same label.
    """
    order = torch.randperm(len(labels))
    images, labels = mix(images[order], labels[order])
    back = order.argsort()
    return images[back], labels[back]


def unmixed(class_num: int, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The images as they are, and their labels (B,) as (B, class_num)."""
    return images, one_hot(labels, class_num).float()
