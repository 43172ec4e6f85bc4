"""The command line: a campaign with its table, one reader, or one case again."""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.table import Table

from . import __doc__ as DOC
from . import campaign, law
from .table import READERS

SHOWN = 3  # kinds of messages a reader has in the table


def main(argv: Sequence[str] | None = None) -> int:
    """Returns 0 where the law held in every case, 1 where it did not, 2 for a mistake on the command line."""
    parser = argparse.ArgumentParser(
        prog="python -m tests.fuzzing", description=DOC, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, default=100_000, metavar="N", help="in all, by weight (%(default)s)")
    parser.add_argument("--reader", action="append", choices=sorted(READERS), help="only this one; may be repeated")
    parser.add_argument("--processes", type=int, default=2, metavar="N", help="at once (%(default)s)")
    parser.add_argument("--out", type=Path, default=Path("reports/fuzzing"), help="folder of the report (%(default)s)")
    parser.add_argument("--replay", metavar="READER:NUMBER", help="one case again, with its traceback")
    given = parser.parse_args(argv)
    if given.replay:
        return _replay(parser, given.replay)
    if given.cases < 1 or given.processes < 1:
        parser.error("--cases and --processes: at least 1 was expected")
    cases = campaign.shares(given.cases, given.reader or list(READERS))
    law.load_all(cases)
    began = time.monotonic()
    tallies = campaign.run(cases, processes=given.processes, show=lambda line: print(line, flush=True))
    seconds = time.monotonic() - began
    command = " ".join(["python -m tests.fuzzing", *(sys.argv[1:] if argv is None else argv)])
    campaign.write(given.out, tallies, command, seconds)
    _show(tallies, seconds)
    print(f"report: {given.out / 'report.json'}")
    return 1 if any(tally.defects for tally in tallies.values()) else 0


def _replay(parser: argparse.ArgumentParser, words: str) -> int:
    name, _, number = words.rpartition(":")
    if name not in READERS or not number.isdecimal():
        parser.error(f"--replay {words}: READER:NUMBER was expected; readers: {', '.join(sorted(READERS))}")
    with tempfile.TemporaryDirectory() as made:
        ending = law.judge(name, int(number), Path(made) / "case")
        for path in sorted(path for path in (Path(made) / "case").rglob("*") if path.is_file()):
            data = path.read_bytes()
            print(f"{path.name}: {len(data):,} bytes, {data[:200]!r}{' …' if len(data) > 200 else ''}")
    detail = ending.detail.encode("utf-8", "backslashreplace").decode()
    print(f"{ending.kind} ({1000 * ending.seconds:.1f} ms)\n{detail}")
    return 0 if ending.lawful else 1


def _show(tallies: dict[str, campaign.Tally], seconds: float) -> None:
    table = Table("reader", title=f"bad input: {seconds / 60:.1f} minutes", title_justify="left", title_style="bold")
    for name in ("cases", "read", "told", "defects", "slowest, ms"):
        table.add_column(name, justify="right")
    table.add_column(f"most frequent of the messages (the first {SHOWN})", max_width=90)
    for name, tally in tallies.items():
        told = [(kind.removeprefix("told: "), n) for kind, n in tally.kinds.most_common() if kind.startswith("told: ")]
        row = _row(tally)
        table.add_row(name, *row, "\n".join(f"{n} {kind}" for kind, n in told[:SHOWN]))
    table.add_section()
    every = campaign.Tally()
    for tally in tallies.values():
        every.join(tally)
    table.add_row("all", *_row(every), "")
    console = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 170)
    console.print(table, markup=False)
    for name, tally in tallies.items():
        for kind, found in tally.defects.items():
            print(f"{name}: {tally.kinds[kind]} × {kind}; --replay {name}:{found[0]['case']}")


def _row(tally: campaign.Tally) -> list[str]:
    read = tally.kinds["read"]
    told = sum(n for kind, n in tally.kinds.items() if kind.startswith("told: "))
    bad = tally.cases - read - told
    return [f"{tally.cases:,}", f"{read:,}", f"{told:,}", f"{bad:,}", f"{1000 * tally.slowest[0]:,.0f}"]
