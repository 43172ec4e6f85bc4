"""Each side at its best on this machine: candidate settings in short trials, the fastest one wins."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from benchmarks.contest import OutOfMemory, Worker, WorkerFailed
from benchmarks.report import say
from benchmarks.settings import (
    EngineSetting,
    OurSetting,
    TrlSetting,
    engine_candidates,
    our_candidates,
    trl_candidates,
)
from benchmarks.workload import Case, pairs, rows
from rankwise.progress import Progress

WARMUP, COUNTED = 2, 3  # steps of a trial; two, since a compiled model compiles again at the second shape
Trial = dict[str, Any]


def best_of_ours(case: Case, job: str) -> tuple[OurSetting, list[Trial]]:
    """Our fastest setting, and what each candidate took."""
    first, budgets = our_candidates(case)
    return _best(
        "ours", first, lambda best: [replace(best, budget=budget) for budget in budgets], _steps("ours", case, job)
    )


def best_of_trl(case: Case, job: str) -> tuple[TrlSetting, list[Trial]]:
    """TRL's fastest setting, and what each candidate took."""
    examples = sum(len(pairs(row)) for row in rows(case)) if case.task == "dpo" else case.batch
    first, sizes = trl_candidates(case, examples)

    def second(best: TrlSetting) -> list[TrlSetting]:
        return [replace(best, micro=size) for size in ((2, 4) if best.packed else sizes)]

    return _best("trl", first, second, _steps("trl", case, job))


def best_of_engine(
    engine: str, case: Case, passes: Callable[[Case, str, EngineSetting], Callable[[], Worker]]
) -> tuple[EngineSetting, list[Trial]]:
    """An engine's fastest setting on so many prompts that its largest batch is full, and what a token took with each.

    Args:
        passes: how to start the worker of an engine on a case.
    """
    first, batches = engine_candidates(engine, case)
    if len(first) == 1 and not batches:
        return first[0], []
    few = replace(case, batch=min(case.batch, max(1, max(batches) // case.k)))

    def trial(setting: EngineSetting) -> float:
        try:
            return _trial(passes(few, engine, setting), _seconds_a_token)
        except WorkerFailed as error:
            if setting.cache != "static":
                raise
            say(f"{engine}: {setting} does not run here: {error.reason}")
            return float("inf")

    return _best(engine, first, lambda best: [replace(best, batch=batch) for batch in batches], trial)


def _best(
    side: str, first: list, second: Callable[[Any], list], trial: Callable[[Any], float]
) -> tuple[Any, list[Trial]]:
    """The setting whose trial takes the fewest seconds: of the first ones, then of variations of their best."""
    trials: dict[Any, float] = {}
    fastest = lambda: min(trials, key=lambda setting: trials[setting])
    with Progress(f"{side}: trying settings", total=len(first) + len(second(first[0])), unit="setting") as progress:
        for setting in first:
            trials[setting] = trial(setting)
            progress.advance(1, setting=setting, seconds=trials[setting])
        for setting in second(fastest()):
            trials[setting] = trial(setting)
            progress.advance(1, setting=setting, seconds=trials[setting])
    told = [
        {"side": side, "setting": str(setting), "seconds": None if seconds == float("inf") else seconds}
        for setting, seconds in trials.items()
    ]
    return fastest(), told


def _steps(side: str, case: Case, job: str) -> Callable[[Any], float]:
    """Trials of one side of a contest between trainers."""
    start = partial(Worker, job=job, side=side, case=case.spec())
    return lambda setting: _trial(partial(start, setting=setting.spec()), _seconds_a_step)


def _trial(start: Callable[[], Worker], measure: Callable[[Worker], float]) -> float:
    """What a worker's trial is measured as; infinite where memory does not suffice."""
    try:
        with start() as worker:
            return measure(worker)
    except OutOfMemory:
        return float("inf")


def _seconds_a_step(worker: Worker) -> float:
    worker.hear()
    for _ in range(WARMUP - 1):
        worker.go()
    return statistics.median(worker.go()["seconds"] for _ in range(COUNTED))


def _seconds_a_token(worker: Worker) -> float:
    """Of one pass, which is hundreds of steps long."""
    worker.hear()
    told = worker.go()
    return told["seconds"] / told["tokens"]
