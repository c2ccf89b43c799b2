"""The transform_ops of a configuration, each one mapped onto torchvision.transforms.v2.

Images come in as uint8 tensors (3, H, W) in RGB and leave as float32. The ops run in the order of the list, as in the
original; decoding has already happened when the first of them runs, whether the list says DecodeImage or not.
Differences from the original that change pixels: resizing is antialiased, and RandomErasing draws its aspect ratio
log-uniformly, both as torchvision does.
"""
from __future__ import annotations

import torch
from torchvision.transforms import InterpolationMode, v2

from recnb.config import ConfigError, Registry, items

TRANSFORMS = Registry("transform", "DataLoader.*.dataset.transform_ops[]")
INTERPOLATION = {mode.value: mode for mode in InterpolationMode}


def interpolation_mode(name: str | None) -> InterpolationMode:
    "The mode of a name, bilinear for None; raises ValueError for an unknown one."
    if name is not None and name not in INTERPOLATION:
        raise ValueError(f"there is no interpolation '{name}', only {', '.join(INTERPOLATION)}")
    return INTERPOLATION[name or "bilinear"]


def height_width(size: int | list) -> list[int]:
    "[height, width] of a size that the original writes as one number or as [width, height]."
    sides = [size, size] if isinstance(size, int) else size
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size}, neither a number of pixels nor [width, height]")
    return [sides[1], sides[0]]


@TRANSFORMS.register
def DecodeImage(to_rgb: bool = True, channel_first: bool = False, to_np: bool = False,
                backend: str = "pil") -> v2.Transform:
    "The identity, or RGB to BGR with `to_rgb: False`; the file itself is always decoded before the first op."
    return v2.Identity() if to_rgb else v2.Lambda(reversed_channels)


def reversed_channels(image: torch.Tensor) -> torch.Tensor:
    "BGR from RGB, or back; a function of its own since worker processes that are not forked must unpickle it."
    return image.flip(-3)


@TRANSFORMS.register
def ResizeImage(size: int | list | None = None, resize_short: int | None = None, interpolation: str | None = None,
                backend: str = "pil") -> v2.Transform:
    "Resizing to `size` (a number, or [width, height]), or of the shorter side to `resize_short` pixels."
    if (size is None) == (resize_short is None):
        raise ValueError("ResizeImage needs either 'size' or 'resize_short'")
    target = height_width(size) if resize_short is None else resize_short
    return v2.Resize(target, interpolation_mode(interpolation), antialias=True)


@TRANSFORMS.register
def CropImage(size: int | list) -> v2.Transform:
    "The central crop of `size` pixels (a number, or [width, height])."
    return v2.CenterCrop(height_width(size))


@TRANSFORMS.register
def RandCropImage(size: int | list, scale: list | None = None, ratio: list | None = None,
                  interpolation: str | None = None, backend: str = "pil") -> v2.Transform:
    "A random crop of a random share (`scale`) and aspect (`ratio`) of the image, resized to `size`."
    return v2.RandomResizedCrop(height_width(size), scale or (0.08, 1.0), ratio or (3 / 4, 4 / 3),
                                interpolation_mode(interpolation), antialias=True)


@TRANSFORMS.register
def RandFlipImage(flip_code: int = 1, prob: float = 0.5) -> v2.Transform:
    "A flip with probability `prob`: 1 left-right, 0 top-bottom, -1 both at once."
    if flip_code not in (-1, 0, 1):
        raise ValueError(f"flip_code is {flip_code}, only 1 (left-right), 0 (top-bottom) and -1 (both) exist")
    flips = {1: [v2.RandomHorizontalFlip(1)], 0: [v2.RandomVerticalFlip(1)]}
    return v2.RandomApply(flips.get(flip_code) or flips[1] + flips[0], prob)


@TRANSFORMS.register
def ColorJitter(brightness: float = 0, contrast: float = 0, saturation: float = 0, hue: float = 0,
                prob: float = 1.0) -> v2.Transform:
    "Random brightness, contrast, saturation and hue, applied with probability `prob`."
    return v2.RandomApply([v2.ColorJitter(brightness, contrast, saturation, hue)], prob)


