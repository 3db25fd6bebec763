"""How a process of ours gets its memory from the system, on Linux with glibc."""

import ctypes
import os
from contextlib import suppress

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
"""Of glibc's malloc.h."""
LARGEST = 2**31 - 1


def hold_memory() -> None:
    """Keep what tensors leave for the next ones, and ask for huge pages. To be called before torch is imported.

    glibc gives large tensors back to the system as soon as they are free, which makes and clears the same pages anew for the
    next ones: a third of the CPU time of a forward and backward pass. Elsewhere this does nothing.
    """
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")  # of torch
    with suppress(OSError, AttributeError, TypeError):  # another C library
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_THRESHOLD, LARGEST // 2)
        libc.mallopt(M_TRIM_THRESHOLD, -1)
