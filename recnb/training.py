"""The whole schedule of a configuration: train, evaluate, keep, resume, write down.

`learn.fit_config()` is `learn.fit` with the callbacks of this chapter added for its duration. After it the model holds
the weights of the best epoch by the first metric listed, which are also what the run folder keeps.
"""
from __future__ import annotations

import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pandas as pd
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from recnb.config import ConfigError, resolve
from recnb.datasets import Loaders
from recnb.files import replacing
from recnb.learner import Callback, CancelValidException, RetrievalLearner, ValueMetric, build_metrics
from recnb.losses import CombinedLoss, build_loss
from recnb.optim import build_optimizer, build_schedule

# What may differ between a checkpoint's configuration and the one that resumes it: nothing of this changes the numbers.
FREE = ("Global.checkpoints", "Global.output_dir", "Global.device", "Global.save_interval", "Global.print_batch_step",
        "Global.use_visualdl", "Global.save_inference_dir", "Global.pretrained_model")


@dataclass
class Plan:
    "What `fit_config` does: how long, at which learning rates, and what it evaluates and keeps, where."

    epochs: int
    schedule: Callable[[int], float]
    folder: Path
    config: str = "{}"  # the configuration as JSON text, kept in the checkpoint and compared on resuming
    checkpoint: Path | None = None  # to resume from where the folder holds none
    eval_interval: int = 1
    save_interval: int = 1
    log_interval: int = 10
    scalars: bool = False


def build_learner(cfg: dict, model: nn.Module, loaders: Loaders, run_dir: str | Path) -> RetrievalLearner:
    """The fastai Learner of a configuration; `learn.fit_config()` runs its whole schedule into `run_dir`.

    Raises ConfigError where the configuration asks for what is not installed.
    """
    settings, plan = cfg["Global"], resolve_plan(cfg, loaders, Path(run_dir))
    evaluate = settings["eval_during_train"]
    learn = RetrievalLearner(loaders if evaluate else Loaders(loaders.train), model, build_loss(cfg),
                             evaluation_loss(cfg, loaders) if evaluate else None, build_optimizer(cfg),
                             build_metrics(cfg), pick_device(settings["device"]), path=run_dir)
    learn.fit_config = partial(fit_config, learn, plan)
    return learn


def resolve_plan(cfg: dict, loaders: Loaders, folder: Path) -> Plan:
    settings = cfg["Global"]
    if settings["use_visualdl"] and not importlib.util.find_spec("visualdl"):
        raise ConfigError("Global.use_visualdl: visualdl is not installed; pip install 'recnb[track]', or set it False")
    checkpoint = resolve(settings["checkpoints"]) if settings["checkpoints"] else None
    if checkpoint and not checkpoint.is_file():
        raise ConfigError(f"Global.checkpoints: there is no file {checkpoint}")
    return Plan(settings["epochs"], build_schedule(cfg, len(loaders.train)), folder, json.dumps(cfg, sort_keys=True),
                checkpoint, settings["eval_interval"], settings["save_interval"], settings["print_batch_step"],
                settings["use_visualdl"])


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
            images.labels, images.names = images.labels.dtype.type(labels), train.names
    return loss if len(loss.losses) else None


def fit_config(learn: RetrievalLearner, plan: Plan) -> None:
    "None; runs the plan, going on behind the last checkpoint where the run folder holds one."
    plan.folder.mkdir(parents=True, exist_ok=True)
    history = History(plan)
    callbacks = [FollowPlan(plan), history, Checkpoints(plan, history)]
    if plan.scalars:
        callbacks.append(Scalars(plan, history))
    learn.create_opt()
    done = resume(learn, plan, history)
    if done:
        print(f"resuming behind epoch {done} of {plan.epochs}")
    learn.first_epoch = done
    try:
        learn.fit(plan.epochs, lr=plan.schedule(0), cbs=callbacks)
    finally:
        learn.first_epoch = 0
    best = plan.folder / "checkpoints" / "best.safetensors"
    if history.best:
        learn.model.load_state_dict(load_file(best, str(next(learn.model.parameters()).device)))
        name, value = learn.retrieval_evaluation.names[0], history.best["value"]
        print(f"the model holds the weights of epoch {history.best['epoch']}, the best by {name} ({value:.4f})")
    with replacing(plan.folder / "model.safetensors") as path:
        save_file({k: v.contiguous() for k, v in learn.model.state_dict().items()}, path)


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
        if (self.epoch + 1) % self.plan.eval_interval and self.epoch + 1 < self.n_epoch:
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

    def __init__(self, plan: Plan):
        self.plan, self.rows, self.best, self.sums = plan, [], {}, {}

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
            self.recorder.log += [float("nan")] * (1 + len(self.learn.metrics))
        row = {"epoch": self.epoch + 1, "lr": self.opt.hypers[-1]["lr"], **{k: self.mean(k) for k in self.sums}}
        evaluation = getattr(self.learn, "retrieval_evaluation", None)
        if evaluation and evaluation.result:
            loss = self.recorder.loss.value
            row |= {"valid_loss": loss.item()} if loss is not None and loss.isfinite() else {}
            row |= evaluation.result
            if not self.best or row[evaluation.names[0]] >= self.best["value"]:
                self.best = {"epoch": self.epoch + 1, "value": row[evaluation.names[0]]}
        self.rows.append(row)
        with replacing(self.plan.folder / "history.csv") as path:
            pd.DataFrame(self.rows).to_csv(path, index=False)


