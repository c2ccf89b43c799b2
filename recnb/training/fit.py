"""The whole schedule of a configuration: train, evaluate, keep, resume, write down.

`learn.fit_config()` is `learn.fit` with the callbacks of this chapter added for its duration. After it the model holds
the weights of the best epoch by the first metric listed, which are also what the run folder keeps.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable

import torch
from safetensors.torch import load_file

from recnb.data.lists import save_dropped, save_label_map
from recnb.distributed.processes import first_does, launch, ranks
from recnb.distributed.rows import sharded_weights, split
from recnb.storage import locked
from recnb.training.callbacks import FollowPlan, History, Pace, Plan, Scalars
from recnb.training.checkpoints import Checkpoints, resume, save_weights, whole_states
from recnb.training.guard import Guard, Wish, explained, stoppable
from recnb.training.learner import Callback, RetrievalLearner
from recnb.training.steps import Accumulate, MovingAverage, ScaleLoss, Together


def fit_config(learn: RetrievalLearner, plan: Plan, on_epoch: Callable[[], object] | None = None) -> None:
    """Run the plan, going on behind the last checkpoint where the run folder holds one.

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
            resume(learn, callbacks, latest, plan.check_same)
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
    """What fit_config does where it starts the processes that train, and shows what they print."""
    history = plan.folder / "history.csv"
    written = history.exists() and history.stat().st_mtime_ns
    for line in launch(plan.folder / "config.yaml", plan.folder, plan.devices):
        print(line, end="")
        before, written = written, history.exists() and history.stat().st_mtime_ns
        if on_epoch and written != before:  # each epoch writes the file anew, then prints a line
            on_epoch()
    learn.model.load_state_dict(load_file(plan.folder / "model.safetensors"))


def build_callbacks(learn: RetrievalLearner, plan: Plan, history: History, pace: Pace, wish: Wish) -> list[Callback]:
    """What fit_config adds to the learner while it runs."""
    folder = plan.folder / "checkpoints"
    kept = Checkpoints(folder, plan.config, plan.save_interval, plan.save_steps, plan.keep_checkpoints, wish)
    callbacks = [FollowPlan(plan), history, pace, kept, Guard(plan.skip_nonfinite, plan.half != torch.float16)]
    callbacks += [Together()] if ranks()[1] > 1 else []
    callbacks += [Accumulate(plan.update_freq)] if plan.update_freq > 1 else []
    callbacks += [ScaleLoss(learn.dls.device)] if plan.half == torch.float16 else []
    callbacks += [MovingAverage(learn.model, plan.decay)] if plan.decay else []
    callbacks += [Scalars(plan.folder / "vdl")] if plan.scalars else []
    return callbacks
