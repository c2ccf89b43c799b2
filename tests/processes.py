"""Functions that run in processes of their own.

Each process is forked from a server that has imported torch and recnb, so it starts in no time, and what one call
leaves behind no other sees.
"""

import multiprocessing
import os
import pickle
import sys
import tempfile
import time
from pathlib import Path

import pytest
import torch.distributed as dist
import torch.multiprocessing

from recnb import build_learner, build_loaders, build_model
from recnb.distributed import AverageGradients

METHOD = "forkserver" if sys.platform == "linux" else "spawn"  # macOS's own libraries do not bear a fork
SERVER = multiprocessing.get_context(METHOD)
SERVER.set_forkserver_preload([build.__module__ for build in (build_model, build_loaders, build_learner)])
SECONDS = 120


def in_processes(count: int, work, *args) -> list:
    """What `work(rank, *args)` returns in each process of a gloo group of so many."""
    with tempfile.TemporaryDirectory() as folder:
        group = torch.multiprocessing.start_processes(
            begin, (count, folder, work, args), count, join=False, start_method=METHOD
        )
        end = time.monotonic() + SECONDS
        while not group.join(max(0.0, end - time.monotonic())):  # True once all have ended; raises what one has raised
            if time.monotonic() > end:
                for process in group.processes:
                    process.kill()
                pytest.fail(f"{work.__name__} has not ended after {SECONDS} s in {count} processes")
        return [pickle.loads((Path(folder) / str(rank)).read_bytes()) for rank in range(count)]


def begin(rank: int, count: int, folder: str, work, args: tuple) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=count)
    (Path(folder) / str(rank)).write_bytes(pickle.dumps(work(rank, *args)))
    dist.destroy_process_group()


def follow(loss, parameters) -> None:
    """Run the backward pass of a loss; the gradients of the parameters become the means over processes, if any run."""
    if not dist.is_initialized():
        return loss.backward()
    average = AverageGradients()
    average.begin([*parameters])
    loss.backward()
    average.finish()
    average.close()


def start(log: Path, work, *args) -> multiprocessing.Process:
    """A process, in a session of its own, that ends with the code that `work(*args)` returns and prints into a file."""
    process = SERVER.Process(target=alone, args=(log, work, args))
    process.start()
    return process


def alone(log: Path, work, args: tuple) -> None:
    os.setsid()
    with log.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    sys.exit(work(*args))
