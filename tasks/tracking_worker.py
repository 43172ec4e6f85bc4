"""The MLflow end of tasks.tracking: reads lines of JSON, writes runs. Not a stage; started by tasks.tracking.

A process of its own, so that nothing of MLflow (its import, its retries, a hang, a crash) reaches a stage. The end
of its input without an "end" line means that the stage was killed. A server that goes away while a stage works is
waited for, and what it was to be told is kept; any other failure, or one at the end, is reported and ends the worker.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, MutableMapping
from functools import partial
from typing import Any, TextIO
from urllib.parse import unquote, urlsplit

FLUSH_EVERY_S = 1.0
BATCH = 1000  # MLflow's limit of metrics a request
AWAY_S = 5.0  # between two tries at a server that is away
KEPT = frozenset({"metrics", "file", "dataset", "table", "tags", "note"})  # messages that nobody waits for
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
    messages = Inbox()
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
        _reply({"error": _reason(error)}, replies)
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


class Inbox(queue.Queue):
    """Messages as they come, None at the end, and whether somebody waits for one of them."""

    awaited = 0

    def _put(self, message: dict[str, Any] | None) -> None:
        super()._put(message)
        self.awaited += message is None or message["do"] not in KEPT

    def _get(self) -> dict[str, Any] | None:
        message = super()._get()
        self.awaited -= message is None or message["do"] not in KEPT
        return message


def _serve(recorder: Any, messages: Inbox, replies: TextIO) -> None:
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
        awaited = message["do"] not in (*KEPT, "flush")
        if pending:
            _patiently(partial(recorder.metrics, pending), messages, replies, awaited=awaited)
            pending = []
        if message["do"] not in ("metrics", "flush"):
            reply = _patiently(partial(recorder.handle, message), messages, replies, awaited=awaited)
            if reply is not None:
                _reply(reply, replies)
        if message["do"] == "end":
            return


def _patiently(act: Callable[[], Any], messages: Inbox, replies: TextIO, *, awaited: bool) -> Any:
    """Do it; where the server is away, again and again until it answers or somebody waits for us."""
    told = False
    while True:
        try:
            return act()
        except Exception as error:
            if awaited or not _is_away(error):
                raise
            if not told:
                _reply({"away": _reason(error)}, replies)
                told = True
        until = time.monotonic() + AWAY_S
        while not (awaited := messages.awaited > 0) and time.monotonic() < until:
            time.sleep(0.1)


def _is_away(error: BaseException | None) -> bool:
    """Whether it is the trouble of a server that cannot be reached, or of a proxy that cannot reach it."""
    while error is not None:
        if type(error).__module__.startswith(("requests.", "urllib3.")):
            return True
        if re.search(r"API request to .* failed with (exception HTTPS?ConnectionPool|error code 50[234])", str(error)):
            return True
        error = error.__cause__ or error.__context__
    return False


def _reason(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def _read(messages: Inbox) -> None:
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
