"""What is known of public judges, computed anew by this project's code: `python -m recipes.public_labels report PATH`.

A line is one number: what it is, what is known of it (public papers, or an earlier count of the same files by other
code), ours. Agreement, length and order effects come from rankwise.agreement, rankings from rankwise.ranking,
leaderboards from rankwise.strengths; what they read are tables of verdicts, made of files by rankwise.stored_judge.
"""

from __future__ import annotations

import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.agreement import (
    Pair,
    cohen_kappa,
    confusion,
    first_share,
    flip_rate,
    krippendorff_alpha,
    label,
    pairs_of,
    prefers_longer,
    win,
)
from rankwise.evaluation import correlation
from rankwise.ranking import rank
from rankwise.verdicts import Verdict, read_verdicts
from recipes.public_labels import FLIPPED, PEOPLE, Labels, load, write
from recipes.public_tables import Grid, board, estimate, grid, percents, proportion, share_of, win_rates

SIDES = {"A": 1, "tie": 0, "B": -1}
SUBSETS = ("Natural", "GPTInst", "GPTOut", "Manual", "Neighbor")  # of LLMBar; all but the first are adversarial
Table = dict[str, list[Verdict]]  # row id -> one judge's verdicts
Line = tuple[str, str, str]  # what, known, ours
StoredLine = Mapping[str, Any]  # as rankwise.stored_lines reads it


@dataclass(frozen=True, kw_only=True)
class Source:
    """Labels and their tables of verdicts."""

    labels: Labels
    tables: dict[str, Table]  # by judge

    @classmethod
    def of(cls, name: str, path: Path) -> Source:
        labels = load(name, path)
        with tempfile.TemporaryDirectory() as folder:
            write(labels, Path(folder))
            tables = {judge: read_verdicts(Path(folder, "verdicts", f"{judge}.parquet")) for judge in labels.judges}
        return cls(labels=labels, tables=tables)

    def pairs(self, judge: str) -> list[Pair]:
        return [pair for row in self.labels.rows for pair in pairs_of(row, self.tables[judge].get(row.id, ()))]


def report(path: Path) -> str:
    """The whole report as text."""
    sections: dict[str, Callable[[Path], tuple[Iterable[Line], Iterable[Grid]]]] = {
        "MT-Bench": mt_bench,
        "IMDb": imdb,
        "PandaLM": pandalm,
        "LLMBar": llmbar,
        "AlpacaEval": alpacaeval,
        "OpenAssistant": oasst,
    }
    parts = []
    for title, numbers in sections.items():
        lines, grids = numbers(path)
        marked = [
            [what, known, ours, "" if not known else "same" if known == ours else "OTHER"]
            for what, known, ours in lines
        ]
        parts.append(f"{title}\n\n{grid([['number', 'known', 'ours', ''], *marked])}")
        parts += [grid(one) for one in grids]
    return "\n\n".join(parts)


# Sources -------------------------------------------------------------------------------------------------------------


def mt_bench(path: Path) -> tuple[list[Line], list[Grid]]:
    """GPT-4 against people, vote by vote; the tournaments of six models."""
    source = Source.of("mt_bench", path)
    gpt4, people = (source.labels.judges[name] for name in ("gpt4", PEOPLE))
    flips, again = sum(line["reason"] == FLIPPED for line in gpt4), _judged_again(gpt4)
    lines = [
        *_votes(gpt4, people),
        ("GPT-4's verdicts that change with the order", "283 of 1,680", f"{flips} of {len(gpt4):,}"),
        ("two texts judged again, as other models' answers: other verdict", "", f"{sum(again)} of {len(again)}"),
        *_tournaments(source),
        *_pooled(source),
    ]
    return lines, [board({"GPT-4": gpt4, "people": people})]


