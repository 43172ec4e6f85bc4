"""What a policy is worth: means with confidence intervals, win rates, KL to the reference, diversity, E1.

All functions take plain numbers, one a prompt unless said otherwise, and know nothing of models.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rankwise.seen import Distinct

Z95 = 1.959963984540054  # two-sided 95 % of a normal
# the same of Student's t, by degrees of freedom; beyond nine that of nine, which is a little too wide
T95 = (0.0, 12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622)


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """A mean and its 95 % confidence interval."""

    mean: float
    low: float
    high: float

    def as_dict(self) -> dict[str, float]:
        return asdict(self)


def mean(values: Sequence[float]) -> Estimate:
    """Mean over prompts, normal interval; raises ValueError on no values."""
    array = np.asarray(values, dtype=np.float64)
    if not len(array):
        raise ValueError("a mean of no values was asked for")
    half = Z95 * array.std(ddof=1) / math.sqrt(len(array)) if len(array) > 1 else 0.0
    centre = float(array.mean())
    return Estimate(mean=centre, low=centre - half, high=centre + half)


def share(successes: float, count: int) -> Estimate:
    """A proportion with Wilson's score interval, which stays inside [0, 1]; a tie may count one half."""
    if count <= 0:
        raise ValueError("a share of nothing was asked for")
    p, z2 = successes / count, Z95**2
    centre = (p + z2 / (2 * count)) / (1 + z2 / count)
    half = Z95 * math.sqrt(p * (1 - p) / count + z2 / (4 * count**2)) / (1 + z2 / count)
    return Estimate(mean=p, low=max(0.0, centre - half), high=min(1.0, centre + half))


def over_seeds(estimates: Sequence[Estimate]) -> Estimate:
    """The mean of several runs' estimates of one quantity, with an interval for the mean over all runs there could be.

    Student's t from the variance between runs, which holds their own sampling error; that of few runs is small by luck
    at times, so the interval is never narrower than sampling error alone would make it. Raises ValueError on none.
    """
    means = np.asarray([one.mean for one in estimates], dtype=np.float64)
    if not len(means):
        raise ValueError("a mean of no runs was asked for")
    within = float(np.mean([((one.high - one.low) / 2) ** 2 for one in estimates]))
    between = float(means.var(ddof=1)) if len(means) > 1 else 0.0
    half = math.sqrt(max(within, T95[min(len(means) - 1, 9)] ** 2 * between) / len(means))
    return Estimate(mean=float(means.mean()), low=float(means.mean()) - half, high=float(means.mean()) + half)


def win_rate(policy: Sequence[float], reference: Sequence[float], *, tie_below: float = 0.0) -> Estimate:
    """Share of prompts where the policy's answer scores higher; at most tie_below apart counts one half."""
    gaps = np.asarray(policy, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    wins = float((gaps > tie_below).sum() + 0.5 * (np.abs(gaps) <= tie_below).sum())
    return share(wins, len(gaps))


def length_controlled_win_rate(
    policy: Sequence[float], reference: Sequence[float], policy_words: Sequence[int], reference_words: Sequence[int]
) -> float:
    """Win rate at equal length: the intercept of a logistic fit of wins on the standardised length difference.

    Dubois et al. 2024, "Length-Controlled AlpacaEval" (https://arxiv.org/abs/2404.04475), without the model and
    instruction terms, which one pair of models does not need.
    """
    gaps = np.asarray(policy, dtype=np.float64) - np.asarray(reference, dtype=np.float64)
    won = (gaps > 0) + 0.5 * (gaps == 0)
    longer = np.asarray(policy_words, dtype=np.float64) - np.asarray(reference_words, dtype=np.float64)
    x = np.tanh(longer / (longer.std() or 1.0))
    design = np.stack([np.ones_like(x), x], axis=1)
    weights = np.zeros(2)
    ridge = 1e-3 * np.eye(2)  # keeps the fit finite when one side wins everything
    for _ in range(50):
        p = 1 / (1 + np.exp(-design @ weights))
        gradient = design.T @ (won - p) - ridge @ weights
        hessian = (design * (p * (1 - p))[:, None]).T @ design + ridge
        weights += np.clip(np.linalg.solve(hessian, gradient), -5, 5)
    return float(1 / (1 + np.exp(-weights[0])))


def distinct_n(texts: Iterable[str], n: int, *, words: int | None = None) -> float:
    """Different n-grams over all n-grams of whitespace words, pooled over texts; 1 is no repetition at all.

    The ratio falls as text gets longer, so compare sets cut to the same number of words a text.
    """
    counted = NGrams(n, words=words)
    for text in texts:
        counted.add(text)
    return counted.distinct


class NGrams:
    """distinct_n of texts that come one by one.

    Args:
        words: of each text, the first so many; None: all.
    """

    def __init__(self, n: int, *, words: int | None = None):
        self._n, self._words, self._count, self._different = n, words, 0, Distinct()

    def add(self, text: str) -> None:
        parts = text.split()[: self._words]
        for start in range(len(parts) - self._n + 1):
            self._count += 1
            self._different.add(tuple(parts[start : start + self._n]))

    @property
    def distinct(self) -> float:
        """Different n-grams over all of them."""
        return len(self._different) / self._count if self._count else 0.0


def objective(reward: float, kl: float, beta: float) -> float:
    """E1: mean reward minus β KL(π‖π_ref), in the reward's units."""
    return reward - beta * kl


def correlation(x: Sequence[float], y: Sequence[float]) -> float:
    """Pearson's r; 0 where one side does not vary."""
    a, b = np.asarray(x, dtype=np.float64), np.asarray(y, dtype=np.float64)
    if len(a) < 2 or not a.std() or not b.std():
        return 0.0
    return float(np.corrcoef(a, b)[0, 1])
