"""What the data doctor looks for: one table of rows in, a count and the first row ids of each finding out.

Every check of tokens sees them through rankwise.rendering: they are the tokens of training. Findings count
rows, except length_bias, which counts pairs.
"""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import TYPE_CHECKING

from rankwise.rows import RowTable
from rankwise.seen import Seen
from rankwise.types import Answer, Row, show_prompt
from tasks.tables import keys

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankwise.rendering import Renderer, TokenRow

Rows = RowTable | Sequence[Row]

SHOWN = 10  # row ids named with a finding

# Markers of the common chat templates and transcripts, whatever this tokenizer's own are.
CONTROL = ("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|start_header_id|>", "<start_of_turn>")
CONTROL += ("<end_of_turn>", "[INST]", "[/INST]", "<<SYS>>", "<s>", "</s>", "\n\nHuman:", "\n\nAssistant:")


@dataclass(frozen=True, kw_only=True)
class Limits:
    """Lengths, in tokens; 0: none."""

    prompt: int
    answer: int
    context: int  # positions of the model


@dataclass(frozen=True, kw_only=True)
class Case:
    """One row as the checks see it: its text, its whole tokens, and how many of them the limits keep."""

    row: Row
    tokens: TokenRow  # rendered without limits
    limits: Limits

    @property
    def kept_prompt_tokens(self) -> int:
        return min(len(self.tokens.prompt_ids), self.limits.prompt or len(self.tokens.prompt_ids))

    @property
    def kept_answers(self) -> list[tuple[int, ...]]:
        return [ids[: self.limits.answer or None] for ids in self.tokens.answers_ids]


@dataclass(kw_only=True)
class Finding:
    """How often something was found in one table."""

    of: int  # rows looked at (length_bias: pairs)
    ids: list[str] = field(default_factory=list)  # of the first rows found
    count: float = 0  # rows, or pairs (a tie in length is half a pair)
    interval: tuple[float, float] | None = None  # 95 % interval of the share, where it is an estimate

    def note(self, row: Row) -> None:
        """A row that has it."""
        self.count += 1
        if len(self.ids) < SHOWN:
            self.ids.append(row.id)

    @property
    def share(self) -> float:
        return self.count / self.of if self.of else 0.0

    @property
    def sure_share(self) -> float:
        """The share, or the least that it may be where it is an estimate."""
        return self.interval[0] if self.interval else self.share

    def as_json(self) -> dict:
        value = {"count": self.count, "of": self.of, "share": round(self.share, 6), "first_ids": self.ids}
        if self.interval:
            value |= {"low": round(self.interval[0], 4), "high": round(self.interval[1], 4)}
        return value


