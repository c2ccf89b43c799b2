"""Several models trained together on the same images, and the losses between them.

Their outputs stand under their names, and those of the model that is to be used also at the top, so that evaluation and
the other losses see one model.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recnb.losses.combined import LOSSES
from recnb.models.heads import check_labels, precise

DISTANCES = {"l2": F.mse_loss, "l1": F.l1_loss, "smooth_l1": F.smooth_l1_loss}


def output(out: dict, name: str, key: str) -> Tensor:
    """Return one model's output.

    Args:
        out: the outputs of a DistillationModel.
        name: whose.
        key: which.

    Raises:
        ValueError: There is none; a KeyError of Python's would name neither.
    """
    if name not in out or key not in out[name]:
        known = [n for n, part in out.items() if isinstance(part, dict)]
        raise ValueError(f"there is no output '{key}' of a model '{name}'; there are the models {', '.join(known)}")
    return out[name][key]


@LOSSES.register
class DistillationGTCELoss(nn.Module):
    """The sum of the cross entropies of several models' logits with the labels.

    Args:
        model_names: whose logits.
        epsilon: smooths the labels, as in CELoss.
        key: the output that holds the logits.
    """

    needs_logits, of_each_image = True, True

    def __init__(self, model_names: list, epsilon: float | None = None, key: str | None = "logits"):
        super().__init__()
        self.model_names, self.epsilon, self.key = model_names, epsilon or 0.0, key or "logits"

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        values = []
        for name in self.model_names:
            logits = precise(output(out, name, self.key))
            check_labels(y, logits.shape[1], f"the model {name}")
            values.append(F.cross_entropy(logits, y, label_smoothing=self.epsilon))
        return torch.stack(values).sum()


@LOSSES.register
class DistillationDMLLoss(nn.Module):
    """Mutual learning (https://arxiv.org/abs/1706.00384): the mean of both Kullback-Leibler divergences of two models.

    Args:
        model_name_pairs: lists of two names; pairs are summed.
        act: makes probabilities of the outputs: softmax, or sigmoid entry by entry.
        key: the output that is compared.

    Raises:
        ValueError: The act is another.
    """

    of_each_image = True

    def __init__(self, model_name_pairs: list, act: str = "softmax", key: str | None = "logits"):
        super().__init__()
        if act not in ("softmax", "sigmoid"):
            raise ValueError(f"act is '{act}', only 'softmax' and 'sigmoid' exist")
        self.model_name_pairs, self.key = model_name_pairs, key or "logits"
        self.needs_logits = self.key == "logits"
        self.log_act = F.logsigmoid if act == "sigmoid" else lambda x: x.log_softmax(-1)

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        values = []
        for pair in self.model_name_pairs:
            a, b = (self.log_act(precise(output(out, name, self.key))) for name in pair)
            both = ((a.exp() - b.exp()) * (a - b)).flatten(1).sum(1)  # of the two divergences
            values.append(both.mean() / 2)
        return torch.stack(values).sum()


@LOSSES.register
class DistillationDistanceLoss(nn.Module):
    """The mean distance of two models' outputs.

    Args:
        model_name_pairs: lists of two names; pairs are summed.
        mode: l2 (squared), l1 or smooth_l1.
        key: the output that is compared.

    Raises:
        ValueError: The mode is another.
    """

    of_each_image = True

    def __init__(self, model_name_pairs: list, mode: str = "l2", key: str | None = "features"):
        super().__init__()
        if mode not in DISTANCES:
            raise ValueError(f"mode is '{mode}', only {', '.join(DISTANCES)} exist")
        self.model_name_pairs, self.distance, self.key = model_name_pairs, DISTANCES[mode], key or "features"
        self.needs_logits = self.key == "logits"

    def forward(self, out: dict[str, Tensor], y: Tensor) -> Tensor:
        pairs = [[precise(output(out, name, self.key)) for name in pair] for pair in self.model_name_pairs]
        for a, b in pairs:
            if a.shape != b.shape:
                raise ValueError(
                    f"the outputs '{self.key}' of the models have the sizes {tuple(a.shape[1:])} and "
                    f"{tuple(b.shape[1:])}; compare outputs of one size, such as logits"
                )
        return torch.stack([self.distance(a, b) for a, b in pairs]).sum()
