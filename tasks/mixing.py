"""Rows from the corpus or from files -> the six tables of stage prompts: sampling, holding out, pairing.

Every choice is a draw: a hash of the seed, a purpose and an id. So it does not depend on the order of a file, and
one more row in a file changes at most one of those taken before.
"""

from __future__ import annotations

import hashlib
import heapq
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rankwise.corpus import draft, opening
from rankwise.types import Answer, Row, UserError, show_prompt, text_prompt
from tasks.formats import HUB
from tasks.params import below, build, default_of
from tasks.sources import File, read_examples, same
from tasks.tables import JUDGED, TRAINED, keys

Tables = dict[str, list[Row]]
Counts = dict[str, Counter[str]]

FURTHEST = 8  # the corpus is read up to this many times as far as the sizes ask, in search of new openings


def from_corpus(sizes: dict[str, int], *, seed: int, opening_words: int) -> tuple[Tables, Counts]:
    """The tables of the embedded corpus; sizes are rows a table (pairs for the labelled ones).

    Raises UserError where the corpus has too few different openings for the prompts asked for.
    """
    if opening_words < 1:
        raise UserError("prompts.opening_words: at least 1 is needed with source: embedded, found 0")
    counts: Counts = {name: Counter() for name in sizes}
    pool = _corpus_rows(FURTHEST * 2 * sum(sizes.values()), seed, opening_words)
    tables = {"eval": _take(pool, sizes["eval"], unlike=set(), once=True)}
    held = {show_prompt(row.prompt) for row in tables["eval"]}
    tables["rollout"] = _take(pool, sizes["rollout"], unlike=held, once=True)
    for name in JUDGED:
        tables[name] = _take_pairs(pool, sizes[name], unlike=held)
    tables["sft"] = _take(pool, sizes["sft"], unlike=held, once=False)
    if all(len(tables[name]) == size for name, size in sizes.items()):
        return tables, counts
    found = ", ".join(f"{name} {len(tables[name])} of {size} rows" for name, size in sizes.items())
    raise UserError(
        f"prompts.embedded: too few different openings of {opening_words} words ({found}); "
        "raise prompts.opening_words or lower the sizes of rollout and eval"
    )


def from_files(
    given: dict[str, dict],
    source: Path,
    *,
    seed: int,
    opening_words: int,
    eval_share: float,
    log: Callable[[str], None],
) -> tuple[Tables, Counts]:
    """The tables of the user's own files; given maps roles to entries of prompts.files.

    Raises UserError for bad files and for rows that a role cannot use.
    """
    if not given:
        raise UserError("prompts.files: no role has a file; give at least one, such as sft: {path: my.jsonl}")
    files = {role: _file(role, entry) for role, entry in given.items()}
    counts: Counts = {role: Counter() for role in files}
    raw = {role: _read(role, file, source, seed, opening_words, counts[role], log) for role, file in files.items()}

    origin = next((role for role in ("rollout", "preferences") if role in raw), None)
    if "eval" not in raw and origin and eval_share:
        raw["eval"], counts["eval"] = _held_out(raw[origin], seed, eval_share), Counter()
    if "labelled_test" not in raw and "labelled" in raw and eval_share:
        raw["labelled_test"], counts["labelled_test"] = _held_out(raw["labelled"], seed, eval_share), Counter()
        files["labelled_test"] = files["labelled"]
    for role in TRAINED:
        for test in ("eval", "labelled_test") if role == "labelled" else ("eval",):
            if role in raw and test in raw:
                raw[role] = _without(raw[role], raw[test], counts[role], f"shares a prompt or group with {test}")
    return {role: _fit(role, rows, files.get(role), seed, counts[role]) for role, rows in raw.items()}, counts


# Reading -------------------------------------------------------------------------------------------------------------


def _file(role: str, entry: dict) -> File:
    defaults = {name: default_of(spec) for name, spec in File.__dataclass_fields__.items()}
    file = build(File, {**defaults, **entry}, where=f"prompts.files.{role}")
    if not file.path:
        raise UserError(f"prompts.files.{role}: path is missing; add path: a file under data/source")
    return file


def _read(
    role: str, file: File, source: Path, seed: int, opening_words: int, left_out: Counter[str], log: Callable
) -> list[Row]:
    hub = file.path.startswith(HUB)
    path = file.path if hub else below(source, file.path, where=f"prompts.files.{role}.path")
    if hub and "@" not in file.path:
        log(f"{role}: {file.path} has no @revision: the data may change from run to run")
    rows: Iterable[Row] = read_examples(path, file, opening_words=opening_words, left_out=left_out)
    if not file.limit:
        return list(rows)
    read = Counter[str]()
    taken = heapq.nsmallest(file.limit, _counted(rows, read), key=lambda row: _draw(seed, f"limit {role}", row.id))
    if over := read["rows"] - len(taken):
        left_out["over the limit"] += over
    return taken


def _counted(rows: Iterable[Row], read: Counter[str]) -> Iterator[Row]:
    for row in rows:
        read["rows"] += 1
        yield row


def _corpus_rows(count: int, seed: int, opening_words: int) -> Iterator[Row]:
    # One by one, not reviews(count): how many are needed shows only as openings turn out to be new.
    for index in range(count):
        review = draft(seed, index)
        prompt, rest = opening(review.text, opening_words)
        meta = {"label": "positive" if review.score > 0 else "negative", "rating": round(5.5 + 4.5 * review.score)}
        own = Answer(text=rest, source="dataset")
        yield Row(id=f"review-{index:06d}", prompt=text_prompt(prompt), answers=(own,), meta=meta)