class TokenizerFacts:
    """What the checks need to know of a tokenizer; it is asked once."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.bos, self.eos = tokenizer.bos_token_id, tokenizer.eos_token_id
        opened = tokenizer("a")["input_ids"]
        self.adds_bos = self.bos is not None and opened[:1] == [self.bos]
        markers = sorted({*CONTROL, *tokenizer.all_special_tokens}, key=len, reverse=True)
        self.control = re.compile("|".join(map(re.escape, markers)))


def examine(rows: Rows, renderer: Renderer, limits: Limits, *, tick: Callable[[], None]) -> dict[str, Finding]:
    """All findings of one table but those that compare tables."""
    facts = TokenizerFacts(renderer.tokenizer)
    found = {name: Finding(of=len(rows)) for name in (*ROW_CHECKS, "duplicate_prompts")}
    longer: Counter[tuple[float, int]] = Counter()
    prompts, orders = Seen(), _Orders()
    for row in rows:
        case = Case(row=row, tokens=renderer.render(row), limits=limits)
        for name, check in ROW_CHECKS.items():
            if check(case, facts):
                found[name].note(row)
        # Texts without a prompt are no duplicates of each other.
        if (prompt := show_prompt(row.prompt).strip()) and not prompts.add(prompt):
            found["duplicate_prompts"].note(row)
        if pairs := list(_strict_pairs(row.answers)):
            longer[sum(_longer(case, *pair) for pair in pairs), len(pairs)] += 1
            orders.add(row, pairs)
        tick()
    return {**found, "contradictions": orders.contradictions(len(rows)), "length_bias": length_bias(longer)}


def shared_with_eval(rows: Rows, evaluation: Iterable[Row]) -> Finding:
    """Rows that train and that share a prompt or a group with a held-out row."""
    held, found = Seen(key for row in evaluation for key in keys(row)), Finding(of=len(rows))
    for row in rows:
        if any(key in held for key in keys(row)):
            found.note(row)
    return found


def length_bias(rows: Mapping[tuple[float, int], int]) -> Finding:
    """Share of pairs whose better answer is longer in tokens, from how many rows have (longer pairs, pairs).

    The interval is Wilson's, with as many independent pairs as the rows' spread allows: pairs of one ranking share
    answers, so ten of them say less than ten rows do.
    """
    count, pairs = (sum(times * one[which] for one, times in rows.items()) for which in (0, 1))
    if not pairs:
        return Finding(of=0)
    share = count / pairs
    variance = sum(times * (hits - share * n) ** 2 for (hits, n), times in rows.items()) / pairs**2
    independent = min(pairs, share * (1 - share) / variance) if variance else sum(rows.values())
    z2 = 1.96**2
    middle = (share + z2 / (2 * independent)) / (1 + z2 / independent)
    half = math.sqrt(z2 * share * (1 - share) / independent + z2**2 / (4 * independent**2)) / (1 + z2 / independent)
    return Finding(of=pairs, count=count, interval=(max(0.0, middle - half), min(1.0, middle + half)))


# Checks of one row ---------------------------------------------------------------------------------------------------


def _double_bos(case: Case, facts: TokenizerFacts) -> bool:
    return facts.bos is not None and case.tokens.prompt_ids[:2] == (facts.bos, facts.bos)


def _missing_bos(case: Case, facts: TokenizerFacts) -> bool:
    return facts.adds_bos and case.tokens.prompt_ids[:1] != (facts.bos,)


def _double_eos(case: Case, facts: TokenizerFacts) -> bool:
    return any(ids.count(facts.eos) > 1 for ids in case.tokens.answers_ids)


def _missing_eos(case: Case, facts: TokenizerFacts) -> bool:
    sampled = (answer.finish_reason == "length" for answer in case.row.answers)
    return any(facts.eos not in ids and not cut for ids, cut in zip(case.tokens.answers_ids, sampled))


def _identical(texts: Sequence) -> bool:
    return len(set(texts)) < len(texts)


def _identical_after_cut(case: Case, _: TokenizerFacts) -> bool:
    kept = case.kept_answers
    return kept != list(case.tokens.answers_ids) and _identical(kept) and not _identical(case.tokens.answers_ids)


def _row_over_context(case: Case, _: TokenizerFacts) -> bool:
    if not case.limits.context:
        return False
    return case.kept_prompt_tokens + max(map(len, case.kept_answers), default=0) > case.limits.context


def _prompt_over_context(case: Case, _: TokenizerFacts) -> bool:
    # A prompt that fills the context leaves no position for an answer.
    return 0 < case.limits.context <= case.kept_prompt_tokens


ROW_CHECKS: dict[str, Callable[[Case, TokenizerFacts], bool]] = {
    "boundary_merges": lambda case, _: case.tokens.boundary_merges > 0,
    "double_bos": _double_bos,
    "missing_bos": _missing_bos,
    "double_eos": _double_eos,
    "missing_eos": _missing_eos,
    "control_tokens": lambda case, facts: any(facts.control.search(answer.text) for answer in case.row.answers),
    "empty_answers": lambda case, _: any(not answer.text.strip() for answer in case.row.answers),
    "identical_answers": lambda case, _: _identical([answer.text.strip() for answer in case.row.answers]),
    "identical_after_cut": _identical_after_cut,
    "cut_prompts": lambda case, _: case.kept_prompt_tokens < len(case.tokens.prompt_ids),
    "cut_answers": lambda case, _: case.kept_answers != list(case.tokens.answers_ids),
    "prompt_over_context": _prompt_over_context,
    "row_over_context": _row_over_context,
}


# Checks of a table ---------------------------------------------------------------------------------------------------


class _Orders:
    """Rows that order two answers of one prompt against another row. Ids of such rows alone are kept in memory."""

    def __init__(self) -> None:
        self._first, self._against = Seen(), set[str]()

    def add(self, row: Row, pairs: Sequence[tuple[int, int]]) -> None:
        """Args: pairs: places of two answers, the better one first."""
        prompt = [[turn.role, turn.content] for turn in row.prompt]
        for better, worse in pairs:
            one, other = row.answers[better].text.strip(), row.answers[worse].text.strip()
            if one == other:
                continue
            self._first.add(json.dumps((prompt, one, other)), row.id)
            against = self._first.note(json.dumps((prompt, other, one)))
            if against is not None and against != row.id:
                self._against |= {row.id, against}

    def contradictions(self, rows: int) -> Finding:
        return Finding(of=rows, ids=sorted(self._against)[:SHOWN], count=len(self._against))


def _strict_pairs(answers: Sequence[Answer]) -> Iterator[tuple[int, int]]:
    """(better, worse) indices of every pair of answers that are not tied."""
    for i, j in combinations(range(len(answers)), 2):
        one, other = answers[i].rank, answers[j].rank
        if one is not None and other is not None and one != other:
            yield (i, j) if one < other else (j, i)


def _longer(case: Case, better: int, worse: int) -> float:
    one, other = len(case.tokens.answers_ids[better]), len(case.tokens.answers_ids[worse])
    return 0.5 if one == other else float(one > other)
