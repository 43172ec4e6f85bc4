"""Each side at its best on this machine: candidate settings in short trials, the fastest one wins."""

from __future__ import annotations

import statistics
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from benchmarks.contest import OutOfMemory, Worker
from benchmarks.settings import OurSetting, TrlSetting, our_candidates, trl_candidates
from benchmarks.workload import Case, pairs, rows
from rankwise.progress import Progress

WARMUP, COUNTED = 2, 3  # steps of a trial; two, since a compiled model compiles again at the second shape
Trial = dict[str, Any]


def best_of_ours(case: Case, job: str) -> tuple[OurSetting, list[Trial]]:
    """Our fastest setting, and what each candidate took."""
    first, budgets = our_candidates(case)
    return _best("ours", first, lambda best: [replace(best, budget=budget) for budget in budgets], case, job)


def best_of_trl(case: Case, job: str) -> tuple[TrlSetting, list[Trial]]:
    """TRL's fastest setting, and what each candidate took."""
    examples = sum(len(pairs(row)) for row in rows(case)) if case.task == "dpo" else case.batch
    first, sizes = trl_candidates(case, examples)

    def second(best: TrlSetting) -> list[TrlSetting]:
        return [replace(best, micro=size) for size in ((2, 4) if best.packed else sizes)]

    return _best("trl", first, second, case, job)


def _best(side: str, first: list, second: Callable[[Any], list], case: Case, job: str) -> tuple[Any, list[Trial]]:
    trials: dict[Any, float] = {}
    fastest = lambda: min(trials, key=lambda setting: trials[setting])
    with Progress(f"{side}: trying settings", total=len(first) + len(second(first[0])), unit="setting") as progress:
        for setting in first:
            trials[setting] = _trial(side, setting, case, job)
            progress.advance(1, setting=setting, seconds=trials[setting])
        for setting in second(fastest()):
            trials[setting] = _trial(side, setting, case, job)
            progress.advance(1, setting=setting, seconds=trials[setting])
    told = [
        {"side": side, "setting": str(setting), "seconds": None if seconds == float("inf") else seconds}
        for setting, seconds in trials.items()
    ]
    return fastest(), told


def _trial(side: str, setting: Any, case: Case, job: str) -> float:
    """Median seconds of a few steps; infinite where memory does not suffice."""
    try:
        with Worker(job=job, side=side, case=case.spec(), setting=setting.spec()) as worker:
            return _few(worker)
    except OutOfMemory:
        return float("inf")


def _few(worker: Worker) -> float:
    worker.hear()
    for _ in range(WARMUP - 1):
        worker.go()
    return statistics.median(worker.go()["seconds"] for _ in range(COUNTED))
