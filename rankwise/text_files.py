"""Text files, plain or as .gz, that others wrote: read in pieces, and never more of them than a machine can hold.

A gzip file can be a thousandth of what it unpacks to, and a file without line ends is one line, so both have a limit
that no file of real text comes near.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, AnyStr, BinaryIO

from rankwise.types import UserError

LONGEST_LINE = 2**24  # bytes or characters of one line: a record
MOST_TIMES = 250  # as large as its .gz, once it is LARGE; text comes to 3 to 50 times
LARGE = 2**25  # bytes


@contextlib.contextmanager
def opened(path: Path) -> Iterator[BinaryIO]:
    """A file's bytes, unpacked where its name ends in .gz.

    Raises UserError where it cannot be read, is no whole gzip file, or unpacks to far more than text does.
    """
    try:
        with open(path, "rb") as file:
            if path.suffix != ".gz":
                yield file
                return
            with gzip.GzipFile(fileobj=file) as unpacked:
                yield io.BufferedReader(_Bounded(unpacked, path))
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror or error}); give a file that is yours") from None


def lines(file: IO[AnyStr], path: Path) -> Iterator[AnyStr]:
    """The lines of an open file with their ends; raises UserError at one that is too long for a record."""
    number = 0
    while line := file.readline(LONGEST_LINE + 1):
        number += 1
        if len(line) > LONGEST_LINE:
            raise UserError(
                f"{path}:{number}: a line of more than {LONGEST_LINE // 2**20} MiB; one record a line was expected: "
                "write line ends, or give the file the ending of what it is"
            )
        yield line


class _Bounded(io.RawIOBase):
    """What a gzip file unpacks to, up to where it is no text."""

    def __init__(self, unpacked: gzip.GzipFile, path: Path):
        self._unpacked, self._path, self._count = unpacked, path, 0
        self._most = max(LARGE, MOST_TIMES * path.stat().st_size)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer) -> int:
        got = self._unpacked.readinto(buffer)
        self._count += got
        if self._count > self._most:
            raise UserError(
                f"{self._path}: unpacks to more than {self._most // 2**20} MiB, {MOST_TIMES} times its size, as no "
                "text does; look at what it is, and unpack it yourself if it is yours"
            )
        return got
