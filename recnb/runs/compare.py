"""Runs side by side: which is best, how they differ, and which queries one gains and loses against another.

Metrics are those of the run folder. Queries are judged again from its embeddings, with re-ranking where its config has
it, but without the steps of PostProcess, which are not in the embeddings.
"""

import os
from collections.abc import Iterable, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.data.images import DataError
from recnb.gallery.curves import histories_figure
from recnb.gallery.pictures import label_text, shorten
from recnb.recipe.resolved import FREE, PATHS
from recnb.registry import ConfigError, check_known
from recnb.retrieval.lists import Ranking, changed
from recnb.retrieval.stats import paired_difference
from recnb.runs.folder import Run, load_run
from recnb.storage import ROOT, resolve

PATH_KEYS = {*(key for keys in PATHS.values() for key in keys), "pretrained"}


def find_runs(run_dirs: Sequence[str | Path] = (), pattern: str = "") -> list[Path]:
    """Return the folders named, and those of the pattern with a config.yaml; raise ConfigError where there is none."""
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
    """Return for each key (its steps) its last step, or as many of its last steps as no other key has."""
    keys, names = [tuple(key) for key in keys], []
    for key in keys:
        same = [sum(other[-n:] == key[-n:] for other in keys) for n in range(1, len(key) + 1)]
        names.append(joint.join(key[-(same.index(min(same)) + 1) :]))
    return names


def load_runs(folders: Sequence[Path]) -> tuple[dict[str, Run], dict[str, str]]:
    """Return the finished runs by name, and for every other folder the reason why it cannot be compared."""
    runs, unusable = {}, {}
    for name, folder in zip(short_names(folder.absolute().parts for folder in folders), folders, strict=True):
        try:
            run = load_run(folder)
            run.lists()  # which have to be there, since queries are judged again
            runs[name] = run
        except (ConfigError, DataError, OSError, ValueError) as error:
            unusable[name] = str(error).splitlines()[0].removeprefix(f"{folder}: ")
    return runs, unusable


def leaderboard(runs: dict[str, Run], unusable: dict[str, str] | None = None, by: str = "") -> pd.DataFrame:
    """Return a row per run: state, test set, epochs and metrics; the best of each test set first.

    `best_epoch` is the epoch whose weights the run kept; the metrics are of these weights. `last ...` are metrics of
    the last epoch, where each epoch was evaluated on the test lists.

    Args:
        runs: the finished runs by name.
        unusable: for each of the other runs, why it cannot be compared.
        by: the metric to sort by; empty: the first.
    """
    sets = test_sets(runs).test_set if runs else {}
    table = pd.DataFrame.from_dict({name: _board_row(run, sets[name]) for name, run in runs.items()}, orient="index")
    if len(table):
        table = table.sort_values(
            ["test_set", by or next(iter(table.columns[4:]), "epochs")], ascending=[True, False], kind="stable"
        )
        whole = dict.fromkeys(("test_set", "epochs", "best_epoch"), "Int64")
        table = table.astype(whole)
    return pd.concat([table, pd.DataFrame({"state": unusable or {}}, dtype=object)]).rename_axis("run")


def _board_row(run: Run, test_set: int) -> dict:
    metrics = {key: value for key, value in run.metrics.items() if isinstance(value, (int, float))}
    first, last = next(iter(metrics), ""), run.history.iloc[-1]
    scores = run.history[first].dropna() if first in run.history else pd.Series(dtype=float)
    best = run.history.epoch[scores[scores == scores.max()].index[-1]] if len(scores) else None
    on_test = not run.cfg.get("DataLoader", {}).get("Validation")
    return {
        "state": "finished",
        "test_set": test_set,
        "epochs": int(last.epoch),
        "best_epoch": best,
        **metrics,
        **{f"last {key}": last[key] for key in metrics if key in last and on_test},
    }


def comparable(board: pd.DataFrame, runs: dict[str, Run], baseline: str = "") -> tuple[str, dict[str, Run]]:
    """Return the baseline and the runs on its test set, itself included, the best first.

    Args:
        board: the leaderboard of the runs.
        runs: the finished runs by name.
        baseline: a run; empty: the lowest on the leaderboard of the test set that most runs share.

    Raises:
        ConfigError: There is no finished run of that name.
    """
    finished = board[board.state == "finished"]
    check_known(filter(None, [baseline]), runs, "baseline", "finished run")
    wanted = finished.test_set[baseline] if baseline else 1
    names = finished.index[finished.test_set == wanted].tolist()
    return baseline or names[-1], {name: runs[name] for name in names}


def flat(node, place: str = "") -> dict:
    """Return a configuration as {dotted key: value}, the keys as in overrides; a list of parts also has its order."""
    if isinstance(node, dict) and node:
        return {k: v for key, value in node.items() for k, v in flat(value, f"{place}.{key}".lstrip(".")).items()}
    if isinstance(node, list) and node and all(isinstance(entry, dict) and len(entry) == 1 for entry in node):
        names = [next(iter(entry)) for entry in node]
        if len(set(names)) == len(names):
            parts = [flat(entry[name], f"{place}.{name}") for name, entry in zip(names, node, strict=True)]
            return {place: ", ".join(names), **{k: v for part in parts for k, v in part.items()}}
    return {place: node}


