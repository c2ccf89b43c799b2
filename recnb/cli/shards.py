"""A list of images becomes files of vectors, each whole or absent, by any number of processes.

These have nothing to tell each other: every n-th file is one process's, and whoever writes the last one also writes
what was left out. A process holds one file's images and vectors at a time, however long the list is.
"""

import hashlib
import json
import os
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from tqdm.auto import tqdm

from recnb.data.images import faults
from recnb.data.lists import ImageList, numbered_lines, read_list, save_dropped
from recnb.data.loaders import ImageLoader, over
from recnb.recipe.data import build_loader, build_transform, evaluation_places
from recnb.recipe.learner import pick_device
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.retrieval.exchange import arrow, write_parquet
from recnb.runs.folder import load_run
from recnb.storage import replacing
from recnb.training.evaluation import embed, fingerprint, views


def embed_list(source: Path, path: Path, out: Path, root: Path, size: int) -> None:
    """Write those of a list's shards that are this process's and not there yet.

    Args:
        source: a run folder, or the YAML file of a configuration.
        path: the list.
        out: the folder of the shards.
        root: the folder that the paths of the list start from.
        size: how many lines of the list a shard is for.

    Raises:
        ConfigError: The folder holds shards of another model, list or size.
        DataError: A line is not `path label [camera]`.
    """
    rank, world = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    cfg, model = opened(source)
    section = evaluation_places(cfg)[0]
    images = ImageList([], np.zeros(0, np.int64), transform=build_transform(cfg, f"{section}.dataset"))
    loader, key = build_loader(cfg, section, images), fingerprint(model, images)
    starts, lines = range(0, sum(1 for _ in numbered_lines(path)), size), numbered_lines(path)
    files = [out / f"{start:012d}-{start + size:012d}.parquet" for start in starts]
    for other in sorted({*out.glob("*.parquet")} - {*files}):
        raise ConfigError(f"{other}: is no shard of {path} by {size} lines; delete it, or choose another folder")
    todo = [number for number, file in enumerate(files) if number % world == rank and not file.is_file()]
    bar = tqdm(total=len(todo), desc="shards", disable=rank > 0)
    for number, file in enumerate(files):
        part = list(islice(lines, size))
        mark = {"model": key, "list": hashlib.sha256("".join(line for _, line in part).encode()).hexdigest()}
        if number in todo:
            images = read_list(str(root), str(path), "\t" if "\t" in part[0][1] else None, (2, 3), True, True, part)
            write(file, starts[number], replace(images, transform=loader.transform), model, loader, mark)
            bar.update()
        elif number % world == rank and any(note_of(file)[name] != value for name, value in mark.items()):
            raise ConfigError(f"{file}: is of another model or list; delete it, or choose another folder")
    if all(file.is_file() for file in files):
        dropped = [tuple(row) for file in files for row in note_of(file)["left_out"]]
        save_dropped(dropped, out / "left_out.csv")
        print(f"{out}: all {len(files)} files are there; {len(dropped):,} images are left out, in left_out.csv")


def opened(source: Path) -> tuple[dict, torch.nn.Module]:
    """Return the configuration and the model, on its device, of a run folder or of a YAML file."""
    run = load_run(source) if source.is_dir() else None
    cfg = run.cfg if run else load_config(source)
    if cfg["Global"]["device"] != "cpu" and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    return cfg, (run.model() if run else build_model(cfg)).eval().to(pick_device(cfg["Global"]["device"]))


def write(
    file: Path, start: int, images: ImageList, model: torch.nn.Module, loader: ImageLoader, mark: dict[str, str]
) -> None:
    """Write a shard, with what it leaves out in its metadata.

    Args:
        file: the shard.
        start: the number of its first image in the list.
        images: its images; those that cannot be read are taken out.
        model: makes the vectors.
        loader: loads images as these are to be loaded.
        mark: which model and lines the shard is of.
    """
    found = faults(images.paths)
    ids = np.delete(start + np.arange(len(images)), [*found])
    images.leave_out(found)
    if len(images):
        first = os.environ.get("RANK", "0") == "0"
        vectors = embed(model, over(loader, images, persistent_workers=False), progress=first)
    else:  # as many dimensions as others have
        black = loader.transform(torch.zeros(3, 64, 64, dtype=torch.uint8))[None]
        vectors = views(model, black.to(next(model.parameters()).device), False, (1.0,))[:0].detach().cpu()
    columns = {"path": images.paths, "label": [images.name(label) for label in images.labels.tolist()]}
    if images.cameras is not None:
        columns["camera"] = images.cameras.tolist()
    for left in file.parent.glob(f".{file.name}.*.part"):  # by a process that was killed
        left.unlink()
    with replacing(file) as part:
        write_parquet(
            part, ids, [vectors.numpy()], columns, mark["model"], json.dumps({**mark, "left_out": images.dropped})
        )


def note_of(file: Path) -> dict:
    """Return what a shard says of itself."""
    return json.loads(arrow()[1].read_schema(file).metadata[b"note"])
