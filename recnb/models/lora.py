"""Low-rank adaptation by peft: a transformer stays as it is, and small matrices beside its layers are trained."""

from collections.abc import Sequence

import torch
from torch import nn

from recnb.models.cutting import Cut, _parameters_behind, listed


def add_lora(backbone: Cut, rank: int = 8, alpha: int = 16, targets: Sequence[str] = ("qkv",)) -> None:
    """Freeze a backbone, and train beside each of its target layers a product of two matrices, which begins at zero.

    LoRA (Hu et al., https://arxiv.org/abs/2106.09685).

    Args:
        backbone: it is changed in place, and its output is the same at first.
        rank: of the product.
        alpha: it counts `alpha / rank` times.
        targets: the last words of the layers' names, such as qkv, proj, fc1 and fc2 of timm's transformers.

    Raises:
        ValueError: peft is missing, no layer has such a name, or the backbone reads a layer's weights past the product.
    """
    try:
        from peft import LoraConfig, inject_adapter_in_model
    except ImportError:
        raise ValueError("lora needs peft: pip install 'recnb[lora]'") from None
    if isinstance(targets, str) or not all(isinstance(name, str) for name in targets):
        raise ValueError(f"lora.targets is {targets!r}, and not a list of names, such as [qkv]")
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=alpha, target_modules=[*targets]), backbone.model)
    used = _parameters_behind(backbone.eval()(torch.zeros(1, *backbone.input_size)))
    backbone.train()
    lost = [name for name, p in backbone.model.named_parameters() if p.requires_grad and id(p) not in used]
    if lost:
        raise ValueError(
            f"lora has no effect on {listed(lost, 2)}, which the network does not call; name other targets"
        )


def merge_lora(model: nn.Module) -> None:
    """Add each product to the weights that it was trained beside, in place; a model without any stays as it is."""
    for name, part in list(model.named_modules()):
        if hasattr(part, "lora_A"):
            part.merge(safe_merge=True)
            model.set_submodule(name, part.get_base_layer())
