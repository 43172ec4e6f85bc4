"""What a table has to be before anybody relies on it: Parquet and Arrow data of others, and of disks that failed.

A file can claim what it does not hold, hold other types than its readers take, and lack values that they need. The
readers of rankwise.rows and tasks.formats ask here, part by part, so that nothing here needs a whole table in memory.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rankwise.types import UserError

REBUILD = "rebuild the table with the stage that makes it"
# A file of a few hundred bytes can claim any number of rows of one value, and reading would take as long.
MOST_ROWS_A_BYTE = 64
MANY_ROWS = 2**24


def check_claims(path: Path, file: pq.ParquetFile) -> None:
    """Raise UserError for what a file says of itself and no table of records is."""
    names = file.schema_arrow.names
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise UserError(f"{path}: two columns are called {twice!r}, and a record could keep one of them; rename one")
    rows, size = file.metadata.num_rows, os.stat(path).st_size
    if rows > max(MANY_ROWS, MOST_ROWS_A_BYTE * size):
        raise UserError(f"{path}: claims {rows:,} rows in {size:,} bytes; no readable Parquet file: write it again")


def check_count(path: Path, file: pq.ParquetFile, count: int) -> None:
    """Raise UserError where a file, read to its end, gave another number of rows than it claims."""
    if count != (said := file.metadata.num_rows):
        raise UserError(f"{path}: not a whole Parquet file (it says {said} rows and holds {count}); write it again")


def conform(path: Path, table: pa.Table, schema: pa.Schema, *, may_be_null: Collection[str]) -> pa.Table:
    """The columns of a schema in its types.

    Args:
        table: all of a table or a part of it, with these columns and perhaps others.
        may_be_null: names such as "meta" and "answers[].rank"; nothing else lacks a value.

    Raises UserError where a column holds another type, or nothing in a place that wants a value.
    """
    columns = []
    for field in schema:
        column = table.column(field.name)
        try:
            columns.append(column.cast(field.type))
        except (pa.ArrowException, ValueError) as error:
            raise UserError(f"{path}: column {field.name!r} is {column.type} ({error}): {REBUILD}") from None
    table = pa.table(columns, schema=schema)
    for name in schema.names:
        if hole := next(_holes(name, table.column(name), may_be_null), None):
            raise UserError(f"{path}: {hole} lacks a value that every row has: {REBUILD}")
    return table


def records_of(table: pa.RecordBatch | pa.Table) -> list[dict[str, Any]]:
    """Records as plain values; raises ValueError on a value that has none, such as a date in the year 60000."""
    try:
        return table.to_pylist()
    except (ValueError, OverflowError, LookupError):
        for name, column in zip(table.schema.names, table.columns):
            try:
                column.to_pylist()
            except (ValueError, OverflowError, LookupError) as error:
                raise ValueError(f"column {name!r}, {column.type}: a value that is none: {error}") from None
        raise


def _holes(name: str, values: pa.ChunkedArray, allowed: Collection[str]) -> Iterator[str]:
    if values.null_count and name not in allowed:
        yield name
    if pa.types.is_list(values.type):
        yield from _holes(f"{name}[]", pc.list_flatten(values), allowed)
    elif pa.types.is_struct(values.type):
        for field in values.type:
            yield from _holes(f"{name}.{field.name}", pc.struct_field(values, field.name), allowed)
