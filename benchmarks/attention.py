"""What attention within prompt trees costs on a CPU, forward and backward of one layer: trees against a dense mask.

    python -m benchmarks.attention
    python -m benchmarks.attention --vary prompt

On bf16 and fp32 tensors alike; "bf16 kernels" is what rankwise.attention would be if it let the kernels compute bf16 in
bf16. Ratios are to ours in the same dtype: above 1 the other one takes longer.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from benchmarks import cli, report
from benchmarks.contest import Effort, Worker, contest, quotient, summary
from benchmarks.workload import Case
from rankwise.types import UserError

COLUMNS = ("case", "attention", "ms", "ratio")
AGAINST = {
    "trees": "trees",
    "trees, bf16 kernels": "trees",
    "dense mask": "trees",
    "trees, fp32": "trees, fp32",
    "dense mask, fp32": "trees, fp32",
}


def main(arguments: list[str]) -> None:
    parser = cli.parser("attention", __doc__)
    cli.add_case_options(parser)
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="answers a prompt (2 4)")
    options = parser.parse_args(arguments)
    if options.device == "cuda":
        raise UserError("--device cuda: attention within trees is a CPU's way; leave it out")
    options.device = "cpu"
    ks = options.k or ([2] if options.vary or options.quick else [2, 4])
    cases = [one for k in ks for one in cli.series(options, cli.case_of(options, k=k))]
    effort = Effort(rounds=options.rounds or (3 if options.quick else 15))
    machine = cli.machine(options, ceiling=False)
    results = [measure(case, effort) for case in cases]
    record = {"benchmark": "attention", "options": cli.told(options), "machine": machine, "results": results}
    lines = [line for result in results for line in _lines(result)]
    report.emit(record, "attention within trees, forward and backward, one layer", COLUMNS, lines, options.json)


def measure(case: Case, effort: Effort) -> dict[str, Any]:
    """All ways on one case."""
    starts = {way: partial(Worker, job="attention", way=way, case=case.spec()) for way in AGAINST}
    found, order = contest(starts, effort, what=report.case_name(case))
    ways = {way: summary(found[way].seconds) for way in AGAINST}
    for way, one in ways.items():
        one["ratio"] = quotient(one, ways[AGAINST[way]])
    return {"case": report.case_facts(case), "order": order, "ways": ways}


def _lines(result: dict[str, Any]) -> list[list[str]]:
    name = report.case_name(Case.of(result["case"]))
    return [
        [name, way, f"{1e3 * one['median']:.2f}", report.times(one["ratio"])] for way, one in result["ways"].items()
    ]


if __name__ == "__main__":
    cli.command(main)
