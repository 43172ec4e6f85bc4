"""What an epoch of preference training will take, before it is started: memory, FLOPs, seconds.

Memory is rankwise.plan.footprint's, of the largest micro-batch that the rows give. Time is the FLOPs that a step spends
divided by a matmul rate and by an efficiency: the share of that rate which a step reaches, assumed until measured.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction

from rankwise.batching import micro_batches, steps
from rankwise.flops import BACKWARD, forward_parts, step_flops
from rankwise.logprobs import KEPT_LOGITS
from rankwise.plan.footprint import Footprint, Shape, footprint
from rankwise.rendering import TokenRow

BUDGET_GRAIN = 64  # positions; budgets are searched in multiples of it


@dataclass(frozen=True, kw_only=True)
class Work:
    """A training set and how it is cut."""

    rows: Sequence[TokenRow]
    batch_size: int = 16  # rows an optimizer step, over all processes
    micro_batch_tokens: int = 2048  # positions a forward pass
    seed: int = 0  # of the shuffle


@dataclass(frozen=True, kw_only=True)
class Remedy:
    """A change that makes a plan fit."""

    change: str  # in words
    micro_batch_tokens: int  # the largest that fits with it


@dataclass(frozen=True, kw_only=True)
class Forecast:
    """One epoch, predicted. Bytes are of one process, the rest is of all together."""

    memory: Footprint
    process_bytes: int  # the process itself: libraries, CUDA's context
    positions: int  # positions computed in an epoch, each prompt once
    steps: int  # optimizer steps in an epoch
    flops: int  # model FLOPs of an epoch (rankwise.flops): what utilisation is measured by
    spent_flops: int  # with what is computed twice, and without gradients of frozen weights
    seconds: float  # of an epoch; communication between processes is not in it

    @property
    def total_bytes(self) -> int:
        return self.memory.peak + self.process_bytes


def forecast(shape: Shape, work: Work, *, flops_per_second: float, process_bytes: int) -> Forecast:
    """Predict an epoch.

    Args:
        flops_per_second: that one process reaches in training: matmul rate times efficiency.

    Raises UserError for rows without a prompt and for architectures whose FLOPs cannot be counted.
    """
    spent = spent_flops(shape, work)
    return Forecast(
        memory=peak_memory(shape, work),
        process_bytes=process_bytes,
        positions=sum(row.positions for row in work.rows),
        steps=math.ceil(len(work.rows) / work.batch_size),
        flops=step_flops(shape.config, work.rows),
        spent_flops=spent,
        seconds=spent / flops_per_second / shape.processes,
    )


def spent_flops(shape: Shape, work: Work) -> int:
    """FLOPs that an epoch really does: checkpointed layers run forward twice, and the head where it keeps no logits.

    Frozen weights need no gradient of their own, which is half of a linear layer's backward pass; the adapters' own
    products, thousandths of it, are left out.
    """
    parts = forward_parts(shape.config, work.rows)
    body = 2 if shape.gradient_checkpointing else 1
    weights = 1 if shape.lora_rank else BACKWARD
    head = parts.head * (1 + weights) + round(parts.head * _share_projected_again(shape, work))
    return parts.linear * (body + weights) + parts.attention * (body + BACKWARD) + head


def _share_projected_again(shape: Shape, work: Work) -> Fraction:
    """Share of the answer tokens whose micro-batch has more logits than rankwise.logprobs keeps."""
    answers = [_answer_tokens(part) for parts in _cuts(work) for part in parts]
    vocabulary = shape.config.get_text_config().vocab_size
    return Fraction(sum(n for n in answers if n * vocabulary > KEPT_LOGITS), max(1, sum(answers)))


def _answer_tokens(part: list[TokenRow]) -> int:
    return sum(len(answer) for row in part for answer in row.answers_ids)


def peak_memory(shape: Shape, work: Work) -> Footprint:
    """The footprint of the step that holds most: the one with the largest micro-batch."""
    part, accumulates = largest_part(work, processes=shape.processes)
    return footprint(shape, part, accumulates=accumulates)


def largest_part(work: Work, *, processes: int = 1) -> tuple[list[TokenRow], bool]:
    """The micro-batch of an epoch with most positions, and whether any process has several in a step."""
    cuts = list(_cuts(work))
    return max((part for parts in cuts for part in parts), key=_positions), max(map(len, cuts)) > processes


def _cuts(work: Work) -> Iterator[list[list[TokenRow]]]:
    for indices in steps(len(work.rows), batch_size=work.batch_size, epochs=1, seed=work.seed):
        yield micro_batches([work.rows[i] for i in indices], max_tokens=work.micro_batch_tokens)


def _positions(part: list[TokenRow]) -> tuple[int, int]:
    # Of parts alike in size, the one with the longer row has the larger mask.
    return sum(row.positions for row in part), max(row.positions for row in part)


def whole_step(work: Work) -> int:
    """Positions of the largest optimizer step: micro_batch_tokens from there on cut nothing."""
    return _positions(largest_part(replace(work, micro_batch_tokens=2**62))[0])[0]


def largest_budget(shape: Shape, work: Work, limit: int) -> int | None:
    """The largest micro_batch_tokens whose peak is at most limit bytes; None where a single row is too large.

    A dozen traces, of a second or two each for a model of some billion weights.
    """
    fits = lambda budget: peak_memory(shape, replace(work, micro_batch_tokens=budget)).peak <= limit
    low, high = max(row.positions for row in work.rows), whole_step(work)
    if not fits(low):
        return None
    if fits(high):
        return high
    while high - low > max(BUDGET_GRAIN, low // 16):
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return max(low // BUDGET_GRAIN * BUDGET_GRAIN, max(row.positions for row in work.rows))


def remedies(shape: Shape, work: Work, limit: int) -> Iterator[Remedy]:
    """Changes that make the plan fit in limit bytes, the cheapest first."""
    checkpointed = replace(shape, gradient_checkpointing=True)
    candidates = [("a smaller micro_batch_tokens", shape)]
    if not shape.gradient_checkpointing:
        candidates.append(("gradient_checkpointing", checkpointed))
    if not shape.lora_rank:
        adapted = replace(checkpointed, lora_rank=16)
        candidates.append(("LoRA of rank 16 with gradient_checkpointing", adapted))
    for words, changed in candidates:
        if budget := largest_budget(changed, work, limit):
            yield Remedy(change=words, micro_batch_tokens=budget)
    sharers = shape.processes if shape.sharding == "fsdp" else 1
    for processes in (2**power for power in range(1, 11)):
        sharded = replace(checkpointed, processes=processes, sharding="fsdp")
        if processes > sharers and (budget := largest_budget(sharded, work, limit)):
            words = f"FSDP2 over {processes} processes with gradient_checkpointing"
            yield Remedy(change=words, micro_batch_tokens=budget)
            return
