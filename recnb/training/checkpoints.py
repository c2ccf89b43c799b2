"""Checkpoints: everything needed to go on after each epoch, and the refusal to go on with something else.

A checkpoint holds weights, optimizer, history, the random state of every process and the resolved configuration. It is
written whole or not at all, sealed with its checksum and read with `weights_only=True`. A run that goes on from one, in
as many processes, ends with the same bits as one that did not stop.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from recnb.distributed.processes import anywhere, ranks
from recnb.distributed.rows import collect, sharded_weights, split
from recnb.models import weights
from recnb.registry import ConfigError
from recnb.storage import check_seal, link_or_copy, replacing, seal
from recnb.training.adaptor import Callback, Learner
from recnb.training.guard import TrainingError, Wish
from recnb.training.plan import FitState, Keeping


class Checkpoints(Callback):
    """Everything needed to go on, after each epoch and every `save_steps` batches, and apart the best epoch's weights.

    `epoch_N.pt` is kept every `save_interval` epochs, the last `keep_checkpoints` of them.

    Args:
        folder: Where they are kept.
        keeping: What is kept, and how often.
        update_freq: How many batches a step of the optimizer has: nothing is saved in the middle of one.
        state: What the callbacks of this fit share.
        judged: The module that is evaluated, whose weights are the best epoch's.
        wish: Says when to save and stop.
    """

    def __init__(
        self, folder: Path, keeping: Keeping, update_freq: int, state: FitState, judged: nn.Module, wish: Wish
    ):
        self.folder, self.keeping, self.update_freq = folder, keeping, update_freq
        self.state, self.judged, self.wish = state, judged, wish
        self.restored: dict | None = None

    def before_train(self):
        self.since = 0
        if self.restored:  # only now, since whatever ran before may have drawn on the generators
            if self.restored["batch"]:
                self.state.sums, self.state.count = self.restored["sums"], self.restored["count"]
            set_random_state(self.restored["rng"])
            self.restored = None

    def after_batch(self):
        if not self.training:
            return
        self.since, step = self.since + 1, self.iter + 1
        whole = step % self.update_freq == 0 or step == self.n_iter  # no gradients are waiting
        asked = anywhere(self.wish.asked, self.loss.device)
        if whole and (asked or (self.keeping.save_steps and self.since >= self.keeping.save_steps)):
            self.since = 0
            self.save(self.epoch, step)
            self.stop_if(asked, f"epoch {self.epoch + 1} step {step}")

    def after_epoch(self):
        epoch = self.epoch + 1
        self.save(epoch, 0)
        if self.state.best.get("epoch") == epoch:
            self.save_best()
        self.number(epoch, self.folder / "latest.pt")
        if epoch < self.n_epoch:
            self.stop_if(anywhere(self.wish.asked, self.dls.device), f"epoch {epoch}")

    def stop_if(self, asked: bool, place: str) -> None:
        if asked:
            raise KeyboardInterrupt(f"stopped behind {place}, all saved: the same command goes on from there")

    def save(self, epoch: int, batch: int) -> None:
        """Write latest.pt: `epoch` epochs are done, and `batch` batches of the next."""
        model, optimizer = whole_states(self.model, self.opt)
        self.state.join()  # every process goes on from the first one's
        state = {
            "model": model,
            "loss": self.loss_func.train_loss.state_dict(),
            "optimizer": optimizer,
            "epoch": epoch,
            "batch": batch,
            "history": self.state.rows,
            "best": self.state.best,
            "config": self.keeping.config,
            "contents": self.keeping.contents,
            "rng": random_states(),
            "sums": self.state.sums,
            "count": self.state.count,
            "callbacks": {cb.name: cb.state_dict() for cb in self.learn.cbs if hasattr(type(cb), "state_dict")},
        }
        path = self.folder / "latest.pt"
        if ranks()[0]:
            return
        try:
            with replacing(path) as temporary:
                torch.save(state, temporary)
                seal(temporary)
        except (OSError, RuntimeError) as error:  # torch's writer has no error of its own
            intact = "the one before it is intact" if path.exists() else "there is none yet"
            raise TrainingError(f"{path}: the checkpoint cannot be written, {intact} ({error})") from error

    def number(self, epoch: int, latest: Path) -> None:
        """Keep the checkpoint behind an epoch under its number, where that is wanted, and the last of these alone."""
        interval, last = self.keeping.save_interval, self.keeping.keep_checkpoints
        if ranks()[0] or not interval or epoch % interval:
            return
        link_or_copy(latest, self.folder / f"epoch_{epoch}.pt")  # `latest` is replaced, never rewritten: a link will do
        for path in numbered(self.folder)[:-last] if last else ():
            path.unlink()

    def save_best(self) -> None:
        save_weights(whole_states(self.judged)[0], self.folder / "best.safetensors")


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that are kept under the numbers of their epochs, in order."""
    return sorted(folder.glob("epoch_*.pt"), key=lambda path: int(path.stem.split("_")[1]))


