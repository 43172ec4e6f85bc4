"""Promotion as a Prefect flow: challenger against champion, a page of the facts, and a person's word where it is asked.

    python -m flows.promote                             # what the rule says; no alias moves
    python -m flows.promote --apply                     # the rule decides
    python -m flows.promote --approval --wait-hours 24  # a person decides, in Prefect's page, within a day

The comparison is `python -m tasks.promote` in a process of its own. Its facts are an artifact before the run pauses, so
whoever opens the run reads them, then presses Resume and fills in the form. Nobody's word is no word: when the time is
over, nothing has changed and the run has failed. The checkout is free for other runs while this one waits.
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from dataclasses import asdict
from typing import Annotated, Any

from prefect import flow, get_run_logger
from prefect.exceptions import FlowPauseTimeout
from prefect.flow_runs import pause_flow_run, suspend_flow_run
from prefect.input import RunInput
from prefect.runtime import flow_run
from prefect.states import Completed, Failed, State
from pydantic import Field, StringConstraints

from flows import checkout, graph, keys, process
from flows.command import Command
from flows.stages import MISTAKE, NAMES, begin, gpu_place, leave_artifact, only_run
from flows.summary import Outcome
from rankwise.types import UserError, printable
from tasks.promote import RECORD
from tasks.promotion_page import for_run, headline
from tasks.stage import read_json

ARTIFACT = "promotion"
MOST_HOURS = 24 * 366
LOOK_EVERY_S = 2  # seconds between two looks at whether somebody has decided


Words = Annotated[str, StringConstraints(strip_whitespace=True, min_length=1)]


class Decision(RunInput):
    """What a person says of a challenger; Prefect makes a form of it."""

    approve: bool = Field(description="make the challenger champion")
    by: Words = Field(description="your name; it is kept with the version")
    reason: Words = Field(description="why; it is kept with the version")


@flow(name="promote", flow_run_name="promote", persist_result=False)
def promote(approval: bool = False, apply: bool = False, wait_hours: float = 72.0, revision: str = "") -> State:
    """Compare the challenger with the champion, and move the alias if the rule or a person says so.

    Args:
        approval: a person decides, whatever the rule says
        apply: the rule decides; not together with approval
        wait_hours: how long a person may take
        revision: the branch of the run that made the challenger, runs/NAME (deployments alone)
    """
    try:
        if flow_run.parent_flow_run_id is None:  # else the run that this is a part of has begun
            begin(revision=revision)
        prepare(approval=approval, apply=apply, wait_hours=wait_hours)
        began = time.monotonic()
        with only_run():
            record = _run_task("--apply" if apply else "")
        _leave(record)
        if approval and record["challenger"]:
            record = _ask(record, wait_hours)
    except UserError as error:
        return Failed(name=MISTAKE, message=str(error))
    except _TaskFailed as failure:
        return Failed(name=NAMES.get(failure.status, "Failed"), message=str(failure))
    except FlowPauseTimeout:
        # Prefect's server puts "The flow was NAME and never resumed." in place of any message.
        return Failed(name="Undecided", message=f"nobody decided within {wait_hours:g} hours; no alias was moved")
    checkout.finish()
    said = headline(record)
    outcome = Outcome(stage="promote", state="ran", note=said, seconds=time.monotonic() - began)
    return Completed(message=said, data=[asdict(outcome)])


def prepare(approval: bool, apply: bool, wait_hours: float) -> list[graph.Node]:
    """Check what was asked for; no stage of DVC's is run."""
    if approval and apply:
        raise UserError("approval and apply were both asked for: either a person decides or the rule does")
    if not 0 < wait_hours <= MOST_HOURS:
        raise UserError(f"wait_hours {wait_hours:g}: a person needs some time, more than 0 hours and at most a year")
    return []


def _ask(record: dict[str, Any], wait_hours: float) -> dict[str, Any]:
    """Pause until a person decides, then do it; raises FlowPauseTimeout."""
    get_run_logger().info("waiting for a decision: Resume in the page of this run (%s)", headline(record))
    asked = Decision.with_initial_data(
        description=f"**{headline(record)}.** {record['why']}\n\nThe facts are in this run's artifact `{ARTIFACT}`.\n\n"
        "**Approve** on makes the challenger champion, off turns it down.",
        approve=record["verdict"] == "promote",
    )
    limit = {"wait_for_input": asked, "timeout": int(3600 * wait_hours)}
    if checkout.current() is None:
        said = pause_flow_run(**limit, poll_interval=LOOK_EVERY_S)
    else:
        # The process ends and its worker is free; Resume starts the run again, in its checkout, with its answers kept.
        said = suspend_flow_run(**limit)
    pair = ",".join(record[role]["version"] if record[role] else "-" for role in ("champion", "challenger"))
    verb = "--approve" if said.approve else "--reject"
    with only_run():  # with =, since a name or "-,1" may look like an option
        record = _run_task(f"{verb}={said.by}", f"--reason={said.reason}", f"--versions={pair}")
    _leave(record)
    return record


class _TaskFailed(Exception):
    """tasks.promote ended badly: its exit status, its last words."""

    def __init__(self, status: int, words: str):
        super().__init__(words)
        self.status = status


def _run_task(*words: str) -> dict[str, Any]:
    """`python -m tasks.promote` to its end; returns its record."""
    logger, last = get_run_logger(), [""]

    def show(line: str) -> None:
        if line.strip():
            last[0] = printable(line)
            logger.info("%s", last[0])

    command = [sys.executable, "-m", "tasks.promote", *filter(None, words)]
    with gpu_place(checkout.current() is not None):
        status = process.run(command, show, env={**os.environ, **keys.from_secrets(os.environ)})
    if status:
        raise _TaskFailed(status, last[0].removeprefix("error: "))
    return read_json(RECORD)


def _leave(record: dict[str, Any]) -> None:
    leave_artifact(ARTIFACT, for_run(record), headline(record))


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--approval", action="store_true", help="pause for a person, who decides in Prefect's page")
    parser.add_argument("--apply", action="store_true", help="let the rule decide")
    parser.add_argument(
        "--wait-hours", type=float, default=72.0, metavar="N", help="how long a person may take (%(default)g)"
    )


def _show(outcomes: list[Outcome], *, prefect: str) -> None:
    """The end of the command: what was decided, and where it is to be seen."""
    for outcome in outcomes:
        print(f"\n{outcome.note}")
    print(f"  facts    {RECORD}\n  MLflow   make mlflow\n  Prefect  {prefect}")


if __name__ == "__main__":
    command = Command(
        module="flows.promote", doc=__doc__, flow=promote, prepare=prepare, arguments=_arguments, show=_show
    )
    # A question is asked anew each time: there is no stage that could be up to date.
    raise SystemExit(command.main([*sys.argv[1:], "--record"]))
