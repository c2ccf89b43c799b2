"""Climb from the untouched features to fine-tuned ones, and keep the best rung whose gain the validation images show.

Fine-tuning on few images can make good features worse. Each rung is a run of its own in rungs/, judged on identities
that it was not trained on; the test lists are judged once, by the caller, with the model that is handed back. A rung
that is there already is read, and one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.data.lists import save_label_map
from recnb.gallery.curves import ladder_figure
from recnb.models.weights import interpolate, read_weights, save_weights
from recnb.recipe import ladder
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.reading import read_yaml
from recnb.recipe.resolved import check_same, resolved
from recnb.recipe.schema import lookup
from recnb.recipe.splits import Split, split_lists, unjudged, whole_list
from recnb.runs.folder import open_run
from recnb.runs.results import save_results
from recnb.runs.verdict import BETTER, WORSE, Verdict, verdict
from recnb.storage import replacing
from recnb.training.adaptor import Callback
from recnb.training.evaluation import Evaluation
from recnb.training.learner import RetrievalLearner


class OutOfTime(Exception):
    """The budget has ended in the middle of a rung."""


class Deadline(Callback):
    """Ends the fit behind the epoch in which the time has run out; its checkpoint is kept."""

    order = 99

    def __init__(self, at: float):
        self.at = at

    def after_epoch(self):
        if time.monotonic() > self.at and self.epoch + 1 < self.n_epoch:
            raise OutOfTime("the budget has ended")  # fastai wants a message


@dataclass
class Rung:
    """A rung that was climbed: its values for each validation query beside those of the start."""

    name: str
    cfg: dict
    queries: pd.DataFrame = field(repr=False)
    folder: str = ""  # in rungs/, of what was trained
    alpha: float | None = None
    minutes: float = 0.0

    @property
    def verdict(self) -> Verdict:
        return verdict(self.queries)


@dataclass
class Ladder:
    """All rungs, the one that is kept, and why."""

    rungs: list[Rung]
    kept: Rung
    metric: str
    said: list[str]

    def table(self) -> pd.DataFrame:
        """Return a row per rung: the metric on validation with its interval, the gain over the start, whether kept."""
        rows = []
        for rung in self.rungs:
            row = rung.verdict.rows.loc[self.metric]
            rows.append(
                {"rung": rung.name, "what": ladder.RUNGS[rung.name], self.metric: row.after}
                | {"low": row.after_low, "high": row.after_high, "gain": row.difference}
                | {"gain low": row.low, "gain high": row.high, "images": len(rung.queries)}
                | {"minutes": rung.minutes, "kept": rung is self.kept}
            )
        return pd.DataFrame(rows).set_index("rung")

    def figure(self) -> Figure:
        """Return each rung's metric with its interval, the kept one marked."""
        rows = [
            {"name": name, "value": row[self.metric], "low": row.low, "high": row.high, "kept": row.kept}
            | {"note": f"{row.gain:+.3f}, {row.minutes:.1f} min" if name != "start" else ""}
            for name, row in self.table().iterrows()
        ]
        return ladder_figure(rows, self.metric)


def climb(cfg: dict, run: Path, show: Callable[[Ladder], object] | None = None) -> tuple[RetrievalLearner, Ladder]:
    """Climb the rungs of a configuration and return the learner of the one that is kept, ready to be evaluated.

    Args:
        cfg: with `Global.recipe: ladder`.
        run: the folder of the whole run; each rung has one in its rungs/.
        show: called with the ladder so far behind every rung.

    Raises:
        ConfigError: The configuration cannot be climbed, or there are too few identities to hold any out.
    """
    ladder.climbable(cfg)
    began, minutes = time.monotonic(), cfg["Ladder"]["minutes"]
    splits = split_lists(cfg, run / "lists")
    at = float("inf") if minutes is None else began + 60 * minutes
    said: list[str] = []
    rungs = []
    try:
        for rung in climbed(cfg, run / "rungs", splits, at):
            rungs.append(rung)
            result = Ladder(rungs, best(rungs, metric_of(rung)), metric_of(rung), said)
            print(f"{rung.name}: {rung.verdict if rungs[1:] else 'the features as they come'}", flush=True)
            if show:
                show(result)
    except OutOfTime:
        said.append(f"the {minutes:g} minutes ended before the ladder did; run again with more, and it goes on")
    result = Ladder(rungs, best(rungs, metric_of(rungs[0])), metric_of(rungs[0]), said)
    learn = handed_back(cfg, run, result, splits, at)
    said.append(f"kept: {result.kept.name}, {ladder.RUNGS[result.kept.name]}, chosen on validation")
    print(*said, sep="\n", flush=True)
    with replacing(run / "ladder.csv") as path:
        result.table().to_csv(path)
    return learn, result


