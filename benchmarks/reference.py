"""How fast are the reference's log-probabilities over a table, ours against TRL's precompute_ref_log_probs.

    python -m benchmarks.reference
    python -m benchmarks.reference --rows 1024 --vary prompt

A pass begins with an empty store. After each of ours the same table is scored once more through the same store, as
happens when learning rate, β or loss change, which are no part of a row's key: the rows recomputed then are counted.
TRL is given the table sorted by length.
"""

from __future__ import annotations

from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import count
from benchmarks.cli import Chosen
from benchmarks.contest import Effort, contest
from benchmarks.parity import reference_parity
from benchmarks.workload import Case
from rankwise.types import UserError

COLUMNS = ("case", "ours s", "TRL s", "ratio", "ours rows/s", "TRL rows/s", "rows recomputed", "second pass s")


def main(arguments: list[str]) -> None:
    parser = cli.parser("reference", __doc__)
    cli.add_trainer_options(parser)
    parser.add_argument("--rows", type=count, help="rows of the table (64); each has two answers")
    options = parser.parse_args(arguments)
    cli.need_trl(options)
    options.batch = options.rows or options.batch or (8 if options.quick else 64)
    if options.vary == "k":
        raise UserError("--vary k: TRL scores pairs only; vary prompt, answer, vocabulary or batch (rows)")
    cases = cli.series(options, cli.case_of(options))
    parity = None if options.ours_only else reference_parity(cases[0])
    machine = cli.machine(options, ceiling=False)
    chosen = cli.choose(options, cases[0], job="reference")
    results = [measure(case, chosen, cli.effort(options)) for case in cases]
    record = cli.record("reference", options, machine, parity, chosen, results)
    report.emit(
        record, "reference pass; ratio: TRL's median / ours", COLUMNS, [_line(one) for one in results], options.json
    )


def measure(case: Case, chosen: Chosen, effort: Effort) -> dict[str, Any]:
    """One line of the table."""
    found, order = contest(chosen.starts(case, "reference"), effort, what=report.case_name(case))
    last = found["ours"].last
    result = {
        "case": report.case_facts(case),
        "settings": chosen.spec(),
        "order": order,
        **report.timed(found),
        "rows_recomputed": last.get("again"),
        "second_pass_seconds": last.get("again_seconds"),
    }
    for side in found:
        median = result[side]["median"]
        result[side]["rows_per_second"] = median and case.batch / median
    return result


def _line(result: dict[str, Any]) -> list[str]:
    ours, trl = result["ours"], result.get("trl") or {}
    again = result["rows_recomputed"]
    return [
        report.case_name(Case.of(result["case"])),
        report.seconds(ours),
        report.seconds(trl),
        report.times(result["ratio"]),
        report.rate(ours["rows_per_second"]),
        report.rate(trl.get("rows_per_second")),
        "—" if again is None else str(again),
        "—" if again is None else f"{result['second_pass_seconds']:.3f}",
    ]


if __name__ == "__main__":
    cli.command(main)
