"""What fastai's loop is given: plain torch data loaders behind a small adaptor, and callbacks in one order.

fastai's own loaders would drop the P x K batches. All of fastai that this kit uses is imported here.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable as Function
from collections.abc import Sequence
from itertools import islice

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset
from torchvision.transforms.v2.functional import pil_to_tensor

from recnb.data.images import read_rgb, to_rgb
from recnb.data.loaders import batch_size, batches_on, over, shared_transform
from recnb.data.samplers import EpochSampler

with warnings.catch_warnings():  # fastai's import warns of torch's and pandas' futures
    warnings.simplefilter("ignore")
    import fastai.callback.hook  # noqa: F401 (its import gives summary)
    from fastai.callback.core import (  # noqa: F401
        Callback,
        CancelBatchException,
        CancelEpochException,
        CancelFitException,
        CancelStepException,
        CancelValidException,
        TrainEvalCallback,
    )
    from fastai.callback.fp16 import MixedPrecision  # noqa: F401 (its import gives to_fp16)
    from fastai.callback.progress import ProgressCallback  # noqa: F401 (its import gives the progress bars)
    from fastai.callback.schedule import ParamScheduler  # noqa: F401 (its import gives fit_one_cycle and lr_find)
    from fastai.callback.tracker import TrackerCallback  # noqa: F401
    from fastai.data.core import DataLoaders  # noqa: F401
    from fastai.learner import Learner, ValueMetric  # noqa: F401
    from fastai.learner import Recorder as FastaiRecorder
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


def refused(name: str, instead: str) -> Function:
    """Return a method that stands for one of fastai's which has no meaning here, and says what serves in its place."""

    def method(*_, **__):
        raise TypeError(f"{name}: {instead}")

    return method


class Recorder(FastaiRecorder):
    """Fastai's, without the column `valid_loss` where there is no evaluation loss that could fill it."""

    def before_fit(self):
        super().before_fit()
        self.loss.reset()
        if self.loss_func.eval_loss is None:
            self.metric_names.remove("valid_loss")

    @property
    def _valid_mets(self):  # fastai has no public way to leave the loss out
        return super()._valid_mets[int(self.loss_func.eval_loss is None) :]

    def plot_loss(self, *args, with_valid: bool | None = None, **options):
        """Draw the training loss of each step and, where it is recorded, the evaluation loss of each epoch."""
        shown = "valid_loss" in self.metric_names if with_valid is None else with_valid
        return super().plot_loss(*args, with_valid=shown, **options)


class Items(Dataset):
    """Pictures (paths, PIL images, or uint8 arrays (H, W) and (H, W, 3)) without labels, as `show` makes them."""

    def __init__(self, pictures: Sequence, show: Function):
        self.pictures, self.show = pictures, show

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        picture = self.pictures[index]
        if isinstance(picture, np.ndarray):
            picture = Image.fromarray(picture)
        if isinstance(picture, Image.Image):
            return self.show(pil_to_tensor(to_rgb(ImageOps.exif_transpose(picture)))), -1
        return self.show(pil_to_tensor(read_rgb(str(picture)))), -1


class FastaiLoader:
    """A torch DataLoader with the attributes that fastai asks of its own."""

    n_inp, after_batch, drop_last = 1, None, False

    def __init__(self, loader: DataLoader, device: torch.device | None = None):
        self.loader, self.device, self.dataset = loader, device, loader.dataset
        self.bs = batch_size(loader)

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        batches = batches_on(self.loader, self.device)
        return ((x,) for x, _ in batches) if isinstance(self.dataset, Items) else batches

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

    def new(self, items: Sequence | None = None, shuffle: bool | None = None, **_) -> FastaiLoader:
        """Return a loader of other items, or with `shuffle=False` of every image once in the order of the list.

        Args:
            items: Paths, PIL images or arrays, which get the transform of this loader's images, and no labels.
            shuffle: None and True: the loader itself.

        Raises:
            ValueError: The items cannot be transformed.
        """
        if items is not None:
            return self.of_items(items)
        if shuffle is False and self.loader.batch_size is None:
            return FastaiLoader(over(self.loader, self.dataset), self.device)
        return self

    def of_items(self, items: Sequence) -> FastaiLoader:
        """Return a loader of unlabelled items; a few are read here and now, many by as many workers as this one's."""
        first = self.dataset.datasets[0] if isinstance(self.dataset, ConcatDataset) else self.dataset
        show = shared_transform(first)
        if show is None or getattr(first, "features", None) is not None:
            raise ValueError("test_dl: these loaders read features, or images without a transform; items have neither")
        workers = {} if len(items) > self.bs else {"num_workers": 0, "prefetch_factor": None}
        return FastaiLoader(over(self.loader, Items(items, show), persistent_workers=False, **workers), self.device)

    show_batch = refused("show_batch", "recnb.gallery.augmentation_figure(learn.loaders.train) shows images in pairs")

    def one_batch(self) -> tuple[Tensor, Tensor]:
        return next(iter(self))
