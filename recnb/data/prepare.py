"""Your own images become three list files: read, looked at, split, searched for duplicates, written.

A table has one image a row: `path` (absolute), `label` (the identity, as text), and where known `camera` and `group`,
the source that images share, such as a session or a video. `split` adds who is trained on and who is retrieved.
Results that are too good mostly come from here: the same picture on both sides of a split, or under two identities.
"""

from __future__ import annotations

import csv
import hashlib
import io
import os
import re
from collections import Counter, defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from scipy.fft import dctn
from scipy.sparse import coo_matrix
from scipy.sparse.csgraph import connected_components

from recnb.data.images import DataError, printable, to_rgb
from recnb.data.lists import ImageFolder, VeriWild
from recnb.registry import suggest
from recnb.retrieval.search import knn
from recnb.storage import resolve, write_text

COLUMNS = ("path", "label", "camera", "group")
SPLITS = {"train": "Train", "query": "Eval.Query", "gallery": "Eval.Gallery"}  # list file -> its place in a config
FLAT = 4.0  # grey levels: a picture that varies less has no shape to compare
TONE = 16.0  # grey levels: two pictures whose colours differ more, on average, are different pictures
NEIGHBOURS = 10
ORIENTATION = 0x0112  # EXIF; from 5 on, width and height change places


# --- Reading --------------------------------------------------------------------------------------------------------


def read_table(
    source: str | Path,
    image_root: str | Path | None = None,
    columns: dict | None = None,
    camera_pattern: str | None = None,
) -> pd.DataFrame:
    """The table of a folder (of one folder per identity), a CSV with a header, or a list file `path label [camera]`.

    Paths in a file are relative to `image_root`, by default the file's own folder, and may lead out of it. `columns`
    says what the CSV calls them, e.g. `{"path": "file", "label": "article"}`. `camera_pattern` is a regular expression
    whose one group is the camera in a path. Raises DataError, with file and line, for whatever is not such a row.
    """
    source = resolve(source)
    root = resolve(source.parent if image_root is None else image_root)
    if source.is_dir():
        images = ImageFolder(str(source))
        table, places = pd.DataFrame({"path": images.paths, "label": images.labels}), images.paths
    elif not source.is_file():
        raise DataError(f"{source}: there is no such file or folder")
    elif source.suffix.lower() in (".csv", ".tsv"):
        table, places = read_csv(source, root, columns or {})
    else:
        images = VeriWild(str(root), str(source), allow_outside=True)
        table = pd.DataFrame({"path": images.paths, "label": images.labels})
        if images.cameras is not None:
            table["camera"] = images.cameras.astype(str)
        places = [images.place(i) for i in range(len(images))]
    if table.empty:
        raise DataError(f"{source}: has no rows below its header")
    table = table.assign(path=[plain(path) for path in table.path], label=table.label.astype(str))
    check_paths(table.path, places)
    return table if camera_pattern is None else with_cameras(table, camera_pattern, source if source.is_dir() else root)


