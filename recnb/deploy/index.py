"""Which images does an index hold, and from where on does it name? Every labelled image once, and a calibration.

A picture is known by its content: a copy under another name, or the same file in another spelling, is the same one.
Everything here sees images through the exported model and its own preprocessing, as the application will. What decides
is measured on test images alone: a model's answers to the images that it was trained on are too good to tell.
"""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from recnb.data.images import DataError, printable, reason
from recnb.data.lists import ImageList, drop_faults, own_index, write_csv
from recnb.deploy.decision import Items, choose, mates, searches
from recnb.deploy.graph import embed_file, open_model
from recnb.recipe.data import evaluation_images, training_split
from recnb.recipe.schema import lookup
from recnb.registry import check_known
from recnb.retrieval.metrics import retrieval_metrics
from recnb.retrieval.search import Index
from recnb.retrieval.stats import bootstrap_interval
from recnb.runs.folder import Run, below
from recnb.storage import resolve, sha256

INDEXES = ("all", "test")


@dataclass
class Labelled:
    """Every labelled image of a run once, N of them, and which rows of these each list names.

    `content` is equal for two rows that are the same picture: rows of one picture under several names are kept.
    """

    paths: list[str]
    names: np.ndarray  # (N,) text
    content: np.ndarray  # (N,) int64
    cameras: np.ndarray  # (N,) int64, -1 where unknown
    boxes: list[list[int] | None]  # N times (left, top, right, bottom) in pixels, or None for the whole image
    rows: dict[str, np.ndarray]  # list -> (n,) rows of its images, in its order
    kept: np.ndarray  # (M,) the rows that the index holds
    asked: np.ndarray  # (Q,) the rows that calibrate: test images, of identities that are new to it if it can be
    trained_on: bool  # whether training has seen the identities of those all the same
    root: Path  # what the paths start from

    def __len__(self) -> int:
        return len(self.paths)

    @property
    def counts(self) -> dict:
        """What the index holds: images, identities, images of each list, and how many stand in several."""
        lists = {name: int(np.isin(rows, self.kept).sum()) for name, rows in self.rows.items()}
        lists = {name: count for name, count in lists.items() if count}
        several = np.bincount(np.concatenate([np.unique(self.rows[name]) for name in lists]), minlength=len(self)) > 1
        return {
            "images": len(self.kept),
            "identities": len(np.unique(self.names[self.kept])),
            "lists": lists,
            "in_several_lists": int(several[self.kept].sum()),
        }

    @property
    def items(self) -> Items:
        """What the calibration has to know of the N images."""
        return Items(np.unique(self.names, return_inverse=True)[1], self.content, self.cameras)

    def path(self, row: int) -> str:
        """Return an image's path, from the root where it lies below."""
        return below(str(Path(self.paths[row]).absolute()), str(self.root))


def lists_of(run: Run, index: str) -> dict[str, ImageList]:
    """Return a run's labelled lists by what they are for; `index: test` does without those of training and validation.

    Raises:
        ConfigError: `index` is neither all nor test.
        DataError: A list of training or validation is not on this machine.
    """
    check_known([index], INDEXES, "index", "index")
    lists = {"query": run.query, "gallery": run.gallery}
    if index == "test":
        return lists
    try:
        training, held_out = training_split(run.cfg)
        if run.cfg["Global"]["on_bad_image"] == "drop":
            for images in filter(None, (training, held_out)):
                drop_faults(images)
        if held_out is None and lookup(run.cfg, "DataLoader.Validation"):
            query, gallery = evaluation_images(run.cfg, part="Validation")
            return {"training": training, "validation": query, "validation gallery": gallery, **lists}
    except DataError as error:
        raise DataError(f"{error}; index: test leaves the training images out of the index") from None
    return {"training": training, **({"validation": held_out} if held_out else {}), **lists}


