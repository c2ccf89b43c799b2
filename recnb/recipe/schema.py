"""YAML in, a checked plain dict out: sections, names and arguments are verified before anything is built.

A section that names a part may have what the part's constructor takes (`parts`), any other section what `settings`
lists. What is wrong is a ConfigError of one sentence: the file and line, or the key, and what would mend it.
"""

import math
from collections.abc import Collection, Iterator
from itertools import chain
from pathlib import Path
from typing import Any

from recnb.recipe.reading import override, read_yaml, unshared
from recnb.recipe.settings import (
    DISTILLATION,
    EVALUATION,
    RECMODEL,
    SPLIT,
    STOP_LAYER,
    WITHOUT_EFFECT,
    Amp,
    Ema,
    Global,
    HeldOut,
    Ladder,
    Loader,
    Retention,
    defaults,
    hints,
)
from recnb.registry import ConfigError, Registry, check_known, check_values, entry, suggest

# What PaddleClas has and recnb has not, with the reason.
UNSUPPORTED = {
    "SSL": "semi-supervised training on unlabelled images (FixMatch, CCSSL) has no counterpart here",
    "UnLabelLoss": "semi-supervised training on unlabelled images (FixMatch, CCSSL) has no counterpart here",
    "IndexProcess": "it configures a tool that makes a classifier of a gallery; recnb.retrieval.Index is built instead",
    "Global.train_mode": "other training loops (metabin, fixmatch, fixmatch_ccssl, progressive) have no counterpart "
    "here; the default loop is the only one",
}
LISTS = ("Eval", "Validation")  # evaluated with a query and a gallery list or, in classification, with one list
LOADERS = ("Train", *(f"{part}{each}" for part in LISTS for each in (".Query", ".Gallery", "")))
FILLED = {"Global": Global, "AMP": Amp, "EMA": Ema, "Ladder": Ladder, "Retention": Retention}  # with their defaults
SECTIONS = (*FILLED, "DataLoader", "Arch", "Loss", "Metric", "PostProcess", "Slim", "Infer")
KEYS: dict[str, dict[str, Any]] = {  # what the sections that are not constructor calls may say
    "": {**dict.fromkeys(SECTIONS, Any), "Optimizer": dict | list},
    **{where: hints(kind) for where, kind in FILLED.items()},
    "Global": hints(Global) | WITHOUT_EFFECT,
    "DataLoader": dict.fromkeys(("Train", *LISTS), Any),
    "DataLoader.Eval": EVALUATION,
    "DataLoader.Validation": EVALUATION | hints(HeldOut),
    **{f"DataLoader.{part}": SPLIT for part in LOADERS if part not in LISTS},
    **{f"DataLoader.{part}.loader": hints(Loader) for part in LOADERS},
    "Loss": dict.fromkeys(("Train", "Eval"), Any),
    "Metric": dict.fromkeys(("Train", "Eval"), Any),
}
REQUIRED = ("DataLoader.Train.dataset", "Arch", "Loss.Train", "Optimizer")


def load_config(path: str | Path, overrides: dict | None = None, parts: bool = True) -> dict:
    """Return the checked configuration of a YAML file, a plain dict with the defaults of FILLED.

    Args:
        path: The file.
        overrides: Dotted keys with values to use instead, e.g. `{"Global.epochs": 2,
            "Loss.Train.SupConLoss.weight": 0.5}`.
        parts: False: the named parts are not looked at, which takes torch and timm.

    Raises:
        ConfigError: The file or an override cannot be meant; the message names the file and line, or the key. Nothing
            has been built and no image has been read by then.
    """
    cfg, overrides = unshared(read_yaml(path)), overrides or {}
    if not isinstance(overrides, dict):
        raise ConfigError(f"overrides: {overrides!r} is a {type(overrides).__name__}, not a mapping of dotted keys")
    check_keys(cfg, "", KEYS[""])
    fill(cfg)
    for key in sorted(overrides, key=lambda key: str(key).partition(".")[0] != "Global"):  # whose recipe adds Ladder
        try:
            override(cfg, key, unshared(overrides[key]))
        except RecursionError:
            raise ConfigError(f"override '{key}': its value contains itself, or is too deeply nested") from None
        fill(cfg)
    fill_loaders(cfg)
    if parts:
        fill_normalisation(cfg)
    check(cfg, parts)
    return cfg


