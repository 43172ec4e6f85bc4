"""Stage audit_judge: can the judge's labels be trusted? Measured before anything is trained on them.

Reads what the judge (and each judge of a panel) said of the rollouts, asks it a battery of planted answers, compares it
with gold labels, and writes one page: reports/audit_judge/audit.html, the same as audit.md, and metrics.json. Then it
stops the run where a measure lies beyond its gate. Replies to the battery are kept like verdicts: a rerun asks nothing.

    python -m tasks.audit_judge
    python -m tasks.audit_judge --rollouts ROWS --verdicts TABLE --gold TABLE     tables made elsewhere

Gold labels are ranked rows (the judge is asked about those whose texts the table of verdicts does not know), a table of
verdicts on the rollouts, each judge in it a vote, or a file of stored verdicts (.csv, .jsonl), each annotator a vote.
They are held against the judge's word by prompt and texts, whatever rows and places these stand in.
"""

from __future__ import annotations

import os
import sys
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.rows import RowTable, read_rows, read_table, write_aside
from rankwise.types import Row, UserError
from tasks import verdicts
from tasks.judges import make_panel
from tasks.params import param
from tasks.stage import Stage, main

if TYPE_CHECKING:
    from rankwise.agreement import Pair
    from rankwise.store import Store
    from rankwise.verdicts import Verdict
    from tasks.audit_measures import Audit, Gold, Material, Measure, Panel
    from tasks.judges import Member


def gate(default: float | None, doc: str) -> Any:
    """A limit; null: measured and reported, never stops."""
    return param(default, doc, ge=-1, le=1)


@dataclass(frozen=True, kw_only=True)
class Gates:
    """Limits as shares of 1; the whole 95 % interval must lie beyond one to stop the run. null: report only.

    The defaults suit a reward model for one quality of the text; docs/judging.md has those for language models.
    """

    agreement: float | None = gate(0.7, "at least: right by gold labels, a tie half")
    kappa: float | None = gate(None, "at least: Cohen's kappa with gold labels")
    calibration_error: float | None = gate(None, "at most: confidence beyond what is right; matters for soft labels")
    position_bias: float | None = gate(0.1, "at most: distance of the first place's share from one half")
    flip_rate: float | None = gate(0.25, "at most: pairs whose winner changes with the order")
    tie_rate: float | None = gate(None, "at most: pairs of different answers that tie")
    invalid_share: float | None = gate(0.05, "at most: replies that could not be read")
    verdict_mass: float | None = gate(0.5, "at least: mean probability of the verdict letters together")
    prefers_longer: float | None = gate(0.75, "at most: decided pairs whose longer answer is preferred")
    padding: float | None = gate(0.2, "at most: rise of the win rate by harmless padding")
    injection: float | None = gate(None, "at most: rise of the win rate by an attack, against its clean twin")
    null_wins: float | None = gate(0.7, "at most: win rate of an answer that says nothing")
    beats_truncated: float | None = gate(None, "at least: answers that beat themselves cut off half way")
    beats_shuffled: float | None = gate(None, "at least: answers that beat their own words shuffled")
    beats_empty: float | None = gate(None, "at least: answers that beat an empty one")
    beats_other_prompt: float | None = gate(None, "at least: answers that beat one to another prompt")
    same_text_decided: float | None = gate(None, "at most: the same text shown twice, one called better")
    panel_alpha: float | None = gate(None, "at least: Krippendorff's alpha of a panel")


@dataclass(frozen=True, kw_only=True)
class Params:
    probes: int = param(50, "rows that planted answers are made of; 0: no judge is asked anything", ge=0)
    labelled: int = param(300, "gold rows that a judge is asked about; 0: none", ge=0)
    tie_below: float = param(0.05, "answers at most this far apart (log-odds, nats) are a tie, as in preferences", ge=0)
    gates: Gates = param(Gates, "what a judge is held to")


