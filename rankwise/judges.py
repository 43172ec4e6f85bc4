"""Judges that run in this process: a Python function, a reward model, a language model.

The language model is shown a rubric and a question and asked for one letter; the probabilities of the letters are its
reply, by the same log-probability code as everything else. It writes nothing, so there is nothing to misread.
"""

from __future__ import annotations

import importlib
import inspect
import json
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from rankwise.batching import micro_batches
from rankwise.checkpoints import Precision, device, load_causal_lm, load_reward_model, load_tokenizer, numerics
from rankwise.fingerprint import digest, file_digest, tokenizer_digest, weights_digest
from rankwise.rendering import Renderer, TokenRow
from rankwise.rewards import RewardModel
from rankwise.rubrics import Rubric, count_controls
from rankwise.scoring import LogpModel
from rankwise.types import Answer, Row, UserError, show_prompt, text_prompt
from rankwise.verdicts import LETTERS, Question, Reply, said_of

NUMERICS = 4  # raise it when the scoring code gives other numbers than before
LOGP_DIGITS = 6  # decimals of a log-probability that are kept: a millionth of a nat is below any rounding of a model


class _Pointwise:
    """A judge that scores each answer by itself, the same way every time."""

    pairwise, attempts, samples = False, 1, 1

    def read(self, question: Question, raw: Mapping[str, Any]) -> Reply:
        return Reply(question=question, values=(raw["score"],), raw=json.dumps(raw))


class CallableJudge(_Pointwise):
    """A Python function (prompt text, answer text) -> score, named "module:function"; for verifiable tasks.

    Its identity is its file's bytes; a function that depends on more (a fitted model, a data file) says so in an
    attribute `identity`, a function without arguments that returns a string.
    """

    def __init__(self, function: str, *, name: str = ""):
        self.name = name or function
        self._function, self._score = function, _import(function)
        self.source = _source(function, self._score)
        more = getattr(self._score, "identity", str)()
        self.identity = digest("callable", function, file_digest(self.source), more)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        for index, question in enumerate(questions):
            yield index, {"score": self._ask(question)}

    def _ask(self, question: Question) -> float:
        try:
            return float(self._score(show_prompt(question.prompt), question.answers[0]))
        except UserError:
            raise
        except Exception as error:  # whatever the user's own function may raise
            where = traceback.extract_tb(error.__traceback__)[-1]
            raise UserError(
                f"judge {self._function!r} gave no score for an answer to row {question.row_id!r}: "
                f"{type(error).__name__}: {error} ({where.filename}:{where.lineno}); it must return a number"
            ) from error


