"""What fastai's loop is given: plain torch data loaders behind a small adaptor, and callbacks in one order.

fastai's own loaders would drop the P x K batches. All of fastai that this kit uses is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from itertools import islice

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from recnb.data.loaders import batch_size, batches_on, over
from recnb.data.samplers import EpochSampler

with warnings.catch_warnings():  # fastai's import warns of torch's and pandas' futures
    warnings.simplefilter("ignore")
    from fastai.callback.core import (  # noqa: F401
        Callback,
        CancelBatchException,
        CancelEpochException,
        CancelFitException,
        CancelStepException,
        CancelValidException,
        TrainEvalCallback,
    )
    from fastai.callback.progress import ProgressCallback  # noqa: F401 (its import gives the progress bars)
    from fastai.callback.schedule import ParamScheduler  # noqa: F401 (its import gives fit_one_cycle and lr_find)
    from fastai.data.core import DataLoaders  # noqa: F401
    from fastai.learner import Learner, ValueMetric  # noqa: F401
    from fastai.optimizer import OptimWrapper  # noqa: F401


def in_order(callbacks: Sequence[Callback | None], first: int) -> list[Callback]:
    """Return the callbacks, which every event will reach in this order.

    Args:
        callbacks: A None stands for one that this fit does without: the others keep their places.
        first: The place of the first one. fastai's recorder has 50 and its progress bar 60.
    """
    for order, callback in enumerate(callbacks, first):
        if callback is not None:
            callback.order = order
    return [callback for callback in callbacks if callback is not None]


class FastaiLoader:
    """A torch DataLoader with the attributes that fastai asks of its own."""

    n_inp, after_batch, drop_last = 1, None, False

    def __init__(self, loader: DataLoader, device: torch.device | None = None):
        self.loader, self.device, self.dataset = loader, device, loader.dataset
        self.bs = batch_size(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return batches_on(self.loader, self.device)

    def begin_at(self, batch: int):
        """Return an iterator that begins behind the first batches; those of this kit's samplers are not even read."""
        sampler = getattr(self.loader, "batch_sampler", None)
        if not batch or not isinstance(sampler, EpochSampler):
            return islice(self, batch, None)
        sampler.first = batch
        try:  # torch may ask for the sampler's iterator twice, and does it here and now
            return iter(self)
        finally:
            sampler.first = 0

    def to(self, device) -> FastaiLoader:
        self.device = device
        return self

    def new(self, shuffle: bool | None = None, **_) -> FastaiLoader:
        """Return itself, or with `shuffle=False` a loader of every image once, in the order of the list."""
        if shuffle is False and self.loader.batch_size is None:
            return FastaiLoader(over(self.loader, self.dataset), self.device)
        return self

    def one_batch(self) -> tuple[Tensor, Tensor]:
        return next(iter(self))
