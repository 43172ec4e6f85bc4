"""What was met before: names on disk, each with a note on where; or how many different things there were, counted."""

from __future__ import annotations

import hashlib
import sqlite3
from array import array
from collections.abc import Hashable, Iterable

import numpy as np

from rankwise.types import UserError

CACHE_KIB = 16_384
COUNTED_TOGETHER = 1 << 20  # things whose hashes are held before those alike are dropped


class Seen:
    """Names that were met, each with the note of the first time. Private to the process, and gone with it.

    A name is known by 16 bytes of its hash, so a long one takes no more room than a short one.

    Example:
        seen = Seen()
        seen.first("a", "line 1")  # None: it is new
        seen.first("a", "line 7")  # "line 1"
    """

    def __init__(self, names: Iterable[str] = ()):
        # No file name: SQLite keeps it in memory up to the cache, and beyond in a temporary file without a name.
        self._db = sqlite3.connect("", isolation_level=None)
        self._db.execute(f"PRAGMA cache_size = -{CACHE_KIB}")
        self._db.execute("PRAGMA journal_mode = OFF")
        self._db.execute("PRAGMA synchronous = OFF")
        self._db.execute("CREATE TABLE seen (name BLOB PRIMARY KEY, note TEXT NOT NULL) WITHOUT ROWID")
        self._db.execute("BEGIN")
        for name in names:
            self.add(name)

    def __contains__(self, name: str) -> bool:
        return self.note(name) is not None

    def add(self, name: str, note: str = "") -> bool:
        """Remember a name; False where it was there, and keeps its note."""
        return self._add(_hash(name), note)

    def note(self, name: str) -> str | None:
        """The note of a name; None where it was not met."""
        return self._note(_hash(name))

    def first(self, name: str, note: str) -> str | None:
        """The note of the first time; None where this is it, and the note is kept."""
        key = _hash(name)
        return None if self._add(key, note) else self._note(key)

    def _add(self, key: bytes, note: str) -> bool:
        try:
            return self._db.execute("INSERT OR IGNORE INTO seen VALUES (?, ?)", (key, note)).rowcount == 1
        except sqlite3.OperationalError as error:
            raise UserError(
                f"no room for what was seen before ({error}): some 60 bytes a row are kept in a temporary file; make "
                "room in /var/tmp, or name another folder in SQLITE_TMPDIR"
            ) from error

    def _note(self, key: bytes) -> str | None:
        found = self._db.execute("SELECT note FROM seen WHERE name = ?", (key,)).fetchone()
        return None if found is None else found[0]


class Distinct:
    """Counts different things by their hashes of 64 bits: eight bytes for each different one, and eight MiB beside."""

    def __init__(self) -> None:
        self._known = np.array([], dtype=np.int64)
        self._fresh = array("q")

    def add(self, thing: Hashable) -> None:
        self._fresh.append(hash(thing))
        if len(self._fresh) >= COUNTED_TOGETHER:
            self._merge()

    def __len__(self) -> int:
        self._merge()
        return len(self._known)

    def _merge(self) -> None:
        self._known = np.union1d(self._known, np.frombuffer(self._fresh, dtype=np.int64))
        self._fresh = array("q")


def _hash(name: str) -> bytes:
    return hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
