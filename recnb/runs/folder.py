"""The run folder: what was run, on what, with what result.

config.yaml  the resolved configuration: loading it gives the same run      env.json  versions, device, seed, commit
ladder.yaml  of a ladder, the configuration that is climbed      rungs/  its runs     ladder.csv  what they came to
contents.json  checksums of the lists' lines and of the weights     SHA256SUMS  of what the results are read from
history.csv  one row an epoch     metrics.json  before, after, gain, intervals     queries.csv  what each query scored
model.safetensors, checkpoints/, gallery.html, train.log, and the executed notebook itself
"""

import copy
import json
import math
import os
import platform
import subprocess
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from pandas.api.types import is_numeric_dtype
from torchvision.transforms.v2.functional import pil_to_tensor

from recnb.data.images import DataError
from recnb.data.lists import ImageList, own_index, read_csv, same_list
from recnb.gallery.pictures import read_picture
from recnb.models.recmodel import DistillationModel, RecModel
from recnb.models.weights import load_weights
from recnb.recipe.data import build_transform, evaluation_images, evaluation_places
from recnb.recipe.ladder import base, is_ladder
from recnb.recipe.model import build_model
from recnb.recipe.parts import import_parts, parts_in_use
from recnb.recipe.reading import as_yaml, read_yaml
from recnb.recipe.resolved import check_contents, check_kept, check_same, contents, resolved, with_paths
from recnb.recipe.schema import architectures, load_config, lookup
from recnb.registry import ConfigError
from recnb.retrieval.lists import Ranking, rank
from recnb.retrieval.rerank import k_reciprocal
from recnb.storage import ROOT, SUMS, check_sums, locked, resolve, sha256, write_json, write_sums, write_text
from recnb.training.checkpoints import kept

PARTS = ("query", "gallery")  # the lists of an evaluation, and their files in embeddings/
PACKAGES = ("recnb", "torch", "torchvision", "fastai", "timm", "faiss-cpu", "numpy", "pillow", "papermill")
SUMMED = (  # what results are read from; weights and checkpoints carry their own checksums
    *("config.yaml", "contents.json", "env.json", "history.csv", "labels.csv", "metrics.json"),
    *("ladder.csv", "ladder.yaml"),
    *(f"embeddings/{part}.{kind}" for part in PARTS for kind in ("npy", "csv")),
    *("parts.py", "queries.csv"),
)


def open_run(run_dir: str | Path, cfg: dict, classes: int | None = None) -> Path:
    """Make a run folder where it is missing, write config.yaml, contents.json and env.json, and return its path.

    Args:
        run_dir: The folder.
        cfg: The checked configuration; of a ladder, config.yaml is the first rung's until one is kept.
        classes: The number of training identities, for config.yaml; without it the training list is read.

    Raises:
        ConfigError: The folder cannot be made, or belongs to another configuration or to other lists or weights.
        LockedError: Another process writes to it. In either case nothing in it has changed.
    """
    run, ours = resolve_run(run_dir), resolved(cfg, classes)
    try:
        run.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"run_dir: {run} cannot be made: {error}") from error
    with locked(run):
        climbed, begun = run / "ladder.yaml", (run / "rungs").is_dir()
        if begun and climbed.is_file():
            check_same(ours, undamaged(run, climbed, read_yaml), climbed)
        begin(run, base(cfg), classes)
        if is_ladder(cfg) and not begun:
            write_text(climbed, as_yaml(ours))
    return run


def begin(run: Path, cfg: dict, classes: int | None = None) -> None:
    """Write what a folder holds before there are results; `open_run` says what of, and when it raises an error."""
    ours, read = resolved(cfg, classes), contents(cfg)
    with locked(run):
        before = ["queries.csv"] * (run / "queries.csv").is_file()  # which a run that goes on reads
        if before and (run / SUMS).exists():
            check_sums(run, before)
        read = check_begun(run, ours, read) | read
        write_text(run / "config.yaml", as_yaml(ours))
        write_json(run / "contents.json", read)
        write_json(run / "env.json", {**environment(cfg), "parts": keep_parts(run)})
        (run / SUMS).unlink(missing_ok=True)  # of the results, which are about to change
        if before:
            write_sums(run, before)


