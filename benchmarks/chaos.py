"""Is anything lost, wrong or done twice where processes die at any moment: kill -9 over whole runs of the pipeline.

    python -m benchmarks.chaos                                # the default pipeline, 100 kills over three whole runs
    python -m benchmarks.chaos --rows tiny --kills 30         # a pipeline of a few rows
    python -m benchmarks.chaos --drivers dvc --kills 20 --seed 7
    python -m benchmarks.faults                               # full disks, servers that go away, a clock that jumps, …

An undisturbed `dvc repro` in a copy of this checkout says what is right. Then, each in a copy of its own, a whole run
by each driver: the flow (python -m flows.align), `dvc repro`, and the stages' own commands one by one. Every stage is
killed at random moments of its start-up, its work, its writing, and of what the driver does after it: all processes at
once, the driver's process group, the driver alone, the stage alone, or the tracker's process alone. The plain command
follows, with no clean-up, in half of the cases at once, while what was not hit is still leaving.

At the end every output has the bytes of the undisturbed run, and so have dvc.lock and the row stores. A verdict or an
answer that is in the store is not asked for again; of verdicts under way a kill loses 64 at most, of answers on a CPU
two batches. Where `dvc` itself was killed over dvc.lock and cannot read it, the file is deleted, and counted. Lost
seconds are those of a stage's process since it made something safe, or since its start; loading code is part of them.
Exit status 1 where anything differs.
"""

from __future__ import annotations

import argparse
import random
import statistics
import sys
from collections import Counter
from dataclasses import asdict
from typing import Any

from benchmarks import cli, ledger, report
from benchmarks.arguments import count, place
from benchmarks.disturbed import Disturbed
from benchmarks.kills import DRIVERS, Kill, plan
from benchmarks.scratch import Copy
from benchmarks.undisturbed import Reference, machine, made, statuses, stores, tree, workplace


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    with workplace(options.keep) as folder:
        tiny = options.rows == "tiny"
        copies = {driver: made(folder, driver, tiny=tiny) for driver in options.drivers}  # before anybody edits a file
        reference = Reference(folder, tiny=tiny, target=options.target)
        results = []
        for number, driver in enumerate(options.drivers):
            share, rest = divmod(options.kills, len(options.drivers))
            rng = random.Random(f"{options.seed} {driver}")
            kills = plan(reference.phases, share + (number < rest), driver, rng)
            results.append(_disturb(copies[driver], reference, driver, kills))
    record = {
        "benchmark": "chaos",
        "options": cli.told(options),
        "machine": machine(),
        "results": [],
        "undisturbed_s": reference.seconds,
        "runs": results,
    }
    show(record, results, options.json)
    if wrong := [f"{one['driver']}: {what}" for one in results for what in one["wrong"]]:
        print("\n".join(["wrong:", *wrong]), file=sys.stderr)
        sys.exit(1)


def _disturb(copy: Copy, reference: Reference, driver: str, planned: dict[str, list[Kill]]) -> dict[str, Any]:
    """One run by one driver, and all that is wrong with it."""
    kills = sum(map(len, planned.values()))
    report.say(f"{driver}: a whole run with {kills} kills")
    run = Disturbed(copy, driver, reference.commands(driver), planned, reference.units)
    told = run.run()
    asked_again = ledger.done_though_safe(run.ledger.events)
    repeated = ledger.repeated(run.ledger.events, reference.events)
    deaths = sum(kill.target != "tracker" for kill in told.kills)
    wrong = [*told.defects, *differences(reference, copy, lock=driver != "stage")]
    wrong += [f"{n} {kind} asked for again though the store held them" for kind, n in asked_again.items() if n]
    for kind, bound in ledger.BOUND.items():
        if repeated[kind] > deaths * bound:
            wrong.append(f"{repeated[kind]} {kind} asked for twice, more than {bound} a kill")
    # Whose process is gone is ended by the next run; where the last stage's tracker was killed, there is none.
    last = reference.phases[-1].stage
    left = sum(kill.target == "tracker" and kill.hit_stage == last for kill in told.kills)
    if (running := (ended := statuses(copy.root)).get("RUNNING", 0)) > left:
        wrong.append(f"{running} runs in MLflow still say RUNNING")
    report.say(f"{driver}: {len(told.kills)} kills, {'; '.join(wrong) or 'the same bytes'}")
    return {
        "driver": driver,
        "kills": [asdict(kill) for kill in told.kills],
        "planned": kills,
        "attempts": told.attempts,
        "told_to_wait": told.waits,
        "locks_cut": told.locks_cut,
        "seconds": round(told.seconds, 1),
        "repeated": dict(repeated),
        "asked_again": sum(asked_again.values()),
        "runs_in_mlflow": ended,
        "wrong": wrong,
    }


