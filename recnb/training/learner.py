"""The fastai Learner for retrieval: labels reach the head, evaluation retrieves, and everything of fastai still works.

Data loaders are plain torch ones behind a small adaptor, since fastai's own would drop the P x K batches. The head's
weights live in the model, so they are optimised, frozen, saved and distributed with it. `learn.fit`, `fit_one_cycle`,
`lr_find`, `freeze`, `validate`, `get_preds` are fastai's; `recnb.training` adds the schedule of a configuration.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from recnb.data.loaders import Loaders, batches_on, divided, over
from recnb.data.pipeline import display_image
from recnb.data.samplers import EpochSampler
from recnb.distributed.processes import joined
from recnb.training.evaluation import DEFAULT_METRICS, embed, judge

with warnings.catch_warnings():  # fastai's import warns of torch's and pandas' futures
    warnings.simplefilter("ignore")
    from fastai.callback.core import (  # noqa: F401
        Callback,
        CancelBatchException,
        CancelEpochException,
        CancelStepException,
        CancelValidException,
    )
    from fastai.callback.progress import ProgressCallback  # noqa: F401 (its import gives the progress bars)
    from fastai.callback.schedule import ParamScheduler  # noqa: F401 (its import gives fit_one_cycle and lr_find)
    from fastai.data.core import DataLoaders
    from fastai.learner import Learner, ValueMetric
    from fastai.optimizer import OptimWrapper


class FastaiLoader:
    """A torch DataLoader with the attributes that fastai asks of its own."""

    n_inp, after_batch, drop_last = 1, None, False

    def __init__(self, loader: DataLoader, device: torch.device | None = None):
        self.loader, self.device, self.dataset = loader, device, loader.dataset
        self.bs = loader.batch_size or loader.batch_sampler.batch_size

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self):
        return batches_on(self.loader, self.device)

    def begin_at(self, batch: int):
        """An iterator that begins behind the first batches; those of this kit's samplers are not even read."""
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
        """Itself; with `shuffle=False` a loader of every image once, in the order of the list."""
        if shuffle is False and self.loader.batch_size is None:
            return FastaiLoader(over(self.loader, self.dataset), self.device)
        return self

    def one_batch(self) -> tuple[Tensor, Tensor]:
        return next(iter(self))

    def show_batch(self, max_n: int = 16, columns: int = 8) -> plt.Figure:
        """A figure of the first images of a batch as the model gets them, each with its identity."""
        images, labels = self.one_batch()
        rows = -(-min(max_n, len(images)) // columns)
        figure, axes = plt.subplots(rows, columns, figsize=(1.3 * columns, 1.55 * rows), facecolor="white", dpi=72)
        for ax in np.ravel(axes):
            ax.set_axis_off()
        for ax, image, label in zip(np.ravel(axes)[:max_n], images.cpu(), labels.tolist(), strict=False):
            ax.imshow(display_image(image, self.dataset.transform))
            ax.set_title(f"identity {self.dataset.name(label)}", fontsize=8, color="black")
        figure.tight_layout(pad=0.4)
        plt.close(figure)
        return figure


class RunLoss(nn.Module):
    """The training loss while training; otherwise the evaluation loss, NaN where the labels give it no meaning."""

    def __init__(self, train: nn.Module, evaluate: nn.Module | None = None):
        super().__init__()
        self.train_loss, self.eval_loss = train, evaluate

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        if self.training:
            return self.train_loss(out, y)
        return self.eval_loss(out, y) if self.eval_loss is not None else out["features"].new_tensor(torch.nan)


class PassLabels(Callback):
    """Gives the head its labels while training (or where a loss needs logits), and each epoch its draw."""

    order = -5

    def before_train(self):
        self.loss_func.train()
        sampler = getattr(self.dl.loader, "batch_sampler", None)
        if hasattr(sampler, "set_epoch"):
            sampler.set_epoch(self.epoch)

    def before_validate(self):
        self.loss_func.eval()

    def before_batch(self):
        if self.training and self.learn.mix is not None:
            x, y = self.learn.mix(*self.xb, *self.yb)
            self.learn.xb, self.learn.yb = (x,), (y,)
        if self.training or getattr(self.loss_func.eval_loss, "needs_logits", False):
            self.learn.xb = (*self.xb, *self.yb)

    def after_loss(self):
        if hasattr(self.learn, "gather_preds"):  # get_preds gives embeddings
            self.learn.pred = self.pred["features"]


class RetrievalEvaluation(Callback):
    """Gathers the features of the validation loader, or what else is judged, and leaves the metrics as `result`."""

    order = 40
    result: dict[str, float]

    def __init__(self, loaders: Loaders, judged: Callable):
        self.query, self.gallery, self.judged, self.result = loaders.query.dataset, loaders.gallery.dataset, judged, {}
        self.reads = getattr(judged, "reads", itemgetter("features"))

    def before_validate(self):
        self.features, self.result = [], {}

    def after_pred(self):
        if not self.training:
            self.features.append(self.reads(self.pred).detach().float().cpu())

    def after_validate(self):
        features = joined(torch.cat(self.features)) if self.features else torch.empty(0)
        self.features = []
        if len(features) == len(self.query) + (self.query is not self.gallery) * len(self.gallery):
            self.result = self.judged(
                features[: len(self.query)],
                features[-len(self.gallery) :],
                self.query,
                self.gallery,
                self.training_features,
            )

    def training_features(self) -> Tensor:
        """The features (N, D) of the training images, seen as queries are, for post-processing fitted on them."""
        images = replace(self.dls.train.dataset, transform=self.query.transform)
        return embed(self.learn.model, over(self.learn.loaders.query, images))


class RetrievalLearner(Learner):
    """A fastai Learner over `Loaders`, a RecModel and a loss `(out, y) -> scalar`.

    `optimizer` makes a torch optimizer from `(groups, lr)`, the groups being those of `splitter(model, loss)`: the
    backbone's, then the others', so that `freeze()` trains the latter and `slice(lr)` spreads over both. `metrics` are
    keys of `retrieval_metrics`, or a function like `judge` that computes them, with their `names`, and with
    `reads(out)` where it takes something else of the model's outputs than the features. `mix` is a batch transform
    `(x, y) -> (x, soft labels)` for training.
    """

    first_epoch, first_batch = 0, 0  # where a resumed fit begins

    def __init__(
        self,
        loaders: Loaders,
        model: nn.Module,
        loss: nn.Module,
        eval_loss: nn.Module | None = None,
        optimizer: Callable = torch.optim.AdamW,
        metrics: Sequence[str] | Callable = DEFAULT_METRICS,
        device: str | torch.device | None = None,
        path: str | Path = ".",
        cbs: Sequence[Callback] = (),
        splitter: Callable | None = None,
        mix: Callable | None = None,
        **kwargs,
    ):
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        evaluated = evaluation_loader(loaders)
        adapted = [FastaiLoader(dl, device) for dl in (loaders.train, evaluated and divided(evaluated)) if dl]
        self.names = list(getattr(metrics, "names", metrics))
        judged = metrics if callable(metrics) else partial(named, metrics)
        evaluation = [RetrievalEvaluation(loaders, judged)] if loaders.query else []
        shown = [ValueMetric(partial(self.score, name), name) for name in self.names] if evaluation else []
        super().__init__(
            DataLoaders(*adapted, path=path),
            model.to(device),
            RunLoss(loss, eval_loss).to(device),
            opt_func=partial(OptimWrapper, opt=optimizer),
            metrics=shown,
            path=path,
            splitter=lambda model: (splitter or backbone_and_rest)(model, loss),
            cbs=[PassLabels(), *evaluation, *cbs],
            **kwargs,
        )
        self.loaders, self.mix = loaders, mix

    def freeze(self):
        """From now on only what does not belong to the backbone is trained."""
        if self.opt is None:
            self.create_opt()
        self.freeze_to(sum(group["backbone"] for group in self.opt.opt.param_groups))

    def score(self, name: str) -> float | None:
        return self.retrieval_evaluation.result.get(name)

    def scores(self) -> dict[str, float]:
        """The retrieval metrics of the model as it is now."""
        if self.loaders.query is None:
            return {}
        self.validate()
        return dict(self.retrieval_evaluation.result)

    def embeddings(self) -> tuple[Tensor, Tensor]:
        """The features (Q, D) of the query and (G, D) of the gallery images, by the model as it is now."""
        query = embed(self.model, self.loaders.query)
        same = self.loaders.gallery.dataset is self.loaders.query.dataset
        return query, query if same else embed(self.model, self.loaders.gallery)

    def _do_epoch_validate(self, ds_idx: int = 1, dl=None):
        if dl is not None or len(self.dls.loaders) > 1:  # nothing to evaluate: train only
            super()._do_epoch_validate(ds_idx, dl)

    def all_batches(self):  # as fastai's, which cannot begin in the middle of an epoch
        self.n_iter, start = len(self.dl), self.first_batch if self.training else 0
        if self.training:
            self.first_batch = 0
        for number, batch in enumerate(self.dl.begin_at(start), start):
            self.one_batch(number, batch)

    def _do_fit(self):  # as fastai's, which cannot begin anywhere but at the first epoch
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)


def named(names: Sequence[str], query_features, gallery_features, query, gallery, train=None) -> dict[str, float]:
    """`judge` with these metrics and nothing else."""
    return judge(query_features, gallery_features, query, gallery, names)


def backbone_and_rest(model: nn.Module, loss: nn.Module) -> list[dict]:
    """The trainable parameters in two groups, the backbone's and the others' with the loss's, empty groups left out."""
    backbone = set(model.backbone.parameters())
    both = [p for part in (model, loss) for p in part.parameters() if p.requires_grad]
    groups = [{"params": [p for p in both if (p in backbone) == own], "backbone": own} for own in (True, False)]
    return [group for group in groups if group["params"]]


def evaluation_loader(loaders: Loaders) -> DataLoader | None:
    """One loader over the query and then the gallery images, or over the one data set that serves as both."""
    if loaders.query is None:
        return None
    query, gallery = loaders.query.dataset, loaders.gallery.dataset
    return loaders.query if query is gallery else over(loaders.query, ConcatDataset([query, gallery]))
