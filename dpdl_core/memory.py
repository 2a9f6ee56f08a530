"""What the C library does with memory that a network's layers free.

Knows no tensors. By default glibc gives every block of more than some hundred kB back to the
kernel, which clears it page by page when the next layer asks again: for a batch of 32 images a
hundred thousand page faults, a third of the trunk's time on a CPU (docs/accuracy.md).
"""

from __future__ import annotations

import ctypes
import functools
import platform

_M_TRIM_THRESHOLD, _M_TOP_PAD, _M_MMAP_THRESHOLD = -1, -2, -3  # <malloc.h>
_KEPT_BYTES = 1 << 30
"""Free memory at the end of the heap beyond which it is given back."""
_HEAP_STEP_BYTES = 64 << 20
"""What a heap grows by; of a thread's own, the largest there is."""
_LARGEST_KEPT_BYTES = 512 << 20
"""Larger blocks, a data set's, are the kernel's, and go back to it when freed."""


@functools.cache
def keep_freed_memory() -> None:
    """For the rest of this process, freed blocks stay its own for the next layer, within bounds.

    Does nothing without glibc. Environment variables such as MALLOC_TRIM_THRESHOLD_ are overruled.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    mallopt = ctypes.CDLL(None).mallopt
    mallopt(_M_MMAP_THRESHOLD, _LARGEST_KEPT_BYTES)
    mallopt(_M_TRIM_THRESHOLD, _KEPT_BYTES)
    mallopt(_M_TOP_PAD, _HEAP_STEP_BYTES)
