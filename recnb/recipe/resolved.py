"""What a run folder records of its configuration and files, and what may differ when the run is resumed."""

import copy
import hashlib
import os
import re
from collections.abc import Callable
from pathlib import Path
from zlib import crc32

from recnb.data.layouts import scan
from recnb.recipe.data import training_images
from recnb.recipe.parts import parts_in_use
from recnb.recipe.schema import LOADERS, architectures, class_num, fill, lookup, optimizers
from recnb.registry import ConfigError
from recnb.storage import from_root, resolve, sha256
from recnb.training.schedules import SCHEDULES

# What may differ between a checkpoint's configuration and the one that resumes it: none of it changes the numbers.
FREE = (
    *(
        f"Global.{key}"
        for key in (
            "checkpoints",
            "save_steps",
            "keep_checkpoints",
            "patience",
            "save_interval",
            "output_dir",
            "save_inference_dir",
            "pretrained_model",
            "pretrained_strict",
            "print_batch_step",
            "use_visualdl",
            "loggers",
            "on_nonfinite",
            "on_finding",
            "grad_checkpointing",
            "device",
            "devices",
            "fully_shard",
            "cache_images",
            "probe_cache",
            "accept_changes",
        )
    ),
    *(f"DataLoader.{part}.loader" for part in LOADERS),
    "Ladder.minutes",
)
PATHS = {
    **{f"DataLoader.{part}.dataset": ("image_root", "cls_label_path") for part in LOADERS},
    "Global": ("pretrained_model", "checkpoints", "cache_images", "probe_cache"),
}

KEPT: dict[str, type | tuple] = {
    "epoch": int,
    "batch": int,
    "history": list,
    "best": dict,
    "rng": (list, dict),
    "callbacks": dict,
}


def resolved(cfg: dict, classes: int | None = None) -> dict:
    """Return the configuration with what a run adds: `portable` paths, the number of classes, relabelling.

    Args:
        cfg: The checked configuration.
        classes: The number of training identities; where neither it nor the file says, their list is read.
    """
    cfg = copy.deepcopy(cfg)
    heads = [section["Head"] for _, section in architectures(cfg) if section.get("Head")]
    if heads and not class_num(cfg)[1]:
        classes = classes or training_images(cfg).classes
        for head in heads:
            head["class_num"] = classes
        cfg["DataLoader"]["Train"]["dataset"].setdefault("relabel", True)
    return portable(cfg)


def portable(cfg: dict) -> dict:
    """Return the configuration with each path relative to the project, or absolute where it is outside."""
    return with_paths(cfg, lambda path: path if "://" in path else from_root(resolve(path)))


def with_paths(cfg: dict, change: Callable[[str], str]) -> dict:
    """Return the configuration with each of its paths changed."""
    cfg = copy.deepcopy(cfg)
    backbones = [(section.get("Backbone") or {}, ("pretrained",)) for _, section in architectures(cfg)]
    for section, keys in [*((lookup(cfg, place) or {}, keys) for place, keys in PATHS.items()), *backbones]:
        section |= {k: change(section[k]) for k in keys if isinstance(section.get(k), str)}
    return cfg


def contents(cfg: dict) -> dict[str, dict]:
    """Return checksums of the files that a run depends on: their SHA-256 and, for a list, one of each line.

    The keys are places in the configuration with the files that they name, and parts.py for the user's own parts. A
    folder of folders counts as the list of its images.
    """
    found = {}
    for place in (f"DataLoader.{part}.dataset" for part in LOADERS):
        section = lookup(cfg, place) or {}
        path = section.get("cls_label_path")
        if path and resolve(path).is_file():  # of Market-1501 it is a folder below image_root
            lines, place = resolve(path).read_bytes().splitlines(), f"{place}.cls_label_path"
        elif path := section.get("image_root"):
            root, place = resolve(path), f"{place}.image_root"
            lines = [os.fsencode(os.path.relpath(file, root)) for file, _ in scan(root)[0]]
        if path:
            found[f"{place} {from_root(resolve(path))}"] = summed(lines)
    if own := parts_in_use():
        found["parts.py"] = summed(own.read_bytes().splitlines())
    weights = {
        f"{place}.Backbone.pretrained": lookup(part, "Backbone.pretrained") for place, part in architectures(cfg)
    }
    weights["Global.pretrained_model"] = cfg["Global"]["pretrained_model"]
    files = {place: resolve(path) for place, path in weights.items() if isinstance(path, str)}
    return found | {f"{k} {from_root(path)}": {"sha256": sha256(path)} for k, path in files.items() if path.is_file()}


