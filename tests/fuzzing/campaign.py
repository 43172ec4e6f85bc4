"""A campaign: so many cases over all readers, in processes that may die of them, and what came of it."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from . import law
from .table import READERS

CHUNK = 4000  # cases that a process is given at once
STUCK_S = 60.0  # without a case that ends, a process is ended: C code hears no alarm
MEMORY_BYTES = 3 * 2**30  # of address space, beyond what a process has at its start
KEPT = 2  # reproducers of a kind of defect
_FORKS = multiprocessing.get_context("fork")  # with every library loaded once


@dataclass
class Tally:
    """What came of one reader's cases."""

    cases: int = 0
    kinds: Counter[str] = field(default_factory=Counter)
    seconds: float = 0.0
    slowest: tuple[float, int] = (0.0, 0)  # seconds of processor time, the case
    defects: dict[str, list[dict[str, Any]]] = field(default_factory=dict)  # by kind: {"case", "detail"}

    def add(self, number: int, ending: law.Ending) -> None:
        self.cases += 1
        self.kinds[ending.kind] += 1
        self.seconds += ending.seconds
        self.slowest = max(self.slowest, (ending.seconds, number))
        if not ending.lawful and len(kept := self.defects.setdefault(ending.kind, [])) < KEPT:
            kept.append({"case": number, "detail": ending.detail})

    def join(self, other: Tally) -> None:
        self.cases += other.cases
        self.kinds += other.kinds
        self.seconds += other.seconds
        self.slowest = max(self.slowest, other.slowest)
        for kind, found in other.defects.items():
            self.defects[kind] = (self.defects.get(kind, []) + found)[:KEPT]


def shares(cases: int, names: list[str]) -> dict[str, int]:
    """Cases of each reader, by weight; every reader has one at least."""
    whole = sum(READERS[name].weight for name in names)
    return {name: max(1, round(cases * READERS[name].weight / whole)) for name in names}


def run(cases: Mapping[str, int], *, processes: int, show=print) -> dict[str, Tally]:
    """Run so many cases of each reader; a process that dies or hangs is a defect of the case that it was at.

    Ctrl-C or SIGTERM ends it with what came so far.
    """
    tallies = {name: Tally() for name in cases}
    chunks = _chunks(cases)
    running: list[_Process] = []
    began = told = time.monotonic()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        while True:
            while len(running) < processes and (chunk := next(chunks, None)):
                running.append(_Process(*chunk))
            if not running:
                return tallies
            time.sleep(0.05)
            for one in [one for one in running if one.ended()]:
                running.remove(one)
                for kind in one.tally.defects.keys() - tallies[one.name].defects.keys():
                    show(f"{one.name}: {kind}; --replay {one.name}:{one.tally.defects[kind][0]['case']}")
                tallies[one.name].join(one.tally)
                if one.rest:
                    running.append(_Process(one.name, one.rest.start, one.rest.stop))
            if time.monotonic() - told > 60:
                told = time.monotonic()
                show(_progress(tallies, sum(cases.values()), told - began))
    except KeyboardInterrupt:
        show(f"stopped; {_progress(tallies, sum(cases.values()), time.monotonic() - began)}")
        for one in running:
            one.kill()
        return tallies


def _chunks(cases: Mapping[str, int]) -> Iterator[tuple[str, int, int]]:
    """Of all readers in turn, so that a campaign that is stopped has seen each of them."""
    starts = dict.fromkeys(cases, 0)
    while starts:
        for name in list(starts):
            stop = min(starts[name] + CHUNK, cases[name])
            yield name, starts[name], stop
            starts[name] = stop
            if stop == cases[name]:
                del starts[name]


def _progress(tallies: Mapping[str, Tally], whole: int, seconds: float) -> str:
    done = sum(tally.cases for tally in tallies.values())
    bad = sum(len(found) for tally in tallies.values() for found in tally.defects.values())
    return f"{done:,} of {whole:,} cases, {done / seconds:,.0f} a second, {bad} defects kept"


class _Process:
    """A process at a chunk of cases: numbers start to stop of one reader."""

    def __init__(self, name: str, start: int, stop: int):
        self.name, self._numbers = name, range(start, stop)
        self.tally, self.rest = Tally(), range(0)
        self._at = _FORKS.Value("q", start)
        self._seen = (start, time.monotonic())
        self._mine, theirs = _FORKS.Pipe(duplex=False)
        self._process = _FORKS.Process(target=_work, args=(name, self._numbers, self._at, theirs))
        self._process.start()
        theirs.close()

    def ended(self) -> bool:
        """Whether it has; then its tally is whole, and rest says what it left undone."""
        if self._mine.poll():
            try:
                self.tally = self._mine.recv()
            except EOFError:  # it died, and its tally with it: the case that it was at, and all before once more
                self._died(self._at.value)
            self._process.join()
            return True
        number, since = self._seen
        if self._at.value != number:
            self._seen = (self._at.value, time.monotonic())
        elif time.monotonic() - since > STUCK_S:
            self.kill()
            self._died(number)
            return True
        return False

    def kill(self) -> None:
        self._process.kill()
        self._process.join()

    def _died(self, number: int) -> None:
        self._process.join()
        code = self._process.exitcode or 0
        kind = "hang" if code == -signal.SIGKILL else f"crash: the process ended, {_signal(-code)}"
        self.tally = Tally()
        self.tally.add(number, law.Ending(kind=kind, seconds=0.0, detail="no traceback: replay the case"))
        self.rest = range(number + 1, self._numbers.stop)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"status {-number}"


def _work(name: str, numbers: range, at: Any, told: Any) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    os.environ["TMPDIR"] = _fast() or tempfile.gettempdir()
    law.limit_memory(MEMORY_BYTES)
    place = Path(tempfile.mkdtemp(prefix="fuzzing-", dir=_fast()))
    tally = Tally()
    try:
        for number in numbers:
            at.value = number
            tally.add(number, law.judge(name, number, place / "case"))
        told.send(tally)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    told.close()
    os._exit(0)  # what libraries do at exit is no reader's


def _fast() -> str | None:
    """A folder in memory, where there is one: a million cases would wear a disk."""
    return "/dev/shm" if os.access("/dev/shm", os.W_OK) else None


def write(out: Path, tallies: Mapping[str, Tally], command: str, seconds: float) -> None:
    """The report: report.json, and the files of every defect under defects/READER-NUMBER."""
    out.mkdir(parents=True, exist_ok=True)
    readers = {}
    for name, tally in tallies.items():
        defects = [{"kind": kind, **one} for kind, found in tally.defects.items() for one in found]
        for one in defects:
            law.put(law.files_of(name, one["case"]), out / "defects" / f"{name}-{one['case']}")
        readers[name] = {
            "cases": tally.cases,
            "kinds": dict(tally.kinds.most_common()),
            "seconds": round(tally.seconds, 3),
            "slowest": {"seconds": round(tally.slowest[0], 4), "case": tally.slowest[1]},
            "defects": defects,
        }
    report = {"command": command, "seconds": round(seconds, 1), "readers": readers}
    (out / "report.json").write_text(json.dumps(report, indent=1) + "\n", encoding="utf-8")
