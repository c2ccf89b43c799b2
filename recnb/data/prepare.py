"""Your own images become list files: read, grouped, mended by hand, written.

A table has one image a row: `path` (absolute), `label` (the identity's name), and where known `camera` and `group`,
the source that images share, such as a session or a video. `recnb.data.audit` looks for what would spoil the results,
`recnb.data.splits` adds who is trained on and who is judged. What is left out is kept as rows (path, reason).
Results that are too good mostly come from here: the same picture on both sides of a split, or under two identities.
"""

import csv
import io
import os
import re
import unicodedata
from collections.abc import Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_type_hints

import numpy as np
import pandas as pd

from recnb.data.audit import exact_copies
from recnb.data.images import DataError, printable
from recnb.data.layouts import no_images, scan
from recnb.data.lists import ImageList, VeriWild, positives
from recnb.registry import check_known, check_values, suggest
from recnb.storage import as_meant, replacing, resolve

COLUMNS = ("path", "label", "camera", "group")
SPLITS = {  # list file -> its place in a configuration
    "train": "Train",
    "query": "Eval.Query",
    "gallery": "Eval.Gallery",
    "validation": "Validation.Query",
}
SESSION = 60  # seconds: photographs of an identity taken closer together are one source


# --- Options --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Options:
    """What 01_prepare may be told, by name; what is left out is as here."""

    image_root: str | None = None  # the folder that paths in a file start from
    columns: dict | None = None  # what a CSV calls its columns
    camera_pattern: str | None = None  # a regular expression with one group, which finds the camera in a path
    group_by: Literal["none", "folder", "time"] = "none"  # what of an identity: subfolders, or a minute's photographs
    tags: str | None = None  # a CSV of path, action (exclude or relabel) and label
    drop_leaks: bool = True  # exact copies are left out
    distance: int = 4  # bits of 64 by which two pictures that look alike may differ
    test_share: float = 0.3
    query_share: float = 0.3
    validation: float = 0.15
    seed: int = 0
    weights: bool | str | None = None  # True for the hub's, a file, False for none; None for what can be had
    backbone: str | None = None
    epochs: int | None = None
    image_size: int | None = None  # pixels


def read_options(given: Mapping) -> Options:
    """Return the options that a mapping gives; raise ConfigError for a name or a value that cannot be meant."""
    hints = get_type_hints(Options)
    check_known(given, hints, "options")
    check_values(dict(given), hints, "options")
    return Options(**given)


# --- Reading --------------------------------------------------------------------------------------------------------


