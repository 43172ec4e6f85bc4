"""What a person sees at the end of a run: the result, minutes per stage, and where to look next.

Everything here is read from files that stages wrote (reports/STAGE/metrics.json, .rankwise/), so a table can
always be shown, whether a stage ran just now or was cached. What no stage wrote is left out.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise import json_text
from rankwise.types import UserError
from tasks.params import read_yaml
from tasks.rounds import stage_files
from tasks.tracking import home

REPORTS = Path("reports")
HOME = home()
PLOT_ENDINGS = {".png", ".svg", ".html"}


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """How a stage of a run ended."""

    stage: str
    state: str  # "ran" | "cached" | "failed" | "stopped" | "not run"
    note: str = ""  # which kind of cached, or why it failed
    seconds: float = 0.0  # wall time here, DVC and Prefect included
    status: int = 0  # exit status of the stage's own command; 2: a mistake of the user's


def minutes(outcome: Outcome) -> str:
    """Minutes of a stage as a cell, empty for what did not run."""
    return f"{outcome.seconds / 60:.2f}" if outcome.state in ("ran", "failed") else ""


def stages_markdown(outcomes: Iterable[Outcome]) -> str:
    """The stages of a run as a Markdown table."""
    rows = ["| stage | state | minutes | |", "|---|---|---:|---|"]
    for outcome in outcomes:
        rows.append(f"| {outcome.stage} | {outcome.state} | {minutes(outcome)} | {_cell(outcome.note)} |")
    return "\n".join(rows)


def metrics_markdown(stage: str, mlflow_run: str | None = None) -> str | None:
    """A stage's metrics as a Markdown table under a link to its MLflow run; None if it has no metrics file.

    mlflow_run is the address of the run that made these bytes; without one, the stage's last run is named.
    """
    metrics = metrics_of(stage)
    if not metrics:
        return None
    rows = ["| metric | value |", "|---|---:|"]
    rows += [f"| {name} | {_short(value)} |" for name, value in flatten(metrics).items()]
    last = _read(HOME / "runs" / f"{stage}.json").get("url")
    link = f"[MLflow run of {stage}]({mlflow_run})" if mlflow_run else f"[last MLflow run of {stage}]({last})"
    return (f"{link}\n\n" if mlflow_run or last else "") + "\n".join(rows)


def headline_markdown() -> str:
    """The result as a Markdown table; empty before the first evaluation."""
    rows = headline()
    if not rows:
        return ""
    cells = [f"| {name} | {policy} | {reference} |" for name, policy, reference in rows]
    table = "\n".join(["| result | policy | reference |", "|---|---:|---:|", *cells])
    if not (by_round := rounds()):
        return table
    lines = [f"| {' | '.join(row)} |" for row in by_round]
    return "\n".join([table, "", lines[0], "|---|---:|---:|---:|---:|", *lines[1:]])


def headline(report: dict[str, Any] | None = None) -> list[tuple[str, str, str]]:
    """(measure, policy's value, reference's value) of an evaluation report, those that it holds.

    A value with an interval is shown as `mean [low, high]`.
    """
    report = metrics_of(last_round("evaluate")) if report is None else report
    wins = _section(report, "win_rate")
    both = ("policy", "reference")
    found = [
        ("win rate (judge)", wins.get("judge"), None, True),
        ("win rate (gold)", wins.get("gold"), None, True),
        ("reward", *_pair(report.get("reward"), both), False),
        ("positive share (gold)", *_pair(report.get("positive_share"), both), True),
        ("KL to the reference (nats)", report.get("kl"), None, False),
        ("answer length (words)", *_pair(report.get("length"), both), False),
        ("distinct-2", *_pair(report.get("distinct_2"), both), False),
        ("preference accuracy", report.get("preference_accuracy"), None, True),
    ]
    return [
        (name, interval(policy, percent), interval(reference, percent))
        for name, policy, reference, percent in found
        if policy is not None or reference is not None
    ]


def rounds(report: dict[str, Any] | None = None) -> list[list[str]]:
    """A head and a row a round, of an evaluation report that has several; else empty."""
    report = metrics_of(last_round("evaluate")) if report is None else report
    found = _section(report, "rounds")
    rows = [
        [
            number,
            interval(_section(one, "win_rate").get("judge"), percent=True),
            interval(_section(one, "win_rate").get("gold"), percent=True),
            interval(one.get("kl")),
            interval(one.get("length")),
        ]
        for number, one in found.items()
        if isinstance(one, dict)
    ]
    return [["round", "win rate (judge)", "win rate (gold)", "KL (nats)", "words"], *rows] if rows else []


def interval(value: Any, percent: bool = False) -> str:
    """A number, or a mean with its confidence bounds, as text."""
    if value is None:
        return ""
    if isinstance(value, dict):
        if "mean" not in value:
            return ""
        bounds = [interval(value[key], percent) for key in ("low", "high") if value.get(key) is not None]
        return interval(value["mean"], percent) + (f" [{', '.join(bounds)}]" if bounds else "")
    is_share = percent and isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e9
    return f"{100 * value:.1f} %" if is_share else _short(value)


def show(outcomes: list[Outcome], *, prefect: str) -> None:
    """Print the end table; prefect says where the run is to be seen."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    console = Console(highlight=False, soft_wrap=True)
    console.print()
    whole = all(outcome.state in ("ran", "cached") for outcome in outcomes)
    if whole and (rows := headline()):  # after a failure the report is that of an earlier run
        table = Table("result", title="policy against reference", title_justify="left", title_style="bold")
        table.add_column("policy", justify="right")
        table.add_column("reference", justify="right")
        for row in rows:
            table.add_row(*row)
        console.print(table)
    if whole and (rows := rounds()):
        table = Table(*rows[0], title="round by round; 0 is the reference", title_justify="left", title_style="bold")
        for row in rows[1:]:
            table.add_row(*row)
        console.print(table)
    table = Table("stage", "state", title="stages", title_justify="left", title_style="bold")
    table.add_column("minutes", justify="right")
    table.add_column("")
    for outcome in outcomes:
        table.add_row(outcome.stage, outcome.state, minutes(outcome), escape(outcome.note))
    total = sum(outcome.seconds for outcome in outcomes)
    table.add_section()
    table.add_row("all", "", f"{total / 60:.2f}" if total else "", counts(outcomes))
    console.print(table)
    for name, place in _places(outcomes, prefect):
        console.print(f"  [bold]{name:<8}[/] {escape(place)}")


