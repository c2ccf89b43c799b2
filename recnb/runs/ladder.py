"""Climb from the untouched features to fine-tuned ones, and keep the best rung whose gain the validation images show.

Fine-tuning on few images can make good features worse. Each rung is a run of its own in rungs/, judged on identities
that it was not trained on; the test lists are judged once, by the caller, with the model that is handed back. A rung
that is there already is read, and one that was interrupted goes on where it stopped.
"""

from __future__ import annotations

import copy
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
from safetensors.torch import load_file, save_file

from recnb.data.lists import ImageList
from recnb.data.loaders import Loaders
from recnb.models.weights import interpolate
from recnb.recipe import ladder
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.schema import lookup
from recnb.registry import ConfigError
from recnb.runs.folder import open_run
from recnb.runs.results import save_results
from recnb.runs.verdict import BETTER, WORSE, Verdict, verdict
from recnb.storage import replacing, resolve, write_text
from recnb.training.adaptor import Callback
from recnb.training.evaluation import Evaluation
from recnb.training.learner import RetrievalLearner

FEWEST = 4  # validation identities, below which there is nothing to choose by


class OutOfTime(Exception):
    """The budget has ended in the middle of a rung."""


class Deadline(Callback):
    """Ends the fit behind the epoch in which the time has run out; its checkpoint is kept."""

    order = 99

    def __init__(self, at: float):
        self.at = at

    def after_epoch(self):
        if time.monotonic() > self.at and self.epoch + 1 < self.n_epoch:
            raise OutOfTime


@dataclass
class Split:
    """Images to train on and others, of other identities, to choose by; sections of data sets."""

    train: dict
    query: dict
    gallery: dict


@dataclass
class Rung:
    """A rung that was climbed: its values for each validation query beside those of the start."""

    name: str
    cfg: dict
    queries: pd.DataFrame = field(repr=False)
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
    splits = [*split_lists(cfg, run / "lists")]
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
    learn = refit(cfg, run, result, splits, at)
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
    start = Rung("start", ladder.start(cfg), first(folder / "start", ladder.start(cfg)))
    start.minutes = (time.monotonic() - began) / 60
    yield start
    rung = partial(over_splits, splits=splits, at=at, start=start)
    images, identities, width, flat = facts(start.cfg, splits)
    power = None
    if flat:
        began, tried = time.monotonic(), []
        for value in ladder.POWERS:
            made = ladder.whiten(cfg, width, value)
            tried.append(Rung("whiten", made, rung(folder / f"whiten-{value:g}", made)))
        chosen = max(tried, key=lambda rung: rung.queries[f"{metric_of(rung)}_after"].mean())
        chosen.minutes, power = (time.monotonic() - began) / 60, chosen.cfg["Arch"]["Neck"]["power"]
        yield chosen
        began, made = time.monotonic(), ladder.probe(cfg, width, power, images, identities)
        queries = rung(folder / "probe", made)
        yield Rung("probe", made, queries, minutes=(time.monotonic() - began) / 60)
    began, made = time.monotonic(), ladder.plain(cfg)
    queries = rung(folder / "finetune", made)
    tuned = Rung("finetune", made, queries, minutes=(time.monotonic() - began) / 60)
    yield tuned
    yield between(tuned, folder, splits, start, at)


def facts(cfg: dict, splits: list[Split]) -> tuple[int, int, int, bool]:
    """Return training images, identities, the width of the lower rungs' embedding, and whether features are vectors."""
    loaders = build_loaders(on_split(cfg, splits[0]))
    train, shape = loaders.train.dataset, build_model(cfg).backbone.out_shape
    flat = prod(shape[1:]) == 1
    return len(train), len(train.names), min(ladder.WIDTH, shape[0], len(train) - 1), flat


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
        place = folder / f"fold-{number}" if len(splits) > 1 else folder
        if not (place / "metrics.json").exists():
            train_rung(on_split(cfg, split), place, at, None if start is None else start_values(start, number))
        tables.append(read_queries(place).assign(fold=number))
    return pd.concat(tables, ignore_index=True)


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
        write_text(folder / "history.csv", "epoch\n")
    save_results(folder, learn, before, after)


