"""Stage verdicts: the judge, or a panel of several, is asked about the answers; every reply is kept as it came.

Costly and perhaps not reproducible, so nothing is derived here: `preferences` turns replies into rankings. A reply that
could not be read, after all attempts, stays in the table without values: no label is made of it. A question that a
file of stored verdicts does not speak of is unanswered, and counts as no reply.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.rows import read_rows
from rankwise.types import Row, UserError
from tasks.judges import JudgeParams, Member, common_family, make_panel
from tasks.params import param
from tasks.stage import Stage, main

if TYPE_CHECKING:
    from rankwise.budget import Spending
    from rankwise.judging import Judge
    from rankwise.verdicts import Reply


@dataclass(frozen=True, kw_only=True)
class Params:
    judge: JudgeParams | None = param(
        JudgeParams, "who ranks the answers; null: nobody is asked, preferences.order ranks them"
    )
    panel: list[dict] = param(list, "further judges, mappings as judge; keys left out are its defaults")


@dataclass(frozen=True, kw_only=True)
class Paths:
    rollouts: Path = Path("data/rollouts.parquet")
    generator: Path = Path("models/sft")
    reward_model: Path = Path("models/reward_model")
    source: Path = Path("data/source")
    verdicts: Path = Path("data/verdicts.parquet")
    report: Path = Path("reports/verdicts")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.rubrics import READER
    from rankwise.verdicts import read_verdicts, write_verdicts
    from tasks import review

    rows = read_rows(paths.rollouts)
    table, metrics = [], {}
    for member in _members(params, paths) if rows and params.judge else ():
        replies = _ask(member, rows, stage)
        family = common_family(member.params, member.judge.name, source=paths.source, generator=paths.generator)
        found = {**summary(member.judge, replies), "same_family_as_generator": int(bool(family))}
        _tell(found, family, stage)
        metrics[member.section] = found
        table += [(member.judge.name, member.judge.identity, reply) for reply in replies]
    write_verdicts(paths.verdicts, table)
    said = read_verdicts(paths.verdicts, {row.id: row for row in rows})
    shown = review.write(stage.report / "review.html", rows, said)
    if shown:
        stage.tracker.table("review", shown)
    stage.tracker.dataset(paths.rollouts, "rollouts")
    stage.finish({"verdicts": len(table), "reader": READER, **metrics})
    for section, found in metrics.items():
        if found["questions"] and found["unanswered"] == found["questions"]:
            raise UserError(
                f"verdicts: the file of {found['name']} ({section}) answers none of {found['questions']} questions: it "
                "speaks of other texts; name the file that was made from these rollouts"
            )
        if found["invalid_share"] == 1:
            raise UserError(
                f"verdicts: none of the {found['questions']} replies of {found['name']} could be read, the last one "
                f"because of this: {_last_reason(table, found['name'])}. See them in {paths.verdicts}, columns raw and "
                f"reason; correct the judge ({section}), or take another"
            )


def summary(judge: Judge, replies: Sequence[Reply]) -> dict[str, Any]:
    """How a judge replied; what its replies are worth is measured by stage audit_judge. Equal from run to run."""
    valid = [reply for reply in replies if reply.values is not None]
    answered = sum(reply.answered for reply in replies)
    found = {
        "name": judge.name,
        "questions": len(replies),
        "unanswered": len(replies) - answered,
        "invalid": answered - len(valid),
        "invalid_share": (answered - len(valid)) / max(1, answered),
        "asked_again_share": sum(reply.question.attempt > 0 for reply in replies) / max(1, len(replies)),
        "prompt_tokens": sum(reply.prompt_tokens for reply in replies),
        "completion_tokens": sum(reply.completion_tokens for reply in replies),
        "controls": sum(reply.controls for reply in replies),
    }
    if judge.pairwise and valid:
        found["mass_mean"] = sum(reply.mass for reply in valid) / len(valid)
    return found


def _members(params: Params, paths: Paths) -> Iterator[Member]:
    return make_panel(params.judge, params.panel, trained=paths.reward_model, source=paths.source, where="verdicts")


def _ask(member: Member, rows: Sequence[Row], stage: Stage) -> list[Reply]:
    from rankwise.judging import judge_rows
    from rankwise.store import Store

    judge = member.judge
    with Store(stage.store("verdicts")) as store:
        what = f"verdicts of {judge.name}"
        replies, asked = judge_rows(judge, rows, store, what=what, pairs_up_to=member.params.pairs_up_to)
    stage.log(f"{judge.name}: {asked} verdicts asked now, {max(0, len(replies) - asked)} known before")
    stage.timings[f"{member.section}_asked"] = asked
    if member.params.kind == "stored":
        idle, lines = judge.idle(reply.question for reply in replies)
        if idle:
            stage.log(f"{judge.name}: {idle} of {lines} lines speak of no pair asked about")
    if hasattr(judge, "spent"):
        _tell_spending(member, judge.spent(), stage)
    return replies


def _tell_spending(member: Member, spent: Spending, stage: Stage) -> None:
    """What asking a server took now; for the log and the tracker alone, since it differs from run to run."""
    money = f", {spent.money:,.4f} at the prices given" if spent.money else ""
    stage.log(
        f"{member.judge.name}: {spent.requests:,} requests now, {spent.prompt:,} + {spent.completion:,} tokens{money}"
    )
    stage.tracker.metrics({f"{member.section}/{k}_now": v for k, v in asdict(spent).items()}, step=None)


def _tell(found: dict[str, Any], family: str, stage: Stage) -> None:
    name = found["name"]
    if found["invalid"]:
        stage.log(
            f"{name}: {found['invalid']} of {found['questions']} questions ({found['invalid_share']:.1%} of those "
            "answered) got no valid reply; they have no verdict, which is not the same as a tie"
        )
    if found["unanswered"]:
        stage.log(f"{name}: {found['unanswered']} of {found['questions']} questions are not answered by its file")
    if found["controls"]:
        stage.log(f"{name}: {found['controls']} control tokens in the texts shown, written so that they are none")
    if found["prompt_tokens"]:
        stage.log(f"{name}: {found['prompt_tokens']} tokens read, {found['completion_tokens']} written")
    if family:
        stage.log(
            f"warning: {name} and the model that gave the answers may both be of the family {family}: judges favour "
            "their own family's answers; hold this one against people, or add one of another family to the panel"
        )


def _last_reason(table: Sequence[tuple[str, str, Reply]], name: str) -> str:
    return [reply.reason for judge, _, reply in table if judge == name][-1]


if __name__ == "__main__":
    raise SystemExit(main("verdicts", Params, Paths, run))
