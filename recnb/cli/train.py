"""`recnb train`: training without a notebook, with the same run folder as its result.

`torchrun --nproc-per-node 2 -m recnb.cli.train ...` trains in several processes, on one machine or more.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

Overrides = Annotated[
    list[str] | None,
    typer.Option("-o", metavar="KEY=VALUE", help="A dotted key of the config and another value; may be repeated."),
]


Parts = Annotated[str, typer.Option(metavar="FILE", help="A Python file of yours that registers parts of your own.")]


def train(
    config: Annotated[Path, typer.Argument(help="The YAML file.")],
    run_dir: Annotated[
        str, typer.Option(help="The folder to write to; by default Global.output_dir, else runs and the name.")
    ] = "",
    overrides: Overrides = None,
    parts: Parts = "",
    printed: Annotated[bool, typer.Option("--print", help="Only print the configuration that would be run.")] = False,
) -> None:
    """Train a configuration without a notebook.

    Called again, it goes on where it stopped. `torchrun -m recnb.cli.train` takes the same words, for many devices.
    """
    from recnb.distributed.processes import processes
    from recnb.recipe.reading import as_yaml
    from recnb.recipe.resolved import resolved
    from recnb.recipe.schema import load_config
    from recnb.runs.experiment import train as trained

    use(parts)
    cfg = load_config(config, overrides_of(overrides))
    if printed:
        print(as_yaml(resolved(cfg)))
        return
    try:
        with processes(cfg["Global"]["device"]):
            result = trained(cfg, run_dir or cfg["Global"]["output_dir"] or f"runs/{config.stem}")
    except KeyboardInterrupt as wish:
        print(wish, file=sys.stderr)
        raise typer.Exit(130) from None
    before = result["before"]
    print("\n".join(f"{name:>12}  {value:.3f} -> {result[name]:.3f}" for name, value in before.items()))


def use(parts: str) -> None:
    """Import the file of parts of one's own, if there is any, before anything is read that may name them."""
    if parts:
        from recnb.recipe.parts import use_parts

        use_parts(parts)


def overrides_of(pairs: Sequence[str] | None) -> dict:
    """Return what `-o KEY=VALUE` gives; raise ConfigError for a word of another form."""
    from recnb.recipe.reading import parse
    from recnb.registry import ConfigError

    parts = [text.partition("=") for text in pairs or ()]
    for key in (key for key, equals, _ in parts if not equals):
        raise ConfigError(f"-o {key}: is not of the form KEY=VALUE")
    return {key: parse(value, f"-o {key}") for key, _, value in parts}


def main(words: Sequence[str] | None = None) -> int:
    """Run `recnb train` and return its exit code: what torchrun starts."""
    from recnb.cli.main import main as recnb

    return recnb(["train", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
