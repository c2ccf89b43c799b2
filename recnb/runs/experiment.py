"""One experiment: from a checked configuration to a run folder."""

import contextlib
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from recnb.distributed.processes import first_does, ranks
from recnb.gallery.curves import history_figure
from recnb.recipe.data import build_loaders
from recnb.recipe.ladder import base, is_ladder
from recnb.recipe.learner import build_learner, device_count
from recnb.recipe.lint import lint, stop
from recnb.recipe.model import build_model
from recnb.runs.folder import open_run, resolve_run
from recnb.runs.ladder import climb
from recnb.runs.results import evaluate_start, save_results
from recnb.storage import locked
from recnb.training.learner import RetrievalLearner


def train(cfg: dict, run_dir: str | Path) -> dict:
    """Train a checked configuration into a run folder and return its metrics, with those of the start as `before`.

    Raises:
        ConfigError: The configuration has a strict finding, or cannot be built.
    """
    first, run = base(cfg), resolve_run(run_dir)
    loaders = build_loaders(first)
    findings = lint(cfg, loaders)
    print("".join(f"{finding}\n" for finding in findings), end="")
    stop(findings)
    with contextlib.ExitStack() as quiet:
        if ranks()[0] == 0 and (ranks()[1] > 1 or device_count(cfg["Global"]["devices"]) == 1):
            quiet.enter_context(locked(run))  # until all is written; of several processes, the first one's
        first_does(open_run, run, cfg, loaders.classes)
        learn = build_learner(first, build_model(first, loaders.classes), loaders, run)
        print(learn.model.describe())
        if not sys.stdout.isatty():  # bars are redrawn, lines stay
            quiet.enter_context(learn.no_bar())
            quiet.enter_context(learn.no_logging())
        before = evaluate_start(run, learn)
        learn = fit(cfg, learn, run)
        after = learn.evaluate()
        first_does(save_results, run, learn, before, after)
    return {**after.metrics, "before": before.metrics}


def fit(cfg: dict, learn: RetrievalLearner, run: Path, show: Callable[[Figure], object] | None = None):
    """Train as the file says, or climb its ladder, and return the learner with the result.

    Args:
        cfg: The configuration.
        learn: The learner of `base(cfg)`.
        run: The run folder.
        show: Called with a figure, the curves after each epoch or the ladder after each rung; without it lines are
            printed.
    """
    if is_ladder(cfg):
        return climb(cfg, run, show and (lambda found: show(found.figure())))[0]
    lines = None if sys.stdout.isatty() else partial(print_epoch, run, cfg["Global"]["epochs"])
    learn.fit_config(on_epoch=(lambda: show(history_figure(pd.read_csv(run / "history.csv")))) if show else lines)
    return learn


def print_epoch(run: Path, epochs: int) -> None:
    """Print the last row of a run's history on one line."""
    row = pd.read_csv(run / "history.csv").iloc[-1].dropna()
    print(f"epoch {row.pop('epoch'):.0f} of {epochs}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}", flush=True)
