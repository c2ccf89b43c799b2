"""RecModel: a cut backbone, a neck that makes the embedding, a head that exists while training.

The forward pass returns a dict, so that each loss takes what it needs and so that the same model serves training,
evaluation and export.
"""

import contextlib
from collections.abc import Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import torch
from torch import Tensor, nn

from recnb.models.chunks import in_chunks
from recnb.registry import suggest


class RecModel(nn.Module):
    """`model(x, y=None) -> dict` with `backbone`, `neck` (where there is one), `features` (B, D) and `logits`.

    `features` is the neck's output, or the backbone's. Logits are computed only when there is a head and labels `y`
    are given: retrieval never needs them.

    Args:
        backbone: images (B, 3, H, W) -> maps, tokens or vectors.
        neck: these -> the embedding (B, D); None: the backbone gives it.
        head: (features, y) -> logits (B, class_num); None: no loss needs any.

    Attributes:
        retrieval_feature_from: the output that `features` is in evaluation.
        head_feature_from: the part that the head reads, `neck` or `backbone`.
        precision: of training under autocast, float16 or bfloat16; None: float32.
        half_evaluation: whether evaluation has that precision too.
        sizes: of `backbone` (flat) and `features`, where they are known.
        grad_cache: images computed at a time while training; None: all.
        frozen: parts whose weights and batch statistics stay as they are.
        rests: whether the backbone's batch normalisations keep the statistics that they begin with.
        on_features: whether `x` is what the (frozen) backbone gave, and not images.
    """

    retrieval_feature_from, head_feature_from = "features", "neck"
    precision: torch.dtype | None = None
    sizes: dict[str, int] | None = None
    half_evaluation = False
    grad_cache: int | None = None
    frozen: tuple[str, ...] = ()
    rests = False
    on_features = False

    def __init__(self, backbone: nn.Module, neck: nn.Module | None = None, head: nn.Module | None = None):
        super().__init__()
        self.backbone, self.neck, self.head = backbone, neck, head

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:  # (B, 3, H, W), (B,)
        half = self.precision is not None and (self.training or self.half_evaluation)
        with torch.autocast(x.device.type, self.precision) if half else contextlib.nullcontext():
            return self.parts(x, y)

    def parts(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor]:
        """What `forward` gives, in the precision that it is called in."""
        out = in_chunks(self.embed, x, self.grad_cache if self.training else None, self)
        if self.head is not None and y is not None:
            out["logits"] = self.head(self.head_input(out), y)  # (B, class_num)
        if not self.training and self.retrieval_feature_from != "features":
            out["features"] = vectors(out[self.retrieval_feature_from])
        return out

    def embed(self, x: Tensor) -> dict[str, Tensor]:
        """What needs no labels: `backbone`, `neck` (where there is one) and `features` (B, D)."""
        out = {"backbone": x if self.on_features else self.backbone(x)}
        if self.neck is not None:
            out["neck"] = self.neck(out["backbone"])
        return out | {"features": vectors(out.get("neck", out["backbone"]))}

    def head_input(self, out: dict[str, Tensor]) -> Tensor:
        """Return what the head reads of the model's outputs, (B, D), in training, evaluation and export alike."""
        behind = self.head_feature_from == "backbone" or self.neck is None
        return vectors(out["backbone" if behind else "neck"])

    def train(self, mode: bool = True) -> "RecModel":
        super().train(mode)
        for name in self.frozen:
            self.get_submodule(name).eval()
        for part in self.backbone.modules() if self.rests else ():
            if isinstance(part, nn.modules.batchnorm._BatchNorm):
                part.eval()
        return self

    def freeze(self, names: Sequence[str]) -> None:
        """Keep these parts (patterns of module names such as 'backbone.model.layer1*') as they are from now on.

        Raises:
            ValueError: No part has such a name.
        """
        known = [name for name, _ in self.named_modules()]
        for pattern in names:
            found = [name for name in known if name and fnmatch(name, pattern)]
            if not found:
                raise ValueError(f"freeze: no part is called '{pattern}'; {suggest(pattern, known)}")
            self.frozen = (*self.frozen, *found)
        for name in self.frozen:
            self.get_submodule(name).eval().requires_grad_(False)

    def describe(self) -> str:
        """A line for each part: what it is, what it gives, how many parameters it has."""
        end = getattr(self.backbone, "stop", None) or "its end"
        shape = getattr(self.backbone, "out_shape", None)  # a backbone of one's own need not know it
        parts = {
            "backbone": f"cut at {end}, gives {shape}" if shape else "not cut",
            "neck": "makes the embedding",
            "head": "for training only",
        }
        rows = [
            (
                part,
                type(getattr(self.backbone, "model", module) if part == "backbone" else module).__name__,
                text,
                sum(p.numel() for p in module.parameters()),
            )
            for part, text in parts.items()
            if (module := getattr(self, part)) is not None
        ]
        return "\n".join(f"{part:<9} {kind:<14} {text:<36} {count:>12,} parameters" for part, kind, text, count in rows)


def vectors(x: Tensor) -> Tensor:
    """(B, D) from maps of one pixel (B, D, 1, 1); anything else as it is."""
    return x.flatten(1) if x.shape[2:].numel() == 1 else x


class DistillationModel(nn.Module):
    """`model(x, y=None) -> dict`: each model's outputs by its name, and those of `chosen` at the top as well.

    In evaluation only the chosen model runs.

    Args:
        models: RecModels by their names.
        chosen: the name of the one that is used.
    """

    def __init__(self, models: Mapping[str, nn.Module], chosen: str):
        super().__init__()
        self.models, self.chosen = nn.ModuleDict(models), chosen

    @property
    def used(self) -> Any:
        return self.models[self.chosen]

    @property
    def backbone(self) -> nn.Module:
        return self.used.backbone

    @property
    def sizes(self) -> dict[str, int]:
        return self.used.sizes

    @property
    def head(self) -> nn.Module | None:
        return self.used.head

    def forward(self, x: Tensor, y: Tensor | None = None) -> dict[str, Tensor | dict]:  # (B, 3, H, W), (B,)
        names = self.models if self.training else [self.chosen]
        out = {name: self.models[name](x, y) for name in names}
        return {**out[self.chosen], **out}

    def head_input(self, out: dict) -> Tensor:
        """Return what the chosen model's head reads of the outputs, (B, D)."""
        return self.used.head_input(out)

    def describe(self) -> str:
        """The lines of each model, under its name."""
        models: Any = self.models
        return "\n".join(
            f"{name}{' (the one that is used)' * (name == self.chosen)}\n{model.describe()}"
            for name, model in models.items()
        )
