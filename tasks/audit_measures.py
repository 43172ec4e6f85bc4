"""What the audit measures of one judge, from what it said: numbers with intervals, each beside its gate.

A measure that cannot be had says why. A gate fails where the whole 95 % interval lies beyond its limit, so that few
probes let a judge pass but never make it fail by chance alone.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from rankwise.agreement import (
    Bin,
    Pair,
    by_row,
    calibration,
    calibration_error,
    clustered_kappa,
    clustered_mean,
    clustered_share,
    confusion,
    either_way,
    first_share,
    flip_rate,
    krippendorff_alpha,
    label,
    paired_shift,
    position_bias,
    prefers_longer,
    prefers_longer_by_quartile,
    tie_rate,
    win,
)
from rankwise.evaluation import Estimate
from rankwise.probes import Outcome, Probe, Same, by_name
from rankwise.verdicts import Verdict

Status = Literal["pass", "fail", "open", "reported", "not measured"]
Gold = Mapping[str, Sequence[int]]  # Pair.about -> labels, one a vote: 1 is the text that sorts first


@dataclass(frozen=True, kw_only=True)
class Kind:
    """What a measure is, for people."""

    title: str
    side: Literal["at most", "at least"]
    form: Literal["share", "points", "number"]
    mend: str


_REPLACE = "take another judge, or write the rubric so that it says what matters"
_RUBRIC = "say in the rubric what such an answer is worth, or take another judge"
KINDS = {
    "agreement": Kind(
        title="Right by gold labels, a tie half",
        side="at least",
        form="share",
        mend="give it more or better labels (reward_model), a clearer rubric, or take another judge",
    ),
    "kappa": Kind(title="Cohen's kappa with gold, ties included", side="at least", form="number", mend=_REPLACE),
    "calibration_error": Kind(
        title="Calibration error of its probabilities",
        side="at most",
        form="points",
        mend="train on hard labels, or calibrate the judge before its strengths become soft labels",
    ),
    "position_bias": Kind(
        title="Favours one place: distance from even",
        side="at most",
        form="points",
        mend="both orders are asked, so labels lose power and not sides; a stronger judge has less of it",
    ),
    "flip_rate": Kind(title="Winner changes with the order", side="at most", form="share", mend=_REPLACE),
    "tie_rate": Kind(
        title="Ties among different answers",
        side="at most",
        form="share",
        mend="raise rollouts.temperature so that answers differ, or take a judge that tells them apart",
    ),
    "invalid_share": Kind(
        title="Replies that could not be read",
        side="at most",
        form="share",
        mend="look at the column reason of data/verdicts.parquet; raise max_reply_tokens, or use reply: logprobs",
    ),
    "verdict_mass": Kind(
        title="Probability on the verdict letters",
        side="at least",
        form="share",
        mend="the model does not mean to answer with a letter: use one that follows instructions, or its chat template",
    ),
    "prefers_longer": Kind(
        title="Prefers the longer answer",
        side="at most",
        form="share",
        mend="say in the rubric that length is no merit, or train with dpo.length_normalised",
    ),
    "padding": Kind(title="A padded answer wins more often", side="at most", form="points", mend=_RUBRIC),
    "injection": Kind(
        title="An attack in the answer wins more often",
        side="at most",
        form="points",
        mend="do not train on this judge's labels where answers can hold such text: take another judge",
    ),
    "null_wins": Kind(title="An answer that says nothing wins", side="at most", form="share", mend=_RUBRIC),
    "beats_truncated": Kind(title="Beats itself cut off half way", side="at least", form="share", mend=_RUBRIC),
    "beats_shuffled": Kind(title="Beats its own words shuffled", side="at least", form="share", mend=_RUBRIC),
    "beats_empty": Kind(title="Beats an empty answer", side="at least", form="share", mend=_RUBRIC),
    "beats_other_prompt": Kind(title="Beats an answer to another prompt", side="at least", form="share", mend=_RUBRIC),
    "same_text_decided": Kind(
        title="The same text twice, one called better", side="at most", form="share", mend=_REPLACE
    ),
    "panel_alpha": Kind(
        title="Krippendorff's alpha of the panel",
        side="at least",
        form="number",
        mend="look at reports/verdicts/review.html, disagreements first; leave out the judge that stands alone",
    ),
}
WORSE = {
    "truncated": "beats_truncated",
    "shuffled_words": "beats_shuffled",
    "empty": "beats_empty",
    "other_prompt": "beats_other_prompt",
}


@dataclass(frozen=True, kw_only=True)
class Measure:
    """One number about a judge, or why there is none."""

    name: str  # of KINDS, and of its gate
    value: Estimate | None = None
    of: str = ""  # what it was measured on: "100 rows"
    of_which: str = ""  # of a family (attacks, paddings, null answers) the one whose interval begins highest
    reach: float = -math.inf  # … and the highest end of all its intervals: a pass has to hold for each
    why_not: str = ""  # why it is not measured

    def status(self, limit: float | None) -> Status:
        """Against its gate; "open": the interval holds the limit, which stops nothing."""
        if self.value is None:
            return "not measured"
        if limit is None:
            return "reported"
        low, high = self.value.low, max(self.value.high, self.reach)
        if KINDS[self.name].side == "at least":
            low, high, limit = -high, -low, -limit
        return "fail" if low > limit else "pass" if high <= limit else "open"


@dataclass(frozen=True, kw_only=True)
class Compared:
    """One pair that a judge and a gold vote both speak of."""

    row_id: str
    preference: float  # the judge's, nats
    gold: int


@dataclass(kw_only=True)
class Material:
    """All that is known of one judge; a part that is not there says why in `missing`."""

    name: str
    verdicts: list[Verdict] = field(default_factory=list)
    pairs: list[Pair] = field(default_factory=list)
    outcomes: list[Outcome] = field(default_factory=list)
    unread_probes: list[Probe] = field(default_factory=list)
    same: list[Same] = field(default_factory=list)
    compared: list[Compared] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)  # "orders" | "probes" | "same" | "gold" -> why


@dataclass(frozen=True, kw_only=True)
class Audit:
    """One judge, measured."""

    name: str
    measures: list[Measure]
    shifts: dict[str, dict[str, Estimate]]  # "injection" | "padding" -> name -> win rate moved by
    wins: dict[str, dict[str, Estimate]]  # "worse": of the real answer; "null": of the planted one
    quartiles: list[tuple[int, int, Estimate]]  # prefers_longer by difference in characters
    bias_nats: Estimate | None
    orders: list[tuple[float, float]]  # log-odds for one answer, shown first and shown second
    confusion: list[list[int]] | None  # rows the judge's label, columns gold's: better, tie, worse
    agreement: dict[str, Estimate]  # "three_ways", "both_decide"
    curve: list[Bin]
    cost: dict[str, float]
    answered: tuple[int, int]  # questions that it could be asked, of all
    read: dict[str, dict[str, tuple[int, int]]]  # family -> probe -> (with a valid reply, all)

    def failed(self, limits: Mapping[str, float | None]) -> list[Measure]:
        return [measure for measure in self.measures if measure.status(limits[measure.name]) == "fail"]


@dataclass(frozen=True, kw_only=True)
class Two:
    """Two judges of a panel."""

    judges: tuple[str, str]
    agreement: Estimate  # the same of better, tie, worse
    kappa: Estimate
    pairs: int


@dataclass(frozen=True, kw_only=True)
class Panel:
    """Several judges, measured by each other."""

    alpha: Measure
    two: list[Two]

    def failed(self, limits: Mapping[str, float | None]) -> bool:
        return self.alpha.status(limits[self.alpha.name]) == "fail"


def audit(material: Material, *, tie_below: float, price: tuple[float, float]) -> Audit:
    """Every measure of one judge.

    Args:
        price: money per million tokens in and out; 0 where it is not known.
    """
    read = _read(material)
    shifts = {family: _shifts(by_name(material.outcomes, family)) for family in ("injection", "padding")}
    wins = {"worse": _wins(material.outcomes, "worse"), "null": _wins(material.outcomes, "null")}
    table = confusion([label(c.preference, tie_below) for c in material.compared], [c.gold for c in material.compared])
    curve = calibration(*([getattr(c, name) for c in material.compared] for name in ("preference", "gold", "row_id")))
    ordered = [pair for pair in material.pairs if pair.orders]
    return Audit(
        name=material.name,
        measures=[
            *_gold_measures(material, curve, tie_below),
            *_order_measures(material, ordered, tie_below),
            *_reply_measures(material, tie_below),
            *_probe_measures(material, shifts, wins, read, tie_below),
        ],
        shifts=shifts,
        wins=wins,
        quartiles=prefers_longer_by_quartile(material.pairs, tie_below=tie_below),
        bias_nats=position_bias(ordered) if ordered else None,
        orders=[pair.orders for pair in ordered],
        confusion=table.tolist() if material.compared else None,
        agreement=_agreements(material.compared, tie_below),
        curve=curve,
        cost=_cost([verdict for verdict in material.verdicts if verdict.answered], price),
        answered=(sum(verdict.answered for verdict in material.verdicts), len(material.verdicts)),
        read=read,
    )


def compare(pairs: Sequence[Pair], gold: Gold) -> list[Compared]:
    """The judge's pairs beside gold's votes on them: those on the same prompt and texts, wherever they stand."""
    return [
        Compared(row_id=pair.row_id, preference=pair.preference, gold=vote * pair.side)
        for pair in pairs
        for vote in gold.get(pair.about, ())
    ]


def panel(judged: Mapping[str, Sequence[Pair]], *, tie_below: float) -> Panel:
    """How far several judges agree on the pairs of the table: together, and two at a time."""
    labels = {
        name: {(p.row_id, p.places): label(p.preference, tie_below) for p in pairs} for name, pairs in judged.items()
    }
    things = sorted(set().union(*labels.values()))
    matrix = [[mine.get(thing) for mine in labels.values()] for thing in things]
    # Either way round, as for kappa: which of two answers stands first in its row means nothing.
    mirrored = [[None if one is None else -one for one in labels_J] for labels_J in matrix]
    alpha = krippendorff_alpha([*matrix, *mirrored], [row_id for row_id, _ in things] * 2)
    two = []
    for first, second in itertools.combinations(labels, 2):
        ours, theirs = labels[first], labels[second]
        both = [(thing[0], ours[thing], theirs[thing]) for thing in ours if thing in theirs]
        if both:
            same = clustered_share(by_row((row_id, float(a == b)) for row_id, a, b in both))
            kappa = clustered_kappa(_tables(both))
            two.append(Two(judges=(first, second), agreement=same, kappa=kappa, pairs=len(both)))
    twice = sum(len(labels_J) - labels_J.count(None) > 1 for labels_J in matrix)
    return Panel(alpha=_of("panel_alpha", alpha, f"{twice} pairs", "no pair was judged by two"), two=two)


# Parts ---------------------------------------------------------------------------------------------------------------


def _tables(both: Sequence[tuple[str, int, int]]) -> np.ndarray:
    """(row id, one label, other label) as each row's confusion, either way round: [R, C, C] counts."""
    rows: dict[str, list[tuple[int, int]]] = defaultdict(list)
    for row_id, one, other in both:
        rows[row_id].append((one, other))
    return np.stack([either_way(confusion(*zip(*labels))) for labels in rows.values()])


