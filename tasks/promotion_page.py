"""A promotion as people read it: on the terminal, on the pages of MLflow and Prefect, and as a page of the answers.

Prompts and answers are data and may be hostile: tasks.markup escapes them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.types import Row, show_prompt
from tasks import promotion
from tasks.markup import Html, document, table, tag, text_of
from tasks.pages import STYLE, band, cell, markdown_table
from tasks.tracking_notes import PAD

SHOWN = 50  # rows of the page at either end: most lost, most won
LONGEST_TEXT = 4000  # characters of a prompt or an answer that are shown
MORE_STYLE = """
.two { display: grid; grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .8rem; }
.text { white-space: pre-wrap; background: var(--card); border: 1px solid var(--line); border-radius: .3rem;
  padding: .4rem .6rem; margin: .2rem 0 0; max-height: 18rem; overflow: auto; font-size: .92rem; }
article { border-top: 1px solid var(--line); padding: .7rem 0; }
h3 { margin: 0; font-size: .9rem; font-weight: 600; }
.worse h3.theirs, .better h3.ours { color: var(--good); }
.worse h3.ours, .better h3.theirs { color: var(--bad); }
@media (max-width: 40rem) { .two { grid-template-columns: minmax(0, 1fr); } }
"""


def headline(record: Mapping[str, Any]) -> str:
    """The state of a promotion in one line."""
    champion, challenger = (number(record[role]) for role in ("champion", "challenger"))
    decision = record["decision"]
    if decision:
        done = {
            "promoted": f"Promoted: version {challenger} is champion"
            + (f" after version {champion}" if champion else ""),
            "rejected": f"Turned down: version {challenger} is no challenger any more",
            "rolled back": f"Rolled back: version {champion} is champion again",
        }[decision["what"]]
        return f"{done}. Decided by {decision['by']}, {decision['at'][:10]}: {decision['reason']}"
    if record["verdict"] == "nothing":
        return f"Nothing to decide: {record['why']}"
    if record["verdict"] == "promote":
        return f"The rule holds: version {challenger} may take the place of version {champion or '–'}"
    return f"The rule does not hold: version {champion or '–'} stays champion"


def measures(record: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """(measure, challenger's value, champion's value), those that the comparison has."""
    metrics = record.get("metrics") or {}
    rows = [
        (f"wins, by {_judge(judge)}", percent(of), percent(_other_side(of)))
        for judge, of in _in_order(metrics.get("win_rate", {}))
    ]
    rows += [
        (f"wins at equal length, by {_judge(judge)}", f"{100 * of:.1f} %", f"{100 * (1 - of):.1f} %")
        for judge, of in _in_order(metrics.get("win_rate_length_controlled", {}))
    ]
    names = {
        "reward": "reward, by the judge",
        "gold_reward": "reward, by gold",
        "positive_share": "positive share (gold)",
        "length": "words of an answer",
        "distinct_1": "distinct-1",
        "distinct_2": "distinct-2",
        "data_perplexity": "perplexity of the data's answers",
    }
    for key, name in names.items():
        if key in metrics:
            of = metrics[key]
            rows.append((name, *(_shown(of[role], key == "positive_share") for role in ("challenger", "champion"))))
    if "kl" in metrics:
        rows.append(("KL to the champion (nats)", _shown(metrics["kl"], False), ""))
    return rows


def conditions(record: Mapping[str, Any]) -> list[tuple[str, str, str, str]]:
    """(condition, value, what is asked for, whether it holds) of the rule."""
    return [
        (
            one["name"],
            "" if one["value"] is None else f"{one['value']:.3g}",
            "" if one["bound"] is None else f"{one['rule']} {one['bound']:g}",
            "holds" if one["passed"] else "fails",
        )
        for one in record["checks"]
    ]


def changes(record: Mapping[str, Any]) -> str:
    """Which samples changed, in a sentence; "" where nothing was compared."""
    found = record.get("changed")
    if not found:
        return ""
    judged = [
        f"by {_judge(judge)} {of['better']} better, {of['worse']} worse, {of['tie']} alike"
        for judge, of in _in_order(found)
    ]
    return f"{found['rows']} of {found['of']} held-out prompts are answered differently: {'; '.join(judged)}."


def for_terminal(record: Mapping[str, Any]) -> str:
    """The end of the command."""
    parts = [f"{record['name']}: {headline(record)}"]
    if record["why"] not in parts[0] and not record["decision"]:
        parts[0] += f" ({record['why']})"
    if rows := measures(record):
        head = ("", f"challenger ({number(record['challenger'])})", f"champion ({number(record['champion'])})")
        parts.append(_columns([head, *rows]))
        parts.append(_columns([("condition", "value", "asked for", ""), *conditions(record)]))
        parts.append(changes(record))
    pages = record["pages"]
    places = {
        "samples": "reports/promotion/samples.html" if rows else "",
        "run": pages.get("run", ""),
        "model": pages["model"],
    }
    parts.append("\n".join(f"  {name:<8} {place}" for name, place in places.items() if place))
    return "\n\n".join(filter(None, parts))


def for_run(record: Mapping[str, Any]) -> str:
    """The head of the comparison's page in MLflow, and of the artifact in Prefect."""
    pages = record["pages"]
    names = {role: f"{role}: version {number(record[role])}" for role in ("challenger", "champion") if record[role]}
    names |= {"samples": "the answers that differ", "run": "the comparison in MLflow"}
    links = [f"[{name}]({pages[key]})" for key, name in names.items() if pages.get(key)]
    why = "" if record["decision"] or record["verdict"] == "nothing" else f" {record['why']}."
    parts = [f"**{cell(headline(record))}.**{why}", " · ".join(links), changes(record), _markdown(record)]
    return "\n\n".join(filter(None, parts))


