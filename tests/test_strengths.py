"""Strengths: fits reach the maximum that other code reaches, and a judge's log-odds where they can be met."""

import itertools
import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.strengths import (
    bradley_terry,
    circular_triads,
    components,
    davidson,
    most_circular_triads,
    of_log_odds,
)

# The first example of a cold process may take long; a shared machine is no reason to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

# Davidson 1970, example 2: tasters of chocolate pudding, brands i and j, wins of i, wins of j, ties.
PUDDING = [
    *[(1, 2, 19, 22, 16), (1, 3, 16, 19, 12), (2, 3, 19, 19, 10), (1, 4, 18, 23, 13), (2, 4, 23, 19, 9)],
    *[(3, 4, 19, 20, 15), (1, 5, 13, 19, 18), (2, 5, 16, 20, 12), (3, 5, 16, 15, 17), (4, 5, 17, 14, 16)],
    *[(1, 6, 18, 21, 12), (2, 6, 22, 20, 12), (3, 6, 13, 18, 10), (4, 6, 14, 19, 18), (5, 6, 11, 21, 12)],
]


def pudding() -> tuple[np.ndarray, np.ndarray]:
    wins, ties = np.zeros((6, 6)), np.zeros((6, 6))
    for i, j, forth, back, tie in PUDDING:
        wins[i - 1, j - 1], wins[j - 1, i - 1] = forth, back
        ties[i - 1, j - 1] = ties[j - 1, i - 1] = tie
    return wins, ties


def a_league(seed: int, count: int = 5, games: int = 40, log_tie: float | None = -0.5):
    """Wins and ties drawn from known strengths; some pairs never meet."""
    random = np.random.default_rng(seed)
    s = random.normal(size=count)
    wins, ties = np.zeros((count, count)), np.zeros((count, count))
    for i, j in itertools.combinations(range(count), 2):
        if (i, j) == (0, 1):
            continue
        weights = np.exp([s[i], s[j], -np.inf if log_tie is None else log_tie + (s[i] + s[j]) / 2])
        won, lost, tied = random.multinomial(games, weights / weights.sum())
        wins[i, j], wins[j, i], ties[i, j], ties[j, i] = won, lost, tied, tied
    return wins, ties


def log_likelihood(at: torch.Tensor, wins: np.ndarray, ties: np.ndarray) -> torch.Tensor:
    """Davidson's, pair by pair from its three outcomes; at: M strengths, then log ν where there are ties."""
    count, total = len(wins), 0.0
    for i, j in itertools.combinations(range(count), 2):
        weights = [at[i], at[j]] + ([at[count] + (at[i] + at[j]) / 2] if len(at) > count else [])
        logp = torch.stack(weights).log_softmax(0)
        seen = torch.tensor([wins[i, j], wins[j, i], ties[i, j]][: len(weights)], dtype=torch.float64)
        total = total + (seen * logp).sum()
    return total


