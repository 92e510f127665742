"""Memory that the C library holds back."""

from __future__ import annotations

import ctypes
import sys


def give_back_freed_memory() -> None:
    """Returns the free parts of the heap to the operating system, where that is glibc's; else does nothing.

    Passes that free blocks of one size and then ask for others leave holes that glibc keeps: three passes of a
    check took 0.3 GiB more than the training step they stand before. The pages cost time when they come back,
    so this is for passes made once.
    """
    if sys.platform != "linux":
        return
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
