"""Any loss of pytorch-metric-learning by its name, with a miner where wanted; the package is an optional one.

- PML: {loss: ProxyAnchorLoss, num_classes: 100, embedding_size: 512, weight: 1.0}
"""

import importlib
import inspect
from typing import Any

from torch import Tensor, nn

from recnb.losses.combined import LOSSES
from recnb.losses.pairs import rows
from recnb.registry import suggest


def part(kind: str, name: str, args: dict) -> nn.Module:
    """Return the loss or miner of pytorch-metric-learning of that name.

    Args:
        kind: `losses` or `miners`.
        name: of the class.
        args: of its constructor.

    Raises:
        ValueError: There is none, or the package is not installed.
    """
    try:
        known = vars(importlib.import_module(f"pytorch_metric_learning.{kind}"))
    except ImportError:
        raise ValueError("PML needs pytorch-metric-learning: pip install 'recnb[pml]'") from None
    classes: dict[str, Any] = {key: value for key, value in known.items() if inspect.isclass(value)}
    if name not in classes:
        raise ValueError(f"pytorch-metric-learning has no {name} among its {kind}; {suggest(name, classes)}")
    return classes[name](**args)


@LOSSES.register
class PML(nn.Module):
    """A loss of pytorch-metric-learning over the features. Its parameters are optimised and kept like any loss's.

    Args:
        loss: the name of its class.
        miner: that of what chooses the pairs that it is given; None: it gets the batch alone.
        miner_args: the miner's arguments.
        feature_from: the model's output that is compared.
        **arguments: the loss's own.
    """

    def __init__(
        self,
        loss: str,
        miner: str | None = None,
        miner_args: dict | None = None,
        feature_from: str = "features",
        **arguments,
    ):
        super().__init__()
        self.loss, self.feature_from = part("losses", loss, arguments), feature_from
        self.miner = part("miners", miner, miner_args or {}) if miner else None

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        features = rows(out, self.feature_from, False)
        return self.loss(features, y, *([self.miner(features, y)] if self.miner else ()))
