"""Rows too many for one process: each writes its own, any number of processes reads them, a kill leaves them whole."""

import contextlib
import os
import random
import re
import signal
import time
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from processes import METHOD, begin, in_processes
from safetensors import safe_open
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import recnb.distributed.rows
import recnb.training.checkpoints
from recnb.cli.train import main
from recnb.distributed.processes import ranks
from recnb.distributed.rows import Rows, on_this_rank, sharded_weights
from recnb.models.heads import ArcMargin
from recnb.models.weights import read_weights
from recnb.registry import ConfigError
from recnb.runs.folder import load_run
from recnb.training.adaptor import OptimWrapper
from recnb.training.checkpoints import kept, load_model, save_weights, whole_states, with_rows, write

CLASSES = 11


def parts():
    """A sharded head, a layer that torch divides where several processes run, and their optimizer behind a step."""
    recnb.distributed.rows.JOINED = recnb.distributed.rows.PIECE = 0
    torch.manual_seed(0)
    model = nn.ModuleDict({"neck": nn.Linear(4, 7), "head": ArcMargin(6, CLASSES, sharded=True)})
    if ranks()[1] > 1:
        fully_shard(model["neck"], mesh=init_device_mesh("cpu", (ranks()[1],)))
    optimizer = OptimWrapper(opt=torch.optim.AdamW(model.parameters(), 0.1))
    for p in model.parameters():
        p.grad = p.detach().square()
    optimizer.opt.step()
    return model, optimizer


def state_of(model, optimizer):
    weights, moments = whole_states(model, optimizer)
    return {"model": weights, "optimizer": moments, "config": "{}", "contents": "{}"}


def written(rank, folder):
    """Names of the files in a folder that two processes write a checkpoint and weights to, once and again."""
    model, optimizer = parts()
    for _ in range(2):
        write(state_of(model, optimizer), folder / "latest.pt")
        save_weights(model, folder / "best.safetensors")
    dist.barrier()
    return sorted(path.name for path in folder.iterdir())


