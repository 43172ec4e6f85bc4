"""Servers that go away in the middle of a run and come back: MLflow's, Prefect's, a judge's (benchmarks.faults)."""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.ground import Broken, Command, Ground, end, free_port, served
from benchmarks.scratch import ROOT
from benchmarks.undisturbed import tree

SERVER = ROOT / "tests" / "fault_server.py"
AT_ONCE = 8  # requests under way
DENSE_STEPS = 500  # of two points each; behind them the tracker keeps every second step (tasks.tracking.FULL_POINTS)
JUDGE = {
    "kind": "server",
    "model": "tiny",
    "rubric": "recipes/rubrics/sentiment.md",
    "reply": "json",
    "pairs_up_to": 4,
}


def mlflow(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "tracking server killed in training", lambda: _tracker(ground, options)


def _tracker(ground: Ground, options: argparse.Namespace) -> str:
    copy, port = ground.before("sft"), free_port()
    home = copy.root.parent / f"{copy.root.name}-mlflow"
    home.mkdir()
    words = ("mlflow", "server", "--host", "127.0.0.1", "--port", str(port), "--workers", "1")
    words += ("--backend-store-uri", f"sqlite:///{home}/mlflow.db", "--artifacts-destination", str(home / "artifacts"))
    url = f"http://127.0.0.1:{port}"
    copy.environment |= {"MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false", "MLFLOW_TRACKING_URI": url}
    # An epoch is a step here, with two points: enough to outlast the outage.
    longer = ("--set", "sft.epochs=900", "--set", "sft.batch_size=1000")
    copy.run("python", "-m", "tasks.recipe", "tiny.json", *longer)
    server = served(copy, words, port)
    try:
        run = Command(copy, ("dvc", "repro", "sft"))
        run.until("sft", "step", 3)
        deadline = time.monotonic() + 60.0
        while not _in_mlflow(home / "mlflow.db", "sft") and time.monotonic() < deadline:
            time.sleep(0.1)  # MLflow's client takes seconds to import: the run is to have begun there
        end(server)
        began = time.monotonic()
        time.sleep(options.outage)
        server = served(copy, words, port)
        took, training = time.monotonic() - began, run.child.poll() is None
        run.end(0)
        every, mine = _in_the_files(copy.root / "reports/sft"), _in_mlflow(home / "mlflow.db", "sft")
        right = {point for point in every if point[1] <= DENSE_STEPS or point[1] % 2 == 0}
        missing = len(right - mine)
        if missing:
            copy.run("python", "-m", "tasks.tracking", "backfill")
            mine = _in_mlflow(home / "mlflow.db", "sft")
    finally:
        end(server)
    if lost := sorted(right - mine):
        raise Broken(f"{len(lost)} of {len(right)} points are not in MLflow: {lost[:3]}")
    when = "while it trained" if training else "after it had trained"
    how = f"{missing} of them by backfill" if missing else "with no help"
    return f"away {took:.0f} s, back {when}; all {len(right)} points that a run keeps are there, {how}"


def _in_the_files(folder: Path) -> set[tuple[str, int, float]]:
    """What a stage's report has: (name, step, value)."""
    with open(folder / "plots/curves.csv", encoding="utf-8", newline="") as handle:
        rows = list(csv.DictReader(handle))
    points = {
        (name, int(row["step"]), float(row[name])) for row in rows for name in row if name != "step" and row[name]
    }
    results = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    return points | {(name, 0, float(value)) for name, value in results.items() if isinstance(value, (int, float))}


def _in_mlflow(store: Path, stage: str) -> set[tuple[str, int, float]]:
    """What the runs of a stage have in MLflow: (name, step, value)."""
    query = "SELECT metrics.key, step, value FROM metrics JOIN runs USING (run_uuid) WHERE runs.name = ?"
    with contextlib.closing(sqlite3.connect(store)) as database:
        return set(database.execute(query, [stage]))


def prefect(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    yield "server killed in training", lambda: _orchestrator(ground, options)


def _orchestrator(ground: Ground, options: argparse.Namespace) -> str:
    copy, port = ground.before("sft"), free_port()
    words = ("python", "-m", "flows.server", "--port", str(port))
    server = served(copy, words, port)
    try:
        flow = ("python", "-m", "flows.align", "--target", "sft")
        run = Command(copy, flow, PREFECT_API_URL=f"http://127.0.0.1:{port}/api")
        run.until("sft", "step", 3)
        end(server)
        time.sleep(options.outage)
        server = served(copy, words, port)
        run.end(0, 1)
        status = run.child.returncode
        if status:
            Command(copy, run.words).end(0)
        ground.same(copy, "models/sft", "reports/sft")
    finally:
        end(server)
    return (
        "the run went on to its end" if not status else f"the run ended: {run.error()}; the same command continued it"
    )


def judge(ground: Ground, options: argparse.Namespace) -> Iterator[tuple[str, Callable[[], str]]]:
    for driver in ("dvc repro", "the flow"):
        yield f"endpoint away under {driver}", lambda driver=driver: _away(ground, options, driver)


def _away(ground: Ground, options: argparse.Namespace, driver: str) -> str:
    right, copy = ground.before("verdicts@1"), ground.before("verdicts@1")
    for one in (right, copy):
        one.run("python", "-m", "tasks.recipe", "tiny.json", "--set", f"verdicts.judge={json.dumps(JUDGE)}")
    port, asked, tries = free_port(), Counter(), 1
    more = {"RANKWISE_JUDGE_URL": f"http://127.0.0.1:{port}/v1", "RANKWISE_JUDGE_CONCURRENCY": str(AT_ONCE)}
    words = ("python", "-m", "flows.align", "--target") if driver == "the flow" else ("dvc", "repro")
    with _judge_server(port, asked):
        Command(right, ("dvc", "repro", "verdicts@1"), **more).end(0)
    once = sum(asked.values())
    asked.clear()
    with _judge_server(port, asked, latency_s=0.2):
        run = Command(copy, (*words, "verdicts@1"), **more)
        run.until("verdicts@1", "verdict", once // 3)
    time.sleep(options.outage)
    with _judge_server(port, asked):
        run.end(0, 1, 255)
        while run.child.returncode:
            if "exited with 75" not in run.said and "Away" not in run.said:
                raise Broken(f"it did not say that the trouble may pass: {run.said[-600:]}")
            tries += 1
            run = Command(copy, run.words, **more)
            run.end(0, 1, 255)
    name = "data/verdicts.parquet"
    if tree(copy.root)[name] != tree(right.root)[name]:
        raise Broken(f"{name} differs from that of an endpoint that was never away")
    twice = sum(n - 1 for n in asked.values())
    if twice > AT_ONCE:
        raise Broken(f"{twice} verdicts asked twice, and {AT_ONCE} were under way")
    away = f"away {options.outage} s; {tries} command(s)"
    return f"{away}; {once} verdicts, {twice} of them asked twice (under way when it went)"


@contextlib.contextmanager
def _judge_server(port: int, asked: Counter[str], **dials: Any) -> Iterator[None]:
    """The tests' judge at a port; what it was asked is added up when it goes, at once and for good."""
    told = json.dumps({"port": port, "judge": {}, **dials})
    with subprocess.Popen(
        [sys.executable, str(SERVER), told], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        try:
            process.stdout.readline()  # its address
            yield
        finally:
            process.stdin.write("\n")
            process.stdin.flush()
            asked.update(json.loads(process.stdout.readline())["asked"])
            process.kill()
