"""Does a judge on a server bear load: many verdicts, faults, kill -9 twice, a budget that ends in the middle.

    python -m benchmarks.judge_load
    python -m benchmarks.judge_load --verdicts 10000 --concurrency 64 --latency 0.5 --faults 0.1

The server is that of the tests (tests/fault_server.py) on loopback. A tenth of its replies fail, in equal shares: 429
with Retry-After, 500, a connection reset, half a body, no JSON, no choices, a reply too late, and verdicts that quote
others, stop in the middle, or are none. Four processes ask, one after another, on one store: two are killed with
kill -9 at a fifth and at two fifths, the third runs into its budget at about three fifths, the fourth ends the work.
A fifth finds nothing left to ask.

Throughput is that of the fourth, from its first request to its last reply. The places for requests under way allow so
much: the time that the server took for all that it was asked (the latency; of a late reply, the time until it was given
up), over the number of places. That over the time it took is the share that was used. Exit status 1 where a figure
misses its limit.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import count, place
from benchmarks.judge_client import ACCOUNT, judge_of, rows
from benchmarks.report import Figure
from rankwise.budget import Budget
from rankwise.judging import first_questions, key_of
from rankwise.rubrics import data_block
from rankwise.store import Store
from rankwise.types import UserError
from rankwise.verdicts import read_verdicts

SERVER = Path(__file__).parent.parent / "tests" / "fault_server.py"
FAULTS = ("busy", "error", "reset", "cut", "not_json", "no_choices", "slow")  # of the request
BAD_VERDICTS = ("quoting", "partial", "malformed")
KILLS, SPENT = (0.2, 0.4), 0.6  # shares of the verdicts
TIMEOUT, LEAST_TIMEOUT_S = 4.0, 2.0  # latencies until a reply is too late; seconds, at least, for a busy machine
LATE = 2.0  # times that, when a late one comes
POLL_S = 0.05


def main(arguments: list[str]) -> None:
    options = _options(arguments)
    with tempfile.TemporaryDirectory() as folder, _serve(options) as server:
        figures = measure(options, Path(folder), server)
    record = {
        "benchmark": "judge_load",
        "options": cli.told(options),
        "machine": _machine(),
        "figures": {name: {**vars(one), "met": one.met} for name, one in figures.items()},
        "results": [],
    }
    lines = [one.line(name) for name, one in figures.items()]
    report.emit(record, "a judge under load", ("figure", "found", "limit", "met"), lines, options.json)
    if missed := [name for name, one in figures.items() if not one.met]:
        print(f"missed: {', '.join(missed)}", file=sys.stderr)
        sys.exit(1)


def measure(options: argparse.Namespace, folder: Path, server: _Server) -> dict[str, Figure]:
    """The whole course; figures by name."""
    again = 0
    for share in KILLS:
        kept = _killed(options, folder, server, int(share * options.verdicts))
        again += kept.asked_again(server.seen())
    report.say("a budget that ends at about three fifths")
    spent = _account(folder)
    share = (SPENT - KILLS[-1]) * options.verdicts / _stored(folder)
    limit = spent.tokens + int(share * (spent.prompt + spent.completion))
    kept = _Kept(options, folder, server)
    third = _ask(options, folder, server, limit=limit)
    again += kept.asked_again(at_the_limit := server.seen())
    if "BUDGET_TOKENS" not in third["said"]:
        raise AssertionError(f"the budget did not end the asking: {third['said'] or 'all was answered'}")
    left = limit - _account(folder).tokens
    kept = _Kept(options, folder, server)
    report.say(f"the rest: {options.verdicts - len(kept.texts)} of {options.verdicts}")
    last = _ask(options, folder, server, profile=options.profile)
    again += kept.asked_again(seen := server.seen())
    idle = _ask(options, folder, server)
    found = read_verdicts(folder / "verdicts.parquet")
    names = Counter((one.row_id, one.shown) for verdicts in found.values() for one in verdicts if one.values)
    new, spent = options.verdicts - len(kept.texts), last["spent"]
    faults = sum(seen["given"].values())
    late = seen["given"].get("slow", 0) - at_the_limit["given"].get("slow", 0)
    served_s = spent["requests"] * options.latency + late * (_timeout_s(options) - options.latency)
    rate, share = new / last["seconds"], served_s / options.concurrency / last["seconds"]
    told = sum(seen["whole"].values()) - sum(at_the_limit["whole"].values())
    grown = _growth(last["memory"])
    # Too short, and on a machine that may have other work, where replies in time may be read too late: speed and memory
    # are shown alone.
    quick = options.quick
    return {
        "verdicts there once": Figure(value=sum(n == 1 for n in names.values()), limit=options.verdicts),
        "kills": Figure(value=len(KILLS), limit=2),
        "kept verdicts asked again": Figure(value=again, limit=0),
        "asked by a run with nothing to do": Figure(value=len(server.seen()["asked"]) - len(seen["asked"]), limit=0),
        "requests": Figure(value=len(seen["asked"])),
        "under way at once": Figure(value=seen["most_at_once"], limit=options.concurrency, sign="≤"),
        "faults of requests": Figure(value=round(100 * faults / len(seen["asked"]), 2), unit=" %"),
        "tokens of the server at the budget's end": Figure(
            value=sum(at_the_limit["used"].values()), limit=limit, sign="≤"
        ),
        "tokens that were left of the budget": Figure(value=left, limit=_most(options), sign="≤"),
        "tokens told to the last run": Figure(
            value=spent["prompt"] + spent["completion"], limit=told, sign="≤" if quick else "="
        ),
        "tokens charged in all": Figure(value=_account(folder).tokens, limit=sum(seen["used"].values()), sign="≥"),
        "verdicts a second": Figure(value=round(rate, 1)),
        "of places / latency, faults not allowed for": Figure(
            value=round(100 * rate * options.latency / options.concurrency, 1), unit=" %"
        ),
        "of what the server's time allowed": Figure(
            value=round(100 * share, 1), limit=None if quick else 80, sign="≥", unit=" %"
        ),
        "memory grown while asking": Figure(
            value=round(grown / 2**20, 1), limit=None if quick else 16, sign="≤", unit=" MiB"
        ),
        "memory at most, all verdicts read": Figure(value=round(idle["peak"] / 2**20, 1), unit=" MiB"),
        "CPU of the client a request": Figure(value=round(1e3 * last["cpu_s"] / spent["requests"], 2), unit=" ms"),
    }


class _Kept:
    """The questions with a valid reply in the store, and what the server had been asked by then."""

    def __init__(self, options: argparse.Namespace, folder: Path, server: _Server):
        self.before = len(server.seen()["asked"])
        judge = judge_of(folder, server.url, options.concurrency, 1.0, None)
        questions = [q for row in rows(options.verdicts) for q in first_questions(row, judge, pairs_up_to=4)]
        with Store(folder / "verdicts.sqlite") as store:
            found = store.get_many(key_of(judge.identity, q) for q in questions)
        keys = ((q, key_of(judge.identity, q)) for q in questions)
        self.texts = {data_block(q) for q, key in keys if key in found and judge.read(q, found[key]).values}

    def asked_again(self, seen: dict[str, Any]) -> int:
        return sum(text in self.texts for text in seen["asked"][self.before :])


def _killed(options: argparse.Namespace, folder: Path, server: _Server, at: int) -> _Kept:
    """Ask until so many replies are kept, and kill -9."""
    report.say(f"kill -9 at {at} of {options.verdicts}")
    process = _start(options, folder, server)
    try:
        while _stored(folder) < at:
            if process.poll() is not None:
                raise AssertionError(f"the client ended by itself before the kill, with status {process.returncode}")
            time.sleep(POLL_S)
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    time.sleep(2 * options.latency)  # until the server has read what was sent
    return _Kept(options, folder, server)


def _ask(options: argparse.Namespace, folder: Path, server: _Server, **more: Any) -> dict[str, Any]:
    process = _start(options, folder, server, **more)
    out, _ = process.communicate()
    if process.returncode:
        raise AssertionError(f"the client failed with status {process.returncode}")
    return json.loads(out.splitlines()[-1])


def _start(
    options: argparse.Namespace, folder: Path, server: _Server, *, limit: int | None = None, profile: str | None = None
) -> subprocess.Popen:
    spec = {
        "folder": str(folder),
        "url": server.url,
        "verdicts": options.verdicts,
        "concurrency": options.concurrency,
        "timeout_s": _timeout_s(options),
        "limit": limit,
        "profile": profile,
    }
    words = [sys.executable, "-m", "benchmarks.judge_client", json.dumps(spec)]
    return subprocess.Popen(words, stdout=subprocess.PIPE, text=True)


def _timeout_s(options: argparse.Namespace) -> float:
    return max(TIMEOUT * options.latency, LEAST_TIMEOUT_S)


def _stored(folder: Path) -> int:
    path = folder / "verdicts.sqlite"
    if not path.exists():
        return 0
    with Store(path) as store:
        return len(store)


def _account(folder: Path):
    return Budget(folder / "spending.sqlite", account=ACCOUNT).spent()


def _growth(memory: list[tuple[int, int]]) -> int:
    """Bytes by which the client was larger at any time after the first fifth of its asking than it was then."""
    return max(size for _, size in memory) - memory[len(memory) // 5][1] if memory else 0


def _most(options: argparse.Namespace) -> int:
    """Tokens that the largest request is charged with, at least."""
    row = rows(options.verdicts)[-1]
    texts = [row.prompt[0].content, *(answer.text for answer in row.answers)]
    return sum(map(len, texts)) + 3000


# The server


class _Server:
    """The fault server in a process of its own."""

    def __init__(self, process: subprocess.Popen):
        self._process = process
        self.url = process.stdout.readline().strip()

    def seen(self) -> dict[str, Any]:
        """What it was asked (the data blocks, in order), what it counted, which faults it gave."""
        print(file=self._process.stdin, flush=True)
        return json.loads(self._process.stdout.readline())


@contextlib.contextmanager
def _serve(options: argparse.Namespace) -> Iterator[_Server]:
    if not SERVER.is_file():
        raise UserError(f"{SERVER} is missing; run this in a checkout, where the tests are")
    share = options.faults / (len(FAULTS) + len(BAD_VERDICTS))
    dials = {
        "dialect": "chat",
        "latency_s": options.latency,
        "slow_s": LATE * _timeout_s(options),
        "retry_after_s": options.latency,
        "seed": options.seed,
        "faults": dict.fromkeys(FAULTS, share),
        "judge": {**dict.fromkeys(BAD_VERDICTS, share), "position_bias": 0.5, "noise": 1.0, "ties": 0.1},
    }
    words = [sys.executable, str(SERVER), json.dumps(dials)]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        try:
            yield _Server(process)
        finally:
            process.kill()


def _options(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.judge_load",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--verdicts", type=count, help="how many, each pair counting twice (10000; 400 with --quick)")
    parser.add_argument("--concurrency", type=count, help="requests under way at once (64; 16 with --quick)")
    parser.add_argument("--latency", type=float, help="seconds of every reply (0.5; 0.05 with --quick)")
    parser.add_argument("--faults", type=float, default=0.1, help="share of the replies that fail (0.1)")
    parser.add_argument("--seed", type=int, default=0, help="of the faults (0)")
    parser.add_argument("--profile", metavar="FILE", help="cProfile's statistics of the fourth process")
    parser.add_argument("--quick", action="store_true", help="small; speed and memory are shown and have no limits")
    parser.add_argument("--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON")
    options = parser.parse_args(arguments)
    defaults = {"verdicts": (10_000, 400), "concurrency": (64, 16), "latency": (0.5, 0.05)}
    for name, (full, quick) in defaults.items():
        if getattr(options, name) is None:
            setattr(options, name, quick if options.quick else full)
    if not 0 <= options.faults < 1 or options.latency <= 0:
        raise UserError("--faults is a share from 0 to below 1, and --latency is above 0")
    return options


def _machine() -> dict[str, Any]:
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in ("openai", "httpx2")}}
    return {"device": "cpu", "cores": os.cpu_count(), "threads": 1, "versions": versions}


if __name__ == "__main__":
    cli.command(main)