def by_torch(wins: np.ndarray, ties: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Maximum by L-BFGS, covariance by the inverse of autograd's Hessian among strengths with mean zero."""
    count, tied = len(wins), bool(ties.any())
    at = torch.zeros(count + tied, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [at], max_iter=500, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimizer.zero_grad()
        value = -log_likelihood(at, wins, ties)
        value.backward()
        return value

    optimizer.step(closure)
    hessian = torch.autograd.functional.hessian(lambda x: -log_likelihood(x, wins, ties), at.detach()).numpy()
    return at.detach().numpy(), np.linalg.pinv(hessian, rcond=1e-9)


def test_the_pudding_of_davidsons_paper_as_the_plackett_luce_package_prints_it():
    """Its vignette's summary(mod, ref = NULL), which reproduces the paper: stopped after 7 iterations, so 2e-4."""
    fit = davidson(*pudding())
    published = [-0.176581, 0.043664, -0.023617, -0.001295, -0.042726, 0.200555]
    assert fit.strengths_M == pytest.approx(published, abs=2e-4)
    assert fit.errors_M == pytest.approx([0.121949, 0.121818, 0.126823, 0.122003, 0.127054, 0.126594], abs=2e-5)
    assert fit.log_tie == pytest.approx(-0.291938, abs=2e-4) and fit.log_tie_error == pytest.approx(0.082499, abs=2e-5)
    assert fit.gap_error(0, 5) == pytest.approx(0.1924059, abs=2e-5)


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("ties", [True, False])
def test_the_fit_is_that_of_another_optimiser(seed, ties):
    """L-BFGS over the likelihood written pair by pair; standard errors by autograd's second derivatives."""
    wins, tied = a_league(seed, log_tie=-0.5 if ties else None)
    fit = davidson(wins, tied) if ties else bradley_terry(wins)
    at, covariance = by_torch(wins, tied)
    assert fit.strengths_M == pytest.approx(at[:5] - at[:5].mean(), abs=1e-7)
    for i, j in itertools.combinations(range(5), 2):
        variance = covariance[i, i] + covariance[j, j] - 2 * covariance[i, j]
        assert fit.gap_error(i, j) == pytest.approx(math.sqrt(variance), rel=1e-6)
    assert (fit.log_tie is not None) == ties
    if ties:
        assert fit.log_tie == pytest.approx(at[5], abs=1e-7)
        assert fit.log_tie_error == pytest.approx(math.sqrt(covariance[5, 5]), rel=1e-6)


def test_of_two_things_the_fit_is_the_logit_of_the_wins():
    """30 wins, 10 losses: log 3, and its variance 1/30 + 1/10; with 20 ties, log ν = log(20 / √(30·10))."""
    wins = np.array([[0, 30], [10, 0]])
    fit = bradley_terry(wins)
    assert fit.strengths_M == pytest.approx([math.log(3) / 2, -math.log(3) / 2], abs=1e-12)
    assert fit.gap_error(0, 1) == pytest.approx(math.sqrt(1 / 30 + 1 / 10), abs=1e-12)
    with_ties = davidson(wins, np.array([[0, 20], [20, 0]]))
    assert with_ties.strengths_M == pytest.approx(fit.strengths_M, abs=1e-12)
    assert with_ties.log_tie == pytest.approx(math.log(20 / math.sqrt(300)), abs=1e-12)


def test_the_fit_meets_every_total():
    """At the maximum each thing's expected wins and half its ties are those that it had."""
    wins, ties = pudding()
    fit = davidson(wins, ties)
    gaps = fit.strengths_M[:, None] - fit.strengths_M[None, :]
    weights = np.stack([np.exp(gaps / 2), np.exp(-gaps / 2), np.full_like(gaps, math.exp(fit.log_tie))])
    win, _, tie = weights / weights.sum(0)
    games = wins + wins.T + ties
    assert (games * (win + tie / 2)).sum(1) == pytest.approx((wins + ties / 2).sum(1), rel=1e-12)
    assert (games * tie).sum() == pytest.approx(ties.sum(), rel=1e-12)


def test_twice_the_games_are_the_same_strengths_and_errors_smaller_by_the_root_of_two():
    once, twice = davidson(*pudding()), davidson(*(2 * table for table in pudding()))
    assert twice.strengths_M == pytest.approx(once.strengths_M, abs=1e-12)
    assert twice.errors_M == pytest.approx(once.errors_M / math.sqrt(2), rel=1e-9)


@pytest.mark.parametrize(
    "wins, ties",
    [
        ([[0, 5], [0, 0]], None),  # never lost
        ([[0, 3, 0], [2, 0, 0], [0, 0, 0]], None),  # met nobody
        ([[0, 3, 9, 9], [2, 0, 9, 9], [0, 0, 0, 1], [0, 0, 2, 0]], None),  # two classes, of which one always wins
        ([[0, 0], [0, 0]], [[0, 4], [4, 0]]),  # ties and nothing else
        ([[0, 3], [0, 0]], [[0, 4], [4, 0]]),  # wins, ties, and no loss
    ],
)
def test_where_no_finite_estimate_exists_the_fit_says_so_and_a_ghost_gives_one(wins, ties):
    wins = np.array(wins)
    ties = np.zeros_like(wins) if ties is None else np.array(ties)
    with pytest.raises(ValueError, match="no finite strengths"):
        davidson(wins, ties)
    fit = davidson(wins, ties, ghost=0.5)
    assert np.isfinite(fit.strengths_M).all() and np.isfinite(fit.errors_M).all()
    assert fit.strengths_M.sum() == pytest.approx(0, abs=1e-9)


def test_a_ghost_of_one_half_is_that_of_the_plackett_luce_package():
    """Its vignette's four things, of which D only lost: coef(PlackettLuce(R)), relative to A."""
    wins = np.zeros((4, 4))
    for winner, loser in ((0, 1), (2, 0), (0, 3), (1, 0), (1, 2)):
        wins[winner, loser] += 1
    with pytest.raises(ValueError, match="no finite strengths"):
        bradley_terry(wins)
    fit = bradley_terry(wins, ghost=0.5)
    assert fit.strengths_M - fit.strengths_M[0] == pytest.approx([0, 0.5184185, 0.1354707, -1.1537565], abs=1e-4)
    without_d = bradley_terry(wins[:3, :3])
    assert without_d.strengths_M - without_d.strengths_M[0] == pytest.approx([0, 0.8392, 0.4196], abs=1e-4)
    assert [without_d.gap_error(0, n) for n in (1, 2)] == pytest.approx([1.3596, 1.5973], abs=1e-4)


def test_a_table_of_ties_that_contradicts_itself_is_refused():
    with pytest.raises(ValueError, match="not symmetric"):
        davidson(np.ones((2, 2)), np.array([[0, 1], [2, 0]]))


# A judge's log-odds


def odds_of(pairs: dict[tuple[int, int], float], count: int) -> np.ndarray:
    odds = np.full((count, count), np.nan)
    np.fill_diagonal(odds, 0.0)
    for (i, j), value in pairs.items():
        odds[i, j], odds[j, i] = value, -value
    return odds


@given(st.lists(st.floats(-500, 500), min_size=1, max_size=6))
def test_differences_of_scores_are_met_exactly_whatever_their_size(scores):
    odds = np.subtract.outer(scores, scores)
    fit = of_log_odds(odds, np.ones_like(odds))
    assert fit.strengths_M == pytest.approx(np.array(scores) - np.mean(scores), abs=1e-9)


@given(st.integers(2, 6), st.integers(0, 10**6))
@settings(max_examples=60)
def test_of_a_round_robin_the_order_of_strengths_is_that_of_the_row_sums(count, seed):
    odds = np.random.default_rng(seed).normal(scale=3, size=(count, count))
    odds = (odds - odds.T) / 2
    fit = of_log_odds(odds, np.ones_like(odds))
    p = 1 / (1 + np.exp(-odds))
    q = 1 / (1 + np.exp(-np.subtract.outer(fit.strengths_M, fit.strengths_M)))
    assert q.sum(1) == pytest.approx(p.sum(1), abs=1e-8)
    assert list(np.argsort(fit.strengths_M)) == list(np.argsort(p.sum(1)))


def test_a_circle_of_equal_preferences_has_equal_strengths():
    fit = of_log_odds(odds_of({(0, 1): 2.0, (1, 2): 2.0, (2, 0): 2.0}, 3), np.ones((3, 3)))
    assert fit.strengths_M == pytest.approx([0, 0, 0], abs=1e-9)


def test_a_chain_of_comparisons_adds_up():
    """0 over 1 by 1.0, 1 over 2 by 0.5, and 0 was never compared with 2: 1.5 between them, and errors that add up."""
    replies = np.full((3, 3), 2)
    fit = of_log_odds(odds_of({(0, 1): 1.0, (1, 2): 0.5}, 3), replies)
    assert fit.strengths_M - fit.strengths_M[2] == pytest.approx([1.5, 0.5, 0.0], abs=1e-9)
    variance = lambda gap: 1 / (2 / (2 + 2 * math.cosh(gap)))
    assert fit.gap_error(0, 1) ** 2 == pytest.approx(variance(1.0), rel=1e-9)
    assert fit.gap_error(0, 2) ** 2 == pytest.approx(variance(1.0) + variance(0.5), rel=1e-9)


def test_with_equally_many_replies_a_pair_the_errors_are_those_of_the_maximum_likelihood_fit():
    odds = odds_of({(0, 1): 1.0, (0, 2): 0.2, (1, 2): -0.4}, 3)
    p = np.where(np.eye(3), 0, 1 / (1 + np.exp(-odds)))
    fit, counted = of_log_odds(odds, np.full((3, 3), 6)), bradley_terry(6 * p)
    assert fit.strengths_M == pytest.approx(counted.strengths_M, abs=1e-9)
    assert fit.covariance_MM == pytest.approx(counted.covariance_MM, abs=1e-9)


# The shape of a tournament


def test_components_are_joined_by_chains():
    known = np.zeros((6, 6), dtype=bool)
    for i, j in ((0, 4), (4, 5), (1, 3)):
        known[i, j] = known[j, i] = True
    assert components(known) == [[0, 4, 5], [1, 3], [2]]
    chain = np.eye(9, k=1, dtype=bool) | np.eye(9, k=-1, dtype=bool)
    assert components(chain) == [list(range(9))]
    assert components(np.zeros((0, 0))) == []


@pytest.mark.parametrize("count, most", [(2, 0), (3, 1), (4, 2), (5, 5), (6, 8), (7, 14)])
def test_the_most_circular_triads_are_those_of_kendall_and_babington_smith(count, most):
    """Their table 1; at K = 3 to 5 also by looking at every tournament."""
    assert most_circular_triads(count) == most
    if count <= 5:
        pairs = list(itertools.combinations(range(count), 2))
        tables = (
            odds_of(dict(zip(pairs, signs)), count) for signs in itertools.product((-1.0, 1.0), repeat=len(pairs))
        )
        assert max(map(circular_triads, tables)) == most


@given(st.integers(3, 7), st.integers(0, 10**6))
@settings(max_examples=50)
def test_circular_triads_are_what_the_scores_say(count, seed):
    """K(K−1)(2K−1)/12 − ½ Σ a_i², a_i the number of wins (Kendall and Babington Smith 1940)."""
    odds = np.random.default_rng(seed).normal(size=(count, count))
    odds = odds - odds.T
    wins = (odds > 0).sum(1)
    assert circular_triads(odds) == count * (count - 1) * (2 * count - 1) / 12 - (wins**2).sum() / 2


def test_a_circle_with_a_tie_in_it_is_none():
    circle = odds_of({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 0.05}, 3)
    assert circular_triads(circle) == 1 and circular_triads(circle, tie_below=0.1) == 0
