"""MLflow, kept at arm's length: metrics files are the record, MLflow is a view of them, and it is best effort.

A stage sends what it has to say, as lines of JSON, to a small process of its own (tasks.tracking_worker, the only
module that imports MLflow). So a stage never pays MLflow's import (1.3 s), a slow or dead tracker never holds up a
training step, and a stage that is killed outright still leaves a run marked KILLED, because the worker sees its
pipe close. A server that goes away while a stage works is told the rest when it is back; after any other failure there
is one warning, then silence.

    MLFLOW_TRACKING_URI       where runs go; unset: an SQLite store under .rankwise/mlflow, no server needed
    MLFLOW_EXPERIMENT_NAME    the experiment ("rankwise")
    RANKWISE_TRACKING=off     no tracking at all
    RANKWISE_PARENT_RUN       set by pipeline_run: the run under which stages put theirs

`python -m tasks.tracking ui` shows the runs in a browser; `python -m tasks.tracking backfill` records what ran while
MLflow was away.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.types import UserError

PATIENCE_S = 60.0  # how long an answer may take; a server that is gone is known after about ten
PATIENCE_MODEL_S = 300.0  # the same for a version of a model, some twenty files on a server
PATIENCE_COPY_S = 3600.0  # the same for a copy of the weights
PATIENCE_STOPPED_S = 5.0  # the same after SIGTERM, when somebody waits for us to leave
FULL_POINTS = 1000  # points a run keeps at each density, see Tracker.metrics


def home() -> Path:
    """The folder of everything that outlives a run and is no DVC output."""
    return Path(os.environ.get("RANKWISE_HOME", ".rankwise"))


class Tracker:
    """One MLflow run as a stage sees it. Every method returns at once unless it says otherwise, and none raises.

    Files handed over are read a little later: they must stay until the run ends.
    """

    def __init__(self, worker: _Worker | None = None):
        self._worker = worker
        self._sent, self._stride, self._held = 0, 1, None

    @property
    def run_id(self) -> str | None:
        """The run's id, waited for up to PATIENCE_S; None where nothing is tracked."""
        return (self._ask({"do": "run"}) or {}).get("run_id")

    @property
    def page(self) -> str | None:
        """The address of the run's page, waited for likewise."""
        return (self._ask({"do": "run"}) or {}).get("url")

    def metrics(self, values: dict[str, float], step: int | None = None) -> None:
        """Numbers of a step, or of the whole run when step is None.

        Long runs are thinned for the view: after every FULL_POINTS points the next ones are kept half as often
        (curves.csv has them all); the last point is always kept.
        """
        message = {"do": "metrics", "values": values, "step": step, "ms": int(time.time() * 1000)}
        if step is None or step % self._stride == 0:
            self._held = None
            self._send(message)
            self._sent += step is not None
            if self._sent == FULL_POINTS:
                self._sent, self._stride = 0, self._stride * 2
        else:
            self._held = message

    def file(self, path: Path) -> None:
        """A file, kept with the run as an artifact."""
        self._send({"do": "file", "path": str(path)})

    def dataset(self, path: Path, role: str) -> None:
        """A data set (file or folder) that the run reads, with its DVC md5; role: "train", "test", "prompts", …"""
        self._send({"do": "dataset", "path": str(path), "role": role})

    def table(self, name: str, rows: list[dict[str, Any]]) -> None:
        """Rows to be read by people in the UI; keep it to hundreds."""
        columns = list(dict.fromkeys(key for row in rows for key in row))
        data = {column: [row.get(column) for row in rows] for column in columns}
        self._send({"do": "table", "name": name, "data": data})

    def tags(self, tags: dict[str, str]) -> None:
        self._send({"do": "tags", "tags": {key: str(value) for key, value in tags.items()}})

    def note(self, markdown: str) -> None:
        """Text for the head of the run's page, above the table of results that the worker adds by itself."""
        self._send({"do": "note", "text": markdown})

    def model(self, folder: Path, name: str, **facts: Any) -> dict[str, Any] | None:
        """Register a model version once for its weights; see tasks.tracking_models.register for the facts.

        Waits for the answer: {"version", "alias", "new"}, or None where MLflow could not be reached.
        """
        patience_s = PATIENCE_COPY_S if facts.get("copy_weights") else PATIENCE_MODEL_S
        return self._ask({"do": "model", "folder": str(folder), "name": name, **facts}, patience_s)

    def run_of(self, stage: str, *, ran: bool) -> dict[str, str] | None:
        """After DVC settled a stage: the run that made its bytes, {"run_id", "url"}; None where none is known.

        ran: the stage was computed just now (its run is tagged with its entry in dvc.lock); False: DVC took it from
        its cache, and the run that once made the same entry is looked up.
        """
        return self._ask({"do": "run_of", "stage": stage, "ran": ran})

    def _send(self, message: dict[str, Any]) -> None:
        if self._worker is not None:
            self._worker.send(message)

    def _ask(self, message: dict[str, Any], patience_s: float | None = None) -> dict[str, Any] | None:
        return None if self._worker is None else self._worker.ask(message, patience_s or PATIENCE_S)

    def _end(self, status: str, error: str = "") -> None:
        if self._held is not None:
            self._send(self._held)
        if self._worker is not None:
            self._worker.end({"do": "end", "status": status, "error": error})


