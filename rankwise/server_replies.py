"""What an OpenAI-compatible server says, read: its tokens counted, and the verdict in it, as far as there is one."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from rankwise.client import Malformed
from rankwise.json_text import whole_characters
from rankwise.rubrics import Rubric
from rankwise.verdicts import Question, said_of

LARGEST_COUNT = 2**24  # tokens of one reply; above any model's, and the table's 32 bits hold a sum of a hundred
LEAST_MASS = 1e-6  # that probabilities leave over; as float32 they are no more exact


def whole(reply: Any) -> dict[str, Any]:
    """The reply, if it is one of this API; raises Malformed."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or len(choices) != 1 or not isinstance(choices[0], dict):
        raise Malformed(f"one choice was expected in {str(reply)[:100]!r}")
    if not isinstance(choices[0].get("message"), dict):
        raise Malformed(f"a choice without a message: {str(choices[0])[:100]!r}")
    return reply


def usage_of(reply: Any) -> tuple[int, int] | None:
    """Tokens of prompt and reply as the server counts them, if it does and they can be true.

    Where the total is above their sum it holds thoughts that the count of the reply leaves out.
    """
    usage = reply.get("usage") if isinstance(reply, dict) else None
    if not isinstance(usage, dict):
        return None
    prompt, completion, total = (usage.get(f"{name}_tokens") for name in ("prompt", "completion", "total"))
    if type(prompt) is not int or prompt < 0:
        return None
    counts = [completion if type(completion) is int else 0, total - prompt if type(total) is int else 0]
    found = prompt, max(0, *counts)
    return found if max(found) <= LARGEST_COUNT else None


def read_json(question: Question, choice: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Fields of Reply, and the text that they are read from."""
    message, ended = choice["message"], choice.get("finish_reason")
    text, refusal = message.get("content"), message.get("refusal")
    if not isinstance(text, str) or ended not in ("stop", None):
        why = {"length": "the reply was cut at max_reply_tokens", "content_filter": "the server's filter took it back"}
        known = why.get(ended) if isinstance(ended, str) else None
        reason = f"the judge will not say: {refusal}" if refusal else known or f"it ended with {str(ended)[:100]!r}"
        return {"values": None, "said": "", "reason": reason}, text if isinstance(text, str) else ""
    read = Rubric.read(question, text)
    return {**read, "reason": whole_characters(read["reason"])}, text


def read_refusal(why: str) -> tuple[dict[str, Any], str]:
    """As read_json, of a question that the server would not have."""
    return {"values": None, "said": "", "mass": 0.0, "reason": f"the server will not have the question: {why}"}, ""


def read_letter(question: Question, choice: Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """Fields of Reply, and the tokens that they are read from, as JSON.

    Each letter has the probability of all listed tokens that are this letter but for blanks around it. One that is not
    listed is taken to be as probable as it can be: as the last that is, and no more than all that are leave over. Where
    that is no less than the most probable letter, nothing tells the letters apart.
    """
    listed = _listed(choice)
    text = json.dumps(listed, ensure_ascii=False)
    found = {letter: [logp for token, logp in listed if token.strip() == letter] for letter in question.letters}
    if not any(found.values()):
        return {"values": None, "said": "", "mass": 0.0, "reason": "no letter among the tokens that are told"}, text
    told = {letter: _log_sum(logps) for letter, logps in found.items() if logps}
    mass = min(1.0, math.fsum(map(math.exp, told.values())))
    absent = [letter for letter in question.letters if letter not in told]
    most = _most(listed)
    if absent and most >= max(told.values()):
        return {"values": None, "said": "", "mass": mass, "reason": "too few tokens are told to bound the others"}, text
    values = tuple(told.get(letter, most) for letter in question.letters)
    return {
        "values": values,
        "mass": mass,
        "said": said_of(values, question.letters),
        "reason": f"not told, so taken as probable as can be: {', '.join(absent)}" if absent else "",
    }, text


def _most(listed: Sequence[tuple[str, float]]) -> float:
    """The log-prob, nats, that a token which is not listed can have at most."""
    left = 1 - math.fsum(math.exp(logp) for _, logp in listed)
    return min(*(logp for _, logp in listed), math.log(max(left, LEAST_MASS)))


def _listed(choice: Mapping[str, Any]) -> list[tuple[str, float]]:
    """The most probable first tokens with their log-probs, nats, as far as they are told."""
    logprobs = choice.get("logprobs")
    content = logprobs.get("content") if isinstance(logprobs, dict) else None
    top = (
        content[0].get("top_logprobs") if isinstance(content, list) and content and isinstance(content[0], dict) else []
    )
    top = top if isinstance(top, list) else []
    pairs = [(one.get("token"), one.get("logprob")) for one in top if isinstance(one, dict)]
    # What the server does not know it may tell as −inf, or as OpenAI does as −9999.
    return [(t, float(p)) for t, p in pairs if isinstance(t, str) and type(p) in (int, float) and -1000 < p <= 1e-3]


def _log_sum(logps: Sequence[float]) -> float:
    most = max(logps)
    return most + math.log(math.fsum(math.exp(logp - most) for logp in logps))
