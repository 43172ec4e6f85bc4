"""The pipeline as a Prefect flow: each stage of dvc.yaml is a task that runs `dvc repro --single-item STAGE`.

    python -m flows.align                        # every stage that is not up to date, ends with a table
    python -m flows.align --target dpo           # up to a stage
    python -m flows.align --recipe recipes/hh.yaml --data /path/to/hh
    python -m flows.align --set dpo.beta=0.3     # with another value in params.yaml
    python -m flows.align --force evaluate       # run a stage again although nothing changed

DVC decides what is stale, so this and a bare `dvc repro` leave the same dvc.lock; Prefect shows, logs, retries
and cancels. Stages run one after another: they share one machine's memory and accelerator. As a deployment
(prefect.yaml) it works in a checkout of its own and publishes what it made. Exit status: 0 done, 2 a mistake of the
user's, 130 or 143 stopped by ctrl-C or SIGTERM, 1 anything else.
"""

from __future__ import annotations

import argparse
import contextlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any, Literal

from prefect import flow, get_run_logger
from prefect.states import Completed, Failed, State
from pydantic import Field

from flows import graph, keys, summary
from flows.checkout import current, finish
from flows.command import Command
from flows.exchange import give_away
from flows.git import git
from flows.promote import promote
from flows.stages import MISTAKE, NAMES, StageFailed, begin, going, leave_artifact, only_run, run_stage
from flows.summary import Outcome
from rankwise.types import UserError
from tasks import recipe as recipes
from tasks.params import read_yaml
from tasks.register import failed_gates
from tasks.rounds import check

PARAMS = Path("params.yaml")
# What a deployment's form offers; a command line also takes a round's stage (dpo@2).
Target = Annotated[str, Field(json_schema_extra={"enum": ["all", *recipes.STAGES]})]
Promotion = Literal["no", "rule", "person"]


def _run_name() -> str:
    from prefect.runtime import flow_run

    given = flow_run.parameters
    commit = git("rev-parse", "--short", "HEAD", check=False).stdout.strip() or "no commit"
    unchanged = git("diff", "--quiet", "HEAD", "--", "params.yaml", check=False).returncode == 0
    recipe = Path(given["recipe"]).stem
    name = recipe if recipe != PARAMS.stem else "default" if unchanged else "changed params"
    changed = f" with {', '.join(given['overrides'])}" if given["overrides"] else ""
    target = f" up to {given['target']}" if given["target"] != "all" else ""
    return f"{name}{changed}{target} @ {commit}"


@flow(name="align", flow_run_name=_run_name, persist_result=False)
def align(
    target: Target = "all",
    recipe: str = "params.yaml",
    overrides: tuple[str, ...] = (),
    data: tuple[str, ...] = (),
    force: tuple[str, ...] = (),
    promotion: Promotion = "no",
    stage_hours: float = 0,
    revision: str = "",
) -> State:
    """From prompts to an evaluated, registered model: every stage of dvc.yaml that is not up to date.

    Args:
        target: run up to this stage only
        recipe: params.yaml as it is, or a file of recipes/ such as recipes/spin.yaml
        overrides: values that stand over the recipe's, such as dpo.beta=0.3
        data: files or folders of the worker's machine that the recipe reads
        force: stages to run although nothing changed
        promotion: who decides whether the new policy becomes champion: no one, the rule, or a person in Prefect's page
        stage_hours: stop a stage that takes longer; it leaves a checkpoint, from which a new run goes on; 0: no limit
        revision: a branch, tag or commit (deployments alone); empty: the tip of the branch that it was deployed from
    """
    given = {"target": target, "recipe": recipe, "overrides": overrides, "data": data, "force": force}
    try:
        begin(stage_hours=stage_hours, revision=revision)
        if promotion != "no" and target != "all":
            raise UserError(f"promotion by {promotion} wants a registered policy; target {target} ends before it")
        with only_run():
            nodes = prepare(**given)
            going.get().environment = keys.from_secrets(os.environ)
            with _tracked(given, nodes):
                outcomes = run_in_order(nodes, force)
    except UserError as error:
        return Failed(name=MISTAKE, message=str(error))
    except StageFailed as failure:
        _leave_summary(failure.outcomes)
        unpublished = give_away(_title(failure.outcomes))
        name, said = NAMES.get(failure.stage.status, "Failed"), "; ".join(filter(None, [str(failure), unpublished]))
        return Failed(name=name, message=said, data=[asdict(outcome) for outcome in failure.outcomes])
    _leave_summary(outcomes)
    _tell_of_gates(outcomes)
    left = [asdict(outcome) for outcome in outcomes]
    if failed := give_away(_title(outcomes)):
        return Failed(name="Unpublished", message=f"every stage is done, but {failed}", data=left)
    if promotion != "no" and (failed := _promotion(promotion, outcomes)):
        return Failed(name="Unpromoted", message=f"every stage is done, but {failed}", data=left)
    finish()
    return Completed(message=summary.counts(outcomes), data=left)


