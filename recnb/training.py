"""The whole schedule of a configuration: train, evaluate, keep, resume, write down.

`learn.fit_config()` is `learn.fit` with the callbacks of this chapter added for its duration. After it the model holds
the weights of the best epoch by the first metric listed, which are also what the run folder keeps.
"""
from __future__ import annotations

import importlib.util
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn

from recnb.checkpoints import Checkpoints, resolved, resume, save_weights
from recnb.config import ConfigError, resolve
from recnb.datasets import Loaders
from recnb.evaluation import build_judge
from recnb.files import replacing
from recnb.learner import Callback, CancelValidException, RetrievalLearner, ValueMetric
from recnb.losses import CombinedLoss, build_loss
from recnb.optim import build_optimizer, build_schedule


@dataclass
class Plan:
    "What `fit_config` does: how long, at which learning rates, and what it evaluates and keeps, where."

    epochs: int
    schedule: Callable[[int], float]
    folder: Path
    config: str = "{}"  # the configuration as JSON text, kept in the checkpoint and compared on resuming
    checkpoint: Path | None = None  # to resume from where the folder holds none
    eval_interval: int = 1  # 0: no evaluation while training
    save_interval: int = 1
    log_interval: int = 10
    scalars: bool = False


def build_learner(cfg: dict, model: nn.Module, loaders: Loaders, run_dir: str | Path) -> RetrievalLearner:
    """The fastai Learner of a configuration; `learn.fit_config()` runs its whole schedule into `run_dir`.

    Raises ConfigError where the configuration asks for what is not installed.
    """
    plan = build_plan(cfg, loaders, Path(run_dir))
    learn = RetrievalLearner(loaders, model, build_loss(cfg), evaluation_loss(cfg, loaders) if loaders.query else None,
                             build_optimizer(cfg), build_judge(cfg), pick_device(cfg["Global"]["device"]),
                             path=run_dir)
    learn.fit_config = partial(fit_config, learn, plan)
    return learn


def build_plan(cfg: dict, loaders: Loaders, folder: Path) -> Plan:
    "The plan of a configuration; raises ConfigError for a checkpoint that is not there or a missing package."
    settings = cfg["Global"]
    if settings["use_visualdl"] and not importlib.util.find_spec("visualdl"):
        raise ConfigError("Global.use_visualdl: visualdl is not installed; pip install 'recnb[track]', or set it False")
    checkpoint = resolve(settings["checkpoints"]) if settings["checkpoints"] else None
    if checkpoint and not checkpoint.is_file():
        raise ConfigError(f"Global.checkpoints: there is no file {checkpoint}")
    return Plan(settings["epochs"], build_schedule(cfg, len(loaders.train)), folder, json.dumps(resolved(cfg)),
                checkpoint, settings["eval_interval"] if settings["eval_during_train"] else 0,
                settings["save_interval"], settings["print_batch_step"], settings["use_visualdl"])


def pick_device(name: str) -> torch.device:
    "The device that Global.device names; without a GPU, 'gpu' becomes the CPU and a line says so."
    if name == "gpu" and not torch.cuda.is_available():
        print("Global.device is gpu, and this machine has none: running on the CPU")
    return torch.device("cuda" if name == "gpu" and torch.cuda.is_available() else "cpu")


def evaluation_loss(cfg: dict, loaders: Loaders) -> CombinedLoss | None:
    """Loss.Eval where it has a meaning: a term on logits needs evaluation labels that are training classes.

    Where they are, the evaluation lists are renumbered to those classes; where not, a line says so.
    """
    loss, train = build_loss(cfg, "Loss.Eval"), loaders.train.dataset
    lists = (loaders.query.dataset, loaders.gallery.dataset)
    loss.needs_logits = any(term.needs_logits for term in loss.losses)
    if loss.needs_logits:
        number = {name: i for i, name in enumerate(train.names.tolist())}
        wanted = [[number.get(images.names[label], -1) for label in images.labels.tolist()] for images in lists]
        if min(map(min, wanted)) < 0:
            print("Loss.Eval has no value: it needs logits, and the evaluation identities are not training classes")
            return None
        for images, labels in zip(lists, wanted, strict=True):
            images.labels, images.names = np.array(labels), train.names
    return loss if len(loss.losses) else None


def fit_config(learn: RetrievalLearner, plan: Plan, on_epoch: Callable[[], object] | None = None) -> None:
    """None; runs the plan, going on behind the last checkpoint where the run folder holds one.

    `on_epoch()` is called after each epoch, when its row stands in history.csv: to draw the curves anew.
    """
    plan.folder.mkdir(parents=True, exist_ok=True)
    history, kept, pace = History(plan, on_epoch), plan.folder / "checkpoints", Pace()
    callbacks = [FollowPlan(plan), history, pace, Checkpoints(kept, plan.config, plan.save_interval)]
    if plan.scalars:
        callbacks.append(Scalars(plan.folder / "vdl"))
    learn.create_opt()
    latest = kept / "latest.pt" if (kept / "latest.pt").exists() else plan.checkpoint
    if latest:
        learn.first_epoch = resume(learn, history, latest, plan.config, kept)
        print(f"resuming behind epoch {learn.first_epoch} of {plan.epochs}")
    try:
        learn.fit(plan.epochs, lr=plan.schedule(0), cbs=callbacks)
    finally:
        learn.first_epoch = 0
    if history.best:
        learn.model.load_state_dict(load_file(kept / "best.safetensors"))
        name, value = learn.names[0], history.best["value"]
        print(f"the model holds the weights of epoch {history.best['epoch']}, the best by {name} ({value:.4f})")
    save_weights(learn.model.state_dict(), plan.folder / "model.safetensors")
    if pace.images:
        print(pace)


