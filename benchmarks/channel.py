"""What a worker and the clock's process say to each other: lines of JSON through two pipes.

The worker's own output goes elsewhere (a log), so that a library which prints cannot disturb the talk.
"""

from __future__ import annotations

import json
import os
import time
from typing import Any

from rankwise.plan import peak


class Stop(Exception):
    """The clock's process wants no more steps."""


class Channel:
    """The worker's end. Reads from file descriptor `inwards`, writes to `outwards`."""

    def __init__(self, inwards: int, outwards: int):
        self._in, self._out = os.fdopen(inwards), os.fdopen(outwards, "w")

    def say(self, **facts: Any) -> None:
        self._out.write(json.dumps(facts) + "\n")
        self._out.flush()

    def wait(self) -> None:
        """Return when a go comes; raises Stop when none will."""
        if self._in.readline().strip() != "go":
            raise Stop


class Pace:
    """Called after each step: says what it took, and waits for the next go.

    The first call also holds the set-up before the first step, so it is never counted.
    """

    def __init__(self, channel: Channel, device: str, baseline: int):
        self._channel, self._device, self._baseline = channel, device, baseline
        peak.reset(device)
        self._began = time.perf_counter()

    def __call__(self, **facts: Any) -> None:
        """facts are told too; a `seconds` among them stands in for the time since the go."""
        self.finish()
        seconds = time.perf_counter() - self._began
        memory = {"peak": peak.highest(self._device), "baseline": self._baseline}
        self._channel.say(**{"seconds": seconds, **memory, **facts})
        self._channel.wait()
        self._began = time.perf_counter()

    def finish(self) -> None:
        """Let the device finish what was asked of it."""
        if self._device == "cuda":
            import torch

            torch.cuda.synchronize()