def differences(reference: Reference, copy: Copy, *, lock: bool) -> list[str]:
    """What differs from the undisturbed run, one line each."""
    wrong, mine = [], tree(copy.root)
    for path in sorted({*reference.tree, *mine}):
        if reference.tree.get(path) != mine.get(path):
            how = "is missing" if path not in mine else "is too much" if path not in reference.tree else "differs"
            wrong.append(f"{path} {how}")
    if lock and (copy.root / "dvc.lock").read_bytes() != reference.lock:
        wrong.append("dvc.lock differs")
    for name, rows in stores(copy.root).items():
        if rows != reference.stores.get(name):
            wrong.append(
                f"the row store {name} differs: {len(rows)} rows, {len(reference.stores.get(name, ()))} expected"
            )
    return wrong


def show(record: dict[str, Any], results: list[dict[str, Any]], to: str | None) -> None:
    """Two tables: by stage, and by driver."""
    every = [Kill(**kill) for one in results for kill in one["kills"]]
    stages = dict.fromkeys(kill.hit_stage for kill in every)
    names = ("start-up", "whole", "work", "writing", "between")
    lines = []
    for stage in stages:
        own = [kill for kill in every if kill.hit_stage == stage]
        by = Counter(kill.hit_phase for kill in own)
        lines.append([stage, str(len(own)), *(str(by[name] or "") for name in names), *_lost(own)])
    columns = ("kill -9 in", "kills", *names, "median s lost", "most")
    report.table(
        "kills by stage and phase (whole: a stage whose work has no units; between: the driver's)", columns, lines, to
    )
    lines = []
    for one in results:
        own = [Kill(**kill) for kill in one["kills"]]
        by = Counter(kill.target for kill in own)
        repeated = one["repeated"]
        lines.append(
            [
                one["driver"],
                f"{len(own)} of {one['planned']}",
                " ".join(f"{name} {by[name]}" for name in by),
                *_lost(own),
                f"{max((kill.orphans_s for kill in own), default=0):.1f}",
                *(str(repeated.get(kind, 0)) for kind in ("step", "answers", "verdict", "reference")),
                str(one["asked_again"]),
                str(one["locks_cut"]),
                "no" if one["wrong"] else "yes",
            ]
        )
    columns = (
        "driver",
        "kills",
        "of what",
        "median s lost",
        "most",
        "s until all gone",
        "steps",
        "answers",
        "verdicts",
    )
    columns += ("reference rows", "stored, asked again", "dvc.lock cut by dvc", "same bytes")
    report.emit(record, "by driver; units computed twice", columns, lines, to)


def _lost(kills: list[Kill]) -> list[str]:
    lost = [kill.lost_s for kill in kills if kill.target != "tracker"]
    return [f"{statistics.median(lost):.1f}", f"{max(lost):.1f}"] if lost else ["", ""]


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.chaos", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kills", type=count, default=100, metavar="N", help="of all drivers together (100)")
    parser.add_argument("--drivers", nargs="+", choices=DRIVERS, default=list(DRIVERS), help="(all)")
    parser.add_argument("--rows", choices=("tiny", "default"), default="default", help="a few rows, or params.yaml's")
    parser.add_argument("--target", metavar="STAGE", default="", help="run up to this stage only (all stages)")
    parser.add_argument("--seed", type=int, default=0, help="of moments and victims (0)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the copies, their logs and ledgers in this folder")
    parser.add_argument("--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.command(main)
