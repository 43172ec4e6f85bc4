"""What stands at the head of a run's page in MLflow, as Markdown: the results, before any click."""

from __future__ import annotations

import re
from typing import Any

ROWS = 30  # a table longer than this is read by nobody; the metrics tab has everything
PAD = "\u00a0\u00a0\u00a0"  # MLflow's page sets table cells without any space between them


def results(final: dict[str, float], *, seconds: float, status: str) -> str:
    """A stage's own results: one line of state, a table of its final numbers."""
    state = {"FINISHED": "Finished in", "RUNNING": "Running for"}.get(status, f"{status.capitalize()} after")
    shown = intervals({name: value for name, value in final.items() if not name.startswith("time/")})
    table = number_table("result", dict(list(shown.items())[:ROWS])) if shown else ""
    more = f"\n\n… and {len(shown) - ROWS} more under Metrics." if len(shown) > ROWS else ""
    return f"{state} {duration(seconds)}.\n\n{table}{more}".strip()


def headline(metrics: dict[str, float]) -> str:
    """The evaluation in one line, for the page of the pipeline; "" where it has none."""
    own = {name.removeprefix("evaluate/"): value for name, value in metrics.items() if name.startswith("evaluate/")}
    return " · ".join(f"{name} **{value}**" for name, value in list(intervals(own).items())[:8])


def stages(children: list[Any], experiment: str) -> str:
    """The pipeline's stages in the order they ran, each with a link to its run."""
    if not children:
        return "No stage ran: DVC had every result already."
    lines = [f"| stage that ran{PAD} | state{PAD} | time |", "|:--|:--|--:|"]
    for child in children:
        info = child.info
        link = f"[{info.run_name}]({page(experiment, info.run_id)})"
        took = duration((info.end_time - info.start_time) / 1000) if info.end_time else "–"
        lines.append(f"| {link}{PAD} | {info.status.lower()}{PAD} | {took} |")
    return "\n".join(lines)


def number_table(title: str, values: dict[str, str]) -> str:
    """Names and shown values as a table."""
    lines = [f"| {title}{PAD} | value |", "|:--|:--|", *(f"| {name}{PAD} | {text} |" for name, text in values.items())]
    return "\n".join(lines)


def intervals(values: dict[str, float]) -> dict[str, str]:
    """Numbers as text, with a mean and its bounds on one line: {"win_rate/judge": "0.86 [0.81, 0.90]"}."""
    shown: dict[str, str] = {}
    for name, value in values.items():
        stem, mark, last = re.fullmatch(r"(.*?)([./]?)([^./]*)", name, re.S).groups()
        low, high = values.get(f"{stem}{mark}low"), values.get(f"{stem}{mark}high")
        if last == "mean" and low is not None and high is not None:
            shown[stem] = f"{number(value)} [{number(low)}, {number(high)}]"
        elif not (last in ("low", "high") and f"{stem}{mark}mean" in values):
            shown[name] = number(value)
    return shown


def page(experiment: str, run_id: str) -> str:
    """The address of a run's page within the UI, opened in its model-training mode (it has one for chat too)."""
    return f"#/experiments/{experiment}/runs/{run_id}?workflowType=machine_learning"


def number(value: float) -> str:
    """Three decimals below ten, then fewer; whole numbers whole; small ones in exponents."""
    if float(value).is_integer() and abs(value) < 1e15:
        return f"{value:,.0f}"
    return f"{value:.3f}" if 0.001 <= abs(value) < 10 else f"{value:.4g}"


def duration(seconds: float) -> str:
    """Seconds as people say them: 8.2 s, 3 min 20 s, 2 h 05 min."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest:02d} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60:02d} min"