def labelled_images(run: Run, index: str = "all") -> Labelled:
    """Return the labelled images of a run.

    Args:
        run: a finished run.
        index: "all" holds the images of every list, "test" those of the gallery alone, to measure strictly.

    Raises:
        ConfigError: There is no such index.
        DataError: An image or a list cannot be read.
    """
    found: dict[tuple, tuple] = {}  # (content, box, name) -> (row, path, camera)
    digests: dict[str, str] = {}
    rows = {}
    for kind, images in lists_of(run, index).items():
        own = []
        for i, path in enumerate(images.paths):
            box = None if images.boxes is None else tuple(images.boxes[i].tolist())
            camera = -1 if images.cameras is None else int(images.cameras[i])
            key = content(images, i, digests), box, printable(images.name(int(images.labels[i])))
            own.append(found.setdefault(key, (len(found), path, camera))[0])
        rows[kind] = np.array(own)
    pictures = [(digest, box) for digest, box, _ in found]
    numbers = {picture: i for i, picture in enumerate(dict.fromkeys(pictures))}
    names, shown = np.array([name for *_, name in found]), np.array([numbers[picture] for picture in pictures])
    paths = [path for _, path, _ in found.values()]
    asked, trained_on = calibrating(run, names, shown, rows)
    return Labelled(
        paths=paths,
        names=names,
        content=shown,
        cameras=np.array([camera for *_, camera in found.values()]),
        boxes=[None if box is None else list(box) for _, box, _ in found],
        rows=rows,
        kept=np.unique(rows["gallery"]) if index == "test" else np.arange(len(found)),
        asked=asked,
        trained_on=trained_on,
        root=common_root(run, paths),
    )


def calibrating(run: Run, names: np.ndarray, shown: np.ndarray, rows: dict) -> tuple[np.ndarray, bool]:
    """Return the rows whose searches calibrate, and whether training has seen their identities.

    Args:
        run: the run, whose labels.csv names the training identities.
        names: (N,) of the images.
        shown: (N,) which picture each image is.
        rows: list -> the rows of its images.
    """
    asked = np.unique(np.concatenate([rows[kind] for kind in ("validation", "query") if kind in rows]))
    training = rows.get("training", np.zeros(0, int))
    classes = run.class_names if (run.folder / "labels.csv").is_file() else []
    trained = {*names[training].tolist(), *map(printable, classes)}
    fresh = asked[~np.isin(shown[asked], shown[training])]
    unseen = fresh[~np.isin(names[fresh], list(trained))]
    if len(unseen):
        return unseen, False
    return (fresh if len(fresh) else asked), True


def content(images: ImageList, i: int, digests: dict[str, str]) -> str:
    """Return the digest of an image's file.

    Args:
        images: the list.
        i: its row.
        digests: remembers those of files that several lists name.

    Raises:
        DataError: The file cannot be read.
    """
    real = os.path.realpath(images.paths[i])
    if real not in digests:
        try:
            digests[real] = sha256(real)
        except OSError as error:
            raise DataError(images.sentence(i, reason(error))) from error
    return digests[real]


def sentence(counts: dict) -> str:
    """Return in words what an index holds, from `Labelled.counts`."""
    *first, last = (f"{name} ({count:,})" for name, count in counts["lists"].items())
    lists, several = f"{', '.join(first)} and {last} lists" if first else f"{last} list", counts["in_several_lists"]
    twice = f"; {several:,} of them stand in several lists and count once" if several else ""
    return f"{counts['images']:,} images of {counts['identities']:,} identities, from the {lists}{twice}"


def common_root(run: Run, paths: list[str]) -> Path:
    """Return the gallery's image_root where all images lie below it, otherwise the folder that they share."""
    root = Path(resolve(lookup(run.cfg, "DataLoader.Eval.Gallery.dataset.image_root") or ".")).absolute()
    absolute = [Path(path).absolute() for path in paths]
    if all(path.is_relative_to(root) for path in absolute):
        return root
    return Path(os.path.commonpath([path.parent for path in absolute]))


