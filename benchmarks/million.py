"""A margin head of a million identities, a tenth of them in each step: seconds a step and the peak of the process.

    python benchmarks/million.py [IDENTITIES] [SHARE]
"""
import resource
import sys
import time

import torch

from recnb.heads import ArcMargin
from recnb.losses import CELoss
from recnb.sharding import step_by_rows


def main() -> None:
    identities, share = int(sys.argv[1]) if sys.argv[1:] else 10**6, float(sys.argv[2]) if sys.argv[2:] else 0.1
    head, loss = ArcMargin(512, identities, sample_rate=share), CELoss()
    optimizer = torch.optim.SGD(head.parameters(), 0.1, 0.9)
    step_by_rows(optimizer)
    for _ in range(6):
        x, y = torch.randn(64, 512, requires_grad=True), torch.randint(identities, (64,))
        start, used = time.perf_counter(), time.process_time()
        optimizer.zero_grad()
        loss({"logits": head(x, y)}, y).backward()
        optimizer.step()
        print(f"{time.perf_counter() - start:.2f} s, {time.process_time() - used:.2f} s of processor")
    print(f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20:.1f} GiB at most")


if __name__ == "__main__":
    main()
