"""The diagnosis as a page for people: the answer first, then why, then bins, then the rows to look at.

One file of HTML that needs no other, pictures included, and the same in Markdown. Prompts and answers are data and may
be hostile: tasks.markup escapes them, tasks.pages.cell in Markdown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.diagnosis import Bin, Summary, Trained, by_rank, summary
from rankwise.types import Row, show_prompt
from tasks.diagnosis_facts import Finding, facts_of, signed
from tasks.diagnosis_words import answer, todo
from tasks.markup import Html, document, table, tag, text_of
from tasks.pages import STYLE, band, cell, markdown_table, picture

if TYPE_CHECKING:
    from tasks.diagnosis import Diagnosis

TITLE = "Diagnosis of the policy"
QUESTION = "The chosen log-prob falls too. Is that normal?"
SHOWN_REASONS = 4  # sentences beside the answer; the rest follow below
LONGEST_TEXT = 2000  # characters of a prompt or an answer that are shown
LONGEST_CELL = 300  # the same in Markdown
LONGEST_LINE = 90  # the same of an id

MORE_STYLE = """
.watch::before, .concern::before { content: "look: "; font-weight: 700; color: var(--open); }
.concern::before { content: "concern: "; color: var(--bad); }
details { border: 1px solid var(--line); border-radius: .4rem; margin: .4rem 0; padding: .3rem .7rem;
  background: var(--card); }
.scroll { overflow-x: auto; }
.scroll td { white-space: nowrap; }
summary { cursor: pointer; font-variant-numeric: tabular-nums; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: .6rem; }
.text { margin: .2rem 0 .5rem; padding: .45rem .6rem; background: var(--back); border: 1px solid var(--line);
  border-radius: .3rem; white-space: pre-wrap; max-height: 14rem; overflow: auto; font-size: .92rem; }
