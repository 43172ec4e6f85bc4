"""Figures that stages write beside their metrics: PNG, the same bytes for the same numbers, no display needed.

Blue is the policy and what is preferred, orange the reference and what is refused, in every figure; the two are told
apart by people with any kind of colour blindness (Okabe and Ito's palette), and by line style in print.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rankwise.rows import write_aside

BLUE, ORANGE, GREEN, GREY = "#0072B2", "#D55E00", "#009E73", "#6B6B6B"
SIZE = (9.0, 5.6)  # inches, at DPI: 900 x 560 pixels
NARROW = 6.2  # width of the figures of a page that is also read on a phone
DPI = 100
STYLE = {
    "font.size": 11,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 10,
    "figure.constrained_layout.use": True,
}

# A panel of training_curves: title, unit of the y axis, and (column, label, colour, line style) of each line.
Line = tuple[str, str, str, str]
PANELS: tuple[tuple[str, str, tuple[Line, ...]], ...] = (
    ("Loss", "nats", (("loss", "training", BLUE, "-"), ("held_out_loss", "held out", ORANGE, "--"))),
    ("Reward margin, best against the others", "β · nats", (("margin", "margin", BLUE, "-"),)),
    (
        "Answers ranked rightly",
        "share of pairs",
        (("accuracy", "training", BLUE, "-"), ("held_out_accuracy", "held out", ORANGE, "--")),
    ),
    (
        "Log-prob against the reference",
        "nats an answer",
        (("chosen_logp_change", "chosen", BLUE, "-"), ("rejected_logp_change", "rejected", ORANGE, "--")),
    ),
    ("KL to the reference", "nats an answer", (("kl", "KL", BLUE, "-"),)),
    ("Gradient norm, before clipping", "", (("grad_norm", "norm", GREY, "-"),)),
)
MOST_PANELS = 4


def training_curves(
    points: list[dict[str, float]], path: Path, *, title: str = "Training", start_loss: float | None = None
) -> None:
    """Loss, margins, accuracy, log-prob changes, KL over optimizer steps: a panel for each that points have, up to 4.

    start_loss (nats): where a preference loss must start (log K! for a strict ranking of K), drawn as a line.
    """
    panels = [panel for panel in PANELS if any(_column(points, line[0])[1] for line in panel[2])][:MOST_PANELS]
    assert panels, f"no known column in the curves: {sorted({key for point in points for key in point})}"
    columns = 1 if len(panels) == 1 else 2
    with figure(path, title, rows=math.ceil(len(panels) / columns), columns=columns) as axes:
        for axis, (name, unit, lines) in zip(axes, panels):
            _curves(axis, points, lines)
            if name == "Loss" and start_loss is not None:
                axis.axhline(start_loss, color=GREY, linestyle=":", label=f"equal rewards: {start_loss:.3g}")
            if "accuracy" in lines[0]:
                axis.axhline(0.5, color=GREY, linestyle=":", label="chance")
            axis.set(title=name, ylabel=unit, xlabel="optimizer step")
            if len(axis.get_legend_handles_labels()[0]) > 1:
                axis.legend()
        for axis in axes[len(panels) :]:
            axis.remove()


def reward_histogram(
    policy: Sequence[float],
    reference: Sequence[float],
    path: Path,
    *,
    title: str = "Rewards of the policy's answers against the reference's",
    unit: str = "judge's reward",
) -> None:
    """Two distributions of rewards over the same bins, with their means."""
    _histograms(policy, reference, path, title=title, unit=unit, digits=2)


def length_histogram(
    policy: Sequence[float],
    reference: Sequence[float],
    path: Path,
    *,
    title: str = "Answer lengths: does the policy win by writing more?",
    unit: str = "tokens an answer",
) -> None:
    """Answer lengths with their mean beside the reference's, over the same bins."""
    _histograms(policy, reference, path, title=title, unit=unit, digits=1)


