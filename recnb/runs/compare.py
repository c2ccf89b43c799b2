"""Runs side by side: who leads, what differs between them, and which queries one gains and loses against another.

Metrics are those of the run folder. Queries are judged anew from its embeddings, re-ranked where its config says so;
the steps of PostProcess, which the embeddings have not gone through, take no part in that.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import fields
from itertools import cycle
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.ticker import MaxNLocator

from recnb.data.images import DataError
from recnb.gallery.pictures import label_text
from recnb.recipe.resolved import FREE
from recnb.registry import ConfigError
from recnb.retrieval.lists import Ranking, changed
from recnb.retrieval.stats import paired_difference
from recnb.runs.folder import Run, load_run
from recnb.storage import ROOT, resolve

# Okabe and Ito's colours but yellow, which is too pale on white; further runs have them again, dashed and dotted.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = [(colour, line) for line in ("-", "--", ":") for colour in COLOURS]


def find_runs(run_dirs: Sequence[str | Path] = (), pattern: str = "") -> list[Path]:
    """The folders named, and those of the pattern that hold a config.yaml; raises ConfigError where there is none."""
    base = Path("/") if Path(pattern).is_absolute() else ROOT
    found = sorted(base.glob(pattern.lstrip("/"))) if pattern else []
    folders = [*map(resolve, run_dirs), *(path for path in found if (path / "config.yaml").is_file())]
    if not folders:
        raise ConfigError(
            f"there is no run folder among {list(run_dirs)} and no folder with a config.yaml in "
            f"'{pattern}' below {base}"
        )
    return list({path.resolve(): path for path in folders}.values())


def short_names(keys: Iterable[Sequence[str]], joint: str = "/") -> list[str]:
    """Each key (its steps) by its last step, or as many of the last steps as tell it from the others."""
    keys, names = [tuple(key) for key in keys], []
    for key in keys:
        same = [sum(other[-n:] == key[-n:] for other in keys) for n in range(1, len(key) + 1)]
        names.append(joint.join(key[-(same.index(min(same)) + 1) :]))
    return names


def load_runs(folders: Sequence[Path]) -> tuple[dict[str, Run], dict[str, str]]:
    """The finished runs by name, and for each of the others the reason why it cannot be compared."""
    runs, unusable = {}, {}
    for name, folder in zip(short_names(folder.absolute().parts for folder in folders), folders, strict=True):
        try:
            run = load_run(folder)
            run.lists()  # queries are judged anew, so these have to be there
            runs[name] = run
        except (ConfigError, DataError, OSError, ValueError) as error:
            unusable[name] = str(error).splitlines()[0].removeprefix(f"{folder}: ")
    return runs, unusable


def leaderboard(runs: dict[str, Run], unusable: dict[str, str] | None = None, by: str = "") -> pd.DataFrame:
    """A row per run, the best first by the metric `by` or the first there is: state, epochs and metrics.

    `best_epoch` is the epoch whose weights the run kept, and the metrics are theirs; `last ...` are the last epoch's.
    """
    rows = {}
    for name, run in runs.items():
        metrics = {key: value for key, value in run.metrics.items() if not isinstance(value, dict)}
        first, last = next(iter(metrics)), run.history.iloc[-1]
        scores = run.history[first].dropna() if first in run.history else pd.Series(dtype=float)
        best = run.history.epoch[scores[scores == scores.max()].index[-1]] if len(scores) else None
        rows[name] = {
            "state": "finished",
            "epochs": int(last.epoch),
            "best_epoch": best,
            **metrics,
            **{f"last {key}": last[key] for key in metrics if key in last},
        }
    table = pd.DataFrame.from_dict(rows, orient="index")
    if len(table):
        table = table.sort_values(by or table.columns[3], ascending=False, kind="stable")
    return pd.concat([table, pd.DataFrame({"state": unusable or {}}, dtype=object)]).rename_axis("run")


def flat(node, place: str = "") -> dict:
    """A configuration as {dotted key: value}, keys as overrides spell them; of a list of parts, their order as well."""
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{place}.{key}".lstrip(".")).items()}
    if isinstance(node, list) and node and all(isinstance(entry, dict) and len(entry) == 1 for entry in node):
        names = [next(iter(entry)) for entry in node]
        if len(set(names)) == len(names):
            parts = [flat(entry[name], f"{place}.{name}") for name, entry in zip(names, node, strict=True)]
            return {place: ", ".join(names), **{k: v for part in parts for k, v in part.items()}}
    return {place: node}


def differences(configs: dict[str, dict]) -> pd.DataFrame:
    """A row per run and a column per dotted key in which the configurations differ; '-' where one does not have it."""
    flats = {name: {key: str(value) for key, value in flat(cfg).items()} for name, cfg in configs.items()}
    keys = dict.fromkeys(key for cfg in flats.values() for key in cfg if key not in FREE)
    differing = [key for key in keys if len({cfg.get(key) for cfg in flats.values()}) > 1]
    return pd.DataFrame(
        [[cfg.get(key, "-") for key in differing] for cfg in flats.values()],
        index=pd.Index(flats, name="run"),
        columns=differing,
    )


def curves(runs: dict[str, Run], metric: str = "") -> plt.Figure:
    """The training loss and a metric (by default the first that the runs have) over the epochs, a line per run."""
    metric = metric or next((key for run in runs.values() for key in run.metrics if key in run.history), "")
    lines = -(-len(runs) // 3)  # of the legend
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4 + 0.22 * lines), facecolor="white", dpi=90, layout="constrained")
    for ax, column in zip(axes, ("train_loss", metric), strict=True):
        for (name, run), (colour, line) in zip(runs.items(), cycle(STYLES)):
            history = run.history.set_index("epoch")
            values = history[column].dropna() if column in history else pd.Series(dtype=float)
            ax.plot(
                values.index,
                values,
                line,
                color=colour,
                linewidth=1.5,
                marker=".",
                markersize=5,
                label=name.replace("$", r"\$"),
            )  # no formula
        ax.set(title=column, xlabel="epoch")
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
        ax.grid(alpha=0.3)
        ax.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    plt.close(figure)
    return figure


def judge(run: Run, k: int = 10) -> Ranking:
    """The run's judged lists as its own evaluation ranks them."""
    return run.rank(k, re_ranking=run.cfg["Global"]["re_ranking"])


