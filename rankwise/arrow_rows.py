"""Rows to Arrow tables and back, a part of a table at a time, by columns: what a row costs is a few list slices."""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from rankwise import json_text
from rankwise.types import Answer, Message, Row

_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string())])
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
        ("prompt", pa.list_(_MESSAGE)),
        ("answers", pa.list_(_ANSWER)),
        ("meta", pa.string()),  # a JSON object
    ]
)
_encode = json.JSONEncoder(sort_keys=True, ensure_ascii=False).encode


def to_arrow(rows: Sequence[Row]) -> pa.Table:
    """Rows as a table of SCHEMA, in their order."""
    messages = [message for row in rows for message in row.prompt]
    answers = [answer for row in rows for answer in row.answers]
    columns = [
        pa.array([row.id for row in rows], pa.string()),
        _lists([len(row.prompt) for row in rows], messages, _MESSAGE),
        _lists([len(row.answers) for row in rows], answers, _ANSWER),
        pa.array([_encode(row.meta) if row.meta else "{}" for row in rows], pa.string()),
    ]
    return pa.Table.from_arrays(columns, schema=SCHEMA)


def from_arrow(part: pa.RecordBatch, *, first: int = 1) -> list[Row]:
    """The rows of a part of a table, its answers having at least the fields of SCHEMA.

    Raises ValueError where a row's meta is no JSON object; first is the number of the first row, for the message.
    """
    prompts = _unlisted(part.column("prompt"), lambda flat: map(_message, *_fields(flat, ("role", "content"))))
    answers = _unlisted(part.column("answers"), lambda flat: itertools.starmap(_answer, zip(*_fields(flat, _NAMES))))
    metas = itertools.starmap(_decode, enumerate(values(part.column("meta")), first))
    return [
        Row(id=row_id, prompt=tuple(prompt), answers=tuple(mine), meta=meta)
        for row_id, prompt, mine, meta in zip(values(part.column("id")), prompts, answers, metas)
    ]


def missing_columns(schema: pa.Schema) -> list[str]:
    """What a file's schema lacks to be a table of rows."""
    missing = [name for name in SCHEMA.names if name not in schema.names]
    if missing:
        return missing
    kind = schema.field("answers").type
    parts = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    held = {part.name for part in parts} if parts is not None and pa.types.is_struct(parts) else set()
    return [f"answers.{name}" for name in _NAMES if name not in held]


def values(array: pa.Array) -> list[Any]:
    """An array as Python values, as to_pylist gives them, several times faster."""
    kind = array.type
    if pa.types.is_list(kind):
        return _unlisted(array, values)
    if pa.types.is_string(kind) or not array.null_count:
        return array.to_numpy(zero_copy_only=False).tolist()
    if array.null_count == len(array):
        return [None] * len(array)
    known = array.is_valid().to_numpy(zero_copy_only=False).tolist()
    filled = array.fill_null(False if pa.types.is_boolean(kind) else 0)
    return [value if there else None for value, there in zip(values(filled), known)]


_NAMES = tuple(field.name for field in _ANSWER)


def _lists(lengths: Sequence[int], items: Sequence[Any], kind: pa.StructType) -> pa.ListArray:
    """Lists of so many items each, which are objects with an attribute for each field."""
    fields = list(kind)
    columns = [pa.array([getattr(item, field.name) for item in items], field.type) for field in fields]
    offsets = np.concatenate([[0], np.cumsum(lengths, dtype=np.int64)]).astype(np.int32)
    return pa.ListArray.from_arrays(pa.array(offsets), pa.StructArray.from_arrays(columns, fields=fields))


def _fields(structs: pa.StructArray, names: Iterable[str]) -> list[list[Any]]:
    return [values(structs.field(name)) for name in names]


def _unlisted(array: pa.ListArray, read: Any) -> list[list[Any] | None]:
    """The items of each list; None where there is none."""
    offsets = array.offsets.to_numpy().tolist()
    first = offsets[0] if offsets else 0
    flat = list(read(array.values.slice(first, (offsets[-1] if offsets else 0) - first)))
    found = [flat[start - first : end - first] for start, end in itertools.pairwise(offsets)]
    if not array.null_count:
        return found
    return [one if there else None for one, there in zip(found, array.is_valid().to_numpy(zero_copy_only=False))]


def _message(role: str, content: str) -> Message:
    return Message(role=role, content=content)


def _answer(*fields: Any) -> Answer:
    text, rank, strength, strength_se, source, token_ids, finish_reason, seed, logps, engine = fields
    return Answer(
        text=text,
        rank=rank,
        strength=strength,
        strength_se=strength_se,
        source=source,
        token_ids=None if token_ids is None else tuple(token_ids),
        finish_reason=finish_reason,
        seed=seed,
        logps=None if logps is None else tuple(logps),
        engine=engine,
    )


def _decode(number: int, text: str | None) -> dict[str, Any]:
    if not text or text == "{}":
        return {}
    try:
        meta = json_text.parse(text)
    except json_text.NotJson as error:
        raise ValueError(f"row {number}: meta is no JSON ({error})") from None
    if not isinstance(meta, dict):
        raise ValueError(f"row {number}: meta is {text[:60]!r}, no JSON object")
    return meta
