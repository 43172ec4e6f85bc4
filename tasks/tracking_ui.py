"""MLflow by hand: its page in a browser, and runs for what it missed."""

from __future__ import annotations

import argparse
import os
import shlex
import socket
import sys

from rankwise import json_text
from rankwise.types import UserError
from tasks.tracking import PATIENCE_COPY_S, home, registry, without_password
from tasks.tracking_worker import SETTINGS

UI = """Start MLflow's page for the store in use, on this machine only. MLflow may open on its page for chat
applications; the address printed leads to the last pipeline run."""
BACKFILL = """Make a run for each stage of dvc.lock whose results no run has, from the files of its report: numbers,
curves, parameters, plots. Run twice, it makes nothing twice. It cannot give back what only the stage could say: the
time of each step, speeds, tables of samples. For the registered model there is `python -m tasks.register`."""


def main() -> int:
    """The command line `python -m tasks.tracking`; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m tasks.tracking", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    ui = commands.add_parser("ui", help="start MLflow's page on 127.0.0.1", description=UI)
    ui.add_argument("--port", type=int, default=5000, help="port on 127.0.0.1 (%(default)s)")
    ui.add_argument("--print", action="store_true", dest="only_print", help="print the command, start nothing")
    commands.add_parser(
        "backfill",
        help="record results that no run has",
        description=BACKFILL,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    arguments = parser.parse_args()
    try:
        if arguments.command == "backfill":
            return _backfill()
        return _show(arguments.port, only_print=arguments.only_print)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _backfill() -> int:
    """Record what is missing, and say of each stage what was done."""
    with registry() as desk:
        told = desk.ask("backfill", patience_s=PATIENCE_COPY_S)["runs"]
    for one in told:
        print(f"{one['stage']:<22} {one['state']:<9} {one['note']}")
    states = [one["state"] for one in told]
    print(", ".join(f"{states.count(state)} {state}" for state in dict.fromkeys(states)) or "dvc.lock has no stage yet")
    return 0


def ui_command(port: int) -> tuple[list[str], dict[str, str]]:
    """The command that serves the store in use, and what it needs in its environment: the store's address, which may
    hold a password and would be in the list of processes. Raises UserError where there is no store yet."""
    root = (home() / "mlflow").resolve()
    uri = os.environ.get("MLFLOW_TRACKING_URI") or f"sqlite:///{root / 'mlflow.db'}"
    if uri.startswith("sqlite:///") and not os.path.exists(uri.removeprefix("sqlite:///")):
        raise UserError(f"{uri.removeprefix('sqlite:///')}: no runs yet; make some first: make run")
    command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1"]
    return command, {"MLFLOW_BACKEND_STORE_URI": uri}


def _show(port: int, *, only_print: bool) -> int:
    uri = os.environ.get("MLFLOW_TRACKING_URI", "")
    if uri.startswith("http"):
        print(f"the runs are on the server that MLFLOW_TRACKING_URI names: {without_password(uri)}")
        return 0
    command, store = ui_command(port)
    # Without this MLflow also starts job runners: 2.4 GB instead of 0.5.
    settings = SETTINGS | {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
    if only_print:
        shown = {name: '"$MLFLOW_TRACKING_URI"' if uri else value for name, value in store.items()}
        print(" ".join([f"{key}={value}" for key, value in (settings | shown).items()] + [shlex.join(command)]))
        return 0
    with socket.socket() as probe:
        if probe.connect_ex(("127.0.0.1", port)) == 0:
            raise UserError(f"port {port} is in use; choose another: python -m tasks.tracking ui --port {port + 1}")
    print(f"MLflow: http://127.0.0.1:{port}/{_last_pipeline()}   (Ctrl-C ends it)", flush=True)
    os.environ.update(settings | store)
    os.execv(command[0], command)


def _last_pipeline() -> str:
    """The page of the run that ended last, a pipeline's before a stage's; "" where there is none."""
    runs = [(path.stat().st_mtime, json_text.read(path, "remove it")) for path in (home() / "runs").glob("*.json")]
    known = [(at, run) for at, run in runs if isinstance(run, dict) and isinstance(run.get("url"), str)]
    if not known:
        return ""
    _, last = max(known, key=lambda one: (one[1].get("kind") == "pipeline", one[0]))
    return "#" + last["url"].partition("#")[2]


if __name__ == "__main__":
    raise SystemExit(main())
