"""When a challenger takes the champion's place: the rule, as checks with their numbers, and what is said of it.

All of it is arithmetic on the metrics of tasks.evaluate, in which the challenger is the policy and the champion the
model that it is held against.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rankwise.types import Row
from tasks.params import param

TURNED_DOWN = ("rejected", "rolled back")
ROLES = {"policy": "challenger", "reference": "champion"}  # names in an evaluation's metrics -> in a promotion's


@dataclass(frozen=True, kw_only=True)
class Params:
    """The rule's bounds."""

    win_rate_above: float = param(
        0.5, "by the judge, the lower 95 % bound of the win rate over the champion is above this", ge=0, le=1
    )
    gold_not_below: float | None = param(
        0.5, "by gold, the upper 95 % bound is no lower than this: gold does not contradict; null: gold is not asked"
    )
    equal_length_above: float = param(0.5, "the judge's win rate at equal length is above this", ge=0, le=1)
    length_at_least: float = param(0.67, "mean words of an answer over the champion's, at least", gt=0)
    length_at_most: float = param(1.5, "mean words of an answer over the champion's, at most", gt=0)
    distinct_at_least: float = param(
        0.9, "distinct-1 and distinct-2 over the champion's, at least: its answers are not all alike", ge=0
    )


@dataclass(frozen=True, kw_only=True)
class Check:
    """One condition of the rule."""

    name: str
    value: float | None  # None: a fact without a number
    bound: float | None
    rule: str  # "above", "at least", "at most", ""
    passed: bool

    def said(self) -> str:
        """ "win rate (judge), lower bound: 0.47, above 0.5 was asked for"."""
        if self.value is None:
            return self.name
        return f"{self.name}: {self.value:.3g}, {self.rule} {self.bound:g} is asked for"


def check(metrics: Mapping[str, Any], params: Params, *, gates: str, decided: str = "") -> list[Check]:
    """Every condition with its number; a promotion needs all of them.

    Args:
        metrics: of tasks.evaluate.measure, under its names or a promotion's.
        gates: the challenger's tag of its own gates: "passed" or "failed".
        decided: the challenger's tag of an earlier decision, "rejected" or "rolled back"; "" where there is none.
    """
    metrics = renamed(metrics)
    wins = metrics["win_rate"]
    judge = "judge" if "judge" in wins else "gold"
    found = [
        _least(f"win rate ({judge}), lower bound", wins[judge]["low"], params.win_rate_above, strictly=True),
        _least(
            f"win rate at equal length ({judge})",
            metrics["win_rate_length_controlled"][judge],
            params.equal_length_above,
            strictly=True,
        ),
    ]
    if judge != "gold" and "gold" in wins and params.gold_not_below is not None:
        found.append(_least("win rate (gold), upper bound", wins["gold"]["high"], params.gold_not_below))
    length = ratio(metrics["length"])
    found += [
        _least("length of answers over the champion's", length, params.length_at_least),
        _most("length of answers over the champion's", length, params.length_at_most),
    ]
    found += [
        _least(f"distinct-{n} over the champion's", ratio(metrics[f"distinct_{n}"]), params.distinct_at_least)
        for n in (1, 2)
    ]
    found.append(_fact("its own gates passed" if gates == "passed" else f"its own gates: {gates}", gates == "passed"))
    if decided in TURNED_DOWN:
        found.append(_fact(f"it was {decided} before: a person decides", False))
    return found


def renamed(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of an evaluation with the models called what they are in a promotion, at any depth."""
    return {
        ROLES.get(key, key): renamed(value) if isinstance(value, Mapping) else value for key, value in metrics.items()
    }


def ratio(both: Mapping[str, float]) -> float:
    """The challenger's number over the champion's; two zeros are alike, and a large number stands for no bound."""
    if both["challenger"] == both["champion"]:
        return 1.0
    return both["challenger"] / both["champion"] if both["champion"] else 1e9


def odds(row: Row) -> dict[str, float | None]:
    """By how much each judge prefers the challenger's answer, log-odds; None where it gave no valid verdict."""
    ending = "_log_odds"
    return {key.removesuffix(ending): value for key, value in row.meta.items() if key.endswith(ending)}


def by_loss(rows: Sequence[Row]) -> list[Row]:
    """The rows that the challenger loses most first, by gold where there is one; those without a verdict last."""

    def loss(row: Row) -> float:
        value = odds(row).get("gold", odds(row).get("judge"))
        return math.inf if value is None else value

    return sorted(rows, key=loss)


def changed(rows: Sequence[Row], tie_below: float) -> dict[str, Any]:
    """How many prompts are answered differently, and how those are judged: {"rows", "of", "judge": {"better", …}}."""
    different = [row for row in rows if row.answers[0].text != row.answers[1].text]
    counts: dict[str, Any] = {"rows": len(different), "of": len(rows)}
    for judge in odds(rows[0]):
        values = [odds(row)[judge] for row in different]
        known = [value for value in values if value is not None]
        better, worse = (sum(sign * value > tie_below for value in known) for sign in (1, -1))
        counts[judge] = {"better": better, "worse": worse, "tie": len(known) - better - worse}
    return counts


def why(checks: list[Check]) -> str:
    """The verdict's reason in a line."""
    failed = [one.said() for one in checks if not one.passed]
    return "; ".join(failed) if failed else "every condition of the rule holds"


def as_records(checks: list[Check]) -> list[dict[str, Any]]:
    return [asdict(one) for one in checks]


def _least(name: str, value: float, bound: float, *, strictly: bool = False) -> Check:
    passed = value > bound if strictly else value >= bound
    return Check(name=name, value=value, bound=bound, rule="above" if strictly else "at least", passed=passed)


def _most(name: str, value: float, bound: float) -> Check:
    return Check(name=name, value=value, bound=bound, rule="at most", passed=value <= bound)


def _fact(name: str, passed: bool) -> Check:
    return Check(name=name, value=None, bound=None, rule="", passed=passed)
