"""Which parts a configuration may name, and where: importing this module fills the registries.

A user's own parts are registered by a Python file that the command line names; a configuration cannot name it. Its path
is kept in the environment, so that processes and kernels started from here import it too.
"""

import importlib.util
import os
import sys
import traceback
from pathlib import Path

from recnb.data import layouts  # noqa: F401 (it too registers data sets)
from recnb.data.augment import BATCH_TRANSFORMS
from recnb.data.lists import DATASETS
from recnb.data.samplers import SAMPLERS
from recnb.data.transforms import TRANSFORMS
from recnb.losses import distillation, hashing, memories, pairs, pml  # noqa: F401 (and these losses)
from recnb.losses.combined import LOSSES
from recnb.models.heads import HEADS
from recnb.models.necks import NECKS
from recnb.registry import ConfigError
from recnb.storage import resolve, sha256
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

VARIABLE = "RECNB_PARTS"
IMPORTED: dict[str, str] = {}  # the names of such modules in the order of import, with the hashes of their files


def use_parts(file: str | Path) -> None:
    """Import a Python file of parts, here and in the processes started from here.

    Raises:
        ConfigError: There is no such file, or it cannot be imported.
    """
    path = resolve(file).absolute()
    import_parts(path)
    os.environ[VARIABLE] = str(path)


def import_parts(path: Path) -> None:
    """Import a Python file unless it is the one imported last; raise ConfigError where that fails."""
    if not path.is_file():
        raise ConfigError(f"parts: there is no file {path}")
    name, content = path.stem, sha256(path)
    if content == next(reversed(IMPORTED.values()), None):
        return
    if name in sys.modules and name not in IMPORTED:
        raise ConfigError(f"parts: {path}: there is a module '{name}' already; give the file another name")
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"parts: {path}: is not a Python file, NAME.py")
    writes, sys.dont_write_bytecode = sys.dont_write_bytecode, True  # a run folder stays as it is
    try:
        sys.modules[name] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules[name])
    except Exception as error:  # whatever is wrong in somebody's file
        del sys.modules[name]
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = getattr(error, "lineno", None) or (lines[-1] if lines else "")
        raise ConfigError(f"parts: {path} line {line}: {type(error).__name__}: {error}") from error
    finally:
        sys.dont_write_bytecode = writes
    sys.path.append(str(path.parent))  # for the workers of loaders where these are not forked
    IMPORTED.pop(name, None)
    IMPORTED[name] = content


def parts_in_use() -> Path | None:
    """Return the file of parts that this process, or the one that started it, was given."""
    return Path(os.environ[VARIABLE]) if os.environ.get(VARIABLE) else None


if own := parts_in_use():
    import_parts(own)
