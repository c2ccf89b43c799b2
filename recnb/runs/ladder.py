"""Climb from the untouched features to fine-tuned ones, and keep the best rung whose gain the validation images show.

Fine-tuning on few images can make good features worse. Each rung is a run of its own in rungs/, judged on identities
that it was not trained on; the test lists are judged once, by the caller, with the model that is handed back. A rung
that is there already is read, and one that was interrupted goes on where it stopped.
"""

import contextlib
import shutil
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any, cast

import numpy as np
import pandas as pd
from torch import Tensor

from recnb.data.lists import save_label_map, write_csv
from recnb.models.weights import average, interpolate, read_weights, save_weights
from recnb.recipe import ladder
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.reading import read_yaml
from recnb.recipe.resolved import check_same, resolved
from recnb.recipe.schema import lookup
from recnb.recipe.splits import Split, split_lists, unjudged, whole_list
from recnb.runs.folder import begin
from recnb.runs.results import save_results
from recnb.runs.rungs import Ladder, Rung
from recnb.storage import SUMS, check_sums
from recnb.training import checkpoints
from recnb.training.adaptor import Callback
from recnb.training.evaluation import Evaluation
from recnb.training.guard import TrainingError
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
    at = float("inf") if minutes is None else began + 60 * minutes
    shared, result = Shared(run, split_lists(cfg, run / "lists"), at), Ladder()
    cfg = ladder.in_splits(cfg, min(split.identities for split in shared.splits))
    try:
        for rung in climbed(cfg, shared, result.said):
            rung.minutes = (time.monotonic() - began) / 60
            result.rungs.append(rung)
            said = f"{rung.name}: {rung.verdict if result.rungs[1:] else 'the features as they come'}"
            print(textwrap.fill(said, 100, subsequent_indent="  "), flush=True)
            if show:
                show(result)
            began = time.monotonic()
    except OutOfTime:
        result.said.append(f"the {minutes:g} minutes ended before the ladder did; run again with more, and it goes on")
    kept = result.kept
    learn = hand_back(cfg, kept, shared)
    result.said.append(f"kept: {kept.name}, {kept.what}, chosen on validation")
    print(*result.said, sep="\n", flush=True)
    write_csv(result.table(), run / "ladder.csv", index=True)
    return learn, result


# ---- the rungs -------------------------------------------------------------------------------------------------------


@dataclass
class Shared:
    """What all rungs of a climb share: the run folder, the splits, when the time has run out, and the first rung."""

    run: Path
    splits: list[Split]
    at: float
    start: Rung | None = None

    def place(self, folder: str, number: int) -> Path:
        """Return where in rungs/ a split of a rung is kept."""
        return self.run / "rungs" / folder / (f"fold-{number}" if len(self.splits) > 1 else "")

    def before(self, number: int) -> dict[str, np.ndarray] | None:
        """Return what the start has for the queries of a split, None while it is climbed itself."""
        return None if self.start is None else self.start.values(number)


def climbed(cfg: dict, shared: Shared, said: list[str]) -> Iterator[Rung]:
    """Yield each rung once it is climbed on every split; why one cannot be is added to `said`."""
    shared.start = trained("start", ladder.start(cfg), shared)
    yield shared.start
    images, identities, width, flat = facts(shared.start.cfg, shared)
    if flat:
        tried = [
            trained("whiten", ladder.whiten(cfg, width, power), shared, f"whiten-{power:g}") for power in ladder.POWERS
        ]
        whitened = max(tried, key=lambda rung: rung.mean)
        yield whitened
        power = whitened.cfg["Arch"]["Neck"]["power"]
        yield trained("probe", ladder.probe(cfg, width, power, images, identities), shared)
    else:
        said.append("whiten, probe: left out, since the backbone is cut where it gives maps and no vectors")
    try:
        tuned = trained("finetune", ladder.finetune(cfg), shared)
    except TrainingError as error:
        said.append(f"finetune, interpolate, average: left out, since {error}")
        return
    yield tuned
    mixes = {alpha: mixed("interpolate", tuned, shared, alpha) for alpha in ladder.ALPHAS}
    between = max(mixes.values(), key=lambda rung: rung.mean)
    between.way = {0.0: shared.start.mean, **{alpha: rung.mean for alpha, rung in mixes.items()}, 1.0: tuned.mean}
    yield between
    places = [shared.place("finetune", number) / "checkpoints" for number in range(len(shared.splits))]
    if all(len(checkpoints.numbered(place)) > 1 for place in places):
        yield mixed("average", tuned, shared)
    else:
        said.append("average: left out, since the weights of several epochs are not in rungs/finetune")


