"""The soak as one figure, PNG: peak memory of each stage and time of a row, by the rows of its tables."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.toy_figure import BLUE, GREEN, GREY, ORANGE, PURPLE, STYLE

COLOURS = (BLUE, ORANGE, GREEN, PURPLE, GREY, "#56B4E9", "#E69F00", "#000000")
MARKS = "os^vDP<>X*dph"


def draw(lines: Sequence[dict[str, Any]], path: Path, *, limit_mib: int) -> None:
    """Write the figure of a soak's lines to path."""
    import matplotlib
    import numpy as np
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from PIL import Image  # comes with matplotlib

    with matplotlib.rc_context(matplotlib.rcParamsDefault | STYLE):
        figure = Figure(figsize=(11, 5.2), dpi=84)
        FigureCanvasAgg(figure)
        memory, time = figure.subplots(1, 2)
        for number, what in enumerate(dict.fromkeys(one["what"] for one in lines)):
            mine = [one for one in lines if one["what"] == what]
            again, colour = divmod(number, len(COLOURS))
            look = {"color": COLOURS[colour], "marker": MARKS[number % len(MARKS)], "markersize": 5}
            look["linestyle"] = "--" if again else "-"
            rows = [one["rows"] for one in mine]
            memory.plot(rows, [one["peak_bytes"] / 2**20 for one in mine], **look, label=what)
            # A start's time is spread over few rows at the left: so the rows by which a run is larger, at its size.
            more = [(one["rows"], one["cpu_us_a_row"]) for one in mine if one["cpu_us_a_row"]]
            if more:
                time.plot(*zip(*more), **look)
        if limit_mib:
            memory.axhline(limit_mib, color=GREY, linestyle=":", label="limit")
        memory.set(title="Peak memory of a stage", ylabel="MiB", ylim=(0, None))
        time.set(title="CPU time of a row more", ylabel="µs", yscale="log")
        for axis in (memory, time):
            axis.set(xscale="log", xlabel="rows")
        figure.legend(*memory.get_legend_handles_labels(), loc="outside right center")
        figure.canvas.draw()
    image = Image.fromarray(np.asarray(figure.canvas.buffer_rgba())).convert("RGB")
    image.quantize(128).save(path, "PNG", optimize=True)
