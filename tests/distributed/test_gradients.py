"""Gradients that travel during the backward pass are those that would travel behind it."""

import pytest
import torch
import torch.distributed as dist
from processes import in_processes
from torch import nn
from torch.utils.checkpoint import checkpoint

import recnb.distributed.gradients
from recnb.distributed.gradients import AverageGradients
from recnb.distributed.processes import gather
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner
from recnb.recipe.model import build_model
from recnb.recipe.schema import load_config


class Branches(nn.Module):
    """Branches whose gradients come in the reverse of the order in which they were run."""

    def __init__(self, count=4):
        super().__init__()
        self.rare = nn.Embedding(9, 5, sparse=True)
        self.branches = nn.ModuleList(nn.Linear(5, 5) for _ in range(count))
        self.double()

    def forward(self, x, order):  # (B, 5) -> (B, 5)
        x = x + self.rare(torch.tensor([7, 1, 7])).sum(0)
        for i in order:
            x = self.branches[i](x).tanh()
        return x


class Watched(AverageGradients):
    """Notes the order in which parameters and buckets come."""

    def begin(self, parameters):
        self.came, self.went = [], []
        super().begin(parameters)
        self.names = {p: i for i, p in enumerate(parameters)}

    def arrived(self, p):
        if self.waiting:
            self.came.append(self.names[p])
        super().arrived(p)

    def send(self, bucket):
        self.went.append([self.names[p] for p in bucket])
        super().send(bucket)


def batch(rank, seed=0):
    return torch.randn(6, 5, generator=torch.Generator().manual_seed(10 * seed + rank), dtype=torch.float64)


def gradients(model):
    return [torch.zeros_like(p) if p.grad is None else p.grad.to_dense().clone() for p in model.parameters()]


def means(model):
    """What the gradients of a model have to become: one reduction each, behind the backward pass."""
    found = gradients(model)
    for gradient in found:
        dist.all_reduce(gradient.div_(dist.get_world_size()))
    return found


def compare(model, average, losses):
    """Assert that gradients which travel in the last of some backward passes are the means of their sums."""
    for loss in losses():
        loss.backward()
    wanted = means(model)
    model.zero_grad()
    *before, last = losses()
    for loss in before:
        loss.backward()
    average.begin([*model.parameters()])
    last.backward()
    sent = len(average.went)
    average.finish()
    torch.testing.assert_close(gradients(model), wanted, rtol=1e-12, atol=1e-12)
    assert len(average.went) == len(average.buckets) > 3  # one reduction a step
    model.zero_grad()
    return sent, average.came, average.went


def in_each(rank):
    """What one process of two finds."""
    recnb.distributed.gradients.BUCKET = recnb.distributed.gradients.LAST = 100
    torch.manual_seed(0)
    model, average = Branches(), Watched()
    orders = ([0, 1, 2, 3], [2, 0, 3, 1])[rank], ([0, 1, 2, 3], [0, 1])[rank]
    found = {
        "another order": compare(model, average, lambda: [model(batch(rank), orders[0]).sum()]),
        "unused": compare(model, average, lambda: [model(batch(rank), orders[1]).sum()]),
        "accumulated": compare(model, average, lambda: [model(batch(rank, i), orders[0]).sum() / 3 for i in range(3)]),
        "gathered": compare(model, average, lambda: [gather(model(batch(rank), orders[0])).square().sum()]),
        "in parts": compare(
            model,
            average,
            lambda: [
                torch.cat(
                    [checkpoint(model, part, orders[0], use_reentrant=False) for part in batch(rank).split(2)]
                ).std()
            ],
        ),
    }
    for p in model.branches[3].parameters():
        p.requires_grad_(False)
    average.begin([p for p in model.parameters() if p.requires_grad])
    model(batch(rank), orders[0]).sum().backward()
    average.finish()
    found["frozen"] = [p.grad is None for p in model.branches[3].parameters()], average.went
    average.begin([p for p in model.parameters() if p.requires_grad])
    loss = model(batch(rank), orders[0]).sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="a batch has one backward pass"):
        loss.backward()
    average.close()
    return found


@pytest.fixture(scope="module")
def found():
    return in_processes(2, in_each)


@pytest.mark.parametrize("case", ["another order", "accumulated", "gathered", "in parts"])
def test_buckets_travel_during_the_backward_pass_in_one_order(found, case):
    (sent, came, went), (others_sent, others_came, others_went) = (each[case] for each in found)
    assert went == others_went == sorted(went, reverse=True) and {i for bucket in went for i in bucket} == {*came}
    assert came != others_came and sorted(came) == sorted(others_came)
    assert sent == others_sent == len(went)


def test_parameters_that_one_process_does_not_use_are_waited_for_by_none(found):
    (sent, came, went), (others_sent, others_came, others_went) = (each["unused"] for each in found)
    assert went == others_went and len(others_came) < len(came)
    assert sent == len(went) and others_sent < len(went)


def test_what_is_frozen_meanwhile_gets_no_gradient(found):
    for none, went in (each["frozen"] for each in found):
        assert none == [True, True] and {i for bucket in went for i in bucket} == set(range(7))


def reductions(rank, config, folder):
    """How often a training of one epoch reduces gradients, and its number of batches."""
    asked, cfg = [], load_config(config)
    whole = AverageGradients.send
    AverageGradients.send = lambda self, bucket: [asked.append(len(self.buckets)), whole(self, bucket)][1]
    learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), folder)
    learn.fit_config()
    assert not any(p._post_accumulate_grad_hooks for p in learn.model.parameters())
    return len(asked) / asked[0], len(learn.dls.train)


def test_a_step_of_several_batches_has_one_reduction(config_file, tmp_path):
    config = config_file({"Global.update_freq": 2, "Global.epochs": 1, "Global.grad_cache": 4})
    for steps, batches in in_processes(2, reductions, config, tmp_path):
        assert steps == -(-batches // 2) < batches
