"Several processes make the step of one with the whole batch, evaluate together, write one run folder, and stop as one."
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from safetensors.torch import load_file
from torch import nn

from recnb.config import ConfigError, load_config
from recnb.distributed import average_gradients, copy_from_first, joined
from recnb.evaluation import embed
from recnb.heads import ArcMargin
from recnb.loaders import build_loaders, divided
from recnb.losses import CELoss, CombinedLoss, SupConLoss
from recnb.memories import CenterLoss
from recnb.model import RecModel, build_model
from recnb.pairs import TripletLossV2
from recnb.training import build_learner, device_count

ROOT = Path(__file__).resolve().parents[1]


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


def in_processes(count, work, *args):
    "What `work(rank, *args)` returns in each of so many gloo processes."
    with mp.Manager() as manager:
        results = manager.dict()
        mp.spawn(begin, (count, free_port(), results, work, args), nprocs=count)
        return [results[rank] for rank in range(count)]


def begin(rank, count, port, results, work, args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=count)
    results[rank] = work(rank, *args)
    dist.destroy_process_group()


def parts():
    "A model, losses of each kind and a batch of twelve images in float64."
    torch.manual_seed(0)
    torch.set_default_dtype(torch.float64)
    model = RecModel(nn.Sequential(nn.Linear(5, 8), nn.Tanh()), nn.Linear(8, 6), ArcMargin(6, 4, scale=8.0, margin=0.2))
    loss = CombinedLoss([(1.0, CELoss(0.1)), (0.5, SupConLoss(temperature=0.5)), (2.0, TripletLossV2()),
                         (0.1, CenterLoss(4, 6))])
    return model, loss, torch.randn(12, 5), torch.randint(0, 4, (12,))


def one_step(rank, count):
    "The gradients of all parameters, as numpy, of a process that sees its share of the batch."
    model, loss, x, y = parts()
    own = slice(rank * 12 // count, (rank + 1) * 12 // count)
    loss(model(x[own], y[own]), y[own]).backward()
    parameters = [*model.parameters(), *loss.parameters()]
    if count > 1:
        average_gradients(parameters)
    return [p.grad.numpy() for p in parameters]


@pytest.mark.parametrize("count", [2, 3])
def test_processes_make_the_step_of_one_with_the_whole_batch(count):
    try:
        alone = one_step(0, 1)
    finally:
        torch.set_default_dtype(torch.float32)
    for gradients in in_processes(count, one_step, count):
        for ours, theirs in zip(alone, gradients, strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-10, atol=1e-12)


def buffers_and_buckets(rank):
    "Tensors of two kinds, more than travel at a time, as the first process has them."
    import recnb.distributed
    recnb.distributed.BUCKET = 100
    tensors = [torch.full((30,), float(rank)), torch.full((3,), rank), torch.full((50,), rank + 0.5)]
    copy_from_first(tensors)
    return [tensor.tolist() for tensor in tensors]


def test_everything_is_copied_from_the_first():
    for tensors in in_processes(2, buffers_and_buckets):
        assert tensors == [[0.0] * 30, [0] * 3, [0.5] * 50]


class Numbers(torch.utils.data.Dataset):
    "Eleven images whose feature is their number."

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


def torchrun(count, config, run, check=True):
    words = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}", "-m",
             "recnb.train", str(config), "--run-dir", str(run)]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0 or not check, done.stdout[-3000:] + done.stderr[-3000:]
    return done


def test_two_processes_end_near_one_with_the_same_global_batch(config_file, tmp_path):
    plain = {"Global.epochs": 3, "DataLoader.Train.sampler": {"batch_size": 15}, "Arch.freeze": ["backbone"],
             "Loss.Train": [{"CELoss": {}}, {"SupConLoss": {"views": 2}}], "Arch.Head.sharded": True}
    torchrun(2, config_file(plain), tmp_path / "two")
    one = config_file({**plain, "DataLoader.Train.sampler": {"batch_size": 30}})
    torchrun(1, one, tmp_path / "one")
    two, one = (pd.read_csv(tmp_path / name / "history.csv") for name in ("two", "one"))
    assert two.columns.tolist() == one.columns.tolist() and len(two) == 3
    np.testing.assert_allclose(two.recall5, one.recall5, atol=0.12)  # the batches are drawn alike, not the same
    np.testing.assert_allclose(two.CELoss, one.CELoss, rtol=0.1)
    metrics = json.loads((tmp_path / "two" / "metrics.json").read_text())
    best = two.recall1[::-1].idxmax()
    alone = load_config(tmp_path / "two" / "config.yaml")
    learn = build_learner(alone, build_model(alone), build_loaders(alone), tmp_path / "alone")
    learn.model.load_state_dict(load_file(tmp_path / "two" / "model.safetensors"))
    for name, value in learn.scores().items():  # what two processes evaluated together, one evaluates alone
        assert metrics[name] == pytest.approx(value, abs=1e-6) == two[name][best]
    kept = torch.load(tmp_path / "two" / "checkpoints" / "latest.pt", weights_only=True)
    assert len(kept["model"]["head.weight"]) == 15


def test_another_number_of_processes_goes_on(config_file, tmp_path):
    steps = {"Optimizer.lr": {"name": "MultiStepDecay", "learning_rate": 0.002, "milestones": [1]},
             "Arch.Head.sharded": True, "EMA": {"decay": 0.9}}
    torchrun(2, config_file({**steps, "Global.epochs": 1}), tmp_path / "run")
    done = torchrun(1, config_file({**steps, "Global.epochs": 2}), tmp_path / "run")
    assert "resuming behind epoch 1 of 2" in done.stdout
    assert pd.read_csv(tmp_path / "run" / "history.csv").epoch.tolist() == [1, 2]
    kept = torch.load(tmp_path / "run" / "checkpoints" / "latest.pt", weights_only=True)
    assert kept["callbacks"]["moving_average"]["weights"]["head.weight"].shape == (15, 16)
    assert len(load_file(tmp_path / "run" / "checkpoints" / "best.safetensors")["head.weight"]) == 15


def test_a_process_that_fails_ends_the_others(config_file, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os\nif os.environ.get('RANK') == '1':\n    import torch\n"
        "    softmax = torch.nn.functional.cross_entropy\n"
        "    def failing(*a, **k):\n        raise ValueError('this rank fails')\n"
        "    torch.nn.functional.cross_entropy = failing\n")
    words = {**os.environ, "PYTHONPATH": str(tmp_path)}
    done = subprocess.run([sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m",
                           "recnb.train", str(config_file()), "--run-dir", str(tmp_path / "run")], cwd=ROOT, env=words,
                          capture_output=True, text=True, timeout=120)
    assert done.returncode != 0 and "this rank fails" in done.stderr


def test_the_notebook_key_starts_processes(config_file, tmp_path, run_notebook_in):
    executed = run_notebook_in("02_train", tmp_path / "run", config=str(config_file({"Global.devices": 2})),
                               run_dir=str(tmp_path / "run"))
    assert executed.exists() and json.loads((tmp_path / "run" / "metrics.json").read_text())["recall5"] > 0
    assert device_count("auto") >= 1
    with pytest.raises(ConfigError, match=r"Global\.devices: 0 is neither a number of processes nor 'auto'"):
        load_config(config_file({"Global.devices": 0}))


@pytest.fixture
def run_notebook_in():
    from conftest import run_notebook
    return run_notebook