def fill(cfg: dict) -> None:
    """Add, in place, what sections leave out: to Global always, to the others of FILLED where the file has them.

    A configuration with a recipe has the section Ladder.
    """
    for where, kind in FILLED.items():
        given = cfg.get(where)
        if given is None and where != "Global" and not (where == "Ladder" and cfg["Global"]["recipe"]):
            continue
        check_keys(given or {}, where, KEYS[where])
        mode = {"eval_mode": "classification"} if kind is Global and lookup(cfg, "DataLoader.Eval.dataset") else {}
        cfg[where] = {**defaults(kind), **mode, **(given or {})}
    if lookup(cfg, "DataLoader.Validation.share") is not None:
        cfg["DataLoader"]["Validation"].setdefault("seed", HeldOut.seed)


def fill_loaders(cfg: dict) -> None:
    """Name the sampler where a file does not, and let a query or gallery list that stands alone be both, in place."""
    for section in (lookup(cfg, f"DataLoader.{part}.sampler") for part in LOADERS):
        if isinstance(section, dict):
            section.setdefault("name", "DistributedBatchSampler")
    for lists in (lookup(cfg, f"DataLoader.{part}") for part in LISTS):
        if not isinstance(lists, dict) or cfg["Global"]["eval_mode"] != "retrieval":
            continue
        for one, other in (("Query", "Gallery"), ("Gallery", "Query")):
            if lists.get(other) and not lists.get(one):
                lists[one] = unshared(lists[other])


def fill_normalisation(cfg: dict) -> None:
    """Replace `auto: True` of each NormalizeImage by the mean and std of the first backbone's pretrained weights."""
    lists = (items(cfg, f"DataLoader.{part}.dataset.transform_ops") for part in LOADERS)
    for place, name, args in chain.from_iterable(lists):
        if name != "NormalizeImage" or args.get("auto") is not True:
            continue
        for key in (key for key in ("mean", "std", "scale") if args.get(key) is not None):
            raise ConfigError(f"{place}.{key}: comes from the backbone with auto: True; keep one")
        from recnb.models.backbones import pretrained_images  # imports timm

        del args["auto"]
        backbone = lookup(architectures(cfg)[0][1], "Backbone.name")
        if facts := pretrained_images(backbone) if isinstance(backbone, str) else None:
            args |= {key: list(facts[key]) for key in ("mean", "std")}  # otherwise ImageNet's, the default


def check_keys(section, where: str, known: Collection[str]) -> None:
    """Raise ConfigError unless a section is a mapping with known keys only.

    Args:
        section: The section.
        where: Its place in the file.
        known: The keys that it may have.
    """
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: holds {section!r}, not a mapping of {', '.join(known)}")
    for key in section:
        place = f"{where}.{key}".lstrip(".")
        if place in UNSUPPORTED:
            raise ConfigError(f"{place}: {UNSUPPORTED[place]}")
        if key not in known:
            raise ConfigError(f"{place}: there is no such key; {suggest(key, known)}")


def check_section(section, where: str, known: dict[str, Any]) -> None:
    """Raise ConfigError unless a section is a mapping with known keys only, each with a value of its type.

    Args:
        section: The section.
        where: Its place in the file.
        known: The keys that it may have, with the types of their values.
    """
    check_keys(section, where, known)
    check_values(section, known, where)


