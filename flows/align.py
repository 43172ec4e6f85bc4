"""The pipeline as a Prefect flow: each stage of dvc.yaml is a task that runs `dvc repro --single-item STAGE`.

    python -m flows.align                        # every stage that is not up to date, ends with a table
    python -m flows.align --target dpo           # up to a stage
    python -m flows.align --recipe recipes/hh.yaml --data /path/to/hh
    python -m flows.align --force evaluate       # run a stage again although nothing changed

DVC decides what is stale, so this and a bare `dvc repro` leave the same dvc.lock; Prefect shows, logs, retries
and cancels. Stages run one after another: they share one machine's memory and accelerator. Exit status: 0 done,
2 a mistake of the user's, 130 or 143 stopped by ctrl-C or SIGTERM, 1 anything else.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger, task
from prefect.cache_policies import NO_CACHE
from prefect.states import Completed, Failed, State

from flows import graph, keys, process, summary
from flows.summary import Outcome
from rankwise.types import UserError
from tasks.params import read_yaml
from tasks.rounds import check
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
class _Going:
    """What stages of the run in this process leave for each other and for its end."""

    outcomes: dict[str, Outcome] = field(default_factory=dict)
    tracker: Any = None  # the pipeline's MLflow run, while there is one
    keys: dict[str, str] = field(default_factory=dict, repr=False)  # of servers, for the environment of stages alone


_going: ContextVar[_Going] = ContextVar("going")


class StageFailed(Exception):
    """A stage failed: carries how every stage of the run ended."""

    def __init__(self, stage: Outcome, outcomes: list[Outcome]):
        super().__init__(f"stage {stage.stage} failed: {stage.note}")
        self.stage, self.outcomes = stage, outcomes


def _worth_a_retry(one: Any, task_run: Any, state: State) -> bool:
    passes = state.name == AWAY or (graph.matches(RETRIED, one.name) and state.name != MISTAKE)
    return passes and task_run.run_count <= len(RETRY_AFTER_S) and not process.stopping.is_set()


# One more retry than the condition ever allows: at the true last attempt Prefect would log a traceback, even of
# a state that is returned.
@task(
    task_run_name="{stage}",
    retries=len(RETRY_AFTER_S) + 1,
    retry_delay_seconds=RETRY_AFTER_S,
    retry_condition_fn=_worth_a_retry,
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
    status = process.run(command, show, env={**os.environ, **_going.get().keys, "PATH": path})
    outcome = reading.outcome(status, time.monotonic() - began)
    _going.get().outcomes[stage] = outcome
    if outcome.state == "failed":
        return Failed(name=NAMES.get(outcome.status, "Failed"), message=outcome.note)
    _leave_metrics(stage, outcome)
    if outcome.state == "cached":
        return Completed(name="Cached", message=outcome.note)
    return Completed(message=f"ran in {outcome.seconds:.1f} s")


def _run_name() -> str:
    from prefect.runtime import flow_run

    given = flow_run.parameters
    commit = _git("rev-parse", "--short", "HEAD").stdout.strip() or "no commit"
    unchanged = _git("diff", "--quiet", "HEAD", "--", "params.yaml").returncode == 0
    name = Path(given["recipe"]).stem if given.get("recipe") else "default" if unchanged else "changed params"
    target = f" up to {given['target']}" if given.get("target") else ""
    return f"{name}{target} @ {commit}"


def _git(*words: str) -> subprocess.CompletedProcess:
    return subprocess.run(["git", *words], capture_output=True, text=True)


@flow(name="align", flow_run_name=_run_name, persist_result=False)
def align(
    target: str | None = None,
    recipe: str | None = None,
    data: list[str] | None = None,
    force: list[str] | None = None,
) -> State:
    """From prompts to an evaluated, registered model: every stage of dvc.yaml that is not up to date.

    Args:
        target: run up to this stage only
        recipe: a params file to use instead of the present params.yaml
        data: files or folders that the recipe reads
        force: stages to run although nothing changed
    """
    _going.set(_Going())
    given = {"target": target, "recipe": recipe, "data": data, "force": force}
    try:
        with _only_run():
            nodes = prepare(**given)
            _going.get().keys = keys.from_secrets(os.environ)
            with _tracked(given, nodes):
                outcomes = _run_all(nodes, force or [])
    except UserError as error:
        return Failed(name=MISTAKE, message=str(error))
    except StageFailed as failure:
        _leave_summary(failure.outcomes)
        name = NAMES.get(failure.stage.status, "Failed")
        return Failed(name=name, message=str(failure), data=[asdict(outcome) for outcome in failure.outcomes])
    _leave_summary(outcomes)
    return Completed(message=summary.counts(outcomes), data=[asdict(outcome) for outcome in outcomes])


def prepare(
    target: str | None, recipe: str | None, data: list[str] | None, force: list[str] | None
) -> list[graph.Node]:
    """Put a recipe in place, if one is named, and plan the stages; doing it twice is the same as once."""
    if recipe or data:
        try:
            from tasks.recipe import apply, link_sources
        except ImportError:
            raise UserError("--recipe and --data need tasks/recipe.py, which this checkout lacks") from None
        if data:
            link_sources([Path(path) for path in data])
        if recipe:
            apply(Path(recipe))
    if (params := Path("params.yaml")).exists():
        check(read_yaml(params), str(params))
    nodes = graph.plan(target)
    graph.check_known(force or [], nodes)
    return nodes


def _run_all(nodes: list[graph.Node], force: list[str]) -> list[Outcome]:
    """Run the stages in order; raises StageFailed at the first that fails."""
    states: dict[str, State] = {}
    outcomes: list[Outcome] = []
    for node in nodes:
        upstream = [states[name] for name in node.upstream if name in states]
        one = run_stage.with_options(name=node.name)
        state = one(node.name, graph.matches(force, node.name), wait_for=upstream, return_state=True)
        states[node.name] = state
        # Without an outcome the task itself broke: a defect here, or a server that went away.
        broke = Outcome(stage=node.name, state="failed", note=state.message or state.name, status=1)
        outcomes.append(_going.get().outcomes.get(node.name, broke))
        if outcomes[-1].state == "failed":
            left = [Outcome(stage=other.name, state="not run") for other in nodes[len(outcomes) :]]
            raise StageFailed(outcomes[-1], outcomes + left)
    return outcomes


def _leave_metrics(stage: str, outcome: Outcome) -> None:
    tracker = _going.get().tracker
    run = tracker.run_of(stage, ran=outcome.state == "ran") if tracker else None
    if (table := summary.metrics_markdown(stage, run["url"] if run else None)) is not None:
        said = f"metrics of {stage} ({outcome.state}{', ' + outcome.note if outcome.note else ''})"
        _leave_artifact(stage, table, said)


def _leave_summary(outcomes: list[Outcome]) -> None:
    whole = all(outcome.state in ("ran", "cached") for outcome in outcomes)
    result = summary.headline_markdown() if whole else ""  # after a failure it is that of an earlier run
    text = "\n\n".join(part for part in (result, summary.stages_markdown(outcomes)) if part)
    _leave_artifact("summary", text, f"the run at a glance: {summary.counts(outcomes)}")
    _name_by_result(summary.in_short(outcomes))


def _name_by_result(result: str) -> None:
    """Add the result to the run's name, which is what a list of runs and the head of a run's page show."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=f"{_run_name()}: {result}")
    except Exception as error:  # a name is not worth a run
        get_run_logger().warning("the run keeps its first name: %s", error)