def summed(lines: list[bytes]) -> dict[str, str]:
    """Return the SHA-256 of lines, and one after another a checksum of each."""
    return {
        "sha256": hashlib.sha256(b"\n".join(lines)).hexdigest(),
        "lines": "".join(f"{crc32(line):08x}" for line in lines),
    }


def check_kept(ours: dict, read: dict, state: dict, path: Path) -> None:
    """Raise ConfigError unless a run may be resumed from a checkpoint.

    Args:
        ours: The resolved configuration.
        read: Its `contents`.
        state: The checkpoint: KEPT, its `config` and `contents`, and more.
        path: The checkpoint.
    """
    wrong = [name for name, kind in KEPT.items() if not isinstance(state.get(name), kind)]
    wrong += [name for name in ("epoch", "batch") if not wrong and state[name] < 0]
    if wrong:
        raise ConfigError(f"{path}: its {wrong[0]} cannot be true; take an earlier one, or delete it to begin anew")
    check_same(ours, state["config"], path)
    check_contents(ours, read, state["contents"], path)


def check_contents(ours: dict, new: dict, old: dict, path: Path) -> None:
    """Raise ConfigError where lists, weights or parts have changed since a run began, unless the file accepts that.

    Args:
        ours: The resolved configuration.
        new: Its `contents`.
        old: The `contents` when the run began.
        path: The file that recorded these.
    """
    differences = [changed(place, old[place], new[place]) for place in new if place in old and new[place] != old[place]]
    if differences and not ours["Global"]["accept_changes"]:
        raise ConfigError(
            f"{path} belongs to other files ({'; '.join(differences)}); put them back, use another run folder, or set "
            "Global.accept_changes: True to go on with these"
        )


def changed(place: str, old: dict, new: dict) -> str:
    """Return in words how a file has changed.

    Args:
        place: Its key in `contents`.
        old: Its checksums when the run began.
        new: Its checksums now.
    """
    if "lines" not in new:
        return f"{place}: the weights have changed"
    before, after = (re.findall("." * 8, part["lines"]) for part in (old, new))
    first = next((i for i, pair in enumerate(zip(before, after, strict=False)) if pair[0] != pair[1]), None)
    line = min(len(before), len(after)) if first is None else first
    return f"{place}: {len(before)} lines then and {len(after)} now, line {line + 1} is the first that differs"


def check_same(ours: dict, theirs: dict, path: Path) -> None:
    """Raise ConfigError where a configuration differs from a checkpoint's in what changes the numbers.

    Args:
        ours: The resolved configuration.
        theirs: The checkpoint's; defaults that it lacks are added in place.
        path: The checkpoint.
    """
    fill(theirs)  # a key that did not exist then
    differences = compare(portable(theirs), portable(ours))
    bound = [
        section["lr"]["name"]
        for _, section in optimizers(ours)
        if "epochs" in SCHEDULES.parameters(section["lr"]["name"])
    ]
    longer = [text for text in differences if text.startswith("Global.epochs:")]
    if longer and not bound:  # a schedule that does not depend on the last epoch may go on
        differences.remove(longer[0])
    if differences:
        end = f" ({bound[0]} runs over Global.epochs: with others its rates would differ)" if longer and bound else ""
        raise ConfigError(
            f"{path} belongs to another configuration ({'; '.join(differences)}){end}; "
            "use another run folder (Global.pretrained_model takes the weights along), or delete this one to "
            "start again"
        )


def compare(old, new, where: str = "") -> list[str]:
    """Return the differences between two configurations that matter, each as `place: old -> new`.

    Args:
        old: One configuration, or what it has at `where`.
        new: The other, likewise.
        where: The dotted place.
    """
    if where in FREE:
        return []
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(k for k in new if k not in old)]
        return [text for k in keys for text in compare(old.get(k), new.get(k), f"{where}.{k}".lstrip("."))]
    return [] if old == new else [f"{where}: {old} -> {new}"]
