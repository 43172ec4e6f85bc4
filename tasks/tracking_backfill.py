"""Runs for results that no run in MLflow has, because it was away when their stages ran, or off.

The files that stages left are the record: metrics.json, curves.csv and plots of reports/STAGE, parameters and digests
in dvc.lock. So numbers, curves, parameters and files are those of the run that made them; what only the stage could
say is not there: the time of each step, speeds, and tables of samples. Imported by tasks.tracking_registry alone.
"""

from __future__ import annotations

import csv
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from mlflow.tracking import MlflowClient

from tasks import lineage
from tasks.register import flatten
from tasks.stage import read_json
from tasks.tracking import home
from tasks.tracking_runs import Recorder, key_of

NOTE = "Recorded afterwards from the files of its report: no speeds, and the time of every point is that of the end."


def backfill(client: MlflowClient, experiment: str) -> list[dict[str, str]]:
    """A run for each stage of dvc.lock that has none: [{"stage", "state", "note"}]; recorded, known, or left.

    A report that is not what dvc.lock says is left: nobody knows which parameters made it.
    """
    told = []
    for stage, entry in _entries().items():
        report = _report(entry)
        if report is None:
            told.append({"stage": stage, "state": "left", "note": "it has no metrics file"})
            continue
        path, md5 = report
        if not path.is_file() or lineage.md5_of(path) != md5:
            told.append(
                {"stage": stage, "state": "left", "note": f"{path} is not what dvc.lock says; run: dvc checkout"}
            )
        elif known := _known(client, experiment, stage, path):
            told.append({"stage": stage, "state": "known", "note": known})
        else:
            told.append({"stage": stage, "state": "recorded", "note": _record(stage, entry, path)})
    return told


def _entries() -> dict[str, dict[str, Any]]:
    return lineage.lock_entries() if lineage.LOCK.is_file() else {}


def _report(entry: Mapping[str, Any]) -> tuple[Path, str] | None:
    """The metrics file of a stage and its md5."""
    for out in entry.get("outs", []):
        if out["path"].endswith("/metrics.json") and "md5" in out:
            return Path(out["path"]), out["md5"]
    return None


def _known(client: MlflowClient, experiment: str, stage: str, path: Path) -> str:
    """The run of a stage that has the very numbers of its report; "" where there is none."""
    curves = {name for _, values in _curves(path.parent) for name in values}  # of these MLflow tells the last step's
    results = {key_of(name): value for name, value in _results(path).items() if name not in curves}
    for run in client.search_runs([experiment], f"attributes.run_name = '{stage}' and attributes.status = 'FINISHED'"):
        if all(run.data.metrics.get(name) == value for name, value in results.items()):
            return run.info.run_id
    return ""


def _results(path: Path) -> dict[str, float]:
    """The numbers of a metrics file under the names that a stage gives them in MLflow."""
    return {name.replace(".", "/"): float(value) for name, value in flatten(_json(path)).items()}


def _record(stage: str, entry: Mapping[str, Any], path: Path) -> str:
    """A run with what the report holds; returns its id. It ends when the metrics file was written."""
    name = stage.partition("@")[0]
    end_ms = int(path.stat().st_mtime * 1000)
    timings = _json(home() / "timings" / f"{path.parent.name}.json")
    start = {
        "kind": "stage",
        "name": stage,
        "params": _params(entry, name),
        "tags": {"stage": name, "backfilled": "true", "dvc.entry_md5": lineage.lock_entry_md5(stage)},
        "ms": end_ms - int(1000 * timings.get("seconds", 0)),
    }
    recorder = Recorder(start)
    points = [{"step": step, "values": values, "ms": end_ms} for step, values in _curves(path.parent)]
    times = {f"time/{key}": value for key, value in timings.items()}
    recorder.metrics([*points, {"step": None, "values": _results(path) | times, "ms": end_ms}])
    for file in sorted(file for file in path.parent.rglob("*") if file.is_file()):
        recorder.handle({"do": "file", "path": str(file)})
    recorder.handle({"do": "note", "text": NOTE})
    recorder.handle({"do": "end", "status": "FINISHED", "error": "", "ms": end_ms})
    return recorder.run_id


def _params(entry: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A stage's own parameters, with those of its round over them."""
    given = entry.get("params", {}).get("params.yaml", {})
    own = [value for key, value in given.items() if key.startswith("rounds.each.") and key.endswith(f".{name}")]
    merge = lambda old, new: (
        old
        | {
            key: merge(old[key], value) if isinstance(value, dict) and isinstance(old.get(key), dict) else value
            for key, value in new.items()
        }
    )
    return functools.reduce(merge, [one for one in own if one], given.get(name) or {})


def _curves(report: Path) -> Iterator[tuple[int, dict[str, float]]]:
    path = report / "plots" / "curves.csv"
    if path.is_file():
        with open(path, encoding="utf-8", newline="") as handle:
            for row in csv.DictReader(handle):
                yield int(row["step"]), {key: float(value) for key, value in row.items() if key != "step" and value}


def _json(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}
