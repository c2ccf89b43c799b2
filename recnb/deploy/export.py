"""From trained to used: the folder with the model, the proof that it is the trained one, its index and its card.

The folder exists only once the proof has passed. Each file has been asked for images of the evaluation then, singly and
in batches, and example.py for the same images from their files on.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.transforms import v2

from recnb.data.lists import ImageList, own_index, positives
from recnb.deploy.decision import check_wanted
from recnb.deploy.graph import FORMATS, Exported, check_installed, embed_images, open_model, planned, write_models
from recnb.deploy.index import build_index, labelled_images
from recnb.deploy.modelcard import compared, model_card
from recnb.recipe.reading import as_yaml
from recnb.recipe.settings import GLOBAL
from recnb.registry import ConfigError, check_known
from recnb.retrieval.neighbours import knn
from recnb.runs.folder import Run
from recnb.storage import me, resolve, write_json, write_sums, write_text
from recnb.training.evaluation import Judge

if TYPE_CHECKING:
    from recnb.deploy.example import Model

EXACT = ("model.onnx", "model.pt2", "example.py")  # must agree with the trained model; fp16 and int8 are measured
LEAST_COSINE, METRIC_TOLERANCE = 0.9999, 5e-4  # near-ties may swap; a share of less than that is no difference
BATCH = 64
OPTIONS = (
    "folder",
    "normalize",
    "dynamic_size",
    "images",
    "index",
    "false_accept_rate",
    "unknown_rate",
    "infer_output_key",
    "infer_add_softmax",
)


class ExportError(RuntimeError):
    """An exported model that is not the trained one; the message says by how much, and where the files are."""


# ---- the proof -------------------------------------------------------------------------------------------------------


def taken(images: ImageList, rows: np.ndarray) -> ImageList:
    """Return a list of some items of another, given by their rows (n,)."""
    return replace(
        images,
        paths=[images.paths[i] for i in rows],
        labels=images.labels[rows],
        lines=None,
        cameras=None if images.cameras is None else images.cameras[rows],
        boxes=None if images.boxes is None else images.boxes[rows],
    )


def sample(query: ImageList, gallery: ImageList, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return rows of both lists: those of as many identities, drawn at random, as have `most` images together.

    Args:
        query: the query list.
        gallery: the gallery list, labelled alike.
        most: how many images to take at most; one identity is taken in any case.
    """
    known = np.random.default_rng(0).permutation(np.unique(query.labels[positives(query, gallery) > 0]))
    counts = np.bincount(np.concatenate([query.labels, gallery.labels]))[known]
    kept = known[: max(1, int((np.cumsum(counts) <= most).sum()))]
    return np.flatnonzero(np.isin(query.labels, kept)), np.flatnonzero(np.isin(gallery.labels, kept))


def pixels_and_input(outside: v2.Transform, whole: v2.Transform, image: Tensor) -> tuple[Tensor, Tensor]:
    """Return what the exported graph takes of an image, uint8 (H, W, 3), and what the trained model takes, (3, H, W).

    Args:
        outside: what is done before the graph.
        whole: what the evaluation does.
        image: (3, H, W) uint8.
    """
    return outside(image).permute(1, 2, 0), whole(image)


@torch.inference_mode()
def outputs(
    images: ImageList, outside: v2.Transform, runners: dict[str, Callable], batch: int, trained: Callable | None = None
) -> dict[str, np.ndarray]:
    """Return the vectors of a list's images by each exported model, and by the trained one under "trained".

    Args:
        images: N of them.
        outside: what is done to an image before the graph.
        runners: what each file computes, by its name.
        batch: how many images at once.
        trained: what the trained model computes; None leaves it out.

    Returns:
        (N, D) float32 by name.
    """
    table = replace(images, transform=partial(pixels_and_input, outside, images.transform))
    found: dict[str, list] = {name: [] for name in (*runners, *["trained"] * (trained is not None))}
    for (pixels, x), _ in DataLoader(table, batch):
        for name, run in runners.items():
            found[name].append(run(pixels))
        if trained is not None:
            found["trained"].append(trained(x).numpy())
    return {name: np.concatenate(parts).reshape(len(images), -1) for name, parts in found.items()}


