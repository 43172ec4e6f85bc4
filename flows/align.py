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

import argparse
import contextlib
import os
import subprocess
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State

from flows import graph, keys, summary
from flows.command import Command
from flows.stages import MISTAKE, NAMES, Going, StageFailed, going, leave_artifact, only_run, run_stage
from flows.summary import Outcome
from rankwise.types import UserError
from tasks.params import read_yaml
from tasks.rounds import check


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
    going.set(Going())
    given = {"target": target, "recipe": recipe, "data": data, "force": force}
    try:
        with only_run():
            nodes = prepare(**given)
            going.get().environment = keys.from_secrets(os.environ)
            with _tracked(given, nodes):
                outcomes = run_in_order(nodes, force or [])
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


def run_in_order(nodes: list[graph.Node], force: list[str]) -> list[Outcome]:
    """Run stages one after another; raises StageFailed at the first that fails."""
    states: dict[str, State] = {}
    outcomes: list[Outcome] = []
    for node in nodes:
        upstream = [states[name] for name in node.upstream if name in states]
        one = run_stage.with_options(name=node.name)
        state = one(node.name, graph.matches(force, node.name), wait_for=upstream, return_state=True)
        states[node.name] = state
        # Without an outcome the task itself broke: a defect here, or a server that went away.
        broke = Outcome(stage=node.name, state="failed", note=state.message or state.name, status=1)
        outcomes.append(going.get().outcomes.get(node.name, broke))
        if outcomes[-1].state == "failed":
            left = [Outcome(stage=other.name, state="not run") for other in nodes[len(outcomes) :]]
            raise StageFailed(outcomes[-1], outcomes + left)
    return outcomes


def _leave_summary(outcomes: list[Outcome]) -> None:
    whole = all(outcome.state in ("ran", "cached") for outcome in outcomes)
    result = summary.headline_markdown() if whole else ""  # after a failure it is that of an earlier run
    text = "\n\n".join(part for part in (result, summary.stages_markdown(outcomes)) if part)
    leave_artifact("summary", text, f"the run at a glance: {summary.counts(outcomes)}")
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
        going.get().tracker = tracker
        yield


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="STAGE", help="run up to this stage (default: all stages)")
    parser.add_argument("--recipe", metavar="FILE", help="a params file to use instead of the present params.yaml")
    parser.add_argument("--data", metavar="PATH", nargs="+", help="files or folders that the recipe reads")
    parser.add_argument("--force", metavar="STAGE", action="append", help="run this stage although nothing changed")


if __name__ == "__main__":
    command = Command(
        module="flows.align", doc=__doc__, flow=align, prepare=prepare, arguments=_arguments, show=summary.show
    )
    raise SystemExit(command.main())
