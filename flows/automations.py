"""What Prefect does by itself about runs: python -m flows.automations makes it so, as often as it is called.

    python -m flows.automations                                   # runs that died are told from runs that work
    python -m flows.automations --notify slack-webhook/alerts     # and a person hears of failures and failed gates
    python -m flows.automations --longest-hours 24                # and a run at work for longer is cancelled

A notification goes through a block of Prefect's, made once on its page (Blocks) or by code: Slack, Teams, mail, a
webhook of your own. A run that died is marked as crashed; `prefect flow-run retry ID`, or Retry on its page, goes on
where it stopped, in the same checkout.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

from prefect.automations import Automation, EventTrigger, Posture
from prefect.client.schemas.objects import StateType
from prefect.events.actions import CancelFlowRun, ChangeFlowRunState, SendNotification

from flows.stages import AWAY, MISTAKE, TIMED_OUT
from rankwise.types import UserError

HEARTBEAT_S = 30  # as prefect.yaml has it
# A busy machine is late with a heartbeat; one that misses six has died.
SILENCE_S = 6 * HEARTBEAT_S
RUNS = {"prefect.resource.id": "prefect.flow-run.*"}


def wanted(*, notify: Any = None, longest_hours: float | None = None, silence_s: float = SILENCE_S) -> list[Automation]:
    """The automations, by settings. notify is the id of a notification block."""
    return list(_wanted(notify, longest_hours, silence_s))


def _wanted(notify: Any, longest_hours: float | None, silence_s: float) -> Iterator[Automation]:
    yield Automation(
        name="rankwise: a run that died",
        description="Its heartbeats stopped without an end: the worker or its machine went away.",
        trigger=EventTrigger(
            match=RUNS,
            for_each={"prefect.resource.id"},
            after={"prefect.flow-run.heartbeat"},
            expect={"prefect.flow-run.*"},
            posture=Posture.Proactive,
            threshold=1,
            within=timedelta(seconds=silence_s),
        ),
        actions=[
            ChangeFlowRunState(
                state=StateType.CRASHED,
                message=f"no sign of life for {silence_s:.0f} s; retry it, and it goes on where it stopped",
            )
        ],
    )
    if longest_hours is not None:
        yield Automation(
            name="rankwise: a run that takes too long",
            description=f"At work for more than {longest_hours:g} hours: cancelled, with a checkpoint.",
            trigger=EventTrigger(
                match=RUNS,
                for_each={"prefect.resource.id"},
                after={"prefect.flow-run.Running"},
                expect={f"prefect.flow-run.{name}" for name in _ENDS},
                posture=Posture.Proactive,
                threshold=1,
                within=timedelta(hours=longest_hours),
            ),
            actions=[CancelFlowRun()],
        )
    if notify is not None:
        yield Automation(
            name="rankwise: tell of a run that failed",
            trigger=EventTrigger(
                match={**RUNS, "prefect.state-type": ["FAILED", "CRASHED"]},
                expect={"prefect.flow-run.*"},
                posture=Posture.Reactive,
                threshold=1,
            ),
            actions=[
                SendNotification(
                    block_document_id=notify,
                    subject="{{ flow.name }} {{ flow_run.state.name }}: {{ flow_run.name }}",
                    body="{{ flow_run.state.message }}\n{{ flow_run|ui_url }}",
                )
            ],
        )
        yield Automation(
            name="rankwise: tell of a policy that failed its gates",
            trigger=EventTrigger(match=RUNS, expect={"rankwise.gates.failed"}, posture=Posture.Reactive, threshold=1),
            actions=[
                SendNotification(
                    block_document_id=notify,
                    subject="a policy failed its gates: {{ event.resource.name }}",
                    body="{{ event.payload.gates|join('\n') }}\n{{ flow_run|ui_url }}",
                )
            ],
        )


# Names of states in which a run is no longer at work; our own are Failed by another name.
_ENDS = (
    *("Completed", "Failed", "Crashed", "Cancelled", "Cancelling", "Paused", "Suspended"),
    *(MISTAKE, AWAY, TIMED_OUT, "Unpublished", "Unpromoted", "Undecided"),
)


def main(words: list[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m flows.automations", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--notify", metavar="TYPE/NAME", help="a notification block, such as slack-webhook/alerts")
    parser.add_argument("--longest-hours", metavar="HOURS", type=float, help="cancel a run at work for longer")
    parser.add_argument(
        "--silence-s", metavar="SECONDS", type=float, default=SILENCE_S, help="without a heartbeat: dead (%(default)s)"
    )
    given = parser.parse_args(words)
    try:
        block = _block(given.notify) if given.notify else None
        for one in wanted(notify=block, longest_hours=given.longest_hours, silence_s=given.silence_s):
            print(f"{_settle(one)}  {one.name}")
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _settle(one: Automation) -> str:
    """Make an automation, or bring the one of its name up to date; returns which of the two."""
    try:
        there = Automation.read(name=one.name)
    except ValueError:
        one.create()
        return "made   "
    one.id = there.id
    one.update()
    return "updated"


def _block(address: str) -> Any:
    """The id of a notification block, named as Prefect names blocks: TYPE/NAME."""
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    kind, slash, name = address.partition("/")
    if not slash:
        raise UserError(f"--notify {address}: TYPE/NAME was expected, such as slack-webhook/alerts (prefect block ls)")
    with get_client(sync_client=True) as client:
        try:
            return client.read_block_document_by_name(name, kind).id
        except ObjectNotFound:
            raise UserError(f"--notify {address}: Prefect has no such block (prefect block ls lists them)") from None


if __name__ == "__main__":
    raise SystemExit(main())
