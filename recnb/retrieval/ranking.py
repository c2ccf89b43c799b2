"""Chapter: at which rank does each match stand?

A ranking metric needs only the ranks of a query's positives, and the rank of a positive needs only a count: how many
negatives score at least as high. So nothing is sorted and nothing of size queries x gallery is kept. Blocks of scores
are computed, counted and forgotten, at little more than the cost of the matrix product itself.

Ties are pessimistic: a negative that scores as high as a positive is ranked before it. Scores closer than `tie` times
the product of the norms (by default TIE, about what float32 sums can tell apart) count as equal. So the order of the
gallery changes nothing, and a model that gives every image the same embedding gets the worst ranking, not a lucky one.

On CPUs compiled loops count (`kernels`), elsewhere torch: the same numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import repeat

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

from recnb.retrieval.protocol import Protocol
from recnb.retrieval.scores import Rows, spans, to_numpy

TIE = 3e-7
CPU_TILE, LARGE_TILE = (256, 1024), (1024, 16384)  # a tile of scores stays in a core's cache, or fills a GPU


def embedding_ranks(
    query: Rows, gallery: Rows, protocol: Protocol, share: np.ndarray, tie: float, memory: int, workers: int = 1
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield blocks of (queries (B,), ranks (B, R)): 1-based ranks of the positives, best first, padded with 0.

    Args:
        query: the queries, made ready.
        gallery: the gallery, made ready.
        protocol: who matches whom.
        share: the query numbers to do.
        tie: scores closer than this times the product of the norms are ties.
        memory: bytes of working memory, whatever the gallery's size.
        workers: threads that each multiply and count whole blocks, so that each counts what its own cache holds.
    """
    limit, width = tile_shape(gallery, memory)
    limit = min(limit, max(32, -(-len(share) // workers)))

    def prepared(queries: np.ndarray) -> Block:
        block = Block(protocol, queries, query.queries(queries))
        block.set_thresholds(block.positive_scores(gallery, width), tie * gallery.scale(query, queries, block.rows))
        return block

    with ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        for batch in _batches(label_blocks(share, protocol, memory // workers, limit), protocol, query.width, memory):
            blocks = list(pool.map(prepared, batch))
            parts = [blocks[i::workers] for i in range(min(workers, len(blocks)))]
            for columns in spans(len(gallery), width):
                list(pool.map(_count, parts, repeat(gallery.gallery(columns)), repeat(columns.start)))
            for block in blocks:
                yield block.queries, block.ranks()


def _batches(blocks: Iterable[np.ndarray], protocol: Protocol, width: int, memory: int) -> Iterator[list[np.ndarray]]:
    """Blocks in lists that fit in the memory together: gallery rows are made ready once for a whole list."""
    batch: list[np.ndarray] = []
    held = 0
    for queries in blocks:
        batch.append(queries)
        held += len(queries) * (4 * width + 12 * int(protocol.positives[queries].max()))
        if held > memory // 4:
            yield batch
            batch, held = [], 0
    if batch:
        yield batch


def _count(blocks: list[Block], right: Tensor, offset: int) -> None:
    for block, tile in tiles(blocks, right):
        block.count(tile, offset)


def score_ranks(
    scores: Callable, protocol: Protocol, share: np.ndarray, tie: float, memory: int
) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yield the blocks of `embedding_ranks` from ready scores.

    Args:
        scores: `scores(queries)` returns the (B, G) scores of some queries, higher for better.
        protocol: who matches whom.
        share: the query numbers to do.
        tie: scores closer than this are ties.
        memory: bytes of working memory.

    Raises:
        ValueError: Scores are not finite, or not (B, G).
    """
    items = len(protocol.label[1])
    for queries in label_blocks(share, protocol, memory, max(1, min(256, memory // (12 * items)))):
        tile = torch.as_tensor(scores(queries))
        tile = tile.to(torch.promote_types(tile.dtype, torch.float32), copy=True)
        if tile.shape != (len(queries), items) or not torch.isfinite(tile).all():
            raise ValueError(
                f"scores of {len(queries)} queries must be finite and of shape {(len(queries), items)}; "
                f"got {tuple(tile.shape)}"
            )
        block = Block(protocol, queries)
        block.set_thresholds(tile[:, torch.as_tensor(block.rows, device=tile.device)], tie)
        block.count(tile, 0)
        yield queries, block.ranks()


def tile_shape(gallery: Rows, memory: int, counted: bool = True) -> tuple[int, int]:
    """Return queries and gallery rows of one block of scores.

    Args:
        gallery: the gallery, made ready.
        memory: bytes of working memory.
        counted: whether the block is counted, and should stay in a core's cache.
    """
    queries, columns = CPU_TILE if counted and gallery.device.type == "cpu" else LARGE_TILE
    return queries, max(64, min(columns, memory // (32 * max(gallery.width, queries))))


def label_blocks(share: np.ndarray, protocol: Protocol, memory: int, limit: int) -> Iterator[np.ndarray]:
    """Yield queries in the order of labels, in blocks whose scores with all their labels' items fit in the memory.

    Args:
        share: the query numbers to do.
        protocol: who matches whom.
        memory: bytes of working memory.
        limit: the most queries of a block.
    """
    labels, start = protocol.label[0][share], protocol.by_label.start
    order = np.argsort(labels, kind="stable")
    block: list[int] = []
    sizes, width = start[labels + 1] - start[labels], 0
    for i, new in zip(order, np.diff(labels[order], prepend=-1) != 0, strict=True):
        grown = width + sizes[i] * bool(new or not block)
        if block and (len(block) == limit or (len(block) + 1) * grown * 64 > memory):
            yield share[np.array(block)]
            block, grown = [], sizes[i]
        block.append(i)
        width = grown
    if block:
        yield share[np.array(block)]


def tiles(blocks: list[Block], right: Tensor) -> Iterator[tuple[Block, Tensor]]:
    """Yield (block, scores (B, C)) of all blocks with some ready gallery rows, in one reused buffer."""
    buffer = torch.empty(max(len(block.queries) for block in blocks) * len(right), device=right.device)
    for block in blocks:
        tile = buffer[: len(block.queries) * len(right)].view(len(block.queries), len(right))
        yield block, product(block.left, right, tile)


def product(left: Tensor, right: Tensor, out: Tensor | None = None) -> Tensor:
    """Return left @ right.T (B, C). A single row is doubled: as a vector, some processors add its terms otherwise.

    Args:
        left: (B, width).
        right: (C, width).
        out: (B, C) where the result is written, or None.
    """
    if min(len(left), len(right)) > 1:
        return torch.mm(left, right.T, out=out)
    left2, right2 = (rows.repeat(2, 1) if len(rows) == 1 else rows for rows in (left, right))
    return torch.mm(left2, right2.T)[: len(left), : len(right)].contiguous()


def share(protocol: Protocol, queries: np.ndarray) -> np.ndarray:
    """Return the queries that this process does: neighbours in the order of labels share their positives."""
    if not (dist.is_available() and dist.is_initialized()):
        return queries
    queries = queries[np.argsort(protocol.label[0][queries], kind="stable")]
    return np.array_split(queries, dist.get_world_size())[dist.get_rank()]


def sum_over_processes(values: np.ndarray) -> np.ndarray:
    """Return the sum of an array over all processes: exact where each entry is 0 in all of them but one."""
    if not (dist.is_available() and dist.is_initialized()):
        return values
    device = torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else "cpu"
    total = torch.as_tensor(values, device=device)
    dist.all_reduce(total)
    return total.cpu().numpy()


class Block:
    """Some queries, the lowest score that beats each of their positives, and how many negatives reached it so far."""

    left: Tensor  # (B, width) the queries, made ready; where scores are computed here

    def __init__(self, protocol: Protocol, queries: np.ndarray, left: Tensor | None = None):
        self.protocol, self.queries = protocol, queries
        if left is not None:
            self.left = left
        self.rows = protocol.by_label.rows(np.unique(protocol.label[0][queries]))

    def positive_scores(self, gallery: Rows, width: int) -> Tensor:
        """Return the block's scores (B, U) with `rows`: the gallery rows that have any of its labels."""
        parts = [gallery.gallery(self.rows[part]) for part in spans(len(self.rows), width)]
        return torch.cat([product(self.left, part) for part in parts], 1)

    def positive_mask(self) -> np.ndarray:
        """Return which of `rows` are positives of which queries, bool (B, U)."""
        protocol, q, g = self.protocol, self.queries[:, None], self.rows[None]
        mask = (protocol.label[0][q] == protocol.label[1][g]) & (protocol.own[q] != g)
        for other in filter(None, (protocol.camera, protocol.group)):
            mask &= other[0][q] != other[1][g]
        return mask

    def set_thresholds(self, scores: Tensor, tolerance: Tensor | float) -> None:
        """Set the thresholds (B, R) float32, best first, padded with -infinity, from the scores (B, U) with `rows`."""
        mask = torch.as_tensor(self.positive_mask(), device=scores.device)
        lowest = torch.where(mask, scores - tolerance, -torch.inf).sort(dim=1, descending=True).values
        self.thresholds = lowest[:, : int(self.protocol.positives[self.queries].max())].contiguous()
        self.ahead = torch.zeros_like(self.thresholds, dtype=torch.int64)

    def ranks(self) -> np.ndarray:
        """Return ranks (B, R) int64, best first, padded with 0: places among positives, plus the negatives ahead."""
        place = np.arange(1, self.ahead.shape[1] + 1)
        return np.where(place <= self.protocol.positives[self.queries][:, None], place + to_numpy(self.ahead), 0)

    def count(self, tile: Tensor, offset: int) -> None:
        """Add the negatives in a tile (B, C) of scores of the gallery rows from `offset`; the tile is used up."""
        if tile.device.type == "cpu":
            self._count_compiled(tile, offset)
        else:
            self._count_in_torch(self.keep_negatives(tile, offset))

    def _count_compiled(self, tile: Tensor, offset: int) -> None:
        from recnb.retrieval import kernels

        protocol, queries = self.protocol, self.queries
        sizes, own = protocol.positives[queries], protocol.own[queries]
        label = protocol.by_label.bounds(protocol.label[0][queries])
        group = label[0], own, own  # nobody
        if protocol.by_group and protocol.group:
            group = protocol.by_group.bounds(protocol.group[0][queries])
        arrays = tile.numpy(), self.thresholds.numpy(), self.ahead.numpy()
        kernels.count_rows(offset, *arrays, sizes, own, *label, *group)

    def keep_negatives(self, tile: Tensor, offset: int) -> Tensor:
        """Return the tile with -infinity for all but the negatives."""
        columns, protocol = slice(offset, offset + tile.shape[1]), self.protocol
        for left, right in filter(None, (protocol.label, protocol.group)):
            rows, items = (torch.as_tensor(a, device=tile.device) for a in (left[self.queries], right[columns]))
            tile.masked_fill_(rows[:, None] == items[None], -torch.inf)
        own = torch.as_tensor(protocol.own[self.queries] - offset, device=tile.device)[:, None]
        return tile.masked_fill_(own == torch.arange(tile.shape[1], device=tile.device), -torch.inf)

    def _count_in_torch(self, tile: Tensor) -> None:
        if self.ahead.shape[1] <= 32:
            for j in range(self.ahead.shape[1]):
                self.ahead[:, j] += (tile >= self.thresholds[:, j, None]).sum(1)
        else:  # the first threshold that each score reaches; the scores that reach none land in a last, unused column
            reached = torch.searchsorted(-self.thresholds, -tile)
            counts = torch.zeros(len(tile), self.ahead.shape[1] + 1, dtype=torch.int64, device=tile.device)
            counts.scatter_add_(1, reached, torch.ones_like(reached))
            self.ahead += counts[:, :-1].cumsum(1)
