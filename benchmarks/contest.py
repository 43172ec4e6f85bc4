"""Two sides alternately, each in a process of its own, one step at a time; medians, quartiles and their quotient."""

from __future__ import annotations

import contextlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

from rankwise.progress import Progress

ROOT = Path(__file__).parent.parent
LOG_LINES = 30  # of a worker that failed


class OutOfMemory(Exception):
    """The side's device has not the memory for this case."""


class WorkerFailed(RuntimeError):
    """A side's process broke off."""

    @property
    def reason(self) -> str:
        """The last line that it wrote, as a rule the exception."""
        return str(self).rstrip().rpartition("\n")[2]


class Worker:
    """A side at work. Used with `with`, so that no process stays behind.

    Raises WorkerFailed where the process ends by itself, with the end of its log.
    """

    def __init__(self, **spec: Any):
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 — closed by __exit__
        ours_in, theirs_out = os.pipe()
        theirs_in, ours_out = os.pipe()
        # No network, no bars, and no thread pool of tokenizers beside the threads that are measured.
        quiet = {"HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}
        # One GPU: a trainer that sees more would spread over them by itself. None where the CPU is measured.
        gpus = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
        quiet["CUDA_VISIBLE_DEVICES"] = "" if spec.get("case", spec).get("device") == "cpu" else gpus
        spec |= {"inwards": theirs_in, "outwards": theirs_out}
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.worker", json.dumps(spec)],
            cwd=ROOT,
            env={**os.environ, **quiet},
            stdout=self._log,
            stderr=self._log,
            pass_fds=(theirs_in, theirs_out),
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._in, self._out = os.fdopen(ours_in), os.fdopen(ours_out, "w")
        self._name = f"{spec.get('side', 'machine')} ({spec['job']})"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._out.close()
        self._process.terminate()
        self._process.wait()
        self._in.close()
        self._log.close()

    def hear(self) -> dict[str, Any]:
        """The next thing that it says."""
        line = self._in.readline()
        if not line:
            status = self._process.wait()
            self._log.seek(0)
            tail = "".join(self._log.readlines()[-LOG_LINES:])
            raise WorkerFailed(f"{self._name} ended with status {status}; the end of its log:\n{tail}")
        said = json.loads(line)
        if said.get("out_of_memory"):
            raise OutOfMemory
        return said

    def go(self) -> dict[str, Any]:
        """Let it do one step more, and hear how it went."""
        self._out.write("go\n")
        self._out.flush()
        return self.hear()


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How long to measure."""

    rounds: int = 9  # steps of each side that count
    warmup: int = 2  # steps of each side before, which do not
    budget_s: float = 300.0  # no new round begins after that many seconds of rounds, three excepted
    exclusive: bool = False  # one side in memory at a time: every few rounds the other is started anew


@dataclass
class Samples:
    """What a side's steps took, in the order they were made."""

    replies: list[dict[str, Any]] = field(default_factory=list)
    out_of_memory: bool = False

    @property
    def seconds(self) -> list[float]:
        return [reply["seconds"] for reply in self.replies]

    @property
    def peaks(self) -> list[float]:
        """Bytes in use at most."""
        return [reply["peak"] for reply in self.replies]

    @property
    def above_baseline(self) -> list[float]:
        """Bytes in use at most, less what was in use before the work began; without those that are not known."""
        return [reply["peak"] - reply["baseline"] for reply in self.replies if reply["peak"] is not None]

    @property
    def last(self) -> dict[str, Any]:
        return self.replies[-1] if self.replies else {}


def alternation(names: list[str], rounds: int) -> Iterator[list[str]]:
    """The order of the sides in each round: reversed from one to the next, so that no side is always the second."""
    for number in range(rounds):
        yield names if number % 2 == 0 else names[::-1]


def contest(
    starts: Mapping[str, Callable[[], Worker]], effort: Effort, *, what: str
) -> tuple[dict[str, Samples], list[str]]:
    """Steps of all sides alternately; their samples, and the order in which the counted steps were made.

    starts: how to start each side's worker.
    """
    found = {name: Samples() for name in starts}
    order: list[str] = []
    with Progress(what, total=effort.rounds * len(starts), unit="step") as progress:
        run = _in_turn if effort.exclusive else _side_by_side
        run(starts, effort, found, order, progress)
    return found, order


def _side_by_side(starts, effort, found, order, progress) -> None:
    workers: dict[str, Worker] = {}
    try:
        for name, start in starts.items():
            workers[name] = start()
            with _noted(found[name]):
                _warm(workers[name], effort)
        began = time.monotonic()
        for number, names in enumerate(alternation(list(workers), effort.rounds)):
            if number >= 3 and time.monotonic() - began > effort.budget_s:
                break
            for name in names:
                if found[name].out_of_memory:
                    continue
                with _noted(found[name]):
                    found[name].replies.append(workers[name].go())
                    order.append(name)
                    progress.advance(1, side=name, seconds=found[name].seconds[-1])
    finally:
        for worker in workers.values():
            worker.__exit__()


def _in_turn(starts, effort, found, order, progress) -> None:
    share = max(1, effort.rounds // 3)
    for names in alternation(list(starts), 3):
        for name in names:
            if found[name].out_of_memory:
                continue
            with _noted(found[name]), starts[name]() as worker:
                _warm(worker, effort)
                for _ in range(share):
                    found[name].replies.append(worker.go())
                    order.append(name)
                    progress.advance(1, side=name, seconds=found[name].seconds[-1])


@contextlib.contextmanager
def _noted(samples: Samples) -> Iterator[None]:
    """A side without enough memory ends its own part, not the other's."""
    try:
        yield
    except OutOfMemory:
        samples.out_of_memory = True


def _warm(worker: Worker, effort: Effort) -> None:
    worker.hear()  # the first step, its set-up included
    for _ in range(effort.warmup - 1):
        worker.go()


def summary(values: list[float]) -> dict[str, Any]:
    """Median, quartiles and the values themselves."""
    if not values:
        return {"median": None, "quartiles": None, "samples": []}
    low, middle, high = statistics.quantiles(values, n=4, method="inclusive") if len(values) > 1 else values * 3
    return {"median": middle, "quartiles": [low, high], "samples": values}


def quotient(over: dict[str, Any] | None, under: dict[str, Any] | None) -> float | None:
    """over's median / under's; None where one is missing."""
    if not over or not under or over["median"] is None or not under["median"]:
        return None
    return over["median"] / under["median"]
