"""Galleries: what a model retrieves, seen picture by picture, with the numbers of `recnb.metrics` beside it.

`rank` judges each query's list; `gallery_figure`, `gallery_html` and `gallery_widget` show it. Plain arrays and lists
go in, so they serve anybody's embeddings. An item left out by the protocol (the query's own picture, the same identity
seen by the same camera) takes no rank: what stands behind it moves up, here as in the metrics.
"""

from __future__ import annotations

import importlib
import io
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import torch
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.path import Path as MarkerPath
from PIL import Image, ImageColor, ImageOps
from torch.nn.functional import normalize

from recnb.images import printable, to_rgb
from recnb.metrics import ranking_metrics, retrieval_metrics
from recnb.ranking import TIE
from recnb.scores import to_numpy

RIGHT, WRONG, EXCLUDED, END = "right", "wrong", "excluded", ""
# Okabe and Ito's blue and vermillion: told apart with every common colour vision, and on white as on black.
COLOURS = {RIGHT: "#0072B2", WRONG: "#D55E00", EXCLUDED: "#7F7F7F"}
Picture = str | Path | Image.Image | np.ndarray  # an array is uint8, (H, W) or (H, W, 3)
Names = Sequence[str] | Mapping | None           # identity -> text
LATER = {"gallery_html": "page", "gallery_widget": "widget", "gallery_static": "static"}


def __getattr__(name: str):
    "The galleries of the next two chapters, which import this one: loaded when first asked for."
    if name in LATER:
        return getattr(importlib.import_module(f"recnb.{LATER[name]}"), name)
    raise AttributeError(f"module 'recnb.gallery' has no attribute '{name}'")


# ---- the judged ranking ----------------------------------------------------------------------------------------------

@dataclass(repr=False, eq=False)
class Ranking:
    "The first k of each of Q lists, judged; `hits` goes further down than k, so that missed positives are known too."

    ids: np.ndarray         # (Q, k) rows of the gallery, most similar first; -1 where the list has ended
    scores: np.ndarray      # (Q, k) similarity; nan where the list has ended
    state: np.ndarray       # (Q, k) "right", "wrong", "excluded", or "" where the list has ended
    position: np.ndarray    # (Q, k) rank from 1 as the metrics count it; 0 for what is excluded
    AP: np.ndarray          # (Q,) average precision; nan for a query without a positive
    first_hit: np.ndarray   # (Q,) rank of the first positive; 0 for a query without one
    positives: np.ndarray   # (Q,) number of positives in the gallery that count
    left_out: np.ndarray    # (Q,) number of same-identity, same-camera items that do not count
    hits: np.ndarray        # (Q, H) the first positives, however far down; -1 where there are no more
    hit_ranks: np.ndarray   # (Q, H)
    hit_scores: np.ndarray  # (Q, H)
    own: np.ndarray         # (Q,) the query's own row in the gallery, -1 where it has none
    query_labels: np.ndarray
    gallery_labels: np.ndarray
    query_cameras: np.ndarray | None = None
    gallery_cameras: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.ids)

    def __repr__(self) -> str:
        return (f"Ranking(queries={len(self)}, gallery={len(self.gallery_labels)}, k={self.ids.shape[1]}, "
                f"mAP={np.nanmean(self.AP):.4f})")

    @property
    def valid(self) -> np.ndarray:
        "(Q,) whether the query has a positive at all: the others count in no metric."
        return self.positives > 0

    @property
    def failed(self) -> np.ndarray:
        "(Q,) whether the first counted item is of another identity: what recall@1 counts as a miss."
        return self.first_hit > 1

    def order(self, by: str = "worst") -> np.ndarray:
        "The queries by AP, 'worst' or 'best' first (those without a positive last), or as they came ('index')."
        if by == "index":
            return np.arange(len(self))
        if by not in ("worst", "best"):
            raise ValueError(f"order must be 'worst', 'best' or 'index', not {by!r}")
        return np.argsort(self.AP if by == "worst" else -self.AP, kind="stable")  # nan sorts last

    def missed(self, q: int, k: int, n: int = 3) -> list[tuple[int, int, float]]:
        "The first n positives of query q that are not among its first k items: (gallery row, rank, similarity)."
        found = zip(self.hits[q].tolist(), self.hit_ranks[q].tolist(), self.hit_scores[q].tolist(), strict=True)
        shown = set(self.ids[q, :k].tolist())
        return [hit for hit in found if hit[0] >= 0 and hit[0] not in shown][:n]


