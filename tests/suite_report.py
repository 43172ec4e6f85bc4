"""A page about a run of the suite: what passed, what failed, what was skipped and why, and where the time went.

make suite                                   # all tests, the slow ones included; the page is .rankwise/suite.md
python -m pytest --suite-report=FILE …       # of any run
"""

from __future__ import annotations

import os
import platform
import subprocess
import time
from collections import Counter, defaultdict
from pathlib import Path

import pytest

SLOWEST = 25
ENDED = ("passed", "failed", "error", "skipped")


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--suite-report", metavar="FILE", type=Path, help="write a page about this run, in Markdown")


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.stash[BEGAN] = time.monotonic()


BEGAN = pytest.StashKey[float]()


def pytest_terminal_summary(terminalreporter, exitstatus: int, config: pytest.Config) -> None:
    path = config.getoption("--suite-report")
    if path is None or hasattr(config, "workerinput"):  # a process of xdist: the one that started it writes
        return
    reports = {outcome: terminalreporter.stats.get(outcome, []) for outcome in ENDED}
    seconds: dict[str, float] = defaultdict(float)  # a test's own, set-up and clean-up included
    for report in (report for many in terminalreporter.stats.values() for report in many):
        if isinstance(report, pytest.TestReport):
            seconds[report.nodeid] += report.duration
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(_lines(reports, seconds, time.monotonic() - config.stash[BEGAN])) + "\n")
    terminalreporter.write_line(f"report: {path}")


def _lines(reports: dict[str, list], seconds: dict[str, float], wall_s: float) -> list[str]:
    counts = ", ".join(f"{len(reports[outcome])} {outcome}" for outcome in ENDED if reports[outcome])
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True).stdout.strip()
    lines = ["# The suite", "", f"{counts or 'no test'} in {wall_s / 60:.1f} minutes", ""]
    lines += [f"- commit {commit or 'unknown'}, Python {platform.python_version()}, {os.cpu_count()} cores"]
    if bad := [*reports["failed"], *reports["error"]]:
        lines += ["", "## Failed", "", *(f"- `{report.nodeid}`: {_reason(report)}" for report in bad)]
    if skipped := Counter(_reason(report) for report in reports["skipped"]):
        lines += ["", "## Skipped", "", *(f"- {count} × {reason}" for reason, count in skipped.most_common())]
    files: dict[str, list[float]] = defaultdict(list)
    for test, took in seconds.items():
        files[test.partition("::")[0]].append(took)
    ordered = sorted(files.items(), key=lambda item: -sum(item[1]))
    lines += ["", "## Files", "", "| file | tests | seconds |", "|---|---|---|"]
    lines += [f"| {name} | {len(took)} | {sum(took):.1f} |" for name, took in ordered]
    lines += ["", "## Slowest tests", "", "| test | seconds |", "|---|---|"]
    slowest = sorted(seconds.items(), key=lambda item: -item[1])[:SLOWEST]
    return lines + [f"| {name.replace('|', chr(92) + '|')} | {took:.1f} |" for name, took in slowest]


def _reason(report: pytest.TestReport) -> str:
    """The last line of what a report says, such as "Skipped: no initdb here"."""
    said = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr or "")
    return (said.strip().splitlines() or ["?"])[-1][:200]
