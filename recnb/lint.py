"""What in a configuration is allowed and yet seldom meant: each finding says where, what, why, and how to mend it.

Whatever cannot mean what it says is an error of `recnb.config`; what is found here runs, perhaps to a poor result.
"""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from recnb.config import items, lookup
from recnb.datasets import Loaders

PAIR_LOSSES = ("SupConLoss", "TripletLoss", "TripletLossV2", "TripletAngularMarginLoss", "PairwiseCosface", "MSMLoss",
               "TriHardLoss", "EmlLoss", "NpairsLoss", "ContrastiveLoss")
PER_IDENTITY = ("sample_per_id", "num_instances")


class Finding(NamedTuple):
    "One thing to look at: its place in the file, what is there, why that matters, what would mend it."

    place: str
    what: str
    why: str
    mend: str


def lint(cfg: dict, loaders: Loaders | None = None) -> list[Finding]:
    "The findings of a checked configuration; with its loaders, those of the lists too."
    checks = [losses, augmentation, inference, schedule]
    findings = [finding for check in checks for finding in check(cfg)]
    return findings + (list(identities(loaders)) if loaders else [])


def losses(cfg: dict) -> Iterator[Finding]:
    "Pair losses without pairs, views that the sampler does not draw, a weight that the original ignored."
    sampler, terms = lookup(cfg, "DataLoader.Train.sampler") or {}, list(items(cfg, "Loss.Train"))
    drawn = next((sampler[key] for key in PER_IDENTITY if key in sampler), None)
    for place, name, args in terms:
        if name in PAIR_LOSSES and drawn is None:
            yield Finding(place, f"{name} with the sampler {sampler.get('name')}",
                          "batches drawn without regard to identity hold few pairs, and most terms are zero",
                          "take PKSampler")
        if drawn and args.get("views", drawn) != drawn:
            yield Finding(f"{place}.views", f"{args['views']}, but the sampler draws {drawn} images of an identity",
                          "the loss goes by the labels here, so views has no effect", f"write views: {drawn}")
    if len(terms) == 1 and terms[0][2].get("weight", 1) != 1:
        yield Finding(f"{terms[0][0]}.weight", f"{terms[0][2]['weight']} on the only loss",
                      "PaddleClas ignores the weight of a single loss, here it scales the gradients",
                      "write weight: 1.0 for the original's behaviour")


def augmentation(cfg: dict) -> Iterator[Finding]:
    "Erasing on the wrong side of the normalisation."
    ops = list(items(cfg, "DataLoader.Train.dataset.transform_ops"))
    names = [name for _, name, _ in ops]
    if "RandomErasing" in names and "NormalizeImage" in names:
        place, _, args = ops[names.index("RandomErasing")]
        behind = names.index("RandomErasing") > names.index("NormalizeImage")
        mean = args.get("mean") or [0.0]
        if behind and any(mean):
            yield Finding(f"{place}.mean", f"{mean} behind NormalizeImage",
                          "it is written as it stands: in normalised values, 0 is the mean colour",
                          "write mean: [0., 0., 0.]")
        if not behind:
            yield Finding(place, "RandomErasing before NormalizeImage",
                          "0 is black there and not the mean colour", "move it behind NormalizeImage")


def inference(cfg: dict) -> Iterator[Finding]:
    "A softmax over an embedding."
    key = lookup(cfg, "Arch.infer_output_key") or "features"
    if lookup(cfg, "Arch.infer_add_softmax") and key != "logits":
        yield Finding("Arch.infer_add_softmax", f"True, and infer_output_key is {key}",
                      "a softmax over an embedding destroys its distances", "write infer_add_softmax: False")


def schedule(cfg: dict) -> Iterator[Finding]:
    "A warm-up that never ends."
    warmup, epochs = lookup(cfg, "Optimizer.lr.warmup_epoch") or 0, cfg["Global"]["epochs"]
    if epochs and warmup >= epochs:
        yield Finding("Optimizer.lr.warmup_epoch", f"{warmup} of {epochs} epochs",
                      "the learning rate only rises and its schedule never begins", "lower it or raise Global.epochs")


def identities(loaders: Loaders) -> Iterator[Finding]:
    "Evaluation identities that occur in training: by their names, which are numbers in a list."
    if loaders.query is not None:
        trained = set(loaders.train.dataset.names.tolist())
        tested = {loaders.query.dataset.names[i] for i in loaders.query.dataset.labels.tolist()}
        if shared := trained & tested:
            yield Finding("DataLoader.Eval.Query", f"{len(shared)} of {len(tested)} identities are in training too",
                          "retrieval is judged on identities never seen, and lists that count from 0 again look shared",
                          "split by identity (notebook 01_prepare), or number the lists once over all")
