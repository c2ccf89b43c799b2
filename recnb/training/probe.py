"""Train neck and head on what the frozen backbone gives: it sees each image once, not once an epoch.

A linear probe over a thousand photos then takes seconds. The features are kept under a key of the backbone's
weights, the transform and the files, so that the next probe of the same images begins at once.
"""

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from recnb.data.cache import with_features, write_array
from recnb.data.lists import ImageList
from recnb.data.loaders import ImageLoader, Loaders, Pair, batch_size, batches_on, over
from recnb.distributed.processes import first_does
from recnb.models.recmodel import RecModel
from recnb.registry import ConfigError
from recnb.training.evaluation import fingerprint


def on_features(model: RecModel, loaders: Loaders, folder: Path, views: int = 1, seed: int = 0) -> Loaders:
    """Freeze the backbone, run it over all images, and return loaders of what it gives.

    Args:
        model: from now on its `forward` takes the backbone's outputs in place of images (`model.on_features`).
        loaders: of the images; the batches of the returned training loader are drawn by the same sampler.
        folder: where the features are kept, float16 of (N, *backbone.out_shape) for each list and view.
        views: how many of each training image there are: one as the evaluation sees it, the others augmented.
        seed: of the augmented views.

    Raises:
        ConfigError: There is no neck that could learn anything, or no room in the folder.
    """
    if model.neck is None:
        raise ConfigError("Arch.Neck: Global.probe trains a neck on frozen features; add one, such as {name: FC}")
    model.freeze(["backbone"])
    train, plain = loaders.train.dataset, (loaders.query or loaders.train).dataset.transform
    seen = [(replace(train, transform=plain), None), *((train, seed + view) for view in range(1, views))]
    made = {id(train): with_features(train, [keep(model, loaders.train, images, folder, s) for images, s in seen])}
    for loader in loaders.parts.values():
        if id(loader.dataset) not in made:
            made[id(loader.dataset)] = with_features(loader.dataset, [keep(model, loader, loader.dataset, folder)])
    loaders.stop_workers()
    model.on_features = True
    inline = {"num_workers": 0, "prefetch_factor": None, "persistent_workers": False}
    ready = {id(part): over(part, made[id(part.dataset)], **inline) for part in loaders.parts.values()}
    ready[id(loaders.train)] = over(loaders.train, made[id(train)], batch_sampler=loaders.train.batch_sampler, **inline)
    query, gallery = (ready.get(id(part)) for part in (loaders.query, loaders.gallery))
    held = loaders.validation and Pair(*(ready[id(part)] for part in vars(loaders.validation).values()))
    return Loaders(ready[id(loaders.train)], query, gallery, held)


def keep(model: RecModel, loader: ImageLoader, images: ImageList, folder: Path, seed: int | None = None) -> Path:
    """Return the file of the backbone's outputs for a list, float16 (N, ...), made where it is missing.

    Args:
        model: its backbone.
        loader: loads images as these are to be loaded.
        images: the list.
        folder: where the file is.
        seed: draws the augmentation; None: the images' transform draws nothing.
    """
    path = folder / f"{fingerprint(model.backbone, images, 'probe', seed, str(model.precision))}.npy"

    def write() -> None:
        if not path.exists():
            parts = (out.half().cpu().numpy() for out in outputs(model, loader, images, seed))
            write_array(path, len(images), parts, "Global.probe_cache", "the features")

    with torch.inference_mode():
        first_does(write)
    return path


def outputs(model: RecModel, loader: ImageLoader, images: ImageList, seed: int | None) -> Iterator[Tensor]:
    """Yield what the backbone gives for the images, in the order of the list and in evaluation mode.

    Args:
        model: its backbone.
        loader: loads images as these are to be loaded.
        images: the list.
        seed: draws the augmentation, for each image by itself; None: nothing is drawn.
    """
    device, size = next(model.parameters()).device, batch_size(loader)
    how = {}
    if seed is not None:  # a seed for each image, so that the number of workers changes nothing
        drawn = np.random.default_rng(seed).integers(2**62, size=len(images)).tolist()
        items = iter(enumerate(drawn))
        how["batch_sampler"] = [list(islice(items, size)) for _ in range(-(-len(images) // size))]
    once = over(loader, images, **how, persistent_workers=False, generator=torch.Generator())
    for x, _ in tqdm(batches_on(once, device), "features kept", len(once), leave=False, delay=5):
        with torch.autocast(device.type, model.precision or torch.bfloat16, enabled=model.half_evaluation):
            yield model.backbone(x)