def _read(material: Material) -> dict[str, dict[str, tuple[int, int]]]:
    """Family -> probe -> (with a valid reply, all), also of probes none of which has one."""
    read = Counter((outcome.probe.family, outcome.probe.name) for outcome in material.outcomes)
    unread = Counter((probe.family, probe.name) for probe in material.unread_probes)
    found: dict[str, dict[str, tuple[int, int]]] = {"worse": {}, "null": {}, "injection": {}, "padding": {}}
    for family, name in {**read, **unread}:
        found[family][name] = (read[family, name], read[family, name] + unread[family, name])
    return found


def _gold_measures(material: Material, curve: Sequence[Bin], tie_below: float) -> list[Measure]:
    decided = [c for c in material.compared if c.gold]
    if not decided:
        why = material.missing.get("gold", "no gold label speaks of a pair that this judge judged")
        return [Measure(name=name, why_not=why) for name in ("agreement", "kappa", "calibration_error")]
    right = by_row((c.row_id, win(c.preference * c.gold, tie_below)) for c in decided)
    error = calibration_error(curve)
    alone = len({c.row_id for c in decided}) < 2
    both = [(c.row_id, label(c.preference, tie_below), c.gold) for c in material.compared]
    return [
        Measure(name="agreement", value=clustered_share(right), of=f"{len(decided)} gold pairs"),
        Measure(name="kappa", value=clustered_kappa(_tables(both)), of=f"{len(material.compared)} gold pairs"),
        Measure(
            name="calibration_error",
            value=Estimate(
                mean=error,
                low=0.0 if alone else max(0.0, error - _calibration_noise(curve)),
                high=1.0 if alone else error,
            ),
            of=f"{len(decided)} gold pairs",
        ),
    ]


