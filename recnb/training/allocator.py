"""Memory on the CPU that is asked for once.

An activation takes tens of megabytes. glibc gets so large a piece from the kernel and hands it back when it is freed,
thousands of times in an epoch, and each time the kernel clears its pages. Kept, it is used again: a training step of
MobileNetV2 takes half the time (`python benchmarks/training.py memory`).
"""

import ctypes

import torch

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4  # of malloc.h


def keep_freed_memory(device: torch.device) -> None:
    """Let this process keep up to 2 GB that it has freed, where it computes on the CPU; no result changes.

    Other C libraries than glibc are left alone.
    """
    if device.type != "cpu":
        return
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # TypeError: on Windows a library has a name
        return
    mallopt(M_TRIM_THRESHOLD, 2**31 - 1)
    if not mallopt(M_MMAP_THRESHOLD, 2**30):  # before glibc 2.35 the threshold is 32 MB at most
        mallopt(M_MMAP_MAX, 0)
