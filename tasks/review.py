"""The verdicts that a person should look at: one page of HTML, disagreements first, and the same as a table of MLflow.

    python -m tasks.review --rollouts data/rollouts.parquet --verdicts data/verdicts.parquet --out review.html
    python -m tasks.review --gold people.parquet --preferences data/preferences.parquet
    python -m tasks.review --verdicts gpt-4.parquet palm.parquet people.parquet --gold-judge people

Stage verdicts writes the page beside its metrics. Prices are in the environment, money a million tokens:
RANKWISE_JUDGE_PRICE_IN and _PRICE_OUT, of a panel's second judge RANKWISE_JUDGE_2_PRICE_IN, and so on.

The page is an artifact of the run and its comparisons are a table there; they are not MLflow traces. A comparison is
two orders of several judges side by side; a trace shows calls one below the other, and neither kinds of doubt nor their
order. And a trace with two calls inside took about 30 ms of CPU and 12 KB of store (MLflow 3.17, SQLite): 2 minutes for
the 4,000 comparisons of 8,000 verdicts. Table and page together took 0.05 s.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Container, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise import ranking
from rankwise.budget import prices as prices_of
from rankwise.rows import RowTable, read_rows, write_aside
from rankwise.types import Answer, Row, UserError, show_prompt
from rankwise.verdicts import Verdict, read_verdicts
from tasks import doubts
from tasks.doubts import KINDS, Comparison
from tasks.markup import CONTROLS, Html, table
from tasks.review_page import LONGEST_TEXT, Shown, money, named, nats, page, said_of_places, verdict_of

PREFIX = "RANKWISE_JUDGE"
LIMIT = 30  # comparisons shown of each kind

Verdicts = Mapping[str, Sequence[Verdict]]  # by row id
Prices = Mapping[str, tuple[float, float]]  # by judge: money a million tokens, of prompts and of replies


def write(
    path: Path,
    judged: Iterable[tuple[Row, Sequence[Verdict]]],
    *,
    gold: Verdicts | None = None,
    ranked: Iterable[Row] | None = None,
    tie_below: float = 0.0,
    prices: Prices | None = None,
    limit: int = LIMIT,
) -> list[dict[str, Any]]:
    """Write the page; returns what it shows, as records for the tracker's table.

    Args:
        judged: each row with the verdicts on it, once; only those shown are kept in memory.
        gold: what people or another judge say of the same rows, by row id.
        ranked: the rows as they are trained on; None: their ranks and strengths are computed here.
        tie_below: nats; preferences of at most so much are ties, and contradict nothing.
        prices: None: as the environment has them, for the judges in their order in the table.
        limit: comparisons of each kind.
    """
    chosen, seen = doubts.Chosen(limit), _Totals()
    for row, verdicts in judged:
        labels = (gold or {}).get(row.id, ())
        compared = doubts.compare(row, verdicts, labels, tie_below=tie_below)
        seen.add(verdicts, compared)
        for one in compared:
            chosen.add(one, (verdicts, labels))
    prices = _from_environment(seen.judges) if prices is None else prices
    kept, totals = chosen.shown()
    standing = _Standing(None if ranked is None else ranked, {one.row.id for one, _ in kept}, tie_below)
    shown = [_shown(one, *beside, standing, prices) for one, beside in kept]
    text = page(shown, totals, facts=seen.facts(), judges=seen.table(prices), rule=_rule(limit, tie_below))
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))
    return [_record(number, one) for number, one in enumerate(shown, start=1)]


class _Standing:
    """Ranks and strengths of the answers that are shown."""

    def __init__(self, ranked: Iterable[Row] | None, ids: Container[str], tie_below: float):
        self._tie_below = tie_below
        self._ranked = None if ranked is None else {row.id: row for row in ranked if row.id in ids}

    def of(self, row: Row, verdicts: Sequence[Verdict]) -> dict[int, Answer]:
        """By place in the row; answers without a rank, or rows that are not trained on, are left out."""
        if self._ranked is None:
            judged = ranking.rank(row, verdicts, tie_below=self._tie_below).row
        else:
            judged = self._ranked.get(row.id, Row(id=row.id, prompt=()))
        by_text = {answer.text: answer for answer in judged.answers}
        return {place: by_text[answer.text] for place, answer in enumerate(row.answers) if answer.text in by_text}


def _shown(
    one: Comparison, verdicts: Sequence[Verdict], gold: Sequence[Verdict], standing: _Standing, prices: Prices
) -> Shown:
    replies = doubts.about(one, verdicts)
    costs = [_cost([reply], prices[reply.judge]) for reply in replies if reply.judge in prices]
    return Shown(
        comparison=one,
        why=tuple((kind, _why(kind, one, replies)) for kind in KINDS if kind in one.kinds),
        replies=tuple(replies),
        labels=tuple(reply for reply in doubts.about(one, gold) if reply.values is not None),
        standing=standing.of(one.row, verdicts),
        cost=sum(costs) if costs else None,
    )


def _why(kind: str, one: Comparison, replies: Sequence[Verdict]) -> str:
    """What is doubtful, in a sentence; "" where the kind's name says it."""
    left, right = named(one.left), named(one.right)
    if kind == "gold":
        voices = f" ({one.labels} voices)" if one.labels > 1 else ""
        return f"Gold{voices} says {right}, {nats(abs(one.gold))}; the judges say {left}, {nats(one.gap)}."
    if kind == "panel":
        side = lambda odds: (left if odds > 0 else right) if odds else "a tie"
        return "; ".join(f"{view.judge} says {side(view.odds)}, {nats(abs(view.odds))}" for view in one.views) + "."
    if kind == "flip":
        return " ".join(_flip(view.judge, *view.orders) for view in one.views if view.flips).strip()
    if kind == "circle":
        a, b, c = map(named, one.circle)
        return f"{a} beats {b}, {b} beats {c}, and {c} beats {a}; of the three this comparison is the weakest."
    if kind == "invalid":
        invalid = [reply for reply in replies if reply.values is None and reply.answered]
        order = lambda reply: ", then ".join(str(place + 1) for place in reply.shown)
        return " ".join(f"{reply.judge}, shown {order(reply)}: {reply.reason or 'no verdict'}." for reply in invalid)
    if kind == "control":
        texts = {"the prompt": show_prompt(one.row.prompt)}
        texts |= {named(place): one.row.answers[place].text for place in (one.left, one.right)}
        counts = {name: sum(1 for _ in CONTROLS.finditer(text)) for name, text in texts.items()}
        return f"Control tokens: {', '.join(f'{count} in {name}' for name, count in counts.items() if count)}."
    return ""


