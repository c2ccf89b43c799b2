"""Tables of images become batches on a device.

Worker processes decode and augment; the ops at the end of a transform that make floats run on whole batches, where the
model is. How many workers there are changes no image. With `Global.cache_images: FOLDER` images are decoded and resized
once, into a file that all processes map into their memory.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.utils.data import ConcatDataset, DataLoader, Dataset, Subset, default_collate

from recnb.data.pipeline import Pipeline
from recnb.distributed.processes import ranks

if TYPE_CHECKING:
    from recnb.data.lists import ImageList


class ImageLoader(DataLoader):
    """Batches (x (B, 3, H, W) float32, y (B,) int64) of an ImageList or of several, on `device`.

    Workers send what `Pipeline.before` makes, and `Pipeline.finish` is called here. It takes what torch's DataLoader
    takes but a collate_fn.
    """

    dataset: ImageList  # or what joins several of them
    device = torch.device("cpu")

    def __init__(self, dataset: Dataset, **options):
        self.transform = shared_transform(dataset)
        whole = not isinstance(self.transform, Pipeline)
        super().__init__(dataset, collate_fn=finished_items if whole else raw_items, **options)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:  # type: ignore[override]
        return self.finished(super().__iter__())

    def finished(self, batches) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches on the device, their last ops run there."""
        for x, *boxes, y in batches:
            x, y = (tensor.to(self.device, non_blocking=True) for tensor in (x, y))
            yield self.transform.finish(x, *boxes) if boxes else x, y


def shared_transform(dataset: Dataset):
    """The transform of all images of a data set, None where it has none or parts of it have different ones."""
    if isinstance(dataset, ConcatDataset):
        parts = [shared_transform(part) for part in dataset.datasets]
        return parts[0] if len(set(map(str, parts))) == 1 else None
    return shared_transform(dataset.dataset) if isinstance(dataset, Subset) else getattr(dataset, "transform", None)


def finished_items(items: list) -> list[Tensor]:
    """(x, y) of items that are ready, each by its own transform; a data set of features has made them already."""
    return list(items) if isinstance(items, tuple) else default_collate([tuple(item) for item in items])


def raw_items(items: list) -> list[Tensor]:
    """(pixels (B, 3, H, W), boxes (B, E, 4), y) of items whose last ops are yet to be run."""
    return default_collate([(item.pixels, item.boxes, item.label) for item in items])


def batch_size(loader: DataLoader) -> int:
    """Return how many images a batch has, whatever draws it."""
    sampler: Any = loader.batch_sampler
    return loader.batch_size or sampler.batch_size


def batches_on(loader: DataLoader, device: torch.device) -> Iterator[tuple[Tensor, Tensor]]:
    """The batches of any loader on a device; the images of an ImageLoader become floats there."""
    if isinstance(loader, ImageLoader):
        loader.device = device
    return ((x.to(device, non_blocking=True), y.to(device, non_blocking=True)) for x, y in loader)


def over(loader: DataLoader, dataset: Dataset, **changes) -> ImageLoader:
    """Another data set, every item once and in its order, in batches as large and with workers as those of a loader."""
    size = {} if "batch_sampler" in changes else {"batch_size": batch_size(loader)}
    return ImageLoader(
        dataset,
        **{
            **size,
            "num_workers": loader.num_workers,
            "pin_memory": loader.pin_memory,
            "prefetch_factor": loader.prefetch_factor,
            "generator": loader.generator,
            "persistent_workers": loader.persistent_workers,
            **changes,
        },
    )


def divided(loader: DataLoader) -> DataLoader:
    """This process's share of an evaluation loader: every n-th image of n processes."""
    rank, world = ranks()
    own = range(rank, len(loader.dataset), world)  # type: ignore[arg-type]
    return loader if world == 1 else over(loader, Subset(loader.dataset, own))


def images_per_second(loader: ImageLoader, seconds: float = 2.0) -> float:
    """How many images a training loader makes with nobody using them, tried for so long, for one epoch at most.

    The first batch, before which the workers start, counts only where there is no other.
    """
    alone = over(
        loader,
        loader.dataset,
        batch_sampler=loader.batch_sampler,
        persistent_workers=False,
        generator=torch.Generator(),
    )
    count, began = 0, time.perf_counter()
    for number, (x, _) in enumerate(alone, 1):
        count += len(x)
        if number == 1 < len(alone):
            count, began = 0, time.perf_counter()
        elif time.perf_counter() - began > seconds:
            break
    return count / (time.perf_counter() - began)


@dataclass
class Pair:
    """The loaders of a list of queries and of the gallery in which they search; one loader twice where it is one list.

    In classification mode the one list stands as both.
    """

    query: ImageLoader
    gallery: ImageLoader


@dataclass
class Loaders:
    """The data loaders of a run; query and gallery are None where nothing is evaluated.

    Where both have one data set, its images are embedded once. `validation` has the images by which an epoch is chosen,
    whose identities are neither trained on nor tested on; None where the file has no `DataLoader.Validation`.
    """

    train: ImageLoader
    query: ImageLoader | None = None
    gallery: ImageLoader | None = None
    validation: Pair | None = None

    @property
    def classes(self) -> int:
        """How many training identities there are."""
        return self.train.dataset.classes

    @property
    def test(self) -> Pair | None:
        """The lists that a run is judged by."""
        return Pair(self.query, self.gallery) if self.query and self.gallery else None

    @property
    def parts(self) -> dict[str, ImageLoader]:
        """Every loader that there is by its name, such as `query` and `validation gallery`."""
        own = {name: getattr(self, name) for name in ("train", "query", "gallery")}
        held = {f"validation {name}": part for name, part in vars(self.validation).items()} if self.validation else {}
        return {name: part for name, part in {**own, **held}.items() if part is not None}

    @property
    def dropped(self) -> list[tuple]:
        """(list, line, path, reason) of each image that was left out, once, whatever lists it stands in."""
        return list(dict.fromkeys(row for part in self.parts.values() for row in part.dataset.dropped))

    def stop_workers(self) -> None:
        """End the worker processes; the next batch starts others.

        Python's collector of cycles takes the queues before the loader, which then waits five seconds for each worker.
        """
        for loader in self.parts.values():
            if loader._iterator is not None:  # torch has no public way
                loader._iterator._shutdown_workers()  # type: ignore[attr-defined]
                loader._iterator = None
