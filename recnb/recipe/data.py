"""Build what the section DataLoader says: tables of images, transforms, samplers and loaders."""

import os
from collections.abc import Callable

import numpy as np
import torch
from torchvision.transforms import v2

from recnb.data.augment import BATCH_TRANSFORMS, COUNTED, MIXING
from recnb.data.cache import keep
from recnb.data.images import DataError
from recnb.data.lists import (
    DATASETS,
    MOST,
    ImageList,
    check_images,
    drop_faults,
    drop_repeated,
    number_alike,
    positives,
    same_list,
)
from recnb.data.loaders import ImageLoader, Loaders, Pair
from recnb.data.pipeline import Pipeline, output_shape
from recnb.data.prepare import hold_out
from recnb.data.samplers import SAMPLERS
from recnb.data.transforms import TRANSFORMS
from recnb.distributed.processes import ranks
from recnb.recipe.schema import LISTS, class_num, items, lookup
from recnb.registry import ConfigError
from recnb.storage import resolve


def build_batch_transform(cfg: dict, class_num: int) -> Callable | None:
    """Return the function that blends the images of a batch as batch_transform_ops says, or None where it says nothing.

    The function takes images (B, 3, H, W) and labels (B,) on one device, and returns blended images (B, 3, H, W) and
    labels (B, class_num) whose rows sum to 1. It draws on torch's global generator.

    Args:
        cfg: The checked configuration.
        class_num: The number of training identities.

    Raises:
        ConfigError: The file lists several ops, which would blend what is blended already, or another class_num.
    """
    ops = items(cfg, MIXING)
    if len(ops) > 1:
        raise ConfigError(
            f"{MIXING}: lists {' and '.join(name for _, name, _ in ops)}, and a batch can be mixed once; "
            "put them into one OpSampler, each with its 'prob'"
        )
    return next(
        (
            BATCH_TRANSFORMS.build({"name": name, **args}, place, class_num=(class_num, COUNTED))
            for place, name, args in ops
        ),
        None,
    )


def read_split(cfg: dict, where: str) -> ImageList:
    """Return the table of the data set at `where`, with the labels that the list or the folders give."""
    try:
        return DATASETS.build(lookup(cfg, f"{where}.dataset"), f"{where}.dataset")
    except DataError as error:
        raise DataError(f"{where}.dataset: {error}") from None


def training_split(cfg: dict) -> tuple[ImageList, ImageList | None]:
    """Return the training table, and what DataLoader.Validation.share holds out of it; labels are the list's own."""
    images, section = read_split(cfg, "DataLoader.Train"), lookup(cfg, "DataLoader.Validation") or {}
    if not section.get("share"):
        return images, None
    try:
        return hold_out(images, section["share"], section["seed"])
    except DataError as error:
        raise DataError(f"DataLoader.Validation.share: {error}") from None


def training_images(cfg: dict) -> ImageList:
    """Return the training table, without what is held out for validation, with labels 0..N-1 and their names.

    Raises:
        DataError: A label is not below the class_num of the file.
    """
    return numbered(cfg, training_split(cfg)[0])


def numbered(cfg: dict, images: ImageList) -> ImageList:
    """Return the training table, its labels changed in place to numbers 0..N-1 with names."""
    (where, classes), relabel = class_num(cfg), lookup(cfg, "DataLoader.Train.dataset.relabel")
    literal = images.names is None and not (classes is None if relabel is None else relabel)
    ids = np.unique(images.labels) if images.names is None else images.names
    if not literal:
        number_alike(images)
    if literal and not classes and ids[-1] >= MOST:
        raise DataError(
            f"{images.place(int(images.labels.argmax()))}: label {ids[-1]} would make as many classes; "
            "leave out relabel: False, so that the identities are numbered"
        )
    if classes and images.labels.max() >= classes:
        first = int(np.argmax(images.labels >= classes))
        raise DataError(
            f"{images.place(first)}: label {images.labels[first]} is out of range: {where} is {classes}, "
            f"the list has {len(ids)} identities up to {ids[-1]}; correct {where} or leave it out"
        )
    if literal:
        images.names = np.arange(ids[-1] + 1)
    return images


