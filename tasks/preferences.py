"""Stage preferences: verdicts, or a given order of sources, become one ranked row a prompt. Pure and cheap.

Imported preferences join them, and so may rows that earlier rounds trained on.

Rows whose answers all tie are counted and left out, and so are rows with fewer than two answers that somebody judged.
A share of the groups (or prompts, where there are none), chosen by a hash of their names, is marked "held_out": they
measure preference accuracy and are never trained on.

Beside each label stands what it may owe to length (meta: longer_by, words of the best answer minus those of the worst)
and how narrow it is (meta: smallest_gap, nats between two neighbours of the order).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.fingerprint import digest
from rankwise.rows import read_rows, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks.params import param
from tasks.selection import SelectParams, counts, first_answers, selected
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

    rollouts = [_split(row, params.held_out_share) for row in read_rows(paths.rollouts)]
    judged = _in_order(rollouts, params) if params.order else _judged(rollouts, paths.verdicts, params)
    imported = _imported(paths.prompts, params)
    earlier = _earlier(paths.earlier, imported, stage.round, params.earlier_rounds)
    rows = [_with_gap(one) for one in judged] + imported + earlier
    if not rows:
        raise UserError(
            f"neither {paths.rollouts} nor {paths.prompts / 'preferences.parquet'} holds a row: there is nothing to "
            "prefer; name prompts or preferences in prompts.files"
        )
    ranked = [row for row in rows if len(row.answers) > 1]
    unjudged = len(rows) - len(ranked)
    if not ranked:
        raise UserError(
            f"none of the {len(rows)} rows has two answers that verdicts compare ({paths.verdicts}): none is ranked; "
            "reports/verdicts/metrics.json counts replies that are invalid or unanswered: take another judge, or have "
            "more pairs labelled"
        )
    kept = [row for row in ranked if not all_tied(row)]
    tied = len(ranked) - len(kept)
    if not kept or tied / len(ranked) > params.max_tied_share:
        raise UserError(
            f"all answers tie in {tied} of {len(ranked)} rows ({tied / len(ranked):.0%}, preferences.max_tied_share "
            f"allows {params.max_tied_share:.0%}); a tie teaches nothing. Lower preferences.tie_below "
            f"({params.tie_below} nats), raise rollouts.temperature, or use a judge that tells answers apart"
        )
    whole, kept = kept, [_with_lengths(row) for row in selected(kept, params.select)]
    if all(row.meta["split"] == "held_out" for row in kept):
        raise UserError(
            f"all {len(kept)} ranked rows are held out, none is left to train on; lower preferences.held_out_share "
            f"({params.held_out_share}), raise preferences.select.prompts ({params.select.prompts}), or give "
            "more prompts"
        )
    write_rows(paths.preferences, kept)
    stage.tracker.table("preferences", [_shown(row) for row in kept[:SAMPLE_ROWS]])
    stage.log(f"{len(kept)} ranked rows, {tied} left out because all their answers tie")
    if unjudged:
        stage.log(f"{unjudged} of {len(rows)} rows left out because fewer than two of their answers were judged")
    carried = {"rows_of_earlier_rounds": len(earlier)} if params.earlier_rounds else {}
    stage.finish({**_summary(kept, judged, tied, unjudged), **carried, **counts(whole, kept, params.select)})


def _imported(prompts: Path, params: Params) -> list[Row]:
    """Imported rankings; held out are those of eval, which SFT never saw, or a share where eval has no ranks."""
    training = [replace(row, answers=row.ranked) for row in read_rows(prompts / "preferences.parquet")]
    if not training:
        return []
    unseen = [replace(row, answers=row.ranked) for row in read_rows(prompts / "eval.parquet") if len(row.ranked) > 1]
    if not unseen:
        return [_split(row, params.held_out_share) for row in training]
    mark = lambda row, split: replace(row, meta={**row.meta, "split": split})
    return [mark(row, "train") for row in training] + [mark(row, "held_out") for row in unseen]


def _judged(rollouts: Sequence[Row], verdicts: Path, params: Params) -> list[Judged]:
    from rankwise.ranking import rank
    from rankwise.verdicts import read_verdicts

    said = read_verdicts(verdicts, {row.id: row for row in rollouts})
    if rollouts and not said:
        raise UserError(
            f"{verdicts} holds no verdict and preferences.order is empty, so nothing ranks the answers; name a "
            "verdicts.judge, or the sources of answers from best to worst in preferences.order"
        )
    asked = [row for row in rollouts if len({answer.text for answer in row.answers}) > 1]
    if missing := [row.id for row in asked if row.id not in said]:
        raise UserError(
            f"{verdicts}: no judge was asked about {len(missing)} of {len(rollouts)} rows, {missing[0]!r} first; the "
            "tables do not belong together: run the stage verdicts again on these rows"
        )
    rows = [first_answers(row, params.select) for row in rollouts]
    about = lambda row: [one for one in said.get(row.id, []) if max(one.shown) < len(row.answers)]
    return [rank(row, about(row), tie_below=params.tie_below) for row in rows]


def _with_gap(judged: Judged) -> Row:
    return replace(judged.row, meta={**judged.row.meta, "smallest_gap": judged.smallest_gap})


def _with_lengths(row: Row) -> Row:
    best, worst = (len(row.answers[place].text.split()) for place in (0, -1))
    return replace(row, meta={**row.meta, "longer_by": best - worst})


def _in_order(rollouts: Sequence[Row], params: Params) -> list[Judged]:
    from rankwise.given import rank_by_source
    from rankwise.ranking import Judged

    order, rollouts = params.order, [first_answers(row, params.select) for row in rollouts]
    there = {answer.source for row in rollouts for answer in row.answers}
    if rollouts and set(order) != there:
        raise UserError(
            f"preferences.order is {order}, and the answers are from {', '.join(sorted(there))}; name just these, best "
            "first (policy: rollouts.k, teacher: rollouts.teacher, dataset: rollouts.data_answers)"
        )
    nothing = dict(position_bias=(), invalid=0, unjudged=0, circular_triads=0, most_circular_triads=0)
    return [Judged(row=rank_by_source(row, order), smallest_gap=None, **nothing) for row in rollouts]


def _earlier(table: Path, imported: Sequence[Row], round_: int, rounds: int) -> list[Row]:
    """Training rows of so many rounds before this one, as ID@ROUND; a row never comes twice."""
    if round_ == 1 or rounds == 0:
        return []
    again = {row.id for row in imported}  # they are in every round
    found = []
    for row in read_rows(table):
        own = row.meta.get("round", round_ - 1)  # of its own round a row does not say it
        if own >= round_ - rounds and row.id not in again and row.meta["split"] == "train":
            name = row.id if "round" in row.meta else f"{row.id}@{own}"
            found.append(replace(row, id=name, meta={**row.meta, "round": own}))
    return found


def _split(row: Row, held_out_share: float) -> Row:
    held_out = int(digest("held-out", keys(row)[0])[:8], 16) / 16**8 < held_out_share
    return replace(row, meta={**row.meta, "split": "held_out" if held_out else "train"})


def _summary(rows: Sequence[Row], judged: Sequence[Judged], tied: int, unjudged: int) -> dict[str, Any]:
    from rankwise.evaluation import mean, share

    biases = [bias for one in judged for bias in one.position_bias]
    longer = [row.meta["longer_by"] for row in rows if row.meta["longer_by"]]
    ranked = [row.answers for row in rows if row.answers[0].strength is not None]
    gaps = [answers[0].strength - answers[-1].strength for answers in ranked]
    found = {
        "rows": len(rows),
        "held_out": sum(row.meta["split"] == "held_out" for row in rows),
        "all_tied": tied,
        "unjudged_rows": unjudged,
        "rows_with_ties": sum(len({a.rank for a in row.answers}) < len(row.answers) for row in rows),
        "invalid_verdicts": sum(one.invalid for one in judged),
        "unjudged_answers": sum(one.unjudged for one in judged),
        **_triads(judged),
        "position_bias_mean": sum(biases) / len(biases) if biases else 0.0,
        "strength_gap_mean": sum(gaps) / len(gaps) if gaps else 0.0,
        "k": {str(k): sum(len(row.answers) == k for row in rows) for k in sorted({len(row.answers) for row in rows})},
    }
    if longer:
        # Best against worst, one number a row: the pairs of a row are not independent.
        found["better_is_longer"] = share(sum(words > 0 for words in longer), len(longer)).as_dict()
        found["longer_by"] = mean([row.meta["longer_by"] for row in rows]).as_dict()
    return found


def _triads(judged: Sequence[Judged]) -> dict[str, float]:
    """Circular triads of rows whose pairs are all known, and Kendall's coefficient of consistency over all of them."""
    complete = [one for one in judged if one.most_circular_triads]
    if not complete:
        return {"circular_triads": 0}
    circular, most = (sum(getattr(one, f"{name}circular_triads") for one in complete) for name in ("", "most_"))
    return {"circular_triads": circular, "consistency": 1 - circular / most}


def _shown(row: Row) -> dict[str, object]:
    answers = {f"{n}: rank {a.rank}": a.text for n, a in enumerate(row.answers)}
    return {"id": row.id, "prompt": show_prompt(row.prompt), **answers}


if __name__ == "__main__":
    raise SystemExit(main("preferences", Params, Paths, run))
