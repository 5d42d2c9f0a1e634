"""Memory of large tensors on CPUs: on huge pages, and kept by the process once it has it.

PyTorch has no caching allocator there: each tensor of a step is new memory that the system fills with zeros, page by page. On the
throughput benchmark's W1 huge pages leave a seventh of a step for that, and glibc, told to keep what is freed, nothing. With
another C library, or on another system, nothing changes.
"""

from __future__ import annotations

import sys

HUGE_PAGES = {"THP_MEM_ALLOC_ENABLE": "1"}
"""Environment of a process whose large tensors lie on huge pages; PyTorch reads it at the first of them."""
ONE_HEAP = {"MALLOC_ARENA_MAX": "1"}
"""Environment of a process that trains in another thread than its first, as Ray Train's do. glibc reads it at the start, and would give
such a thread small heaps of its own, in which no large tensor has room."""
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4
"""Names and numbers of glibc's malloc.h."""
NEVER = -1
"""As a trim threshold: however much is free at the heap's end, it stays."""


def keep_freed_memory() -> bool:
    """Have malloc take large blocks from the heap as well, and never give the heap back; whether it agreed.

    The process goes on holding what it once needed, and what lies unused between blocks: 6 % more at the peak on W1 and 19 % on W2, where
    steps took a tenth and a seventh less time. (Where nothing but a few very large sizes alternates, it can be several times the live
    tensors.)
    """
    if sys.platform != "linux":
        return False
    import ctypes

    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):  # another C library than glibc
        return False
    return bool(mallopt(M_MMAP_MAX, 0)) and bool(mallopt(M_TRIM_THRESHOLD, NEVER))