def facts(cfg: dict, shared: Shared) -> tuple[int, int, int, bool]:
    """Return training images, identities, the width of the lower rungs, and whether features are vectors."""
    loaders = build_loaders(on_split(cfg, shared.splits[0]))
    width, *rest = cast(Any, build_model(cfg)).backbone.out_shape
    return len(loaders.train.dataset), loaders.classes, min(ladder.WIDTH, width), prod(rest) == 1


def missing(place: Path, cfg: dict, shared: Shared) -> bool:
    """Return whether a rung has yet to be climbed.

    Raises:
        ConfigError: It is there, and damaged or of another configuration.
        OutOfTime: It is not, and the time has run out.
    """
    if (place / "metrics.json").exists():
        if (place / SUMS).exists():
            check_sums(place)
        check_same(resolved(cfg), read_yaml(place / "config.yaml"), place)
        return False
    if shared.start and time.monotonic() > shared.at:
        raise OutOfTime
    return True


def trained(name: str, cfg: dict, shared: Shared, folder: str = "") -> Rung:
    """Return a rung that is trained; a folder without metrics.json goes on."""

    def fit(learn: RetrievalLearner, place: Path, number: int) -> None:
        learn.add_cb(Deadline(shared.at))
        fit_quietly(learn, place)

    return Rung(name, cfg, on_splits(cfg, folder or name, shared, fit), folder or name)


def mixed(name: str, tuned: Rung, shared: Shared, alpha: float | None = None) -> Rung:
    """Return a rung whose weights are mixed of those of the fine-tuning, `alpha` of the way to them or their mean."""
    made = Rung(name, tuned.cfg, tuned.queries, "finetune", alpha)

    def mix(learn: RetrievalLearner, place: Path, number: int) -> None:
        source = shared.place("finetune", number)
        take_weights(learn, weights_of(made, learn.model.state_dict(), source), place)
        shutil.copyfile(source / "labels.csv", place / "labels.csv")

    made.queries = on_splits(tuned.cfg, name if alpha is None else f"{name}-{alpha:g}", shared, mix)
    return made


def on_splits(
    cfg: dict, folder: str, shared: Shared, make: Callable[[RetrievalLearner, Path, int], None]
) -> pd.DataFrame:
    """Return the queries of a rung on every split, with the number of the split as `fold`.

    Args:
        cfg: the rung's configuration.
        folder: where in rungs/ it is.
        shared: what the rungs share.
        make: `make(learn, place, number)` gives the learner of a split its weights, where the rung is not there yet.
    """
    tables = []
    for number, split in enumerate(shared.splits):
        place, made = shared.place(folder, number), on_split(cfg, split)
        if missing(place, made, shared):
            learn = learner_of(made, place)
            make(learn, place, number)
            finish(place, learn, shared.before(number))
        tables.append(read_queries(place).assign(fold=number))
    return pd.concat(tables, ignore_index=True)