class RewardModelJudge(_Pointwise):
    """A sequence classifier with one output scores prompt + answer."""

    in_parts = True

    def __init__(
        self, folder: Path, *, max_tokens: int, precision: Precision = "fp32", batch_tokens: int = 16384, name: str = ""
    ):
        self.name = name or Path(folder).name
        self._renderer = Renderer(load_tokenizer(folder))
        self._module = RewardModel(load_reward_model(folder)).eval().to(device())
        self._max_tokens, self._precision, self._batch_tokens = max_tokens, precision, batch_tokens
        self.identity = digest(
            NUMERICS, "reward-model", weights_digest(folder), tokenizer_digest(folder), max_tokens, precision
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = [self._render(str(index), question) for index, question in enumerate(questions)]
        with torch.inference_mode(), numerics(self._precision, device()):
            for part in micro_batches(rows, max_tokens=self._batch_tokens, cost=self._module.cost):
                scores_A: Tensor = self._module(self._module.batch(part, 0).to(device()))
                yield from ((int(row.id), {"score": score}) for row, score in zip(part, scores_A.tolist()))

    def _render(self, name: str, question: Question) -> TokenRow:
        row = Row(id=name, prompt=question.prompt, answers=(Answer(text=question.answers[0]),))
        return path_within(self._renderer.render(row), self._max_tokens)


class LocalModelJudge:
    """A causal LM is asked for the letter of the better (of a list: the best) answer, in one forward pass.

    Its reply is the log-probability of each letter: the sum over all tokens whose text is that letter, blanks aside.
    A question with more tokens than the model has positions gets an invalid reply, which counts and says so: cut, it
    would be another question, and one long answer is no reason to stop a run.
    """

    pairwise, attempts, samples, in_parts = True, 1, 1, True

    def __init__(
        self, folder: Path, rubric: Rubric, *, precision: Precision = "fp32", batch_tokens: int = 16384, name: str = ""
    ):
        self.name = name or Path(folder).name
        self._tokenizer, self._rubric = load_tokenizer(folder), rubric
        self._renderer = Renderer(self._tokenizer)
        self._module = LogpModel(load_causal_lm(folder).to(device())).eval()
        self._positions = getattr(self._module.model.config.get_text_config(), "max_position_embeddings", None)
        self._precision, self._batch_tokens = precision, batch_tokens
        self._tokens = _letter_tokens(self._tokenizer)
        self._controls = _controls(self._tokenizer)
        self._system_role = self._tokenizer.chat_template is None or self._takes_system_role()
        self.identity = digest(
            NUMERICS, "local-llm", weights_digest(folder), tokenizer_digest(folder), rubric.version, precision
        )

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]]]:
        rows = []
        for index, question in enumerate(questions):
            row = TokenRow(id=str(index), prompt_ids=self._prompt_ids(question), answers_ids=self._asked(question))
            if self._positions is not None and len(row.prompt_ids) > self._positions:
                yield index, {"prompt_tokens": len(row.prompt_ids), "positions": self._positions}
            else:
                rows.append(row)
        with torch.inference_mode(), numerics(self._precision, device()):
            for part in micro_batches(rows, max_tokens=self._batch_tokens, cost=self._module.cost):
                batch = self._module.batch(part, 0).to(device())
                logp_BN = batch.by_prompt(self._module(batch).sum_A.double())
                for row, logp_N in zip(part, logp_BN):
                    yield int(row.id), self._raw(questions[int(row.id)], row, logp_N)

    def read(self, question: Question, raw: Mapping[str, Any]) -> Reply:
        found = {
            "question": question,
            "raw": json.dumps(raw),
            "prompt_tokens": raw["prompt_tokens"],
            "controls": count_controls(question, controls=self._controls),
        }
        if "logps" not in raw:
            why = f"the question has {raw['prompt_tokens']} tokens, and the model has {raw['positions']} positions"
            return Reply(values=None, mass=0.0, reason=why, **found)
        logps = tuple(raw["logps"])
        return Reply(values=logps, mass=math.fsum(map(math.exp, logps)), said=said_of(logps, question.letters), **found)

    def _asked(self, question: Question) -> tuple[tuple[int], ...]:
        """The tokens of all letters, one after another, each as an answer of one token."""
        for letter in question.letters:
            if not self._tokens[letter]:
                raise UserError(
                    f"judge {self.name!r}: its tokenizer has no single token for the verdict {letter!r}; use another "
                    "judge model"
                )
        return tuple((token,) for letter in question.letters for token in self._tokens[letter])

    def _raw(self, question: Question, row: TokenRow, logp_N: Tensor) -> dict[str, Any]:
        sizes = [len(self._tokens[letter]) for letter in question.letters]
        letters = [part.logsumexp(0).item() for part in logp_N[: sum(sizes)].split(sizes)]
        return {"logps": [round(logp, LOGP_DIGITS) for logp in letters], "prompt_tokens": len(row.prompt_ids)}

    def _prompt_ids(self, question: Question) -> tuple[int, ...]:
        system, user = self._rubric.messages(question, reply="logprobs", controls=self._controls)
        if self._tokenizer.chat_template is None:
            return tuple(
                self._renderer.prompt_ids(text_prompt(f"{system['content']}\n\n{user['content']}\n\nVerdict:"))
            )
        if self._system_role:
            return self._chat_ids([system, user])
        return self._chat_ids([{**user, "content": f"{system['content']}\n\n{user['content']}"}])

    def _chat_ids(self, chat: list[dict[str, str]]) -> tuple[int, ...]:
        rendered = self._tokenizer.apply_chat_template(
            chat,
            add_generation_prompt=True,
            return_dict=True,
            enable_thinking=False,  # templates of models that think first know it; others do not look
        )
        return tuple(rendered["input_ids"])

    def _takes_system_role(self) -> bool:
        """Whether the chat template has a place for it; some (Gemma's) refuse."""
        try:
            self._chat_ids([{"role": "system", "content": "s"}, {"role": "user", "content": "u"}])
        except TemplateError:
            return False
        return True


def path_within(row: TokenRow, limit: int) -> TokenRow:
    """Keep at most limit tokens of prompt + answer: the answer whole where it can be, the prompt's end before it."""
    if not limit or row.longest_path + 1 <= limit:
        return row
    answer = row.answers_ids[0][:limit]
    room = limit - len(answer)
    return TokenRow(id=row.id, prompt_ids=row.prompt_ids[-room:] if room else (), answers_ids=(answer,))


def _letter_tokens(tokenizer: PreTrainedTokenizerBase) -> dict[str, tuple[int, ...]]:
    """For each letter all tokens whose text is that letter, with blanks around it or without."""
    found: dict[str, list[int]] = {letter: [] for letter in LETTERS}
    for token, number in sorted(tokenizer.get_vocab().items(), key=lambda item: item[1]):
        # A vocabulary writes blanks its own way (Ġ, ▁) and letters as they are; so few tokens have to be decoded.
        if len(token) <= 4 and any(letter in found for letter in token):
            text = tokenizer.decode([number]).strip()
            if text in found:
                found[text].append(number)
    return {letter: tuple(tokens) for letter, tokens in found.items()}


def _controls(tokenizer: PreTrainedTokenizerBase) -> tuple[str, ...]:
    """Texts that are one token wherever they stand; runs of blanks are some of them, and steer nothing."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values()}
    return tuple(sorted(text for text in {*added, *tokenizer.all_special_tokens} if text.strip()))


def _import(name: str) -> Callable[[str, str], float]:
    module_name, _, function_name = name.partition(":")
    try:
        return getattr(importlib.import_module(module_name), function_name)
    except Exception as error:  # a module of the user's own may raise anything while it is imported
        raise UserError(
            f"judge {name!r} cannot be imported ({type(error).__name__}: {error}); write it as "
            "package.module:function, for example rankwise.corpus:ground_truth"
        ) from error


def _source(name: str, score: object) -> Path:
    """The file that a function stands in; UserError for what is none, or has no file (built in, partial, an object)."""
    try:
        source = inspect.getsourcefile(score) if callable(score) else None
    except TypeError:
        source = None
    if source is None or not Path(source).is_file():
        raise UserError(
            f"judge {name!r} is a {type(score).__name__} and no Python function in a file, which is what a judge is "
            "known by; wrap it: def judge(prompt, answer): return …"
        )
    return Path(source)
