"""Token rows to tensors and back: prompts once with their answers beside them, in batches of a token budget.

Three questions, three functions: which rows make an optimizer step (epochs of shuffled rows), how a step is cut into
micro-batches that fit in memory (by token budget, sorted by length), and how rows lie in a tensor (shared or padded).
None of them changes the result: the loss is a mean over prompts, whatever the cut.

Letters: R rows of the tensor, L positions, N answer tokens, A answers, B prompts, K answers a prompt.
"""

from __future__ import annotations

import random
from bisect import bisect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import Self

import torch
from torch import Tensor

from rankwise.attention import Span, Trees
from rankwise.rendering import TokenRow
from rankwise.types import UserError

PROMPT = -1  # the answer number of a prompt's own tokens


@dataclass(frozen=True, kw_only=True)
class AnswerBatch:
    """What every batch of answers knows: whose answers they are, and how they rank."""

    ids: tuple[str, ...]  # [B] row ids, in the caller's order
    answer_rows: Tensor  # [A] which of the B prompts an answer belongs to
    answer_slots: Tensor  # [A] its place among that prompt's answers, 0 first
    ranks_BK: Tensor | None  # [B, K] equal numbers tie; None when answers lie best first and none are tied
    mask_BK: Tensor  # [B, K] True where an answer exists
    strengths_BK: Tensor | None  # [B, K] float32, nats, 0 where no answer exists; None where some answer has none

    def to(self, device: torch.device | str) -> Self:
        moved = {f.name: getattr(self, f.name) for f in fields(self)}
        return replace(self, **{k: v.to(device) for k, v in moved.items() if isinstance(v, Tensor)})

    def by_prompt(self, values_A: Tensor) -> Tensor:
        """[A] values as [B, K], zero where no answer exists; differentiable."""
        grid = torch.zeros(self.mask_BK.shape, dtype=values_A.dtype, device=values_A.device)
        return grid.index_put((self.answer_rows, self.answer_slots), values_A)


@dataclass(frozen=True, kw_only=True)
class Batch(AnswerBatch):
    """Rows as tensors. A tensor row may hold several prompt trees; positions know which tree and answer they are."""

    input_ids: Tensor  # [R, L] int64
    position_ids: Tensor  # [R, L] int64; every answer continues from its prompt's end
    tree: Tensor  # [R, L] int64: which prompt a position belongs to; -1 is padding
    branch: Tensor  # [R, L] int64: which answer a position belongs to; PROMPT for the prompt's own
    is_tree: bool  # False: plain causal rows, where an ordinary 2-D padding mask says it all
    source_index: Tensor  # [N] flat index into R·L of the position that predicts each answer token
    target_ids: Tensor  # [N] the answer tokens
    answer_index: Tensor  # [N] which of the A answers a token belongs to
    answer_tokens: Tensor  # [A] its length in tokens
    trees: Trees | None = None  # the same trees as rankwise.attention takes them; flat rows only

    def attention_mask(self) -> Tensor:
        """[R, 1, L, L] bool, True = may attend: own prompt and own answer, not later; or [R, L] for plain rows."""
        if not self.is_tree:
            return (self.tree >= 0).long()
        same_tree = self.tree[:, :, None] == self.tree[:, None, :]
        to_prompt = self.branch[:, None, :] == PROMPT
        same_branch = self.branch[:, :, None] == self.branch[:, None, :]
        length = self.input_ids.shape[1]
        earlier = torch.ones(length, length, dtype=torch.bool, device=self.tree.device).tril()
        return (same_tree & (to_prompt | same_branch) & earlier)[:, None]

    @property
    def padding_fraction(self) -> float:
        """Share of computed positions that hold no token."""
        return float((self.tree < 0).float().mean())


