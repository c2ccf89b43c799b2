"""From a model and lists of images to numbers: embedding, post-processing, retrieval metrics.

`embed` makes the features of a list, a `Judge` says what they retrieve. Between the two stand the steps of the section
PostProcess and, with `Global.re_ranking: True`, k-reciprocal re-ranking.
"""

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from recnb.data.lists import ImageList, own_index
from recnb.data.loaders import batches_on, divided
from recnb.distributed.processes import from_all, joined
from recnb.distributed.rows import is_divided
from recnb.registry import Count, Registry
from recnb.retrieval.metrics import DEFINITIONS, ranking_metrics, retrieval_metrics
from recnb.retrieval.rerank import KReciprocal, alpha_query_expansion, database_augmentation, fit_whitening
from recnb.storage import replacing
from recnb.training.allocator import keep_freed_memory

METRICS = Registry("metric")
POST_PROCESS = Registry("post-processing step")
DEFAULT_METRICS = ("recall1", "recall5", "mAP")


@METRICS.register
def Recallk(topk: list[Count] | None = None) -> list[str]:
    """recall{k}: the share of queries with a right image among their first k."""
    return [f"recall{k}" for k in topk or (1, 5)]


@METRICS.register
def Precisionk(topk: list[Count] | None = None) -> list[str]:
    """precision@{k}: how many of the first k are right."""
    return [f"precision@{k}" for k in topk or (1, 5)]


@METRICS.register
def mAP() -> list[str]:
    """mAP: the mean over queries of average precision over the whole ranking."""
    return ["mAP"]


@METRICS.register
def mINP() -> list[str]:
    """mINP: the number of right images over the rank of the last of them."""
    return ["mINP"]


@METRICS.register
def TopkAcc(topk: list[Count] | None = None) -> list[str]:
    """top{k}: in classification, the share of images with their class among the k most likely."""
    return [f"top{k}" for k in topk or (1, 5)]


@POST_PROCESS.register
def AlphaQueryExpansion(k: int = 10, alpha: float = 3.0) -> Callable:
    """Each query joined by its k nearest, weighted by cosine ** alpha."""
    return lambda query, gallery, train: (alpha_query_expansion(query, gallery, k, alpha), gallery)


@POST_PROCESS.register
def DatabaseAugmentation(k: int = 10, alpha: float = 3.0) -> Callable:
    """Each gallery item joined by its k nearest, weighted by cosine ** alpha."""
    return lambda query, gallery, train: (query, database_augmentation(gallery, k, alpha))


@POST_PROCESS.register
def Whitening(dimensions: int | None = None, whiten: bool = True) -> Callable:
    """Projection to the leading principal components of the training images; `whiten: False` leaves their lengths."""

    def step(query: Tensor, gallery: Tensor, train: Callable) -> tuple:
        project = fit_whitening(train(), dimensions, whiten)
        return project(query), project(gallery)

    return step


def binarized(kind: str) -> Callable:
    """Return the step that makes codes of -1 and 1.

    `kind` is sign, or round: for features between 0 and 1, from 0.5 on.
    """
    codes = {"sign": torch.sign, "round": lambda x: (x >= 0.5).float() * 2 - 1}[kind]
    return lambda query, gallery, train: (codes(query), codes(gallery))


@dataclass
class Evaluation:
    """What a model makes of query and gallery images: their features, and what these retrieve.

    `per_query` has the values whose mean is the metric, nan for a query that has nothing to find.
    """

    query: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (Q, D) float32, before any post-processing
    gallery: Tensor = field(default_factory=lambda: torch.empty(0, 0))  # (G, D)
    metrics: dict[str, float] = field(default_factory=dict)
    per_query: dict[str, np.ndarray] = field(default_factory=dict)  # (Q,) float64


@dataclass
class Judge:
    """The metrics `names` of query features (Q, D) against gallery features (G, D), which belong to two lists.

    The order is by cosine, or by k-reciprocal distance. An image never retrieves itself, nor its identity's images of
    its camera.

    Args:
        names: Keys of `retrieval_metrics`.
        steps: They change the features in turn: `(query, gallery, train) -> (query, gallery)`, where `train()` gives
            the features of the training images.
        re_ranking: Whether the order is by k-reciprocal distance.
        normalize: Whether features are compared by their cosine; otherwise by their dot product.
        device: Where they are compared; None: where they are.
    """

    names: Sequence[str] = DEFAULT_METRICS
    steps: Sequence[Callable] = ()
    re_ranking: bool = False
    normalize: bool = True
    device: str | torch.device | None = None
    reads = None  # the features

    def __call__(
        self, query: Tensor, gallery: Tensor, asked: ImageList, items: ImageList, train: Callable | None = None
    ) -> Evaluation:
        first, second = query, gallery
        for step in self.steps:
            first, second = step(first, second, train)
        lists = (asked.labels, items.labels, asked.cameras, items.cameras)
        options: dict[str, Any] = {
            "exclude_self": own_index(asked, items),
            "metrics": list(dict.fromkeys(map(definition, self.names))),
            "topk": sorted({int(name) for key in self.names for name in re.findall(r"\d+$", key)}) or (1,),
            "per_query": True,
        }
        if self.re_ranking:
            distances = KReciprocal(first, None if asked is items else second, device=self.device)
            scores, arrays = ranking_metrics(distances, *lists, **options)
        else:
            options |= {"distance": "cosine" if self.normalize else "dot", "device": self.device}
            scores, arrays = retrieval_metrics(first, second, *lists, **options)
        values = {name: np.where(arrays["valid"], arrays[name], np.nan) for name in self.names}
        return Evaluation(query, gallery, {name: scores[name] for name in self.names}, values)