def unpaired(first: Run, second: Run) -> str:
    """Why two runs cannot be paired query by query, in a sentence, or nothing where they can."""
    for part in ("query", "gallery"):
        ours, theirs = getattr(first, part), getattr(second, part)
        if ours.paths != theirs.paths:
            return (
                f"the {part} lists of {first.name} ({len(ours)} images) and {second.name} ({len(theirs)} images) "
                "do not name the same files in the same order, so there are no pairs to compare"
            )
        for kind in ("labels", "cameras"):
            if not np.array_equal(getattr(ours, kind), getattr(theirs, kind)):
                return f"the {part} lists of {first.name} and {second.name} give the same files other {kind}"
    return ""


def paired(rankings: dict[str, Ranking], baseline: str) -> pd.DataFrame:
    """A row per run and metric: the mean difference from the baseline, its 95 % interval and p-value, queries gained.

    Identities are resampled whole: their queries rise and fall together.
    """
    first, rows = rankings[baseline], []
    for name, second in rankings.items():
        fixed, broken = changed(first, second)
        for metric, values in (("mAP", lambda r: r.AP), ("recall1", lambda r: (r.first_hit == 1).astype(float))):
            if name != baseline:
                result = paired_difference(
                    values(first)[first.valid], values(second)[first.valid], first.query_labels[first.valid]
                )
                rows.append({"run": name, "metric": metric, **result, "fixed": len(fixed), "broken": len(broken)})
    columns = ["run", "metric", "difference", "low", "high", "p_value", "fixed", "broken"]
    return pd.DataFrame(rows, columns=columns)


def stacked(entries: Sequence[tuple[Ranking, int, str]], label_names=None) -> Ranking:
    """One ranking of chosen lists, (ranking, query, what to call it) each, over the same gallery: for the galleries."""
    first = entries[0][0]
    shared = {
        "gallery_labels": np.array([label_text(x, label_names) for x in first.gallery_labels.tolist()]),
        "gallery_cameras": first.gallery_cameras,
        "query_labels": np.array(
            [f"{title}: {label_text(part.query_labels[q].item(), label_names)}" for part, q, title in entries]
        ),
    }
    if first.query_cameras is None:
        shared["query_cameras"] = None
    return Ranking(
        **shared,
        **{
            field.name: np.stack([getattr(part, field.name)[q] for part, q, _ in entries])
            for field in fields(Ranking)
            if field.name not in shared
        },
    )