@dataclass(frozen=True, kw_only=True)
class Paths:
    rollouts: Path = Path("data/rollouts.parquet")
    verdicts: Path = Path("data/verdicts.parquet")
    gold: Path = Path("data/prompts/labelled_test.parquet")
    reward_model: Path = Path("models/reward_model")
    source: Path = Path("data/source")
    report: Path = Path("reports/audit_judge")


@dataclass(frozen=True, kw_only=True)
class Tables:
    """What the audit reads."""

    rows: dict[str, Row]  # by id
    given: dict[str, dict[str, list[Verdict]]]  # judge -> row id -> verdicts
    gold: Gold  # labels of pairs
    gold_rows: list[Row]  # rows that a judge may be asked about; empty where gold speaks of the rollouts
    no_gold: str  # why there is none


def run(params: Params, paths: Paths, stage: Stage) -> None:
    tables = _tables(params, paths)
    audits = _audits(tables, params, paths, stage)
    together = _panel(tables, params) if len(tables.given) > 1 else None
    limits = asdict(params.gates)
    failed = _failed(audits, together, limits)
    _write(audits, together, limits, len(failed), paths, stage)
    _stop(failed, limits, paths)


def _failed(
    audits: Mapping[str, Audit], together: Panel | None, limits: Mapping[str, float | None]
) -> list[tuple[str, Measure]]:
    """(judge's name, measure) of every gate that fails; the panel's after those of its judges."""
    failed = [(audit.name, measure) for audit in audits.values() for measure in audit.failed(limits)]
    return failed + ([("the panel", together.alpha)] if together and together.failed(limits) else [])


# Gathering -----------------------------------------------------------------------------------------------------------


def _tables(params: Params, paths: Paths) -> Tables:
    from rankwise.agreement import ranked_pairs
    from rankwise.verdicts import joined

    rows: dict[str, Row] = {}
    given: dict[str, dict[str, list[Verdict]]] = {}
    judged = RowTable(paths.rollouts)
    for row, mine in joined(paths.verdicts, judged) if len(judged) else ():
        rows[row.id] = _texts_alone(row)
        for verdict in mine:
            names = {"judge": sys.intern(verdict.judge), "identity": sys.intern(verdict.identity)}
            lean = replace(verdict, **names, texts="", raw="", reason="")
            given.setdefault(lean.judge, {}).setdefault(row.id, []).append(lean)
    votes = _gold_verdicts(paths.gold, rows)
    if votes is not None:
        why = f"{paths.gold} speaks of none of the pairs"
        return Tables(
            rows=rows, given=given, gold=_gold(_votes(rows, votes, params.tie_below)), gold_rows=[], no_gold=why
        )
    labelled = [row for row in read_rows(paths.gold) if len(row.ranked) > 1]
    gold = _gold((pair, int(pair.preference)) for row in labelled for pair in ranked_pairs(row))
    why = "the judge gave no verdict on its rows" if labelled else f"{paths.gold} holds no ranked row"
    return Tables(rows=rows, given=given, gold=gold, gold_rows=labelled, no_gold=why)


def _texts_alone(row: Row) -> Row:
    """What is held of every row: with their tokens, answers take several times the memory."""
    answers = tuple(replace(answer, token_ids=None, logps=None) for answer in row.answers)
    return replace(row, answers=answers, meta={})


def _gold(labels: Iterable[tuple[Pair, int]]) -> Gold:
    """(pair, label) by what the pair is about."""
    found = defaultdict(list)
    for pair, one in labels:
        found[pair.about].append(one * pair.side)
    return found


def _gold_verdicts(path: Path, rows: Mapping[str, Row]) -> Mapping[str, Sequence[Verdict]] | None:
    """What a table or a file of verdicts says of the rows, by row id; None where it holds ranked rows."""
    from rankwise.verdicts import read_verdicts

    if path.name.removesuffix(".gz").endswith((".csv", ".jsonl")):
        return _annotators(path, rows)
    if "values" not in read_table(path).column_names:
        return None
    return read_verdicts(path, rows) if rows else {}


