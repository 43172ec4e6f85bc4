"""The answer of a benchmark: a table for people, a JSON record for the rest."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contest import Samples, quotient, summary
from benchmarks.workload import Case


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What was found, and what it may be."""

    value: float
    limit: float | None = None
    sign: str = "="  # = | ≤ | ≥
    unit: str = ""

    @property
    def met(self) -> bool:
        if self.limit is None:
            return True
        ways = {"=": self.value == self.limit, "≤": self.value <= self.limit, "≥": self.value >= self.limit}
        return ways[self.sign]

    def line(self, name: str) -> list[str]:
        limit = "" if self.limit is None else f"{self.sign} {self.limit:,.6g}{self.unit}"
        return [name, f"{self.value:,.6g}{self.unit}", limit, "" if self.limit is None else "yes" if self.met else "NO"]


def timed(found: dict[str, Samples]) -> dict[str, Any]:
    """Both sides' times in seconds, and how many times faster ours is: the quotient of the medians."""
    sides = {name: {"out_of_memory": one.out_of_memory, **summary(one.seconds)} for name, one in found.items()}
    return {**sides, "ratio": quotient(sides.get("trl"), sides["ours"])}


def case_name(case: Case) -> str:
    """A case in a table."""
    answers = case.answer if case.task == "sft" else f"{case.k} × {case.answer}"
    return f"{case.name}, {case.batch} × ({case.prompt} + {answers}), V {case.shape.vocabulary}"


def case_facts(case: Case) -> dict[str, Any]:
    """A case as the record shows it; Case.of reads it."""
    return case.spec()


def emit(record: dict[str, Any], title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], to: str | None):
    """Print the table; write the record to stdout ("-"), to a file, or nowhere (None).

    Where the record goes to stdout the table goes to stderr.
    """
    console = table(title, columns, lines, to)
    for name, value in notes(record):
        console.print(f"{name}: {value}", markup=False, highlight=False)
    text = json.dumps(record, indent=1, ensure_ascii=False)
    if to == "-":
        print(text)
    elif to is not None:
        Path(to).write_text(text + "\n", encoding="utf-8")


def table(title: str, columns: Sequence[str], lines: Sequence[Sequence[str]], to: str | None) -> Any:
    """Print a table, to stderr where the record goes to stdout; returns the console that it stands on."""
    from rich.console import Console
    from rich.table import Table

    made = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        made.add_column(column, justify="left" if number == 0 else "right")
    for line in lines:
        made.add_row(*line)
    # As wide as the table: cut in a log, a number would be lost.
    console = Console(stderr=to == "-", width=None if sys.stdout.isatty() else 200)
    console.print(made)
    return console


def notes(record: dict[str, Any]) -> list[tuple[str, str]]:
    """What is said below a table: settings, parity, machine."""
    machine = record["machine"]
    versions = ", ".join(f"{name} {value or 'missing'}" for name, value in machine["versions"].items())
    said = [("machine", f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads, {versions}")]
    if "matmul_flops" in machine:
        rates = ", ".join(f"{kind} {rate / 1e9:,.0f} GFLOP/s" for kind, rate in machine["matmul_flops"].items())
        said.append(("matmul ceiling", rates))
    if parity := record.get("parity"):
        apart = ", ".join(f"{name} {value:.1e}" for name, value in parity.items() if isinstance(value, float))
        said.append((f"parity{parity.get('of', ' in fp32, relative')}", apart))
    elif "parity" in record:
        said.append(("parity", "not checked, TRL took no part"))
    said += list(record.get("left_out", {}).items())
    return said + _settings(record["results"])


def _settings(results: list[dict[str, Any]]) -> list[tuple[str, str]]:
    """The settings that ran: once where all results had the same, else at each."""
    told = []
    for one in results:
        if "settings" in one:
            name = ", ".join(filter(None, (case_name(Case.of(one["case"])), one.get("compared"))))
            told.append((name, ", ".join(f"{side} {setting}" for side, setting in one["settings"].items() if setting)))
    if len({setting for _, setting in told}) == 1:
        return [("settings", told[0][1])]
    return [(f"settings of {name}", setting) for name, setting in told]


def say(what: str) -> None:
    """A line on what is done now, beside the progress of the steps."""
    print(what, file=sys.stderr, flush=True)


def seconds(one: dict[str, Any] | None) -> str:
    """A median with its quartiles."""
    return _with_quartiles(one, lambda value: f"{value:.3f}" if value < 10 else f"{value:.1f}")


def megabytes(one: dict[str, Any] | None) -> str:
    """A median of bytes as MiB."""
    return "—" if not one or one.get("median") is None else f"{one['median'] / 2**20:,.0f}"


def times(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f} ×"


def share(value: float | None) -> str:
    return "—" if value is None else f"{100 * value:.1f} %"


def rate(value: float | None) -> str:
    return "—" if value is None else f"{value:.2f}"


def tokens(one: dict[str, Any] | None) -> str:
    """A median of tokens a second with its quartiles."""
    return _with_quartiles(one, lambda value: f"{value:,.0f}")


def _with_quartiles(one: dict[str, Any] | None, show) -> str:
    if not one:
        return "—"
    if one.get("out_of_memory"):
        return "out of memory"
    if one["median"] is None:
        return "—"
    low, high = one["quartiles"]
    return f"{show(one['median'])} [{show(low)}, {show(high)}]"
