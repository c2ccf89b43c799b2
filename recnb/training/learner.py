"""The fastai Learner for retrieval: labels reach the head, and evaluation retrieves.

The head's weights live in the model, so they are optimised, frozen, saved and distributed with it. `learn.fit`,
`fit_one_cycle`, `lr_find`, `freeze`, `validate`, `get_preds` are fastai's, and what of fastai has no meaning here says
what to use instead. `learn.fit_config` follows the plan of a configuration.
"""

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import ConcatDataset, DataLoader

from recnb.data.loaders import Loaders, Pair, divided, over
from recnb.training.adaptor import (
    Callback,
    CancelEpochException,
    DataLoaders,
    FastaiLoader,
    FastaiRecorder,
    Learner,
    OptimWrapper,
    Recorder,
    TrackerCallback,
    TrainEvalCallback,
    ValueMetric,
    in_order,
    refused,
)
from recnb.training.allocator import keep_freed_memory
from recnb.training.callbacks import PassLabels, RetrievalEvaluation
from recnb.training.evaluation import DEFAULT_METRICS, Accuracy, Evaluation, Judge, passes_behind
from recnb.training.fit import fit_config
from recnb.training.plan import Plan

INSTEAD = {  # of what fastai has and this learner does not take
    "opt_func": "give optimizer=, the class of a torch optimizer, or what makes one of (groups, lr)",
    "loss_func": "give loss=, a module of (outputs, labels) such as CombinedLoss",
    "MixUp": "give mix=MixupOperator(class_num), from recnb.data.augment",
    "CutMix": "give mix=CutmixOperator(class_num), from recnb.data.augment",
    "ShowGraphCallback": "call recorder.plot_loss() behind fit; fit_config draws curves by itself",
}


class RunLoss(nn.Module):
    """The training loss while training; otherwise the evaluation loss, NaN where the labels give it no meaning."""

    def __init__(self, train: nn.Module, evaluate: nn.Module | None = None):
        super().__init__()
        self.train_loss, self.eval_loss = train, evaluate

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        if self.training:
            return self.train_loss(out, y)
        return self.eval_loss(out, y) if self.eval_loss is not None else out["features"].new_tensor(torch.nan)


