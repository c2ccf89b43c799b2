"""Training without a notebook: `python -m recnb.cli.train configs/demo.yaml --run-dir runs/demo -o Global.epochs=2`.

What notebooks/02_train.ipynb runs, with the same run folder as its result. Called again it goes on where it stopped.
`torchrun --nproc-per-node 2 -m recnb.cli.train ...` trains in several processes, on one machine or more.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from recnb.data.images import DataError
from recnb.distributed.processes import processes
from recnb.recipe.reading import as_yaml, parse
from recnb.recipe.resolved import resolved
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.runs.experiment import train
from recnb.storage import LockedError
from recnb.training.guard import TrainingError


def main(words: list[str] | None = None) -> int:
    """The exit code of the command: 0, or 1 behind one line of what is wrong, 130 where it was asked to stop."""
    parser = argparse.ArgumentParser(prog="python -m recnb.cli.train", description=__doc__.splitlines()[0])
    parser.add_argument("config", help="the YAML file")
    parser.add_argument("--run-dir", help="where to write; by default Global.output_dir, else runs and the name")
    parser.add_argument(
        "-o",
        dest="overrides",
        action="append",
        default=[],
        metavar="KEY=VALUE",
        help="a dotted key and the value to use instead, e.g. Global.epochs=2; may be repeated",
    )
    parser.add_argument("--print", action="store_true", help="only print the configuration that would be run")
    given = parser.parse_args(words)
    try:
        pairs = [text.partition("=") for text in given.overrides]
        if bad := [key for key, equals, _ in pairs if not equals]:
            raise ConfigError(f"-o {bad[0]}: is not of the form KEY=VALUE")
        cfg = load_config(given.config, {key: parse(value) for key, _, value in pairs})
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