def check_begun(run: Path, ours: dict, read: dict) -> dict:
    """Return what the files held with which the rungs in a folder began, nothing where no rung did.

    Args:
        run: The folder.
        ours: The resolved configuration.
        read: What its lists and weights hold.

    Raises:
        ConfigError: What has begun in the folder belongs to another configuration or to other files.
    """
    latest, known = run / "checkpoints" / "latest.pt", run / "contents.json"
    if latest.is_file():
        check_kept(ours, read, kept(latest), latest)
    if latest.is_file() or not known.is_file() or not (run / "rungs").is_dir():
        return {}
    old = undamaged(run, known, lambda path: json.loads(path.read_text(encoding="utf-8")))
    check_contents(ours, read, old, known)
    return old


def keep_parts(run: Path) -> dict[str, str] | None:
    """Copy the file of the user's own parts into the run folder, and return its name and hash; None without one."""
    own, stored = parts_in_use(), run / "parts.py"
    if own is None:
        return None
    write_text(stored, own.read_text(encoding="utf-8"))
    return {"file": own.name, "sha256": sha256(stored)}


def resolve_run(run_dir: str | Path) -> Path:
    """Return the path of a run folder; a relative one counts from the project's root."""
    run = Path(run_dir)
    return run if run.is_absolute() else ROOT / run


def environment(cfg: dict) -> dict:
    """Return what env.json holds: versions, device, threads, seed and commit."""

    def installed(package: str) -> str | None:
        try:
            return version(package)
        except PackageNotFoundError:
            return None

    device = torch.cuda.get_device_name() if torch.cuda.is_available() and cfg["Global"]["device"] != "cpu" else "cpu"
    return {
        "python": platform.python_version(),
        "platform": platform.platform(),
        "device": device,
        "threads": torch.get_num_threads(),
        "seed": cfg["Global"]["seed"],
        "commit": commit(),
        "packages": {package: installed(package) for package in PACKAGES},
    }


def commit() -> str | None:
    """Return the project's git commit, with a plus where files differ from it, or None outside a checkout."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--exclude=*", "--abbrev=40", "--dirty=+"]
    try:
        return subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL).strip()
    except (OSError, subprocess.CalledProcessError):
        return None


@dataclass
class Run:
    """A finished run as its folder has it: configuration, evaluation lists and their features, results.

    The lists are read when they are first asked for: the rest of a run can be used where its images are not.
    """

    folder: Path
    cfg: dict
    lists: Callable[[], tuple[ImageList, ImageList]]  # gives query and gallery
    query_features: np.ndarray  # (Q, D) float32
    gallery_features: np.ndarray  # (G, D)
    metrics: dict
    history: pd.DataFrame

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def query(self) -> ImageList:
        return self.lists()[0]

    @property
    def gallery(self) -> ImageList:
        return self.lists()[1]

    def content(self, part: str) -> tuple[list[str], list[str], list[int] | None]:
        """Return what a list says, wherever it lies: paths from the image root on, names of identities, cameras.

        Args:
            part: "query" or "gallery".
        """
        images, root = getattr(self, part), image_root(self.cfg, part.title())
        cameras = None if images.cameras is None else images.cameras.tolist()
        paths = [below(path, root) + str(getattr(path, "box", "")) for path in images.pictures]
        return paths, [*map(images.name, images.labels.tolist())], cameras

    @property
    def class_names(self) -> list[str]:
        """The names of the training identities, in the order of their labels."""
        return undamaged(self.folder, self.folder / "labels.csv", lambda path: read_csv(path)["name"].tolist())

    @property
    def exclude_self(self) -> np.ndarray:
        """(Q,) the gallery row of each query's own file, -1 where it is not in the gallery."""
        return own_index(self.query, self.gallery)

    def rank(self, k: int = 10, re_ranking: bool = False) -> Ranking:
        """Return the first k of every query's list, judged; ordered by cosine, or by k-reciprocal distance."""
        others = None if same_list(self.query, self.gallery) else self.gallery_features
        scores = -k_reciprocal(self.query_features, others) if re_ranking else None
        return rank(
            self.query_features,
            self.gallery_features,
            self.query.labels,
            self.gallery.labels,
            self.query.cameras,
            self.gallery.cameras,
            self.exclude_self,
            k,
            scores=scores,
        )

    def model(self) -> RecModel | DistillationModel:
        """Return the trained model in evaluation mode, on the CPU."""
        use_own_parts(self.folder)  # another run's may have come since
        model = build_model(untrained(self.cfg))
        load_weights(model, self.folder / "model.safetensors")
        return model.eval()


