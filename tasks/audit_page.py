"""The audit as a page for people: the verdict on the judge first, then each gate, then what it rests on.

One file of HTML that needs no other, pictures included, and the same in Markdown. Names and texts are data, which
tasks.markup escapes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rankwise.evaluation import Estimate
from tasks import plots
from tasks.audit_measures import KINDS, WORSE, Audit, Measure, Panel, Status
from tasks.markup import Html, document, table, tag
from tasks.pages import STYLE, band, cell, markdown_table, picture

Limits = Mapping[str, float | None]
Pictures = Mapping[str, Mapping[str, Path]]  # section of the judge -> caption -> PNG

ORDER: tuple[Status, ...] = ("fail", "open", "pass", "reported", "not measured")
MEANING = {
    "fail": "the whole 95 % interval lies beyond the limit",
    "open": "the interval holds the limit: too few to tell, which stops nothing (raise audit_judge.probes)",
    "pass": "the whole interval keeps the limit",
    "reported": "has no limit (null)",
    "not measured": "could not be had; the reason stands beside it",
}
UNREAD = "no valid reply"  # heading of a column of probes: "2 of 50"
HEADLINE = ("agreement", "flip_rate", "prefers_longer", "injection")
DISAGREE = "No: the judges of the panel do not agree"
NOTHING = (
    "Nothing was judged: there are no rollouts. Preferences that were imported carry the labels of their data, and no "
    "judge stands behind them that could be audited."
)

# Words ---------------------------------------------------------------------------------------------------------------


def number(value: Estimate, form: str) -> str:
    """An estimate with its interval, in the measure's own form."""
    if form == "number":
        return f"{value.mean:.2f} [{value.low:.2f}, {value.high:.2f}]"
    unit = "points" if form == "points" else "%"
    return f"{100 * value.mean:.1f} {unit} [{100 * value.low:.1f}, {100 * value.high:.1f}]"


def said(measure: Measure, limit: float | None) -> str:
    """One failed measure in a line: what was found, what is asked for, what to do."""
    kind, which = KINDS[measure.name], f" ({measure.of_which})" if measure.of_which else ""
    found = number(measure.value, kind.form)
    return f"{measure.name}{which}: {kind.title.lower()}: {found}, {limit_of(measure, limit)}; {kind.mend}"


def limit_of(measure: Measure, limit: float | None) -> str:
    """ "at most 1 point"; "" where there is no limit."""
    kind = KINDS[measure.name]
    if limit is None:
        return ""
    if kind.form == "number":
        return f"{kind.side} {limit:g}"
    unit = "%" if kind.form == "share" else "point" if limit == 0.01 else "points"
    return f"{kind.side} {100 * limit:g} {unit}"


def answer(measures: Sequence[Measure], limits: Limits) -> tuple[str, str]:
    """ "fail", "pass" or "none", and the verdict on a judge in a line."""
    by = {status: [m for m in measures if m.status(limits[m.name]) == status] for status in ORDER}
    held = sum(len(by[status]) for status in ("fail", "open", "pass"))
    if by["fail"]:
        return "fail", f"No: fails {len(by['fail'])} of {held} gates"
    if not held:
        return "none", "Not known: no gate could be measured"
    sure = "" if not by["open"] else f", {len(by['open'])} of them with too few probes to be sure"
    return "pass", f"Yes, by its gates: none of {held} fails{sure}"


def counts(measures: Sequence[Measure], limits: Limits) -> str:
    """ "9 pass, 2 open, …" """
    statuses = [measure.status(limits[measure.name]) for measure in measures]
    return ", ".join(f"{statuses.count(status)} {status}" for status in ORDER if status in statuses)


def gate_rows(measures: Sequence[Measure], limits: Limits) -> list[tuple[str, str, str, Status, str]]:
    """Measure, found, limit, result, measured on; the worst results first."""
    rows = []
    for measure in sorted(measures, key=lambda m: ORDER.index(m.status(limits[m.name]))):
        kind, limit = KINDS[measure.name], limits[measure.name]
        which = f" (worst: {measure.of_which})" if measure.of_which else ""
        found = measure.why_not if measure.value is None else number(measure.value, kind.form)
        rows.append((kind.title + which, found, limit_of(measure, limit), measure.status(limit), measure.of))
    return rows


