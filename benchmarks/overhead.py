"""What the frame costs: seconds that MLflow, DVC and Prefect add to a stage, and to a step of training.

    python -m benchmarks.overhead
    python -m benchmarks.overhead --stages preferences@1 dpo@1 --rounds 5 --steps 10000 --step-ms 50
    python -m benchmarks.overhead --steps 0                 # the stages alone

In a copy of this checkout, on a pipeline of a few rows, each stage runs, round after round:

    bare      python -m tasks.NAME with RANKWISE_TRACKING=off
    MLflow    the same, with a run in a SQLite store
    DVC       dvc repro --single-item --force, with that run
    Prefect   python -m flows.align, with all that, on a server that is open; of its run, the time from the start of
              this stage's task to that of the next

What a layer adds is the difference to the layer before it in the same round. A skipped stage is the same by DVC and in
the flow where nothing changed. CPU is that of a process with all that it waits for; a flow's is told for the whole run.
Then the tracker alone gets the records of so many training steps, one every so many milliseconds: what its calls take
of the stage's time, and what its worker takes of all cores. Exit status 1 where a figure misses its limit.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import sys
import time
import urllib.request
from datetime import datetime
from importlib import metadata
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import count, place
from benchmarks.contest import summary
from benchmarks.report import Figure
from benchmarks.scratch import ROOT, Copy, open_server, scratch_copy
from rankwise.types import UserError

STAGES = ("preferences@1", "dpo@1")  # one that reads a table, one that trains and records curves
LAYERS = ("bare", "MLflow", "DVC", "Prefect")
LIMIT_S, LIMIT_SHARE = 5.0, 2.0  # seconds that all layers add to a stage; per cent of a training run

# A process of its own: nothing here imports tasks. The values are those of a step of stage dpo.
STEPS = """
import json, os, resource, sys, time
from tasks.tracking import stage_run
steps, step_s = int(sys.argv[1]), float(sys.argv[2])
names = ("accuracy chosen_logp_change kl_from_reference loss margin rejected_logp_change padding_fraction "
         "learning_rate grad_norm epoch tokens_seen tokens_per_second rows_per_second seconds").split()
took = 0.0
with stage_run("dpo", {"beta": 0.2}) as tracker:
    due = time.monotonic()
    for step in range(1, steps + 1):
        values = {name: (step * 37 + number) / 7919 for number, name in enumerate(names)}
        began = time.perf_counter()
        tracker.metrics(values, step=step)
        took += time.perf_counter() - began
        due += step_s
        time.sleep(max(0.0, due - time.monotonic()))