def read(rank, folder):
    """The state of this process as it was made, as a checkpoint holds it, and its weights as a file holds them."""
    model, optimizer = parts()

    def here():
        states = (value for state in optimizer.opt.state.values() for value in state.values())
        return [on_this_rank(t).clone() for t in (*model.parameters(), *states)]

    made = here()
    for p in model.parameters():
        p.detach().zero_()
    state = kept(folder / "latest.pt")
    load_model(model, state["model"])
    optimizer.load_state_dict(with_rows(model, optimizer.opt, state["optimizer"], recnb.distributed.rows.split))
    torch.testing.assert_close(here(), made, rtol=0, atol=0)
    weights = read_weights(folder / "best.safetensors", in_part=True)
    assert isinstance(weights["head.weight"], Rows) and len(weights["head.weight"]) == CLASSES
    for p in model.parameters():
        p.detach().zero_()
    load_model(model, weights)
    torch.testing.assert_close(here(), made, rtol=0, atol=0)
    return [len(rows) for rows in made[:3]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two processes have written."""
    folder = tmp_path_factory.mktemp("rows")
    for names in in_processes(2, written, folder):
        assert len(names) == 6 and len([name for name in names if re.fullmatch(r"latest-\w{8}\.rows\..*", name)]) == 2
    return folder


@pytest.mark.parametrize("count", [1, 2, 3])
def test_each_process_reads_its_rows_of_what_two_have_written(folder, count):
    weight, bias, classes = zip(*in_processes(count, read, folder), strict=True)
    assert weight == bias == {1: (7,), 2: (4, 3), 3: (3, 3, 1)}[count] and sum(classes) == CLASSES


def test_each_process_writes_its_own_rows_and_nothing_else(folder):
    held = kept(folder / "latest.pt")
    assert all(isinstance(held["model"][name], Rows) for name in ("head.weight", "neck.weight", "neck.bias"))
    for path, rows, others in zip(held["model"]["head.weight"].files, (5, 6), (4, 3), strict=True):
        with safe_open(path, "pt") as file:
            for number, (name, shape) in enumerate(
                {"neck.weight": (others, 4), "neck.bias": (others,), "head.weight": (rows, 6)}.items()
            ):
                for place in (f"model.{name}", *(f"optimizer.state.{number}.{m}" for m in ("exp_avg", "exp_avg_sq"))):
                    assert tuple(file.get_slice(place).get_shape()) == shape
            assert len(file.keys()) == 9


def test_whoever_reads_weights_gets_all_rows(folder):
    weights = read_weights(folder / "best.safetensors")
    whole = parts()[0].state_dict()
    torch.testing.assert_close(weights, dict(whole), rtol=0, atol=0)


def test_other_numbers_of_rows_are_refused(folder):
    model, _ = parts()
    model["head"].class_num = 12
    assert sharded_weights(model) == {"head.weight": range(12)}
    with pytest.raises(ValueError, match="a state of 11 rows cannot be divided as one of 12 classes"):
        load_model(model, kept(folder / "latest.pt")["model"])


@pytest.mark.parametrize("seed", range(3))
def test_a_damaged_or_missing_file_is_named(folder, seed):
    path = random.Random(seed).choice(sorted(folder.glob("best*.safetensors")))
    content = bytearray(path.read_bytes())
    content[random.Random(seed).randrange(len(content))] ^= 4
    whole, _ = path.read_bytes(), path.write_bytes(content)
    try:
        with pytest.raises(ConfigError, match=path.name):
            read_weights(folder / "best.safetensors")
        path.unlink()
        with pytest.raises(ConfigError, match=path.name):
            read_weights(folder / "best.safetensors")
    finally:
        path.write_bytes(whole)


def write_on(rank, folder):
    """None; checkpoints whose numbers all say which one it is, until the process is killed."""
    recnb.distributed.rows.JOINED = 0
    head = nn.ModuleDict({"head": ArcMargin(64, 5000, sharded=True)})
    for number in range(10**6):
        head["head"].weight.detach().fill_(number)
        write({"model": whole_states(head)[0], "epoch": number, "config": "{}", "contents": "{}"}, folder / "latest.pt")


@pytest.mark.parametrize("seed", range(2))
def test_killed_at_any_moment_a_whole_checkpoint_is_left(tmp_path, seed):
    args = (2, str(tmp_path), write_on, (tmp_path,))
    group = torch.multiprocessing.start_processes(begin, args, 2, join=False, start_method=METHOD)
    end = time.monotonic() + 60
    while not (tmp_path / "latest.pt").exists() and time.monotonic() < end:
        time.sleep(0.01)
    time.sleep(random.Random(seed).random())
    first, other = random.Random(seed).sample(group.processes, 2)
    assert first.is_alive() and other.is_alive()
    for process in (first, other):
        with contextlib.suppress(ProcessLookupError):  # one that was left alone has ended with an error
            os.kill(process.pid, signal.SIGKILL)
    other.join()
    state = kept(tmp_path / "latest.pt")
    rows = state["model"]["head.weight"].read(range(5000))
    assert (rows == state["epoch"]).all()


def full_disk(rank, folder):
    """What is said where the second process finds the disk full, then where the first one does."""
    model, _ = parts()
    write({"model": whole_states(model)[0], "epoch": 1, "config": "{}", "contents": "{}"}, folder / "latest.pt")
    said = []
    for full, place in ((1, "save_file"), (0, "seal")):
        effect = OSError(28, "No space left on device") if rank == full else None
        wrapped = getattr(recnb.training.checkpoints, place)
        with patch.object(recnb.training.checkpoints, place, wraps=wrapped, side_effect=effect):
            with pytest.raises(OSError, match="No space left on device") as found:
                write({"model": whole_states(model)[0], "epoch": 2}, folder / "latest.pt")
        said.append(str(found.value))
    return said


def test_a_disk_that_is_full_in_one_process_ends_all_and_leaves_the_checkpoint_before(tmp_path):
    first, second = in_processes(2, full_disk, tmp_path)
    plain = "[Errno 28] No space left on device"
    assert first[0].startswith(f"process 1 of 2: {plain}") and first[1].startswith(plain)
    assert second[0].startswith(plain) and second[1].startswith(f"process 0 of 2: {plain}")
    state = kept(tmp_path / "latest.pt")
    assert state["epoch"] == 1 and len(state["model"]["head.weight"].read(range(CLASSES))) == CLASSES


def train(rank, config, folder, joined=0):
    """0; a training whose rows stay apart where their bytes are more than `joined`."""
    recnb.distributed.rows.JOINED = joined
    return main([str(config), "--run-dir", str(folder)])


def test_a_training_whose_rows_stay_apart_ends_as_one_whose_rows_are_joined(config_file, tmp_path):
    steps = {
        "Arch.freeze": ["backbone"],
        "Arch.Head.sharded": True,
        "Optimizer.lr": {"name": "ConstLR", "learning_rate": 0.002},
        "EMA": {"decay": 0.9},
        "Global.epochs": 3,
        "Global.keep_checkpoints": 1,
    }
    config, run, joined = config_file(steps), tmp_path / "run", tmp_path / "joined"
    assert in_processes(2, train, config, run) == in_processes(2, train, config, joined, 1 << 27) == [0, 0]
    assert (run / "history.csv").read_bytes() == (joined / "history.csv").read_bytes()
    names = {path.name.partition("-")[0] for path in run.rglob("*.rows.safetensors")}
    assert names == {"model", "best", "epoch_3"} and not list(joined.rglob("*.rows.safetensors"))
    for name in ("model.safetensors", "checkpoints/best.safetensors"):
        torch.testing.assert_close(read_weights(run / name), read_weights(joined / name), rtol=0, atol=0)
    # one process goes on, and everything is in one file again
    assert train(0, config_file({**steps, "Global.epochs": 4}), run) == 0
    assert {path.name.partition("-")[0] for path in run.rglob("*.rows.safetensors")} <= {"best"}
    whole = load_run(run).model().state_dict()["head.weight"]
    assert torch.equal(whole, read_weights(run / "model.safetensors")["head.weight"]) and len(whole) == 15
