"""Readers of what the project leaves for itself and the machine says: reports, notes, listings, lines, variables."""

from __future__ import annotations

import contextlib
import io
import json
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Any

from flows import checkout, graph, server, summary
from rankwise import budget, client
from rankwise.types import UserError
from tasks import doctor, frontier, history, register, servable, tracking_ui, weights
from tasks.stage import read_json

from . import octets, trees
from .law import Files, holds, reader

_BOTH = {"policy": {"mean": 0.5, "low": 0.4, "high": 0.6}, "reference": {"mean": 0.1, "low": 0.0, "high": 0.2}}
METRICS = {
    "win_rate": {"judge": {"mean": 0.7, "low": 0.6, "high": 0.8}, "gold": {"mean": 0.7, "low": 0.6, "high": 0.8}},
    "kl": {"mean": 1.5, "low": 1.0, "high": 2.0, "per_token": 0.1},
    "length": {"policy": 30.5, "reference": 29.5},
    "distinct_2": {"policy": 0.5, "reference": 0.6},
    "gold_reward": _BOTH,
    "preference_accuracy": 0.8,
}
CONFIG = {"model_type": "llama", "vocab_size": 270, "max_position_embeddings": 64, "text_config": {}}
GATES = {"gates": [{"metric": "kl.mean", "rule": "at_most", "bound": 2, "value": 1.5, "passed": False}]}


@contextlib.contextmanager
def _within(folder: Path) -> Iterator[None]:
    """In a folder, as commands of the project are in its root."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def _json(random: Random, whole: Any) -> bytes:
    value = trees.changed(random, whole) if random.random() < 0.9 else whole
    data = trees.octets(trees.as_json(random, value))
    return octets.spoilt(random, data, data) if random.random() < 0.3 else data


def _report(random: Random) -> Files:
    rounds = {"0": {"kl": {"mean": 0.0}, "length": 3.0}, "1": METRICS}
    return {"metrics.json": _json(random, random.choice((METRICS, {**METRICS, "rounds": rounds})))}


def _read_report(folder: Path) -> None:
    """Each of a report's readers, one after another; all may tell what is wrong with it, none may fail."""
    path = folder / "metrics.json"
    told: list[UserError] = []
    for read in (_read_history, _read_settings):
        try:
            read(path)
        except UserError as error:
            told.append(error)
    (folder / "reports/evaluate").mkdir(parents=True)
    (folder / "reports/evaluate/metrics.json").write_bytes(path.read_bytes())
    with _within(folder):
        "".join([summary.headline_markdown(), summary.metrics_markdown("evaluate") or ""]).encode("utf-8", "replace")
        with contextlib.redirect_stdout(io.StringIO()):
            summary.show([summary.Outcome(stage="evaluate", state="ran")], prefect="-")
        summary.in_short([summary.Outcome(stage="evaluate", state="ran")])
    if told:
        raise told[0]
    holds(isinstance(read_json(path), dict), "a report that is none")


def _read_history(path: Path) -> None:
    known = history.rounds_so_far(METRICS, 2, path)
    holds({"2"} <= set(known), "a round is missing")


def _read_settings(path: Path) -> None:
    points = {"metrics": {"method": "dpo", "value": 0.1, "temperature": 1.0}}
    place = path.parent / "points" / "metrics"
    place.mkdir(parents=True)
    (place / "metrics.json").write_bytes(path.read_bytes())
    frontier.settings({"evaluations": points}, path.parent / "points")


def _beside(name: str, whole: Any, read: Callable[[Path], Any], **more: Any) -> None:
    reader(name=name, make=lambda random: {f"{name}.json": _json(random, whole)}, read=read, weight=1.5, **more)


def _read_gates(folder: Path) -> None:
    (folder / "gates.json").rename(folder / "registration.json")
    holds(all(isinstance(line, str) for line in register.failed_gates(folder)), "a gate that is none")


def _read_config(folder: Path) -> None:
    (folder / "model_config.json").rename(folder / "config.json")
    from types import SimpleNamespace

    class Tokenizer(SimpleNamespace):
        def __len__(self) -> int:
            return 270

    none = dict.fromkeys(("bos_token", "eos_token", "pad_token", "pad_token_id", "eos_token_id", "chat_template"))
    facts = doctor._tokenizer_facts(Tokenizer(**none), folder)
    holds(all(type(facts[name]) is int for name in ("model_vocabulary", "context")), "sizes that are no numbers")


def _read_server(folder: Path) -> None:
    before, server.HOME = server.HOME, folder
    try:
        holds(server.kept_open() is None, "a server that is not there")
    finally:
        server.HOME = before


def _read_checkout(folder: Path) -> None:
    (folder / ".git").mkdir()
    (folder / "checkout.json").rename(folder / checkout.NOTE)
    with _within(folder):
        found = checkout.current()
    holds(found is not None and all(isinstance(value, str) for value in asdict(found).values()), "no checkout")


