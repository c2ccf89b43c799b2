"""Regions: where two pictures agree, by a model's last spatial map and without a gradient.

The heat at a location of one picture is the cosine of its vector with the mean vector of the other picture's map: 0 is
no agreement, 1 the same direction. The scale is fixed, so that heats of different pairs can be compared.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import interpolate, normalize


def agreement(model: nn.Module, a: Tensor, b: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Return the heats of two model inputs, each (H, W) in [0, 1].

    Args:
        model: A model with a `backbone`, or a backbone.
        a: (3, H, W).
        b: (3, H, W).
    """
    first, second = spatial_map(model, a), spatial_map(model, b)
    return heat(first, second, a.shape[1:]), heat(second, first, b.shape[1:])


def heat(own: Tensor, other: Tensor, size: Sequence[int]) -> np.ndarray:
    """Return the cosine of each location of map `own` with the mean vector of `other`, below 0 as 0.

    Args:
        own: (C, h, w).
        other: (C, h2, w2).
        size: height and width of the result.
    """
    own, other = (normalize(x.float(), dim=0) for x in (own, other))
    cosine = torch.einsum("chw,c->hw", own, normalize(other.mean((1, 2)), dim=0)).clamp(0, 1)
    return interpolate(cosine[None, None], list(size), mode="bilinear")[0, 0].cpu().numpy()


def spatial_map(model: nn.Module, x: Tensor) -> Tensor:
    """Return the last map (C, h, w) that the backbone makes of one input (3, H, W).

    It is the last of at least 16 places or, without such a map, the last of any size.

    Raises:
        ValueError: the backbone makes no map at all.
    """
    backbone = getattr(model, "backbone", model)
    found: dict[bool, Tensor] = {}
    prefix = getattr(backbone, "prefix_tokens", 0) or 0

    def keep(_, __, out) -> None:
        values = as_map(out[0], x.shape[1] / x.shape[2], prefix) if isinstance(out, Tensor) and len(out) == 1 else None
        if values is not None:
            found[values.shape[1:].numel() >= 16] = values

    hooks = [module.register_forward_hook(keep) for module in backbone.modules()]
    try:
        with torch.no_grad():
            backbone(x[None].to(next(model.parameters()).device))
    finally:
        for hook in hooks:
            hook.remove()
    if not found:
        raise ValueError("the backbone makes no spatial map, so there are no regions to compare")
    return found[max(found)]


def as_map(out: Tensor, aspect: float, prefix: int = 0) -> Tensor | None:
    """Return an output as a map (C, h, w), or None where it is no map.

    Args:
        out: (C, h, w), (h, w, C), or tokens (prefix + h * w, C).
        aspect: height of the input by its width.
        prefix: how many tokens at the beginning belong to no place.
    """
    if out.ndim == 2 and len(out) - prefix > 1:
        tokens = out[prefix:]
        height = max(1, round((len(tokens) * aspect) ** 0.5))
        return None if len(tokens) % height else tokens.T.reshape(out.shape[1], height, -1)
    if out.ndim != 3:
        return None
    last = abs(out.shape[0] / out.shape[1] - aspect) < abs(out.shape[1] / out.shape[2] - aspect)
    out = out.permute(2, 0, 1) if last else out
    return out if out.shape[1:].numel() > 1 else None
