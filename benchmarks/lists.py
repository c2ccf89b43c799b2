"""How list files and samplers scale: ten million lines read, and epochs drawn over them.

    python benchmarks/lists.py [--lines 10000000]      a JSON line: seconds, and megabytes at the most

A million identities of ten images each, as `path label` lines. The file takes about 30 bytes a line in a temporary
folder.
"""

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path

from recnb.data.lists import read_list
from recnb.data.samplers import DistributedBatchSampler, DistributedRandomIdentitySampler, PKSampler

SAMPLERS = {
    "PKSampler": (PKSampler, {"sample_per_id": 4}),
    "DistributedBatchSampler": (DistributedBatchSampler, {}),
    "DistributedRandomIdentitySampler": (DistributedRandomIdentitySampler, {"num_instances": 4}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--lines", type=int, default=10_000_000)
    lines = parser.parse_args().lines
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "list.txt"
        with path.open("w") as file:
            file.writelines(f"images/{i // 10:07d}/{i % 10}.jpg {i // 10}\n" for i in range(lines))
        began = time.perf_counter()
        images = read_list(folder, str(path), None, (2, 3))
    result = {
        "lines": len(images),
        "identities": int(images.labels[-1]) + 1,
        "read_s": round(time.perf_counter() - began, 1),
        "peak_MB": peak(),
    }
    for name, (make, options) in SAMPLERS.items():
        began = time.perf_counter()
        sampler = make(images.labels, batch_size=256, shuffle=True, **options)
        first = next(iter(sampler))
        result[name] = {"first_batch_s": round(time.perf_counter() - began, 2), "of": len(first), "peak_MB": peak()}
    print(json.dumps(result))


def peak() -> int:
    """The most memory that this process has held, in MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024


if __name__ == "__main__":
    main()