def _annotators(path: Path, rows: Mapping[str, Row]) -> Mapping[str, Sequence[Verdict]]:
    """What each annotator of a file of stored verdicts says of the rows' pairs, by row id."""
    from rankwise.judging import first_questions
    from rankwise.stored_judge import StoredJudge
    from rankwise.verdicts import verdict_of

    judge = StoredJudge(path)
    asked = [q for row in rows.values() for q in first_questions(row, judge, pairs_up_to=_all_pairs([row]))]
    found = defaultdict(list)
    for index, raw in judge.ask(asked):
        for vote in raw["votes"]:
            reply = judge.read(asked[index], {**raw, "votes": [vote]})
            found[asked[index].row_id].append(verdict_of(vote["annotator"], judge.identity, reply))
    return found


def _votes(
    rows: Mapping[str, Row], table: Mapping[str, Sequence[Verdict]], tie_below: float
) -> Iterator[tuple[Pair, int]]:
    """(pair, label) of every gold judge, each draw a vote of its own."""
    from rankwise.agreement import label, pairs_of

    for row_id, mine in table.items():
        votes = defaultdict(list)
        for verdict in mine:
            votes[verdict.judge, verdict.sample].append(verdict)
        for one in votes.values():
            yield from ((pair, label(pair.preference, tie_below)) for pair in pairs_of(rows[row_id], one))


def _audits(tables: Tables, params: Params, paths: Paths, stage: Stage) -> dict[str, Audit]:
    """Every judge whose verdicts are in the table, asked where params.yaml names it; by section, "judge", "judge_2"."""
    from rankwise.budget import prices
    from tasks.audit_measures import audit

    found: dict[str, Audit] = {}
    for member in _members(tables, params, paths, stage):
        material = _material(member.judge.name, member, tables, params, stage)
        price = prices(member.prefix, os.environ)
        found[member.section] = audit(material, tie_below=params.tie_below, price=price)
    known = {one.name for one in found.values()}
    for name in (name for name in tables.given if name not in known):
        section = f"judge_{len(found) + 1}" if found else "judge"
        material = _material(name, None, tables, params, stage)
        found[section] = audit(material, tie_below=params.tie_below, price=(0.0, 0.0))
    return found


def _members(tables: Tables, params: Params, paths: Paths, stage: Stage) -> Iterator[Member]:
    """The judges of params.yaml, each made when its turn comes; none where nothing is to be asked."""
    asked = stage.section("verdicts", verdicts.Params)
    if not params.probes or not tables.rows or asked.judge is None:
        return
    folders = {"trained": paths.reward_model, "source": paths.source}
    for member in make_panel(asked.judge, asked.panel, **folders, where="verdicts"):
        if tables.given and member.judge.name not in tables.given:
            raise UserError(
                f"{paths.verdicts} holds verdicts of {', '.join(sorted(tables.given))}, and params.yaml names "
                f"{member.judge.name} (verdicts.{member.section}): another judge would be audited than the one that "
                "labels. Run the stage verdicts first, or set audit_judge.probes to 0 to audit the table alone"
            )
        mine = tables.given.get(member.judge.name, {})
        if any(verdict.identity != member.judge.identity for found in mine.values() for verdict in found):
            raise UserError(
                f"{paths.verdicts} holds verdicts of {member.judge.name} as it was, and it has changed since: its "
                f"weights, rubric, file or parameters (verdicts.{member.section}). Another judge would be audited than "
                "the one that labels: run the stage verdicts first, or set audit_judge.probes to 0 to audit the table "
                "alone"
            )
        yield member


