"""From verdicts to a ranking of K answers: pure functions, re-derivable at any time without asking again.

What is not known stays unknown: a pair seen in one order only, a list that lacks one of its rotations, a reply that
could not be read. None of them becomes a tie.

Letters: K answers of a row, M different texts among them (answers with one text are one thing, and tie).
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from rankwise.strengths import circular_triads, components, most_circular_triads, of_log_odds
from rankwise.types import Row
from rankwise.verdicts import Verdict

ROUNDING = 1e-9  # nats; strengths that differ by less are equal


@dataclass(frozen=True, kw_only=True)
class Compared:
    """What verdicts say about a row's answers, pair by pair."""

    odds_KK: np.ndarray  # log-odds that i is better than j, nats; NaN: not known; 0 where the texts are the same
    replies_KK: np.ndarray  # valid replies behind each; scores are of one answer, and count for no pair
    position_bias: tuple[float, ...]  # nats a pair and judge, > 0 favours the first place; of pairs with both orders


@dataclass(frozen=True, kw_only=True)
class Judged:
    """A row as its judges see it."""

    row: Row  # answers with ranks and strengths, best first; answers that nothing joins to the others are left out
    position_bias: tuple[float, ...]  # as in Compared
    invalid: int  # replies that could not be read; what nobody answered is none
    unjudged: int  # answers left out
    circular_triads: int  # threes that beat each other in a circle
    most_circular_triads: int  # as many as there could be; 0 where not every pair is known
    smallest_gap: float | None  # strength between two neighbours of the order, nats; None: fewer than two answers


