"""What can go wrong while training, each said in one sentence and with the last checkpoint left as it was.

A loss or gradient without a value, memory that does not suffice, a worker of the data loader that dies, a wish to stop.
"""

import re
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from recnb.distributed.processes import anywhere
from recnb.distributed.rows import on_this_rank
from recnb.training.adaptor import Callback, CancelBatchException, Learner
from recnb.training.plan import FitState

NO_MEMORY = re.compile(r"out of memory|can't allocate memory|Cannot allocate memory", re.IGNORECASE)


class TrainingError(RuntimeError):
    """Training cannot go on; the message says where it was, why, and what would help."""


class Guard(Callback):
    """Stops before the step that a loss or a gradient without a value would make, or leaves that step out."""

    def __init__(self, skip: bool, check_gradients: bool, state: FitState):
        self.skip, self.check_gradients, self.state = skip, check_gradients, state

    def before_batch(self):
        self.state.skipped = False

    def after_loss(self):
        if self.training and anywhere(not self.loss.isfinite(), self.loss.device):
            self.fail("loss")

    def before_step(self):
        if not self.check_gradients:
            return
        gradients = [on_this_rank(p.grad) for p in self.opt.all_params().itemgot(0) if p.grad is not None]
        finite = torch.stack(torch._foreach_norm(gradients)).isfinite().all()
        if anywhere(not finite, self.loss.device):  # a rank sees the gradients of its own share of a sharded head only
            self.fail("gradient")

    def fail(self, what: str) -> None:
        terms = ", ".join(f"{name} {value.item():.4g}" for name, value in self.loss_func.train_loss.terms.items())
        labels = self.yb[0] if self.yb[0].dim() == 1 else self.yb[0].argmax(1)
        identities = [self.dls.train.dataset.name(label) for label in sorted(set(labels.tolist()))]
        where = (
            f"epoch {self.epoch + 1} step {self.iter + 1}: the {what} is not finite ({terms}) at learning "
            f"rate {self.opt.hypers[-1]['lr']:.4g}, in a batch of the identities {', '.join(identities[:20])}"
            f"{' ...' if len(identities) > 20 else ''}"
        )
        spoilt = [name for name, buffer in self.model.named_buffers() if not buffer.isfinite().all()]
        if not self.skip or spoilt:
            why = f"; {spoilt[0]} is spoilt already, so skipping the step does not help" if self.skip else ""
            raise TrainingError(
                f"{where}{why}. The last checkpoint is as it was. Lower the learning rate, lengthen "
                "the warm-up, clip with Optimizer.clip_norm, or set Global.on_nonfinite: skip"
            )
        self.state.skipped = True
        print(f"{where}: step left out")
        self.opt.zero_grad()
        raise CancelBatchException


@contextmanager
def explained(learn: Learner) -> Iterator[None]:
    """Turn errors of memory and of dead workers in the block into a TrainingError that says what to change."""
    try:
        yield
    except TrainingError as error:  # fastai puts the callback before the message
        raise TrainingError(str(error).rpartition(":\n\t")[2]) from None
    except (RuntimeError, MemoryError) as error:
        loader, x = learn.dls.train, learn.xb[0] if getattr(learn, "xb", None) else None
        if isinstance(error, MemoryError) or NO_MEMORY.search(str(error)):
            shape = "" if x is None else f" and images of {tuple(x.shape[1:])}"
            raise TrainingError(
                f"memory does not suffice for batches of {loader.bs}{shape}: lower the sampler's "
                "batch_size (and raise Global.update_freq for the same effective batch), lower the "
                "image size, or compute in half precision with a section AMP"
            ) from error
        if "DataLoader worker" in str(error):
            raise TrainingError(
                f"a worker process of the data loader has died ({str(error).splitlines()[0]}) while "
                f"reading one of {', '.join(loader.dataset.being_read()) or 'its images'}: memory may "
                "not suffice (lower loader.num_workers), or that file crashes its decoder"
            ) from error
        raise


class Wish:
    """Whether the run has been asked to stop."""

    asked = False


@contextmanager
def stoppable() -> Iterator[Wish]:
    """Take Ctrl-C and SIGTERM in the block as a wish to stop, which the run follows when its state is whole.

    A second one stops at once. Outside the main thread, where Python allows no handlers, nothing changes.
    """
    wish = Wish()
    if threading.current_thread() is not threading.main_thread():
        yield wish
        return

    def ask(number: int, frame) -> None:
        if wish.asked:
            raise KeyboardInterrupt
        wish.asked = True
        print("stopping behind this step, or behind the evaluation under way; once more stops at once", flush=True)

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield wish
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
