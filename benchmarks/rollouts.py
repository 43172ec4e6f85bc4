"""How fast are sampled answers: each engine at its best setting, alternately, as ratios to transformers' generate().

    python -m benchmarks.rollouts
    python -m benchmarks.rollouts --serve "vllm serve {model} --host 127.0.0.1 --port {port}"
    python -m benchmarks.rollouts --vary k --settings embedded=bf16-128 generate=bf16-dynamic-32

embedded     rankwise.generation, in this process
generate     model.generate(), prompts sorted by length, K answers of each (num_return_sequences)
continuous   model.generate_batch(), transformers' continuous batching
server       rankwise.endpoint, through the server that --serve starts

All draw from the whole distribution at temperature 1. A share of 1 / --answer of the vocabulary ends an answer, so
lengths are about geometric, cut at 8/3 of their mean. Tokens are those of the answers, their ends included.
"""

from __future__ import annotations

import argparse
import contextlib
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import count
from benchmarks.choose import Trial, best_of_engine
from benchmarks.contest import Effort, Samples, Worker, contest, quotient, summary
from benchmarks.parity import greedy_parity
from benchmarks.settings import ENGINES, EngineSetting, engine_setting
from benchmarks.workload import Case, longest_rollout
from rankwise.types import UserError

COLUMNS = ("case", "engine", "tokens/s", "to generate()", "answers/s", "tokens an answer", "peak MiB", "setting")
QUICK = {"embedded": "fp32-8", "generate": "fp32-dynamic-8", "continuous": "fp32-8", "server": "own-8"}


def main(arguments: list[str]) -> None:
    parser = cli.parser("rollouts", __doc__)
    cli.add_case_options(parser)
    parser.add_argument("--k", type=count, default=4, help="answers a prompt (4)")
    parser.add_argument("--engines", nargs="+", choices=ENGINES, help="those that take part (all; server by --serve)")
    parser.add_argument("--serve", metavar="COMMAND", default="", help="starts a server; with {model} and {port} in it")
    parser.add_argument(
        "--settings", nargs="+", metavar="ENGINE=S", help="as embedded=bf16-128; default: tried out on the first case"
    )
    options = parser.parse_args(arguments)
    options.settings = _settings(options.settings or [])
    engines = _engines(options)
    options.batch = options.batch or (4 if options.quick else 64)
    cases = cli.series(options, cli.case_of(options, task="rollouts", k=options.k))
    with model_of(cases[0], options.serve) as start:
        parity, left_out = greedy_parity(cases[0], engines, start)
        engines = [engine for engine in engines if engine not in left_out]
        machine = cli.machine(options, ceiling=False)
        settings, trials = _chosen(options, engines, cases[0], start)
    results = []
    for case in cases:
        with model_of(case, options.serve) as start:
            results.append(measure(case, settings, start, _effort(options)))
    record = {
        "benchmark": "rollouts",
        "options": cli.told(options),
        "machine": machine,
        "parity": parity,
        "left_out": left_out,
        "trials": trials,
        "results": results,
    }
    title = "rollouts; ratio: tokens/s of the engine / those of generate()"
    report.emit(record, title, COLUMNS, [line for one in results for line in _lines(one)], options.json)


@contextlib.contextmanager
def model_of(case: Case, serve: str) -> Iterator[Callable[..., Worker]]:
    """A folder with the case's model; what is yielded starts a worker on it."""
    with tempfile.TemporaryDirectory() as folder:
        with Worker(job="folder", case=case.spec(), folder=folder) as worker:
            worker.hear()
        yield partial(Worker, folder=folder, serve=serve)


