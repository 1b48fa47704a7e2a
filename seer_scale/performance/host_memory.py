"""Makes a CPU process keep the memory of freed tensors, and use huge pages.

By default glibc returns the pages of a large tensor to the system when the tensor is freed. The
tensors of the next step get fresh pages, which the system clears and maps one by one. Pages have
4 KiB: hundreds of megabytes are more pages than the processor's page table cache holds.
"""

from __future__ import annotations

import ctypes
import os

# Constants of glibc's <malloc.h> and Linux's <sys/mman.h>.
_TRIM_THRESHOLD, _TOP_PAD, _MMAP_MAX = -1, -2, -4
_MADV_HUGEPAGE = 14
_HUGE = 2 << 20  # bytes of a huge page, on most processors
_PAD = 64 << 20  # bytes that the heap grows by beyond the reserved ones


def keep_freed_memory(ranks: int = 1) -> bool:
    """Makes this process keep freed memory for its next allocations.

    To be called once, from the main thread. Reserves half of this rank's share of the machine's
    memory as heap and marks the heap for huge pages. Memory is taken only when it is used.

    Args:
        ranks: number of such processes on the machine.

    Returns:
        True with glibc; False with another C library, where nothing changes.
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
    if heap:  # otherwise the system overcommits no memory: go on without huge pages
        start = -(-heap // _HUGE) * _HUGE
        length = (heap + size - start) // _HUGE * _HUGE
        libc.madvise(ctypes.c_void_p(start), ctypes.c_size_t(length), _MADV_HUGEPAGE)
        libc.free(ctypes.c_void_p(heap))
    return True
