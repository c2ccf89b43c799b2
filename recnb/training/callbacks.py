"""The callbacks of a learner and of a plan: labels for the head, evaluation, learning rates, the history, the pace."""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from torch import Tensor

from recnb.data.lists import write_csv
from recnb.data.loaders import Pair, over
from recnb.distributed.processes import averaged, first_does, joined, ranks
from recnb.training.adaptor import Callback, CancelFitException, CancelValidException, ValueMetric
from recnb.training.evaluation import Evaluation, embed
from recnb.training.loggers import Logger
from recnb.training.plan import FitState, Plan


class PassLabels(Callback):
    """Gives the head its labels while training (or where a loss needs logits), and each epoch its draw."""

    def before_train(self):
        self.loss_func.train()
        sampler = getattr(self.dl.loader, "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)

    def before_validate(self):
        self.loss_func.eval()

    def before_batch(self):
        if self.training and self.learn.mix is not None:
            x, y = self.learn.mix(*self.xb, *self.yb)
            self.learn.xb, self.learn.yb = (x,), (y,)
        if self.training or getattr(self.loss_func.eval_loss, "needs_logits", False):
            self.learn.xb = (*self.xb, *self.yb)

    def after_loss(self):
        if hasattr(self.learn, "gather_preds"):  # get_preds gives embeddings
            self.learn.pred = self.pred["features"]


class RetrievalEvaluation(Callback):
    """Has the outputs for a pair of lists judged, and leaves the `result` until the next training.

    Args:
        pair: The loaders of the query and of the gallery images.
        judge: As `Judge`: called with what it `reads` of the outputs, or else the features, of query and gallery.
    """

    def __init__(self, pair: Pair, judge: Callable[..., Evaluation]):
        self.pair, self.query, self.gallery, self.judge = pair, pair.query.dataset, pair.gallery.dataset, judge
        self.result: Evaluation | None = None

    def before_train(self):
        self.result = None  # memory

    def before_validate(self):
        self.features, self.read, self.result = [], [], None

    def after_pred(self):
        if not self.training and self.yb:  # items without labels are not the lists
            self.features.append(self.pred["features"].detach().float().cpu())
            if self.judge.reads:
                self.read.append(self.judge.reads(self.pred).detach().float().cpu())

    def after_validate(self):
        features = joined(torch.cat(self.features)) if self.features else torch.empty(0)
        read = joined(torch.cat(self.read)) if self.read else features
        self.features, self.read = [], []
        if len(features) == len(self.query) + (self.query is not self.gallery) * len(self.gallery):
            judged = self.judge(*self.parts(read), self.query, self.gallery, self.training_features)
            query, gallery = self.parts(features)
            self.result = replace(judged, query=query, gallery=gallery)

    def parts(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        """Return the rows of the query and of the gallery images."""
        return rows[: len(self.query)], rows[-len(self.gallery) :]

    def training_features(self) -> Tensor:
        """Return the features (N, D) of the training images, seen as queries are, for steps that are fitted on them."""
        images = replace(self.dls.train.dataset, transform=self.query.transform)
        return embed(self.learn.model, over(self.pair.query, images))


def write_row(write: Callable, row: list) -> None:
    """Write a row of the live table with epochs counted from 1 and blanks where there is no value."""
    number = row[0] + 1 if isinstance(row[0], int) else row[0]
    write([number, *("" if value is None or value != value else value for value in row[1:])])


class FollowPlan(Callback):
    """Sets the learning rate of every step, leaves out evaluations between intervals, writes a line each few steps."""

    def __init__(self, plan: Plan, state: FitState):
        self.plan, self.state = plan, state

    def before_fit(self):
        self.learn.train_iter = self.first_epoch * len(self.dls.train) + self.first_batch
        self.learn.logger = partial(write_row, self.learn.logger)
        bar = getattr(getattr(self.learn, "progress", None), "mbar", None)
        if self.first_epoch and bar:  # fastai's bar has to be told of a start at 0 before any other
            bar.update(0)

    def before_batch(self):
        if self.training:
            batches = self.plan.schedule.update_freq
            steps = -(-self.n_iter // batches)
            self.state.rates = self.at(self.epoch * steps + self.iter // batches)
            for group in self.opt.opt.param_groups:
                group["lr"] = self.state.rates[group["entry"]] * group["lr_scale"]

    def at(self, step: int) -> list[float]:
        """Return the learning rate of each optimizer at a step."""
        values = [row[self.learn.names[0]] for row in self.state.rows if self.learn.names[0] in row]
        return [rate(step, values) for rate in self.plan.schedule.rates]

    def before_validate(self):
        interval, epoch = self.plan.evaluation.interval, self.epoch + 1
        due = interval and epoch % interval == 0 and epoch >= self.plan.evaluation.first
        if not due and not (interval and epoch == self.n_epoch):
            raise CancelValidException

    def after_batch(self):
        if self.training and (self.iter + 1) % min(self.plan.log_interval, self.n_iter) == 0:
            terms = self.loss_func.train_loss.terms
            loss, *values = averaged(torch.stack([self.loss.detach(), *terms.values()]).float()).tolist()
            if ranks()[0] == 0:
                self.write(loss, dict(zip(terms, values, strict=True)))

    def write(self, loss: float, terms: dict[str, float]):
        words = ", ".join(f"{name}: {value:.5f}" for name, value in terms.items())
        with (self.plan.folder / "train.log").open("a") as log:
            log.write(
                f"{time.strftime('%H:%M:%S')} epoch {self.epoch + 1}/{self.n_epoch} step {self.iter + 1}/"
                f"{self.n_iter} lr {self.state.rates[0]:.6g} loss {loss:.5f} ({words})\n"
            )


class History(Callback):
    """One row an epoch: learning rate, training loss and its terms, evaluation loss, metrics; kept as history.csv."""

    def __init__(
        self,
        folder: Path,
        state: FitState,
        watched: RetrievalEvaluation | None,
        on_epoch: Callable[[], object] | None = None,
    ):
        self.folder, self.state, self.watched, self.on_epoch = folder, state, watched, on_epoch

    def before_fit(self):  # so that the live table has a column for each term
        self.shown = [ValueMetric(partial(self.mean, name), name) for name in self.loss_func.train_loss.names]
        self.learn.metrics = [*self.shown, *self.learn.metrics]

    def after_fit(self):
        self.learn.metrics = [metric for metric in self.learn.metrics if metric not in self.shown]

    def mean(self, name: str) -> float:
        return (self.state.sums[name] / self.state.count).item() if self.state.count else float("nan")

    def before_train(self):
        self.state.sums, self.state.count = {}, 0

    def after_train(self):
        self.state.join()

    def after_batch(self):
        if self.training and not self.state.skipped:
            self.state.count += 1
            for name, value in (("train_loss", self.loss.detach()), *self.loss_func.train_loss.terms.items()):
                self.state.sums[name] = self.state.sums.get(name, 0) + value

    def after_epoch(self):
        if self.recorder.cancel_valid:  # keeps the columns of the live table in step
            blank = [float("nan")] * (self.loss_func.eval_loss is not None)
            self.recorder.log += [*blank, *(metric.value for metric in self.learn.metrics)]
        state, result = self.state, self.watched and self.watched.result
        row = {"epoch": self.epoch + 1, "lr": state.rates[0], **{name: self.mean(name) for name in state.sums}}
        if result:
            loss = self.recorder.loss.value
            row |= {"valid_loss": loss.item()} if loss is not None and loss.isfinite() else {}
            row |= result.metrics
            value = result.metrics[self.learn.names[0]]
            if not state.best or value >= state.best["value"]:
                state.best = {"epoch": self.epoch + 1, "value": value}
        state.rows.append(row)
        first_does(self.write)
        if self.on_epoch:
            self.on_epoch()

    def write(self):
        write_csv(pd.DataFrame(self.state.rows), self.folder / "history.csv")


class StopEarly(Callback):
    """Ends training behind `patience` epochs without a better value of the first metric, also where a run goes on."""

    def __init__(self, patience: int, state: FitState):
        self.patience, self.state = patience, state

    def after_epoch(self):
        name, last = self.learn.names[0], len(self.state.rows)
        values = {row["epoch"]: row[name] for row in self.state.rows if name in row}
        if values and last - max(values, key=values.get) >= self.patience:
            print(f"stopped behind epoch {last}: {self.patience} epochs without a better {name}")
            raise CancelFitException

    before_fit = after_epoch  # a run that goes on may have stopped already


class Pace(Callback):
    """Counts training images and the seconds they take, evaluation apart, and how long the loader made the model wait.

    A loader that is faster than the model has its next batch ready: the model waits only where the loader is slower.
    """

    def __init__(self):
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def before_train(self):
        self.started = self.ready = time.perf_counter()

    def before_batch(self):
        if self.training:
            self.waited += time.perf_counter() - self.ready
            self.images += len(self.xb[0]) * ranks()[1]

    def after_batch(self):
        self.ready = time.perf_counter()

    def after_train(self):
        self.seconds += time.perf_counter() - self.started

    def __str__(self) -> str:
        waiting, alone = self.waited / self.seconds, self.images / (self.seconds - self.waited)
        which = "model" if waiting < 0.1 else "loader"
        hint = "; more num_workers, Global.cache_images or cheaper transform_ops would help" * (which == "loader")
        return (
            f"{self.images:,} training images in {self.seconds:.0f} s: {self.images / self.seconds:,.0f} a second, "
            f"the model alone {alone:,.0f}\n"
            f"{waiting:.0%} of the time went by waiting for the loader: the {which} is the bottleneck{hint}"
        )


class Log(Callback):
    """Hands each step's loss terms and each epoch's row of the history to the loggers of a run."""

    def __init__(self, loggers: Sequence[Logger], state: FitState):
        self.loggers, self.state = loggers, state

    def after_batch(self):
        if self.training:
            terms = self.loss_func.train_loss.terms
            self.write({f"train_{name}": value.item() for name, value in terms.items()}, "step", self.train_iter)

    def after_epoch(self):
        row = self.state.rows[-1]
        self.write({f"epoch_{name}": row[name] for name in row if name != "epoch"}, "epoch", row["epoch"])

    def write(self, values: dict[str, float], kind: str, number: int):
        for logger in self.loggers:
            logger.write(values, kind, number)
