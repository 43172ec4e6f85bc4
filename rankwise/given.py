"""Rankings that no judge has to make: who wrote an answer says where it stands (E8, E9 in docs/equations.md)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from rankwise.types import Row, UserError


def rank_by_source(row: Row, order: Sequence[str]) -> Row:
    """A row's answers best first, by their sources; answers of one source tie, and so do answers with one text.

    A text that two sources wrote stands where the better one is: nothing tells its copies apart.

    Args:
        order: sources from best to worst, such as ("dataset", "policy") for SPIN.

    Raises UserError on an answer of a source that is not in order.
    """
    place = {source: number for number, source in enumerate(order)}
    if strange := [answer.source for answer in row.answers if answer.source not in place]:
        raise UserError(f"row {row.id}: an answer is from {strange[0]!r}, which the order {list(order)} does not have")
    best: dict[str, int] = {}  # text -> place of its best source
    for answer in row.answers:
        best[answer.text] = min(best.get(answer.text, len(order)), place[answer.source])
    answers = sorted(row.answers, key=lambda answer: best[answer.text])
    places = [best[answer.text] for answer in answers]
    return replace(row, answers=tuple(replace(a, rank=places.index(at)) for a, at in zip(answers, places)))
