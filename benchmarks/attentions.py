"""Ways to attend within prompt trees on a CPU, each timed by benchmarks.attention.

Letters: L positions, H heads, D head size.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

import rankwise.attention
from benchmarks.channel import Channel, Pace
from benchmarks.workload import Case, rows
from rankwise.batching import Batch, flat_rows, shared_rows
from rankwise.plan import peak
from rankwise.rendering import TokenRow

Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def run(spec: dict[str, Any], channel: Channel) -> None:
    """Forward and backward of one layer's attention over the rows of a step, once a go; tells how far fp32 is."""
    case = Case.of(spec["case"])
    drawn = [TokenRow(id=str(n), prompt_ids=row.prompt, answers_ids=row.answers) for n, row in enumerate(rows(case))]
    attend, batch = WAYS[spec["way"]](drawn)
    heads, dtype = case.shape.heads, torch.float32 if "fp32" in spec["way"] else torch.bfloat16
    shape = (*batch.input_ids.shape, heads, case.shape.hidden // heads)
    dice = torch.Generator().manual_seed(case.seed)
    q, k, v = (torch.randn(shape, generator=dice).to(dtype).transpose(1, 2).requires_grad_() for _ in range(3))
    peak.reset("cpu")
    pace = Pace(channel, "cpu", peak.now("cpu"))
    while True:
        attend(q, k, v).float().sum().backward()
        pace()
        q.grad = k.grad = v.grad = None


def _dense(drawn: list[TokenRow]) -> tuple[Attention, Batch]:
    """Trees packed into rows under a dense mask, as layout "shared" does; the mask is made once."""
    batch = shared_rows(drawn, 0)
    mask = batch.attention_mask()
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask), batch


def _trees(drawn: list[TokenRow]) -> tuple[Attention, Batch]:
    """rankwise.attention, as layout "flat" does."""
    batch = flat_rows(drawn, 0)
    module = torch.nn.Module()
    return lambda q, k, v: rankwise.attention.attend(module, q, k, v, None, trees=batch.trees)[0], batch


def _trees_in_bf16(drawn: list[TokenRow]) -> tuple[Attention, Batch]:
    """The same, with kernels that compute bf16 in bf16."""
    rankwise.attention.KERNEL_DTYPE = torch.bfloat16  # in this process, which does nothing else
    return _trees(drawn)


WAYS: dict[str, Callable[[list[TokenRow]], tuple[Attention, Batch]]] = {
    "trees": _trees,
    "trees, bf16 kernels": _trees_in_bf16,
    "dense mask": _dense,
    "trees, fp32": _trees,
    "dense mask, fp32": _dense,
}
