"""Readers of the project's own tables and stores: rows, verdicts, reference log-probabilities, SQLite files."""

from __future__ import annotations

import contextlib
import io
import json
import sqlite3
import tempfile
from pathlib import Path
from random import Random

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise import rows as tables
from rankwise.budget import Budget
from rankwise.ranking import rank
from rankwise.store import Store
from rankwise.types import Answer, Message, Row, text_prompt
from rankwise.verdicts import SCHEMA, Verdict, read_verdicts, texts_digest
from tasks.scored_rows import read_reference

from . import arrow, octets, trees
from .law import Files, holds, reader

ROWS = [
    Row(id="a", prompt=text_prompt("The film"), answers=(Answer(text=" was.", rank=0), Answer(text=" is.", rank=1))),
    Row(
        id="b",
        prompt=(Message(role="user", content="Hi"),),
        answers=(Answer(text="x", token_ids=(1, 2), logps=(-0.5, -1.0), seed=7, finish_reason="stop"),),
        meta={"split": "train", "label": 1},
    ),
]
_WHOLE: dict[str, bytes] = {}


def _rows(random: Random) -> Files:
    if "rows" not in _WHOLE:
        with tempfile.TemporaryDirectory() as made:
            tables.write_rows(Path(made) / "rows.parquet", ROWS)
            _WHOLE["rows"] = (Path(made) / "rows.parquet").read_bytes()
    return {"rows.parquet": _spoilt_table(random, _WHOLE["rows"])}


def _spoilt_table(random: Random, data: bytes) -> bytes:
    kind = random.randrange(4)
    if kind == 0:
        return octets.spoilt(random, data, data)
    table = pq.read_table(io.BytesIO(data))
    if kind == 1:
        return arrow.of_table(random, table)
    changed = trees.changed(random, table.to_pylist())
    try:  # in the types of the table where they fit, else in those that the values ask for
        table = pa.Table.from_pylist(changed, schema=table.schema if random.random() < 0.7 else None)
    except (pa.ArrowException, ValueError, TypeError, AttributeError, OverflowError, LookupError):
        return arrow.of_table(random, table)
    out = io.BytesIO()
    try:
        pq.write_table(table, out)
    except pa.ArrowException:
        return octets.spoilt(random, data, data)
    return out.getvalue()


def _read_rows(folder: Path) -> None:
    found = tables.read_rows(folder / "rows.parquet")
    holds(len(found) == pq.ParquetFile(folder / "rows.parquet").metadata.num_rows, "rows came to nothing")
    for row in found:
        holds(isinstance(row.id, str) and isinstance(row.meta, dict), "a row without an id")
        holds(all(isinstance(m.content, str) and isinstance(m.role, str) for m in row.prompt), "a turn that is none")
        holds(all(isinstance(a.text, str) for a in row.answers), "an answer without a text")
        holds(all(a.rank is None or type(a.rank) is int for a in row.answers), "a rank that is none")
        holds(all(type(i) is int for a in row.answers for i in a.token_ids or ()), "token ids that are none")
    tables.write_rows(folder / "again.parquet", found)
    holds(
        repr(tables.read_rows(folder / "again.parquet")) == repr(sorted(found, key=lambda row: row.id)), "not the same"
    )


def _verdicts(random: Random) -> Files:
    if "verdicts" not in _WHOLE:
        texts = texts_digest(ROWS[0].prompt, [" was.", " is."])
        told = {"row_id": "a", "judge": "j", "identity": "i", "texts": texts, "sample": 0, "attempts": 1, "mass": 1.0}
        more = {
            "reason": "",
            "raw": "A",
            "prompt_tokens": 3,
            "completion_tokens": 1,
            "answered": True,
            "orderless": False,
        }
        record = {**told, "shown": [0, 1], "values": [1.0, 0.0], "said": "A", **more}
        turned = {**record, "shown": [1, 0], "texts": texts_digest(ROWS[0].prompt, [" is.", " was."]), "values": None}
        out = io.BytesIO()
        pq.write_table(pa.Table.from_pylist([record, turned], schema=SCHEMA), out)
        _WHOLE["verdicts"] = out.getvalue()
    return {"verdicts.parquet": _spoilt_table(random, _WHOLE["verdicts"])}


def _read_verdicts(folder: Path) -> None:
    found = read_verdicts(folder / "verdicts.parquet", {row.id: row for row in ROWS})
    count = pq.ParquetFile(folder / "verdicts.parquet").metadata.num_rows
    holds(sum(map(len, found.values())) == count, "verdicts came to nothing")
    for row in ROWS:
        mine: list[Verdict] = found.get(row.id, [])
        judged = rank(row, mine, tie_below=0.1)
        holds(len(judged.row.answers) + judged.unjudged == len(row.answers), "answers came to nothing")


