"""The demo set: invented logos, photographed by three invented cameras, drawn on this machine in seconds.

In goes a seed, out come JPEG files and list files of `path label camera`, so a demo takes the path that anybody's own
photographs take. What is easy to get wrong is the split: test identities are never trained on, marks that look alike
stay on one side of it, and an identity's queries come from one camera while its gallery comes from the other two.
"""
import io
import json
import os
import shutil
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter, ImageFont
from PIL.Image import Resampling, Transform

VERSION = 1  # raised whenever the same arguments would give other pixels
MANIFEST = "marks.json"  # what was drawn; complete only once all of it is there
CANVAS = 192  # pixels of the panel on which a mark is printed, before it is photographed


class Mark(NamedTuple):
    """One identity; the marks of one group share every attribute but one."""

    shape: str
    glyph: str
    colours: tuple[str, str, str]  # ground, ink, accent
    trim: str
    group: int


class Camera(NamedTuple):
    """What a camera does to every picture that it takes."""

    tint: tuple[float, float, float]  # gains of red, green, blue
    contrast: float
    saturation: float
    blur: float  # pixels of a 96-pixel picture
    noise: float  # grey levels
    detail: float  # the sensor's side as a share of the picture's
    quality: int  # of the JPEG file
    yaw: float  # degrees from the front
    pitch: float


