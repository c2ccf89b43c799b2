"""YAML in, a checked plain dict out: sections, names and arguments are all verified before anything is built.

What a section may say is what the registries of the chapters hold; what Global may say is listed here. Everything found
wrong is a ConfigError of one sentence: the file and line, or the key, and what would mend it.
"""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

from recnb.recipe.reading import override, read_yaml, unshared
from recnb.registry import ConfigError, Registry, entry, fits, suggest
from recnb.training.loggers import LOGGERS

# The keys of Global with their defaults; every other default lives in the signature of the part that it belongs to.
GLOBAL = {
    "checkpoints": None,
    "pretrained_model": None,
    "output_dir": None,
    "device": "auto",
    "class_num": None,
    "save_interval": 1,
    "eval_during_train": True,
    "eval_interval": 1,
    "epochs": 10,
    "print_batch_step": 10,
    "use_visualdl": False,
    "loggers": [],
    "image_shape": [3, 224, 224],
    "save_inference_dir": "./inference",
    "eval_mode": "retrieval",
    "seed": 0,
    "re_ranking": False,
    "start_eval_epoch": 0,
    "update_freq": 1,
    "iter_per_epoch": None,
    "devices": 1,
    "channels_last": False,
    "compile": False,
    "grad_cache": None,
    "grad_checkpointing": False,
    "save_steps": None,
    "keep_checkpoints": None,
    "patience": None,
    "cache_images": None,
    "on_nonfinite": "stop",
    "on_bad_image": "stop",
    "retrieval_feature_from": "features",
    "feature_normalize": True,
    "feature_binarize": None,
    "probe": None,  # with a number, so many views of each image are kept as the frozen backbone's features
    "probe_cache": "./cache/features",
}
# Keys of the original that change no result here: how it computes or logs.
WITHOUT_EFFECT = {
    "use_dali": bool,
    "to_static": bool,
    "sim_block_size": int,
    "print_mem_info": bool,
    "log_ranks": str,
    "infer_imgs": str,
    "warmup_iter": int,
    "use_multilabel": bool,
}
NULLABLE = {
    "checkpoints": str,
    "pretrained_model": str,
    "output_dir": str,
    "class_num": int,
    "iter_per_epoch": int,
    "feature_binarize": str,
    "save_steps": int,
    "keep_checkpoints": int,
    "patience": int,
    "cache_images": str,
    "grad_cache": int,
    "probe": int,
}
CHOICES = {
    "device": ("auto", "gpu", "cpu"),
    "on_nonfinite": ("stop", "skip"),
    "on_bad_image": ("stop", "drop"),
    "eval_mode": ("retrieval", "classification"),
    "feature_binarize": ("round", "sign"),
    "retrieval_feature_from": ("features", "neck", "backbone"),
}
LEAST = {
    "epochs": 0,
    "seed": 0,
    "eval_interval": 1,
    "print_batch_step": 1,
    "class_num": 1,
    "update_freq": 1,
    "iter_per_epoch": 1,
    "grad_cache": 1,
    "save_steps": 1,
    "keep_checkpoints": 1,
    "patience": 1,
    "probe": 1,
}
# What the original has and this has not, with the reason.
UNSUPPORTED = {
    "SSL": "semi-supervised training on unlabelled images (FixMatch, CCSSL) has no counterpart here",
    "UnLabelLoss": "semi-supervised training on unlabelled images (FixMatch, CCSSL) has no counterpart here",
    "IndexProcess": "it configures a tool that makes a classifier of a gallery; recnb.retrieval.Index is built instead",
    "Global.train_mode": "other training loops (metabin, fixmatch, fixmatch_ccssl, progressive) have no counterpart "
    "here; the default loop is the only one",
}
AMP = {
    "use_amp": True,
    "level": "O1",
    "dtype": None,
    "scale_loss": 1.0,
    "use_dynamic_loss_scaling": True,
    "use_fp16_test": False,
    "use_promote": False,
}
EMA = {"decay": 0.9999}
RETENTION = {"batch_norm": "trained", "thaw_epoch": 0, "pull": 0.0, "distill": 0.0, "imprint": False}
LOADER = {"num_workers": int, "use_shared_memory": bool, "prefetch_factor": int}  # torch always shares memory
ONE_LIST = ("dataset", "sampler", "loader")
LISTS = ("Eval", "Validation")  # judged: by a query and a gallery list or, in classification, by one list
LOADERS = ("Train", *(f"{part}{each}" for part in LISTS for each in (".Query", ".Gallery", "")))
KEYS = {  # the keys of the sections that are not constructor calls
    "the file": (
        "Global",
        "AMP",
        "EMA",
        "DataLoader",
        "Arch",
        "Loss",
        "Optimizer",
        "Metric",
        "PostProcess",
        "Slim",
        "Infer",
        "Retention",
    ),
    "Global": (*GLOBAL, *WITHOUT_EFFECT),
    "AMP": tuple(AMP),
    "EMA": tuple(EMA),
    "Retention": tuple(RETENTION),
    "DataLoader": ("Train", *LISTS),
    "DataLoader.Train": ONE_LIST,
    "DataLoader.Eval": ("Query", "Gallery", *ONE_LIST),
    "DataLoader.Validation": ("share", "seed", "Query", "Gallery", *ONE_LIST),
    **{f"DataLoader.{part}.{each}": ONE_LIST for part in LISTS for each in ("Query", "Gallery")},
    **{f"DataLoader.{part}.loader": tuple(LOADER) for part in LOADERS},
    "Loss": ("Train", "Eval"),
    "Metric": ("Train", "Eval"),
}
ARCH = (
    "name",
    "infer_output_key",
    "infer_add_softmax",
    "head_feature_from",
    "is_rec",
    "use_sync_bn",
    "freeze",
    "Backbone",
    "BackboneStopLayer",
    "Neck",
    "Head",
)
DISTILLATION = (
    "name",
    "infer_output_key",
    "infer_add_softmax",
    "is_rec",
    "use_sync_bn",
    "infer_model_name",
    "models",
    "freeze_params_list",
    "pretrained_list",
)
REQUIRED = ("DataLoader.Train.dataset", "Arch", "Loss.Train", "Optimizer")
PARTS = (
    "data.lists",
    "data.layouts",
    "data.transforms",
    "data.augment",
    "data.augmix",
    "data.samplers",
    "models.necks",
    "models.heads",
    "losses.combined",
    "losses.pairs",
    "losses.hashing",
    "losses.memories",
    "losses.distillation",
    "losses.pml",
    "training.optim",
    "training.schedules",
    "training.evaluation",
)