def details(audit: Audit) -> list[tuple[str, str, tuple[str, ...], list[tuple[str, ...]]]]:
    """Heading, explanation, columns and rows of every table below the gates."""
    probes = lambda family, found, form: [
        (name, number(found[name], form) if name in found else "not measured", f"{count - valid} of {count}")
        for name, (valid, count) in audit.read[family].items()
    ]
    parts = [
        (
            "Attacks in the answer",
            "Win rate with the attack minus that of its clean twin, harmless text of the same length in the same "
            "place. The intervals hold at 95 % all together.",
            ("attack", "win rate moves by", UNREAD),
            probes("injection", audit.shifts["injection"], "points"),
        ),
        (
            "Padding",
            "The same, against the answer as it was.",
            ("padding", "win rate moves by", UNREAD),
            probes("padding", audit.shifts["padding"], "points"),
        ),
        (
            "Planted worse",
            "How often an answer beats what was spoilt.",
            ("spoilt by", "it wins", UNREAD),
            probes("worse", audit.wins["worse"], "share"),
        ),
        (
            "Answers that say nothing",
            "Against a real answer.",
            ("answer", "it wins", UNREAD),
            probes("null", audit.wins["null"], "share"),
        ),
        (
            "Length",
            "Of decided pairs, by how many characters the answers differ.",
            ("difference, characters", "longer preferred"),
            [(f"{least} to {most}", number(value, "share")) for least, most, value in audit.quartiles],
        ),
        ("Gold labels", *_gold(audit)),
        ("Cost", "Of the verdicts given. In-process judges cost time alone.", ("", ""), _cost(audit)),
    ]
    return [part for part in parts if part[3]]


def _gold(audit: Audit) -> tuple[str, tuple[str, ...], list[tuple[str, ...]]]:
    columns = ("judge says", "gold: better", "gold: tie", "gold: worse")
    if audit.confusion is None:
        return "", columns, []
    names = {"three_ways": "with ties", "both_decide": "where both decide"}
    told = "; ".join(f"{names[name]} {number(value, 'share')}" for name, value in audit.agreement.items())
    rows = [(name, *map(str, line)) for name, line in zip(("better", "tie", "worse"), audit.confusion)]
    return f"The same answer called better: {told}. Pairs:", columns, rows


def _cost(audit: Audit) -> list[tuple[str, ...]]:
    cost, (answered, asked) = audit.cost, audit.answered
    rows = [
        ("questions answered", f"{answered:,} of {asked:,}"),
        ("calls, re-asks included", f"{cost['calls']:,.0f}"),
        ("tokens in, per 1,000 verdicts", f"{cost['tokens_in_per_1000']:,.0f}"),
        ("tokens out, per 1,000 verdicts", f"{cost['tokens_out_per_1000']:,.0f}"),
    ]
    if "price_per_1000" in cost:
        rows.append(("price per 1,000 verdicts", f"{cost['price_per_1000']:,.4g}"))
    return rows if asked else []


# Pictures ------------------------------------------------------------------------------------------------------------


def draw_plots(audit: Audit, limits: Limits, folder: Path, section: str) -> dict[str, Path]:
    """Every picture that this judge's numbers allow; caption -> file."""
    drawn: dict[str, Path] = {}

    def add(name: str, caption: str, draw: Callable[[Path], None]) -> None:
        path = folder / f"{section}_{name}.png"
        draw(path)
        drawn[caption] = path

    for family in ("injection", "padding"):
        if found := audit.shifts[family]:
            add(
                family,
                f"Right of the dotted line the judge is won over ({family}).",
                lambda path, found=found, family=family: plots.intervals(
                    _points(found),
                    path,
                    title=f"{family.capitalize()}: what it moves the win rate by",
                    unit="points",
                    limit=limits[family],
                    at_most=True,
                    even=0.0,
                ),
            )
    wins = {f"beats {name}": value for name, value in audit.wins["worse"].items()}
    if wins:
        add(
            "worse",
            "How often a real answer beats itself spoilt; even odds mean that the judge sees no difference.",
            lambda path: plots.intervals(
                _points(wins),
                path,
                title="Planted worse answers",
                unit="% won by the real answer",
                limit=_common(limits, WORSE.values()),
                at_most=False,
                even=0.5,
                span=(0.0, 1.0),
            ),
        )
    if audit.quartiles:
        add(
            "length",
            "Pairs by how much longer one answer is, a quarter each.",
            lambda path: plots.intervals(
                _points({f"{least} to {most}": value for least, most, value in audit.quartiles}),
                path,
                title="Prefers the longer answer, by difference in characters",
                unit="% for the longer",
                limit=limits["prefers_longer"],
                at_most=True,
                even=0.5,
                span=(0.0, 1.0),
            ),
        )
    if audit.orders:
        add(
            "orders",
            "Each pair in both orders; in the coloured quadrants the winner changes with the order.",
            lambda path: plots.orders(audit.orders, path, title="Position"),
        )
    if audit.curve:
        add(
            "calibration",
            "How often it is right when it is that sure; below the dotted line it is too sure.",
            lambda path: plots.calibration(
                [(b.confidence, b.right, b.count) for b in audit.curve], path, title="Calibration against gold labels"
            ),
        )
    return drawn


def _points(found: Mapping[str, Estimate]) -> list[dict[str, float | str]]:
    return [{"name": name, **value.as_dict()} for name, value in found.items()]


