"""Figures of a run: curves, histograms, maps, samples."""

from collections.abc import Mapping, Sequence
from itertools import cycle, islice
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.offsetbox import AnnotationBbox, OffsetImage
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import ImageOps

from recnb.data.images import printable, read_rgb
from recnb.data.loaders import ImageLoader
from recnb.data.pipeline import display_image
from recnb.gallery.figure import COLOURS, INK, SOFT, panels
from recnb.gallery.fonts import drawn_label, legible
from recnb.gallery.pictures import read_picture, shorten
from recnb.retrieval.lists import RIGHT, WRONG
from recnb.retrieval.metrics import cmc

# Okabe and Ito's colours but yellow, which is too pale on white.
PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
GROUPS = PALETTE[:6]  # black would pass for a picture's frame
STYLES = [(colour, line) for line in ("-", "--", ":") for colour in PALETTE]  # further lines: dashed, then dotted


def curves_figure(arrays: dict, recall: np.ndarray, precision: np.ndarray) -> Figure:
    """Draw two panels: CMC, and precision over recall.

    Args:
        arrays: As `retrieval_metrics(per_query=True)` gives them.
        recall: (P,) from 0 to 1.
        precision: (P,) the precision at each recall.
    """
    figure, axes = plots(2)
    draw_cmc(axes[0], arrays)
    axes[1].plot(recall, precision, color=COLOURS[RIGHT], linewidth=2)
    axes[1].fill_between(recall, precision, color=COLOURS[RIGHT], alpha=0.1, linewidth=0)
    axes[1].set(
        title="Precision and recall", xlabel="recall", ylabel="interpolated precision", xlim=(0, 1), ylim=(0, 1.02)
    )
    return figure


def histogram_figure(edges: np.ndarray, counts: np.ndarray, point: dict) -> Figure:
    """Draw the similarities of pairs, with the operating threshold.

    Args:
        edges: (bins + 1,) edges of the bins.
        counts: (2, bins) how many negative (row 0) and positive pairs are in each.
        point: `threshold`, `TPR` and `rate`, the false-match rate, as `operating_point` gives them.
    """
    figure, (ax,) = plots(1, 7)
    draw_pairs(ax, edges, counts, point)
    return figure


def draw_cmc(ax: Axes, arrays: dict) -> None:
    """Draw the share of queries that are found by each of the first 50 ranks, with a number at the first and the tenth.

    `arrays` are those of `retrieval_metrics(per_query=True)`.
    """
    values = cmc(arrays, 50)
    ax.plot(np.arange(1, 51), values, color=COLOURS[RIGHT], linewidth=2)
    for k in (1, 10):
        ax.plot(k, values[k - 1], "o", color=COLOURS[RIGHT], markersize=5, clip_on=False, zorder=5)
        ax.annotate(
            f"{values[k - 1]:.1%}", (k, values[k - 1]), (7, -13), textcoords="offset points", color=INK, fontsize=9
        )
    ax.set(title="Found by rank (CMC)", xlabel="rank", ylabel="share of queries", xlim=(0, 50), ylim=(0, 1.02))
    ax.yaxis.set_major_formatter(PercentFormatter(1))


