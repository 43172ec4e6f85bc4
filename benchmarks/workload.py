"""What both sides are given: a model's shape and a table of token rows, each a function of a seed.

Pure Python, so that the process which only holds the clock stays small and starts at once.
"""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal, Self

from rankwise.plan.presets import PRESETS

PAD, EOS, FIRST = 0, 1, 2  # token ids: padding, end of sequence, the first ordinary one
SPREAD = 0.5  # of the logarithm of lengths: two thirds of them lie within a factor of 1.65

Task = Literal["dpo", "sft", "rollouts"]


@dataclass(frozen=True, kw_only=True)
class Shape:
    """A Llama by its sizes; weights are random."""

    hidden: int
    layers: int
    heads: int
    kv_heads: int
    intermediate: int
    vocabulary: int
    context: int
    tied: bool = True  # one matrix embeds tokens and predicts them


def _llama(preset: str, *, context: int) -> Shape:
    """A preset's sizes as a Llama's, whatever its architecture."""
    sizes = PRESETS[preset]
    return Shape(
        hidden=sizes["hidden_size"],
        layers=sizes["num_hidden_layers"],
        heads=sizes["num_attention_heads"],
        kv_heads=sizes["num_key_value_heads"],
        intermediate=sizes["intermediate_size"],
        vocabulary=sizes["vocab_size"],
        context=context,
        tied=sizes.get("tie_word_embeddings", False),
    )


MODELS = {
    "tiny": Shape(hidden=32, layers=2, heads=2, kv_heads=2, intermediate=64, vocabulary=128, context=256),
    "15m": _llama("llama-15m", context=1024),
    "0.5b": _llama("qwen-0.5b", context=4096),
    "1.5b": _llama("qwen-1.5b", context=4096),
    "8b": _llama("llama-8b", context=4096),
}


@dataclass(frozen=True, kw_only=True)
class Case:
    """One point of measurement; both sides build their model and their rows from it alone."""

    task: Task = "dpo"
    name: str = "15m"  # of the model, for people
    shape: Shape = field(default_factory=lambda: MODELS["15m"])
    batch: int = 16  # prompts of an optimizer step, a table, a pass
    k: int = 2  # answers a prompt; 1 for SFT
    prompt: int = 128  # median tokens of a prompt
    answer: int = 96  # median tokens of an answer, its end included; of rollouts about the mean
    seed: int = 0
    device: Literal["cpu", "cuda"] = "cpu"
    weights: Literal["fp32", "bf16"] = "fp32"  # the parameters' dtype; precision of the arithmetic is a setting
    checkpointing: bool = False  # activation checkpointing

    def spec(self) -> dict[str, Any]:
        """As JSON."""
        return asdict(self)

    @classmethod
    def of(cls, spec: dict[str, Any]) -> Self:
        return cls(**{**spec, "shape": Shape(**spec["shape"])})

    def with_value(self, name: str, value: int) -> Case:
        """The same case with k, prompt, answer, batch or vocabulary changed; the context grows where it must."""
        if name == "vocabulary":
            return replace(self, shape=replace(self.shape, vocabulary=value))
        changed = replace(self, **{name: value})
        longest = 4 * (changed.prompt + changed.answer)
        return replace(changed, shape=replace(self.shape, context=max(self.shape.context, longest)))

    @property
    def parity_beta(self) -> float:
        """β for the comparison in fp32, the smaller the longer the answers.

        A sum of 96 log-probabilities over 32,000 words is about −1,000 nats, which fp32 rounds by 6e-5: at β = 0.1
        that alone is 1e-5 of the loss, on either side. Scaled so, limits far below that still find a wrong program.
        """
        return min(0.1, 4 / (self.answer * math.log(self.shape.vocabulary)))

    def for_parity(self) -> Case:
        """A small piece of the same work, on which both sides must agree in fp32: pairs, few rows, two layers."""
        shape = self.shape if self.shape.hidden <= 512 else replace(self.shape, layers=2)
        return replace(
            self,
            shape=shape,
            batch=min(self.batch, 8),
            k=min(self.k, 2),
            weights="fp32",
            checkpointing=False,
        )


@dataclass(frozen=True, kw_only=True)
class Tokens:
    """One prompt and its answers, best first."""

    prompt: tuple[int, ...]
    answers: tuple[tuple[int, ...], ...]


def rows(case: Case) -> list[Tokens]:
    """The prompts of one optimizer step; lengths are lognormal, ids uniform, every answer ends in EOS.

    A larger batch or K adds prompts or answers to those of a smaller one.
    """
    return [_row(case, random.Random(f"{case.seed}/{number}")) for number in range(case.batch)]


def _row(case: Case, dice: random.Random) -> Tokens:
    return Tokens(
        prompt=_ids(dice, _length(dice, case.prompt), case),
        answers=tuple((*_ids(dice, _length(dice, case.answer) - 1, case), EOS) for _ in range(case.k)),
    )


def pairs(row: Tokens) -> list[Tokens]:
    """A ranking as the C(K, 2) pairs that a trainer of pairs needs to see all of it."""
    return [Tokens(prompt=row.prompt, answers=pair) for pair in itertools.combinations(row.answers, 2)]


def end_ids(case: Case) -> tuple[int, ...]:
    """Token ids that end a rollout: a share of 1 / case.answer of the vocabulary, EOS among them.

    Random weights hardly favour any token, so they would end an answer once in a vocabulary of tokens; with these,
    lengths are about geometric.
    """
    return tuple(range(EOS, case.shape.vocabulary, case.answer))


def longest_rollout(case: Case) -> int:
    """Tokens at which a rollout is cut: 256 where they are 96 on average, so that one in fourteen is."""
    return case.answer * 8 // 3


def count_tokens(answers: Sequence[Sequence[Sequence[int]]], case: Case) -> int:
    """Tokens of all rollouts, [prompts][K][tokens], their ends included.

    Raises ValueError unless there are K to each prompt and each stops where it must: so no engine is credited with
    tokens that nobody asked for, or with work left undone.
    """
    if len(answers) > case.batch or any(len(mine) != case.k for mine in answers):
        raise ValueError(f"{[len(mine) for mine in answers]} answers for up to {case.batch} prompts of {case.k} each")
    ends, most = frozenset(end_ids(case)), longest_rollout(case)
    for number, one in enumerate(one for mine in answers for one in mine):
        ended = bool(one) and one[-1] in ends
        if not ends.isdisjoint(one[:-1]) or not (ended or len(one) == most) or len(one) > most:
            raise ValueError(
                f"answer {number} of {len(one)} tokens ends with {one[-1:]}: it must stop at its first end token, "
                f"or at {most} tokens without one"
            )
    return sum(len(one) for mine in answers for one in mine)


def _length(dice: random.Random, median: int) -> int:
    drawn = round(dice.lognormvariate(math.log(median), SPREAD))
    return min(max(drawn, 2), 4 * median)


def _ids(dice: random.Random, count: int, case: Case) -> tuple[int, ...]:
    return tuple(dice.randrange(FIRST, case.shape.vocabulary) for _ in range(count))
