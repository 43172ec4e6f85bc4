"""The services of a team on this machine: PostgreSQL, an S3-compatible store, Prefect, MLflow and a worker.

    python -m infra.stack up           # start what is missing, make pool, limits and deployments (make up)
    python -m infra.stack status       # what runs where
    python -m infra.stack down         # stop all, keep the data (make down)
    python -m infra.stack passwords    # write infra/.env alone, for compose
    eval "$(python -m infra.stack environment)"   # this shell's commands use the stack from now on

Settings and passwords are in infra/.env, which the first `up` writes; data, logs and process ids are in
.rankwise/stack, or where RANKWISE_STACK says. docs/stack.md tells the rest. Exit status: 0 done, 1 a service is not
well, 2 a mistake to be mended first.
"""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from infra.stack import settings as stack_settings
from infra.stack.processes import Processes, Service
from infra.stack.services import services
from infra.stack.settings import Settings
from rankwise.types import UserError


def up(settings: Settings, names: list[str]) -> int:
    """Start what does not run or is not well, each after what it needs; names: these and what they need, none: all."""
    processes, came = Processes(settings.root), {}
    waiting = _wanted(services(settings), names)
    for service in waiting:
        if processes.find(service) is None:
            processes.clear(service)
    while waiting:
        wave = [one for one in waiting if all(need in came for need in one.after)]
        for service in wave:
            if service.name == "worker":
                print("prefect: pool, limits, deployments", flush=True)
                _set_up(settings)
            came[service.name] = _start(processes, service)
        for service in wave:
            processes.wait(service)
        waiting = [one for one in waiting if one not in wave]
    return _table(settings, processes, came)


def _wanted(known: list[Service], names: list[str]) -> list[Service]:
    """The services of these names and those that they need; all where no name is given."""
    if not names:
        return known
    if unknown := [name for name in names if name not in {one.name for one in known}]:
        raise UserError(f"no service is called {unknown[0]!r}; there are {', '.join(one.name for one in known)}")
    wanted = set(names)
    for service in reversed(known):
        if service.name in wanted:
            wanted |= set(service.after)
    return [service for service in known if service.name in wanted]


def _start(processes: Processes, service: Service) -> str:
    """Start a service unless it runs and is well; returns what was done, in a word."""
    running = processes.find(service) is not None
    if running and processes.current(service) and (service.spared or service.healthy()):
        return "running"
    if running:
        processes.stop(service)
    print(f"starting {service.what} ...", flush=True)
    processes.start(service)
    return "restarted" if running else "started"


def _set_up(settings: Settings) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "infra.stack.setup"],
        env={
            **os.environ,
            **settings.client(),
            "PREFECT_HOME": str(settings.root / "worker"),
            "RANKWISE_GPUS": str(settings.gpus),
        },
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        raise UserError((done.stderr.strip() or done.stdout.strip()).removeprefix("error: "))


def down(settings: Settings, *, delete_data: bool) -> int:
    """Stop all in the order that is the reverse of starting; data are deleted only after a yes."""
    processes = Processes(settings.root)
    stopped = [service.what for service in reversed(services(settings)) if processes.stop(service)]
    print(f"stopped: {', '.join(stopped)}" if stopped else "nothing ran")
    if not delete_data:
        print(f"data are kept in {settings.root}")
        return 0
    print(f"this deletes all runs, models and artifacts of the stack: {settings.root}")
    try:
        answer = input("type yes to delete: ").strip()
    except EOFError:  # nobody there to ask
        answer = ""
    if answer != "yes":
        print("kept")
        return 0
    shutil.rmtree(settings.root)
    print(f"deleted; {stack_settings.FILE} with the passwords is kept")
    return 0


def status(settings: Settings) -> int:
    """Show the table."""
    return _table(settings, Processes(settings.root))


def environment(settings: Settings) -> int:
    """Print what a shell has to export to use the stack."""
    for name, value in settings.client().items():
        print(f"export {name}={shlex.quote(value)}")
    return 0


def _table(settings: Settings, processes: Processes, came: dict[str, str] | None = None) -> int:
    """Print what runs; returns 1 where one of those that came, or of all, is not well."""
    rows, bad = [("service", "address", "state", "log")], []
    for service in services(settings):
        alive = processes.find(service) is not None
        good = alive and service.healthy()
        state = (came or {}).get(service.name, "running") if good else "not well" if alive else "down"
        rows.append((service.name, service.address, state, os.path.relpath(processes.log(service))))
        if not good and (came is None or service.name in came):
            bad.append(service.name)
    widths = [max(map(len, column)) for column in zip(*rows)]
    print()
    for row in rows:
        print("   ".join(text.ljust(width) for text, width in zip(row, widths)).rstrip())
    if bad:
        print("\nmake up starts what is down or not well")
    else:
        print(f"\nPrefect and MLflow ask for the user admin and the password in {stack_settings.FILE}; in a shell:")
        print('  eval "$(python -m infra.stack environment)"')
    return 1 if bad else 0


@contextlib.contextmanager
def _alone(root: Path) -> Iterator[None]:
    """One `up` or `down` of a stack at a time."""
    root.mkdir(parents=True, exist_ok=True)
    with open(root / "lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError(f"another up or down of {root} is at work; wait for its end") from None
        yield


def main(arguments: list[str] | None = None) -> int:
    """Run a command; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m infra.stack", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    start = commands.add_parser("up", help="start what is missing")
    start.add_argument(
        "service", nargs="*", help="postgres, s3, prefect, mlflow, worker, and what it needs; default: all"
    )
    stop = commands.add_parser("down", help="stop all, keep the data")
    stop.add_argument("--delete-data", action="store_true", help="delete the data too, after a question")
    commands.add_parser("status", help="what runs where; status 1 where something does not")
    commands.add_parser("passwords", help="write infra/.env with random passwords, where there is none")
    commands.add_parser("environment", help="print the exports that let a shell use the stack")
    given = parser.parse_args(arguments)
    try:
        if given.command in ("up", "passwords") and stack_settings.write_once():
            print(f"wrote {stack_settings.FILE} with random passwords, for this user alone", flush=True)
        elif given.command == "passwords":
            print(f"{stack_settings.FILE} is there and stays as it is")
        if given.command == "passwords":
            return 0
        settings = stack_settings.read()
        if given.command in ("status", "environment"):
            return {"status": status, "environment": environment}[given.command](settings)
        with _alone(settings.root):
            return (
                up(settings, given.service) if given.command == "up" else down(settings, delete_data=given.delete_data)
            )
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; `make up` goes on, `make down` stops what was started", file=sys.stderr)
        return 130


if __name__ == "__main__":
    raise SystemExit(main())
