"""Comparisons of answers as one page of HTML for people, the most doubtful one open; readable on a phone.

What judges, answers and prompts say is data and may be hostile: see tasks.markup. The script filters by kind and moves
from one comparison to the next; without it the page shows everything.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from rankwise.types import Answer
from rankwise.verdicts import LETTERS
from tasks.doubts import CONTRADICTIONS, KINDS, Comparison
from tasks.markup import Html, document, table, tag, text_of

if TYPE_CHECKING:
    from rankwise.verdicts import Verdict

LONGEST_TEXT = 4000  # characters of a prompt's turn or an answer that are shown
LONGEST_REPLY = 2000  # the same of a raw reply or a reason
LONGEST_LINE = 90  # the same of what stands in a line of its own: names, the prompt's beginning
TITLE = "Verdicts to look at, the most doubtful first"

STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1b1b1b; --soft: #5c5c5c; --line: #d5d5d5; --card: #f6f6f4;
  --better: #0060a8; --worse: #a84300; --mark: #ffd84d; --bad: #a5122a; }
@media (prefers-color-scheme: dark) {
  :root { --back: #141414; --text: #e6e6e6; --soft: #a3a3a3; --line: #3a3a3a; --card: #1f1f1f;
    --better: #6cb8ff; --worse: #ff9d5c; --mark: #6d5600; --bad: #ff7d8f; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; padding: .8rem 1rem 3rem; max-width: 80rem; background: var(--back); color: var(--text);
  font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.2rem; margin: 0; }
h2, h3 { font-size: .95rem; margin: 0; }
p { margin: .3rem 0; }
summary { cursor: pointer; }
summary:focus-visible, .text:focus-visible { outline: 2px solid var(--better); outline-offset: 2px; }
mark { background: var(--mark); color: inherit; border-radius: .2rem; padding: 0 .15rem;
  font-family: ui-monospace, monospace; }
kbd { border: 1px solid var(--line); border-radius: .2rem; padding: 0 .3rem; }
.soft { color: var(--soft); font-size: .87rem; }
.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.bad { color: var(--bad); }
fieldset { border: 0; padding: 0; margin: .5rem 0; display: flex; flex-wrap: wrap; gap: .35rem; }
legend { position: absolute; clip-path: inset(50%); }
fieldset label { border: 1px solid var(--line); border-radius: 1rem; padding: .15rem .7rem; cursor: pointer;
  white-space: nowrap; }
fieldset label:has(:checked) { border-color: var(--better); box-shadow: inset 0 0 0 1px var(--better); }
fieldset label:has(:focus-visible) { outline: 2px solid var(--better); outline-offset: 2px; }
fieldset input { margin: 0 .35rem 0 0; accent-color: var(--better); }
.one { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; background: var(--card); }
.one[hidden] { display: none; }
.one > summary { padding: .45rem .7rem; display: flex; flex-wrap: wrap; gap: .15rem .6rem; align-items: baseline; }
.one > summary::before { content: "\\25B8"; color: var(--soft); }
.one[open] > summary::before { content: "\\25BE"; }
.one > div { padding: 0 .7rem .7rem; display: grid; grid-template-columns: minmax(0, 1fr); gap: .6rem; }
.kind { border: 1px solid currentcolor; border-radius: .3rem; padding: 0 .4rem; font-size: .8rem; color: var(--soft); }
.kind.bad { color: var(--bad); }
.excerpt { color: var(--soft); flex: 1 1 12rem; min-width: 0; overflow: hidden; text-overflow: ellipsis;
  white-space: nowrap; }
.why { margin: 0; padding-left: 1.2rem; }
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .6rem; }
.text { margin: .2rem 0 0; padding: .45rem .6rem; background: var(--back); border: 1px solid var(--line);
  border-radius: .3rem; white-space: pre-wrap; max-height: 16rem; overflow: auto; font-size: .92rem; }
.prompt { max-height: 7.5rem; }
.raw { font: .82rem/1.4 ui-monospace, monospace; }
.better h3 { color: var(--better); }
.worse h3 { color: var(--worse); }
.better .text { border-left: 3px solid var(--better); }
.worse .text { border-left: 3px solid var(--worse); }
table { border-collapse: collapse; width: 100%; font-size: .87rem; }
th, td { text-align: left; vertical-align: top; padding: .25rem .6rem .25rem 0; border-top: 1px solid var(--line); }
th { color: var(--soft); font-weight: normal; border: 0; white-space: nowrap; }
@media (max-width: 45rem) {
  body { padding: .6rem .6rem 3rem; }
  fieldset { flex-wrap: nowrap; overflow-x: auto; padding: .2rem; }
  .two { grid-template-columns: minmax(0, 1fr); }
  thead { display: none; }
  tr { display: block; border-top: 1px solid var(--line); padding: .3rem 0; }
  td { display: inline; border: 0; padding: 0; }
  td:empty { display: none; }
  td:not(:first-child)::before { content: " · " attr(data-name) " "; color: var(--soft); }
  td[data-name^=reason] { display: block; }
  td[data-name^=reason]::before { content: none; }
}
"""