def _votes(gpt4: Sequence[StoredLine], people: Sequence[StoredLine]) -> list[Line]:
    """Every vote of a person beside GPT-4's verdict on the same question, turn and models."""
    said = {key: side for line in gpt4 for key, side in _both_ways(line)}
    votes = [(said[line["row_id"], *line["models"]], SIDES[line["verdict"]]) for line in people]
    decided = [(ours, theirs) for ours, theirs in votes if ours and theirs]
    return [
        ("votes of people", "2,399", f"{len(votes):,}"),
        ("GPT-4 agrees with the vote, ties included", "0.6478", f"{_same(votes) / len(votes):.4f}"),
        ("  Cohen's kappa", "", estimate(cohen_kappa(confusion(*zip(*votes))))),
        ("votes where neither says tie", "1,536", f"{len(decided):,}"),
        ("GPT-4 agrees with those", "0.8366", f"{_same(decided) / len(decided):.4f}"),
        ("  with its 95 % interval, votes taken as independent", "", proportion(_same(decided), len(decided))),
    ]


def _tournaments(source: Source) -> list[Line]:
    """The six models' answers to a question and turn, as rankwise.ranking sees them."""
    played: dict[str, set[frozenset[str]]] = defaultdict(set)
    for line in source.labels.judges["gpt4"]:
        played[line["row_id"]].add(frozenset(line["models"]))
    complete = sum(len(pairs) == 15 for pairs in played.values())
    judged = [rank(row, source.tables["gpt4"][row.id], tie_below=0.0) for row in source.labels.rows]
    circular = [one.circular_triads for one in judged]
    zeta = [1 - one.circular_triads / one.most_circular_triads for one in judged if one.most_circular_triads]
    tied = sum(len({answer.rank for answer in one.row.answers}) < len(one.row.answers) for one in judged)
    return [
        ("complete tournaments of K = 6", "112 of 112", f"{complete} of {len(source.labels.rows)}"),
        ("  circular triads in all of them", "", str(sum(circular))),
        ("  mean coefficient of consistency (Kendall's zeta)", "", f"{np.mean(zeta):.4f}" if zeta else "none"),
        ("  rankings with ties", "", f"{tied} of {len(judged)}"),
    ]


def _pooled(source: Source) -> list[Line]:
    """GPT-4 and the votes of people taken together, pair by pair of texts."""
    gpt4, people = source.pairs("gpt4"), source.pairs(PEOPLE)
    side = {(pair.row_id, pair.places): label(pair.preference, 0.0) for pair in people}
    both = [(label(pair.preference, 0.0), side.get((pair.row_id, pair.places), 0)) for pair in gpt4]
    decided = [(ours, theirs) for ours, theirs in both if ours and theirs]
    return [
        ("GPT-4 agrees with people's majority, where neither ties", "", proportion(_same(decided), len(decided))),
        ("GPT-4 prefers the longer answer", "", estimate(prefers_longer(gpt4, tie_below=0.0))),
        ("people's majority prefers the longer answer", "", estimate(prefers_longer(people, tie_below=0.0))),
    ]


def pandalm(path: Path) -> tuple[list[Line], list[Grid]]:
    """Two judges against the majority of three people."""
    source = Source.of("pandalm", path)
    votes: dict[str, list[int]] = defaultdict(list)
    for line in source.labels.judges[PEOPLE]:
        votes[line["row_id"]].append(SIDES[line["verdict"]])
    majority = {row_id: max(SIDES.values(), key=mine.count) for row_id, mine in votes.items()}
    lines: list[Line] = [("pairs", "", str(len(majority)))]
    # The 0.698 that was noted as gpt-3.5's is PandaLM-7B's.
    for judge, name, known in (("gpt35", "gpt-3.5", ""), ("pandalm7b", "PandaLM-7B", "0.698")):
        said = {line["row_id"]: SIDES[line["verdict"]] for line in source.labels.judges[judge]}
        both = [(said[row_id], majority[row_id]) for row_id in said]
        lines += [
            (
                f"{name} agrees with the majority, no verdict counted as wrong",
                known,
                share_of(_same(both), len(majority)),
            ),
            (f"  of its {len(said)} verdicts", "", proportion(_same(both), len(both))),
            ("  Cohen's kappa", "", estimate(cohen_kappa(confusion(*zip(*both))))),
            ("  prefers the longer answer", "", estimate(prefers_longer(source.pairs(judge), tie_below=0.0))),
        ]
    alpha = krippendorff_alpha(list(votes.values()))
    lines += [
        ("three people among themselves: Krippendorff's alpha", "", estimate(alpha)),
        (
            "  their majority prefers the longer answer",
            "",
            estimate(prefers_longer(source.pairs(PEOPLE), tie_below=0.0)),
        ),
    ]
    return lines, []


