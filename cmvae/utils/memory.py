"""Memory allocation of a process that computes on the CPU."""

from __future__ import annotations

import ctypes
import gc
import platform
from collections.abc import Iterator
from contextlib import contextmanager

# From malloc.h of glibc.
_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_MAX = -1, -2, -4
_NEVER_TRIM = 2**31 - 1
_GROWTH_BYTES = 256 * 2**20


@contextmanager
def garbage_collected_on_request() -> Iterator[None]:
    """Let Python's garbage collector run only where the block calls `gc.collect`.

    It otherwise runs at any time, on every rank at another one, and all ranks wait for the slowest. Objects
    that exist already are not looked at again.
    """
    gc.collect()
    gc.freeze()
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
        gc.unfreeze()


def keep_freed_memory() -> None:
    """Keep freed memory for later tensors. Does nothing if the C library is not glibc.

    By default glibc returns blocks above 32 MB to the system when they are freed. The next tensor of the same
    size must then be mapped again page by page, which takes up to a quarter of an update.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER_TRIM)
    libc.mallopt(_M_TOP_PAD, _GROWTH_BYTES)
