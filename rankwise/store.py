"""Row-keyed store: what was costly to compute, kept row by row, so that a rerun pays only for what is missing.

One SQLite file: committed rows survive a kill at any moment, several processes may fill it at once, memory stays flat.
A key is a fingerprint of everything that the value depends on; the first value written under a key stays.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from rankwise import json_text
from rankwise.types import UserError

BUSY_TIMEOUT_S = 60
LOOKUP = 500  # keys a query; SQLite's limit on variables was 999 for long


def share(database: sqlite3.Connection) -> None:
    """Let processes read it while one writes (WAL); SQLite makes none wait for another that is changing to that."""
    until = time.monotonic() + BUSY_TIMEOUT_S
    while True:
        try:
            database.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode != sqlite3.SQLITE_BUSY or time.monotonic() > until:
                raise
        time.sleep(0.01)


class Store:
    """A mapping from fingerprints to JSON values on disk.

    Example:
        with Store(path) as store:
            missing = [key for key in keys if key not in store.get_many(keys)]
            store.put_many({key: compute(key) for key in missing})
    """

    def __init__(self, path: Path):
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._db = sqlite3.connect(self.path, timeout=BUSY_TIMEOUT_S)
            share(self._db)
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS rows (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID"
            )

    def __enter__(self) -> Store:
        return self

    def __exit__(self, *_: object) -> None:
        self._db.close()

    def __len__(self) -> int:
        with self._told():
            return self._db.execute("SELECT count(*) FROM rows").fetchone()[0]

    def get_many(self, keys: Iterable[str]) -> dict[str, Any]:
        """The values of those keys that are there."""
        return {key: self._value(key, text) for key, text in self._select("key, value", keys)}

    def held(self, keys: Iterable[str]) -> set[str]:
        """Those keys that are there."""
        return {key for (key,) in self._select("key", keys)}

    def put_many(self, rows: Mapping[str, Any]) -> None:
        """Add rows in one transaction; on return they survive a kill. A key already there keeps its value."""
        with self._told(), self._db:
            self._db.executemany(
                "INSERT OR IGNORE INTO rows VALUES (?, ?)",
                [(key, json.dumps(value, ensure_ascii=False)) for key, value in rows.items()],
            )

    def _value(self, key: str, text: Any) -> Any:
        try:
            return json_text.parse(text)
        except (json_text.NotJson, TypeError) as error:
            raise UserError(
                f"{self.path}: row {key!r} is damaged ({error}); move the file away: its rows will be computed again"
            ) from None

    def _select(self, columns: str, keys: Iterable[str]) -> Iterator[tuple]:
        for part in _parts(list(keys), LOOKUP):
            marks = ",".join("?" * len(part))
            with self._told():
                found = self._db.execute(f"SELECT {columns} FROM rows WHERE key IN ({marks})", part).fetchall()
            yield from found

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        """Trouble with the file (damaged, locked, disk full) as a message to the user."""
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes bytes of the file
            raise UserError(
                f"{self.path}: not usable as a row store ({error}); if the disk is full, make room and run again; "
                "if the file is damaged, move it away: its rows will be computed again"
            ) from error


def _parts(items: list, size: int) -> Iterator[list]:
    for start in range(0, len(items), size):
        yield items[start : start + size]