def check_numbers(node, where: str = "") -> None:
    """Raise ConfigError for a number that is not finite or does not fit 64 bits."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ():
        place = f"{where}.{key}".lstrip(".")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{place}: {value} is not a finite number")
        if isinstance(value, int) and abs(value) >= 2**63:
            raise ConfigError(f"{place}: the number is too large; the most is {2**63 - 1}")
        check_numbers(value, place)


def check(cfg: dict, parts: bool = True) -> None:
    """Raise ConfigError for the first section, name, argument or value that cannot be used; `parts` as above."""
    check_numbers(cfg)
    for where in KEYS:
        section = lookup(cfg, where) if where else cfg
        if section is not None:
            check_section(section, where, KEYS[where])
    shape = cfg["Global"]["image_shape"]
    if len(shape) != 3 or shape[0] != 3:
        raise ConfigError(f"Global.image_shape: {shape} is not [3, height, width]; images are read in RGB")
    for where in (place for place in REQUIRED if not lookup(cfg, place)):
        raise ConfigError(f"{where}: the file has no such section, and nothing can be trained without it")
    for where, section in architectures(cfg):
        check_arch(section, where)
    check_retention(cfg)
    class_num(cfg)  # raises where there are two
    check_evaluation(cfg)
    check_validation(cfg)
    for where, section in optimizers(cfg):
        if not section.get("lr"):
            raise ConfigError(f"{where}.lr: the file has no such section, and nothing can be trained without it")
    for where, section, registry in named_sections(cfg) if parts else ():
        registry.check(section, where)
        if getattr(registry[section["name"]], "needs_logits", False):
            check_logits(cfg, where, section["name"])


def check_retention(cfg: dict) -> None:
    """Raise ConfigError where Retention asks to imprint a head without exactly one cosine weight for each class."""
    if not lookup(cfg, "Retention.imprint"):
        return
    for place, arch in architectures(cfg):
        head = arch["Head"] if isinstance(arch.get("Head"), dict) else {}
        plain = head and not head.get("sharded") and head.get("sub_centers", 1) == 1
        if not (plain and head.get("name") != "FC"):
            raise ConfigError(f"Retention.imprint: needs {place}.Head with one cosine weight per class, not sharded")
        if arch.get("Neck") and arch.get("head_feature_from", "neck") == "backbone":
            raise ConfigError(f"Retention.imprint: needs {place}.head_feature_from: neck, the embedding")


def check_arch(section: dict, where: str) -> None:
    """Raise ConfigError for a key or value that a model's section cannot have; registries check the parts."""
    check_section(section, where, RECMODEL)
    check_known([section.get("name", "RecModel")], ("RecModel", "DistillationModel"), f"{where}.name", "model")
    check_section(section.get("BackboneStopLayer") or {}, f"{where}.BackboneStopLayer", STOP_LAYER)
    if not lookup(section, "Backbone.name"):
        raise ConfigError(f"{where}.Backbone.name: the file has no such section, and nothing can be trained without it")
    # the network's constructor checks the rest
    check_values(section["Backbone"], {"name": str, "pretrained": bool | str | None}, f"{where}.Backbone")


def adds_softmax(section: dict) -> bool:
    """Return whether a model's section asks for a softmax in the export; the text 'false' means no."""
    return str(section.get("infer_add_softmax", False)).lower() == "true"


def check_logits(cfg: dict, where: str, name: str) -> None:
    """Raise ConfigError where a part needs logits and a model has no head, or has them of some classes only.

    Args:
        cfg: The configuration.
        where: The place of the part.
        name: The part.
    """
    for place, section in architectures(cfg):
        if not section.get("Head"):
            raise ConfigError(f"{where}: {name} needs logits, and {place}.Head, which makes them, is missing")
        partial = section["Head"].get("sample_rate", 1) < 1 or section["Head"].get("sharded")
        if partial and name != "CELoss":
            raise ConfigError(
                f"{where}: {name} needs the logits of all classes, and {place}.Head has those of some "
                "(sample_rate, sharded); only CELoss takes these"
            )


def class_num(cfg: dict) -> tuple[str, int | None]:
    """Return the place and the number of training identities that the file gives, or Global's place and None.

    Raise ConfigError where it gives two different numbers.
    """
    heads = [(f"{where}.Head.class_num", lookup(section, "Head.class_num")) for where, section in architectures(cfg)]
    given = [pair for pair in [("Global.class_num", cfg["Global"]["class_num"]), *heads] if pair[1]]
    for place, number in given:
        if number != given[0][1]:
            raise ConfigError(
                f"{given[0][0]} is {given[0][1]}, but {place} is {number}: both count the training identities, so give "
                "the same number or leave one of them out"
            )
    return given[-1] if given else ("Global.class_num", None)


def check_evaluation(cfg: dict) -> None:
    """Raise ConfigError where evaluation lists are missing, or belong to another mode."""
    mode, wanted = cfg["Global"]["eval_mode"], cfg["Global"]["eval_during_train"]
    single = mode == "classification"
    for part in LISTS:
        lists = lookup(cfg, f"DataLoader.{part}") or {}
        for key in (key for key in lists if key in KEYS["DataLoader.Eval"] and (key in ("Query", "Gallery")) == single):
            raise ConfigError(
                f"DataLoader.{part}.{key}: does not belong to Global.eval_mode {mode}, "
                f"which is evaluated with DataLoader.{part}.{'dataset' if single else 'Query and .Gallery'}"
            )
    lists, needed = lookup(cfg, "DataLoader.Eval") or {}, "dataset" if single else "Query"
    if not lists.get(needed) and (wanted or lists):
        both = (
            "retrieval is evaluated with DataLoader.Eval.Query and DataLoader.Eval.Gallery (one alone serves as both): "
        )
        raise ConfigError(
            f"DataLoader.Eval.{needed}: there is no such section; {'' if single else both}add it, or leave "
            "DataLoader.Eval out and set Global.eval_during_train: False"
        )