def use_own_parts(run: Path) -> None:
    """Import a run's copy of the user's parts, where it has one."""
    if (run / "parts.py").is_file():
        import_parts(run.absolute() / "parts.py")


def below(path: str, root: str) -> str:
    """Return a path relative to a folder, or whole where there is no folder or the path is outside."""
    inside = os.path.relpath(path, root) if root else path
    return str(path) if inside.startswith("..") else Path(inside).as_posix()


def image_root(cfg: dict, part: str = "Query") -> str:
    """Return the folder that the paths of the query list, or of the gallery list, start from."""
    section = lookup(cfg, f"DataLoader.Eval.{part}.dataset") or lookup(cfg, "DataLoader.Eval.dataset") or {}
    return str(resolve(section.get("image_root") or ""))


def model_input(run: Run, picture) -> torch.Tensor:
    """Return a picture (path, PIL image or array) transformed as in the run's evaluation, (3, H, W)."""
    transform = build_transform(run.cfg, f"{evaluation_places(run.cfg)[0]}.dataset")
    return transform(pil_to_tensor(read_picture(picture, 4096)))


def embed_picture(run: Run, model: torch.nn.Module, picture) -> np.ndarray:
    """Return the embedding (D,) of one picture.

    Args:
        run: The run, for the transforms of its evaluation.
        model: Its model, as `run.model()` gives it.
        picture: A path, PIL image or array.
    """
    with torch.inference_mode():
        return model(model_input(run, picture)[None])["features"][0].float().numpy()


def untrained(cfg: dict) -> dict:
    """Return the configuration of a model that is not trained: without pretrained weights or recomputed blocks."""
    cfg = copy.deepcopy(cfg)
    cfg["Global"] |= {"pretrained_model": None, "grad_checkpointing": False}
    cfg["Arch"].pop("pretrained_list", None)
    for _, section in architectures(cfg):
        section["Backbone"]["pretrained"] = False
    return cfg


def load_run(folder: str | Path) -> Run:
    """Return the run of a folder that training has finished, wherever the folder and its images are.

    Raises:
        ConfigError: Something is missing, damaged, or cannot be true; the message names the file.
    """
    run = resolve(folder)
    parts = {name: run / "embeddings" / f"{name}.npy" for name in PARTS}
    for path in (run / "config.yaml", run / "metrics.json", run / "history.csv", *parts.values()):
        if not path.is_file():
            raise ConfigError(
                f"{run}: is not the folder of a finished run, {path.relative_to(run)} is missing; 02_train writes one"
            )
    if (run / SUMS).exists():  # not where training has begun again, or has written none yet
        check_sums(run)
    use_own_parts(run)
    cfg = with_paths(load_config(run / "config.yaml"), partial(beside, run))
    features = [undamaged(run, path, read_vectors) for path in parts.values()]
    if features[0].shape[1] != features[1].shape[1]:
        sizes = " and ".join(str(values.shape[1]) for values in features)
        raise ConfigError(f"{run}: embeddings/query.npy and gallery.npy are of two runs, with {sizes} dimensions")
    metrics = undamaged(run, run / "metrics.json", read_metrics)
    lists = cache(partial(read_lists, run, cfg, features))
    return Run(run, cfg, lists, features[0], features[1], metrics, undamaged(run, run / "history.csv", read_history))


def beside(run: Path, path: str) -> str:
    """Return the file that a relative path of a run means: below the nearest folder around the run that has it."""
    places = (folder / path for folder in run.absolute().parents)
    return path if Path(path).is_absolute() else next((str(place) for place in places if place.exists()), path)


def read_vectors(path: Path) -> np.ndarray:
    """Return the embeddings (N, D) of a file; raise ValueError unless they are finite numbers."""
    values = np.load(path, allow_pickle=False)
    if values.ndim != 2 or not values.size or values.dtype.kind != "f":
        raise ValueError(f"it holds {values.dtype} {values.shape}, not floats (N, D)")
    if not np.isfinite(values).all():
        raise ValueError(f"row {np.flatnonzero(~np.isfinite(values).all(1))[0]} is not finite")
    return values