def draw_pairs(ax: Axes, edges: np.ndarray, counts: np.ndarray, point: dict) -> None:
    """Draw the similarities of both kinds of pairs, each with an area of 1, and the threshold.

    Args:
        ax: Where to draw.
        edges: As for `histogram_figure`.
        counts: As there.
        point: As there.
    """
    width, used = edges[1] - edges[0], np.flatnonzero(counts.sum(0))
    heights = counts / counts.sum(1, keepdims=True) / width
    for kind, name, colour in ((0, "other identity", COLOURS[WRONG]), (1, "same identity", COLOURS[RIGHT])):
        ax.stairs(heights[kind], edges, color=colour, linewidth=1.5, label=name)
        ax.stairs(heights[kind], edges, color=colour, fill=True, alpha=0.2, linewidth=0)
    ax.axvline(point["threshold"], color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    ax.set(
        title="Similarity of pairs",
        xlabel="cosine",
        xlim=(edges[used[0]], edges[used[-1] + 1]),
        ylim=(0, 1.55 * heights.max()),
        yticks=[],
    )
    place = np.clip(point["threshold"], *ax.get_xlim())  # beyond all scores where no negative may be accepted
    left = place > np.mean(ax.get_xlim())
    ax.annotate(
        f"from {point['threshold']:.3f}: {point['TPR']:.1%} of the same,\n{point['rate']:.3g} of the others",
        (place, 0.86),
        (-6 if left else 6, 0),
        xycoords=("data", "axes fraction"),
        va="top",
        textcoords="offset points",
        ha="right" if left else "left",
        fontsize=8,
        color=SOFT,
    )
    ax.legend(frameon=False, fontsize=8, loc="upper left", ncols=2)


def draw_ap(ax: Axes, arrays: dict) -> None:
    """Draw how the average precision is spread over the queries, and its mean."""
    ap = arrays["AP"][arrays["valid"]]
    ax.hist(ap, np.linspace(0, 1, 21).tolist(), color=COLOURS[RIGHT], edgecolor="white", linewidth=0.8)
    ax.axvline(ap.mean(), color=COLOURS[WRONG], linewidth=1.8)
    ax.set_ylim(0, 1.18 * ax.get_ylim()[1])
    ax.annotate(
        f"mAP {ap.mean():.3f}",
        (ap.mean(), 0.97),
        (5, 0),
        xycoords=("data", "axes fraction"),
        va="top",
        textcoords="offset points",
        ha="left" if ap.mean() < 0.75 else "right",
        fontsize=9,
        color=COLOURS[WRONG],
    )
    ax.set(title="Average precision of the queries", xlabel="AP", ylabel="queries", xlim=(0, 1))


def ladder_figure(rows: Sequence[Mapping], metric: str = "mAP", way: Mapping[float, float] | None = None) -> Figure:
    """Draw the rungs of a ladder, the first at the top: each value with its interval, drawn and in numbers.

    Args:
        rows: for each rung `name`, `value`, `low` and `high` (the 95 % interval), `kept`, whether it is the one to use,
            and perhaps a `note`, which follows the numbers.
        metric: the metric that the values are.
        way: by the share of the way from the start's weights to the fine-tuned ones, the value there: a second curve.
    """
    way = way or {}
    figure, (ax, *beside) = plots(2 if way else 1, 13 if way else 9, 1.3 + 0.42 * len(rows))
    for curve in beside:
        curve.plot([*way], [*way.values()], marker="o", color=COLOURS[RIGHT])
        curve.set(xlabel="share of the way from the start to the fine-tuned weights", ylabel=metric)
    for place, row in enumerate(rows):
        colour, value = COLOURS[RIGHT] if row["kept"] else "#7F7F7F", row["value"]
        ends = np.nan_to_num([[value - row["low"]], [row["high"] - value]]).clip(0)
        ax.errorbar(value, place, xerr=ends, fmt="o", color=colour, capsize=4, markersize=9 if row["kept"] else 6)
        interval = f" ({row['low']:.3f} to {row['high']:.3f})" if np.isfinite(row["low"]) else ""
        said = [f"{value:.3f}{interval}", "kept" * row["kept"], row.get("note", "")]
        weight = "bold" if row["kept"] else "normal"
        style = {"fontsize": 9, "va": "center", "color": INK, "fontweight": weight, "parse_math": False}
        ax.text(1.02, place, "  ".join(filter(None, said)), transform=ax.get_yaxis_transform(), **style)
    first = rows[0]["value"]
    ax.axvline(first, color=SOFT, linewidth=1, linestyle=(0, (4, 2)), zorder=0)
    ax.set_yticks(range(len(rows)), [str(row["name"]).replace("$", r"\$") for row in rows], fontsize=10)
    ax.set(xlabel=f"{metric} on validation, 95 % intervals; dashed: as it comes", ylim=(len(rows) - 0.5, -0.5))
    ax.grid(axis="y", visible=False)
    return legible(figure)


def confusion_figure(table: pd.DataFrame) -> Figure:
    """Draw how often queries of each identity (rows) have each identity (columns) as their first hit.

    Args:
        table: counts, with the identities' names as index and columns; a count is right where both are the same.
    """
    rows, columns = table.shape
    figure, (ax,) = plots(1, 2.2 + 0.42 * columns, 1.6 + 0.42 * rows)
    share = table.to_numpy() / np.maximum(table.to_numpy().sum(1, keepdims=True), 1)
    right = np.array(table.index)[:, None] == np.array(table.columns)[None]
    for mask, colour in ((right, COLOURS[RIGHT]), (~right, COLOURS[WRONG])):
        ax.imshow(
            np.where(mask, share, np.nan), LinearSegmentedColormap.from_list("", ["white", colour]), vmin=0, vmax=1
        )
    for (row, column), count in np.ndenumerate(table.to_numpy()):
        if count:
            ink = "white" if share[row, column] > 0.6 else INK
            ax.text(column, row, str(count), ha="center", va="center", fontsize=9, color=ink)
    named = [[shorten(name, 22).replace("$", r"\$") for name in names] for names in (table.columns, table.index)]
    ax.set_xticks(range(columns), named[0], rotation=45, ha="left", fontsize=9)
    ax.set_yticks(range(rows), named[1], fontsize=9)
    ax.xaxis.tick_top()
    ax.tick_params(length=0)
    ax.grid(visible=False)
    ax.spines[:].set_visible(False)
    ax.set(xlabel="first hit", ylabel="query")
    return legible(figure)


def map_figure(
    points: np.ndarray,
    labels,
    pictures: Sequence | None = None,
    groups: Sequence = (),
    title: str = "",
    names=None,
    most: int = 120,
) -> Figure:
    """Draw the points as a map, some identities coloured and named, the others grey.

    Args:
        points: (N, 2).
        labels: (N,) identities.
        pictures: one for each point; as many are drawn as fit without overlap.
        groups: the identities to colour, at most six; their pictures are drawn first.
        title: the heading.
        names: from identity to text, a list or a mapping.
        most: how many pictures are drawn at most.
    """
    labels, groups = np.asarray(labels), list(groups)[: len(GROUPS)]
    figure, ((ax,),) = panels(1, 1, (9, 7))
    colours = np.full(len(labels), "#C4C4C4", dtype=object)
    for group, colour in zip(groups, GROUPS, strict=False):
        colours[labels == group] = colour
        ax.plot(
            [], [], "o", color=colour, markersize=7, label=shorten(drawn_label(group, names), 24).replace("$", r"\$")
        )  # no formula
    ax.scatter(points[:, 0], points[:, 1], s=16, c=list(colours), linewidths=0)
    ax.margins(0.04)
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, loc="left", fontsize=11, fontweight="bold", color=INK)
    ax.spines[:].set_color("#DDDDDD")
    shown = {} if pictures is None else {i: pictures[i] for i in _apart(points, np.isin(labels, groups), most)}
    for i, source in shown.items():
        picture = OffsetImage(np.asarray(read_picture(source, 34)), zoom=1, dpi_cor=False)
        frame = {"edgecolor": colours[i], "linewidth": 2 if colours[i] != "#C4C4C4" else 0.8}
        ax.add_artist(AnnotationBbox(picture, points[i], pad=0.08, bboxprops=frame))
    if groups:
        figure.legend(frameon=False, fontsize=9, loc="outside lower center", ncols=6)
    return legible(figure)


