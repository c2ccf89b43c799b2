"""Training without a notebook: `python -m recnb.train configs/demo.yaml --run-dir runs/demo -o Global.epochs=2`.

What notebooks/02_train.ipynb runs, with the same run folder as its result. Called again it goes on where it stopped.
`torchrun --nproc-per-node 2 -m recnb.train ...` trains in several processes, on one machine or more.
"""
from __future__ import annotations

import argparse
import contextlib
import sys
from functools import partial
from pathlib import Path

import pandas as pd
import yaml

from recnb.checkpoints import resolved
from recnb.config import ConfigError, as_yaml, load_config, resolve
from recnb.datasets import DataError
from recnb.distributed import first_does, processes
from recnb.files import LockedError
from recnb.guard import TrainingError
from recnb.lint import lint, stop
from recnb.loaders import build_loaders
from recnb.marks import draw_marks
from recnb.model import build_model
from recnb.plain import Loader
from recnb.runs import open_run, resolve_run, save_embeddings, save_metrics
from recnb.training import build_learner


def train(cfg: dict, run_dir: str | Path) -> dict:
    "The metrics of a checked configuration, trained into a run folder; a strict finding of the lint is a ConfigError."
    image_root = cfg["DataLoader"]["Train"]["dataset"].get("image_root") or ""
    if "data/demo/" in image_root:  # the demo draws its own images
        first_does(draw_marks, resolve("data/demo"))
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
    "None; prints the last row of a run's history on one line."
    row = pd.read_csv(run / "history.csv").iloc[-1].dropna()
    print(f"epoch {row.pop('epoch'):.0f} of {epochs}: {', '.join(f'{k} {v:.4g}' for k, v in row.items())}", flush=True)


def main(words: list[str] | None = None) -> int:
    "The exit code of the command: 0, or 1 behind one line of what is wrong, 130 where it was asked to stop."
    parser = argparse.ArgumentParser(prog="python -m recnb.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the YAML file")
    parser.add_argument("--run-dir", help="where to write; by default Global.output_dir, else runs and the name")
    parser.add_argument("-o", dest="overrides", action="append", default=[], metavar="KEY=VALUE",
                        help="a dotted key and the value to use instead, e.g. Global.epochs=2; may be repeated")
    parser.add_argument("--print", action="store_true", help="only print the configuration that would be run")
    given = parser.parse_args(words)
    try:
        pairs = [text.partition("=") for text in given.overrides]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise ConfigError(f"-o {bad[0]}: is not of the form KEY=VALUE")
        cfg = load_config(given.config, {key: yaml.load(value, Loader) for key, _, value in pairs})  # a SafeLoader
        if given.print:
            print(as_yaml(resolved(cfg)))
            return 0
        with processes(cfg["Global"]["device"]):
            result = train(cfg, given.run_dir or cfg["Global"]["output_dir"] or f"runs/{Path(given.config).stem}")
    except (ConfigError, DataError, TrainingError, LockedError) as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt as wish:
        print(wish, file=sys.stderr)
        return 130
    print("\n".join(f"{name:>12}  {result['before'][name]:.4f} -> {result[name]:.4f}" for name in result["before"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
