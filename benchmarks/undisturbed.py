"""A whole run that nothing disturbs, in a copy of this checkout, and what it leaves: what is right."""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shlex
import sqlite3
import tempfile
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import yaml

from benchmarks import ledger, report, witness
from benchmarks.ledger import Ledger
from benchmarks.scratch import RECIPE, Copy

MADE = ("data", "models", "reports")


class Reference:
    """A copy in which the pipeline ran undisturbed, and what it left."""

    def __init__(self, folder: Path, *, tiny: bool, target: str = "", overrides: tuple[str, ...] = ()):
        self.target = (target,) if target else ()
        self.copy = made(folder, "undisturbed", tiny=tiny, overrides=overrides)
        report.say("an undisturbed run")
        told = Ledger(folder / "undisturbed.ledger")
        self.seconds = round(self.copy.run("dvc", "repro", *self.target, CHAOS_LEDGER=str(told.path)).wall_s, 1)
        told.read()
        self.events, self.phases = told.events, ledger.phases(told.events)
        self.units = {stage: len(keys) for stage, keys in ledger.units(told.events).items()}
        self.tree, self.stores = tree(self.copy.root), stores(self.copy.root)
        self.lock = (self.copy.root / "dvc.lock").read_bytes()
        entries = yaml.safe_load(self.lock)["stages"]
        # as DVC ran them, each with its paths
        self.stages = [tuple(shlex.split(entries[stage]["cmd"])[1:]) for stage in _order(entries, self.phases)]

    def commands(self, driver: str) -> list[tuple[str, ...]]:
        """What a person types, one after another."""
        flow = ("python", "-m", "flows.align", *(("--target", *self.target) if self.target else ()))
        return {"flow": [flow], "dvc": [("dvc", "repro", *self.target)], "stage": self.stages}[driver]


def made(folder: Path, name: str, *, tiny: bool, overrides: tuple[str, ...] = ()) -> Copy:
    """A fresh copy of this checkout whose stages tell what they do."""
    (folder / name).mkdir()
    probe = folder / "witness"
    probe.mkdir(exist_ok=True)
    (probe / "sitecustomize.py").write_text(Path(witness.__file__).read_text(encoding="utf-8"), encoding="utf-8")
    copy = Copy(folder / name, RECIPE if tiny else None, overrides=overrides)
    copy.environment["PYTHONPATH"] = os.pathsep.join([str(probe), copy.environment["PYTHONPATH"]])
    return copy


@contextlib.contextmanager
def workplace(keep: str | None) -> Iterator[Path]:
    """A folder for the copies: a temporary one, or the one to be kept."""
    if keep is None:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    Path(keep).mkdir(parents=True, exist_ok=True)
    yield Path(tempfile.mkdtemp(dir=keep, prefix="chaos-"))


def _order(entries: dict[str, Any], phases: list[ledger.Phase]) -> list[str]:
    ran = list(dict.fromkeys(phase.stage for phase in phases))
    assert sorted(ran) == sorted(entries), f"the ledger tells of {ran}, dvc.lock of {list(entries)}"
    return ran


def tree(root: Path) -> dict[str, str]:
    """The digest of every output file, by path; .gitignore files are DVC's own, and bare stages write none."""
    files = (file for name in MADE for file in (root / name).rglob("*") if file.is_file() and file.name != ".gitignore")
    return {str(file.relative_to(root)): hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def stores(root: Path) -> dict[str, dict[str, str]]:
    """The rows of every store, by key."""
    found = {}
    for path in sorted((root / ".rankwise/stores").glob("*.sqlite")):
        with contextlib.closing(sqlite3.connect(path)) as store:
            found[path.stem] = dict(store.execute("SELECT key, value FROM rows"))
    return found


def statuses(root: Path) -> dict[str, int]:
    """How many runs of each status MLflow's store has."""
    path = root / ".rankwise/mlflow/mlflow.db"
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as store:
        return dict(store.execute("SELECT status, count(*) FROM runs GROUP BY status"))


def machine() -> dict[str, Any]:
    names = ("prefect", "dvc", "mlflow")
    versions = {"python": platform.python_version(), **{name: metadata.version(name) for name in names}}
    load = f"cpu (load {os.getloadavg()[1]:.1f} over 5 minutes)"
    return {"device": load, "cores": os.cpu_count(), "threads": 1, "versions": versions}
