"""Rows on disk that are looked at several times: without those that share something with others, or reordered."""

from __future__ import annotations

import hashlib
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rankwise.rows import RowTable, write_rows
from rankwise.seen import Seen
from rankwise.types import Row
from tasks.tables import keys

Reason = tuple[str, Callable[[Row], bool]]  # why rows are left out, and whether one is


class Kept:
    """The rows of a table without those that some reason leaves out; each iteration reads it anew."""

    def __init__(self, table: RowTable, reasons: tuple[Reason, ...] = ()):
        self._table, self._reasons = table, reasons

    def __iter__(self) -> Iterator[Row]:
        return self.counting(Counter())

    def counting(self, left_out: Counter[str]) -> Iterator[Row]:
        """The rows; left_out counts the others by reason."""
        for row in self._table:
            why = next((reason for reason, holds in self._reasons if holds(row)), None)
            if why is None:
                yield row
            else:
                left_out[why] += 1

    def unlike(self, others: Iterable[Row], reason: str) -> Kept:
        """Without those that share a prompt or a group with one of the others."""
        taken = Seen(key for row in others for key in keys(row))
        alike = lambda row: any(key in taken for key in keys(row))
        return Kept(self._table, (*self._reasons, (reason, alike)))


def draw(seed: int, purpose: str, key: str) -> int:
    """A number in [0, 2^64) that this key draws for this purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()[:8], "big")


def noting(rows: Iterable[Row], draws: array, draw_of: Callable[[Row], int]) -> Iterator[Row]:
    """The rows as they are; draws gets the number of each, eight bytes a row."""
    for row in rows:
        draws.append(draw_of(row))
        yield row


def in_order_of(rows: Iterable[Row], draw_of: Callable[[Row], int], path: Path) -> Iterator[Row]:
    """The rows by the numbers that they draw, sorted on disk (path) before the first comes out."""
    write_rows(path, (replace(row, id=f"{draw_of(row):016x}{row.id}") for row in rows))
    return (replace(row, id=row.id[16:]) for row in RowTable(path))
