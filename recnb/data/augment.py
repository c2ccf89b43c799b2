"""Augmentation by policy, and of whole batches: more transform_ops, and the batch_transform_ops that blend two images.

A policy draws a few of some fifteen ops and their strengths for each image; torchvision.transforms.v2 has them, and
the levels 0 to 10 of the original are mapped onto its magnitudes. What turning and shearing leave empty is filled with
grey, interpolated at best bilinearly, the finest that tensors have there. AugMix alone is written out, since
torchvision's takes three times as long and at the original's severity moves nothing; timm's shorthand, which has more
ops in it, gets torchvision's. All draws are on torch's global generator.

Left out: RandAugmentV2 and its ops SolarizeAdd and Cutout, the policies 'v0', 'v0r' and 'originalr', and FmixOperator,
none of which torchvision has and no feature-learning file of the original uses.
"""

import math
import re
from collections.abc import Callable
from functools import partial
from statistics import NormalDist
from typing import Annotated, Literal

import numpy as np
import torch
from torch.distributions import Beta, Dirichlet
from torch.nn.functional import grid_sample, one_hot, pad, softshrink
from torchvision.transforms import AutoAugmentPolicy, InterpolationMode, v2

from recnb.data.transforms import MEAN, TRANSFORMS, Share, Turning, affine_mode, of_bytes, per_channel, sometimes
from recnb.registry import Count, Positive, Range, Registry, Side, entry, fits, suggest

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
    num_layers: Count = 2,
    magnitude: Annotated[int, Range(0, 10)] = 5,
    fillcolor: list | None = None,
    interpolation: Turning = "bicubic",
) -> v2.Transform:
    """RandAugment (https://arxiv.org/abs/1909.13719): `num_layers` random ops, each at level `magnitude` of 0 to 10.

    Strengths grow with the level for each op, as in the paper; the original's Posterize and Solarize weaken.
    """
    fill = per_channel("fillcolor", fillcolor or GREY)
    return of_bytes("RandAugment", v2.RandAugment(num_layers, magnitude, 11, affine_mode(interpolation), fill))


@TRANSFORMS.register
def AutoAugment(fillcolor: list | None = None) -> v2.Transform:
    """The policy that AutoAugment found for ImageNet (https://arxiv.org/abs/1805.09501): one of its 25 pairs of ops."""
    fill = per_channel("fillcolor", fillcolor or GREY)
    return of_bytes("AutoAugment", v2.AutoAugment(AutoAugmentPolicy.IMAGENET, InterpolationMode.BILINEAR, fill))


@TRANSFORMS.register
def TrivialAugment(num_magnitude_bins: Annotated[int, Range(2)] = 31) -> v2.Transform:
    """TrivialAugment (https://arxiv.org/abs/2103.10158): one random op at one of `num_magnitude_bins` strengths."""
    return of_bytes("TrivialAugment", v2.TrivialAugmentWide(num_magnitude_bins, InterpolationMode.BILINEAR, GREY))


