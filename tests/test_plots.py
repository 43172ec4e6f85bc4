"""Laws of the figures: the same numbers give the same bytes, and a figure shows what it was given."""

from __future__ import annotations

import math
import random
import struct

import pytest

from tasks import plots
from tasks.history import NONE

RANDOM = random.Random(7)
CURVES = [
    {"step": step, "loss": math.log(24) - 0.01 * step, "margin": 0.1 * step, "kl": 0.2 * step} for step in range(90)
]
POLICY, REFERENCE = ([RANDOM.gauss(mean, 1) for _ in range(50)] for mean in (1, 0))
ROUNDS = {
    str(n): {
        "win_rate": {"gold": {"mean": 0.5 + n / 9, "low": 0.4, "high": 0.9}},
        "kl": NONE | {"mean": n},
        "length": 20,
    }
    for n in range(4)
}
FIGURES = {
    "curves": lambda path: plots.training_curves(CURVES, path, title="dpo", start_loss=math.log(24)),
    "one_curve": lambda path: plots.training_curves([{"step": 1, "loss": 2.0}], path),
    "rewards": lambda path: plots.reward_histogram(POLICY, REFERENCE, path),
    "lengths": lambda path: plots.length_histogram([3, 4, 4], [4, 4, 4], path),
    "answers": lambda path: plots.answers([3, 4, 4], [8], [2, 1], path, k=2, title="the policy's answers"),
    "answers_all_cut": lambda path: plots.answers([], [8] * 4, [2, 2], path, k=2, title="the policy's answers"),
    "rounds": lambda path: plots.rounds(ROUNDS, path),
    "win": lambda path: plots.win_rates([{"name": "judge", "mean": 0.8, "low": 0.75, "high": 0.84}], path),
}


def size(path) -> tuple[int, int]:
    """Width and height in pixels, from the PNG's header."""
    return struct.unpack(">II", path.read_bytes()[16:24])


@pytest.mark.parametrize("name", FIGURES)
def test_plots_are_deterministic(name, tmp_path):
    first, second = tmp_path / "first.png", tmp_path / "second.png"
    FIGURES[name](first)
    FIGURES[name](second)
    assert first.read_bytes() == second.read_bytes()
    width, height = size(first)
    assert width == 900 and 200 <= height <= 600
    for stamp in (b"Software", b"matplotlib", b"Creation"):
        assert stamp not in first.read_bytes()


def test_another_number_is_another_picture(tmp_path):
    row = {"name": "judge", "mean": 0.8, "low": 0.75, "high": 0.84}
    plots.win_rates([row], tmp_path / "a.png")
    plots.win_rates([{**row, "low": 0.7}], tmp_path / "b.png")
    assert (tmp_path / "a.png").read_bytes() != (tmp_path / "b.png").read_bytes()


def test_a_callers_style_does_not_reach_the_figure(tmp_path):
    """A notebook's dark theme, or a user's matplotlibrc, would change the bytes."""
    import matplotlib

    FIGURES["win"](tmp_path / "plain.png")
    with matplotlib.rc_context({"axes.facecolor": "black", "figure.dpi": 300, "savefig.dpi": 50}):
        FIGURES["win"](tmp_path / "styled.png")
    assert (tmp_path / "plain.png").read_bytes() == (tmp_path / "styled.png").read_bytes()


def test_a_panel_exists_only_for_columns_that_exist(monkeypatch, tmp_path):
    drawn = []
    monkeypatch.setattr(plots, "_curves", lambda axis, points, lines: drawn.append(lines[0][0]))
    plots.training_curves([{"step": 1, "loss": 1.0, "kl": 0.1}, {"step": 2, "loss": 1.0, "kl": ""}], tmp_path / "a.png")
    assert drawn == ["loss", "kl"]


def test_a_running_mean_of_a_constant_is_that_constant():
    assert plots._smooth([2.0] * 9, 3) == [2.0] * 9
    # at the ends fewer values are near: (1 + 2) / 2, (1 + 2 + 3) / 3, ..., (3 + 4) / 2
    assert plots._smooth([1.0, 2.0, 3.0, 4.0], 1) == [1.5, 2.0, 3.0, 3.5]
