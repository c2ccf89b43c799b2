"""Which parts a file may name, and where: importing this module fills the registries."""

from recnb.data import augmix, layouts  # noqa: F401 (these too register transforms and data sets)
from recnb.data.augment import BATCH_TRANSFORMS
from recnb.data.lists import DATASETS
from recnb.data.samplers import SAMPLERS
from recnb.data.transforms import TRANSFORMS
from recnb.losses import distillation, hashing, memories, pairs, pml  # noqa: F401 (and these losses)
from recnb.losses.combined import LOSSES
from recnb.models.heads import HEADS
from recnb.models.necks import NECKS
from recnb.training.evaluation import METRICS, POST_PROCESS
from recnb.training.optim import OPTIMIZERS, REGULARIZERS
from recnb.training.schedules import SCHEDULES

SLOTS = {  # the places of a file where a name stands; `*` is each list of images, `[]` a list of names
    "DataLoader.*.dataset": DATASETS,
    "DataLoader.*.dataset.transform_ops[]": TRANSFORMS,
    "DataLoader.Train.dataset.batch_transform_ops[]": BATCH_TRANSFORMS,
    "DataLoader.*.sampler": SAMPLERS,
    "Arch.Neck": NECKS,
    "Arch.Head": HEADS,
    "Loss.Train[]": LOSSES,
    "Loss.Eval[]": LOSSES,
    "Optimizer": OPTIMIZERS,
    "Optimizer.regularizer": REGULARIZERS,
    "Optimizer.lr": SCHEDULES,
    "Metric.Eval[]": METRICS,
    "Metric.Train[]": METRICS,
    "PostProcess[]": POST_PROCESS,
}
