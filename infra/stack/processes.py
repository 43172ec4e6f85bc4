"""Services as processes of their own: started in the background, found again by a note, stopped with all they started.

A note (ROOT/run/NAME.json) holds the process id, when that process began, so that a reused id is never taken for it,
and a digest of how it was started, so that a changed setting starts it anew.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from infra.stack.settings import SECRETS
from rankwise.types import UserError

STOP_S = 30.0  # between the signal that asks and SIGKILL
MARK = "RANKWISE_STACK_SERVICE"  # in the environment of a service and of all that it starts


@dataclass(frozen=True, kw_only=True)
class Service:
    """One program of the stack."""

    name: str
    what: str  # for people
    address: str  # for people
    port: tuple[str, int] | None  # host and TCP port that it listens on; without one its children may outlive it
    command: list[str]
    environment: dict[str, str] = field(repr=False)  # over that of this process; secrets are in it
    healthy: Callable[[], bool]
    prepare: Callable[[], None] = lambda: None  # before each start
    user: str | None = None  # the system's user that it runs as; None: this one
    stop_signal: int = signal.SIGTERM
    spared: bool = False  # while it lives it is left alone: what it runs is worth more than one bad look at it
    after: tuple[str, ...] = ()  # services that it needs, by name
    start_s: float = 180.0  # how long a start may take, on a busy machine too


class Processes:
    """The processes of a stack, by the notes that it left."""

    def __init__(self, root: Path):
        self._root, self._notes, self.logs = root, root / "run", root / "logs"

    def log(self, service: Service) -> Path:
        return self.logs / f"{service.name}.log"

    def find(self, service: Service) -> psutil.Process | None:
        """The service's process, if it lives."""
        with contextlib.suppress(OSError, ValueError, KeyError, psutil.Error):
            note = json.loads(self._note(service).read_text(encoding="utf-8"))
            process = psutil.Process(note["pid"])
            if abs(process.create_time() - note["began"]) < 1 and _alive(process):
                return process
        return None

    def current(self, service: Service) -> bool:
        """Whether it was started as it would be started now."""
        return json.loads(self._note(service).read_text(encoding="utf-8"))["digest"] == _digest(service)

    def clear(self, service: Service) -> None:
        """Make way for one that does not run; raises UserError where somebody else holds its port.

        What an earlier one that was killed left behind holds its port, and is ended. Flow runs of a worker that was
        killed hold none; they go on and report by themselves.
        """
        if service.port is None:
            return
        _end(self._marked(service))
        if (holder := _listener(*service.port)) is not None:
            raise UserError(
                f"{service.name}: port {service.port[1]} of {service.port[0]} is taken{holder}; stop what holds it, or "
                f"give RANKWISE_{service.name.upper()}_PORT another"
            )

    def start(self, service: Service) -> None:
        """Start it in the background, after clear(); wait() says whether it came up."""
        service.prepare()
        for folder in (self._notes, self.logs):
            folder.mkdir(parents=True, exist_ok=True)
        with open(self.log(service), "a", encoding="utf-8") as log:
            try:
                process = subprocess.Popen(
                    service.command,
                    env={**_clean(os.environ), **service.environment, MARK: self._mark(service)},
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=subprocess.STDOUT,
                    start_new_session=True,
                    **as_user(service.user),
                )
            except OSError as error:
                raise UserError(f"{service.name}: {service.command[0]}: {error.strerror}") from error
        note = {"pid": process.pid, "began": psutil.Process(process.pid).create_time(), "digest": _digest(service)}
        self._note(service).write_text(json.dumps(note), encoding="utf-8")

    def wait(self, service: Service) -> None:
        """Return once it is healthy; raises UserError with the end of its log when it is not in time, or died."""
        deadline = time.monotonic() + service.start_s
        while not service.healthy():
            alive = self.find(service) is not None
            if not alive or time.monotonic() > deadline:
                why = f"is not healthy after {service.start_s:.0f} s" if alive else "ended as soon as it was started"
                self.stop(service)
                raise UserError(f"{service.name} {why}; its log, {self.log(service)}, ends:\n{self._end_of(service)}")
            time.sleep(0.1)

    def stop(self, service: Service) -> bool:
        """Stop it and all that it started, in whichever session; returns whether there was something to stop."""
        process = self.find(service)
        if process is not None:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(service.stop_signal)
            _wait([process])
        left = self._marked(service)
        _end(left)
        self._note(service).unlink(missing_ok=True)
        return process is not None or bool(left)

    def _marked(self, service: Service) -> list[psutil.Process]:
        """Processes that this service started, and itself."""
        found = []
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):  # others' processes, and those that end meanwhile
                if process.environ().get(MARK) == self._mark(service):
                    found.append(process)
        return found

    def _mark(self, service: Service) -> str:
        return f"{self._root}:{service.name}"

    def _note(self, service: Service) -> Path:
        return self._notes / f"{service.name}.json"

    def _end_of(self, service: Service, lines: int = 8) -> str:
        text = self.log(service).read_text(encoding="utf-8", errors="replace").splitlines()
        return "\n".join(f"  {line}" for line in text[-lines:])


def as_user(name: str | None) -> dict[str, object]:
    """Arguments of Popen that run a program as that user of the system."""
    if name is None:
        return {}
    import pwd

    entry = pwd.getpwnam(name)
    return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": [], "cwd": "/"}


def _clean(environment: os._Environ[str]) -> dict[str, str]:
    """This process's environment without what would send a service elsewhere, or show it a secret of another's."""
    ours = ("PREFECT_", "MLFLOW_", "AWS_", "PG", "RCLONE_")
    return {name: value for name, value in environment.items() if not name.startswith(ours) and name not in SECRETS}


def _digest(service: Service) -> str:
    told = json.dumps([service.command, sorted(service.environment.items())])
    return hashlib.sha256(told.encode("utf-8")).hexdigest()


def _end(processes: list[psutil.Process]) -> None:
    """SIGTERM, time for a checkpoint, SIGKILL."""
    for ask in (psutil.Process.terminate, psutil.Process.kill):
        for one in processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                ask(one)
        processes = _wait(processes)


def _wait(processes: list[psutil.Process]) -> list[psutil.Process]:
    """Wait for their end, at most STOP_S; returns those that live still."""
    deadline = time.monotonic() + STOP_S
    while (left := [one for one in processes if _alive(one)]) and time.monotonic() < deadline:
        time.sleep(0.05)
    return left


def _alive(process: psutil.Process) -> bool:
    """Whether it runs. One that has ended stays in the table until its parent, often process 1, takes note."""
    try:
        return process.is_running() and process.status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def _listener(host: str, port: int) -> str | None:
    """Words on who listens on a TCP port of this machine; None where nobody does."""
    with socket.socket(socket.AF_INET6 if ":" in host else socket.AF_INET) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
            return None
        except PermissionError as error:
            raise UserError(f"port {port}: {error.strerror}; ports below 1024 are the system's") from error
        except OSError as error:
            if error.errno == errno.EADDRNOTAVAIL:
                raise UserError(f"RANKWISE_BIND is {host!r}, which is no address of this machine") from error
    with contextlib.suppress(psutil.Error, StopIteration):
        found = next(c for c in psutil.net_connections("tcp") if c.status == "LISTEN" and c.laddr.port == port)
        return f" by process {found.pid} ({psutil.Process(found.pid).name()})" if found.pid else ""
    return ""
