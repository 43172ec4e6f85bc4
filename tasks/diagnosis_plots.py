"""Figures of a diagnosis: best against worst answer, row by row, and each bin's margin in its two parts.

Colours and form are those of tasks.plots: blue is what is preferred, orange what is refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tasks.plots import BLUE, GREY, NARROW, ORANGE, figure

if TYPE_CHECKING:
    from rankwise.diagnosis import Bin, Trained
    from tasks.diagnosis import Diagnosis

QUADRANTS = {  # case -> where its label stands in the axes: right is chosen up, above is rejected up
    "chosen up, rejected down": (0.98, 0.02, "right"),
    "both up": (0.52, 0.93, "left"),
    "both down": (0.48, 0.02, "right"),
    "chosen down, rejected up": (0.02, 0.93, "left"),
}
REACH = 0.995  # quantile of all changes that the axes hold; a few strays would squeeze the rest
LEAST_REACH = 1e-3  # nats, where nothing has moved


def draw(found: Diagnosis, folder: Path) -> dict[str, Path]:
    """Every figure that these rows allow; caption -> file."""
    drawn = {
        "Every row: below the dotted line the best answer moved up against the worst, wherever both went.": _quadrants(
            found.shown, found, folder / "quadrants.png"
        )
    }
    lengths = [_span(one, 0) for one in found.by_length]
    longer = [("shorter", "as long", "longer")[(one.low > 0) - (one.high < 0) + 1] for one in found.by_longer]
    panels = [
        ("By length", "mean tokens of a row's answers", lengths, found.by_length),
        ("By difference in length", "the best answer is … than the worst", longer, found.by_longer),
        ("By the judge's gap", "log-odds for best over worst, nats", [_span(b, 1) for b in found.by_gap], found.by_gap),
    ]
    panels = [panel for panel in panels if panel[3]]
    drawn[
        "The margin's two parts, nats an answer: above 0 they widen it, below 0 they narrow it; their sum is the dot."
    ] = _parts(panels, folder / "parts.png")
    return drawn


def _quadrants(rows: Sequence[Trained], found: Diagnosis, path: Path) -> Path:
    import numpy as np

    chosen, rejected = (np.array([row.changes[place] for row in rows]) for place in (0, -1))
    reach = max(LEAST_REACH, 1.08 * float(np.quantile(np.abs([chosen, rejected]), REACH)))
    cases = [row.case for row in rows]
    split = "held-out" if found.evidence == "held_out" else "training"
    with figure(path, f"Log-prob against the reference, {split} rows", height=5.4, width=NARROW) as (axis,):
        axis.axhspan(-reach, 0, xmin=0.5, facecolor=BLUE, alpha=0.08)
        axis.axhspan(0, reach, xmax=0.5, facecolor=ORANGE, alpha=0.12)
        axis.axhline(0, color=GREY, linewidth=0.8)
        axis.axvline(0, color=GREY, linewidth=0.8)
        axis.plot([-reach, reach], [-reach, reach], color=GREY, linestyle=":")
        inside = lambda values: np.clip(values, -reach, reach)
        axis.scatter(inside(chosen), inside(rejected), s=12, color=BLUE, alpha=0.35, linewidths=0)
        axis.plot(chosen.mean(), rejected.mean(), marker="D", color=ORANGE, markersize=9, markeredgecolor="white")
        for case, (x, y, side) in QUADRANTS.items():
            text = f"{case}: {cases.count(case) / len(cases):.1%}"
            axis.annotate(text, (x, y), xycoords="axes fraction", ha=side, fontsize=10, fontweight="bold")
        axis.set(
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            xlabel="change of the best answer, nats (diamond: mean)",
            ylabel="change of the worst answer, nats",
        )
    return path


def _parts(panels: Sequence[tuple[str, str, list[str], Sequence[Bin]]], path: Path) -> Path:
    height = 0.8 + 2.2 * len(panels)
    with figure(path, "Where margins come from", rows=len(panels), height=height, width=NARROW) as axes:
        for axis, (title, unit, names, bins) in zip(axes, panels):
            _bars(axis, bins)
            axis.set(title=title, xlabel=unit, ylabel="nats")
            axis.set_xticks(range(len(names)), [f"{name}\n{b.found.rows:,} rows" for name, b in zip(names, bins)])
            axis.grid(axis="x", visible=False)
        axes[0].legend(loc="upper center", bbox_to_anchor=(0.5, 1.45), ncols=3)
    return path


def _bars(axis: Any, bins: Sequence[Bin]) -> None:
    places = list(range(len(bins)))
    moved = [one.found.per_answer for one in bins]
    parts = (
        (-0.18, [m.chosen.mean for m in moved], BLUE, "best rose by"),
        (0.18, [-m.rejected.mean for m in moved], ORANGE, "worst fell by"),
    )
    for shift, values, colour, label in parts:
        axis.bar([p + shift for p in places], values, width=0.34, color=colour, alpha=0.7, label=label)
    axis.plot(places, [m.margin.mean for m in moved], "o", color="black", markersize=5, label="margin")
    axis.axhline(0, color=GREY, linewidth=0.8)
    axis.margins(y=0.12)


def _span(one: Bin, digits: int) -> str:
    return f"{one.low:.{digits}f} to {one.high:.{digits}f}"
