"""What a judge is asked and what it says, and the table of it: data/verdicts.parquet, one row a reply.

A question shows one answer (a score is wanted), two (which is better) or more (which order). The table keeps what was
said beside what was read from it, so that every label can be traced to the words that it comes from. Nothing in it
differs from run to run: no seconds, and of answers shown again (copies of a row) only the first carries their tokens.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.arrow_rows import values
from rankwise.fingerprint import digest
from rankwise.rows import read_parts, readable, table_writer
from rankwise.table_checks import REBUILD
from rankwise.types import Message, Row, UserError

LOG3 = math.log(3)  # log-odds of one verdict without probabilities: Anscombe's empirical logit, log((1 + ½) / (0 + ½))
PART = 1024  # verdicts written at once
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"  # what answers are called, in the order shown
SCHEMA = pa.schema(
    [
        ("row_id", pa.string()),
        ("judge", pa.string()),
        ("identity", pa.string()),
        ("texts", pa.string()),
        ("shown", pa.list_(pa.int32())),  # places in the row, in the order shown
        ("sample", pa.int32()),
        ("attempts", pa.int32()),
        ("values", pa.list_(pa.float64())),  # null: no valid reply
        ("mass", pa.float64()),
        ("said", pa.string()),
        ("reason", pa.string()),
        ("raw", pa.string()),
        ("prompt_tokens", pa.int32()),
        ("completion_tokens", pa.int32()),
        ("answered", pa.bool_()),
        ("orderless", pa.bool_()),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Question:
    """One thing asked of a judge. One answer: a score is wanted; two: which is better; more: which order."""

    row_id: str
    prompt: tuple[Message, ...]
    answers: tuple[str, ...]  # texts, in the order shown
    places: tuple[int, ...]  # their places in the row, in the order shown
    sample: int = 0  # number of the draw, where a judge is asked the same several times (temperature > 0)
    attempt: int = 0  # above 0: asked again because earlier replies made no sense

    @property
    def letters(self) -> str:
        """What the answers are called, in the order shown: "AB", "ABCDE"; UserError for more than the alphabet has."""
        if len(self.answers) > len(LETTERS):
            raise UserError(
                f"row {self.row_id!r} has {len(self.answers)} answers with different texts, and a list that a judge is "
                f"shown can have {len(LETTERS)}; give it fewer (rollouts.k)"
            )
        return LETTERS[: len(self.answers)]


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a judge said to a question, read from its raw reply; the raw one is kept beside it."""

    question: Question  # as last asked
    values: tuple[float, ...] | None  # nats, one an answer shown; None: no attempt gave a valid reply
    # One answer: (score,). Two: log-odds that the first is better = values[0] - values[1]. More: log-worths.
    # A verdict without probabilities: see values_of.
    mass: float = 1.0  # probability of the verdict tokens together, where there are any
    said: str = ""  # the verdict as the judge put it: "A", "B", "tie", "C > A = B"; "" for scores
    reason: str = ""  # the judge's own reason; of an invalid reply: why it could not be read
    raw: str = ""  # the reply itself (JSON or text), unread
    prompt_tokens: int = 0
    completion_tokens: int = 0  # of all attempts together
    controls: int = 0  # control tokens found in what was shown, and written so that they are none
    answered: bool = True  # False: nobody could be asked (a file does not speak of it), which is no unreadable reply
    orderless: bool = False  # given without an order: what was said stands for both orders


@dataclass(frozen=True, kw_only=True, slots=True)
class Verdict:
    """A row of the table: a reply without the texts that it is about."""

    row_id: str
    judge: str  # its name; unique within a panel
    identity: str = ""  # of the judge that said it, Judge.identity; "": not known
    texts: str = ""  # texts_digest of what was shown; "": not known
    shown: tuple[int, ...]  # places in the row, in the order shown
    sample: int
    attempts: int  # times the question was asked
    values: tuple[float, ...] | None  # as in Reply
    mass: float
    said: str
    reason: str
    raw: str
    prompt_tokens: int
    completion_tokens: int
    answered: bool = True  # as in Reply
    orderless: bool = False


def texts_digest(prompt: Sequence[Message], texts: Sequence[str]) -> str:
    """Name of what was shown: a prompt and answers' texts in the order shown, whatever row they stand in."""
    return digest([[turn.role, turn.content] for turn in prompt], list(texts))


def values_of(said: str, letters: str) -> tuple[float, ...]:
    """Log-worths, nats, of a verdict without probabilities: each place above the last is worth LOG3, a tie nothing.

    Args:
        said: "A", "B", "tie" of two answers; "C > A = B" of any number, each letter once.
        letters: what the answers are called, in the order shown.

    Raises ValueError where said is no such verdict.
    """
    if said == "tie":
        return (0.0,) * len(letters)
    if len(letters) == 2 and said in tuple(letters):
        return tuple(LOG3 * (letter == said) for letter in letters)
    groups = [part.split(" = ") for part in said.split(" > ")]
    if sorted(letter for group in groups for letter in group) != sorted(letters):
        raise ValueError(f"{said!r} is no verdict on {letters}")
    worth = {letter: LOG3 * (len(groups) - 1 - n) for n, group in enumerate(groups) for letter in group}
    return tuple(worth[letter] for letter in letters)