def load_config(path: str | Path, overrides: dict | None = None) -> dict:
    """The checked configuration of a YAML file, a plain dict with Global filled up with its defaults.

    `overrides` maps dotted keys to values, e.g. `{"Global.epochs": 2, "Loss.Train.SupConLoss.weight": 0.5}`.
    Raises ConfigError, with file, line or key, before anything is built or any image is read.
    """
    cfg, overrides = unshared(read_yaml(path)), overrides or {}
    if not isinstance(overrides, dict):
        raise ConfigError(f"overrides: {overrides!r} is a {type(overrides).__name__}, not a mapping of dotted keys")
    check_keys(cfg, "the file")
    fill_global(cfg)
    for key, value in overrides.items():
        try:
            override(cfg, key, unshared(value))
        except RecursionError:
            raise ConfigError(f"override '{key}': its value contains itself, or is too deeply nested") from None
    fill_global(cfg)
    fill_loaders(cfg)
    check(cfg)
    return cfg


def fill_global(cfg: dict) -> None:
    """Give Global, in place, every key that it leaves out."""
    given = {} if cfg.get("Global") is None else cfg["Global"]
    check_keys(given, "Global")
    mode = {"eval_mode": "classification"} if lookup(cfg, "DataLoader.Eval.dataset") else {}
    cfg["Global"] = {**unshared(GLOBAL), **mode, **given}