def for_version(record: Mapping[str, Any]) -> str:
    """What a version's page says of its promotion; the list of versions shows the first line, unrendered."""
    parts = [cell(headline(record)), changes(record), _markdown(record)]
    if run := record["pages"].get("run"):
        parts.insert(2, f"[The comparison, with the samples that changed]({run})")
    return "\n\n".join(filter(None, parts))


def page(record: Mapping[str, Any], rows: Sequence[Row]) -> str:
    """The answers that differ, side by side, the most lost first; rows in that order."""
    kind = "pass" if record["verdict"] == "promote" else "fail"
    names = tuple(f"{role} (version {number(record[role])})" for role in ("challenger", "champion"))
    parts = [
        tag("h1", f"{record['name']}: challenger against champion"),
        band(kind, headline(record), f"{record['why']}. {changes(record)}", []),
        table(("", *names), measures(record), class_="wide"),
        tag("h2", "The rule"),
        table(("condition", "value", "asked for", ""), conditions(record), class_="wide"),
    ]
    shown = list(rows) if len(rows) <= 2 * SHOWN else [*rows[:SHOWN], *rows[-SHOWN:]]
    left = len(rows) - len(shown)
    parts.append(tag("h2", "Answers that differ, those that the challenger loses most first"))
    if left:
        parts.append(tag("p", f"{left} in the middle are left out; samples.parquet has all.", class_="soft"))
    parts += [_article(row, names) for row in shown]
    return document(f"{record['name']}: challenger against champion", parts, style=STYLE + MORE_STYLE)


def _article(row: Row, names: tuple[str, str]) -> Html:
    odds = promotion.odds(row)
    first = odds.get("gold", odds.get("judge"))
    side = "" if not first else "better" if first > 0 else "worse"
    said = [f"{_judge(judge)}: {'no verdict' if value is None else f'{value:+.2f}'}" for judge, value in odds.items()]
    answers = [
        tag("div", tag("h3", name, class_=whose), tag("p", text_of(answer.text, LONGEST_TEXT), class_="text"))
        for name, whose, answer in zip(names, ("ours", "theirs"), row.answers)
    ]
    about = f"challenger better by (log-odds): {', '.join(said)}"
    prompt = tag("p", text_of(show_prompt(row.prompt), LONGEST_TEXT))
    return tag("article", prompt, tag("div", *answers, class_="two"), tag("p", about, class_="soft"), class_=side)


def _markdown(record: Mapping[str, Any]) -> str:
    rows = measures(record)
    if not rows:
        return ""
    head = ["", f"challenger ({number(record['challenger'])})", f"champion ({number(record['champion'])})"]
    rule = _padded(["condition of the rule", "value", "asked for", ""], conditions(record))
    return "\n".join([*_padded(head, rows), "", *rule])


def _padded(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A table in Markdown with space between its cells, which MLflow's page sets without any."""
    return [line.replace(" |", f"{PAD} |") for line in markdown_table(columns, rows)]


def percent(of: Mapping[str, float]) -> str:
    """A share with its interval: "54.0 % [48.3, 59.6]"."""
    return f"{100 * of['mean']:.1f} % [{100 * of['low']:.1f}, {100 * of['high']:.1f}]"


def number(version: Mapping[str, str] | None) -> str:
    return version["version"] if version else ""


def _other_side(of: Mapping[str, float]) -> dict[str, float]:
    return {"mean": 1 - of["mean"], "low": 1 - of["high"], "high": 1 - of["low"]}


def _in_order(found: Mapping[str, Any]) -> list[tuple[str, Any]]:
    """What judges say, the training judge first; a record that was read back is sorted by name."""
    return [(judge, found[judge]) for judge in ("judge", "gold") if judge in found]


def _judge(name: str) -> str:
    return "the judge" if name == "judge" else name


def _shown(value: Any, share: bool) -> str:
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return percent(value) if share else f"{value['mean']:.3g} [{value['low']:.3g}, {value['high']:.3g}]"
    return f"{value:.3g}"


def _columns(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
