"""A sweep as a Prefect flow: methods and their knobs over one SFT model, one set of rollouts, one reference pass.

    python -m flows.frontier                                   # recipes/sweeps/frontier.yaml: reward against KL
    python -m flows.frontier recipes/sweeps/mine.yaml          # another question
    python -m flows.frontier --jobs 2                          # two points at a time

The stages are those of sweeps/dvc.yaml, and what they need of dvc.yaml; DVC decides what is stale, so a stopped sweep
continues where it was and one more point costs one point. A point that fails stops what follows from it and nothing
else. Ends with a line a setting; the whole table is sweeps/NAME/frontier/frontier.md, the figures lie beside it.
"""

from __future__ import annotations

import argparse
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from contextvars import copy_context
from dataclasses import asdict
from pathlib import Path

from prefect import flow
from prefect.states import Completed, Failed, State

from flows import graph, keys, process, summary
from flows.align import common_arguments, put_in_place, run_in_order
from flows.checkout import finish
from flows.command import Command
from flows.exchange import give_away
from flows.stages import MISTAKE, NAMES, StageFailed, begin, going, leave_artifact, only_run, run_stage
from flows.summary import Outcome
from rankwise.types import UserError
from tasks import sweep as sweeps
from tasks.frontier import in_short, settings
from tasks.params import read_yaml
from tasks.tracking import Tracker, pipeline_run

FILE = "sweeps/dvc.yaml"
NOT_RUN = "a stage before it failed"
LOOK_EVERY_S = 0.5  # seconds between two looks at points that are under way; ctrl-C is heard in between


@flow(name="frontier", flow_run_name="{sweep}", persist_result=False)
def frontier(
    sweep: str = str(sweeps.DEFAULT),
    jobs: int = 1,
    recipe: str = "params.yaml",
    data: tuple[str, ...] = (),
    stage_hours: float = 0,
    revision: str = "",
) -> State:
    """Every point of a sweep that is not up to date, and the figure.

    Args:
        sweep: a file of recipes/sweeps
        jobs: points that run at the same time
        recipe: params.yaml as it is, or a file of recipes/
        data: files or folders of the worker's machine that the recipe reads
        stage_hours: stop a stage that takes longer; it leaves a checkpoint, from which a new run goes on; 0: no limit
        revision: a branch, tag or commit (deployments alone); empty: the tip of the branch that it was deployed from
    """
    try:
        begin(stage_hours=stage_hours, revision=revision)
        with only_run():
            nodes = prepare(sweep=sweep, jobs=jobs, recipe=recipe, data=data)
            going.get().environment = keys.from_secrets(os.environ)
            with pipeline_run(f"sweep {Path(sweep).stem}", {"sweep": sweep}) as tracker:
                outcomes = _run(nodes, jobs)
                _tell(tracker)
    except UserError as error:
        return Failed(name=MISTAKE, message=str(error))
    except StageFailed as failure:
        unpublished = give_away(f"sweep {Path(sweep).stem}: {failure}")
        name, said = NAMES.get(failure.stage.status, "Failed"), "; ".join(filter(None, [str(failure), unpublished]))
        return Failed(name=name, message=said, data=[asdict(outcome) for outcome in failure.outcomes])
    leave_artifact("frontier", _table() or summary.stages_markdown(outcomes), summary.counts(outcomes))
    left = [asdict(outcome) for outcome in outcomes]
    unpublished = give_away(f"sweep {Path(sweep).stem}: {summary.counts(outcomes)}")
    failed = [outcome.stage for outcome in outcomes if outcome.state == "failed"]
    if failed:
        return Failed(message=f"{len(failed)} of {len(outcomes)} stages failed: {', '.join(failed[:5])}", data=left)
    if unpublished:
        return Failed(name="Unpublished", message=f"every stage is done, but {unpublished}", data=left)
    finish()
    return Completed(message=summary.counts(outcomes), data=left)


def prepare(sweep: str, jobs: int, recipe: str, data: Sequence[str]) -> list[graph.Node]:
    """Write sweeps/params.yaml for the sweep file, and plan its stages; doing it twice is the same as once."""
    if jobs < 1:
        raise UserError(f"--jobs {jobs}: at least 1 was expected")
    put_in_place(recipe, [], data)
    sweeps.apply(Path(sweep))
    return graph.plan(file=FILE)