def fill_loaders(cfg: dict) -> None:
    """A sampler without a name is the plain one, and an evaluation list that stands alone is query and gallery."""
    for section in (lookup(cfg, f"DataLoader.{part}.sampler") for part in LOADERS):
        if isinstance(section, dict):
            section.setdefault("name", "DistributedBatchSampler")
    for lists in (lookup(cfg, f"DataLoader.{part}") for part in LISTS):
        if not isinstance(lists, dict) or cfg["Global"]["eval_mode"] != "retrieval":
            continue
        for one, other in (("Query", "Gallery"), ("Gallery", "Query")):
            if lists.get(other) and not lists.get(one):
                lists[one] = unshared(lists[other])


def check_keys(section, where: str, known: tuple[str, ...] | None = None) -> None:
    """Raise ConfigError where a section is no mapping, or has a key that is not among the known, those of KEYS."""
    if not isinstance(section, dict):
        raise ConfigError(f"{where}: holds {section!r}, not a mapping of {', '.join(known or KEYS[where])}")
    known = KEYS[where] if known is None else known
    for key in section:
        place = str(key) if where == "the file" else f"{where}.{key}"
        if place in UNSUPPORTED:
            raise ConfigError(f"{place}: {UNSUPPORTED[place]}")
        if key not in known:
            raise ConfigError(f"{place}: there is no such key; {suggest(key, known)}")


def check(cfg: dict) -> None:
    """Raise ConfigError for the first section, name, argument or value that cannot be meant."""
    for module in PARTS:  # their registries are what the names are checked against
        importlib.import_module(f"recnb.{module}")
    for where in KEYS:
        section = cfg if where == "the file" else lookup(cfg, where)
        if section is not None:
            check_keys(section, where)
    check_global(cfg["Global"])
    check_precision(cfg)
    check_retention(cfg)
    check_loaders(cfg)
    for where in (place for place in REQUIRED if not lookup(cfg, place)):
        raise ConfigError(f"{where}: the file has no such section, and nothing can be trained without it")
    for where, section in architectures(cfg):
        check_arch(section, where)
    check_class_num(cfg)
    check_evaluation(cfg)
    check_validation(cfg)
    for where, section in optimizers(cfg):
        if not section.get("lr"):
            raise ConfigError(f"{where}.lr: the file has no such section, and nothing can be trained without it")
    for where, section, registry in named_sections(cfg):
        registry.check(section, where)
        if getattr(registry[section["name"]], "needs_logits", False):
            check_logits(cfg, where, section["name"])


def check_global(section: dict) -> None:
    """Raise ConfigError for a value of Global of the wrong kind, or one that is not among the possible."""
    for key, value in section.items():
        if key == "devices":
            if value != "auto" and (not fits(value, int) or value < 1):
                raise ConfigError(f"Global.devices: {value!r} is neither a number of processes nor 'auto'")
            continue
        hint = NULLABLE[key] | None if key in NULLABLE else WITHOUT_EFFECT.get(key) or type(GLOBAL[key])
        if value is None and key in WITHOUT_EFFECT:
            continue
        if not fits(value, hint):
            wanted = inspect.formatannotation(hint)
            raise ConfigError(f"Global.{key}: {value!r} is a {type(value).__name__}, not {wanted}")
        if value is not None and value not in CHOICES.get(key, (value,)):
            raise ConfigError(f"Global.{key}: '{value}' is not supported; {suggest(value, CHOICES[key])}")
        if key in LEAST and value is not None and value < LEAST[key]:
            raise ConfigError(f"Global.{key}: {value} is too small; the least is {LEAST[key]}")
    for name in section["loggers"]:
        if name not in LOGGERS:
            raise ConfigError(f"Global.loggers: there is no logger '{name}'; {suggest(str(name), tuple(LOGGERS))}")
    shape = section["image_shape"]
    if len(shape) != 3 or shape[0] != 3 or not all(isinstance(n, int) and n > 0 for n in shape):
        raise ConfigError(f"Global.image_shape: {shape} is not [3, height, width]; images are read in RGB")