def evaluation_places(cfg: dict, part: str = "Eval") -> tuple[str, str]:
    """Return the places of the query and the gallery images of `Eval` or `Validation` in a configuration."""
    single = cfg["Global"]["eval_mode"] == "classification"
    return (f"DataLoader.{part}",) * 2 if single else (f"DataLoader.{part}.Query", f"DataLoader.{part}.Gallery")


def evaluation_images(cfg: dict, classes: np.ndarray | None = None, part: str = "Eval") -> tuple[ImageList, ImageList]:
    """Return the query and the gallery table, labelled alike; in classification one table, twice.

    Where Global.on_bad_image is drop, images that cannot be decoded are left out, and identities keep their numbers.

    Args:
        cfg: The checked configuration.
        classes: The names of the training identities in the order of their numbers, which they keep here; in
            classification they are read from the training list where they are not given.
        part: `Eval` or `Validation`.

    Raises:
        DataError: No query has anything to find, only one of the lists has cameras, or a class is none of the
            training's.
    """
    if cfg["Global"]["eval_mode"] == "classification":
        images = read_split(cfg, f"DataLoader.{part}")
        drop_repeated(images)
        known = np.asarray(training_images(cfg).names if classes is None else classes)
        number_alike(images, first=known)
        unknown = images.labels >= len(known)
        if unknown.any() or np.asarray(images.names).dtype.kind != known.dtype.kind:
            first = int(unknown.argmax())
            raise DataError(
                f"{images.place(first)}: {images.name(images.labels[first])} is none of the training classes; "
                "correct the list, or judge unseen identities with Global.eval_mode: retrieval"
            )
        if cfg["Global"]["on_bad_image"] == "drop":
            drop_faults(images)
        return images, images
    query, gallery = (read_split(cfg, where) for where in evaluation_places(cfg, part))
    return labelled_alike(cfg, query, gallery, classes)


def labelled_alike(
    cfg: dict, query: ImageList, gallery: ImageList, classes: np.ndarray | None = None
) -> tuple[ImageList, ImageList]:
    """Change the labels of a query and a gallery table in place, so that a number is one identity, and return both.

    Args:
        cfg: The checked configuration.
        query: The queries.
        gallery: The gallery, which may be the same table.
        classes: The names of the training identities in the order of their numbers, which they keep here.

    Raises:
        DataError: No query has anything to find, or only one of the lists has cameras.
    """
    if (query.cameras is None) != (gallery.cameras is None):
        with_cameras, without = (query, gallery) if gallery.cameras is None else (gallery, query)
        raise DataError(
            f"{with_cameras.source} has a third column, the camera, and {without.source} has none: give "
            "it in both lists or in neither"
        )
    tables = [query] if query is gallery else [query, gallery]
    for images in tables:
        drop_repeated(images)
    number_alike(*tables, first=classes)
    if cfg["Global"]["on_bad_image"] == "drop":
        for images in tables:
            drop_faults(images)
    if not positives(query, gallery).any():
        raise DataError(
            f"{query.source}: no query has an image of its identity in {gallery.source} "
            "(its own file, and images of its own camera, do not count)"
        )
    return query, gallery


MOST_WORKERS = 8  # where the file does not say: one GPU seldom needs more


