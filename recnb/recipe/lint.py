"""Findings: what is allowed in a configuration and is probably a mistake, with the reason and what to write instead.

What is not allowed is a ConfigError of `recnb.recipe.schema`. A configuration with findings runs, perhaps to a poor
result.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torchvision.transforms.v2 import Transform

from recnb.data.lists import ImageList
from recnb.data.loaders import Loaders
from recnb.data.pipeline import output_shape, single_ops
from recnb.models.backbones import pretrained_images
from recnb.recipe.schema import LOADERS, adds_softmax, architectures, items, lookup, optimizers
from recnb.recipe.settings import WITHOUT_EFFECT
from recnb.registry import ConfigError
from recnb.storage import sha256

PAIR_LOSSES = (
    "SupConLoss",
    "TripletLoss",
    "TripletLossV2",
    "TripletAngularMarginLoss",
    "PairwiseCosface",
    "MSMLoss",
    "TriHardLoss",
    "EmlLoss",
    "NpairsLoss",
    "ContrastiveLoss",
)
PER_IDENTITY = ("sample_per_id", "num_instances")


class Finding(NamedTuple):
    """A probable mistake: its place in the file, what is there, why it matters, and what to write instead."""

    place: str
    what: str
    why: str
    mend: str
    strict: bool = False  # training would be useless

    def __str__(self) -> str:
        return f"{self.place}: {self.what}: {self.why}; {self.mend}"


def lint(cfg: dict, loaders: Loaders | None = None) -> list[Finding]:
    """Return the findings about a checked configuration and, with its loaders, about its lists."""
    checks = [losses, augmentation, inference, schedule, processes, without_effect]
    findings = [finding for check in checks for finding in check(cfg)]
    if loaders is not None:
        judged = identities(loaders) if cfg["Global"]["eval_mode"] == "retrieval" else ()
        findings += [*judged, *copies(loaders), *shapes(cfg, loaders), *pretraining(cfg, loaders)]
    every = cfg["Global"]["on_finding"] == "stop"
    return [finding._replace(strict=every or finding.strict) for finding in findings]


def stop(findings: list[Finding]) -> None:
    """Raise ConfigError for the first strict finding."""
    for finding in (finding for finding in findings if finding.strict):
        raise ConfigError(str(finding))


def losses(cfg: dict) -> Iterator[Finding]:
    """Find pair losses without pairs, views that the sampler does not draw, weights that PaddleClas ignores."""
    sampler, terms = lookup(cfg, "DataLoader.Train.sampler") or {}, items(cfg, "Loss.Train")
    drawn = next((sampler[key] for key in PER_IDENTITY if key in sampler), None)
    for place, name, args in terms:
        if name in PAIR_LOSSES and drawn is None:
            yield Finding(
                place,
                f"{name} with the sampler {sampler.get('name')}",
                "batches drawn without regard to identity hold few pairs, and most terms are zero",
                "take PKSampler",
            )
        if drawn and args.get("views", drawn) != drawn:
            yield Finding(
                f"{place}.views",
                f"{args['views']}, but the sampler draws {drawn} images of an identity",
                "the loss goes by the labels here, so views has no effect",
                f"write views: {drawn}",
            )
        if name == "MSMLoss":
            yield Finding(
                place,
                f"MSMLoss with weight {args.get('weight', 1)}",
                "PaddleClas's gradient is twice that of its value, here it is that of its value",
                f"coming from there, write weight: {2 * args.get('weight', 1)} for the same pull",
            )
    if terms and all(args.get("weight") == 0 for _, _, args in terms):
        yield Finding("Loss.Train", "every weight is 0", "no gradient comes of it", "give one loss a weight", True)
    if len(terms) == 1 and terms[0][2].get("weight", 1) != 1:
        yield Finding(
            f"{terms[0][0]}.weight",
            f"{terms[0][2]['weight']} on the only loss",
            "PaddleClas ignores the weight of a single loss, here it scales the gradients",
            "write weight: 1.0 for the original's behaviour",
        )


def augmentation(cfg: dict) -> Iterator[Finding]:
    """Find erasing on the wrong side of the normalisation, and random ops in an evaluation."""
    ops = items(cfg, "DataLoader.Train.dataset.transform_ops")
    names = [name for _, name, _ in ops]
    normalize = next((name for name in names if name in ("NormalizeImage", "Normalize")), None)
    if "RandomErasing" in names and normalize:
        place, _, args = ops[names.index("RandomErasing")]
        after = names.index("RandomErasing") > names.index(normalize)
        mean = args.get("mean") or [0.0]
        if after and any(mean):
            yield Finding(
                f"{place}.mean",
                f"{mean} after {normalize}",
                "the values are normalised by then, and 0 is the mean colour",
                "write mean: [0., 0., 0.]",
            )
        if not after:
            yield Finding(
                place,
                f"RandomErasing before {normalize}",
                "0 is black there and not the mean colour",
                f"move it after {normalize}",
            )
    for part in (part for part in LOADERS if part != "Train"):
        for place, name, _ in items(cfg, f"DataLoader.{part}.dataset.transform_ops"):
            if name.startswith("Rand"):
                yield Finding(
                    place,
                    f"{name} in evaluation",
                    "the metrics change from one evaluation to the next",
                    "leave it out there",
                )


def inference(cfg: dict) -> Iterator[Finding]:
    """Find a softmax over an embedding."""
    for place, section in [("Arch", cfg["Arch"]), *architectures(cfg)[:1]]:
        key, given = section.get("infer_output_key") or "features", section.get("infer_add_softmax")
        if isinstance(given, str):
            yield Finding(
                f"{place}.infer_add_softmax",
                f"the text '{given}'",
                "PaddleClas takes any text as True, here it means what it says",
                f"write {given.title()}",
            )
        if adds_softmax(section) and key != "logits":
            yield Finding(
                f"{place}.infer_add_softmax",
                f"True, and infer_output_key is {key}",
                "a softmax over an embedding destroys its distances",
                "write infer_add_softmax: False",
            )
        if place == "Arch" and section.get("name", "RecModel") == "RecModel":
            return


def schedule(cfg: dict) -> Iterator[Finding]:
    """Find a warm-up that never ends."""
    epochs = cfg["Global"]["epochs"]
    for where, section in optimizers(cfg):
        warmup = section["lr"].get("warmup_epoch") or 0
        if epochs and warmup >= epochs:
            yield Finding(
                f"{where}.lr.warmup_epoch",
                f"{warmup} of {epochs} epochs",
                "the rate only rises and its schedule never begins",
                "lower it or raise Global.epochs",
            )


def processes(cfg: dict) -> Iterator[Finding]:
    """Find several processes, whose step sees more images than the learning rate is meant for."""
    count, batch = cfg["Global"]["devices"], lookup(cfg, "DataLoader.Train.sampler.batch_size")
    if count != 1:
        yield Finding(
            "Global.devices",
            f"{count}, each with batches of {batch}",
            "a step sees as many batches as there are processes, and a rate found with one is too low for it",
            "multiply learning_rate by their number (Adam: by its root), or divide batch_size by it",
        )


def without_effect(cfg: dict) -> Iterator[Finding]:
    """Find keys and sections that have no effect here."""
    for key in (key for key in WITHOUT_EFFECT if cfg["Global"].get(key)):
        yield Finding(f"Global.{key}", f"{cfg['Global'][key]}", "it changes nothing here", "leave it out")
    for key, why in (
        ("Slim", "pruning and quantisation while training have no counterpart here, the model is trained without them"),
        ("Infer", "the exported model holds its own preprocessing"),
    ):
        if cfg.get(key):
            yield Finding(key, ", ".join(cfg[key]), why, "leave the section out")
    if lookup(cfg, "Metric.Train"):
        yield Finding(
            "Metric.Train",
            "metrics of the training batches",
            "logits carry the margin while training, so their accuracy says little; the loss terms are shown instead",
            "leave it out",
        )


def shapes(cfg: dict, loaders: Loaders) -> Iterator[Finding]:
    """Find sizes of images that differ from Global.image_shape, or between training and evaluation."""
    shape, said = output_shape(loaders.train.dataset.transform, "DataLoader.Train"), cfg["Global"]["image_shape"]
    evaluated = [part for name, part in loaders.parts.items() if name != "train"]
    sizes = [list(output_shape(part.dataset.transform, "DataLoader.Eval")) for part in evaluated[:1]] or [said]
    if sizes != [said]:
        facts = [pretrained_images(section["Backbone"]["name"]) or {} for _, section in architectures(cfg)]
        yield Finding(
            "Global.image_shape",
            f"{said}, but the evaluation's transform_ops make images of {sizes[0]}",
            "a network with a fixed input size is built for image_shape, and would get images of another size",
            f"write image_shape: {sizes[0]}",
            any(fact.get("fixed_input_size") for fact in facts),
        )
    if list(shape) != sizes[0]:
        yield Finding(
            "DataLoader.Train.dataset.transform_ops",
            f"images of {list(shape)}, Global.image_shape is {said}",
            "sizes of ops are [width, height], image_shape is [3, height, "
            "width]: training and evaluation see different sizes",
            "write the same size in both",
        )


def pretraining(cfg: dict, loaders: Loaders) -> Iterator[Finding]:
    """Find images that are normalised or sized differently from those that the weights were trained on."""
    for place, section in architectures(cfg):
        backbone = section["Backbone"]
        facts = pretrained_images(backbone["name"]) if backbone.get("pretrained") else None
        if facts is None:
            continue
        found = normalisation(loaders.train.dataset.transform)
        if found and not np.allclose(found, (facts["mean"], facts["std"]), atol=0.01):
            mean, std = found
            yield Finding(
                "DataLoader.Train.dataset.transform_ops",
                f"mean {mean} and std {std}, but the weights of {backbone['name']} were trained with mean "
                f"{[*facts['mean']]} and std {[*facts['std']]}",
                "features of images in other colours are worse from the start",
                "write NormalizeImage: {auto: True} in each transform_ops",
                backbone["pretrained"] is True,
            )
        if facts["fixed_input_size"] and cfg["Global"]["image_shape"] != [*facts["input_size"]]:
            yield Finding(
                "Global.image_shape",
                f"{cfg['Global']['image_shape']}, but the weights of {place}.Backbone were trained with "
                f"{[*facts['input_size']]}",
                "the position of a patch is learnt for this size and has to be interpolated for another",
                "take this size, unless the images are too many for it",
            )


def normalisation(transform: Transform) -> tuple[list[float], list[float]] | None:
    """Return the mean and std of each channel by which a transform normalises images between 0 and 1.

    Only ops without chance are looked at; where these leave an image as bytes, None.
    """
    black, white = (torch.full((3, 256, 256), value, dtype=torch.uint8) for value in (0, 255))
    for op in single_ops(transform):
        if type(op).make_params is Transform.make_params and type(op).forward is Transform.forward:
            black, white = op(black), op(white)
    if not black.is_floating_point():
        return None
    black, white = (image.flatten(1).mean(1).double() for image in (black, white))
    std = 1 / (white - black)
    return (-black * std).round(decimals=3).tolist(), std.round(decimals=3).tolist()


def identities(loaders: Loaders) -> Iterator[Finding]:
    """Find identities that are in two of the training, validation and test lists, by their names."""
    sets = {name: seen(part.dataset) for name, part in loaders.parts.items() if "gallery" not in name}
    places = {"query": "DataLoader.Eval.Query", "validation query": "DataLoader.Validation"}
    for name, other in (("query", "train"), ("validation query", "train"), ("validation query", "query")):
        where = "training" if other == "train" else "Eval"
        if shared := sets.get(name, set()) & sets.get(other, set()):
            yield Finding(
                places[name],
                f"{len(shared)} of {len(sets[name])} identities are in {where} too",
                "retrieval is judged on identities never seen, and lists that count from 0 again look shared",
                "split by identity (notebook 01_prepare), or number the lists once over all",
            )


def copies(loaders: Loaders) -> Iterator[Finding]:
    """Find images of the test or validation lists whose file is an exact copy of another's."""
    for pair, place in ((loaders.test, "DataLoader.Eval"), (loaders.validation, "DataLoader.Validation")):
        tables = [] if pair is None else [pair.query.dataset, pair.gallery.dataset]
        files = {os.path.realpath(path) for table in tables if table.boxes is None for path in table.paths}
        sizes: dict[int, list[str]] = {}
        for file in sorted(files):
            sizes.setdefault(Path(file).stat().st_size, []).append(file)
        digests = {file: sha256(file) for some in sizes.values() if some[1:] for file in some}
        first = {digest: file for file, digest in reversed(digests.items())}
        alike = [file for file, digest in digests.items() if first[digest] != file]
        if alike:
            yield Finding(
                place,
                f"{len(alike)} images are exact copies of others ({Path(alike[0]).name} of "
                f"{Path(first[digests[alike[0]]]).name})",
                "a query finds its own copy, which says nothing of the features",
                "keep one of each in the lists",
            )


def seen(images: ImageList) -> set:
    """Return the names of the identities that have an image in a table."""
    return {images.name(label) for label in images.labels.tolist()}
