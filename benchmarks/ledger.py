"""The ledger that the stages of a run leave (benchmarks.witness), read: phases, what was done twice, what was lost."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

# What a kill may cost of finished work, by kind: so many verdicts wait for a place in the store; prompts, on a CPU,
# until two batches of answers are complete, of which the default's evaluation has one a prompt.
BOUND = {"verdict": 64, "answers": 512}


@dataclass(frozen=True, kw_only=True)
class Event:
    event: str  # start | work | safe | end
    stage: str
    pid: int
    at: float  # seconds of the monotonic clock, which all processes share
    kind: str
    keys: list[str]


class Ledger:
    """A file that grows; read() takes what is new."""

    def __init__(self, path: Path):
        self.path, self.events = path, []
        self._offset, self._rest = 0, b""

    def read(self) -> list[Event]:
        if not self.path.exists():
            return []
        with open(self.path, "rb") as handle:
            handle.seek(self._offset)
            new = handle.read()
        self._offset += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        found = []
        for line in filter(None, lines):
            try:
                found.append(Event(**json.loads(line)))
            except ValueError:
                continue  # cut by a kill
        self.events += found
        return found


@dataclass(frozen=True, kw_only=True)
class Phase:
    """A part of a stage of an undisturbed run."""

    stage: str
    name: str  # start-up | work | writing | between, or whole where no unit of work is told of
    seconds: float


def phases(events: Iterable[Event]) -> list[Phase]:
    """The phases of every stage, in the order in which they ran; between is what the driver does after a stage."""
    found: list[Phase] = []
    by_stage: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_stage[event.stage].append(event)
    runs = [
        (own[0].at, own[-1].at, [one.at for one in own if one.event == "work"], stage)
        for stage, own in by_stage.items()
    ]
    runs.sort()
    for number, (start, end, work, stage) in enumerate(runs):
        following = runs[number + 1][0] if number + 1 < len(runs) else end + 1.0
        marks = {"start-up": (start, work[0]), "work": (work[0], work[-1]), "writing": (work[-1], end)} if work else {}
        marks = (marks or {"whole": (start, end)}) | {"between": (end, following)}
        found += [Phase(stage=stage, name=name, seconds=stop - begin) for name, (begin, stop) in marks.items()]
    return found


def units(events: Iterable[Event]) -> dict[str, set[str]]:
    """Units of work by stage."""
    found: dict[str, set[str]] = defaultdict(set)
    for event in events:
        if event.event == "work":
            found[event.stage].update(event.keys)
    return found


def repeated(events: Iterable[Event], undisturbed: Iterable[Event]) -> Counter[str]:
    """By kind: units that were done more often than in an undisturbed run."""
    count = lambda told: Counter((one.kind, key) for one in told if one.event == "work" for key in one.keys)
    more = count(events) - count(undisturbed)
    return Counter({kind: sum(n for (of, _), n in more.items() if of == kind) for kind in {kind for kind, _ in more}})


def done_though_safe(events: Iterable[Event]) -> Counter[str]:
    """By kind: verdicts and answers that were asked for although the store held them."""
    safe: set[str] = set()
    found: Counter[str] = Counter()
    for event in sorted(events, key=lambda one: one.at):
        if event.event == "safe" and event.kind == "rows":
            safe.update(event.keys)
        elif event.event == "work" and event.kind in BOUND:
            found[event.kind] += sum(key in safe for key in event.keys)
    return found


def lost_s(events: Iterable[Event], pid: int, killed_at: float) -> float:
    """Seconds of a stage's process that have to be computed again: since what it made safe last, or since its start.

    Nothing where it made more safe after the kill, as it does when its driver alone died and it is told to stop.
    """
    own = [event for event in events if event.pid == pid]
    over = any(event.event == "end" and event.at <= killed_at for event in own)
    # Where it was over, and the driver had not noted it, a finished training's checkpoint is gone already.
    kept = [one.at for one in own if one.event == "safe" and not (over and one.kind == "checkpoint")]
    if not own or any(at > killed_at for at in kept):
        return 0.0
    return max(0.0, killed_at - max([own[0].at, *kept]))