def _reference(random: Random) -> Files:
    if "reference" not in _WHOLE:
        meta = {"reference": "w", "precision": "fp32", "max_prompt_tokens": "0", "max_answer_tokens": "0"}
        table = pa.table({"id": ["a", "b"], "key": ["k", "l"], "logps": [[-1.0, -2.0], [-3.0]]})
        out = io.BytesIO()
        pq.write_table(table.replace_schema_metadata(meta), out)
        _WHOLE["reference"] = out.getvalue()
    return {"reference.parquet": _spoilt_table(random, _WHOLE["reference"])}


def _read_reference(folder: Path) -> None:
    meta, known = read_reference(folder / "reference.parquet")
    holds(all(isinstance(meta[name], int) for name in ("max_prompt_tokens", "max_answer_tokens")), "no limits")
    for row_id, (key, logps) in known.items():
        holds(isinstance(row_id, str) and isinstance(key, str), "a row without a key")
        holds(all(type(logp) is float for logp in logps), "log-probs that are none")


def _base(name: str) -> bytes:
    """A SQLite file as the project writes it."""
    if name not in _WHOLE:
        with tempfile.TemporaryDirectory() as made:
            path = Path(made) / name
            if name == "spending.sqlite":
                base: Budget | Store = Budget(path)
                base.reserve(10)
                base.settle(10, prompt=4, completion=3)
                base.first_seen("j", "m")
            else:
                base = Store(path)
                base.put_many({"a": {"values": [1.5]}, "b": None, "c": "text"})
            base._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            base._db.execute("PRAGMA journal_mode = DELETE")
            base._db.close()
            _WHOLE[name] = path.read_bytes()
    return _WHOLE[name]


def _database(random: Random, name: str, statements: tuple[str, ...]) -> Files:
    """A SQLite file, with some of its values changed or its bytes spoilt."""
    data = _base(name)
    if random.random() < 0.6:
        with contextlib.closing(sqlite3.connect(":memory:", isolation_level=None)) as db:
            db.deserialize(data)
            value = random.choice((None, 1, -1, 2**62, 1.5, "x", b"\xff", "[1", "[" * 3000, '"\\ud800"', ""))
            statement = random.choice(statements)
            with contextlib.suppress(sqlite3.Error):
                db.execute(statement, (value,) if "?" in statement else ())
            data = db.serialize()
    return {name: data if random.random() < 0.5 else octets.spoilt(random, data, data)}


_OF_STORE = (
    *("UPDATE rows SET value = ?", "UPDATE rows SET key = ?", "DROP TABLE rows"),
    *("ALTER TABLE rows RENAME COLUMN value TO v", "DELETE FROM rows"),
)
_OF_BUDGET = (
    *("UPDATE spending SET prompt = ?", "UPDATE spending SET charged = ?", "UPDATE first_seen SET model = ?"),
    *("DROP TABLE spending", "INSERT INTO spending (account, prompt) VALUES ('RANKWISE_JUDGE', ?)"),
)


def _read_store(folder: Path) -> None:
    with Store(folder / "store.sqlite") as store:
        holds(len(store) >= 0, "no count")
        found = store.get_many(["a", "b", "c", "d"])
        json.dumps(found)
        holds(store.held(found) == set(found), "rows that are and are not there")
        store.put_many({"d": [1]})
        holds(store.get_many(["d"]) == {"d": [1]} or "d" in found, "a row that was put is not there")


def _read_budget(folder: Path) -> None:
    budget = Budget(folder / "spending.sqlite", limit=1000)
    spent = budget.spent()
    counts = (spent.requests, spent.prompt, spent.completion, spent.charged, spent.tokens)
    holds(all(type(count) is int and count >= 0 for count in counts), "counts that are none")
    holds(isinstance(budget.first_seen("j", "m"), str), "a model that is none")
    if budget.reserve(10):
        holds(budget.spent().tokens >= spent.tokens + 10, "a request that was not charged")
        budget.settle(10, prompt=1, completion=1)


reader(name="rows", make=_rows, read=_read_rows, weight=0.7)
reader(name="verdicts", make=_verdicts, read=_read_verdicts, weight=0.7)
reader(name="reference", make=_reference, read=_read_reference, weight=0.6)
reader(name="store", make=lambda r: _database(r, "store.sqlite", _OF_STORE), read=_read_store, weight=0.2)
reader(name="budget", make=lambda r: _database(r, "spending.sqlite", _OF_BUDGET), read=_read_budget, weight=0.2)
