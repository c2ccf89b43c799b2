"""AugMix with the strengths and weights of the original."""

from __future__ import annotations

import math
from functools import partial

import numpy as np
import torch
from torch.distributions import Beta, Dirichlet
from torch.nn.functional import grid_sample, pad, softshrink
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional

from recnb.data.transforms import TRANSFORMS, of_bytes

AUGMIX_OPS = {  # (uint8 (3, H, W), level of 0.1 to 10, sign of -1 or 1): the original's strengths, black borders
    "autocontrast": lambda image, level, sign: functional.autocontrast(image),
    "equalize": lambda image, level, sign: functional.equalize(image),
    "posterize": lambda image, level, sign: functional.posterize(image, 4 - int(level * 4 / 10)),
    "rotate": lambda image, level, sign: turned(image, sign * int(level * 30 / 10)),
    "solarize": lambda image, level, sign: solarized(image, 256 - int(level * 256 / 10)),
    "shear_x": lambda image, level, sign: warped(image, [(1, sign * level * 0.3 / 10, 0), (0, 1, 0)]),
    "shear_y": lambda image, level, sign: warped(image, [(1, 0, 0), (sign * level * 0.3 / 10, 1, 0)]),
    "translate_x": lambda image, level, sign: moved(image, sign * int(level * image.shape[2] / 30), 0),
    "translate_y": lambda image, level, sign: moved(image, 0, sign * int(level * image.shape[1] / 30)),
}


@TRANSFORMS.register
def AugMix(
    prob: float = 0.5,
    aug_prob_coeff: float = 0.1,
    mixture_width: int = 3,
    mixture_depth: int = 1,
    aug_severity: int = 1,
) -> v2.Transform:
    """AugMix (https://arxiv.org/abs/1912.02781) over nine geometric and tonal ops, with probability `prob`.

    `mixture_width` chains of `mixture_depth` ops each (-1: 1 to 3 at random), at levels from 0.1 to `aug_severity` (1
    to 10), are averaged by weights of a Dirichlet distribution, and the average with the image itself by one of a Beta
    distribution, both with the parameter `aug_prob_coeff`. As in the original, and unlike the paper, that is 0.1 rather
    than 1, with which one chain or the image itself mostly gets nearly all of the weight, the severity is 1 rather than
    3, and what moves leaves black. Unlike the original, values are rounded, not cut off. Raises ValueError for numbers
    outside of these ranges.
    """
    if not aug_prob_coeff > 0 or mixture_width < 1 or not (mixture_depth == -1 or mixture_depth >= 1):
        raise ValueError(
            f"aug_prob_coeff is {aug_prob_coeff}, mixture_width {mixture_width} and mixture_depth "
            f"{mixture_depth}, not a number above 0, 1 or more, and 1 or more or -1 for 1 to 3 at random"
        )
    if not 1 <= aug_severity <= 10:
        raise ValueError(f"aug_severity is {aug_severity}, not a level from 1 to 10")
    shares = Dirichlet(torch.full((mixture_width,), float(aug_prob_coeff)))
    mix = partial(augmixed, Beta(aug_prob_coeff, aug_prob_coeff), shares, mixture_depth, aug_severity)
    return of_bytes("AugMix", v2.Lambda(mix), prob)


def augmixed(share: Beta, shares: Dirichlet, depth: int, severity: float, image: torch.Tensor) -> torch.Tensor:
    """uint8 (3, H, W): the image and its chains, averaged.

    Chains that together cannot move a value by half a grey level are not computed, and their weight is the image's:
    with the parameter 0.1, that spares more than half of the work.
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
    """The weight of each chain, which the image's own completes to 1, and each chain as [(op, level, sign), ...]."""
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
    """(3, H, W), whose pixel (x, y) is the image's at (x + right, y + down), or black."""
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
