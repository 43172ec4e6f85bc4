"""The law that every reader is held to, and the table of readers."""

from __future__ import annotations

import os
import re
import resource
import shutil
import signal
import tempfile
import traceback
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from random import Random
from time import process_time
from typing import Any

from rankwise.types import UserError

LONGEST_S = 5.0  # of processor time that a case may take; most take a millisecond
LARGEST_BYTES = 384 * 2**20  # by which a case may raise the most memory that its process ever held
LONGEST_MESSAGE = 8000  # characters; a person is to read it
ROOT = Path(__file__).parent.parent.parent

Files = dict[str, bytes]


@dataclass(frozen=True, kw_only=True)
class Reader:
    """One way into the project.

    Example:
        Reader(name="csv", make=…, read=…, weight=2.0)
    """

    name: str
    make: Callable[[Random], Files]  # the files of a case
    # Reads them in the folder where they lie; raises Unlawful where what came of it is not well-formed.
    read: Callable[[Path], None]
    weight: float = 1.0  # of a campaign's cases
    places: tuple[str, ...] = ()  # words of which a message holds at least one; none: the name of a file of the case


@dataclass(frozen=True, kw_only=True)
class Ending:
    """How a case ended."""

    kind: str  # "read", "told: …", "unlawful: …", "crash: …", "hang", "memory"
    seconds: float  # of processor time
    detail: str = ""  # of a defect: message and traceback

    @property
    def lawful(self) -> bool:
        return self.kind == "read" or self.kind.startswith("told: ")


class Unlawful(AssertionError):
    """A reader gave a value that is none, or dropped something in silence."""


class _TooLong(BaseException):
    """Out of time; no reader catches it."""


READERS: dict[str, Reader] = {}


def reader(**given: Any) -> None:
    """Enter a reader into the table."""
    one = Reader(**given)
    assert one.name not in READERS, one.name
    READERS[one.name] = one


def holds(condition: object, what: str) -> None:
    """Raise Unlawful unless it is so."""
    if not condition:
        raise Unlawful(what)


def files_of(name: str, number: int) -> Files:
    """The files of a case."""
    return READERS[name].make(Random(f"{name}:{number}"))


def put(files: Files, folder: Path) -> None:
    """Write a case's files into a folder of which nothing else stays."""
    try:
        rest = {entry.name for entry in os.scandir(folder)} - {*files}
    except FileNotFoundError:
        folder.mkdir(parents=True)
        rest = set()
    if rest:
        shutil.rmtree(folder)
        folder.mkdir()
    for name, data in files.items():
        path = folder / name
        if "/" in name:
            path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def load_all(names: Iterable[str]) -> None:
    """Load what each reader needs, in this process: those forked from it begin with it."""
    with tempfile.TemporaryDirectory() as made:
        for name in names:
            for number in range(3):
                judge(name, number, Path(made) / "case")


def limit_memory(more: int) -> None:
    """Let this process have so many bytes of address space beside those that it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    most = pages * resource.getpagesize() + more
    resource.setrlimit(resource.RLIMIT_AS, (most, most))


def judge(name: str, number: int, folder: Path) -> Ending:
    """Make a case in a folder, have it read, and say how it ended."""
    one, files = READERS[name], files_of(name, number)
    put(files, folder)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    began = process_time()
    kind, detail = _attempt(one, files, folder)
    seconds = process_time() - began
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    if grown > LARGEST_BYTES:
        kind, detail = "memory", f"{grown / 2**20:.0f} MiB more than ever before, then: {kind} {detail}"
    return Ending(kind=kind, seconds=seconds, detail=detail)


def _attempt(one: Reader, files: Files, folder: Path) -> tuple[str, str]:
    signal.signal(signal.SIGPROF, _ring)
    signal.setitimer(signal.ITIMER_PROF, LONGEST_S)
    try:
        one.read(folder)
        return "read", ""
    except UserError as error:
        if wrong := _of_message(str(error), one, files):
            return f"unlawful: {wrong}", f"{error}\n{traceback.format_exc()}"[:LONGEST_MESSAGE]
        return f"told: {_pattern(str(error), folder)}", ""
    except Unlawful as error:
        return f"unlawful: {error}"[:200], traceback.format_exc()[-LONGEST_MESSAGE:]
    except _TooLong:
        return "hang", traceback.format_exc()[-LONGEST_MESSAGE:]
    except MemoryError:
        return "memory", traceback.format_exc()[-LONGEST_MESSAGE:]
    except BaseException as error:
        return f"crash: {type(error).__name__} at {_where(error)}", traceback.format_exc()[-LONGEST_MESSAGE:]
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _ring(*_: object) -> None:
    raise _TooLong


def _of_message(message: str, one: Reader, files: Files) -> str:
    """What a message lacks of what a person needs; "" where nothing."""
    if not any(place in message for place in one.places or [*files]):
        return "the message names no place"
    if len(message) > LONGEST_MESSAGE:
        return "the message is longer than anybody reads"
    if any("\ud800" <= character <= "\udfff" for character in message):
        return "the message cannot be written as UTF-8"
    return ""


def _pattern(message: str, folder: Path) -> str:
    """A message without what differs from case to case."""
    head = message.replace(str(folder), "").split("\n")[0]
    head = re.sub(r"'[^']*'|\"[^\"]*\"|\([^()]*\)|\[[^\]]*\]|\{[^}]*\}", "…", head)
    head = re.sub(r"[^\s:;]*\d[^\s:;]*", "N", head)
    return head[:70]


def _where(error: BaseException) -> str:
    """The innermost place in the project's own code."""
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if str(ROOT) in f.filename and "/tests/" not in f.filename and ".venv" not in f.filename]
    last = (own or frames)[-1]
    return f"{Path(last.filename).name}:{last.name}"
