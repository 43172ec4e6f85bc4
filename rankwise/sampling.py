"""What every engine is asked and gives back: options, seeds, prompts, answers. A recipe means the same with each.

Options apply in the order of transformers: repetition penalty, temperature, top-k, top-p, min-p; what is left is
renormalised. Log-probabilities that are kept are of the model itself: temperature 1, the whole vocabulary, no option.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

from rankwise.types import Message


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int  # longest answer, tokens, its end token included
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # smallest set of tokens whose probability reaches this
    top_k: int = 0  # this many likeliest tokens; 0 is all
    min_p: float = 0.0  # tokens at least this share of the likeliest one's probability
    # logits of tokens of the prompt or the answer so far are divided by it, negative ones multiplied
    repetition_penalty: float = 1.0
    stop: tuple[str, ...] = ()  # an answer ends where its text first holds one; the text is cut before it
    stop_token_ids: tuple[int, ...] = ()  # an answer ends with one, as with an end token

    def identity(self) -> dict[str, Any]:
        """What of it an answer depends on; options at rest are left out, so a new one makes no old answer stale."""
        rest = asdict(Sampling(max_new_tokens=0))
        return {name: value for name, value in asdict(self).items() if value != rest[name]}


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One sampled answer."""

    token_ids: tuple[int, ...] | None  # the end token included, if it came; None where a server gave text alone
    finish_reason: str  # "stop" (an end token, a stop string) | "length"
    seed: int
    logps: tuple[float, ...] | None = None  # one a token: log π(token) at temperature 1 over the whole vocabulary, nats
    text: str | None = None  # where the engine gave it; else what the tokens say


@dataclass(frozen=True, kw_only=True)
class Wanted:
    """A prompt that K answers are wanted for."""

    name: str  # what messages call it
    prompt: tuple[Message, ...]
    prompt_ids: tuple[int, ...]  # as the policy is given it, at least one token
    seeds: tuple[int, ...]  # one an answer, from seed_of


class Engine(Protocol):
    """What answers prompts: rankwise.generation in this process, rankwise.endpoint through a server."""

    version: str  # program and release, kept with each answer; a server's is known once it has answered
    # Whether all answers so far may be kept; False: others that were computed beside the last ones are still to come,
    # and would round otherwise if they were computed alone.
    settled: bool

    def identity(self) -> dict[str, Any]:
        """What of the engine, model and sampling an answer depends on; known before anything is loaded or started."""
        ...

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, list[Sampled]]]:
        """Yield (index into wanted, its K answers in the order of its seeds), each as soon as it is done.

        Raises UserError before any is asked where prompts cannot be asked at all (no room in the context), and after
        all others were answered where some got no answer.
        """
        ...


def seed_of(seed: int, prompt_id: str, round_: int, k: int) -> int:
    """The seed of answer k to a prompt in a round: 63 bits, a function of nothing else."""
    text = f"{seed}/{prompt_id}/{round_}/{k}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
