"""Judging: which questions rank the answers of a row, and a reply to each of them, asked for as few times as can be.

A pointwise judge (reward model, Python function) scores each answer by itself. A pairwise judge (a language model) sees
each pair in both orders, because the first place is favoured: preference is half the difference of its two log-odds,
position bias half their sum. Of more than a few answers it sees whole lists first, each answer once in every place, and
then the pairs of the best.

Answers with the same text are never compared. Pointwise and in pairs each of them is asked about for itself, with one
key, so the judge is asked once; in lists the first stands for all.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from rankwise.fingerprint import digest
from rankwise.progress import Progress
from rankwise.rows import RowTable
from rankwise.seen import Seen
from rankwise.store import Store
from rankwise.types import Row, UserError
from rankwise.verdicts import Question, Reply

COMMIT_REPLIES = 64  # replies are put into the store by so many, which is what a kill loses at most …
COMMIT_S = 1.0  # … or when one comes and the last time was so long ago, or none comes
WINDOW_ROWS = 4096  # rows in memory with what is asked about them and replied
READ_TOGETHER = 500  # raw replies taken from the store at once


class Judge(Protocol):
    """Somebody who can be asked. What a judge says is kept as it says it, and read afterwards.

    A judge whose replies depend, in their last bits, on what is computed beside them says in_parts = True. It is asked
    in parts of COMMIT_REPLIES that do not depend on what is known already, so that a run that was killed leaves the
    same bytes in the end.
    """

    name: str  # what tables and pages call it; unique within a panel
    identity: str  # hash of all that its replies depend on: weights, tokenizer, rubric, decoding; not how many samples
    pairwise: bool  # False: asked about one answer at a time
    attempts: int  # times a question may be asked until a reply can be read; 1 where replies are deterministic
    samples: int  # draws of each question; 1 where replies are deterministic

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]] | None]:
        """Yield (index of the question, raw reply as JSON-able dict) in any order, as they come.

        One that others answer for yields None when none has come for a while: what came before is kept then.

        Raises UserError or Unavailable after all that could be answered was yielded.
        """

    def read(self, question: Question, raw: Mapping[str, Any]) -> Reply:
        """The raw reply, read: a pure function, so it can be read again (and better) without asking again."""


def judge_rows(
    judge: Judge, rows: Sequence[Row], store: Store, *, what: str = "verdicts", pairs_up_to: int = 4
) -> tuple[list[Reply], int]:
    """Every reply of judged, in order of the rows; and how many times the judge was asked now."""
    asked = Asked()
    told = judged(judge, rows, store, asked, what=what, pairs_up_to=pairs_up_to)
    return [reply for _, replies in told for reply in replies], asked.now


@dataclass(kw_only=True)
class Asked:
    """How many times a judge was asked, not counting what the store knew."""

    now: int = 0


def judged(
    judge: Judge,
    rows: RowTable | Sequence[Row],
    store: Store,
    asked: Asked,
    *,
    what: str = "verdicts",
    pairs_up_to: int = 4,
) -> Iterator[tuple[Row, list[Reply]]]:
    """Each row with every reply that ranks its answers, in order of the rows, of which WINDOW_ROWS are in memory.

    Raw replies are kept as they come, under key_of: killed anywhere, a rerun asks only what is missing. One that cannot
    be read is asked for again, up to judge.attempts times in all; after that it stays without values.

    Args:
        pairs_up_to: rows of at most so many different answers are compared pair by pair, each pair in both orders. Of
            more, the list is shown in as many rotations as it has answers, then the best so many pair by pair.

    Raises UserError where a reply is no finite number, and what the judge raises.
    """
    paid, left, number = Seen(), iter(rows), 0
    while window := list(itertools.islice(left, WINDOW_ROWS)):
        several = len(rows) > WINDOW_ROWS
        name = f"{what}, rows {number + 1} to {number + len(window)} of {len(rows)}" if several else what
        number += len(window)
        first = [first_questions(row, judge, pairs_up_to=pairs_up_to) for row in window]
        replies, now = _by_row(judge, first, store, name, paid)
        second = [questions_of_the_best(row, mine, pairs_up_to=pairs_up_to) for row, mine in zip(window, replies)]
        if any(second):
            more, again = _by_row(judge, second, store, f"{name} on the best {pairs_up_to}", paid)
            replies, now = [[*mine, *others] for mine, others in zip(replies, more)], now + again
        asked.now += now
        yield from zip(window, replies)


def ask_all(
    judge: Judge, questions: Sequence[Question], store: Store, *, what: str = "verdicts", paid: Seen | None = None
) -> tuple[list[Reply], int]:
    """A reply to each question, in their order; and how many times the judge was asked now. Kept as judge_rows says.

    Args:
        paid: keys whose tokens other replies carry already; those of these replies are added.

    Raises what judge_rows raises.
    """
    paid = Seen() if paid is None else paid
    replies: list[Reply | None] = [None] * len(questions)
    waiting, asked = list(range(len(questions))), 0
    for attempt in range(judge.attempts):
        current = {n: replace(questions[n], attempt=attempt) for n in waiting}
        keys = {n: key_of(judge.identity, question) for n, question in current.items()}
        wanted = {key: current[n] for n, key in keys.items()}
        asked += _ask_missing(judge, wanted, store, what if attempt == 0 else f"{what}, asked again ({attempt})")
        for part in _parts(waiting):
            found = store.get_many({keys[n] for n in part})
            for n in part:
                reply = judge.read(current[n], found[keys[n]])
                replies[n] = _with_costs(reply, replies[n], free=not paid.add(keys[n]))
        waiting = [n for n in waiting if replies[n].values is None]
        if not waiting:
            break
    return replies, asked


def first_questions(row: Row, judge: Judge, *, pairs_up_to: int) -> list[Question]:
    """What is asked about a row whatever the replies: every answer, every pair, or the list in all its rotations."""
    if not judge.pairwise:
        shown = [(place,) for place in range(len(row.answers))]
    elif len({answer.text for answer in row.answers}) <= pairs_up_to:
        shown = _pairs(row, range(len(row.answers)))
    else:
        shown = _rotations(row)
    return [_question(row, places, sample) for sample in range(judge.samples) for places in shown]


def questions_of_the_best(row: Row, replies: Sequence[Reply], *, pairs_up_to: int) -> list[Question]:
    """The pairs of those answers that the lists put first; none where no list was shown, or none had a valid reply."""
    worths: dict[str, list[float]] = defaultdict(list)
    for reply in replies:
        if len(reply.question.answers) > 2 and reply.values is not None:
            mean = sum(reply.values) / len(reply.values)
            for text, value in zip(reply.question.answers, reply.values):
                worths[text].append(value - mean)
    # Equal worths are told apart by the text: the order of the answers in the row must not choose.
    ordered = sorted(worths, key=lambda text: (-math.fsum(worths[text]) / len(worths[text]), digest(text)))
    best = set(ordered[:pairs_up_to])
    places = [place for place, answer in enumerate(row.answers) if answer.text in best]
    samples = sorted({reply.question.sample for reply in replies})
    return [_question(row, pair, sample) for sample in samples for pair in _pairs(row, places)]


def key_of(judge_identity: str, question: Question) -> str:
    """Key of a raw reply in the store: the judge, the exact texts that it is shown, the draw, and nothing else."""
    turns = [[message.role, message.content] for message in question.prompt]
    return digest(judge_identity, turns, question.answers, question.sample, question.attempt)


def _by_row(
    judge: Judge, questions: Sequence[Sequence[Question]], store: Store, what: str, paid: Seen
) -> tuple[list[list[Reply]], int]:
    """ask_all for the questions of each row."""
    replies, asked = ask_all(judge, [question for mine in questions for question in mine], store, what=what, paid=paid)
    ordered = iter(replies)
    return [list(itertools.islice(ordered, len(mine))) for mine in questions], asked


def _ask_missing(judge: Judge, wanted: Mapping[str, Question], store: Store, what: str) -> int:
    """Ask for those keys that the store lacks, so that it holds them all; returns how many those were."""
    held = store.held(wanted)
    if len(held) == len(wanted):
        return 0
    with Progress(what, total=len(wanted), unit="verdict", done=len(held)) as progress:
        if getattr(judge, "in_parts", False):
            for part in _fixed_parts(wanted):
                # Not kept where it ends half-way, or the rest of the part would be computed without it.
                missing = {key: wanted[key] for key in part if key not in held}
                store.put_many(dict(filter(None, _asked(judge, missing, what, progress))))
        else:
            _keep(_asked(judge, {key: wanted[key] for key in wanted if key not in held}, what, progress), store)
    return len(wanted) - len(held)


def _asked(
    judge: Judge, missing: Mapping[str, Question], what: str, progress: Progress
) -> Iterator[tuple[str, dict[str, Any]] | None]:
    """(key, raw reply), as they come; None when none does."""
    keys, questions, invalid = list(missing), list(missing.values()), 0
    for one in judge.ask(questions) if questions else ():
        if one is None:
            yield None
            continue
        index, raw = one
        reply = judge.read(questions[index], raw)
        _check(reply, what)
        invalid += reply.values is None
        yield keys[index], raw
        progress.advance(1, **({"invalid": invalid} if invalid else {}))


def _keep(replies: Iterator[tuple[str, dict[str, Any]] | None], store: Store) -> None:
    """Put replies into the store as they come, and when none comes; all that came is there, whatever ends them."""
    fresh: dict[str, dict[str, Any]] = {}
    committed = time.monotonic()
    try:
        for one in replies:
            fresh.update([one] if one else [])
            late = one is None or time.monotonic() - committed >= COMMIT_S
            if fresh and (late or len(fresh) >= COMMIT_REPLIES):
                store.put_many(fresh)
                fresh, committed = {}, time.monotonic()
    finally:
        store.put_many(fresh)


def _fixed_parts(wanted: Mapping[str, Question]) -> Iterator[Sequence[str]]:
    """Keys of questions alike in length, so many as a commit holds, whatever of them is known already."""
    size = lambda question: sum(map(len, question.answers)) + sum(len(turn.content) for turn in question.prompt)
    ordered = sorted(wanted, key=lambda key: (size(wanted[key]), key))
    for start in range(0, len(ordered), COMMIT_REPLIES):
        yield ordered[start : start + COMMIT_REPLIES]


def _parts(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    """So many at a time that their raw replies, which may be long, are not all in memory."""
    for start in range(0, len(numbers), READ_TOGETHER):
        yield numbers[start : start + READ_TOGETHER]


def _check(reply: Reply, what: str) -> None:
    if reply.values is None or all(map(math.isfinite, reply.values)):
        return
    raise UserError(
        f"{what}: the judge's reply to row {reply.question.row_id!r} is {', '.join(map(str, reply.values))}, which "
        "ranks nothing; a finite number is needed: look at this row, and at the judge's weights or function"
    )


def _with_costs(reply: Reply, before: Reply | None, *, free: bool) -> Reply:
    """A reply with the tokens of the attempts before it; free: its own are counted elsewhere already."""
    tokens = [(0, 0) if free else (reply.prompt_tokens, reply.completion_tokens)]
    tokens += [(before.prompt_tokens, before.completion_tokens)] if before is not None else []
    prompt, completion = map(sum, zip(*tokens))
    return replace(reply, prompt_tokens=prompt, completion_tokens=completion)


def _question(row: Row, places: Sequence[int], sample: int) -> Question:
    texts = tuple(row.answers[place].text for place in places)
    return Question(row_id=row.id, prompt=row.prompt, answers=texts, places=tuple(places), sample=sample)


def _pairs(row: Row, places: Sequence[int]) -> list[tuple[int, int]]:
    return [(i, j) for i, j in itertools.permutations(places, 2) if row.answers[i].text != row.answers[j].text]


def _rotations(row: Row) -> list[tuple[int, ...]]:
    """The different answers in every rotation, so that each stands once in each place.

    They follow one another by a hash of their texts, so that answers in another order lead to the same questions.
    """
    places: dict[str, int] = {}
    for place, answer in enumerate(row.answers):
        places.setdefault(answer.text, place)
    ring = [places[text] for text in sorted(places, key=digest)]
    return [tuple(ring[start:] + ring[:start]) for start in range(len(ring))]
