import platform
import resource

import pytest
import torch

from recnb.training.allocator import keep_freed_memory


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has these options")
def test_large_tensors_come_from_memory_that_was_freed_before():
    def faults():
        return resource.getrusage(resource.RUSAGE_SELF).ru_minflt

    keep_freed_memory(torch.device("cpu"))
    for _ in range(20):  # an aligned piece does not always fit where one of its size was
        torch.ones(16 << 20)  # 64 MB, which is above what glibc keeps by itself
    before = faults()
    for _ in range(4):
        torch.ones(16 << 20)
    assert faults() - before < 1000  # each had 16,384 pages to be cleared
