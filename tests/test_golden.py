"""Fifty steps of preference training follow the trajectory that is kept in tests/golden.

The tolerance is derived, not chosen: the file holds how far the trajectory in float32 lies from the same one in
float64, which is what float32's rounding costs over fifty steps. Another order of sums rounds otherwise but no more
coarsely, so two right runs differ by about that; ten times as much is allowed. A β that is wrong in its fourth digit
costs hundreds of times as much (the last test). On one machine a repeated run is the same bit for bit (test_training).
"""

import json

import pytest
from golden.trajectory import FILE, NAMES, STEPS, largest_change, run

from rankwise import objectives

KEPT = json.loads(FILE.read_text())
TIMES = 10


def excess(found: dict) -> dict[str, float]:
    """Largest distance to the kept trajectory, in units of what rounding costs."""
    kept = {name: KEPT[name] for name in found}
    return {name: change / KEPT["rounding"][name] for name, change in largest_change(found, kept).items()}


def test_the_file_is_whole_and_its_rounding_is_that_of_float32():
    assert all(len(KEPT[name]) == STEPS for name in NAMES)
    assert KEPT["loss"][-1] < 0.5 * KEPT["loss"][0]  # it has learnt something, so there was something to follow
    assert max(KEPT["rounding"].values()) < 1e-5


@pytest.mark.parametrize(
    "how",
    [{}, {"micro_batch_tokens": 1}, {"micro_batch_tokens": 60}, {"layout": "shared"}, {"layout": "padded"}],
    ids=["batch of 8", "8 × batch of 1", "uneven parts", "dense mask", "padded"],
)
def test_fifty_steps_follow_the_kept_trajectory(how):
    """Batch 8 × accumulation 1 is batch 1 × accumulation 8, and every layout is every other, for fifty steps."""
    assert max(excess(run(**how)).values()) <= TIMES


def test_a_wrong_formula_leaves_the_trajectory(monkeypatch):
    """β off by a ten-thousandth is seen, so the tolerance is no licence."""
    right = objectives.implicit_rewards
    monkeypatch.setattr("rankwise.learners.implicit_rewards", lambda p, r, beta: right(p, r, beta * 1.0001))
    assert max(excess(run()).values()) > 10 * TIMES
