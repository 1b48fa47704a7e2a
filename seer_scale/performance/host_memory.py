"""What the C library does with memory that tensors on a CPU give back: it keeps it.

glibc returns every large tensor's pages to the system when it is freed, and the next step's tensors
get fresh ones, which the system clears and enters page by page.
"""

from __future__ import annotations

import ctypes

# Of <malloc.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_PAD = 64 << 20  # bytes that the heap grows by at once


def keep_freed_memory() -> bool:
    """From now on this process keeps what it frees for its next allocations; True on glibc.

    What it holds is then its highest use so far, as `peak_memory_gib` has always counted.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # musl, macOS
        return False
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _PAD}  # -1: never
    return all(mallopt(option, value) for option, value in options.items())
