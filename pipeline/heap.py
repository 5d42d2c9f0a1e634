"""Memory of freed tensors stays with the process, for training on CPUs.

PyTorch has no caching allocator there: each tensor of a step is new memory that the kernel fills with zeros, page by page. On the
throughput benchmark's W1 that was a quarter of a step. glibc keeps what it is told to keep; elsewhere nothing changes.
"""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names and numbers of glibc's malloc.h."""
NEVER = -1
"""As a trim threshold: however much is free at the heap's end, it stays."""


def keep_freed_memory() -> bool:
    """Have malloc take large blocks from the heap as well, and never give the heap back; whether it agreed.

    What the process holds is then the most that it ever needed, which is what a worker has to be given in any case.
    """
    if sys.platform != "linux":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
