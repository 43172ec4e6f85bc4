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

from flows import checkout, graph, process, summary
from flows.exchange import begin_with
from flows.summary import Outcome
from rankwise.types import UserError, printable

# Stages that ask services outside this machine, through code of the user's too: these are tried again whatever broke,
# and any other one that says itself that its trouble may pass; after so many seconds each time.
RETRIED = frozenset({"rollouts", "verdicts"})
RETRY_AFTER_S = [float(seconds) for seconds in os.environ.get("RANKWISE_RETRY_AFTER_S", "10 60").split()]
# Names of Failed states, by a stage's exit status
MISTAKE = "Mistake"  # trying again cannot mend it
AWAY = "Away"  # a server is away, busy, or died: trying again may do
TIMED_OUT = "TimedOut"  # it took longer than a stage may; it left a checkpoint, and a new run goes on from there
# Prefect's concurrency limit for stages that use a GPU: as many places as there are GPUs for runs to share.
GPU_LIMIT = os.environ.get("RANKWISE_GPU_LIMIT", "rankwise-gpu")
GPU_LOOK_S = 10  # seconds between two looks at whether the run was stopped while it waits for a place
TOOK_TOO_LONG = 124  # the status that `timeout` has for it
NAMES = {2: MISTAKE, os.EX_TEMPFAIL: AWAY, TOOK_TOO_LONG: TIMED_OUT}


@dataclass
class Going:
    """What stages of the run in this process leave for each other and for its end."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    tracker: Any = None  # the pipeline's MLflow run, while there is one
    # for the environment of stages alone: keys of servers, threads
    environment: dict[str, str] = field(default_factory=dict, repr=False)
    limit_s: float | None = None  # the longest that a stage may take
    pull: bool = False  # whether stages take from DVC's remote what is not here
    slots: bool = False  # whether other runs want this machine's GPUs too


going: ContextVar[Going] = ContextVar("going")


def begin(*, revision: str, stage_hours: float = 0) -> None:
    """Set out on a run; raises UserError where its arguments do not fit the place that it runs in."""
    checkout.refuse_none()
    own = checkout.current()
    if revision and own is None:
        raise UserError(f"revision {revision!r}: this folder is no checkout of a run's own; use git to change it")
    if stage_hours < 0:
        raise UserError(f"stage_hours {stage_hours:g}: hours were expected, or 0 for no limit")
    run = Going(limit_s=stage_hours * 3600 or None, slots=own is not None)
    going.set(run)
    if own is not None:
        os.environ["RANKWISE_BRANCH"] = own.branch  # where dvc.lock of this run will be: register notes it
        get_run_logger().info("a checkout of %s @ %s of %s", own.revision, own.commit[:10], own.repository)
        if own.note:
            get_run_logger().warning("%s", own.note)
        run.pull = begin_with()


class StageFailed(Exception):
    """A stage failed: carries how every stage of the run ended."""

    def __init__(self, stage: Outcome, outcomes: list[Outcome]):
        super().__init__(f"stage {stage.stage} failed: {stage.note}")
        self.stage, self.outcomes = stage, outcomes


def worth_a_retry(one: Any, task_run: Any, state: State) -> bool:
    passes = state.name == AWAY or (graph.matches(RETRIED, one.name) and state.name not in (MISTAKE, TIMED_OUT))
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
def run_stage(stage: str, force: bool = False, accelerated: bool = False) -> State:
    """Run one stage through DVC, in a process of its own; the state says whether it ran or was cached.

    accelerated: it uses a GPU where there is one, so it waits until one is free of other runs.
    """
    logger, reading, began = get_run_logger(), graph.Reading(stage), time.monotonic()

    def show(line: str) -> None:
        if (text := reading.take(printable(line))) is not None:
            logger.info("%s", text)

    run = going.get()
    options = ["--force"] * force + ["--pull"] * run.pull
    command = [sys.executable, "-m", "flows.guarded_dvc", "--wait-for-lock", "repro", "--single-item", *options, stage]
    # `python` and `accelerate` in dvc.yaml are those of this environment, activated or not.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    environment = {**os.environ, **run.environment, "PATH": path}
    try:
        with gpu_place(accelerated and run.slots):
            status = process.run(command, show, env=environment, limit_s=run.limit_s)
    except process.Stopped:
        return Cancelled(message="stopped with the run")
    except process.TookTooLong:
        return _timed_out(stage, run)
    outcome = reading.outcome(status, time.monotonic() - began)
    run.outcomes[stage] = outcome
    if outcome.state == "failed":
        return Failed(name=NAMES.get(outcome.status, "Failed"), message=outcome.note)
    _leave_metrics(stage, outcome)
    if outcome.state == "cached":
        return Completed(name="Cached", message=outcome.note)
    return Completed(message=f"ran in {outcome.seconds:.1f} s")


@contextlib.contextmanager
def gpu_place(wanted: bool) -> Iterator[None]:
    """A place of Prefect's concurrency limit GPU_LIMIT, where a deployment's run wants one and there is such a limit.

    Prefect takes the place back from a process that died, five minutes after its last sign of life. Raises Stopped
    where the run is stopped while it waits.
    """
    with contextlib.ExitStack() as held:
        while wanted:
            if process.stopping.is_set():
                raise process.Stopped
            from prefect.concurrency.sync import concurrency

            with contextlib.suppress(TimeoutError):
                place = concurrency(GPU_LIMIT, occupy=1, timeout_seconds=GPU_LOOK_S, strict=False)
                held.enter_context(place)
                break
        yield


def _timed_out(stage: str, run: Going) -> State:
    note = f"took longer than {run.limit_s / 3600:g} h, the most that a stage of this run may; it can be continued"
    run.outcomes[stage] = Outcome(stage=stage, state="failed", note=note, seconds=run.limit_s, status=TOOK_TOO_LONG)
    return Failed(name=TIMED_OUT, message=note)


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
    path = checkout.LOCK
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run of this checkout is going on; wait for it or stop it") from None
        process.stopping.clear()  # what was said to an earlier run of this process
        yield
