"""Chapter: which index suits so many vectors, and what it holds and reads.

The kinds and their numbers are those of faiss's own guide (https://github.com/facebookresearch/faiss/wiki,
"Guidelines to choose an index"). `plan` is arithmetic; what faiss has measured is beside it in docs/searching.md.
"""

from __future__ import annotations

import re

EXACT = 1_000_000  # below, one core compares a query with all of 128 dimensions in 50 ms
WHOLE = 10_000_000  # below, lists hold whole vectors; from here on, codes
POINTS = 40  # vectors for each list to train on: faiss asks for 30 to 256
LINKS = 32  # of a vertex in HNSW
STREAMED, VISITED = 10e9, 1.5e9  # bytes a second of one core: in a row, and list by list (faiss's log of Deep1B)


def auto_factory(count: int, dimension: int, distance: str = "cosine") -> str:
    """Return the faiss factory string that suits so many vectors: exact, then lists of vectors, then lists of codes.

    Args:
        count: how many vectors.
        dimension: of a vector; of bits, in bytes.
        distance: as in `recnb.retrieval.Index`.
    """
    if distance == "hamming":
        return "BFlat"
    if count < EXACT:
        return "Flat"
    if count < WHOLE:
        return f"IVF{int(4 * count**0.5)},Flat"
    pieces = max(1, min(64, dimension // 2))  # of 4 bits each
    width = pieces * max(1, min(4, dimension // pieces))
    lists = 1 << int(16 * count**0.5).bit_length()
    return f"OPQ{pieces}_{width},IVF{lists}_HNSW{LINKS},PQ{pieces}x4fsr"


def probes(lists: int) -> int:
    """Return how many of an index's lists a query visits unless `effort` says otherwise."""
    return min(lists, max(8, min(256, lists // 16)))


def plan(count: int, dimension: int) -> dict[str, str | float]:
    """Return what an index of so many float32 vectors costs, by arithmetic.

    Args:
        count: how many vectors.
        dimension: of a vector.

    Returns:
        The `factory`; `GB` of memory, ids included and the user's columns not; `MB read` for a query; `ms` of one
        core for it where all is in memory.
    """
    factory, size = auto_factory(count, dimension), 4 * dimension
    if factory == "Flat":
        return costs(factory, count * (size + 8), count * size, STREAMED)
    lists = int(re.findall(r"IVF(\d+)", factory)[0])
    share = count * probes(lists) / lists  # vectors in the lists that are visited
    if factory.endswith("Flat"):
        return costs(factory, count * (size + 8) + lists * size, lists * size + share * size, STREAMED)
    pieces, width = map(int, re.findall(r"OPQ(\d+)_(\d+)", factory)[0])
    centre = 4 * width + 8 * LINKS
    walked = 2 * probes(lists) * LINKS * 4 * width
    return costs(factory, count * (pieces / 2 + 8) + lists * centre, walked + share * pieces / 2, VISITED)


def costs(factory: str, held: float, read: float, speed: float) -> dict[str, str | float]:
    """Return a row of `plan`.

    Args:
        factory: the kind of index.
        held: bytes of memory.
        read: bytes that a query reads.
        speed: bytes that a core reads in a second.
    """
    return {"factory": factory, "GB": held / 1e9, "MB read": read / 1e6, "ms": 1e3 * read / speed}
