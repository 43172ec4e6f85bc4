"""Two answers to every prompt as one judge sees them: which is better, by how much, and what each scores."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from rankwise.types import Row, UserError
from tasks.stage import Stage

if TYPE_CHECKING:
    from rankwise.evaluation import Estimate
    from rankwise.judging import Judge
    from rankwise.verdicts import Verdict


@dataclass(frozen=True, kw_only=True)
class Judged:
    """One judge's view: log-odds that the first answer is better, one a prompt; scores of both where it scores.

    None stands where the judge gave no valid verdict; such a prompt is in no rate and no mean.
    """

    odds: list[float | None]
    scores: tuple[list[float | None], list[float | None]] | None  # of first and second; None for pairwise judges

    @property
    def known(self) -> list[int]:
        """The prompts that have a verdict, by number."""
        return [n for n, values in enumerate(zip(self.odds, *(self.scores or ()))) if None not in values]

    def known_scores(self) -> tuple[list[float], list[float]]:
        """The scores of those prompts, of first and second."""
        assert self.scores is not None, "a pairwise judge has no scores"
        return tuple([values[n] for n in self.known] for values in self.scores)

    def win_rate(self, tie_below: float) -> Estimate:
        from rankwise.evaluation import win_rate

        odds = [self.odds[n] for n in self.known]
        return win_rate(odds, [0.0] * len(odds), tie_below=tie_below)

    def at_equal_length(self, first: Sequence[Row], second: Sequence[Row]) -> float:
        """The win rate that the first would have at the second's length in words."""
        from rankwise.evaluation import length_controlled_win_rate

        words = [[len(rows[n].answers[0].text.split()) for n in self.known] for rows in (first, second)]
        odds = [self.odds[n] for n in self.known]
        return length_controlled_win_rate(odds, [0.0] * len(odds), *words)


def compared(judge: Judge, first: Sequence[Row], second: Sequence[Row], *, stage: Stage, where: str) -> Judged:
    """A judge's view of the first answers of two tables with the same prompts; a pairwise one sees both orders.

    Args:
        where: the judge's place in params.yaml, for messages.

    Raises UserError where it gave no valid verdict at all.
    """
    pairs = [replace(one, answers=(one.answers[0], other.answers[0])) for one, other in zip(first, second, strict=True)]
    said = verdicts_on(pairs, judge, stage=stage, what=f"verdicts of {where}")
    judged = _view(pairs, said, scores=not judge.pairwise)
    if not judged.known:
        raise UserError(
            f"{where}: none of the {len(pairs)} prompts has a valid verdict, so nothing can be compared; look at what "
            f"the judge replied ({stage.store('verdicts')} keeps it), or name another judge"
        )
    if unjudged := len(pairs) - len(judged.known):
        stage.log(f"{where}: {unjudged} of {len(pairs)} prompts have no valid verdict and are left out of its numbers")
    return judged


def best_answers(judge: Judge, rows: Sequence[Row], *, stage: Stage, where: str) -> list[Row]:
    """Rows with that one of their answers which the judge puts first; the one drawn first among equals."""
    from rankwise.ranking import rank

    said = verdicts_on(rows, judge, stage=stage, what=f"best of {len(rows[0].answers)} by {where}")
    chosen = [rank(row, said[row.id], tie_below=0.0).row.answers for row in rows]
    if without := [row.id for row, answers in zip(rows, chosen) if not answers]:
        raise UserError(
            f"{where}: {len(without)} of {len(rows)} prompts have no two answers that it compared: "
            f"{', '.join(without[:10])}; none of theirs is the best. Raise its number of askings, or take another judge"
        )
    return [replace(row, answers=answers[:1]) for row, answers in zip(rows, chosen)]


def verdicts_on(rows: Sequence[Row], judge: Judge, *, stage: Stage, what: str) -> dict[str, list[Verdict]]:
    """What the judge says of each row's answers, by row id; from the store where it was asked before."""
    from rankwise.judging import judge_rows
    from rankwise.store import Store
    from rankwise.verdicts import verdict_of

    with Store(stage.store("verdicts")) as store:
        replies, _ = judge_rows(judge, rows, store, what=what)
    said: dict[str, list[Verdict]] = {row.id: [] for row in rows}
    for reply in replies:
        said[reply.question.row_id].append(verdict_of(judge.name, judge.identity, reply))
    return said


def _view(pairs: Sequence[Row], said: Mapping[str, Sequence[Verdict]], *, scores: bool) -> Judged:
    from rankwise.ranking import compare

    odds = [float(compare(row, said[row.id]).odds_KK[0, 1]) for row in pairs]
    return Judged(
        odds=[None if math.isnan(value) else value for value in odds],
        scores=tuple([_score(said[row.id], place) for row in pairs] for place in (0, 1)) if scores else None,
    )


def _score(verdicts: Sequence[Verdict], place: int) -> float | None:
    """A pointwise judge's score of the answer at a place of the row, the mean of its draws."""
    values = [verdict.values[0] for verdict in verdicts if verdict.shown == (place,) and verdict.values is not None]
    return sum(values) / len(values) if values else None


def agreement(judge: Judged, gold: Judged) -> dict[str, float]:
    """How far one judge agrees with another: on which answer is better, and in scores."""
    from rankwise.evaluation import correlation

    decided = [(a, b) for a, b in zip(judge.odds, gold.odds) if a and b]
    found = {"pairs": sum((a > 0) == (b > 0) for a, b in decided) / max(1, len(decided))}
    if judge.scores and gold.scores:
        both = sorted(set(judge.known) & set(gold.known))
        pooled = [[values[n] for values in side.scores for n in both] for side in (judge, gold)]
        found["correlation"] = correlation(*pooled)
    return found


def models_metrics(judged: Judged, models: Sequence[str], name: str, *, beta: float | None, kl: float | None) -> dict:
    """Mean scores of the two models, and what follows from them: E1 of the policy, or the share of positive answers.

    Args:
        beta: of the policy's training; None where it had none, and no E1 follows.
        kl: to the other model; None where it was not measured, and no E1 follows.
    """
    from rankwise.evaluation import mean, objective, share

    if judged.scores is None:
        return {}
    scores = dict(zip(models, judged.known_scores()))
    rewards = {model: mean(values) for model, values in scores.items()}
    found = {"reward" if name == "judge" else "gold_reward": {m: one.as_dict() for m, one in rewards.items()}}
    policy, reference = models
    if name == "judge" and beta is not None and kl is not None:
        # E1 of the policy; the reference's own is its reward, its KL being zero.
        found["objective_e1"] = {
            "policy": objective(rewards[policy].mean, kl, beta),
            "reference": rewards[reference].mean,
        }
    elif name == "gold":
        found["positive_share"] = {m: share(sum(v > 0 for v in of), len(of)).as_dict() for m, of in scores.items()}
    return found