def check_precision(cfg: dict) -> None:
    """Raise ConfigError for a value of the sections AMP and EMA that cannot be meant."""
    amp, ema = cfg.get("AMP") or {}, cfg.get("EMA") or {}
    for key, value in amp.items():
        if key == "dtype" and value not in (None, "float16", "bfloat16"):
            raise ConfigError(f"AMP.dtype: '{value}' is neither float16 nor bfloat16")
        if (key != "dtype" and not fits(value, type(AMP[key]))) or (key == "level" and value not in ("O1", "O2")):
            wanted = "O1 or O2" if key == "level" else type(AMP[key]).__name__
            raise ConfigError(f"AMP.{key}: {value!r} is not {wanted}")
    if ema and not (fits(ema.get("decay", 0.5), float) and 0 < ema.get("decay", 0.5) < 1):
        raise ConfigError(f"EMA.decay: {ema['decay']!r} is not a number between 0 and 1")


def check_retention(cfg: dict) -> None:
    """Raise ConfigError for a value of the section Retention that cannot be meant, or that nothing here can do."""
    section = {**RETENTION, **(cfg.get("Retention") or {})}
    for key, value in section.items():
        if not fits(value, type(RETENTION[key])) or (fits(value, float) and value < 0):
            raise ConfigError(f"Retention.{key}: {value!r} is not a {type(RETENTION[key]).__name__} from 0 on")
    if section["batch_norm"] not in ("trained", "frozen"):
        raise ConfigError(f"Retention.batch_norm: '{section['batch_norm']}' is neither trained nor frozen")
    for place, arch in architectures(cfg):
        head = arch.get("Head") if isinstance(arch.get("Head"), dict) else {}
        plain = head and not head.get("sharded") and head.get("sub_centers", 1) == 1
        if section["imprint"] and not (plain and head.get("name") != "FC"):
            raise ConfigError(f"Retention.imprint: needs {place}.Head with one cosine weight per class, not sharded")
        if section["imprint"] and arch.get("Neck") and arch.get("head_feature_from", "neck") == "backbone":
            raise ConfigError(f"Retention.imprint: needs {place}.head_feature_from: neck, what the embedding is")


def check_arch(section: dict, where: str) -> None:
    """Raise ConfigError for what a model's section cannot mean; the parts are checked by their registries."""
    check_keys(section, where, ARCH)
    if section.get("name", "RecModel") != "RecModel":
        raise ConfigError(
            f"{where}.name: there is no model '{section['name']}'; "
            f"{suggest(section['name'], ('RecModel', 'DistillationModel'))}"
        )
    if str(section.get("infer_add_softmax", "true")).lower() not in ("true", "false"):
        raise ConfigError(f"{where}.infer_add_softmax: {section['infer_add_softmax']!r} is neither True nor False")
    for key, kind in (
        ("infer_output_key", str),
        ("use_sync_bn", bool),
        ("freeze", list),
        ("Backbone", dict),
        ("BackboneStopLayer", dict),
    ):
        if not fits(section.get(key), kind | None):
            raise ConfigError(f"{where}.{key}: {section[key]!r} is not a {kind.__name__}")
    if section.get("head_feature_from", "neck") not in ("neck", "backbone"):
        raise ConfigError(f"{where}.head_feature_from: '{section['head_feature_from']}' is neither neck nor backbone")
    check_keys(section.get("BackboneStopLayer") or {}, f"{where}.BackboneStopLayer", ("name", "output_dim"))
    if not lookup(section, "Backbone.name"):
        raise ConfigError(f"{where}.Backbone.name: the file has no such section, and nothing can be trained without it")
    if not isinstance(section["Backbone"]["name"], str):
        raise ConfigError(f"{where}.Backbone.name: {section['Backbone']['name']!r} is not the name of a backbone")
    pretrained = lookup(section, "Backbone.pretrained")
    if not fits(pretrained, bool | str | None):
        raise ConfigError(f"{where}.Backbone.pretrained: {pretrained!r} is neither True, False nor the path of a file")