def agreement(trained: tuple, exported: tuple, query: ImageList, gallery: ImageList, distance: str) -> dict:
    """Return how the vectors of two models compare, by themselves and in what they retrieve.

    Args:
        trained: (Q, D) of the queries and (G, D) of the gallery by the trained model.
        exported: the same by an exported one.
        query: the query list.
        gallery: the gallery list.
        distance: how vectors are compared.
    """
    ours, theirs = (np.concatenate(pair).astype(np.float64) for pair in (trained, exported))
    length = np.linalg.norm(ours, axis=1) * np.linalg.norm(theirs, axis=1)
    cosine, difference = (ours * theirs).sum(1) / np.maximum(length, 1e-12), np.abs(ours - theirs)
    own = own_index(query, gallery)
    first = [knn(asked, items, 1, distance, exclude=own)[1][:, 0] for asked, items in (trained, exported)]
    scores = [metrics(pair, query, gallery, distance) for pair in (trained, exported)]
    return {
        "cosine_least": float(cosine.min()),
        "cosine_mean": float(cosine.mean()),
        "difference_largest": float(difference.max()),
        "difference_mean": float(difference.mean()),
        "same_first_hit": float((first[0] == first[1]).mean()),
        **scores[1],
        "loss": {name: scores[0][name] - scores[1][name] for name in scores[0]},
    }


def metrics(vectors: tuple, query: ImageList, gallery: ImageList, distance: str) -> dict[str, float]:
    """Return recall1 and mAP.

    Args:
        vectors: (Q, D) of the queries and (G, D) of the gallery.
        query: the query list.
        gallery: the gallery list, labelled alike.
        distance: how vectors are compared.
    """
    asked, items = map(torch.from_numpy, vectors)
    return Judge(("recall1", "mAP"), normalize=distance == "cosine")(asked, items, query, gallery).metrics


def prove(run: Run, plan: Exported, runners: dict[str, Callable], example: Model, most: int) -> dict:
    """Return the content of parity.json: each file against the trained model, and example.py from image files on.

    Files are compared on the same tensors, in batches and singly; beside them stand the features that the run has
    stored. `failures` are sentences.

    Args:
        run: the run that is exported.
        plan: as what.
        runners: what each file computes, by its name.
        example: the ONNX model as example.py runs it.
        most: how many images to take at most.
    """
    distance, parts, rows = example.meta["compare"], (run.query, run.gallery), sample(run.query, run.gallery, most)
    query, gallery = map(taken, parts, rows)
    items = outputs(gallery, plan.outside, runners, BATCH, plan.trained)
    asked = {
        BATCH: outputs(query, plan.outside, runners, BATCH, plan.trained),
        1: outputs(query, plan.outside, runners, 1),
    }
    reference = asked[BATCH]["trained"], items["trained"]
    compared = partial(agreement, reference, query=query, gallery=gallery, distance=distance)
    files = tuple(embed_images(example, images).reshape(len(images), -1) for images in (query, gallery))
    stored = tuple(map(np.take, (run.query_features, run.gallery_features), rows, (0, 0)))
    report = {
        "images": {"query": len(query), "gallery": len(gallery), "of": [len(part) for part in parts]},
        "required": {"cosine_least": LEAST_COSINE, "metric_tolerance": METRIC_TOLERANCE},
        "trained": metrics(reference, query, gallery, distance),
        "model_parity": {
            name: {f"batch_{size}": compared((asked[size][name], items[name])) for size in (BATCH, 1)}
            for name in runners
        },
        "pipeline_parity": {"example.py": compared(files)},
    }
    if example.meta["output"]["name"] == "features":
        report["stored_features"] = {key: value for key, value in compared(stored).items() if "difference" not in key}
    return {**report, "failures": failures(report)}


