"""Tables of images become batches on a device.

Worker processes decode and augment; the ops at the end of a transform that make floats run on whole batches, where the
model is. How many workers there are changes no image. With `Global.cache_images: FOLDER` images are decoded and resized
once, into a file that all processes map into their memory.
"""
from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torchvision
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate
from torchvision.transforms import v2
from tqdm.auto import tqdm

import recnb.augment  # noqa: F401 (registers its ops)
from recnb.config import ConfigError, class_num, lookup, resolve
from recnb.datasets import (
    DataError,
    ImageList,
    check_images,
    drop_faults,
    evaluation_images,
    evaluation_places,
    same_list,
    training_images,
)
from recnb.distributed import first_does
from recnb.files import replacing
from recnb.images import PART, fingerprint
from recnb.samplers import SAMPLERS
from recnb.sharding import ranks
from recnb.transforms import Pipeline, build_transform, output_shape

MOST_WORKERS = 8  # where the file does not say: one GPU seldom needs more


class ImageLoader(DataLoader):
    """Batches (x (B, 3, H, W) float32, y (B,) int64) of an ImageList or of several, on `device`.

    Workers send what `Pipeline.before` makes, and `Pipeline.finish` is called here. It takes what torch's DataLoader
    takes but a collate_fn.
    """

    device = torch.device("cpu")

    def __init__(self, dataset: Dataset, **options):
        self.transform = shared_transform(dataset)
        whole = not isinstance(self.transform, Pipeline)
        super().__init__(dataset, collate_fn=finished_items if whole else raw_items, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return self.finished(super().__iter__())

    def finished(self, batches) -> Iterator[tuple[Tensor, Tensor]]:
        "The batches on the device, their last ops run there."
        for x, *boxes, y in batches:
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in (x, y))
            yield self.transform.finish(x, *boxes) if boxes else x, y


def shared_transform(dataset: Dataset):
    "The transform of all images of a data set, None where it has none or parts of it have different ones."
    if isinstance(dataset, ConcatDataset):
        parts = [shared_transform(part) for part in dataset.datasets]
        return parts[0] if len(set(map(str, parts))) == 1 else None
    return shared_transform(dataset.dataset) if isinstance(dataset, Subset) else getattr(dataset, "transform", None)


def finished_items(items: list) -> list[Tensor]:
    "(x, y) of items that are ready, each by its own transform."
    return default_collate([tuple(item) for item in items])


def raw_items(items: list) -> list[Tensor]:
    "(pixels (B, 3, H, W), boxes (B, E, 4), y) of items whose last ops are yet to be run."
    return default_collate([(item.pixels, item.boxes, item.label) for item in items])