def check_validation(cfg: dict) -> None:
    """Raise ConfigError where DataLoader.Validation gives no images, or a share that cannot be held out."""
    where, section = "DataLoader.Validation", lookup(cfg, "DataLoader.Validation")
    single = cfg["Global"]["eval_mode"] == "classification"
    if section is None or (section.get("dataset" if single else "Query") and "share" not in section):
        return
    if single:
        raise ConfigError(f"{where}: classification is validated with a list of its own; add {where}.dataset")
    for key in (key for key in section if key not in ("share", "seed")):
        raise ConfigError(f"{where}.{key}: with a share, the images are those of training; keep one of the two")
    if section.get("share") is None:
        raise ConfigError(
            f"{where}: has no images; give a share of the training identities, such as 'share: 0.15', or the lists "
            f"{where}.Query and {where}.Gallery"
        )
    if not lookup(cfg, "DataLoader.Eval.Query"):
        raise ConfigError(
            f"{where}.share: its images are read as those of DataLoader.Eval.Query, and there is no such section; add "
            f"it, or give the lists {where}.Query and {where}.Gallery"
        )


def lookup(cfg: dict, where: str):
    """Return the value at a dotted place of a configuration, or None."""
    node: Any = cfg
    for step in where.split("."):
        node = node.get(step) if isinstance(node, dict) else None
    return node


def items(cfg: dict, where: str, named: bool = False) -> list[tuple[str, str, dict]]:
    """Return the entries of a list of `{Name: arguments}`, each as (place, name, arguments).

    Args:
        cfg: The configuration.
        where: The dotted place of the list; without one there are no entries.
        named: Whether arguments may have a 'name' too.
    """
    section = lookup(cfg, where) or []
    if not isinstance(section, list):
        raise ConfigError(f"{where}: must be a list of '- Name: {{arguments}}' entries")
    return [entry(item, f"{where}.{i}", named) for i, item in enumerate(section)]


def architectures(cfg: dict) -> list[tuple[str, dict]]:
    """Return (place, section) of every model of a configuration: Arch, or those that Arch.models lists."""
    section = lookup(cfg, "Arch") or {}
    if not isinstance(section, dict) or section.get("name") != "DistillationModel":
        return [("Arch", section)]
    check_section(section, "Arch", DISTILLATION)
    models = [(place, args) for place, _, args in items(cfg, "Arch.models", named=True)]
    if not models:
        raise ConfigError("Arch.models: DistillationModel needs a list of '- Name: {a RecModel}'")
    return models


def optimizers(cfg: dict) -> list[tuple[str, dict]]:
    """Return (place, section with its name) of each optimizer: Optimizer, or the entries of its list."""
    section = cfg.get("Optimizer")
    if isinstance(section, list):
        return [(place, {"name": name, **args}) for place, name, args in items(cfg, "Optimizer")]
    return [("Optimizer", section)] if isinstance(section, dict) else []


def named_sections(cfg: dict) -> Iterator[tuple[str, dict, Registry]]:
    """Yield every (place, section, registry) of a configuration whose section picks a part by name."""
    from recnb.recipe.parts import SLOTS  # imports torch, which a message about a mistyped key need not wait for

    roots = {"Arch": architectures(cfg), "Optimizer": optimizers(cfg)}
    for slot, registry in SLOTS.items():
        for loader in LOADERS if "*" in slot else ("",):
            first, _, rest = slot.replace("*", loader).removesuffix("[]").partition(".")
            for root, section in roots.get(first, [(first, cfg.get(first) or {})]):
                where = f"{root}.{rest}" if rest else root
                found = lookup(section, rest) if rest else section
                if slot.endswith("[]"):
                    yield from ((place, {"name": name, **args}, registry) for place, name, args in items(cfg, where))
                elif found is not None:
                    yield where, found, registry
