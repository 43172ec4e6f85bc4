"""What the machine has: its memory, the memory of this process, its rate of matrix products."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from rankwise.checkpoints import Precision, numerics

# CUDA's context and libraries: assumed. On the CPU it is what this process holds with the libraries imported.
CUDA_PROCESS_BYTES = 2**30


def matmul_rate(precision: Precision, where: torch.device, *, seconds: float = 1.0) -> float:
    """FLOP/s of square matrix products on a device in a precision, the best of as many as fit into seconds."""
    side = 8192 if where.type == "cuda" else 1536
    a, b = torch.rand(2, side, side, device=where)
    best, began = math.inf, time.monotonic()
    with numerics(precision, where), torch.no_grad():
        while time.monotonic() - began < seconds or best == math.inf:
            start = time.monotonic()
            a @ b
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            best = min(best, time.monotonic() - start)
    return 2 * side**3 / best


def machine_memory(where: torch.device) -> int:
    """Bytes that a device has in all; on the CPU what the machine has, or less where a control group says so."""
    if where.type == "cuda":
        return torch.cuda.mem_get_info(where)[1]
    total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.is_file() else "max"
    return total if said == "max" else min(total, int(said))


def process_memory(kind: str) -> int:
    """Bytes that a process holds on a kind of device before it has a model."""
    return CUDA_PROCESS_BYTES if kind == "cuda" else status_bytes("VmRSS")


def status_bytes(name: str) -> int:
    """A line of this process's memory in /proc, bytes; 0 where the system has no such file."""
    status = Path("/proc/self/status")
    lines = status.read_text().splitlines() if status.is_file() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:")), 0)
