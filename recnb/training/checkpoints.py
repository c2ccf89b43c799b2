"""Checkpoints: everything needed to go on after each epoch, and the refusal to go on with something else.

A checkpoint holds weights, optimizer, history, the random state of every process and the resolved configuration. It is
written whole or not at all, sealed with its checksum and read with `weights_only=True`. A run that goes on from one, in
as many processes, ends with the same bits as one that did not stop.
"""

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from secrets import token_hex
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from recnb.distributed.processes import anywhere, from_all, own_part, ranks
from recnb.distributed.rows import OwnRows, Rows, changed, collect, sharded_weights, split
from recnb.models import weights
from recnb.registry import ConfigError
from recnb.storage import check_files, check_seal, link_or_copy, replacing, seal, sha256
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
        try:
            write(state, path, keep, path.stem if batch else f"epoch_{epoch}")
        except (OSError, RuntimeError, SafetensorError) as error:
            intact = "the one before it is intact" if path.exists() else "there is none yet"
            raise TrainingError(f"{path}: the checkpoint cannot be written, {intact} ({error})") from error

    def number(self, epoch: int, latest: Path) -> None:
        """Keep the checkpoint behind an epoch under its number, where that is wanted, and the last of these alone."""
        interval, last = self.keeping.save_interval, self.keeping.keep_checkpoints
        if ranks()[0] or not interval or epoch % interval:
            return
        link_or_copy(latest, self.folder / f"epoch_{epoch}.pt")  # `latest` is replaced, never rewritten: a link will do
        for path in numbered(self.folder)[:-last] if last else ():
            for old in (path, *self.folder.glob(f"{path.stem}-*{APART}")):
                old.unlink()

    def save_best(self) -> None:
        save_weights(self.judged, self.folder / "best.safetensors")


def numbered(folder: Path) -> list[Path]:
    """Return the checkpoints of a folder that are kept under the numbers of their epochs, in order."""
    return sorted(folder.glob("epoch_*.pt"), key=lambda path: int(path.stem.split("_")[1]))


def keep(state: dict[str, Any], path: Path, apart: dict[str, str]) -> None:
    """Write a state as a checkpoint, with the names of its files of rows."""
    with replacing(path) as temporary:
        torch.save({**state, "apart": apart}, temporary)
        seal(temporary)


def save_weights(model: nn.Module, path: Path) -> None:
    """Write a model's weights, in the first process; all have to call it."""
    write(whole_states(model)[0], path, weights.save_weights, path.stem)


APART, MARK = ".rows.safetensors", "rows: "  # how files of rows end, and what stands in a state in place of them


def write(state: dict[str, Any], path: Path, save: Callable = keep, name: str = "latest") -> None:
    """Write a state, in the first process, and its `OwnRows`, in each; all have to call it.

    Killed at any moment, it leaves the file before with all its rows: the file is replaced when the rows that it names
    are whole, and those that neither it nor a numbered checkpoint names are deleted behind that.

    Args:
        state: Nested dicts and lists. In the file `rows: name` stands in place of rows.
        path: The file.
        save: Writes it: `(state, path, SHA-256 of the files of rows of all processes, in their order)`.
        name: How the names of the files of rows begin. Each is a new one, so that none is written over.
    """
    kinds = ("latest", "epoch_*") if path.suffix == ".pt" else (path.stem,)
    before = [old for kind in kinds for old in path.parent.glob(f"{kind}-*{APART}")]  # later some are of the next
    own: dict[str, Tensor] = {}
    apart: dict[str, str] = {}

    def put_apart(entry, place: str):
        if not isinstance(entry, OwnRows):
            return entry
        own[place] = entry.tensor.contiguous()
        return f"{MARK}{place}"

    state = changed(state, put_apart)
    if own:
        apart = dict(together(partial(write_rows, own, path.with_name(f"{name}-{token_hex(4)}{APART}"))))
    together(partial(save, state, path, apart) if ranks()[0] == 0 else dict)
    for old in before if ranks()[0] == 0 else ():
        owner = old.with_name(f"{old.name.partition('-')[0]}.pt")
        if old.name not in apart and (owner == path or not owner.exists()):
            old.unlink()


def write_rows(own: dict[str, Tensor], path: Path) -> tuple[str, str]:
    """Write this process's rows and return the file's name and SHA-256."""
    with replacing(path) as temporary:
        save_file(own, temporary, {"format": "pt"})
    return path.name, sha256(path)


def together(work: Callable[[], Any]) -> list:
    """Return what the work gives in each process; where it cannot be written in one, raise an error in all of them."""
    done, error, failed = None, None, ""
    try:
        done = work()
    except (OSError, RuntimeError, SafetensorError) as found:  # torch's writer has no error of its own
        error, failed = found, f"process {ranks()[0]} of {ranks()[1]}: {found}"
    results = from_all((done, failed))
    if reasons := [reason for _, reason in results if reason]:
        raise error or OSError(reasons[0])
    return [done for done, _ in results]


def random_states() -> list[dict]:
    """Return the states of torch's generators, on the CPU and on every GPU, of each process; all have to call it."""
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []
    return from_all({"torch": torch.get_rng_state(), "cuda": on_gpus})


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
        files = [path.with_name(name) for name in state.get("apart", ())]
        state = changed(
            state, lambda v, _: Rows(v[len(MARK) :], files) if isinstance(v, str) and v.startswith(MARK) else v
        )
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
    check_files(path.parent, own_part(state.get("apart", {})))
    try:
        load_model(learn.model, state["model"])
        learn.loss_func.train_loss.load_state_dict(state["loss"])
        learn.opt.load_state_dict(with_rows(learn.model, learn.opt.opt, state["optimizer"], split))
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


def load_model(model: nn.Module, state: dict[str, Any]) -> None:
    """Give a model a state, of which sharded weights take their share."""
    model.load_state_dict(split(state, sharded_weights(model), into=model.state_dict()))


def with_rows(model: nn.Module, optimizer, state: dict, change: Callable) -> dict:
    """Return the state of an optimizer, or of each of several, with its entries for sharded weights changed.

    Args:
        model: Says which weights are sharded.
        optimizer: The optimizer, or `Several`.
        state: Its state dict.
        change: `(entries, weights) -> entries`: joins the rows of all processes, or takes this one's.
    """
    if "optimizers" in state:
        parts = zip(optimizer.optimizers, state["optimizers"], strict=True)
        return {"optimizers": [with_rows(model, own, part, change) for own, part in parts]}
    return {**state, "state": change(state["state"], sharded_weights(model, optimizer))}
