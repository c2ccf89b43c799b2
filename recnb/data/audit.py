"""What would spoil the results is found before: unreadable files, copies, the same picture under two identities."""

import hashlib
import io
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pandas as pd
from PIL import Image, ImageOps
from scipy.fft import dctn
from tqdm.auto import tqdm

from recnb.data.images import opened, reason, to_rgb
from recnb.retrieval.neighbours import knn

FLAT = 4.0  # grey levels: a picture that varies less has no shape to compare
TONE = 16.0  # grey levels: two pictures whose colours differ more, on average, are different pictures
NEIGHBOURS = 10
MANY = 300_000  # images, each of which is compared with each: with more it takes longer than anybody waits
ORIENTATION, DETAILS, TAKEN = 0x0112, 0x8769, 0x9003  # EXIF; turned from 5 on, width and height change places
COLUMNS = ("width", "height", "sha256", "hash", "colours", "taken", "problem")


def fingerprints(paths: Iterable[str]) -> pd.DataFrame:
    """Return one row an image, by path: width, height, sha256, hash, colours, taken and problem.

    The hash (8 bytes; None for a flat picture) is perceptual: the signs of the 64 lowest frequencies of the grey
    picture against their median. Saving it again or resizing it turns few of its bits. `taken` is the time that the
    camera noted, None where there is none; `problem` is why a file cannot be read, or None.
    """
    paths = list(paths)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        rows = tqdm(
            pool.map(fingerprint, paths), "images read", len(paths), unit=" images", leave=False, delay=3, mininterval=1
        )
        return pd.DataFrame(list(rows), columns=COLUMNS, index=pd.Index(paths, name="path"))


def fingerprint(path: str) -> tuple:
    """Return the row of `fingerprints` of one file."""
    try:
        data = Path(path).read_bytes()
        with opened(io.BytesIO(data)) as image:
            exif = image.getexif()
            width, height = image.size if exif.get(ORIENTATION, 1) < 5 else image.size[::-1]
            taken = exif.get_ifd(DETAILS).get(TAKEN)
            image.draft("RGB", (64, 64))  # the JPEG decoder shrinks: many times faster on photographs
            ImageOps.exif_transpose(image, in_place=True)
            small = to_rgb(image).resize((32, 32), Image.Resampling.BOX)
    except Exception as error:  # decoders raise whatever a broken file leads them to
        return (None,) * (len(COLUMNS) - 1) + (reason(error),)
    grey = np.asarray(small.convert("L"), np.float32)
    waves = dctn(grey)[:8, :8].ravel()
    bits = np.packbits(waves > np.median(waves[1:])) if grey.std() > FLAT else None  # the first is the brightness
    colours = np.asarray(small.resize((8, 8), Image.Resampling.BOX))
    return width, height, hashlib.sha256(data).hexdigest(), bits, colours, taken, None


def exact_copies(table: pd.DataFrame, prints: pd.DataFrame) -> list[tuple[str, str]]:
    """Return (path, reason) of the images that are best left out since other files hold the same bytes.

    Of copies under one identity the first stays. Those under several identities all go: nothing says which is right.
    """
    digests = prints.sha256.loc[table.path]
    several = table.assign(digest=digests.to_numpy())[digests.duplicated(keep=False).to_numpy()].sort_values("path")
    left: list[tuple[str, str]] = []
    for _, copies in several.groupby("digest"):
        first, labels = copies.path.iloc[0], list(dict.fromkeys(copies.label))
        if len(labels) > 1:
            left += [(path, f"the same file stands under {' and '.join(labels)}") for path in copies.path]
        else:
            left += [(path, f"a copy of {Path(first).name}") for path in copies.path[1:]]
    return left


def audit(table: pd.DataFrame, prints: pd.DataFrame | None = None, distance: int = 4) -> dict[str, pd.DataFrame]:
    """Return tables of what is in a table: identities, sizes, unreadable, duplicates, leaks.

    `duplicates` pairs the images with the same bytes, and those that look alike (each with its nearest few). `leaks`
    are the pairs that stand under two identities or, after `split`, in two splits.

    Args:
        table: images with `path` and `label`, and where known `camera`, `group` and `split`.
        prints: what `fingerprints` found in them; None reads them now.
        distance: in how many of 64 bits the perceptual hashes of two that look alike may differ; their colours agree
            too. A flat picture has nothing to hash and is compared by its bytes alone.
    """
    prints = fingerprints(table.path) if prints is None else prints.loc[table.path]
    table = table.reset_index(drop=True)
    fine = np.flatnonzero(prints.problem.isna())
    sizes = prints.iloc[fine].value_counts(["width", "height"]).rename("images").reset_index().astype(int)
    counts = {"images": ("path", "size")} | {
        f"{name}s": (name, "nunique") for name in ("camera", "group") if name in table
    }
    keys = ["split", "label"] if "split" in table else ["label"]
    digests, first = prints.sha256.to_numpy(), {}
    same = [(first[digests[i]], i, 0, "same file") for i in fine if first.setdefault(digests[i], i) != i]
    found = pd.DataFrame([*same, *alike(prints, fine, distance)], columns=["a", "b", "bits", "kind"])
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


def alike(prints: pd.DataFrame, rows: np.ndarray, distance: int) -> list[tuple]:
    """Return (row, row, differing bits, kind) of different files that look alike, nearest first.

    Args:
        prints: the rows of `fingerprints`.
        rows: which of them can be read.
        distance: how many bits may differ.
    """
    kinds = prints.iloc[rows].assign(row=rows).drop_duplicates("sha256").dropna(subset=["hash"])
    if len(kinds) < 2:
        return []
    if len(kinds) > MANY:
        print(f"{len(kinds):,} images are too many to look for near copies among them; exact copies are found")
        return []
    kinds, colours = kinds.row.to_numpy(), np.stack(kinds.colours.to_list()).astype(np.int16)
    scores, found = knn(np.stack(prints.hash.iloc[kinds].to_list()), k=NEIGHBOURS, distance="hamming")
    left, place = np.nonzero(scores >= -distance)
    ends = np.sort(np.stack([left, found[left, place]], 1), axis=1)
    near = np.abs(colours[ends[:, 0]] - colours[ends[:, 1]]).mean((1, 2, 3)) <= TONE
    pairs = {(int(-scores[left[i], place[i]]), *kinds[ends[i]].tolist()) for i in np.flatnonzero(near)}
    return [(a, b, bits, "looks alike") for bits, a, b in sorted(pairs)]
