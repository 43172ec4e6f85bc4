"""A stage of dvc.yaml as a Prefect task: `dvc repro --single-item STAGE` in a process of its own.

DVC decides what is stale; Prefect shows, logs, retries and cancels. What stages of a run leave for each other and for
its end is in `going`.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from prefect import get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Cancelled, Completed, Failed, State

from flows import graph, process, summary
from flows.summary import Outcome
from rankwise.types import UserError
from tasks.tracking import home

# Stages that ask services outside this machine, through code of the user's too: these are tried again whatever broke,
# and any other one that says itself that its trouble may pass; after so many seconds each time.
RETRIED = frozenset({"rollouts", "verdicts"})
RETRY_AFTER_S = [float(seconds) for seconds in os.environ.get("RANKWISE_RETRY_AFTER_S", "10 60").split()]
# Names of Failed states, by a stage's exit status
MISTAKE = "Mistake"  # trying again cannot mend it
AWAY = "Away"  # a server is away, busy, or died: trying again may do
NAMES = {2: MISTAKE, os.EX_TEMPFAIL: AWAY}


@dataclass
class Going:
    """What stages of the run in this process leave for each other and for its end."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    tracker: Any = None  # the pipeline's MLflow run, while there is one
    # for the environment of stages alone: keys of servers, threads
    environment: dict[str, str] = field(default_factory=dict, repr=False)


going: ContextVar[Going] = ContextVar("going")


class StageFailed(Exception):
    """A stage failed: carries how every stage of the run ended."""

    def __init__(self, stage: Outcome, outcomes: list[Outcome]):
        super().__init__(f"stage {stage.stage} failed: {stage.note}")
        self.stage, self.outcomes = stage, outcomes


def worth_a_retry(one: Any, task_run: Any, state: State) -> bool:
    passes = state.name == AWAY or (graph.matches(RETRIED, one.name) and state.name != MISTAKE)
    return passes and task_run.run_count <= len(RETRY_AFTER_S) and not process.stopping.is_set()


# One more retry than the condition ever allows: at the true last attempt Prefect would log a traceback, even of
# a state that is returned.
@task(
    task_run_name="{stage}",
    retries=len(RETRY_AFTER_S) + 1,
    retry_delay_seconds=RETRY_AFTER_S,
    retry_condition_fn=worth_a_retry,
    persist_result=False,
    cache_policy=NO_CACHE,
)
def run_stage(stage: str, force: bool = False) -> State:
    """Run one stage through DVC, in a process of its own; the state says whether it ran or was cached."""
    logger, reading, began = get_run_logger(), graph.Reading(stage), time.monotonic()

    def show(line: str) -> None:
        if (text := reading.take(line)) is not None:
            logger.info("%s", text)

    forced = ["--force"] if force else []
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", "repro", "--single-item", *forced, stage]
    # `python` and `accelerate` in dvc.yaml are those of this environment, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    try:
        status = process.run(command, show, env={**os.environ, **going.get().environment, "PATH": path})
    except process.Stopped:
        return Cancelled(message="stopped with the run")
    outcome = reading.outcome(status, time.monotonic() - began)
    going.get().outcomes[stage] = outcome
    if outcome.state == "failed":
        return Failed(name=NAMES.get(outcome.status, "Failed"), message=outcome.note)
    _leave_metrics(stage, outcome)
    if outcome.state == "cached":
        return Completed(name="Cached", message=outcome.note)
    return Completed(message=f"ran in {outcome.seconds:.1f} s")


def _leave_metrics(stage: str, outcome: Outcome) -> None:
    if graph.of_another_file(stage):  # points of a sweep are read side by side, not one by one
        return
    tracker = going.get().tracker
    run = tracker.run_of(stage, ran=outcome.state == "ran") if tracker else None
    if (table := summary.metrics_markdown(stage, run["url"] if run else None)) is not None:
        said = f"metrics of {stage} ({outcome.state}{', ' + outcome.note if outcome.note else ''})"
        leave_artifact(stage, table, said)


def leave_artifact(name: str, markdown: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    key = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    try:
        create_markdown_artifact(key=key, markdown=markdown, description=description)
    except Exception as error:  # the files are the record; a page that could not be written stops nothing
        get_run_logger().warning("no artifact %s: %s", key, error)


@contextlib.contextmanager
def only_run() -> Iterator[None]:
    """One checkout serves one run at a time; the kernel frees the lock however its holder dies."""
    path = home() / "locks" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run of this checkout is going on; wait for it or stop it") from None
        process.stopping.clear()  # what was said to an earlier run of this process
        yield