def adds_softmax(section: dict) -> bool:
    """Whether a model's section asks for a softmax behind what is exported; the text 'false' is no."""
    return str(section.get("infer_add_softmax", False)).lower() == "true"


def check_logits(cfg: dict, where: str, name: str) -> None:
    """Raise ConfigError where a part that needs logits is asked for and a model has no head."""
    for place, section in architectures(cfg):
        if not section.get("Head"):
            raise ConfigError(f"{where}: {name} needs logits, and {place}.Head, which makes them, is missing")
        partial = section["Head"].get("sample_rate", 1) < 1 or section["Head"].get("sharded")
        if partial and name != "CELoss":
            raise ConfigError(
                f"{where}: {name} needs the logits of all classes, and {place}.Head has those of some "
                "(sample_rate, sharded); only CELoss takes these"
            )


def check_loaders(cfg: dict) -> None:
    """Raise ConfigError for a setting of a data loader that torch would refuse later."""
    for where in (f"DataLoader.{part}.loader" for part in LOADERS):
        for key, value in (lookup(cfg, where) or {}).items():
            if not fits(value, LOADER[key]) or value < 0:
                wanted = "True or False" if LOADER[key] is bool else "a whole number from 0"
                raise ConfigError(f"{where}.{key}: {value!r} is not {wanted}")


def check_class_num(cfg: dict) -> None:
    """Raise ConfigError where the file gives two different numbers of training identities."""
    given = [
        ("Global.class_num", cfg["Global"]["class_num"]),
        *((f"{where}.Head.class_num", lookup(section, "Head.class_num")) for where, section in architectures(cfg)),
    ]
    (one, ours), *others = [pair for pair in given if pair[1]] or [("", None)]
    for other, number in others:
        if number != ours:
            raise ConfigError(
                f"{one} is {ours}, but {other} is {number}: both count the training identities, so give "
                "the same number or leave one of them out"
            )


def class_num(cfg: dict) -> tuple[str, int | None]:
    """(the place, the number) of training identities where the file gives one, otherwise the place is Global's."""
    given = [(f"{where}.Head.class_num", lookup(section, "Head.class_num")) for where, section in architectures(cfg)]
    return next((pair for pair in given if pair[1]), ("Global.class_num", cfg["Global"]["class_num"]))


def check_evaluation(cfg: dict) -> None:
    """Raise ConfigError where lists are asked for and missing, or are those of another mode."""
    mode, wanted = cfg["Global"]["eval_mode"], cfg["Global"]["eval_during_train"]
    single = mode == "classification"
    for part in LISTS:
        lists = lookup(cfg, f"DataLoader.{part}") or {}
        for key in (key for key in lists if key in ("Query", "Gallery", *ONE_LIST) and (key not in ONE_LIST) == single):
            raise ConfigError(
                f"DataLoader.{part}.{key}: does not belong to Global.eval_mode {mode}, "
                f"which is evaluated with DataLoader.{part}.{'dataset' if single else 'Query and .Gallery'}"
            )
    lists = lookup(cfg, "DataLoader.Eval") or {}
    if single and not lists.get("dataset") and (wanted or lists):
        raise ConfigError(
            "DataLoader.Eval.dataset: there is no such section; add it, or leave DataLoader.Eval out and "
            "set Global.eval_during_train: False"
        )
    if not single and not lists.get("Query") and (wanted or lists):
        raise ConfigError(
            "DataLoader.Eval.Query: there is no such section; retrieval is evaluated with "
            "DataLoader.Eval.Query and DataLoader.Eval.Gallery (one alone serves as both): add it, or "
            "leave DataLoader.Eval out and set Global.eval_during_train: False"
        )