def _flip(judge: str, left_first: float, right_first: float) -> str:
    place = "first" if left_first > 0 else "second"
    return f"{judge} takes whichever is shown {place}, by {abs(left_first):.2f} and by {abs(right_first):.2f} nats."


class _Totals:
    """What all verdicts and comparisons amount to, as they pass."""

    def __init__(self) -> None:
        self._rows = self._compared_rows = self._comparisons = 0
        self._by_judge: dict[str, Counter[str]] = {}

    @property
    def judges(self) -> list[str]:
        return list(self._by_judge)

    def add(self, verdicts: Sequence[Verdict], compared: Sequence[Comparison]) -> None:
        """A row's."""
        self._rows += 1
        self._compared_rows += bool(compared)
        self._comparisons += len(compared)
        for one in verdicts:
            mine = self._by_judge.setdefault(one.judge, Counter())
            mine["replies"] += 1
            mine["invalid"] += one.values is None and one.answered
            mine["read"] += one.prompt_tokens
            mine["written"] += one.completion_tokens
        for view in (view for one in compared for view in one.views if view.orders):
            self._by_judge[view.judge]["asked"] += 1
            self._by_judge[view.judge]["flips"] += view.flips

    def facts(self) -> str:
        if not self._by_judge:
            return "No judge said anything: there is no verdict to look at."
        total = sum(self._by_judge.values(), Counter())
        tokens = total["read"] + total["written"]
        facts = [
            f"{total['replies']:,} replies of {', '.join(self.judges)}",
            f"{self._comparisons:,} comparisons of {self._compared_rows:,} of {self._rows:,} prompts",
            f"{total['invalid']:,} replies invalid",
        ]
        return " · ".join([*facts, f"{tokens:,} tokens"] if tokens else facts)

    def table(self, prices: Prices) -> Html:
        columns = ["judge", "replies", "invalid", "order flips", "tokens read", "tokens written", "cost"]
        cost = lambda mine, price: (mine["read"] * price[0] + mine["written"] * price[1]) / 1e6
        lines = [
            [
                judge,
                f"{mine['replies']:,}",
                f"{mine['invalid']:,}",
                f"{mine['flips']:,} of {mine['asked']:,}" if mine["asked"] else "",
                f"{mine['read']:,}",
                f"{mine['written']:,}",
                money(cost(mine, prices[judge])) if judge in prices else "no price given",
            ]
            for judge, mine in self._by_judge.items()
        ]
        return table(columns, lines)


def _rule(limit: int, tie_below: float) -> list[str]:
    return [
        "A comparison is two answers to one prompt, and every reply on both of them. All are counted. Shown "
        f"are the {limit} most doubtful of each kind, and {limit} drawn at random from all.",
        "The more contradictions meet in a comparison (against gold, judges disagree, order flips, circular), the "
        "earlier it stands; among equals, the surer the less sure of the two sides is; then the more voices gold has; "
        "then the smaller the gap.",
        "Against gold: the judges prefer one answer, and people or gold labels the other. Judges disagree: two of a "
        "panel prefer different answers. Order flips: a judge prefers one answer in one order and the other in the "
        "other. Circular: three answers beat each other in a circle. Smallest gaps: neighbours in a ranking that "
        "nearly tie. Invalid replies: no attempt could be read, so that the question has no verdict.",
        "Numbers are log-odds in nats that the answer named is the better one, with the probability that they stand "
        f"for; strengths are log-odds too. At most {tie_below:g} nats is a tie, and contradicts nothing.",
    ]


