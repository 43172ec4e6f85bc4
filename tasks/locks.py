"""One writer at a time: locks that the kernel frees when their holder dies, and holders that are on their way out."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TextIO

from rankwise.types import UserError

LEAVING_S = 60.0  # for a step, a checkpoint, and a result that is being put in place


@contextlib.contextmanager
def only_writer(stage: str, output: str, home: Path) -> Iterator[None]:
    """One process at a time writes a stage's output; the kernel frees the lock however its holder dies.

    Args:
        output: a name for what is written.
        home: where locks lie. Several trees may share it (those of `dvc queue` do): their outputs are not each other's.

    Raises UserError where another process is at it.
    """
    tree = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:12]
    path = home / "locks" / f"{output}-{tree}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as handle:
        _take(handle, stage)
        handle.truncate(0)
        handle.write(f"{os.getpid()} {os.getppid()}" if "DVC_STAGE" in os.environ else str(os.getpid()))
        handle.flush()
        yield


def _take(handle: TextIO, stage: str) -> None:
    """Lock a file; waits for a holder whose DVC has died, since it leaves by itself (tasks.exits)."""
    told, until = False, time.monotonic() + LEAVING_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder, *parent = handle.read().split() or ["?"]
        if not parent or not _is_orphan(holder, parent[0]) or time.monotonic() > until:
            raise UserError(
                f"stage {stage} is already being run here by process {holder}; wait for it, or stop it, then run this "
                "again"
            )
        if not told:
            print(f"[{stage}] process {holder}, of a run that was killed, is leaving; waiting for it", flush=True)
            told = True
        time.sleep(0.1)


def _is_orphan(pid: str, parent: str) -> bool:
    """Whether a process has lost its parent, or is gone itself; Linux alone can tell, and sends it SIGTERM then."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return sys.platform == "linux"
    return stat.rpartition(")")[2].split()[1] != parent
