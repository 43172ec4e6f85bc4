"""Progress of long work: a bar with a rate on a terminal, a line every few seconds in a log."""

from __future__ import annotations

import contextlib
import sys
import time
from typing import TextIO

from tqdm import tqdm

LOG_EVERY_S = 5.0


class Progress:
    """Counts work done and shows the rate; on a terminal as a bar, elsewhere as plain log lines.

    Example:
        with Progress("rollouts", total=512, unit="prompt") as progress:
            progress.advance(32, tokens=1900)
    """

    def __init__(self, what: str, *, total: int, unit: str, done: int = 0, stream: TextIO | None = None):
        stream = stream or sys.stderr
        self._what, self._unit, self._total, self._done, self._start = what, unit, total, done, done
        self._stream, self._began, self._spoke = stream, time.monotonic(), time.monotonic()
        self._last_shown = -1
        self._bar = (
            tqdm(desc=what, total=total, initial=done, unit=f" {unit}", file=stream, leave=True)
            if stream.isatty()
            else None
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()
        elif self._last_shown != self._done:
            self._say("")

    def advance(self, count: int = 1, **notes: object) -> None:
        """Count work done; notes (loss=…, tokens=…) are shown beside the rate."""
        self._done += count
        text = " ".join(f"{name} {_short(value)}" for name, value in notes.items())
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(count)
        elif time.monotonic() - self._spoke >= LOG_EVERY_S:
            self._say(text)

    def _say(self, notes: str) -> None:
        seconds = max(time.monotonic() - self._began, 1e-9)
        rate = (self._done - self._start) / seconds
        left = (self._total - self._done) / rate if rate > 0 else float("inf")
        eta = f", {left:.0f} s left" if 0 < left < 1e6 else ""
        tail = f"  {notes}" if notes else ""
        line = f"{self._what}: {self._done}/{self._total} {self._unit}s, {rate:.3g} {self._unit}s/s{eta}{tail}"
        # The reader of a log may die before us; the work is not to be lost with it.
        with contextlib.suppress(BrokenPipeError):
            print(line, file=self._stream, flush=True)
        self._spoke, self._last_shown = time.monotonic(), self._done


def _short(value: object) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