def compare(row: Row, verdicts: Sequence[Verdict]) -> Compared:
    """Preferences of a judge, or of a panel: then the log-odds of the mean probability of those who know the pair.

    Scores: their difference. Pairs: half the difference of the two orders, which takes the liking for a place out.
    Lists: the mean difference over all rotations of the list, in which each answer stands once in each place; where a
    pair was also asked by itself, that counts. Several draws of one question count as their mean.
    """
    texts, seat_K = _seats(row)
    by_judge: dict[str, dict[tuple[int, ...], dict[int, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    for verdict in verdicts:
        shown = tuple(seat_K[place] for place in verdict.shown)
        if verdict.values is not None and len(set(shown)) == len(shown):
            by_judge[verdict.judge][shown][verdict.sample] = np.array(verdict.values)
    views = [_view(draws, len(texts)) for draws in by_judge.values()]
    odds_JMM = np.array([odds_MM for odds_MM, _, _ in views]).reshape(len(views), len(texts), len(texts))
    odds_MM = _panel(odds_JMM)
    np.fill_diagonal(odds_MM, 0.0)
    replies_MM = sum((replies_MM for _, replies_MM, _ in views), np.zeros(odds_MM.shape, dtype=int))
    every = np.ix_(seat_K, seat_K)
    biases = tuple(bias for _, _, mine in views for bias in mine)
    return Compared(odds_KK=odds_MM[every], replies_KK=replies_MM[every], position_bias=biases)


def rank(row: Row, verdicts: Sequence[Verdict], *, tie_below: float) -> Judged:
    """Order a row's answers by their strengths, which is the order of the row sums of p_ij where all pairs are known.

    Two answers tie where one is preferred to the other by at most tie_below (nats), or where their strengths are no
    further apart: three that beat each other in a circle are told apart by nothing but their place. An answer shares
    the rank above where it ties with all that have it: a chain of near neighbours does not tie its ends.
    """
    compared, (texts, seat_K) = compare(row, verdicts), _seats(row)
    kept = _joined(compared.odds_KK, texts, seat_K)
    odds, replies = (table[np.ix_(kept, kept)] for table in (compared.odds_KK, compared.replies_KK))
    strength_of, error_of = _strengths(odds, replies, kept, [texts[seat] for seat in seat_K])
    if not all(len(verdict.shown) > 1 for verdict in verdicts):
        error_of = {}  # scores come without a number of comparisons
    order = sorted(strength_of, key=lambda k: (_rounded(strength_of[k]), k))
    gaps = [max(0.0, strength_of[above] - strength_of[below]) for above, below in itertools.pairwise(order)]
    answers = []
    for group in _tie_groups(order, strength_of, compared.odds_KK, tie_below):
        place = len(answers)
        answers += [
            replace(row.answers[k], rank=place, strength=strength_of[k], strength_se=error_of.get(k)) for k in group
        ]
    return Judged(
        row=replace(row, answers=tuple(answers)),
        position_bias=compared.position_bias,
        invalid=sum(verdict.values is None and verdict.answered for verdict in verdicts),
        unjudged=len(row.answers) - len(answers),
        circular_triads=circular_triads(odds, tie_below=tie_below),
        most_circular_triads=0 if np.isnan(odds).any() else most_circular_triads(len(kept)),
        smallest_gap=min(gaps, default=None),
    )


def all_tied(row: Row) -> bool:
    """True where the ranks tell nothing: no answer is above another."""
    return len({answer.rank for answer in row.answers}) < 2


def _seats(row: Row) -> tuple[list[int], list[int]]:
    """The place at which each of the M texts first stands; and which of the M each of the K answers has."""
    first = {}
    for place, answer in enumerate(row.answers):
        first.setdefault(answer.text, place)
    number = {text: seat for seat, text in enumerate(first)}
    return list(first.values()), [number[answer.text] for answer in row.answers]


def _view(draws: Mapping[tuple[int, ...], Mapping[int, np.ndarray]], count: int):
    """One judge's [M, M] log-odds, replies behind them, and position biases, from its draws by what was shown."""
    odds_MM, replies_MM = np.full((count, count), np.nan), np.zeros((count, count), dtype=int)
    mean = {shown: np.mean(list(mine.values()), axis=0) for shown, mine in draws.items()}
    _add_scores(odds_MM, mean)
    _add_lists(odds_MM, replies_MM, mean, draws)
    biases = []
    for i, j in (shown for shown in mean if len(shown) == 2 and shown[0] < shown[1]):
        if (j, i) in mean:
            forth, back = (float(mean[shown][0] - mean[shown][1]) for shown in ((i, j), (j, i)))
            odds_MM[i, j], odds_MM[j, i] = (forth - back) / 2, (back - forth) / 2
            replies_MM[i, j] = replies_MM[j, i] = len(draws[i, j]) + len(draws[j, i])
            biases.append((forth + back) / 2)
    return odds_MM, replies_MM, biases


def _add_scores(odds_MM: np.ndarray, mean: Mapping[tuple[int, ...], np.ndarray]) -> None:
    scores = {shown[0]: float(values[0]) for shown, values in mean.items() if len(shown) == 1}
    for i, j in itertools.permutations(scores, 2):
        odds_MM[i, j] = scores[i] - scores[j]


def _add_lists(odds_MM: np.ndarray, replies_MM: np.ndarray, mean: Mapping, draws: Mapping) -> None:
    """Lists of which every rotation has a reply; an answer's place in them cancels."""
    found: dict[tuple[int, int], list[float]] = defaultdict(list)
    for shown in (s for s in mean if len(s) > 2 and s[0] == min(s)):
        turns = [shown[start:] + shown[:start] for start in range(len(shown))]
        if not all(turn in mean for turn in turns):
            continue
        worth = {seat: np.mean([mean[turn][turn.index(seat)] for turn in turns]) for seat in shown}
        for i, j in itertools.permutations(shown, 2):
            found[i, j].append(float(worth[i] - worth[j]))
            replies_MM[i, j] += sum(len(draws[turn]) for turn in turns)
    for pair, differences in found.items():
        odds_MM[pair] = sum(differences) / len(differences)


def _panel(odds_JMM: np.ndarray) -> np.ndarray:
    """logit of the mean of σ(log-odds) over the judges who know a pair, [M, M]; of one judge, its own log-odds."""
    known_JMM = ~np.isnan(odds_JMM)
    several_MM = np.zeros(odds_JMM.shape[1:])
    for sign in (1, -1):
        # log Σ σ(±x): the mean itself would be 1 to the last digit long before its logit is infinite
        log_p_JMM = -np.logaddexp(0, -sign * np.where(known_JMM, odds_JMM, 0.0))
        several_MM += sign * np.logaddexp.reduce(np.where(known_JMM, log_p_JMM, -1e9), axis=0, initial=-1e9)
    count_MM = known_JMM.sum(axis=0)
    return np.where(count_MM == 0, np.nan, np.where(count_MM == 1, np.nansum(odds_JMM, axis=0), several_MM))


def _joined(odds_KK: np.ndarray, texts: Sequence[int], seat_K: Sequence[int]) -> list[int]:
    """Where the texts first stand that are ranked: the largest group that comparisons join, or none.

    One answer of several that nothing was compared with is no ranking; an answer that is alone in its row is one.
    """
    groups = components(~np.isnan(odds_KK[np.ix_(texts, texts)]))
    answers = lambda group: sum(seat in group for seat in seat_K)
    largest = max(groups, key=answers, default=[])
    return [texts[seat] for seat in largest] if answers(largest) > 1 or len(seat_K) == 1 else []


def _strengths(
    odds: np.ndarray, replies: np.ndarray, kept: Sequence[int], first_K: Sequence[int]
) -> tuple[dict[int, float], dict[int, float]]:
    """Strength and standard error by place, of each answer whose text is kept; first_K: where its text first stands."""
    if not kept:
        return {}, {}
    fit = of_log_odds(odds, replies)
    at = {k: kept.index(first) for k, first in enumerate(first_K) if first in kept}
    return tuple({k: float(values[n]) for k, n in at.items()} for values in (fit.strengths_M, fit.errors_M))


def _tie_groups(
    order: Sequence[int], strength_of: Mapping[int, float], odds_KK: np.ndarray, tie_below: float
) -> list[list[int]]:
    """The order cut into groups of one rank each; answers of equal strength stay together, or their place would cut."""

    def tie(a: int, b: int) -> bool:
        near = abs(strength_of[a] - strength_of[b]) <= max(tie_below, ROUNDING)
        return near or bool(abs(odds_KK[a, b]) <= tie_below)

    groups: list[list[int]] = []
    for _, equal in itertools.groupby(order, key=lambda k: _rounded(strength_of[k])):
        block = list(equal)
        if groups and all(tie(a, b) for a in groups[-1] for b in block):
            groups[-1] += block
        else:
            groups.append(block)
    return groups


def _rounded(strength: float) -> float:
    """A key that sorts the strongest first, without the last digits, which depend on the order of sums."""
    return -round(strength, 9)