def metric_of(rung: Rung) -> str:
    """Return what rungs are compared by: mAP where it is measured, for it moves before recall@1 does."""
    names = [column.removesuffix("_after") for column in rung.queries if column.endswith("_after")]
    return "mAP" if "mAP" in names else names[0]


def best(rungs: list[Rung], metric: str) -> Rung:
    """Return the rung with the highest metric among those surely better than the start and worse in nothing."""
    sure = [rungs[0]]
    for rung in rungs[1:]:
        rows = rung.verdict.rows
        if rows.loc[metric].verdict == BETTER and not (rows.verdict == WORSE).any():
            sure.append(rung)
    return max(sure, key=lambda rung: rung.verdict.rows.loc[metric].after)


# ---- the rungs -------------------------------------------------------------------------------------------------------


def climbed(cfg: dict, folder: Path, splits: list[Split], at: float) -> Iterator[Rung]:
    """Yield each rung once it is climbed on every split."""
    first = partial(over_splits, splits=splits, at=float("inf"), start=None)
    began = time.monotonic()
    start = Rung("start", ladder.start(cfg), first(folder / "start", ladder.start(cfg)), "start")
    start.minutes = (time.monotonic() - began) / 60
    yield start
    rung = partial(over_splits, splits=splits, at=at, start=start)
    images, identities, width, flat = facts(start.cfg, splits)
    power = None
    if flat:
        began, tried = time.monotonic(), []
        for value in ladder.POWERS:
            made = ladder.whiten(cfg, width, value)
            tried.append(Rung("whiten", made, rung(folder / f"whiten-{value:g}", made), f"whiten-{value:g}"))
        chosen = max(tried, key=lambda rung: rung.queries[f"{metric_of(rung)}_after"].mean())
        chosen.minutes, power = (time.monotonic() - began) / 60, chosen.cfg["Arch"]["Neck"]["power"]
        yield chosen
        began, made = time.monotonic(), ladder.probe(cfg, width, power, images, identities)
        queries = rung(folder / "probe", made)
        yield Rung("probe", made, queries, "probe", minutes=(time.monotonic() - began) / 60)
    began, made = time.monotonic(), ladder.plain(cfg)
    queries = rung(folder / "finetune", made)
    tuned = Rung("finetune", made, queries, "finetune", minutes=(time.monotonic() - began) / 60)
    yield tuned
    yield between(tuned, folder, splits, start, at)


def facts(cfg: dict, splits: list[Split]) -> tuple[int, int, int, bool]:
    """Return training images, identities, the width of the lower rungs' embedding, and whether features are vectors."""
    loaders = build_loaders(on_split(cfg, splits[0]))
    backbone: Any = build_model(cfg).backbone
    images, shape = len(loaders.train.dataset), backbone.out_shape
    return images, loaders.classes, min(ladder.WIDTH, shape[0], images - 1), prod(shape[1:]) == 1


def on_split(cfg: dict, split: Split) -> dict:
    """Return a rung's configuration on the images of a split."""
    evaluation = lookup(cfg, "DataLoader.Eval.Query")
    query, gallery = (
        {**evaluation, "dataset": ladder.with_ops(evaluation["dataset"], part)} for part in (split.query, split.gallery)
    )
    return ladder.judged_by(cfg, split.train, query, gallery)


