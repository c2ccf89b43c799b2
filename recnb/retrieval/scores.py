"""Chapter: scores between embeddings.

Every retrieval number starts from the same question: how alike are these two rows? Here the four usual answers
(cosine, dot, Euclidean, Hamming) are all made into one matrix product, so that metrics, re-ranking and search share
one fast path, one precision (float32) and one set of checks. A higher score is always a better match.

    cosine     q.g / (|q||g|); a row of zeros scores 0 with everything
    dot        q.g
    euclidean  q.g - |g|^2 / 2, which orders a gallery exactly as minus the distance does
    hamming    rows are packed bits (uint8, as numpy.packbits writes them); bits - 2 x the bits that differ
"""

import contextlib
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import ArrayLike
from torch import Tensor

DISTANCES = ("cosine", "dot", "euclidean", "hamming")
MEMORY = 256 << 20  # bytes
Array = np.ndarray | Tensor | Sequence
Index = slice | np.ndarray | Tensor  # of some rows


class Rows:
    """The rows of an (N, D) array, checked once and made ready for scoring a block at a time.

    Args:
        array: a list, a numpy array (memory-mapped too, it is never read whole) or a tensor on any device.
        distance: one of DISTANCES.
        name: what messages call the array.
        device: where rows are scored; by default where a tensor is, otherwise the CPU.

    Raises:
        ValueError: It is empty, not two-dimensional, or holds NaN or infinity (the row is named).
    """

    def __init__(
        self, array: Array, distance: str = "cosine", name: str = "query", device: str | torch.device | None = None
    ):
        if distance not in DISTANCES:
            raise ValueError(f"distance must be one of {', '.join(DISTANCES)}; got {distance!r}")
        self.array = array if isinstance(array, (np.ndarray, Tensor)) else np.asarray(array)
        self.distance, self.name = distance, name
        if self.array.ndim != 2:
            raise ValueError(f"{name} must be two-dimensional (rows, dimensions); got shape {tuple(self.array.shape)}")
        if 0 in self.array.shape:
            raise ValueError(f"{name} is empty: shape {tuple(self.array.shape)}")
        if distance == "hamming" and str(self.array.dtype).removeprefix("torch.") != "uint8":
            raise ValueError(f"{name} must hold packed bits (uint8, see numpy.packbits) for the Hamming distance")
        self.device = torch.device(device or (array.device if isinstance(array, Tensor) else "cpu"))
        self.norms = self._checked_norms()

    def __len__(self) -> int:
        return self.array.shape[0]

    @property
    def width(self) -> int:
        """Columns of a block as `queries` and `gallery` return it."""
        return self.array.shape[1] * (8 if self.distance == "hamming" else 1) + (self.distance == "euclidean")

    def raw(self, index: Index) -> Tensor:
        """Return the float32 values (n, D) of some rows, on the device."""
        if isinstance(self.array, Tensor):
            index = index if isinstance(index, slice) else torch.as_tensor(index, device=self.array.device)
            rows = self.array[index].detach().to(self.device)
        else:  # torch must not be handed read-only memory, such as a memory-mapped file's
            rows = torch.from_numpy(np.require(self.array[index], requirements=["C", "W"])).to(self.device)
        return _signs(rows) if self.distance == "hamming" else rows.float()

    def queries(self, index: Index) -> Tensor:
        """Return rows ready to be the left side of the product, (n, width)."""
        rows = self.raw(index)
        if self.distance == "cosine":
            return rows / self._norms(index)
        return torch.cat([rows, rows.new_ones(len(rows), 1)], 1) if self.distance == "euclidean" else rows

    def gallery(self, index: Index) -> Tensor:
        """Return rows ready to be the right side of the product (transposed), (n, width)."""
        if self.distance != "euclidean":
            return self.queries(index)
        rows = self.raw(index)
        return torch.cat([rows, rows.square().sum(1, keepdim=True) / -2], 1)

    def scale(self, query: "Rows", queries: Index, rows: Index) -> Tensor | float:
        """Return what float32 rounding is relative to: the products of the norms (len(queries), len(rows)).

        Args:
            query: the other side of the comparison.
            queries: some of its rows.
            rows: some rows of this side.
        """
        if self.distance == "cosine":
            return 1.0
        left = query.norms[torch.as_tensor(queries, device=query.device)][:, None]
        right = self.norms[torch.as_tensor(rows, device=self.device)]
        return left * right + (right.square() / 2 if self.distance == "euclidean" else 0)

    def _norms(self, index: Index) -> Tensor:
        index = index if isinstance(index, slice) else torch.as_tensor(index, device=self.device)
        return self.norms[index].clamp_min(1e-30)[:, None]

    def _checked_norms(self) -> Tensor:
        norms = torch.empty(len(self), device=self.device)
        for rows in spans(len(self), max(1, (16 << 20) // (4 * self.width))):
            torch.linalg.vector_norm(self.raw(rows), dim=1, out=norms[rows])
        bad = torch.nonzero(~torch.isfinite(norms))
        if len(bad):
            raise ValueError(f"{self.name} row {int(bad[0])} holds NaN, infinity or a value too large to square")
        return norms


def pair(
    query: Array, gallery: Array | None, distance: str = "cosine", device: str | torch.device | None = None
) -> tuple[Rows, Rows]:
    """Return the two sides of a comparison on one device; the same object twice where `gallery` is None.

    Args:
        query: (Q, D) embeddings.
        gallery: (G, D) embeddings, or None.
        distance: as in `Rows`; `device` too.
        device: see `distance`.

    Raises:
        ValueError: The two have other numbers of dimensions, or one is not as `Rows` needs it.
    """
    left = Rows(query, distance, "query", device)
    right = left if gallery is None else Rows(gallery, distance, "gallery", left.device)
    if left.array.shape[1] != right.array.shape[1]:
        raise ValueError(f"query has {left.array.shape[1]} dimensions but gallery has {right.array.shape[1]}")
    return left, right


def spans(length: int, step: int, start: int = 0) -> list[slice]:
    """Return consecutive slices of at most `step` that cover range(start, length).

    Args:
        length: where the last one ends.
        step: the most places of each.
        start: where the first one begins.
    """
    return [slice(i, min(i + step, length)) for i in range(start, length, step)]


@contextlib.contextmanager
def exact(device: str | torch.device, threads: int | None = None) -> Iterator[None]:
    """Make a block in which float32 products are float32, whatever autocast or TF32 say; on so many threads each."""
    before = torch.get_float32_matmul_precision(), torch.get_num_threads()
    torch.set_float32_matmul_precision("highest")
    torch.set_num_threads(threads or before[1])
    try:
        with torch.no_grad(), torch.autocast(torch.device(device).type, enabled=False):
            yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.set_num_threads(before[1])


def to_numpy(values: ArrayLike) -> np.ndarray:
    """Return labels, scores or indices, given as a list, an array or a tensor, as a numpy array."""
    return values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)


def _signs(packed: Tensor) -> Tensor:
    shifts = torch.arange(7, -1, -1, device=packed.device, dtype=torch.uint8)
    bits = (packed[:, :, None] >> shifts) & 1
    return bits.flatten(1).float() * 2 - 1
