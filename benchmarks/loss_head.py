"""What the vocabulary head alone costs, forward and backward: time, peak memory, and error against float64.

    python -m benchmarks.loss_head
    python -m benchmarks.loss_head --tokens 4096 --vocabularies 151936 --hidden 896

Four heads on the same hidden states, alternately: ours (rankwise.logprobs.token_logps, the vocabulary in chunks), the
full logits with log_softmax, the full logits with TRL's selective_log_softmax, and the fused head that TRL's
DPOTrainer uses since 1.16. Ratios are to ours: above 1 the other one needs more.
In parentheses: errors over the tokens alone whose target is probable, up to p = 0.99999; gradients are tiny there.
"""

from __future__ import annotations

import itertools
from functools import partial
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import count
from benchmarks.contest import Effort, Samples, Worker, contest, quotient, summary

COLUMNS = (
    "tokens × vocabulary",
    "head",
    "s",
    "ratio",
    "peak MiB",
    "ratio",
    "logp error (confident)",
    "∇hidden error (confident)",
    "∇weight error (confident)",
)
NAMES = {"ours": "ours", "full": "full", "trl_full": "TRL, full", "trl_fused": "TRL, fused"}
ERRORS = ("logp_error", "hidden_gradient_error", "weight_gradient_error")


def main(arguments: list[str]) -> None:
    parser = cli.parser("loss_head", __doc__)
    cli.add_trl_options(parser)
    parser.add_argument("--tokens", type=count, nargs="+", help="answer tokens a pass (1024 4096)")
    parser.add_argument("--vocabularies", type=count, nargs="+", help="8000 32000 128000")
    parser.add_argument("--hidden", type=count, help="hidden size (288)")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), default="bf16", help="of hidden states and weight (bf16)")
    options = parser.parse_args(arguments)
    cli.need_trl(options)
    options.device = cli.device(options.device)
    tokens = options.tokens or ([64] if options.quick else [1024, 4096])
    vocabularies = options.vocabularies or ([256] if options.quick else [8_000, 32_000, 128_000])
    effort = Effort(rounds=options.rounds or (3 if options.quick else 9), warmup=1 if options.quick else 2)
    machine = cli.machine(options, ceiling=False)
    results = [measure(options, n, v, effort) for n, v in itertools.product(tokens, vocabularies)]
    record = {"benchmark": "loss_head", "options": cli.told(options), "machine": machine, "results": results}
    lines = [line for result in results for line in _lines(result)]
    report.emit(record, f"vocabulary head, forward and backward, {options.dtype}", COLUMNS, lines, options.json)


def measure(options: Any, tokens: int, vocabulary: int, effort: Effort) -> dict[str, Any]:
    """All heads on one size."""
    spec = {
        "tokens": tokens,
        "vocabulary": vocabulary,
        "hidden": options.hidden or (32 if options.quick else 288),
        "dtype": options.dtype,
        "device": options.device,
        "seed": options.seed,
    }
    names = [name for name in NAMES if not (options.ours_only and name.startswith("trl"))]
    starts = {name: partial(Worker, job="head", head=name, **spec) for name in names}
    found, order = contest(starts, effort, what=f"{tokens} × {vocabulary}")
    heads = {name: _head(one) for name, one in found.items()}
    for one in heads.values():
        one["time_ratio"] = quotient(one, heads["ours"])
        one["peak_ratio"] = quotient(one["peak"], heads["ours"]["peak"])
    return {"case": spec, "order": order, "heads": heads}


def _head(found: Samples) -> dict[str, Any]:
    return {
        "out_of_memory": found.out_of_memory,
        **summary(found.seconds),
        "peak": summary(found.above_baseline),
        **{name: found.last.get(name) for error in ERRORS for name in (error, f"confident_{error}")},
    }


def _lines(result: dict[str, Any]) -> list[list[str]]:
    size = f"{result['case']['tokens']} × {result['case']['vocabulary']}"
    return [
        [
            size,
            NAMES[name],
            report.seconds(one),
            report.times(one["time_ratio"]),
            report.megabytes(one["peak"]),
            report.times(one["peak_ratio"]),
            *(f"{_error(one[error])} ({_error(one[f'confident_{error}'])})" for error in ERRORS),
        ]
        for name, one in result["heads"].items()
    ]


def _error(value: float | None) -> str:
    return "—" if value is None else f"{value:.1e}"


if __name__ == "__main__":
    cli.command(main)
