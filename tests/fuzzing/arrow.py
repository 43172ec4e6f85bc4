"""Parquet files that are spoilt: in their bytes, and in what their columns are."""

from __future__ import annotations

import datetime
import io
from collections.abc import Callable
from random import Random
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from . import octets

# Columns of types that no reader of texts waits for, by their length.
_COLUMNS: tuple[Callable[[int], pa.Array], ...] = (
    lambda n: pa.array([7] * n, pa.int64()),
    lambda n: pa.array([None] * n, pa.null()),
    lambda n: pa.array([1.5] * n),
    lambda n: pa.array([True] * n),
    lambda n: pa.array([b"\xff\xfe"] * n),
    lambda n: pa.array(["text"] * n, pa.large_string()),
    lambda n: pa.array(["text"] * n).dictionary_encode(),
    lambda n: pa.array([datetime.datetime(2026, 11, 28)] * n),
    lambda n: pa.array([2**62] * n, pa.timestamp("us")),
    lambda n: pa.array([2**62] * n, pa.timestamp("us", tz="UTC")),
    lambda n: pa.array([0] * n, pa.timestamp("us", tz="No/Where")),
    lambda n: pa.array([2**31 - 1] * n, pa.date32()),
    lambda n: pa.array([2**62] * n, pa.duration("s")),
    lambda n: pa.array([2**62] * n, pa.time64("ns")),
    lambda n: pa.array([[["a"]]] * n),
    lambda n: pa.array([[("k", "v")]] * n, pa.map_(pa.string(), pa.string())),
    lambda n: pa.array([{"role": "user", "content": None}] * n),
    lambda n: pa.array([[]] * n, pa.list_(pa.string())),
    lambda n: pa.array([[{"text": None, "rank": 1}, None]] * n),
)


def parquet(random: Random, records: list[Any]) -> bytes:
    """A Parquet file of records as far as columns can hold them, or of columns that are others."""
    try:
        table = pa.Table.from_pylist([one for one in records if isinstance(one, dict)])
    except (pa.ArrowException, OverflowError, UnicodeEncodeError, TypeError, ValueError, AttributeError):
        table = pa.table({"prompt": ["a", "b"], "completion": ["c", None]})
    return of_table(random, table)


def of_table(random: Random, table: pa.Table) -> bytes:
    """A Parquet file of a table, whole or spoilt in columns, rows or bytes."""
    kind = random.randrange(8)
    if kind in (0, 1, 2) and table.num_columns:
        table = _columns(random, table)
    elif kind == 3 and table.num_rows:
        table = pa.concat_tables([table, table.slice(random.randrange(table.num_rows))])
    elif kind == 4:
        table = table.replace_schema_metadata({random.choice(("pandas", "ARROW:schema", "huggingface")): "{}"})
    out = io.BytesIO()
    try:
        pq.write_table(table, out, compression=random.choice(("zstd", "none", "snappy")))
    except (pa.ArrowException, ValueError):  # objects without a field, which the format does not have
        out = io.BytesIO(b"PAR1PAR1")
    data = out.getvalue()
    return octets.spoilt(random, data, data) if kind >= 6 else data


def _columns(random: Random, table: pa.Table) -> pa.Table:
    at = random.randrange(table.num_columns)
    name, kind = table.column_names[at], random.randrange(5)
    if kind == 0:
        return table.drop_columns([name])
    if kind == 1:
        return table.append_column(random.choice((name, "id", "more")), table.column(at))
    if kind == 2:
        return table.set_column(at, random.choice(("", " ", "a\x00b", "漢字", "text", "é" * 900)), table.column(at))
    if kind == 3:  # some values missing
        mask = pa.array([random.random() < 0.5 for _ in range(table.num_rows)], pa.bool_())
        gone = pa.compute.if_else(mask, pa.nulls(table.num_rows, table.column(at).type), table.column(at))
        return table.set_column(at, name, gone)
    return table.set_column(at, name, random.choice(_COLUMNS)(table.num_rows))