def _promotion(by: str, outcomes: list[Outcome]) -> str:
    """Hold a policy that is new against the champion; returns what failed, "" where nothing did.

    In a run of a checkout's own it becomes a run of its own, since a person may take days and nothing waits for it.
    """
    logger = get_run_logger()
    if not any(outcome.stage == "register" and outcome.state == "ran" for outcome in outcomes):
        logger.info("promotion: not asked for, the policy was registered before")
        return ""
    asked = {"approval": by == "person", "apply": by == "rule"}
    if (own := current()) is None:
        told = promote(**asked, return_state=True)
        return "" if told.is_completed() else f"promotion failed: {told.message}"
    from prefect.deployments import run_deployment

    try:
        ordered = run_deployment("promote/promote", parameters={**asked, "revision": own.branch}, timeout=0)
    except Exception as error:  # not deployed, or the server is away
        return f"promotion could not be asked for: {error}"
    logger.info("promotion: run %s", ordered.name)
    return ""


def prepare(
    target: str, recipe: str, overrides: Sequence[str], data: Sequence[str], force: Sequence[str]
) -> list[graph.Node]:
    """Put a recipe in place, if one is named, and plan the stages; doing it twice is the same as once."""
    put_in_place(recipe, overrides, data)
    nodes = graph.plan(None if target == "all" else target)
    graph.check_known(force, nodes)
    return nodes


def put_in_place(recipe: str, overrides: Sequence[str], data: Sequence[str]) -> None:
    """params.yaml as it was asked for, and the data that it reads."""
    if data:
        recipes.link_sources([Path(path) for path in data])
    if Path(recipe) != PARAMS or overrides:
        recipes.apply(Path(recipe), overrides=overrides)
    if PARAMS.exists():
        check(read_yaml(PARAMS), str(PARAMS))


def run_in_order(nodes: list[graph.Node], force: Sequence[str]) -> list[Outcome]:
    """Run stages one after another; raises StageFailed at the first that fails."""
    states: dict[str, State] = {}
    outcomes: list[Outcome] = []
    for node in nodes:
        upstream = [states[name] for name in node.upstream if name in states]
        one = run_stage.with_options(name=node.name)
        forced = graph.matches(force, node.name)
        state = one(node.name, forced, node.accelerated, wait_for=upstream, return_state=True)
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
    _name_by_result(_title(outcomes))


def _title(outcomes: list[Outcome]) -> str:
    return f"{_run_name()}: {summary.in_short(outcomes)}"


def _name_by_result(title: str) -> None:
    """Add the result to the run's name, which is what a list of runs and the head of a run's page show."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    try:
        with get_client(sync_client=True) as client:
            client.update_flow_run(flow_run.id, name=title)
    except Exception as error:  # a name is not worth a run
        get_run_logger().warning("the run keeps its first name: %s", error)


def _tell_of_gates(outcomes: list[Outcome]) -> None:
    """An event for automations, where the policy that was just registered failed a gate."""
    if not any(outcome.stage == "register" and outcome.state == "ran" for outcome in outcomes):
        return
    from prefect.events import emit_event
    from prefect.runtime import flow_run

    if failed := failed_gates():
        emit_event(
            "rankwise.gates.failed",
            resource={"prefect.resource.id": f"prefect.flow-run.{flow_run.id}", "prefect.resource.name": flow_run.name},
            payload={"gates": failed},
        )


@contextlib.contextmanager
def _tracked(given: dict[str, Any], nodes: list[graph.Node]) -> Iterator[None]:
    """A parent run in MLflow for the stages that will run; none when nothing will."""
    if not given["force"] and graph.stale([node.name for node in nodes]) == {}:
        yield
        return
    from prefect.runtime import flow_run

    from tasks.tracking import pipeline_run

    params = {name: value for name, value in given.items() if value and value != "all"}
    with pipeline_run(str(flow_run.name), params, {"prefect.flow_run_id": str(flow_run.id)}) as tracker:
        going.get().tracker = tracker
        yield


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--target", metavar="STAGE", default="all", help="run up to this stage (default: all stages)")
    parser.add_argument(
        "--set",
        dest="overrides",
        metavar="KEY=VALUE",
        action="append",
        default=[],
        help="a value that stands over those of params.yaml or the recipe: --set dpo.beta=0.3",
    )
    parser.add_argument(
        "--force", metavar="STAGE", action="append", default=[], help="run this stage although nothing changed"
    )
    parser.add_argument(
        "--promotion",
        choices=["no", "rule", "person"],
        default="no",
        help="who decides on the new policy (%(default)s)",
    )
    common_arguments(parser)


def common_arguments(parser: argparse.ArgumentParser) -> None:
    """Those of every flow over the pipeline."""
    parser.add_argument(
        "--recipe", metavar="FILE", default=str(PARAMS), help="a params file to use instead of the present params.yaml"
    )
    parser.add_argument("--data", metavar="PATH", nargs="+", default=[], help="files or folders that the recipe reads")
    parser.add_argument(
        "--stage-hours", metavar="HOURS", type=float, default=0, help="stop a stage that takes longer (0: no limit)"
    )


if __name__ == "__main__":
    command = Command(
        module="flows.align", doc=__doc__, flow=align, prepare=prepare, arguments=_arguments, show=summary.show
    )
    raise SystemExit(command.main())
