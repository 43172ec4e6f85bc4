"""Strengths from comparisons in pairs: Bradley-Terry, and Davidson's model where a tie is an outcome of its own.

M things (the answers of a row, or models on a leaderboard) have strengths s, nats, with mean zero:

    P(i beats j) : P(j beats i) : P(tie)  =  exp(s_i) : exp(s_j) : ν exp((s_i + s_j) / 2)

Without ties ν is 0, and P(i beats j) = σ(s_i − s_j). Both are fitted by maximum likelihood: the log-likelihood is
concave, and Newton's method reaches its top in a few steps. All numbers are float64.

References
    Bradley and Terry 1952, "Rank analysis of incomplete block designs", Biometrika 39
    Davidson 1970, "On extending the Bradley-Terry model to accommodate ties", JASA 65
    the ghost: Turner et al. 2020, "Modelling rankings in R: the PlackettLuce package" https://arxiv.org/abs/1810.12068

Example:
    fit = davidson(wins_MM, ties_MM)
    fit.strengths_M[0] - fit.strengths_M[1], fit.gap_error(0, 1)
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

CERTAIN = 15.0  # nats; a preference beyond it (3 in 10 million the other way) says no more than that it is certain
FLAT = 1e-9  # information a comparison; a likelihood that is flatter in some direction has its top infinitely far away
STEPS = 100  # Newton steps, of which a fit with an estimate takes ten or so
EXACT = 1e-10  # nats; the last step of a fit is smaller


@dataclass(frozen=True, kw_only=True)
class Strengths:
    """A fit: estimates, and how sure they are by the number of comparisons."""

    strengths_M: np.ndarray  # nats, mean zero
    covariance_MM: np.ndarray  # of the strengths
    log_tie: float | None = None  # log ν of Davidson's model; None without ties
    log_tie_error: float | None = None  # its standard error

    @property
    def errors_M(self) -> np.ndarray:
        """Standard error of each strength, that is of its distance from the mean of all, nats."""
        return np.sqrt(np.maximum(np.diag(self.covariance_MM), 0.0))  # rounding may leave less than nothing

    def gap_error(self, i: int, j: int) -> float:
        """Standard error of s_i − s_j, nats: what a comparison of the two rests on."""
        c = self.covariance_MM
        return math.sqrt(max(0.0, c[i, i] + c[j, j] - 2 * c[i, j]))


def bradley_terry(wins_MM: np.ndarray, *, ghost: float = 0.0) -> Strengths:
    """Strengths from wins.

    Args:
        wins_MM: [i, j] how many times i beat j; a share of a win counts as such. Pairs may be missing.
        ghost: wins and losses of everyone against an imagined opponent of strength 0. Above 0 every table has a finite
            estimate, drawn towards equality; 0.5 is usual.

    Raises ValueError where no finite estimate exists: who never lost (directly or by others) is infinitely strong.
    """
    return davidson(wins_MM, np.zeros_like(np.asarray(wins_MM, dtype=np.float64)), ghost=ghost)


def davidson(wins_MM: np.ndarray, ties_MM: np.ndarray, *, ghost: float = 0.0) -> Strengths:
    """Strengths and the inclination to tie, from wins and ties; without any tie it is bradley_terry.

    Args:
        wins_MM: [i, j] how many times i beat j.
        ties_MM: [i, j] how many times they tied, the same number at [j, i].
        ghost: as for bradley_terry.

    Raises ValueError where no finite estimate exists, or where ties_MM is not symmetric.
    """
    wins_MM, ties_MM = (np.asarray(table, dtype=np.float64).copy() for table in (wins_MM, ties_MM))
    if not np.array_equal(ties_MM, ties_MM.T):
        raise ValueError("the table of ties is not symmetric: a tie of i with j is one of j with i")
    for table in (wins_MM, ties_MM):
        np.fill_diagonal(table, 0.0)
    if ghost:
        wins_MM = np.pad(wins_MM, (0, 1), constant_values=ghost)
        wins_MM[-1, -1] = 0.0
        ties_MM = np.pad(ties_MM, (0, 1))
    return _without_ghost(_fit(wins_MM, ties_MM), bool(ghost))


def of_log_odds(odds_MM: np.ndarray, replies_MM: np.ndarray) -> Strengths:
    """Strengths of a judge's preferences: the Bradley-Terry fit to p_ij = σ(odds_ij), each known pair counting once.

    Where all pairs are known, the order of the strengths is that of the row sums of p_ij: at the maximum the two have
    the same sums. Log-odds that are differences of scores are met exactly, by the scores without their mean.

    Args:
        odds_MM: antisymmetric; log-odds that i is better than j, nats; NaN where the pair is not known. The known
            pairs must join all.
        replies_MM: how many replies stand behind each pair, for the standard errors: as if each were a draw.
    """
    known_MM = ~np.isnan(odds_MM)
    np.fill_diagonal(known_MM, False)
    strengths_M = np.nan_to_num(odds_MM).mean(axis=1)
    gaps_MM = strengths_M[:, None] - strengths_M[None, :]
    if known_MM.sum() < len(odds_MM) * (len(odds_MM) - 1) or not np.allclose(odds_MM, gaps_MM, rtol=1e-12, atol=1e-12):
        p_MM = np.where(known_MM, _sigmoid(np.clip(np.nan_to_num(odds_MM), -CERTAIN, CERTAIN)), 0.0)
        strengths_M = _fit(p_MM, np.zeros_like(p_MM)).strengths_M
    return Strengths(strengths_M=strengths_M, covariance_MM=_spread(strengths_M, known_MM, replies_MM))


def components(known_MM: np.ndarray) -> list[list[int]]:
    """Groups of things that chains of known comparisons join, each in order; the largest first."""
    joined_MM = np.asarray(known_MM, dtype=bool) | np.eye(len(known_MM), dtype=bool)
    for _ in range(len(known_MM).bit_length()):  # chains twice as long each time
        joined_MM = joined_MM @ joined_MM
    groups = {tuple(np.flatnonzero(row)) for row in joined_MM}
    return sorted(([int(n) for n in group] for group in groups), key=lambda group: (-len(group), group))


def circular_triads(odds_MM: np.ndarray, *, tie_below: float = 0.0) -> int:
    """How many threes beat one another in a circle; preferences of at most tie_below (nats) beat nobody."""
    beats_MM = (np.nan_to_num(odds_MM) > tie_below).astype(np.int64)
    return int(np.trace(beats_MM @ beats_MM @ beats_MM)) // 3  # a circle is seen from each of its three


def most_circular_triads(count: int) -> int:
    """The most that a complete round robin of so many can have. 1 − circular triads / this is Kendall's ζ.

    Kendall and Babington Smith 1940, "On the method of paired comparisons", Biometrika 31.
    """
    return (count**3 - (count if count % 2 else 4 * count)) // 24


def _fit(wins_MM: np.ndarray, ties_MM: np.ndarray) -> Strengths:
    """Newton's method from equality. Parameters: M strengths, and log ν where there are ties."""
    count, tied = len(wins_MM), bool(ties_MM.any())
    at, step = np.zeros(count + tied), np.full(count + tied, np.inf)
    games_MM = wins_MM + wins_MM.T + ties_MM
    flat = FLAT * games_MM[games_MM > 0].min(initial=1.0)
    for _ in range(STEPS):
        gradient, information = _derivatives(at, wins_MM, ties_MM)
        # A constant added to all strengths changes nothing; this much information about it keeps their mean at zero.
        information[:count, :count] += 1 / count
        if np.linalg.eigvalsh(information)[0] < flat:
            break
        step = _uphill(at, np.linalg.solve(information, gradient), wins_MM, ties_MM)
        at = at + step
        if np.abs(step).max() < EXACT:
            break
    if np.abs(step).max() >= EXACT:
        raise ValueError(
            "the comparisons have no finite strengths: somebody never lost, never won, or met none of the others, "
            "or all ended in ties; leave them out, or fit with a ghost of 0.5"
        )
    covariance = np.linalg.inv(information)
    return Strengths(
        strengths_M=at[:count] - at[:count].mean(),
        covariance_MM=_centred(covariance[:count, :count]),
        log_tie=float(at[-1]) if tied else None,
        log_tie_error=float(np.sqrt(covariance[-1, -1])) if tied else None,
    )


