"""Tables of rows on disk: one Parquet file a table, sorted by id, the same bytes for the same rows.

Files are written aside and renamed, so a killed writer leaves the old table or the new one, never half.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.types import Answer, Message, Row, UserError

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
        held = {part.name for part in table.schema.field("answers").type.value_type}
        missing = [f"answers.{part.name}" for part in _ANSWER if part.name not in held]
    if missing:
        raise UserError(
            f"{path}: columns {missing} are missing (found {table.column_names}); "
            "this is not a table of rows: rebuild it with the stage that makes it"
        )
    return [_row(record) for record in table.to_pylist()]


def write_table(path: Path, table: pa.Table) -> None:
    """Write any Arrow table, deterministically and atomically."""
    write_aside(path, lambda aside: pq.write_table(table, aside, compression="zstd"))


def read_table(path: Path) -> pa.Table:
    """Read any Parquet table; raises UserError where it is missing or broken."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such table; run the stage that makes it first (dvc repro shows which)")
    try:
        return pq.read_table(path)
    except (pa.ArrowInvalid, OSError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); rebuild it") from error


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


def _row(record: dict) -> Row:
    return Row(
        id=record["id"],
        prompt=tuple(Message(**message) for message in record["prompt"]),
        answers=tuple(_answer(answer) for answer in record["answers"]),
        meta=json.loads(record["meta"] or "{}"),
    )


def _answer(record: dict) -> Answer:
    lists = {name: None if record[name] is None else tuple(record[name]) for name in ("token_ids", "logps")}
    return Answer(**{**record, **lists})
