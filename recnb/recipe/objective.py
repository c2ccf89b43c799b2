"""Build the loss of the section Loss, and the judge of embeddings of Metric and PostProcess."""

import torch

from recnb.losses.combined import LOSSES, CombinedLoss
from recnb.recipe.schema import check_logits, items
from recnb.registry import ConfigError
from recnb.retrieval.metrics import DEFINITIONS
from recnb.training.evaluation import DEFAULT_METRICS, METRICS, POST_PROCESS, Accuracy, Judge, TopkAcc, binarized


def build_metrics(cfg: dict) -> list[str]:
    """Return the keys of the metrics that a configuration lists, in its order, or the usual ones of its mode.

    Raises:
        ConfigError: A metric belongs to the other mode.
    """
    single, names = cfg["Global"]["eval_mode"] == "classification", []
    for place, name, args in items(cfg, "Metric.Eval"):
        if (name == "TopkAcc") != single:
            raise ConfigError(
                f"{place}: {name} does not belong to Global.eval_mode {cfg['Global']['eval_mode']}; "
                f"{'list TopkAcc' if single else 'list Recallk, mAP, mINP or Precisionk'}"
            )
        found = METRICS.build({"name": name, **args}, place)
        if isinstance(found, dict):  # of one's own: keys with the functions that define them
            DEFINITIONS.update(found)
        names += found
    return names or (TopkAcc() if single else list(DEFAULT_METRICS))


def build_judge(
    cfg: dict, model: torch.nn.Module | None = None, device: str | torch.device | None = None
) -> Judge | Accuracy:
    """Return what judges features: the metrics, the post-processing and the re-ranking of a configuration.

    Args:
        cfg: The checked configuration.
        model: In classification its head is judged, which takes what it reads instead of features.
        device: Where features are compared; None: where they are.
    """
    settings, names = cfg["Global"], build_metrics(cfg)
    steps = [POST_PROCESS.build({"name": name, **args}, place) for place, name, args in items(cfg, "PostProcess")]
    if settings["eval_mode"] == "classification":
        head, reads = getattr(model, "head", None), getattr(model, "head_input", None)
        return Accuracy(names) if head is None else Accuracy(names, head, reads)
    if settings["feature_binarize"]:
        steps.insert(0, binarized(settings["feature_binarize"]))
    return Judge(names, steps, settings["re_ranking"], settings["feature_normalize"], device)


def build_loss(
    cfg: dict, where: str = "Loss.Train", classes: int | None = None, sizes: dict[str, int] | None = None
) -> CombinedLoss:
    """Return the weighted sum of the losses that a configuration lists.

    Args:
        cfg: The checked configuration.
        where: The section, Loss.Train or Loss.Eval.
        classes: The number of training identities, for a loss with centres or a memory that leaves it out.
        sizes: The sizes of `features` and of `backbone`, flat, likewise.

    Raises:
        ConfigError: A loss needs a head and there is none.
    """
    weighted, kinds = [], []
    for place, name, args in items(cfg, where):
        known: dict[str, tuple] = {}
        if classes and (args.get("num_classes") or 0) <= classes:  # of more, only a part may be trained on
            known["num_classes"] = (classes, "the training identities are")
        if size := (sizes or {}).get(args.get("feature_from", "features")):
            known |= dict.fromkeys(("feat_dim", "embedding_size"), (size, "the model gives features of size"))
        loss = LOSSES.build({"name": name, **args}, place, **known)
        if getattr(loss, "needs_logits", False):
            check_logits(cfg, place, name)
        weighted.append((float(args.get("weight", 1.0)), loss))
        kinds.append(name)
    return CombinedLoss(weighted, kinds)