def write_row(write: Callable, row: list) -> None:
    "None; writes a row of the live table with epochs counted from 1 and blanks where there is no value."
    number, *cells = row
    blank = [value is None or value != value for value in cells]
    write([number + 1 if isinstance(number, int) else number, *(
        "" if empty else value for value, empty in zip(cells, blank, strict=True))])


class FollowPlan(Callback):
    "Sets the learning rate of every step, leaves out evaluations between intervals, writes a line each few steps."

    order = 70  # behind the progress bar's callback, whose table is written to

    def __init__(self, plan: Plan):
        self.plan = plan

    def before_fit(self):
        self.learn.train_iter = self.first_epoch * len(self.dls.train)
        self.learn.logger = partial(write_row, self.learn.logger)
        bar = getattr(getattr(self.learn, "progress", None), "mbar", None)
        if self.first_epoch and bar:  # fastai's bar has to be told of a start at 0 before any other
            bar.update(0)

    def before_batch(self):
        if self.training:
            self.opt.set_hyper("lr", self.plan.schedule(self.train_iter))

    def before_validate(self):
        interval, last = self.plan.eval_interval, self.epoch + 1 == self.n_epoch
        if not interval or ((self.epoch + 1) % interval and not last):
            raise CancelValidException

    def after_batch(self):
        if self.training and (self.iter + 1) % self.plan.log_interval == 0:
            terms = ", ".join(f"{k}: {v.item():.5f}" for k, v in self.loss_func.train_loss.terms.items())
            with (self.plan.folder / "train.log").open("a") as log:
                log.write(f"{time.strftime('%H:%M:%S')} epoch {self.epoch + 1}/{self.n_epoch} step {self.iter + 1}/"
                          f"{self.n_iter} lr {self.opt.hypers[-1]['lr']:.6g} loss {self.loss.item():.5f} ({terms})\n")


class History(Callback):
    "One row an epoch: learning rate, training loss and its terms, evaluation loss, metrics; kept as history.csv."

    order = 45

    def __init__(self, plan: Plan, on_epoch: Callable[[], object] | None = None):
        self.plan, self.on_epoch, self.rows, self.best, self.sums = plan, on_epoch, [], {}, {}

    def before_fit(self):  # so that the live table has a column for each term
        self.shown = [ValueMetric(partial(self.mean, name), name) for name in self.loss_func.train_loss.names]
        self.learn.metrics = [*self.shown, *self.learn.metrics]

    def after_fit(self):
        self.learn.metrics = [metric for metric in self.learn.metrics if metric not in self.shown]

    def mean(self, name: str) -> float:
        return (self.sums[name] / self.count).item()

    def before_train(self):
        self.sums, self.count = {}, 0

    def after_batch(self):
        if self.training:
            self.count += 1
            for name, value in (("train_loss", self.loss.detach()), *self.loss_func.train_loss.terms.items()):
                self.sums[name] = self.sums.get(name, 0) + value

    def after_epoch(self):
        if self.recorder.cancel_valid:  # keeps the columns of the live table in step
            self.recorder.log += [float("nan"), *(metric.value for metric in self.learn.metrics)]
        row = {"epoch": self.epoch + 1, "lr": self.opt.hypers[-1]["lr"], **{k: self.mean(k) for k in self.sums}}
        evaluation = getattr(self.learn, "retrieval_evaluation", None)
        if evaluation and evaluation.result:
            loss = self.recorder.loss.value
            row |= {"valid_loss": loss.item()} if loss is not None and loss.isfinite() else {}
            row |= evaluation.result
            if not self.best or row[self.learn.names[0]] >= self.best["value"]:
                self.best = {"epoch": self.epoch + 1, "value": row[self.learn.names[0]]}
        self.rows.append(row)
        with replacing(self.plan.folder / "history.csv") as path:
            pd.DataFrame(self.rows).to_csv(path, index=False)
        if self.on_epoch:
            self.on_epoch()


class Pace(Callback):
    "Counts training images and the seconds they take, evaluation apart, and how long the loader made the model wait."

    order = 80

    def __init__(self):
        self.images, self.seconds, self.waited = 0, 0.0, 0.0

    def before_train(self):
        self.started = self.ready = time.perf_counter()

    def before_batch(self):
        if self.training:
            self.waited += time.perf_counter() - self.ready
            self.images += len(self.xb[0])

    def after_batch(self):
        self.ready = time.perf_counter()

    def after_train(self):
        self.seconds += time.perf_counter() - self.started

    def __str__(self) -> str:
        return (f"{self.images:,} training images in {self.seconds:.0f} s: {self.images / self.seconds:,.0f} a second, "
                f"{self.waited / self.seconds:.0%} of the time spent waiting for the loader")


class Scalars(Callback):
    "Writes each step's loss terms and each epoch's metrics for visualdl."

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