def build_loaders(cfg: dict) -> Loaders:
    """Return the data loaders of a configuration, once every image has been decoded (`recnb.data.images.faults`).

    With Global.on_bad_image: drop, images that cannot be decoded are left out of the lists and stand in
    `Loaders.dropped` (`save_dropped`); only the number of classes counts them.

    Raises:
        ConfigError: The configuration contradicts itself, or images would have different sizes.
        DataError: A list or an image cannot be used.
    """
    settings = cfg["Global"]
    train, held_out = training_split(cfg)
    images, given = {"DataLoader.Train": numbered(cfg, train)}, class_num(cfg)[1]
    if given and given > train.classes:
        print(f"class_num is {given}, the training list has {train.classes} identities: the others will never be seen")
    if settings["on_bad_image"] == "drop":
        drop_faults(train)
    for part in LISTS:
        if part == "Validation" and held_out is not None:
            images["DataLoader.Validation"] = labelled_alike(cfg, held_out, held_out, train.names)[0]
        elif lookup(cfg, f"DataLoader.{part}"):
            images |= zip(evaluation_places(cfg, part), evaluation_images(cfg, train.names, part), strict=True)
    loaders, wanted = {}, None
    for where, table in images.items():
        read_as = "DataLoader.Eval.Query" if table is held_out else where
        table.transform = build_transform(cfg, f"{read_as}.dataset")
        shape = output_shape(table.transform, read_as)
        wanted = None if where == "DataLoader.Train" else wanted or shape
        if wanted not in (None, shape):
            raise ConfigError(f"{read_as}.dataset.transform_ops make images of {shape}, and others are of {wanted}")
        loaders[where] = build_loader(cfg, read_as, table)
    if settings["on_bad_image"] != "drop":
        check_images(*{(table.source, table.paths[0]): table for table in images.values()}.values())
    for where, table in images.items() if settings["cache_images"] else ():
        keep(table, resolve(settings["cache_images"]), where)
    test, validation = (searched(loaders, part) for part in LISTS)
    query, gallery = (test.query, test.gallery) if test else (None, None)
    return Loaders(loaders["DataLoader.Train"], query, gallery, validation)


def searched(loaders: dict[str, ImageLoader], part: str) -> Pair | None:
    """Return the query and the gallery loader of `Eval` or `Validation`, None where there are none.

    Equal lists share one loader, so that their images are embedded once.
    """
    found = [loader for where, loader in loaders.items() if where.startswith(f"DataLoader.{part}")]
    if len(found) == 2 and same_list(*(loader.dataset for loader in found)):
        found.pop()
    return Pair(found[0], found[-1]) if found else None


def build_loader(cfg: dict, where: str, images: ImageList) -> ImageLoader:
    """Return the loader of one list: training batches from its sampler, evaluation images in their order.

    Args:
        cfg: The checked configuration.
        where: The place of the list's section.
        images: The list.

    Raises:
        ConfigError: The section has no sampler, or one that would leave out images of an evaluation.
    """
    section, options = lookup(cfg, f"{where}.sampler"), machine_options(lookup(cfg, f"{where}.loader") or {})
    if section is None or section.get("batch_size", 0) < 1:
        raise ConfigError(f"{where}.sampler: must name a sampler and its batch_size, at least 1")
    seed = cfg["Global"]["seed"]
    # An own generator keeps the loader from drawing on the global random state, which belongs to the model.
    options |= {
        "persistent_workers": options["num_workers"] > 0,
        "pin_memory": torch.cuda.is_available(),
        "generator": torch.Generator().manual_seed(seed),
    }
    if where == "DataLoader.Train":
        known = {
            "labels": (images.labels, ""),
            "seed": (seed, "Global.seed is"),
            "rank": (ranks()[0], "this process is"),
            "world_size": (ranks()[1], "there run"),
        }
        sampler = SAMPLERS.build(section, f"{where}.sampler", **known)
        sampler.steps = cfg["Global"]["iter_per_epoch"]
        return ImageLoader(images, batch_sampler=sampler, **options)
    if section.get("drop_last"):
        raise ConfigError(f"{where}.sampler.drop_last: True would leave images out of the evaluation")
    return ImageLoader(images, batch_size=section["batch_size"], **options)


def machine_options(options: dict) -> dict:
    """Return the options of a loader, with num_workers and prefetch_factor by the cores that this process may use.

    Where the file leaves them out: a worker for each core, 8 at most, and at least 8 batches ahead.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    given = {key: value for key, value in options.items() if key != "use_shared_memory" and value is not None}
    workers = given.get("num_workers", workers)
    if not workers:
        return {"num_workers": 0}  # torch refuses prefetch_factor without workers
    return {"num_workers": workers, "prefetch_factor": max(2, 8 // workers), **given}


def build_transform(cfg: dict, where: str) -> Pipeline:
    """Return the composed transform_ops of the data set section at `where`.

    Raises:
        ConfigError: An op cannot be built, or images of different sizes leave with different sizes, which no batch can
            hold.
    """
    ops = [
        TRANSFORMS.build({"name": name, **args}, place) for place, name, args in items(cfg, f"{where}.transform_ops")
    ]
    transform = Pipeline([*ops, v2.ToDtype(torch.float32, scale=True)])
    output_shape(transform, where)
    return transform
