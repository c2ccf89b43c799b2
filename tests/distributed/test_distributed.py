"""Several processes make the step of one with the whole batch, evaluate together, and stop as one."""

import json
import os
import subprocess
import sys
import time
from math import prod
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
from conftest import run_notebook
from processes import follow, in_processes
from safetensors.torch import load_file
from torch import nn

from recnb.cli.train import main
from recnb.data.loaders import divided
from recnb.distributed.gradients import copy_from_first, share_batches
from recnb.distributed.processes import joined
from recnb.losses.combined import CELoss, CombinedLoss, SupConLoss
from recnb.losses.memories import CenterLoss
from recnb.losses.pairs import TripletLossV2
from recnb.models.backbones import create_backbone, share_on_gpus
from recnb.models.heads import ArcMargin
from recnb.models.recmodel import RecModel
from recnb.recipe.data import build_loaders
from recnb.recipe.learner import build_learner, device_count
from recnb.recipe.model import build_model
from recnb.recipe.optimizer import build_optimizer
from recnb.recipe.schema import load_config
from recnb.registry import ConfigError
from recnb.storage import seal
from recnb.training.adaptor import Callback
from recnb.training.evaluation import embed

ROOT = Path(__file__).resolve().parents[2]


def parts():
    """A model, losses of each kind and a batch of twelve images in float64."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = RecModel(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 6), ArcMargin(6, 4, scale=8.0, margin=0.2))
    loss = CombinedLoss(
        [(1.0, CELoss(0.1)), (0.5, SupConLoss(temperature=0.5)), (2.0, TripletLossV2()), (0.1, CenterLoss(4, 6))]
    )
    return model, loss, torch.randn(12, 5), torch.randint(0, 4, (12,))


def one_step(rank, count):
    """The gradients of all parameters, as numpy, of a process that sees its share of the batch."""
    model, loss, x, y = parts()
    own = slice(rank * 12 // count, (rank + 1) * 12 // count)
    parameters = [*model.parameters(), *loss.parameters()]
    follow(loss(model(x[own], y[own]), y[own]), parameters)
    return [p.grad.numpy() for p in parameters]


def assert_as_one(step, count, rtol, atol):
    """The arrays of `step(0, 1)`, which those of `step(rank, count)` agree with in each of so many processes."""
    try:
        alone = step(0, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    for found in in_processes(count, step, count):
        for ours, theirs in zip(alone, found, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=rtol, atol=atol)
    return alone


@pytest.mark.parametrize("count", [2, 3])
def test_processes_make_the_step_of_one_with_the_whole_batch(count):
    assert_as_one(one_step, count, rtol=1e-10, atol=1e-12)


def sampled_steps(rank, count):
    """Weight and momentum behind two steps of a head of which some classes are drawn, as numpy."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    head, x, y = ArcMargin(6, 40, scale=8.0, sample_rate=0.5), torch.randn(12, 6), torch.randint(0, 40, (12,))
    optimizer = build_optimizer({"Optimizer": {"name": "Momentum", "weight_decay": 0.1}})([head.weight], lr=0.1)
    torch.manual_seed(rank)
    own = slice(rank * 12 // count, (rank + 1) * 12 // count)
    for _ in range(2):
        optimizer.zero_grad()
        follow(CELoss(0.1)({"logits": head(x[own], y[own])}, y[own]), [head.weight])
        optimizer.step()
    return [head.weight.detach().numpy(), optimizer.state[head.weight]["momentum_buffer"].numpy()]


def test_processes_with_a_sampled_head_draw_and_move_the_rows_of_one():
    _, momentum = assert_as_one(sampled_steps, 2, rtol=1e-10, atol=1e-12)
    assert 20 < momentum.any(axis=1).sum() < 40


def convolutional(synchronized):
    """A model with batch normalisations in backbone and neck, one of them at the cut, and a small batch."""
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    backbone = create_backbone("test_resnet", stop="layer3.0.bn3", input_size=(3, 32, 32))
    neck = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(backbone.out_channels, 6), nn.BatchNorm1d(6))
    model = RecModel(backbone, neck, ArcMargin(6, 4, scale=8.0, margin=0.2))
    for p in model.parameters():
        p.data += 0.1 * torch.randn(p.shape)  # timm's residual branches begin at 0
    if synchronized:
        share_batches(model)
    loss = CombinedLoss([(1.0, CELoss(0.1)), (0.5, SupConLoss(temperature=0.5))])
    return model.train(), loss, torch.randn(12, 3, 32, 32), torch.randint(0, 4, (12,))


