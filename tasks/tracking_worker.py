"""The MLflow end of tasks.tracking: reads lines of JSON, writes runs. Not a stage; started by tasks.tracking.

A process of its own, so that nothing of MLflow (its import, its retries, a hang, a crash) reaches a stage. The end
of its input without an "end" line means that the stage was killed. The first failure is reported and ends it.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import signal
import sys
import threading
import time
from collections.abc import MutableMapping
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

FLUSH_EVERY_S = 1.0
BATCH = 1000  # MLflow's limit of metrics a request
DEADLINE_S = 60.0  # after its stage is gone, a worker is gone too

# Read by MLflow at import. DO_NOT_TRACK=1 would not stop its telemetry, "true" does.
SETTINGS = {
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",  # the defaults hang 247 s on a server that is gone
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "5",
    "MLFLOW_RECORD_ENV_VARS_IN_MODEL_LOGGING": "false",
    "MLFLOW_ENABLE_SYSTEM_METRICS_LOGGING": "true",  # sampled by the worker, so that no step pays for it
    "MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL": "5",  # seconds
}


def main() -> int:
    """Serve one run until its "end" line, or until the stage's end of the pipe closes."""
    # A signal to the whole group is for the stage; the worker ends when the stage does, and says how it ended.
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    os.nice(5)  # the training step comes first
    os.environ.update({key: value for key, value in SETTINGS.items() if key not in os.environ})
    part_from_password(os.environ)
    replies = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what MLflow prints is not a reply
    messages: queue.Queue[dict[str, Any] | None] = queue.Queue()
    threading.Thread(target=_read, args=(messages,), daemon=True).start()
    recorder = None
    try:
        start = messages.get()
        if start is None:
            return 0
        logging.disable(logging.INFO)  # a fresh store's migrations
        recorder = _recorder(start)
        _serve(recorder, messages, replies)
    except Exception as error:
        logging.exception("tracking stopped")
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        _reply({"error": reason[:300]}, replies)
        if recorder is not None:
            recorder.give_up()
        return 1
    return 0


def part_from_password(environment: MutableMapping[str, str]) -> None:
    """Take user and password out of the server's address, and give them to MLflow apart.

    It quotes the address in its log, in errors and on pages.
    """
    parts = urlsplit(environment.get("MLFLOW_TRACKING_URI", ""))
    if parts.scheme not in ("http", "https") or parts.username is None:
        return
    environment["MLFLOW_TRACKING_USERNAME"] = unquote(parts.username)
    environment["MLFLOW_TRACKING_PASSWORD"] = unquote(parts.password or "")
    environment["MLFLOW_TRACKING_URI"] = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()


def _recorder(start: dict[str, Any]) -> Any:
    """What carries messages out. Not imported before the settings above: it imports MLflow."""
    if start["kind"] == "registry":
        from tasks.tracking_registry import Acts

        return Acts()
    from tasks.tracking_runs import Recorder

    return Recorder(start)


def _serve(recorder: Any, messages: queue.Queue, replies: TextIO) -> None:
    pending: list[dict[str, Any]] = []
    while True:
        try:
            message = messages.get(timeout=FLUSH_EVERY_S if pending else None)
        except queue.Empty:
            message = {"do": "flush"}
        if message is None:
            message = {"do": "end", "status": "KILLED", "error": "its process died"}
        if message["do"] == "metrics":
            pending.append(message)
            if sum(len(point["values"]) for point in pending) < BATCH:
                continue
        if pending:
            recorder.metrics(pending)
            pending = []
        if message["do"] not in ("metrics", "flush"):
            reply = recorder.handle(message)
            if reply is not None:
                _reply(reply, replies)
        if message["do"] == "end":
            return


def _read(messages: queue.Queue) -> None:
    for line in sys.stdin:
        try:
            message = json.loads(line)
        except json.JSONDecodeError:
            continue  # empty, or cut short by a signal
        messages.put(message)
    messages.put(None)
    time.sleep(DEADLINE_S)
    os._exit(1)


def _reply(value: dict[str, Any], replies: TextIO) -> None:
    with contextlib.suppress(OSError):  # the stage is gone; its run still gets its end
        print(json.dumps(value), file=replies, flush=True)


if __name__ == "__main__":
    status = main()
    os._exit(status)  # threads of MLflow's, or one still reading, hold nothing up