class RetrievalLearner(Learner):
    """A fastai Learner over `Loaders`, a RecModel and a loss.

    Epochs are evaluated on the validation lists where the loaders have any, and otherwise on the test lists, which
    `evaluate` always takes.

    Args:
        loaders: of the training, test and validation images.
        model: `(x, y) -> dict` of outputs, with a part `backbone`.
        loss: `(out, y) -> scalar`.
        eval_loss: of the evaluated identities, where it has a meaning for them; None: none is shown.
        optimizer: makes a torch optimizer of (groups, lr).
        metrics: keys of `retrieval_metrics`, or a `Judge` or what is called like one.
        device: None: a GPU where there is one.
        path: the folder that fastai writes below.
        cbs: callbacks of fastai.
        splitter: `splitter(model, loss)` gives the groups; None: the backbone's, then the others', so that `freeze()`
            trains the latter and `slice(lr)` spreads over both.
        mix: a batch transform `(x, y) -> (x, soft labels)` for training.
        plan: what `fit_config` follows.
        **kwargs: go to fastai's Learner.

    Raises:
        TypeError: An argument of fastai's has no meaning here; the message says what serves in its place.
    """

    first_epoch, first_batch = 0, 0  # where a resumed fit begins

    def __init__(
        self,
        loaders: Loaders,
        model: nn.Module,
        loss: nn.Module,
        eval_loss: nn.Module | None = None,
        optimizer: Callable = torch.optim.AdamW,
        metrics: Sequence[str] | Judge | Accuracy = DEFAULT_METRICS,
        device: str | torch.device | None = None,
        path: str | Path = ".",
        cbs: Sequence[Callback] = (),
        splitter: Callable | None = None,
        mix: Callable | None = None,
        plan: Plan | None = None,
        **kwargs,
    ):
        for name in INSTEAD.keys() & kwargs:
            raise TypeError(f"{name}: {INSTEAD[name]}")
        if isinstance(metrics, Sequence) and not all(isinstance(name, str) for name in metrics):
            raise TypeError("metrics: give names, such as ['recall1', 'mAP'], or a Judge; a batch alone has no ranking")
        device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        keep_freed_memory(device)
        judge = Judge(metrics, device=device) if isinstance(metrics, Sequence) else metrics
        self.names = list(judge.names)
        self.tested = RetrievalEvaluation(loaders.test, judge) if loaders.test else None
        self.watched = RetrievalEvaluation(loaders.validation, judge) if loaders.validation else self.tested
        pairs = {part.pair.query: part.pair for part in (self.watched, self.tested) if part}
        held = [FastaiLoader(evaluation_loader(pair), device) for pair in pairs.values()]
        shown = [ValueMetric(partial(self.last, name), name) for name in self.names] if self.watched else []
        super().__init__(
            DataLoaders(FastaiLoader(loaders.train, device), *held[:1], path=path),
            model.to(device),
            RunLoss(loss, eval_loss).to(device),
            opt_func=partial(OptimWrapper, opt=optimizer),
            metrics=shown,
            path=path,
            splitter=lambda model: (splitter or backbone_and_rest)(model, loss),
            cbs=in_order([PassLabels(), self.watched], TrainEvalCallback.order + 1),
            **kwargs,
        )
        self.loaders, self.mix, self.plan, self.test_loader = loaders, mix, plan, held[-1] if self.tested else None
        self.remove_cb(FastaiRecorder)
        self.add_cbs([Recorder(), *cbs])

    def fit_config(self, on_epoch: Callable[[], object] | None = None) -> None:
        """Train as the plan says, going on behind the last checkpoint where the run folder holds one.

        Args:
            on_epoch: called after each epoch, when its row stands in history.csv: to draw the curves anew.

        Raises:
            ValueError: The learner has no plan.
        """
        if self.plan is None:
            raise ValueError("fit_config: this learner has no plan; give it one (plan=Plan(...)), or call fit")
        fit_config(self, self.plan, on_epoch)

    def freeze(self):
        """Train from now on only what does not belong to the backbone."""
        if self.opt is None:
            self.create_opt()
        self.freeze_to(sum(group["backbone"] for group in self.opt.opt.param_groups))

    def last(self, name: str) -> float | None:
        """Return a metric of the evaluation that has just been made, for the live table."""
        result = self.watched and self.watched.result
        return result.metrics[name] if result else None

    def add_cb(self, cb: Callback | type[Callback]):
        """Add a callback; one that would watch `valid_loss`, where there is none, watches the first metric.

        Raises:
            TypeError: It has no meaning here; the message says what serves in its place.
            ValueError: It watches what this learner never evaluates.
        """
        cb = cb() if isinstance(cb, type) else cb
        if (name := type(cb).__name__) in INSTEAD:
            raise TypeError(f"{name}: {INSTEAD[name]}")
        if name == "CSVLogger" and self.plan is not None and str(cb.fname) == "history.csv":
            raise TypeError("CSVLogger: a run keeps history.csv itself; give another fname")
        if isinstance(cb, TrackerCallback) and cb.monitor == "valid_loss" and self.loss_func.eval_loss is None:
            if self.watched is None:
                raise ValueError(f"{name}: nothing is evaluated; give the loaders query and gallery, or monitor=...")
            cb.monitor, cb.comp, cb.min_delta = self.names[0], np.greater, abs(cb.min_delta)
        return super().add_cb(cb)

    def embed(self, items: Sequence) -> Tensor:
        """Return the features (N, D) of pictures, which are shown to the model as evaluation shows its own.

        Args:
            items: paths, PIL images, or uint8 arrays (H, W, 3).

        Raises:
            ValueError: There is no evaluation, or it reads features and not images.
        """
        if self.watched is None:
            raise ValueError("embed: the loaders have no query and gallery, whose transform the items would get")
        return self.get_preds(dl=self.dls.test_dl(items))[0]

    def evaluate(self) -> Evaluation:
        """Return what the model as it is now makes of the test lists' query and gallery images; each is embedded once.

        Without test lists it is empty.
        """
        if self.tested is None:
            return Evaluation()
        with self.removed_cbs(self.watched), self.added_cbs(self.tested):
            self.validate(dl=self.test_loader)
        result, self.tested.result = self.tested.result, None
        return result or Evaluation()

    def _do_epoch_validate(self, ds_idx: int = 1, dl=None):
        if dl is not None or len(self.dls.loaders) > 1:  # nothing to evaluate: train only
            super()._do_epoch_validate(ds_idx, dl)

    def all_batches(self):  # as fastai's, which cannot begin in the middle of an epoch
        self.n_iter, start = len(self.dl), self.first_batch if self.training else 0
        if self.training:
            self.first_batch = 0
        behind = 0 if self.training else passes_behind(self.model, self.n_iter)
        for number, batch in enumerate(self.dl.begin_at(start) if start else self.dl, start):
            self.one_batch(number, batch)
        for _ in range(behind):
            self.model(batch[0])

    def _do_fit(self):  # as fastai's, which cannot begin anywhere but at the first epoch
        for epoch in range(self.first_epoch, self.n_epoch):
            self.epoch = epoch
            self._with_events(self._do_epoch, "epoch", CancelEpochException)

    predict = refused("predict", "there are no classes; rank learn.embed([item]) in the gallery by recnb.retrieval.knn")
    show_results = refused("show_results", "give the features of learn.evaluate() to recnb.gallery.gallery_figure")
    tta = refused("tta", "recnb.training.embed(learn.model, loader, flip=True, scales=(1, 1.25)) averages over views")
    export = refused("export", "recnb.deploy.export_model makes a graph of a run; learn.save keeps weights")
    loss_not_reduced = refused("with_loss", "the loss is of a whole batch; learn.evaluate().per_query says what fails")


def backbone_and_rest(model: nn.Module, loss: nn.Module) -> list[dict]:
    """Return the trainable parameters in two groups, the backbone's and the others' with the loss's.

    Empty groups are left out.
    """
    backbone = set(model.get_submodule("backbone").parameters())
    both = [p for part in (model, loss) for p in part.parameters() if p.requires_grad]
    groups = [{"params": [p for p in both if (p in backbone) == own], "backbone": own} for own in (True, False)]
    return [group for group in groups if group["params"]]


def evaluation_loader(pair: Pair) -> DataLoader:
    """Return this process's share of the query and then the gallery images, or of the one list that serves as both."""
    query, gallery = pair.query.dataset, pair.gallery.dataset
    return divided(pair.query if query is gallery else over(pair.query, ConcatDataset([query, gallery])))
