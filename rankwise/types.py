"""The nouns: a row is a prompt with K answers, ranked or not. Every table of the pipeline holds rows.

A prompt alone is a row with K = 0, an SFT example has K = 1, a preference pair K = 2, a ranking K > 2.
Rollouts are rows whose answers have no rank yet.

Example:
    Row(
        id="imdb-17",
        prompt=(Message(role="text", content="The film opens with"),),
        answers=(Answer(text=" a superb chase.", rank=0), Answer(text=" a yawn.", rank=1)),
    )
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# What steers a terminal, or turns the direction of what follows, instead of being shown: all but tab and line end.
_STEERS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")


class UserError(ValueError):
    """A mistake that the user can mend: says what was given, where, why it cannot work, what to do.

    Stages show the message alone and exit with status 2; any other exception is a defect of ours and
    keeps its traceback. What it quotes may be anybody's; no message steers the terminal that shows it.
    """

    def __str__(self) -> str:
        return printable(super().__str__())


class Missing(UserError):
    """A file or folder that a stage makes is not there; commands add which stage that is, where they know."""

    def __init__(self, path: Path, what: str):
        super().__init__(f"{path}: no such {what}; run the stage that makes it first")
        self.path = path


class Unavailable(UserError):
    """Trouble that may pass by itself, a server that is away or busy: later the same command may do.

    Stages show the message alone and exit with status 75 (EX_TEMPFAIL); the flow runs them again.
    """


@dataclass(frozen=True, kw_only=True)
class Message:
    """One turn of a prompt. Plain text that is to be continued is a single message of role "text"."""

    role: str  # "text" (continued verbatim, no chat template), or "system" | "user" | "assistant"
    content: str


@dataclass(frozen=True, kw_only=True)
class Answer:
    """One answer (completion) to a prompt."""

    text: str
    rank: int | None = None  # 0 is best; equal ranks are a tie; None: not ranked
    strength: float | None = None  # Bradley-Terry log-strength given by the judge, when there is one
    strength_se: float | None = None  # its standard error, nats, as if each reply were a draw; None: a score
    source: str = ""  # who wrote it: "dataset", "policy", "teacher", a model's name
    token_ids: tuple[int, ...] | None = None  # as sampled, end-of-sequence token included if it came
    finish_reason: str | None = None  # "stop" (ended by itself) | "length" (cut) | None (not sampled)
    seed: int | None = None  # the sampling seed of this answer
    # one a token: sampling log-probs at temperature 1, nats; they never stand in for the reference's own
    logps: tuple[float, ...] | None = None
    engine: str | None = None  # program and release that sampled it


@dataclass(frozen=True, kw_only=True)
class Row:
    """A prompt and its K answers."""

    id: str  # unique within a table
    prompt: tuple[Message, ...]
    answers: tuple[Answer, ...] = ()
    meta: dict[str, Any] = field(default_factory=dict)  # flat, JSON-able: label, split, group, ...

    @property
    def ranked(self) -> tuple[Answer, ...]:
        """The answers that have a rank, best first; ties keep their order."""
        return tuple(sorted((a for a in self.answers if a.rank is not None), key=lambda a: a.rank))


def printable(text: str) -> str:
    """Text for a terminal or a log: what would steer it is written out (\\x1b, \\u202e)."""
    return _STEERS.sub(lambda found: found[0].encode("unicode_escape").decode(), text)


def text_prompt(text: str) -> tuple[Message, ...]:
    """A plain-text prompt, to be continued verbatim."""
    return (Message(role="text", content=text),)


def show_prompt(prompt: tuple[Message, ...]) -> str:
    """A prompt as a person reads it: plain text as it is, a chat with its roles."""
    if len(prompt) == 1 and prompt[0].role == "text":
        return prompt[0].content
    return "\n".join(f"[{message.role}] {message.content}" for message in prompt)