def over_splits(folder: Path, cfg: dict, splits: list[Split], at: float, start: Rung | None) -> pd.DataFrame:
    """Return the values of every validation query, the start's beside the rung's, each split trained in turn."""
    tables = []
    for number, split in enumerate(splits):
        place, made = folder / f"fold-{number}" if len(splits) > 1 else folder, on_split(cfg, split)
        if not done(place, made):
            train_rung(made, place, at, None if start is None else start_values(start, number))
        tables.append(read_queries(place).assign(fold=number))
    return pd.concat(tables, ignore_index=True)


def done(folder: Path, cfg: dict) -> bool:
    """Return True if a rung stands there already; raise ConfigError where it is another configuration's."""
    if not (folder / "metrics.json").exists():
        return False
    check_same(resolved(cfg), read_yaml(folder / "config.yaml"), folder)
    return True


def start_values(start: Rung, fold: int) -> dict[str, np.ndarray]:
    """Return the metrics of the untouched features for each query of a fold."""
    rows = start.queries[start.queries.fold == fold]
    return {c.removesuffix("_after"): rows[c].to_numpy(float) for c in rows if c.endswith("_after")}


def read_queries(folder: Path) -> pd.DataFrame:
    """Return the values that a rung has left for each query."""
    return pd.read_csv(folder / "queries.csv", float_precision="round_trip", dtype={"label": str})


def train_rung(cfg: dict, folder: Path, at: float, start: dict[str, np.ndarray] | None) -> None:
    """Train a rung into its folder and judge it on the validation lists; a folder without metrics.json goes on."""
    if time.monotonic() > at:
        raise OutOfTime
    learn = learner_of(cfg, folder)
    learn.add_cb(Deadline(at))
    with learn.no_bar(), learn.no_logging():
        learn.fit_config()
        after = learn.evaluate()
    finish(folder, learn, after, start)


def learner_of(cfg: dict, folder: Path) -> RetrievalLearner:
    """Return the learner of a configuration that writes into a folder."""
    loaders = build_loaders(cfg)
    open_run(folder, cfg, loaders.classes)
    return build_learner(cfg, build_model(cfg, loaders.classes), loaders, folder)


def finish(folder: Path, learn: RetrievalLearner, after: Evaluation, start: dict[str, np.ndarray] | None) -> None:
    """Write the results of a rung, compared with the start's values for the same queries."""
    before = (
        after
        if start is None
        else Evaluation(metrics={k: float(np.nanmean(v)) for k, v in start.items()}, per_query=start)
    )
    if not (folder / "history.csv").exists():
        write_history(folder, after.metrics)
    save_results(folder, learn, before, after)


def between(tuned: Rung, folder: Path, splits: list[Split], start: Rung, at: float) -> Rung:
    """Return the rung of the weights between the start and the fine-tuned ones, alpha chosen on validation."""
    began, tables = time.monotonic(), {alpha: [] for alpha in ladder.ALPHAS}
    for number, split in enumerate(splits):
        source = folder / "finetune" / (f"fold-{number}" if len(splits) > 1 else "")
        learn = None
        for alpha in ladder.ALPHAS:
            place = folder / f"interpolate-{alpha:g}" / (f"fold-{number}" if len(splits) > 1 else "")
            cfg = on_split(tuned.cfg, split)
            if not done(place, cfg):
                if time.monotonic() > at:
                    raise OutOfTime
                learn = learn or learner_of(cfg, place)
                open_run(place, cfg, learn.loaders.classes)
                write_between(cfg, learn, source / "model.safetensors", alpha, place)
                with learn.no_bar(), learn.no_logging():
                    after = learn.evaluate()
                shutil.copyfile(source / "history.csv", place / "history.csv")
                shutil.copyfile(source / "labels.csv", place / "labels.csv")
                finish(place, learn, after, start_values(start, number))
            tables[alpha].append(read_queries(place).assign(fold=number))
    joined = {alpha: pd.concat(parts, ignore_index=True) for alpha, parts in tables.items()}
    metric = f"{metric_of(tuned)}_after"
    alpha = max(joined, key=lambda alpha: joined[alpha][metric].mean())
    return Rung("interpolate", tuned.cfg, joined[alpha], "finetune", alpha, (time.monotonic() - began) / 60)


