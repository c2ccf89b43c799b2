"""Checkpoints: everything needed to go on after each epoch, and the refusal to go on with something else.

A checkpoint holds weights, optimizer, history, random state and the resolved configuration. It is written whole or not
at all, and read with `weights_only=True`.
"""
from __future__ import annotations

import copy
import json
import os
from pathlib import Path

import torch
from safetensors.torch import save_file

from recnb.config import GLOBAL, LOADERS, ConfigError, architectures, class_num, lookup, resolve
from recnb.datasets import training_images
from recnb.files import replacing
from recnb.learner import Callback, RetrievalLearner

# What may differ between a checkpoint's configuration and the one that resumes it: nothing of this changes the numbers.
FREE = ("Global.checkpoints", "Global.output_dir", "Global.device", "Global.save_interval", "Global.print_batch_step",
        "Global.use_visualdl", "Global.save_inference_dir", "Global.pretrained_model")
PATHS = {**{f"DataLoader.{part}.dataset": ("image_root", "cls_label_path") for part in LOADERS},
         "Global": ("pretrained_model", "checkpoints")}


def resolved(cfg: dict) -> dict:
    "The configuration with what the run derived filled in: paths made absolute, the number of classes, relabelling."
    cfg = copy.deepcopy(cfg)
    heads = [section["Head"] for _, section in architectures(cfg) if section.get("Head")]
    if heads and not class_num(cfg)[1]:
        classes = len(training_images(cfg).names)
        for head in heads:
            head["class_num"] = classes
        cfg["DataLoader"]["Train"]["dataset"].setdefault("relabel", True)
    backbones = [(section.get("Backbone") or {}, ("pretrained",)) for _, section in architectures(cfg)]
    for section, keys in [*((lookup(cfg, place) or {}, keys) for place, keys in PATHS.items()), *backbones]:
        section |= {k: str(resolve(section[k]).absolute()) for k in keys if isinstance(section.get(k), str)}
    return cfg


class Checkpoints(Callback):
    "Everything needed to go on, after each epoch, and the weights of the best epoch apart."

    order = 90

    def __init__(self, folder: Path, recipe: str, save_interval: int):
        self.folder, self.recipe, self.save_interval = folder, recipe, save_interval

    def after_epoch(self):
        epoch, rows, best = self.epoch + 1, self.history.rows, self.history.best
        average = getattr(self.learn, "moving_average", None)
        if best.get("epoch") == epoch:
            judged = self.model if average is None else average.average.module
            save_weights(judged.state_dict(), self.folder / "best.safetensors")
        state = {"model": self.model.state_dict(), "loss": self.loss_func.train_loss.state_dict(),
                 "optimizer": self.opt.state_dict(), "epoch": epoch, "history": rows, "best": best,
                 "config": self.recipe, "rng": random_state(),
                 "callbacks": {cb.name: cb.state_dict() for cb in self.learn.cbs if hasattr(type(cb), "state_dict")}}
        with replacing(self.folder / "latest.pt") as path:
            torch.save(state, path)
        if self.save_interval > 0 and epoch % self.save_interval == 0:
            kept = self.folder / f"epoch_{epoch}.pt"
            kept.unlink(missing_ok=True)
            os.link(self.folder / "latest.pt", kept)  # `latest` is replaced, never rewritten, so a link is a copy


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    "None; writes a state dict as a .safetensors file."
    with replacing(path) as temporary:
        save_file({name: value.contiguous() for name, value in state.items()}, temporary)


def random_state() -> dict[str, torch.Tensor | list]:
    "The state of torch's generators, on the CPU and on every GPU."
    return {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}


def resume(learn: RetrievalLearner, callbacks: list[Callback], path: Path, config: str, folder: Path) -> int:
    """How many epochs are done at the checkpoint `path`, whose state the learner and the callbacks then have.

    `folder` keeps this run's checkpoints. Raises ConfigError where the checkpoint belongs to a configuration other
    than `config` (JSON text), with the differences.
    """
    try:
        state = torch.load(path, "cpu", weights_only=True)
        done, theirs = state["epoch"], json.loads(state["config"])
    except Exception as error:  # torch raises whatever its unpickler meets
        raise ConfigError(f"{path} is not a checkpoint of a run: {error}") from error
    theirs["Global"] = {**GLOBAL, **theirs["Global"]}  # a key that is newer than the checkpoint had its default then
    differences = compare(theirs, json.loads(config))
    if differences:
        raise ConfigError(f"{path} belongs to another configuration ({'; '.join(differences)}); use another run "
                          "folder, or delete this one to begin anew")
    learn.model.load_state_dict(state["model"])
    learn.loss_func.train_loss.load_state_dict(state["loss"])
    learn.opt.load_state_dict(state["optimizer"])
    for callback in (cb for cb in callbacks if cb.name in state["callbacks"]):
        callback.load_state_dict(state["callbacks"][callback.name])
    history = next(cb for cb in callbacks if cb.name == "history")
    history.rows, history.best = state["history"], state["best"]
    if not (folder / "best.safetensors").exists():  # a checkpoint from another folder
        if history.best.get("epoch") == done:
            save_weights(state["model"], folder / "best.safetensors")
        elif history.best:
            print(f"the best epoch so far, {history.best['epoch']}, is not in {folder}: the best is found anew")
            history.best = {}
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
