"""Tables of rows on disk: one Parquet file a table, sorted by id, the same bytes for the same rows.

Tables are written and read in parts, so that memory does not grow with them. Files are written aside and renamed: a
killed writer leaves the old table or the new one, never half.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.arrow_rows import SCHEMA, from_arrow, missing_columns, to_arrow
from rankwise.sorted_tables import BLOCK_ROWS, SortedTable
from rankwise.table_checks import REBUILD, check_claims, check_count, conform, records_of
from rankwise.types import Missing, Row, UserError

BUFFER_BYTES = 1 << 20  # of a Parquet file's column, whose row groups may hold the whole file
_MAY_BE_NULL = {
    "meta",
    *(f"answers[].{name}" for name in ("rank", "strength", "strength_se", "token_ids", "finish_reason", "seed")),
    *("answers[].logps", "answers[].engine"),
}


class RowTable:
    """The rows of a table written by write_rows, sorted by id; each iteration reads the file anew, a part at a time.

    Args:
        key: as it was written.

    Raises UserError where the file is missing or is not such a table; what is wrong with a row, as it is read.

    Example:
        table = RowTable(path)
        len(table), sum(len(row.answers) for row in table)
    """

    def __init__(self, path: Path, *, key: str | None = "id"):
        self.path, self._key = Path(path), key
        with readable(self.path), pq.ParquetFile(self.path) as file:
            check_claims(self.path, file)
            schema, self._count = file.schema_arrow, file.metadata.num_rows
        if missing := missing_columns(schema):
            raise UserError(
                f"{path}: columns {missing} are missing (found {schema.names}); "
                "this is not a table of rows: rebuild it with the stage that makes it"
            )

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Row]:
        last, number = None, 1
        for part in read_parts(self.path, SCHEMA, may_be_null=_MAY_BE_NULL):
            try:
                rows = from_arrow(part, first=number)
            except ValueError as error:
                raise UserError(f"{self.path} {error}: {REBUILD}") from None
            number += len(rows)
            for row in rows:
                if self._key and last is not None and row.id <= last:
                    why = "occurs twice; ids must be unique within a table" if row.id == last else "is out of order"
                    raise UserError(f"{self.path}: id {row.id!r} {why}: {REBUILD}")
                last = row.id
                yield row


def read_rows(path: Path) -> list[Row]:
    """All rows of a table at once; RowTable is for tables that may be large, and raises the same."""
    return list(RowTable(path))


@contextlib.contextmanager
def rows_writer(path: Path, *, key: str | None = "id") -> Iterator[RowsWriter]:
    """A table to add rows to, in any order; it takes path's place when the block ends without an error.

    Args:
        key: None keeps the rows in the order that they come in: for scratch files, no stage reads such a table.

    Raises UserError on a repeated id: a table is keyed by it.
    """
    with table_writer(path, SCHEMA, key=key, unique=True) as table:
        writer = RowsWriter(table)
        yield writer
        writer.flush()


class RowsWriter:
    """What rows_writer gives."""

    def __init__(self, table: SortedTable):
        self.count = 0
        self._table, self._held = table, []

    def add(self, row: Row) -> None:
        self._held.append(row)
        self.count += 1
        if len(self._held) == BLOCK_ROWS:
            self.flush()

    def flush(self) -> None:
        self._table.add(to_arrow(self._held))
        self._held = []


def write_rows(path: Path, rows: Iterable[Row], *, key: str | None = "id") -> int:
    """Write rows as one Parquet table sorted by id; returns how many. Arguments and errors are those of rows_writer."""
    with rows_writer(path, key=key) as writer:
        for row in rows:
            writer.add(row)
    return writer.count


@contextlib.contextmanager
def table_writer(path: Path, schema: pa.Schema, *, key: str | None, unique: bool = False) -> Iterator[SortedTable]:
    """Any table, sorted by a column of text, to add parts to; it takes path's place when the block ends well.

    Raises UserError on a repeated key where keys are to be unique.
    """
    with _aside(path) as aside:
        with SortedTable(aside, schema, key=key) as table:
            yield table
        if unique and table.repeated is not None:
            raise UserError(f"{path}: {key} {table.repeated!r} occurs twice; {key}s must be unique within a table")


def write_table(path: Path, table: pa.Table) -> None:
    """Write any Arrow table, deterministically and atomically."""
    write_aside(path, lambda aside: pq.write_table(table, aside, compression="zstd"))


def read_table(path: Path) -> pa.Table:
    """Read any Parquet table whole; raises UserError where it is missing or broken."""
    with readable(path), pq.ParquetFile(path) as file:
        check_claims(path, file)
        table = file.read()
        check_count(path, file, table.num_rows)
        return table


def read_parts(path: Path, schema: pa.Schema, *, may_be_null: Collection[str]) -> Iterator[pa.RecordBatch]:
    """The columns of a schema of any Parquet table, so many rows at a time that memory stays flat.

    Raises as read_table does, and where a part is not of this schema; may_be_null is that of table_checks.conform.
    """
    for part in _parts(path, schema.names):
        yield from conform(path, pa.Table.from_batches([part]), schema, may_be_null=may_be_null).to_batches()


def stream_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of any Parquet file, so many at a time that memory stays flat; raises as read_table does."""
    for part in _parts(path, None):
        with readable(path):
            records = records_of(part)
        yield from records


def _parts(path: Path, columns: Sequence[str] | None) -> Iterator[pa.RecordBatch]:
    with readable(path):
        file = pq.ParquetFile(path, buffer_size=BUFFER_BYTES)
    with file:
        with readable(path):
            check_claims(path, file)
            parts = file.iter_batches(BLOCK_ROWS, columns=columns)
        count = 0
        while True:
            with readable(path):
                if (part := next(parts, None)) is None:
                    check_count(path, file, count)
                    return
            count += len(part)
            yield part


@contextlib.contextmanager
def readable(path: Path) -> Iterator[None]:
    """What is wrong with a Parquet file that the block reads, as a message to the user."""
    if not Path(path).is_file():
        raise Missing(path, "table")
    try:
        yield
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from error


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Run write on a temporary neighbour of path, then rename it into place."""
    with _aside(path) as aside:
        write(aside)


@contextlib.contextmanager
def _aside(path: Path) -> Iterator[Path]:
    """A temporary neighbour of path to write to; it takes path's place when the block ends without an error."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        yield aside
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what writers of path that were killed have left beside it; one that lives keeps its file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp*"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name.rpartition(".tmp")[0].rpartition(".")[2]), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)
