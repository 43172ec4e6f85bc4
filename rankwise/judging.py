"""Judges: who ranks the answers. A judge gives replies; rankings are a pure function of replies.

A pointwise judge (reward model, Python callable) scores each answer by itself. A pairwise judge (a language model asked
which of two answers is better) sees each pair in both orders, because the first place is favoured: preference is half
the difference of its two log-odds, position bias half their sum.
"""

from __future__ import annotations

import importlib
import inspect
import itertools
import json
import math
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.batching import micro_batches
from rankwise.checkpoints import Precision, device, load_causal_lm, load_reward_model, load_tokenizer, numerics
from rankwise.fingerprint import digest, file_digest, tokenizer_digest, weights_digest
from rankwise.progress import Progress
from rankwise.rendering import Renderer, TokenRow
from rankwise.rewards import RewardModel
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.types import Answer, Message, Row, UserError, show_prompt

VERDICTS = ("A", "B")
NUMERICS = 2  # raise it when the scoring code gives other numbers than before
COMMIT_REPLIES = 64  # replies lost at most when killed


@dataclass(frozen=True, kw_only=True)
class Question:
    """One call of a judge: an answer alone (second is None), or two answers in the order shown."""

    row_id: str
    prompt: tuple[Message, ...]
    first: str
    second: str | None = None
    i: int  # place of the first answer in its row
    j: int | None = None  # place of the second


@dataclass(frozen=True, kw_only=True)
class Reply:
    """What a judge said; kept raw, because it was costly and may not be reproducible."""

    value: float  # pointwise: the score; pairwise: log-odds that the answer shown first is better, nats
    mass: float = 1.0  # pairwise: probability that the judge gave to the two verdict tokens together


class Judge(Protocol):
    """A judge answers questions in batches and knows its own identity."""

    identity: str  # hash of everything that its replies depend on
    pairwise: bool

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        """Yield (index of the question, reply) in any order, as they come."""


class CallableJudge:
    """A Python function (prompt text, answer text) -> score, named "module:function"; for verifiable tasks.

    Its identity is its file's bytes; a function that depends on more (a fitted model, a data file) says so in an
    attribute `identity`, a function without arguments that returns a string.
    """

    pairwise = False

    def __init__(self, name: str):
        self._name, self._score = name, _import(name)
        source = Path(inspect.getsourcefile(self._score))
        more = getattr(self._score, "identity", str)()
        self.identity = digest("callable", name, file_digest(source), more)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        for index, question in enumerate(questions):
            yield index, Reply(value=self._ask(question))

    def _ask(self, question: Question) -> float:
        try:
            return float(self._score(show_prompt(question.prompt), question.first))
        except UserError:
            raise
        except Exception as error:  # whatever the user's own function may raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"judge {self._name!r} gave no score for an answer to row {question.row_id!r}: "
                f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}); it must return a number"
            ) from error


class RewardModelJudge:
    """A sequence classifier with one output scores prompt + answer."""

    pairwise = False

    def __init__(self, folder: Path, *, max_tokens: int, precision: Precision = "fp32", batch_tokens: int = 16384):
        self.tokenizer = load_tokenizer(folder)
        self._renderer = Renderer(self.tokenizer)
        self._module = RewardModel(load_reward_model(folder)).eval().to(device())
        self._max_tokens, self._precision, self._batch_tokens = max_tokens, precision, batch_tokens
        self.identity = digest(
            NUMERICS, "reward-model", weights_digest(folder), tokenizer_digest(folder), max_tokens, precision
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        rows = [self._render(str(index), question) for index, question in enumerate(questions)]
        with torch.inference_mode(), numerics(self._precision, device()):
            for part in micro_batches(rows, max_tokens=self._batch_tokens, cost=self._module.cost):
                scores_A: Tensor = self._module(self._module.batch(part, 0).to(device()))
                yield from ((int(row.id), Reply(value=score)) for row, score in zip(part, scores_A.tolist()))

    def _render(self, name: str, question: Question) -> TokenRow:
        row = Row(id=name, prompt=question.prompt, answers=(Answer(text=question.first),))
        return path_within(self._renderer.render(row), self._max_tokens)


class LocalModelJudge:
    """A causal LM is shown two answers and the rubric; its log-odds of "A" over "B" are the reply.

    The two verdict tokens are scored by the same log-probability code as everything else.
    """

    pairwise = True

    def __init__(self, folder: Path, rubric: Path, *, precision: Precision = "fp32", batch_tokens: int = 16384):
        self._tokenizer = load_tokenizer(folder)
        self._rubric = Path(rubric).read_text(encoding="utf-8")
        self._module = LogpModel(load_causal_lm(folder).to(device())).eval()
        self._verdicts = [_single_token(self._tokenizer, verdict) for verdict in VERDICTS]
        self._precision, self._batch_tokens = precision, batch_tokens
        self.identity = digest(
            NUMERICS, "local-llm", weights_digest(folder), tokenizer_digest(folder), self._rubric, VERDICTS, precision
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, Reply]]:
        answers = tuple((token,) for token in self._verdicts)
        rows = [
            TokenRow(id=str(index), prompt_ids=tuple(self._prompt_ids(question)), answers_ids=answers)
            for index, question in enumerate(questions)
        ]
        with torch.inference_mode(), numerics(self._precision, device()):
            for part in micro_batches(rows, max_tokens=self._batch_tokens, cost=self._module.cost):
                batch = self._module.batch(part, 0).to(device())
                logp_BK = batch.by_prompt(self._module(batch).sum_A)
                for row, (a, b) in zip(part, logp_BK.tolist()):
                    yield int(row.id), Reply(value=a - b, mass=float(torch.tensor([a, b]).exp().sum()))

    def _prompt_ids(self, question: Question) -> list[int]:
        data = {"prompt": show_prompt(question.prompt), "answer_A": question.first, "answer_B": question.second}
        block = json.dumps(data, ensure_ascii=False)
        if self._tokenizer.chat_template is not None:
            chat = [{"role": "system", "content": self._rubric}, {"role": "user", "content": block}]
            rendered = self._tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=True)
            return list(rendered["input_ids"])
        return list(self._tokenizer(f"{self._rubric}\n\n{block}\n\nVerdict:")["input_ids"])