@TRANSFORMS.register
def TimmAutoAugment(
    config_str: str = "rand-m9-mstd0.5-inc1",
    interpolation: Turning = "bicubic",
    img_size: Side | list[Side] = 224,
    mean: list | None = None,
    prob: Share = 1.0,
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
    """Return timm's RandAugment: a normal distribution of levels is 21 equally likely ones, in steps of a tenth.

    Args:
        text: the shorthand, for messages.
        look: torchvision's interpolation and fill.
        m: the mean level, 0 to 10.
        n: how many ops.
        mstd: the deviation of the level.
        inc: whether strengths grow with the level, as torchvision's always do.

    Raises:
        ValueError: The numbers ask for what torchvision does not have.
    """
    if inc == 0 or not 0 <= m <= 10 or n < 1:
        raise ValueError(
            f"config_str '{text}': write inc1, since torchvision's ops always grow with their level, "
            "a level m from 0 to 10 and n of 1 or more"
        )
    drawn = [NormalDist(m, mstd).inv_cdf((i + 0.5) / 21) for i in range(21)] if mstd else [m]
    steps = [round(10 * min(10, max(0, level))) for level in drawn]
    layer = v2.RandomChoice([v2.RandAugment(1, step, 101, **look) for step in steps])
    return v2.Compose([sometimes(0.5, layer)] * int(n))


# --- AugMix, with the strengths and weights of the original -----------------------------------------------------------

AUGMIX_OPS = {  # (uint8 (3, H, W), level of 0.1 to 10, sign of -1 or 1): the original's strengths, black borders
    "autocontrast": lambda image, level, sign: v2.functional.autocontrast(image),
    "equalize": lambda image, level, sign: v2.functional.equalize(image),
    "posterize": lambda image, level, sign: v2.functional.posterize(image, 4 - int(level * 4 / 10)),
    "rotate": lambda image, level, sign: turned(image, sign * int(level * 30 / 10)),
    "solarize": lambda image, level, sign: solarized(image, 256 - int(level * 256 / 10)),
    "shear_x": lambda image, level, sign: warped(image, [(1, sign * level * 0.3 / 10, 0), (0, 1, 0)]),
    "shear_y": lambda image, level, sign: warped(image, [(1, 0, 0), (sign * level * 0.3 / 10, 1, 0)]),
    "translate_x": lambda image, level, sign: moved(image, sign * int(level * image.shape[2] / 30), 0),
    "translate_y": lambda image, level, sign: moved(image, 0, sign * int(level * image.shape[1] / 30)),
}


@TRANSFORMS.register
def AugMix(
    prob: Share = 0.5,
    aug_prob_coeff: Positive = 0.1,
    mixture_width: Count = 3,
    mixture_depth: Count | Literal[-1] = 1,
    aug_severity: Annotated[int, Range(1, 10)] = 1,
) -> v2.Transform:
    """AugMix (https://arxiv.org/abs/1912.02781) over nine geometric and tonal ops, with probability `prob`.

    `mixture_width` chains of `mixture_depth` ops each (-1: 1 to 3 at random), at levels from 0.1 to `aug_severity` (1
    to 10), are averaged by weights of a Dirichlet distribution, and the average with the image itself by one of a Beta
    distribution, both with the parameter `aug_prob_coeff`. As in the original, and unlike the paper, that is 0.1 rather
    than 1, with which one chain or the image itself mostly gets nearly all of the weight, the severity is 1 rather than
    3, and what moves leaves black. Unlike the original, values are rounded, not cut off.
    """
    shares = Dirichlet(torch.full((mixture_width,), float(aug_prob_coeff)))
    mix = partial(augmixed, Beta(aug_prob_coeff, aug_prob_coeff), shares, mixture_depth, aug_severity)
    return of_bytes("AugMix", v2.Lambda(mix), prob)


def augmixed(share: Beta, shares: Dirichlet, depth: int, severity: float, image: torch.Tensor) -> torch.Tensor:
    """Return uint8 (3, H, W): the image and its chains, averaged.

    Chains that together cannot move a value by half a grey level are not computed, and their weight is the image's:
    with the parameter 0.1, that spares more than half of the work.

    Args:
        share: draws the weight of all chains together.
        shares: draws the weight of each of them.
        depth: ops in a chain; -1: 1 to 3 at random.
        severity: the highest level.
        image: uint8 (3, H, W).
    """
    weights, chains = drawn(share, shares, depth, severity)
    felt = [(weight, chain) for weight, chain in zip(weights, chains, strict=True) if 512 * len(chains) * weight > 1]
    if not felt:
        return image
    image = image.contiguous()  # decoders give the channels last, where some ops take five times as long
    mixed = image * (1 - sum(weight for weight, _ in felt))
    for weight, chain in felt:
        part = image
        for name, level, sign in chain:
            part = AUGMIX_OPS[name](rounded(part), level, sign)
        mixed.add_(part, alpha=weight)
    return rounded(mixed)


def drawn(share: Beta, shares: Dirichlet, depth: int, severity: float) -> tuple[list[float], list[list[tuple]]]:
    """Return the weight of each chain, which the image completes to 1, and each chain as [(op, level, sign), ...].

    Args:
        share: as in `augmixed`, like all that follows.
        shares: see there.
        depth: see there.
        severity: see there.
    """
    weights = (share.sample() * shares.sample()).tolist()
    depths = [depth] * len(weights) if depth > 0 else torch.randint(1, 4, (len(weights),)).tolist()
    names = list(AUGMIX_OPS)
    return weights, [
        [
            (names[int(len(names) * which)], 0.1 + (severity - 0.1) * level, -1 if sign < 0.5 else 1)
            for which, level, sign in torch.rand(length, 3).tolist()
        ]
        for length in depths
    ]


def turned(image: torch.Tensor, degrees: float) -> torch.Tensor:
    """`warped`: a turn counter-clockwise around the middle."""
    cos, sin = math.cos(math.radians(degrees)), math.sin(math.radians(degrees))
    y, x = (side / 2 for side in image.shape[-2:])
    return warped(image, [(cos, -sin, x - cos * x + sin * y), (sin, cos, y - sin * x - cos * y)])


def warped(image: torch.Tensor, matrix: list[tuple]) -> torch.Tensor:
    """float (3, H, W) whose pixel (x, y) is the image's at matrix @ (x, y, 1), or black where that is outside of it.

    Bilinear, by Pillow's rule: centres are at halves, and up to the border a pixel reaches as it is. torchvision's own
    takes more than twice as long.
    """
    height, width = image.shape[-2:]
    x, y = torch.arange(width) + 0.5, torch.arange(height)[:, None] + 0.5
    grid = torch.empty(2, height, width)  # where to look, x and y, from border to border -1 to 1
    for plane, side, (a, b, c) in zip(grid, (width, height), matrix, strict=True):
        torch.add(2 / side * a * x, 2 / side * (b * y + c) - 1, out=plane)
        outside = softshrink(plane, 1)  # how far, or 0 within
        last = 1 - 1 / side  # the outermost centres, beyond which grid_sample would blend with black
        plane.clamp_(-last, last).add_(outside, alpha=1e6)  # so far away that nothing of the image is left
    return grid_sample(image[None].float(), grid.permute(1, 2, 0)[None], align_corners=False)[0]


def moved(image: torch.Tensor, right: int, down: int) -> torch.Tensor:
    """Return (3, H, W), whose pixel (x, y) is the image's at (x + right, y + down), or black.

    Args:
        image: (3, H, W).
        right: pixels.
        down: pixels.
    """
    return pad(image, [-right, right, -down, down])


def solarized(image: torch.Tensor, threshold: int) -> torch.Tensor:
    """uint8 (3, H, W) with values from the threshold on inverted.

    Comparing takes torch twenty times as long as numpy.
    """
    values = image.numpy()
    return torch.from_numpy(values ^ -(values >= threshold).view(np.uint8))  # minus 1 is 255 here, and x ^ 255, 255 - x


def rounded(values: torch.Tensor) -> torch.Tensor:
    """uint8 of bytes, or of floats from 0 to 255, which are written over.

    Numpy's cast takes a third of torch's time.
    """
    return torch.from_numpy(values.add_(0.5).numpy().astype(np.uint8)) if values.is_floating_point() else values


# --- Single ops -------------------------------------------------------------------------------------------------------


@TRANSFORMS.register
def RandomApply(transforms: list, p: Share = 0.5) -> v2.Transform:
    """A list of transforms, `- Name: {arguments}` each, applied all together with probability `p`."""
    ops = [
        TRANSFORMS.build({"name": name, **args}, place)
        for place, name, args in (entry(item, f"transforms.{i}") for i, item in enumerate(transforms))
    ]
    return sometimes(p, *ops)


@TRANSFORMS.register
def RandomInterpolationAugment(prob: Share = 1.0) -> v2.Transform:
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
        image = v2.functional.resize(image, size, InterpolationMode(name), antialias=antialias)
    return image


@TRANSFORMS.register
def Cutout(n_holes: Count = 1, length: Count = 112) -> v2.Transform:
    """Cutout (https://arxiv.org/abs/1708.04552): `n_holes` squares of `length` pixels set to 0, around random pixels.

    A hole near the border loses what is outside. 0 is black, after NormalizeImage the data set's mean colour.
    """
    return v2.Lambda(partial(with_holes, n_holes, length))


def with_holes(n_holes: int, length: int, image: torch.Tensor) -> torch.Tensor:
    """Return a copy of the image with squares of 0 in it.

    Args:
        n_holes: how many squares.
        length: pixels of a side.
        image: (3, H, W).
    """
    image = image.clone()
    for _ in range(n_holes):
        top, left = (int(torch.randint(side, ())) - length // 2 for side in image.shape[-2:])
        image[..., max(0, top) : max(0, top + length), max(0, left) : max(0, left + length)] = 0
    return image


# --- Batches ----------------------------------------------------------------------------------------------------------


@BATCH_TRANSFORMS.register
def MixupOperator(class_num: int, alpha: Positive = 1.0) -> Callable:
    """Mixup (https://arxiv.org/abs/1710.09412): the mean of two images and labels, weighted by Beta(alpha, alpha)."""
    return partial(shuffled, v2.MixUp(alpha=alpha, num_classes=class_num))


@BATCH_TRANSFORMS.register
def CutmixOperator(class_num: int, alpha: Positive = 0.2) -> Callable:
    """CutMix (https://arxiv.org/abs/1905.04899): a rectangle of another image, and of its label as large a share."""
    return partial(shuffled, v2.CutMix(alpha=alpha, num_classes=class_num))


@BATCH_TRANSFORMS.register
def OpSampler(class_num: int, MixupOperator: dict | None = None, CutmixOperator: dict | None = None) -> Callable:
    """One of the operators for each batch, with the probability `prob` that stands among its arguments.

    What the probabilities leave of 1 is the share of batches that are not mixed, their labels one-hot.
    """
    given = {"MixupOperator": MixupOperator, "CutmixOperator": CutmixOperator}
    ops, weights = [], []
    for name, args in ((name, dict(args)) for name, args in given.items() if args is not None):
        prob = args.pop("prob", None)
        if not fits(prob, Share):
            raise ValueError(f"{name}.prob is {prob}, not the probability, from 0 to 1, with which OpSampler takes it")
        ops.append(BATCH_TRANSFORMS.build({"name": name, **args}, name, class_num=(class_num, COUNTED)))
        weights.append(prob)
    rest = 1 - sum(weights)
    if not ops or rest < -1e-6:
        raise ValueError(f"the probabilities are {weights}, and OpSampler needs at least one, of 1 together at most")
    return v2.RandomChoice([*ops, partial(unmixed, class_num)], [*weights, max(0.0, rest)])


def shuffled(mix: Callable, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images and labels mixed with those of a random other row; row i stays row i.

    torchvision mixes each row with the one before it, which in the batch of an identity sampler has the same label.

    Args:
        mix: one of torchvision's transforms of batches.
        images: (B, 3, H, W).
        labels: (B,).
    """
    order = torch.randperm(len(labels))
    images, labels = mix(images[order], labels[order])
    back = order.argsort()
    return images[back], labels[back]


def unmixed(class_num: int, images: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the images as they are, and their labels (B, class_num).

    Args:
        class_num: how many classes.
        images: (B, 3, H, W).
        labels: (B,).
    """
    return images, one_hot(labels, class_num).float()
