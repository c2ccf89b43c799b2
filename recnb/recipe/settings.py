"""The keys of the sections that do not name a part, each with its type, bounds and default."""

import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, get_type_hints

from recnb.registry import Count, Natural, Positive, Range, Rate, Side

WORKERS = max(64, 8 * (os.cpu_count() or 1))  # more take memory and make nothing faster


@dataclass
class Global:
    """The settings of a run as a whole.

    Args:
        checkpoints: a checkpoint to go on from
        pretrained_model: weights of the whole model to start from: `.safetensors`, `.pth`, `.pdparams` or a checkpoint
        pretrained_strict: refuse a `.pdparams` that does not fill the model without its head, or has more in it
        output_dir: the run folder, where none is given at the start
        device: `auto`: a GPU where there is one; `gpu`: the same, and a line says if there is none; `cpu`
        class_num: the number of training identities; counted where it is left out
        save_interval: epochs between the checkpoints that are kept; 0 for none
        eval_during_train: evaluate while training
        eval_interval: epochs between evaluations; the last epoch is always evaluated
        epochs: how many epochs to train
        print_batch_step: steps between the lines of `train.log`
        use_visualdl: write scalars for VisualDL (`pip install 'recnb[track]'`)
        loggers: where the curves go too: `tensorboard`, `wandb`, `mlflow`, `visualdl`; see [](../runs.md)
        image_shape: what `transform_ops` make: [3, height, width]
        save_inference_dir: where `05_export` writes; by default `export/` in the run folder
        eval_mode: `retrieval`, or `classification` (the default with `Eval.dataset`)
        seed: of all random draws
        re_ranking: k-reciprocal [re-ranking](../glossary.md#re-ranking) in evaluation
        start_eval_epoch: evaluate from this epoch on
        update_freq: how many batches make a step of the optimizer
        iter_per_epoch: steps in an epoch; the sampler's length where it is left out
        devices: how many processes, or `auto`: one for each GPU; see [](../devices.md)
        fully_shard: divide the backbone's weights over the processes, for a backbone too large for one device; see
            [](../devices.md)
        channels_last: channels last in memory: convolutions are faster so on a CPU, where it is the default, and on
            recent GPUs with half precision
        compile: `model.compile()`
        grad_cache: how many images the backbone computes at a time; see [](../performance.md)
        grad_checkpointing: compute blocks again in the backward pass, to save memory
        save_steps: steps between further checkpoints, which a kill repeats at most
        keep_checkpoints: how many `epoch_N.pt` are kept, the latest; all where it is left out
        patience: stop after this many epochs without a better first metric; never where it is left out
        cache_images: a folder for decoded and resized images
        on_nonfinite: `stop` at a loss that is not finite, or `skip` the step
        on_bad_image: `stop` at an image that cannot be read, or `drop` it
        on_finding: `say` what is probably a mistake, or `stop` at it, before anything is written
        retrieval_feature_from: which output is searched with: `features`, `neck` or `backbone`
        feature_normalize: embeddings at length 1
        feature_binarize: `round` or `sign`: binary codes
        recipe: `ladder`: try from untouched features to fine-tuned ones and keep the best; see [](../ladder.md)
        probe: freeze the backbone and train neck and head on its stored output, for this many views of each image
        probe_cache: the folder of that output
        accept_changes: resume a run although its lists, its parts or the starting weights have changed
    """

    checkpoints: str | None = None
    pretrained_model: str | None = None
    pretrained_strict: bool = True
    output_dir: str | None = None
    device: Literal["auto", "gpu", "cpu"] = "auto"
    class_num: Count | None = None
    save_interval: Natural = 1
    eval_during_train: bool = True
    eval_interval: Count = 1
    epochs: Natural = 10
    print_batch_step: Count = 10
    use_visualdl: bool = False
    loggers: list[Literal["tensorboard", "wandb", "mlflow", "visualdl"]] = field(default_factory=list)
    image_shape: list[Side] = field(default_factory=lambda: [3, 224, 224])
    save_inference_dir: str = "./inference"
    eval_mode: Literal["retrieval", "classification"] = "retrieval"
    seed: Natural = 0
    re_ranking: bool = False
    start_eval_epoch: Natural = 0
    update_freq: Count = 1
    iter_per_epoch: Count | None = None
    devices: Annotated[int, Range(1, 1024)] | Literal["auto"] = 1
    fully_shard: bool = False
    channels_last: bool | None = None
    compile: bool = False
    grad_cache: Count | None = None
    grad_checkpointing: bool = False
    save_steps: Count | None = None
    keep_checkpoints: Count | None = None
    patience: Count | None = None
    cache_images: str | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_bad_image: Literal["stop", "drop"] = "stop"
    on_finding: Literal["say", "stop"] = "say"
    retrieval_feature_from: Literal["features", "neck", "backbone"] = "features"
    feature_normalize: bool = True
    feature_binarize: Literal["round", "sign"] | None = None
    recipe: Literal["ladder"] | None = None
    probe: Count | None = None
    probe_cache: str = "./cache/features"
    accept_changes: bool = False