def _record(number: int, one: Shown) -> dict[str, Any]:
    """A line of the tracker's table."""
    told, texts = one.comparison, [answer.text[:LONGEST_TEXT] for answer in one.comparison.row.answers]
    say = lambda reply: f"{reply.judge} shown {[place + 1 for place in reply.shown]}: {said_of_places(reply)}"
    replies = [f"{say(reply)} {reply.reason}".strip() for reply in (*one.replies, *one.labels)]
    return {
        "number": number,
        "kinds": ", ".join(KINDS[kind] for kind, _ in one.why),
        "why": " ".join(text for _, text in one.why if text),
        "verdict": verdict_of(told),
        "nats": None if told.odds is None else round(told.odds, 4),
        "gold nats": None if told.gold is None else round(told.gold, 4),
        "row": told.row.id,
        "prompt": show_prompt(told.row.prompt)[:LONGEST_TEXT],
        "left": f"{named(told.left)}: {texts[told.left]}",
        "right": f"{named(told.right)}: {texts[told.right]}",
        "replies": "\n".join(replies)[:LONGEST_TEXT],
        "tokens": sum(reply.prompt_tokens + reply.completion_tokens for reply in one.replies),
        "cost": one.cost,
    }


def _cost(replies: Iterable[Verdict], price: tuple[float, float]) -> float:
    read, written = price
    return sum(one.prompt_tokens * read + one.completion_tokens * written for one in replies) / 1e6


def _from_environment(judges: Sequence[str]) -> dict[str, tuple[float, float]]:
    """Prices of the judges that have one; a panel's second judge has variables of its own."""
    prefixes = [PREFIX if number == 1 else f"{PREFIX}_{number}" for number in range(1, len(judges) + 1)]
    found = {judge: prices_of(prefix, os.environ) for judge, prefix in zip(judges, prefixes)}
    return {judge: price for judge, price in found.items() if any(price)}


def _read(paths: Sequence[Path], judges: Sequence[str], rows: Sequence[Row]) -> dict[str, list[Verdict]]:
    """The verdicts of tables, or of some of their judges; raises UserError where one of these is in none of them.

    Raises it too where a verdict is on other texts than the rows hold.
    """
    by_id = {row.id: row for row in rows}
    found: dict[str, list[Verdict]] = defaultdict(list)
    for path in paths:
        for row_id, mine in read_verdicts(path, by_id).items():
            found[row_id] += mine
    known = dict.fromkeys(one.judge for mine in found.values() for one in mine)
    if missing := [judge for judge in judges if judge not in known]:
        raise UserError(
            f"{', '.join(map(str, paths))}: no verdict of {', '.join(missing)}; judges there are {', '.join(known)}"
        )
    return {row_id: [one for one in mine if not judges or one.judge in judges] for row_id, mine in found.items()}


def main() -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.review", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--rollouts", type=Path, default=Path("data/rollouts.parquet"), help="rows with answers (%(default)s)")
    add("--verdicts", type=Path, nargs="+", default=[Path("data/verdicts.parquet")], help="what judges said of them")
    add("--judge", nargs="+", default=[], help="only these judges of --verdicts")
    add("--gold", type=Path, nargs="+", default=[], help="such tables of people's verdicts, or of another judge's")
    add("--gold-judge", nargs="+", default=[], help="only these judges of --gold; without --gold, of --verdicts")
    add("--preferences", type=Path, help="the ranked rows; without it ranks are computed from the verdicts")
    add("--tie-below", type=float, default=0.0, help="preferences of at most so many nats are ties (%(default)s)")
    add("--limit", type=int, default=LIMIT, help="comparisons of each kind (%(default)s)")
    add("--out", type=Path, default=Path("review.html"), help="the page (%(default)s)")
    try:
        return _by_hand(parser.parse_args())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _by_hand(given: argparse.Namespace) -> int:
    rows = read_rows(given.rollouts)
    verdicts, gold = _read(given.verdicts, given.judge, rows), None
    if given.gold or given.gold_judge:
        gold = _read(given.gold or given.verdicts, given.gold_judge, rows)
    if not given.gold and not given.judge:  # gold is in the same table, and is no judge of the panel
        verdicts = {
            row_id: [one for one in mine if one.judge not in given.gold_judge] for row_id, mine in verdicts.items()
        }
    ranked = RowTable(given.preferences) if given.preferences else None
    judged = ((row, verdicts.get(row.id, ())) for row in rows)
    shown = write(given.out, judged, gold=gold, ranked=ranked, tie_below=given.tie_below, limit=given.limit)
    print(f"{given.out}: {len(shown)} comparisons")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
