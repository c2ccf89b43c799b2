"""The whole schedule of a configuration: train, evaluate, keep, resume, write down.

`learn.fit_config()` is `learn.fit` with the callbacks of this chapter added for its duration. After it the model holds
the weights of the best epoch by the first metric listed, which are also what the run folder keeps.
"""
from __future__ import annotations

import contextlib
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

from recnb.augment import build_batch_transform
from recnb.checkpoints import Checkpoints, resolved, resume, save_weights, whole_states
from recnb.config import EMA, ConfigError, architectures, items, lookup, resolve
from recnb.datasets import save_dropped, save_label_map, seeded
from recnb.distributed import averaged, first_does, launch
from recnb.evaluation import build_judge
from recnb.files import locked, replacing
from recnb.guard import Guard, Wish, explained, stoppable
from recnb.learner import Callback, CancelValidException, RetrievalLearner, ValueMetric
from recnb.loaders import Loaders
from recnb.losses import CombinedLoss, build_loss
from recnb.model import precision
from recnb.optim import build_optimizer, parameter_groups
from recnb.schedules import build_schedules
from recnb.sharding import ranks, sharded_weights, split
from recnb.steps import Accumulate, MovingAverage, ScaleLoss, Together


@dataclass
class Plan:
    "What `fit_config` does: how long, at which learning rates, and what it evaluates and keeps, where."

    epochs: int
    schedules: list[Callable]  # one for each optimizer, from the optimizer's steps so far and the metric's values
    folder: Path
    config: str = "{}"  # the configuration as JSON text, kept in the checkpoint and compared on resuming
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


def build_learner(cfg: dict, model: nn.Module, loaders: Loaders, run_dir: str | Path) -> RetrievalLearner:
    """The fastai Learner of a configuration; `learn.fit_config()` runs its whole schedule into `run_dir`.

    Raises ConfigError where the configuration asks for what is not installed.
    """
    plan = build_plan(cfg, loaders, Path(run_dir))
    with seeded(cfg["Global"]["seed"]):  # centres are drawn
        loss = build_loss(cfg, classes=len(loaders.train.dataset.names), sizes=getattr(model, "sizes", None))
    if cfg["Global"]["channels_last"]:
        model.to(memory_format=torch.channels_last)
    if cfg["Global"]["compile"]:
        model.compile()  # in place: the names of the weights stay
    mix = build_batch_transform(cfg, len(loaders.train.dataset.names))
    if mix:
        check_mixable(cfg)
    learn = RetrievalLearner(loaders, model, loss, evaluation_loss(cfg, loaders) if loaders.query else None,
                             build_optimizer(cfg), build_judge(cfg, model), pick_device(cfg["Global"]["device"]),
                             path=run_dir, splitter=partial(parameter_groups, cfg), mix=mix)
    learn.create_opt()  # what no optimizer would train is found now
    learn.fit_config = partial(fit_config, learn, plan)
    return learn


def check_mixable(cfg: dict) -> None:
    "None; raises ConfigError where a head or a loss needs one label for each image and images are blended."
    where = "DataLoader.Train.dataset.batch_transform_ops: blends images and their labels, but"
    for place, section in architectures(cfg):
        if lookup(section, "Head.name") not in (None, "FC"):
            raise ConfigError(f"{where} {place}.Head {section['Head']['name']} needs one label each; take FC")
    for place, name, _ in items(cfg, "Loss.Train"):
        if name != "CELoss":
            raise ConfigError(f"{where} {place} needs one label each; only CELoss takes shares of labels")


