"""Pictures and names for galleries: files, arrays or images in, RGB arrays and short texts out."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from recnb.data.images import opened, printable, reason, to_rgb

Picture = str | Path | Image.Image | np.ndarray  # an array is uint8, (H, W) or (H, W, 3)
Names = Sequence[str] | np.ndarray | Mapping | None  # identity -> text


def read_picture(picture: Picture, size: int) -> Image.Image:
    """Return the picture in RGB, upright, at most size x size.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it cannot be read; the message names it.
    """
    if isinstance(picture, (str, Path)):
        return _read_file(Path(picture), size, getattr(picture, "box", None))
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    picture = to_rgb(ImageOps.exif_transpose(picture))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def _read_file(path: Path, size: int, box: tuple | None) -> Image.Image:
    try:
        with opened(str(path)) as image:
            if box is None:
                image.draft("RGB", (2 * size, 2 * size))  # the JPEG decoder shrinks: many times faster on photographs
            ImageOps.exif_transpose(image, in_place=True)
            return read_picture(to_rgb(image) if box is None else to_rgb(image).crop(box), size)
    except FileNotFoundError:
        raise FileNotFoundError(f"the picture '{path}' does not exist (working directory: {Path.cwd()})") from None
    except Exception as error:  # a damaged file makes decoders raise anything
        raise ValueError(f"the picture '{path}' cannot be read: it {reason(error)}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] in (3, 4))):
        raise ValueError(f"a picture is a uint8 array (H, W) or (H, W, 3), not {array.dtype} {array.shape}")
    return Image.fromarray(flat)


def label_text(label, names: Names = None) -> str:
    """Return what an identity is called: its name, or without names the label if it is text, otherwise 'id 7'."""
    plain = str(label) if isinstance(label, str) else f"id {label}"
    if isinstance(names, Mapping):
        return printable(str(names.get(label, plain)))
    return printable(plain if names is None else str(names[label]))


def shorten(text: str, n: int) -> str:
    """Return the text in at most n characters; what is too long loses its middle, since names differ at their ends."""
    head = (n - 1) // 2
    return text if len(text) <= n else f"{text[:head]}…{text[len(text) - (n - 1 - head) :]}"