def failures(report: dict) -> list[str]:
    """Return a sentence for each file that has to be exact and is not, from the content of parity.json."""
    found = []
    for name, size, row in compared(report):
        if name in EXACT and not row["cosine_least"] >= LEAST_COSINE:
            found.append(f"{name}, {size}: the cosine with the trained model falls to {row['cosine_least']:.6f}")
        found += [
            f"{name}, {size}: {metric} is {row[metric]:.4f} and not {report['trained'][metric]:.4f}"
            for metric, loss in row["loss"].items()
            if name in EXACT and not abs(loss) <= METRIC_TOLERANCE
        ]
    return found


# ---- the folder ------------------------------------------------------------------------------------------------------


def export_folder(run: Run, folder: str | Path | None) -> Path:
    """Return the folder asked for, or Global.save_inference_dir where that is set, or export in the run's folder.

    Raises:
        ConfigError: It holds other things than an export.
    """
    given = run.cfg["Global"]["save_inference_dir"]
    target = resolve(folder or given) if folder or given != GLOBAL["save_inference_dir"] else run.folder / "export"
    held = [path.name for path in target.iterdir()] if target.is_dir() else [target.name] * target.exists()
    other = [name for name in held if not name.endswith(".ipynb")]
    if other and "inference.yml" not in other:
        raise ConfigError(f"{target}: holds other things than an export ({other[0]}); name another folder")
    return target


MADE = re.compile(
    r"(model(_fp16|_int8)?\.(onnx|pt2)|inference\.yml|(parity|operating_point)\.json|example\.py|README\.md|SHA256SUMS"
    r"|index/(index\.json|vectors-[0-9a-f]{16}\.faiss|embeddings\.npy|items\.csv)|\.recnb)"
)
MARK = ".recnb"  # says in a folder that stands beside an export that it was put there, and may go again


def check_replaceable(folder: Path) -> None:
    """Raise ConfigError where a folder beside an export is not one that an export has put there, and nothing else."""
    if not folder.exists():
        return
    names = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if not path.is_dir()]
    other = [name for name in names if not MADE.fullmatch(name)]
    if other or MARK not in names:
        raise ConfigError(
            f"{folder}: is in the way of the export and "
            + (f"holds {other[0]}, which no export has made" if other else "was not put there by one")
            + "; rename it or move it away"
        )


def clear_drafts(target: Path) -> None:
    """Remove what an export into `target` has left that was killed on this machine."""
    for draft in target.parent.glob(f".{target.name}.*.draft"):
        mark = (draft / MARK).read_text() if (draft / MARK).is_file() else ""
        made = re.fullmatch(rf"process (\d+) on {re.escape(platform.node())}", mark)
        if made and not alive(int(made[1])):
            shutil.rmtree(draft)


def alive(process: int) -> bool:
    """Return True if there is a process of this number on this machine."""
    try:
        os.kill(process, 0)
    except OSError as error:
        return isinstance(error, PermissionError)  # it is another user's
    return True


@contextlib.contextmanager
def published(target: Path) -> Iterator[Path]:
    """Give a hidden folder that takes the place of `target` in the end, or of TARGET.failed after an ExportError.

    What `target` was becomes TARGET.previous, but for notebooks, which stay: the one that is being executed may be
    among them. Both names beside it are only taken from an earlier export.

    Raises:
        ConfigError: One of these folders holds something else.
    """
    failed, previous = (target.with_name(f"{target.name}.{end}") for end in ("failed", "previous"))
    for folder in (failed, previous):
        check_replaceable(folder)
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_drafts(target)
    draft = Path(tempfile.mkdtemp(prefix=f".{target.name}.", suffix=".draft", dir=target.parent))
    try:
        write_text(draft / MARK, me())
        (draft / target.name).mkdir()
        yield draft / target.name
        put_aside(target, previous)
        (draft / target.name).rename(target)
        for notebook in previous.glob("*.ipynb"):
            notebook.rename(target / notebook.name)
        if [*previous.glob("*")] == [previous / MARK]:
            shutil.rmtree(previous)
        shutil.rmtree(failed, ignore_errors=True)
    except ExportError:
        put_aside(draft / target.name, failed)
        raise
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def put_aside(folder: Path, aside: Path) -> None:
    """Give a folder the name `aside`, which an earlier export may have, and mark it."""
    if not folder.exists():
        return
    shutil.rmtree(aside, ignore_errors=True)
    if any(folder.iterdir()):
        (folder / MARK).touch()
        folder.rename(aside)
    else:
        folder.rmdir()


