"""Settings of the process: what makes CPU training faster and no user should have to know, and what code may run."""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def remote_code_allowed() -> bool:
    """Whether Python code that comes with a model may run: only where RANKWISE_TRUST_REMOTE_CODE=1 asks for it.

    It is a matter of the machine's safety, not of a result, so it is no parameter.
    """
    return os.environ.get("RANKWISE_TRUST_REMOTE_CODE") == "1"


def keep_freed_memory() -> bool:
    """Let glibc reuse freed blocks instead of returning each large one to the kernel; True where it applied.

    A training step allocates the same large tensors again and again. By default each is a fresh mapping, zeroed page by
    page: 38,000 page faults a step on the embedded default against 1,700 with this (NOTEBOOK.md).
    """
    if not sys.platform.startswith("linux"):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and bool(mallopt(M_MMAP_MAX, 0) and mallopt(M_TRIM_THRESHOLD, 2**31 - 1))


def spin_briefly() -> None:
    """Let idle threads of GNU OpenMP spin for microseconds, then sleep; to be called before torch is imported.

    A training step is a thousand short parallel parts. A thread that sleeps at once has to be woken for each; one that
    spins on takes the core that its own partner needs as soon as anything else runs on the machine. Both are slower
    (NOTEBOOK.md). A GOMP_SPINCOUNT or OMP_WAIT_POLICY of the user's wins.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "1000")