def _apart(points: np.ndarray, first: np.ndarray, most: int) -> list[int]:
    """Return up to `most` points that are a picture's size apart, beginning with those marked `first`."""
    place = (points - points.min(0)) / np.maximum(np.ptp(points, axis=0), 1e-30) * (18, 14)  # in pictures
    taken = []
    for i in np.argsort(~first, kind="stable"):
        if len(taken) < most and all(np.abs(place[i] - place[j]).max() >= 1 for j in taken):
            taken.append(int(i))
    return taken


def plots(count: int, width: float | None = None, height: float = 3.4) -> tuple[Figure, np.ndarray]:
    """Return a figure with plots in a row, each over a grid and without a frame.

    Args:
        count: How many plots.
        width: Inches; by default 10 for two plots and otherwise 12.
        height: Inches.
    """
    figure, axes = panels(1, count, (width or (10 if count == 2 else 12), height))
    for ax in axes[0]:
        ax.set_facecolor("white")
        ax.grid(alpha=0.25)
        ax.set_axisbelow(True)
        ax.spines[["top", "right"]].set_visible(False)
    return figure, axes[0]


def samples_figure(table: pd.DataFrame, rows: int = 6, columns: int = 8) -> Figure:
    """Draw samples of images, an identity a row; the identities are spread from the largest to the smallest.

    Args:
        table: a row per image: path, label and, where they are known, camera and split, which stand over the picture.
        rows: how many identities.
        columns: how many images of each.
    """
    counts = table.label.value_counts(ascending=False, sort=True)
    names = counts.index[np.unique(np.linspace(0, len(counts) - 1, rows).round().astype(int))]
    columns = min(columns, counts.iloc[0])
    size, widths = (1.2 * columns + 1.8, 1.4 * len(names)), [1.3] + [1] * columns
    look = {"dpi": 90, "layout": "none", "subplot_kw": {"frame_on": False, "xticks": [], "yticks": []}}
    figure, axes = panels(len(names), columns + 1, size, width_ratios=widths, **look)
    figure.subplots_adjust(0.01, 0.01, 0.99, 0.97, 0.06, 0.16)
    for line, name in zip(axes, names, strict=True):
        mine = table[table.label == name].sort_values("path")
        line[0].text(
            0,
            0.5,
            f"{shorten(printable(name), 18)}\n{len(mine)} image{'s' * (len(mine) > 1)}",
            va="center",
            fontsize=11,
            transform=line[0].transAxes,
            parse_math=False,
        )
        mine = mine.iloc[np.unique(np.linspace(0, len(mine) - 1, columns).round().astype(int))]
        for ax, (_, item) in zip(line[1:], mine.iterrows(), strict=False):
            words = [str(item["split"])] if "split" in mine else []
            words += [f"camera {item.camera}"] if isinstance(item.get("camera"), str) else []
            ax.imshow(ImageOps.contain(read_rgb(item.path), (160, 160)))
            ax.set_title("  ".join(words), fontsize=8, color="#555555", pad=2, parse_math=False)
    return legible(figure)


