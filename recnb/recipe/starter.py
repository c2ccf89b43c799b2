"""Which recipe to begin with for images that were just prepared, and the configuration that it becomes.

The recipes are the files of configs/starters. One is chosen by the weights that can be had and by how many images and
identities there are; sizes, batches, epochs and learning rates follow from the same numbers.
"""

import copy
import re
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import pandas as pd
import torch
from torch import nn

from recnb.data.images import DataError
from recnb.data.lists import as_csv
from recnb.data.prepare import SPLITS, Options, list_files, write_files
from recnb.models.backbones import create_backbone, hub_weights, list_backbones
from recnb.recipe.ladder import largest_batch
from recnb.recipe.reading import as_yaml
from recnb.recipe.schema import items, load_config, lookup, optimizers
from recnb.recipe.settings import GLOBAL
from recnb.registry import ConfigError
from recnb.storage import ROOT, from_root, resolve

FOLDER = "configs/starters"
BACKBONE = "mobilenetv2_100"  # small enough for a CPU
BATCH = 64  # images, which the recipes' learning rates are meant for
FEW = {"images": 100, "identities": 8, "each": 3}  # below these, fine-tuning learns the photos by heart
MANY = 20_000  # images, more than a CPU fine-tunes on in an evening
PADDED = "_imagenetnorm"  # files with this in their names were made by TensorFlow, which pads as pad_type 'same' does
STEPS = {"scratch_small": (600, 10, 60), "finetune_cnn": (240, 3, 20), "probe": (300, 5, 30)}  # steps; epochs from, to
ANSWERS = "weights is True (from the hub), a FILE (its name, or backbone, says whose), or False (none, from scratch)"


@dataclass(frozen=True)
class Facts:
    """What a choice goes by: the images to train on."""

    images: int
    identities: int
    each: int  # images an identity, the median
    side: int  # pixels of the shorter side, the median
    gpu: bool


@dataclass(frozen=True)
class Start:
    """A configuration to begin with: the recipe's name, why it was chosen, and the values."""

    name: str
    why: str
    cfg: dict


def facts(splits: pd.DataFrame, prints: pd.DataFrame) -> Facts:
    """Return the facts about the training images of `splits`, their sizes by path in `prints`.

    Raise DataError where there is but one identity to train or to test on.
    """
    train, tested = splits[splits["split"] == "train"], splits[splits["split"].isin(("query", "gallery"))]
    counts = train.label.value_counts()
    for what, number in (("train", len(counts)), ("test", tested.label.nunique())):
        if number < 2:
            raise DataError(
                f"there is one identity to {what} on, and it takes two to tell one from the other; add more identities"
            )
    sides = prints.loc[train.path, ["width", "height"]].min(axis=1)
    return Facts(len(train), len(counts), int(counts.median()), int(sides.median()), torch.cuda.is_available())


def choose(seen: Facts, options: Options, config: str | Path = "auto") -> Start:
    """Return the configuration to begin with, without lists.

    Args:
        seen: what there is to train on.
        options: its weights, backbone, epochs and image_size, where they are given.
        config: `auto` for one of the recipes, or a configuration to take instead.

    Raises:
        ConfigError: Weights that were asked for cannot be had, or a file of them does not say whose they are.
    """
    if config == "auto":
        backbone, source = pretrained(options)
        name, reason = recipe(seen, backbone)
        path: str | Path = f"{FOLDER}/{name}.yaml"
        why = f"{reason}; {source}"
    else:
        backbone = pretrained(options)[0] if options.weights or options.backbone else None
        name, path, why = Path(config).stem, config, "as you named it"
    if options.backbone and not backbone:
        backbone = {"name": options.backbone, "pretrained": False}
    cfg = load_config(path, {"Arch.Backbone": backbone} if backbone else None)
    fit(cfg, seen, options, *STEPS.get(name, (None, None, None)))
    counted = f"{seen.images:,} images of {seen.identities:,} identities to train on"
    return Start(name, f"{name}, with {counted}: {why}", cfg)


