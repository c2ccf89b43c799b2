"""Which labels are probably wrong? Images whose nearest neighbours agree on another identity."""

from dataclasses import replace

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from recnb.gallery.figure import gallery_figure
from recnb.gallery.pictures import shorten
from recnb.retrieval.lists import rank
from recnb.retrieval.neighbours import knn
from recnb.runs.analysis import Embeddings


def label_errors(features, labels, k: int = 5, agreement: float = 1.0) -> pd.DataFrame:
    """Return the items whose k nearest neighbours agree on another identity, the most certain first.

    Args:
        features: (N, D), compared by cosine.
        labels: (N,) integers or names.
        k: how many neighbours vote.
        agreement: the least share of the neighbours with the suggested identity.

    Returns:
        A row per item: `item` (its row), label, suggested, agreement, `similarity` (the mean cosine with the neighbours
        of the suggested identity) and `own_similarity` (the best with an item of its own label, nan where it is alone).
    """
    labels = np.asarray(labels)
    scores, ids = knn(features, None, k)
    names, codes = np.unique(labels, return_inverse=True)
    near = codes[ids]
    votes = (near[:, :, None] == near[:, None, :]).sum(2)
    suggested = near[np.arange(len(near)), votes.argmax(1)]  # the first of equals is the nearest
    items = np.flatnonzero((suggested != codes) & (votes.max(1) / ids.shape[1] >= agreement - 1e-9))
    table = pd.DataFrame(
        {
            "item": items,
            "label": labels[items],
            "suggested": names[suggested[items]],
            "agreement": votes.max(1)[items] / ids.shape[1],
            "similarity": [scores[i][near[i] == suggested[i]].mean() for i in items],
            "own_similarity": [_best_of_own(features, codes, i) for i in items.tolist()],
        }
    )
    return table.sort_values(["agreement", "similarity"], ascending=False, kind="stable").reset_index(drop=True)


def _best_of_own(features, codes: np.ndarray, item: int) -> float:
    mine = np.flatnonzero((codes == codes[item]) & (np.arange(len(codes)) != item))
    return knn(features[item : item + 1], features[mine], 1)[0][0, 0] if len(mine) else np.nan


def suspects(data: Embeddings, k: int = 5, agreement: float = 1.0) -> pd.DataFrame:
    """Return the `label_errors` of all images, with the names of identities and, where they are known, paths.

    Args:
        data: The embeddings.
        k: As for `label_errors`.
        agreement: As there.
    """
    vectors, labels, paths = data.union()
    table = label_errors(vectors, labels, k, agreement)
    for column in ("label", "suggested"):
        table[column] = data.text(table[column]) if data.names is not None else table[column].astype(str)
    if paths:
        table.insert(0, "path", [data.short(paths[i]) for i in table["item"]])
    return table


def corrections(table: pd.DataFrame) -> pd.DataFrame:
    """Return `suspects` as tags to correct by hand: path, action and, as label, the suggested identity."""
    return table.assign(action="relabel", label=table.suggested)[["path", "action", "label"]]


def suspects_figure(data: Embeddings, table: pd.DataFrame) -> Figure:
    """Draw a row per image of `suspects`: its label, its picture, and its six nearest neighbours with their labels."""
    vectors, labels, known = data.union()
    paths = known or []
    items, names = table["item"].to_numpy(), np.array(data.text(labels))
    ranking = rank(vectors[items], vectors, labels[items], labels, exclude_self=items, k=6)
    called = [f"{n}. {shorten(names[item], 30)}" for n, item in enumerate(items, 1)]
    named = replace(ranking, query_labels=np.array(called), gallery_labels=names)
    pictures = [paths[i] for i in items]
    return gallery_figure(named, pictures, paths, range(len(items)), k=6, title="Labels to check")
