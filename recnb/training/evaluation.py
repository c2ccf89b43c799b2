"""From a model and lists of images to numbers: embedding, post-processing, retrieval metrics.

`embed` makes the features of a list, `judge` what they retrieve. Between the two stand the steps of the section
PostProcess and, with `Global.re_ranking: True`, k-reciprocal re-ranking.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from recnb.data.lists import ImageList, own_index
from recnb.data.loaders import batches_on, divided
from recnb.distributed.processes import joined
from recnb.registry import Registry
from recnb.retrieval.metrics import ranking_metrics, retrieval_metrics
from recnb.retrieval.rerank import KReciprocal, alpha_query_expansion, database_augmentation, fit_whitening
from recnb.storage import replacing

METRICS = Registry("metric", "Metric.Eval[]", "Metric.Train[]")
POST_PROCESS = Registry("post-processing step", "PostProcess[]")
DEFAULT_METRICS = ("recall1", "recall5", "mAP")


@METRICS.register
def Recallk(topk: list | None = None) -> list[str]:
    """recall{k}: the share of queries with a right image among their first k."""
    return [f"recall{k}" for k in topk or (1, 5)]


@METRICS.register
def Precisionk(topk: list | None = None) -> list[str]:
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
def TopkAcc(topk: list | None = None) -> list[str]:
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
    return lambda query, gallery, train: tuple(map(fit_whitening(train(), dimensions, whiten), (query, gallery)))


def binarized(kind: str) -> Callable:
    """The step that makes codes of -1 and 1: by the sign, or ('round', for features between 0 and 1) from 0.5 on."""

    def step(query: Tensor, gallery: Tensor, train: Callable | None) -> tuple[Tensor, Tensor]:
        return tuple(x.sign() if kind == "sign" else (x >= 0.5).float() * 2 - 1 for x in (query, gallery))

    return step


def classified(names: Sequence[str], model: nn.Module, features: Tensor, images: ImageList) -> dict[str, float]:
    """top{k} of images by the logits of the model's head for its inputs (N, D), or by the features without a head."""
    head = getattr(model, "head", None)
    with torch.inference_mode():
        logits = features if head is None else head(features.to(next(model.parameters()).device)).float().cpu()
    own = logits.gather(1, torch.from_numpy(images.labels)[:, None])
    place = (logits >= own).sum(1) - 1  # how many classes come before, one that is as likely among them
    return {name: (place < int(name[3:])).float().mean().item() for name in names}


def judge(
    query_features,
    gallery_features,
    query: ImageList,
    gallery: ImageList,
    names: Sequence[str] = DEFAULT_METRICS,
    steps: Sequence[Callable] = (),
    re_ranking: bool = False,
    train: Callable | None = None,
    normalize: bool = True,
) -> dict[str, float]:
    """The metrics `names` of query features (Q, D) against gallery features (G, D), which belong to the two lists.

    `steps` change the features in turn; `train()` gives the training images' where a step asks for them. The order is
    by cosine, or by k-reciprocal distance. An image never retrieves itself, nor its identity's images of its camera.
    """
    for step in steps:
        query_features, gallery_features = step(query_features, gallery_features, train)
    lists = (query.labels, gallery.labels, query.cameras, gallery.cameras)
    kinds = list(dict.fromkeys(re.sub(r"\d+$", "{k}", name) for name in names))  # one order in all processes
    options = {
        "exclude_self": own_index(query, gallery),
        "metrics": kinds,
        "topk": sorted({int(name) for key in names for name in re.findall(r"\d+$", key)}) or (1,),
    }
    if re_ranking:
        same = query is gallery
        scores = ranking_metrics(KReciprocal(query_features, None if same else gallery_features), *lists, **options)
    else:
        options["distance"] = "cosine" if normalize else "dot"
        scores = retrieval_metrics(query_features, gallery_features, *lists, **options)
    return {name: scores[name] for name in names}


def embed(
    model: nn.Module,
    loader: DataLoader,
    flip: bool = False,
    scales: Sequence[float] = (1.0,),
    amp: bool = False,
    cache: str | Path | None = None,
    progress: bool = True,
) -> Tensor:
    """The features (N, D) of a loader's images, float32 on the CPU, by the model in evaluation mode.

    flip, scales: the features of the mirrored and of the resized images are averaged with the image's own, each at
    length 1. amp: bfloat16 where the device computes in it. cache: a folder that keeps the features under a key of
    the weights, the transforms and the files (path, size, time), so that no change of any of them finds old ones.
    """
    kept = Path(cache) / f"{fingerprint(model, loader.dataset, flip, scales, amp)}.npy" if cache else None
    if kept and kept.exists():
        return torch.from_numpy(np.load(kept))
    device, training = next(model.parameters()).device, model.training
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device.type, torch.bfloat16, enabled=amp):
            own = divided(loader)
            batches = tqdm(batches_on(own, device), "embedding", len(own), False, delay=5, disable=not progress)
            features = joined(torch.cat([views(model, x, flip, scales).float().cpu() for x, _ in batches]))
    finally:
        model.train(training)
    if kept:
        with replacing(kept) as path, path.open("wb") as file:
            np.save(file, features.numpy())
    return features.clone()


def views(model: nn.Module, x: Tensor, flip: bool, scales: Sequence[float]) -> Tensor:  # (B, 3, H, W) -> (B, D)
    """The features of a batch, averaged over its mirror images and scales where these are asked for."""
    sizes = [x if s == 1 else F.interpolate(x, scale_factor=s, mode="bilinear", antialias=True) for s in scales]
    features = [model(image)["features"] for size in sizes for image in ([size, size.flip(-1)] if flip else [size])]
    return features[0] if len(features) == 1 else sum(F.normalize(f.float()) for f in features) / len(features)


def fingerprint(model: nn.Module, images: ImageList, *options) -> str:
    """A key of all that features depend on: weights, transforms, the files with their sizes and times, and options."""
    boxes = None if images.boxes is None else images.boxes.tolist()
    key = hashlib.sha256(repr((str(model), str(images.transform), boxes, options)).encode())
    for name, value in model.state_dict().items():
        key.update(name.encode())
        key.update(value.cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    for path in images.paths:
        stat = Path(path).stat()
        key.update(f"{path}\n{stat.st_size} {stat.st_mtime_ns}\n".encode())
    return key.hexdigest()[:32]
