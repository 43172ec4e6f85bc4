"""What of the ranked rows is trained on: all of it, or a part, to ask how much a ranking helps.

A part of the prompts, the first answers of each, or the best and the worst alone; and labels whose top is wrong at a
known rate. Only training rows are touched: whatever was selected, held-out rows measure the same.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, replace

from rankwise.fingerprint import digest
from rankwise.types import Answer, Row
from tasks.params import param


@dataclass(frozen=True, kw_only=True)
class SelectParams:
    """A part of the training rows; the defaults take them whole."""

    prompts: float = param(1.0, "share of the training prompts, drawn by a hash of their names", gt=0, le=1)
    answers: int = param(0, "so many answers of each prompt, those drawn first; 0: all", ge=0)
    ends: bool = param(False, "the best and the worst answer alone; what lies between is not trained on")
    top_noise: float = param(0.0, "probability that the best answer and another one change places", ge=0, le=1)


def first_answers(row: Row, select: SelectParams) -> Row:
    """A row of rollouts with the answers that were drawn first."""
    limited = select.answers and row.meta["split"] == "train"
    return replace(row, answers=row.answers[: select.answers]) if limited else row


def selected(row: Row, select: SelectParams) -> Row | None:
    """A ranked row, best answer first, as it is to be trained on; None: it is left out."""
    if row.meta["split"] != "train":
        return row
    if _chance("prompts", row) >= select.prompts:
        return None
    row = replace(row, answers=_noisy(row, select.top_noise))
    return replace(row, answers=(row.answers[0], row.answers[-1])) if select.ends else row


def _noisy(row: Row, probability: float) -> tuple[Answer, ...]:
    """The answers, the best and a random lower one having changed places with the given probability."""
    lower = [place for place, answer in enumerate(row.answers) if answer.rank > row.answers[0].rank]
    if not lower or _chance("noise", row) >= probability:
        return row.answers
    other = random.Random(digest("noise", row.id)).choice(lower)
    seats = list(row.answers)
    seats[0], seats[other] = (_in_place_of(seats[b], seats[a]) for a, b in ((0, other), (other, 0)))
    return tuple(seats)


def _in_place_of(answer: Answer, other: Answer) -> Answer:
    return replace(answer, rank=other.rank, strength=other.strength, strength_se=other.strength_se)


def _chance(what: str, row: Row) -> float:
    """A number in [0, 1) of the row's own, another one for each use."""
    return int(digest(what, row.id)[:12], 16) / 16**12