worker = resource.getrusage(resource.RUSAGE_CHILDREN)
print(json.dumps({"own_s": took, "worker_s": worker.ru_utime + worker.ru_stime}))
"""


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    with scratch_copy() as copy:
        report.say("the pipeline once, so that every stage has what it reads")
        copy.run("dvc", "repro")
        found: list[dict[str, Any]] = []
        with open_server(copy) as server:
            for number in range(options.rounds + 1):
                report.say(f"round {number} of {options.rounds}" if number else "a round that does not count")
                found.append(_round(copy, server, options.stages, turn=number))
        steps = _steps(copy, options) if options.steps else None
    found = found[1:]
    results = [_of_stage(stage, found) for stage in options.stages]
    figures = _figures(results, found, steps, options)
    record = {
        "benchmark": "overhead",
        "options": cli.told(options),
        "machine": _machine(),
        "results": [],
        "stages": results,
        "figures": {name: {**vars(one), "met": one.met} for name, one in figures.items()},
    }
    _show(record, results, figures, options.json)
    if missed := [name for name, one in figures.items() if not one.met]:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)


def _round(copy: Copy, server: str, stages: list[str], *, turn: int) -> dict[str, Any]:
    """Each way of running each stage once, in an order that turns; then the flow with all of them."""
    found: dict[str, Any] = {}
    for stage in stages:
        module = f"tasks.{stage.partition('@')[0]}"
        ways = {
            "bare": lambda module=module: copy.run("python", "-m", module, RANKWISE_TRACKING="off"),
            "MLflow": lambda module=module: copy.run("python", "-m", module),
            "DVC": lambda stage=stage: copy.run("dvc", "repro", "--single-item", "--force", stage),
        }
        names = list(ways)
        order = names[turn % len(names) :] + names[: turn % len(names)]
        costs = {name: ways[name]() for name in order}
        costs["skipped by DVC"] = copy.run("dvc", "repro", "--single-item", stage)
        found[stage] = costs
    forced = [word for stage in stages for word in ("--force", stage)]
    began = time.time()
    whole = copy.run("python", "-m", "flows.align", "--record", *forced)
    tasks = _tasks(server, since=began)
    for stage in stages:
        found[stage]["Prefect"] = tasks[stage]
    others = [seconds for stage, seconds in tasks.items() if stage not in stages]
    found["flow"] = {"whole": whole, "skipped": others, "rest": whole.wall_s - sum(tasks.values())}
    return found


def _tasks(server: str, *, since: float) -> dict[str, float]:
    """Seconds of each stage of the last flow run, from the start of its task to that of the next; of the last one, to
    its end."""
    asked = {"sort": "EXPECTED_START_TIME_ASC", "limit": 200}
    body = json.dumps(asked).encode()
    request = urllib.request.Request(f"{server}/task_runs/filter", body, {"Content-Type": "application/json"})
    deadline = time.monotonic() + 30
    while True:  # the server stores task runs some time after they end
        with urllib.request.urlopen(request, timeout=30) as reply:
            runs = [run for run in json.load(reply) if run["start_time"] and _seconds(run["start_time"]) >= since]
        if runs and all(run["end_time"] for run in runs) and len(runs) == len({run["name"] for run in runs}) > 1:
            break
        if time.monotonic() > deadline:
            raise AssertionError("the Prefect server does not tell the task runs of the flow")
        time.sleep(0.5)
    runs.sort(key=lambda run: _seconds(run["start_time"]))
    ends = [run["start_time"] for run in runs[1:]] + [runs[-1]["end_time"]]
    return {run["name"]: _seconds(end) - _seconds(run["start_time"]) for run, end in zip(runs, ends)}


def _seconds(text: str) -> float:
    return datetime.fromisoformat(text.replace("Z", "+00:00")).timestamp()


def _steps(copy: Copy, options: argparse.Namespace) -> dict[str, float]:
    report.say(f"{options.steps} steps of {options.step_ms} ms: {options.steps * options.step_ms / 60_000:.1f} minutes")
    told = copy.output("python", "-c", STEPS, str(options.steps), str(options.step_ms / 1000))
    return json.loads(told.splitlines()[-1])


# What was found


def _of_stage(stage: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians and quartiles over the rounds: the stage bare, what each layer adds, what all add, what a skip costs."""
    walls = [{name: getattr(cost, "wall_s", cost) for name, cost in one[stage].items()} for one in found]
    cpus = [{name: cost.cpu_s for name, cost in one[stage].items() if name != "Prefect"} for one in found]
    added = {
        f"{kind} {upper}": summary([one[upper] - one[lower] for one in costs])
        for kind, costs in (("wall", walls), ("cpu", cpus))
        for lower, upper in itertools.pairwise(LAYERS)
        if kind == "wall" or upper != "Prefect"
    }
    return {
        "stage": stage,
        "wall bare": summary([one["bare"] for one in walls]),
        "cpu bare": summary([one["bare"] for one in cpus]),
        **added,
        "wall all": summary([one["Prefect"] - one["bare"] for one in walls]),
        "wall skipped by DVC": summary([one["skipped by DVC"] for one in walls]),
        "cpu skipped by DVC": summary([one["skipped by DVC"] for one in cpus]),
    }


