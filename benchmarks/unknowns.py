"""Measures how a recogniser names and refuses images of identities that had no part in any of its choices.

    python benchmarks/unknowns.py runs/grocery/export --rate 0.1

Half of the test identities, drawn at random, choose the curve and the threshold for a false-accept rate. The
images of the other half are then searched, each without itself, and with its identity taken out of the index. Prints
the mean and the range over the draws. Nothing is embedded: the vectors are those of the export.
"""

import argparse
from pathlib import Path

import numpy as np

from recnb.deploy.decision import Searches, choose, evidence, probability, searches
from recnb.deploy.index import labelled_images
from recnb.retrieval.search import Index
from recnb.runs import load_run


def some(found: tuple[Searches, Searches, np.ndarray], which: np.ndarray) -> tuple[Searches, Searches, np.ndarray]:
    known, unknown, has = found
    return known[which], unknown[which], has[which]


def fares(found: tuple[Searches, Searches, np.ndarray], identity: np.ndarray, point: dict) -> list[float]:
    """The shares of known images named rightly, of known ones answered unknown, and of unknown ones given a name."""
    known, unknown, has = found
    (first, numbers), (_, others) = evidence(known), evidence(unknown)
    accepted = (probability(numbers, point["probability"]) >= point["threshold"])[has]
    named = probability(others, point["probability"]) >= point["threshold"]
    return [float((accepted & (first == identity)[has]).mean()), float((~accepted).mean()), float(named.mean())]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("export", type=Path, help="an export folder in its run folder, with index: all")
    parser.add_argument("--rate", type=float, default=0.1, help="the false-accept rate that is asked for")
    parser.add_argument("--draws", type=int, default=20)
    args = parser.parse_args()
    known, vectors = labelled_images(load_run(args.export.parent)), np.load(args.export / "index" / "embeddings.npy")
    items, asked, distance = known.items, known.asked, Index.load(args.export / "index").distance
    found, identity = searches(vectors[asked], vectors, items[asked], items, distance), items.identity[asked]
    rows = []
    for draw in range(args.draws):
        names = np.random.default_rng(draw).permutation(np.unique(identity))
        chose = np.isin(identity, names[: len(names) // 2])
        point = choose(some(found, chose), identity[chose], {"false_accept_rate": args.rate})
        rows.append(fares(some(found, ~chose), identity[~chose], point))
    print(f"{len(known)} images of {len(np.unique(known.names))} identities in the index, {len(asked)} test images")
    for name, values in zip(
        ("known, named rightly", "known, unknown", "unknown, named"), np.transpose(rows), strict=True
    ):
        print(f"{name:22} {values.mean():.1%} ({values.min():.1%} to {values.max():.1%} in {args.draws} draws)")


if __name__ == "__main__":
    main()
