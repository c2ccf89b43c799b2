"""The rungs of `Global.recipe: ladder`, from cheap to dear: what each changes in the configuration that is climbed.

The file itself says how to fine-tune. The rungs below it need less: nothing, a projection fitted in closed form, a neck
and a head on frozen features. A rung's configuration judges the validation lists and never sees the test lists.
"""

import copy

from recnb.recipe.schema import check, lookup
from recnb.recipe.settings import Retention, defaults
from recnb.registry import ConfigError

RUNGS = {
    "start": "as it comes",
    "whiten": "principal components of the training images, whitened",
    "probe": "neck and head on the frozen backbone",
    "finetune": "fine-tuned as the file says",
    "interpolate": "between the start and the fine-tuned weights",
    "average": "mean of the weights behind the last epochs of fine-tuning",
}
WIDTH = 512  # of the embedding of the lower rungs, where there are images and features for so many
VIEWS, PROBE_STEPS, PROBE_BATCH = 4, 400, 256
POWERS = (0.25, 0.5, 1.0)  # of the whitening; the validation images choose
ALPHAS = (0.2, 0.4, 0.6, 0.8)  # of the way from the start to the fine-tuned weights


def is_ladder(cfg: dict) -> bool:
    """Return True if a configuration is to be climbed and not just trained."""
    return cfg["Global"]["recipe"] == "ladder"


def base(cfg: dict) -> dict:
    """Return the configuration of the model that training begins with: the first rung, or the whole file."""
    return start(cfg) if is_ladder(cfg) else cfg


def start(cfg: dict) -> dict:
    """Return the configuration of the untrained network: no neck, no head, no epoch."""
    cfg = plain(cfg)
    cfg["Global"] |= {"epochs": 0, "probe": None}
    for part in ("Neck", "Head", "freeze", "head_feature_from"):
        cfg["Arch"].pop(part, None)
    cfg["Loss"] = {"Train": [{"SupConLoss": {"weight": 1.0}}]}
    cfg["Optimizer"] = {"name": "AdamW", "lr": {"name": "Constant", "learning_rate": 0.001}}
    cfg.pop("Retention", None)
    return cfg


def plain(cfg: dict) -> dict:
    """Return the configuration as one that is trained, not climbed."""
    cfg = copy.deepcopy(cfg)
    cfg.pop("Ladder", None)
    cfg["Global"]["recipe"] = None
    return cfg


def in_splits(cfg: dict, identities: int) -> dict:
    """Return the configuration with batches that `identities` suffice for, and say where that makes them smaller."""
    cfg = copy.deepcopy(cfg)
    sampler = cfg["DataLoader"]["Train"]["sampler"]
    most = largest_batch(sampler, identities, sampler["batch_size"])
    if most < sampler["batch_size"]:
        print(f"batches of {most} images, not {sampler['batch_size']}: {identities} identities are left to train on")
        sampler["batch_size"] = most
    return cfg


def largest_batch(sampler: dict, identities: int, images: int) -> int:
    """Return how many images a batch can have, at most `images`; where any may come together, as many as it has now."""
    each = sampler.get("sample_per_id") or sampler.get("num_instances")
    return min(images // each, identities) * each if each else sampler["batch_size"]


def whiten(cfg: dict, width: int, power: float) -> dict:
    """Return the configuration of the whitening to `width` dimensions."""
    cfg = start(cfg)
    cfg["Global"]["probe"] = 1
    cfg["Arch"]["Neck"] = {"name": "Whitening", "dimensions": width, "power": power}
    return cfg


def probe(cfg: dict, width: int, power: float, images: int, identities: int) -> dict:
    """Return the configuration of the probe: it begins at the whitening and trains it, with a head.

    Args:
        cfg: the configuration that is climbed.
        width: dimensions of the embedding.
        power: of the whitening that it begins with.
        images: how many there are to train on, for the number of epochs.
        identities: how many there are, for the size of a batch.
    """
    given = plain(cfg)
    cfg = whiten(given, width, power)
    head = lookup(given, "Arch.Head") or {}
    keep = {key: head[key] for key in ("name", "margin", "scale") if key in head}
    cfg["Arch"]["Head"] = keep if keep.get("name") == "ArcMargin" else {"name": "ArcMargin", "margin": 0.2, "scale": 30}
    cfg["Loss"] = {"Train": [{"CELoss": {"weight": 1.0}}, {"SupConLoss": {"weight": 1.0, "temperature": 0.1}}]}
    sampler = cfg["DataLoader"]["Train"]["sampler"]
    sampler["batch_size"] = largest_batch(sampler, identities, PROBE_BATCH)
    epochs = min(60, max(5, round(PROBE_STEPS * sampler["batch_size"] / max(1, images))))
    cfg["Global"] |= {"epochs": epochs, "probe": VIEWS, "eval_interval": max(1, epochs // 6), "save_interval": 0}
    cfg["Optimizer"] = {"name": "AdamW", "weight_decay": 0.0, "lr": {"name": "Cosine", "learning_rate": 0.001}}
    cfg["Retention"] = {**defaults(Retention), "imprint": True}
    return cfg


def finetune(cfg: dict) -> dict:
    """Return the configuration of the fine-tuning: as the file says, with the weights behind its last epochs kept."""
    cfg = plain(cfg)
    cfg["Global"] |= {"save_interval": 1, "keep_checkpoints": last_epochs(cfg["Global"]["epochs"])}
    return cfg


def last_epochs(epochs: int) -> int:
    """Return of how many of a training's last epochs the weights are averaged: of a third, two at least."""
    return max(2, round(epochs / 3))


def judged_by(cfg: dict, train: dict, query: dict, gallery: dict) -> dict:
    """Return the configuration with these lists to train on and to be judged by, the test lists left out."""
    cfg = copy.deepcopy(cfg)
    cfg["DataLoader"]["Train"]["dataset"] = with_ops(cfg["DataLoader"]["Train"]["dataset"], train)
    lists = {"Query": query, "Gallery": gallery}
    cfg["DataLoader"] |= {"Eval": copy.deepcopy(lists), "Validation": copy.deepcopy(lists)}
    check(cfg)
    return cfg


def with_ops(section: dict, images: dict) -> dict:
    """Return the section of other images, transformed as a section says."""
    return images | {key: section[key] for key in ("transform_ops", "batch_transform_ops") if key in section}


def climbable(cfg: dict) -> None:
    """Raise ConfigError for a configuration that no ladder can climb."""
    if cfg["Arch"].get("name") == "DistillationModel":
        raise ConfigError("Global.recipe: a ladder has one model, and Arch has several; leave recipe out")
    if cfg["Global"]["eval_mode"] != "retrieval":
        raise ConfigError("Global.recipe: a ladder is judged by retrieval, not by Global.eval_mode: classification")
    if not (lookup(cfg, "Arch.Backbone.pretrained") or cfg["Global"]["pretrained_model"]):
        raise ConfigError(
            "Global.recipe: a ladder begins with pretrained weights; give Arch.Backbone.pretrained, or leave recipe "
            "out to train from scratch"
        )
    if cfg["Global"]["devices"] != 1:
        raise ConfigError(
            "Global.recipe: a ladder is climbed in one process; set Global.devices: 1, or leave recipe out"
        )
