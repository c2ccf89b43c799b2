"""What a fit is told before it begins, and what its callbacks tell each other while it runs."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from recnb.distributed.processes import averaged, ranks
from recnb.training.retention import Retention


@dataclass(kw_only=True)
class Schedule:
    """How long, at which learning rates, and how a step is made of batches."""

    epochs: int
    rates: Sequence[Callable]  # one for each optimizer, from its steps so far and the first metric's values so far
    update_freq: int = 1  # batches to one step of the optimizer
    decay: float | None = None  # of the moving average of the weights
    half: torch.dtype | None = None  # with float16, losses are scaled
    skip_nonfinite: bool = False


@dataclass(kw_only=True)
class Keeping:
    """What is kept to go on from, and what may be gone on from."""

    config: str = "{}"  # the configuration as JSON text, kept in the checkpoint
    contents: str = "{}"  # what the lists and the weights held, as JSON text, kept in the checkpoint
    check_same: Callable = lambda state, path: None  # raises ConfigError for a checkpoint of another configuration
    checkpoint: Path | None = None  # to resume from where the folder holds none
    save_interval: int = 1  # epochs from one numbered checkpoint to the next; 0: none
    save_steps: int | None = None  # batches from one `latest.pt` to the next within an epoch
    keep_checkpoints: int | None = None  # how many numbered ones


@dataclass(kw_only=True)
class Watching:
    """When the model is evaluated while it trains."""

    interval: int = 1  # epochs; 0: never
    first: int = 0  # the epochs before it are not evaluated
    patience: int | None = None  # epochs without a better value of the first metric, behind which training ends


@dataclass(kw_only=True)
class Plan:
    """What `fit_config` does and writes down."""

    folder: Path
    schedule: Schedule
    keeping: Keeping = field(default_factory=Keeping)
    evaluation: Watching = field(default_factory=Watching)
    retention: Retention = field(default_factory=Retention)
    log_interval: int = 10  # steps from one line of train.log to the next
    loggers: Sequence[str] = ()  # of `recnb.training.loggers`
    seed: int = 0
    devices: int = 1


@dataclass
class FitState:
    """What the callbacks of one fit share; all but `rates` and `skipped` is kept in its checkpoints."""

    rows: list[dict] = field(default_factory=list)  # one an epoch, as in history.csv
    best: dict = field(default_factory=dict)  # `epoch` and `value`, by the first metric
    sums: dict[str, Tensor] = field(default_factory=dict)  # of the loss and its terms over this epoch's batches
    count: int = 0  # of these batches
    rates: list[float] = field(default_factory=list)  # the learning rate of each optimizer in this step
    skipped: bool = False  # whether this step is left out

    def join(self) -> None:
        """Make the sums those of all processes, whose losses of single images are of their own."""
        if self.sums and ranks()[1] > 1:
            self.sums = dict(zip(self.sums, averaged(torch.stack([*self.sums.values()])).unbind(), strict=True))