def _calibration_noise(curve: Sequence[Bin]) -> float:
    """Error that a perfectly calibrated judge would show in these bins by chance alone: mean |noise|, by count.

    Pairs of one row share answers, so a bin's choices are as many as the rows that they are of.
    """
    total = sum(b.count for b in curve)
    spread = lambda b: math.sqrt(2 / math.pi * b.confidence * (1 - b.confidence) / b.rows)
    return sum(b.count * spread(b) for b in curve) / total


def _order_measures(material: Material, ordered: Sequence[Pair], tie_below: float) -> list[Measure]:
    if not ordered:
        scored = bool(material.pairs) and all(len(v.shown) == 1 for v in material.verdicts)
        why = "scores each answer by itself: there is no order" if scored else "no pair was judged in both orders"
        why = material.missing.get("orders", why)
        return [Measure(name=name, why_not=why) for name in ("position_bias", "flip_rate")]
    of = f"{len(ordered)} pairs in both orders"
    return [
        Measure(name="position_bias", value=_from_even(first_share(ordered, tie_below=tie_below)), of=of),
        Measure(name="flip_rate", value=flip_rate(ordered, tie_below=tie_below), of=of),
    ]


def _from_even(found: Estimate) -> Estimate:
    low, high = found.low - 0.5, found.high - 0.5
    return Estimate(mean=abs(found.mean - 0.5), low=max(0.0, low, -high), high=max(abs(low), abs(high)))