def said_of(values: Sequence[float], letters: str) -> str:
    """The verdict that log-worths amount to, in the words of Reply.said: "A", "B", "tie", "C > A = B"."""
    groups: dict[float, list[str]] = {}
    for value, letter in sorted(zip(values, letters), key=lambda pair: (-pair[0], pair[1])):
        groups.setdefault(value, []).append(letter)
    if len(letters) > 2:
        return " > ".join(" = ".join(group) for group in groups.values())
    return "tie" if len(groups) == 1 else next(iter(groups.values()))[0]


def verdict_of(judge: str, identity: str, reply: Reply) -> Verdict:
    """The reply of a judge, by name and identity, as a row of the table."""
    question = reply.question
    return Verdict(
        row_id=question.row_id,
        judge=judge,
        identity=identity,
        texts=texts_digest(question.prompt, question.answers),
        shown=question.places,
        sample=question.sample,
        attempts=question.attempt + 1,
        values=reply.values,
        mass=reply.mass,
        said=reply.said,
        reason=reply.reason,
        raw=reply.raw,
        prompt_tokens=reply.prompt_tokens,
        completion_tokens=reply.completion_tokens,
        answered=reply.answered,
        orderless=reply.orderless,
    )


def write_verdicts(path: Path, replies: Iterable[tuple[str, str, Reply]]) -> int:
    """Write (judge's name, its identity, reply) as one table, sorted by row id, else in the order given; how many."""
    told = (verdict_of(*one) for one in replies)
    with table_writer(path, SCHEMA, key="row_id") as table:
        while part := list(itertools.islice(told, PART)):
            columns = [pa.array([getattr(one, field.name) for one in part], field.type) for field in SCHEMA]
            table.add(pa.Table.from_arrays(columns, schema=SCHEMA))
    return table.rows


def read_verdicts(path: Path, rows: Mapping[str, Row] | None = None) -> dict[str, list[Verdict]]:
    """All verdicts on each row at once, by row id; joined is for tables that may be large.

    Args:
        rows: by id, the rows that were judged: each verdict has to be on texts that stand there, place by place.

    Raises UserError where the file is missing, is no such table, or speaks of other texts than rows hold.
    """
    found: dict[str, list[Verdict]] = {}
    for verdict in _verdicts(path):
        if rows is not None:
            _check(verdict, rows.get(verdict.row_id), path)
        found.setdefault(verdict.row_id, []).append(verdict)
    return found


def joined(path: Path, rows: Iterable[Row]) -> Iterator[tuple[Row, list[Verdict]]]:
    """Each of the rows that were judged, which are sorted by id as the table is, with the verdicts on it.

    Raises what read_verdicts raises.
    """
    by_row = itertools.groupby(_in_order(path), key=lambda verdict: verdict.row_id)
    row_id, verdicts = next(by_row, (None, ()))
    for row in rows:
        if row_id is not None and row_id < row.id:
            break
        mine = []
        if row_id == row.id:
            mine = list(verdicts)
            for verdict in mine:
                _check(verdict, row, path)
            row_id, verdicts = next(by_row, (None, ()))
        yield row, mine
    if row_id is not None:
        _check(next(iter(verdicts)), None, path)


def _in_order(path: Path) -> Iterator[Verdict]:
    last = ""
    for verdict in _verdicts(path):
        if verdict.row_id < last:
            raise UserError(
                f"{path}: row {verdict.row_id!r} stands behind row {last!r}, and verdicts are sorted by row id: "
                f"{REBUILD}, or sort it by row_id"
            )
        last = verdict.row_id
        yield verdict


def _verdicts(path: Path) -> Iterator[Verdict]:
    with readable(path):
        names = pq.read_schema(path).names
    if missing := [name for name in SCHEMA.names if name not in names]:
        raise UserError(
            f"{path}: columns {missing} are missing (found {names}); this is no table of verdicts: "
            "rebuild it with the stage verdicts"
        )
    for part in read_parts(path, SCHEMA, may_be_null={"values"}):
        for record in zip(*(values(part.column(name)) for name in SCHEMA.names)):
            fields = dict(zip(SCHEMA.names, record))
            known = None if fields["values"] is None else tuple(fields["values"])
            verdict = Verdict(**{**fields, "shown": tuple(fields["shown"]), "values": known})
            if known is not None and not (len(known) == len(verdict.shown) and all(map(math.isfinite, known))):
                raise UserError(
                    f"{path}: row {verdict.row_id!r}, a verdict of {verdict.judge}: {len(verdict.shown)} finite values "
                    f"were expected, found {[*known]}: {REBUILD}"
                )
            yield verdict


def _check(verdict: Verdict, row: Row | None, path: Path) -> None:
    if why := _foreign(verdict, row):
        raise UserError(
            f"{path}: row {verdict.row_id!r}, a verdict of {verdict.judge}: {why}; the tables do not belong "
            "together: run the stage verdicts again on these rows, or name the rows that were judged"
        )


def _foreign(verdict: Verdict, row: Row | None) -> str:
    """Why the verdict is not on this row; "" where it is."""
    if row is None:
        return "no row has this id"
    if not all(0 <= place < len(row.answers) for place in verdict.shown):
        return f"it is on places {[*verdict.shown]}, and the row has {len(row.answers)} answers"
    if verdict.texts != texts_digest(row.prompt, [row.answers[place].text for place in verdict.shown]):
        return f"it is on other texts than the row's prompt and its answers at {[*verdict.shown]}"
    return ""
