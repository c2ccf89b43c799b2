"""Effective rank and uniformity: known shapes, and plain loops."""

import math

import numpy as np
import pytest
import torch

from recnb.retrieval.spread import effective_rank, uniformity


def test_effective_rank_of_known_shapes():
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(8, 8)))[0]
    assert effective_rank(np.tile(axes, (50, 1))) == pytest.approx(8)
    assert effective_rank(np.tile(axes[:3], (50, 1))) == pytest.approx(3)
    assert effective_rank(np.ones((20, 5))) == pytest.approx(1, abs=1e-6)
    x = rng.normal(size=(60, 8)) * np.arange(1, 9)
    values = np.linalg.svd(x, compute_uv=False)
    shares = values / values.sum()
    wanted = math.exp(-sum(p * math.log(p) for p in shares))
    for memory in (1, 1 << 20):
        assert effective_rank(torch.tensor(x), memory=memory) == pytest.approx(wanted, rel=1e-5)
    with pytest.raises(ValueError, match="all vectors are 0"):
        effective_rank(np.zeros((3, 2)))


@pytest.mark.parametrize("memory", [1, 1 << 20])
def test_uniformity_is_the_plain_loop(memory):
    x = np.random.default_rng(0).normal(size=(30, 4))
    unit = x / np.linalg.norm(x, axis=1, keepdims=True)
    pairs = [(i, j) for i in range(30) for j in range(30) if i != j]
    wanted = math.log(sum(math.exp(-2 * ((unit[i] - unit[j]) ** 2).sum()) for i, j in pairs) / len(pairs))
    assert uniformity(x, memory=memory) == pytest.approx(wanted, rel=1e-5)
    assert uniformity(np.ones((5, 3)), memory=memory) == pytest.approx(0, abs=1e-5)
    with pytest.raises(ValueError, match="two vectors"):
        uniformity(x[:1])