CAMERAS = (
    Camera((0.98, 1.10, 1.28), 1.05, 0.95, 0.4, 4, 1.0, 82, -24, 6),  # a phone in the street: cool, crisp
    Camera((1.26, 1.03, 0.74), 1.15, 1.00, 0.8, 6, 0.8, 62, 22, -12),  # in a shop: lamplight, contrast
    Camera((0.80, 1.08, 0.88), 0.80, 0.60, 0.6, 8, 0.6, 45, 4, 28),  # at night: green, coarse, noisy, from above
)

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
    pool = {"shape": list(SHAPES), "glyph": list(GLYPHS), "colours": swaps, "trim": TRIMS}[attribute]
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
    if GLYPHS[mark.glyph] is not None:
        draw.polygon(_pixels(GLYPHS[mark.glyph], side, 0.28), fill=ink)
    else:
        font = ImageFont.load_default(size=0.64 * side)
        draw.text((side / 2, side / 2), mark.glyph, ink, font, anchor="mm", stroke_width=side // 40, stroke_fill=ink)
    art.putalpha(mask)
    return art.resize((size, size), Resampling.LANCZOS)


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


# --- The things they are printed on ---------------------------------------------------------------------------------

SURFACES = {  # colours in which a material comes
    "paper": ((238, 234, 224), (250, 250, 246), (226, 231, 236)),
    "carton": ((190, 150, 104), (205, 170, 125), (168, 128, 86)),
    "cloth": ((64, 84, 110), (196, 192, 180), (120, 50, 54), (88, 104, 78)),
    "metal": ((176, 182, 188), (206, 206, 202), (120, 128, 134)),
    "wood": ((164, 112, 66), (198, 152, 100), (110, 74, 48)),
    "paint": ((34, 92, 140), (232, 190, 60), (70, 128, 92), (200, 76, 60), (240, 240, 240)),
}


@cache
def _texture(material: str) -> Image.Image:
    """The grain of a material, to multiply its colour with."""
    rng, (y, x) = np.random.default_rng(1), np.mgrid[:CANVAS, :CANVAS].astype(np.float32)

    def clouds(across: int, down: int) -> np.ndarray:
        coarse = Image.fromarray(rng.integers(0, 256, (down, across), dtype=np.uint8))
        return np.asarray(coarse.resize((CANVAS, CANVAS), Resampling.BICUBIC), np.float32) / 255

    grain = {
        "paper": lambda: 0.06 * clouds(40, 40) + 0.06 * clouds(3, 3),
        "carton": lambda: 0.05 * np.sin(x * 0.9) + 0.05 + 0.12 * clouds(9, 9),
        "cloth": lambda: 0.06 * np.sin(x * 1.4) * np.sin(y * 1.4) + 0.06 + 0.3 * clouds(5, 4),
        "metal": lambda: 0.15 * clouds(3, 96) + 0.15 * clouds(2, 2),
        "wood": lambda: 0.08 + 0.08 * np.sin(y * 0.3 + 9 * clouds(3, 6)) + 0.12 * clouds(6, 80),
        "paint": lambda: 0.10 * clouds(4, 4) + 0.10 * (clouds(24, 24) > 0.82),
    }[material]()
    return Image.fromarray((255 * (1 - grain)).clip(0, 255).astype(np.uint8)).convert("RGB")


def _panel(art: Image.Image, rng: np.random.Generator) -> Image.Image:
    """A mark printed on a sheet, box, cloth, plate, board or sign, seen from the front (RGBA)."""
    material = list(SURFACES)[rng.integers(len(SURFACES))]
    colour = SURFACES[material][rng.integers(len(SURFACES[material]))]
    panel, mask = Image.new("RGB", (CANVAS, CANVAS), colour), Image.new("L", (CANVAS, CANVAS))
    draw, dark = ImageDraw.Draw(panel), tuple(int(0.6 * c) for c in colour)
    left, top, right, bottom = edge = rng.integers((0, 0, CANVAS - 18, CANVAS - 18), (18, 18, CANVAS, CANVAS)).tolist()
    ImageDraw.Draw(mask).rounded_rectangle(edge, radius=20 if material in ("metal", "paint") else 3, fill=255)
    if material == "paper":
        for row in range(CANVAS - 24, CANVAS, 7):
            draw.line((34, row, int(rng.integers(80, CANVAS - 24)), row), fill=dark, width=2)
    elif material == "carton":
        draw.rectangle((CANVAS * 0.42, 0, CANVAS * 0.58, CANVAS), fill=tuple(min(255, c + 22) for c in colour))
    elif material in ("metal", "paint"):
        draw.rounded_rectangle((left + 5, top + 5, right - 5, bottom - 5), 16, outline=dark, width=3)
    panel.paste(art, tuple(int(v) for v in (CANVAS - art.width) // 2 + rng.integers(-6, 7, 2)), art)
    panel = ImageChops.multiply(panel, _texture(material))
    panel.putalpha(mask)
    return panel


# --- The places they are photographed in, all 96 pixels wide --------------------------------------------------------


def _shade(rng: np.random.Generator, *colours: tuple[int, int, int]) -> tuple[int, ...]:
    r, g, b = colours[rng.integers(len(colours))]
    dr, dg, db = rng.integers(-16, 17, 3).tolist()
    return min(255, max(0, r + dr)), min(255, max(0, g + dg)), min(255, max(0, b + db))


def _street(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 96, 96), fill=_shade(rng, (176, 204, 232), (208, 214, 220), (150, 180, 214)))
    x = -5
    while x < 96:
        width, top = (int(v) for v in rng.integers((18, 0), (48, 48)))
        draw.rectangle((x, top, x + width, 96), fill=_shade(rng, (150, 110, 96), (196, 186, 170), (120, 126, 134)))
        glass, step = _shade(rng, (70, 86, 104), (230, 220, 170), (196, 214, 226)), int(rng.integers(7, 11))
        for left in range(x + 3, x + width - 3, step):
            for row in range(top + 4, 96, step + 2):
                draw.rectangle((left, row, left + step // 2, row + step // 2), fill=glass)
        x += width
    draw.rectangle((0, int(rng.integers(72, 92)), 96, 96), fill=_shade(rng, (96, 98, 104), (130, 140, 110)))
    for x, y, r in rng.integers((0, 0, 4), (96, 30, 12), (int(rng.integers(3, 9)), 3)).tolist():
        draw.ellipse((x - r, y - r, x + r, y + r), fill=_shade(rng, (70, 110, 60), (92, 132, 72)))


def _shop(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 96, 96), fill=_shade(rng, (96, 66, 44), (140, 104, 72), (70, 56, 50)))
    goods, y = ((170, 70, 56), (216, 178, 96), (76, 112, 124), (232, 222, 202), (96, 120, 84), (150, 104, 120)), 0
    while y < 96:
        height, x = int(rng.integers(24, 46)), int(rng.integers(-8, 2))
        while x < 96:
            wide, tall, gap = (int(v) for v in rng.integers((6, 12, 1), (20, height, 3)))
            draw.rounded_rectangle((x, y + height - tall, x + wide, y + height), 2, fill=_shade(rng, *goods))
            draw.rectangle((x + 1, y + height - tall // 2, x + wide - 1, y + height - 4), fill=_shade(rng, *goods))
            x += wide + gap
        draw.rectangle((0, y + height, 96, y + height + 4), fill=_shade(rng, (176, 132, 86), (210, 176, 130)))
        y += height + 5


def _night(draw: ImageDraw.ImageDraw, rng: np.random.Generator) -> None:
    draw.rectangle((0, 0, 96, 96), fill=_shade(rng, (34, 38, 52), (48, 44, 58), (30, 48, 52)))
    for x, y, w, h in rng.integers(0, 96, (5, 4)).tolist():
        draw.rectangle((x, y, x + w // 2, y + h), fill=_shade(rng, (60, 64, 78), (28, 30, 36), (84, 78, 76)))
    for x, y, r in rng.integers((0, 0, 2), (96, 96, 9), (int(rng.integers(10, 20)), 3)).tolist():
        lamp = _shade(rng, (255, 200, 110), (255, 120, 90), (120, 200, 255), (190, 255, 170), (255, 240, 210))
        draw.ellipse((x - r, y - r, x + r, y + r), fill=(*lamp, int(rng.integers(60, 200))))


PLACES = (_street, _shop, _night)  # one for each camera


def _background(camera: int, size: int, rng: np.random.Generator) -> Image.Image:
    """A place out of focus, strewn with bright shapes, so that a patch of colour alone means nothing."""
    place = Image.new("RGB", (96, 96))
    draw = ImageDraw.Draw(place, "RGBA")
    PLACES[camera](draw, rng)
    for _ in range(int(rng.integers(0, 4))):
        x, y, radius, corners = (int(v) for v in rng.integers((0, 0, 6, 3), (96, 96, 13, 9)))
        for share in (1.0, 0.5):
            bright = _shade(rng, (230, 57, 70), (255, 209, 102), (0, 119, 182), (250, 246, 236), (40, 43, 66))
            draw.regular_polygon((x, y, radius * share), corners, rotation=17 * radius, fill=bright)
    return place.filter(ImageFilter.GaussianBlur(rng.uniform(0.7, 2.2))).resize((size, size), Resampling.BICUBIC)


# --- The photograph -------------------------------------------------------------------------------------------------


def _corners(camera: Camera, rng: np.random.Generator) -> np.ndarray:
    """Where the panel's corners fall: a square in space, turned, seen from a finite distance; (4, 2), 0 to 1."""
    yaw, pitch, roll = np.radians(rng.normal((camera.yaw, camera.pitch, 0), (10, 8, 9)))
    x, y = np.array([(-1, -1), (1, -1), (1, 1), (-1, 1)]).T
    x, y = x * np.cos(roll) - y * np.sin(roll), x * np.sin(roll) + y * np.cos(roll)
    depth = 1 + 0.3 * (x * np.sin(yaw) + y * np.sin(pitch))
    plane = np.stack([x * np.cos(yaw), y * np.cos(pitch)], 1) / depth[:, None]
    return 0.5 + rng.normal(0, 0.04, 2) + rng.uniform(0.40, 0.58) * plane


def _warp(panel: Image.Image, corners: np.ndarray, side: int) -> Image.Image:
    rows, targets = [], []
    for (x, y), (u, v) in zip(corners * side, np.array([(0, 0), (1, 0), (1, 1), (0, 1)]) * CANVAS, strict=True):
        rows += [[x, y, 1, 0, 0, 0, -u * x, -u * y], [0, 0, 0, x, y, 1, -v * x, -v * y]]
        targets += [u, v]
    plane = np.linalg.solve(np.array(rows), np.array(targets))
    return panel.transform((side, side), Transform.PERSPECTIVE, tuple(plane), Resampling.BILINEAR)


LEAF = np.array([(0, -13), (3, -8), (4, -2), (3, 6), (0, 13), (-3, 6), (-4, -2), (-3, -8)]) / 100


def _occlude(layer: Image.Image, rng: np.random.Generator) -> None:
    """Something in front, at times: a pole, a strip of tape, or leaves that hang in from a corner."""
    draw, side, kind = ImageDraw.Draw(layer), layer.width, rng.integers(5)
    if kind == 0:
        x, width = side * rng.uniform(0.15, 0.85), side * rng.uniform(0.03, 0.08)
        draw.rectangle((x, 0, x + width, side), fill=_shade(rng, (70, 74, 80), (130, 130, 134), (92, 70, 54)))
        draw.rectangle((x, 0, x + width / 3, side), fill=_shade(rng, (150, 154, 160)))
    elif kind == 1:
        x, y, slope = side * rng.uniform((-0.1, 0.2, -0.3), (0.5, 0.8, 0.3))
        draw.line((x, y, x + side * 0.6, y + slope), _shade(rng, (224, 214, 180), (70, 130, 180)), side // 13)
    elif kind == 2:
        corner = side * np.array([rng.choice([0.05, 0.95]), rng.choice([0.1, 0.9])])
        for a in rng.uniform(0, 2 * np.pi, 9):
            leaf = LEAF @ np.array([(np.cos(a), -np.sin(a)), (np.sin(a), np.cos(a))]) + rng.normal(0, 0.12, 2)
            leaf = side * leaf + corner
            draw.polygon([tuple(p) for p in leaf], fill=_shade(rng, (58, 98, 48), (84, 126, 60), (120, 140, 62)))


def _light(size: int, rng: np.random.Generator) -> np.ndarray:
    """A lamp from one side and, at times, a shadow across: (size, size, 1), about 1."""
    y, x = np.mgrid[-1 : 1 : size * 1j, -1 : 1 : size * 1j].astype(np.float32)
    angle, turn = rng.uniform(0, 2 * np.pi, 2)
    light = rng.uniform(0.9, 1.15) + rng.uniform(0.05, 0.3) * (x * np.cos(angle) + y * np.sin(angle))
    if rng.random() < 0.45:
        depth = (x * np.cos(turn) + y * np.sin(turn) - rng.uniform(-0.4, 0.4)) / rng.uniform(0.02, 0.15)
        light *= 1 - rng.uniform(0.25, 0.5) / (1 + np.exp(-depth.clip(-30, 30)))
    return light[..., None].astype(np.float32)


def _expose(scene: np.ndarray, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """A camera's colours: white balance, saturation, contrast."""
    pixels = scene * (np.array(camera.tint) * rng.normal(1, 0.04, 3)).astype(np.float32)
    grey = pixels @ np.full((3, 1), 1 / 3, np.float32)
    saturation = camera.saturation * rng.uniform(0.85, 1.1)
    pixels = 125 + camera.contrast * rng.uniform(0.9, 1.1) * (grey + saturation * (pixels - grey) - 125)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _sense(picture: Image.Image, camera: Camera, rng: np.random.Generator) -> Image.Image:
    """What the sensor makes of it: defocus, motion, few pixels, noise."""
    size = picture.width
    picture = picture.filter(ImageFilter.GaussianBlur(camera.blur * size / 96 * rng.uniform(0.5, 1.4)))
    if rng.random() < 0.25:
        shift = [int(s) for s in rng.normal(0, 0.025 * size, 2)]
        picture = Image.blend(picture, ImageChops.offset(picture, *shift), 0.5)
    sensor = int(size * camera.detail * rng.uniform(0.85, 1))
    pixels = np.asarray(picture.resize((sensor, sensor), Resampling.BOX), np.float32)
    pixels = pixels + camera.noise * rng.standard_normal(pixels.shape, np.float32)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).resize((size, size), Resampling.BICUBIC)


def photograph(art: Image.Image, camera: int, rng: np.random.Generator, size: int = 96) -> Image.Image:
    """A photograph (RGB, size x size) of the artwork, printed on something, somewhere, as that camera sees it."""
    scene, look = _background(camera, size, rng), CAMERAS[camera]
    front = _warp(_panel(art, rng), _corners(look, rng), 2 * size)  # at twice the size, to smooth its edges
    _occlude(front, rng)
    front = front.reduce(2)
    shadow = ImageChops.offset(front.getchannel("A").point(lambda alpha: alpha // 2), size // 40, size // 24)
    scene.paste((12, 12, 20), (0, 0), shadow.filter(ImageFilter.GaussianBlur(size / 40)))
    scene.paste(front, (0, 0), front)
    return _sense(_expose(np.asarray(scene, np.float32) * _light(size, rng), look, rng), look, rng)


# --- The set on disk ------------------------------------------------------------------------------------------------


def draw_marks(root, identities: int = 120, renderings: int = 24, size: int = 96, seed: int = 0) -> dict[str, Path]:
    """The paths of the set under `root`: images, train, query, gallery; drawn unless the same set is there already.

    Two thirds of the groups are for training. Rendering r is by camera r modulo 3; the queries of test identity i are
    its pictures by camera i modulo 3, its gallery those by the other two. Raises ValueError for sizes that cannot be,
    and for a folder that holds something else. The same arguments and library versions give the same bytes.
    """
    marks, root = design_marks(identities, seed), Path(root)
    _check("renderings", renderings, len(CAMERAS), 999)
    _check("size", size, 32, 512)
    made = {"drawn by": __name__, "version": VERSION, "identities": identities, "renderings": renderings, "size": size}
    made, found, lists = {**made, "seed": seed, "complete": True}, _manifest(root), _lists(marks, renderings)
    if found != made or not _whole(root, lists):
        _clear(root, found)
        _write(root / MANIFEST, json.dumps({**made, "complete": False}))
        for name, lines in lists.items():
            _write(root / f"{name}.txt", "".join(f"{line}\n" for line in lines))
        with ThreadPoolExecutor(os.cpu_count()) as pool:  # Pillow and numpy work outside the interpreter's lock
            list(pool.map(lambda i: _draw_identity(root, marks[i], i, renderings, size, seed), range(identities)))
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


def _whole(root: Path, lists: dict[str, list[str]]) -> bool:
    files = {name: root / f"{name}.txt" for name in lists}
    same = all(file.is_file() and file.read_text().splitlines() == lists[name] for name, file in files.items())
    return same and all((root / "images" / line.split()[0]).is_file() for lines in lists.values() for line in lines)


def _clear(root: Path, found: dict | None) -> None:
    """Removes an earlier set; a folder that is not marked as ours is refused, because this deletes."""
    if found is None and root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise ValueError(f"{root} holds something other than a drawn set; name a new or an empty folder")
    shutil.rmtree(root / "images", ignore_errors=True)


def _write(path: Path, data: str | bytes) -> None:
    """Puts a whole file in place at once: an interrupted run leaves no half of one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f"{path.name}.{os.getpid()}.part")
    part.write_bytes(data.encode() if isinstance(data, str) else data)
    part.replace(path)