def points_table(point: dict) -> pd.DataFrame:
    """Return what becomes of searches at each point of an operating_point.json, as texts with 95 % intervals."""
    columns = {
        "known_right": "known, named rightly",
        "known_wrong": "known, named wrongly",
        "unknown_rate": "known, answered unknown",
        "false_accept_rate": "unknown, given a name",
    }
    rows = {
        name: {"from": f"{row['threshold']:.1%}"}
        | {text: "{share:.1%} ({low:.1%} to {high:.1%})".format(**row[key]) for key, text in columns.items()}
        for name, row in point["points"].items()
    }
    return pd.DataFrame.from_dict(rows, orient="index")


# ---- made with the exported model ------------------------------------------------------------------------------------


def build_index(
    run: Run, known: Labelled, folder: Path, final: Path, wanted: Mapping[str, float]
) -> tuple[Index, dict]:
    """Return the index of a run's labelled images, saved in FOLDER/index, and the content of operating_point.json.

    The index has the columns path (below info["image_root"]), label, and mate: how alike an image and the most similar
    other one of its identity are. Its info also says what it holds, how a search is decided, what becomes of searches
    so, and the metrics with their intervals. Beside it lie embeddings.npy and items.csv, what it was first made of.

    Args:
        run: the run that is exported.
        known: its labelled images, and which of them the index holds.
        folder: the export folder, with model.onnx in it.
        final: where that is going to be.
        wanted: as in `recnb.deploy.decision.choose`.
    """
    model = open_model(folder / "model.onnx")
    distance = model.meta["compare"]
    vectors = np.stack([embed_file(model, *image) for image in zip(known.paths, known.boxes, strict=True)])
    asked, kept, items = known.asked, known.kept, known.items
    found = searches(vectors[asked], vectors[kept], items[asked], items[kept], distance)
    point = choose(found, items.identity[asked], wanted)
    point = {"holds": known.counts, "searches": searched(known, found[2]), **point}
    info = {
        "image_root": from_here(known.root, final),
        **{key: value for key, value in point.items() if key != "curve"},
        "metrics": intervals(run, vectors[known.rows["query"]], vectors[known.rows["gallery"]], distance),
    }
    paths, labels = [known.path(row) for row in kept], known.names[kept].tolist()
    alike = mates(vectors[kept], items.identity[kept], distance)[0]
    index = Index(distance, model=sha256(folder / "model.onnx"), info=info)
    index.add(vectors[kept], path=paths, label=labels, mate=alike)
    index.save(folder / "index")
    np.save(folder / "index" / "embeddings.npy", vectors[kept])
    write_csv(pd.DataFrame({"id": index.ids, "label": labels, "path": paths}), folder / "index" / "items.csv")
    return index, point


def from_here(root: Path, folder: Path) -> str:
    """Return where a folder is as seen from another, empty where that would tell what is above the user's home."""
    try:
        shared = Path(os.path.commonpath([root.absolute(), folder.absolute()]))
    except ValueError:  # another drive
        return ""
    home = Path.home()
    return "" if home != shared and home.is_relative_to(shared) else Path(os.path.relpath(root, folder)).as_posix()


def searched(known: Labelled, has: np.ndarray) -> dict:
    """Return on what the calibration was measured: how many searches, of whom, and whether training saw these."""
    return {
        "known": int(has.sum()),
        "unknown": len(known.asked),
        "identities": len(np.unique(known.names[known.asked])),
        "trained_on": known.trained_on,
    }


def intervals(run: Run, asked: np.ndarray, items: np.ndarray, distance: str) -> dict[str, dict[str, float]]:
    """Return recall1, recall5 and mAP of a run's lists, each with its 95 % interval over identities.

    Args:
        run: the run, with its query and gallery lists.
        asked: (Q, D) the queries' vectors.
        items: (G, D) the gallery's.
        distance: how vectors are compared.
    """
    query, gallery = run.query, run.gallery
    lists = (query.labels, gallery.labels, query.cameras, gallery.cameras)
    _, arrays = retrieval_metrics(
        asked, items, *lists, own_index(query, gallery), distance=distance, metrics=("recall{k}", "mAP"), per_query=True
    )
    valid = arrays["valid"]
    return {
        name: bootstrap_interval(arrays[name][valid], query.labels[valid]) for name in ("recall1", "recall5", "mAP")
    }
