"""A file becomes an RGB image, or a half sentence says why it cannot.

Whatever a file holds is decoded right or refused: truncated, empty, of another format than its name says, with 16 bits,
alpha, a palette or CMYK, animated, turned, or so large that it might be meant to fill the memory.
"""

import hashlib
import io
import os
import re
import stat
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np
import PIL
import torch
from PIL import Image, ImageOps, UnidentifiedImageError
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm.auto import tqdm

with suppress(ImportError):  # the extra `heic`: photographs of phones
    from pillow_heif import register_heif_opener

    register_heif_opener()

try:  # torchvision is going to hand its decoders over to torchcodec, which needs FFmpeg
    from torchvision.io import ImageReadMode, decode_jpeg
except ImportError:
    decode_jpeg = None


MAX_PIXELS = int(os.environ.get("RECNB_MAX_PIXELS", "64_000_000"))  # what one image may have
Image.MAX_IMAGE_PIXELS = max(MAX_PIXELS, Image.MAX_IMAGE_PIXELS or 0)  # Pillow refuses twice as many
PART = 1000  # as many images of a list are remembered together as decoded
REMEMBERED = Path(
    os.environ.get("XDG_CACHE_HOME") or os.path.expanduser("~/.cache"),  # noqa: PTH111 (never fails)
    "recnb",
    "decoded.txt",
)

REASONS: dict[type[Exception], str] = {  # why an image cannot be used, by what reading it raised
    FileNotFoundError: "is not there",
    IsADirectoryError: "is a folder or a device, no file",
    UnidentifiedImageError: "is empty or of no known image format",
}


class DataError(RuntimeError):
    """Images or list files that cannot be used; the message names the file and the line."""

    def __init__(self, message: str):
        super().__init__(message.encode("utf-8", "backslashreplace").decode())  # file names may be no text


class Cropped(str):
    """The path of an image of which only `box` is meant, (left, top, right, bottom) in pixels."""

    box: tuple[int, ...]

    def __new__(cls, path: str, box: Sequence[int] = ()):
        self = super().__new__(cls, path)
        self.box = tuple(box)
        return self


def printable(text: str) -> str:
    """The text on one line, in signs that can be written: control signs and bytes that are no text become escapes."""
    return re.sub("[\x00-\x1f\x7f\u2028\u2029\ufeff\ud800-\udfff]", lambda sign: ascii(sign[0])[1:-1], text)


def opened(file: str | io.BytesIO) -> Image.Image:
    """The image of a file, only its header read; raises what Pillow raises, also for more than MAX_PIXELS pixels."""
    if isinstance(file, str) and not stat.S_ISREG(os.stat(file).st_mode):  # opening a pipe would wait  # noqa: PTH116
        raise IsADirectoryError
    image = Image.open(file)
    width, height = image.size
    if width * height > MAX_PIXELS:
        image.close()
        raise Image.DecompressionBombError(f"it has {width:,} x {height:,}, and {MAX_PIXELS:,} are allowed.")
    return image


def read_rgb(path: str, box: list[int] | None = None, draft: bool = False) -> Image.Image:
    """Return the image of a file in RGB: its first frame, turned as its EXIF says.

    The format is that of the content, whatever the name's ending. What cannot be read raises what Pillow raises, and
    ValueError where it has no meaning in RGB.

    Args:
        path: the file.
        box: what to cut out, (left, top, right, bottom) in pixels.
        draft: whether JPEG without a box is read whole but computed at an eighth of its size.
    """
    with opened(path) as image:
        if draft and box is None:
            image.draft(None, (1, 1))
        ImageOps.exif_transpose(image, in_place=True)
        place = None if box is None else check_box(box, *image.size)
        rgb = to_rgb(image)
        return rgb if place is None else rgb.crop(place)


def read_pixels(path: str, box: list[int] | None = None) -> torch.Tensor:
    """uint8 (3, H, W), the pixels of `read_rgb`, which raises what cannot be decoded.

    JPEG in colour or grey is decoded by torchvision where it can, in little more than half of the time: both build on
    libjpeg-turbo and give the same bytes. Everything else, and what it refuses, is Pillow's.
    """
    with opened(path) as image:
        plain = decode_jpeg is not None and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L")
    if plain:
        with suppress(RuntimeError):
            data = torch.from_numpy(np.fromfile(path, np.uint8))
            pixels = decode_jpeg(data, ImageReadMode.RGB, apply_exif_orientation=True)
            if box is None:
                return pixels
            left, top, right, bottom = check_box(box, pixels.shape[2], pixels.shape[1])
            return pixels[:, top:bottom, left:right]
    return pil_to_tensor(read_rgb(path, box))


