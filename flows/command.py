"""A flow as a command: a Prefect server where none is configured, the run, and its last words.

The last words of a run that failed are the stage, the reason and the command to continue; see flows/align.py.
"""

from __future__ import annotations

import argparse
import inspect
import os
import shlex
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from flows import graph, server
from flows.stages import MISTAKE, only_run
from flows.summary import Outcome
from rankwise.types import UserError
from tasks.tracking import without_password


class _Terminated(BaseException):
    """SIGTERM arrived."""


@dataclass(frozen=True, kw_only=True)
class Command:
    """A flow's command line.

    The flow takes what `arguments` declares, returns a state whose data are its Outcomes, and does not mind that
    `prepare` has put everything in place before.
    """

    module: str  # what `python -m` runs
    doc: str
    flow: Any
    prepare: Callable[..., list[graph.Node]]  # those of the flow's arguments that it names -> the stages that will run
    arguments: Callable[[argparse.ArgumentParser], None]
    show: Callable[..., None]  # (outcomes, prefect=where the run is to be seen): the end table

    def main(self, words: list[str] | None = None) -> int:
        """Run the flow; returns the exit status."""
        words = sys.argv[1:] if words is None else words
        given = self._parse(words)
        again = os.environ.get("RANKWISE_AGAIN") or shlex.join(["python", "-m", self.module, *words])
        signal.signal(signal.SIGTERM, _terminate)
        record = given.pop("record")
        try:
            with only_run():  # nothing is put in place under a run that is going on
                wanted = inspect.signature(self.prepare).parameters
                nodes = self.prepare(**{name: value for name, value in given.items() if name in wanted})
            return self._run(given, nodes, again, record=record)
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        except (KeyboardInterrupt, _Terminated) as stop:
            print(f"stopped; what was computed is kept. Continue with: {again}", file=sys.stderr)
            return 130 if isinstance(stop, KeyboardInterrupt) else 143

    def _parse(self, words: list[str]) -> dict[str, Any]:
        parser = argparse.ArgumentParser(
            prog=f"python -m {self.module}",
            description=self.doc,
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.arguments(parser)
        parser.add_argument(
            "--record", action="store_true", help="make a Prefect run even if every stage is up to date"
        )
        return vars(parser.parse_args(words))

    def _run(self, given: dict[str, Any], nodes: list[graph.Node], again: str, *, record: bool) -> int:
        url = _configured() or server.kept_open()
        if url is None and not record and not given.get("force") and graph.stale(node.name for node in nodes) == {}:
            # Nothing would run, and a server would cost more than the look at the files.
            outcomes = [Outcome(stage=node.name, state="cached", note="didn't change") for node in nodes]
            print("every stage is up to date (`dvc status`): nothing ran, no Prefect run was made (--record makes one)")
            self.show(outcomes, prefect="make prefect (earlier runs)")
            return 0
        own = None
        if url is None:
            began = time.monotonic()
            print("starting a Prefect server for this run ...", flush=True)
            own = server.Server.for_one_run()
            url, took = own.url, time.monotonic() - began
            print(f"Prefect answers at {url.removesuffix('/api')} after {took:.1f} s", flush=True)
        try:
            return self._run_at(url, given, again, kept=own is None)
        finally:
            if own is not None:
                own.stop()

    def _run_at(self, url: str, given: dict[str, Any], again: str, *, kept: bool) -> int:
        from prefect.settings import PREFECT_API_URL, temporary_settings

        with temporary_settings({PREFECT_API_URL: url}):
            try:
                state = self.flow(**given, return_state=True)
            except BaseException:
                _send_the_rest()
                time.sleep(0 if kept else 1)  # our server stores the last states before it goes
                raise
            _send_the_rest()
            told = state.result(raise_on_failure=False)
            outcomes = [Outcome(**one) for one in told] if isinstance(told, list) else []
            run_id = state.state_details.flow_run_id
            if not kept:
                _let_settle(run_id, sum(outcome.state != "not run" for outcome in outcomes))
        page = f"/runs/flow-run/{run_id}"
        where = (
            without_password(url).removesuffix("/api") + page
            if kept
            else f"make prefect, then http://127.0.0.1:4200{page}"
        )
        if outcomes:
            self.show(outcomes, prefect=where)
        if state.is_completed():
            return 0
        bad = next((outcome for outcome in outcomes if outcome.state == "failed"), None)
        print(f"\nerror: {state.message}", file=sys.stderr)
        if bad is not None:
            print(
                f"continue with: {again}   (finished stages are cached; that stage alone: dvc repro -s {bad.stage})",
                file=sys.stderr,
            )
        return 2 if (bad.status == 2 if bad else state.name == MISTAKE) else 1


def _configured() -> str | None:
    """The API address that the environment or the active Prefect profile sets."""
    from prefect.settings import get_current_settings

    return get_current_settings().api.url


def _let_settle(flow_run_id: Any, tasks: int) -> None:
    """Before our server goes: task runs are stored, which it does some time after they end, from events."""
    from prefect.client.orchestration import get_client
    from prefect.client.schemas.filters import FlowRunFilter

    only = FlowRunFilter.model_validate({"id": {"any_": [flow_run_id]}})
    with get_client(sync_client=True) as client:
        stored = server.wait_until_recorded(
            lambda: [run.state for run in client.read_task_runs(flow_run_filter=only)], tasks
        )
    if not stored:
        print("warning: the Prefect server did not store every task run in time", file=sys.stderr)


def _send_the_rest() -> None:
    """Send logs and events that still wait here, so that nothing comes after our last words.

    Without a server to take them they would also hold up our exit, for a minute.
    """
    from prefect.events.worker import EventsWorker
    from prefect.logging.handlers import APILogWorker

    for worker in (APILogWorker, EventsWorker):
        worker.drain_all(timeout=5, at_exit=False)


def _terminate(*_: object) -> None:
    raise _Terminated
