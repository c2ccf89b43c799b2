"""Chapter: a second look at the ranking.

What is close to the same things as the query is probably the same thing. k-reciprocal re-ranking compares the
neighbourhoods of two images, query expansion and database augmentation average an image with its neighbours, and
whitening gives every direction of the space the same say. None of them needs a label or changes the model.
"""

from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor
from torch.nn.functional import normalize

from recnb.retrieval.neighbours import knn, nearest
from recnb.retrieval.scores import MEMORY, Array, Rows, exact, pair, spans, to_numpy


def k_reciprocal(
    query: Array, gallery: Array | None = None, k1: int = 20, k2: int = 6, lambda_value: float = 0.3, **options
) -> np.ndarray:
    """Return distances (Q, G) float32, smaller for better: k-reciprocal re-ranking (Zhong et al., CVPR 2017).

    Beside this matrix little memory is used; where the matrix itself is too large, use `KReciprocal`.

    Args:
        query: as in `KReciprocal`, like all that follows.
        gallery: see there.
        k1: see there.
        k2: see there.
        lambda_value: see there.
        options: `distance`, `device` and `memory`; see there.

    Raises:
        ValueError: See there.
    """
    rerank = KReciprocal(query, gallery, k1, k2, lambda_value, **options)
    result = np.empty((rerank.queries, rerank.items), np.float32)
    for rows in spans(rerank.queries, max(1, rerank.memory // (16 * rerank.items))):
        result[rows] = rerank.distances(np.arange(rows.start, rows.stop))
    return result


class KReciprocal:
    """k-reciprocal re-ranking (Zhong et al., CVPR 2017) as a function of query numbers: no (Q, G) matrix need exist.

    `distances(queries)` returns their (B, G) distances; the object itself, when called, minus them: the scores that
    `recnb.retrieval.metrics.ranking_metrics` takes. It holds neighbour lists and sparse vectors, nothing of size Q x G.

    Args:
        query: (Q, D) embeddings.
        gallery: (G, D) embeddings; None: the queries are their own gallery.
        k1: neighbours whose reciprocal ones describe an image.
        k2: neighbours over which these descriptions are averaged.
        lambda_value: the share of the original distance, 0 to 1.
        distance: "cosine" (2 - 2 cos) or "euclidean" (squared), divided by each image's largest distance.
        device: where neighbours are searched; by default where the query is.
        memory: bytes of working memory.

    Raises:
        ValueError: Shapes do not agree, a row is not finite, or a parameter is out of range.
    """

    def __init__(
        self,
        query: Array,
        gallery: Array | None = None,
        k1: int = 20,
        k2: int = 6,
        lambda_value: float = 0.3,
        distance: str = "cosine",
        device: str | torch.device | None = None,
        memory: int = MEMORY,
    ):
        if distance not in ("cosine", "euclidean"):
            raise ValueError(f"k-reciprocal re-ranking needs the distance cosine or euclidean; got {distance!r}")
        if k1 < 1 or k2 < 1 or not 0 <= lambda_value <= 1:
            raise ValueError(f"k1 and k2 must be at least 1 and lambda_value in 0..1; got {k1}, {k2}, {lambda_value}")
        left, right = pair(query, gallery, distance, device)
        sides = [left] if right is left else [left, right]
        self.queries, self.items = len(left), len(right)
        self.first = 0 if right is left else len(left)
        self.rows = Rows(torch.cat([side.raw(slice(None)) for side in sides]), distance)
        self.lambda_value, self.memory = lambda_value, memory
        with exact(self.rows.device):
            neighbours, lowest = _neighbours(self.rows, k1, memory // 4)
        every = torch.arange(len(self.rows), device=self.rows.device)  # rounding is no distance: hence the least one
        self.largest = self._squared(lowest, every).maximum(1e-6 * self._size(every) + 1e-30)
        vectors = _averaged(self._vectors(neighbours), to_numpy(neighbours[:, :k2]))
        self.vectors, self.by_column = vectors[: self.queries], vectors[self.first :].tocsc()

    def __call__(self, queries: np.ndarray) -> np.ndarray:
        return -self.distances(queries)

    def distances(self, queries: np.ndarray) -> np.ndarray:
        """Return distances (B, G) float32 of the queries with these numbers (B,)."""
        from recnb.retrieval.kernels import subtract_shared

        result, weight = self._unshared(queries), np.float32(1 - self.lambda_value)

        def work(rows: slice) -> None:
            subtract_shared(*_parts(self.vectors[queries[rows]]), *_parts(self.by_column), weight, result[rows])

        workers = torch.get_num_threads()
        with ThreadPoolExecutor(workers) as pool:
            list(pool.map(work, spans(len(queries), -(-len(queries) // workers))))
        return result

    def _unshared(self, queries: np.ndarray) -> np.ndarray:
        """Distances (B, G) as if no two images shared a neighbour: 1 - lambda + lambda x the original distance."""
        result, least = np.empty((len(queries), self.items), np.float32), 1 - self.lambda_value
        weight = self.lambda_value / self.largest[queries]
        left, bias = self.rows.queries(queries) * (-2 * weight[:, None]), weight * self._size(queries) + least
        width = max(1, min(8192, self.memory // (32 * max(self.rows.width, len(left)))))
        with exact(self.rows.device):
            for columns in spans(len(self.rows), width, self.first):
                part = torch.addmm(bias[:, None], left, self.rows.gallery(columns).T).clamp_min_(least)
                result[:, columns.start - self.first : columns.stop - self.first] = part.cpu().numpy()
        return result

    def _squared(self, scores: Tensor, queries: np.ndarray | Tensor) -> Tensor:
        """Squared distances (n,) of unit or raw vectors, from the scores (n,) of these queries."""
        return (self._size(queries) - 2 * scores).clamp_min(0)

    def _size(self, queries: np.ndarray | Tensor) -> Tensor:
        index = torch.as_tensor(queries, device=self.rows.device)
        return self.rows.norms[index].square() if self.rows.distance == "euclidean" else self.rows.norms.new_tensor(2.0)

    def _vectors(self, neighbours: Tensor) -> sparse.csr_array:
        """Sparse (N, N): row i holds exp(-distance) of the members of i's extended neighbourhood, summing to 1."""
        count, parts, half = len(neighbours), [], neighbours[:, : int(np.around((neighbours.shape[1] - 1) / 2)) + 1]
        mutual = _mutual(half, self.memory)
        for part in spans(count, max(1, self.memory // (64 * neighbours.shape[1] ** 2 * half.shape[1]))):
            owner, member = _members(neighbours, half, mutual, part)
            parts.append((owner, member, self._similarity(owner, member)))
        rows, columns, weight = (to_numpy(torch.cat(column)) for column in zip(*parts, strict=True))
        places = rows.astype(np.int32), columns.astype(np.int32)
        vectors = sparse.csr_array((weight, places), shape=(count, count))
        vectors.data /= np.repeat(vectors.sum(1), np.diff(vectors.indptr))
        return vectors

    def _similarity(self, owner: Tensor, member: Tensor) -> Tensor:
        result = torch.empty(len(owner), device=self.rows.device)
        for part in spans(len(owner), max(1, self.memory // (128 * self.rows.width))):
            scores = (self.rows.queries(owner[part]) * self.rows.gallery(member[part])).sum(1)
            result[part] = torch.exp(-self._squared(scores, owner[part]) / self.largest[owner[part]])
        return result


def _neighbours(rows: Rows, k1: int, memory: int) -> tuple[Tensor, Tensor]:
    """Rows of each image's nearest, itself first, (N, k1 + 1), and each image's lowest score (N,)."""
    if len(rows) < 2:
        raise ValueError("re-ranking needs at least two images")
    found, k, numbers = [], min(k1, len(rows) - 1), torch.arange(len(rows), device=rows.device)
    for part in spans(len(rows), max(1, min(1024, memory // (64 * k)))):
        _, ids, lowest = nearest(rows, rows, part, k, numbers[part], memory)
        found.append((torch.cat([numbers[part, None], ids], 1), lowest))
    ids, lowest = (torch.cat(column) for column in zip(*found, strict=True))
    return ids, lowest


def _mutual(lists: Tensor, memory: int) -> Tensor:
    """Whether each image is also among the listed neighbours of its listed neighbour, bool (N, k)."""
    numbers = torch.arange(len(lists), device=lists.device)[:, None, None]
    return torch.cat(
        [
            (lists[lists[rows]] == numbers[rows]).any(2)
            for rows in spans(len(lists), max(1, memory // (64 * lists.shape[1] ** 2)))
        ]
    )


def _members(neighbours: Tensor, half: Tensor, half_mutual: Tensor, rows: slice) -> tuple[Tensor, Tensor]:
    """(image, member) pairs of the extended k-reciprocal neighbourhoods of some images, without repetition.

    The k1-reciprocal neighbours, and the (k1 / 2)-reciprocal neighbours of each of those of which more than two
    thirds are k1-reciprocal neighbours of the image already.
    """
    near = neighbours[rows]  # (n, K)
    numbers = torch.arange(rows.start, rows.stop, device=near.device)
    near = torch.where((neighbours[near] == numbers[:, None, None]).any(2), near, -1)
    further, counts = half[near.clamp_min(0)], half_mutual[near.clamp_min(0)]  # (n, K, H)
    known = (further[..., None] == near[:, None, None, :]).any(3) & counts
    accepted = (near >= 0) & (3 * known.sum(2) > 2 * counts.sum(2))
    further = torch.where(counts & accepted[..., None], further, -1)
    members = torch.cat([near, further.flatten(1)], 1).sort(dim=1).values
    fresh = (members >= 0) & (members != members.roll(1, dims=1))
    fresh[:, 0] = members[:, 0] >= 0
    return numbers[:, None].expand_as(members)[fresh], members[fresh]


def _averaged(vectors: sparse.csr_array, neighbours: np.ndarray) -> sparse.csr_array:
    """Each sparse row replaced by the mean of its neighbours' rows (the local query expansion of the paper)."""
    count, k = neighbours.shape
    weights = np.full(count * k, 1 / k, np.float32)
    starts, columns = np.arange(0, count * k + 1, k, dtype=np.int32), neighbours.ravel().astype(np.int32)
    return sparse.csr_array((weights, columns, starts), (count, count)) @ vectors


def _parts(matrix: sparse.sparray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    return matrix.indptr, matrix.indices, matrix.data


def alpha_query_expansion(
    query: Array,
    gallery: Array | None = None,
    k: int = 10,
    alpha: float = 3.0,
    device: str | torch.device | None = None,
    memory: int = MEMORY,
) -> np.ndarray:
    """Return the queries (Q, D) float32, unit length, each added to its k nearest, weighted by cosine ** alpha.

    Args:
        query: (Q, D) embeddings.
        gallery: (G, D) embeddings; None: the queries are their own gallery, each without itself.
        k: how many neighbours.
        alpha: 0 is average query expansion (Chum et al., ICCV 2007), larger values trust near neighbours more
            (Radenovic, Tolias and Chum, TPAMI 2019). A negative cosine weighs nothing.
        device: where to compute; by default where the query is.
        memory: bytes of working memory.
    """
    scores, ids = knn(query, gallery, k, device=device, memory=memory)
    left, right = pair(query, gallery, "cosine", device)
    weights = torch.from_numpy(np.where(scores > 0, scores, 0) ** alpha * (scores > 0)).to(left.device)
    result = []
    for rows in spans(len(left), max(1, memory // (16 * left.width))):
        total = left.queries(rows).clone()
        for place in range(ids.shape[1]):
            total += weights[rows, place, None] * right.gallery(ids[rows, place])
        result.append(normalize(total))
    return torch.cat(result).cpu().numpy()


def database_augmentation(
    gallery: Array, k: int = 10, alpha: float = 3.0, device: str | torch.device | None = None, memory: int = MEMORY
) -> np.ndarray:
    """Return the gallery (G, D) float32, each item added to its k nearest as by `alpha_query_expansion`.

    Database-side feature augmentation (Arandjelovic and Zisserman, CVPR 2012).

    Args:
        gallery: (G, D) embeddings.
        k: how many neighbours.
        alpha: as in `alpha_query_expansion`; `device` and `memory` too.
        device: see `alpha`.
        memory: see `alpha`.
    """
    return alpha_query_expansion(gallery, None, k, alpha, device, memory)


@dataclass
class Whitening:
    """A projection (x - mean) @ projection, then to unit length; call it with (N, D) to get (N, d) float32."""

    mean: np.ndarray
    projection: np.ndarray

    def __call__(self, vectors: Array, memory: int = MEMORY) -> np.ndarray:
        rows = Rows(vectors, "dot", "vectors", "cpu")
        if rows.width != len(self.mean):
            raise ValueError(f"the whitening was fitted on {len(self.mean)} dimensions; got {rows.width}")
        mean, projection = map(torch.from_numpy, (self.mean, self.projection))
        parts = spans(len(rows), max(1, memory // (16 * rows.width)))
        return np.concatenate([normalize((rows.raw(part) - mean) @ projection).numpy() for part in parts])


def fit_whitening(train: Array, dimensions: int | None = None, whiten: bool = True, memory: int = MEMORY) -> Whitening:
    """Return a `Whitening` to the leading principal components of training vectors, never of the test gallery.

    Args:
        train: (N, D) embeddings.
        dimensions: how many components; None: all that the vectors span.
        whiten: whether each component is divided by its standard deviation (Jegou and Chum, ECCV 2012); False only
            rotates and cuts (PCA).
        memory: bytes of working memory.

    Raises:
        ValueError: The training vectors have or span fewer dimensions.
    """
    rows = Rows(train, "dot", "train", "cpu")
    parts = spans(len(rows), max(1, memory // (16 * rows.width)))
    mean = torch.stack([rows.raw(part).double().sum(0) for part in parts]).sum(0) / len(rows)
    centred = (rows.raw(part).double() - mean for part in parts)
    values, vectors = torch.linalg.eigh(sum(part.T @ part for part in centred) / len(rows))
    values, vectors = values.flip(0), vectors.flip(1)
    wanted = dimensions or min(rows.width, len(rows) - 1)
    if not 0 < wanted <= rows.width or (whiten and values[wanted - 1] <= 1e-9 * values[0]):
        raise ValueError(
            f"{wanted} dimensions cannot be whitened from {len(rows)} vectors of {rows.width} dimensions: ask for fewer"
        )
    scale = values[:wanted].rsqrt() if whiten else torch.ones(wanted)
    return Whitening(mean.float().numpy(), (vectors[:, :wanted] * scale).float().numpy())
