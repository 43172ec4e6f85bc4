"""Which labels are doubtful: comparisons of two answers, and the kinds of disagreement found in each.

Pure functions of the table of replies. A comparison is what is trained on: two answers to one prompt, and every reply
that says something of both. Log-odds are in nats and in favour of the left answer, the one that is preferred.
"""

from __future__ import annotations

import hashlib
import math
from bisect import insort
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations, pairwise
from typing import TYPE_CHECKING, Any

from rankwise.agreement import pairs_of
from rankwise.ranking import ROUNDING
from rankwise.types import Row
from tasks.markup import CONTROLS

if TYPE_CHECKING:
    from rankwise.verdicts import Verdict

# Kinds of doubt as a page calls them, in its order. Of a contradiction one side is wrong.
CONTRADICTIONS = {"gold": "against gold", "panel": "judges disagree", "flip": "order flips", "circle": "circular"}
KINDS = {
    **CONTRADICTIONS,
    "close": "smallest gaps",
    "invalid": "invalid replies",
    "control": "control tokens",
    "random": "random sample",
}


@dataclass(frozen=True, kw_only=True)
class View:
    """What one judge says of two answers; log-odds that the left one is better, nats."""

    judge: str
    odds: float  # all its replies together
    orders: tuple[float, float] | None = None  # with the left one shown first, with the right one; None: no pair was

    @property
    def flips(self) -> bool:
        """Whether the two orders name different answers; a tie in one of them names none."""
        return self.orders is not None and self.orders[0] * self.orders[1] < 0

    def turned(self) -> View:
        """The same of the same answers, left and right exchanged."""
        orders = None if self.orders is None else (-self.orders[1], -self.orders[0])
        return View(judge=self.judge, odds=-self.odds, orders=orders)


@dataclass(kw_only=True)
class Comparison:
    """Two answers to a prompt, as the judges see them."""

    row: Row
    left: int  # place in the row of the answer that is preferred; of a tie, the earlier one
    right: int
    odds: float | None  # of the whole panel; None: not known
    views: tuple[View, ...]  # of those judges that say something
    gold: float | None = None  # by gold labels; None: there are none
    labels: int = 0  # voices of gold: people, or judges
    neighbours: bool = False  # in the ranking of the row, and no tie
    circle: tuple[int, ...] = ()  # three places, each of which beats the next, and the last the first
    kinds: dict[str, float] = field(default_factory=dict)  # kind -> nats by which the less sure side holds its opinion

    @property
    def gap(self) -> float:
        """How far the answers are apart, nats; infinite where nothing is known of them."""
        return math.inf if self.odds is None else abs(self.odds)

    @property
    def doubt(self) -> tuple:
        """Sort key, most doubtful first: contradictions that meet here, how sure their sides are, smaller gaps."""
        told = [self.kinds[kind] for kind in CONTRADICTIONS if kind in self.kinds]
        drawn = set(self.kinds) == {"random"}
        labels = self.labels if "gold" in self.kinds else 0
        return (-len(told), -max(told, default=0.0), -labels, drawn, self.gap, self.row.id, self.left, self.right)


def compare(
    row: Row, verdicts: Sequence[Verdict], gold: Sequence[Verdict] = (), *, tie_below: float = 0.0
) -> list[Comparison]:
    """Every two answers of a row that some reply says something of, with the contradictions in each."""
    found = list(_pairs(row, verdicts, gold, tie_below))
    _mark_invalid(found, verdicts)
    _mark_controls(row, found)
    _mark_circles(found, tie_below)
    _mark_neighbours(found, tie_below)
    return found


class Chosen:
    """Comparisons to be looked at, chosen as all of them pass: of each kind the limit most doubtful ones.

    Where gaps are concerned these are the smallest; and limit of all, drawn by a hash of their names, which makes them
    the same ones at any time. Only those are kept, each with whatever is added beside it.
    """

    def __init__(self, limit: int):
        self._limit, self._count = limit, 0
        self._best: dict[str, list[tuple]] = {kind: [] for kind in KINDS}
        self._totals: Counter[str] = Counter()

    def add(self, one: Comparison, beside: Any = None) -> None:
        self._count += 1
        for kind in one.kinds:
            self._offer(kind, one.doubt, one, beside)
        if one.odds is not None:
            self._offer("random", _lot(one), one, beside)
            if one.neighbours:
                self._offer("close", one.gap, one, beside)

    def _offer(self, kind: str, key: Any, one: Comparison, beside: Any) -> None:
        self._totals[kind] += 1
        best = self._best[kind]
        if len(best) == self._limit and best and not key < best[-1][0]:
            return
        insort(best, (key, self._count, one, beside))
        del best[self._limit :]

    def shown(self) -> tuple[list[tuple[Comparison, Any]], dict[str, tuple[int, int]]]:
        """The chosen ones, most doubtful first, each with what stands beside it; and of each kind how many are shown,
        and how many there are."""
        for *_, one, _ in self._best["close"]:
            one.kinds["close"] = one.gap
        for *_, one, _ in self._best["random"]:
            one.kinds["random"] = 0.0
        chosen = {id(one): (one, beside) for best in self._best.values() for _, _, one, beside in best}
        shown = sorted(chosen.values(), key=lambda told: told[0].doubt)
        of_kind = lambda kind: sum(kind in one.kinds for one, _ in shown)
        return shown, {kind: (of_kind(kind), self._totals[kind]) for kind in KINDS if self._totals[kind]}


