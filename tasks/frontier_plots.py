"""The figures of a sweep, after figures 2 and 3 of the DPO paper (https://arxiv.org/abs/2305.18290)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.evaluation import Estimate
from tasks.frontier import SFT, Setting
from tasks.plots import GREY, figure

# Okabe and Ito's palette again, with a marker of its own for each: eight methods, told apart without colour too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000", "#8C6D1F")
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
KL_LINEAR = 1.0  # nats: up to here the axis is linear, so that 0 is on it, and logarithmic beyond


def frontier(every: Sequence[Setting], labels: Mapping[str, str], reward: str, heading: str, path: Path) -> None:
    """Reward against KL to the reference: a line a method, its points with both intervals, the SFT model at KL 0."""
    with figure(path, "What reward for how much KL", columns=1, height=5.6) as (axis,):
        for number, method in enumerate(_methods(every)):  # every curve begins with the SFT model, at KL 0
            points = [one for one in every if one.method in (SFT, method) and {"kl", reward} <= one.found.keys()]
            points.sort(key=lambda one: one.found["kl"].mean)
            x, y = ([one.found[name] for one in points] for name in ("kl", reward))
            _line(axis, x, y, number, labels[method])
        for one in every:
            if one.method == SFT and reward in one.found:
                axis.axhline(one.found[reward].mean, color=GREY, linestyle=":", label=labels[SFT])
        axis.set_xscale("symlog", linthresh=KL_LINEAR)
        axis.set(xlabel="KL to the SFT model, nats a sequence", ylabel=heading, xlim=(0, None))
        axis.legend(loc="best")


def temperatures(every: Sequence[Setting], labels: Mapping[str, str], path: Path) -> None:
    """Win rate by gold over the sampling temperature: against the reference's answers, and against the data's own."""
    who = "gold" if any("win_rate_gold" in one.found for one in every) else "judge"
    panels = (
        (f"win_rate_{who}", "Against the SFT model at that temperature"),
        (f"win_rate_{who}_over_data", "Against the data's own text"),
    )
    several = [key for key, group in _by_setting(every).items() if len(group) > 1]
    shown = [(name, title) for name, title in panels if any(name in one.found for one in every)]
    with figure(path, "Win rate over the sampling temperature", columns=len(shown), height=4.6) as axes:
        for axis, (name, title) in zip(axes, shown):
            for key in several:
                if key[0] == SFT and name == f"win_rate_{who}":  # one half, against itself
                    continue
                group = [one for one in _by_setting(every)[key] if name in one.found]
                group.sort(key=lambda one: one.temperature)
                x = [Estimate(mean=one.temperature, low=one.temperature, high=one.temperature) for one in group]
                value = "" if key[1] is None else f" ({key[1]:g})"
                # The colours of the other figure, SFT behind all of them.
                number = [*_methods(every), SFT].index(key[0])
                _line(axis, x, [one.found[name] for one in group], number, f"{labels[key[0]]}{value}")
            axis.axhline(0.5, color=GREY, linestyle=":")
            axis.set(title=title, xlabel="temperature", ylabel=f"win rate ({who})", ylim=(0, 1))
            axis.legend(loc="best")


def _methods(every: Sequence[Setting]) -> list[str]:
    return [method for method in dict.fromkeys(one.method for one in every) if method != SFT]


def _by_setting(every: Sequence[Setting]) -> dict[tuple[str, float | None], list[Setting]]:
    groups: dict[tuple[str, float | None], list[Setting]] = {}
    for one in every:
        groups.setdefault((one.method, one.value), []).append(one)
    return groups


def _line(axis: Any, x: Sequence[Estimate], y: Sequence[Estimate], number: int, label: str) -> None:
    around = lambda values: [[v.mean - v.low for v in values], [v.high - v.mean for v in values]]
    axis.errorbar(
        [v.mean for v in x],
        [v.mean for v in y],
        xerr=around(x),
        yerr=around(y),
        color=COLOURS[number % len(COLOURS)],
        ecolor=(COLOURS[number % len(COLOURS)], 0.45),  # wide intervals of few seeds must not hide the curves
        marker=MARKERS[(number + number // len(COLOURS)) % len(MARKERS)],
        linewidth=1.5,
        elinewidth=0.8,
        label=label,
    )
