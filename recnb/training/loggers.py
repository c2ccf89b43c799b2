"""Where the curves of a run can be watched besides its own folder: TensorBoard, Weights & Biases, MLflow, VisualDL.

Each is a library of its own, imported once a run asks for it. A logger is opened with the run folder and the
configuration, and gives two functions: one that writes values, one that ends the log.
"""

import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

from recnb.registry import ConfigError


class Logger(NamedTuple):
    """An open log: `write(values, kind, number)` for the step or the epoch of a number, and `close()`."""

    write: Callable[[dict[str, float], str, int], object]
    close: Callable[[], object]


def tensorboard(folder: Path, config: dict) -> Logger:
    """Open event files in `tensorboard/` of the run folder."""
    from torch.utils.tensorboard import SummaryWriter

    return scalars(SummaryWriter(str(folder / "tensorboard")))


def visualdl(folder: Path, config: dict) -> Logger:
    """Open log files in `vdl/` of the run folder."""
    from visualdl import LogWriter

    return scalars(LogWriter(logdir=str(folder / "vdl")))


def scalars(writer) -> Logger:
    """Return the log of a writer that takes one scalar at a time."""

    def write(values: dict[str, float], kind: str, number: int) -> None:
        for name, value in values.items():
            writer.add_scalar(name, value, number)

    return Logger(write, writer.close)


def wandb(folder: Path, config: dict) -> Logger:
    """Open a run of the folder's name in the project that the environment names, or else in `recnb`."""
    import wandb

    project = os.environ.get("WANDB_PROJECT", "recnb")
    run = wandb.init(project=project, name=folder.name, dir=str(folder), config=config)
    for prefix, kind in (("train", "step"), ("epoch", "epoch")):  # its own counter would mix the two
        run.define_metric(f"{prefix}_*", step_metric=kind)
    return Logger(lambda values, kind, number: run.log({**values, kind: number}), run.finish)


def mlflow(folder: Path, config: dict) -> Logger:
    """Open a run of the folder's name on the environment's tracking server, or else in the folder's `mlflow.db`."""
    import mlflow

    if "MLFLOW_TRACKING_URI" not in os.environ:
        mlflow.set_tracking_uri(f"sqlite:///{folder.absolute() / 'mlflow.db'}")
    mlflow.start_run(run_name=folder.name, tags={"folder": str(folder.absolute())})

    def write(values: dict[str, float], kind: str, number: int) -> None:
        mlflow.log_metrics({name.replace("@", "_at_"): value for name, value in values.items()}, step=number)

    return Logger(write, mlflow.end_run)


LOGGERS: dict[str, Callable[[Path, dict], Logger]] = {
    "tensorboard": tensorboard,
    "wandb": wandb,
    "mlflow": mlflow,
    "visualdl": visualdl,
}
EXTRAS = {"visualdl": "track"}  # where the extra has another name than the logger


def check_installed(names: Sequence[str], where: str) -> None:
    """Raise ConfigError where the library of a logger is missing, naming the extra that brings it."""
    for name in names:
        if not importlib.util.find_spec(name):
            extra = EXTRAS.get(name, name)
            raise ConfigError(f"{where}: {name} is not installed; pip install 'recnb[{extra}]', or leave it out")


@contextmanager
def opened(names: Sequence[str], folder: Path, config: dict) -> Iterator[list[Logger]]:
    """Open loggers for the block.

    Args:
        names: Keys of LOGGERS.
        folder: The run folder.
        config: The configuration, for loggers that show it.
    """
    loggers = [LOGGERS[name](folder, config) for name in names]
    try:
        yield loggers
    finally:
        for logger in loggers:
            logger.close()
