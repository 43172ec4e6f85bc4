"""From a judge's replies to a ranking of K answers: pure functions, re-derivable at any time without asking again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.types import Row


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row as its judge sees it."""

    row: Row  # answers with ranks and strengths, best first; answers without a verdict are left out
    position_bias: tuple[float, ...]  # nats a pair, > 0 favours the first place; empty for pointwise judges
    circular: bool  # some three answers beat each other in a circle
    unjudged: int  # answers that had no valid reply


def log_odds(replies: Sequence[tuple[int, int | None, float]], count: int) -> tuple[np.ndarray, list[float]]:
    """[K, K] preference log-odds that i beats j, and the position biases, from (i, j, value) replies.

    Pointwise (j is None): difference of scores. Pairwise: half the difference of the two orders; a pair with one
    order only is not known (NaN), since half of it would be position.
    """
    odds_KK = np.full((count, count), np.nan)
    np.fill_diagonal(odds_KK, 0.0)
    scores = {i: value for i, j, value in replies if j is None}
    for i in scores:
        for j in scores:
            odds_KK[i, j] = scores[i] - scores[j]
    shown = {(i, j): value for i, j, value in replies if j is not None}
    biases = []
    for (i, j), value in shown.items():
        if (j, i) in shown:
            odds_KK[i, j] = (value - shown[j, i]) / 2
            if i < j:
                biases.append((value + shown[j, i]) / 2)
    return odds_KK, biases


def rank(row: Row, replies: Sequence[tuple[int, int | None, float]], *, tie_below: float) -> Judged:
    """Order a row's answers by their summed preference; neighbours at most tie_below apart (nats) are a tie.

    Strength is the mean log-odds against the other answers, itself included: for scores, the score minus its mean.
    """
    count = len(row.answers)
    odds_KK, biases = log_odds(replies, count)
    _same_text_ties(row, odds_KK)
    known = [i for i in range(count) if not np.isnan(odds_KK[i]).all() and (count == 1 or _compared(odds_KK, i))]
    odds = odds_KK[np.ix_(known, known)]
    strengths = np.nanmean(odds, axis=1) if known else np.array([])
    order = sorted(range(len(known)), key=lambda n: (-strengths[n], known[n]))
    ranks, place = [], 0
    for position, n in enumerate(order):
        gap = odds[order[position - 1], n] if position else np.inf
        gap = strengths[order[position - 1]] - strengths[n] if np.isnan(gap) else gap
        if position and abs(gap) > tie_below:
            place = position
        ranks.append(place)
    answers = tuple(
        replace(row.answers[known[n]], rank=ranks[position], strength=float(strengths[n]))
        for position, n in enumerate(order)
    )
    return Judged(
        row=replace(row, answers=answers),
        position_bias=tuple(biases),
        circular=_has_circle(odds, tie_below),
        unjudged=count - len(known),
    )


def all_tied(row: Row) -> bool:
    """True where the ranks tell nothing: no answer is above another."""
    return len({answer.rank for answer in row.answers}) < 2


def _same_text_ties(row: Row, odds_KK: np.ndarray) -> None:
    # Answers with one text tie without a call.
    for i, first in enumerate(row.answers):
        for j, second in enumerate(row.answers):
            if i != j and first.text == second.text:
                odds_KK[i, j] = 0.0


def _compared(odds_KK: np.ndarray, i: int) -> bool:
    return bool((~np.isnan(np.delete(odds_KK[i], i))).any())


def _has_circle(odds: np.ndarray, tie_below: float) -> bool:
    beats = (np.nan_to_num(odds) > tie_below).astype(int)
    return bool(np.trace(beats @ beats @ beats) > 0)
