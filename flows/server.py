"""A Prefect server for the runs of this checkout: on loopback, SQLite under .rankwise/prefect, stopped with its user.

    python -m flows.server              # the UI on http://127.0.0.1:4200, until ctrl-C (`make prefect`)
    python -m flows.server --port 4300

A run uses PREFECT_API_URL (or the active Prefect profile) where one is set, else the server that this command
keeps open here, else one that it starts for itself. Prefect's own serverless mode loses task runs: not used.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.parse
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from flows import process
from rankwise import json_text
from rankwise.types import UserError
from tasks.tracking import home

HOME = home() / "prefect"
DEFAULT_PORT = 4200
# A new database takes 6 s on an idle machine and ten times that on a busy one.
START_TIMEOUT_S = 180.0
# Parts of the server that serve schedules and workers; a server for one run goes without.
UNNEEDED = ("SCHEDULER", "LATE_RUNS", "FOREMAN", "CANCELLATION_CLEANUP", "PAUSE_EXPIRATIONS", "TRIGGERS", "REPOSSESSOR")


class Server:
    """A server of ours and its processes. `url` is its API address."""

    def __init__(self, port: int, *, lean: bool):
        """Start it and return at once; wait() until it answers. lean leaves scheduling services out."""
        HOME.mkdir(parents=True, exist_ok=True)
        self.port = port
        self.url = f"http://127.0.0.1:{port}/api"
        self.log = HOME / "server.log"
        # A home of its own: a person's Prefect profile and database are left as they are.
        environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
        environment["PREFECT_HOME"] = str(HOME.resolve())
        environment["PREFECT_UI_URL"] = self.url.removesuffix("/api")  # links in notifications
        environment["PREFECT_UI_API_URL"] = self.url  # the page otherwise asks port 4200, whatever port this is
        if lean:
            environment |= {f"PREFECT_SERVER_SERVICES_{name}_ENABLED": "false" for name in UNNEEDED}
        with open(self.log, "w", encoding="utf-8") as log:
            self._process = subprocess.Popen(
                process.bound_to_this(
                    [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
                ),
                env=environment,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    @classmethod
    def for_one_run(cls) -> Server:
        """A lean one that answers: on DEFAULT_PORT, or another where that is taken, also while this one starts.

        Prefect binds the port at the end of its start, seconds after the look whether it is free.
        """
        server = cls(free_port(DEFAULT_PORT), lean=True)
        try:
            server.wait()
        except UserError:
            if free_port(server.port) == server.port:
                raise
            server = cls(free_port(), lean=True)
            server.wait()
        return server

    def wait(self) -> None:
        """Return when the server answers, else stop it; raises UserError with the end of its log if it does not."""
        deadline = time.monotonic() + START_TIMEOUT_S
        try:
            while not (_listens(self.pid, self.port) and healthy(self.url)):
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise UserError(
                        f"the local Prefect server did not start ({self.log}): {_last_line(self.log)}; "
                        "set PREFECT_API_URL to use another, or run `dvc repro`, which needs none"
                    )
                time.sleep(0.1)
        except BaseException:
            self.stop()
            raise

    @property
    def pid(self) -> int:
        return self._process.pid

    def join(self) -> int:
        """Wait for the server to end; returns its exit status."""
        return self._process.wait()

    def stop(self) -> None:
        """Stop it and everything that it started."""
        for number in (signal.SIGTERM, signal.SIGKILL):
            try:
                os.killpg(self._process.pid, number)
                self._process.wait(10)
            except ProcessLookupError:
                break
            except subprocess.TimeoutExpired:
                continue
        self._process.poll()


def kept_open() -> str | None:
    """The API address of the server that `python -m flows.server` keeps open in this checkout, if it answers."""
    try:
        note = json_text.parse((HOME / "server.json").read_text(encoding="utf-8"))
        there = _listens(note["pid"], urllib.parse.urlsplit(note["url"]).port)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return None
    return note["url"] if there and healthy(note["url"]) else None


def healthy(url: str) -> bool:
    """Whether a Prefect API answers at this address."""
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=2) as reply:
            return reply.status == 200
    except (OSError, ValueError, http.client.HTTPException):  # also where it is no address at all
        return False


def _listens(pid: int, port: int | None) -> bool:
    """Whether the server at this port is that process, and not a neighbour's."""
    try:
        sockets = psutil.Process(pid).net_connections("tcp")
    except (psutil.Error, ValueError, TypeError, OverflowError):
        return False
    return any(one.status == psutil.CONN_LISTEN and one.laddr.port == port for one in sockets)


def free_port(preferred: int | None = None) -> int:
    """A loopback TCP port that nothing listens on; the preferred one if it is free."""
    for port in (preferred, 0):
        if port is not None:
            with socket.socket() as probe:
                probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                try:
                    probe.bind(("127.0.0.1", port))
                except OSError:
                    continue
                return probe.getsockname()[1]
    raise UserError("no free TCP port on 127.0.0.1")


def wait_until_recorded(read_states: Callable[[], list[Any]], expected: int, timeout_s: float = 10.0) -> bool:
    """Wait until the server has stored that many finished task runs; it does so after they end, from events."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        states = read_states()
        if len(states) >= expected and all(state is not None and state.is_final() for state in states):
            return True
        time.sleep(0.2)
    return False


def main(arguments: list[str] | None = None) -> int:
    """Keep a full server open until ctrl-C or SIGTERM; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.server", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--port", type=int, default=DEFAULT_PORT, help="TCP port on 127.0.0.1 (%(default)s)")
    port = parser.parse_args(arguments).port
    if (url := kept_open()) is not None:
        print(f"a server of this checkout is open already: {url.removesuffix('/api')}")
        return 0
    if free_port(port) != port:
        print(f"error: port {port} is taken; name another with --port", file=sys.stderr)
        return 2
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    server = Server(port, lean=False)
    note = HOME / "server.json"
    try:
        server.wait()
        note.write_text(json.dumps({"url": server.url, "pid": server.pid}), encoding="utf-8")
        print(f"Prefect UI: http://127.0.0.1:{port} (ctrl-C ends it)", flush=True)
        try:
            return server.join()
        finally:
            note.unlink(missing_ok=True)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 0
    finally:
        server.stop()


def _last_line(path: Path) -> str:
    lines = [line.strip() for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if line.strip()]
    return lines[-1] if lines else "its log is empty"


if __name__ == "__main__":
    raise SystemExit(main())