def rank(query, gallery, query_labels, gallery_labels, query_cameras=None, gallery_cameras=None, exclude_self=False,
         k: int = 10, show_excluded: int = 2, missed: int = 3, scores=None) -> Ranking:
    """The judged first k of every query's list, as a `Ranking`.

    query (Q, D), gallery (G, D): compared by their cosine; or None, with scores (Q, G), higher for better, such as
    minus a re-ranked distance. Labels and cameras (Q,) and (G,), exclude_self and ties as in `recnb.metrics`. A
    query's own picture is never shown. Up to `show_excluded` items of the same identity and camera are shown in their
    place, marked: enough to see them, too few to crowd out the rest.
    """
    given = query_labels, gallery_labels, query_cameras, gallery_cameras
    if scores is None:
        _, arrays = retrieval_metrics(query, gallery, *given, exclude_self, metrics=["mAP"], per_query=True)
    else:
        _, arrays = ranking_metrics(scores, *given, exclude_self, metrics=["mAP"], per_query=True)
    ql, gl, qc, gc = (None if values is None else to_numpy(values) for values in given)
    own = to_numpy(exclude_self)
    if own.ndim == 0:
        own = np.arange(len(ql)) if own else np.full(len(ql), -1)
    rows = []
    for q, row in enumerate(_cosines(query, gallery) if scores is None else map(to_numpy, scores)):
        positive = gl == ql[q]
        excluded = positive & (gc == qc[q]) if qc is not None else np.zeros(len(gl), bool)
        # as in the metrics, a positive stands behind the negatives that score as high, or so close that none can tell
        behind = row - np.float32(TIE if scores is None else 0)
        keys = np.where(positive, np.nextafter(behind.astype(float), -np.inf), row)
        if own[q] >= 0:
            keys[own[q]] = -np.inf
        rows.append(_judge(keys, row, positive, excluded, k, show_excluded, k + missed))
    columns = {name: np.stack([row[name] for row in rows]) for name in rows[0]}
    return Ranking(**columns, AP=np.where(arrays["valid"], arrays["AP"], np.nan), first_hit=arrays["first_hit"],
                   own=own, query_labels=ql, gallery_labels=gl, query_cameras=qc, gallery_cameras=gc)


