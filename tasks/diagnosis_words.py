"""What the numbers of a diagnosis mean, in sentences made by rules; each rule is a function of `Facts` alone.

A threshold is a constant with its reason beside it. They were chosen, not measured.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from tasks.diagnosis_facts import ENOUGH_ROWS, Facts, Finding, share, signed

STILL = 1e-3  # nats a token: below it the policy is its reference for every purpose, and all else is rounding
HALVED = 0.69  # nats a token (log 2): each token of the best answers has become half as likely
OFF_DATA = 0.1  # nats a token: over 30 tokens the best answers have become e³ = 20 times less likely
LEARNT_BY_HEART = 0.1  # accuracy: a tenth of all pairs is right only because the policy was trained on them
LENGTH_SKEW = 0.1  # accuracy: a tenth of all pairs hangs on which answer is the longer
NEAR_TIES = 0.25  # share of training rows: then a quarter of the labels are nearly guesses


# The answer ----------------------------------------------------------------------------------------------------------


def answer(facts: Facts, said: Sequence[Finding]) -> tuple[str, str]:
    """ "pass", "fail" or "none", and the answer to "the chosen log-prob falls; is that normal?" in a line."""
    moved = facts.whole.per_token
    if max(abs(moved.chosen.mean), abs(moved.rejected.mean)) < STILL:
        return "none", "Nothing has moved: the policy still gives its reference's log-probabilities"
    concerns = sum(finding.kind == "concern" for finding in said)
    if moved.chosen.mean >= 0:
        line = "It does not fall here: the best answers became likelier"
        return ("fail", f"{line}, but something else is wrong") if concerns else ("pass", line)
    if concerns:
        return "fail", "Not all of it: the chosen log-prob falls, and there is reason for concern"
    if forced(facts):
        return "pass", "Yes: here it has to fall, and the best answers fell less than the worst"
    return "pass", "Yes: the loss allows it, and the fall is small"


def forced(facts: Facts) -> bool:
    """Whether the reference drew these answers, so that their mean change can only be negative."""
    return facts.whole.drawn == 1 and facts.whole.kl.low > 0


# Rules ---------------------------------------------------------------------------------------------------------------


def findings(facts: Facts, training: Mapping[str, Any]) -> list[Finding]:
    """What every rule says, in the order of the page; training: the parameters of stage dpo."""
    moved = facts.whole.per_token
    if max(abs(moved.chosen.mean), abs(moved.rejected.mean)) < STILL:
        todo = (f"raise dpo.learning_rate (now {training['learning_rate']:g}) or dpo.epochs",)
        return [Finding(kind="watch", text="No answer's log-probability has changed: nothing was learnt.", todo=todo)]
    told = (rule(facts, training) for rule in RULES)
    return [finding for finding in told if finding is not None]


def _fell(facts: Facts, training: Mapping[str, Any]) -> Finding:
    """How often and how far both went."""
    whole, nats, token = facts.whole, facts.whole.per_answer, facts.whole.per_token
    return Finding(
        kind="said",
        text=(
            f"On {facts.split} rows the best answer's log-probability fell in {share(whole.chosen_fell.mean)} of "
            f"{whole.rows:,} (mean {signed(nats.chosen.mean, 1)} nats, {signed(token.chosen.mean, 2)} a token), the "
            f"worst's in {share(whole.rejected_fell.mean)} (mean {signed(nats.rejected.mean, 1)}, "
            f"{signed(token.rejected.mean, 2)} a token)."
        ),
    )


def _origin(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Which of the two answers the margin comes from."""
    moved = facts.whole.per_answer
    best, worst = moved.chosen.mean, -moved.rejected.mean
    if moved.margin.mean <= 0:
        return None  # there is none to explain; _learnt speaks of that
    where = "from both"
    if best <= 0 or worst <= 0:
        where = "wholly from pushing the worst down" if best <= 0 else "wholly from lifting the best"
    return Finding(
        kind="said",
        text=f"Of the mean margin of {moved.margin.mean:.1f} nats the best answer's part is {signed(best, 1)} and the "
        f"worst's {signed(worst, 1)}: it comes {where}.",
    )