SCRIPT = """
const all = [...document.querySelectorAll('.one')], seen = () => all.filter(one => !one.hidden);
document.querySelector('fieldset').addEventListener('change', event => {
  const kind = event.target.value;
  for (const one of all) one.hidden = kind !== 'all' && !one.dataset.kinds.split(' ').includes(kind);
  seen().slice(0, 1).forEach(one => one.open = true);
});
document.addEventListener('keydown', event => {
  const step = {j: 1, k: -1, o: 0}[event.key], some = seen();
  if (step === undefined || event.ctrlKey || event.metaKey || event.altKey || !some.length) return;
  const at = some.findIndex(one => one.contains(document.activeElement));
  const one = some[at < 0 ? 0 : Math.min(Math.max(at + step, 0), some.length - 1)];
  if (!step) one.open = !one.open;
  one.querySelector('summary').focus({preventScroll: true});
  one.scrollIntoView({block: 'start'});
});
"""


@dataclass(frozen=True, kw_only=True)
class Shown:
    """A comparison with all that a page says of it."""

    comparison: Comparison
    why: tuple[tuple[str, str], ...]  # kind, and what is doubtful in a sentence; "" where the kind says it
    replies: tuple[Verdict, ...]
    labels: tuple[Verdict, ...]  # what gold says
    standing: dict[int, Answer]  # place -> the answer with its rank and strength
    cost: float | None  # money that the replies cost; None where no price is known


def page(
    shown: Sequence[Shown], totals: dict[str, tuple[int, int]], *, facts: str, judges: Html, rule: Sequence[str]
) -> str:
    """The whole file.

    Args:
        totals: kind -> how many are shown, how many there are.
        facts: one line on what was judged.
        judges: a table of them.
        rule: how the comparisons were chosen, in paragraphs.
    """
    key = lambda name: tag("kbd", name)
    keys = ["Keys: ", key("j"), " next, ", key("k"), " the one before, ", key("o"), " open and close."]
    body = [
        tag("h1", TITLE),
        tag("p", text_of(facts, LONGEST_REPLY), class_="soft"),
        _filters(len(shown), totals),
        tag("main", *(_comparison(number, one) for number, one in enumerate(shown, start=1))),
        tag("details", tag("summary", "Judges, tokens and cost"), judges),
        tag("details", tag("summary", "How these were chosen"), *(tag("p", line) for line in rule)),
        tag("p", *keys, class_="soft"),
    ]
    return document(TITLE, body, style=STYLE, script=SCRIPT)


def named(place: int) -> str:
    """What people call an answer."""
    return f"answer {place + 1}"


def nats(odds: float) -> str:
    """Log-odds and the probability that they stand for."""
    return f"{odds:+.2f} nats ({(1 + math.tanh(odds / 2)) / 2:.0%})"


def money(cost: float) -> str:
    """Money in the unit of the prices given."""
    return f"{cost:,.2f}" if cost >= 1 else f"{cost:.2g}"


def verdict_of(told: Comparison) -> str:
    """What the judges say of two answers, in a few words."""
    left, right = named(told.left), named(told.right)
    if told.odds is None:
        return f"no verdict on {left} and {right}"
    return f"{left} over {right}" if told.odds else f"{left} and {right} tie"


def said_of_places(reply: Verdict) -> str:
    """The verdict as the judge put it, and the answers that it means."""
    if reply.values is None:
        return "invalid" if reply.answered else "not answered"
    if len(reply.shown) == 1:
        return f"score {reply.values[0]:.3f}"
    letters = dict(zip(LETTERS, reply.shown))
    meant = re.sub(r"\b[A-Z]\b", lambda found: str(letters.get(found[0], -1) + 1), reply.said)
    what = "answer " if len(reply.said) == 1 else ""
    return f"{reply.said}: {what}{meant}" if meant != reply.said else reply.said


def _filters(count: int, totals: dict[str, tuple[int, int]]) -> Html:
    options = [("all", f"all {count}")]
    options += [(kind, f"{KINDS[kind]} {shown:,} of {total:,}") for kind, (shown, total) in totals.items()]
    choice = lambda kind: tag("input", type="radio", name="kind", value=kind, checked=kind == "all")
    return tag("fieldset", tag("legend", "Show"), *(tag("label", choice(kind), name) for kind, name in options))