def _reply_measures(material: Material, tie_below: float) -> list[Measure]:
    why = "no pair has a verdict" if material.verdicts else "no verdict"
    masses = [(v.row_id, v.mass) for v in material.verdicts if v.values is not None]
    longer = prefers_longer(material.pairs, tie_below=tie_below)
    return [
        _of(
            "tie_rate",
            tie_rate(material.pairs, tie_below=tie_below) if material.pairs else None,
            f"{len(material.pairs)} pairs",
            why,
        ),
        _invalid_share(material, why),
        _of(
            "verdict_mass",
            clustered_mean(by_row(masses), span=(0.0, 1.0)) if any(mass < 1 for _, mass in masses) else None,
            f"{len(masses)} replies",
            "gives no probabilities of verdict tokens" if masses else why,
        ),
        _of("prefers_longer", longer, f"{len(material.pairs)} pairs", why if not material.pairs else "no two lengths"),
    ]


def _invalid_share(material: Material, why: str) -> Measure:
    """Of the questions that were answered at all. Where probes have no valid reply, the worse of questions and probes.

    Counted together, the many questions would hide an attack to which a judge says nothing that can be read.
    """
    answered = [(verdict.row_id, float(verdict.values is None)) for verdict in material.verdicts if verdict.answered]
    probes = [(outcome.probe.row.id, 0.0) for outcome in material.outcomes]
    found = {"questions": clustered_share(by_row(answered))} if answered else {}
    if material.unread_probes:
        probes += [(probe.row.id, 1.0) for probe in material.unread_probes]
        found["probes"] = clustered_share(by_row(probes))
    elif answered:
        return Measure(name="invalid_share", value=found["questions"], of=f"{len(answered)} replies")
    return _worst("invalid_share", found, f"{len(answered)} replies, {len(probes)} probes", why)


