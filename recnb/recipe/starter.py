"""A configuration to start from, written for lists that were just prepared."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np

from recnb.data.prepare import SPLITS, plain
from recnb.recipe.data import training_images
from recnb.recipe.reading import as_yaml
from recnb.recipe.schema import GLOBAL, load_config, lookup
from recnb.registry import ConfigError
from recnb.storage import ROOT, resolve, write_text


def write_config(folder: str | Path, image_root: str | Path, base: str | Path = "configs/demo.yaml") -> Path:
    """The path of folder/config.yaml: the base configuration, but with the lists of `write_lists` in this folder.

    The number of classes is left to the list, and a batch has no more identities than there are to train on.
    """
    cfg, folder = load_config(base), resolve(folder)
    for name, place in SPLITS.items():
        section, file = lookup(cfg, f"DataLoader.{place}"), folder / f"{name}.txt"
        if section is None:
            raise ConfigError(f"{base}: there is no DataLoader.{place}; take a base that trains and evaluates")
        text = file.read_text(encoding="utf-8")
        tabs, outside = "\t" in text, re.search(r"^\.\./", text, re.MULTILINE)
        beside = {key: value for key, value in section["dataset"].items() if key == "transform_ops"}
        section["dataset"] = {
            "name": "ImageNetDataset" if tabs else "VeriWild",
            "image_root": portable(image_root),
            "cls_label_path": portable(file),
            **({"delimiter": "\t"} if tabs else {}),
            **({"allow_outside": True} if outside else {}),
            **beside,
        }
    cfg["Global"]["class_num"] = None
    (lookup(cfg, "Arch.Head") or {}).pop("class_num", None)
    sampler, identities = lookup(cfg, "DataLoader.Train.sampler"), len(np.unique(training_images(cfg).labels))
    each = sampler.get("sample_per_id", sampler.get("num_instances"))
    if each:
        sampler["batch_size"] = each * min(sampler["batch_size"] // each, identities)
    cfg["Global"] = {key: value for key, value in cfg["Global"].items() if value != GLOBAL.get(key)}
    write_text(folder / "config.yaml", f"# {Path(base).name} with the lists of this folder\n{as_yaml(cfg)}")
    load_config(folder / "config.yaml")
    return folder / "config.yaml"


def portable(path: str | Path) -> str:
    """The path as a config says it: from the project's root where it is below that, otherwise absolute."""
    path = Path(plain(resolve(path)))
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.as_posix()