def augmentation_figure(loader: ImageLoader, count: int = 8) -> Figure:
    """Draw images of the first training batch: above as they are in the file, below as the model gets them."""
    sampler: Any = loader.batch_sampler
    items, images = list(islice(next(iter(sampler)), count)), loader.dataset
    look = {"dpi": 90, "layout": "none", "subplot_kw": {"xticks": [], "yticks": []}}
    figure, axes = panels(2, len(items), (1.25 * len(items), 2.9), **look)
    for (before, after), item in zip(axes.T, items, strict=True):
        index = item[0] if isinstance(item, tuple) else item  # with it comes the seed of the augmentation
        before.imshow(images.image(index).permute(1, 2, 0))
        before.set_title(shorten(printable(images.name(int(images.labels[index]))), 14), fontsize=8, parse_math=False)
        after.imshow(display_image(images[item][0], images.transform))
    axes[0, 0].set_ylabel("file", fontsize=8)
    axes[1, 0].set_ylabel("model", fontsize=8)
    figure.tight_layout(pad=0.4)
    return legible(figure)


def history_figure(history: pd.DataFrame) -> Figure:
    """Draw the content of history.csv over the epochs: the losses, and beside them the metrics if it has any."""
    losses = [column for column in history if "loss" in column.lower()]
    metrics = [column for column in history.dropna(axis=1, how="all") if column not in (*losses, "epoch", "lr")]
    panels = {"loss": losses, **({"retrieval": metrics} if metrics else {})}
    figure, axes = plots(len(panels), 5 * len(panels))
    for ax, (title, columns) in zip(axes, panels.items(), strict=True):
        for column, style in zip(columns, cycle(STYLES)):
            _draw_epochs(ax, history, column, column, style)
        ax.set_title(title)
        if columns:
            ax.legend(frameon=False, fontsize=8)
        if title == "retrieval":
            ax.set_ylim(0, 1.02)
    return figure


