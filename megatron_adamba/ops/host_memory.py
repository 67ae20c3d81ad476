"""The C allocator's way with large blocks, which matters where tensors live in host memory."""

from __future__ import annotations

import ctypes

_TRIM_THRESHOLD, _MMAP_THRESHOLD = -1, -3
"""parameters of glibc's mallopt (malloc.h)"""


def keep_freed_pages() -> bool:
    """Let freed blocks stay with the process instead of going back to the kernel page by page.

    A training step frees and asks for the same large temporaries again and again; each time glibc unmaps them, the
    kernel hands out zeroed pages anew, up to a tenth of a step on a CPU. Peak memory does not change. Returns whether
    the allocator took the setting (other C libraries have none).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        return False
    return bool(mallopt(_MMAP_THRESHOLD, 1 << 30)) and bool(mallopt(_TRIM_THRESHOLD, -1))