def export_model(
    run: Run,
    formats: Sequence[str] = ("onnx", "torch"),
    folder: str | Path | None = None,
    normalize: bool | None = None,
    dynamic_size: bool = False,
    images: int = 2000,
    index: str = "all",
    false_accept_rate: float | None = None,
    unknown_rate: float | None = None,
    **arch,
) -> Path:
    """Return the folder made, whose files the model card lists; an earlier one is kept as FOLDER.previous.

    Args:
        run: a finished run.
        formats: some of FORMATS, onnx among them.
        folder: where to; by default Global.save_inference_dir, or export in the run's folder.
        normalize: vectors of length 1, by default where the evaluation compares by cosine.
        dynamic_size: any height and width, where the network can.
        images: how many the proof takes at most.
        index: "all" holds every labelled image, "test" those of the gallery alone, to measure strictly.
        false_accept_rate: the share of searches for unknown identities that may get a name.
        unknown_rate: the share of searches for known identities that may be answered "unknown"; without either rate,
            the two kinds of searches together fare best.
        arch: infer_output_key and infer_add_softmax, where they shall not be the configuration's.

    Raises:
        ConfigError: What is asked for cannot be meant.
        ExportError: The proof fails; the files are in FOLDER.failed.
    """
    check_installed()
    check_arguments(formats, arch)
    given = {"false_accept_rate": false_accept_rate, "unknown_rate": unknown_rate}
    wanted = {name: rate for name, rate in given.items() if rate is not None}
    target, plan = export_folder(run, folder), planned(run, normalize, dynamic_size, arch)
    known = labelled_images(run, index)
    check_wanted(wanted, len(known.asked))
    with published(target) as part:
        report = write_proved(run, plan, formats, part, images)
        if report["failures"]:
            raise ExportError(
                f"the exported model is not the trained one: {'; '.join(report['failures'])}; nothing is "
                f"exported, and the files are kept in {target}.failed"
            )
        info = None
        if plan.vector:
            made, point = build_index(run, known, part, target, wanted)
            info = made.info
            write_json(part / "operating_point.json", point)
        card = model_card(run, plan.meta, report, info, sorted(path.name for path in part.iterdir()))
        write_text(part / "README.md", card)
        write_sums(part, sorted(summed(part)))
    return target


def summed(folder: Path) -> Iterator[str]:
    """Yield the files whose checksums an export keeps.

    Not README.md, which waits to be filled in, nor what the index checks by itself, since it changes with its items.
    """
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in ("README.md", "index/index.json") and path.suffix != ".faiss":
            yield name


def write_proved(run: Run, plan: Exported, formats: Sequence[str], folder: Path, most: int) -> dict:
    """Return the content of parity.json, written beside the models, example.py and inference.yml.

    Args:
        run: the run that is exported.
        plan: as what.
        formats: the formats of the models.
        folder: where to.
        most: how many images the proof takes at most.
    """
    runners = write_models(plan, formats, folder)
    shutil.copyfile(Path(__file__).with_name("example.py"), folder / "example.py")
    write_text(folder / "inference.yml", as_yaml(plan.meta))
    report = prove(run, plan, runners, open_model(folder / "model.onnx"), most)
    write_json(folder / "parity.json", report)
    return report


def check_arguments(formats: Sequence[str], arch: dict) -> None:
    """Raise ConfigError for a format or an option that does not exist."""
    check_known(formats, FORMATS, "formats", "format")
    if "onnx" not in formats:
        raise ConfigError("formats: onnx must be among them, since example.py and the index run it")
    check_known(arch, OPTIONS, "options", "option")