def write_between(cfg: dict, learn: RetrievalLearner, trained: Path, alpha: float, folder: Path) -> None:
    """Give the learner's model the weights between its configuration's start and a file, and save them."""
    start = build_model(cfg, learn.loaders.classes).state_dict()
    weights = interpolate(start, read_weights(trained), alpha)
    learn.model.load_state_dict(weights)
    save_weights(weights, folder / "model.safetensors")


# ---- what is handed back ---------------------------------------------------------------------------------------------


def handed_back(cfg: dict, run: Path, climbed: Ladder, splits: list[Split], at: float) -> RetrievalLearner:
    """Return the learner of the kept rung over the test lists; its weights and history stand in the run folder."""
    kept = climbed.kept
    final, source = refitted(cfg, run, kept, splits, at)
    learn = learner_of({**final, "Global": {**final["Global"], "probe": None}}, run)
    start = learn.model.state_dict()
    weights = start if source is None else read_weights(source / "model.safetensors")
    if kept.alpha is not None:
        weights = interpolate(start, weights, kept.alpha)
    save_weights(weights, run / "model.safetensors")
    learn.model.load_state_dict(weights)
    open_run(run, final, learn.loaders.classes)
    if source is None:
        save_label_map(learn.loaders.train.dataset, run / "labels.csv")
        write_history(run, {})
    else:
        for file in ("history.csv", "labels.csv"):
            shutil.copyfile(source / file, run / file)
    return learn


def refitted(cfg: dict, run: Path, kept: Rung, splits: list[Split], at: float) -> tuple[dict, Path | None]:
    """Return the kept rung's configuration and the folder of its weights, None where these are the start's.

    Where Ladder.refit says so and there is time, and always where there were folds, the rung is trained again on all
    training images, those held out included, for as many epochs as were best.
    """
    final = unjudged(kept.cfg)
    final["DataLoader"]["Eval"] = cfg["DataLoader"]["Eval"]
    section = final["DataLoader"]["Train"]
    again = len(splits) > 1 or (cfg["Ladder"]["refit"] and time.monotonic() < at)
    if kept.name == "start":
        return final, None
    if not again:
        section["dataset"] = ladder.with_ops(section["dataset"], splits[0].train)
        return final, run / "rungs" / kept.folder
    section["dataset"] = ladder.with_ops(section["dataset"], whole_list(cfg, run / "lists"))
    histories = [*(run / "rungs" / kept.folder).rglob("history.csv")]
    final["Global"] |= {"epochs": best_epoch(histories), "eval_during_train": False}
    source = run / "rungs" / f"{kept.folder}-refit"
    if not (source / "model.safetensors").exists():
        learn = learner_of(unjudged(final), source)
        with learn.no_bar(), learn.no_logging():
            learn.fit_config()
    if not (source / "history.csv").exists():
        write_history(source, {})
    return final, source


def write_history(folder: Path, metrics: dict[str, float]) -> None:
    """Write the history of a rung that has no epochs: one row, of epoch 0."""
    with replacing(folder / "history.csv") as path:
        pd.DataFrame([{"epoch": 0, "lr": 0.0, **metrics}]).to_csv(path, index=False)


def best_epoch(histories: list[Path]) -> int:
    """Return how many epochs were best, the median over the folds."""
    epochs = []
    for path in histories:
        table = pd.read_csv(path)
        judged = (
            table.dropna(subset=[name]) if (name := "mAP" if "mAP" in table else table.columns[-1]) in table else table
        )
        epochs.append(int(judged.epoch[judged[name][::-1].idxmax()]) if len(judged) else 0)
    return int(np.median(epochs)) if epochs else 0
