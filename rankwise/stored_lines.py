"""Files of stored verdicts -> votes. A line is one verdict on two answers, or one ranking of several:

| columns | what they hold |
|---|---|
| `prompt`, or `row_id` | the prompt as text or as a list of {role, content}; or the id of its row |
| `first`, `second` | the two answers' texts, in the order in which they were shown |
| `answers` | instead of the two: a list of {text, rank}, 0 is best, equal is a tie |
| `pair` | instead of all these: the `question_key` that a label sheet wrote |
| `verdict`, or `value` | "A" (first), "B" (second), "tie"; or log-odds that first is better, nats; empty: no answer |
| `order` | "shown" (also where the column is missing): holds for this order alone; "none": for both orders |
| `annotator`, or `judge` | who said it; may be missing |
| `reason` | may be missing |

Formats: .jsonl, .csv (each also .gz), .parquet. A CSV file's fields stay the text that they are, since answers are
matched to the character; a prompt of turns and the list of answers are written there as JSON.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rankwise import json_text, text_files
from rankwise.fingerprint import digest
from rankwise.rows import stream_records
from rankwise.types import Message, UserError, show_prompt
from rankwise.verdicts import Question, texts_digest

SWAPPED = {"A": "B", "B": "A", "tie": "tie"}
FIELDS_UP_TO = 2**31 - 1  # bytes of one field of a CSV file


@dataclass(frozen=True, kw_only=True)
class Vote:
    """What one annotator said of two answers, or of the order of several."""

    place: str  # "line 7" of the file
    annotator: str
    said: str = ""  # as Reply.said; "" where there is a value, or nothing
    value: float | None = None  # log-odds that the answer shown first is better, nats
    reason: str = ""
    orderless: bool = False  # holds for both orders

    def swapped(self) -> Vote:
        """The same vote, the two answers shown the other way round."""
        return replace(self, said=SWAPPED.get(self.said, ""), value=None if self.value is None else -self.value)


@dataclass(frozen=True, kw_only=True)
class Line:
    """A line of a file."""

    name: str  # of what it speaks about: one of names_of the question; of a ranking, one of the prompt without answers
    vote: Vote
    ranks: dict[str, int] | None  # of a ranking: text -> rank, 0 is best


def question_key(prompt: Sequence[Message], answers: Sequence[str]) -> str:
    """Name of a question: its prompt and its answers in the order shown, whatever row they stand in."""
    return f"q{texts_digest(prompt, answers)}"


def names_of(question: Question, answers: Sequence[str]) -> list[str]:
    """Every name under which a line may speak of these answers to the question's prompt."""
    prompt = question.prompt
    texts = {show_prompt(prompt), *(turn.content for turn in prompt if len(prompt) == 1)}
    shown = [digest("text", text, list(answers)) for text in sorted(texts)]
    return [question_key(prompt, answers), digest("row", question.row_id, list(answers)), *shown]


def read_line(place: str, record: Mapping[str, Any]) -> Line | None:
    """A record as a line; None where nobody has answered it. ValueError says what is wrong with it."""
    for name, value in record.items():
        if isinstance(value, str) and value != json_text.whole_characters(value):
            raise ValueError(
                f"column {name[:60]}: half a character (a lone surrogate, \\ud800 to \\udfff); mend the text"
            )
    vote = _vote(place, record)
    if _given(record, "answers"):
        if vote.said or vote.value is not None:
            raise ValueError("both answers with ranks and a verdict on two; give one of them")
        return Line(name=_about(record, ()), vote=vote, ranks=_ranks(record["answers"]))
    if not vote.said and vote.value is None:
        return None
    return Line(name=_pair(record), vote=vote, ranks=None)


def annotator_of(record: Mapping[str, Any]) -> str:
    """Who said it; "" where that is not told."""
    return str(record.get("annotator") or record.get("judge") or "").strip()


def _vote(place: str, record: Mapping[str, Any]) -> Vote:
    order = str(record.get("order") or "shown").strip().lower()
    if order not in ("shown", "none"):
        raise ValueError(f"order is {order[:60]!r}; shown or none was expected")
    return Vote(
        place=place,
        annotator=annotator_of(record),
        said=_verdict(record),
        value=_value(record),
        reason=str(record.get("reason") or ""),
        orderless=order == "none",
    )


def _verdict(record: Mapping[str, Any]) -> str:
    given = record.get("verdict")
    if not _given(record, "verdict"):
        return ""
    if _given(record, "value"):
        raise ValueError("both a verdict and a value; give one of them")
    found = {said.lower(): said for said in SWAPPED}.get(str(given).strip().lower())
    if found is None:
        raise ValueError(f"verdict is {str(given)[:60]!r}; A, B or tie was expected")
    return found


def _value(record: Mapping[str, Any]) -> float | None:
    if not _given(record, "value"):
        return None
    try:
        value = math.nan if isinstance(record["value"], bool) else float(record["value"])
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not math.isfinite(value):
        raise ValueError(f"value is {str(record['value'])[:60]!r}; log-odds in nats, a finite number, were expected")
    return value