def weights_of(rung: Rung, start: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Return the weights of a rung.

    Args:
        rung: which.
        start: the weights before any training.
        source: the folder of the training that it is made of.
    """
    if rung.name == "average":
        last = ladder.last_epochs(len(pd.read_csv(source / "history.csv")))
        paths = checkpoints.numbered(source / "checkpoints")[-last:]
        return average(checkpoints.kept(path)["model"] for path in paths)
    trained = read_weights(source / "model.safetensors")
    return trained if rung.alpha is None else interpolate(start, trained, rung.alpha)


def hand_back(cfg: dict, kept: Rung, shared: Shared) -> RetrievalLearner:
    """Return the learner of the kept rung over the test lists; its weights and history stand in the run folder."""
    final, source = refitted(cfg, kept, shared)
    learn = learner_of({**final, "Global": {**final["Global"], "probe": None}}, shared.run)
    start = learn.model.state_dict()
    take_weights(learn, start if source is None else weights_of(kept, start, source), shared.run)
    begin(shared.run, final, learn.loaders.classes)
    if source is None:
        save_label_map(learn.loaders.train.dataset, shared.run / "labels.csv")
        write_history(shared.run, {})
    else:
        for file in ("history.csv", "labels.csv"):  # what a training has left beside its weights
            shutil.copyfile(source / file, shared.run / file)
    return learn


def refitted(cfg: dict, kept: Rung, shared: Shared) -> tuple[dict, Path | None]:
    """Return the kept rung's configuration and the folder of its weights, None where these are the start's.

    Where Ladder.refit says so and there is time, and always where there were folds, the rung is trained again on
    all training images, those held out included, for as many epochs as were best.
    """
    final = unjudged(kept.cfg)
    final["DataLoader"]["Eval"] = cfg["DataLoader"]["Eval"]
    section, folder = final["DataLoader"]["Train"], shared.run / "rungs" / kept.folder
    again = len(shared.splits) > 1 or (cfg["Ladder"]["refit"] and time.monotonic() < shared.at)
    if kept.name == "start":
        return final, None
    if not again:
        section["dataset"] = ladder.with_ops(section["dataset"], shared.splits[0].train)
        return final, folder
    section["dataset"] = ladder.with_ops(section["dataset"], whole_list(cfg, shared.run / "lists"))
    final["Global"] |= {"epochs": epochs_of(kept, [*folder.rglob("history.csv")]), "eval_during_train": False}
    source = folder.with_name(f"{'average' if kept.name == 'average' else kept.folder}-refit")
    if not (source / "model.safetensors").exists():
        fit_quietly(learner_of(unjudged(final), source), source)
    if not (source / "history.csv").exists():
        write_history(source, {})
    return final, source


def on_split(cfg: dict, split: Split) -> dict:
    """Return a rung's configuration on the images of a split."""
    evaluation = lookup(cfg, "DataLoader.Eval.Query")
    query, gallery = (
        {**evaluation, "dataset": ladder.with_ops(evaluation["dataset"], part)} for part in (split.query, split.gallery)
    )
    return ladder.judged_by(cfg, split.train, query, gallery)


def learner_of(cfg: dict, folder: Path) -> RetrievalLearner:
    """Return the learner of a configuration that writes into a folder."""
    loaders = build_loaders(cfg)
    begin(folder, cfg, loaders.classes)
    return build_learner(cfg, build_model(cfg, loaders.classes), loaders, folder)


def fit_quietly(learn: RetrievalLearner, folder: Path) -> None:
    """Train a rung; what it prints goes into its folder, as output.txt."""
    with (
        (folder / "output.txt").open("a", encoding="utf-8") as file,
        contextlib.redirect_stdout(file),
        learn.no_bar(),
        learn.no_logging(),
    ):
        learn.fit_config()


def take_weights(learn: RetrievalLearner, weights: dict[str, Tensor], folder: Path) -> None:
    """Give a learner's model some weights, and write them as model.safetensors."""
    learn.model.load_state_dict(weights)
    save_weights(weights, folder / "model.safetensors")


# ---- its files -------------------------------------------------------------------------------------------------------


def finish(folder: Path, learn: RetrievalLearner, start: dict[str, np.ndarray] | None) -> None:
    """Judge a rung and write its results, compared with the start's values for the same queries."""
    with learn.no_bar(), learn.no_logging():
        after = before = learn.evaluate()
    learn.loaders.stop_workers()
    if start is not None:
        before = Evaluation(metrics={k: float(np.nanmean(v)) for k, v in start.items()}, per_query=start)
    if not (folder / "history.csv").exists():
        write_history(folder, after.metrics)
    save_results(folder, learn, before, after)


def read_queries(folder: Path) -> pd.DataFrame:
    """Return the values that a rung has left for each query."""
    return pd.read_csv(folder / "queries.csv", float_precision="round_trip", dtype={"label": str})


def write_history(folder: Path, metrics: dict[str, float]) -> None:
    """Write the history of a rung that has no epochs: one row, of epoch 0."""
    write_csv(pd.DataFrame([{"epoch": 0, "lr": 0.0, **metrics}]), folder / "history.csv")


def epochs_of(kept: Rung, histories: list[Path]) -> int:
    """Return how many epochs a rung is trained for again: as many as were best, all for a mean of the last ones.

    Over folds it is the median.
    """
    epochs = [0] * (not histories)
    for path in histories:
        table = pd.read_csv(path)
        if kept.name == "average":
            epochs.append(int(table.epoch.max()))
            continue
        metric = "mAP" if "mAP" in table else table.columns[-1]
        judged = table.dropna(subset=[metric])
        epochs.append(int(judged.epoch[judged[metric][::-1].idxmax()]) if len(judged) else 0)
    return int(np.median(epochs))
