"""The demo set: invented logos, photographed by three invented cameras, drawn on this machine in seconds.

In goes a seed, out come JPEG files and list files of `path label camera`, so a demo takes the path that anybody's own
photographs take. What is easy to get wrong is the split: test identities are never trained on, marks that look alike
stay on one side of it, and an identity's queries come from one camera while its gallery comes from the other two.
"""

import io
import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
from filelock import FileLock
from PIL import Image, ImageDraw, ImageFont

from recnb.demo.photographs import CAMERAS, photograph

VERSION = 1  # raised whenever the same arguments would give other pixels
MANIFEST = "marks.json"  # what was drawn; complete only once all of it is there


class Mark(NamedTuple):
    """One identity; the marks of one group share every attribute but one."""

    shape: str
    glyph: str
    colours: tuple[str, str, str]  # ground, ink, accent
    trim: str
    group: int


# --- The marks ------------------------------------------------------------------------------------------------------

TURN = np.linspace(0, 2 * np.pi, 120, endpoint=False)


def _polar(radius: np.ndarray | float, angle: np.ndarray = TURN) -> np.ndarray:
    return np.stack([radius * np.sin(angle), -radius * np.cos(angle)], 1)  # (N, 2), the first point on top


def _star(points: int, inner: float = 1.0) -> np.ndarray:
    corner = np.arange(2 * points)
    return _polar(np.where(corner % 2, inner * np.cos(np.pi / points), 1.0), corner * np.pi / points)


def _squircle(power: float, width: float = 1.0, height: float = 1.0) -> np.ndarray:
    x, y = _polar(1.0).T
    return np.stack([np.sign(x) * abs(x) ** (2 / power) * width, np.sign(y) * abs(y) ** (2 / power) * height], 1)


def _poly(*numbers: int) -> np.ndarray:
    return np.array(numbers, float).reshape(-1, 2) / 10


def _heart() -> np.ndarray:
    y = 13 * np.cos(TURN) - 5 * np.cos(2 * TURN) - 2 * np.cos(3 * TURN) - np.cos(4 * TURN)
    return np.stack([16 * np.sin(TURN) ** 3, -y - 2], 1) / 16


SHAPES = {  # outlines within -1 to 1, x to the right, y down
    "disc": _polar(1.0),
    "tile": _squircle(6, 0.9, 0.9),
    "diamond": _squircle(1.15, 1.08, 1.08),
    "hexagon": _star(6),
    "pill": _squircle(3, 1.05, 0.72),
    "seal": _polar(0.93 + 0.07 * np.cos(14 * TURN)),
    "flower": _polar(0.88 + 0.14 * np.cos(5 * TURN)),
    "shield": _poly(-9, -9, 0, -10, 9, -9, 9, 0, 7, 5, 4, 8, 0, 10, -4, 8, -7, 5, -9, 0),
    "tag": _poly(-9, -4, -4, -10, 4, -10, 9, -4, 9, 10, -9, 10),
    "trefoil": np.add(_polar(0.86 + 0.2 * np.cos(3 * TURN)), (0, 0.08)),
}
GLYPHS = {
    "star": _star(5, 0.5),
    "spark": _star(4, 0.5),
    "sun": _star(10, 0.65),
    "heart": _heart(),
    "moon": np.concatenate([_polar(1.0, TURN[14:106] + 1.2), np.add(_polar(0.7, TURN[105:15:-1] + 1.2), (0.4, -0.16))]),
    "drop": _polar(1.0) * np.stack([1.05 * np.sin(TURN / 2) ** 1.5, np.ones(120)], 1),
    "bolt": _poly(2, -10, -6, 2, -1, 2, -3, 10, 6, -3, 1, -3, 5, -10),
    "arrow": _poly(0, -10, 9, 0, 4, 0, 4, 10, -4, 10, -4, 0, -9, 0),
    "crown": _poly(-10, -7, -5, 0, 0, -9, 5, 0, 10, -7, 8, 8, -8, 8),
    "cross": _poly(-3, -9, 3, -9, 3, -3, 9, -3, 9, 3, 3, 3, 3, 9, -3, 9, -3, 3, -9, 3, -9, -3, -3, -3),
    "glass": _poly(-8, -9, 8, -9, 2, 0, 8, 9, -8, 9, -2, 0),
    "peaks": _poly(-10, 8, -3, -7, 1, 0, 4, -4, 10, 8),
    "fish": _poly(-10, -6, -5, -2, 0, -6, 5, -5, 10, 0, 5, 5, 0, 6, -5, 2, -10, 6),
    "house": _poly(0, -9, 10, 0, 7, 0, 7, 9, 2, 9, 2, 3, -2, 3, -2, 9, -7, 9, -7, 0, -10, 0),
    **dict.fromkeys("AEKRS"),  # letters have no outline here: the font has them
}
TRIMS = ("ring", "half", "band", "rays", "coin")
PALETTES = (
    ("#14213d", "#f6f1e4", "#e63946"), ("#ffcf33", "#1d1d1b", "#f7f7f2"), ("#0f7a5a", "#fff3d6", "#f2a541"),
    ("#c8102e", "#ffffff", "#222a54"), ("#5b2a86", "#f9d5e5", "#f6a623"), ("#0077b6", "#ffffff", "#ffb703"),
    ("#e76f51", "#fdf6e3", "#264653"), ("#2b2d42", "#ffd166", "#ef476f"), ("#7a4a21", "#f3e2c0", "#3c9d6b"),
    ("#ff8fab", "#33202a", "#fff0f3"), ("#86bbd8", "#1b2a41", "#f26419"), ("#a7c957", "#273a1e", "#fffbe6"),
)  # fmt: skip
SWAPS = ((0, 1, 2), (1, 0, 2), (2, 1, 0), (0, 2, 1), (1, 2, 0))
VARIED = ("glyph", "colours", "shape", "trim")  # the attribute that differs within a group, group after group


