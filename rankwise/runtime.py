"""Settings of the process that make CPU training faster and that no user should have to know."""

from __future__ import annotations

import ctypes
import os
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


def yield_when_waiting() -> None:
    """Let idle OpenMP threads sleep instead of spin; to be called before torch is imported.

    A spinning thread takes the core that its own partner needs as soon as anything else runs on the machine: training
    on 2 busy cores then slows 1.5 times more than it has to (NOTEBOOK.md). An OMP_WAIT_POLICY of the user's wins.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