def build_plan(cfg: dict, loaders: Loaders, folder: Path) -> Plan:
    "The plan of a configuration; raises ConfigError for a checkpoint that is not there or a missing package."
    settings = cfg["Global"]
    if settings["use_visualdl"] and not importlib.util.find_spec("visualdl"):
        raise ConfigError("Global.use_visualdl: visualdl is not installed; pip install 'recnb[track]', or set it False")
    checkpoint = resolve(settings["checkpoints"]) if settings["checkpoints"] else None
    if checkpoint and not checkpoint.is_file():
        raise ConfigError(f"Global.checkpoints: there is no file {checkpoint}")
    amp, ema = cfg.get("AMP"), cfg.get("EMA")
    half = precision(amp, settings["device"]) if amp is not None and amp.get("use_amp", True) else None
    steps = -(-len(loaders.train) // settings["update_freq"])
    return Plan(settings["epochs"], build_schedules(cfg, steps), folder, json.dumps(resolved(cfg)), checkpoint,
                settings["eval_interval"] if settings["eval_during_train"] else 0, settings["save_interval"],
                settings["print_batch_step"], settings["use_visualdl"], settings["start_eval_epoch"],
                settings["update_freq"], None if ema is None else ema.get("decay", EMA["decay"]), half,
                settings["save_steps"], settings["keep_checkpoints"], settings["on_nonfinite"] == "skip",
                settings["seed"], device_count(settings["devices"]))


def device_count(wanted: int | str) -> int:
    "How many processes Global.devices asks for; `auto` is one for each GPU."
    return max(1, torch.cuda.device_count()) if wanted == "auto" else wanted


def pick_device(name: str) -> torch.device:
    "The device that Global.device names; without a GPU, 'gpu' becomes the CPU and a line says so."
    if name == "gpu" and not torch.cuda.is_available():
        print("Global.device is gpu, and this machine has none: running on the CPU")
    return torch.device(f"cuda:{torch.cuda.current_device()}" if name == "gpu" and torch.cuda.is_available() else "cpu")


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
    if plan.devices > 1 and ranks()[1] == 1:
        return fit_elsewhere(learn, plan, on_epoch)
    first = ranks()[0] == 0
    with locked(plan.folder) if first else contextlib.nullcontext(), stoppable() as wish, explained(learn):
        first_does(save_label_map, learn.loaders.train.dataset, plan.folder / "labels.csv")
        if learn.loaders.dropped:
            first_does(save_dropped, learn.loaders.dropped, plan.folder / "dropped.csv")
        history, kept, pace = History(plan, on_epoch), plan.folder / "checkpoints", Pace()
        callbacks = build_callbacks(learn, plan, history, pace, wish)
        learn.create_opt()
        latest = kept / "latest.pt" if (kept / "latest.pt").exists() else plan.checkpoint
        if latest:
            resume(learn, callbacks, latest)
            inside = f" and step {learn.first_batch} of the next" * bool(learn.first_batch)
            print(f"resuming behind epoch {learn.first_epoch} of {plan.epochs}{inside}")
        else:
            torch.manual_seed(plan.seed + ranks()[0])  # of dropout and of blended batches
        try:
            learn.fit(plan.epochs, lr=plan.schedules[0](0), cbs=callbacks)
        finally:
            learn.first_epoch = learn.first_batch = 0
            learn.loaders.stop_workers()
        if history.best:
            first_does(len, "")  # the file is whole
            learn.model.load_state_dict(split(load_file(kept / "best.safetensors"), sharded_weights(learn.model)))
            name, value = learn.names[0], history.best["value"]
            print(f"the model holds the weights of epoch {history.best['epoch']}, the best by {name} ({value:.4f})")
        elif plan.decay:
            next(cb for cb in callbacks if isinstance(cb, MovingAverage)).swap()
        save_weights(whole_states(learn.model)[0], plan.folder / "model.safetensors")
        if pace.images:
            print(pace)


def fit_elsewhere(learn: RetrievalLearner, plan: Plan, on_epoch: Callable[[], object] | None) -> None:
    "What fit_config does where it starts the processes that train, and shows what they print."
    history = plan.folder / "history.csv"
    written = history.exists() and history.stat().st_mtime_ns
    for line in launch(plan.folder / "config.yaml", plan.folder, plan.devices):
        print(line, end="")
        before, written = written, history.exists() and history.stat().st_mtime_ns
        if on_epoch and written != before:  # each epoch writes the file anew, then prints a line
            on_epoch()
    learn.model.load_state_dict(load_file(plan.folder / "model.safetensors"))


def build_callbacks(learn: RetrievalLearner, plan: Plan, history: History, pace: Pace, wish: Wish) -> list[Callback]:
    "What fit_config adds to the learner while it runs."
    folder = plan.folder / "checkpoints"
    kept = Checkpoints(folder, plan.config, plan.save_interval, plan.save_steps, plan.keep_checkpoints, wish)
    callbacks = [FollowPlan(plan), history, pace, kept, Guard(plan.skip_nonfinite, plan.half != torch.float16)]
    callbacks += [Together()] if ranks()[1] > 1 else []
    callbacks += [Accumulate(plan.update_freq)] if plan.update_freq > 1 else []
    callbacks += [ScaleLoss(learn.dls.device)] if plan.half == torch.float16 else []
    callbacks += [MovingAverage(learn.model, plan.decay)] if plan.decay else []
    callbacks += [Scalars(plan.folder / "vdl")] if plan.scalars else []
    return callbacks


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
        "The learning rate of each optimizer."
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
            log.write(f"{time.strftime('%H:%M:%S')} epoch {self.epoch + 1}/{self.n_epoch} step {self.iter + 1}/"
                      f"{self.n_iter} lr {self.rates[0]:.6g} loss {loss:.5f} ({words})\n")


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
        return (self.sums[name] / self.count).item() if self.count else float("nan")

    def before_train(self):
        self.sums, self.count = {}, 0

    def after_train(self):
        self.join()

    def join(self):
        "None; the sums become those of all processes, whose losses of single images are of their own."
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
        return (f"{self.images:,} training images in {self.seconds:.0f} s: {self.images / self.seconds:,.0f} a second, "
                f"{waiting:.0%} of the time spent waiting for the loader; the model alone takes {alone:,.0f}. The "
                f"{which} is the bottleneck{hint}")


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