def _material(name: str, member: Member | None, tables: Tables, params: Params, stage: Stage) -> Material:
    """All that is known of a judge; it is asked now, where it can be."""
    from rankwise import probes
    from rankwise.store import Store
    from tasks.audit_measures import Material, compare

    mine = tables.given.get(name, {})
    material = Material(
        name=name,
        verdicts=[verdict for found in mine.values() for verdict in found],
        pairs=[pair for row_id, found in mine.items() for pair in _pairs(tables.rows[row_id], found)],
    )
    if any(orderless(found) for found in mine.values()):
        material.missing["orders"] = "one stored verdict stands for both orders of a pair"
    material.compared = compare(material.pairs, tables.gold)
    material.missing["gold"] = tables.no_gold if member or not tables.gold_rows else "the judge was not asked about it"
    if member is None:
        why = "params.yaml does not name this judge" if params.probes else "audit_judge.probes is 0: nothing is asked"
        material.missing |= {"probes": why, "same": why}
        return material
    material.missing["same"] = "scores each answer by itself: one text, one score"
    with Store(stage.store("verdicts")) as store:
        unknown = _unknown(tables.gold_rows, material.pairs)[: params.labelled]
        material.compared += compare(_asked_about_gold(member, unknown, material.pairs, store), tables.gold)
        if member.params.kind == "stored":
            material.missing |= dict.fromkeys(("probes", "same"), "its replies are in a file: it answers nothing new")
            return material
        drawn = probes.draw(list(tables.rows.values()), params.probes)
        asked = probes.ask(member.judge, probes.battery(drawn), store, tie_below=params.tie_below)
        material.outcomes, material.unread_probes = asked
        material.same = probes.ask_same(member.judge, drawn, store)
    return material


def _pairs(row: Row, verdicts: Sequence[Verdict]) -> list[Pair]:
    """The row's pairs; without their orders where these are one stored verdict, which shows no order's effect."""
    from rankwise.agreement import pairs_of

    alike = orderless(verdicts)
    return [replace(pair, orders=None) if pair.places in alike else pair for pair in pairs_of(row, verdicts)]


def orderless(verdicts: Sequence[Verdict]) -> set[tuple[int, int]]:
    """Pairs (i, j), i < j, on which what was said in one order stands for both."""
    return {tuple(sorted(verdict.shown)) for verdict in verdicts if len(verdict.shown) == 2 and verdict.orderless}


def _unknown(rows: Sequence[Row], pairs: Sequence[Pair]) -> list[Row]:
    """The gold rows with a pair of texts that is none of these pairs'."""
    from rankwise.agreement import ranked_pairs

    known = {pair.about for pair in pairs}
    return [row for row in rows if any(pair.about not in known for pair in ranked_pairs(row))]


def _asked_about_gold(member: Member, rows: Sequence[Row], known: Sequence[Pair], store: Store) -> list[Pair]:
    """What the judge, asked now, says of gold rows' pairs that are not known; the same texts in two rows count once."""
    from rankwise.agreement import pairs_of
    from rankwise.judging import judge_rows
    from rankwise.verdicts import verdict_of

    # A file may hold pairs alone, and costs nothing: it is asked about every pair.
    pairs_up_to = _all_pairs(rows) if member.params.kind == "stored" else member.params.pairs_up_to
    replies, _ = judge_rows(member.judge, rows, store, what="gold rows", pairs_up_to=pairs_up_to)
    found = defaultdict(list)
    for reply in replies:
        found[reply.question.row_id].append(verdict_of(member.judge.name, member.judge.identity, reply))
    asked = {pair.about: pair for row in rows for pair in pairs_of(row, found[row.id])}
    for pair in known:
        asked.pop(pair.about, None)
    # Ids are unique within one file alone: gold's row "0" is not the rollouts'.
    return [replace(pair, row_id=f"gold {pair.row_id}") for pair in asked.values()]


def _all_pairs(rows: Sequence[Row]) -> int:
    """The pairs_up_to with which every pair of these rows is asked about."""
    return max((len(row.answers) for row in rows), default=2)


def _panel(tables: Tables, params: Params) -> Panel:
    from rankwise.agreement import pairs_of
    from tasks.audit_measures import panel

    judged = {
        name: [pair for row_id, found in mine.items() for pair in pairs_of(tables.rows[row_id], found)]
        for name, mine in tables.given.items()
    }
    return panel(judged, tie_below=params.tie_below)


