"""Ops in a row: the part that workers run on single images, and the part that runs on whole batches."""

import torch
from torchvision.transforms import v2

from recnb.registry import ConfigError


class Pipeline(v2.Compose):
    """Ops in a row, uint8 (3, H, W) -> float32 (3, H, W), the last of which may as well run later, on whole batches.

    `finish(*before(image))` of an image, or of the stacked results of several, is bit for bit what calling the whole
    makes of each. Left to `finish` are those at the end that make floats, normalise, or erase by a constant: bytes are
    a quarter as much to send to another process or to a GPU, and the arithmetic is done there. All draws of random
    numbers are in `before`.
    """

    def __init__(self, ops: list[v2.Transform]):
        super().__init__([single for op in ops for single in (op.transforms if type(op) is v2.Compose else [op])])
        self.later = next((i for i, op in reversed([*enumerate(self.transforms, 1)]) if not by_batch(op)), 0)

    def before(self, image: torch.Tensor, done: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
        """The image (3, H, W) and what erasing ops will erase, (E, 4) of [top, left, height, width]; `done` ops are."""
        for op in self.transforms[done : self.later]:
            image = op(image)
        return image, torch.tensor([rectangle(op, image) for op in self.erasing()], dtype=torch.int64).reshape(-1, 4)

    def finish(self, images: torch.Tensor, boxes: torch.Tensor) -> torch.Tensor:
        """(B, 3, H, W) on the device of the images, from those of `before` and their (B, E, 4) on the CPU."""
        places, given = iter(boxes.unbind(1)), images
        for op in self.transforms[self.later :]:
            if isinstance(op, v2.RandomErasing):
                images = erased(images, next(places), op.value)
            elif isinstance(op, v2.Normalize) and images is not given:  # another copy takes as long as normalising
                images = v2.functional.normalize(images, op.mean, op.std, inplace=True)
            else:
                images = op(images)
        return images

    def erasing(self) -> list[v2.RandomErasing]:
        """The ops of `finish` that erase."""
        return [op for op in self.transforms[self.later :] if isinstance(op, v2.RandomErasing)]


def by_batch(op: v2.Transform) -> bool:
    """Whether an op does to each image of a batch what it does to it alone, except for a rectangle drawn for each."""
    return isinstance(op, (v2.ToDtype, v2.Normalize, v2.Identity)) or (
        isinstance(op, v2.RandomErasing) and op.value is not None
    )  # None: noise


def rectangle(op: v2.RandomErasing, image: torch.Tensor) -> list[int]:
    """[top, left, height, width] that an op draws for an image; height 0 where it erases nothing."""
    drawn: dict = op.make_params([image]) if torch.rand(1) < op.p else {"v": None}
    return [0, 0, 0, 0] if drawn["v"] is None else [drawn[side] for side in "ijhw"]


def erased(images: torch.Tensor, boxes: torch.Tensor, value: list[float]) -> torch.Tensor:
    """Return the images, in each a rectangle overwritten in place.

    Args:
        images: (B, 3, H, W).
        boxes: (B, 4) of [top, left, height, width]; height 0 where nothing is erased.
        value: a number a channel.
    """
    colour = images.new_tensor(value).view(-1, 1, 1)
    for image, (top, left, height, width) in zip(images, boxes.tolist(), strict=True):
        if height:
            image[:, top : top + height, left : left + width] = colour
    return images


def output_shape(transform: v2.Transform, where: str) -> tuple[int, ...]:
    """(3, H, W) of what a transform makes of any image.

    Raises ConfigError where that depends on the image or on chance.
    """
    images = [torch.zeros(3, height, width, dtype=torch.uint8) for height, width in ((300, 200), (90, 120))]
    with torch.random.fork_rng(devices=[]):
        try:
            shapes = [tuple(transform(image).shape) for image in images * 4]
        except (RuntimeError, ValueError, TypeError) as error:
            raise ConfigError(f"{where}.transform_ops: cannot be applied in this order: {error}") from error
    if len(set(shapes)) > 1:
        raise ConfigError(
            f"{where}.transform_ops: images of different sizes leave with different sizes "
            f"{tuple(dict.fromkeys(shapes))[:2]}; add '- ResizeImage: {{size: N}}'"
        )
    return shapes[0]


def single_ops(transform: v2.Transform) -> list[v2.Transform]:
    """The transforms that a composed one runs, in order.

    V2.Compose keeps them in a plain list, so modules() is blind.
    """
    inner = getattr(transform, "transforms", None)
    return [transform] if inner is None else [op for part in inner for op in single_ops(part)]


def display_image(image: torch.Tensor, transform: v2.Transform) -> torch.Tensor:
    """(H, W, 3) in [0, 1]: a transformed image with every normalisation undone, for looking at."""
    ops = single_ops(transform)
    for op in reversed(ops):
        if isinstance(op, v2.Normalize):
            mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (op.mean, op.std))
            image = image * std + mean
    made_float = next(op for op in ops if isinstance(op, v2.ToDtype))  # the later ones find float, and keep its scale
    return (image if made_float.scale else image / 255).clamp(0, 1).permute(1, 2, 0)