@contextlib.contextmanager
def stage_run(name: str, params: dict[str, Any], facts: dict[str, str] | None = None) -> Iterator[Tracker]:
    """A run for one stage, a child of the pipeline's where there is one; only rank 0 of a launch has one.

    Args:
        facts: what a point of a sweep is a point of, kept beside its params to compare points by; the parent of
            many points does not copy their numbers.
    """
    stage = os.environ.get("DVC_STAGE", "").rpartition(":")[2] or name  # rounds of a stage differ here: dpo@1, dpo@2
    params = {**params, **{f"point.{key}": value for key, value in (facts or {}).items()}}
    start = {"kind": "point" if facts else "stage", "name": stage, "params": params, "tags": {"stage": name}}
    with _run(start) as tracker:
        yield tracker


@contextlib.contextmanager
def pipeline_run(name: str, params: dict[str, Any], tags: dict[str, str] | None = None) -> Iterator[Tracker]:
    """The parent run; stages started inside (RANKWISE_PARENT_RUN is in their environment) become its children.

    Waits for the run's id, about two seconds.
    """
    with _run({"kind": "pipeline", "name": name, "params": params, "tags": tags or {}}) as tracker:
        before = os.environ.get("RANKWISE_PARENT_RUN")
        if run_id := tracker.run_id:
            os.environ["RANKWISE_PARENT_RUN"] = run_id
        try:
            yield tracker
        finally:
            os.environ.pop("RANKWISE_PARENT_RUN", None)
            if before is not None:
                os.environ["RANKWISE_PARENT_RUN"] = before


class Registry:
    """The registered models, for commands that are of no use without them: trouble is an error, not a warning."""

    def __init__(self, worker: _Worker):
        self._worker = worker

    def ask(self, act: str, *, patience_s: float = PATIENCE_S, **facts: Any) -> dict[str, Any]:
        """The answer to an act of tasks.tracking_registry.

        Raises UserError where MLflow cannot be reached or refuses.
        """
        answer = self._worker.ask({"do": act, **facts}, patience_s)
        if answer is None:
            raise UserError(self._worker.trouble)
        if "refused" in answer:
            raise UserError(answer["refused"])
        return answer


@contextlib.contextmanager
def registry() -> Iterator[Registry]:
    """The registry, without a run of its own. Raises UserError where tracking is off or MLflow is away."""
    if os.environ.get("RANKWISE_TRACKING", "on") == "off":
        raise UserError("RANKWISE_TRACKING is off, and this command works on MLflow's registry; unset it")
    worker = _Worker({"kind": "registry"}, warns=False)
    try:
        yield Registry(worker)
    finally:
        worker.end({"do": "end", "status": "FINISHED"})


@contextlib.contextmanager
def _run(start: dict[str, Any]) -> Iterator[Tracker]:
    off = os.environ.get("RANKWISE_TRACKING", "on") == "off" or os.environ.get("RANK", "0") != "0"
    tracker = Tracker(None if off else _Worker(start))
    status, error = "KILLED", ""  # a BaseException that is no Exception: SIGTERM or Ctrl-C
    try:
        yield tracker
        status = "FINISHED"
    except Exception as failure:
        status, error = "FAILED", f"{type(failure).__name__}: {failure}"
        raise
    finally:
        tracker._end(status, error)


