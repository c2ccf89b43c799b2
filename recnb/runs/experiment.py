"""One experiment from a checked configuration to a run folder."""

from __future__ import annotations

import contextlib
import sys
from functools import partial
from pathlib import Path

import pandas as pd

from recnb.distributed.processes import first_does
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.lint import lint, stop
from recnb.recipe.model import build_model
from recnb.runs.folder import open_run, resolve_run, save_embeddings, save_metrics


def train(cfg: dict, run_dir: str | Path) -> dict:
    """The metrics of a checked configuration, trained into a run folder.

    A strict finding of the lint is a ConfigError.
    """
    run = resolve_run(run_dir)
    first_does(open_run, run, cfg)
    loaders = build_loaders(cfg)
    findings = lint(cfg, loaders)
    for finding in findings:
        print(f"{finding.place}: {finding.what}: {finding.why}; {finding.mend}")
    stop(findings)
    learn = build_learner(cfg, build_model(cfg), loaders, run)
    print(learn.model.describe())
    with contextlib.ExitStack() as quiet:
        if not sys.stdout.isatty():  # bars are redrawn, lines stay
            quiet.enter_context(learn.no_bar())
            quiet.enter_context(learn.no_logging())
        before = learn.scores()
        learn.fit_config(on_epoch=None if sys.stdout.isatty() else partial(print_epoch, run, cfg["Global"]["epochs"]))
        after = learn.scores()
    if loaders.query:
        query, gallery = learn.embeddings()
        first_does(partial(save_embeddings, run, query=query, gallery=gallery))
    first_does(save_metrics, run, before, after)
    return {**after, "before": before}


def print_epoch(run: Path, epochs: int) -> None:
    """Print the last row of a run's history on one line."""
    row = pd.read_csv(run / "history.csv").iloc[-1].dropna()
    print(f"epoch {row.pop('epoch'):.0f} of {epochs}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}", flush=True)
