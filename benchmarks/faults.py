"""What a run does when something around it fails, on a pipeline of a few rows: one scenario a row of the table.

    python -m benchmarks.faults
    python -m benchmarks.faults --only sigterm judge --outage 180
    python -m benchmarks.chaos                       # kill -9 at random moments

sigterm     each driver is told to stop while a model trains: a checkpoint, status 143, and on from there
disk        the disk is full under models, under row stores and checkpoints, under DVC's cache, and then it is not
read-only   the same folders cannot be written, and then they can
clock       the clock of the day jumps back and forth by hours during a whole run: time.time, in every Python process
mlflow      the tracking server is killed while a model trains, and comes back
prefect     the Prefect server is killed while a model trains, and comes back
judge       the judge's endpoint is away in the middle of its verdicts, and comes back

A scenario holds where trouble is told in a line without a traceback, nobody has to clean up, the plain command goes on
when the trouble is over, and the outputs have the bytes of an undisturbed run. What cannot be tried here (mounting
without the right to) is told as skipped. Exit status 1 where one does not hold.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import signal
import sys
import textwrap
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

from benchmarks import cli, outages, report
from benchmarks.arguments import count, place
from benchmarks.ground import Broken, Command, Ground, Skipped, mount, mounted
from benchmarks.scratch import Copy
from benchmarks.undisturbed import MADE, machine, workplace

FOLDERS = {"models": "sft", ".rankwise": "rollouts@1", ".dvc/cache": "sft"}  # and a stage that writes into it
SHOWN = 110  # characters of what was seen
JUMP_S = 2.0  # seconds from one jump of the clock to the next
ROOM, SPARE = 1 << 26, 48 << 10  # bytes of a disk that fills up, and that are free: it begins, and then it is full


@dataclass(kw_only=True)
class Outcome:
    scenario: str
    case: str
    outcome: str  # holds | FAILS | skipped
    seen: str
    seconds: float = 0.0


# The scenarios: each yields cases, (name, what does it)


def sigterm(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    drivers = {
        "the stage": ground.command("sft"),
        "dvc repro": ("dvc", "repro", "sft"),
        "the flow": ("python", "-m", "flows.align", "--target", "sft"),
    }
    for name, words in drivers.items():

        def case(words=words, name=name) -> str:
            copy = ground.before("sft")
            first = Command(copy, words)
            first.until("sft", "step", 3)
            began = time.monotonic()
            first.child.send_signal(signal.SIGTERM)
            first.end(*((-signal.SIGTERM, 143) if name == "dvc repro" else (143,)))
            took = time.monotonic() - began
            said = Command(copy, words)
            if "continuing from step" not in said.end(0):
                raise Broken("it began anew")
            ground.same(copy, "models/sft", "reports/sft")
            return f"gone after {took:.1f} s, continued from its checkpoint"

        yield name, case


def disk(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    for folder, stage in FOLDERS.items():
        yield f"{folder} full", lambda folder=folder, stage=stage: _full(ground, folder, stage)


def _full(ground: Ground, folder: str, stage: str) -> str:
    copy = ground.before(stage)
    target = copy.root / folder
    target.mkdir(parents=True, exist_ok=True)
    aside = target.with_name(f"{target.name}.aside")
    shutil.copytree(target, aside, symlinks=True)
    with mounted("-t", "tmpfs", "-o", f"size={ROOM}", "tmpfs", target):
        shutil.copytree(aside, target, symlinks=True, dirs_exist_ok=True)
        shutil.rmtree(aside)
        ballast = target / ".ballast"
        with contextlib.suppress(OSError), open(ballast, "wb", buffering=0) as handle:
            while handle.write(bytes(4096)):
                pass
        os.truncate(ballast, ballast.stat().st_size - SPARE)
        said = _told_of(copy, stage, words=ground.command(stage) if folder == ".rankwise" else ("dvc", "repro", stage))
        ballast.unlink()
        _goes_on(ground, copy, stage)
    return said


def read_only(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    for folder, stage in FOLDERS.items():
        yield f"{folder} read-only", lambda folder=folder, stage=stage: _fixed(ground, folder, stage)


def _fixed(ground: Ground, folder: str, stage: str) -> str:
    copy = ground.before(stage)
    target = copy.root / folder
    target.mkdir(parents=True, exist_ok=True)
    with mounted("--bind", target, target):
        mount("-o", "remount,ro,bind", target)
        said = _told_of(copy, stage, words=ground.command(stage) if folder == ".rankwise" else ("dvc", "repro", stage))
    _goes_on(ground, copy, stage)
    return said


def _told_of(copy: Copy, stage: str, *, words: tuple[str, ...]) -> str:
    """The stage fails, and says why in a line."""
    run = Command(copy, words)
    run.end(1, 2, 255)
    return run.error()


def _goes_on(ground: Ground, copy: Copy, stage: str) -> None:
    Command(copy, ("dvc", "repro", stage)).end(0)
    outs = [path for path in MADE if path != "data"] if stage == "sft" else ["data/rollouts"]
    ground.same(copy, *(f"{name}/{stage}" if "/" not in name else name for name in outs))


def clock(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "by hours, back and forth", lambda: _jumps(ground)


def _jumps(ground: Ground) -> str:
    copy = ground.before("prompts")
    began = time.monotonic()
    Command(copy, ("dvc", "repro"), CHAOS_CLOCK=str(JUMP_S)).end(0)
    took = time.monotonic() - began
    ground.same(copy)
    said = Command(copy, ("dvc", "repro"), CHAOS_CLOCK=str(JUMP_S)).end(0)
    if "Running stage" in said:
        raise Broken("what was up to date ran again")
    return f"{took / JUMP_S:.0f} jumps in a run, and nothing to do after it"


SCENARIOS = {
    "sigterm": sigterm,
    "disk": disk,
    "read-only": read_only,
    "clock": clock,
    "mlflow": outages.mlflow,
    "prefect": outages.prefect,
    "judge": outages.judge,
}


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    outcomes = []
    with workplace(options.keep) as folder:
        ground = Ground(folder)
        for name in options.only:
            for case, work in SCENARIOS[name](ground, options):
                report.say(f"{name}: {case}")
                outcomes.append(_tried(name, case, work))
                report.say(f"  {outcomes[-1].outcome}: {outcomes[-1].seen}")
    record = {
        "benchmark": "faults",
        "options": cli.told(options),
        "machine": machine(),
        "results": [],
        "scenarios": [asdict(one) for one in outcomes],
    }
    short = lambda text: textwrap.shorten(text, SHOWN, placeholder=" …")  # whole above, and in the record
    lines = [[one.scenario, one.case, one.outcome, f"{one.seconds:.0f}", short(one.seen)] for one in outcomes]
    report.emit(record, "what fails around a run", ("scenario", "case", "outcome", "s", "seen"), lines, options.json)
    if any(one.outcome == "FAILS" for one in outcomes):
        sys.exit(1)


def _tried(name: str, case: str, work: Callable[[], str]) -> Outcome:
    began = time.monotonic()
    try:
        outcome, seen = "holds", work()
    except Skipped as why:
        outcome, seen = "skipped", str(why)
    except (Broken, AssertionError) as why:
        outcome, seen = "FAILS", str(why)
    return Outcome(scenario=name, case=case, outcome=outcome, seen=seen, seconds=round(time.monotonic() - began, 1))


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.faults", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS), help="(all)")
    parser.add_argument("--outage", type=count, default=20, metavar="S", help="seconds that a server is away (20)")
    parser.add_argument("--keep", metavar="FOLDER", help="keep the copies and their logs in this folder")
    parser.add_argument("--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    cli.command(main)
