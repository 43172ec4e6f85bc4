"""What judgements are worth, as pure functions of numbers: agreement, order effects, length, calibration.

Pairs of one row share answers, so every interval here counts rows and not pairs (a ratio estimate over clusters).
A label is 1 (the first answer is better), 0 (a tie) or -1. Legend: N things judged, J judges, C labels.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import NormalDist

import numpy as np

from rankwise.evaluation import Z95, Estimate, share
from rankwise.ranking import compare
from rankwise.types import Row
from rankwise.verdicts import Verdict, texts_digest

LABELS = (1, 0, -1)


@dataclass(frozen=True, kw_only=True, slots=True)
class Pair:
    """Two answers of one row as one judge sees them; nats, above 0 for the first of the two places."""

    row_id: str
    places: tuple[int, int]
    preference: float  # all replies together: the label's side
    orders: tuple[float, float] | None = None  # with places[0] shown first, with places[1] shown first; None: no orders
    longer: int = 0  # characters by which the first answer is longer
    about: str = ""  # name of the prompt and the two texts, whatever row and places they stand in
    side: int = 1  # 1: the first answer's text is the one that sorts first, -1: it is the other one's

    @property
    def bias(self) -> float:
        """Nats that being shown first is worth: half the sum of the log-odds of the answer shown first."""
        return (self.orders[0] - self.orders[1]) / 2


@dataclass(frozen=True, kw_only=True)
class Bin:
    """A step of a calibration curve."""

    confidence: float  # mean probability that the judge gave to its own choice
    right: float  # share of these choices that were right
    count: int
    rows: int  # that these choices are of


def label(preference: float, tie_below: float) -> int:
    """1, 0 or -1; at most tie_below apart (nats) is a tie."""
    return 0 if abs(preference) <= tie_below else int(math.copysign(1, preference))


def win(preference: float, tie_below: float) -> float:
    """1 won, 0.5 tied, 0 lost."""
    return (1 + label(preference, tie_below)) / 2


def pairs_of(row: Row, verdicts: Sequence[Verdict]) -> list[Pair]:
    """What one judge's verdicts say of each pair of a row's answers, as rankwise.ranking reads them.

    Of answers with one text the first stands for all, so that nothing counts twice. Pairs of which nothing is known are
    absent.
    """
    odds_KK = compare(row, verdicts).odds_KK
    shown: dict[tuple[int, ...], list[float]] = defaultdict(list)
    for verdict in verdicts:
        if len(verdict.shown) == 2 and verdict.values is not None:
            shown[tuple(verdict.shown)].append(verdict.values[0] - verdict.values[1])
    found = []
    for i, j in _different(row):
        if np.isnan(odds_KK[i, j]):
            continue
        both = (i, j) in shown and (j, i) in shown
        orders = (float(np.mean(shown[i, j])), -float(np.mean(shown[j, i]))) if both else None
        found.append(_pair(row, (i, j), float(odds_KK[i, j]), orders))
    return found


def ranked_pairs(row: Row) -> list[Pair]:
    """The pairs of a row whose answers have ranks, as if a judge had said so with one nat; ties 0.

    Of answers with one text the first stands for all.
    """
    rank = [answer.rank for answer in row.answers]
    known = [(i, j) for i, j in _different(row) if rank[i] is not None and rank[j] is not None]
    return [_pair(row, (i, j), float(np.sign(rank[j] - rank[i])), None) for i, j in known]


def _different(row: Row) -> Iterator[tuple[int, int]]:
    """The places of every two different texts, each text where it stands first."""
    texts = [answer.text for answer in row.answers]
    return itertools.combinations([place for place, text in enumerate(texts) if texts.index(text) == place], 2)


def _pair(row: Row, places: tuple[int, int], preference: float, orders: tuple[float, float] | None) -> Pair:
    first, second = (row.answers[place].text for place in places)
    return Pair(
        row_id=row.id,
        places=places,
        preference=preference,
        orders=orders,
        longer=len(first) - len(second),
        about=texts_digest(row.prompt, sorted((first, second))),
        side=1 if first < second else -1,
    )


# Means and shares over rows ------------------------------------------------------------------------------------------


def by_row(pairs: Iterable[tuple[str, float]]) -> list[tuple[float, int]]:
    """(row id, value) pairs as (sum, count) a row: what the interval functions take."""
    held: dict[str, list[float]] = defaultdict(list)
    for row_id, value in pairs:
        held[row_id].append(value)
    return [(sum(values), len(values)) for values in held.values()]


def clustered_mean(
    rows: Sequence[tuple[float, int]], *, span: tuple[float, float] = (-math.inf, math.inf), z: float = Z95
) -> Estimate:
    """Mean of all values and its normal interval, from (sum, count) a row.

    The variance is that of a ratio estimate with the rows as clusters (Cochran 1977, Sampling Techniques, eq. 9A.2
    without the finite-population factor); with one value a row it is the sample variance over n. One row tells nothing
    of other rows: its interval is the whole span.

    Args:
        span: least and greatest value that there can be.
    """
    sums, counts = np.array([s for s, _ in rows], dtype=np.float64), np.array([n for _, n in rows], dtype=np.float64)
    if not counts.sum():
        raise ValueError("a mean of no values was asked for")
    mean = float(sums.sum() / counts.sum())
    if len(rows) < 2:
        return Estimate(mean=mean, low=span[0], high=span[1])
    half = z * math.sqrt(((sums - mean * counts) ** 2).sum() * len(rows) / (len(rows) - 1)) / float(counts.sum())
    return Estimate(mean=mean, low=max(span[0], mean - half), high=min(span[1], mean + half))


def clustered_share(rows: Sequence[tuple[float, int]]) -> Estimate:
    """A share with Wilson's interval, from (hits, count) a row; as many independent hits as the rows' spread allows.

    With one pair a row it is Wilson's interval of that many pairs. One row tells nothing of other rows: [0, 1].
    """
    sums, counts = np.array([s for s, _ in rows], dtype=np.float64), np.array([n for _, n in rows], dtype=np.float64)
    total = float(counts.sum())
    if not total:
        raise ValueError("a share of nothing was asked for")
    p = float(sums.sum()) / total
    if len(rows) < 2:
        return Estimate(mean=p, low=0.0, high=1.0)
    variance = float(((sums - p * counts) ** 2).sum()) / total**2
    # Where all rows say the same, their spread tells nothing: each counts once.
    independent = min(total, p * (1 - p) / variance) if variance > 0 else float(len(rows))
    return share(p * independent, independent)


def paired_shift(before: Sequence[float], after: Sequence[float], *, together: int = 1) -> Estimate:
    """Mean of after - before over paired wins (0, 0.5, 1), with the adjusted Wald interval of Bonett and Price.

    It adds one row each way, so that a hundred rows without a change still leave an interval of a few points
    (Bonett and Price 2012, https://doi.org/10.3102/1076998611411915). The mean is that of the rows themselves.

    Args:
        together: how many such intervals shall hold at 95 % all at once (Bonferroni).
    """
    gaps = np.asarray(after, dtype=np.float64) - np.asarray(before, dtype=np.float64)
    if not len(gaps):
        raise ValueError("a shift of nothing was asked for")
    n = len(gaps)
    up, down = (gaps[gaps > 0].sum() + 1) / (n + 2), (-gaps[gaps < 0].sum() + 1) / (n + 2)
    half = NormalDist().inv_cdf(1 - 0.025 / together) * math.sqrt(max(0.0, up + down - (up - down) ** 2) / (n + 2))
    mean, centre = float(gaps.mean()), float(up - down)
    return Estimate(mean=mean, low=min(mean, max(-1.0, centre - half)), high=max(mean, min(1.0, centre + half)))


# Order and length ----------------------------------------------------------------------------------------------------


def position_bias(pairs: Sequence[Pair]) -> Estimate | None:
    """Nats that being shown first is worth, mean over the pairs asked in both orders; None where one row has them all.

    0 is no bias.
    """
    rows = by_row((pair.row_id, pair.bias) for pair in pairs if pair.orders)
    return clustered_mean(rows) if len(rows) > 1 else None


def first_share(pairs: Sequence[Pair], *, tie_below: float) -> Estimate:
    """Share of verdicts for the answer shown first, ties one half; each pair in both orders, so 0.5 is no bias."""
    shown = lambda pair: (win(pair.orders[0], tie_below) + win(-pair.orders[1], tie_below)) / 2
    return clustered_share(by_row((pair.row_id, shown(pair)) for pair in pairs if pair.orders))


def flip_rate(pairs: Sequence[Pair], *, tie_below: float) -> Estimate:
    """Share of pairs whose winner changes with the order; a tie in one order is no flip."""
    flipped = lambda pair: label(pair.orders[0], tie_below) * label(pair.orders[1], tie_below) < 0
    return clustered_share(by_row((pair.row_id, float(flipped(pair))) for pair in pairs if pair.orders))


def tie_rate(pairs: Sequence[Pair], *, tie_below: float) -> Estimate:
    """Share of pairs that are a tie."""
    return clustered_share(by_row((pair.row_id, float(not label(pair.preference, tie_below))) for pair in pairs))


def prefers_longer(pairs: Sequence[Pair], *, tie_below: float) -> Estimate | None:
    """Share of decided pairs of different length whose longer answer is preferred; None where there is no such pair."""
    decided = [pair for pair in pairs if pair.longer and label(pair.preference, tie_below)]
    rows = by_row((pair.row_id, float((pair.preference > 0) == (pair.longer > 0))) for pair in decided)
    return clustered_share(rows) if rows else None


def prefers_longer_by_quartile(pairs: Sequence[Pair], *, tie_below: float) -> list[tuple[int, int, Estimate]]:
    """(least, greatest difference in characters, share for the longer) of each quarter of the decided pairs."""
    decided = [pair for pair in pairs if pair.longer and label(pair.preference, tie_below)]
    decided.sort(key=lambda pair: abs(pair.longer))
    parts = [part for part in np.array_split(np.arange(len(decided)), 4) if len(part)]
    quarters = [[decided[n] for n in part] for part in parts]
    return [(abs(q[0].longer), abs(q[-1].longer), prefers_longer(q, tie_below=tie_below)) for q in quarters]


# Agreement -----------------------------------------------------------------------------------------------------------


def confusion(judge: Sequence[int], gold: Sequence[int]) -> np.ndarray:
    """[C, C] counts: row the judge's label, column gold's, in the order of LABELS."""
    table_CC = np.zeros((len(LABELS), len(LABELS)), dtype=np.int64)
    for ours, theirs in zip(judge, gold):
        table_CC[LABELS.index(ours), LABELS.index(theirs)] += 1
    return table_CC


def either_way(table_CC: np.ndarray) -> np.ndarray:
    """The table as if each pair had been written down either way round, by half a count each.

    Which of two answers is called the first means nothing; a table whose better answers all come first would make
    agreement by chance certain.
    """
    return (table_CC + table_CC[::-1, ::-1]) / 2


def cohen_kappa(table_CC: np.ndarray) -> Estimate:
    """Agreement of two judges beyond chance, from their [C, C] table of counts.

    Cohen 1960; the interval is of Fleiss, Cohen and Everitt 1969 (https://doi.org/10.1037/h0028106), for things
    judged independently. 0 where both give one and the same label to everything: nothing was told apart.
    """
    n = float(table_CC.sum())
    p_CC = np.asarray(table_CC, dtype=np.float64) / n
    row_C, column_C = p_CC.sum(axis=1), p_CC.sum(axis=0)
    observed, expected = float(np.trace(p_CC)), float(row_C @ column_C)
    if expected >= 1:
        return Estimate(mean=0.0, low=-1.0, high=1.0)
    kappa = (observed - expected) / (1 - expected)
    diagonal = float((np.diag(p_CC) * (1 - (row_C + column_C) * (1 - kappa)) ** 2).sum())
    sums_CC = (column_C[:, None] + row_C[None, :]) ** 2
    beside = (1 - kappa) ** 2 * float((p_CC * sums_CC)[~np.eye(len(p_CC), dtype=bool)].sum())
    variance = (diagonal + beside - (kappa - expected * (1 - kappa)) ** 2) / ((1 - expected) ** 2 * n)
    half = Z95 * math.sqrt(max(0.0, variance))
    return Estimate(mean=kappa, low=max(-1.0, kappa - half), high=min(1.0, kappa + half))


def clustered_kappa(tables_RCC: np.ndarray) -> Estimate:
    """Cohen's kappa of R rows, from each row's [C, C] table of counts: that of the sum, its interval a jackknife.

    For rows whose pairs share answers; cohen_kappa's interval takes every pair as judged independently of the others.
    """
    total_CC = tables_RCC.sum(axis=0)
    kappa = cohen_kappa(total_CC).mean
    alone = len(tables_RCC) < 2
    return _jackknife(kappa, [kappa] if alone else [cohen_kappa(total_CC - one_CC).mean for one_CC in tables_RCC])


def _jackknife(value: float, without_R: Sequence[float]) -> Estimate:
    """A value in [-1, 1] and its interval, from the values with one row left out; one row tells nothing of others."""
    count, left = len(without_R), np.asarray(without_R, dtype=np.float64)
    if count < 2:
        return Estimate(mean=value, low=-1.0, high=1.0)
    half = Z95 * math.sqrt((count - 1) / count * float(((left - left.mean()) ** 2).sum()))
    return Estimate(mean=value, low=max(-1.0, value - half), high=min(1.0, value + half))


def krippendorff_alpha(labels_NJ: Sequence[Sequence[int | None]], rows: Sequence[str] | None = None) -> Estimate | None:
    """Nominal alpha of J judges, some of whom may not have judged a thing (None); None where nothing can be compared.

    1 minus observed over expected disagreement (Krippendorff 2011, Computing Krippendorff's Alpha-Reliability); 0 where
    every label is the same. The interval is a jackknife over rows.

    Args:
        rows: the row of each thing; None: each is of its own.
    """
    counts_NC = np.array([[list(labels).count(c) for c in LABELS] for labels in labels_NJ], dtype=np.float64)
    names = np.unique(np.arange(len(counts_NC)) if rows is None else np.asarray(rows), return_inverse=True)[1]
    twice = counts_NC.sum(axis=1) > 1 if len(counts_NC) else np.zeros(0, dtype=bool)
    if not twice.any():
        return None
    counts_NC, names = counts_NC[twice], np.unique(names[twice], return_inverse=True)[1]
    judges_N = counts_NC.sum(axis=1)
    observed_R = np.bincount(names, (judges_N**2 - (counts_NC**2).sum(axis=1)) / (judges_N - 1))
    total_RC = np.stack([np.bincount(names, column) for column in counts_NC.T], axis=1)
    alpha = float(_alpha(observed_R.sum(), total_RC.sum(axis=0)))
    return _jackknife(alpha, _alpha(observed_R.sum() - observed_R, total_RC.sum(axis=0) - total_RC))


def _alpha(observed: np.ndarray, total_C: np.ndarray) -> np.ndarray:
    n = total_C.sum(axis=-1)
    different = n**2 - (total_C**2).sum(axis=-1)
    return np.where(different > 0, 1 - observed * (n - 1) / np.where(different > 0, different, 1), 0.0)


# Calibration ---------------------------------------------------------------------------------------------------------


def calibration(
    preferences: Sequence[float], gold: Sequence[int], rows: Sequence[str] | None = None, *, bins: int = 10
) -> list[Bin]:
    """How often the judge is right when it is that sure: sigmoid of its preference's size, in equal steps of [0.5, 1].

    Pairs that gold calls a tie have no right side and are left out.

    Args:
        rows: the row of each pair; None: each is of its own.
    """
    decided = [(p, g) for p, g in zip(preferences, gold) if g]
    names = np.array([row for row, g in zip(range(len(gold)) if rows is None else rows, gold) if g])
    confidence = np.array([1 / (1 + math.exp(-min(abs(p), 700.0))) for p, _ in decided])
    right = np.array([win(p * g, 0.0) for p, g in decided])  # without a preference it is right half the time
    # Steps are (edge, next edge], the first one closed: as scikit-learn cuts them.
    place = np.clip(np.ceil((confidence - 0.5) * 2 * bins) - 1, 0, bins - 1).astype(int) if decided else confidence
    return [
        Bin(
            confidence=float(confidence[here].mean()),
            right=float(right[here].mean()),
            count=int(here.sum()),
            rows=len(set(names[here].tolist())),
        )
        for n in range(bins)
        if (here := place == n).any()
    ]


def calibration_error(curve: Sequence[Bin]) -> float:
    """Expected calibration error: mean distance of confidence from the share that was right, weighted by count."""
    return sum(b.count * abs(b.confidence - b.right) for b in curve) / sum(b.count for b in curve)
