"""Blocks of a backbone that torch's fully_shard divides over processes make the steps of one process."""

import numpy as np
import torch
from processes import in_processes
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.models.backbones import create_backbone
from recnb.models.heads import ArcMargin
from recnb.models.necks import FC
from recnb.models.recmodel import RecModel
from recnb.recipe.optimizer import build_optimizer


def step(rank, count, sharded):
    """Gradients and, behind two steps, weights, as numpy; and whether the blocks were sharded and how."""
    torch.manual_seed(0)
    backbone = create_backbone("test_vit", stop="flatten", input_size=(3, 160, 160))
    model = RecModel(backbone, FC(backbone.out_channels, 16), ArcMargin(16, 5, scale=8.0)).train()
    loss = CombinedLoss([(1.0, CELoss()), (0.5, SupConLoss(temperature=0.5))])
    x, y = torch.randn(8, 3, 160, 160), torch.arange(8) % 5
    if sharded:
        mesh = init_device_mesh("cpu", (count,))
        for block in model.backbone.model.blocks:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
    optimizer = build_optimizer({"Optimizer": {"name": "Momentum"}})(model.parameters(), lr=0.01)
    own, found = slice(rank * 8 // count, (rank + 1) * 8 // count), []
    for _ in range(2):
        optimizer.zero_grad()
        loss(model(x[own], y[own]), y[own]).backward()
        found += [p.grad for p in model.parameters()]
        optimizer.step()
    kinds = [(isinstance(p, DTensor), len(p.to_local() if sharded else p)) for p in backbone.model.blocks.parameters()]
    return [(t.full_tensor() if sharded else t).detach().numpy() for t in (*found, *model.parameters())], kinds


def test_sharded_blocks_make_the_step_of_one_process():
    alone, whole = step(0, 1, False)
    for found, kinds in in_processes(2, step, 2, True):
        assert all(divided and 2 * own == rows for (divided, own), (_, rows) in zip(kinds, whole, strict=True))
        for ours, theirs in zip(alone, found, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-6)  # float32