def _read_listing(folder: Path) -> None:
    """DVC's listing of a folder; nothing is written outside of the new one."""
    before, weights._dvc = weights._dvc, lambda *_: str(folder / "cache")
    try:
        for md5 in ("aa1", "bb2.dir"):
            place = weights._object(folder / "cache/files/md5", md5)
            place.parent.mkdir(parents=True)
            place.write_bytes((folder / "listing.json").read_bytes() if md5.endswith(".dir") else b"weights")
        outside = {path for path in folder.rglob("*") if path.is_file()}
        found = weights._from_cache("bb2.dir", folder / "aside" / "deep")
    finally:
        weights._dvc = before
    made = {path for path in folder.rglob("*") if path.is_file()} - outside
    holds(all(path.is_relative_to(folder / "aside" / "deep") for path in made), "a file outside of the folder")
    holds(found in (True, False), "no word on whether it was found")


def _read_pointer(folder: Path) -> None:
    (folder / "pointer.json").rename(folder / "p")
    (folder / "model").mkdir()
    (folder / "p").rename(folder / "model/pointer.json")
    before, weights.find = weights.find, lambda md5, path, **_: path
    try:
        holds(isinstance(servable.find_weights(folder / "model"), Path), "no folder")
    finally:
        weights.find = before


def _read_runs(folder: Path) -> None:
    (folder / ".rankwise/runs").mkdir(parents=True)
    (folder / "runs.json").rename(folder / ".rankwise/runs/runs.json")
    with _within(folder):
        holds(isinstance(tracking_ui._last_pipeline(), str), "no address")


def _lines(random: Random) -> Files:
    whole = (
        b"Running stage 'dpo':\n> python\n[dpo] 1\nERROR: failed: 'python' exited with 2\nStage 'dpo' didn't change\n"
    )
    return {"lines.txt": octets.spoilt(random, whole + b"error: row 7: no prompt\n")}


def _read_lines(folder: Path) -> None:
    reading = graph.Reading("dpo@1")
    for line in (folder / "lines.txt").read_text(encoding="utf-8", errors="replace").splitlines():
        shown = reading.take(line)
        holds(shown is None or isinstance(shown, str), "a line that is none")
    for status in (0, 1, -9):
        outcome = reading.outcome(status, 1.0)
        holds(outcome.note is not None and isinstance(outcome.status, int), "an outcome without a status")


def _variables(random: Random) -> Files:
    whole = (
        "http://127.0.0.1:8000/v1",
        "https://u:p@host/v1",
        "http://[::1",
        "http://h:99999999",
        "x",
        "http://h\x00/v1",
    )
    names = ("URL", "API_KEY", "MODEL", "CONCURRENCY", "TIMEOUT", "BUDGET_TOKENS", "PRICE_IN", "PRICE_OUT")
    texts = [one for one in trees.TEXTS if "\x00" not in one]
    value = lambda name: (
        random.choice(whole) if name == "URL" else random.choice((*texts, "1", "1e3", "-1", "1_0", "9" * 400))
    )
    given = {"RANKWISE_JUDGE_URL": whole[0]} if random.random() < 0.8 else {}
    given |= {f"RANKWISE_JUDGE_{name}": value(name) for name in random.sample(names, random.randrange(1, 6))}
    return {"environment.json": json.dumps(given).encode()}


def _read_variables(folder: Path) -> None:
    given = json.loads((folder / "environment.json").read_bytes())
    told = []
    try:
        endpoint = client.Endpoint.from_environment("RANKWISE_JUDGE", given)
        holds(endpoint.concurrency >= 1 and endpoint.timeout_s >= 1, "an endpoint that cannot work")
    except UserError as error:
        told.append(error)
    found = budget.Budget.from_environment("RANKWISE_JUDGE", given, path=folder / "spending.sqlite")
    holds(found.limit is None or (type(found.limit) is int and found.limit >= 0), "a limit that is none")
    if told:
        raise told[0]


reader(name="report", make=_report, read=_read_report, weight=0.3, places=("metrics.json", "points"))
_beside("gates", GATES, _read_gates, places=("registration.json",))
_beside("model_config", CONFIG, _read_config, places=("config.json",))
_beside("server", {"url": "http://127.0.0.1:9/api"}, _read_server)
_beside(
    "checkout",
    {"repository": "/r", "revision": "main", "commit": "c", "branch": "runs/x", "note": ""},
    _read_checkout,
    places=("rankwise.json",),
)
_beside("listing", [{"md5": "aa1", "relpath": "a/b.bin"}], _read_listing, places=("bb/2.dir", "2.dir"))
_beside("pointer", {"md5": "m.dir", "path": "models/policy", "commit": "c", "branch": ""}, _read_pointer)
_beside("runs", {"kind": "pipeline", "url": "http://h/#/x", "run_id": "1"}, _read_runs)
reader(name="lines", make=_lines, read=_read_lines, weight=2.0)
reader(name="environment", make=_variables, read=_read_variables, weight=1.0, places=("RANKWISE_JUDGE_",))