def _values(attribute: str, n: int, rng: np.random.Generator) -> list:
    """Different values of one attribute; several colours are swaps within one palette."""
    palette = PALETTES[rng.integers(len(PALETTES))]
    swaps = [tuple(palette[i] for i in swap) for swap in SWAPS]
    pools: dict[str, Sequence] = {"shape": list(SHAPES), "glyph": list(GLYPHS), "colours": swaps, "trim": TRIMS}
    pool = pools[attribute]
    return [pool[i] for i in rng.permutation(len(pool))[:n]]


def design_marks(identities: int = 120, seed: int = 0) -> list[Mark]:
    """The identities of a seed, in groups of three (up to five where the number asks for it) that look alike."""
    _check("identities", identities, 6, 1500)
    _check("seed", seed, 0, 2**31)
    rng, marks, seen = np.random.default_rng([seed, 0]), [], set()
    for group, members in enumerate(np.array_split(np.arange(identities), identities // 3)):
        varied, alike = VARIED[group % len(VARIED)], []
        while not alike or not seen.isdisjoint(mark[:-1] for mark in alike):
            shared = {name: _values(name, 1, rng)[0] for name in VARIED}
            alike = [Mark(**{**shared, varied: value}, group=group) for value in _values(varied, len(members), rng)]
        seen.update(mark[:-1] for mark in alike)
        marks += alike
    return marks


def draw_mark(mark: Mark, size: int = 156) -> Image.Image:
    """The flat artwork of a mark: a square RGBA picture, transparent around the shape."""
    side = 3 * size  # drawn large and reduced, because ImageDraw does not smooth edges
    ground, ink, accent = mark.colours
    art, outline, mask = Image.new("RGB", (side, side), ground), SHAPES[mark.shape], Image.new("L", (side, side))
    draw = ImageDraw.Draw(art)
    ImageDraw.Draw(mask).polygon(_pixels(outline, side, 0.47), fill=255)
    _draw_trim(draw, mark.trim, outline, ground, accent, side)
    glyph = GLYPHS[mark.glyph]
    if glyph is not None:
        draw.polygon(_pixels(glyph, side, 0.28), fill=ink)
    else:
        font = ImageFont.load_default(size=0.64 * side)
        draw.text((side / 2, side / 2), mark.glyph, ink, font, anchor="mm", stroke_width=side // 40, stroke_fill=ink)
    art.putalpha(mask)
    return art.resize((size, size), Image.Resampling.LANCZOS)


def _pixels(points: np.ndarray, side: float, scale: float) -> list[tuple[float, float]]:
    return [(x, y) for x, y in side * (0.5 + scale * points)]


def _draw_trim(draw: ImageDraw.ImageDraw, trim: str, outline: np.ndarray, ground: str, accent: str, side: int) -> None:
    if trim == "ring":
        draw.rectangle((0, 0, side, side), fill=accent)
        draw.polygon(_pixels(outline, side, 0.36), fill=ground)
    elif trim == "half":
        draw.rectangle((side / 2, 0, side, side), fill=accent)
    elif trim == "band":
        draw.rectangle((0, 0.36 * side, side, 0.64 * side), fill=accent)
    elif trim == "coin":
        draw.ellipse((0.19 * side, 0.19 * side, 0.81 * side, 0.81 * side), fill=accent)
    else:
        for start in range(0, 360, 45):
            draw.pieslice((-side, -side, 2 * side, 2 * side), start, start + 22, fill=accent)


# --- The set on disk ------------------------------------------------------------------------------------------------


def draw_marks(root, identities: int = 120, renderings: int = 24, size: int = 96, seed: int = 0) -> dict[str, Path]:
    """Return the paths under `root`: images, train, query, gallery; drawn unless the same set is there already.

    Two thirds of the groups are for training. Rendering r is by camera r modulo 3; the queries of test identity i are
    its pictures by camera i modulo 3, its gallery those by the other two. The same arguments and library versions give
    the same bytes.

    Args:
        root: the folder.
        identities: how many marks, 6 to 1500.
        renderings: photographs of each, 3 to 999.
        size: pixels of a side, 32 to 512.
        seed: of all draws.

    Raises:
        ValueError: The sizes cannot be, or the folder holds something else.
    """
    marks, root = design_marks(identities, seed), Path(root)
    _check("renderings", renderings, len(CAMERAS), 999)
    _check("size", size, 32, 512)
    made = {"drawn by": __name__, "version": VERSION, "identities": identities, "renderings": renderings, "size": size}
    made, lists = {**made, "seed": seed, "complete": True}, _lists(marks, renderings)
    if not _there(root, made, lists):
        root.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(root.with_name(f".{root.name}.lock")):  # another process may be drawing it
            if not _there(root, made, lists):
                _clear(root)
                _write(root / MANIFEST, json.dumps({**made, "complete": False}))
                for name, lines in lists.items():
                    _write(root / f"{name}.txt", "".join(f"{line}\n" for line in lines))
                with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and numpy work outside the interpreter's lock
                    draw = partial(_draw_identity, root, renderings=renderings, size=size, seed=seed)
                    list(pool.map(draw, marks, range(identities)))
                _write(root / MANIFEST, json.dumps(made))
    return {"images": root / "images", **{name: root / f"{name}.txt" for name in lists}}


def _check(name: str, value: int, low: int, high: int) -> None:
    if not isinstance(value, int) or not low <= value <= high:
        raise ValueError(f"{name} must be a whole number from {low} to {high}, not {value!r}")


def _path(label: int, rendering: int) -> str:
    return f"{label:04d}/camera{rendering % len(CAMERAS)}_{rendering // len(CAMERAS):02d}.jpg"


def _lists(marks: list[Mark], renderings: int) -> dict[str, list[str]]:
    """The lines of each list file; labels count on from training to test."""
    lists, train_groups = {"train": [], "query": [], "gallery": []}, round((marks[-1].group + 1) * 2 / 3)
    for label, mark in enumerate(marks):
        for r in range(renderings):
            part = "train" if mark.group < train_groups else "gallery" if (r - label) % len(CAMERAS) else "query"
            lists[part].append(f"{_path(label, r)} {label} {r % len(CAMERAS)}")
    return lists


def _draw_identity(root: Path, mark: Mark, label: int, renderings: int, size: int, seed: int) -> None:
    art = draw_mark(mark)
    for r in range(renderings):
        file, camera = io.BytesIO(), r % len(CAMERAS)
        picture = photograph(art, camera, np.random.default_rng([seed, label, r]), size)
        picture.save(file, "JPEG", quality=CAMERAS[camera].quality)
        _write(root / "images" / _path(label, r), file.getvalue())


def _manifest(root: Path) -> dict | None:
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        return None
    return found if isinstance(found, dict) and found.get("drawn by") == __name__ else None


def _there(root: Path, made: dict, lists: dict[str, list[str]]) -> bool:
    """Return whether the very set is there and complete."""
    if _manifest(root) != made:
        return False
    files = {name: root / f"{name}.txt" for name in lists}
    same = all(file.is_file() and file.read_text().splitlines() == lists[name] for name, file in files.items())
    return same and all((root / "images" / line.split()[0]).is_file() for lines in lists.values() for line in lines)


def _clear(root: Path) -> None:
    """Remove an earlier set; a folder that is not marked as ours is refused, because this deletes."""
    if _manifest(root) is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} holds something other than a drawn set; name a new or an empty folder")
    shutil.rmtree(root / "images", ignore_errors=True)


def _write(path: Path, data: str | bytes) -> None:
    """Puts a whole file in place at once: an interrupted run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    part.replace(path)
