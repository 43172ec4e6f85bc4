"""Text to tokens: the one place where it happens, for SFT, rollouts, reference, training and judging alike.

The rule at the boundary: a prompt's tokens are tokenize(prompt), whatever follows, because that is what the
policy will be given when it answers. An answer's tokens are what tokenize(prompt + answer) adds to them. Where the
tokenizer would merge characters across the boundary, the answer's text is tokenized by itself and the row is
marked, so that the data doctor can count it. A plain-text answer ends in the EOS token; a chat answer ends as the
chat template ends it; a sampled answer that was cut does not end.

Text is data: a special token that is spelled out in an answer or in a turn of a chat (</s>, <|im_end|>) is tokenized as
the characters that it is written in, so nobody ends a turn, or begins one, by writing so. A plain-text prompt is the
whole input, continued verbatim: special tokens that it spells out are meant.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import takewhile

from transformers import PreTrainedTokenizerBase

from rankwise.types import Answer, Message, Row, UserError


@dataclass(frozen=True, kw_only=True)
class TokenRow:
    """A row as tokens: its prompt once, its K answers beside it."""

    id: str
    prompt_ids: tuple[int, ...]
    answers_ids: tuple[tuple[int, ...], ...]  # K answers; each ends in EOS unless it was cut
    ranks: tuple[int, ...] = ()  # one an answer, 0 best, ties equal; empty when unranked
    strengths: tuple[float, ...] = ()  # judge's log-strengths, one an answer, when known
    boundary_merges: int = 0  # answers whose first characters the tokenizer would merge into the prompt
    cut_tokens: int = 0  # tokens lost to the length limit, prompt and answers together

    @property
    def positions(self) -> int:
        """Positions that this row computes: the prompt, and each answer but its last token, which predicts none."""
        return len(self.prompt_ids) + sum(len(answer) - 1 for answer in self.answers_ids)

    @property
    def longest_path(self) -> int:
        """Positions from the first prompt token to the end of the longest answer."""
        return len(self.prompt_ids) + max((len(answer) - 1 for answer in self.answers_ids), default=0)


class Renderer:
    """Renders rows with one tokenizer, one template and one pair of length limits.

    max_prompt_tokens keeps a prompt's end (its beginning is cut); max_answer_tokens keeps an answer's beginning.
    0 means no limit.

    A pad token equal to EOS is harmless here: targets are chosen by position, never by token, so the policy still
    learns to stop.

    Raises UserError when the tokenizer has no EOS token, or when a chat row meets a tokenizer without a template.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, max_prompt_tokens: int = 0, max_answer_tokens: int = 0):
        if tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer {tokenizer.name_or_path!r} has no EOS token, so an answer could never end; "
                "set eos_token in its tokenizer_config.json"
            )
        self.tokenizer = tokenizer
        self.max_prompt_tokens = max_prompt_tokens
        self.max_answer_tokens = max_answer_tokens
        self._known: dict[int, int] = {}
        # Some tokenizers close every text with EOS by themselves; a prompt must stay open.
        probe = tokenizer("a")["input_ids"]
        self._closing = int(bool(probe) and probe[-1] == tokenizer.eos_token_id)
        self._special = _special(tokenizer)

    def prompt_ids(self, prompt: Sequence[Message]) -> list[int]:
        """Tokens of a prompt, ready for an answer to follow; whole, whatever the limits."""
        if _is_text(prompt):
            return list(self.tokenizer(prompt[0].content)["input_ids"][: -self._closing or None])
        return self._template(prompt, add_generation_prompt=True)

    def answer_ids(self, prompt: Sequence[Message], prompt_ids: Sequence[int], text: str) -> tuple[list[int], bool]:
        """Tokens of an answer after its prompt, its end token included; and whether its text was tokenized alone."""
        if self._special.search(text):
            return [*self._as_written(text), self.tokenizer.eos_token_id], True
        if _is_text(prompt):
            whole = self.tokenizer(prompt[0].content + text)["input_ids"]
            whole = whole[: -self._closing or None]
            tail = [self.tokenizer.eos_token_id]
        else:
            whole = self._template((*prompt, Message(role="assistant", content=text)), add_generation_prompt=False)
            tail = []
        if list(whole[: len(prompt_ids)]) == list(prompt_ids):
            return [*whole[len(prompt_ids) :], *tail], False
        alone = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return [*alone, self.tokenizer.eos_token_id], True

    def render(self, row: Row, answers: Sequence[Answer] | None = None) -> TokenRow:
        """A row as tokens. Answers that carry token ids (rollouts) keep them: nothing is tokenized twice."""
        answers = row.answers if answers is None else answers
        full = self.prompt_ids(row.prompt)
        kept = self._within(full)
        answers_ids, merges, cut = [], 0, len(full) - len(kept)
        for answer in answers:
            if answer.token_ids is not None:
                ids = list(answer.token_ids)
            else:
                ids, merged = self.answer_ids(row.prompt, full, answer.text)
                # Cut by its length limit: the policy must not learn to stop in the middle of a sentence.
                ids = self._without_end(row.prompt, full, ids) if answer.finish_reason == "length" else ids
                merges += merged
            limit = self.max_answer_tokens or len(ids)
            cut += max(0, len(ids) - limit)
            answers_ids.append(self._shared(ids[:limit]))
        ranked = bool(answers) and all(answer.rank is not None for answer in answers)
        rated = bool(answers) and all(answer.strength is not None for answer in answers)
        return TokenRow(
            id=row.id,
            prompt_ids=self._shared(kept),
            answers_ids=tuple(answers_ids),
            ranks=tuple(answer.rank for answer in answers) if ranked else (),
            strengths=tuple(answer.strength for answer in answers) if rated else (),
            boundary_merges=merges,
            cut_tokens=cut,
        )

    def _shared(self, ids: Sequence[int]) -> tuple[int, ...]:
        """Token ids, one object for all alike: eight bytes a token in memory, where a tokenizer's take forty."""
        known = self._known
        return tuple([known.setdefault(one, one) for one in ids])

    def _without_end(self, prompt: Sequence[Message], prompt_ids: Sequence[int], answer_ids: list[int]) -> list[int]:
        """An answer before what follows every answer to this prompt: EOS, or whatever the chat template closes with."""
        some, others = (self.answer_ids(prompt, prompt_ids, text)[0] for text in ("a", "b"))
        end = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(reversed(some), reversed(others))))
        return answer_ids[:-end] if end and answer_ids[-end:] == some[-end:] else answer_ids

    def _within(self, prompt_ids: list[int]) -> list[int]:
        """The prompt's end within the limit, its BOS kept in front: the model knows no text without one."""
        limit = self.max_prompt_tokens
        if not limit or len(prompt_ids) <= limit:
            return prompt_ids
        bos = prompt_ids[:1] if prompt_ids[0] == self.tokenizer.bos_token_id else []
        return [*bos, *prompt_ids[len(prompt_ids) - limit + len(bos) :]]

    def text(self, token_ids: Sequence[int]) -> str:
        """The text of sampled tokens, special tokens left out."""
        return self.tokenizer.decode(token_ids, skip_special_tokens=True)

    def answer_text(self, prompt_ids: Sequence[int], token_ids: Sequence[int]) -> str:
        """The text that sampled tokens add to their prompt: a leading space that belongs to the answer stays."""
        before = self.text(prompt_ids)
        whole = self.text([*prompt_ids, *token_ids])
        return whole[len(before) :] if whole.startswith(before) else self.text(token_ids)

    def _template(self, messages: Sequence[Message], *, add_generation_prompt: bool) -> list[int]:
        if self.tokenizer.chat_template is None:
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path!r} has no chat template, but the prompt has roles "
                f"{[message.role for message in messages]}; give the tokenizer one (chat_template.jinja), "
                "or import the data as plain text"
            )
        chat = [{"role": message.role, "content": message.content} for message in messages]
        try:
            if any(self._special.search(message.content) for message in messages):
                return self._template_of_data(chat, add_generation_prompt=add_generation_prompt)
            rendered = self.tokenizer.apply_chat_template(
                chat, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=True
            )
        except Exception as error:  # a template is a program of the model's, and many refuse some order of roles
            raise UserError(
                f"tokenizer {self.tokenizer.name_or_path!r}: its chat template does not take turns of "
                f"{[message.role for message in messages]}, the first {messages[0].content[:40]!r} "
                f"({type(error).__name__}: {str(error)[:200]}); change the template (chat_template.jinja) or these rows"
            ) from error
        return list(rendered["input_ids"])

    def _template_of_data(self, chat: list[dict[str, str]], *, add_generation_prompt: bool) -> list[int]:
        """A chat whose turns spell out special tokens: these are put in after the template, as they are written."""
        written: list[str] = []
        mark = _unused_character("".join(turn["content"] for turn in chat))

        def held(found: re.Match[str]) -> str:
            written.append(found[0])
            return f"{mark}{len(written) - 1}{mark}"

        held_back = [{**turn, "content": self._special.sub(held, turn["content"])} for turn in chat]
        rendered = self.tokenizer.apply_chat_template(
            held_back, add_generation_prompt=add_generation_prompt, tokenize=False
        )
        parts = re.split(f"{mark}([0-9]+){mark}", rendered)
        ids: list[int] = []
        for number, part in enumerate(parts):
            if number % 2:
                ids += self._as_written(written[int(part)])
            elif part:
                ids += self.tokenizer(part, add_special_tokens=False)["input_ids"]
        return ids

    def _as_written(self, text: str) -> list[int]:
        """Tokens of a text by itself, in which no character is a special token."""
        return list(self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"])


def _special(tokenizer: PreTrainedTokenizerBase) -> re.Pattern[str]:
    """Matches what is a special token wherever it stands in a text."""
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    texts = sorted(filter(None, {*added, *tokenizer.all_special_tokens}), key=len, reverse=True)
    return re.compile("|".join(map(re.escape, texts)) or r"(?!)")


def _unused_character(text: str) -> str:
    """A character of private use that a text does not hold."""
    return next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)


def _is_text(prompt: Sequence[Message]) -> bool:
    return len(prompt) == 1 and prompt[0].role == "text"
