"""Which process a run in MLflow is of, so that a run whose process was killed does not say RUNNING for ever.

A stage that dies alone has its end told by its worker. Where both die at once, as with a container or a machine, nobody
is left to tell: the next run on the same host does. Linux alone, where a process has a name that is never used twice.
"""

from __future__ import annotations

import os
import socket
from pathlib import Path
from typing import Any

TAG = "rankwise.process"


def name_of(pid: int) -> str:
    """Host, boot and namespace of a process, its number and when it began, "" where that cannot be told.

    The parts before the last two are where it lives: only from there can one see whether it still does.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        began = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]  # clock ticks after boot
        return f"{socket.gethostname()} {boot}/{os.stat('/proc/self/ns/pid').st_ino} {pid} {began}"
    except OSError:
        return ""


def end_those_of_the_dead(client: Any, experiment: str, mine: str) -> list[str]:
    """Set runs of this host to KILLED that say RUNNING while their process is gone; returns their ids.

    Those of an earlier boot are gone; those of another container of this name, now, cannot be seen from here.
    """
    host, _, _ = mine.partition(" ")
    if not host:
        return []
    running = f"attributes.status = 'RUNNING' and tags.`{TAG}` LIKE '{host} %'"
    found = client.search_runs([experiment], running)
    dead = [run.info.run_id for run in found if _is_gone(run.data.tags[TAG], mine)]
    for run_id in dead:
        client.set_terminated(run_id, "KILLED")
    return dead


def _is_gone(theirs: str, mine: str) -> bool:
    (_, place, pid, _), (_, here, _, _) = theirs.split(" "), mine.split(" ")
    if place.partition("/")[0] != here.partition("/")[0]:
        return True
    return place == here and name_of(int(pid)) != theirs
