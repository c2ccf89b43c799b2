"""One experiment from a checked configuration to a run folder."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

import pandas as pd

from recnb.distributed.processes import first_does
from recnb.recipe.data import build_loaders
from recnb.recipe.ladder import is_ladder, start
from recnb.recipe.learner import build_learner
from recnb.recipe.lint import lint, stop
from recnb.recipe.model import build_model
from recnb.runs.folder import open_run, resolve_run
from recnb.runs.ladder import climb
from recnb.runs.results import evaluate_start, save_results


def train(cfg: dict, run_dir: str | Path) -> dict:
    """Train a checked configuration into a run folder and return its metrics, those before under `before`.

    Raises:
        ConfigError: The lint has found what makes the run useless.
    """
    first, run = start(cfg) if is_ladder(cfg) else cfg, resolve_run(run_dir)
    loaders = build_loaders(first)
    first_does(open_run, run, first, loaders.classes)
    findings = lint(cfg, loaders)
    for finding in findings:
        print(f"{finding.place}: {finding.what}: {finding.why}; {finding.mend}")
    stop(findings)
    learn = build_learner(first, build_model(first, loaders.classes), loaders, run)
    print(learn.model.describe())
    with contextlib.ExitStack() as quiet:
        if not sys.stdout.isatty():  # bars are redrawn, lines stay
            quiet.enter_context(learn.no_bar())
            quiet.enter_context(learn.no_logging())
        before = evaluate_start(run, learn)
        if is_ladder(cfg):
            learn, _ = climb(cfg, run)
        else:
            say = None if sys.stdout.isatty() else partial(print_epoch, run, cfg["Global"]["epochs"])
            learn.fit_config(on_epoch=say)
        after = learn.evaluate()
    first_does(save_results, run, learn, before, after)
    return {**after.metrics, "before": before.metrics}


def print_epoch(run: Path, epochs: int) -> None:
    """Print the last row of a run's history on one line."""
    row = pd.read_csv(run / "history.csv").iloc[-1].dropna()
    print(f"epoch {row.pop('epoch'):.0f} of {epochs}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}", flush=True)
