"""Figures of an evaluation against their closed forms."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.evaluation import (
    Estimate,
    correlation,
    distinct_n,
    length_controlled_win_rate,
    mean,
    objective,
    over_seeds,
    share,
    win_rate,
)


def test_a_mean_and_its_interval():
    """Values 1…5: standard deviation √2.5, so ±1.96·√(2.5/5)."""
    estimate = mean([1, 2, 3, 4, 5])
    half = 1.959963984540054 * math.sqrt(0.5)
    assert estimate.as_dict() == pytest.approx({"mean": 3, "low": 3 - half, "high": 3 + half})


def test_one_value_has_no_spread_and_none_is_an_error():
    assert mean([2.5]).as_dict() == {"mean": 2.5, "low": 2.5, "high": 2.5}
    for nothing in (lambda: mean([]), lambda: share(0, 0), lambda: win_rate([], [])):
        with pytest.raises(ValueError):
            nothing()


@pytest.mark.parametrize(
    "successes, count, low, high",
    [(0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (81, 263, 0.2553, 0.3662), (15, 148, 0.0624, 0.1605)],
)
def test_wilson_intervals_are_the_published_ones(successes, count, low, high):
    """0/10: z²/(10 + z²). The others: Newcombe 1998, "Two-sided confidence intervals for the single proportion"."""
    estimate = share(successes, count)
    assert (estimate.low, estimate.high) == pytest.approx((low, high), abs=6e-5)


@given(st.integers(1, 400), st.floats(0, 1))
def test_a_wilson_bound_solves_its_equation(count, part):
    """(p̂ − p)² = z² p(1 − p)/n at both ends, which lie within [0, 1] and around the share."""
    estimate = share(part * count, count)
    assert 0 <= estimate.low <= estimate.mean + 1e-12 and estimate.mean - 1e-12 <= estimate.high <= 1
    for p in (estimate.low, estimate.high):
        assert (estimate.mean - p) ** 2 == pytest.approx(1.959963984540054**2 * p * (1 - p) / count, abs=1e-9)


def test_win_rate_counts_a_tie_as_one_half():
    assert win_rate([1, 2, 3, 0], [0, 2, 1, 5]).mean == 2.5 / 4
    assert win_rate([1.0, 2.0], [0.9, 3.0], tie_below=0.2).mean == 0.25
    assert win_rate([1, 1], [1, 1]).mean == 0.5


@given(st.lists(st.tuples(st.integers(-3, 3), st.integers(-3, 3)), min_size=1, max_size=30))
def test_win_rates_of_both_sides_sum_to_one(pairs):
    a, b = [x for x, _ in pairs], [y for _, y in pairs]
    assert win_rate(a, b).mean + win_rate(b, a).mean == pytest.approx(1)


def test_win_rate_at_equal_length_is_the_win_rate_when_lengths_are_equal():
    policy = [1] * 30 + [0] * 10
    assert length_controlled_win_rate(policy, [0.5] * 40, [7] * 40, [7] * 40) == pytest.approx(0.75, abs=1e-3)


def test_win_rate_at_equal_length_takes_out_what_length_explains():
    """Wins drawn with log-odds 0.4 + 3·tanh(Δ/σ), most answers longer: the fit finds σ(0.4), what is more is length."""
    random = np.random.default_rng(0)
    delta = random.normal(5, 10, size=20_000)
    odds = 0.4 + 3 * np.tanh(delta / delta.std())
    won = random.random(len(delta)) < 1 / (1 + np.exp(-odds))
    words = np.full(len(delta), 100)
    fitted = length_controlled_win_rate(won, np.full(len(won), 0.5), words + delta, words)
    assert fitted == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.02)
    assert won.mean() > fitted + 0.05


def test_win_rate_at_equal_length_stays_finite_when_all_is_won():
    rate = length_controlled_win_rate([1.0] * 50, [0.0] * 50, list(range(50)), [25] * 50)
    assert 0.95 < rate < 1


def test_distinct_n_by_hand():
    """ "a b a b" has the bigrams ab, ba, ab; with "a b" four in all, two different."""
    assert distinct_n(["a b a b", "a b"], 2) == 2 / 4
    assert distinct_n(["a b c"], 1) == 1 and distinct_n(["a a a a"], 1) == 0.25
    assert distinct_n(["a b c d", "a b c d"], 1, words=2) == 2 / 4
    assert distinct_n(["a", ""], 2) == 0


def test_the_objective_is_reward_minus_beta_kl():
    """E1, and what it is for: π* ∝ π_ref exp(r/β) attains β log Z, and no other policy does better."""
    assert objective(2.0, 3.0, 0.5) == 0.5
    reward, reference, beta = np.array([1.0, -0.5, 0.3]), np.array([0.2, 0.5, 0.3]), 0.4
    z = (reference * np.exp(reward / beta)).sum()
    value = lambda p: objective((p * reward).sum(), (p * np.log(p / reference)).sum(), beta)
    best = reference * np.exp(reward / beta) / z
    assert value(best) == pytest.approx(beta * math.log(z))
    for other in np.random.default_rng(1).dirichlet(np.ones(3), size=50):
        assert value(other) < value(best)


def test_correlation_of_a_line_is_one_and_of_a_constant_zero():
    assert correlation([1, 2, 3], [5, 7, 9]) == pytest.approx(1) and correlation([1, 2, 3], [3, 2, 1]) == pytest.approx(
        -1
    )
    assert correlation([1, 2, 3], [4, 4, 4]) == 0 and correlation([1], [2]) == 0


def test_the_mean_of_one_run_keeps_its_interval():
    one = Estimate(mean=0.3, low=0.1, high=0.5)
    assert over_seeds([one]).as_dict() == pytest.approx(one.as_dict())


def test_runs_that_agree_by_luck_are_not_surer_than_their_samples():
    """Four runs with one mean and half-width h each: sampling error alone leaves h / √4."""
    found = over_seeds([Estimate(mean=1.0, low=0.8, high=1.2)] * 4)
    assert (found.low, found.high) == pytest.approx((0.9, 1.1))


def test_runs_that_differ_widen_the_interval():
    """Means 0, 1, 2 known exactly: variance 1, standard error 1/√3, and 4.303 is Student's t for two degrees."""
    found = over_seeds([Estimate(mean=m, low=m, high=m) for m in (0.0, 1.0, 2.0)])
    assert found.mean == pytest.approx(1.0)
    assert found.high - found.mean == pytest.approx(4.3027 / math.sqrt(3))


@pytest.mark.parametrize("runs", [2, 3, 5, 10])
@pytest.mark.parametrize("within", [0.0, 0.5, 2.0])
def test_intervals_over_runs_hold_the_truth_as_often_as_they_say(runs, within):
    """Runs around 0 with spread 1, each with a sampling error of its own: at least 95 % of intervals hold 0."""
    draw, held = np.random.default_rng(0), 0
    for _ in range(2000):
        means = draw.normal(0, 1, runs) + draw.normal(0, within, runs)
        found = over_seeds([Estimate(mean=m, low=m - 1.96 * within, high=m + 1.96 * within) for m in means])
        held += found.low <= 0 <= found.high
    assert held / 2000 > 0.95 - 3 * math.sqrt(0.95 * 0.05 / 2000)


def test_a_mean_of_no_runs_is_an_error():
    with pytest.raises(ValueError, match="no runs"):
        over_seeds([])
