"""Who is trained on, who is judged: a table of images is split by identity, and nothing stands on two sides.

Groups, the sources that images share such as a session or a video, are never torn apart. Identities are drawn from a
seed, alike from small and large ones.
"""

from collections import Counter, defaultdict

import numpy as np
import pandas as pd
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from recnb.data.images import DataError

TRIES = 100  # draws of the identities to test
FEWEST = 3  # identities of a validation list: fewer have too little to be taken for one another


def split(
    table: pd.DataFrame, test_share: float = 0.3, query_share: float = 0.3, validation: float = 0.0, seed: int = 0
) -> pd.DataFrame:
    """Return the table, by path, with `split` (train, validation, query or gallery) and `source`.

    Identities are trained on or judged, never both. Of a test identity's images some are queries, whole groups at a
    time, and only while each of its queries keeps an image to find in the gallery, from another camera where cameras
    are known. `source`, the third column of a list, is what a query may not find of its own identity: its camera where
    that is known, otherwise a number of its own group or image.

    Args:
        table: images with `path` and `label`, and where known `camera` and `group`.
        test_share: the share of the identities with two images or more that are tested, drawn alike from small and
            large ones; identities that share a group stay together.
        query_share: the share of a test identity's images that are queries.
        validation: the share of the other identities that the best epoch is chosen by, three at least; none where there
            are too few.
        seed: another number gives another split.

    Raises:
        DataError: Nothing is left to train on or to retrieve.
    """
    for name, share in (("test_share", test_share), ("query_share", query_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is {share}; it is a share, between 0 and 1")
    if not 0 <= validation < 1:
        raise ValueError(f"validation is {validation}; it is a share, from 0 to below 1")
    table, rng = table.sort_values("path", ignore_index=True), np.random.default_rng(seed)
    identity, unit, source = pd.factorize(table.label, sort=True)[0], units(table), sources(table)
    for _ in range(TRIES):
        tested = test_identities(identity, unit, test_share, rng)
        if min(tested.sum(), (~tested).sum()) > 1:  # of few, another draw may leave two on either side
            break
    if not tested.any() or tested.all():
        several = int((np.bincount(identity) > 1).sum())
        raise DataError(
            f"no identity can be tested while another is trained on: {identity.max() + 1:,} identities were found, "
            f"{several:,} of them with two images or more, and it takes two of these that do not share their groups"
        )
    rows = np.flatnonzero(tested[identity])
    chosen = rows[query_rows(identity[rows], unit[rows], source[rows], query_share, rng)]
    if not len(chosen):
        raise DataError("no image can be a query: no test identity has images of two cameras or two groups")
    part = np.where(tested[identity], "gallery", "train").astype(object)
    part[chosen] = "query"
    rows = np.flatnonzero(part == "train")
    part[rows[validation_rows(identity[rows], unit[rows], source[rows], validation, rng)]] = "validation"
    return table.assign(split=part, source=source)


def validation_rows(
    identity: np.ndarray, unit: np.ndarray, source: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Return (rows,) True for the images of the identities to validate on; of none where too few stay to train on.

    Args:
        identity: (rows,) the identity of each image that is not tested.
        unit: (rows,) what must not be torn apart.
        source: (rows,) what an image may not find of its own identity.
        share: the share of the identities to take, three at least; 0 for none.
        rng: what draws them.
    """
    number, ids = pd.factorize(identity)
    taken = np.zeros(len(ids), bool)
    if share and len(ids) >= 3 * FEWEST:
        taken = test_identities(number, pd.factorize(unit)[0], max(share, FEWEST / len(ids)), rng)
    findable = pd.Series(source).groupby(number).nunique().to_numpy() > 1
    if (taken & findable).sum() < 2 or 2 * taken.sum() > len(ids):
        taken[:] = False
    return taken[number]


def units(table: pd.DataFrame) -> np.ndarray:
    """Return (N,) a number for what must not be torn apart: the group of an image, or the image itself."""
    own = "image " + table.path
    return pd.factorize(own if "group" not in table else ("group " + table.group).fillna(own))[0]


def sources(table: pd.DataFrame) -> np.ndarray:
    """Return (N,) the number of the camera, and where none is known one beyond them, of the unit."""
    if "camera" not in table or table.camera.isna().all():
        return units(table)
    known = table.camera.notna().to_numpy()
    whole = table.camera[known].str.fullmatch("[0-9]{1,9}").all()
    camera = table.camera.fillna("0").astype(int) if whole else pd.factorize(table.camera, sort=True)[0]
    return np.where(known, camera, np.max(camera) + 1 + units(table))


def test_identities(identity: np.ndarray, unit: np.ndarray, share: float, rng: np.random.Generator) -> np.ndarray:
    """Return (identities,) True for those to test: a share of those that can be, whatever their number of images.

    Args:
        identity: (rows,) the identity of each image.
        unit: (rows,) what must not be torn apart; identities that share one stay together.
        share: how many of the identities with two images or more.
        rng: what draws them.
    """
    images = np.bincount(identity)
    nodes = len(images) + unit.max() + 1
    links = coo_matrix((np.ones(len(unit)), (identity, len(images) + unit)), shape=(nodes, nodes))
    linked = pd.factorize(connected_components(links, directed=False)[1][: len(images)])[0]
    size, smallest = np.bincount(linked), np.full(linked.max() + 1, images.max())
    np.minimum.at(smallest, linked, images)
    mean, possible = np.bincount(linked, images) / size, np.flatnonzero(smallest > 1)
    taken, owed = [], rng.uniform(-0.5, 0.5)
    for cluster in sorted(rng.permutation(possible), key=lambda c: mean[c]):  # by size, equal sizes in random order
        owed += share * size[cluster]
        if owed >= rng.uniform(0, size[cluster]):
            taken.append(cluster)
            owed -= size[cluster]
    if not taken and len(possible):
        taken = [possible[np.argmin(size[possible])]]
    if len(taken) > linked.max():  # one is left to train on
        taken = taken[:-1]
    return np.isin(linked, taken)


def query_rows(
    identity: np.ndarray, unit: np.ndarray, source: np.ndarray, share: float, rng: np.random.Generator
) -> np.ndarray:
    """Return which rows are queries: units in random order, each taken only if all queries still find something.

    Args:
        identity: (rows,) the identity of each image.
        unit: (rows,) what is a query together or not at all.
        source: (rows,) what a query may not find of its own identity.
        share: how many of an identity's images become queries.
        rng: what orders the units.
    """
    members, left, asked = defaultdict(list), defaultdict(Counter), defaultdict(list)
    for row, (i, u, s) in enumerate(zip(identity, unit, source, strict=True)):
        members[u].append(row)
        left[i][s] += 1
    wanted = {i: max(1, round(share * images.total())) for i, images in left.items()}
    for u in rng.permutation(list(members)):
        moved = defaultdict(Counter)
        for row in members[u]:
            moved[identity[row]][source[row]] += 1
        if all(
            len(asked[i]) < wanted[i]
            and (rest := set(left[i] - gone))
            and (len(rest) > 1 or rest.isdisjoint({*gone, *source[asked[i]]}))
            for i, gone in moved.items()
        ):
            for row in members[u]:
                asked[identity[row]].append(row)
                left[identity[row]] -= Counter([source[row]])
    return np.array(sorted(row for rows in asked.values() for row in rows), int)
