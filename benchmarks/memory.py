"""How much memory a training step needs at its peak, ours and TRL's best setting, each in a fresh process.

    python -m benchmarks.memory
    python -m benchmarks.memory --vary vocabulary --our-setting bf16-4096 --trl-setting bf16-compile-4

"Above imports" leaves out what the process holds before it makes its model; on a GPU it is the allocator's peak on the
device. Without settings both sides are first tried out for speed, as benchmarks.train_step does: peak memory is that
of the fastest setting, not of the leanest.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from benchmarks import cli, report
from benchmarks.cli import Chosen
from benchmarks.contest import Effort, Samples, contest, quotient, summary
from benchmarks.parity import step_parity
from benchmarks.workload import Case

COLUMNS = ("case", "ours MiB", "TRL MiB", "ours / TRL", "ours total MiB", "TRL total MiB", "ours / TRL")


def main(arguments: list[str]) -> None:
    parser = cli.parser("memory", __doc__)
    cli.add_trainer_options(parser)
    parser.add_argument("--task", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--k", type=int, default=2, help="answers a prompt, DPO (2)")
    options = parser.parse_args(arguments)
    cli.need_trl(options)
    cases = cli.series(options, cli.case_of(options, task=options.task, k=1 if options.task == "sft" else options.k))
    parity = None if options.ours_only else step_parity(cases[0])
    machine = cli.machine(options, ceiling=False)
    chosen = cli.choose(options, cases[0])
    # One side at a time, thrice: a peak needs few steps, and neither side is to lack memory for the other's sake.
    effort = replace(cli.effort(options), rounds=options.rounds or 3, exclusive=True)
    results = [measure(case, cli.fitted(chosen, case), effort) for case in cases]
    record = cli.record("memory", options, machine, parity, chosen, results)
    title = f"peak memory of a {options.task.upper()} step above imports, and in all; ratio: ours / TRL"
    report.emit(record, title, COLUMNS, [_line(one) for one in results], options.json)


def measure(case: Case, chosen: Chosen, effort: Effort) -> dict[str, Any]:
    """One line of the table."""
    found, order = contest(chosen.starts(case), effort, what=report.case_name(case))
    sides = {name: _side(one) for name, one in found.items()}
    trl = sides.get("trl", {})
    return {
        "case": report.case_facts(case),
        "settings": chosen.spec(),
        "order": order,
        **sides,
        "ratio": quotient(sides["ours"]["above_imports"], trl.get("above_imports")),
        "total_ratio": quotient(sides["ours"]["total"], trl.get("total")),
    }


def _side(found: Samples) -> dict[str, Any]:
    """Bytes."""
    return {
        "out_of_memory": found.out_of_memory,
        "above_imports": summary(found.above_baseline),
        "total": summary(found.peaks),
    }


def _line(result: dict[str, Any]) -> list[str]:
    ours, trl = result["ours"], result.get("trl", {})
    return [
        report.case_name(Case.of(result["case"])),
        report.megabytes(ours["above_imports"]),
        "out of memory" if trl.get("out_of_memory") else report.megabytes(trl.get("above_imports")),
        report.times(result["ratio"]),
        report.megabytes(ours["total"]),
        report.megabytes(trl.get("total")),
        report.times(result["total_ratio"]),
    ]


if __name__ == "__main__":
    cli.command(main)
