"""Unpacks Omniglot or the Grocery Store pictures into data/ with list files that configs/omniglot.yaml and
configs/grocery.yaml read:

    python scripts/unpack.py omniglot FOLDER   images_background.zip and images_evaluation.zip lie in FOLDER
    python scripts/unpack.py grocery FOLDER    grocery_store_cap28.zip lies in FOLDER

The second also makes products/, with a folder of photographs for each product, as `recnb start` takes them.
"""

import argparse
import csv
import shutil
import zipfile
from pathlib import Path

DATA = Path(__file__).resolve().parents[1] / "data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=["omniglot", "grocery"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--to", type=Path, help="the folder to write to, by default data/NAME of the project")
    args = parser.parse_args()
    target = args.to or DATA / args.name
    unpack(args.folder, target)
    lists = omniglot(target) if args.name == "omniglot" else grocery(target)
    if args.name == "grocery":
        by_product(target)
    for name, rows in lists.items():
        (target / name).write_text("".join(f"{path} {label}\n" for path, label in rows))
        print(f"{target / name}: {len(rows)} images of {len({label for _, label in rows})} identities")


def unpack(folder: Path, target: Path) -> None:
    archives = sorted(folder.glob("*.zip"))
    if not archives:
        raise SystemExit(f"{folder}: there is no .zip file in it")
    for archive in archives:
        with zipfile.ZipFile(archive) as packed:
            packed.extractall(target)
    for text in ("README.txt", "LICENSE"):
        if (folder / text).exists():
            shutil.copy(folder / text, target / text)


def omniglot(target: Path) -> dict[str, list[tuple[str, int]]]:
    """Characters of images_background to train on, those of images_evaluation as query and gallery at once."""
    lists, first = {}, 0
    for name, part in (("train.txt", "images_background"), ("test.txt", "images_evaluation")):
        characters = sorted(p for p in (target / part).glob("*/*") if p.is_dir())
        lists[name] = [
            (image.relative_to(target).as_posix(), label)
            for label, character in enumerate(characters, first)
            for image in sorted(character.glob("*.png"))
        ]
        first += len(characters)  # one number is one character, in both lists
    return lists


def grocery(target: Path) -> dict[str, list[tuple[str, int]]]:
    """Products with an even fine label to train on, those with an odd one as query and gallery at once."""
    table = next(target.rglob("images.csv"))
    with table.open(newline="") as file:
        rows = [
            ((table.parent / row["path"]).relative_to(target).as_posix(), int(row["fine"]))
            for row in csv.DictReader(file)
        ]
    return {
        "train.txt": [(path, fine) for path, fine in rows if fine % 2 == 0],
        "test.txt": [(path, fine) for path, fine in rows if fine % 2 == 1],
    }


def by_product(target: Path) -> None:
    """Copy the photographs into products/, a folder for each product, named by where they lay."""
    table = next(target.rglob("images.csv"))
    with next(target.rglob("classes.csv")).open(newline="") as file:
        names = {row["Class ID (int)"]: row["Class Name (str)"] for row in csv.DictReader(file)}
    with table.open(newline="") as file:
        for row in csv.DictReader(file):
            copy = target / "products" / names[row["fine"]] / row["path"].replace("/", "_")
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(table.parent / row["path"], copy)


if __name__ == "__main__":
    main()
