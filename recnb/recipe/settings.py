"""What the sections that are no part's constructor call may say: each key with its type, bounds and default."""

from __future__ import annotations

import os
from dataclasses import MISSING, dataclass, field, fields
from typing import Annotated, Any, Literal, get_type_hints

from recnb.registry import Count, Natural, Positive, Range, Rate, Side

WORKERS = max(64, 8 * (os.cpu_count() or 1))  # more take the machine's memory and make nothing faster


@dataclass
class Global:
    """The settings of a run as a whole.

    Args:
        checkpoints: a checkpoint to go on from
        pretrained_model: weights of the whole model to start from: `.safetensors`, `.pth`, `.pdparams` or a checkpoint
        pretrained_strict: refuse a `.pdparams` that does not fill the model, its head apart, or has more in it
        output_dir: the run folder, where none is given at the start
        device: `auto`: a GPU where there is one; `gpu`: the same, and a line says where there is none; `cpu`
        class_num: the number of training identities; counted where it is left out
        save_interval: keep a checkpoint of every so many epochs; 0 for none
        eval_during_train: evaluate while training
        eval_interval: evaluate after every so many epochs; the last one is always evaluated
        epochs: how many epochs to train
        print_batch_step: a line in `train.log` every so many steps
        use_visualdl: write scalars for VisualDL (`pip install 'recnb[track]'`)
        loggers: where the curves go too: `tensorboard`, `wandb`, `mlflow`, `visualdl`; see [](../runs.md)
        image_shape: what `transform_ops` make: [3, height, width]
        save_inference_dir: where `05_export` writes; `export/` in the run folder where it is left alone
        eval_mode: `retrieval`, or `classification` (the default with `Eval.dataset`)
        seed: of all random draws
        re_ranking: k-reciprocal [re-ranking](../glossary.md#re-ranking) in evaluation
        start_eval_epoch: evaluate from this epoch on
        update_freq: how many batches a step of the optimizer sums
        iter_per_epoch: steps in an epoch; the sampler's length where it is left out
        devices: how many processes, or `auto`: one for each GPU; see [](../devices.md)
        channels_last: channels last in memory; faster on recent GPUs
        compile: `model.compile()`
        grad_cache: compute the backbone in parts of so many images; see [](../performance.md)
        grad_checkpointing: compute blocks again in the backward pass, to save memory
        save_steps: save every so many steps too, so that no more are repeated after a kill
        keep_checkpoints: how many `epoch_N.pt` are kept; all where it is left out
        patience: stop behind so many epochs without a better first metric; never where it is left out
        cache_images: a folder for decoded and resized images
        on_nonfinite: `stop` at a loss that is not finite, or `skip` the step
        on_bad_image: `stop` at an image that cannot be read, or `drop` it
        retrieval_feature_from: which output is searched with: `features`, `neck` or `backbone`
        feature_normalize: embeddings at length 1
        feature_binarize: `round` or `sign`: binary codes
        recipe: `ladder`: climb from the untouched features to fine-tuned ones, keep the best; see [](../ladder.md)
        probe: freeze the backbone, keep what it gives for so many views of each image, and train neck and head on that
        probe_cache: the folder for these features
        accept_changes: go on with a run although its lists or the weights it began from have changed
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
    channels_last: bool = False
    compile: bool = False
    grad_cache: Count | None = None
    grad_checkpointing: bool = False
    save_steps: Count | None = None
    keep_checkpoints: Count | None = None
    patience: Count | None = None
    cache_images: str | None = None
    on_nonfinite: Literal["stop", "skip"] = "stop"
    on_bad_image: Literal["stop", "drop"] = "stop"
    retrieval_feature_from: Literal["features", "neck", "backbone"] = "features"
    feature_normalize: bool = True
    feature_binarize: Literal["round", "sign"] | None = None
    recipe: Literal["ladder"] | None = None
    probe: Count | None = None
    probe_cache: str = "./cache/features"
    accept_changes: bool = False


@dataclass
class WithoutEffect:
    """Keys of Global in the original that change no result here: how it computes or logs."""

    use_dali: bool | None = None
    to_static: bool | None = None
    sim_block_size: int | None = None
    print_mem_info: bool | None = None
    log_ranks: str | None = None
    infer_imgs: str | None = None
    warmup_iter: int | None = None
    use_multilabel: bool | None = None


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
        minutes: behind so many it ends with the best rung so far; null for as long as it takes
        folds: how often identities are held out in turn; where it is left out 4, and 1 from 40 identities on
        refit: train the kept rung again on all training identities, those held out included
    """

    minutes: Rate | None = 20.0
    folds: Count | None = None
    refit: bool = True


@dataclass
class Retention:
    """What keeps a pretrained network near its start.

    Args:
        batch_norm: `trained`, or `frozen`: batch statistics stay as they were
        thaw_epoch: so many first epochs train only neck and head
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
        prefetch_factor: how many batches each of them is ahead
    """

    num_workers: Annotated[int, Range(0, WORKERS)] | None = None
    use_shared_memory: bool = True
    prefetch_factor: Annotated[int, Range(1, 256)] | None = None


@dataclass
class Split:
    """A list of images: which, in what batches, and how they are loaded."""

    dataset: Any = None
    sampler: Any = None
    loader: Any = None


@dataclass
class Lists(Split):
    """The lists of an evaluation: query and gallery or, in classification, one list."""

    Query: Any = None
    Gallery: Any = None


@dataclass
class HeldOut:
    """A share of the training identities to validate on.

    Args:
        share: how many of the training identities are held out
        seed: of the draw
    """

    share: Annotated[float, Range(above=0, below=1)] | None = None
    seed: Natural = 0


@dataclass
class AnyArch:
    """What a RecModel and a DistillationModel both say."""

    name: str = "RecModel"
    infer_output_key: str | None = None
    infer_add_softmax: bool | Literal["True", "False", "true", "false"] | None = None
    is_rec: Any = None
    use_sync_bn: bool | None = None


@dataclass
class Arch(AnyArch):
    """The section of one RecModel."""

    head_feature_from: Literal["neck", "backbone"] = "neck"
    freeze: list[str] | None = None
    Backbone: dict | None = None
    BackboneStopLayer: dict | None = None
    Neck: Any = None
    Head: Any = None


@dataclass
class StopLayer:
    """Where the backbone ends."""

    name: str | None = None
    output_dim: Count | None = None


@dataclass
class Distillation(AnyArch):
    """The section of several models that are trained together."""

    models: list | None = None
    infer_model_name: str | None = None
    freeze_params_list: list | None = None
    pretrained_list: list | None = None


def hints(*sections: type) -> dict[str, Any]:
    """Return what sections of these kinds may say: each key with its annotation."""
    return {key: hint for section in sections for key, hint in get_type_hints(section, include_extras=True).items()}


def defaults(section: type) -> dict[str, Any]:
    """Return each key of a kind of section with its default, which belongs to the caller."""
    return {f.name: f.default if f.default_factory is MISSING else f.default_factory() for f in fields(section)}


GLOBAL, AMP, EMA, LADDER = (defaults(section) for section in (Global, Amp, Ema, Ladder))
WITHOUT_EFFECT = (*defaults(WithoutEffect),)