def recipe(seen: Facts, backbone: dict | None) -> tuple[str, str]:
    """Return the name of the recipe for some images, and why it is this one."""
    if backbone is None:
        return "scratch_small", "without pretrained weights a small network is trained from scratch"
    for key, least in FEW.items():
        if getattr(seen, key) < least:
            what = {"each": "images of an identity"}.get(key, key)
            return "probe", f"{getattr(seen, key)} {what} are too few to fine-tune on, so the backbone stays as it is"
    if seen.images > MANY and not seen.gpu:
        return "probe", "without a GPU, so many images are trained on in reasonable time if the backbone stays as it is"
    model = create_backbone(**{**backbone, "pretrained": False})
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return "probe", f"{backbone['name']} is no network of the kind that finetune_cnn is for, so it stays as it is"
    return "finetune_cnn", "enough to fine-tune gently"


def pretrained(options: Options) -> tuple[dict | None, str]:
    """Return the section of the pretrained backbone, None where there is none, and a half sentence that says which.

    Raise ConfigError where weights were asked for that cannot be had.
    """
    if options.weights is False:
        return None, "weights is False"
    if isinstance(options.weights, str):
        path = resolve(options.weights)
        if not path.is_file():
            raise ConfigError(f"options: there is no weights file {path}; {ANSWERS}")
        return section_of(path, options.backbone), f"the weights are those of {path.name}"
    name = options.backbone or BACKBONE
    for path in sorted((ROOT / "weights").glob("*.*")) if options.weights is None else ():
        if backbone_of(path) == name:
            return section_of(path, name), f"the weights are those of {from_root(path)}"
    try:
        create_backbone(name, pretrained=True)
    except ValueError as error:
        missing = f"the hub cannot be reached for the weights of {name} ({hub_weights(name) or 'it has none'})"
        if options.weights:
            raise ConfigError(f"options: {missing}; fetch that file elsewhere and name it, for {ANSWERS}") from error
        return None, f"{missing}, and no file in weights/ is one; with {ANSWERS}, features would be far better"
    return {"name": name, "pretrained": True}, f"the weights of {name} are the hub's"


def section_of(path: Path, name: str | None) -> dict:
    """Return the section of a backbone with the weights of a file; raise ConfigError where nothing says whose."""
    name = name or backbone_of(path)
    if name is None:
        raise ConfigError(f"options: the name of {path.name} begins with no backbone's; write backbone, too")
    padding = {"pad_type": "same"} if PADDED in path.name else {}
    return {"name": name, "pretrained": from_root(path), **padding}


def backbone_of(path: Path) -> str | None:
    """Return the backbone whose name a weights file's begins with, the longest where several fit, or None."""
    return max((name for name in list_backbones() if path.name.startswith(name)), key=len, default=None)


