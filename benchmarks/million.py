"""A margin head of a million identities, a tenth of them in each step: seconds a step and the most memory taken.

    python benchmarks/million.py [IDENTITIES] [SHARE]

Prints a JSON line.
"""

import json
import resource
import sys
import time
from statistics import median

import torch
from training import DEVICE, gpu_memory, machine, now

from recnb.distributed.rows import step_by_rows
from recnb.losses.combined import CELoss
from recnb.models.heads import ArcMargin

BATCH, STEPS = 64, 6


def head(identities: int, share: float) -> dict:
    """Seconds of a step once warm, by the clock and of the processor, and GiB at the peak."""
    gpu_memory()
    part, loss = ArcMargin(512, identities, sample_rate=share).to(DEVICE), CELoss()
    optimizer = torch.optim.SGD(part.parameters(), 0.1, 0.9)
    step_by_rows(optimizer)
    clock, processor = [], []
    for _ in range(STEPS):
        x = torch.randn(BATCH, 512, device=DEVICE, requires_grad=True)
        y = torch.randint(identities, (BATCH,), device=DEVICE)
        began, used = now(), time.process_time()
        optimizer.zero_grad()
        loss({"logits": part(x, y)}, y).backward()
        optimizer.step()
        clock.append(now() - began)
        processor.append(time.process_time() - used)
    return {
        "part": "head",
        "what": f"ArcMargin, {identities:,} x 512 at rate {share:g}, Momentum, batches of {BATCH}",
        "seconds": median(clock[2:]),
        "processor_seconds": median(processor[2:]),
        "process_GiB": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20,
        "GPU_GiB": gpu_memory(),
    }


def main() -> None:
    identities, share = int(sys.argv[1]) if sys.argv[1:] else 10**6, float(sys.argv[2]) if sys.argv[2:] else 0.1
    print(json.dumps({**machine(), **head(identities, share)}))


if __name__ == "__main__":
    main()
