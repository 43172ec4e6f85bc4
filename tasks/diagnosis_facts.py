"""What the rules of a diagnosis look at, and what they give: numbers of rows in, sentences out."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from rankwise.diagnosis import Summary
    from tasks.diagnosis import Diagnosis

ENOUGH_ROWS = 20  # rows: with fewer an accuracy is known to no better than ±0.2
NEAR_TIE = 1.1  # nats (log 3): the judge itself gives one label in four at least a chance to be wrong

Kind = Literal["said", "watch", "concern"]  # a fact; something to know; a reason not to call the fall normal


@dataclass(frozen=True, kw_only=True)
class Facts:
    """The numbers that the rules look at."""

    split: str  # "held-out" | "training": whose rows these are
    whole: Summary  # of these rows
    training: Summary | None  # of the training rows, where others are judged by
    per_token: bool  # whether the loss compares log-ratios a token
    longer: Mapping[str, Summary]  # rows whose best answer is "shorter", "longer" than the worst
    by_gap: Sequence[Summary]  # rows by the judge's gap, the smallest first
    near_ties: float | None  # share of training rows with a gap below NEAR_TIE; None where no gap is known
    training_rows: int
    contradicted: int  # training rows whose best answer the policy holds below the worst
    sure: int | None  # of these, with a gap of at least the median; None where no gap is known
    flips: Mapping[str, int]  # order by likelihood: kept right, mended, broken, kept wrong


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One sentence or two, and what to do where something should be done."""

    kind: Kind
    text: str
    todo: tuple[str, ...] = ()


def facts_of(found: Diagnosis) -> Facts:
    """What the rules need of a diagnosis."""
    from rankwise.diagnosis import flips, summary

    training = found.of("train")
    gaps = [row.gap for row in training if row.gap is not None]
    sides = {-1: "shorter", 0: "alike", 1: "longer"}
    return Facts(
        split="held-out" if found.evidence == "held_out" else "training",
        whole=summary(found.shown),
        training=summary(training) if training and found.evidence == "held_out" else None,
        per_token=found.per_token,
        longer={sides[(one.low > 0) - (one.high < 0)]: one.found for one in found.by_longer},
        by_gap=[one.found for one in found.by_gap],
        near_ties=sum(gap < NEAR_TIE for gap in gaps) / len(gaps) if gaps else None,
        training_rows=len(training),
        contradicted=len(found.contradicted),
        sure=len(found.sure) if gaps else None,
        flips=flips(found.shown, per_token=found.per_token),
    )


def share(value: float) -> str:
    return f"{100 * value:.0f} %"


def signed(value: float, digits: int) -> str:
    """A number with its sign, as print sets it."""
    return f"{value:+.{digits}f}".replace("-", "−")