def histories_figure(histories: Mapping[str, pd.DataFrame], columns: Sequence[str]) -> Figure:
    """Draw columns of several histories over the epochs, a panel per column and a line per history.

    Args:
        histories: name -> table with `epoch`; a history without a column has no line there.
        columns: what is drawn.
    """
    figure, axes = plots(len(columns), 10, 3.4 + 0.22 * -(-len(histories) // 3))  # lines of the legend
    for ax, column in zip(axes, columns, strict=True):
        for (name, history), style in zip(histories.items(), cycle(STYLES)):
            _draw_epochs(ax, history, column, name, style)
        ax.set_title(column)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    return legible(figure)


def _draw_epochs(ax: Axes, history: pd.DataFrame, column: str, name: str, style: tuple[str, str]) -> None:
    values = history.set_index("epoch")[column].dropna() if column in history else pd.Series(dtype=float)
    colour, line = style
    name = name.replace("$", r"\$")  # no formula
    ax.plot(values.index, values, line, color=colour, linewidth=1.5, marker=".", markersize=5, label=name)
    ax.set_xlabel("epoch")
    ax.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))  # one epoch has one tick


def before_after_figure(table: pd.DataFrame) -> Figure:
    """Draw bars of each metric before and after training, with 95 % intervals, and above them the difference.

    Args:
        table: a row per metric with before, before_low, before_high, the same of after, difference, low, high and
            verdict, which begins with "better" or "worse" where that is sure.
    """
    figure, (ax,) = plots(1, max(4.5, 1.9 * len(table) + 1))
    places, tops = np.arange(len(table)), table[["before", "after", "before_high", "after_high"]].max(axis=1)
    for shift, name, colour in ((-0.2, "before", "#BDBDBD"), (0.2, "after", COLOURS[RIGHT])):
        ends = [(table[name] - table[f"{name}_low"]).clip(0), (table[f"{name}_high"] - table[name]).clip(0)]
        whiskers = {"yerr": ends, "ecolor": INK, "capsize": 4, "error_kw": {"elinewidth": 1.2}}
        ax.bar(places + shift, table[name], 0.38, color=colour, label=name, **whiskers)
    for place, top, row in zip(places, tops, table.itertuples(), strict=True):
        colour = {"better": COLOURS[RIGHT], "worse:": COLOURS[WRONG]}.get(row.verdict.split()[0], SOFT)
        said = f"{row.difference:+.3f}" + (f"\n({row.low:+.3f} to {row.high:+.3f})" if np.isfinite(row.low) else "")
        ax.annotate(said, (place, top), (0, 5), textcoords="offset points", ha="center", color=colour, fontsize=9)
    ticks = [f"{row.Index}\n{row.before:.3f} → {row.after:.3f}" for row in table.itertuples()]
    ax.set_xticks(places, ticks, fontsize=10)
    ax.set(ylim=(0, 1.25 * max(tops.max(), 0.1)))
    ax.set_yticks([tick for tick in ax.get_yticks() if tick <= 1])  # above is room for the differences
    ax.grid(axis="x", visible=False)
    figure.legend(frameon=False, fontsize=9, loc="outside upper left", ncols=2)
    return figure
