"""A judge whose replies stand in a file: people's labels, or what other judges said before.

rankwise.stored_lines says what a file looks like. A line answers the questions about exactly its texts, to the
character. A verdict counts for both orders only where the file says so (`order`: none; a ranking has no order): half of
a verdict given in one order may be the order. What the file does not answer stays unanswered.

Several annotators of a question are one judge: their votes are pooled to the empirical logit
log((n_A + ½) / (n_B + ½)), a tie counting half to each side (Anscombe 1956; of a single vote: log 3). So 3 : 0 weighs
more than 2 : 1, which a majority forgets, and it is of no matter who answered which questions. One annotator alone is a
judge by `annotator`; several of those are a panel.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.fingerprint import digest, file_digest
from rankwise.json_text import whole_characters
from rankwise.stored_lines import Line, Vote, annotator_of, names_of, read_line, records
from rankwise.types import UserError
from rankwise.verdicts import Question, Reply, said_of, values_of

READER = 2  # raise it when lines are read otherwise than before
SHOWN = 10  # bad lines named in a message


class StoredJudge:
    """Answers questions from a file.

    Args:
        annotator: whose lines count; empty: everybody's.

    Raises UserError where the file is missing, is none of the formats, or holds lines that make no sense.
    """

    pairwise = True
    attempts = 1
    samples = 1

    def __init__(self, path: Path, *, annotator: str = ""):
        self.path = Path(path)
        self.name = annotator or self.path.name.split(".")[0]
        self._noticed: set[str] = set()  # names of questions that the file speaks of
        self._votes: dict[str, list[Vote]] = defaultdict(list)  # on pairs, by the name of the question
        self._rankings: dict[str, list[Line]] = defaultdict(list)  # by the name of the prompt
        self._read(annotator)
        self.identity = digest("stored", READER, file_digest(self.path), annotator)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        """Yield (index, {"votes": […]}) of every question; no votes where the file does not answer it.

        Raises UserError, before anything is yielded, where an annotator says two things about one question, or where a
        list is asked about and the file holds pairs alone.
        """
        found = [self._found(question) for question in questions]
        problems = [text for question, votes in zip(questions, found) for text in _contradictions(question, votes)]
        if problems:
            what = "an annotator says two things of one question; take one of them out, or name the annotators"
            raise _told(self.path, what, problems)
        for index, (question, votes) in enumerate(zip(questions, found)):
            raw: dict[str, Any] = {"votes": [_as_json(vote) for vote in _one_each(votes)]}
            if not votes and self._other_order(question):
                raw["other_order_alone"] = True
            yield index, raw

    def read(self, question: Question, raw: Mapping[str, Any]) -> Reply:
        """The votes pooled; not answered where there are none; orderless where each of them holds for both orders."""
        votes = raw["votes"]
        text = json.dumps(raw, ensure_ascii=False, sort_keys=True)
        if not votes:
            why = "the file holds no verdict on this question"
            if raw.get("other_order_alone"):
                why += " in this order, only in the other one; order: none would say that it holds for both"
            return Reply(question=question, values=None, reason=why, raw=text, answered=False)
        values = pooled(votes, question.letters)
        reasons = "; ".join(vote["reason"] for vote in votes if vote["reason"])
        return Reply(
            question=question,
            values=values,
            said=said_of(values, question.letters),
            reason=reasons,
            raw=text,
            orderless=all(vote["orderless"] for vote in votes),
        )

    def notice(self, question: Question) -> None:
        """A question that idle is to know of."""
        for texts in (question.answers, question.answers[::-1], ()):
            named = names_of(question, texts)
            self._noticed.update(name for name in named if name in self._votes or name in self._rankings)

    def idle(self) -> tuple[int, int]:
        """(lines that speak of none of the questions noticed, all lines); many are a sign of a file on other texts."""
        sizes = {name: len(lines) for found in (self._votes, self._rankings) for name, lines in found.items()}
        return sum(size for name, size in sizes.items() if name not in self._noticed), sum(sizes.values())

    def _found(self, question: Question) -> list[Vote]:
        """What the file says to a question."""
        if len(question.answers) == 2:
            direct = [vote for name in names_of(question, question.answers) for vote in self._votes.get(name, ())]
            swapped = [vote.swapped() for vote in self._other_order(question) if vote.orderless]
            return direct + swapped + self._ranked(question)
        if not self._rankings:
            count = len(question.answers)
            raise UserError(
                f"{self.path}: holds verdicts on pairs, but row {question.row_id!r} is asked about as a list of "
                f"{count} answers; let this judge's pairs_up_to be {count} or more, so that every pair is asked about, "
                "or give rankings (column answers)"
            )
        return self._ranked(question)

    def _other_order(self, question: Question) -> list[Vote]:
        """The votes on the same two answers in the other order, as they stand in the file."""
        if len(question.answers) != 2:
            return []
        return [vote for name in names_of(question, question.answers[::-1]) for vote in self._votes.get(name, ())]

    def _ranked(self, question: Question) -> list[Vote]:
        """What rankings of these answers, and perhaps of others, say of these."""
        lines = [line for name in names_of(question, ()) for line in self._rankings.get(name, ())]
        return [
            replace(
                line.vote,
                said=said_of([-line.ranks[text] for text in question.answers], question.letters),
                orderless=True,
            )
            for line in lines
            if all(text in line.ranks for text in question.answers)
        ]

    def _read(self, annotator: str) -> None:
        problems, names = [], set()
        for place, record in records(self.path):
            name = annotator_of(record)
            names.add(name)
            try:
                line = read_line(place, record) if annotator in ("", name) else None
            except ValueError as error:
                problems.append(f"{place}: {error}")
                continue
            if line is None:
                continue
            if line.ranks is None:
                self._votes[line.name].append(line.vote)
            else:
                self._rankings[line.name].append(line)
        if problems:
            raise _told(self.path, "lines that make no sense", problems)
        if annotator and annotator not in names:
            known = ", ".join(sorted(name[:60] for name in names if name)[:SHOWN]) or "none"
            raise UserError(whole_characters(f"{self.path}: no line of annotator {annotator!r}; found: {known}"))
        if not self._votes and not self._rankings:
            raise UserError(f"{self.path}: no line gives a verdict; fill in column verdict (A, B or tie)")


def pooled(votes: Sequence[Mapping[str, Any]], letters: str) -> tuple[float, ...]:
    """Log-worths, nats, of at least one vote {said, value} on the answers that letters name.

    Verdicts on pairs: the empirical logit of the votes. Log-odds: the logit of the mean probability, as a panel has it;
    a verdict among them counts as that of one vote. Orders of more than two: the mean of their worths.
    """
    if len(letters) > 2:
        worths = [values_of(vote["said"], letters) for vote in votes]
        return tuple(math.fsum(worth) / len(votes) for worth in zip(*worths))
    if len(votes) == 1 or any(vote["value"] is not None for vote in votes):
        odds = np.array([_odds(vote, letters) for vote in votes])
        if len(odds) == 1:
            return float(odds[0]), 0.0
        for_first, against = (-np.logaddexp(0.0, sign * odds) for sign in (-1, 1))  # log σ(±odds)
        return float(np.logaddexp.reduce(for_first) - np.logaddexp.reduce(against)), 0.0
    first = sum({"A": 1.0, "tie": 0.5, "B": 0.0}[vote["said"]] for vote in votes)
    return math.log((first + 0.5) / (len(votes) - first + 0.5)), 0.0


def _odds(vote: Mapping[str, Any], letters: str) -> float:
    if vote["value"] is not None:
        return vote["value"]
    first, second = values_of(vote["said"], letters)
    return first - second


def _contradictions(question: Question, votes: Sequence[Vote]) -> Iterator[str]:
    first: dict[str, Vote] = {}
    for vote in votes:
        one = first.setdefault(vote.annotator, vote)
        if (one.said, one.value) != (vote.said, vote.value):
            who = f"annotator {vote.annotator!r}" if vote.annotator else "the unnamed annotator"
            yield (
                f"{one.place} and {vote.place}: {who} says {_spell(one)} and {_spell(vote)} "
                f"of one question of row {question.row_id!r} (A is {question.answers[0][:40]!r})"
            )


def _one_each(votes: Sequence[Vote]) -> list[Vote]:
    """A vote that the file repeats counts once."""
    return list({vote.annotator: vote for vote in reversed(votes)}.values())[::-1]


def _spell(vote: Vote) -> str:
    return repr(vote.said) if vote.value is None else repr(vote.value)


def _as_json(vote: Vote) -> dict[str, Any]:
    return {name: getattr(vote, name) for name in ("place", "annotator", "said", "value", "reason", "orderless")}


def _told(path: Path, what: str, problems: Sequence[str]) -> UserError:
    rest = [f"and {len(problems) - SHOWN} more"] if len(problems) > SHOWN else []
    return UserError(whole_characters("\n  ".join([f"{path}: {what}", *problems[:SHOWN], *rest])))
