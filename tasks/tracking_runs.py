"""Runs in MLflow: what the worker does with each message of a stage. Imported by tasks.tracking_worker alone.

A stage's headline numbers are copied to its parent, as "stage/name": MLflow's chart view shows only the metrics of
the run that is open, and the parent's page is the one that people open.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mlflow.entities import Dataset, DatasetInput, InputTag, Metric, Param, RunTag
from mlflow.environment_variables import MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING
from mlflow.exceptions import MlflowException
from mlflow.system_metrics.system_metrics_monitor import SystemMetricsMonitor
from mlflow.tracking import MlflowClient

from rankwise.types import UserError
from tasks import lineage, tracking_models, tracking_notes, tracking_processes, yaml_text
from tasks.recipe import STAGES
from tasks.tracking import home, without_password

HEADLINE = re.compile(r"loss|accura|margin|\bkl|win_rate|reward|distinct|length|agreement|entropy|share|tie", re.I)
NEVER_HEADLINE = re.compile(r"^time/|per_second")
LOCK_TRIES = 5  # two stages at once on one SQLite file


def open_store() -> tuple[MlflowClient, str]:
    """The client and the experiment's id; makes the default store (SQLite, no server) on first use."""
    root = (home() / "mlflow").resolve()
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "rankwise")
    if os.environ.get("MLFLOW_TRACKING_URI"):
        client = MlflowClient()
        return client, _experiment(client, name, artifacts=None)
    root.mkdir(parents=True, exist_ok=True)
    os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{root / 'mlflow.db'}"
    # MLflow makes its tables without a lock: two first stages at once would make them twice.
    with open(root / "init.lock", "w", encoding="utf-8") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        client = MlflowClient()
        return client, _experiment(client, name, artifacts=(root / "artifacts").as_uri())