def between(tuned: Rung, folder: Path, splits: list[Split], start: Rung, at: float) -> Rung:
    """Return the rung of the weights between the start and the fine-tuned ones, alpha chosen on validation."""
    began, tables = time.monotonic(), {alpha: [] for alpha in ladder.ALPHAS}
    for number, split in enumerate(splits):
        source = folder / "finetune" / (f"fold-{number}" if len(splits) > 1 else "")
        learn = None
        for alpha in ladder.ALPHAS:
            place = folder / f"interpolate-{alpha:g}" / (f"fold-{number}" if len(splits) > 1 else "")
            if not (place / "metrics.json").exists():
                if time.monotonic() > at:
                    raise OutOfTime
                cfg = on_split(tuned.cfg, split)
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
    return Rung("interpolate", tuned.cfg, joined[alpha], alpha, (time.monotonic() - began) / 60)


def write_between(cfg: dict, learn: RetrievalLearner, trained: Path, alpha: float, folder: Path) -> None:
    """Give the learner's model the weights between its configuration's start and a file, and save them."""
    first = build_model(cfg, learn.loaders.classes).state_dict()
    weights = interpolate(first, load_file(trained), alpha)
    learn.model.load_state_dict(weights)
    with replacing(folder / "model.safetensors") as path:
        save_file({name: value.contiguous() for name, value in weights.items()}, path)


# ---- what is handed back ---------------------------------------------------------------------------------------------


def refit(cfg: dict, run: Path, climbed: Ladder, splits: list[Split], at: float) -> RetrievalLearner:
    """Return the learner of the kept rung over the test lists, its files copied into the run folder.

    Where Ladder.refit says so, and always where there were folds, the rung is trained again on all training images, the
    validation ones included, for as many epochs as were best.
    """
    kept, rungs = climbed.kept, run / "rungs"
    final = copy.deepcopy(kept.cfg)
    final["DataLoader"].pop("Validation", None)
    name = {"whiten": f"whiten-{lookup(kept.cfg, 'Arch.Neck.power') or 0:g}", "interpolate": "finetune"}.get(
        kept.name, kept.name
    )
    source = rungs / name
    again = kept.name != "start" and (cfg["Ladder"]["refit"] or len(splits) > 1)
    if again:
        whole = whole_list(cfg, run / "lists")
        section = final["DataLoader"]["Train"]
        section["dataset"] = ladder.with_ops(section["dataset"], whole)
        final["Global"] |= {"epochs": best_epoch([*source.rglob("history.csv")]), "eval_during_train": False}
        source = rungs / f"{name}-refit"
        if not (source / "model.safetensors").exists():
            learn = learner_of(unjudged(final), source)
            with learn.no_bar(), learn.no_logging():
                learn.fit_config()
    else:
        section = final["DataLoader"]["Train"]
        section["dataset"] = ladder.with_ops(section["dataset"], splits[0].train)
    learn = learner_of({**final, "Global": {**final["Global"], "probe": None}}, run)
    weights = load_file(source / "model.safetensors")
    if kept.alpha is not None:
        first = build_model(final, learn.loaders.classes).state_dict()
        weights = interpolate(first, weights, kept.alpha)
    learn.model.load_state_dict(weights)
    open_run(run, final, learn.loaders.classes)
    for file in ("history.csv", "labels.csv"):
        if (source / file).exists():
            shutil.copyfile(source / file, run / file)
    if not (run / "history.csv").exists():
        write_text(run / "history.csv", "epoch\n")
    with replacing(run / "model.safetensors") as path:
        save_file({key: value.contiguous() for key, value in weights.items()}, path)
    return learn


def unjudged(cfg: dict) -> dict:
    """Return the configuration without lists to be judged by: nothing is held out any more."""
    cfg = copy.deepcopy(cfg)
    cfg["DataLoader"].pop("Eval", None)
    return cfg


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