mark { background: #ffd84d; color: #1b1b1b; border-radius: .2rem; padding: 0 .15rem; font-family: monospace; }
"""

DEFINITIONS = (
    "Change of an answer: h = log π(y) − log π_ref(y), nats, summed over its tokens with its end token; π_ref is the "
    "reference that this round's policy was held to. Best and worst (chosen and rejected) are the first and the last "
    "answer of a row; of tied ones, the one that stands there.",
    "Margin: h of the best minus h of the worst; so the best's part is h of the best, the worst's part is −h of the "
    "worst, and they add up. Common movement: the mean of h over all K answers of a row; spread: their standard "
    "deviation about it. The best's share is its part of the margin, signed; the worst's is one minus it.",
    "Implicit reward: what the loss compares, s = β·h, or with dpo.length_normalised β·h a token times the mean length "
    "of the row's answers. Accuracy: the share of ranked pairs that implicit rewards order as the label does, equal "
    "rewards one half; so it is 50 % while the policy is its reference.",
    "Contradicted: a training row whose worst answer has the larger implicit reward after training. Its confidence is "
    "σ of that difference, the probability that the policy gives to the other order. A small gap of the judge "
    "beside it speaks for noise in the label, a large one for a look at the row.",
    "Order by likelihood: whether a model gives the best answer more log-probability than the worst, a token where "
    "dpo.length_normalised is set and in sum where not. It needs no reference. A row is mended where the reference had "
    "it wrong and the policy has it right, broken the other way; equal counts as wrong.",
    "KL(π_ref‖π) is estimated by the mean of −h over answers that the reference drew, exactly so at "
    "rollouts.temperature 1 without top_p, top_k or penalties; at other settings it is near.",
)

Pictures = Mapping[str, Path]  # caption -> PNG


# Tables --------------------------------------------------------------------------------------------------------------

Table = tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]  # heading, explanation, columns, rows


def tables(found: Diagnosis) -> list[Table]:
    """Every table of the page that these rows allow."""
    what = _split(found.evidence)
    bins = (
        ("By length of the answers", "mean tokens of a row's answers", found.by_length),
        ("By difference in length", "tokens of the best minus the worst", found.by_longer),
        ("By the judge's gap", "log-odds for best over worst, nats", found.by_gap),
    )
    told: list[Table] = [
        ("How far answers moved", "Means over rows ± half their 95 % interval.", *_units(found)),
        *(
            (name, f"{what.capitalize()}; changes in nats, means over rows.", *_bins(key, some))
            for name, key, some in bins
        ),
        ("By rank", f"{what.capitalize()}, every answer by its rank; ties share one.", *_ranks(found)),
    ]
    return [one for one in told if one[3]]


def _units(found: Diagnosis) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("rows", "unit", "best", "worst", "margin", "common", "spread", "best's share")
    units = (
        ("per_answer", "nats an answer", 1),
        ("per_token", "nats a token", 2),
        ("in_loss", "β · nats in the loss", 2),
    )
    lines = []
    for split in ("held_out", "train"):
        if not found.of(split):
            continue
        whole = summary(found.of(split))
        for name, unit, digits in units:
            moved = getattr(whole, name)
            mean = lambda e, n=digits: f"{signed(e.mean, n)} ± {e.mean - e.low:.{n}f}"
            share = "" if moved.chosen_share is None else signed(moved.chosen_share, 2)
            means = map(mean, (moved.chosen, moved.rejected, moved.margin, moved.common))
            lines.append((_split(split), unit, *means, f"{moved.spread.mean:.{digits}f}", share))
    return columns, lines


def _bins(key: str, bins: Sequence[Bin]) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = (key, "rows", "best", "worst", "margin", "a token: best", "worst", "both down", "accuracy (start: 50 %)")
    return columns, [(f"{one.low:.4g} to {one.high:.4g}".replace("-", "−"), *_bin(one.found)) for one in bins]


def _bin(whole: Summary) -> tuple[str, ...]:
    nats, token = whole.per_answer, whole.per_token
    return (
        f"{whole.rows:,}",
        *(signed(one.mean, 1) for one in (nats.chosen, nats.rejected, nats.margin)),
        *(signed(one.mean, 2) for one in (token.chosen, token.rejected)),
        f"{whole.cases['both down']:.0%}",
        f"{whole.accuracy.mean:.0%}",
    )


def _ranks(found: Diagnosis) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("rank", "answers", "mean change, nats", "a token")
    ranks = by_rank(found.shown)
    if max(len(row.ranks) for row in found.shown) < 3:
        return columns, []  # best and worst say it all
    return columns, [
        (str(rank + 1), f"{count:,}", signed(nats, 1), signed(token, 2)) for rank, (count, nats, token) in ranks.items()
    ]


def _split(name: str) -> str:
    return "held-out rows" if name == "held_out" else "training rows"


# Rows ----------------------------------------------------------------------------------------------------------------


def lists(found: Diagnosis, listed: int) -> list[tuple[str, str, list[tuple[Trained, str]]]]:
    """Heading, explanation, and (row, what it may be) of each list of rows to look at."""
    notes = [(row, _note(row, found.sure_gap)) for row in found.contradicted[:listed]]
    flipped = [(row, "") for row in found.broken[:listed]]
    told = [
        (
            f"Training rows that may be mislabelled: {len(notes):,} of {len(found.contradicted):,}",
            "The policy still holds the best answer below the worst, the surest first. Where the judge's gap is below "
            "the median the label may be noise; where it is above, the label or the policy is wrong: look at it.",
            notes,
        ),
        (
            f"Held-out rows that broke: {len(flipped):,} of {len(found.broken):,}",
            "By likelihood the reference had the best answer above the worst, and the policy has not.",
            flipped,
        ),
    ]
    return [one for one in told if one[2]]


def _note(row: Trained, sure_gap: float | None) -> str:
    if row.gap is None:
        return ""
    return "look at it: a large gap" if row.gap >= sure_gap else "perhaps noise: a small gap"


def numbers(row: Trained) -> str:
    """What is known of a listed row, in a line."""
    import math

    other = 1 / (1 + math.exp(min(row.reward_margin, 700)))
    gap = "no gap known" if row.gap is None else f"judge's gap {row.gap:.2f} nats"
    best, worst = signed(row.changes[0], 1), signed(row.changes[-1], 1)
    return (
        f"reward margin {signed(row.reward_margin, 2)} ({other:.0%} for the other order) · {gap} · "
        f"loss {row.loss:.2f} · best {best}, worst {worst} nats"
    )


# Pages ---------------------------------------------------------------------------------------------------------------


def html_page(
    found: Diagnosis, said: Sequence[Finding], texts: Mapping[str, Row], pictures: Pictures, *, listed: int
) -> str:
    """The diagnosis as one file of HTML."""
    kind, line = answer(facts_of(found), said)
    first, rest = said[:SHOWN_REASONS], said[SHOWN_REASONS:]
    items = [tag("li", finding.text, class_=finding.kind) for finding in first]
    body: list[Html] = [
        tag("h1", QUESTION),
        band(kind, line, _about(found), items),
        tag("div", *(picture(caption, path) for caption, path in pictures.items()), class_="pictures"),
    ]
    if rest:
        body += [tag("h2", "What else was seen"), tag("ul", *(tag("li", one.text, class_=one.kind) for one in rest))]
    body += [tag("h2", "What to do"), tag("ul", *(tag("li", text) for text in _todo(said)))]
    for heading, text, columns, rows in tables(found):
        body += [tag("h2", heading), tag("p", text, class_="soft"), tag("div", table(columns, rows), class_="scroll")]
    for heading, text, rows in lists(found, listed):
        body += [tag("h2", heading), tag("p", text, class_="soft")]
        body += [_listed(row, note, texts[row.id]) for row, note in rows]
    body += [tag("h2", "Definitions"), tag("ul", *(tag("li", text) for text in DEFINITIONS))]
    return document(TITLE, body, style=STYLE + MORE_STYLE)


def _about(found: Diagnosis) -> str:
    counts = [f"{len(found.of(split)):,} {_split(split)}" for split in ("train", "held_out")]
    return f"The policy of this round against its reference, on {' and '.join(counts)}."


def _todo(said: Sequence[Finding]) -> list[str]:
    always = "Whether the policy's own answers are better is measured by stage evaluate: see its win rates."
    return [*(f"Consider: {text}." for text in todo(said)), always]


def _listed(row: Trained, note: str, text: Row) -> Html:
    answers = (("Best by its label", text.answers[0].text), ("Worst by its label", text.answers[-1].text))
    line = [tag("b", text_of(row.id, LONGEST_LINE)), " ", numbers(row), *([" · ", tag("b", note)] if note else [])]
    return tag(
        "details",
        tag("summary", *line),
        tag("h3", "Prompt"),
        _text(show_prompt(text.prompt)),
        tag("div", *(tag("div", tag("h3", name), _text(body)) for name, body in answers), class_="two"),
    )


def _text(text: str) -> Html:
    return tag("div", text_of(text, LONGEST_TEXT), class_="text", dir="auto")


def markdown_page(
    found: Diagnosis, said: Sequence[Finding], texts: Mapping[str, Row], pictures: Pictures, *, listed: int
) -> str:
    """The diagnosis as Markdown."""
    mark = {"said": "", "watch": "**look:** ", "concern": "**concern:** "}
    lines = [f"# {QUESTION}", "", f"**{answer(facts_of(found), said)[1]}.** {_about(found)}", ""]
    lines += [f"- {mark[finding.kind]}{cell(finding.text)}" for finding in said]
    lines += ["", *(f"![{caption}](plots/{path.name})" for caption, path in pictures.items()), ""]
    lines += ["## What to do", "", *(f"- {cell(text)}" for text in _todo(said))]
    for heading, text, columns, rows in tables(found):
        lines += ["", f"## {heading}", "", text, "", *markdown_table(columns, rows)]
    for heading, text, rows in lists(found, listed):
        cut = lambda whole: whole if len(whole) <= LONGEST_CELL else f"{whole[:LONGEST_CELL]} …"
        cells = [
            (row.id, numbers(row), note, *map(cut, (show_prompt(texts[row.id].prompt), *_ends(texts[row.id]))))
            for row, note in rows
        ]
        columns = ("id", "numbers", "", "prompt", "best by its label", "worst by its label")
        lines += ["", f"## {heading}", "", text, "", *markdown_table(columns, cells)]
    return "\n".join([*lines, "", "## Definitions", "", *(f"- {cell(text)}" for text in DEFINITIONS), ""])


def _ends(row: Row) -> tuple[str, str]:
    return row.answers[0].text, row.answers[-1].text
