"""Rows as the role of their table needs them: one answer to imitate, each prompt once, rankings, pairs of texts."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path

from rankwise.seen import Seen
from rankwise.types import Answer, Row, UserError, show_prompt, text_prompt
from tasks.kept import Kept, draw, in_order_of
from tasks.sources import File, same


def fit(role: str, rows: Kept, file: File, seed: int, left_out: Counter[str], *, scratch: Path) -> Iterator[Row]:
    """The rows of a role, one by one; left_out counts those that it cannot use, and those that are kept out of it.

    Raises UserError for rows that make no sense in the role.
    """
    if role not in ("sft", "rollout", "eval", "preferences") and all(len(row.answers) == 1 for row in rows):
        yield from _pairs(rows, file.positive, file.negative, seed, left_out, scratch)
        return
    own = rows.counting(left_out)
    if role == "sft":
        yield from (_best_alone(row, role) for row in own)
    elif role == "rollout":
        yield from _each_prompt_once((_best_alone(row, role) if row.answers else row for row in own), left_out)
    elif role == "eval":
        yield from _each_prompt_once(own, left_out)
    else:
        for row in own:
            ranked = _ranked(row, role)
            if len({answer.rank for answer in ranked.answers}) > 1:
                yield ranked
            else:
                left_out["all answers tied"] += 1


def pair(better: Row, worse: Row) -> Row:
    """Two whole texts, no prompt before them."""
    answers = (Answer(text=_whole(row), rank=rank, source="dataset") for rank, row in enumerate((better, worse)))
    return Row(id=f"{better.id}|{worse.id}", prompt=text_prompt(""), answers=tuple(answers))


def _best_alone(row: Row, role: str) -> Row:
    """A row with its own answer, or the best of a ranking, unranked: what a policy is to imitate."""
    if not row.answers:
        raise UserError(f"prompts.files.{role}: row {row.id!r} is a prompt without an answer; give prompt + completion")
    best = (row.ranked or row.answers)[0]
    if row.answers == (Answer(text=best.text, source="dataset"),):
        return row
    return replace(row, answers=(Answer(text=best.text, source="dataset"),))


def _ranked(row: Row, role: str) -> Row:
    if len(row.answers) < 2:
        raise UserError(
            f"prompts.files.{role}: row {row.id!r} has {len(row.answers)} answers, so there is nothing to rank; "
            "give pairs (chosen, rejected) or rankings (answers with rank or score)"
            + ("" if role == "preferences" else ", or texts with a label in every row")
        )
    return row


def _each_prompt_once(rows: Iterable[Row], left_out: Counter[str]) -> Iterator[Row]:
    seen = Seen()
    for row in rows:
        if seen.add(json.dumps([[turn.role, turn.content] for turn in row.prompt])):
            yield row
        else:
            left_out["same prompt as another row"] += 1


def _pairs(
    rows: Kept, positive: int | str, negative: int | str, seed: int, left_out: Counter[str], scratch: Path
) -> Iterator[Row]:
    """Texts with labels as pairs for a reward model: no prompt, a positive text above a negative one."""
    counts, found = Counter[bool | None](), set[str]()

    def side(row: Row) -> bool | None:
        for side, label in ((True, positive), (False, negative)):
            if same(row.meta.get("label"), label):
                return side
        return None

    for row in rows.counting(left_out):
        counts[side(row)] += 1
        if len(found) < 10:
            found.add(str(row.meta.get("label")))
    if not counts[True] or not counts[False]:
        raise UserError(
            f"labelled texts: both labels positive: {positive!r} and negative: {negative!r} must occur, found "
            f"{sorted(found)}; set positive and negative to labels of the data"
        )
    for reason, count in (
        ("label neither positive nor negative", counts[None]),
        ("text without a partner of the other label", abs(counts[True] - counts[False])),
    ):
        if count:
            left_out[reason] += count
    draw_of = lambda row: draw(seed, "pair", row.id)
    sides = (
        in_order_of((row for row in rows if side(row) is which), draw_of, scratch.with_name(f"{scratch.name}.{which}"))
        for which in (True, False)
    )
    yield from (pair(good, bad) for good, bad in zip(*sides))


def _whole(row: Row) -> str:
    return show_prompt(row.prompt) + row.answers[0].text