# ---- lists -----------------------------------------------------------------------------------------------------------


def split_lists(cfg: dict, folder: Path) -> Iterator[Split]:
    """Yield the splits of the training identities: the Validation lists, one share of them, or folds.

    Raise ConfigError where there are too few identities with two images to choose by.
    """
    section = lookup(cfg, "DataLoader.Validation") or {}
    if section.get("Query"):
        train = cfg["DataLoader"]["Train"]["dataset"]
        yield Split(
            {k: v for k, v in train.items() if k != "transform_ops"},
            *(
                {k: v for k, v in section[part]["dataset"].items() if k != "transform_ops"}
                for part in ("Query", "Gallery")
            ),
        )
        return
    images = training_table(cfg)
    names = np.array([images.name(label) for label in images.labels])
    found, counts = np.unique(names, return_counts=True)
    able = found[counts > 1]
    if len(able) < 2 * FEWEST:
        raise ConfigError(
            f"Global.recipe: a ladder needs {2 * FEWEST} identities with two images, to train on some and choose by "
            f"others, and there are {len(able)}; take more, or leave recipe out"
        )
    folds = cfg["Ladder"]["folds"] or (1 if section.get("share") or len(able) >= 40 else 4)
    order = np.random.default_rng(section.get("seed", 0)).permutation(able)
    share = section.get("share") or 0.25
    parts = (
        [order[: max(FEWEST, round(share * len(able)))]]
        if folds == 1
        else np.array_split(order, min(folds, len(able) // 2))
    )
    for number, held in enumerate(parts):
        inside = np.isin(names, held)
        train, validation = (
            write_list(cfg, images, rows, folder / f"{name}-{number}.txt")
            for name, rows in (("train", ~inside), ("validation", inside))
        )
        yield Split(train, validation, validation)


def training_table(cfg: dict) -> ImageList:
    """Return every training image, those that Validation.share would hold out included."""
    whole = copy.deepcopy(cfg)
    whole["DataLoader"].pop("Validation", None)
    loaders: Loaders = build_loaders(unjudged({**whole, "Global": {**whole["Global"], "eval_during_train": False}}))
    return loaders.train.dataset


def whole_list(cfg: dict, folder: Path) -> dict:
    """Return the section of all training images, validation ones included."""
    section = lookup(cfg, "DataLoader.Validation") or {}
    images = training_table(cfg)
    if not section.get("Query"):
        return write_list(cfg, images, np.ones(len(images), bool), folder / "all.txt")
    held = build_loaders(cfg).validation
    tables = [images, *{id(part.dataset): part.dataset for part in (held.query, held.gallery)}.values()]
    return write_list(cfg, images, np.ones(len(images), bool), folder / "all.txt", tables[1:])


def write_list(cfg: dict, images: ImageList, rows: np.ndarray, path: Path, more: list[ImageList] | None = None) -> dict:
    """Write the chosen rows of a table, and all rows of others, as a list file, and return its section."""
    if images.boxes is not None:
        raise ConfigError("Global.recipe: a ladder cannot hold out images with boxes; give DataLoader.Validation lists")
    root = Path(images.paths[0]).anchor or "."
    lines = dict.fromkeys(
        "\t".join(
            [str(Path(table.paths[i]).absolute().relative_to(root)), table.name(table.labels[i]), *camera(table, i)]
        )
        for table, chosen in [(images, np.flatnonzero(rows)), *((table, range(len(table))) for table in more or ())]
        for i in chosen
    )
    write_text(path, "\n".join(lines) + "\n")
    return {
        "name": "VeriWild",
        "image_root": root,
        "cls_label_path": str(resolve(path)),
        "delimiter": "\t",
        "names": True,
    }


def camera(images: ImageList, index: int) -> list[str]:
    """Return the third column of a list, where it has one."""
    return [] if images.cameras is None else [str(images.cameras[index])]
