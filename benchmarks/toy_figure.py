"""The toy world's numbers as one figure, PNG."""

from __future__ import annotations

from pathlib import Path
from statistics import fmean
from typing import Any

BLUE, ORANGE, GREEN, PURPLE, GREY = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#6B6B6B"
MARKS = {  # method: colour, marker
    "DPO, pairs": (BLUE, "o"),
    "DPO, rankings of 4": (GREEN, "s"),
    "DPO, best of 4": (PURPLE, "D"),
    "DPO, sampled": (GREY, "P"),
    "policy gradient, exact": (ORANGE, "^"),
    "policy gradient, sampled": (ORANGE, "v"),
}
STYLE = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#E6E6E6",
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "figure.constrained_layout.use": True,
}


def draw(record: dict[str, Any], path: Path) -> None:
    """Write the figure of a record (toy_runs.everything) to path."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        figure = Figure(figsize=(11, 8.6), dpi=84)
        FigureCanvasAgg(figure)
        axes = figure.subplots(2, 2)
        _front(axes[0, 0], record)
        _distances(axes[0, 1], record)
        _rewards(axes[1, 0], record)
        _sampled(axes[1, 1], record)
        figure.canvas.draw()
    # A palette makes the file a third as large.
    Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB").quantize(128).save(
        path, "PNG", optimize=True
    )


def _front(axis: Any, record: dict[str, Any]) -> None:
    """Reward against KL: the optimum's curve, and where each method ended on it."""
    line = record["front"]
    x, y = [one["kl_to_reference"] for one in line], [one["reward"] for one in line]
    axis.plot(x, y, color="black", linewidth=1, label=r"$\pi^*$ (E2)")
    for size, (method, (colour, marker)) in enumerate(MARKS.items()):
        mine = [one for one in record["results"] if (one["policy"], one["method"]) == ("llama", method)]
        x, y = [one["kl_to_reference"] for one in mine], [one["reward"] for one in mine]
        # one around another where they agree
        axis.plot(x, y, marker, color=colour, markerfacecolor="none", markersize=4 + 2 * size, label=method)
    for one in record["results"]:
        if (one["policy"], one["method"]) == ("llama", "DPO, pairs"):
            place = (one["kl_to_reference"], one["reward"])
            axis.annotate(f"β = {one['beta']:g}", place, (12, -14), textcoords="offset points")
    axis.set(
        title="Where the Llama ends: reward against KL",
        xlabel=r"KL$(\pi\,\|\,\pi_\mathrm{ref})$, nats",
        ylabel="expected reward",
    )
    axis.legend(loc="lower right")


def _distances(axis: Any, record: dict[str, Any]) -> None:
    """Total variation to π* by β: filled the table, hollow the Llama."""
    betas = record["effort"]["betas"]
    for number, (method, (colour, marker)) in enumerate(MARKS.items()):
        for kind, fill in (("table", colour), ("llama", "none")):
            mine = [one for one in record["results"] if (one["policy"], one["method"]) == (kind, method)]
            places = [betas.index(one["beta"]) + 0.12 * (number - 2.5) for one in mine]
            axis.plot(places, [one["total_variation"] for one in mine], marker, color=colour, markerfacecolor=fill)
    axis.set_yscale("log")
    axis.set_xticks(range(len(betas)), [f"β = {beta:g}" for beta in betas])
    axis.set(title=r"Distance to $\pi^*$: filled the table, hollow the Llama", ylabel="total variation", ylim=(None, 1))
    axis.grid(axis="x", visible=False)


def _rewards(axis: Any, record: dict[str, Any]) -> None:
    """Implicit against true rewards at the smallest β."""
    beta = min(record["effort"]["betas"])
    true = [one for line in record["rewards"] for one in line]
    for method in ("policy gradient, sampled", "policy gradient, exact", "DPO, sampled", "DPO, pairs"):
        colour, marker = MARKS[method]
        wanted = ("llama", method, beta)
        mine = next(one for one in record["results"] if (one["policy"], one["method"], one["beta"]) == wanted)
        recovered = [one for line in mine["recovered"] for one in line]
        axis.plot(true, recovered, marker, color=colour, markersize=3, alpha=0.7, label=method)
    ends = [min(true), max(true)]
    axis.plot(ends, ends, color="black", linewidth=1, zorder=0)
    axis.set(
        title=f"Rewards recovered by the Llama, β = {beta:g}",
        xlabel="true reward $r$",
        ylabel=r"$\beta\,\log(\pi/\pi_\mathrm{ref}) + \beta\,\log Z$",
    )
    axis.legend()


def _sampled(axis: Any, record: dict[str, Any]) -> None:
    """Total variation against the number of comparisons; mean over draws."""
    betas = record["effort"]["betas"]
    colours = dict(zip(betas, (ORANGE, PURPLE, GREEN, BLUE)))
    x = record["effort"]["counts"]
    for k, style in ((2, "-"), (4, "--")):
        for beta in betas:
            mine = [one for one in record["sampled"] if (one["k"], one["beta"]) == (k, beta)]
            y = [fmean(one["total_variation"]) for one in mine]
            axis.plot(x, y, style, color=colours[beta], marker=".", label=f"β = {beta:g}, K = {k}")
    axis.plot(x, [0.7 * min(y) * (x[-1] / n) ** 0.5 for n in x], ":", color=GREY, label="slope −1/2")
    axis.set(
        xscale="log",
        yscale="log",
        title=r"Distance to $\pi^*$ by sampled preferences, the table",
        xlabel="comparisons",
        ylabel="total variation",
    )
    axis.legend(ncols=2)