def _take(pool: Iterator[Row], count: int, *, unlike: set[str], once: bool) -> list[Row]:
    """The next rows of the pool whose prompt is not in `unlike`; once: and no two prompts alike."""
    taken: list[Row] = []
    seen = set(unlike)
    while len(taken) < count and (row := next(pool, None)) is not None:
        prompt = show_prompt(row.prompt)
        if prompt not in seen:
            taken.append(row)
            seen |= {prompt} if once else set()
    return taken


def _take_pairs(pool: Iterator[Row], count: int, *, unlike: set[str]) -> list[Row]:
    """Pairs of neighbours of the pool with different ratings, the better rated text above, no prompt in `unlike`.

    Ratings teach a judge more than the two labels would: how much better, and what a mixed review is worth.
    """
    usable = (row for row in pool if show_prompt(row.prompt) not in unlike)
    pairs: list[Row] = []
    while len(pairs) < count and (first := next(usable, None)) and (second := next(usable, None)):
        if first.meta["rating"] != second.meta["rating"]:
            pairs.append(_pair(*sorted((first, second), key=lambda row: -row.meta["rating"])))
    return pairs


# Holding out ---------------------------------------------------------------------------------------------------------


def _draw(seed: int, purpose: str, key: str) -> int:
    """A number in [0, 2^64) that this key draws for this purpose."""
    return int.from_bytes(hashlib.sha256(f"{seed}\0{purpose}\0{key}".encode()).digest()[:8], "big")


def _held_out(rows: list[Row], seed: int, share: float) -> list[Row]:
    # By group where there is one, else by prompt; the share is exact, so that small data have an eval too.
    groups = sorted({keys(row)[0] for row in rows}, key=lambda key: _draw(seed, "eval", key))
    held = set(groups[: max(1, round(share * len(groups)))])
    return [row for row in rows if keys(row)[0] in held]


def _without(rows: list[Row], held: list[Row], left_out: Counter[str], reason: str) -> list[Row]:
    taken = {key for row in held for key in keys(row)}
    kept = [row for row in rows if taken.isdisjoint(keys(row))]
    if len(kept) < len(rows):
        left_out[reason] += len(rows) - len(kept)
    return kept


# Roles ---------------------------------------------------------------------------------------------------------------


def _fit(role: str, rows: list[Row], file: File | None, seed: int, left_out: Counter[str]) -> list[Row]:
    """Rows as their role needs them."""
    if role == "sft":
        return [_best_alone(row, role) for row in rows]
    if role == "rollout":
        return _each_prompt_once([_best_alone(row, role) if row.answers else row for row in rows], left_out)
    if role == "eval":
        return _each_prompt_once(rows, left_out)
    if role != "preferences" and all(len(row.answers) == 1 for row in rows):
        return _pairs(rows, file.positive, file.negative, seed, left_out)
    ranked = [_ranked(row, role) for row in rows]
    kept = [row for row in ranked if len({answer.rank for answer in row.answers}) > 1]
    if len(kept) < len(ranked):
        left_out["all answers tied"] += len(ranked) - len(kept)
    return kept


def _best_alone(row: Row, role: str) -> Row:
    """A row with its own answer, or the best of a ranking, unranked: what a policy is to imitate."""
    if not row.answers:
        raise UserError(f"prompts.files.{role}: row {row.id!r} is a prompt without an answer; give prompt + completion")
    best = (row.ranked or row.answers)[0]
    return replace(row, answers=(Answer(text=best.text, source="dataset"),))


def _ranked(row: Row, role: str) -> Row:
    if len(row.answers) < 2:
        raise UserError(
            f"prompts.files.{role}: row {row.id!r} has {len(row.answers)} answers, so there is nothing to rank; "
            "give pairs (chosen, rejected) or rankings (answers with rank or score)"
            + ("" if role == "preferences" else ", or texts with a label in every row")
        )
    return row


def _each_prompt_once(rows: list[Row], left_out: Counter[str]) -> list[Row]:
    first: dict[tuple, Row] = {}
    for row in rows:
        first.setdefault(row.prompt, row)
    if len(first) < len(rows):
        left_out["same prompt as another row"] += len(rows) - len(first)
    return list(first.values())


def _pairs(rows: list[Row], positive: int | str, negative: int | str, seed: int, left_out: Counter[str]) -> list[Row]:
    """Texts with labels as pairs for a reward model: no prompt, a positive text above a negative one."""
    sides: dict[bool, list[Row]] = {True: [], False: []}
    for row in sorted(rows, key=lambda row: _draw(seed, "pair", row.id)):
        for side, label in ((True, positive), (False, negative)):
            if same(row.meta.get("label"), label):
                sides[side].append(row)
    better, worse = sides[True], sides[False]
    if not better or not worse:
        found = sorted({str(row.meta.get("label")) for row in rows})[:10]
        raise UserError(
            f"labelled texts: both labels positive: {positive!r} and negative: {negative!r} must occur, found {found}; "
            "set positive and negative to labels of the data"
        )
    for reason, count in (
        ("label neither positive nor negative", len(rows) - len(better) - len(worse)),
        ("text without a partner of the other label", abs(len(better) - len(worse))),
    ):
        if count:
            left_out[reason] += count
    return [_pair(good, bad) for good, bad in zip(better, worse)]


def _pair(better: Row, worse: Row) -> Row:
    """Two whole texts, no prompt before them."""
    answers = (Answer(text=_whole(row), rank=rank, source="dataset") for rank, row in enumerate((better, worse)))
    return Row(id=f"{better.id}|{worse.id}", prompt=text_prompt(""), answers=tuple(answers))


def _whole(row: Row) -> str:
    return show_prompt(row.prompt) + row.answers[0].text