def judge_rows(
    judge: Judge, rows: Sequence[Row], store: Store, *, what: str = "verdicts"
) -> tuple[list[tuple[Question, Reply]], int]:
    """Every question that ranks the rows' answers, with its reply, in order; and how many were asked now.

    Replies are kept as they come: killed anywhere, a rerun asks only what is missing.
    """
    questions = questions_of(rows, pairwise=judge.pairwise)
    keys = [key_of(judge.identity, question) for question in questions]
    found = store.get_many(keys)
    wanted = {key: question for key, question in zip(keys, questions) if key not in found}
    with Progress(what, total=len(set(keys)), unit="verdict", done=len(set(keys)) - len(wanted)) as progress:
        fresh: dict[str, dict] = {}
        names = list(wanted)
        for index, reply in judge.ask(list(wanted.values())):
            if not math.isfinite(reply.value):
                raise UserError(
                    f"{what}: the judge's reply to row {wanted[names[index]].row_id!r} is {reply.value}, which ranks "
                    "nothing; a finite number is needed: look at this row, and at the judge's weights or function"
                )
            fresh[names[index]] = asdict(reply)
            progress.advance(1)
            if len(fresh) >= COMMIT_REPLIES:
                store.put_many(fresh)
                fresh = {}
        store.put_many(fresh)
    found = store.get_many(keys)
    return [(question, Reply(**found[key])) for key, question in zip(keys, questions)], len(wanted)


def questions_of(rows: Sequence[Row], *, pairwise: bool) -> list[Question]:
    """The questions that rank each row's answers; answers with the same text are asked about once or not at all."""
    return [question for row in rows for question in (_pairs(row) if pairwise else _points(row))]


def key_of(judge_identity: str, question: Question) -> str:
    """Key of a reply in the row store: the judge and the exact text it is shown, and nothing else."""
    turns = [[message.role, message.content] for message in question.prompt]
    return digest(judge_identity, turns, question.first, question.second)


def path_within(row: TokenRow, limit: int) -> TokenRow:
    """Keep at most limit tokens of prompt + answer: the answer whole where it can be, the prompt's end before it."""
    if not limit or row.longest_path + 1 <= limit:
        return row
    answer = row.answers_ids[0][:limit]
    room = limit - len(answer)
    return TokenRow(id=row.id, prompt_ids=row.prompt_ids[-room:] if room else (), answers_ids=(answer,))


def _points(row: Row) -> list[Question]:
    return [Question(row_id=row.id, prompt=row.prompt, first=a.text, i=i) for i, a in enumerate(row.answers)]


def _pairs(row: Row) -> list[Question]:
    return [
        Question(row_id=row.id, prompt=row.prompt, first=row.answers[i].text, second=row.answers[j].text, i=i, j=j)
        for i, j in itertools.permutations(range(len(row.answers)), 2)
        if row.answers[i].text != row.answers[j].text
    ]


def _single_token(tokenizer: PreTrainedTokenizerBase, verdict: str) -> int:
    for text in (f" {verdict}", verdict):
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        if len(ids) == 1:
            return ids[0]
    raise UserError(f"the judge's tokenizer has no single token for the verdict {verdict!r}; use another judge model")


def _import(name: str) -> Callable[[str, str], float]:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(
            f"judge {name!r} cannot be imported ({error}); write it as package.module:function, "
            "for example rankwise.corpus:ground_truth"
        ) from error
