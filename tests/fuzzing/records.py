"""Records as data sets have them, in every shape that the project reads, with answers, ids and columns beside."""

from __future__ import annotations

from random import Random
from typing import Any

WORDS = [
    "the",
    "a",
    "film",
    "plot",
    "was",
    "is",
    "good",
    "bad",
    "dull",
    "bright",
    "and",
    "but",
    "very",
    "not",
    "quite",
    "it",
    "ended",
    "began",
    "well",
    "slowly",
]


def text(random: Random, most: int = 12) -> str:
    """Some words, now and then with what texts have beside words."""
    said = " ".join(random.choice(WORDS) for _ in range(random.randrange(1, most)))
    return said + random.choice(("", "", "", ".", "\n", ' "q"', ", é", " 🙂", " <b>", "\r\nx"))


def turns(random: Random, *, answered: bool) -> list[dict[str, str]]:
    """A conversation that ends with the user's turn, or the assistant's."""
    role, said = random.choice((("role", "content"), ("from", "value")))
    who = {"role": ("user", "assistant"), "from": ("human", "gpt")}[role]
    count = 2 * random.randrange(1, 3) - (not answered)
    system = [{role: "system", said: text(random)}] if random.random() < 0.2 else []
    return [*system, *({role: who[n % 2], said: text(random)} for n in range(count))]


def ranking(random: Random) -> dict[str, Any]:
    by = random.choice(("rank", "score"))
    answers = [{"text": f" {text(random)}{n}", by: random.randrange(4)} for n in range(random.randrange(2, 5))]
    return {random.choice(("prompt", "instruction")): text(random), random.choice(("answers", "responses")): answers}


def pair(random: Random) -> dict[str, Any]:
    return {"prompt": text(random), "chosen": f" {text(random)}a", "rejected": f" {text(random)}b"}


def pair_turns(random: Random) -> dict[str, Any]:
    if random.random() < 0.5:
        shared = f"\n\nHuman: {text(random)}\n\nAssistant:"
        return {"chosen": f"{shared} {text(random)}", "rejected": f"{shared} {text(random)}"}
    shared = turns(random, answered=False)
    role, said = ("role", "content") if "role" in shared[0] else ("from", "value")
    end = lambda: {role: "assistant", said: text(random)}
    return {"chosen": [*shared, end()], "rejected": [*shared, end()]}


def conversation(random: Random) -> dict[str, Any]:
    return {random.choice(("messages", "conversations")): turns(random, answered=random.random() < 0.8)}


def completion(random: Random) -> dict[str, Any]:
    return {"instruction": text(random), "input": "", "system": "Be brief.", "output": text(random)}


def prompt(random: Random) -> dict[str, Any]:
    return {"prompt": random.choice((text(random), turns(random, answered=False)))}


def plain(random: Random) -> dict[str, Any]:
    return {"text": text(random, 30), "label": random.randrange(2)}


SHAPES = (ranking, pair, pair_turns, conversation, completion, prompt, plain)


def records(random: Random) -> list[dict[str, Any]]:
    """A few records of one shape, with ids, or labels and groups, or neither."""
    shape, ids, more = random.choice(SHAPES), random.random() < 0.6, random.random() < 0.4
    found = []
    for number in range(random.choice((1, 1, 2, 3, 5, 14))):
        record = shape(random)
        record |= {"id": random.choice((f"r{number}", number))} if ids else {}
        record |= {"group": random.choice(("a", 1)), "label": random.choice((0, 1.5, "x"))} if more else {}
        found.append(record)
    return found


def how(random: Random, columns: list[str]) -> dict[str, Any]:
    """How a file is read, as params.yaml says it: most often nothing of its own."""
    if random.random() < 0.5 or not columns:
        return {}
    one = random.choice(columns)
    return random.choice(
        (
            {"chat": random.choice(("roles", "text"))},
            {"columns": {one: random.choice(("prompt", "text", "id", "chosen"))}},
            {"columns": {"answers.text": "text", "answers.rank": "score"}},
            {"where": {one: random.choice((1, "1", ["a", 1], None))}},
            {"group": one, "keep": columns[:2]},
            {"leave_out": ["empty_answers", "identical_answers"], "leave_out_ids": ["r0", "1"], "max_words": 9},
            {"shape": random.choice(("ranking", "pair", "messages", "completion", "prompt", "text"))},
            {"opening_words": random.choice((0, 3))},
        )
    )
