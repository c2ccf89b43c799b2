"""`recnb check`: whether a configuration would train, without training."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from recnb.cli.train import Overrides, Parts, overrides_of, use

if TYPE_CHECKING:
    from recnb.training.learner import RetrievalLearner


def check(
    config: Annotated[Path, typer.Argument(help="The YAML file.")], overrides: Overrides = None, parts: Parts = ""
) -> None:
    """Check a configuration without training.

    Looks at its keys, lists, images and model, and puts one batch through the loss and the evaluation. Nothing is
    written.
    """
    from recnb.recipe.data import build_loaders
    from recnb.recipe.learner import build_learner
    from recnb.recipe.lint import lint, stop
    from recnb.recipe.model import build_model
    from recnb.recipe.schema import load_config

    use(parts)
    cfg = load_config(config, overrides_of(overrides))
    print(f"{config}: every section, name and argument is known", flush=True)
    loaders = build_loaders(cfg)
    for name, part in vars(loaders).items():
        if images := getattr(part, "dataset", None):
            print(f"{name}: {len(images):,} images of {len(set(images.labels.tolist())):,} identities")
    findings = lint(cfg, loaders)
    print("".join(f"{finding}\n" for finding in findings), end="")
    stop(findings)
    with tempfile.TemporaryDirectory() as folder:
        learn = build_learner(cfg, build_model(cfg), loaders, folder)
        print(learn.model.describe())
        one_batch(learn)
    loaders.stop_workers()
    print("sound: it can be trained")


def one_batch(learn: RetrievalLearner) -> None:
    """Put one batch through the training loss, and one of the evaluation through the model, and say what came out.

    Raises:
        TrainingError: The loss or a feature is not finite, or the memory does not suffice.
    """
    import torch

    from recnb.training.guard import TrainingError, explained

    with explained(learn):
        x, y = learn.dls.train.one_batch()
        x, y = learn.mix(x, y) if learn.mix else (x, y)
        loss = learn.loss_func.train_loss(learn.model.to(x.device).train()(x, y), y)
        print(f"one batch of {tuple(x.shape)}: loss {loss.item():.3f}")
        values = [loss.detach()]
        if learn.loaders.query:
            with torch.inference_mode():
                values.append(learn.model.eval()(learn.dls.valid.one_batch()[0])["features"])
            print(f"one batch of the evaluation: features {tuple(values[-1].shape)}")
        if not all(value.isfinite().all() for value in values):
            raise TrainingError("the loss or a feature of the first batch is not finite: lower the learning rate")
