"""Freed memory is kept for the next array, on Linux.

MLX's CPU build allocates every temporary with malloc. The GNU library gives a freed block of more
than 128 KiB back to the kernel, which fills its pages with zeros when it is asked again: a tenth of
a training step of an SAE. Blocks up to 32 MiB, the most that the library allows, stay with the
process instead; what is larger (weights) is given back as before.
"""

from __future__ import annotations

import ctypes
import platform

# Names and numbers of malloc.h.
M_TRIM_THRESHOLD, M_TOP_PAD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -2, -3, -8
LARGEST = 32 << 20
SETTINGS = {
    M_MMAP_THRESHOLD: LARGEST,
    M_TRIM_THRESHOLD: 1 << 30,  # free memory at the heap's end that is kept
    M_TOP_PAD: 64 << 20,  # asked for at a time
    M_ARENA_MAX: 1,  # MLX allocates in one thread and frees in another
}


def keep_freed() -> bool:
    """Whether the C library took the settings; False where it has none. Never fails."""
    if platform.libc_ver()[0] != "glibc":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return False
    return all([mallopt(name, value) == 1 for name, value in SETTINGS.items()])