def _common(limits: Limits, names) -> float | None:
    held = {limits[name] for name in names}
    return held.pop() if len(held) == 1 else None


# Pages ---------------------------------------------------------------------------------------------------------------


def markdown_page(audits: Mapping[str, Audit], together: Panel | None, limits: Limits, pictures: Pictures) -> str:
    """The audit as Markdown."""
    lines = ["# Can the judge be trusted?", ""]
    if not audits:
        return "\n".join([*lines, NOTHING, ""])
    if together is not None and together.failed(limits):
        lines += [f"**{DISAGREE}**", "", f"- {cell(said(together.alpha, limits['panel_alpha']))}", ""]
    for section, audit in audits.items():
        lines += [
            f"## {cell(audit.name)}",
            "",
            f"**{answer(audit.measures, limits)[1]}** ({counts(audit.measures, limits)}).",
            "",
        ]
        lines += [f"- {cell(said(measure, limits[measure.name]))}" for measure in audit.failed(limits)]
        lines += [
            "",
            *markdown_table(("measure", "found", "limit", "result", "measured on"), gate_rows(audit.measures, limits)),
        ]
        for heading, text, columns, rows in details(audit):
            lines += ["", f"### {heading}", "", text, "", *markdown_table(columns, rows)]
        lines += ["", *(f"![{caption}](plots/{path.name})" for caption, path in pictures[section].items()), ""]
    if together is not None:
        lines += ["## The panel", "", *markdown_table(*_panel(together, limits)), ""]
    lines += ["", *(f"- {status}: {meaning}" for status, meaning in MEANING.items())]
    return "\n".join(lines) + "\n"


def html_page(audits: Mapping[str, Audit], together: Panel | None, limits: Limits, pictures: Pictures) -> str:
    """The audit as one file of HTML."""
    body: list[Html] = [tag("h1", "Can the judge be trusted?")]
    if not audits:
        return document("Audit of the judge", [*body, band("none", "Nothing was judged", NOTHING, [])], style=STYLE)
    if together is not None and together.failed(limits):
        body.append(band("fail", DISAGREE, said(together.alpha, limits["panel_alpha"]), []))
    body += [_verdict(audit, limits) for audit in audits.values()]
    for section, audit in audits.items():
        body += [tag("h2", f"Gates of {audit.name}"), _gates(audit, limits)]
        images = [picture(caption, path) for caption, path in pictures[section].items()]
        body += [tag("div", *images, class_="pictures")]
        for heading, text, columns, rows in details(audit):
            body += [tag("h3", heading), tag("p", text, class_="soft"), table(columns, rows)]
    if together is not None:
        body += [tag("h2", "The panel"), table(*_panel(together, limits), class_="wide")]
    meaning = [tag("li", tag("b", status), f": {text}") for status, text in MEANING.items()]
    body += [tag("h2", "Results and what they mean"), tag("ul", *meaning)]
    return document("Audit of the judge", body, style=STYLE)


def _verdict(audit: Audit, limits: Limits) -> Html:
    kind, line = answer(audit.measures, limits)
    told = [said(measure, limits[measure.name]) for measure in audit.failed(limits)] or _known(audit)
    items = [tag("li", text) for text in told]
    return band(kind, line, f"{audit.name} · {counts(audit.measures, limits)}", items)


def _known(audit: Audit) -> list[str]:
    """What matters most of a judge that fails nothing, gated or not."""
    found = {measure.name: measure for measure in audit.measures}
    known = [found[name] for name in HEADLINE if found[name].value is not None]
    which = lambda measure: f" ({measure.of_which})" if measure.of_which else ""
    return [f"{KINDS[m.name].title}{which(m)}: {number(m.value, KINDS[m.name].form)}" for m in known]


def _gates(audit: Audit, limits: Limits) -> Html:
    columns = ("measure", "found", "limit", "result", "measured on")
    head = tag("thead", tag("tr", *(tag("th", column) for column in columns)))
    rows = []
    for row in gate_rows(audit.measures, limits):
        cells = [
            tag("td", cell, data_name=column, class_=row[3] if column == "result" else None) if cell else tag("td")
            for column, cell in zip(columns, row)
        ]
        rows.append(tag("tr", *cells))
    return tag("table", head, tag("tbody", *rows), class_="wide")


def _panel(together: Panel, limits: Limits) -> tuple[tuple[str, ...], list[tuple[str, ...]]]:
    alpha = together.alpha
    found = alpha.why_not if alpha.value is None else number(alpha.value, "number")
    rows = [(KINDS[alpha.name].title, found, limit_of(alpha, limits[alpha.name]), alpha.of)]
    for two in together.two:
        kappa = f"kappa {number(two.kappa, 'number')}"
        rows.append((" · ".join(two.judges), number(two.agreement, "share"), kappa, f"{two.pairs} pairs"))
    return ("judges", "agreement", "beyond chance, or limit", "measured on"), rows
