"""A whole run of the pipeline whose processes are killed again and again, each time followed by the plain command."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks import report
from benchmarks.kills import Kill
from benchmarks.ledger import Event, Ledger, lost_s
from benchmarks.scratch import Copy

POLL_S, SCAN_S = 0.01, 0.5
ORPHAN_S = 60.0  # the longest that a process may outlive its driver: a step, a checkpoint, a tracker's last words
REFUSALS = 60  # times, a second apart, that a command may be told to wait for a process which is leaving
MARK = "CHAOS_ATTEMPT"
# dvc 3.67 empties dvc.lock before it writes it. Killed in between, its own command can go on only without that file.
CUT = "'./dvc.lock' validation failed", "'./dvc.lock' is invalid"
BUSY = ("is already being run here by process", "another run of this checkout is going on")


@dataclass(kw_only=True)
class Told:
    """How a disturbed run went."""

    kills: list[Kill]
    defects: list[str] = field(default_factory=list)
    attempts: int = 0
    locks_cut: int = 0  # times that `dvc` had left a dvc.lock which it could not read, and that was deleted
    waits: int = 0  # times that a command said a process of the killed one was still leaving
    seconds: float = 0.0
    orphans_s: float = 0.0


class Disturbed:
    """One run to its end in a copy.

    Args:
        commands: one after another, each again until it ends well.
        units: how many units of work each stage has in an undisturbed run.
    """

    def __init__(
        self,
        copy: Copy,
        driver: str,
        commands: list[tuple[str, ...]],
        planned: dict[str, list[Kill]],
        units: dict[str, int],
    ):
        self.copy, self.driver, self.commands, self.planned, self.units = copy, driver, commands, planned, units
        self.ledger = Ledger(copy.root.parent / f"{copy.root.name}.ledger")
        self.log = copy.root.parent / f"{copy.root.name}.log"
        self.told = Told(kills=[])
        self.number = sum(map(len, planned.values()))
        self._armed: Kill | None = None
        self._since = 0  # events before this one are of killed processes
        self._leaving: dict[str, tuple[Kill, float]] = {}  # attempts with processes that outlive their kill
        self._scanned = 0.0
        self._tried = 0

    def run(self) -> Told:
        began = time.monotonic()
        for command in self.commands:
            refused = 0
            while not self.told.defects:
                status, fired = self._attempt(command)
                if status == 0:
                    break
                if any(kill.target != "tracker" for kill in fired):
                    continue
                said = self._said()
                if self.driver == "dvc" and any(cut in said for cut in CUT):
                    (self.copy.root / "dvc.lock").unlink()
                    self.told.locks_cut += 1
                    continue
                if any(busy in said for busy in BUSY) and refused < REFUSALS:
                    refused, self.told.waits = refused + 1, self.told.waits + 1
                    time.sleep(1.0)
                    continue
                self.told.defects.append(f"{' '.join(command)} ended by itself with status {status}: {said[-1500:]}")
        while self._leaving:
            self._look_at_leaving(now=True)
            time.sleep(SCAN_S)
        self.told.seconds = time.monotonic() - began
        for kill in self.told.kills:
            kill.orphans_s = round(kill.orphans_s, 2)
        self.told.orphans_s = max((kill.orphans_s for kill in self.told.kills), default=0.0)
        return self.told

    def _attempt(self, command: tuple[str, ...]) -> tuple[int, list[Kill]]:
        """The command until it ends or is killed: its status, and the kills of it."""
        self.told.attempts += 1
        mark = f"{self.driver}-{self.told.attempts}"
        environment = self.copy.environment | {MARK: mark, "CHAOS_LEDGER": str(self.ledger.path)}
        self.ledger.read()
        self._since, fired = len(self.ledger.events), []
        self._tried = self.log.stat().st_size if self.log.exists() else 0
        with open(self.log, "ab") as log:
            child = subprocess.Popen(
                command,
                cwd=self.copy.root,
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while child.poll() is None:
                self.ledger.read()
                self._look_at_leaving()
                if self._due():
                    kill, self._armed = self._armed, None
                    self._fire(kill, child, mark)
                    fired.append(kill)
                    self._since = len(self.ledger.events)
                time.sleep(POLL_S)
        except BaseException:  # ctrl-C: nothing of ours goes on alone
            kill_all(marked(mark))
            raise
        if fired:
            self._leaving[mark] = (fired[-1], time.monotonic())
        if fired and not fired[-1].at_once:
            while mark in self._leaving:
                self._look_at_leaving(now=True)
                time.sleep(POLL_S)
        self.ledger.read()
        for kill in fired:
            if kill.target != "tracker":
                kill.lost_s = round(lost_s(self.ledger.events, kill.victim, kill.at), 2)
        return child.returncode, fired

    def _due(self) -> bool:
        """Whether the moment of the next kill has come."""
        fresh = self.ledger.events[self._since :]
        start = next((one for one in reversed(fresh) if one.event == "start"), None)
        if start is None:
            return False
        if self._armed is None or (self._armed.stage != start.stage and self._anchor(self._armed, fresh) is None):
            again = [self._armed] if self._armed else []
            over = [
                kill
                for stage, kills in self.planned.items()
                if stage != start.stage
                for kill in self._past(stage, kills)
            ]
            waiting = self.planned.get(start.stage, [])
            if again or over:  # its stage was over before its moment came: so long after this one's start
                self._armed = (again or over)[0]
                if not again:
                    self.planned[self._armed.stage].remove(self._armed)
                self._armed.stage, self._armed.phase = start.stage, "start-up"
                self._armed.delay_s = min(self._armed.delay_s, 3.0)
            elif waiting:
                self._armed = waiting.pop(0)
        if self._armed is None:
            return False
        anchor = self._anchor(self._armed, fresh)
        return anchor is not None and time.monotonic() >= anchor + self._armed.delay_s

    def _past(self, stage: str, kills: list[Kill]) -> list[Kill]:
        """Kills of a stage that has ended, and that another one has followed."""
        ended = any(one.stage == stage and one.event == "end" for one in self.ledger.events)
        return kills if ended else []

    def _anchor(self, kill: Kill, fresh: list[Event]) -> float | None:
        """When the phase of a kill began in this attempt."""
        own = [one for one in fresh if one.stage == kill.stage]
        if kill.phase in ("start-up", "whole"):
            found = [one.at for one in own if one.event == "start"]
        elif kill.phase == "work":
            work = [one.at for one in own if one.event == "work"]
            found = work[:1] if self._worked(kill.stage) >= kill.share * self.units.get(kill.stage, 0) else []
        elif kill.phase == "between":
            found = [one.at for one in own if one.event == "end"]
        else:
            work = [one.at for one in own if one.event in ("start", "work")]
            found = work if self._worked(kill.stage) >= self.units.get(kill.stage, 0) else []
        return found[-1] if found else None

    def _fire(self, kill: Kill, child: subprocess.Popen, mark: str) -> None:
        starts = [one for one in self.ledger.events if one.event == "start"]
        alive = marked(mark)
        last = starts[-1]
        tracker = [pid for pid, words in alive.items() if "tasks.tracking_worker" in words]
        if kill.target == "stage" and last.pid not in alive:
            kill.target = "driver"
        if kill.target == "tracker" and not tracker:
            kill.target = "everything"
        kill.hit_stage, kill.hit_phase = last.stage, self._phase(last, alive)
        moment = time.monotonic()
        if kill.target == "everything":
            while alive := marked(mark):
                kill_all(alive)
        elif kill.target == "group":
            with contextlib.suppress(ProcessLookupError):
                os.killpg(child.pid, signal.SIGKILL)
        else:
            kill_all({"driver": [child.pid], "stage": [last.pid], "tracker": tracker}[kill.target])
        if kill.target in ("driver", "group", "everything"):
            child.wait()
        kill.victim, kill.at = last.pid, moment
        self.told.kills.append(kill)
        what = f"{kill.target} in {kill.hit_phase} of {kill.hit_stage}"
        report.say(f"{self.driver}: kill {len(self.told.kills)} of {self.number}, {what}")

    def _phase(self, start: Event, alive: dict[int, str]) -> str:
        own = [one for one in self.ledger.events if one.pid == start.pid and one.at >= start.at]
        if start.pid not in alive or own[-1].event == "end":
            return "between"
        if not any(one.event == "work" for one in own):
            return "start-up" if self.units.get(start.stage) else "whole"
        return "writing" if self._worked(start.stage) >= self.units.get(start.stage, 0) else "work"

    def _worked(self, stage: str) -> int:
        """How many units of a stage are done, by all attempts."""
        return len({key for one in self.ledger.events if (one.stage, one.event) == (stage, "work") for key in one.keys})

    def _look_at_leaving(self, *, now: bool = False) -> None:
        """Note when the processes of killed attempts are gone."""
        if not self._leaving or (not now and time.monotonic() - self._scanned < SCAN_S):
            return
        self._scanned = time.monotonic()
        for mark, (kill, ended) in list(self._leaving.items()):
            left = marked(mark)
            kill.orphans_s = time.monotonic() - ended if left else kill.orphans_s
            if not left:
                del self._leaving[mark]
            elif kill.orphans_s > ORPHAN_S:
                names = "; ".join(" ".join(words.split("\0"))[:200] for words in left.values())
                self.told.defects.append(f"{ORPHAN_S:.0f} s after the kill of {kill.target} there still are: {names}")
                kill_all(left)

    def _said(self) -> str:
        with open(self.log, "rb") as log:
            log.seek(self._tried)
            return log.read().decode("utf-8", "replace")


def marked(mark: str) -> dict[int, str]:
    """The living processes that an attempt has started, directly or not: pid and command line."""
    found, wanted = {}, f"{MARK}={mark}".encode()
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            if wanted in (folder / "environ").read_bytes().split(b"\0"):
                found[int(folder.name)] = (folder / "cmdline").read_text("utf-8", "replace")
    return found


def kill_all(pids: Iterable[int]) -> None:
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