def check_validation(cfg: dict) -> None:
    """Raise ConfigError where DataLoader.Validation gives no images, or a share that cannot be held out."""
    where, section = "DataLoader.Validation", lookup(cfg, "DataLoader.Validation")
    single = cfg["Global"]["eval_mode"] == "classification"
    if section is None or (section.get("dataset" if single else "Query") and "share" not in section):
        return
    share, seed = section.get("share"), section.get("seed", 0)
    if single:
        raise ConfigError(f"{where}: classification is validated with a list of its own; add {where}.dataset")
    for key in (key for key in section if key not in ("share", "seed")):
        raise ConfigError(f"{where}.{key}: with a share, the images are those of training; keep one of the two")
    if not fits(share, float) or not 0 < share < 1:
        raise ConfigError(
            f"{where}.share: {share!r} is not a share of the training identities, between 0 and 1, such as 0.15; "
            f"without a share, give the lists {where}.Query and {where}.Gallery"
        )
    if not fits(seed, int) or seed < 0:
        raise ConfigError(f"{where}.seed: {seed!r} is not a whole number from 0")
    if not lookup(cfg, "DataLoader.Eval.Query"):
        raise ConfigError(
            f"{where}.share: its images are read as those of DataLoader.Eval.Query, and there is no such section; add "
            f"it, or give the lists {where}.Query and {where}.Gallery"
        )


def lookup(cfg: dict, where: str):
    """What stands at a dotted place, or None."""
    node = cfg
    for step in where.split("."):
        node = node.get(step) if isinstance(node, dict) else None
    return node


def items(cfg: dict, where: str, named: bool = False) -> list[tuple[str, str, dict]]:
    """The entries of a list of `{Name: arguments}` as (place, name, arguments).

    `named`: these may have a 'name' too.
    """
    section = lookup(cfg, where) or []
    if not isinstance(section, list):
        raise ConfigError(f"{where}: must be a list of '- Name: {{arguments}}' entries")
    return [entry(item, f"{where}.{i}", named) for i, item in enumerate(section)]


def architectures(cfg: dict) -> list[tuple[str, dict]]:
    """The (place, section) of every model of a configuration: Arch itself, or those that Arch.models lists."""
    section = lookup(cfg, "Arch") or {}
    if not isinstance(section, dict) or section.get("name") != "DistillationModel":
        return [("Arch", section)]
    check_keys(section, "Arch", DISTILLATION)
    models = [(place, args) for place, _, args in items(cfg, "Arch.models", named=True)]
    if not models:
        raise ConfigError("Arch.models: DistillationModel needs a list of '- Name: {a RecModel}'")
    return models


def optimizers(cfg: dict) -> list[tuple[str, dict]]:
    """The (place, section with its name) of each optimizer: the section is one, or a list of `- Name: {arguments}`."""
    section = cfg.get("Optimizer")
    if isinstance(section, list):
        return [(place, {"name": name, **args}) for place, name, args in items(cfg, "Optimizer")]
    return [("Optimizer", section)] if isinstance(section, dict) else []


def named_sections(cfg: dict):
    """Every (place, section, registry) of a configuration whose section picks a part by name."""
    roots = {"Arch": architectures(cfg), "Optimizer": optimizers(cfg)}
    for registry in Registry.made:
        for slot in registry.slots:
            for loader in LOADERS if "*" in slot else ("",):
                first, _, rest = slot.replace("*", loader).removesuffix("[]").partition(".")
                for root, section in roots.get(first, [(first, cfg.get(first) or {})]):
                    where = f"{root}.{rest}" if rest else root
                    found = lookup(section, rest) if rest else section
                    if slot.endswith("[]"):
                        entries = [(place, {"name": name, **args}) for place, name, args in items(cfg, where)]
                    else:
                        entries = [(where, found)] if found is not None else []
                    yield from ((place, section, registry) for place, section in entries)