def read_source(
    source: str | Path,
    image_root: str | Path | None = None,
    columns: dict | None = None,
    camera_pattern: str | None = None,
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return the table of a folder, a CSV or a list file, and (path, reason) of the files of a folder that are none.

    Names lose blanks around them, and are composed alike (NFC): what looks the same is one identity.

    Args:
        source: a folder of one folder per identity, a CSV with a header, or a list file `path label [camera]`.
        image_root: the folder that paths in a file start from, by default the file's own; they may lead out of it.
        columns: what the CSV calls its columns, e.g. `{"path": "file", "label": "article"}`.
        camera_pattern: a regular expression whose one group is the camera in a path.

    Raises:
        DataError: A row cannot be used, with its file and line, or there is none.
    """
    source, unused = resolve(source), []
    root = images_root(source, image_root)
    if source.is_dir():
        files, unused = scan(source)
        if not files:
            raise DataError(f"{source}: {no_images(unused)}")
        table, places = pd.DataFrame(files, columns=["path", "label"], dtype=object), None
    elif not source.is_file():
        raise DataError(f"{source}: there is no such file or folder")
    elif source.suffix.lower() in (".csv", ".tsv"):
        table, places = read_csv(source, root, columns or {})
    else:
        images = VeriWild(str(root), str(source), allow_outside=True)
        table = pd.DataFrame({"path": images.paths, "label": map(images.name, images.labels)})
        if images.cameras is not None:
            table["camera"] = images.cameras.astype(str)
        places = [images.place(i) for i in range(len(images))]
    if table.empty:
        raise DataError(f"{source}: has no rows below its header")
    names = {name: unicodedata.normalize("NFC", str(name)).strip() for name in table.label.unique()}
    table = table.assign(path=[plain(path) for path in table.path], label=table.label.map(names))
    if places is not None:
        check_paths(table.path, places)
    return (table if camera_pattern is None else with_cameras(table, camera_pattern, root)), unused


def images_root(source: str | Path, image_root: str | Path | None = None) -> Path:
    """Return the folder that the images of a source lie in: what paths are shown from."""
    source = resolve(source)
    return Path(plain(source if source.is_dir() else resolve(source.parent if image_root is None else image_root)))


def relative(table: pd.DataFrame, root: Path) -> pd.DataFrame:
    """Return a table with its columns of paths as they are from `root`: for reading."""
    columns = [name for name in table if name.startswith("path")]
    return table.assign(**{name: [os.path.relpath(path, root) for path in table[name]] for name in columns})


def read_csv(
    path: Path, root: Path, columns: dict, known: tuple[str, ...] = COLUMNS, needed: tuple[str, ...] = ("path", "label")
) -> tuple[pd.DataFrame, list[str]]:
    """Return the table of a CSV and the place of each row.

    Args:
        path: the file; cells are parted by the commonest of , ; and tab in its header.
        root: the folder that its paths start from.
        columns: what it calls the columns that it calls otherwise.
        known: the columns that are taken.
        needed: those of them that every row has to fill.

    Raises:
        DataError: A column is missing or a row lacks a cell, with the line.
    """
    try:
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise DataError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path} line {error.object.count(10, 0, error.start) + 1}: is not UTF-8 text") from None
    reader = csv.DictReader(
        io.StringIO(text, newline=""), strict=True, delimiter=max(",;\t", key=text.partition("\n")[0].count)
    )
    try:
        rows = [(f"{path} line {reader.line_num}", row) for row in reader]
    except csv.Error as error:
        raise DataError(f"{path} line {reader.reader.line_num}: {error}") from None
    names, header = dict(zip(known, known, strict=True)) | columns, list(reader.fieldnames or [])
    for name in (*needed, *columns):
        if name not in known or names[name] not in header:
            wrong, there = (names[name], header) if name in known else (name, known)
            raise DataError(f"{path} line 1: there is no column '{wrong}'; {suggest(wrong, there)}")
    for place, row in rows:
        if None in row or None in row.values() or not all((row[names[name]] or "").strip() for name in needed):
            raise DataError(f"{place}: has no {', no '.join(needed)}, or not {len(header)} cells as the header")
    table = pd.DataFrame(
        {
            name: [as_meant(row[theirs]) or None for _, row in rows]
            for name, theirs in names.items()
            if theirs in header
        },
        columns=[name for name, theirs in names.items() if theirs in header or name in needed],
    ).astype(object)
    return table.assign(path=[str(root / p) for p in table.path]), [place for place, _ in rows]


def plain(path: str | Path) -> str:
    """The absolute path without dots; links are kept, for an image belongs to the folder where it is listed."""
    return os.path.abspath(path)  # noqa: PTH100 (a Path takes six times as long, and there may be millions)


def check_paths(paths: Iterable[str], places: list[str]) -> None:
    """Raise DataError for the first image that does not exist or stands there twice."""
    first = {}
    for path, place in zip(paths, places, strict=True):
        if path in first:
            raise DataError(f"{place}: the image {path} was given before, in {first[path]}")
        if not Path(path).is_file():
            raise DataError(f"{place}: there is no image {path}")
        first[path] = place


def with_cameras(table: pd.DataFrame, pattern: str, root: Path) -> pd.DataFrame:
    """Return the table with the camera of each image.

    Args:
        table: images with `path`.
        pattern: a regular expression whose one group finds the camera in a path.
        root: the folder that paths are searched from.

    Raises:
        DataError: It has no such group, or finds none in a path.
    """
    if re.compile(pattern).groups != 1:
        raise DataError(f"camera_pattern: '{pattern}' does not have one group, which finds the camera")
    found = [re.search(pattern, Path(os.path.relpath(path, root)).as_posix()) for path in table.path]
    if None in found:
        raise DataError(f"camera_pattern: '{pattern}' finds no camera in {table.path[found.index(None)]}")
    return table.assign(camera=[match[1] for match in found if match])


# --- Mending and grouping -------------------------------------------------------------------------------------------


def with_tags(table: pd.DataFrame, tags: str | Path, root: Path) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return the table as a file of tags mends it, and (path, reason) of the images that it excludes.

    Args:
        table: images with `path` and `label`.
        tags: a CSV of `path` (absolute, or below `root`), `action` (exclude or relabel) and `label`, the right name.
        root: the folder of the images.

    Raises:
        DataError: A row names no image of the table, no action, or no label to take, with its line.
    """
    path, labels, known, left = resolve(tags), {}, set(table.path), []
    rows, places = read_csv(path, root, {}, ("path", "action", "label"), needed=("path", "action"))
    rows = rows.reindex(columns=["path", "action", "label"]).fillna("")
    for place, file, action, label in zip(places, map(plain, rows.path), rows.action, rows.label, strict=True):
        if file not in known:
            raise DataError(f"{place}: there is no image {printable(file)} among those that were found")
        if action == "exclude":
            left.append((file, f"excluded in {path.name}"))
        elif action == "relabel" and label:
            labels[file] = label.strip()
        else:
            raise DataError(f"{place}: '{action}' is no action with what it needs: exclude, or relabel with a label")
    table = table.assign(label=[labels.get(file, old) for file, old in zip(table.path, table.label, strict=True)])
    return without(table, left), left


def without(table: pd.DataFrame, left: list[tuple[str, str]]) -> pd.DataFrame:
    """Return the rows of a table that are not among (path, reason)."""
    return table[~table.path.isin([path for path, _ in left])].reset_index(drop=True)


def clean(
    table: pd.DataFrame, prints: pd.DataFrame, drop_copies: bool = True
) -> tuple[pd.DataFrame, list[tuple[str, str]]]:
    """Return the table without files that cannot be read and without exact copies, and (path, reason) of these.

    Args:
        table: images with `path` and `label`.
        prints: what `audit.fingerprints` found in them.
        drop_copies: whether exact copies go, too.

    Raises:
        DataError: Nothing is left.
    """
    problems = prints.problem.loc[table.path].dropna()
    left = list(problems.items())
    table = without(table, left)
    if drop_copies:
        copies = exact_copies(table, prints)
        table, left = without(table, copies), left + copies
    if table.empty:
        raise DataError(f"none of the {len(prints):,} images can be used; the first, {left[0][0]}: {left[0][1]}")
    return table, left


def with_groups(table: pd.DataFrame, by: str, root: Path, taken: pd.Series) -> pd.DataFrame:
    """Return the table with the group of each image where one is known.

    Args:
        table: images with `path` and `label`; groups that it has stay.
        by: `folder` for the subfolder of its identity that an image lies in, `time` for the photographs of an identity
            taken within a minute of the one before, `none` for no others than it has.
        root: the folder of the identities' folders.
        taken: by path, the time that the camera noted, None where it noted none.
    """
    if by == "none" or "group" in table:
        return table
    if by == "folder":
        folders = [Path(os.path.relpath(path, root)).parent for path in table.path]
        return table.assign(group=[str(folder) if len(folder.parts) > 1 else None for folder in folders])
    noted = taken.loc[table.path].astype(str).str.strip("\0 ")
    clock = pd.to_datetime(noted, format="%Y:%m:%d %H:%M:%S", errors="coerce")  # as EXIF writes it
    table = table.assign(clock=clock.to_numpy()).sort_values(["label", "clock", "path"])
    begins = (table.clock.diff().dt.total_seconds() > SESSION) | (table.label != table.label.shift())
    group = (table.label + " " + begins.cumsum().astype(str)).where(table.clock.notna(), None)
    return table.assign(group=group).drop(columns="clock").sort_index()


def used(table: pd.DataFrame, left: list[tuple[str, str]], root: Path) -> pd.DataFrame:
    """Return what is used and what is left out, a row a reason, with the first file of each.

    Args:
        table: the images that are used.
        left: (path, reason) of the others.
        root: the folder that paths are shown from.
    """
    rows = pd.DataFrame(left, columns=["path", "why"])
    rows["path"] = [os.path.relpath(path, root) for path in rows.path]
    counts = rows.groupby("why", sort=False).path.agg(["size", "first"]).reset_index()
    first = [("used", len(table), "", os.path.relpath(table.path.iloc[0], root))]
    others = [("left out", *row) for row in counts[["size", "why", "first"]].itertuples(index=False)]
    return pd.DataFrame([*first, *others], columns=["", "files", "why", "the first"])


# --- Writing --------------------------------------------------------------------------------------------------------


def list_files(splits: pd.DataFrame, image_root: str | Path | None = None) -> tuple[Path, dict[str, str]]:
    """Return the folder that paths start from (default: the deepest they share), and by its name each list's text.

    Lines are path and name between tabs, and the source where images share one; VeriWild reads them with a tab as its
    delimiter and `names: True`. Raise DataError for a path or a name that no list can hold.
    """
    folders = [str(Path(path).parent) for path in splits.path]
    root = Path(os.path.commonpath(folders) if image_root is None else plain(resolve(image_root)))
    paths = splits.path.map(lambda path: Path(os.path.relpath(path, root)).as_posix())
    for path in paths[(paths.map(printable) != paths) | (paths.str.strip() != paths)]:
        raise DataError(
            f"{root / path}: no list can hold this name, which is no UTF-8 text, or has control signs in it or blanks "
            "around it; rename the file"
        )
    for label in (label for label in splits.label.unique() if printable(label) != label or not label):
        raise DataError(
            f"the identity '{printable(label)}': no list can hold this name, which is empty, no UTF-8 text, or has "
            "tabs, line ends or other control signs in it; rename its folder"
        )
    shared = "" if splits.source.is_unique else "\t" + splits.source.astype(str)
    lines = paths + "\t" + splits.label + shared + "\n"
    parts = [name for name in SPLITS if name != "validation" or (splits["split"] == name).any()]
    return root, {f"{name}.txt": "".join(lines[splits["split"] == name]) for name in parts}


def write_files(folder: str | Path, files: Mapping[str, str]) -> None:
    """Write all files of a folder, or none where one cannot be written: then DataError, and what was there stays."""
    folder = resolve(folder)
    try:
        with ExitStack() as stack:
            for name, text in files.items():
                part = stack.enter_context(replacing(folder / name))
                part.write_text(text, encoding="utf-8", errors="backslashreplace", newline="")
    except OSError as error:
        raise DataError(f"{folder}: cannot be written to: {error.strerror or error}; nothing was changed") from None


def hold_out(images: ImageList, share: float, seed: int) -> tuple[ImageList, ImageList]:
    """Return (those to train on, those to validate on): a share of the identities, drawn by a seed, is held out.

    Args:
        images: A training list.
        share: How many of its identities are held out, between 0 and 1.
        seed: The same seed holds out the same identities.

    Raises:
        DataError: Fewer than two of the identities held out have two images to find each other, or fewer than two are
            left to train on.
    """
    identities = np.unique(images.labels)
    count = round(share * len(identities))
    chosen = np.random.default_rng(seed).permutation(identities)[:count]
    out = np.isin(images.labels, chosen)
    held = images.subset(out)
    usable = len(set(held.labels[positives(held, held) > 0].tolist())) if count else 0
    left = len(identities) - count
    if min(usable, left) < 2:
        raise DataError(
            f"{images.source} has {len(identities)} identities, and {share} of them leaves {left} to train on and "
            f"{usable} with two images (of different cameras, if there are any) to validate on; both need two: "
            "take another share or more images, or leave DataLoader.Validation out"
        )
    return images.subset(~out), held
