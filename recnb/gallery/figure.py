"""The gallery as a figure: a row of pictures for each query, with its numbers beside it.

An item that the protocol leaves out (the query's own picture, the same identity seen by the same camera) takes no rank:
what follows it moves up, as in the metrics.
"""

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as MarkerPath
from PIL import Image, ImageColor, ImageOps

from recnb.gallery.fonts import drawn_label, legible
from recnb.gallery.pictures import Names, Picture, read_picture, shorten
from recnb.retrieval.lists import EXCLUDED, RIGHT, WRONG, Ranking, choose_rows

# Okabe and Ito's blue and vermillion: told apart with every common colour vision, and on white as on black.
COLOURS = {RIGHT: "#0072B2", WRONG: "#D55E00", EXCLUDED: "#7F7F7F"}


TILE, GAP, NOTES, CAPTION, HEAD = 0.9, 0.08, 1.75, 0.42, 0.48  # inches
INK, SOFT, PAPER, MAT = "#1A1A1A", "#5C5C5C", "#FFFFFF", "#F1F1EF"
SIGNS = {RIGHT: MarkerPath([(-0.9, 0.0), (-0.25, -0.65), (0.95, 0.75)]), WRONG: "x", EXCLUDED: "_"}


def panels(rows: int, columns: int, size: tuple[float, float], **options) -> tuple[Figure, np.ndarray]:
    """Return a white figure and its axes (rows, columns).

    A notebook shows it once, as a cell's value: it is closed, so that pyplot does not show it again.

    Args:
        rows: How many rows of axes.
        columns: How many columns.
        size: Width and height in inches.
        options: For `pyplot.subplots`.
    """
    look: dict[str, Any] = {"dpi": 100, "facecolor": "white", "layout": "constrained"}
    figure, axes = plt.subplots(rows, columns, figsize=size, squeeze=False, **look | options)
    plt.close(figure)
    return figure, axes


