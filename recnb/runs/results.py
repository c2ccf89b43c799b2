"""What a run writes down when it has been judged: metrics, the embeddings, and each query before and after."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd

from recnb.data.lists import ImageList
from recnb.distributed.processes import first_does
from recnb.runs.folder import save_embeddings, save_metrics
from recnb.runs.rows import save_rows
from recnb.storage import from_root, replacing
from recnb.training.evaluation import Evaluation
from recnb.training.learner import RetrievalLearner


def evaluate_start(run: Path, learn: RetrievalLearner) -> Evaluation:
    """Return the evaluation of the model before training, and keep each query's values in queries.csv.

    Where a run goes on, the metrics and the values are those that it kept, and there are no features.
    """
    if learn.tested is None:
        return Evaluation()
    path, columns = run / "queries.csv", {f"{name}_before": name for name in learn.names}
    if path.exists() and ((run / "checkpoints" / "latest.pt").exists() or (run / "rungs").exists()):
        table = pd.read_csv(path, float_precision="round_trip")
        if set(columns) <= set(table) and len(table) == len(learn.tested.query):
            values = {name: table[column].to_numpy(float) for column, name in columns.items()}
            return Evaluation(metrics={name: mean_of_valid(v) for name, v in values.items()}, per_query=values)
    start = learn.evaluate()
    first_does(save_queries, path, learn.tested.query, start)
    return start


def mean_of_valid(values: np.ndarray) -> float:
    """Return the mean over the queries that have something to find."""
    return float(values[~np.isnan(values)].mean())


def save_queries(path: Path, images: ImageList, before: Evaluation, after: Evaluation | None = None) -> None:
    """Write a row for each query: its path, its identity, and each metric's value before and after training.

    A query that has nothing to find has no value.

    Args:
        path: The CSV file.
        images: The queries.
        before: The evaluation before training.
        after: The one after it; None while there is none.
    """
    names = [images.name(label) for label in images.labels.tolist()]
    table = pd.DataFrame({"path": [*map(from_root, images.paths)], "label": names})
    for name, values in before.per_query.items():
        table[f"{name}_before"] = values
        if after is not None:
            table[f"{name}_after"] = after.per_query[name]
    with replacing(path) as temporary:
        table.to_csv(temporary, index=False, errors="backslashreplace")


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
        save_embeddings(run, query=after.query, gallery=after.gallery)
        save_rows(run, {"query": learn.tested.query, "gallery": learn.tested.gallery})
    save_metrics(run, before.metrics, after.metrics)
