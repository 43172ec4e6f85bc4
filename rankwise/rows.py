"""Tables of rows on disk: one Parquet file a table, sorted by id, the same bytes for the same rows.

Files are written aside and renamed, so a killed writer leaves the old table or the new one, never half.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise import json_text
from rankwise.table_checks import REBUILD, check_claims, check_count, conform, records_of
from rankwise.types import Answer, Message, Missing, Row, UserError

_ANSWER = pa.struct(
    [
        ("text", pa.string()),
        ("rank", pa.int32()),
        ("strength", pa.float64()),
        ("strength_se", pa.float64()),
        ("source", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("seed", pa.int64()),
        ("logps", pa.list_(pa.float32())),
        ("engine", pa.string()),
    ]
)
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))),
        ("answers", pa.list_(_ANSWER)),
        ("meta", pa.string()),  # a JSON object
    ]
)
_MAY_BE_NULL = {
    "meta",
    *(f"answers[].{name}" for name in ("rank", "strength", "strength_se", "token_ids", "finish_reason", "seed")),
    *("answers[].logps", "answers[].engine"),
}


def write_rows(path: Path, rows: Iterable[Row]) -> int:
    """Write rows as one Parquet table sorted by id; returns how many.

    Raises UserError on a repeated id: a table is keyed by it.
    """
    ordered = sorted(rows, key=lambda row: row.id)
    for before, after in itertools.pairwise(ordered):
        if before.id == after.id:
            raise UserError(f"{path}: id {after.id!r} occurs twice; ids must be unique within a table")
    records = [{**asdict(row), "meta": json.dumps(row.meta, sort_keys=True, ensure_ascii=False)} for row in ordered]
    write_table(path, pa.Table.from_pylist(records, schema=SCHEMA))
    return len(ordered)


def read_rows(path: Path) -> list[Row]:
    """Read a table written by write_rows.

    Raises UserError where the file is missing or is not such a table.
    """
    table = read_table(path)
    missing = [name for name in SCHEMA.names if name not in table.column_names]
    if not missing:
        kind = table.schema.field("answers").type
        parts = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
        held = {part.name for part in parts} if parts is not None and pa.types.is_struct(parts) else set()
        missing = [f"answers.{part.name}" for part in _ANSWER if part.name not in held]
    if missing:
        raise UserError(
            f"{path}: columns {missing} are missing (found {table.column_names}); "
            "this is not a table of rows: rebuild it with the stage that makes it"
        )
    table = conform(path, table, SCHEMA, may_be_null=_MAY_BE_NULL)
    rows = [_row(path, number, record) for number, record in enumerate(table.to_pylist(), 1)]
    seen = set()
    for row in rows:
        if row.id in seen:
            raise UserError(f"{path}: id {row.id!r} occurs twice; ids must be unique within a table: {REBUILD}")
        seen.add(row.id)
    return rows


def write_table(path: Path, table: pa.Table) -> None:
    """Write any Arrow table, deterministically and atomically."""
    write_aside(path, lambda aside: pq.write_table(table, aside, compression="zstd"))


def read_table(path: Path) -> pa.Table:
    """Read any Parquet table; raises UserError where it is missing or broken."""
    if not Path(path).is_file():
        raise Missing(path, "table")
    try:
        with pq.ParquetFile(path) as file:
            check_claims(path, file)
            table = file.read()
            check_count(path, file, table.num_rows)
            return table
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); rebuild it") from error


def stream_records(path: Path) -> Iterator[dict[str, Any]]:
    """The records of any Parquet file, a batch of them in memory at a time; raises UserError where it is broken."""
    try:
        with pq.ParquetFile(path) as file:
            check_claims(path, file)
            count = 0
            for batch in file.iter_batches(1024):
                count += batch.num_rows
                yield from records_of(batch)
            check_count(path, file, count)
    except UserError:
        raise
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from None


def write_json(path: Path, value: object) -> None:
    """Write JSON with sorted keys, atomically."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False, allow_nan=False) + "\n"
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


def write_aside(path: Path, write: Callable[[Path], object]) -> None:
    """Run write on a temporary neighbour of path, then rename it into place."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    _clear_leftovers(path)
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        write(aside)
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def _clear_leftovers(path: Path) -> None:
    """Remove what writers of path that were killed have left beside it; one that lives keeps its file."""
    for left in path.parent.glob(f".{glob.escape(path.name)}.*.tmp"):
        with contextlib.suppress(ValueError, PermissionError):
            try:
                os.kill(int(left.name.split(".")[-2]), 0)
            except ProcessLookupError:
                left.unlink(missing_ok=True)


def _row(path: Path, number: int, record: dict) -> Row:
    return Row(
        id=record["id"],
        prompt=tuple(Message(**message) for message in record["prompt"]),
        answers=tuple(_answer(answer) for answer in record["answers"]),
        meta=_meta(path, number, record["meta"] or "{}"),
    )


def _meta(path: Path, number: int, text: str) -> dict[str, Any]:
    try:
        meta = json_text.parse(text)
    except json_text.NotJson as error:
        raise UserError(f"{path} row {number}: meta is no JSON ({error}): {REBUILD}") from None
    if not isinstance(meta, dict):
        raise UserError(f"{path} row {number}: meta is {text[:60]!r}, no JSON object: {REBUILD}")
    return meta


def _answer(record: dict) -> Answer:
    lists = {name: None if record[name] is None else tuple(record[name]) for name in ("token_ids", "logps")}
    return Answer(**{**record, **lists})