def _run(nodes: list[graph.Node], jobs: int) -> list[Outcome]:
    """The pipeline's own stages one after another, then the sweep's, several at a time."""
    own = [node for node in nodes if not graph.of_another_file(node.name)]
    outcomes = run_in_order(own, [])
    if jobs > 1 and "OMP_NUM_THREADS" not in os.environ:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        going.get().environment["OMP_NUM_THREADS"] = str(max(1, cores // jobs))
    points = [node for node in nodes if graph.of_another_file(node.name)]
    return outcomes + _run_at_once(points, jobs)


def _run_at_once(nodes: list[graph.Node], jobs: int) -> list[Outcome]:
    """Each stage as soon as those before it are done and a place is free; in the end every one has an outcome."""
    names, waiting, running = {node.name for node in nodes}, list(nodes), {}
    states: dict[str, State] = {}
    with _threads(jobs) as start:
        while waiting or running:
            for node in [node for node in waiting if names.intersection(node.upstream) <= states.keys()]:
                if any(states[name].is_failed() or states[name].is_cancelled() for name in _before(node, states)):
                    states[node.name] = Failed(message=NOT_RUN)
                    _forget(node)
                elif len(running) < jobs:
                    running[start(node, states)] = node
                else:
                    continue
                waiting.remove(node)
            done, _ = wait(running, timeout=LOOK_EVERY_S, return_when=FIRST_COMPLETED)
            for future in done:
                node = running.pop(future)
                states[node.name] = future.result()
                if states[node.name].is_failed():
                    _forget(node)
    return [_outcome(node, states[node.name]) for node in nodes]


def _forget(node: graph.Node) -> None:
    """Remove an evaluation that is of an earlier policy than the one that has just failed: it would be drawn."""
    _, _, stage = node.name.rpartition(":")
    if stage.startswith("evaluate@"):
        shutil.rmtree(_report().parent / "evaluations" / stage.partition("@")[2], ignore_errors=True)


def _before(node: graph.Node, states: Mapping[str, State]) -> list[str]:
    # The figure is drawn of those points that there are.
    return [] if ":frontier@" in node.name else [name for name in node.upstream if name in states]


def _outcome(node: graph.Node, state: State) -> Outcome:
    name = node.name
    if name in going.get().outcomes:
        return going.get().outcomes[name]
    ran = "not run" if state.message == NOT_RUN else "failed"
    return Outcome(stage=name, state=ran, note=state.message or state.name, status=1)


@contextmanager
def _threads(jobs: int) -> Iterator:
    """Start stages in threads; when this is left by an error or by ctrl-C, all of them are stopped and waited for."""
    pool = ThreadPoolExecutor(max_workers=jobs)

    def start(node: graph.Node, states: Mapping[str, State]) -> Future:
        short = node.name.rpartition(":")[2]
        one = run_stage.with_options(name=short, task_run_name=short)
        before = [states[name] for name in _before(node, states)]
        work = {"accelerated": node.accelerated, "wait_for": before, "return_state": True}
        return pool.submit(copy_context().run, one, node.name, **work)

    try:
        yield start
    except BaseException:
        process.stopping.set()
        raise
    finally:
        pool.shutdown(wait=True, cancel_futures=True)


def _report() -> Path:
    return Path("sweeps") / read_yaml(sweeps.FILE)["sweep"] / "frontier"


def _table() -> str:
    path = _report() / "frontier.md"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _tell(tracker: Tracker) -> None:
    """The table on the head of the sweep's page in MLflow, the figures among its files."""
    if table := _table():
        tracker.note(table)
    for path in sorted(_report().rglob("*.*")):
        tracker.file(path)


def _show(outcomes: list[Outcome], *, prefect: str) -> None:
    """The end of the command: each setting in a line, what did not run, where the figures are."""
    from rich.console import Console

    console = Console(highlight=False, soft_wrap=True)
    sweep, report = read_yaml(sweeps.FILE), _report()
    every, _ = settings(sweep, report.parent / "evaluations")
    if every:
        reward = read_yaml(Path("params.yaml"))["frontier"]["reward"]
        console.print(f"\nsweep {sweep['sweep']}", style="bold")
        console.print(in_short(sweep, every, reward), markup=False)
    for outcome in outcomes:
        if outcome.state in ("failed", "not run"):
            console.print(f"  {outcome.stage}: {outcome.state}, {outcome.note}", markup=False)
    seconds = sum(outcome.seconds for outcome in outcomes)
    console.print(f"  {summary.counts(outcomes)}; {seconds / 60:.1f} minutes of stages", markup=False)
    figures = ", ".join(map(str, sorted(report.rglob("*.png"))))
    table = report / "frontier.md" if every else ""
    for name, place in {"table": table, "figures": figures, "Prefect": prefect, "MLflow": "make mlflow"}.items():
        if place:
            console.print(f"  {name:<8} {place}", markup=False)


def _arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("sweep", nargs="?", default=str(sweeps.DEFAULT), metavar="FILE", help="a sweep (%(default)s)")
    common_arguments(parser)
    parser.add_argument(
        "--jobs", type=int, default=1, metavar="N", help="points that run at the same time (%(default)s)"
    )


if __name__ == "__main__":
    command = Command(
        module="flows.frontier", doc=__doc__, flow=frontier, prepare=prepare, arguments=_arguments, show=_show
    )
    raise SystemExit(command.main())
