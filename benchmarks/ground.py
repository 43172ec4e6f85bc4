"""What a run stands on when something around it fails: watched commands, copies of what was, disks, servers."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks.disturbed import MARK, marked
from benchmarks.ledger import Ledger
from benchmarks.scratch import START_S, Copy
from benchmarks.undisturbed import Reference, tree

WAIT_S = 600.0  # for anything that must happen
EPOCHS = 20  # of SFT, long enough to be disturbed


class Broken(Exception):
    """A scenario does not hold."""


class Skipped(Exception):
    """A scenario cannot be tried here."""


class Command:
    """A command in a copy while it runs, with its lines and what its stages tell."""

    def __init__(self, copy: Copy, words: tuple[str, ...], **environment: str):
        Command.number = getattr(Command, "number", 0) + 1
        self.mark, self.words = f"fault-{os.getpid()}-{Command.number}", words
        stem = copy.root.parent / f"{copy.root.name}-{Command.number}"
        self.log, self.ledger = stem.with_suffix(".log"), Ledger(stem.with_suffix(".ledger"))
        told = {MARK: self.mark, "CHAOS_LEDGER": str(self.ledger.path)}
        with open(self.log, "wb") as log:
            self.child = subprocess.Popen(
                words,
                cwd=copy.root,
                env={**copy.environment, **told, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @property
    def said(self) -> str:
        return self.log.read_text(encoding="utf-8", errors="replace")

    def until(self, stage: str, kind: str, units: int = 1) -> None:
        """Wait until a stage has done so many units of work."""
        deadline = time.monotonic() + WAIT_S
        while True:
            self.ledger.read()
            done = [one for one in self.ledger.events if (one.stage, one.event, one.kind) == (stage, "work", kind)]
            if sum(len(one.keys) for one in done) >= units:
                return
            if self.child.poll() is not None or time.monotonic() > deadline:
                raise Broken(f"{' '.join(self.words)} ended before it could be disturbed: {self.said[-600:]}")
            time.sleep(0.005)

    def end(self, *statuses: int) -> str:
        """Wait for its end, with one of these statuses and no process left; what it said."""
        try:
            status = self.child.wait(WAIT_S)
        except subprocess.TimeoutExpired:
            self.child.kill()
            raise Broken(f"{' '.join(self.words)} does not end: {self.said[-600:]}") from None
        if status not in statuses:
            raise Broken(f"{' '.join(self.words)} ended with {status}, not {statuses}: {self.said[-1200:]}")
        if status and "Traceback" in self.said:
            raise Broken(f"{' '.join(self.words)} ended with a traceback: {self.said[-1200:]}")
        deadline = time.monotonic() + 60
        while left := marked(self.mark):
            if time.monotonic() > deadline:
                raise Broken(f"{len(left)} processes outlive {' '.join(self.words)}")
            time.sleep(0.1)
        return self.said

    def error(self) -> str:
        """Its message, in short."""
        lines = [line for line in self.said.splitlines() if "error" in line.lower()]
        return (lines[0] if lines else self.said.strip().splitlines()[-1]).strip()[:160]


class Ground:
    """An undisturbed run, and copies of what it was before some stage."""

    def __init__(self, folder: Path):
        self.folder, self.reference = folder, Reference(folder, tiny=True, overrides=(f"sft.epochs={EPOCHS}",))
        self._made = 0

    def before(self, stage: str) -> Copy:
        """A copy in which no stage from this one on has run; row stores and checkpoints are empty."""
        self._made += 1
        copy = object.__new__(Copy)
        old, copy.root = self.reference.copy, self.folder / f"{stage.partition('@')[0]}-{self._made}"
        shutil.copytree(old.root, copy.root, symlinks=True)
        paths = old.environment["PYTHONPATH"].replace(str(old.root), str(copy.root))
        copy.environment = old.environment | {"PYTHONPATH": paths}
        shutil.rmtree(copy.root / ".rankwise", ignore_errors=True)
        shutil.rmtree(copy.root / ".dvc/cache/runs", ignore_errors=True)  # or DVC would take results from there
        later = self.stages[self.stages.index(stage) :]
        copy.run("python", "-c", FORGET, *later)
        copy.run("dvc", "gc", "--quiet", "--force", "--workspace")  # what they are about to make is not there already
        return copy

    @property
    def stages(self) -> list[str]:
        return list(dict.fromkeys(phase.stage for phase in self.reference.phases))

    def command(self, stage: str) -> tuple[str, ...]:
        """A stage's own command."""
        return self.reference.stages[self.stages.index(stage)]

    def same(self, copy: Copy, *names: str) -> None:
        """Outputs below these names (all, where none is given) have the bytes of the undisturbed run."""
        inside = lambda found: {p: d for p, d in found.items() if not names or p.startswith(names)}
        mine, right = inside(tree(copy.root)), inside(self.reference.tree)
        if bad := sorted(path for path in {*mine, *right} if mine.get(path) != right.get(path)):
            raise Broken(f"{len(bad)} outputs differ from the undisturbed run's: {', '.join(bad[:5])}")


FORGET = """
import shutil, sys, yaml
from pathlib import Path
lock = yaml.safe_load(Path("dvc.lock").read_text())
for stage in sys.argv[1:]:
    for out in lock["stages"].pop(stage)["outs"]:
        path = Path(out["path"])
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
Path("dvc.lock").write_text(yaml.safe_dump(lock, sort_keys=False))
"""


def mount(*words: object) -> None:
    done = subprocess.run(["mount", *map(str, words)], capture_output=True, text=True)
    if done.returncode:
        raise Skipped(f"mount: {done.stderr.strip()}")


@contextlib.contextmanager
def mounted(*words: object) -> Iterator[None]:
    if os.geteuid() != 0:
        raise Skipped("mounting needs root")
    mount(*words)
    try:
        yield
    finally:
        subprocess.run(["umount", "--lazy", str(words[-1])], check=True)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def served(copy: Copy, words: tuple[str, ...], port: int) -> subprocess.Popen:
    """A server of its own process group, once it takes connections."""
    environment = copy.environment | {MARK: f"server-{port}"}
    with open(copy.root.parent / f"server-{port}.log", "ab") as log:
        server = subprocess.Popen(
            words,
            cwd=copy.root,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,
        )
    server.port = port
    deadline = time.monotonic() + START_S
    while True:
        with contextlib.suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1):
            return server
        if server.poll() is not None or time.monotonic() > deadline:
            raise Broken(f"{' '.join(words)} did not start")
        time.sleep(0.2)


def end(server: subprocess.Popen) -> None:
    """kill -9 of a server with all its processes."""
    while left := marked(f"server-{server.port}"):
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        server.poll()
