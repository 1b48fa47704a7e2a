"""Memory of tensors on a CPU: kept when it is freed, and in huge pages.

glibc gives every large tensor's pages back to the system when it is freed. The next step's tensors
get fresh ones, which the system clears and enters one by one, and which are of 4 KiB: a step's
hundreds of megabytes are more of them than the processor can look up at once.
"""

from __future__ import annotations

import ctypes
import os

# Of glibc's <malloc.h> and Linux's <sys/mman.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE = 14
_HUGE = 2 << 20  # bytes of a huge page, on most processors
_PAD = 64 << 20  # bytes that the heap grows by beyond what is reserved


def keep_freed_memory(ranks: int = 1) -> bool:
    """From now on this process keeps what it frees for its next allocations; True on glibc.

    Call once, from the main thread. The heap is made as large as half of this rank's share of the
    machine and marked for huge pages; no memory is taken before it is used.

    Args:
        ranks: processes of this kind on the machine.
    """
    libc = ctypes.CDLL(None)
    if not (hasattr(libc, "mallopt") and hasattr(libc, "gnu_get_libc_version")):
        return False  # musl, macOS
    options = {_MMAP_MAX: 0, _TRIM_THRESHOLD: -1, _TOP_PAD: _PAD}  # -1: give nothing back
    if not all(libc.mallopt(option, value) for option, value in options.items()):
        return False
    size = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // 2 // ranks
    libc.malloc.restype = ctypes.c_void_p
    heap: int | None = libc.malloc(ctypes.c_size_t(size))
    if heap:  # else the system promises no more than it has: without huge pages then
        start = -(-heap // _HUGE) * _HUGE
        length = (heap + size - start) // _HUGE * _HUGE
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))
    return True