def definition(name: str) -> str:
    """Return the key of `DEFINITIONS` that a metric's name is made of: its own, or `recall{k}` of `recall5`."""
    return name if name in DEFINITIONS else re.sub(r"\d+$", "{k}", name)


@dataclass
class Accuracy:
    """The metrics top{k}: the share of images with their class among the k most likely.

    Args:
        names: Such as `top1`.
        head: Makes logits (N, classes) of what `reads` takes; None where the features are logits.
        reads: What the head takes of the model's outputs.
    """

    names: Sequence[str]
    head: nn.Module | None = None
    reads: Callable | None = None

    def __call__(self, query: Tensor, gallery: Tensor, asked: ImageList, *_) -> Evaluation:
        with torch.inference_mode():
            device = next((p.device for p in self.head.parameters()), query.device) if self.head else query.device
            logits = self.head(query.to(device)).float().cpu() if self.head else query
        own = logits.gather(1, torch.from_numpy(asked.labels)[:, None])
        place = (logits >= own).sum(1) - 1  # how many classes come before, one that is as likely among them
        hits = {name: (place < int(name[3:])).float() for name in self.names}
        metrics = {name: values.mean().item() for name, values in hits.items()}
        return Evaluation(query, gallery, metrics, {name: values.double().numpy() for name, values in hits.items()})


def embed(
    model: nn.Module,
    loader: DataLoader,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    amp: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """Return the features (N, D) of a loader's images, float32 on the CPU, by the model in evaluation mode.

    Args:
        model: Its output holds `features`.
        loader: Images in the order of their list.
        flip: Whether the features of the mirrored images are averaged with the images' own, each at length 1.
        scales: The sizes, as shares of an image's own, over whose features is averaged likewise.
        amp: Whether to compute in bfloat16.
        cache: A folder that keeps the features under a key of the weights, the transforms and the files (path, size,
            time), so that no change of any of them finds old ones.
        progress: Whether a bar is shown where it takes long.
    """
    kept = Path(cache) / f"{fingerprint(model, loader.dataset, flip, scales, amp)}.npy" if cache else None
    if kept and kept.exists():
        return torch.from_numpy(np.load(kept))
    device, training = next(model.parameters()).device, model.training
    keep_freed_memory(device)
    model.eval()
    plain, found = not any(map(is_divided, model.parameters())), []
    try:
        # fully_shard keeps the memory that it makes here for training, which takes nothing of inference mode
        with torch.inference_mode(plain), torch.no_grad(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            own = divided(loader)
            batches = tqdm(batches_on(own, device), "embedding", len(own), False, delay=5, disable=not progress)
            behind = passes_behind(model, len(own))
            for x, _ in batches:
                found.append(views(model, x, flip, scales).float().cpu())
            for _ in range(behind):
                views(model, x, flip, scales)
            features = joined(torch.cat(found))
    finally:
        model.train(training)
    if kept:
        with replacing(kept) as path, path.open("wb") as file:
            np.save(file, features.numpy())
    return features.clone()


def passes_behind(model: nn.Module, batches: int) -> int:
    """Return how many forward passes to add to those of the batches, for as many as another process makes.

    Where weights are divided all processes make each pass. They have to call it, before the first one.

    Args:
        model: Says whether its weights are divided.
        batches: How many this process has.
    """
    return max(from_all(batches)) - batches if any(map(is_divided, model.parameters())) else 0


def views(model: nn.Module, x: Tensor, flip: bool, scales: Sequence[float]) -> Tensor:  # (B, 3, H, W) -> (B, D)
    """Return the features (B, D) of a batch (B, 3, H, W), averaged over its mirror images and scales.

    Args:
        model: Its output holds `features`.
        x: The images.
        flip: Whether mirror images are averaged with their own.
        scales: The sizes, as shares of an image's own.
    """
    sizes = [x if s == 1 else F.interpolate(x, scale_factor=s, mode="bilinear", antialias=True) for s in scales]
    features = [model(image)["features"] for size in sizes for image in ([size, size.flip(-1)] if flip else [size])]
    return features[0] if len(features) == 1 else torch.stack([F.normalize(f.float()) for f in features]).mean(0)


def fingerprint(model: nn.Module, images: Any, *options) -> str:
    """Return a key of all that features of an ImageList depend on: weights, transforms, files with times, options."""
    boxes = None if images.boxes is None else images.boxes.tolist()
    key = hashlib.sha256(repr((str(model), str(images.transform), boxes, options)).encode())
    for name, value in model.state_dict().items():
        key.update(name.encode())
        key.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for path in images.paths:
        stat = Path(path).stat()
        key.update(f"{path}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return key.hexdigest()[:32]
