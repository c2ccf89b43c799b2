"""`recnb embed`: the vectors of very many images, in shards.

`torchrun --nproc-per-node 2 -m recnb.cli.embed ...` divides the shards among processes, on one machine or more.
"""

import sys
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer


def embed(
    source: Annotated[Path, typer.Argument(metavar="CONFIG_OR_RUN", help="A run folder, or a YAML file.")],
    images: Annotated[Path, typer.Argument(metavar="LIST", help="A list file, an image a line.")],
    out: Annotated[Path, typer.Option(metavar="FOLDER", help="The folder to write to.")],
    root: Annotated[Path | None, typer.Option(help="What the paths start from; by default the list's folder.")] = None,
    shard: Annotated[int, typer.Option(min=1, help="How many lines of the list a file is for.")] = 50_000,
) -> None:
    """Write the vectors of a list of images into Parquet files.

    A line is `path label` or `path label camera`, separated by tabs or by blanks. Called again, it goes on with the
    files that are missing. Images that cannot be read are listed in left_out.csv, and nowhere else.
    `torchrun -m recnb.cli.embed` takes the same words, for many processes.
    """
    from recnb.registry import ConfigError

    if find_spec("pyarrow") is None:
        raise ConfigError("recnb embed needs pyarrow: pip install 'recnb[parquet]'")
    for path in (path for path in (source, images) if not path.exists()):
        raise ConfigError(f"{path}: there is no such file or folder")
    from recnb.cli.shards import embed_list

    embed_list(source, images, out, root or images.parent, shard)


def main(words: Sequence[str] | None = None) -> int:
    """Run `recnb embed` and return its exit code: what torchrun starts."""
    from recnb.cli.main import main as recnb

    return recnb(["embed", *(sys.argv[1:] if words is None else words)])


if __name__ == "__main__":
    sys.exit(main())