def measure(
    case: Case, settings: dict[str, EngineSetting], start: Callable[..., Worker], effort: Effort
) -> dict[str, Any]:
    """All engines on one case."""
    starts = {engine: _passes(start, case, engine, setting) for engine, setting in settings.items()}
    found, order = contest(starts, effort, what=report.case_name(case))
    engines = {engine: _engine(one) for engine, one in found.items()}
    for one in engines.values():
        generate = engines.get("generate")
        one["ratio"] = quotient(one["tokens_per_second"], generate and generate["tokens_per_second"])
    return {
        "case": report.case_facts(case),
        "longest_answer": longest_rollout(case),
        "settings": {engine: str(setting) for engine, setting in settings.items()},
        "order": order,
        "engines": engines,
    }


def _passes(start: Callable[..., Worker], case: Case, engine: str, setting: EngineSetting) -> Callable[[], Worker]:
    return partial(start, job="rollouts", side=engine, case=case.spec(), setting=setting.spec())


def _engine(found: Samples) -> dict[str, Any]:
    """An engine's passes: seconds, and what was sampled in them; bytes in use above what imports take."""
    replies = found.replies
    tokens, answers = (sum(reply[name] for reply in replies) for name in ("tokens", "answers"))
    return {
        "out_of_memory": found.out_of_memory,
        **summary(found.seconds),
        "tokens": [reply["tokens"] for reply in replies],
        "answers": [reply["answers"] for reply in replies],
        "tokens_per_second": summary([reply["tokens"] / reply["seconds"] for reply in replies]),
        "answers_per_second": summary([reply["answers"] / reply["seconds"] for reply in replies]),
        "tokens_per_answer": tokens / answers if answers else None,
        "peak": summary(found.above_baseline),
    }


def _lines(result: dict[str, Any]) -> list[list[str]]:
    name = report.case_name(Case.of(result["case"]))
    return [
        [
            name,
            engine,
            "out of memory" if one["out_of_memory"] else report.tokens(one["tokens_per_second"]),
            report.times(one["ratio"]),
            report.rate(one["answers_per_second"]["median"]),
            report.rate(one["tokens_per_answer"]),
            report.megabytes(one["peak"]),
            result["settings"][engine],
        ]
        for engine, one in result["engines"].items()
    ]


def _engines(options: argparse.Namespace) -> list[str]:
    wanted = options.engines or [engine for engine in ENGINES if engine != "server" or options.serve]
    if "server" in wanted and not options.serve:
        raise UserError(
            "--engines server: nothing says how one is started; add --serve COMMAND with {model} and {port}"
        )
    if options.serve and "server" not in wanted:
        raise UserError("--serve starts a server, and --engines names none; add server to it")
    if strangers := set(options.settings) - set(wanted):
        raise UserError(f"--settings {min(strangers)}=…: this engine takes no part; name it in --engines")
    return wanted


def _settings(given: list[str]) -> dict[str, EngineSetting]:
    pairs = [text.partition("=") for text in given]
    for engine, _, text in pairs:
        if engine not in ENGINES:
            raise UserError(f"--settings {engine}={text}: no such engine; there are {', '.join(ENGINES)}")
    return {engine: engine_setting(engine, text) for engine, _, text in pairs}


def _chosen(
    options: argparse.Namespace, engines: list[str], case: Case, start: Callable[..., Worker]
) -> tuple[dict[str, EngineSetting], list[Trial]]:
    """Settings given, or the best of each engine in short trials."""
    settings: dict[str, EngineSetting] = {}
    trials: list[Trial] = []
    for engine in engines:
        setting = options.settings.get(engine)
        if setting is None and options.quick:
            setting = engine_setting(engine, QUICK[engine])
        if setting is None:
            setting, tried = best_of_engine(engine, case, partial(_passes, start))
            trials += [{"engine": engine, "setting": one["setting"], "tokens_per_second": _rate(one)} for one in tried]
        settings[engine] = setting
    return settings, trials


def _rate(trial: Trial) -> float | None:
    return trial["seconds"] and 1 / trial["seconds"]


def _effort(options: argparse.Namespace) -> Effort:
    """A pass is hundreds of steps long, so few will do."""
    return Effort(rounds=options.rounds or 3, warmup=1, budget_s=options.budget, exclusive=options.exclusive)


if __name__ == "__main__":
    cli.command(main)