def _comparison(number: int, one: Shown) -> Html:
    told = one.comparison
    prompt = " ".join(" ".join(message.content for message in told.row.prompt).split())
    line = tag(
        "summary",
        tag("span", str(number), class_="soft number"),
        *(tag("span", KINDS[kind], class_="kind bad" if kind in CONTRADICTIONS else "kind") for kind, _ in one.why),
        tag("b", verdict_of(told)),
        tag("span", "" if told.odds is None else nats(told.odds), class_="number"),
        tag("span", text_of(prompt[:LONGEST_LINE], LONGEST_LINE), class_="excerpt", dir="auto"),
    )
    inside = tag(
        "div",
        tag("ul", *(tag("li", text_of(text, LONGEST_REPLY)) for _, text in one.why if text), class_="why"),
        tag("div", tag("h2", "Prompt ", _soft(told.row.id)), *map(_turn, told.row.prompt)),
        tag("div", *(_answer(one, place) for place in (told.left, told.right)), class_="two"),
        tag("div", _replies(one), *_cost(one)),
    )
    return tag("details", line, inside, class_="one", data_kinds=" ".join(told.kinds), open=number == 1)


def _turn(message) -> Html:
    role = [_soft(message.role)] if message.role != "text" else []
    return tag("div", *role, _text(message.content, "text prompt"))


def _answer(one: Shown, place: int) -> Html:
    told, answer = one.comparison, one.comparison.row.answers[place]
    ranked = one.standing.get(place)
    facts = [f"{len(answer.text.split()):,} words"]
    if ranked is not None and ranked.strength is not None:
        error = "" if ranked.strength_se is None else f" ± {ranked.strength_se:.2f}"
        facts.insert(0, f"strength {ranked.strength:+.2f}{error}")
    if ranked is not None and ranked.rank is not None:
        facts.insert(0, f"rank {ranked.rank + 1} of {len(one.standing)}")
    if answer.source:
        facts.append(f"by {answer.source}")
    better = bool(told.odds) and place == told.left
    return tag(
        "article",
        tag("h3", named(place).capitalize(), " · preferred" if better else ""),
        _soft(" · ".join(facts)),
        _text(answer.text),
        class_=("better" if better else "worse") if told.odds else None,
    )


def _replies(one: Shown) -> Html:
    better = f"{named(one.comparison.left)} better by"
    columns = ["judge", "shown", "said", better, "mass", "tokens", "reason and raw reply"]
    rows = [_reply(one.comparison, reply, "") for reply in one.replies]
    rows += [_reply(one.comparison, reply, "gold: ") for reply in one.labels]
    filled = [place for place in range(len(columns)) if any(row[place] for row in rows)]
    return table([columns[place] for place in filled], [[row[place] for place in filled] for row in rows])


def _reply(told: Comparison, reply: Verdict, role: str) -> list[str]:
    number = lambda text: tag("span", text, class_="number") if text else ""
    more = [f"draw {reply.sample + 1}"] * bool(reply.sample) + [f"{reply.attempts} attempts"] * (reply.attempts > 1)
    gap = ""
    if reply.values is not None and len(reply.shown) > 1:
        values = dict(zip(reply.shown, reply.values))
        gap = f"{values[told.left] - values[told.right]:+.2f}"
    tokens = f"{reply.prompt_tokens:,} + {reply.completion_tokens:,}"
    raw = [tag("details", tag("summary", "raw reply"), _text(reply.raw, "text raw"))] if reply.raw else []
    return [
        tag("bdi", role, text_of(reply.judge, LONGEST_LINE), _soft("".join(f", {text}" for text in more))),
        ", then ".join(str(place + 1) for place in reply.shown),
        tag(
            "span",
            text_of(said_of_places(reply), LONGEST_LINE),
            class_="bad" if reply.values is None and reply.answered else None,
        ),
        number(gap),
        number(f"{reply.mass:.3f}" if reply.mass != 1 else ""),
        number(tokens if tokens != "0 + 0" else ""),
        tag("div", text_of(reply.reason, LONGEST_REPLY), *raw, dir="auto") if reply.reason or raw else "",
    ]


def _cost(one: Shown) -> list[Html]:
    return [] if one.cost is None else [tag("p", f"These replies cost {money(one.cost)}.", class_="soft")]


def _soft(text: str) -> Html:
    return tag("span", text_of(text, LONGEST_LINE), class_="soft")


def _text(text: str, class_: str = "text") -> Html:
    # No <pre>: it swallows a newline at its start.
    return tag("div", text_of(text, LONGEST_TEXT), class_=class_, dir="auto", tabindex="0")