def normalised_step(rank, count, synchronized=True, chunk=None):
    """Loss, gradients and running statistics behind one step, and features in evaluation, as numpy."""
    model, loss, x, y = convolutional(synchronized)
    model.grad_cache = chunk
    own = slice(rank * 12 // count, (rank + 1) * 12 // count)
    value = loss(model(x[own], y[own]), y[own])
    follow(value, model.parameters())
    if count > 1:
        dist.all_reduce(value.detach_())
    found = [value.detach() / count, *(p.grad for p in model.parameters()), *model.buffers()]
    return [tensor.numpy() for tensor in (*found, model.eval()(x)["features"].detach())]


@pytest.mark.parametrize("count", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_shared_batch_statistics_are_those_of_the_whole_batch(count):
    alone = assert_as_one(normalised_step, count, rtol=1e-9, atol=1e-11)
    apart = in_processes(count, normalised_step, count, False)[0]
    assert abs(apart[0] - alone[0]) > 1e-4 and len(apart) == len(alone)


def test_shared_batch_statistics_with_chunks_are_those_of_the_chunks_of_all():
    """Half of each process's batch at a time, so rows 0-2 and 6-8 are normalised together."""
    first, second = in_processes(2, normalised_step, 2, True, 3)
    for ours, theirs in zip(first, second, strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-9, atol=1e-11)
    assert abs(first[0] - in_processes(2, normalised_step, 2)[0][0]) > 1e-4


def uneven(rank):
    norm = nn.BatchNorm1d(3)
    share_batches(norm)
    x = torch.arange(15.0).view(5, 3).sin()
    return norm(x[:1] if rank == 0 else x[1:]).tolist(), norm.eval()(x[:2]).tolist(), norm.running_var.tolist()


def test_shared_batches_may_be_of_any_size_and_evaluation_is_apart():
    alone = nn.BatchNorm1d(3)
    x = torch.arange(15.0).view(5, 3).sin()
    expected = alone(x)
    (first, evaluated, variance), (second, *others) = in_processes(2, uneven)
    torch.testing.assert_close(torch.tensor(first + second), expected.detach())
    torch.testing.assert_close(torch.tensor(evaluated), alone.eval()(x[:2]).detach())
    assert [evaluated, variance] == others and variance == pytest.approx(alone.running_var.tolist())


def kinds(rank, config):
    """The hooks of a built model's batch normalisations."""
    model = build_model(load_config(config))
    return [len(part._forward_pre_hooks) for part in model.modules() if isinstance(part, nn.BatchNorm2d)]


def test_use_sync_bn_is_applied_where_several_processes_run(config_file):
    plain, shared = config_file().read_text(), config_file({"Arch.use_sync_bn": True})
    assert not any(kinds(0, shared))
    for hooks in in_processes(2, kinds, shared):
        assert hooks and set(hooks) == {1}
    shared.write_text(plain)
    assert not any(in_processes(2, kinds, shared)[0])
    with pytest.raises(ConfigError, match=r"Arch\.use_sync_bn: 'yes' is a str, not bool"):
        load_config(config_file({"Arch.use_sync_bn": "yes"}))


def test_on_gpus_the_library_synchronises_and_the_cut_stays():
    backbone = create_backbone("test_resnet", stop="layer3.0.bn3", input_size=(3, 32, 32)).eval()
    x, weights = torch.randn(2, 3, 32, 32), backbone.state_dict()
    expected = backbone(x)
    neck = nn.Sequential(nn.Flatten(), nn.BatchNorm1d(prod(backbone.out_shape)))
    model = share_on_gpus(RecModel(backbone, neck)).eval()
    assert sum(isinstance(part, nn.SyncBatchNorm) for part in model.modules()) > 5
    assert not any(isinstance(part, nn.BatchNorm2d | nn.BatchNorm1d) for part in model.modules())
    assert torch.equal(model.backbone(x), expected) and model.backbone.state_dict().keys() == weights.keys()


def a_short_training(rank, config, folder):
    cfg = load_config(config)
    build_learner(cfg, build_model(cfg), build_loaders(cfg), folder).fit_config()


def test_a_training_with_shared_statistics_in_half_precision(config_file, tmp_path):
    in_processes(
        2,
        a_short_training,
        config_file({"Arch.use_sync_bn": True, "AMP": {}, "Global.epochs": 1, "EMA": {"decay": 0.9}}),
        tmp_path,
    )
    assert pd.read_csv(tmp_path / "history.csv").train_loss.notna().all()


def buffers_and_buckets(rank):
    """Tensors of two kinds, more than travel at a time, as the first process has them."""
    import recnb.distributed.gradients

    recnb.distributed.gradients.BUCKET = 100
    tensors = [torch.full((30,), float(rank)), torch.full((3,), rank), torch.full((50,), rank + 0.5)]
    copy_from_first(tensors)
    return [tensor.tolist() for tensor in tensors]


def test_everything_is_copied_from_the_first():
    for tensors in in_processes(2, buffers_and_buckets):
        assert tensors == [[0.0] * 30, [0] * 3, [0.5] * 50]


class Numbers(torch.utils.data.Dataset):
    """Eleven images whose feature is their number."""

    transform, boxes = None, None

    def __len__(self):
        return 11

    def __getitem__(self, i):
        return torch.full((1,), float(i)), i


class Same(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(1))

    def forward(self, x):  # (B, 1) -> {"features": (B, 1)}
        return {"features": x * self.weight}


def shares(rank):
    loader = torch.utils.data.DataLoader(Numbers(), 4)
    mine = [label for _, labels in divided(loader) for label in labels.tolist()]
    return mine, joined(torch.tensor(mine)[:, None]).flatten().tolist(), embed(Same(), loader).flatten().tolist()


def test_an_evaluation_is_divided_and_joined():
    results = in_processes(2, shares)
    assert [mine for mine, _, _ in results] == [[0, 2, 4, 6, 8, 10], [1, 3, 5, 7, 9]]
    for _, whole, embedded in results:
        assert whole == embedded == list(range(11))


def train(rank, config, run):
    return main([str(config), "--run-dir", str(run)])


def test_two_processes_end_near_one_with_the_same_global_batch(config_file, tmp_path):
    plain = {
        "Global.epochs": 3,
        "DataLoader.Train.sampler": {"batch_size": 15},
        "Arch.freeze": ["backbone"],
        "Loss.Train": [{"CELoss": {}}, {"SupConLoss": {"views": 2}}],
        "Arch.Head.sharded": True,
    }
    two = config_file({**plain, "Global.devices": 2})  # which torchrun starts
    assert train(0, two, tmp_path / "two") == 0
    one = config_file({**plain, "DataLoader.Train.sampler": {"batch_size": 30}})
    assert train(0, one, tmp_path / "one") == 0
    two, one = (pd.read_csv(tmp_path / name / "history.csv") for name in ("two", "one"))
    assert two.columns.tolist() == one.columns.tolist() and len(two) == 3
    np.testing.assert_allclose(two, one, rtol=1e-3)  # the same batches, summed in another order
    np.testing.assert_allclose(two.CELoss, one.CELoss, rtol=0.1)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    best = two.recall1[::-1].idxmax()
    alone = load_config(tmp_path / "two" / "config.yaml")
    learn = build_learner(alone, build_model(alone), build_loaders(alone), tmp_path / "alone")
    learn.model.load_state_dict(load_file(tmp_path / "two" / "model.safetensors"))
    for name, value in learn.evaluate().metrics.items():  # what two processes evaluated together, one evaluates alone
        assert metrics[name] == pytest.approx(value, abs=1e-6) == two[name][best]
    kept = torch.load(tmp_path / "two" / "checkpoints" / "latest.pt", weights_only=True)
    assert len(kept["model"]["head.weight"]) == 15


SEVERAL = {
    "Loss.Train": [{"CELoss": {}}],
    "Arch.freeze": ["backbone"],
    "Global.epochs": 2,
    "Global.save_steps": 4,
    "Arch.Head.sharded": True,
    "Optimizer": [
        {"AdamW": {"scope": "head", "lr": {"name": "Cosine", "learning_rate": 0.01}}},
        {"Momentum": {"scope": "RecModel", "clip_norm": 1.0, "lr": {"name": "Cosine", "learning_rate": 0.01}}},
    ],
}


def several(rank, config, folder):
    """The weights behind a training that was stopped and gone on with, the head's rows of both processes."""
    cfg = load_config(config)
    for stop in (True, False):
        learn = build_learner(cfg, build_model(cfg), build_loaders(cfg), folder)
        if stop:
            with pytest.raises(ValueError, match="stopped by the test"):
                learn.add_cb(Stop()).fit_config()
        else:
            learn.fit_config()
    return len(learn.model.head.weight), len(learn.opt.opt.optimizers)


@pytest.mark.parametrize("rate", [pytest.param(1.0, marks=pytest.mark.slow), 0.5])
def test_a_sharded_head_has_an_optimizer_of_its_own(config_file, tmp_path, rate):
    changes = {**SEVERAL, "Arch.Head.sample_rate": rate}
    assert in_processes(2, several, config_file(changes), tmp_path / "cut") == [(7, 2), (8, 2)]
    in_processes(2, a_short_training, config_file(changes), tmp_path / "whole")
    for file in ("history.csv", "model.safetensors"):
        assert (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
    kept = torch.load(tmp_path / "cut" / "checkpoints" / "latest.pt", weights_only=True)
    assert kept["optimizer"]["optimizers"][0]["state"][0]["exp_avg"].shape == (15, 16)
    weights = load_file(tmp_path / "cut" / "model.safetensors")
    assert weights["head.weight"].shape == (15, 16) and (kept["model"]["head.weight"] != 0).all()


def test_another_number_of_processes_goes_on(config_file, tmp_path, capsys):
    steps = {
        "Optimizer.lr": {"name": "MultiStepDecay", "learning_rate": 0.002, "milestones": [1]},
        "Arch.Head.sharded": True,
        "EMA": {"decay": 0.9},
    }
    assert in_processes(2, train, config_file({**steps, "Global.epochs": 1}), tmp_path / "run") == [0, 0]
    assert train(0, config_file({**steps, "Global.epochs": 2}), tmp_path / "run") == 0
    assert "resuming behind epoch 1 of 2" in capsys.readouterr().out
    assert pd.read_csv(tmp_path / "run" / "history.csv").epoch.tolist() == [1, 2]
    kept = torch.load(tmp_path / "run" / "checkpoints" / "latest.pt", weights_only=True)
    assert kept["callbacks"]["moving_average"]["weights"]["head.weight"].shape == (15, 16)
    assert len(load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")["head.weight"]) == 15


class Stop(Callback):
    """Ends training behind a step and its checkpoint."""

    order = 100

    def after_batch(self):
        if self.training and (self.epoch, self.iter) == (1, 3):
            raise ValueError("stopped by the test")


def stopped_and_resumed(rank, config, folder, old):
    """None; a run that is left alone and one that is stopped, by learners that know nothing of each other."""
    from recnb.training.checkpoints import set_random_state

    cfg = load_config(config)
    learns = [build_learner(cfg, build_model(cfg), build_loaders(cfg), folder / run) for run in ("whole", "cut", "cut")]
    learns[0].fit_config()
    with pytest.raises(ValueError, match="stopped by the test"):
        learns[1].add_cb(Stop()).fit_config()
    latest = folder / "cut" / "checkpoints" / "latest.pt"
    kept = torch.load(latest, weights_only=True)
    dist.barrier()
    assert len(kept["rng"]) == 2 and not torch.equal(kept["rng"][0]["torch"], kept["rng"][1]["torch"])
    if old and rank == 0:  # as checkpoints were that held the first process's state
        torch.save({**kept, "rng": kept["rng"][0]}, latest)
        seal(latest)
    dist.barrier()
    torch.manual_seed(17)  # a new process would have another random state
    learns[2].fit_config()
    set_random_state(kept["rng"][:1])
    return torch.rand(3).tolist()


@pytest.mark.parametrize("old", [False, True], ids=["of both processes", "of the first alone"])
def test_every_process_goes_on_with_its_own_random_state(config_file, tmp_path, old):
    config = config_file({"Global.save_steps": 2, "Arch.Backbone.drop_rate": 0.3, "Global.epochs": 2})
    one, other = in_processes(2, stopped_and_resumed, config, tmp_path, old)
    assert one != other  # a state that is not there is drawn anew, another for each process
    same = [
        (tmp_path / "whole" / file).read_bytes() == (tmp_path / "cut" / file).read_bytes()
        for file in ("history.csv", "model.safetensors")
    ]
    assert all(same) is not old


@pytest.mark.slow
def test_a_process_that_fails_ends_the_others(config_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import torch\n"
        "    softmax = torch.nn.functional.cross_entropy\n"
        "    def failing(*a, **k):\n        raise ValueError('this rank fails')\n"
        "    torch.nn.functional.cross_entropy = failing\n"
    )
    words = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node=2",
            "-m",
            "recnb.cli.train",
            str(config_file()),
            "--run-dir",
            str(tmp_path / "run"),
        ],
        cwd=ROOT,
        env=words,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode != 0 and "this rank fails" in done.stderr


def test_a_number_of_devices_is_one_at_least(config_file):
    assert device_count("auto") >= 1
    with pytest.raises(ConfigError, match=r"Global\.devices: 0 is too small; the least is 1"):
        load_config(config_file({"Global.devices": 0}))


@pytest.mark.slow
def test_the_notebook_starts_processes(config_file, tmp_path):
    executed = run_notebook(
        "02_train", tmp_path / "run", config=str(config_file({"Global.devices": 2})), run_dir=str(tmp_path / "run")
    )
    assert executed.exists() and json.loads((tmp_path / "run" / "metrics.json").read_text())["recall5"] > 0


def kept_by(rank, config):
    if rank:  # sees the finished file where the other one has been quicker
        time.sleep(1)
    images = build_loaders(load_config(config)).train.dataset
    dist.barrier()
    return images.kept.path.name, images[0, 1][0].sum().item()


def test_processes_keep_images_in_one_file(config_file, tmp_path):
    config = config_file({"Global.cache_images": str(tmp_path / "kept")})
    one, other = in_processes(2, kept_by, config)
    assert one == other and len(list((tmp_path / "kept").iterdir())) == 3