def flat_rows(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """One tensor row without padding: each prompt once, its answers beside it, tree behind tree."""
    _refuse_empty(rows)
    layout = _Layout(1, sum(row.positions for row in rows), pad_id)
    spans = []
    for index, row in enumerate(rows):
        spans.append(_span(layout.filled[0], row))
        layout.add_tree(0, index, row.prompt_ids, list(enumerate(row.answers_ids)))
    return layout.batch(rows, is_tree=True, trees=Trees.of(spans))


def _span(start: int, row: TokenRow) -> Span:
    prompt, answers = len(row.prompt_ids), [len(answer) - 1 for answer in row.answers_ids]
    if len(answers) == 1:  # a path without a fork is one causal sequence
        return Span(start=start, prompt=prompt + answers[0], answers=())
    return Span(start=start, prompt=prompt, answers=tuple(answers))


def shared_rows(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Each prompt once, its answers beside it; several trees to a tensor row, packed first-fit by length."""
    _refuse_empty(rows)
    capacity = max(row.positions for row in rows)
    bins: list[list[int]] = []
    room: list[int] = []
    for index in sorted(range(len(rows)), key=lambda i: -rows[i].positions):
        place = next((b for b, left in enumerate(room) if left >= rows[index].positions), None)
        if place is None:
            bins.append([])
            room.append(capacity)
            place = len(bins) - 1
        bins[place].append(index)
        room[place] -= rows[index].positions
    layout = _Layout(len(bins), capacity, pad_id)
    for r, members in enumerate(bins):
        for index in members:
            layout.add_tree(r, index, rows[index].prompt_ids, list(enumerate(rows[index].answers_ids)))
    return layout.batch(rows, is_tree=True)


def padded_rows(rows: Sequence[TokenRow], pad_id: int) -> Batch:
    """Every answer in a tensor row of its own behind a copy of its prompt, padded on the right."""
    _refuse_empty(rows)
    longest = max(row.longest_path for row in rows)
    layout = _Layout(sum(len(row.answers_ids) for row in rows), longest, pad_id)
    r = 0
    for index, row in enumerate(rows):
        for slot, answer in enumerate(row.answers_ids):
            layout.add_tree(r, index, row.prompt_ids, [(slot, answer)])
            r += 1
    return layout.batch(rows, is_tree=False)


def _refuse_empty(rows: Sequence[TokenRow]) -> None:
    if empty := [row.id for row in rows if not row.prompt_ids]:
        raise UserError(
            f"rows without a prompt token: {', '.join(empty[:10])} ({len(empty)} in all); a model predicts their "
            "first answer token from nothing: give them a prompt, or a tokenizer that adds a BOS token"
        )
    if empty := [row.id for row in rows if not all(row.answers_ids)]:
        raise UserError(
            f"rows with an answer of no token: {', '.join(empty[:10])} ({len(empty)} in all); there is nothing to "
            "score: leave these answers out, or end them with the EOS token, as Renderer does"
        )


class _Layout:
    """Fills a batch's tensors, one prompt tree at a time."""

    def __init__(self, rows: int, length: int, pad_id: int):
        self.input_ids = torch.full((rows, length), pad_id)
        self.position_ids = torch.zeros((rows, length), dtype=torch.int64)
        self.tree = torch.full((rows, length), -1)
        self.branch = torch.full((rows, length), PROMPT)
        self.length = length
        self.filled = [0] * rows
        self.source: list[tuple[int, int, list[int], list[int]]] = []  # (prompt, slot, sources, targets)

    def add_tree(self, r: int, index: int, prompt: Sequence[int], answers: list[tuple[int, Sequence[int]]]) -> None:
        self._put(r, index, PROMPT, prompt, position=0)
        prompt_end = r * self.length + self.filled[r] - 1
        for slot, answer in answers:
            start = r * self.length + self.filled[r]
            sources = [prompt_end, *range(start, start + len(answer) - 1)]
            self.source.append((index, slot, sources[: len(answer)], list(answer)))
            # The last token predicts nothing, so it is a target only.
            self._put(r, index, slot, answer[:-1], position=len(prompt))

    def _put(self, r: int, index: int, branch: int, ids: Sequence[int], *, position: int) -> None:
        start, end = self.filled[r], self.filled[r] + len(ids)
        self.input_ids[r, start:end] = torch.tensor(ids, dtype=torch.int64)
        self.position_ids[r, start:end] = torch.arange(position, position + len(ids))
        self.tree[r, start:end] = index
        self.branch[r, start:end] = branch
        self.filled[r] = end

    def batch(self, rows: Sequence[TokenRow], *, is_tree: bool, trees: Trees | None = None) -> Batch:
        self.source.sort(key=lambda item: item[:2])
        mask_BK, ranks_BK = answer_grid(rows)
        return Batch(
            ids=tuple(row.id for row in rows),
            input_ids=self.input_ids,
            position_ids=self.position_ids,
            tree=self.tree,
            branch=self.branch,
            is_tree=is_tree,
            trees=trees,
            source_index=torch.tensor([i for item in self.source for i in item[2]], dtype=torch.int64),
            target_ids=torch.tensor([i for item in self.source for i in item[3]], dtype=torch.int64),
            answer_index=torch.tensor([a for a, item in enumerate(self.source) for _ in item[3]], dtype=torch.int64),
            answer_rows=torch.tensor([item[0] for item in self.source]),
            answer_slots=torch.tensor([item[1] for item in self.source]),
            answer_tokens=torch.tensor([len(item[3]) for item in self.source]),
            ranks_BK=ranks_BK,
            mask_BK=mask_BK,
            strengths_BK=strength_grid(rows),
        )


def answer_grid(rows: Sequence[TokenRow]) -> tuple[Tensor, Tensor | None]:
    """Which answers exist, [B, K], and their ranks, [B, K], or None when the order of the answers says it all."""
    width = max(len(row.answers_ids) for row in rows)
    mask_BK = torch.tensor([[k < len(row.answers_ids) for k in range(width)] for row in rows])
    if all(list(row.ranks) == sorted(set(row.ranks)) for row in rows):
        return mask_BK, None
    return mask_BK, torch.tensor([[*row.ranks, *[10**6] * (width - len(row.ranks))] for row in rows])


def strength_grid(rows: Sequence[TokenRow]) -> Tensor | None:
    """The judge's strengths, [B, K] float32, or None where some row has none."""
    if any(len(row.strengths) != len(row.answers_ids) for row in rows):
        return None
    width = max(len(row.answers_ids) for row in rows)
    return torch.tensor([[*row.strengths, *[0.0] * (width - len(row.strengths))] for row in rows])


def steps(count: int, *, batch_size: int, epochs: int, seed: int) -> Iterator[list[int]]:
    """Row numbers of each optimizer step: every epoch a new shuffle, a last short step keeps every row."""
    for epoch in range(epochs):
        order = list(range(count))
        random.Random(f"{seed}/{epoch}").shuffle(order)
        for start in range(0, count, batch_size):
            yield order[start : start + batch_size]


def positions(rows: Sequence[TokenRow]) -> int:
    """What rows cost where each prompt is computed once and nothing is padded."""
    return sum(row.positions for row in rows)


def micro_batches(
    rows: Sequence[TokenRow], *, max_tokens: int, cost: Callable[[list[TokenRow]], float] = positions
) -> list[list[TokenRow]]:
    """Cut rows into parts of at most max_tokens positions, alike in length within a part.

    A row longer than the budget makes a part of its own.

    Args:
        cost: positions that a forward pass over these rows computes, padding included (LogpModel.cost,
            RewardModel.cost); a further row never lowers it.
    """
    order = sorted(rows, key=lambda row: (row.positions, row.id))
    parts: list[list[TokenRow]] = []
    start = 0
    while start < len(order):
        # Doubling, then halving: asking for the cost of every longer part would take as many looks at every row.
        few = 1
        while few < len(order) - start and cost(order[start : start + 2 * few]) <= max_tokens:
            few *= 2
        more = bisect(range(few + 1, 2 * few), max_tokens, key=lambda n, at=start: cost(order[at : at + n]))
        parts.append(order[start : start + few + more])
        start += few + more
    return parts
