"""The callbacks of a schedule: learning rates, the history, the pace and its bottleneck, scalars for a dashboard."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch

from recnb.distributed.processes import averaged, first_does, ranks
from recnb.storage import replacing
from recnb.training.learner import Callback, CancelValidException, ValueMetric


@dataclass
class Plan:
    """What `fit_config` does: how long, at which learning rates, and what it evaluates and keeps, where."""

    epochs: int
    schedules: list[Callable]  # one for each optimizer, from the optimizer's steps so far and the metric's values
    folder: Path
    config: str = "{}"  # the configuration as JSON text, kept in the checkpoint
    check_same: Callable = lambda theirs, path: None  # raises ConfigError for a checkpoint of another configuration
    checkpoint: Path | None = None  # to resume from where the folder holds none
    eval_interval: int = 1  # 0: no evaluation while training
    save_interval: int = 1
    log_interval: int = 10
    scalars: bool = False
    first_evaluation: int = 0  # the epochs before it are not evaluated
    update_freq: int = 1  # batches to one step of the optimizer
    decay: float | None = None  # of the moving average of the weights
    half: torch.dtype | None = None  # with float16, losses are scaled
    save_steps: int | None = None
    keep_checkpoints: int | None = None
    skip_nonfinite: bool = False
    seed: int = 0
    devices: int = 1


def write_row(write: Callable, row: list) -> None:
    """Write a row of the live table with epochs counted from 1 and blanks where there is no value."""
    number, *cells = row
    blank = [value is None or value != value for value in cells]
    write(
        [
            number + 1 if isinstance(number, int) else number,
            *("" if empty else value for value, empty in zip(cells, blank, strict=True)),
        ]
    )


class FollowPlan(Callback):
    """Sets the learning rate of every step, leaves out evaluations between intervals, writes a line each few steps."""

    order = 70  # behind the progress bar's callback, whose table is written to

    def __init__(self, plan: Plan):
        self.plan = plan

    def before_fit(self):
        self.learn.train_iter = self.first_epoch * len(self.dls.train) + self.first_batch
        self.learn.logger = partial(write_row, self.learn.logger)
        bar = getattr(getattr(self.learn, "progress", None), "mbar", None)
        if self.first_epoch and bar:  # fastai's bar has to be told of a start at 0 before any other
            bar.update(0)

    def before_batch(self):
        if self.training:
            steps = -(-self.n_iter // self.plan.update_freq)
            self.rates = self.at(self.epoch * steps + self.iter // self.plan.update_freq)
            for group in self.opt.opt.param_groups:
                group["lr"] = self.rates[group["entry"]] * group["lr_scale"]

    def at(self, step: int) -> list[float]:
        """The learning rate of each optimizer."""
        values = [row[self.learn.names[0]] for row in self.history.rows if self.learn.names[0] in row]
        return [schedule(step, values) for schedule in self.plan.schedules]

    def before_validate(self):
        interval, epoch = self.plan.eval_interval, self.epoch + 1
        due = interval and epoch % interval == 0 and epoch >= self.plan.first_evaluation
        if not due and not (interval and epoch == self.n_epoch):
            raise CancelValidException

    def after_batch(self):
        if self.training and (self.iter + 1) % self.plan.log_interval == 0:
            terms = self.loss_func.train_loss.terms
            loss, *values = averaged(torch.stack([self.loss.detach(), *terms.values()]).float()).tolist()
            if ranks()[0] == 0:
                self.write(loss, dict(zip(terms, values, strict=True)))

    def write(self, loss: float, terms: dict[str, float]):
        words = ", ".join(f"{name}: {value:.5f}" for name, value in terms.items())
        with (self.plan.folder / "train.log").open("a") as log:
            log.write(
                f"{time.strftime('%H:%M:%S')} epoch {self.epoch + 1}/{self.n_epoch} step {self.iter + 1}/"
                f"{self.n_iter} lr {self.rates[0]:.6g} loss {loss:.5f} ({words})\n"
            )


class History(Callback):
    """One row an epoch: learning rate, training loss and its terms, evaluation loss, metrics; kept as history.csv."""

    order = 45

    def __init__(self, plan: Plan, on_epoch: Callable[[], object] | None = None):
        self.plan, self.on_epoch, self.rows, self.best, self.sums = plan, on_epoch, [], {}, {}

    def before_fit(self):  # so that the live table has a column for each term
        self.shown = [ValueMetric(partial(self.mean, name), name) for name in self.loss_func.train_loss.names]
        self.learn.metrics = [*self.shown, *self.learn.metrics]

    def after_fit(self):
        self.learn.metrics = [metric for metric in self.learn.metrics if metric not in self.shown]

    def mean(self, name: str) -> float:
        return (self.sums[name] / self.count).item() if self.count else float("nan")

    def before_train(self):
        self.sums, self.count = {}, 0

    def after_train(self):
        self.join()

    def join(self):
        """The sums become those of all processes, whose losses of single images are of their own."""
        if self.sums and ranks()[1] > 1:
            self.sums = dict(zip(self.sums, averaged(torch.stack([*self.sums.values()])).unbind(), strict=True))

    def after_batch(self):
        if self.training and not self.guard.skipped:
            self.count += 1
            for name, value in (("train_loss", self.loss.detach()), *self.loss_func.train_loss.terms.items()):
                self.sums[name] = self.sums.get(name, 0) + value

    def after_epoch(self):
        if self.recorder.cancel_valid:  # keeps the columns of the live table in step
            self.recorder.log += [float("nan"), *(metric.value for metric in self.learn.metrics)]
        row = {"epoch": self.epoch + 1, "lr": self.follow_plan.rates[0], **{k: self.mean(k) for k in self.sums}}
        evaluation = getattr(self.learn, "retrieval_evaluation", None)
        if evaluation and evaluation.result:
            loss = self.recorder.loss.value
            row |= {"valid_loss": loss.item()} if loss is not None and loss.isfinite() else {}
            row |= evaluation.result
            if not self.best or row[self.learn.names[0]] >= self.best["value"]:
                self.best = {"epoch": self.epoch + 1, "value": row[self.learn.names[0]]}
        self.rows.append(row)
        first_does(self.write)
        if self.on_epoch:
            self.on_epoch()

    def write(self):
        with replacing(self.plan.folder / "history.csv") as path:
            pd.DataFrame(self.rows).to_csv(path, index=False)


class Pace(Callback):
    """Counts training images and the seconds they take, evaluation apart, and how long the loader made the model wait.

    A loader that is faster than the model has its next batch ready: the model waits only where the loader is slower.
    """

    order = 80

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
            f"{waiting:.0%} of the time spent waiting for the loader; the model alone takes {alone:,.0f}. The "
            f"{which} is the bottleneck{hint}"
        )


class Scalars(Callback):
    """Writes each step's loss terms and each epoch's metrics for visualdl."""

    order = 95

    def __init__(self, folder: Path):
        from visualdl import LogWriter

        self.writer = LogWriter(logdir=str(folder))

    def after_batch(self):
        if self.training:
            for name, value in self.loss_func.train_loss.terms.items():
                self.writer.add_scalar(f"train_{name}", value.item(), self.train_iter)

    def after_epoch(self):
        for name, value in self.history.rows[-1].items():
            self.writer.add_scalar(f"epoch_{name}", value, self.epoch + 1)