def _leave_artifact(name: str, markdown: str, description: str) -> None:
    from prefect.artifacts import create_markdown_artifact

    key = "".join(letter if letter.isalnum() else "-" for letter in name.lower())
    try:
        create_markdown_artifact(key=key, markdown=markdown, description=description)
    except Exception as error:  # the files are the record; a page that could not be written stops nothing
        get_run_logger().warning("no artifact %s: %s", key, error)


@contextlib.contextmanager
def _tracked(given: dict[str, Any], nodes: list[graph.Node]) -> Iterator[None]:
    """A parent run in MLflow for the stages that will run; none when nothing will."""
    if not given["force"] and graph.stale([node.name for node in nodes]) == {}:
        yield
        return
    from prefect.runtime import flow_run

    from tasks.tracking import pipeline_run

    params = {name: value for name, value in given.items() if value}
    with pipeline_run(str(flow_run.name), params, {"prefect.flow_run_id": str(flow_run.id)}) as tracker:
        _going.get().tracker = tracker
        yield


@contextlib.contextmanager
def _only_run() -> Iterator[None]:
    """One checkout serves one run at a time; the kernel frees the lock however its holder dies."""
    path = home() / "locks" / "flow.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise UserError("another run of this checkout is going on; wait for it or stop it") from None
        yield


if __name__ == "__main__":
    from flows.command import main

    raise SystemExit(main(align, prepare, __doc__))