def to_rgb(image: Image.Image) -> Image.Image:
    """The image in RGB as Pillow converts it, but 16-bit grey keeps its upper 8 bits, and what is clear becomes white.

    Pillow would clip 16-bit grey to white. Alpha, of pixels, of a palette or of one colour, is blended onto white:
    without it, what was meant to be hidden would show. CMYK in JPEG is taken as inverted, Adobe's way, as everywhere.
    Raises ValueError for pixels without a known range, and for a transparent colour of 16 bits.
    """
    wide = image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM"))
    clear = image.info.get("transparency")
    if isinstance(clear, int | tuple) and (wide or np.max(clear) > 255):
        raise ValueError("one colour of 16 bits stands for transparent; save it with an alpha channel")
    if wide:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise ValueError(f"its pixels are of kind {image.mode}, which have no known range; save it with 8 or 16 bits")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def reason(error: Exception) -> str:
    """Why an image cannot be used, from what reading it raised: the half sentence behind its name."""
    if isinstance(error, Image.DecompressionBombError):
        return (
            f"has more pixels than is safe to decode: {error} Save it smaller, leave it out, or set "
            "RECNB_MAX_PIXELS=N in the environment where you trust it"
        )
    return REASONS.get(
        type(error),
        f"cannot be decoded: {getattr(error, 'strerror', None) or printable(str(error)) or type(error).__name__}",
    )


def check_box(box: Sequence[int], width: int, height: int) -> tuple[int, int, int, int]:
    """Return the box.

    Args:
        box: (left, top, right, bottom) in pixels.
        width: of the image.
        height: of the image.

    Raises:
        ValueError: The box holds no pixels or reaches out of the image.
    """
    left, top, right, bottom = box
    if not (0 <= left < right <= width and 0 <= top < bottom <= height):
        raise ValueError(
            f"the box {left} {top} {right} {bottom} is not within the {width} x {height} pixels of the image"
        )
    return left, top, right, bottom


def faults(paths: Sequence[str], boxes: np.ndarray | None = None) -> dict[int, str]:
    """{index: reason} of the images that cannot be used: missing, unreadable, truncated, of no known kind, without box.

    All are decoded in threads, JPEG at an eighth of its size: at 400 x 300 pixels and on two cores in half a second a
    thousand. Whole thousands of a list that were fine are noted by path, size and date below ~/.cache/recnb, and not
    decoded again while these stay; where nothing can be written there, nothing is remembered. Found is whatever makes
    the decoder give up. Not found are pixels that are wrong and yet decode, as bytes altered within a JPEG may, and
    what happens to a file later: that is an error of the same words when a batch is made.
    """
    new, remembered = [], set()
    with suppress(OSError):
        remembered.update(REMEMBERED.read_bytes().decode("ascii", "replace").split())

    def look(start: int) -> dict[int, str]:
        part = range(start, min(start + PART, len(paths)))
        mark = fingerprint(paths, boxes, part) if len(part) == PART else None
        if mark in remembered:
            return {}
        found = {i: why for i in part if (why := fault(paths[i], None if boxes is None else boxes[i].tolist()))}
        new.extend([mark] * (mark is not None and not found))
        return found

    found, bar = {}, tqdm(total=len(paths), desc="images checked", unit=" images", leave=False, delay=3)
    with ThreadPoolExecutor(max(8, os.cpu_count() or 1)) as pool, bar:
        for some in pool.map(look, range(0, len(paths), PART)):
            found |= some
            bar.update(min(PART, bar.total - bar.n))
    with suppress(OSError):
        if new:
            REMEMBERED.parent.mkdir(parents=True, exist_ok=True)
            with REMEMBERED.open("a") as file:
                file.write("".join(f"{mark}\n" for mark in new))
    return found


def fault(path: str, box: list[int] | None = None) -> str | None:
    """Why an image cannot be used, or None."""
    try:
        read_rgb(path, box, draft=True)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        return reason(error)
    return None


def fingerprint(paths: Sequence[str], boxes: np.ndarray | None, part: range) -> str | None:
    """Return a digest of path, size, date and box of some images and of the decoder; None where a file is missing.

    Args:
        paths: the files of a list.
        boxes: (N, 4), or None.
        part: which of them.
    """
    digest = hashlib.sha256(PIL.__version__.encode())
    for i in part:
        try:
            file = os.stat(paths[i])  # noqa: PTH116 (a Path takes four times as long)
        except (OSError, ValueError):
            return None
        box = None if boxes is None else boxes[i].tolist()
        digest.update(f"{paths[i]!a} {file.st_size} {file.st_mtime_ns} {box}\n".encode())
    return digest.hexdigest()