class Recorder:
    """One run, being written."""

    def __init__(self, start: dict[str, Any]):
        self.kind, self.name, self.began = start["kind"], start["name"], start["ms"]
        self.final: dict[str, float] = {}
        self.text: list[str] = []
        self.tables: list[str] = []
        self.client, self.experiment = open_store()
        self.parent = self._find_parent() if self.kind != "pipeline" else None
        self.copies = self.parent is not None and self.kind == "stage"  # of many points nobody could read the copies
        tags = self._tags(start["tags"])
        if "backfilled" not in tags and (process := tracking_processes.name_of(os.getppid())):
            tags[tracking_processes.TAG] = process
            with contextlib.suppress(MlflowException):  # what others left is not worth this run
                tracking_processes.end_those_of_the_dead(self.client, self.experiment, process)
        run = self.client.create_run(self.experiment, self.began, tags, self.name)
        self.run_id = run.info.run_id
        self._params(_flat((_pipeline_params() if self.kind == "pipeline" else {}) | start["params"]))
        self.monitor = _system_monitor(self.run_id) if self.kind == "stage" and "backfilled" not in tags else None

    def handle(self, message: dict[str, Any]) -> dict[str, Any] | None:
        """Carry out one message; the reply is for those that somebody waits for."""
        return getattr(self, f"_do_{message['do']}", self._unknown)(message)

    def metrics(self, points: list[dict[str, Any]]) -> None:
        """Log points in batches, and the headline ones to the parent as well."""
        own, copied = [], []
        stage, _, key = self.name.partition("@")
        number = int(key) if key.isdigit() else 0
        for point in points:
            step = point["step"] or 0
            # Rounds: their curves lie beside each other, their results make one curve over rounds, the last one on top.
            final = point["step"] is None
            shown, at = (stage, number) if final else (self._in_parent(), step)
            for name, value in point["values"].items():
                if value is None:
                    continue
                own.append(Metric(key_of(name), float(value), point["ms"], step))
                if HEADLINE.search(name) and not NEVER_HEADLINE.search(name):
                    copied.append(Metric(key_of(f"{shown}/{name}"), float(value), point["ms"], at))
            if final:
                self.final |= {name: value for name, value in point["values"].items() if value is not None}
        self._log(self.run_id, own)
        if self.copies:
            self._log(self.parent, copied)

    def give_up(self) -> None:
        """After a failure: one try to leave no run behind that says RUNNING."""
        with contextlib.suppress(Exception):
            self.client.set_terminated(self.run_id, "FAILED")

    def _do_run(self, message: dict[str, Any]) -> dict[str, Any]:
        return self._link(self.run_id)

    def _do_file(self, message: dict[str, Any]) -> None:
        path = Path(message["path"])
        if path.is_file():
            self.client.log_artifact(self.run_id, str(path))

    def _do_dataset(self, message: dict[str, Any]) -> None:
        path = Path(message["path"])
        with contextlib.suppress(UserError):  # a path that is not there is the stage's to complain about
            dataset = Dataset(
                name=path.as_posix(),
                digest=lineage.md5_of(path),
                source_type="dvc",
                source=json.dumps({"path": path.as_posix(), "commit": lineage.git_commit()}),
            )
            context = InputTag("mlflow.data.context", message["role"])
            for run_id in (self.run_id, *([self.parent] if self.copies else [])):
                _retry(self.client.log_inputs, run_id, [DatasetInput(dataset, tags=[context])])

    def _do_table(self, message: dict[str, Any]) -> None:
        self.client.log_table(self.run_id, message["data"], f"{message['name']}.json")
        self.tables.append(message["name"])

    def _do_tags(self, message: dict[str, Any]) -> None:
        tags = [RunTag(key, value) for key, value in message["tags"].items()]
        _retry(self.client.log_batch, self.run_id, tags=tags)

    def _do_note(self, message: dict[str, Any]) -> None:
        if message["text"] not in self.text:  # a server that went away may be told twice
            self.text.append(message["text"])
        self._write_note("RUNNING", int(time.time() * 1000))

    def _do_model(self, message: dict[str, Any]) -> dict[str, Any]:
        facts = {key: value for key, value in message.items() if key != "do"}
        return tracking_models.register(self.client, self.run_id, **facts)

    def _do_run_of(self, message: dict[str, Any]) -> dict[str, Any] | None:
        digest = lineage.lock_entry_md5(message["stage"])
        if message["ran"]:
            with contextlib.suppress(FileNotFoundError):
                run_id = json.loads(_run_file(message["stage"]).read_text())["run_id"]
                _retry(self.client.set_tag, run_id, "dvc.entry_md5", digest)
                return self._link(run_id)
        found = self.client.search_runs([self.experiment], f"tags.`dvc.entry_md5` = '{digest}'", max_results=1)
        return self._link(found[0].info.run_id) if digest and found else {}

    def _do_end(self, message: dict[str, Any]) -> dict[str, Any]:
        end_ms = message.get("ms") or int(time.time() * 1000)
        if self.monitor is not None:
            self.monitor.finish()
        if self.kind == "pipeline":
            self._end_children()
        if message["error"]:
            self.text.insert(0, f"**Failed:** {message['error']}")
        self._write_note(message["status"], end_ms)
        _retry(self.client.set_terminated, self.run_id, message["status"], end_time=end_ms)
        path = _run_file(self.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps({"kind": self.kind, **self._link(self.run_id)}) + "\n", encoding="utf-8")
        return {"ended": True}

    def _unknown(self, message: dict[str, Any]) -> None:
        raise AssertionError(f"no such message: {message['do']}")

    def _artifact(self, path: str) -> str:
        return tracking_notes.artifact(self.experiment, self.run_id, path)

    def _end_children(self) -> None:
        """A stage whose worker was killed with it still says RUNNING: nobody else will end it."""
        for child in self._children():
            if child.info.status == "RUNNING":
                _retry(self.client.set_terminated, child.info.run_id, "KILLED")

    def _children(self) -> list:
        tag = f"tags.`mlflow.parentRunId` = '{self.run_id}'"
        return list(self.client.search_runs([self.experiment], tag, order_by=["attributes.start_time ASC"]))

    def _write_note(self, status: str, now_ms: int) -> None:
        if self.kind == "pipeline":
            copied, children = self.client.get_run(self.run_id).data.metrics, self._children()
            own = [
                tracking_notes.lines(
                    tracking_notes.headline(copied),
                    tracking_notes.total(children, self.experiment),
                    tracking_notes.setting(_params_file()),
                ),
                *self.text,
                tracking_notes.stages(children, self.experiment),
            ]
        else:
            seconds = (now_ms - self.began) / 1000
            tables = {name: self._artifact(f"{name}.json") for name in self.tables}
            own = [*self.text, tracking_notes.results(self.final, seconds=seconds, status=status, tables=tables)]
        note = "\n\n".join(filter(None, own))
        _retry(self.client.set_tag, self.run_id, "mlflow.note.content", note)

    def _tags(self, given: dict[str, str]) -> dict[str, str]:
        commit = lineage.git_commit()
        tags = {
            "mlflow.source.type": "LOCAL",
            "mlflow.source.name": f"python -m tasks.{given['stage']}" if "stage" in given else "flows",
            "mlflow.source.git.commit": commit.removesuffix("+dirty"),
            "git.commit": commit,
            "dvc.lock_md5": lineage.lock_md5(),
            "mlflow.parentRunId": self.parent or "",
        }
        return {key: str(value) for key, value in (tags | given).items() if value}

    def _find_parent(self) -> str | None:
        parent = os.environ.get("RANKWISE_PARENT_RUN")
        with contextlib.suppress(MlflowException):  # one of another store, or deleted: then there is none
            return parent and self.client.get_run(parent).info.run_id
        return None

    def _params(self, params: dict[str, Any]) -> None:
        def of(prefix: str) -> list[Param]:
            return [Param(key_of(prefix + name), str(value)[:500]) for name, value in params.items()]

        for first in range(0, len(params), 100):
            _retry(self.client.log_batch, self.run_id, params=of("")[first : first + 100])
            if self.copies:
                # A stage that runs twice under one parent, with other values: the first stay.
                with contextlib.suppress(MlflowException):
                    self.client.log_batch(self.parent, params=of(f"{self._in_parent()}.")[first : first + 100])

    def _in_parent(self) -> str:
        """What the stage is called in the names of its parent's curves and params; of the first round plainly."""
        return self.name.removesuffix("@1")

    def _log(self, run_id: str, metrics: list[Metric]) -> None:
        for first in range(0, len(metrics), 1000):
            _retry(self.client.log_batch, run_id, metrics=metrics[first : first + 1000])

    def _link(self, run_id: str) -> dict[str, str]:
        return {"run_id": run_id, "url": address_of(tracking_notes.page(self.experiment, run_id))}