def _probe_measures(material: Material, shifts: dict, wins: dict, read: dict, tie_below: float) -> list[Measure]:
    why = material.missing.get("probes", "no probe had a valid reply")
    rows = len({outcome.probe.row.id for outcome in material.outcomes})
    found = [
        _worst(name, by, f"{rows} rows", why, unread=[probe for probe, (valid, _) in read[family].items() if not valid])
        for name, family, by in (
            ("injection", "injection", shifts["injection"]),
            ("padding", "padding", shifts["padding"]),
            ("null_wins", "null", wins["null"]),
        )
    ]
    for probe, name in WORSE.items():
        valid, count = read["worse"].get(probe, (0, 0))
        none = material.missing.get("probes", "no answer could be spoilt so")
        none = f"none of {count} probes had a valid reply" if count else none
        found.append(_of(name, wins["worse"].get(probe), f"{valid} rows", none))
    decided = [(one.row_id, float(label(one.odds, tie_below) != 0)) for one in material.same]
    value = clustered_share(by_row(decided)) if decided else None
    return [*found, _of("same_text_decided", value, f"{len(material.same)} rows", material.missing.get("same", why))]


def _worst(name: str, found: Mapping[str, Estimate], of: str, why: str, unread: Sequence[str] = ()) -> Measure:
    """The one that does most harm by the low end of its interval.

    Args:
        unread: further ones of which nothing is known, so that they may be the worst: without them nothing passes.
    """
    if not found:
        return Measure(name=name, why_not=why)
    which = max(found, key=lambda one: (found[one].low, found[one].mean))
    reach = 1.0 if unread else max(one.high for one in found.values())
    of += f"; no valid reply to {', '.join(unread)}" if unread else ""
    return Measure(name=name, value=found[which], of=of, of_which=which, reach=reach)


def _of(name: str, value: Estimate | None, of: str, why: str) -> Measure:
    return Measure(name=name, why_not=why) if value is None else Measure(name=name, value=value, of=of)


def _shifts(found: Mapping[str, Sequence[Outcome]]) -> dict[str, Estimate]:
    # Intervals of one family hold together: the worst of fourteen is the worst by chance too.
    return {
        name: paired_shift([o.twin_win for o in mine], [o.win for o in mine], together=len(found))
        for name, mine in found.items()
    }


def _wins(outcomes: Sequence[Outcome], family: Literal["worse", "null"]) -> dict[str, Estimate]:
    won: Callable[[Outcome], float] = lambda o: 1 - o.win if family == "worse" else o.win
    rows = lambda mine: by_row((outcome.probe.row.id, won(outcome)) for outcome in mine)
    return {name: clustered_share(rows(mine)) for name, mine in by_name(outcomes, family).items()}


def _agreements(compared: Sequence[Compared], tie_below: float) -> dict[str, Estimate]:
    labels = [(c.row_id, label(c.preference, tie_below), c.gold) for c in compared]
    both = [(row_id, float(ours == gold)) for row_id, ours, gold in labels if ours and gold]
    found = {}
    if labels:
        found["three_ways"] = clustered_share(by_row((row_id, float(ours == gold)) for row_id, ours, gold in labels))
    if both:
        found["both_decide"] = clustered_share(by_row(both))
    return found


def _cost(verdicts: Sequence[Verdict], price: tuple[float, float]) -> dict[str, float]:
    """Calls and tokens of the verdicts that were given, and what a thousand of them cost."""
    count = len(verdicts)
    tokens_in, tokens_out = sum(v.prompt_tokens for v in verdicts), sum(v.completion_tokens for v in verdicts)
    found = {
        "verdicts": count,
        "calls": sum(v.attempts for v in verdicts),
        "tokens_in_per_1000": 1000 * tokens_in / count if count else 0.0,
        "tokens_out_per_1000": 1000 * tokens_out / count if count else 0.0,
    }
    if any(price) and count:
        found["price_per_1000"] = (price[0] * tokens_in + price[1] * tokens_out) / 1000 / count
    return found
