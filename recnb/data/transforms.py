"""The transform_ops of a configuration, each one mapped onto torchvision.transforms.v2: geometry, values, erasing.

Images come in as uint8 tensors (3, H, W) in RGB and leave as float32. The ops run in the order of the list, as in the
original, the last of them on whole batches where that is the same (`Pipeline`); decoding has already happened when the
first of them runs, whether the list says DecodeImage or not.
The original has two families, which write a size in opposite order: its own ops (ResizeImage, CropImage, RandCropImage,
RandCropImageV2, RandomCropImage) as [width, height], those of paddle.vision (Resize, CenterCrop, RandomCrop,
RandomResizedCrop) as [height, width]. `backend` and `return_numpy` are accepted and change nothing. Policies and the
mixing of batches are the chapter `augment`.

Differences from the original that change pixels: resizing is antialiased, and RandCropImageV2 has no crops that are a
pixel short.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import Annotated, Literal

import torch
from torchvision.transforms import InterpolationMode, v2

from recnb.registry import Count, Range, Registry, Side, fits

TRANSFORMS = Registry("transform")
Interpolation = Literal["nearest", "nearest-exact", "bilinear", "bicubic", "lanczos"]  # what resizing tensors has
Turning = Literal["nearest", "bilinear", "bicubic", "lanczos", "hamming", "random"]  # what the original has
Border = Literal["constant", "edge", "reflect", "symmetric"]
Share = Annotated[float, Range(0, 1)]
MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]  # ImageNet's, of values between 0 and 1
WIDTH_HEIGHT, HEIGHT_WIDTH = "[width, height]", "[height, width]"


def affine_mode(name: str) -> InterpolationMode:
    """The mode of a name for rotating and shearing; tensors have nothing finer than bilinear and get that instead."""
    return InterpolationMode.NEAREST if name == "nearest" else InterpolationMode.BILINEAR


def height_width(size: Side | list[Side], order: str = WIDTH_HEIGHT) -> list[int]:
    """[height, width] of a size that is one number, or two in this order; raises ValueError for anything else."""
    sides = size if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ValueError(f"size is {size}, neither a number of pixels nor {order}")
    return list(sides) if order == HEIGHT_WIDTH else [sides[1], sides[0]]


def bounds(key: str, value: list | None, default: tuple) -> list[float]:
    """Return [least, greatest] of an argument.

    Args:
        key: its name, for the message.
        value: two numbers, or None.
        default: what stands for None.

    Raises:
        ValueError: They are not two numbers above 0, the smaller one first.
    """
    pair = default if value is None else value
    if len(pair) != 2 or not all(fits(end, float) for end in pair) or not 0 < pair[0] <= pair[1]:
        raise ValueError(f"{key} is {value}, not two numbers above 0, the smaller one first")
    return list(pair)


def per_channel(key: str, value: float | list) -> list[float]:
    """Three numbers, one a channel, of an argument that is one number or three; raises ValueError for anything else."""
    values = value if isinstance(value, list | tuple) else [value] * 3
    if len(values) != 3 or not all(fits(number, float) for number in values):
        raise ValueError(f"{key} is {value}, neither one number nor three, one a channel")
    return list(values)


def sometimes(prob: float, *ops: v2.Transform) -> v2.Transform:
    """All of the ops with probability `prob`, otherwise none of them."""
    return v2.RandomApply(list(ops), prob)


def of_bytes(name: str, op: v2.Transform, prob: float = 1.0) -> v2.Transform:
    """Return an op that is defined on 8-bit images and refuses any other.

    Args:
        name: the op's name in the file, for the message.
        op: the op.
        prob: how often it is applied.
    """
    return v2.Compose([v2.Lambda(partial(checked_bytes, name)), sometimes(prob, op)])


def checked_bytes(name: str, image: torch.Tensor) -> torch.Tensor:
    """The image; raises ValueError where it has been made float before."""
    if image.dtype != torch.uint8:
        raise ValueError(f"{name} works on 8-bit images: put it before ToTensor and NormalizeImage")
    return image


# --- Decoding, resizing, cropping -------------------------------------------------------------------------------------


@TRANSFORMS.register
def DecodeImage(
    to_rgb: bool = True, channel_first: bool = False, to_np: bool = False, backend: str = "pil"
) -> v2.Transform:
    """The identity, or RGB to BGR with `to_rgb: False`; the file itself is always decoded before the first op."""
    return v2.Identity() if to_rgb else v2.Lambda(reversed_channels)


def reversed_channels(image: torch.Tensor) -> torch.Tensor:
    """BGR from RGB, or back; a function of its own since worker processes that are not forked must unpickle it."""
    return image.flip(-3)


@TRANSFORMS.register
def ResizeImage(
    size: Side | list[Side] | None = None,
    resize_short: int | None = None,
    interpolation: Interpolation | None = None,
    backend: str = "pil",
    return_numpy: bool = True,
) -> v2.Transform:
    """Resizing to `size` (a number, or [width, height]), or of the shorter side to `resize_short` pixels."""
    if (size is None) == (resize_short is None):
        raise ValueError("ResizeImage needs either 'size' or 'resize_short'")
    target = resize_short if size is None else height_width(size)
    return v2.Resize(target, InterpolationMode(interpolation or "bilinear"), antialias=True)


@TRANSFORMS.register
def CropImage(size: Side | list[Side]) -> v2.Transform:
    """The central crop of `size` pixels (a number, or [width, height])."""
    return v2.CenterCrop(height_width(size))


@TRANSFORMS.register
def RandCropImage(
    size: Side | list[Side],
    scale: list[float] | None = None,
    ratio: list[float] | None = None,
    interpolation: Interpolation | None = None,
    use_log_aspect: bool = False,
    backend: str = "pil",
) -> v2.Transform:
    """A random crop of a random share (`scale`) and aspect (`ratio`) of the image, resized to `size`.

    The aspect is drawn uniformly, and with `use_log_aspect` log-uniformly, as torchvision draws it.
    """
    return (v2.RandomResizedCrop if use_log_aspect else UniformCrop)(
        height_width(size),
        bounds("scale", scale, (0.08, 1.0)),
        bounds("ratio", ratio, (3 / 4, 4 / 3)),
        InterpolationMode(interpolation or "bilinear"),
        antialias=True,
    )


class UniformCrop(v2.RandomResizedCrop):
    """A random crop whose aspect is drawn uniformly, and whose share is bounded so that it always fits."""

    def make_params(self, flat_inputs: list) -> dict:
        """Draw a crop: its top, left, height and width."""
        height, width = flat_inputs[0].shape[-2:]
        aspect = drawn(*self.ratio)  # width / height
        most = min(self.scale[1], height * aspect / width, width / (height * aspect))
        area = height * width * drawn(min(self.scale[0], most), most)
        w, h = max(1, int((area * aspect) ** 0.5)), max(1, int((area / aspect) ** 0.5))
        top, left = (int(torch.randint(0, room + 1, (1,))) for room in (height - h, width - w))
        return {"top": top, "left": left, "height": h, "width": w}


def drawn(least: float, most: float) -> float:
    """Return a number between two, uniformly drawn."""
    return torch.empty(1).uniform_(least, most).item()


@TRANSFORMS.register
def RandCropImageV2(size: Side | list[Side]) -> v2.Transform:
    """A random crop of exactly `size` pixels (a number, or [width, height]), without resizing; none smaller goes in."""
    return v2.RandomCrop(height_width(size))


TRANSFORMS["RandomCropImage"] = RandCropImageV2  # another of the original's names


@TRANSFORMS.register
def Resize(size: Side | list[Side], interpolation: Interpolation = "bilinear") -> v2.Transform:
    """Resizing of the shorter side to `size` pixels, or to [height, width]."""
    sides = height_width(size, HEIGHT_WIDTH)
    return v2.Resize(sides if isinstance(size, list) else size, InterpolationMode(interpolation), antialias=True)


@TRANSFORMS.register
def CenterCrop(size: Side | list[Side]) -> v2.Transform:
    """The central crop of `size` pixels (a number, or [height, width]), with black where the image is smaller."""
    return v2.CenterCrop(height_width(size, HEIGHT_WIDTH))


@TRANSFORMS.register
def RandomCrop(
    size: Side | list[Side],
    padding: int | list | None = None,
    pad_if_needed: bool = False,
    fill: float | list = 0,
    padding_mode: Border = "constant",
) -> v2.Transform:
    """A random crop of `size` pixels (a number, or [height, width]) out of the image padded as Pad does."""
    return v2.RandomCrop(
        height_width(size, HEIGHT_WIDTH), pad_if_needed=pad_if_needed, **border(padding, fill, padding_mode)
    )


@TRANSFORMS.register
def RandomResizedCrop(
    size: Side | list[Side],
    scale: list[float] | None = None,
    ratio: list[float] | None = None,
    interpolation: Interpolation = "bilinear",
) -> v2.Transform:
    """A random crop of a random share and aspect of the image, resized to `size` (a number, or [height, width])."""
    return v2.RandomResizedCrop(
        height_width(size, HEIGHT_WIDTH),
        bounds("scale", scale, (0.08, 1.0)),
        bounds("ratio", ratio, (3 / 4, 4 / 3)),
        InterpolationMode(interpolation),
        antialias=True,
    )


@TRANSFORMS.register
def CropWithPadding(
    prob: Share = 1.0,
    padding_num: float = 0,
    size: Side | list[Side] = 224,
    scale: list[float] | None = None,
    ratio: list[float] | None = None,
    interpolation: str = "bilinear",
) -> v2.Transform:
    """A random share and aspect of the image stays where it is, `padding_num` over the rest, with probability `prob`.

    From AdaFace (https://arxiv.org/abs/2204.00964). The image keeps its size: `size` and `interpolation` are accepted
    and, as in the original, have no effect.
    """
    limits = bounds("scale", scale, (0.08, 1.0)), bounds("ratio", ratio, (3 / 4, 4 / 3))
    return sometimes(prob, v2.Lambda(partial(in_its_place, padding_num, *limits)))


def in_its_place(fill: float, scale: list, ratio: list, image: torch.Tensor) -> torch.Tensor:
    """Return (3, H, W) of `fill`, but for a random rectangle of the image.

    Args:
        fill: the value elsewhere.
        scale: the least and the greatest share of the area.
        ratio: the least and the greatest width over height.
        image: (3, H, W).
    """
    top, left, height, width = v2.RandomResizedCrop.get_params(image, scale, ratio)
    result = torch.full_like(image, fill)
    box = (..., slice(top, top + height), slice(left, left + width))
    result[box] = image[box]
    return result


# --- Borders, flips, turns --------------------------------------------------------------------------------------------


def border(padding: int | list | None, fill: float | list, padding_mode: str) -> dict:
    """Return the arguments by which torchvision knows a border.

    Args:
        padding: pixels: one number, two or four.
        fill: a number, or one a channel.
        padding_mode: as torchvision's.

    Raises:
        ValueError: The widths or the colour cannot be meant.
    """
    widths = padding if isinstance(padding, list) else [padding or 0]
    if len(widths) not in (1, 2, 4) or not all(isinstance(width, int) and width >= 0 for width in widths):
        raise ValueError(
            f"padding is {padding}, neither a number of pixels, [left and right, top and bottom] nor "
            "[left, top, right, bottom]"
        )
    colour = per_channel("fill", fill)
    return {"padding": padding, "fill": colour if padding_mode == "constant" else 0, "padding_mode": padding_mode}


@TRANSFORMS.register
def Pad(
    padding: int | list, fill: float | list = 0, padding_mode: Border = "constant", backend: str = "pil"
) -> v2.Transform:
    """The image with a border of `padding` pixels (a number, [left and right, top and bottom] or four, from the left).

    The padding_mode 'constant' writes `fill` there (a number, or one a channel), 'edge', 'reflect' and 'symmetric' what
    the image has. In the original, the backend 'pil' is constant whatever the mode says.
    """
    return v2.Pad(**border(padding, fill, padding_mode))


TRANSFORMS["Pad_paddle_vision"] = Pad  # the original's name for paddle.vision's


@TRANSFORMS.register
def RandFlipImage(flip_code: Literal[1, 0, -1] = 1, prob: Share = 0.5) -> v2.Transform:
    """A flip with probability `prob`: 1 left-right, 0 top-bottom, -1 both at once."""
    flips = {1: [v2.RandomHorizontalFlip(1)], 0: [v2.RandomVerticalFlip(1)]}
    return sometimes(prob, *(flips.get(flip_code) or flips[1] + flips[0]))


@TRANSFORMS.register
def RandomHorizontalFlip(prob: Share = 0.5) -> v2.Transform:
    """A flip left-right with probability `prob`."""
    return RandFlipImage(prob=prob)


@TRANSFORMS.register
def RandomRotation(
    degrees: float | list,
    prob: Share = 0.5,
    interpolation: Turning = "nearest",
    expand: bool = False,
    center: list | None = None,
    fill: float | list = 0,
) -> v2.Transform:
    """With probability `prob`, a turn by an angle from -degrees to degrees, or of the range [least, greatest].

    It goes around `center` ([x, y] from the upper left corner), by default the middle. `expand` keeps the corners, so
    that sizes differ: let ResizeImage follow. What comes from outside is `fill`. Bicubic is bilinear here.
    """
    return sometimes(
        prob, v2.RandomRotation(degrees, affine_mode(interpolation), expand, center, per_channel("fill", fill))
    )


# --- Colours and values -----------------------------------------------------------------------------------------------


@TRANSFORMS.register
def ColorJitter(
    brightness: float = 0, contrast: float = 0, saturation: float = 0, hue: float = 0, prob: Share = 1.0
) -> v2.Transform:
    """Random brightness, contrast, saturation and hue, applied with probability `prob`."""
    return sometimes(prob, v2.ColorJitter(brightness, contrast, saturation, hue))


@TRANSFORMS.register
def RandomGrayscale(p: Share = 0.1) -> v2.Transform:
    """Three equal channels of grey with probability `p`."""
    return sometimes(p, v2.RandomGrayscale(1))


def number(value: float | str) -> float:
    """A number that may be written as a fraction: `1.0/255.0`."""
    numerator, _, denominator = str(value).partition("/")
    return float(numerator) / float(denominator or 1)


@TRANSFORMS.register
def NormalizeImage(
    scale: float | str | None = None,
    mean: list | None = None,
    std: list | None = None,
    order: Literal["", "hwc", "chw"] = "",  # all three mean the same here
    output_fp16: bool = False,
    channel_num: int = 3,
    auto: bool = False,
) -> v2.Transform:
    """(image * scale - mean) / std per channel; scale defaults to 1/255, mean and std to ImageNet's.

    With `auto`, mean and std are those of the backbone's pretrained weights; `load_config` writes them out.
    """
    if auto:
        raise ValueError("auto is for configurations, in which load_config replaces it; give mean and std")
    factor = number(scale) if scale is not None else 1 / 255
    mean, std = per_channel("mean", mean or MEAN), per_channel("std", std or STD)
    return v2.Compose([v2.ToDtype(torch.float32), v2.Normalize([m / factor for m in mean], [s / factor for s in std])])


@TRANSFORMS.register
def ToTensor() -> v2.Transform:
    """float32 between 0 and 1 of an 8-bit image; what is float already stays as it is."""
    return v2.ToDtype(torch.float32, scale=True)


@TRANSFORMS.register
def Normalize(
    mean: float | list = 0.0, std: float | list = 1.0, data_format: Literal["CHW", "HWC"] = "CHW"
) -> v2.Transform:
    """(image - mean) / std per channel, of an image between 0 and 1: ToTensor must come first."""
    return v2.Normalize(per_channel("mean", mean), per_channel("std", std))


@TRANSFORMS.register
def RandomErasing(
    EPSILON: Share = 0.5,
    sl: float | str = 0.02,
    sh: float | str = 0.4,
    r1: float | str = 0.3,
    mean: list | None = None,
    attempt: Count = 100,
    use_log_aspect: bool = False,
    mode: Literal["const", "pixel"] = "const",
) -> v2.Transform:
    """A rectangle overwritten with probability EPSILON (https://arxiv.org/abs/1708.04896).

    sl and sh bound its share of the area, r1 and 1 / r1 its aspect, which is drawn uniformly, and with `use_log_aspect`
    log-uniformly. `mean` is written as it stands: after NormalizeImage, 0 is the data set's mean colour. mode 'pixel'
    writes noise instead. `attempt` is how often a rectangle is drawn at most, until one fits.
    """
    value = "random" if mode == "pixel" else [float(m) for m in per_channel("mean", mean or 0.0)]
    area, aspect = bounds("[sl, sh]", [number(sl), number(sh)], ()), number(r1)
    if not 0 < aspect <= 1:
        raise ValueError(f"r1 is {r1}, not the least ratio of two sides, above 0 and at most 1")
    return Erasing(EPSILON, area, (aspect, 1 / aspect), value, use_log_aspect, attempt)


class Erasing(v2.RandomErasing):
    """torchvision's erasing with a choice of how the aspect is drawn, and of how often.

    Args:
        p: the probability of erasing.
        scale: the least and the greatest share of the area.
        ratio: the least and the greatest height over width.
        value: what is written, a number a channel, or 'random' for noise.
        log_aspect: whether the aspect is drawn log-uniformly.
        attempts: how many rectangles are drawn at most.
    """

    def __init__(
        self,
        p: float,
        scale: Sequence[float],
        ratio: Sequence[float],
        value: Sequence[float] | str,
        log_aspect: bool,
        attempts: int,
    ):
        super().__init__(p, scale, ratio, value)
        self.log_aspect, self.attempts = log_aspect, attempts

    def make_params(self, flat_inputs: list) -> dict:
        """Draw a rectangle, with `v` None where none fits: its top i, left j, height h, width w and content v."""
        channels, height, width = flat_inputs[0].shape[-3:]
        for _ in range(self.attempts):
            area = height * width * drawn(*self.scale)
            aspect = math.exp(drawn(*map(math.log, self.ratio))) if self.log_aspect else drawn(*self.ratio)
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            if h < height and w < width:
                value = torch.tensor(self.value)[:, None, None] if self.value else torch.randn(channels, h, w)
                top, left = (int(torch.randint(0, room + 1, (1,))) for room in (height - h, width - w))
                return {"i": top, "j": left, "h": h, "w": w, "v": value}
        return {"i": 0, "j": 0, "h": height, "w": width, "v": None}
