"""One side at work, in a process of its own: python -m benchmarks.worker SPEC, started by benchmarks.contest.

SPEC is JSON: job, side ("ours" or "trl"), case, setting, and the file descriptors to talk through.
"""

from __future__ import annotations

import json
import signal
import sys
import tempfile
from typing import Any

from rankwise.runtime import keep_freed_memory, spin_briefly


def main(spec: dict[str, Any]) -> None:
    # Asked to end, it takes down what it started: a server, a folder.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    # What a stage of the pipeline sets for itself, for both sides; before torch is imported.
    keep_freed_memory()
    spin_briefly()
    from benchmarks import jobs
    from benchmarks.channel import Channel, Stop

    channel = Channel(spec["inwards"], spec["outwards"])
    with tempfile.TemporaryDirectory() as folder:
        try:
            jobs.JOBS[spec["job"]](spec, channel, folder)
        except Stop:
            return


if __name__ == "__main__":
    main(json.loads(sys.argv[1]))
