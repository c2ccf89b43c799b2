"""Peak memory while a sharded head is saved and read, in shares: what a process holds of weights and optimizer state.

    python benchmarks/rows.py [ROWS] [WIDTH]      2,000,000 rows of 32 numbers, with AdamW's state

Two processes write a checkpoint that two and three read, then three write one that three and two read. Of each process
what it takes beyond what it took before the head was made, at most and by Linux's count, over its share.
"""

import json
import os
import platform
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

from recnb.distributed.processes import from_all
from recnb.distributed.rows import split
from recnb.models.heads import ArcMargin
from recnb.training.adaptor import OptimWrapper
from recnb.training.checkpoints import kept, load_model, whole_states, with_rows, write


def memory(what: str) -> int:
    """Bytes of this process: VmRSS now, or VmHWM, the most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) << 10 for line in lines if line.startswith(f"{what}:"))


def forget() -> None:
    """Begin to count the most memory anew."""
    Path("/proc/self/clear_refs").write_text("5")


def parts(rows: int, width: int) -> tuple[nn.Module, OptimWrapper]:
    """A model with a sharded head and its optimizer."""
    model = nn.ModuleDict({"neck": nn.Linear(width, width), "head": ArcMargin(width, rows, sharded=True)})
    return model, OptimWrapper(opt=torch.optim.AdamW(model.parameters(), 0.01))


def save(path: Path, model: nn.Module, optimizer: OptimWrapper) -> None:
    """Write a checkpoint behind a step."""
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.opt.step()
    optimizer.opt.zero_grad()
    forget()
    weights, moments = whole_states(model, optimizer)
    write({"model": weights, "optimizer": moments, "config": "{}", "contents": "{}"}, path)


def load(path: Path, model: nn.Module, optimizer: OptimWrapper) -> None:
    """Read a checkpoint."""
    state = kept(path)
    load_model(model, state["model"])
    optimizer.load_state_dict(with_rows(model, optimizer.opt, state["optimizer"], split))


def measure(rank: int, count: int, folder: str, work, rows: int, width: int) -> None:
    """Print what all processes take for one of the two."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/{count}-{work.__name__}", rank=rank, world_size=count)
    work(Path(folder) / "warm.pt", *parts(rows // 1000, width))
    before = memory("VmRSS")
    forget()
    model, optimizer = parts(rows, width)
    began = time.perf_counter()
    work(Path(folder) / "latest.pt", model, optimizer)
    seconds, taken = time.perf_counter() - began, memory("VmHWM") - before
    state = optimizer.opt.state[model["head"].weight].values()
    share = sum(t.nbytes for t in (model["head"].weight, *state))
    taken = from_all(taken / share)
    if rank == 0:
        print(
            json.dumps(
                {
                    "device": f"{os.cpu_count()} cores, {platform.machine()}",
                    "torch": torch.__version__,
                    "part": "rows",
                    "what": f"{work.__name__}, {count} processes, {rows:,} x {width} with AdamW",
                    "share_MB": share / 1e6,
                    "seconds": seconds,
                    "shares": [round(each, 3) for each in taken],
                }
            )
        )
    dist.destroy_process_group()


def main() -> None:
    rows, width = map(int, sys.argv[1:]) if sys.argv[1:] else (2_000_000, 32)
    for writers, others in ((2, 3), (3, 2)):
        with tempfile.TemporaryDirectory() as folder:
            for count, work in ((writers, save), (writers, load), (others, load)):
                torch.multiprocessing.spawn(measure, (count, folder, work, rows, width), count)


if __name__ == "__main__":
    main()