def fit(cfg: dict, seen: Facts, options: Options, steps: int | None, least: int | None, most: int | None) -> None:
    """Make sizes, batches, epochs and rates of a configuration, in place, follow from what there is to train on.

    Args:
        cfg: the configuration.
        seen: what there is to train on.
        options: epochs and image_size, where they are given.
        steps: how many steps to train for in all; None leaves the epochs and rates of the file.
        least: how many epochs at least.
        most: how many epochs at most.
    """
    sampler = lookup(cfg, "DataLoader.Train.sampler")
    if steps and seen.each < sampler.get("sample_per_id", 0):
        sampler["sample_per_id"] = 2  # an identity with fewer images would see one of them several times in a batch
    sampler["batch_size"] = largest_batch(sampler, seen.identities, sampler["batch_size"])
    if options.image_size or steps:
        own = cfg["Global"]["image_shape"][-1]
        resize(
            cfg, options.image_size or max(32, min(own * (2 if seen.gpu and own < 128 else 1), seen.side // 32 * 32))
        )
    if steps:
        once = max(1, seen.images // sampler["batch_size"])
        cfg["Global"]["epochs"] = min(most, max(least, round(steps / once)))
    cfg["Global"]["epochs"] = options.epochs or cfg["Global"]["epochs"]
    epochs = cfg["Global"]["epochs"]
    if steps:
        cfg["Global"]["eval_interval"] = max(1, epochs // 5)
        for _, section in optimizers(cfg):
            section["lr"]["learning_rate"] = round(
                section["lr"]["learning_rate"] * (sampler["batch_size"] / BATCH) ** 0.5, 6
            )
    for _, section in optimizers(cfg):
        if section["lr"].get("warmup_epoch", 0) >= epochs:
            section["lr"]["warmup_epoch"] = 0


def resize(cfg: dict, side: int) -> None:
    """Let a configuration, in place, work on squares of `side` pixels: every size that is its image_shape's."""
    old = cfg["Global"]["image_shape"][-1]
    cfg["Global"]["image_shape"] = [3, side, side]
    for place in ("Train", "Eval.Query", "Eval.Gallery", "Eval"):
        for _, _, arguments in items(cfg, f"DataLoader.{place}.dataset.transform_ops"):
            for key in ("size", "resize_short"):
                if arguments.get(key) == old:
                    arguments[key] = side


def with_lists(cfg: dict, folder: str | Path, image_root: str | Path, files: Mapping[str, str]) -> dict:
    """Return a configuration with other lists; the number of classes is left to them.

    Args:
        cfg: the configuration; a validation list is judged as its test lists are.
        folder: where the lists lie.
        image_root: what their paths start from.
        files: their texts by name, as `prepare.list_files` gives them.

    Raises:
        ConfigError: The configuration has no section for a list.
    """
    cfg = copy.deepcopy(cfg)
    cfg["DataLoader"].pop("Validation", None)
    if "validation.txt" in files:
        cfg["DataLoader"]["Validation"] = {"Query": copy.deepcopy(lookup(cfg, "DataLoader.Eval.Query"))}
    for name, place in SPLITS.items():
        section, file = lookup(cfg, f"DataLoader.{place}"), f"{name}.txt"
        if section is None and name == "validation":
            continue
        if section is None:
            raise ConfigError(f"there is no DataLoader.{place}; take a configuration that trains and evaluates")
        section["dataset"] = {
            "name": "VeriWild",
            "image_root": from_root(resolve(image_root)),
            "cls_label_path": from_root(resolve(folder) / file),
            "delimiter": "\t",
            "names": True,
            **({"allow_outside": True} if re.search(r"^\.\./", files[file], re.MULTILINE) else {}),
            **{key: value for key, value in section["dataset"].items() if key == "transform_ops"},
        }
    cfg["Global"]["class_num"] = None
    (lookup(cfg, "Arch.Head") or {}).pop("class_num", None)
    cfg["Global"] = {key: value for key, value in cfg["Global"].items() if value != GLOBAL.get(key)}
    return cfg


def write(
    folder: str | Path,
    start: Start,
    splits: pd.DataFrame,
    image_root: str | Path | None = None,
    tables: Mapping[str, pd.DataFrame] | None = None,
) -> Path:
    """Write lists, config.yaml and tables into a folder, all or nothing, and return the path of config.yaml.

    Args:
        folder: where to write.
        start: the configuration to begin with.
        splits: the images with their `split` and `source`.
        image_root: what paths in the lists start from, by default the deepest folder that they share.
        tables: further CSV files, by name.
    """
    root, files = list_files(splits, image_root)
    cfg = with_lists(start.cfg, folder, root, files)
    more = {f"{name}.csv": as_csv(table) for name, table in (tables or {}).items()}
    said = textwrap.fill(start.why, 100, initial_indent="# ", subsequent_indent="# ")
    made = resolve(folder) / "config.yaml"
    earlier = made.read_text(encoding="utf-8") if made.is_file() else ""
    write_files(folder, {**files, **more, made.name: f"{said}\n{as_yaml(cfg)}"})
    if "validation.txt" not in files and "/validation.txt" in earlier:  # another may be the user's own
        made.with_name("validation.txt").unlink(missing_ok=True)
    load_config(made)
    return made


def run_folder(out_dir: str | Path) -> str:
    """Return the run folder that belongs to a folder of lists: the one around it, or one of its name in runs/."""
    folder = Path(from_root(resolve(out_dir)))
    inside = folder.parts[:1] == ("runs",) and len(folder.parts) > 2
    return folder.parent.as_posix() if inside else f"runs/{folder.name}"
