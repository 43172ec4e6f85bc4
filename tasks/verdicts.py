"""Stage verdicts: the judge, or a panel of several, is asked about the answers; every reply is kept as it came.

Costly and perhaps not reproducible, so nothing is derived here: `preferences` turns replies into rankings. A reply that
could not be read, after all attempts, stays in the table without values: no label is made of it. A question that a
file of stored verdicts does not speak of is unanswered, and counts as no reply.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.rows import RowTable
from rankwise.types import UserError
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
    from rankwise.verdicts import joined, write_verdicts
    from tasks import review

    rows, told = RowTable(paths.rollouts), {}
    count = write_verdicts(paths.verdicts, _replies(params, paths, rows, told, stage))
    shown = review.write(stage.report / "review.html", joined(paths.verdicts, rows))
    if shown:
        stage.tracker.table("review", shown)
    stage.tracker.dataset(paths.rollouts, "rollouts")
    metrics = {section: found.as_json() for section, found in told.items()}
    stage.finish({"verdicts": count, "reader": READER, **metrics})
    for section, found in metrics.items():
        if found["questions"] and found["unanswered"] == found["questions"]:
            raise UserError(
                f"verdicts: the file of {found['name']} ({section}) answers none of {found['questions']} questions: it "
                "speaks of other texts; name the file that was made from these rollouts"
            )
        if found["invalid_share"] == 1:
            raise UserError(
                f"verdicts: none of the {found['questions']} replies of {found['name']} could be read, the last one "
                f"because of this: {told[section].last_reason}. See them in {paths.verdicts}, columns raw and "
                f"reason; correct the judge ({section}), or take another"
            )


def _replies(
    params: Params, paths: Paths, rows: RowTable, told: dict[str, Summary], stage: Stage
) -> Iterator[tuple[str, str, Reply]]:
    """(judge's name, its identity, reply), judge by judge; told gets what each of them amounts to."""
    for member in _members(params, paths) if len(rows) and params.judge else ():
        judge = member.judge
        family = common_family(member.params, judge.name, source=paths.source, generator=paths.generator)
        found = told[member.section] = Summary(judge, same_family=bool(family))
        for reply in _ask(member, rows, stage):
            found.add(reply)
            yield judge.name, judge.identity, reply
        _tell(found.as_json(), family, stage)


class Summary:
    """How a judge replied, counted as replies pass; what they are worth is measured by stage audit_judge.

    Equal from run to run.
    """

    def __init__(self, judge: Judge, *, same_family: bool):
        self._judge, self._same_family = judge, same_family
        self._counts: Counter[str] = Counter()
        self._mass = 0.0
        self.last_reason = ""  # of the last reply

    def add(self, reply: Reply) -> None:
        counts = self._counts
        counts["questions"] += 1
        counts["answered"] += reply.answered
        counts["asked_again"] += reply.question.attempt > 0
        counts["prompt_tokens"] += reply.prompt_tokens
        counts["completion_tokens"] += reply.completion_tokens
        counts["controls"] += reply.controls
        if reply.values is not None:
            counts["valid"] += 1
            self._mass += reply.mass
        self.last_reason = reply.reason

    def as_json(self) -> dict[str, Any]:
        counts = self._counts
        invalid = counts["answered"] - counts["valid"]
        found = {
            "name": self._judge.name,
            "questions": counts["questions"],
            "unanswered": counts["questions"] - counts["answered"],
            "invalid": invalid,
            "invalid_share": invalid / max(1, counts["answered"]),
            "asked_again_share": counts["asked_again"] / max(1, counts["questions"]),
            "prompt_tokens": counts["prompt_tokens"],
            "completion_tokens": counts["completion_tokens"],
            "controls": counts["controls"],
            "same_family_as_generator": int(self._same_family),
        }
        if self._judge.pairwise and counts["valid"]:
            found["mass_mean"] = self._mass / counts["valid"]
        return found


def _members(params: Params, paths: Paths) -> Iterator[Member]:
    return make_panel(params.judge, params.panel, trained=paths.reward_model, source=paths.source, where="verdicts")


def _ask(member: Member, rows: RowTable, stage: Stage) -> Iterator[Reply]:
    from rankwise.judging import Asked, judged
    from rankwise.store import Store

    judge, asked, count = member.judge, Asked(), 0
    with Store(stage.store("verdicts")) as store:
        what = f"verdicts of {judge.name}"
        for _, replies in judged(judge, rows, store, asked, what=what, pairs_up_to=member.params.pairs_up_to):
            count += len(replies)
            for reply in replies:
                if member.params.kind == "stored":
                    judge.notice(reply.question)
                yield reply
    stage.log(f"{judge.name}: {asked.now} verdicts asked now, {max(0, count - asked.now)} known before")
    stage.timings[f"{member.section}_asked"] = asked.now
    if member.params.kind == "stored":
        idle, lines = judge.idle()
        if idle:
            stage.log(f"{judge.name}: {idle} of {lines} lines speak of no pair asked about")
    if hasattr(judge, "spent"):
        _tell_spending(member, judge.spent(), stage)


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


if __name__ == "__main__":
    raise SystemExit(main("verdicts", Params, Paths, run))