def batches_on(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    "The batches of any loader on a device; the images of an ImageLoader become floats there."
    if isinstance(loader, ImageLoader):
        loader.device = device
    return ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def over(loader: DataLoader, dataset: Dataset, **changes) -> ImageLoader:
    "Another data set, every item once and in its order, in batches as large and with workers as those of a loader."
    size = {} if "batch_sampler" in changes else {"batch_size": loader.batch_size or loader.batch_sampler.batch_size}
    return ImageLoader(dataset, **{**size, "num_workers": loader.num_workers, "pin_memory": loader.pin_memory,
                                   "prefetch_factor": loader.prefetch_factor, "generator": loader.generator,
                                   "persistent_workers": loader.persistent_workers, **changes})


def divided(loader: DataLoader) -> DataLoader:
    "This process's share of an evaluation loader: every n-th image of n processes."
    rank, world = ranks()
    return loader if world == 1 else over(loader, Subset(loader.dataset, range(rank, len(loader.dataset), world)))


def images_per_second(loader: ImageLoader, seconds: float = 2.0) -> float:
    """How many images a training loader makes with nobody using them, tried for so long, for one epoch at most.

    The first batch, before which the workers start, counts only where there is no other.
    """
    alone = over(loader, loader.dataset, batch_sampler=loader.batch_sampler, persistent_workers=False,
                 generator=torch.Generator())
    count, began = 0, time.perf_counter()
    for number, (x, _) in enumerate(alone, 1):
        count += len(x)
        if number == 1 < len(alone):
            count, began = 0, time.perf_counter()
        elif time.perf_counter() - began > seconds:
            break
    return count / (time.perf_counter() - began)


@dataclass
class Loaders:
    """The data loaders of a run; query and gallery are None where nothing is evaluated.

    Where both have one data set, its images are embedded once.
    """

    train: ImageLoader
    query: ImageLoader | None = None
    gallery: ImageLoader | None = None

    @property
    def dropped(self) -> list[tuple]:
        "(list, line, path, reason) of each image that was left out, once, whatever lists it stands in."
        parts = (part for part in (self.train, self.query, self.gallery) if part is not None)
        return list(dict.fromkeys(row for part in parts for row in part.dataset.dropped))

    def stop_workers(self) -> None:
        """End the worker processes; the next batch starts others.

        Python's collector of cycles takes the queues before the loader, which then waits five seconds for each worker.
        """
        for loader in (self.train, self.query, self.gallery):
            if loader is not None and loader._iterator is not None:  # torch has no public way
                loader._iterator._shutdown_workers()
                loader._iterator = None


def build_loaders(cfg: dict) -> Loaders:
    """The data loaders of a configuration, all images checked by decoding them (`recnb.images.faults`).

    With Global.on_bad_image: drop, the others are left out of the lists, before anything but the number of classes is
    computed from these, and stand in `Loaders.dropped` (`save_dropped`).

    Raises ConfigError or DataError, before anything is trained, for whatever would fail or mislead later.
    """
    images, drop = {"DataLoader.Train": training_images(cfg)}, cfg["Global"]["on_bad_image"] == "drop"
    given, listed = class_num(cfg)[1], len(images["DataLoader.Train"].names)
    if given and given > listed:
        print(f"class_num is {given}, the training list has {listed} identities: the others will never be seen")
    if drop:
        drop_faults(images["DataLoader.Train"])
    if cfg["Global"]["eval_during_train"] or lookup(cfg, "DataLoader.Eval"):
        images |= zip(evaluation_places(cfg), evaluation_images(cfg), strict=True)
    loaders = {}
    for where, table in images.items():
        table.transform = build_transform(cfg, f"{where}.dataset")
        shape, wanted = output_shape(table.transform, where), tuple(cfg["Global"]["image_shape"])
        if where != "DataLoader.Train" and shape != wanted:
            raise ConfigError(f"{where}.dataset.transform_ops make images of {shape}, Global.image_shape is {wanted}")
        loaders[where] = build_loader(cfg, where, table)
    if not drop:
        check_images(*{(t.source, t.paths[0]): t for t in images.values()}.values())
    if cfg["Global"]["cache_images"]:
        for where, table in images.items():
            keep(table, resolve(cfg["Global"]["cache_images"]), where)
    train, *evaluation = loaders.values()
    if len(evaluation) == 2 and same_list(*(loader.dataset for loader in evaluation)):
        evaluation.pop()  # one loader serves as both, so that its images are embedded once
    return Loaders(train, *evaluation * (2 // max(1, len(evaluation))))


def build_loader(cfg: dict, where: str, images: ImageList) -> ImageLoader:
    "The loader of one split: training batches from its sampler, evaluation images in the order of their list."
    section, options = lookup(cfg, f"{where}.sampler"), machine_options(lookup(cfg, f"{where}.loader") or {})
    if section is None or section.get("batch_size", 0) < 1:
        raise ConfigError(f"{where}.sampler: must name a sampler and its batch_size, at least 1")
    seed = cfg["Global"]["seed"]
    # An own generator keeps the loader from drawing on the global random state, which belongs to the model.
    options |= {"persistent_workers": options["num_workers"] > 0, "pin_memory": torch.cuda.is_available(),
                "generator": torch.Generator().manual_seed(seed)}
    if where == "DataLoader.Train":
        known = {"labels": (images.labels, ""), "seed": (seed, "Global.seed is"),
                 "rank": (ranks()[0], "this process is"), "world_size": (ranks()[1], "there run")}
        sampler = SAMPLERS.build(section, f"{where}.sampler", **known)
        sampler.steps = cfg["Global"]["iter_per_epoch"]
        return ImageLoader(images, batch_sampler=sampler, **options)
    if section.get("drop_last"):
        raise ConfigError(f"{where}.sampler.drop_last: True would leave images out of the evaluation")
    return ImageLoader(images, batch_size=section["batch_size"], **options)


def machine_options(options: dict) -> dict:
    """num_workers and prefetch_factor where the file leaves them out, by the cores that this process may use.

    A worker for each of its cores, 8 at most, and at least 8 batches ahead.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = max(1, min(MOST_WORKERS, cores // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))))
    options = {"num_workers": workers, **{k: v for k, v in options.items() if k != "use_shared_memory"}}
    if not options["num_workers"]:
        options.pop("prefetch_factor", None)  # which torch refuses without workers
    else:
        options.setdefault("prefetch_factor", max(2, 8 // options["num_workers"]))
    return options


# --- Images decoded once ----------------------------------------------------------------------------------------------


class Kept:
    "The images (3, H, W) of a list as the first `done` ops of a transform leave them, in a file."

    def __init__(self, path: Path, transform: Pipeline, done: int):
        self.path, self.transform, self.done, self.map = path, transform, done, None

    def __getitem__(self, index: int) -> Tensor:
        if self.map is None:
            self.map = np.load(self.path, mmap_mode="r")
        return torch.from_numpy(self.map[index].copy()).permute(2, 0, 1)

    def __getstate__(self) -> dict:  # another process maps the file itself
        return {**vars(self), "map": None}


def fixed_ops(transform: Pipeline) -> int:
    "How many of the first ops make one size of all images, and of an image always the same; 0 where none do."
    last = 0
    for count, op in enumerate(transform.transforms, 1):
        if not isinstance(op, (v2.Identity, v2.Resize, v2.CenterCrop)):
            break
        if isinstance(op, v2.CenterCrop) or (isinstance(op, v2.Resize) and len(op.size) == 2):
            last = count
    return last


def keep(images: ImageList, folder: Path, where: str) -> None:
    """None; decodes and resizes the images of a list into a file of the folder, unless it is there, and uses it.

    The file is named by the paths, sizes, dates and boxes of the images, the ops and the decoders. Raises ConfigError
    where the first ops leave no one size to keep, DataError where the disk has no room.
    """
    done = fixed_ops(images.transform)
    if not done:
        raise ConfigError(f"{where}.dataset.transform_ops: Global.cache_images keeps images of one size, and the first "
                          "op makes none; begin with '- ResizeImage: {size: N}', larger than what is cropped later")
    key = [fingerprint(images.paths, images.boxes, range(len(images))), torchvision.__version__,
           *map(str, images.transform.transforms[:done])]
    images.kept = Kept(folder / f"{hashlib.sha256(repr(key).encode()).hexdigest()[:32]}.npy", images.transform, done)
    first_does(write_kept, images)


def write_kept(images: ImageList) -> None:
    "None; writes the file of `images.kept` where there is none."
    if images.kept.path.exists():  # asked by one process: others might see the file and not wait for it
        return

    def first_part(index: int) -> np.ndarray:  # (H, W, 3)
        image = images.image(index)
        for op in images.transform.transforms[:images.kept.done]:
            image = op(image)
        return image.permute(1, 2, 0).numpy()

    def fill(index: int) -> None:
        file[index] = first_part(index)

    path, parts = images.kept.path, range(0, len(images), PART)
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (len(images), *first_part(0).shape)
    free, wanted = shutil.disk_usage(path.parent).free, int(np.prod(shape))
    if wanted > 0.95 * free:
        raise DataError(f"Global.cache_images: {path.parent} has {free / 1e9:.1f} GB free, and the images of "
                        f"{images.source} take {wanted / 1e9:.1f} GB; choose another folder, or leave it out")
    with replacing(path) as temporary, ThreadPoolExecutor(os.cpu_count()) as pool:
        file = np.lib.format.open_memmap(temporary, "w+", np.uint8, shape)
        for start in tqdm(parts, "images kept", unit="thousand", leave=False, delay=3):
            list(pool.map(fill, range(start, min(start + PART, len(images)))))
        file.flush()