def read_metrics(path: Path) -> dict:
    """Return the content of metrics.json; raise ValueError unless it maps names to finite numbers, or to mappings."""
    metrics = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(metrics, dict):
        raise ValueError("it is not a mapping of metrics")
    for name, value in metrics.items():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if not (number or isinstance(value, dict)):
            raise ValueError(f"{name} is {value!r}, not a finite number")
    return metrics


def read_history(path: Path) -> pd.DataFrame:
    """Return history.csv; raise ValueError unless it has epochs."""
    history = pd.read_csv(path)
    if "epoch" not in history or history.empty or not is_numeric_dtype(history.epoch):
        raise ValueError("it has no column of epochs")
    return history


def read_lists(run: Path, cfg: dict, features: Sequence[np.ndarray]) -> tuple[ImageList, ImageList]:
    """Return a run's query and gallery list with their transforms.

    Where the lists are not on this machine, they are those that the run folder keeps.

    Args:
        run: The folder.
        cfg: The run's configuration.
        features: The embeddings of the query and of the gallery, a row for each image.

    Raises:
        DataError: The lists are neither on this machine nor in the run folder.
        ConfigError: They have changed since the run.
    """
    stored = undamaged(run, run / "embeddings", lambda _: kept_rows(run))
    try:
        lists = evaluation_images(cfg)
    except (DataError, OSError):
        if not stored:
            raise
        lists = stored
    for where, images, values, rows in zip(evaluation_places(cfg), lists, features, stored or lists, strict=True):
        images.transform = build_transform(cfg, f"{where}.dataset")
        if len(images) != len(values):
            raise ConfigError(
                f"{run}: embeddings has {len(values)} rows for the {len(images)} images of "
                f"{images.source}; the list has changed since the run"
            )
        pairs = zip(told(images), told(rows), strict=True)
        if other := next((pair for pair in pairs if pair[0] != pair[1]), None):
            raise ConfigError(
                f"{run}: {images.source} has {other[0]} where embeddings has {other[1]}; the list has changed since "
                "the run"
            )
    return lists


def told(images: ImageList) -> Iterator[str]:
    """Yield what a list says of each image, wherever the images are: the file, the identity, the camera."""
    cameras = [""] * len(images) if images.cameras is None else images.cameras.tolist()
    for path, label, camera in zip(images.paths, images.labels.tolist(), cameras, strict=True):
        text = f"{'/'.join(path.rsplit('/', 2)[-2:])} {images.name(label)} {camera}".rstrip()
        yield text.encode("utf-8", "backslashreplace").decode()  # as it stands in a CSV


def kept_rows(run: Path) -> tuple[ImageList, ImageList] | None:
    """Return the query and the gallery list that `save_rows` wrote, without transforms, or None if it wrote none."""
    files = [run / "embeddings" / f"{part}.csv" for part in PARTS]
    if not all(path.is_file() for path in files):
        return None
    query, gallery = map(read_csv, files)
    names = np.unique(np.concatenate([query.label.to_numpy(str), gallery.label.to_numpy(str)]))
    return images_in(query, names, files[0]), images_in(gallery, names, files[1])


def images_in(table: pd.DataFrame, names: np.ndarray, path: Path) -> ImageList:
    """Return the list whose rows a table has.

    Args:
        table: Columns path, label (the identity's name), camera and box, the last two empty where they are not known.
        names: The identities, by their numbers.
        path: The file of the table.
    """
    boxed, seen = table.box.ne("").all(), table.camera.ne("").all()
    return ImageList(
        [str(resolve(path)) for path in table.path],
        np.searchsorted(names, table.label.to_numpy(str)),
        table.camera.to_numpy(np.int64) if seen else None,
        source=str(path),
        names=names,
        boxes=np.array([box.split() for box in table.box], np.int64) if boxed else None,
    )


def undamaged(run: Path, path: Path, read: Callable):
    """Return `read(path)` for a file of a run.

    Args:
        run: The run folder, for the message.
        path: The file.
        read: How to read it.

    Raises:
        ConfigError: Reading fails.
    """
    try:
        return read(path)
    except Exception as error:  # a damaged file makes readers raise anything
        raise ConfigError(f"{run}: {path.relative_to(run)} is damaged: {error}") from error