def _pair(record: Mapping[str, Any]) -> str:
    if _given(record, "pair"):
        return str(record["pair"]).strip()
    texts = [record.get(name) for name in ("first", "second")]
    if not all(isinstance(text, str) for text in texts):
        missing = [name for name, text in zip(("first", "second"), texts) if not isinstance(text, str)]
        raise ValueError(f"column {' and '.join(missing)}: an answer's text was expected (found {_names(record)})")
    return _about(record, texts)


def _about(record: Mapping[str, Any], answers: Sequence[str]) -> str:
    """The name under which a line with these answers is found; of a ranking: that of its prompt."""
    prompt = record.get("prompt")
    if isinstance(prompt, str) and prompt.startswith('[{"'):  # CSV has no lists
        prompt = _turns_or_text(prompt)
    if _given(record, "row_id") and prompt in (None, ""):
        return digest("row", str(record["row_id"]), list(answers))
    if isinstance(prompt, str):
        return digest("text", prompt, list(answers))
    if prompt is not None:
        try:
            return question_key([Message(role=turn["role"], content=turn["content"]) for turn in prompt], answers)
        except (TypeError, KeyError):
            found = str(prompt)[:60]
            raise ValueError(f"prompt is {found!r}; text or a list of {{role, content}} was expected") from None
    raise ValueError(f"neither prompt nor row_id nor pair is given (found {_names(record)})")


def _turns_or_text(text: str) -> Any:
    try:
        turns = json_text.parse(text)
    except json_text.NotJson:
        return text
    return turns if all(isinstance(turn, dict) and {*turn} == {"role", "content"} for turn in turns) else text


def _ranks(answers: Any) -> dict[str, int]:
    if isinstance(answers, str):
        answers = json_text.parse(answers)  # its error is a ValueError
    try:
        ranks = [(answer["text"], answer["rank"]) for answer in answers]
    except (TypeError, KeyError):
        raise ValueError(f"answers is {str(answers)[:60]!r}; a list of {{text, rank}} was expected") from None
    if not all(isinstance(text, str) and type(rank) is int for text, rank in ranks) or len(ranks) < 2:
        raise ValueError("answers: at least two were expected, each with a text and a whole number as its rank")
    if len(found := dict(ranks)) < len(ranks) and any(found[text] != rank for text, rank in ranks):
        raise ValueError("answers: one text has two ranks")
    return found


def _names(record: Mapping[str, Any]) -> str:
    return ", ".join(name[:60] for name in [*record][:20])


def _given(record: Mapping[str, Any], name: str) -> bool:
    value = record.get(name)
    return not (value is None or value == "" or value != value or (isinstance(value, str) and not value.strip()))


# Files ---------------------------------------------------------------------------------------------------------------


def records(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """(place, record) of every line. Fields of a CSV file stay the text that they are: answers are matched exactly."""
    if not path.is_file():
        raise UserError(f"{path}: no such file; name the file with the stored verdicts (verdicts, below data/source)")
    name = path.name.removesuffix(".gz")
    if name.endswith(".parquet"):
        return ((f"row {n}", record) for n, record in enumerate(stream_records(path), 1))
    if name.endswith(".jsonl"):
        return _objects(path)
    if name.endswith(".csv"):
        return _fields(path)
    raise UserError(f"{path}: unknown format; known: .jsonl and .csv (each also .gz), .parquet")


def _lines(path: Path) -> Iterator[str]:
    try:
        with text_files.opened(path) as file:
            # newline="": line ends inside a quoted field belong to the answer.
            yield from text_files.lines(io.TextIOWrapper(file, encoding="utf-8-sig", newline=""), path)
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text ({error}); save it as UTF-8 (spreadsheets: CSV UTF-8)") from None


def _objects(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    for number, line in enumerate(_lines(path), 1):
        if not line.strip():
            continue
        try:
            record = json_text.parse(line)
        except json_text.NotJson as error:
            raise UserError(f"{path}: line {number}: not JSON: {error}") from None
        if not isinstance(record, dict):
            raise UserError(f"{path}: line {number}: an object with named columns was expected")
        yield f"line {number}", record


def _fields(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    csv.field_size_limit(FIELDS_UP_TO)
    lines = _lines(path)
    header = next(lines, "")
    # Spreadsheets of much of Europe write semicolons.
    table = csv.DictReader(itertools.chain([header], lines), delimiter=max(",;\t", key=header.count), strict=True)
    try:
        names = table.fieldnames or ()
        if header and not names:
            raise UserError(f"{path}: line 1: the columns' names were expected, and it is blank; remove it")
        if twice := [name for name in names if names.count(name) > 1]:
            raise UserError(f"{path}: line 1: two columns are called {twice[0][:60]!r}; rename one of them")
        for record in table:
            if None in record or None in record.values():
                raise UserError(
                    f"{path}: line {table.line_num}: {len(table.fieldnames or ())} fields were expected, as in line 1; "
                    "check the quotes"
                )
            yield f"line {table.line_num}", record
    except csv.Error as error:
        raise UserError(f"{path}: line {table.line_num}: not CSV: {error}; check the quotes") from None
