"""What asking a server may cost, and what it has cost: tokens, counted over all runs of a project.

A request is charged before it is sent, with the most tokens that it can come to, and settled when the server has told
what it came to. The charge is on disk before the request leaves. So whatever is killed, and however often, and however
many processes ask at once, the server never counts more than the limit; a request whose cost was never told stays
charged with the most that it can have been.

The same file keeps which model first answered as a judge, since a name may come to stand for another one.
"""

from __future__ import annotations

import contextlib
import math
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rankwise.store import BUSY_TIMEOUT_S, share
from rankwise.types import UserError

_TABLES = """
CREATE TABLE IF NOT EXISTS spending (
    run INTEGER PRIMARY KEY, account TEXT NOT NULL, requests INTEGER NOT NULL DEFAULT 0,
    prompt INTEGER NOT NULL DEFAULT 0, completion INTEGER NOT NULL DEFAULT 0, charged INTEGER NOT NULL DEFAULT 0
);
CREATE TABLE IF NOT EXISTS first_seen (judge TEXT PRIMARY KEY, model TEXT NOT NULL);
"""


@dataclass(frozen=True, kw_only=True)
class Spending:
    """What was asked of a server, and what it took."""

    requests: int  # sendings, those that came to nothing too
    prompt: int  # tokens that the server told
    completion: int
    charged: int  # tokens, at most, of requests under way and of those whose cost was never told
    money: float  # of the tokens that were told, at the prices given

    @property
    def tokens(self) -> int:
        """All that may have been spent."""
        return self.prompt + self.completion + self.charged


class Budget:
    """An account of tokens, with a limit or without. Several threads may use it, one at a time.

    Example:
        budget = Budget.from_environment("RANKWISE_JUDGE", os.environ, path=Path(".rankwise/stores/spending.sqlite"))
        if budget.reserve(900):
            budget.settle(900, prompt=310, completion=25)

    Args:
        path: where it is kept; None: in memory, for this one object.
        account: what is counted together: the prefix of a server's variables.
        limit: tokens; None: as many as it takes.
        price_in, price_out: money a million tokens, of prompts and of replies.
    """

    def __init__(
        self,
        path: Path | None = None,
        *,
        account: str = "RANKWISE_JUDGE",
        limit: int | None = None,
        price_in: float = 0.0,
        price_out: float = 0.0,
    ):
        self.account, self.limit, self._prices = account, limit, (price_in, price_out)
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
        with self._told():
            self._db = sqlite3.connect(
                path or ":memory:", timeout=BUSY_TIMEOUT_S, isolation_level=None, check_same_thread=False
            )  # without a level, transactions are begun by hand
            share(self._db)
            # A killed process loses nothing that it wrote, and a request is not worth a wait for the disk.
            self._db.execute("PRAGMA synchronous = NORMAL")
            self._db.executescript(_TABLES)
        self._run: int | None = None  # a line of its own, from the first request on

    @classmethod
    def from_environment(cls, prefix: str, environment: Mapping[str, str], *, path: Path) -> Budget:
        """{prefix}_BUDGET_TOKENS, _PRICE_IN and _PRICE_OUT; raises UserError."""
        limit = _number(environment, f"{prefix}_BUDGET_TOKENS", math.inf)
        price_in, price_out = prices(prefix, environment)
        whole = None if limit == math.inf else int(limit)
        return cls(path, account=prefix, limit=whole, price_in=price_in, price_out=price_out)

    def reserve(self, tokens: int) -> bool:
        """Charge a request with the most that it can take; False, and nothing is charged, where that is too much."""
        with self._transaction():
            if self.limit is not None and self.spent().tokens + tokens > self.limit:
                return False
            if self._run is None:
                self._run = self._db.execute("INSERT INTO spending (account) VALUES (?)", (self.account,)).lastrowid
            self._db.execute(
                "UPDATE spending SET requests = requests + 1, charged = charged + ? WHERE run = ?", (tokens, self._run)
            )
            return True

    def settle(self, tokens: int, *, prompt: int, completion: int) -> None:
        """Replace the charge of a request by what it took."""
        with self._transaction():
            self._db.execute(
                "UPDATE spending SET charged = charged - ?, prompt = prompt + ?, completion = completion + ? "
                "WHERE run = ?",
                (tokens, prompt, completion, self._run),
            )

    def spent(self, *, now: bool = False) -> Spending:
        """What this account was used for: by all runs, or by this one alone."""
        only, value = ("run = ?", self._run) if now else ("account = ?", self.account)
        with self._told():
            found = self._db.execute(
                "SELECT sum(requests), sum(prompt), sum(completion), sum(charged) FROM spending WHERE " + only, (value,)
            ).fetchone()
        requests, prompt, completion, charged = (count or 0 for count in found)  # sums of no line are NULL
        if not all(isinstance(count, int) and count >= 0 for count in (requests, prompt, completion, charged)):
            raise self._damaged("its counts are none")
        money = (prompt * self._prices[0] + completion * self._prices[1]) / 1e6
        return Spending(requests=requests, prompt=prompt, completion=completion, charged=charged, money=money)

    def first_seen(self, judge: str, model: str) -> str:
        """The model that first answered as this judge: this one, unless another one did before."""
        with self._transaction():
            self._db.execute("INSERT OR IGNORE INTO first_seen VALUES (?, ?)", (judge, model))
            found = self._db.execute("SELECT model FROM first_seen WHERE judge = ?", (judge,)).fetchone()
            if found is None or not isinstance(found[0], str):
                raise self._damaged(f"it does not keep who answered as {judge}")
            return found[0]

    def has_seen(self, judge: str) -> bool:
        """Whether any model has answered as this judge."""
        with self._told():
            return bool(self._db.execute("SELECT 1 FROM first_seen WHERE judge = ?", (judge,)).fetchone())

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        """All or nothing, and nobody else's in between."""
        with self._told():
            self._db.execute("BEGIN IMMEDIATE")
            try:
                yield
            except BaseException:
                self._db.execute("ROLLBACK")
                raise
            self._db.execute("COMMIT")

    @contextlib.contextmanager
    def _told(self) -> Iterator[None]:
        try:
            yield
        except (sqlite3.DatabaseError, UnicodeDecodeError) as error:  # the latter: SQLite quotes bytes of the file
            raise self._damaged(error) from error

    def _damaged(self, why: object) -> UserError:
        return UserError(
            f"{self._path}: not usable as an account of tokens ({why}); if the disk is full, make room and run again; "
            "if the file is damaged, move it away and lower the budget by what was spent"
        )


def prices(prefix: str, environment: Mapping[str, str]) -> tuple[float, float]:
    """Money a million tokens, of prompts and of replies: {prefix}_PRICE_IN and _PRICE_OUT; raises UserError."""
    return _number(environment, f"{prefix}_PRICE_IN", 0.0), _number(environment, f"{prefix}_PRICE_OUT", 0.0)


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "").strip().replace("_", "")
    if not text:
        return default
    with contextlib.suppress(ValueError):
        if 0 <= float(text) < math.inf:
            return float(text)
    raise UserError(f"{name} is {environment[name]!r}; it has to be a number, 0 or more")