def answers(
    ended: Sequence[int], cut: Sequence[int], different: Sequence[int], path: Path, *, k: int, title: str
) -> None:
    """Sampled answers: their lengths, how they ended, and how many of a prompt's K say something of their own.

    Args:
        ended: tokens of each answer that ended by itself.
        cut: tokens of each answer that the length limit ended.
        different: different answers among the K, one number a prompt; drawn where some prompt lacks one.
    """
    repeated = min(different) < k
    with figure(path, title, columns=2 if repeated else 1) as axes:
        _lengths_by_end(axes[0], ended, cut)
        if repeated:
            places = range(1, k + 1)
            shares = [100 * sum(n == place for n in different) / len(different) for place in places]
            axes[1].bar(places, shares, color=[ORANGE] * (k - 1) + [BLUE], alpha=0.6)
            axes[1].set(title="Different answers to a prompt", xlabel=f"of K = {k}", ylabel="% of prompts")
            axes[1].set_xticks(list(places))
            axes[1].grid(axis="x", visible=False)


def _lengths_by_end(axis: Any, ended: Sequence[int], cut: Sequence[int]) -> None:
    longest, count = max([*ended, *cut]), len(ended) + len(cut)
    step = -(-(longest + 1) // 40)  # whole tokens a bar, 40 bars at most
    edges = [step * n - 0.5 for n in range(longest // step + 2)]
    parts = ((ended, f"ended by itself: {len(ended) / count:.1%}", BLUE), (cut, f"cut: {len(cut) / count:.1%}", ORANGE))
    shown = [part for part in parts if part[0]]
    axis.hist(
        [lengths for lengths, _, _ in shown],
        edges,
        weights=[[100 / count] * len(lengths) for lengths, _, _ in shown],
        color=[colour for _, _, colour in shown],
        label=[label for _, label, _ in shown],
        stacked=True,
        alpha=0.6,
    )
    mean = (sum(ended) + sum(cut)) / count
    axis.axvline(mean, color=GREY, linestyle="--", label=f"mean {mean:.1f}")
    axis.set(title="Lengths", xlabel="tokens an answer", ylabel="% of answers")
    axis.legend()


def win_rates(rows: list[dict[str, Any]], path: Path, *, title: str = "Win rate of the policy") -> None:
    """A point and its confidence interval for each row {"name", "mean", "low", "high"}, against even odds."""
    with figure(path, title, height=1.8 + 0.75 * len(rows)) as (axis,):
        places = range(len(rows) - 1, -1, -1)  # the first row on top
        for place, row in zip(places, rows):
            below, above = max(0.0, row["mean"] - row["low"]), max(0.0, row["high"] - row["mean"])
            colour = BLUE if row["low"] > 0.5 else ORANGE if row["high"] < 0.5 else GREY
            axis.errorbar(row["mean"], place, xerr=[[below], [above]], fmt="o", color=colour, capsize=5, markersize=8)
            text = f"{row['mean']:.1%}  [{row['low']:.1%}, {row['high']:.1%}]"
            middle = min(max(row["mean"], 0.15), 0.85)  # the text stays inside
            axis.annotate(text, (middle, place), (0, 10), textcoords="offset points", ha="center", color=colour)
        axis.axvline(0.5, color=GREY, linestyle=":")
        axis.annotate(
            "even", (0.5, 1.0), (4, -12), xycoords=("data", "axes fraction"), textcoords="offset points", color=GREY
        )
        axis.set(
            xlim=(0, 1), ylim=(-0.6, len(rows) - 0.3), xlabel="share of comparisons won, ties one half; 95 % interval"
        )
        axis.set_yticks(list(places), [row["name"] for row in rows])
        axis.grid(axis="y", visible=False)


def intervals(
    rows: Sequence[dict[str, Any]],
    path: Path,
    *,
    title: str,
    unit: str,
    limit: float | None,
    at_most: bool,
    even: float,
    span: tuple[float, float] | None = None,
) -> None:
    """A point and its interval for each row {"name", "mean", "low", "high"} beside a gate's limit, as shares.

    Orange lies wholly beyond the limit, grey on both sides of it, blue within it (or has none to keep).

    Args:
        even: where a judge without a fault would lie, or chance; drawn dotted.
        span: ends of the axis; fitted to the rows where None.
    """
    with figure(path, title, height=1.5 + 0.38 * len(rows), width=NARROW) as (axis,):
        places = range(len(rows) - 1, -1, -1)
        for place, row in zip(places, rows):
            below, above = max(0.0, row["mean"] - row["low"]), max(0.0, row["high"] - row["mean"])
            colour = _side(row, limit, at_most)
            axis.errorbar(
                100 * row["mean"], place, xerr=[[100 * below], [100 * above]], fmt="o", color=colour, capsize=4
            )
        axis.axvline(100 * even, color=GREY, linestyle=":")
        if limit is not None:
            axis.axvline(100 * limit, color=ORANGE, linestyle="--", label=f"limit: {100 * limit:g}")
            axis.legend(loc="lower right")
        axis.set(xlabel=unit, ylim=(-0.7, len(rows) - 0.3))
        if span is not None:
            axis.set_xlim(100 * span[0], 100 * span[1])
        axis.set_yticks(list(places), [row["name"] for row in rows])
        axis.grid(axis="y", visible=False)


def _side(row: dict[str, Any], limit: float | None, at_most: bool) -> str:
    if limit is None:
        return BLUE
    low, high, bound = (row["low"], row["high"], limit) if at_most else (-row["high"], -row["low"], -limit)
    return ORANGE if low > bound else BLUE if high <= bound else GREY


def calibration(bins: Sequence[tuple[float, float, int]], path: Path, *, title: str) -> None:
    """(confidence, share that was right, pairs) of each step against the diagonal, the pairs as bars below."""
    with figure(path, title, rows=2, ratios=(3.0, 1.0), height=4.6, width=NARROW) as (curve, counts):
        sure, right, sizes = ([one[part] for one in bins] for part in range(3))
        curve.plot([0.5, 1], [0.5, 1], color=GREY, linestyle=":", label="as sure as it is right")
        curve.plot(sure, right, color=BLUE, marker="o", label="this judge")
        curve.set(ylabel="share that was right", xlim=(0.49, 1.01), ylim=(min(0.45, *right) - 0.03, 1.03))
        curve.legend(loc="upper left")
        counts.bar(sure, sizes, width=0.03, color=BLUE, alpha=0.6)
        counts.set(xlabel="probability that the judge gave to its own choice", ylabel="pairs", xlim=(0.49, 1.01))


def orders(odds: Sequence[tuple[float, float]], path: Path, *, title: str) -> None:
    """The same pair in both orders, log-odds for one of its answers; without position bias, points lie on the diagonal.

    In the two quadrants that are coloured the winner changes with the order.
    """
    first, second = ([pair[part] for pair in odds] for part in range(2))
    reach = 1.05 * max(1e-3, *map(abs, first), *map(abs, second))
    with figure(path, title, height=4.8, width=NARROW) as (axis,):
        for corner in ((0, -reach), (-reach, 0)):
            axis.add_patch(_patch(corner, reach))
        axis.plot([-reach, reach], [-reach, reach], color=GREY, linestyle=":")
        axis.scatter(first, second, s=12, color=BLUE, alpha=0.35, linewidths=0)
        axis.set(
            xlim=(-reach, reach),
            ylim=(-reach, reach),
            xlabel="log-odds for an answer shown first, nats",
            ylabel="log-odds for it shown second, nats",
        )


def _patch(corner: tuple[float, float], size: float) -> Any:
    from matplotlib.patches import Rectangle

    return Rectangle(corner, size, size, facecolor=ORANGE, alpha=0.12, edgecolor="none")


def rounds(
    found: dict[str, dict[str, Any]], path: Path, *, title: str = "Round by round, against the SFT model"
) -> None:
    """Win rates, KL and answer length over rounds, with their intervals; round 0 is the SFT model itself.

    Args:
        found: numbers by round, as tasks.history gives them.
    """
    judged = any("win_rate" in one for one in found.values())
    with figure(path, title, columns=3 if judged else 2, height=3.6) as axes:
        *first, kl, length = axes
        for axis in first:
            for name, label, colour in (("judge", "judge", ORANGE), ("gold", "gold", BLUE)):
                points = {int(n): one["win_rate"][name] for n, one in found.items() if name in one.get("win_rate", {})}
                if points:
                    _interval_line(axis, points, colour, label)
            axis.axhline(0.5, color=GREY, linestyle=":")
            axis.set(title="Win rate", ylim=(0, 1))
            axis.legend()
        _interval_line(kl, {int(n): one["kl"] for n, one in found.items()}, BLUE, "KL")
        kl.set(title="KL to the SFT model", ylabel="nats an answer")
        length.plot([int(n) for n in found], [one["length"] for one in found.values()], color=BLUE, marker="o")
        length.set(title="Answer length", ylabel="words", ylim=(0, None))
        for axis in axes:
            axis.set(xlabel="round", xticks=[int(n) for n in found])


def _interval_line(axis: Any, points: dict[int, dict[str, float]], colour: str, label: str) -> None:
    means = [point["mean"] for point in points.values()]
    below = [max(0.0, point["mean"] - point["low"]) for point in points.values()]
    above = [max(0.0, point["high"] - point["mean"]) for point in points.values()]
    axis.errorbar(list(points), means, yerr=[below, above], color=colour, marker="o", capsize=4, label=label)


def _histograms(
    policy: Sequence[float], reference: Sequence[float], path: Path, *, title: str, unit: str, digits: int
) -> None:
    everything = [*policy, *reference]
    low, high = min(everything), max(everything)
    edges = [low + (high - low or 1.0) * index / 30 for index in range(31)]
    with figure(path, title) as (axis,):
        for values, name, colour in ((reference, "reference", ORANGE), (policy, "policy", BLUE)):
            mean = sum(values) / len(values)
            weights = [100 / len(values)] * len(values)
            axis.hist(
                values,
                edges,
                weights=weights,
                color=colour,
                alpha=0.45,
                label=f"{name}, mean {mean:.{digits}f}",
            )
            axis.hist(values, edges, weights=weights, color=colour, histtype="step", linewidth=1.5)
            axis.axvline(mean, color=colour, linestyle="-" if name == "policy" else "--", linewidth=2)
        axis.set(xlabel=unit, ylabel="% of answers")
        axis.legend()


def _curves(axis: Any, points: list[dict[str, float]], lines: tuple[Line, ...]) -> None:
    for column, label, colour, style in lines:
        steps, values = _column(points, column)
        if len(values) > 60:
            axis.plot(steps, values, color=colour, alpha=0.25, linewidth=0.8)
            values = _smooth(values, len(values) // 30)
            label = f"{label}, running mean"
        if values:
            axis.plot(steps, values, color=colour, linestyle=style, label=label, marker="." if len(values) < 3 else "")


def _column(points: list[dict[str, float]], name: str) -> tuple[list[float], list[float]]:
    kept = [(point["step"], point[name]) for point in points if isinstance(point.get(name), (int, float))]
    return [step for step, _ in kept], [value for _, value in kept]


def _smooth(values: list[float], reach: int) -> list[float]:
    sums = [0.0]
    for value in values:
        sums.append(sums[-1] + value)
    spans = [(max(0, index - reach), min(len(values), index + reach + 1)) for index in range(len(values))]
    return [(sums[end] - sums[begin]) / (end - begin) for begin, end in spans]


@contextmanager
def figure(
    path: Path,
    title: str,
    *,
    rows: int = 1,
    columns: int = 1,
    ratios: tuple[float, ...] | None = None,
    height: float = SIZE[1],
    width: float = SIZE[0],
) -> Iterator[list[Any]]:
    """Axes to draw on; the figure is written to path, atomically, when the block ends."""
    import matplotlib
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        canvas = Figure(figsize=(width, height), dpi=DPI)
        FigureCanvasAgg(canvas)
        axes = canvas.subplots(rows, columns, squeeze=False, height_ratios=ratios)
        canvas.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        yield list(axes.flat)
        # No date and no version in the file: its bytes are hashed.
        save: Callable[[Path], None] = lambda aside: canvas.savefig(aside, format="png", metadata={"Software": None})
        write_aside(path, save)