def _unseen(facts: Facts, training: Mapping[str, Any]) -> Finding:
    """What all answers did together, which the loss cannot see."""
    moved, unit = (facts.whole.per_token, "a token") if facts.per_token else (facts.whole.per_answer, "an answer")
    digits = 2 if facts.per_token else 1
    best, worst = (side.mean - moved.common.mean for side in (moved.chosen, moved.rejected))
    return Finding(
        kind="said",
        text=(
            f"The loss allows that: it sees differences alone (E6), and the same change {unit} of every answer leaves "
            f"it as it was. All answers together moved by {signed(moved.common.mean, digits)} nats {unit}; measured "
            f"from there the best moved by {signed(best, digits)} and the worst by {signed(worst, digits)}."
        ),
    )


def _expected(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Why a fall is forced on the reference's own draws, and is not on answers from elsewhere."""
    moved = facts.whole.per_token
    if forced(facts):
        kl = facts.whole.kl
        return Finding(
            kind="said",
            text=(
                "The reference drew these answers itself, and any model that differs from it gives its draws less on "
                f"average: their mean change estimates −KL(π_ref‖π), here {signed(-kl.mean, 1)} nats "
                f"[{signed(-kl.high, 1)}, {signed(-kl.low, 1)}], never above 0. What they lost went to answers that "
                "are not in this table; stage evaluate says whether those are better."
            ),
        )
    if moved.chosen.mean >= 0:
        return None
    text = (
        "These answers were not all drawn by the reference, so nothing forces them to fall: what the best lost went to "
        "answers that nobody has ranked."
    )
    if -moved.chosen.mean <= OFF_DATA:
        return Finding(kind="said", text=f"{text} So far it is little ({signed(moved.chosen.mean, 2)} nats a token).")
    return Finding(
        kind="concern",
        text=f"{text} {signed(moved.chosen.mean, 2)} nats a token is more than {OFF_DATA:g}.",
        todo=hold_back(training),
    )


def _depth(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Whether the best answers fell so far that the policy hardly writes them any more."""
    fall = -facts.whole.per_token.chosen.mean
    if fall <= HALVED:
        return None
    return Finding(
        kind="concern",
        text=f"The best answers lost {fall:.2f} nats a token, more than {HALVED:g}: each of their tokens is less than "
        "half as likely as it was. The policy moves away from what was preferred, whatever the margin says.",
        todo=hold_back(training),
    )


def _learnt(facts: Facts, training: Mapping[str, Any]) -> Finding:
    """Whether the order of the labels was learnt at all."""
    right, margin = facts.whole.accuracy, facts.whole.in_loss.margin
    said = f"{share(right.mean)} [{share(right.low)}, {share(right.high)}] of the ranked pairs"
    if right.low > 0.5 and margin.mean > 0:
        return Finding(kind="said", text=f"The implicit rewards order {said} rightly; at the start it is one half.")
    return Finding(
        kind="concern",
        text=f"The implicit rewards order {said} rightly, with a mean reward margin of {signed(margin.mean, 2)}: no "
        "better than the one half of the start, as far as can be told. What was lost bought nothing.",
        todo=(
            "look whether the judge can be trusted (stage audit_judge)",
            "give more ranked rows",
            f"try another dpo.learning_rate (now {training['learning_rate']:g})",
        ),
    )


def _by_heart(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Whether training rows are ordered by memory."""
    if facts.training is None:
        return None
    seen, unseen = facts.training.accuracy.mean, facts.whole.accuracy.mean
    if seen - unseen <= LEARNT_BY_HEART:
        return None
    todo = (f"fewer dpo.epochs (now {training['epochs']})",) if training["epochs"] > 1 else ()
    return Finding(
        kind="watch",
        text=f"Training rows are ordered rightly in {share(seen)} of pairs, held-out rows in {share(unseen)}: part "
        "of every margin on training rows is memory, so believe the held-out ones.",
        todo=(*todo, *_soften(facts, training)),
    )


def _length(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Whether the order hangs on which answer is the longer."""
    sides = [facts.longer.get(side) for side in ("longer", "shorter")]
    if any(side is None or side.rows < ENOUGH_ROWS for side in sides):
        return None
    longer, shorter = (side.accuracy.mean for side in sides)
    said = f"{share(longer)} of pairs where the best answer is longer than the worst, {share(shorter)} where shorter"
    if abs(longer - shorter) <= LENGTH_SKEW:
        return Finding(kind="said", text=f"Length hardly matters: right are {said}.")
    mend = (
        "the loss is a token already: look at prefers_longer in the audit of the judge"
        if facts.per_token
        else "set dpo.length_normalised to true"
    )
    side = "longer" if longer > shorter else "shorter"
    return Finding(kind="watch", text=f"The policy leans to {side} answers: right are {said}.", todo=(mend,))


def _gap(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Whether the policy is righter where the judge was surer."""
    if len(facts.by_gap) < 2 or min(facts.by_gap[0].rows, facts.by_gap[-1].rows) < ENOUGH_ROWS:
        return None
    low, high = (facts.by_gap[place].accuracy.mean for place in (0, -1))
    said = f"{share(low)} of pairs right where its gap is smallest, {share(high)} where largest"
    if high > low:
        return Finding(kind="said", text=f"The surer the judge, the righter the policy: {said}.")
    return Finding(
        kind="watch",
        text=f"The policy is no righter where the judge was surer ({said}): its gaps say little about its labels.",
        todo=("do not train on these gaps (dpo.loss plackett_luce)",)
        if training["loss"] == "soft_plackett_luce"
        else (),
    )


def _near_ties(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """Whether many labels are nearly guesses."""
    if facts.near_ties is None or facts.near_ties <= NEAR_TIES:
        return None
    return Finding(
        kind="watch",
        text=f"In {share(facts.near_ties)} of training rows the judge's odds for best over worst are below 3 to 1.",
        todo=("raise preferences.tie_below", *_soften(facts, training)),
    )


def _contradicted(facts: Facts, training: Mapping[str, Any]) -> Finding | None:
    """How many labels training did not get through."""
    if not facts.training_rows:
        return None
    said = (
        f"After training the policy still holds the best answer below the worst in {facts.contradicted:,} of "
        f"{facts.training_rows:,} training rows ({share(facts.contradicted / facts.training_rows)})"
    )
    if not facts.contradicted:
        return Finding(kind="said", text=f"{said}.")
    more = "" if facts.sure is None else f", in {facts.sure:,} of them against a judge surer than in half of all rows"
    return Finding(kind="said", text=f"{said}{more}. Those may be mislabelled: they are listed below.")


def _order(facts: Facts, training: Mapping[str, Any]) -> Finding:
    """What became of the order by likelihood, which is another thing than that by implicit reward."""
    told = facts.flips
    before, after = told["kept right"] + told["broken"], told["kept right"] + told["mended"]
    text = (
        f"By likelihood itself the reference had the best answer above the worst in {before:,} of "
        f"{facts.whole.rows:,} rows, the policy has it in {after:,}: mended {told['mended']:,}, broken "
        f"{told['broken']:,}."
    )
    if told["broken"] <= told["mended"]:
        return Finding(kind="said", text=text)
    return Finding(kind="concern", text=f"{text} Training broke more than it mended.", todo=hold_back(training))


Rule = Callable[[Facts, Mapping[str, Any]], Finding | None]
RULES: tuple[Rule, ...] = (
    *(_fell, _origin, _unseen, _expected, _depth, _learnt),
    *(_order, _by_heart, _length, _gap, _near_ties, _contradicted),
)


# What to do ----------------------------------------------------------------------------------------------------------


def hold_back(training: Mapping[str, Any]) -> tuple[str, ...]:
    """What keeps a policy nearer to its reference, with the values in force."""
    known = [
        f"raise dpo.beta (now {training['beta']:g})",
        f"lower dpo.learning_rate (now {training['learning_rate']:g})",
    ]
    if training["epochs"] > 1:
        known.append(f"fewer dpo.epochs (now {training['epochs']})")
    if training["loss"] != "ipo":
        known.append("set dpo.loss to ipo, whose margins have a finite target")
    return tuple(known)


def _soften(facts: Facts, training: Mapping[str, Any]) -> tuple[str, ...]:
    """What asks for no certainty: labels that are believed in part."""
    if training["loss"] == "ipo":
        return ()
    known = [] if training["label_smoothing"] else ["raise dpo.label_smoothing above 0"]
    if facts.by_gap and training["loss"] != "soft_plackett_luce":
        known.append("set dpo.loss to soft_plackett_luce, which aims at the judge's own odds")
    return tuple(known)


def todo(said: Sequence[Finding]) -> list[str]:
    """All that the findings ask for, each once, concerns first."""
    ordered = sorted(said, key=lambda finding: finding.kind != "concern")
    return list(dict.fromkeys(line for finding in ordered for line in finding.todo))