def read_csv(path: Path, root: Path, columns: dict) -> tuple[pd.DataFrame, list[str]]:
    """The table of a CSV and the place of each row; cells are parted by the commonest of , ; and tab in the header."""
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {error.object.count(10, 0, error.start) + 1}: is not UTF-8 text") from None
    reader = csv.DictReader(
        io.StringIO(text, newline=""), strict=True, delimiter=max(",;\t", key=text.partition("\n")[0].count)
    )
    try:
        rows = [(f"{path} line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.reader.line_num}: {error}") from None
    names, header = dict(zip(COLUMNS, COLUMNS, strict=True)) | columns, reader.fieldnames or []
    for name in ("path", "label", *columns):
        if name not in COLUMNS or names[name] not in header:
            wrong, known = (names[name], header) if name in COLUMNS else (name, COLUMNS)
            raise DataError(f"{path} line 1: there is no column '{wrong}'; {suggest(wrong, known)}")
    for place, row in rows:
        if None in row or None in row.values() or not (row[names["path"]] and row[names["label"]]):
            raise DataError(f"{place}: has no path, no label, or not {len(header)} cells as the header")
    table = pd.DataFrame(
        {name: [row[theirs] or None for _, row in rows] for name, theirs in names.items() if theirs in header}
    ).astype(object)
    return table.assign(path=[str(root / p) for p in table.path]), [place for place, _ in rows]


def plain(path: str | Path) -> str:
    """The absolute path without dots; links are kept, for an image belongs to the folder where it is listed."""
    return os.path.normpath(Path(path).absolute())


def check_paths(paths, places: list[str]) -> None:
    """Raise DataError for the first image that does not exist or stands there twice."""
    first = {}
    for path, place in zip(paths, places, strict=True):
        if path in first:
            raise DataError(f"{place}: the image {path} was given before, in {first[path]}")
        if not Path(path).is_file():
            raise DataError(f"{place}: there is no image {path}")
        first[path] = place


def with_cameras(table: pd.DataFrame, pattern: str, root: Path) -> pd.DataFrame:
    """The table with the camera that a regular expression finds in each path below `root`."""
    if re.compile(pattern).groups != 1:
        raise DataError(f"camera_pattern: '{pattern}' does not have one group, which finds the camera")
    found = [re.search(pattern, Path(os.path.relpath(path, root)).as_posix()) for path in table.path]
    if None in found:
        raise DataError(f"camera_pattern: '{pattern}' finds no camera in {table.path[found.index(None)]}")
    return table.assign(camera=[match[1] for match in found])


# --- Splitting ------------------------------------------------------------------------------------------------------


def split(table: pd.DataFrame, test_share: float = 0.3, query_share: float = 0.3, seed: int = 0) -> pd.DataFrame:
    """The table, by path, with `split` (train, query or gallery), `number` (the label written) and `source`.

    Identities are trained on or tested, never both: about `test_share` of those with two images or more are tested,
    drawn alike from small and large ones; identities that share a group stay together. Of a test identity's images
    about `query_share` are queries, whole groups at a time, and only while each of its queries keeps an image to find
    in the gallery, from another camera where cameras are known. Test identities are numbered on from the training ones.
    `source`, the third column of a list, is what a query may not find of its own identity: its camera where that is
    known, otherwise a number of its own group or image.
    Raises DataError where nothing is left to train on or to retrieve.
    """
    for name, share in (("test_share", test_share), ("query_share", query_share)):
        if not 0 < share < 1:
            raise ValueError(f"{name} is {share}; it is a share, between 0 and 1")
    table, rng = table.sort_values("path", ignore_index=True), np.random.default_rng(seed)
    identity, unit, source = pd.factorize(table.label, sort=True)[0], units(table), sources(table)
    tested = test_identities(identity, unit, test_share, rng)
    if not tested.any() or tested.all():
        raise DataError(
            "no identity can be tested while another is trained on: that takes identities of two images or "
            "more that do not all share groups with the others"
        )
    rows = np.flatnonzero(tested[identity])
    chosen = rows[query_rows(identity[rows], unit[rows], source[rows], query_share, rng)]
    if not len(chosen):
        raise DataError("no image can be a query: no test identity has images of two cameras or two groups")
    part = np.where(tested[identity], "gallery", "train").astype(object)
    part[chosen] = "query"
    number = np.argsort(np.argsort(tested, kind="stable"))  # training identities first
    return table.assign(split=part, number=number[identity], source=source)


def units(table: pd.DataFrame) -> np.ndarray:
    """(N,) a number for what must not be torn apart: the group of an image, or the image itself."""
    own = "image " + table.path
    return pd.factorize(own if "group" not in table else ("group " + table.group).fillna(own))[0]


def sources(table: pd.DataFrame) -> np.ndarray:
    """(N,) the number of the camera, and where none is known one beyond them, of the unit."""
    if "camera" not in table or table.camera.isna().all():
        return units(table)
    known = table.camera.notna().to_numpy()
    whole = table.camera[known].str.fullmatch("[0-9]{1,9}").all()
    camera = table.camera.fillna("0").astype(int) if whole else pd.factorize(table.camera, sort=True)[0]
    return np.where(known, camera, np.max(camera) + 1 + units(table))


def test_identities(identity: np.ndarray, unit: np.ndarray, share: float, rng) -> np.ndarray:
    """(identities,) True for those to test: `share` of those that can be, whatever their number of images."""
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
    return np.isin(linked, taken)


def query_rows(identity: np.ndarray, unit: np.ndarray, source: np.ndarray, share: float, rng) -> np.ndarray:
    """Which rows are queries: units in random order, each taken only if all queries still find something."""
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


# --- Looking --------------------------------------------------------------------------------------------------------


def fingerprints(paths) -> pd.DataFrame:
    """One row an image, by path: width, height, sha256, hash (8 bytes; None if it is flat), colours, problem (or None).

    The hash is perceptual: the signs of the 64 lowest frequencies of the grey picture against their median. Saving it
    again or resizing it turns few of its bits.
    """
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        return pd.DataFrame(list(pool.map(fingerprint, paths)), index=pd.Index(paths, name="path"))


def fingerprint(path: str) -> dict:
    """The row of `fingerprints` of one file."""
    row = dict.fromkeys(("width", "height", "sha256", "hash", "colours", "problem"))
    try:
        data = Path(path).read_bytes()
        with Image.open(io.BytesIO(data)) as image:
            size = image.size[::-1] if image.getexif().get(ORIENTATION, 1) >= 5 else image.size
            image.draft("RGB", (64, 64))  # the JPEG decoder shrinks: many times faster on photographs
            ImageOps.exif_transpose(image, in_place=True)
            small = to_rgb(image).resize((32, 32), Image.Resampling.BOX)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        return {**row, "problem": str(error).replace(repr(path), "the file")}
    grey = np.asarray(small.convert("L"), np.float32)
    waves = dctn(grey)[:8, :8].ravel()
    bits = np.packbits(waves > np.median(waves[1:])) if grey.std() > FLAT else None  # the first is the brightness
    colours = np.asarray(small.resize((8, 8), Image.Resampling.BOX), np.float32)
    return {
        **row,
        "width": size[0],
        "height": size[1],
        "sha256": hashlib.sha256(data).hexdigest(),
        "hash": bits,
        "colours": colours,
    }


def audit(table: pd.DataFrame, prints: pd.DataFrame | None = None, distance: int = 4) -> dict[str, pd.DataFrame]:
    """Tables of what is in a table: identities, sizes, unreadable, duplicates, leaks.

    `duplicates` pairs the images with the same bytes, and those whose perceptual hashes differ in at most `distance` of
    64 bits and whose colours agree (each with its nearest few). `leaks` are the pairs that stand under two identities
    or, after `split`, in two splits. A flat picture has nothing to hash and is compared by its bytes alone.
    """
    prints = fingerprints(table.path) if prints is None else prints.loc[table.path]
    table = table.reset_index(drop=True)
    fine = np.flatnonzero(prints.problem.isna())
    sizes = prints.iloc[fine].value_counts(["width", "height"]).rename("images").reset_index().astype(int)
    counts = {"images": ("path", "size")} | {
        f"{name}s": (name, "nunique") for name in ("camera", "group") if name in table
    }
    keys = ["split", "label"] if "split" in table else ["label"]
    found = pd.DataFrame(
        [*same_bytes(prints.sha256.to_numpy(), fine), *alike(prints, fine, distance)],
        columns=["a", "b", "bits", "kind"],
    )
    pairs, leak = found[["kind", "bits"]].copy(), pd.Series("", found.index)
    for name, what in (("label", "two identities, "), ("split", "two splits"), ("path", "")):
        if name in table:
            for side in "ab":
                pairs[f"{name} {side}"] = table[name].to_numpy()[found[side].to_numpy(int)]
            leak += np.where(pairs[f"{name} a"] != pairs[f"{name} b"], what, "")
    pairs["leak"] = leak.str.strip(", ")
    return {
        "identities": table.groupby(keys, as_index=False).agg(**counts),
        "sizes": sizes,
        "unreadable": prints.problem[prints.problem.notna()].reset_index(),
        "duplicates": pairs,
        "leaks": pairs[pairs.leak != ""].reset_index(drop=True),
    }


def same_bytes(digests: np.ndarray, rows: np.ndarray) -> list[tuple]:
    """(row, row, 0, kind) of the same digest: the first of each with every other."""
    first = {}
    return [(first[digests[i]], i, 0, "same file") for i in rows if first.setdefault(digests[i], i) != i]


def alike(prints: pd.DataFrame, rows: np.ndarray, distance: int) -> list[tuple]:
    """(row, row, differing bits, kind) of different files that look alike, nearest first."""
    kinds = prints.iloc[rows].assign(row=rows).drop_duplicates("sha256").dropna(subset=["hash"])
    if len(kinds) < 2:
        return []
    kinds, colours = kinds.row.to_numpy(), np.stack(kinds.colours.to_list())
    scores, found = knn(np.stack(prints.hash.iloc[kinds].to_list()), k=NEIGHBOURS, distance="hamming")
    left, place = np.nonzero(scores >= -distance)
    ends = np.sort(np.stack([left, found[left, place]], 1), axis=1)
    near = np.abs(colours[ends[:, 0]] - colours[ends[:, 1]]).mean((1, 2, 3)) <= TONE
    pairs = {(int(-scores[left[i], place[i]]), *kinds[ends[i]].tolist()) for i in np.flatnonzero(near)}
    return [(a, b, bits, "looks alike") for bits, a, b in sorted(pairs)]


# --- Writing --------------------------------------------------------------------------------------------------------


def write_lists(splits: pd.DataFrame, folder: str | Path, image_root: str | Path | None = None) -> Path:
    """The folder that the paths in train.txt, query.txt and gallery.txt start from (default: the deepest they share).

    Lines are `path label source`; where a path holds white space, `path<tab>label`, which ImageNetDataset reads. That
    has no room for cameras: DataError where both are needed, and for a name that no list can hold.
    """
    folders = [str(Path(path).parent) for path in splits.path]
    root = Path(os.path.commonpath(folders) if image_root is None else plain(resolve(image_root)))
    paths = splits.path.map(lambda path: Path(os.path.relpath(path, root)).as_posix())
    spaced = paths[[path.split() != [path] for path in paths]]
    for path in spaced:
        if "camera" in splits or path != path.strip() or re.search(r"[\t\r\n]", path):
            raise DataError(
                f"{root / path}: white space in a path is possible only within it and in lists without "
                "cameras (which are then separated by tabs, for ImageNetDataset); rename the file"
            )
    for path in paths[paths.map(printable) != paths]:
        raise DataError(
            f"{root / path}: no list can hold this name, which is no UTF-8 text or has control signs in "
            "it; rename the file"
        )
    for name in SPLITS:
        mine = splits[splits["split"] == name]
        lines = (
            [f"{path}\t{label}\n" for path, label in zip(paths[mine.index], mine.number, strict=True)]
            if len(spaced)
            else [
                f"{path} {label} {source}\n"
                for path, label, source in zip(paths[mine.index], mine.number, mine.source, strict=True)
            ]
        )
        write_text(Path(resolve(folder), f"{name}.txt"), "".join(lines))
    return root