@dataclass
class Amp:
    """Mixed precision.

    Args:
        use_amp: compute in half precision where that is safe
        level: `O1`, or `O2`: evaluation in half precision too
        dtype: `float16` or `bfloat16`; what the device is fast with where it is left out
        scale_loss: the first scale of the loss; the scaler finds its own
        use_dynamic_loss_scaling: without effect: the scale always follows the gradients
        use_fp16_test: evaluate in half precision
        use_promote: without effect
    """

    use_amp: bool = True
    level: Literal["O1", "O2"] = "O1"
    dtype: Literal["float16", "bfloat16"] | None = None
    scale_loss: Positive = 1.0
    use_dynamic_loss_scaling: bool = True
    use_fp16_test: bool = False
    use_promote: bool = False


@dataclass
class Ema:
    """A running average of the weights, which is what is evaluated and kept.

    Args:
        decay: how much of the average stays at each step
    """

    decay: Annotated[float, Range(above=0, below=1)] = 0.9999


@dataclass
class Ladder:
    """How a ladder is climbed (`Global.recipe: ladder`).

    Args:
        minutes: after this time it ends with the best rung so far; null for as long as it takes
        folds: how many times identities are held out in turn; where it is left out 4, or 1 from 40 identities on
        refit: train the rung that is kept again, on all training identities
    """

    minutes: Rate | None = 20.0
    folds: Count | None = None
    refit: bool = True


@dataclass
class Retention:
    """What keeps a pretrained network near its start.

    Args:
        batch_norm: `trained`, or `frozen`: batch statistics stay as they were
        thaw_epoch: how many epochs at the start train only neck and head
        pull: how strongly each step pulls the backbone's weights towards the starting ones
        distill: weight of the cosine distance to the starting backbone's output for the same images
        imprint: whether the head's weights begin as the classes' mean embeddings
    """

    batch_norm: Literal["trained", "frozen"] = "trained"
    thaw_epoch: Natural = 0
    pull: Rate = 0.0
    distill: Rate = 0.0
    imprint: bool = False


@dataclass
class Loader:
    """How the images of a list are loaded.

    Args:
        num_workers: processes that read images; by the number of cores where it is left out
        use_shared_memory: without effect: torch always shares memory
        prefetch_factor: how many batches each of these processes prepares ahead
    """

    num_workers: Annotated[int, Range(0, WORKERS)] | None = None
    use_shared_memory: bool = True
    prefetch_factor: Annotated[int, Range(1, 256)] | None = None


@dataclass
class HeldOut:
    """A share of the training identities to validate on.

    Args:
        share: how many of the training identities are held out
        seed: of the draw
    """

    share: Annotated[float, Range(above=0, below=1)] | None = None
    seed: Natural = 0


# Sections that name other sections, or without defaults: each key with what it may be.
WITHOUT_EFFECT: dict[str, Any] = {  # keys of Global in the original that change no result here: how it computes or logs
    **dict.fromkeys(("use_dali", "to_static", "print_mem_info", "use_multilabel"), bool | None),
    **dict.fromkeys(("sim_block_size", "warmup_iter"), int | None),
    **dict.fromkeys(("log_ranks", "infer_imgs"), str | None),
}
SPLIT: dict[str, Any] = {"dataset": Any, "sampler": Any, "loader": Any}  # a list of images
EVALUATION: dict[str, Any] = {**SPLIT, "Query": Any, "Gallery": Any}  # what is evaluated; in classification one list
ANY_ARCH: dict[str, Any] = {
    "name": str,
    "infer_output_key": str | None,
    "infer_add_softmax": bool | Literal["True", "False", "true", "false"] | None,
    "is_rec": Any,
    "use_sync_bn": bool | None,
}
RECMODEL: dict[str, Any] = {
    **ANY_ARCH,
    "head_feature_from": Literal["neck", "backbone"],
    "freeze": list[str] | None,
    "Backbone": dict | None,
    "BackboneStopLayer": dict | None,
    "Neck": Any,
    "Head": Any,
}
STOP_LAYER: dict[str, Any] = {"name": str | None, "output_dim": Count | None}  # where the backbone ends
DISTILLATION: dict[str, Any] = {  # several models that are trained together
    **ANY_ARCH,
    "models": list | None,
    "infer_model_name": str | None,
    "freeze_params_list": list | None,
    "pretrained_list": list | None,
}


def hints(section: type) -> dict[str, Any]:
    """Return what a section of this kind may say: each key with its annotation."""
    return get_type_hints(section, include_extras=True)


def defaults(section: type) -> dict[str, Any]:
    """Return each key of a kind of section with its default; the caller may change it."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(section)}


GLOBAL = defaults(Global)