def differences(runs: dict[str, Run]) -> pd.DataFrame:
    """Return a row per run and a column per dotted key whose values differ; '-' where a run has no such key.

    Paths count from the folder that they share with the run, so that copied and moved projects do not differ.
    """
    flats = {name: {key: _told(run, key, value) for key, value in flat(run.cfg).items()} for name, run in runs.items()}
    keys = dict.fromkeys(key for cfg in flats.values() for key in cfg if key not in FREE)
    differing = [key for key in keys if len({cfg.get(key) for cfg in flats.values()}) > 1]
    return pd.DataFrame(
        [[cfg.get(key, "-") for key in differing] for cfg in flats.values()],
        index=pd.Index(flats, name="run"),
        columns=differing,
    )


def _told(run: Run, key: str, value) -> str:
    """Return a value of a configuration as text, a path from the folder on that it shares with the run."""
    if not (key.rsplit(".", 1)[-1] in PATH_KEYS and isinstance(value, str)):
        return str(value)
    path, folder = resolve(value).absolute(), run.folder.absolute()
    return path.relative_to(os.path.commonpath([path, folder])).as_posix()


def curves(runs: dict[str, Run], metric: str = "") -> Figure:
    """Draw the training loss and a metric over the epochs, by default the first metric of the runs."""
    metric = metric or next((key for run in runs.values() for key in run.metrics if key in run.history), "")
    return histories_figure({name: run.history for name, run in runs.items()}, ("train_loss", metric))


def judge(run: Run, k: int = 10) -> Ranking:
    """Return what each query of a run finds, ranked as in the run's own evaluation."""
    return run.rank(k, re_ranking=run.cfg["Global"]["re_ranking"])


def unpaired(first: Run, second: Run) -> str:
    """Return in a sentence why two runs cannot be compared query by query, or nothing where they can.

    Lists are compared by their content, not by their folder, so that copied and moved projects compare.
    """
    for part in ("query", "gallery"):
        ours, theirs = first.content(part), second.content(part)
        if ours[0] != theirs[0]:
            return (
                f"the {part} lists of {first.name} ({len(ours[0])} images) and {second.name} ({len(theirs[0])} images) "
                "do not name the same files in the same order, so there are no pairs to compare"
            )
        for kind, one, other in zip(("labels", "cameras"), ours[1:], theirs[1:], strict=True):
            if one != other:
                return f"the {part} lists of {first.name} and {second.name} give the same files other {kind}"
    return ""


def test_sets(runs: dict[str, Run]) -> pd.DataFrame:
    """Return a row per run: the number of its test set, 1 for the one of most runs, and how much is in it.

    Only runs with one test set, the same query and gallery lists, can be compared.
    """
    contents = {name: repr([run.content(part) for part in ("query", "gallery")]) for name, run in runs.items()}
    sets = list(dict.fromkeys(sorted(contents.values(), key=list(contents.values()).count, reverse=True)))
    rows = {
        name: {
            "test_set": 1 + sets.index(content),
            "queries": len(runs[name].query),
            "gallery": len(runs[name].gallery),
            "identities": len(np.unique(runs[name].query.labels)),
        }
        for name, content in contents.items()
    }
    return pd.DataFrame.from_dict(rows, orient="index").rename_axis("run")


def paired(rankings: dict[str, Ranking], baseline: str) -> pd.DataFrame:
    """Return a row per run and metric: the mean difference from the baseline, its 95 % interval, queries won and lost.

    The bootstrap resamples identities, since their queries rise and fall together.
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


def versus(rankings: dict[str, Ranking], baseline: str, name: str, most: int) -> list[tuple[Ranking, int, str]]:
    """Return queries whose first hit only a run has right, then those that only the baseline has right.

    Args:
        rankings: What each run finds, by name.
        baseline: The name of the baseline.
        name: The name of the run.
        most: How many queries of each kind at most.

    Returns:
        Two entries a query, of the baseline and of the run: the ranking, the row in it, and who finds or misses it.
    """
    first, second = rankings[baseline], rankings[name]
    fixed, broken = changed(first, second)
    both = ((first, shorten(baseline, 12)), (second, shorten(name, 12)))
    return [
        (ranking, q, f"{run} {'finds' if (ranking is second) == gained else 'misses'}")
        for gained, queries in ((True, fixed), (False, broken))
        for q in queries[:most]
        for ranking, run in both
    ]


def stacked(entries: Sequence[tuple[Ranking, int, str]], label_names=None) -> Ranking:
    """Return one ranking made of queries of several rankings over the same gallery, to show in a gallery.

    Args:
        entries: for each query its ranking, its row in it, and words that are shown before its identity.
        label_names: identity -> text.
    """
    first = entries[0][0]
    shared: dict[str, Any] = {
        "gallery_labels": np.array([label_text(x, label_names) for x in first.gallery_labels.tolist()]),
        "gallery_cameras": first.gallery_cameras,
        "query_labels": np.array(
            [
                f"{title} {shorten(label_text(part.query_labels[q].item(), label_names), 19)}"
                for part, q, title in entries
            ]
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
