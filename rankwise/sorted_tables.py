"""A Parquet file sorted by a key, of more rows than fit in memory; the same bytes for the same rows in any order.

What comes in order is written as it comes. The rest is sorted in runs of so many bytes, kept beside the file, and
merged at the end; of a table that is out of order the keys alone are then in memory, some 40 bytes a row.

A file's row groups end after GROUP_ROWS rows, or earlier where GROUP_BYTES of values are in them: so readers, too,
hold a part of a table, whatever its rows and their length.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

GROUP_ROWS = 8192  # rows of a row group at most
GROUP_BYTES = 32 << 20  # bytes of values after which a row group ends
BLOCK_ROWS = 1024  # rows that a group grows by, and that are read at once
RUN_BYTES = 32 << 20  # bytes of values that are sorted in memory, which takes three times as many


class SortedTable:
    """Writes a table; used in a `with`, at whose end the file is whole. Rows of one key keep the order they came in.

    Args:
        path: written in place; the runs lie beside it until the end.
        key: a column of text; None: the rows keep the order that they come in.

    Example:
        with SortedTable(path, schema, key="id") as table:
            table.add(part)
        table.rows, table.repeated
    """

    def __init__(self, path: Path, schema: pa.Schema, *, key: str | None):
        self.rows = 0
        self.repeated: str | None = None  # the first key that occurs twice
        self._path, self._schema, self._key = Path(path), schema, key
        self._file = _Groups(self._path, schema)
        self._last: str | None = None  # the last key in the file
        self._waiting: list[pa.Table] = []  # out of order
        self._runs: list[Path] = []

    def __enter__(self) -> SortedTable:
        return self

    def __exit__(self, kind: type | None, *_: object) -> None:
        try:
            if kind is None:
                self._settle()
        finally:
            self._file.close()
            for run in self._runs:
                run.unlink(missing_ok=True)

    def add(self, part: pa.Table) -> None:
        """Add rows, in any order."""
        if not len(part):
            return
        self.rows += len(part)
        if self._key is None:
            self._file.add(part)
            return
        keys = part.column(self._key)
        ordered = pc.all(pc.less_equal(keys.slice(0, len(part) - 1), keys.slice(1))).as_py() is not False
        if ordered and not self._waiting and not self._runs and (self._last is None or self._last <= keys[0].as_py()):
            self._append(part)
            return
        self._waiting.append(part)
        if sum(waiting.nbytes for waiting in self._waiting) >= RUN_BYTES:
            self._spill()

    def _append(self, part: pa.Table) -> None:
        """To the file, whose keys all come before these."""
        keys = part.column(self._key)
        again = pc.equal(keys.slice(0, len(part) - 1), keys.slice(1))
        if self.repeated is None and self._last == keys[0].as_py():
            self.repeated = self._last
        if self.repeated is None and (place := pc.index(again, True).as_py()) >= 0:
            self.repeated = keys[place].as_py()
        self._last = keys[-1].as_py()
        self._file.add(part)

    def _sorted(self) -> pa.Table:
        together = pa.concat_tables(self._waiting).combine_chunks()
        self._waiting = []
        return together.take(pc.sort_indices(together.column(self._key)))

    def _spill(self) -> None:
        run = self._path.with_name(f"{self._path.name}.run{len(self._runs)}")
        self._runs.append(run)
        ordered = self._sorted()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.OSFile(str(run), "wb") as handle, pa.ipc.new_stream(handle, self._schema, options=options) as stream:
            for batch in ordered.to_batches(max_chunksize=BLOCK_ROWS):
                stream.write_batch(batch)

    def _settle(self) -> None:
        if self._waiting and not self._runs and not self._file.rows:
            self._append(self._sorted())
        elif self._waiting:
            self._spill()
        if not self._runs:
            return
        # What was in order has become the first of the runs.
        self._file.close()
        begun = self._path.with_name(f"{self._path.name}.run")
        self._path.rename(begun)
        runs = [begun, *self._runs]
        self._runs, self._last, self.repeated = runs, None, None
        self._file = _Groups(self._path, self._schema)
        for part in _merged(runs, self._schema, self._key):
            self._append(part)


class _Groups:
    """A Parquet file whose row groups depend on its rows alone, not on the parts that they came in."""

    def __init__(self, path: Path, schema: pa.Schema):
        self.rows = 0
        self._schema = schema
        self._writer = pq.ParquetWriter(path, schema, compression="zstd")
        self._rest: list[pa.Table] = []  # fewer rows than a block
        self._group: list[pa.Table] = []  # blocks
        self._bytes = 0

    def add(self, part: pa.Table) -> None:
        self.rows += len(part)
        self._rest.append(part)
        if sum(map(len, self._rest)) < BLOCK_ROWS:
            return
        together = pa.concat_tables(self._rest)
        whole = len(together) // BLOCK_ROWS * BLOCK_ROWS
        for start in range(0, whole, BLOCK_ROWS):
            self._add_block(together.slice(start, BLOCK_ROWS))
        self._rest = [together.slice(whole)]

    def close(self) -> None:
        if self._writer.is_open:
            with contextlib.closing(self._writer):
                self._group += self._rest
                if sum(map(len, self._group)) or not self.rows:
                    self._write()

    def _add_block(self, block: pa.Table) -> None:
        self._group.append(block)
        self._bytes += sum(_bytes(chunk) for column in block.columns for chunk in column.chunks)
        if len(self._group) * BLOCK_ROWS >= GROUP_ROWS or self._bytes >= GROUP_BYTES:
            self._write()

    def _write(self) -> None:
        group = pa.concat_tables([self._schema.empty_table(), *self._group]).combine_chunks()
        self._writer.write_table(group)
        self._group, self._bytes = [], 0


def _bytes(array: pa.Array) -> int:
    """Bytes of the values: of two arrays that hold the same the same number, unlike nbytes, which counts masks."""
    if pa.types.is_list(array.type):
        return 4 * len(array) + _bytes(array.flatten())
    if pa.types.is_struct(array.type):
        return sum(map(_bytes, array.flatten()))
    if pa.types.is_string(array.type):
        return 4 * len(array) + (pc.sum(pc.binary_length(array)).as_py() or 0)
    return len(array) * array.type.bit_width // 8


class _Run:
    """A sorted part of the rows, read from its beginning to its end."""

    def __init__(self, path: Path):
        self._path = path
        self._batches, self._held = iter(self._read(None)), []
        self._count = 0

    def keys(self, key: str) -> list[pa.Array]:
        return [batch.column(key) for batch in self._read(key)]

    def take(self, count: int) -> list[pa.RecordBatch]:
        """The next rows."""
        while self._count < count:
            self._held.append(next(self._batches))
            self._count += len(self._held[-1])
        taken, left = [], count
        while left:
            batch = self._held.pop(0)
            taken.append(batch.slice(0, left))
            if len(batch) > left:
                self._held.insert(0, batch.slice(left))
            left -= len(taken[-1])
        self._count -= count
        return taken

    def _read(self, key: str | None) -> Iterator[pa.RecordBatch]:
        with open(self._path, "rb") as handle:
            parquet = handle.read(4) == b"PAR1"
        if parquet:
            with pq.ParquetFile(self._path) as file:
                yield from file.iter_batches(BLOCK_ROWS, columns=[key] if key else None)
            return
        with pa.OSFile(str(self._path), "rb") as handle, pa.ipc.open_stream(handle) as stream:
            yield from stream


def _merged(paths: Sequence[Path], schema: pa.Schema, key: str) -> Iterator[pa.Table]:
    """The rows of sorted files in one order, a group's worth at a time; of equal keys those of earlier files first."""
    runs = [_Run(path) for path in paths]
    held = [run.keys(key) for run in runs]
    starts = np.cumsum([0, *(sum(map(len, keys)) for keys in held)])
    order = pc.sort_indices(pa.chunked_array([chunk for keys in held for chunk in keys], pa.string())).to_numpy()
    del held
    taken = starts[:-1].copy()  # of each run, rows that are through
    for first in range(0, len(order), GROUP_ROWS):
        part = order[first : first + GROUP_ROWS].astype(np.int64)
        run_of = np.searchsorted(starts, part, side="right") - 1
        counts = np.bincount(run_of, minlength=len(runs))
        # A run's rows come in its own order, so the next ones of each, put together, hold the part.
        pieces = [batch for run, count in zip(runs, counts) for batch in run.take(int(count))]
        before = np.concatenate([[0], np.cumsum(counts)[:-1]])
        together = pa.Table.from_batches(pieces, schema=schema).combine_chunks()
        yield together.take(pa.array(part - taken[run_of] + before[run_of]))
        taken += counts
