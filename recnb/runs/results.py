"""What an evaluation writes into the run folder: metrics, embeddings, and each query before and after training."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pandas as pd

from recnb.data.lists import ImageList, write_csv
from recnb.distributed.processes import first_does
from recnb.runs.folder import SUMMED
from recnb.runs.verdict import verdict
from recnb.storage import SUMS, from_root, replacing, write_json, write_sums
from recnb.training.evaluation import Evaluation
from recnb.training.learner import RetrievalLearner


def evaluate_start(run: Path, learn: RetrievalLearner) -> Evaluation:
    """Return the evaluation of the model before training, and keep each query's values in queries.csv.

    A run that goes on has the metrics and values that it kept, and no features.
    """
    if learn.tested is None:
        return Evaluation()
    path, columns = run / "queries.csv", {f"{name}_before": name for name in learn.names}
    if path.exists() and ((run / "checkpoints" / "latest.pt").exists() or (run / "rungs").exists()):
        table = pd.read_csv(path, float_precision="round_trip")
        if set(columns) <= set(table) and len(table) == len(learn.tested.query):
            values = {name: table[column].to_numpy(float) for column, name in columns.items()}
            means = {name: float(v[~np.isnan(v)].mean()) for name, v in values.items()}  # of queries with a positive
            return Evaluation(metrics=means, per_query=values)
    start = learn.evaluate()
    first_does(save_queries, path, learn.tested.query, start)
    first_does(write_sums, run, ["queries.csv"])  # a run that goes on reads it
    return start


def save_queries(path: Path, images: ImageList, before: Evaluation, after: Evaluation | None = None) -> None:
    """Write a row for each query: its path, its identity, and each metric's value before and after training.

    A query without a positive has no value.

    Args:
        path: The CSV file.
        images: The queries.
        before: The evaluation before training.
        after: The one after it; None while there is none.
    """
    names = [images.name(label) for label in images.labels.tolist()]
    table = pd.DataFrame(
        {"path": [*map(from_root, images.paths)], "label": names}, dtype=object
    )  # bytes may be no text
    for name, values in before.per_query.items():
        table[f"{name}_before"] = values
        if after is not None:
            table[f"{name}_after"] = after.per_query[name]
    # It is of the file before: killed in between, none is better than a wrong one.
    (path.parent / SUMS).unlink(missing_ok=True)
    write_csv(table, path)


def save_metrics(run: Path, before: dict, after: dict) -> dict:
    """Write metrics.json and return its content.

    It holds the final metrics, those before training, their gain and, where the run has a queries.csv, the 95 %
    intervals of all three. There are no times in it, so that the files of equal runs are equal.

    Args:
        run: The run folder.
        before: The metrics before training.
        after: The metrics after it.
    """
    content = {**after, "before": before, "gain": {k: after[k] - before[k] for k in after if k in before}}
    if (run / "queries.csv").is_file():
        content["intervals"] = verdict(run).intervals
    write_json(run / "metrics.json", content)
    write_sums(run, [name for name in SUMMED if (run / name).is_file()])
    return content


def save_rows(run: Path, lists: Mapping[str, ImageList]) -> None:
    """Write embeddings/query.csv and gallery.csv: path, identity, camera and box of each row of the embeddings."""
    for part, images in lists.items():
        boxes = images.boxes if images.boxes is not None else [()] * len(images)
        columns = {
            "path": [from_root(path) for path in images.paths],
            "label": [*map(images.name, images.labels.tolist())],
            "camera": "" if images.cameras is None else images.cameras,
            "box": [" ".join(map(str, box)) for box in boxes],
        }
        write_csv(pd.DataFrame(columns, dtype=object), run / "embeddings" / f"{part}.csv")


def save_results(run: Path, learn: RetrievalLearner, before: Evaluation, after: Evaluation) -> None:
    """Write metrics.json, and where there are test lists queries.csv and the embeddings.

    Args:
        run: The run folder.
        learn: What was trained.
        before: The evaluation before training.
        after: The one after it.
    """
    if learn.tested is not None:
        save_queries(run / "queries.csv", learn.tested.query, before, after)
        for name, values in (("query", after.query), ("gallery", after.gallery)):
            with replacing(run / "embeddings" / f"{name}.npy") as path, path.open("wb") as file:
                np.save(file, values.numpy())
        save_rows(run, {"query": learn.tested.query, "gallery": learn.tested.gallery})
    save_metrics(run, before.metrics, after.metrics)
