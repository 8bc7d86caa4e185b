"""The main memory of a process that computes on a CPU."""

from __future__ import annotations

import ctypes
import platform

# Of glibc's malloc.h.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER = 2**31 - 1
_AT_A_TIME = 256 * 2**20


def keep_freed_memory() -> None:
    """Keep what tensors free for those to come, where the C library is glibc; elsewhere do nothing.

    By itself it gives blocks above 32 MB back to the system as soon as they are freed, and the next tensor of
    the same size has to be mapped again, page by page, which takes up to a quarter of an update.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
    libc.mallopt(_M_TOP_PAD, _AT_A_TIME)
