"""Rows from the corpus or from files -> the six tables of stage prompts: sampling, holding out, pairing.

Every choice is a draw: a hash of the seed, a purpose and an id. So it does not depend on the order of a file, and
one more row in a file changes at most one of those taken before.

Rows pass one by one. A file's are kept on disk while they are looked at again; in memory are their draws, eight bytes
a row.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from rankwise.corpus import draft, opening
from rankwise.rows import RowTable, write_rows
from rankwise.seen import Seen
from rankwise.types import Answer, Row, UserError, show_prompt, text_prompt
from tasks.formats import HUB
from tasks.kept import Kept, draw, in_order_of, noting
from tasks.params import below, build, default_of
from tasks.roles import fit, pair
from tasks.sources import File, read_examples
from tasks.tables import JUDGED, TRAINED, keys

Tables = Iterator[tuple[str, Iterable[Row]]]  # one after another, each to be read to its end before the next
Counts = dict[str, Counter[str]]  # rows left out, by table and reason; complete once the tables are read

FURTHEST = 8  # the corpus is read up to this many times as far as the sizes ask, in search of new openings


def from_corpus(sizes: dict[str, int], *, seed: int, opening_words: int) -> tuple[Tables, Counts]:
    """The tables of the embedded corpus; sizes are rows a table (pairs for the labelled ones).

    Raises UserError where the corpus has too few different openings for the prompts asked for; of the last table, as it
    is read.
    """
    if opening_words < 1:
        raise UserError("prompts.opening_words: at least 1 is needed with source: embedded, found 0")
    return _of_corpus(sizes, seed, opening_words), {name: Counter() for name in sizes}


def _of_corpus(sizes: dict[str, int], seed: int, opening_words: int) -> Tables:
    pool = _corpus_rows(FURTHEST * 2 * sum(sizes.values()), seed, opening_words)
    found, held = Counter[str](), Seen()
    for name, rows in (
        ("eval", _take(pool, sizes["eval"], unlike=Seen(), alike=held)),
        ("rollout", _take(pool, sizes["rollout"], unlike=held, alike=Seen())),
        *((name, _take_pairs(pool, sizes[name], unlike=held)) for name in JUDGED),
        ("sft", _take(pool, sizes["sft"], unlike=held, alike=None)),
    ):
        yield name, _counted(rows, found, name)
    if any(found[name] < size for name, size in sizes.items()):
        told = ", ".join(f"{name} {found[name]} of {size} rows" for name, size in sizes.items())
        raise UserError(
            f"prompts.embedded: too few different openings of {opening_words} words ({told}); "
            "raise prompts.opening_words or lower the sizes of rollout and eval"
        )


def from_files(
    given: dict[str, dict],
    source: Path,
    scratch: Path,
    *,
    seed: int,
    opening_words: int,
    eval_share: float,
    log: Callable[[str], None],
) -> tuple[Tables, Counts]:
    """The tables of the user's own files; given maps roles to entries of prompts.files.

    Args:
        scratch: a folder for rows that are looked at again; to be there until the tables are read.

    Raises UserError for bad files, and as the tables are read for rows that a role cannot use.
    """
    if not given:
        raise UserError("prompts.files: no role has a file; give at least one, such as sft: {path: my.jsonl}")
    files = {role: _file(role, entry) for role, entry in given.items()}
    counts: Counts = {role: Counter() for role in files}
    read = {
        role: _read(role, file, source, scratch, seed, opening_words, counts[role], log) for role, file in files.items()
    }

    origin = next((role for role in ("rollout", "preferences") if role in files), None)
    for test, whole in (("eval", origin), ("labelled_test", "labelled")):
        if test not in files and whole in files and eval_share:
            read[test] = _held_out(*read[whole], eval_share, scratch / test), array("Q")
            files[test], counts[test] = files[whole], Counter()
    raw = {role: Kept(table) for role, (table, _) in read.items()}
    for role in TRAINED:
        for test in ("eval", "labelled_test") if role == "labelled" else ("eval",):
            if role in raw and test in raw:
                raw[role] = raw[role].unlike(raw[test], f"shares a prompt or group with {test}")
    return _fitted(raw, files, seed, counts, scratch), counts


def _fitted(raw: dict[str, Kept], files: dict[str, File], seed: int, counts: Counts, scratch: Path) -> Tables:
    return (
        (role, fit(role, rows, files[role], seed, counts[role], scratch=scratch / role)) for role, rows in raw.items()
    )


# Reading -------------------------------------------------------------------------------------------------------------


def _file(role: str, entry: dict) -> File:
    defaults = {name: default_of(spec) for name, spec in File.__dataclass_fields__.items()}
    file = build(File, {**defaults, **entry}, where=f"prompts.files.{role}")
    if not file.path:
        raise UserError(f"prompts.files.{role}: path is missing; add path: a file under data/source")
    return file


def _read(
    role: str,
    file: File,
    source: Path,
    scratch: Path,
    seed: int,
    opening_words: int,
    left_out: Counter[str],
    log: Callable,
) -> tuple[RowTable, array]:
    """The rows of a file, and what each draws for a place among the held-out ones."""
    hub = file.path.startswith(HUB)
    path = file.path if hub else below(source, file.path, where=f"prompts.files.{role}.path")
    if hub and "@" not in file.path:
        log(f"{role}: {file.path} has no @revision: the data may change from run to run")
    rows = read_examples(path, file, opening_words=opening_words, left_out=left_out)
    if file.limit:
        rows = _limited(rows, role, file.limit, seed, left_out, scratch)
    draws, table = array("Q"), scratch / f"{role}.parquet"
    # By group where there is one, else by prompt.
    write_rows(table, noting(rows, draws, lambda row: draw(seed, "eval", keys(row)[0])), key=None)
    return RowTable(table, key=None), draws


def _limited(
    rows: Iterable[Row], role: str, limit: int, seed: int, left_out: Counter[str], scratch: Path
) -> Iterator[Row]:
    """So many of the rows, those that draw the smallest numbers, by these."""
    draws, whole = array("Q"), scratch / f"{role}.whole"
    draw_of = lambda row: draw(seed, f"limit {role}", row.id)
    write_rows(whole, noting(rows, draws, draw_of), key=None)
    if over := max(0, len(draws) - limit):
        left_out["over the limit"] += over
    last = _smallest(draws, limit)
    return in_order_of(
        (row for row in RowTable(whole, key=None) if draw_of(row) <= last), draw_of, scratch / f"{role}.sorted"
    )


def _counted(rows: Iterable[Row], read: Counter[str], name: str) -> Iterator[Row]:
    for row in rows:
        read[name] += 1
        yield row


def _corpus_rows(count: int, seed: int, opening_words: int) -> Iterator[Row]:
    # One by one, not reviews(count): how many are needed shows only as openings turn out to be new.
    for index in range(count):
        review = draft(seed, index)
        prompt, rest = opening(review.text, opening_words)
        meta = {"label": "positive" if review.score > 0 else "negative", "rating": round(5.5 + 4.5 * review.score)}
        own = Answer(text=rest, source="dataset")
        yield Row(id=f"review-{index:06d}", prompt=text_prompt(prompt), answers=(own,), meta=meta)


def _take(pool: Iterator[Row], count: int, *, unlike: Seen, alike: Seen | None) -> Iterator[Row]:
    """The next rows of the pool whose prompt is not in `unlike`; with alike, no two prompts alike, and it gets them."""
    taken = 0
    while taken < count and (row := next(pool, None)) is not None:
        prompt = show_prompt(row.prompt)
        if prompt not in unlike and (alike is None or alike.add(prompt)):
            taken += 1
            yield row


def _take_pairs(pool: Iterator[Row], count: int, *, unlike: Seen) -> Iterator[Row]:
    """Pairs of neighbours of the pool with different ratings, the better rated text above, no prompt in `unlike`.

    Ratings teach a judge more than the two labels would: how much better, and what a mixed review is worth.
    """
    usable = (row for row in pool if show_prompt(row.prompt) not in unlike)
    taken = 0
    while taken < count and (first := next(usable, None)) and (second := next(usable, None)):
        if first.meta["rating"] != second.meta["rating"]:
            taken += 1
            yield pair(*sorted((first, second), key=lambda row: -row.meta["rating"]))


# Holding out ---------------------------------------------------------------------------------------------------------


def _held_out(rows: RowTable, draws: array, share: float, path: Path) -> RowTable:
    # The share of groups is exact, so that small data have an eval too.
    groups = np.unique(np.array(draws))
    last = _smallest(groups, max(1, round(share * len(groups))))
    write_rows(path, (row for row, mine in zip(rows, draws) if mine <= last), key=None)
    return RowTable(path, key=None)


def _smallest(draws: Iterable[int], count: int) -> int:
    """The largest of the so many smallest; -1 of none."""
    ordered = np.sort(np.asarray(draws, dtype=np.uint64))[:count]
    return int(ordered[-1]) if len(ordered) else -1