def _uphill(at: np.ndarray, step: np.ndarray, wins_MM: np.ndarray, ties_MM: np.ndarray) -> np.ndarray:
    """The step, halved until the log-likelihood does not fall."""
    value = _log_likelihood(at, wins_MM, ties_MM)
    while _log_likelihood(at + step, wins_MM, ties_MM) < value - 1e-12 * abs(value):
        step = step / 2
    return step


def _outcomes(at: np.ndarray, count: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """log P of a win of i over j, of a loss, and of a tie, each [M, M]."""
    gaps_MM = at[:count, None] - at[None, :count]
    log_tie = at[count] if len(at) > count else -np.inf
    weights = np.stack([gaps_MM / 2, -gaps_MM / 2, np.full_like(gaps_MM, log_tie)])
    return tuple(weights - np.logaddexp.reduce(weights, axis=0))


def _log_likelihood(at: np.ndarray, wins_MM: np.ndarray, ties_MM: np.ndarray) -> float:
    win_MM, _, tie_MM = _outcomes(at, len(wins_MM))
    ties = (ties_MM * tie_MM).sum() / 2 if ties_MM.any() else 0.0
    return float((wins_MM * win_MM).sum() + ties)


def _derivatives(at: np.ndarray, wins_MM: np.ndarray, ties_MM: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Gradient of the log-likelihood, and minus its second derivatives.

    With u = ½ for a win, −½ for a loss, 0 for a tie, an outcome's log-weight is u (s_i − s_j), and log ν for a tie: an
    exponential family, so both are moments of u and of the tie's indicator.
    """
    count = len(wins_MM)
    win_MM, loss_MM, tie_MM = map(np.exp, _outcomes(at, count))
    games_MM = wins_MM + wins_MM.T + ties_MM
    mean_MM = (win_MM - loss_MM) / 2
    # ½ − E u and ½ + E u, written so that they keep their digits near 0
    won_MM, lost_MM = loss_MM + tie_MM / 2, win_MM + tie_MM / 2
    gradient = (wins_MM * won_MM - wins_MM.T * lost_MM - ties_MM * mean_MM).sum(axis=1)
    variance_MM = win_MM * loss_MM + tie_MM * (win_MM + loss_MM) / 4
    information = _laplacian(games_MM * variance_MM)
    if len(at) == count:
        return gradient, information
    both = (games_MM * -mean_MM * tie_MM).sum(axis=1)
    own = (games_MM * tie_MM * (1 - tie_MM)).sum() / 2
    gradient = np.append(gradient, (ties_MM - games_MM * tie_MM).sum() / 2)
    return gradient, np.block([[information, both[:, None]], [both[None, :], np.array([[own]])]])


def _spread(strengths_M: np.ndarray, known_MM: np.ndarray, replies_MM: np.ndarray) -> np.ndarray:
    """Covariance of strengths that were fitted with one weight a pair, from the replies behind each: A⁺ B A⁺."""
    gaps_MM = np.clip(strengths_M[:, None] - strengths_M[None, :], -CERTAIN, CERTAIN)
    variance_MM = np.where(known_MM, _sigmoid(gaps_MM) * _sigmoid(-gaps_MM), 0.0)
    inverse = np.linalg.pinv(_laplacian(variance_MM), hermitian=True)
    return inverse @ _laplacian(variance_MM / np.maximum(replies_MM, 1)) @ inverse


def _laplacian(weights_MM: np.ndarray) -> np.ndarray:
    """Σ over pairs of weight · (e_i − e_j)(e_i − e_j)ᵀ."""
    return np.diag(weights_MM.sum(axis=1)) - weights_MM


def _centred(covariance_MM: np.ndarray) -> np.ndarray:
    """Covariance of the same numbers without their mean."""
    rows = covariance_MM - covariance_MM.mean(axis=0, keepdims=True)
    return rows - rows.mean(axis=1, keepdims=True)


def _without_ghost(fit: Strengths, ghost: bool) -> Strengths:
    if not ghost:
        return fit
    strengths_M, covariance_MM = fit.strengths_M[:-1], fit.covariance_MM[:-1, :-1]
    return Strengths(
        strengths_M=strengths_M - strengths_M.mean(),
        covariance_MM=_centred(covariance_MM),
        log_tie=fit.log_tie,
        log_tie_error=fit.log_tie_error,
    )


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))