class Checkpoints(Callback):
    "Everything needed to go on, after each epoch, and the weights of the best epoch apart."

    order = 90

    def __init__(self, plan: Plan, history: History):
        self.plan, self.rows = plan, history

    def after_epoch(self):
        folder, history = self.plan.folder / "checkpoints", self.rows
        if history.best.get("epoch") == self.epoch + 1:
            with replacing(folder / "best.safetensors") as path:
                save_file({k: v.contiguous() for k, v in self.model.state_dict().items()}, path)
        state = {"model": self.model.state_dict(), "optimizer": self.opt.state_dict(), "epoch": self.epoch + 1,
                 "history": history.rows, "best": history.best, "config": self.plan.config, "rng": random_state()}
        with replacing(folder / "latest.pt") as path:
            torch.save(state, path)
        if self.plan.save_interval > 0 and (self.epoch + 1) % self.plan.save_interval == 0:
            kept = folder / f"epoch_{self.epoch + 1}.pt"
            kept.unlink(missing_ok=True)
            os.link(folder / "latest.pt", kept)  # `latest` is replaced, never rewritten, so a link is a copy


class Scalars(Callback):
    "Writes each step's loss terms and each epoch's metrics for visualdl."

    order = 95

    def __init__(self, plan: Plan, history: History):
        from visualdl import LogWriter
        self.rows, self.writer = history, LogWriter(logdir=str(plan.folder / "vdl"))

    def after_batch(self):
        if self.training:
            for name, value in self.loss_func.train_loss.terms.items():
                self.writer.add_scalar(f"train_{name}", value.item(), self.train_iter)

    def after_epoch(self):
        for name, value in self.rows.rows[-1].items():
            self.writer.add_scalar(f"epoch_{name}", value, self.epoch + 1)


def random_state() -> dict[str, torch.Tensor | list]:
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def resume(learn: RetrievalLearner, plan: Plan, history: History) -> int:
    """How many epochs are done: 0, or as many as the checkpoint says whose state the learner then has.

    Raises ConfigError where the checkpoint belongs to another configuration, with the differences.
    """
    path = plan.folder / "checkpoints" / "latest.pt"
    path = path if path.exists() else plan.checkpoint
    if path is None:
        return 0
    try:
        state = torch.load(path, "cpu", weights_only=True)
        done, config = state["epoch"], state["config"]
    except Exception as error:  # torch raises whatever its unpickler meets
        raise ConfigError(f"{path} is not a checkpoint of a run: {error}") from error
    differences = compare(json.loads(config), json.loads(plan.config))
    if differences:
        raise ConfigError(f"{path} belongs to another configuration ({'; '.join(differences)}); use another run "
                          "folder, or delete this one to begin anew")
    learn.model.load_state_dict(state["model"])
    learn.opt.load_state_dict(state["optimizer"])
    history.rows, history.best = state["history"], state["best"]
    torch.set_rng_state(state["rng"]["torch"])
    if state["rng"]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(state["rng"]["cuda"])
    return done


def compare(old, new, where: str = "") -> list[str]:
    "What differs between two configurations and matters, each as `place: old -> new`."
    if where in FREE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [text for k in keys for text in compare(old.get(k), new.get(k), f"{where}.{k}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} -> {new}"]