class PaletteCanvas(FigureCanvasAgg):
    """Writes PNG in 256 colours fitted to the figure, which takes a third of the room in a notebook."""

    def print_png(self, filename_or_obj, *, metadata=None, pil_kwargs=None, **_):
        buffer = io.BytesIO()
        super().print_png(buffer, metadata=metadata, pil_kwargs=pil_kwargs)
        with Image.open(buffer) as image:
            image = image.convert("RGB")
            sample = image.resize((image.width // 4, image.height // 4), Image.Resampling.NEAREST)
            fitted = sample.quantize(250, kmeans=2)  # without k-means, small vivid areas (a brand's blue) turn grey
            own = [channel for colour in (INK, *COLOURS.values()) for channel in ImageColor.getrgb(colour)]
            fitted.putpalette(fitted.getpalette()[:750] + own)
            image = image.quantize(palette=fitted, dither=Image.Dither.NONE)
            corner, palette = image.getpixel((0, 0)), image.getpalette()
            palette[3 * corner : 3 * corner + 3] = ImageColor.getrgb(PAPER)  # the fit leaves it slightly grey
            image.putpalette(palette)
            image.save(filename_or_obj, format="png", optimize=True, dpi=(self.figure.dpi, self.figure.dpi))


def gallery_figure(
    ranking: Ranking,
    query_images: Sequence[Picture],
    gallery_images: Sequence[Picture],
    rows: Sequence[int] | None = None,
    k: int = 8,
    label_names: Names = None,
    title: str = "Nearest neighbours",
) -> Figure:
    """Return a figure with a row per query: its numbers, its picture, its first k hits, framed and signed.

    The background is opaque and every colour is set, so that a dark theme or style leaves it as it is.

    Args:
        ranking: what is shown, as `recnb.retrieval.rank` judges it.
        query_images: a file, image or array for each query.
        gallery_images: the same for each gallery item.
        rows: the queries to show, by default those of `choose_rows`.
        k: how many hits of each query.
        label_names: from identity to text, a list or a mapping.
        title: the heading.
    """
    shown, k = choose_rows(ranking) if rows is None else np.asarray(rows), min(k, ranking.ids.shape[1])
    width, height = NOTES + (k + 1) * (TILE + GAP) + 3 * GAP, HEAD + len(shown) * (TILE + CAPTION)
    fig = plt.figure(figsize=(width, height), dpi=100, facecolor=PAPER, layout="none")
    plt.close(fig)  # as in `panels`
    PaletteCanvas(fig)
    head = fig.add_axes((0, 1 - HEAD / height, 1, HEAD / height), xlim=(0, width), ylim=(0, HEAD), label="head")
    _draw_head(head, title, [s for s in SIGNS if (ranking.state[shown, :k] == s).any()])
    for line, q in enumerate(shown):
        bottom = height - HEAD - line * (TILE + CAPTION) - TILE
        for place in range(-1, k):  # -1: the query itself
            left = NOTES + (place + 1) * (TILE + GAP) + (2 * GAP if place >= 0 else 0)
            box = (left / width, bottom / height, TILE / width, TILE / height)
            if place < 0:
                _draw_query(fig.add_axes(box, label=f"query {q}"), ranking, q, k, query_images, label_names)
            elif ranking.ids[q, place] >= 0:
                _draw_hit(
                    fig.add_axes(box, label=f"query {q}, hit {place}"), ranking, q, place, gallery_images, label_names
                )
    return legible(fig)


def _draw_query(ax: Axes, ranking: Ranking, q: int, k: int, images: Sequence[Picture], names: Names) -> None:
    _draw_tile(ax, images[q], INK, 1.0)
    notes = ["no positive", "in the gallery"]
    if ranking.valid[q]:
        notes = [f"AP {ranking.AP[q]:.3f}", f"first hit: rank {ranking.first_hit[q]}"]
        missed = ", ".join(str(rank) for _, rank, _ in ranking.missed(q, k))
        notes += [f"next right: {missed}"] if missed else []
    lines = _wrap(drawn_label(ranking.query_labels[q], names), 20)
    for i, line in enumerate(lines + notes):
        ax.annotate(  # to the left of the tile, ending at its edge
            line,
            (0, 0.99 - 0.165 * i),
            (-7, 0),
            xycoords="axes fraction",
            textcoords="offset points",
            ha="right",
            va="top",
            parse_math=False,
            fontsize=8,
            fontweight="bold" if i < len(lines) else "normal",
            color=SOFT if "next right" in line else INK,
        )


def _wrap(text: str, n: int) -> list[str]:
    """Return the text in one line, or in two of n characters, split at a space or, without one, after / _ or -."""
    if len(text) <= n:
        return [text]
    cut = text.rfind(" ", 0, n + 1) + 1 or max(text.rfind(sign, 0, n) + 1 for sign in "/_-")
    return [text[:cut].strip(), shorten(text[cut:], n)] if cut else [shorten(text, n)]


def _draw_hit(ax: Axes, ranking: Ranking, q: int, place: int, images: Sequence[Picture], names: Names) -> None:
    item, state, position = ranking.ids[q, place], str(ranking.state[q, place]), ranking.position[q, place]
    dashed = (0, (2.2, 1.4))
    _draw_tile(ax, images[item], COLOURS[state], 2.4, dashed if state == EXCLUDED else "-")
    _draw_sign(ax, state, (0.93, 0.93), ax.transAxes)
    ax.set_xlabel(f"{position or '-'} · {ranking.scores[q, place]:.3f}", fontsize=8, color=INK, labelpad=2)
    below = {RIGHT: "", EXCLUDED: "own camera", WRONG: shorten(drawn_label(ranking.gallery_labels[item], names), 14)}
    ax.annotate(
        below[state],
        (0.5, 0),
        (0, -14),
        xycoords="axes fraction",
        textcoords="offset points",
        ha="center",
        parse_math=False,
        va="top",
        fontsize=8,
        color=SOFT,
    )


def _draw_tile(ax: Axes, picture: Picture, colour: str, width: float, style="-") -> None:
    """Draw the whole picture in the middle of a square, framed."""
    pixels = round(TILE * ax.figure.dpi)
    tile = ImageOps.pad(read_picture(picture, pixels), (pixels, pixels), color=MAT)
    ax.imshow(tile, interpolation="nearest", alpha=1 if style == "-" else 0.4)
    ax.set(xticks=[], yticks=[])
    ax.spines[:].set(visible=True, color=colour, linewidth=width, linestyle=style)


def _draw_sign(ax: Axes, state: str, at: tuple[float, float], transform) -> None:
    """Draw a disc in the colour of the state with its sign, without a font, since few have these signs."""
    style = {"transform": transform, "clip_on": False, "linestyle": "none", "zorder": 9}
    ax.plot(*at, marker="o", markersize=11, color=COLOURS[state], markeredgecolor=PAPER, markeredgewidth=1, **style)
    ax.plot(*at, marker=SIGNS[state], markersize=5.5, color="none", markeredgecolor=PAPER, markeredgewidth=1.6, **style)


def _draw_head(ax: Axes, title: str, states: list[str]) -> None:
    """Draw the title, and what the signs mean."""
    ax.set_axis_off()
    ax.text(0.1, HEAD - 0.13, title, fontsize=10.5, fontweight="bold", color=INK, va="top", parse_math=False)
    x = NOTES + TILE + 3 * GAP
    meaning = {RIGHT: "right", WRONG: "wrong", EXCLUDED: "own camera: not counted"}
    for state in states:
        _draw_sign(ax, state, (x + 0.08, HEAD - 0.21), ax.transData)
        ax.text(x + 0.22, HEAD - 0.215, meaning[state], fontsize=8, color=INK, va="center")
        x += 0.75