def in_short(outcomes: list[Outcome]) -> str:
    """The result in a few words: what failed, else the win rate if it was measured, else how stages ended."""
    for outcome in outcomes:
        if outcome.state == "failed":
            return f"{outcome.stage} failed"
    wins = interval(_section(metrics_of(last_round("evaluate")), "win_rate").get("judge"), percent=True)
    evaluated = any(outcome.stage.partition("@")[0] == "evaluate" for outcome in outcomes)
    return f"win rate {wins}, {counts(outcomes)}" if wins and evaluated else counts(outcomes)


def counts(outcomes: Iterable[Outcome]) -> str:
    """`3 ran, 9 cached`"""
    states = [outcome.state for outcome in outcomes]
    return ", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states))


def metrics_of(stage: str) -> dict[str, Any]:
    """The metrics file of a stage, empty if there is none to read."""
    return _read(REPORTS / stage_files(stage) / "metrics.json")


def last_round(stage: str) -> str:
    """A stage's address in the last round of params.yaml: "evaluate@3"; itself where there are no rounds."""
    try:
        return f"{stage}@{int(read_yaml(Path('params.yaml'))['rounds']['count'])}"
    except (UserError, LookupError, TypeError, ValueError):
        return stage


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested metrics as one level: {"kl": {"mean": 1}} is {"kl.mean": 1}, the name that `dvc metrics` uses."""
    flat: dict[str, Any] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        else:
            flat[f"{prefix}{key}"] = item
    return flat


def _section(report: dict[str, Any], name: str) -> dict[str, Any]:
    found = report.get(name)
    return found if isinstance(found, dict) else {}


def _pair(value: Any, keys: tuple[str, str]) -> tuple[Any, Any]:
    if isinstance(value, dict) and any(key in value for key in keys):
        return value.get(keys[0]), value.get(keys[1])
    return value, None


def _places(outcomes: list[Outcome], prefect: str) -> list[tuple[str, str]]:
    plots = sorted(str(path) for path in REPORTS.rglob("*") if path.suffix in PLOT_ENDINGS)
    places = []
    if plots:
        more = f" and {len(plots) - 4} more under {REPORTS}/" if len(plots) > 4 else ""
        places.append(("plots", ", ".join(plots[:4]) + more))
    policy = Path("models") / stage_files(last_round("policy"))
    if policy.exists():
        places.append(("model", f"{policy}/ (transformers.AutoModelForCausalLM.from_pretrained reads it)"))
    states = {outcome.state for outcome in outcomes}
    if "ran" in states and states <= {"ran", "cached"}:
        places.append(("keep it", "git add dvc.lock, with what else `git status` shows, and commit"))
    places.append(("MLflow", "make mlflow"))
    places.append(("Prefect", prefect))
    return places


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json_text.parse(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _short(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    return _cell(str(value))


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("\n", " ")
