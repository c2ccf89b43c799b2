"""A margin head of a million identities, a tenth of them in each step: seconds a step and the peak of the process.

python benchmarks/million.py [IDENTITIES] [SHARE]
"""

import resource
import sys
import time

import torch

from recnb.distributed.rows import step_by_rows
from recnb.losses.combined import CELoss
from recnb.models.heads import ArcMargin


def main() -> None:
    identities, share = int(sys.argv[1]) if sys.argv[1:] else 10**6, float(sys.argv[2]) if sys.argv[2:] else 0.1
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    head, loss = ArcMargin(512, identities, sample_rate=share).to(device), CELoss()
    optimizer = torch.optim.SGD(head.parameters(), 0.1, 0.9)
    step_by_rows(optimizer)
    for _ in range(6):
        x, y = torch.randn(64, 512, device=device, requires_grad=True), torch.randint(identities, (64,), device=device)
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss({"logits": head(x, y)}, y).backward()
        optimizer.step()
        if device.type == "cuda":
            torch.cuda.synchronize()
        print(f"{time.perf_counter() - start:.2f} s, {time.process_time() - used:.2f} s of processor")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")
    if device.type == "cuda":
        print(f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB of the GPU at most")


if __name__ == "__main__":
    main()