def save_weights(state: dict[str, torch.Tensor], path: Path) -> None:
    """Write a state dict as a .safetensors file, in the first process."""
    if ranks()[0] == 0:
        weights.save_weights(state, path)


def random_states() -> list[dict]:
    """Return the states of torch's generators, on the CPU and on every GPU, of each process; all have to call it."""
    own = {"torch": torch.get_rng_state(), "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []}
    world = ranks()[1]
    states = [own] * world
    if world > 1:
        dist.all_gather_object(states, own)
    return states


def set_random_state(states: list[dict] | dict) -> None:
    """Set torch's generators as this process had them.

    A process that the states do not know, since there were fewer or since an older checkpoint has the first one's
    alone, is seeded from the first one's and its own number.
    """
    states, rank = states if isinstance(states, list) else [states], ranks()[0]
    if rank >= len(states):
        torch.manual_seed(int(states[0]["torch"].sum()) + rank)
        return
    torch.set_rng_state(states[rank]["torch"])
    if states[rank]["cuda"] and torch.cuda.is_available():
        torch.cuda.set_rng_state_all(states[rank]["cuda"])


def kept(path: Path) -> dict:
    """Return what a checkpoint holds; raise ConfigError where it is none, or not as it was written."""
    check_seal(path)
    try:
        state = torch.load(path, "cpu", weights_only=True)
        return {**state, "config": json.loads(state["config"]), "contents": json.loads(state["contents"])}
    except Exception as error:  # torch raises whatever its unpickler meets
        raise ConfigError(f"{path} is not a checkpoint of a run: {error}") from error


def resume(learn: Learner, callbacks: list[Callback], checkpoints: Checkpoints, path: Path) -> None:
    """Give the learner, the callbacks and their common state what a checkpoint holds, to go on from there.

    Args:
        learn: Has an optimizer already.
        callbacks: Those of this fit.
        checkpoints: The one of them that keeps checkpoints.
        path: The checkpoint.

    Raises:
        ConfigError: The file is no checkpoint, is damaged, or belongs to another configuration.
    """
    ours, state = checkpoints.state, kept(path)
    checkpoints.keeping.check_same(state, path)
    try:
        learn.model.load_state_dict(split(state["model"], sharded_weights(learn.model)))
        learn.loss_func.train_loss.load_state_dict(state["loss"])
        load_optimizer(learn, state["optimizer"])
        for callback in (cb for cb in callbacks if cb.name in state["callbacks"]):
            callback.load_state_dict(state["callbacks"][callback.name])
    except (RuntimeError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"{path}: its content does not fit its own configuration, so it has been changed or is "
            f"damaged ({error}); take an earlier checkpoint, or delete it to begin anew"
        ) from error
    ours.rows, ours.best, checkpoints.restored = state["history"], state["best"], state
    learn.first_epoch, learn.first_batch = state["epoch"], state["batch"]
    best = ours.best.get("epoch")
    if path == checkpoints.folder / "latest.pt" and state["epoch"] and not state["batch"]:
        checkpoints.number(state["epoch"], path)  # the process may have ended before it was kept
    if best == state["epoch"] and not state["batch"]:  # nor may these have been written
        checkpoints.save_best()
    elif best and not (checkpoints.folder / "best.safetensors").exists():  # a checkpoint from another folder
        print(f"the best epoch so far, {best}, is not in {checkpoints.folder}: the best is found anew")
        ours.best = {}


def whole_states(model: nn.Module, optimizer=None) -> tuple[dict, dict | None]:
    """Return the states of model and optimizer, the shares of sharded weights joined; every process has to call it."""
    state = collect(model.state_dict(), sharded_weights(model))
    return state, optimizer and with_rows(model, optimizer.opt, optimizer.state_dict(), collect)


def load_optimizer(learn: Learner, state: dict) -> None:
    """Give the learner's optimizer a state, of which sharded weights take their share."""
    learn.opt.load_state_dict(with_rows(learn.model, learn.opt.opt, state, split))


def with_rows(model: nn.Module, optimizer, state: dict, change: Callable) -> dict:
    """Return the state of an optimizer, or of each of several, with its entries for sharded weights changed.

    Args:
        model: Says which weights are sharded.
        optimizer: The optimizer, or `Several`.
        state: Its state dict.
        change: `(entries, counts) -> entries`: joins the rows of all processes, or takes this one's.
    """
    if "optimizers" in state:
        parts = zip(optimizer.optimizers, state["optimizers"], strict=True)
        return {"optimizers": [with_rows(model, own, part, change) for own, part in parts]}
    return {**state, "state": change(state["state"], sharded_weights(model, optimizer))}