def about(comparison: Comparison, verdicts: Sequence[Verdict]) -> list[Verdict]:
    """The replies on a row that say something of these two answers, or were to."""
    both = {comparison.left, comparison.right}
    return [one for one in verdicts if both <= set(one.shown) or (len(one.shown) == 1 and both >= set(one.shown))]


def _pairs(row: Row, verdicts: Sequence[Verdict], gold: Sequence[Verdict], tie_below: float) -> Iterator[Comparison]:
    """The comparisons of a row, with the contradictions that one of them has by itself."""
    views = _views(row, verdicts)
    several = any(len(seen) > 1 for seen in views.values())
    odds = _preferences(row, verdicts) if several else {places: seen[0].odds for places, seen in views.items()}
    labels, people = _preferences(row, gold), _views(row, gold)
    invalid = {_place(row, one) for one in verdicts if one.values is None and one.answered} - {None}
    for places in sorted({*views, *invalid}):
        (left, right), seen, sign = places, views.get(places, ()), 1
        if odds.get(places, 0.0) < 0:
            left, right, seen, sign = right, left, tuple(view.turned() for view in seen), -1
        found = Comparison(row=row, left=left, right=right, odds=None, views=seen)
        found.odds, found.gold = (sign * some[places] if places in some else None for some in (odds, labels))
        found.labels = len(people.get(places, ()))
        _mark_contradictions(found, tie_below)
        yield found


def _preferences(row: Row, verdicts: Sequence[Verdict]) -> dict[tuple[int, int], float]:
    """By places, the smaller first: log-odds that the first is better, of all judges together."""
    odds = {pair.places: pair.preference for pair in pairs_of(row, verdicts)} if verdicts else {}
    return {places: one if abs(one) > ROUNDING else 0.0 for places, one in odds.items()}


def _views(row: Row, verdicts: Sequence[Verdict]) -> dict[tuple[int, int], tuple[View, ...]]:
    """What each judge says of each pair of places, the smaller place first."""
    by_judge: dict[str, list[Verdict]] = defaultdict(list)
    for verdict in verdicts:
        by_judge[verdict.judge].append(verdict)
    found: dict[tuple[int, int], tuple[View, ...]] = {}
    for judge, mine in by_judge.items():
        for pair in pairs_of(row, mine):
            view = View(judge=judge, odds=pair.preference, orders=pair.orders)
            found[pair.places] = (*found.get(pair.places, ()), view)
    return found


def _mark_contradictions(one: Comparison, tie_below: float) -> None:
    """Two sides that name different answers; each kind with how sure its less sure side is."""
    sides = {"flip": [view.orders for view in one.views if view.orders], "panel": [[view.odds for view in one.views]]}
    sides["gold"] = [[one.gold, one.odds]] if None not in (one.gold, one.odds) else []
    for kind, cases in sides.items():
        sure = [min(max(odds), -min(odds)) for odds in cases if odds]
        if max(sure, default=0.0) > tie_below:
            one.kinds[kind] = max(sure)


def _mark_invalid(found: Sequence[Comparison], verdicts: Sequence[Verdict]) -> None:
    """A reply that could not be read is shown with one comparison, or a long list's would be with all of its own."""
    by_places = {frozenset((one.left, one.right)): one for one in found}
    for verdict in verdicts:
        if verdict.values is None and verdict.answered and found and (place := _place(found[0].row, verdict)):
            by_places[frozenset(place)].kinds["invalid"] = 0.0


def _place(row: Row, verdict: Verdict) -> tuple[int, int] | None:
    """The comparison that an invalid reply is shown with: of the first two answers that it saw."""
    others = [place for place in range(len(row.answers)) if place not in verdict.shown]
    both = [*verdict.shown, *others][:2]
    return (min(both), max(both)) if len(both) == 2 else None


def _mark_controls(row: Row, found: Sequence[Comparison]) -> None:
    if any(CONTROLS.search(message.content) for message in row.prompt):
        holding = set(range(len(row.answers)))
    else:
        holding = {place for place, answer in enumerate(row.answers) if CONTROLS.search(answer.text)}
    for one in found:
        if holding & {one.left, one.right}:
            one.kinds["control"] = 0.0


def _mark_circles(found: Sequence[Comparison], tie_below: float) -> None:
    """Of three answers that beat each other in a circle, the weakest comparison is the doubtful one."""
    beats = {(one.left, one.right): one for one in found if one.odds is not None and one.odds > tie_below}
    for low, middle, high in combinations(sorted({place for pair in beats for place in pair}), 3):
        for a, b, c in ((low, middle, high), (low, high, middle)):
            if (a, b) in beats and (b, c) in beats and (c, a) in beats:
                weakest = min((beats[pair] for pair in ((a, b), (b, c), (c, a))), key=lambda one: one.gap)
                weakest.circle, weakest.kinds["circle"] = (a, b, c), weakest.gap


def _mark_neighbours(found: Sequence[Comparison], tie_below: float) -> None:
    """Neighbours in the order of summed preferences: a small gap between them may as well be none."""
    known = {(one.left, one.right): one for one in found if one.odds is not None}
    sums: dict[int, float] = defaultdict(float)
    for (left, right), one in known.items():
        sums[left] += math.tanh(one.odds / 2)
        sums[right] -= math.tanh(one.odds / 2)
    for better, worse in pairwise(sorted(sums, key=lambda place: (-sums[place], place))):
        one = known.get((better, worse)) or known.get((worse, better))
        if one is not None and one.gap > tie_below:
            one.neighbours = True


def _lot(one: Comparison) -> bytes:
    return hashlib.sha256(repr((one.row.id, *sorted((one.left, one.right)))).encode()).digest()