def _figures(
    results: list[dict[str, Any]],
    found: list[dict[str, Any]],
    steps: dict[str, float] | None,
    options: argparse.Namespace,
) -> dict[str, Figure]:
    middle = lambda values: round(summary(values)["median"], 2)
    flows = [one["flow"] for one in found]
    figures = {
        "all layers on a stage, the dearest one's median": Figure(
            value=round(max(one["wall all"]["median"] for one in results), 2), limit=LIMIT_S, sign="≤", unit=" s"
        ),
        "a skipped stage in the flow": Figure(value=middle([s for one in flows for s in one["skipped"]]), unit=" s"),
        "a flow run beside its stages: start, plan, parent run, summary": Figure(
            value=middle([one["rest"] for one in flows]), unit=" s"
        ),
        "CPU of a whole flow run, its stages included": Figure(
            value=middle([one["whole"].cpu_s for one in flows]), unit=" s"
        ),
    }
    if steps is None:
        return figures
    run_s = options.steps * options.step_ms / 1000
    own, worker = 100 * steps["own_s"] / run_s, 100 * steps["worker_s"] / run_s / os.cpu_count()
    which = f"{options.steps:,} steps of {options.step_ms:g} ms"
    return figures | {
        f"MLflow over {which}, of the stage's time and of all cores": Figure(
            value=round(own + worker, 2), limit=None if options.quick else LIMIT_SHARE, sign="≤", unit=" %"
        ),
        "  its calls, of the stage's time": Figure(value=round(own, 3), unit=" %"),
        "  its worker's CPU, start and end included": Figure(value=round(steps["worker_s"], 2), unit=" s"),
        "  a call": Figure(value=round(1e6 * steps["own_s"] / options.steps, 1), unit=" µs"),
    }


def _show(record: dict[str, Any], results: list[dict[str, Any]], figures: dict[str, Figure], to: str | None) -> None:
    columns = ("seconds", "bare", *(f"+ {name}" for name in LAYERS[1:]), "all layers", "skipped by DVC")
    lines = []
    for one in results:
        wall = [one["wall bare"], *(one[f"wall {name}"] for name in LAYERS[1:]), one["wall all"]]
        cpu = [one["cpu bare"], *(one[f"cpu {name}"] for name in LAYERS[1:3]), None, None]
        lines.append([one["stage"], *map(report.seconds, [*wall, one["wall skipped by DVC"]])])
        lines.append(["  CPU", *map(report.seconds, [*cpu, one["cpu skipped by DVC"]])])
    report.table("what the frame adds to a stage: medians of paired differences, and quartiles", columns, lines, to)
    lines = [one.line(name) for name, one in figures.items()]
    report.emit(record, "the cost of the frame", ("figure", "found", "limit", "met"), lines, to)


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.overhead",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--stages", nargs="+", default=list(STAGES), metavar="STAGE", help=f"({' '.join(STAGES)})")
    parser.add_argument("--rounds", type=count, help="rounds that count (5; 1 with --quick)")
    parser.add_argument("--steps", type=int, help="training steps that the tracker gets (10000; 100 with --quick)")
    parser.add_argument("--step-ms", type=float, default=50.0, help="milliseconds a step (50: the default on 2 cores)")
    parser.add_argument("--quick", action="store_true", help="one round, few steps: to see that it runs")
    parser.add_argument("--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON")
    options = parser.parse_args(arguments)
    options.rounds = options.rounds or (1 if options.quick else 5)
    if options.steps is None:
        options.steps = 100 if options.quick else 10_000
    if options.steps < 0 or options.step_ms <= 0:
        raise UserError("--steps is 0 or more, and --step-ms is above 0")
    known = [path.stem for path in (ROOT / "tasks").glob("*.py")]
    for stage in options.stages:
        if stage.partition("@")[0] not in known:
            raise UserError(f"--stages {stage}: no such stage; name them as dvc.yaml does, a first round with its @1")
    return options


def _machine() -> dict[str, Any]:
    names = ("prefect", "dvc", "mlflow")
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    load = f"cpu (load {os.getloadavg()[1]:.1f} over 5 minutes)"
    return {"device": load, "cores": os.cpu_count(), "threads": 1, "versions": versions}


if __name__ == "__main__":
    cli.command(main)
