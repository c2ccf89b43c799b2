"""The whole schedule of a configuration: train, evaluate, keep, resume, write down.

`learn.fit_config()` is `learn.fit` with the callbacks of this chapter added for its duration. After it the model holds
the weights of the best epoch by the first metric listed, which are also what the run folder keeps.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from recnb.data.lists import save_dropped, save_label_map
from recnb.distributed.processes import first_does, launch, ranks
from recnb.models.weights import read_weights
from recnb.storage import locked
from recnb.training.adaptor import Callback, ProgressCallback, in_order
from recnb.training.callbacks import FollowPlan, History, Log, Pace, StopEarly
from recnb.training.checkpoints import Checkpoints, load_model, resume, save_weights
from recnb.training.guard import Guard, Wish, explained, stoppable
from recnb.training.loggers import Logger, opened
from recnb.training.plan import FitState, Plan
from recnb.training.retention import callbacks_of, fit_neck, imprint
from recnb.training.steps import Accumulate, MovingAverage, ScaleLoss, Together

if TYPE_CHECKING:
    from recnb.training.learner import RetrievalLearner


def fit_config(learn: RetrievalLearner, plan: Plan, on_epoch: Callable[[], object] | None = None) -> None:
    """Run a plan here, or have it run by as many processes as it asks for; see `RetrievalLearner.fit_config`.

    Args:
        learn: What is trained.
        plan: How.
        on_epoch: Called after each epoch.

    Raises:
        ConfigError: There is a checkpoint of another configuration, or one that is damaged.
        TrainingError: Training cannot go on.
        LockedError: Another process trains into the folder.
    """
    if plan.devices > 1 and ranks()[1] == 1:
        return fit_elsewhere(learn, plan, on_epoch)
    state = FitState()
    with alone(plan) as loggers, stoppable() as wish, explained(learn):
        callbacks = build_callbacks(learn, plan, state, wish, loggers, on_epoch)
        learn.create_opt()
        begin(learn, plan, callbacks)  # may refuse: nothing is written before
        first_does(save_label_map, learn.loaders.train.dataset, plan.folder / "labels.csv")
        if learn.loaders.dropped:
            first_does(save_dropped, learn.loaders.dropped, plan.folder / "dropped.csv")
        try:
            learn.fit(plan.schedule.epochs, lr=plan.schedule.rates[0](0), cbs=callbacks)
        finally:
            learn.first_epoch = learn.first_batch = 0
            learn.loaders.stop_workers()
        if (pace := first_of(Pace, callbacks)).images:
            print(pace)
        keep(learn, plan, state, first_of(MovingAverage, callbacks))


@contextlib.contextmanager
def alone(plan: Plan) -> Iterator[list[Logger]]:
    """Hold the run folder's lock and open the loggers for the block, in the first process only."""
    if ranks()[0]:
        yield []
        return
    with locked(plan.folder), opened(plan.loggers, plan.folder, json.loads(plan.keeping.config)) as loggers:
        yield loggers


def begin(learn: RetrievalLearner, plan: Plan, callbacks: list[Callback]) -> None:
    """Go on from the last checkpoint, of the run folder or else of the plan, or begin at the plan's seed.

    Args:
        learn: What is trained.
        plan: Says where checkpoints are.
        callbacks: Those of this fit.
    """
    own = plan.folder / "checkpoints" / "latest.pt"
    last = own if own.exists() else plan.keeping.checkpoint
    if last:
        resume(learn, callbacks, first_of(Checkpoints, callbacks), last)
        inside = f" and step {learn.first_batch} of the next" if learn.first_batch else ""
        print(f"resuming behind epoch {learn.first_epoch} of {plan.schedule.epochs}{inside}")
    else:
        torch.manual_seed(plan.seed + ranks()[0])  # of dropout and of blended batches
        if hasattr(getattr(learn.model, "neck", None), "fit"):  # models that are distilled together have no neck
            fit_neck(learn.model, learn.loaders)
        if plan.retention.imprint:
            imprint(learn.model, learn.loaders)