def _params_file() -> dict[str, Any]:
    """What params.yaml says, nothing where there is none: a pipeline's page tells it, its stages check it."""
    path = Path("params.yaml")
    with contextlib.suppress(OSError, ValueError):
        found = yaml_text.parse(path.read_text(encoding="utf-8"))
        return found if isinstance(found, dict) else {}
    return {}


def _pipeline_params() -> dict[str, Any]:
    """The params of every stage, whichever will run: pipelines are compared by them."""
    found = _params_file()
    rounds = found.get("rounds")
    named = {name: rounds[name] for name in ("count", "reference", "start") if name in rounds} if rounds else {}
    return {name: found[name] for name in STAGES if name in found} | ({"rounds": named} if named else {})


def _system_monitor(run_id: str) -> SystemMetricsMonitor | None:
    """Samples of the machine's processors, memory, disk, network and GPUs, taken in the worker while a stage runs.

    A stage that is shorter than an interval has none. MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING and
    MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL are MLflow's own switches; tasks.tracking_worker sets their defaults.
    """
    if not MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING.get():
        return None
    with contextlib.suppress(Exception):  # a view of the machine is not worth a run
        monitor = SystemMetricsMonitor(run_id)
        monitor.start()
        return monitor


def address_of(page: str) -> str:
    """A page of MLflow's as an address: on the server in use, or where `python -m tasks.tracking ui` shows it."""
    uri = os.environ["MLFLOW_TRACKING_URI"]
    server = without_password(uri).rstrip("/") if uri.startswith("http") else "http://127.0.0.1:5000"
    return f"{server}/{page}"


def _experiment(client: MlflowClient, name: str, artifacts: str | None) -> str:
    found = client.get_experiment_by_name(name)
    if found is None:
        # The kind makes the UI open on training runs; its default is the page for chat applications.
        tags = {"mlflow.experimentKind": "custom_model_development"}
        try:
            return client.create_experiment(name, artifact_location=artifacts, tags=tags)
        except MlflowException:
            found = client.get_experiment_by_name(name)  # somebody else made it just now
            if found is None:
                raise
    return found.experiment_id


def _retry(write: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    for again in range(LOCK_TRIES):
        try:
            return write(*arguments, **named)
        except MlflowException as error:
            if "locked" not in str(error) or again == LOCK_TRIES - 1:
                raise
            time.sleep(0.2 * 2**again)


def _run_file(name: str) -> Path:
    return home() / "runs" / f"{name}.json"  # not below mlflow, which checkouts of several runs share


def _flat(value: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, item in value.items():
        flat |= _flat(item, f"{prefix}{key}.") if isinstance(item, dict) else {f"{prefix}{key}": item}
    return flat


def key_of(name: str) -> str:
    """A name that MLflow takes: a round's "dpo@2" becomes "dpo.2"."""
    return re.sub(r"[^\w\-. :/]", ".", name)