def llmbar(path: Path) -> tuple[list[Line], list[Grid]]:
    """65 judges in both orders, on natural and on adversarial pairs."""
    source = Source.of("llmbar", path)
    subset = {row.id: row.meta["subset"].split("/")[-1] for row in source.labels.rows}
    gold = {pair.row_id: pair for pair in source.pairs(PEOPLE)}
    longer = [_longer_wins([pair for pair in gold.values() if subset[pair.row_id] == name]) for name in SUBSETS]
    judges = sorted(name for name in source.tables if name != PEOPLE)
    rows = [_judge_of_llmbar(name, source, subset, gold) for name in judges]
    gpt4 = next((row[-len(SUBSETS) : -1] for row in rows if row[0] == "GPT-4_Vanilla"), [])
    lines = [
        ("judges, each in both orders", "65", str(len(judges))),
        ("longer wins, right on the four adversarial parts", "6–29 %", percents(longer[1:])),
        ("GPT-4 (Vanilla), right on them, both orders", "77–89 %", percents(gpt4)),
    ]
    head = ["judge", "verdicts", "flips", "for the first", "prefers longer", *SUBSETS, "adversarial"]
    return lines, [[head, ["longer wins", "", "", "", "", *longer, ""], *rows]]


def alpacaeval(path: Path) -> tuple[list[Line], list[Grid]]:
    """Two judges of 17 models, each against one baseline."""
    source = Source.of("alpacaeval", path)
    names = {"gpt4turbo": "GPT-4-turbo against gpt4_1106_preview", "gpt4": "GPT-4 against text_davinci_003"}
    lines: list[Line] = []
    for judge, name in names.items():
        pairs = source.pairs(judge)
        lines += [
            (f"{name}: pairs", "", f"{len(pairs):,}"),
            ("  prefers the longer answer", "", estimate(prefers_longer(pairs, tie_below=0.0))),
        ]
    boards = [win_rates(source.labels.judges[judge]) for judge in names]
    both = sorted(set(boards[0]) & set(boards[1]))
    places = [np.argsort(np.argsort([board[model] for model in both])).tolist() for board in boards]
    lines.append(
        (f"rank correlation of the two judges' win rates, {len(both)} models", "", f"{correlation(*places):.3f}")
    )
    return lines, [board({name: source.labels.judges[judge] for judge, name in names.items()})]


def oasst(path: Path) -> tuple[list[Line], list[Grid]]:
    """People's rankings of K answers: to questions, to verdicts, to ranks and back."""
    source = Source.of("oasst", path)
    given = {line["row_id"]: {a["text"]: a["rank"] for a in line["answers"]} for line in source.labels.judges[PEOPLE]}
    judged = [rank(row, source.tables[PEOPLE][row.id], tie_below=0.0).row for row in source.labels.rows]
    kept = sum(
        [given[row.id][answer.text] for answer in row.answers] == list(range(len(row.answers))) for row in judged
    )
    pairs = source.pairs(PEOPLE)
    longest = sum(max(len(a.text) for a in row.answers) == len(row.answers[0].text) for row in judged)
    sizes = [len(row.answers) for row in judged]
    lines = [
        (
            "rankings that leave the K-way path as people gave them",
            f"{len(given)} of {len(given)}",
            f"{kept} of {len(judged)}",
        ),
        ("answers a ranking", "2–9", f"{min(sizes)}–{max(sizes)}"),
        ("pairs in them", "", f"{len(pairs):,}"),
        ("people prefer the longer answer", "", estimate(prefers_longer(pairs, tie_below=0.0))),
        ("the best answer is the longest", "", share_of(longest, len(judged))),
    ]
    return lines, []


