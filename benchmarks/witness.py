"""What the stages of a run do, seen from inside: the sitecustomize of a run's processes (benchmarks.chaos).

Each stage appends to the file CHAOS_LEDGER, as it happens: its start and end, each unit of work (a verdict, the answers
to a prompt, a reference row, an optimizer step), and what was made safe (rows in a store, a checkpoint). Lines of JSON,
each written at once, so that a kill cuts at most the last one. Nothing of the program is changed by it.

With CHAOS_CLOCK=S the clock of the day is set by hours every S seconds, in all processes alike: time.time is, and what
counts seconds by the monotonic clock is not. Times of files and datetime.now stay the machine's.
"""

from __future__ import annotations

import atexit
import importlib.abc
import importlib.machinery
import json
import os
import sys
import time

KEYS = 50  # in a line
JUMPS_H = (0, -2, 3, -26)


def _stage() -> str:
    """The stage that this process is to run, "" for every other process."""
    words = sys.orig_argv
    module = words[words.index("-m") + 1] if "-m" in words[:-1] else ""
    name = module.removeprefix("tasks.")
    if name == module or name.startswith("tracking"):
        return ""
    return f"{name}@{words[words.index('--round') + 1]}" if "--round" in words else name


STAGE = _stage()


def tell(event: str, kind: str = "", keys: list[str] | None = None) -> None:
    """One event, with the keys of the units that it is about."""
    for start in range(0, max(1, len(keys or ())), KEYS):
        told = {"event": event, "stage": STAGE, "pid": os.getpid(), "at": time.clock_gettime(time.CLOCK_MONOTONIC)}
        told |= {"kind": kind, "keys": (keys or [])[start : start + KEYS]}
        os.write(_ledger, f"\n{json.dumps(told)}\n".encode())


def _judging(module) -> None:
    real = module._asked

    def asked(*arguments):
        for one in real(*arguments):
            if one is not None:
                tell("work", "verdict", [one[0]])
            yield one

    module._asked = asked


class _Engine:
    """An engine, and a line for each prompt that it has answered."""

    def __init__(self, engine, keys: list[str]):
        self._engine, self._keys = engine, keys

    def __getattr__(self, name: str):
        return getattr(self._engine, name)

    def answers(self, wanted):
        answers = self._engine.answers(wanted)
        try:
            for index, sampled in answers:
                tell("work", "answers", [self._keys[index]])
                yield index, sampled
        finally:
            answers.close()


def _rollouts(module) -> None:
    real = module._fill
    module._fill = lambda store, engine, keys, *rest: real(store, _Engine(engine, keys), keys, *rest)


def _reference(module) -> None:
    real = module._score

    def score(*arguments, **named):
        fresh = real(*arguments, **named)
        tell("work", "reference", list(fresh))
        return fresh

    module._score = score


def _store(module) -> None:
    real = module.Store.put_many

    def put_many(self, rows):
        keys = list(rows)
        real(self, rows)
        if keys:
            tell("safe", "rows", keys)

    module.Store.put_many = put_many


def _training(module) -> None:
    count, save = module._Run._count, module._Run._save

    def counted(self, *arguments):
        record = count(self, *arguments)
        tell("work", "step", [f"{STAGE} {record.step}"])
        return record

    def saved(self):
        before = self.saved_step
        save(self)
        if self.saved_step != before:
            tell("safe", "checkpoint", [f"{STAGE} {self.saved_step}"])

    module._Run._count, module._Run._save = counted, saved


SEEN = {
    "rankwise.judging": _judging,
    "rankwise.rollouts": _rollouts,
    "rankwise.reference": _reference,
    "rankwise.store": _store,
    "rankwise.training": _training,
}


class _Finder(importlib.abc.MetaPathFinder):
    """Lets a module be imported as ever, and then looked into."""

    def find_spec(self, name, path=None, target=None):
        if name not in SEEN or (spec := importlib.machinery.PathFinder.find_spec(name, path)) is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module) -> None:
            execute(module)
            SEEN[name](module)

        spec.loader.exec_module = exec_module
        return spec


def _jumping_clock(every_s: float) -> None:
    real = time.time
    time.time = lambda: real() + 3600 * JUMPS_H[int(time.monotonic() / every_s) % len(JUMPS_H)]
    time.time_ns = lambda: int(time.time() * 1e9)


if os.environ.get("CHAOS_CLOCK"):
    _jumping_clock(float(os.environ["CHAOS_CLOCK"]))
if STAGE and os.environ.get("CHAOS_LEDGER"):
    _ledger = os.open(os.environ["CHAOS_LEDGER"], os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    tell("start")
    atexit.register(tell, "end")
    sys.meta_path.insert(0, _Finder())
