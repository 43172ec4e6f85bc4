"""How fast is an optimizer step: forward, backward, clipping, AdamW; ours and TRL's best setting alternately.

    python -m benchmarks.train_step                      # DPO, K = 2 and K = 4, on the reference case
    python -m benchmarks.train_step --vary prompt        # growth with the prompt's length
    python -m benchmarks.train_step --task sft

A step takes the same prompts on both sides. At K > 2 TRL trains on the C(K, 2) pairs of each ranking, since it cannot
rank, so the ratio is one of prompts a second; losses then differ by definition, and parity is checked on pairs.
"""

from __future__ import annotations

from typing import Any

from benchmarks import cli, report
from benchmarks.cli import Chosen
from benchmarks.contest import Effort, Samples, contest
from benchmarks.parity import step_parity
from benchmarks.workload import Case

COLUMNS = (
    "case",
    "compared",
    "ours s/step",
    "TRL s/step",
    "ratio",
    "ours prompts/s",
    "TRL prompts/s",
    "ours MFU",
    "TRL MFU",
)


def main(arguments: list[str]) -> None:
    parser = cli.parser("train_step", __doc__)
    cli.add_trainer_options(parser)
    parser.add_argument("--task", choices=("dpo", "sft"), default="dpo")
    parser.add_argument("--k", type=int, nargs="+", metavar="K", help="answers a prompt, DPO (2 4)")
    parser.add_argument("--best-only", action="store_true", help="leave out the comparison in equal precisions")
    options = parser.parse_args(arguments)
    cli.need_trl(options)
    cases = _cases(options)
    parity = None if options.ours_only else step_parity(cases[0])
    machine = cli.machine(options, ceiling=True)
    chosen = cli.choose(options, cases[0])
    results = []
    for case in cases:
        fitted = cli.fitted(chosen, case)
        for compared, pair in comparisons(
            case, fitted, like_for_like=case is cases[0] and not options.best_only
        ).items():
            results.append(measure(case, pair, compared, cli.effort(options), machine))
    record = cli.record("train_step", options, machine, parity, chosen, results)
    title = f"{options.task.upper()} optimizer step; ratio: TRL's median / ours"
    report.emit(record, title, COLUMNS, [_line(one) for one in results], options.json)


def measure(case: Case, chosen: Chosen, compared: str, effort: Effort, machine: dict[str, Any]) -> dict[str, Any]:
    """One line of the table."""
    what = f"{report.case_name(case)}, {compared}"
    found, order = contest(chosen.starts(case), effort, what=what)
    flops = found["ours"].last.get("flops")
    result = {
        "case": report.case_facts(case),
        "compared": compared,
        "settings": chosen.spec(),
        "order": order,
        "step_flops": flops,
        **report.timed(found),
    }
    for side, setting in (("ours", chosen.ours), ("trl", chosen.trl)):
        if setting is not None:
            result[side] |= _derived(found[side], result[side]["median"], case, setting.precision, flops, machine)
    return result


def comparisons(case: Case, chosen: Chosen, *, like_for_like: bool) -> dict[str, Chosen]:
    """Both at their best; then both in fp32 (not on a GPU) and both in bf16, where that is not the same again."""
    pairs = {"best": chosen}
    if like_for_like and chosen.trl is not None:
        for precision in ("bf16",) if case.device == "cuda" else ("fp32", "bf16"):
            if chosen.at(precision).spec() != chosen.spec():
                pairs[precision] = chosen.at(precision)
    return pairs


def _derived(
    found: Samples, median: float | None, case: Case, precision: str, flops: int | None, machine: dict[str, Any]
) -> dict[str, Any]:
    """Prompts a second, and model FLOP utilisation: FLOPs that the shared layout needs, whatever this side computed."""
    if median is None:
        return {"prompts_per_second": None, "mfu": None}
    ceiling = machine["matmul_flops"]["fp32" if precision == "fp32" else "bf16"]
    return {"prompts_per_second": case.batch / median, "mfu": flops and flops / median / ceiling}


def _cases(options) -> list[Case]:
    if options.task == "sft":
        return cli.series(options, cli.case_of(options, task="sft", k=1))
    ks = options.k or ([2] if options.vary else [2, 4])
    return [one for k in ks for one in cli.series(options, cli.case_of(options, k=k))]


def _line(result: dict[str, Any]) -> list[str]:
    ours, trl = result["ours"], result.get("trl") or {}
    return [
        report.case_name(Case.of(result["case"])),
        result["compared"],
        report.seconds(ours),
        report.seconds(trl),
        report.times(result["ratio"]),
        report.rate(ours["prompts_per_second"]),
        report.rate(trl.get("prompts_per_second")),
        report.share(ours["mfu"]),
        report.share(trl.get("mfu")),
    ]


if __name__ == "__main__":
    cli.command(main)