@TRANSFORMS.register
def AugMix(prob: float = 0.5, aug_prob_coeff: float = 1.0, mixture_width: int = 3, mixture_depth: int = 1,
           aug_severity: int = 1) -> v2.Transform:
    """AugMix (https://arxiv.org/abs/1912.02781) over the nine geometric and tonal ops, with probability `prob`.

    `aug_prob_coeff` is the parameter of the Dirichlet and Beta distributions that weigh the chains.
    """
    return v2.RandomApply([v2.AugMix(aug_severity, mixture_width, mixture_depth, aug_prob_coeff, all_ops=False)], prob)


def number(value: float | str) -> float:
    "A number that may be written as a fraction: `1.0/255.0`."
    numerator, _, denominator = str(value).partition("/")
    return float(numerator) / float(denominator or 1)


@TRANSFORMS.register
def NormalizeImage(scale: float | str | None = None, mean: list | None = None, std: list | None = None,
                   order: str = "", output_fp16: bool = False, channel_num: int = 3) -> v2.Transform:
    "(image * scale - mean) / std per channel; scale defaults to 1/255, mean and std to ImageNet's."
    if order not in ("", "hwc", "chw"):
        raise ValueError(f"order is '{order}', only '', 'hwc' and 'chw' exist (all three mean the same here)")
    factor = number(scale) if scale is not None else 1 / 255
    mean, std = mean or [0.485, 0.456, 0.406], std or [0.229, 0.224, 0.225]
    return v2.Compose([v2.ToDtype(torch.float32), v2.Normalize([m / factor for m in mean], [s / factor for s in std])])


@TRANSFORMS.register
def RandomErasing(EPSILON: float = 0.5, sl: float = 0.02, sh: float = 0.4, r1: float = 0.3, mean: list | None = None,
                  attempt: int = 100, use_log_aspect: bool = True, mode: str = "const") -> v2.Transform:
    """A rectangle overwritten with probability EPSILON (https://arxiv.org/abs/1708.04896).

    sl and sh bound its share of the area, r1 its aspect ratio. `mean` is written as it stands: after NormalizeImage,
    0 is the data set's mean colour. mode 'pixel' writes noise instead.
    """
    if mode not in ("const", "pixel"):
        raise ValueError(f"mode is '{mode}', only 'const' and 'pixel' exist")
    value = "random" if mode == "pixel" else [float(m) for m in (mean or [0.0, 0.0, 0.0])]
    return v2.RandomErasing(EPSILON, (sl, sh), (r1, 1 / r1), value)


def build_transform(cfg: dict, where: str) -> v2.Transform:
    """The composed transform_ops of the data set section at `where`.

    Raises ConfigError where an op cannot be built, or where two images of different sizes come out differently,
    since they could not share a batch.
    """
    ops = [TRANSFORMS.build({"name": name, **args}, place)
           for place, name, args in items(cfg, f"{where}.transform_ops")]
    transform = v2.Compose([*ops, v2.ToDtype(torch.float32, scale=True)])
    output_shape(transform, where)
    return transform


def output_shape(transform: v2.Transform, where: str) -> tuple[int, ...]:
    "(3, H, W) of what a transform makes of any image; raises ConfigError where that depends on the image."
    images = [torch.zeros(3, height, width, dtype=torch.uint8) for height, width in ((300, 200), (90, 120))]
    with torch.random.fork_rng(devices=[]):
        try:
            shapes = [tuple(transform(image).shape) for image in images]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"{where}.transform_ops: cannot be applied in this order: {error}") from error
    if shapes[0] != shapes[1]:
        raise ConfigError(f"{where}.transform_ops: images of different sizes leave with different sizes {shapes}; "
                          "add '- ResizeImage: {size: N}'")
    return shapes[0]


def single_ops(transform: v2.Transform) -> list[v2.Transform]:
    "The transforms that a composed one runs, in order; v2.Compose keeps them in a plain list, so modules() is blind."
    inner = getattr(transform, "transforms", None)
    return [transform] if inner is None else [op for part in inner for op in single_ops(part)]


def display_image(image: torch.Tensor, transform: v2.Transform) -> torch.Tensor:
    "(H, W, 3) in [0, 1]: a transformed image with the normalisation undone, for looking at."
    for op in reversed(single_ops(transform)):
        if isinstance(op, v2.Normalize):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (op.mean, op.std))
            image = (image * std + mean) / 255
    return image.clamp(0, 1).permute(1, 2, 0)
