"""Stage preferences: verdicts, or a given order of sources, become one ranked row a prompt. Pure and cheap.

Imported preferences join them, and so may rows that earlier rounds trained on.

Rows whose answers all tie are counted and left out, and so are rows with fewer than two answers that somebody judged.
A share of the groups (or prompts, where there are none), chosen by a hash of their names, is marked "held_out": they
measure preference accuracy and are never trained on.

Beside each label stands what it may owe to length (meta: longer_by, words of the best answer minus those of the worst)
and how narrow it is (meta: smallest_gap, nats between two neighbours of the order).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.fingerprint import digest
from rankwise.rows import RowTable, rows_writer
from rankwise.seen import Seen
from rankwise.types import Row, UserError, show_prompt
from tasks.params import param
from tasks.preferences_summary import Summary
from tasks.selection import SelectParams, first_answers, selected
from tasks.stage import Stage, main
from tasks.tables import keys

if TYPE_CHECKING:
    from rankwise.ranking import Judged

SAMPLE_ROWS = 50  # rows shown in the tracker


@dataclass(frozen=True, kw_only=True)
class Params:
    order: list[str] = param(
        list, "sources of answers, best first, such as [dataset, policy] (SPIN); []: the verdicts say"
    )
    earlier_rounds: int = param(
        0, "rounds before this one whose training rows join: 0 is SPIN's Algorithm 1, 1 its published code", ge=0
    )
    tie_below: float = param(0.05, "answers at most this far apart (log-odds, nats) are a tie", ge=0)
    held_out_share: float = param(0.1, "share of prompts kept to measure preference accuracy on", ge=0, le=0.9)
    max_tied_share: float = param(0.5, "stop when more than this share of rows tie altogether", ge=0, le=1)
    select: SelectParams = param(SelectParams, "a part of the training rows, to ask how much a ranking helps")


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    rollouts: Path = Path("data/rollouts.parquet")
    verdicts: Path = Path("data/verdicts.parquet")
    audit: Path = Path("reports/audit_judge/metrics.json")
    earlier: Path = Path("data/prompts/preferences.parquet")  # preferences of the round before; unread in round 1
    preferences: Path = Path("data/preferences.parquet")
    report: Path = Path("reports/preferences")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.ranking import all_tied

    found, shown = Summary(params.select), []
    with rows_writer(paths.preferences) as table:
        for row in _rows(params, paths, stage.round, found):
            found.rows += 1
            if len(row.answers) < 2:
                found.unjudged_rows += 1
            elif all_tied(row):
                found.tied += 1
            elif (kept := selected(row, params.select)) is not None:
                kept = _with_lengths(kept)
                found.add(kept, row)
                table.add(kept)
                shown += [_shown(kept)] if len(shown) < SAMPLE_ROWS else []
            else:
                found.left_out += 1
        _check(found, params, paths)
    stage.tracker.table("preferences", shown)
    stage.log(f"{found.kept} ranked rows, {found.tied} left out because all their answers tie")
    if found.unjudged_rows:
        stage.log(
            f"{found.unjudged_rows} of {found.rows} rows left out because fewer than two of their answers were judged"
        )
    carried = {"rows_of_earlier_rounds": found.earlier} if params.earlier_rounds else {}
    stage.finish({**found.as_json(), **carried})


def _rows(params: Params, paths: Paths, round_: int, found: Summary) -> Iterator[Row]:
    """All rows, ranked, one by one: those of the rollouts, imported ones, those of earlier rounds."""
    rollouts = RowTable(paths.rollouts)
    judged = _in_order(rollouts, params) if params.order else _judged(rollouts, paths.verdicts, params)
    for one in judged:
        found.add_judged(one)
        yield _with_gap(one)
    yield from _imported(paths.prompts, params)
    for row in _earlier(paths.earlier, _imported(paths.prompts, params), round_, params.earlier_rounds):
        found.earlier += 1
        yield row


def _check(found: Summary, params: Params, paths: Paths) -> None:
    """Raises UserError where nothing is left to train on, or too much ties."""
    if not found.rows:
        raise UserError(
            f"neither {paths.rollouts} nor {paths.prompts / 'preferences.parquet'} holds a row: there is nothing to "
            "prefer; name prompts or preferences in prompts.files"
        )
    ranked = found.rows - found.unjudged_rows
    if not ranked:
        raise UserError(
            f"none of the {found.rows} rows has two answers that verdicts compare ({paths.verdicts}): none is ranked; "
            "reports/verdicts/metrics.json counts replies that are invalid or unanswered: take another judge, or have "
            "more pairs labelled"
        )
    tied = found.tied
    if tied == ranked or tied / ranked > params.max_tied_share:
        raise UserError(
            f"all answers tie in {tied} of {ranked} rows ({tied / ranked:.0%}, preferences.max_tied_share "
            f"allows {params.max_tied_share:.0%}); a tie teaches nothing. Lower preferences.tie_below "
            f"({params.tie_below} nats), raise rollouts.temperature, or use a judge that tells answers apart"
        )
    if found.held_out == found.kept:
        raise UserError(
            f"all {found.kept} ranked rows are held out, none is left to train on; lower preferences.held_out_share "
            f"({params.held_out_share}), raise preferences.select.prompts ({params.select.prompts}), or give "
            "more prompts"
        )


def _imported(prompts: Path, params: Params) -> Iterator[Row]:
    """Imported rankings; held out are those of eval, which SFT never saw, or a share where eval has no ranks."""
    table, evaluation = RowTable(prompts / "preferences.parquet"), RowTable(prompts / "eval.parquet")
    if not len(table):
        return
    training = (replace(row, answers=row.ranked) for row in table)
    unseen = (replace(row, answers=row.ranked) for row in evaluation if len(row.ranked) > 1)
    first = next(unseen, None)
    if first is None:
        yield from (_split(row, params.held_out_share) for row in training)
        return
    mark = lambda row, split: replace(row, meta={**row.meta, "split": split})
    yield from (mark(row, "train") for row in training)
    yield from (mark(row, "held_out") for row in itertools.chain([first], unseen))


def _judged(rollouts: RowTable, verdicts: Path, params: Params) -> Iterator[Judged]:
    from rankwise.ranking import rank
    from rankwise.verdicts import joined

    said, missing, first = False, 0, ""
    for row, mine in joined(verdicts, rollouts):
        said = said or bool(mine)
        if not mine and len({answer.text for answer in row.answers}) > 1:
            missing, first = missing + 1, first or row.id
        row = first_answers(_split(row, params.held_out_share), params.select)
        about = [one for one in mine if max(one.shown) < len(row.answers)]
        yield rank(row, about, tie_below=params.tie_below)
    if len(rollouts) and not said:
        raise UserError(
            f"{verdicts} holds no verdict and preferences.order is empty, so nothing ranks the answers; name a "
            "verdicts.judge, or the sources of answers from best to worst in preferences.order"
        )
    if missing:
        raise UserError(
            f"{verdicts}: no judge was asked about {missing} of {len(rollouts)} rows, {first!r} first; the "
            "tables do not belong together: run the stage verdicts again on these rows"
        )


def _with_gap(judged: Judged) -> Row:
    return replace(judged.row, meta={**judged.row.meta, "smallest_gap": judged.smallest_gap})


def _with_lengths(row: Row) -> Row:
    best, worst = (len(row.answers[place].text.split()) for place in (0, -1))
    return replace(row, meta={**row.meta, "longer_by": best - worst})


def _in_order(rollouts: RowTable, params: Params) -> Iterator[Judged]:
    from rankwise.given import rank_by_source
    from rankwise.ranking import Judged

    select = lambda row: first_answers(_split(row, params.held_out_share), params.select)
    order, there = params.order, {answer.source for row in rollouts for answer in select(row).answers}
    if len(rollouts) and set(order) != there:
        raise UserError(
            f"preferences.order is {order}, and the answers are from {', '.join(sorted(there))}; name just these, best "
            "first (policy: rollouts.k, teacher: rollouts.teacher, dataset: rollouts.data_answers)"
        )
    nothing = dict(position_bias=(), invalid=0, unjudged=0, circular_triads=0, most_circular_triads=0)
    return (Judged(row=rank_by_source(select(row), order), smallest_gap=None, **nothing) for row in rollouts)


def _earlier(table: Path, imported: Iterable[Row], round_: int, rounds: int) -> Iterator[Row]:
    """Training rows of so many rounds before this one, as ID@ROUND; a row never comes twice."""
    if round_ == 1 or rounds == 0:
        return
    again = Seen(row.id for row in imported)  # they are in every round
    for row in RowTable(table):
        own = row.meta.get("round", round_ - 1)  # of its own round a row does not say it
        if own >= round_ - rounds and row.id not in again and row.meta["split"] == "train":
            name = row.id if "round" in row.meta else f"{row.id}@{own}"
            yield replace(row, id=name, meta={**row.meta, "round": own})


def _split(row: Row, held_out_share: float) -> Row:
    held_out = int(digest("held-out", keys(row)[0])[:8], 16) / 16**8 < held_out_share
    return replace(row, meta={**row.meta, "split": "held_out" if held_out else "train"})


def _shown(row: Row) -> dict[str, object]:
    answers = {f"{n}: rank {a.rank}": a.text for n, a in enumerate(row.answers)}
    return {"id": row.id, "prompt": show_prompt(row.prompt), **answers}


if __name__ == "__main__":
    raise SystemExit(main("preferences", Params, Paths, run))