# Writing -------------------------------------------------------------------------------------------------------------


def _write(
    audits: Mapping[str, Audit],
    together: Panel | None,
    limits: Mapping[str, float | None],
    failed: int,
    paths: Paths,
    stage: Stage,
) -> None:
    from tasks.audit_page import draw_plots, html_page, markdown_page

    plots = {section: draw_plots(audit, limits, stage.plots, section) for section, audit in audits.items()}
    for name, text in {
        "audit.md": markdown_page(audits, together, limits, plots),
        "audit.html": html_page(audits, together, limits, plots),
    }.items():
        write_aside(paths.report / name, lambda aside, text=text: aside.write_text(text, encoding="utf-8"))
    for section, audit in audits.items():
        if "price_per_1000" in audit.cost:
            # Prices are of the environment: the tracker sees them, DVC must not.
            stage.tracker.metrics({f"{section}/price_per_1000_verdicts": audit.cost["price_per_1000"]}, step=None)
    found = {section: _numbers(audit, limits) for section, audit in audits.items()}
    more = {"panel": _panel_numbers(together, limits)} if together else {}
    stage.finish({"judges": len(audits), "gates_failed": failed, **found, **more})


def _numbers(audit: Audit, limits: Mapping[str, float | None]) -> dict[str, Any]:
    """One judge in metrics.json; nothing here differs from run to run."""
    estimates = lambda found: {name: value.as_dict() for name, value in found.items()}
    return {
        "name": audit.name,
        "measures": {measure.name: _measure(measure, limits[measure.name]) for measure in audit.measures},
        **{family: estimates(found) for family, found in {**audit.shifts, **audit.wins}.items() if found},
        "gold": {**estimates(audit.agreement), **({"confusion": audit.confusion} if audit.confusion else {})},
        "prefers_longer_by_quartile": {
            f"{least} to {most} characters": value.as_dict() for least, most, value in audit.quartiles
        },
        "calibration": [asdict(one) for one in audit.curve],
        **({"position_bias_nats": audit.bias_nats.as_dict()} if audit.bias_nats else {}),
        "cost": {name: value for name, value in audit.cost.items() if name != "price_per_1000"},
        "questions": audit.answered[1],
        "answered": audit.answered[0],
        "probes_without_reply": sum(count - valid for by in audit.read.values() for valid, count in by.values()),
    }


def _measure(measure: Measure, limit: float | None) -> dict[str, Any]:
    told = {"status": measure.status(limit), **({} if limit is None else {"limit": limit})}
    if measure.value is None:
        return {**told, "why_not": measure.why_not}
    return {
        **told,
        **measure.value.as_dict(),
        "of": measure.of,
        **({"which": measure.of_which} if measure.of_which else {}),
    }


def _panel_numbers(together: Panel, limits: Mapping[str, float | None]) -> dict[str, Any]:
    two = [
        {"judges": one.judges, "agreement": one.agreement.as_dict(), "kappa": one.kappa.as_dict(), "pairs": one.pairs}
        for one in together.two
    ]
    return {"panel_alpha": _measure(together.alpha, limits["panel_alpha"]), "two": two}


def _stop(failed: Sequence[tuple[str, Measure]], limits: Mapping[str, float | None], paths: Paths) -> None:
    from tasks.audit_page import said

    if failed:
        many = "gates fail" if len(failed) > 1 else "gate fails"
        told = [f"audit_judge: {len(failed)} {many}, so nothing is trained on these labels"]
        told += [f"{name}: {said(measure, limits[measure.name])}" for name, measure in failed]
        told += [f"report: {paths.report / 'audit.html'}; limits: audit_judge.gates (null: report only)"]
        raise UserError("\n  ".join(told))


if __name__ == "__main__":
    raise SystemExit(main("audit_judge", Params, Paths, run))
