"""Peak memory of this process: of the host, or of the CUDA device where the work is there.

On Linux the peak is read from /proc (VmHWM), not from getrusage: ru_maxrss of a new process begins at the size of
the one that started it.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
import sys
from pathlib import Path

STATUS = Path("/proc/self/status")


def now(device: str) -> int:
    """Bytes in use."""
    if device == "cuda":
        import torch

        return torch.cuda.memory_allocated()
    return _status("VmRSS") if STATUS.exists() else _largest_ever()


def highest(device: str) -> int:
    """The most bytes in use since reset, or since the process began where the system cannot reset."""
    if device == "cuda":
        import torch

        return torch.cuda.max_memory_allocated()
    return _status("VmHWM") if STATUS.exists() else _largest_ever()


def reset(device: str) -> None:
    """Give back what is free, and let highest begin anew at what is in use now."""
    gc.collect()
    if device == "cuda":
        import torch

        torch.cuda.reset_peak_memory_stats()
        return
    # What earlier work left behind in the heap would otherwise count as in use, and hide as much of the next peak.
    if trim := getattr(ctypes.CDLL(None), "malloc_trim", None):
        trim(0)
    with contextlib.suppress(OSError):  # not permitted in some containers: the peak then counts from the start
        Path("/proc/self/clear_refs").write_text("5")


def _status(name: str) -> int:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(f"{name}:"))
    return int(line.split()[1]) * 1024


def _largest_ever() -> int:
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