def keep(learn: RetrievalLearner, plan: Plan, state: FitState, average: MovingAverage | None) -> None:
    """Give the model the weights of the best epoch, or where none was evaluated the last ones, and save it.

    Args:
        learn: What was trained.
        plan: Says where to.
        state: Says which epoch is the best.
        average: The average of the weights, where there is one.
    """
    if state.best:
        load_model(learn.model, read_weights(plan.folder / "checkpoints" / "best.safetensors", in_part=True))
        name, value = learn.names[0], state.best["value"]
        chosen = ", chosen on validation" if learn.loaders.validation else ""
        print(f"the model holds the weights of epoch {state.best['epoch']}, the best by {name} ({value:.3f}){chosen}")
        if not chosen:
            print("the choice saw the test lists, so their metrics flatter it; DataLoader.Validation would not")
    elif average:
        average.swap()
    save_weights(learn.model, plan.folder / "model.safetensors")


def fit_elsewhere(learn: RetrievalLearner, plan: Plan, on_epoch: Callable[[], object] | None) -> None:
    """Start the processes that train, show what they print, and take the weights that they leave.

    Args:
        learn: Gets the weights.
        plan: Says how many processes.
        on_epoch: Called after each epoch.
    """
    history = plan.folder / "history.csv"
    written = history.exists() and history.stat().st_mtime_ns
    for line in launch(plan.folder / "config.yaml", plan.folder, plan.devices):
        print(line, end="")
        before, written = written, history.exists() and history.stat().st_mtime_ns
        if on_epoch and written != before:  # each epoch writes the file anew, then prints a line
            on_epoch()
    learn.model.load_state_dict(read_weights(plan.folder / "model.safetensors"))


def build_callbacks(
    learn: RetrievalLearner,
    plan: Plan,
    state: FitState,
    wish: Wish,
    loggers: Sequence[Logger],
    on_epoch: Callable[[], object] | None,
) -> list[Callback]:
    """Return what a fit adds to the learner, in the order in which every event reaches it.

    Behind a batch gradients are summed, averaged over processes, looked through for what has no value, scaled back and
    used, and then the weights are averaged. Checkpoints come behind everything whose state they keep.

    Args:
        learn: What is trained.
        plan: How.
        state: What the callbacks share.
        wish: Says when to stop.
        loggers: Where curves go too.
        on_epoch: Called after each epoch.
    """
    schedule = plan.schedule
    several, scaled = ranks()[1] > 1, schedule.half == torch.float16
    average = MovingAverage(learn.model, schedule.decay) if schedule.decay else None
    judged = average.average.module if average else learn.model
    before_recorder = [
        *callbacks_of(learn.model, plan.retention),
        Accumulate(schedule.update_freq) if schedule.update_freq > 1 else None,
        Together(schedule.update_freq) if several else None,
        Guard(schedule.skip_nonfinite, not scaled, state),  # ScaleLoss looks for gradients that overflow itself
        ScaleLoss(learn.dls.device) if scaled else None,
        average,
        History(plan.folder, state, learn.watched, on_epoch),  # adds columns to the recorder's table
    ]
    behind_progress = [  # whose table FollowPlan writes to
        FollowPlan(plan, state),
        Pace(),
        Checkpoints(plan.folder / "checkpoints", plan.keeping, schedule.update_freq, state, judged, wish),
        Log(loggers, state) if loggers else None,
        StopEarly(plan.evaluation.patience, state) if plan.evaluation.patience else None,
    ]
    return in_order(before_recorder, 0) + in_order(behind_progress, ProgressCallback.order + 1)


def first_of(kind: type, callbacks: list[Callback]):
    """Return the callback of a kind, None where there is none."""
    return next((callback for callback in callbacks if isinstance(callback, kind)), None)
