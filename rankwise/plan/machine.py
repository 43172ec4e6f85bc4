"""What the machine has: its memory, the memory of this process, its rate of matrix products."""

from __future__ import annotations

import math
import os
import time
from pathlib import Path

import torch

from rankwise.checkpoints import Precision, numerics
from rankwise.plan import peak

# CUDA's context and libraries: assumed. On the CPU it is what this process holds with the libraries imported.
CUDA_PROCESS_BYTES = 2**30
SIDE = {"cpu": 1536, "cuda": 8192}
PRODUCTS = 8


def matmul_rate(precision: Precision, where: torch.device, *, side: int | None = None) -> float:
    """FLOP/s of square matrix products on a device in a precision, the best of several.

    side: of the squares; by default one that a machine of the kind needs to show its rate.
    """
    side = side or SIDE[where.type]
    # In the dtype itself: autocast would be timed with what it takes to convert.
    a, b = torch.randn(2, side, side, device=where).to(torch.bfloat16 if precision == "bf16" else torch.float32)
    best = math.inf
    with numerics(precision, where), torch.no_grad():
        for _ in range(PRODUCTS):
            start = time.perf_counter()
            a @ b
            if where.type == "cuda":
                torch.cuda.synchronize(where)
            best = min(best, time.perf_counter() - start)
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
    return CUDA_PROCESS_BYTES if kind == "cuda" else peak.now(kind)