class _Worker:
    """The process at the other end: lines of JSON to it, replies and at most one error back."""

    def __init__(self, start: dict[str, Any], *, warns: bool = True):
        self.trouble, self._warns = "", warns
        self._replies: queue.Queue[dict[str, Any] | None] = queue.Queue()
        self._dead = False
        log = home() / "mlflow" / "worker.log"
        try:
            log.parent.mkdir(parents=True, exist_ok=True)
            with open(log, "a", encoding="utf-8") as stderr:
                self._process = subprocess.Popen(
                    [sys.executable, "-m", "tasks.tracking_worker"],
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=stderr,
                )
        except OSError as error:
            self._fail(str(error))
            return
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.send({"do": "start", "ms": int(time.time() * 1000), **start})

    def send(self, message: dict[str, Any]) -> None:
        if self._dead:
            return
        # A line starts with a newline too: one that a signal cut short then spoils no other.
        line = b"\n" + json.dumps(message, default=str).encode("utf-8") + b"\n"
        try:
            self._process.stdin.write(line)
            self._process.stdin.flush()
        except (OSError, ValueError):
            self._fail("its process is gone")

    def ask(self, message: dict[str, Any], patience_s: float) -> dict[str, Any] | None:
        self.send(message)
        if self._dead:
            return None
        try:
            return self._replies.get(timeout=patience_s)
        except queue.Empty:
            self._fail(f"no answer for {patience_s:.0f} s")
            return None

    def end(self, message: dict[str, Any]) -> None:
        self.ask(message, PATIENCE_STOPPED_S if message["status"] == "KILLED" else PATIENCE_S)
        if not hasattr(self, "_process"):
            return
        with contextlib.suppress(OSError):
            self._process.stdin.close()
        # One that is slow is left to finish: it ends by itself, in a minute at most, and holds no output of ours.
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=1.0)
            self._listener.join(timeout=1.0)  # a warning that is on its way comes before the stage's end

    def _listen(self) -> None:
        reply: dict[str, Any] = {}
        for line in self._process.stdout:
            reply = json.loads(line)
            if "error" in reply:
                self._fail(reply["error"])
            elif "away" in reply:
                why = without_password(reply["away"])
                self._say(f"MLflow is away ({why}); what it is to be told is kept until it is back")
            else:
                self._replies.put(reply)
        if "ended" not in reply:
            self._fail("its process is gone")

    def _fail(self, reason: str) -> None:
        if self._dead:
            return
        reason = without_password(reason)  # MLflow quotes the address
        self._dead, self.trouble = True, _with_mend(reason)
        self._say(
            f"MLflow is not recording this run ({reason}); results are not affected: metrics and curves are in the "
            "report files"
        )
        self._replies.put(None)  # last: whoever waits for it goes on, and may end

    def _say(self, text: str) -> None:
        if self._warns:
            print(f"warning: {text}", file=sys.stderr, flush=True)


def without_password(text: str) -> str:
    """A text whose addresses hold no user and no password: https://me:secret@host becomes https://host."""
    return re.sub(r"//[^/\s]*@", "//", text)


def _with_mend(reason: str) -> str:
    """Why MLflow could not be used, and what to do about it."""
    uri = without_password(os.environ.get("MLFLOW_TRACKING_URI", "")) or f"the store in {home() / 'mlflow'}"
    mend = "see that MLFLOW_TRACKING_URI names a server that runs"
    if "401" in reason or "authenticated" in reason:
        mend = "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD to an account of that server"
    elif "403" in reason or "ermission" in reason:
        mend = "ask for an account of that server that may edit the experiment and the registered model"
    return f"MLflow ({uri}): {reason}; {mend} ({home() / 'mlflow/worker.log'} has its own words)"


if __name__ == "__main__":
    import runpy

    # By name, not imported: what the page needs is no dependency of the stages that import this module.
    runpy.run_module("tasks.tracking_ui", run_name="__main__")
