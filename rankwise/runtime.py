"""Settings of the process that make CPU training faster and that no user should have to know."""

from __future__ import annotations

import ctypes
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks instead of returning each large one to the kernel; True where it applied.

    A training step allocates the same large tensors again and again. By default each is a fresh mapping, zeroed page by
    page: 38,000 page faults a step on the embedded default against 1,700 with this (NOTEBOOK.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))
