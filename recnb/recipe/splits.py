"""Hold out training identities to choose by, as list files, so that every choice can be looked at and repeated."""

import copy
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from recnb.data.lists import ImageList
from recnb.recipe.data import build_loaders
from recnb.recipe.schema import lookup
from recnb.registry import ConfigError
from recnb.storage import resolve, write_text

FEWEST = 4  # validation identities; with fewer nothing can be chosen
ENOUGH = 10  # identities in Validation lists that are used as they are
SHARE = 0.25  # of many identities
MANY = 40  # identities; from here on SHARE of them is held out once, not in folds


@dataclass
class Split:
    """The data set sections of images to train on, and of images of other identities to choose by.

    `identities` says how many there are to train on.
    """

    train: dict
    query: dict
    gallery: dict
    identities: int


def split_lists(cfg: dict, folder: Path) -> list[Split]:
    """Return the splits of the training identities: the Validation lists, or a share of them, or folds.

    Validation lists of fewer than ENOUGH identities are too small for a choice. Their images join the training list,
    and identities are held out of both in turn.

    Args:
        cfg: The configuration of a ladder.
        folder: Where the lists are written.

    Raises:
        ConfigError: There are too few identities with two images to choose by.
    """
    section = lookup(cfg, "DataLoader.Validation") or {}
    tables = [training_table(cfg), *held_tables(cfg)]
    if len({table.name(label) for table in tables[1:] for label in table.labels}) >= ENOUGH:
        given = (cfg["DataLoader"]["Train"], section["Query"], section["Gallery"])
        train, query, gallery = ({k: v for k, v in part["dataset"].items() if k != "transform_ops"} for part in given)
        return [Split(train, query, gallery, len(np.unique(tables[0].labels)))]
    names = [np.array([table.name(label) for label in table.labels]) for table in tables]
    found, counts = np.unique(np.concatenate(names), return_counts=True)
    able = found[counts > 1]
    if len(able) < 2 * FEWEST:
        raise ConfigError(
            f"Global.recipe: a ladder needs {2 * FEWEST} identities with two images, to train on some and choose by "
            f"others, and there are {len(able)}; take more, or leave recipe out"
        )
    order, share = np.random.default_rng(section.get("seed", 0)).permutation(able), section.get("share") or SHARE
    folds = cfg["Ladder"]["folds"] or (1 if section.get("share") or len(able) >= MANY else 4)
    once = [order[: max(FEWEST, round(share * len(able)))]]
    parts = once if folds == 1 else np.array_split(order, min(folds, len(able) // 2))
    splits = []
    for number, held in enumerate(parts):
        inside = [np.isin(own, held) for own in names]
        train, validation = (
            write_list(folder / f"{name}-{number}.txt", *zip(tables, map(np.flatnonzero, rows), strict=True))
            for name, rows in (("train", [~rows for rows in inside]), ("validation", inside))
        )
        splits.append(Split(train, validation, validation, len(found) - len(held)))
    return splits


def held_tables(cfg: dict) -> list[ImageList]:
    """Return the tables of the Validation lists, each once."""
    held = build_loaders(cfg).validation if lookup(cfg, "DataLoader.Validation.Query") else None
    if held is None:
        return []
    return [*{id(part.dataset): part.dataset for part in (held.query, held.gallery)}.values()]


def training_table(cfg: dict) -> ImageList:
    """Return the table of all training images, including those that Validation.share would hold out."""
    return build_loaders(unjudged(cfg)).train.dataset


def whole_list(cfg: dict, folder: Path) -> dict:
    """Return the data set section of all training images, including those held out."""
    tables = [training_table(cfg), *held_tables(cfg)]
    return write_list(folder / "all.txt", *((table, np.arange(len(table))) for table in tables))


def write_list(path: Path, *parts: tuple[ImageList, np.ndarray]) -> dict:
    """Write rows of tables as one list file, each image once, and return its data set section.

    Args:
        path: The file.
        parts: Tables with the indices of their rows.
    """
    if any(images.boxes is not None for images, _ in parts):
        raise ConfigError("Global.recipe: a ladder cannot hold out images with boxes; give DataLoader.Validation lists")
    root = Path(parts[0][0].paths[0]).absolute().anchor
    lines: dict[str, None] = {}
    for images, rows in parts:
        for i in rows.tolist():
            cells = [str(Path(images.paths[i]).absolute().relative_to(root)), images.name(images.labels[i])]
            cells += [] if images.cameras is None else [str(images.cameras[i])]
            lines["\t".join(cells)] = None
    write_text(path, "\n".join(lines) + "\n")
    section = {"name": "VeriWild", "image_root": root, "cls_label_path": str(resolve(path))}
    return section | {"delimiter": "\t", "names": True}


def unjudged(cfg: dict) -> dict:
    """Return the configuration without Eval and Validation lists."""
    cfg = copy.deepcopy(cfg)
    for part in ("Eval", "Validation"):
        cfg["DataLoader"].pop(part, None)
    cfg["Global"]["eval_during_train"] = False
    return cfg
