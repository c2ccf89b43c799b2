"""The photographs of the demo set: a flat piece of artwork goes in, a small photograph of it comes out.

It is printed on something, put somewhere and seen at an angle by one of three cameras, each with colours, sharpness
and noise of its own. The cameras must differ more than the marks do, or finding the same colours would be enough.
"""

from functools import cache
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageChops, ImageDraw, ImageFilter
from PIL.Image import Resampling, Transform

CANVAS = 192  # pixels of the panel on which the artwork is printed, before it is photographed


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
    x, y = ((CANVAS - art.width) // 2 + rng.integers(-6, 7, 2)).tolist()
    panel.paste(art, (x, y), art)
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
    """Return a photograph (RGB, size x size) of the artwork, printed on something, somewhere, as that camera sees it.

    Args:
        art: the artwork (RGBA).
        camera: which of CAMERAS.
        rng: what draws everything else.
        size: pixels of a side.
    """
    scene, look = _background(camera, size, rng), CAMERAS[camera]
    front = _warp(_panel(art, rng), _corners(look, rng), 2 * size)  # at twice the size, to smooth its edges
    _occlude(front, rng)
    front = front.reduce(2)
    shadow = ImageChops.offset(front.getchannel("A").point(lambda alpha: alpha // 2), size // 40, size // 24)
    scene.paste((12, 12, 20), (0, 0), shadow.filter(ImageFilter.GaussianBlur(size / 40)))
    scene.paste(front, (0, 0), front)
    return _sense(_expose(np.asarray(scene, np.float32) * _light(size, rng), look, rng), look, rng)
