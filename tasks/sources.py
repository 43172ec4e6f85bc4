"""Data in: a file of any format and shape -> rows, one at a time.

Formats: .jsonl, .json (a list), .csv (each also .gz), .parquet, a folder of those, a folder saved by Hugging Face
`datasets`, or a hub id written "hub:org/name@revision". The shapes are those of tasks.shapes.

A bad record is never skipped: the reader goes on to the tenth, then stops with all of them. What the user's own
settings leave out is counted.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.seen import Seen
from rankwise.types import Answer, Message, Row, UserError, show_prompt
from tasks.formats import BadRecord, near, records, show, spell
from tasks.params import param
from tasks.shapes import COLUMNS, SHAPES, LeftOut, Shape, read_parts, text_of

IDS = ("id", "prompt_id", "question_id", "uuid")
KEPT = ("label", "split", "group", "source", "category", "subset")  # scalar columns that go into a row's meta
SHOWN = 10  # bad records named before the reader gives up


@dataclass(frozen=True, kw_only=True)
class File:
    """How one file is read. In params.yaml every entry but path may be left out."""

    path: str = param("", "file or folder, relative to data/source; or hub:org/name@revision")
    split: str = param("train", "split of a datasets folder or hub id")
    subset: str = param("", "configuration of a hub id; empty: its only one")
    shape: Literal["auto", "ranking", "pair", "pair_turns", "messages", "completion", "prompt", "text"] = param(
        "auto", "shape of the records; auto: known by their columns"
    )
    columns: dict[str, str] = param(dict, "own column: standard column; list.key: standard for answers in a list")
    chat: Literal["auto", "roles", "text"] = param(
        "auto", "auto: as found; roles: transcripts become turns; text: turns become a Human/Assistant transcript"
    )
    opening_words: int | None = param(None, "words of a plain text's prompt; null: prompts.opening_words", ge=0)
    where: dict = param(dict, "column: value (or list of values); other records are left out and counted")
    group: str = param("", "column whose equal values never straddle train and eval; empty: column group, if any")
    keep: list[str] = param(list, "more scalar columns to keep in a row's meta")
    leave_out: list[Literal["empty_answers", "identical_answers"]] = param(list, "rows left out and counted")
    leave_out_ids: list[str] = param(list, "ids of rows left out and counted")
    max_words: int = param(0, "rows with more words in prompt and longest answer are left out; 0: none", ge=0)
    limit: int = param(0, "rows taken, at random by seed; 0: all", ge=0)
    positive: int | str = param(1, "label of the texts that are the better ones (role labelled)")
    negative: int | str = param(0, "label of the texts that are the worse ones (role labelled)")


def read_examples(path: Path | str, file: File, *, opening_words: int, left_out: Counter[str]) -> Iterator[Row]:
    """The rows of a file or hub id; left_out counts, by reason, the records that `file` leaves out.

    Raises UserError where the source is missing, broken or empty, and for bad records (the first ten, each with
    its line or row number, its id, what was expected and what was found).
    """
    reader = _Reader(path, file, opening_words if file.opening_words is None else file.opening_words)
    problems: list[str] = []
    count = 0
    for place, record in records(path, split=file.split, subset=file.subset):
        count += 1
        try:
            yield reader.row(place, record)
        except LeftOut as reason:
            left_out[str(reason)] += 1
        except BadRecord as bad:
            problems.append(f"{place}: {bad}")
            if len(problems) == SHOWN:
                problems.append(f"reading stopped at the first {SHOWN}")
                break
    if problems:
        raise UserError("\n  ".join([f"{path}: bad records", *problems] if len(problems) > 1 else problems))
    if not count:
        raise UserError(f"{path}: empty: at least one record was expected")


def same(value: Any, wanted: Any) -> bool:
    """Equal as data are: 1 and "1" (CSV holds text alone), True and "true"."""
    return value == wanted or str(value).lower() == str(wanted).lower()


class _Reader:
    """Turns the records of one file into rows; knows the file's shape and the ids seen so far."""

    def __init__(self, path: Path | str, file: File, opening_words: int):
        self.path, self.file, self.opening_words = path, file, opening_words
        self.shape: Shape | None = None
        self.seen = Seen()  # ids, and where
        self._mapped = {*file.columns, *file.columns.values()}
        for own, standard in file.columns.items():
            known = COLUMNS | {*IDS, *KEPT, "text", "rank", "score", "model"}
            if standard not in known:
                raise UserError(f"{path}: columns: {own}: {standard!r} is no standard column{near(standard, known)}")

    def row(self, place: str, record: dict | BadRecord) -> Row:
        if isinstance(record, BadRecord):
            raise record
        if not isinstance(record, dict):
            raise BadRecord(f"an object with named columns was expected, found {show(record)}")
        self._filter(record)
        own = self._renamed(record)
        self.shape = self.shape or self._detect(own)
        named = next((own[name] for name in IDS if own.get(name) is not None), None)
        try:
            prompt, answers = read_parts(own, self.shape, opening_words=self.opening_words, chat=self.file.chat)
        except BadRecord as bad:
            raise BadRecord(f"(id {_cut(named)}) {bad}" if named is not None else str(bad)) from None
        row_id = self._id(named, prompt, answers, place)
        row = Row(id=row_id, prompt=prompt, answers=answers, meta=self._meta({**record, **own}))
        self._leave_out(row)
        return row

    def _leave_out(self, row: Row) -> None:
        texts = [answer.text.strip() for answer in row.answers]
        reasons = {"empty_answers": not all(texts), "identical_answers": len(set(texts)) < len(texts)}
        for reason in self.file.leave_out:
            if reasons[reason]:
                raise LeftOut(reason)
        if row.id in self.file.leave_out_ids:
            raise LeftOut("leave_out_ids")
        if self.file.max_words and words(row) > self.file.max_words:
            raise LeftOut("more words than max_words")

    def _filter(self, record: dict) -> None:
        for column, wanted in self.file.where.items():
            if column not in record:
                raise BadRecord(f"where: column {column!r} is missing{near(column, record)}; found {spell(record)}")
            options = wanted if isinstance(wanted, list) else [wanted]
            if not any(same(record[column], option) for option in options):
                raise LeftOut(f"{column} is not {wanted}")

    def _renamed(self, record: dict) -> dict:
        columns = self.file.columns
        # A mapped column takes the place of any that has the standard name already.
        renamed = {name: value for name, value in record.items() if name not in self._mapped}
        for own, standard in columns.items():
            column, _, key = own.partition(".") if own not in record else (own, "", "")
            if column not in record:
                raise BadRecord(f"columns: {column!r} is missing{near(column, record)}; found {spell(record)}")
            if key:
                entries = renamed.setdefault(column, record[column])
                if isinstance(entries, list):
                    renamed[column] = [{**e, standard: e.get(key)} if isinstance(e, dict) else e for e in entries]
            else:
                renamed[standard] = record[own]
        return renamed

    def _detect(self, record: dict) -> Shape:
        if self.file.shape != "auto":
            return SHAPES[self.file.shape]
        for shape in SHAPES.values():
            if not shape.missing(record):
                return shape
        near_miss = lambda name: difflib.get_close_matches(name[:60].lower(), sorted(COLUMNS), n=1, cutoff=0.7)
        meant = spell(f"{name}: {close[0]}" for name in record if (close := near_miss(name)))
        shapes = "\n".join(f"  {s.name}: {' + '.join('|'.join(g) for g in s.needs)}" for s in SHAPES.values())
        raise UserError(
            f"{self.path}: columns {spell(record)} fit no known shape; "
            + (f"did you mean columns: {{{meant}}}? " if meant else "")
            + f"map your own names with columns: {{own: standard}}. The shapes:\n{shapes}"
        )

    def _id(self, named: Any, prompt: Sequence[Message], answers: Sequence[Answer], place: str) -> str:
        if named is None:
            turns = [{"role": turn.role, "content": turn.content} for turn in prompt]
            content = [turns, [[answer.text, answer.rank] for answer in answers]]
            row_id = hashlib.sha256(json.dumps(content, ensure_ascii=False).encode()).hexdigest()[:16]
            if row_id in self.seen:
                raise LeftOut("exact duplicate")
        elif isinstance(named, (str, int)) and not isinstance(named, bool) and str(named).strip():
            row_id = text_of(str(named), "id")
        else:
            raise BadRecord(f"an id (text or a whole number) was expected, found {show(named)}")
        if (first := self.seen.first(row_id, place)) is not None:
            raise BadRecord(
                f"id {_cut(row_id)} occurs twice, first at {first}; make ids unique, or map the column to "
                "something else, as in columns: {prompt_id: group}"
            )
        return row_id

    def _meta(self, record: dict) -> dict[str, Any]:
        meta = {name: record[name] for name in (*KEPT, *self.file.keep) if _is_scalar(record.get(name))}
        for name, value in meta.items():
            if isinstance(value, str):
                text_of(value, name)
        if group := self.file.group:
            if group not in record:
                raise BadRecord(f"group: column {group!r} is missing{near(group, record)}; found {spell(record)}")
            meta["group"] = text_of(str(record[group]), group)
        return meta


def words(row: Row) -> int:
    """Words of a row's prompt and of its longest answer."""
    return len(show_prompt(row.prompt).split()) + max((len(a.text.split()) for a in row.answers), default=0)


def _cut(named: Any) -> str:
    text = repr(named)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _is_scalar(value: Any) -> bool:
    return isinstance(value, (str, int, bool)) or (isinstance(value, float) and math.isfinite(value))