def _cosines(query, gallery) -> Iterator[np.ndarray]:
    "Each query's cosine with every gallery item, (G,)."
    query, gallery = (normalize(torch.as_tensor(x).detach().float(), eps=1e-30) for x in (query, gallery))
    for block in query.split(max(1, 2**24 // len(gallery))):
        yield from to_numpy(block @ gallery.T)


def _judge(keys, scores, positive, excluded, k: int, show_excluded: int, n_hits: int) -> dict:
    "One query's row of each array of a `Ranking`; keys order the gallery, -infinity for what is never shown."
    counted = np.where(excluded, -np.inf, keys)
    left_out = _best(np.where(excluded, keys, -np.inf), len(keys))
    visible = counted.copy()
    visible[left_out[:show_excluded]] = keys[left_out[:show_excluded]]
    shown, hits = _best(visible, k), _best(np.where(positive, counted, -np.inf), n_hits)
    negatives = counted[~positive]
    hit_ranks = np.array([np.count_nonzero(negatives > keys[hit]) for hit in hits], int) + np.arange(1, len(hits) + 1)
    state = np.where(excluded[shown], EXCLUDED, np.where(positive[shown], RIGHT, WRONG))
    position = np.where(excluded[shown], 0, np.cumsum(~excluded[shown]))
    return {"ids": _pad(shown, k, -1), "scores": _pad(scores[shown], k, np.nan), "state": _pad(state, k, END),
            "position": _pad(position, k, 0), "positives": np.count_nonzero(counted[positive] > -np.inf),
            "left_out": len(left_out), "hits": _pad(hits, n_hits, -1), "hit_ranks": _pad(hit_ranks, n_hits, 0),
            "hit_scores": _pad(scores[hits], n_hits, np.nan)}


def _best(keys: np.ndarray, n: int) -> np.ndarray:
    "The n highest of the finite keys, as indices, best first, equals as they came: without sorting the whole gallery."
    n = min(n, np.count_nonzero(keys > -np.inf))
    if not n:
        return np.zeros(0, int)
    near = np.flatnonzero(keys >= np.partition(keys, len(keys) - n)[len(keys) - n])
    return near[np.argsort(-keys[near], kind="stable")][:n]


def _pad(values: np.ndarray, n: int, fill) -> np.ndarray:
    "The values as an array of n: a list may end before k."
    return np.concatenate([values, np.full(n - len(values), fill, values.dtype)])


def choose_rows(ranking: Ranking, n: int = 6) -> np.ndarray:
    """Up to n queries of different identities, worst first: half of them failures, half successes, where both exist.

    Each half is spread evenly over its AP, so that the worst, the middling and the best are seen. Deterministic.
    """
    order = [q for q in ranking.order().tolist() if ranking.valid[q]]
    halves = [[q for q in order if ranking.failed[q] == failed] for failed in (True, False)]
    n_failed = min(len(halves[0]), max(n - n // 2, n - len(halves[1])))
    wanted = [[(half, t) for t in np.linspace(0, len(half) - 1, count)]
              for half, count in zip(halves, (n_failed, min(len(halves[1]), n - n_failed)), strict=True)]
    labels, chosen = ranking.query_labels, {}
    for half, target in filter(None, chain(*zip_longest(*wanted))):  # in turn, so that both kinds get identities
        free = [i for i, q in enumerate(half) if labels[q] not in chosen]
        if free:
            q = half[min(free, key=lambda i: abs(i - target))]
            chosen[labels[q]] = q
    return np.array(sorted(chosen.values(), key=order.index), dtype=int)


def changed(first: Ranking, second: Ranking) -> tuple[np.ndarray, np.ndarray]:
    "The queries whose first hit only the second has right, and only the first has; the largest change in AP first."
    order = np.argsort(-np.abs(np.nan_to_num(second.AP - first.AP)), kind="stable")
    return tuple(order[(good.first_hit[order] == 1) & bad.failed[order]]
                 for good, bad in ((second, first), (first, second)))


# ---- pictures and words ----------------------------------------------------------------------------------------------

def read_picture(picture: Picture, size: int) -> Image.Image:
    "The picture in RGB, upright, at most size x size; FileNotFoundError or ValueError names the file."
    if isinstance(picture, (str, Path)):
        return _read_file(Path(picture), size, getattr(picture, "box", None))
    if isinstance(picture, np.ndarray):
        picture = _from_array(picture)
    picture = to_rgb(ImageOps.exif_transpose(picture))
    picture.thumbnail((size, size), Image.Resampling.LANCZOS)
    return picture


def _read_file(path: Path, size: int, box: tuple | None) -> Image.Image:
    try:
        with Image.open(path) as image:
            if box is None:
                image.draft("RGB", (2 * size, 2 * size))  # the JPEG decoder shrinks: many times faster on photographs
            ImageOps.exif_transpose(image, in_place=True)
            return read_picture(to_rgb(image) if box is None else to_rgb(image).crop(box), size)
    except FileNotFoundError:
        raise FileNotFoundError(f"the picture '{path}' does not exist (working directory: {Path.cwd()})") from None
    except Exception as error:  # decoders raise whatever a broken file leads them to
        raise ValueError(f"the picture '{path}' cannot be read: {error}") from None


def _from_array(array: np.ndarray) -> Image.Image:
    flat = array[..., 0] if array.ndim == 3 and array.shape[2] == 1 else array
    if array.dtype != np.uint8 or not (flat.ndim == 2 or (flat.ndim == 3 and flat.shape[2] in (3, 4))):
        raise ValueError(f"a picture is a uint8 array (H, W) or (H, W, 3), not {array.dtype} {array.shape}")
    return Image.fromarray(flat)


def label_text(label, names: Names = None) -> str:
    "An identity as it is shown: its name where a list or mapping has one, itself where it is text, otherwise 'id 7'."
    plain = str(label) if isinstance(label, str) else f"id {label}"
    if isinstance(names, Mapping):
        return printable(str(names.get(label, plain)))
    return printable(plain if names is None else str(names[label]))


def shorten(text: str, n: int) -> str:
    "The text in at most n characters, the middle left out: names differ at either end."
    head = (n - 1) // 2
    return text if len(text) <= n else f"{text[:head]}…{text[len(text) - (n - 1 - head):]}"


# ---- the figure ------------------------------------------------------------------------------------------------------

TILE, GAP, NOTES, CAPTION, HEAD = 0.9, 0.08, 1.5, 0.42, 0.48  # inches
INK, SOFT, PAPER, MAT = "#1A1A1A", "#5C5C5C", "#FFFFFF", "#F1F1EF"
SIGNS = {RIGHT: MarkerPath([(-0.9, 0.0), (-0.25, -0.65), (0.95, 0.75)]), WRONG: "x", EXCLUDED: "_"}


class PaletteCanvas(FigureCanvasAgg):
    "Writes PNG with 256 fitted colours: a third of the bytes of true colour, which a notebook would carry for good."

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
            palette[3 * corner:3 * corner + 3] = ImageColor.getrgb(PAPER)  # the fit leaves it slightly grey
            image.putpalette(palette)
            image.save(filename_or_obj, format="png", optimize=True, dpi=(self.figure.dpi, self.figure.dpi))


def gallery_figure(ranking: Ranking, query_images: Sequence[Picture], gallery_images: Sequence[Picture],
                   rows: Sequence[int] | None = None, k: int = 8, label_names: Names = None,
                   title: str = "Nearest neighbours") -> Figure:
    """A figure with a row per query: its numbers, its picture, its first k hits, framed, signed, with similarity.

    rows: the queries to show, by default those of `choose_rows`. label_names: list or mapping from identity to text.
    The background is opaque and every colour is set, so that a dark theme or style leaves it as it is.
    """
    rows, k = choose_rows(ranking) if rows is None else np.asarray(rows), min(k, ranking.ids.shape[1])
    width, height = NOTES + (k + 1) * (TILE + GAP) + 3 * GAP, HEAD + len(rows) * (TILE + CAPTION)
    fig = plt.figure(figsize=(width, height), dpi=100, facecolor=PAPER, layout="none")
    plt.close(fig)  # shown once, as a cell's value, and not again when pyplot shows what is open
    PaletteCanvas(fig)
    head = fig.add_axes((0, 1 - HEAD / height, 1, HEAD / height), xlim=(0, width), ylim=(0, HEAD), label="head")
    _draw_head(head, title, [s for s in SIGNS if (ranking.state[rows, :k] == s).any()])
    for line, q in enumerate(rows):
        bottom = height - HEAD - line * (TILE + CAPTION) - TILE
        for place in range(-1, k):  # -1: the query itself
            left = NOTES + (place + 1) * (TILE + GAP) + (2 * GAP if place >= 0 else 0)
            box = (left / width, bottom / height, TILE / width, TILE / height)
            if place < 0:
                _draw_query(fig.add_axes(box, label=f"query {q}"), ranking, q, k, query_images, label_names)
            elif ranking.ids[q, place] >= 0:
                _draw_hit(fig.add_axes(box, label=f"query {q}, hit {place}"), ranking, q, place, gallery_images,
                          label_names)
    return fig


def _draw_query(ax: Axes, ranking: Ranking, q: int, k: int, images: Sequence[Picture], names: Names) -> None:
    _draw_tile(ax, images[q], INK, 1.0)
    notes = ["no positive", "in the gallery"]
    if ranking.valid[q]:
        notes = [f"AP {ranking.AP[q]:.3f}", f"first hit: rank {ranking.first_hit[q]}"]
        missed = ", ".join(str(rank) for _, rank, _ in ranking.missed(q, k))
        notes += [f"next right: {missed}"] if missed else []
    lines = _wrap(shorten(label_text(ranking.query_labels[q], names), 36), 19)
    for i, line in enumerate(lines + notes):
        _note(ax, line, 0.99 - 0.165 * i, "bold" if i < len(lines) else "normal", SOFT if "next right" in line else INK)


def _wrap(text: str, n: int) -> list[str]:
    "The text in one line, or in two, split behind the last sign or space that fits."
    if len(text) <= n:
        return [text]
    cut = max((text.rfind(sign, 0, n) + 1 for sign in " /_-"), default=0)
    return [text[:cut or n].strip(), text[cut or n:]]


def _note(ax: Axes, text: str, y: float, weight: str, colour: str) -> None:
    "A line of text to the left of the tile, ending at its edge."
    ax.annotate(text, (0, y), (-7, 0), xycoords="axes fraction", textcoords="offset points", ha="right", va="top",
                parse_math=False, fontsize=7.5, fontweight=weight, color=colour)


def _draw_hit(ax: Axes, ranking: Ranking, q: int, place: int, images: Sequence[Picture], names: Names) -> None:
    item, state, position = ranking.ids[q, place], str(ranking.state[q, place]), ranking.position[q, place]
    dashed = (0, (2.2, 1.4))
    _draw_tile(ax, images[item], COLOURS[state], 2.4, dashed if state == EXCLUDED else "-")
    _draw_sign(ax, state, (0.93, 0.93), ax.transAxes)
    ax.set_xlabel(f"{position or '-'} · {ranking.scores[q, place]:.3f}", fontsize=8, color=INK, labelpad=2)
    below = {RIGHT: "", EXCLUDED: "own camera", WRONG: shorten(label_text(ranking.gallery_labels[item], names), 17)}
    ax.annotate(below[state], (0.5, 0), (0, -14), xycoords="axes fraction", textcoords="offset points", ha="center",
                parse_math=False, va="top", fontsize=6.5, color=SOFT)


def _draw_tile(ax: Axes, picture: Picture, colour: str, width: float, style="-") -> None:
    "The whole picture in the middle of a square, framed."
    pixels = round(TILE * ax.figure.dpi)
    tile = ImageOps.pad(read_picture(picture, pixels), (pixels, pixels), color=MAT)
    ax.imshow(tile, interpolation="nearest", alpha=1 if style == "-" else 0.4)
    ax.set(xticks=[], yticks=[])
    for spine in ax.spines.values():
        spine.set(visible=True, color=colour, linewidth=width, linestyle=style)


def _draw_sign(ax: Axes, state: str, at: tuple[float, float], transform) -> None:
    "A disc in the colour of the state with its sign, drawn: fonts differ in what they hold."
    style = {"transform": transform, "clip_on": False, "linestyle": "none", "zorder": 9}
    ax.plot(*at, marker="o", markersize=11, color=COLOURS[state], markeredgecolor=PAPER, markeredgewidth=1, **style)
    ax.plot(*at, marker=SIGNS[state], markersize=5.5, color="none", markeredgecolor=PAPER, markeredgewidth=1.6, **style)


def _draw_head(ax: Axes, title: str, states: list[str]) -> None:
    "The title, and what the signs mean."
    ax.set_axis_off()
    ax.text(0.1, HEAD - 0.13, title, fontsize=10.5, fontweight="bold", color=INK, va="top", parse_math=False)
    x = NOTES + TILE + 3 * GAP
    meaning = {RIGHT: "right", WRONG: "wrong", EXCLUDED: "own camera: not counted"}
    for state in states:
        _draw_sign(ax, state, (x + 0.08, HEAD - 0.21), ax.transData)
        ax.text(x + 0.22, HEAD - 0.215, meaning[state], fontsize=8, color=INK, va="center")
        x += 0.75