def imdb(path: Path) -> tuple[list[Line], list[Grid]]:
    """TF-IDF with logistic regression as in recipes.judges, fitted on train; the known one's settings are not known."""
    import pandas as pd
    from sklearn.feature_extraction.text import TfidfVectorizer
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline

    tables = {name: pd.read_parquet(path / "imdb" / f"{name}.parquet") for name in ("train", "validation", "test")}
    vectors = TfidfVectorizer(ngram_range=(1, 2), min_df=3, sublinear_tf=True)
    model = make_pipeline(vectors, LogisticRegression(C=10.0, max_iter=1000))
    model.fit(tables["train"]["text"], tables["train"]["label"])
    right = lambda name, words: model.score(
        [" ".join(t.split()[:words]) if words else t for t in tables[name]["text"]], tables[name]["label"]
    )
    lines = [
        ("accuracy, validation", "0.893", f"{right('validation', None):.3f}"),
        ("accuracy, test", "0.895", f"{right('test', None):.3f}"),
        ("accuracy, test, first 60 words", "0.79", f"{right('test', 60):.2f}"),
    ]
    return lines, []


# Parts ---------------------------------------------------------------------------------------------------------------


def _both_ways(line: StoredLine) -> Iterator[tuple[tuple[str, str, str], int]]:
    """A verdict on two models, and the same on the two the other way round."""
    side, (first, second) = SIDES[line["verdict"]], line["models"]
    yield (line["row_id"], first, second), side
    yield (line["row_id"], second, first), -side


def _judged_again(lines: Iterable[StoredLine]) -> list[bool]:
    """Of each verdict on two texts that had one before: whether it is another one."""
    first: dict[tuple[str, str, str], int] = {}
    changed = []
    for line in lines:
        side = SIDES[line["verdict"]] * (1 if line["first"] < line["second"] else -1)
        about = (line["row_id"], *sorted((line["first"], line["second"])))
        if about in first:
            changed.append(first[about] != side)
        else:
            first[about] = side
    return changed


def _judge_of_llmbar(name: str, source: Source, subset: Mapping[str, str], gold: Mapping[str, Pair]) -> list[str]:
    """A line of the table of judges; accuracy is that of single verdicts, both orders alike."""
    right, count = defaultdict(int), defaultdict(int)
    for row_id, verdicts in source.tables[name].items():
        for verdict in (v for v in verdicts if v.values is not None):
            better = verdict.shown[0] if verdict.said == "A" else verdict.shown[1]
            for part in (subset[row_id], *(["adversarial"] if subset[row_id] != "Natural" else [])):
                right[part] += (better == 0) == (gold[row_id].preference > 0)
                count[part] += 1
    pairs = source.pairs(name)
    measures = (
        flip_rate(pairs, tie_below=0.0),
        first_share(pairs, tie_below=0.0),
        prefers_longer(pairs, tie_below=0.0),
    )
    said = str(sum(count[part] for part in SUBSETS))
    return [
        name,
        said,
        *(share_of(m.mean, 1) if m else "none" for m in measures),
        *(share_of(right[p], count[p]) for p in (*SUBSETS, "adversarial")),
    ]


def _longer_wins(gold: Sequence[Pair]) -> str:
    """How often the longer of two answers (characters) is the better one, as many alike counting half."""
    return share_of(sum(win(pair.preference * pair.longer, 0.0) for pair in gold), len(gold))


def _same(both: Iterable[tuple[int, int]]) -> int:
    return sum(ours == theirs for ours, theirs in both)
