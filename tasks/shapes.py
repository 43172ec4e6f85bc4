"""A record of any known shape -> a prompt and its answers: one function a shape, one table of the shapes.

A shape is known by its columns. From top to bottom, the first that fits is taken:

    ranking     a prompt, answers|responses = [{text, rank (0 best, equal = tie) or score}]
    pair        a prompt, chosen, rejected
    pair_turns  chosen, rejected, which share their first turns (message lists, or "\\n\\nHuman: … \\n\\nAssistant: …")
    messages    messages|conversations; the last assistant turn is the answer
    completion  a prompt, completion|output|response
    prompt      a prompt
    text        text, split after its first words into a prompt and the rest

where a prompt is prompt, prompt_messages, conversations (ShareGPT) or instruction (+ input, system).
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from rankwise.corpus import opening
from rankwise.types import Answer, Message, text_prompt
from tasks.formats import BadRecord, show, spell

Prompt = tuple[Message, ...]
Parts = tuple[Prompt, tuple[Answer, ...]]

PROMPTS = ("prompt", "prompt_messages", "conversations", "instruction")
ANSWER_LISTS = ("answers", "responses")
COMPLETIONS = ("completion", "output", "response")
CONVERSATIONS = ("messages", "conversations")
BESIDE = ("input", "system")  # what an instruction may bring along

ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}
SPEAKERS = {"system": "System", "user": "Human", "assistant": "Assistant"}
_TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class LeftOut(Exception):
    """A record that the user's own settings leave out; the reader counts the reason."""


@dataclass(frozen=True, kw_only=True)
class Shape:
    """One way to write rows down."""

    name: str
    needs: tuple[tuple[str, ...], ...]  # of each group one column must be there
    read: Callable[[dict, int], Parts]  # (record, words of a plain text's prompt) -> prompt, answers

    def missing(self, record: dict) -> list[str]:
        """The groups of columns that a record lacks, spelt for people."""
        return ["|".join(group) for group in self.needs if not any(name in record for name in group)]


def read_parts(record: dict, shape: Shape, *, opening_words: int, chat: str) -> Parts:
    """A record's prompt and answers; chat "roles" turns transcripts into turns, "text" turns into transcripts."""
    if missing := shape.missing(record):
        raise BadRecord(f"shape {shape.name!r} needs column {', '.join(missing)}; found {spell(record) or 'none'}")
    if chat == "roles" and "prompt_messages" in record:
        record = {name: value for name, value in record.items() if name != "prompt"}
    return RESTYLE[chat](*shape.read(record, opening_words))


# The shapes ----------------------------------------------------------------------------------------------------------


def _ranking(record: dict, _: int) -> Parts:
    column = _first(record, ANSWER_LISTS)
    entries = record[column]
    if not isinstance(entries, list) or not all(isinstance(entry, dict) for entry in entries):
        raise BadRecord(f"column {column!r}: a list of {{text, rank}} was expected, found {show(entries)}")
    if len(entries) < 2:
        raise BadRecord(
            f"column {column!r}: a ranking needs at least 2 answers, found {len(entries)}; leave the row out, "
            "or give it as prompt + completion"
        )
    answers = [
        Answer(text=text_of(entry.get("text"), f"{column}.text"), rank=rank, source=_writer(entry))
        for entry, rank in zip(entries, _ranks(entries, column))
    ]
    return _prompt_of(record), tuple(answers)


def _pair(record: dict, opening_words: int) -> Parts:
    # A list of several turns holds its prompt already (the prompt column then repeats its first turn).
    if any(isinstance(record[name], list) and len(record[name]) > 1 for name in ("chosen", "rejected")):
        return _pair_turns(record, opening_words)
    return _prompt_of(record), _ordered(_said(record, "chosen"), _said(record, "rejected"))


def _pair_turns(record: dict, _: int) -> Parts:
    chosen, rejected = record["chosen"], record["rejected"]
    if isinstance(chosen, str) and isinstance(rejected, str):
        return _pair_transcripts(text_of(chosen, "chosen"), text_of(rejected, "rejected"))
    (shared, better), (other, worse) = _last_turn(chosen, "chosen"), _last_turn(rejected, "rejected")
    if shared != other:
        turn = next((i for i, (a, b) in enumerate(zip(shared, other)) if a != b), min(len(shared), len(other))) + 1
        raise BadRecord(
            f"columns 'chosen' and 'rejected' may differ in their last turn only, but differ from turn {turn}"
        )
    if not shared:
        raise BadRecord("columns 'chosen' and 'rejected' hold one turn each and there is no prompt column; add one")
    return shared, _ordered(better, worse)


def _pair_transcripts(chosen: str, rejected: str) -> Parts:
    marker = "\n\nAssistant:"
    at = _shared(chosen, rejected).rfind(marker)
    if at < 0:
        raise BadRecord(
            "columns 'chosen' and 'rejected' share no turns that end in '\\n\\nAssistant:'; "
            "add a prompt column, or write the conversations as message lists"
        )
    at += len(marker)
    return text_prompt(chosen[:at]), _ordered(chosen[at:], rejected[at:])


def _messages(record: dict, _: int) -> Parts:
    column = _first(record, CONVERSATIONS)
    turns = _turns(record[column], column)
    if turns[-1].role != "assistant":
        return turns, ()
    if len(turns) == 1:
        raise BadRecord(f"column {column!r}: an answer without a turn before it; add the user's turn")
    return turns[:-1], (Answer(text=turns[-1].content, source="dataset"),)


def _completion(record: dict, _: int) -> Parts:
    return _prompt_of(record), (Answer(text=_said(record, _first(record, COMPLETIONS)), source="dataset"),)


def _prompt(record: dict, _: int) -> Parts:
    return _prompt_of(record), ()


def _plain(record: dict, opening_words: int) -> Parts:
    text = text_of(record["text"], "text")
    if not text.strip():
        raise BadRecord("column 'text' is empty; leave the row out")
    if opening_words == 0:
        return text_prompt(""), (Answer(text=text, source="dataset"),)
    if len(text.split(maxsplit=opening_words)) <= opening_words:
        raise LeftOut("no words after the opening")
    prompt, rest = opening(text, opening_words)
    return text_prompt(prompt), (Answer(text=rest, source="dataset"),)


SHAPES = {
    shape.name: shape
    for shape in (
        Shape(name="ranking", needs=(PROMPTS, ANSWER_LISTS), read=_ranking),
        Shape(name="pair", needs=(PROMPTS, ("chosen",), ("rejected",)), read=_pair),
        Shape(name="pair_turns", needs=(("chosen",), ("rejected",)), read=_pair_turns),
        Shape(name="messages", needs=(CONVERSATIONS,), read=_messages),
        Shape(name="completion", needs=(PROMPTS, COMPLETIONS), read=_completion),
        Shape(name="prompt", needs=(PROMPTS,), read=_prompt),
        Shape(name="text", needs=(("text",),), read=_plain),
    )
}
COLUMNS = frozenset(name for shape in SHAPES.values() for group in shape.needs for name in group) | {*BESIDE}


# Chats as turns or as text -------------------------------------------------------------------------------------------


def _as_text(prompt: Prompt, answers: tuple[Answer, ...]) -> Parts:
    if prompt[0].role == "text":
        return prompt, answers
    turns = "".join(f"\n\n{SPEAKERS[turn.role]}: {turn.content}" for turn in prompt)
    spaced = (replace(a, text=a.text if a.text[:1].isspace() else f" {a.text}") for a in answers)
    return text_prompt(f"{turns}\n\nAssistant:"), tuple(spaced)


def _as_roles(prompt: Prompt, answers: tuple[Answer, ...]) -> Parts:
    if prompt[0].role == "text":
        prompt = _transcript(prompt[0].content)
    # The space after "Assistant:" belongs to the transcript; a chat template writes its own.
    return prompt, tuple(replace(a, text=a.text.strip()) for a in answers)


def _transcript(text: str) -> Prompt:
    head, *rest = _TURN.split(text)
    if not rest:
        return (Message(role="user", content=text),)
    if head.strip():
        raise BadRecord(f"the prompt starts within a turn ({show(head)}); start it with 'Human:' or set chat: text")
    speakers = {name: role for role, name in SPEAKERS.items()}
    turns = [Message(role=speakers[name], content=said.strip()) for name, said in zip(rest[::2], rest[1::2])]
    if turns[-1].role == "assistant":
        if turns[-1].content:
            raise BadRecord("the prompt ends within an assistant's turn; end it with 'Assistant:' or set chat: text")
        turns.pop()
    if not turns:
        raise BadRecord("the prompt holds no turn before 'Assistant:'; add the user's turn")
    return tuple(turns)


RESTYLE = {"auto": lambda prompt, answers: (prompt, answers), "text": _as_text, "roles": _as_roles}


# Columns -------------------------------------------------------------------------------------------------------------


def _prompt_of(record: dict) -> Prompt:
    column = _first(record, PROMPTS)
    value = record[column]
    if isinstance(value, list):
        return _turns(value, column)
    text = text_of(value, column)
    if not text.strip():
        raise BadRecord(f"column {column!r} is empty; leave the row out")
    if column != "instruction":
        return text_prompt(text)
    more = _text_or_nothing(record, "input")
    turn = Message(role="user", content=f"{text}\n\n{more}" if more else text)
    system = _text_or_nothing(record, "system")
    return (Message(role="system", content=system), turn) if system else (turn,)


def _turns(value: Any, column: str) -> Prompt:
    """Turns in either spelling: {role, content}, or ShareGPT's {from, value}."""
    if isinstance(value, dict):
        value = [value]
    if not isinstance(value, list) or not value:
        raise BadRecord(f"column {column!r}: a list of {{role, content}} was expected, found {show(value)}")
    turns = []
    for index, turn in enumerate(value):
        where = f"{column}[{index}]"
        if not isinstance(turn, dict):
            raise BadRecord(f"column {where!r}: {{role, content}} was expected, found {show(turn)}")
        role, said = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
        if not isinstance(role, str) or role not in ROLES:
            raise BadRecord(f"column {where!r}: a role of {', '.join(ROLES)} was expected, found {show(role)}")
        turns.append(Message(role=ROLES[role], content=text_of(said, where)))
    return tuple(turns)


def _last_turn(value: Any, column: str) -> tuple[Prompt, str]:
    turns = _turns(value, column)
    if turns[-1].role != "assistant":
        raise BadRecord(
            f"column {column!r}: the last turn is the {turns[-1].role}'s; end it with the assistant's answer"
        )
    return turns[:-1], turns[-1].content


def _said(record: dict, column: str) -> str:
    value = record[column]
    return _last_turn(value, column)[1] if isinstance(value, (list, dict)) else text_of(value, column)


def _text_or_nothing(record: dict, column: str) -> str:
    value = record.get(column)
    return "" if value is None else text_of(value, column)


def text_of(value: Any, column: str) -> str:
    """A text that any table can hold; raises BadRecord on anything else."""
    if not isinstance(value, str):
        raise BadRecord(f"column {column!r}: text was expected, found {show(value)}; mend it or leave the row out")
    if not value.isascii() and any("\ud800" <= char <= "\udfff" for char in value):
        raise BadRecord(f"column {column!r}: half a character (a lone surrogate, \\ud800 to \\udfff); mend the text")
    return value


def _ordered(better: str, worse: str) -> tuple[Answer, ...]:
    return Answer(text=better, rank=0, source="dataset"), Answer(text=worse, rank=1, source="dataset")


def _ranks(entries: list[dict], column: str) -> list[int]:
    """Dense ranks, 0 best, ties equal, from the entries' ranks or else from their scores (higher is better)."""
    for name, sign in (("rank", 1), ("score", -1)):
        values = [entry.get(name) for entry in entries]
        if all(isinstance(v, (int, float)) and not isinstance(v, bool) and v == v for v in values):  # NaN is not
            order = {value: rank for rank, value in enumerate(sorted({sign * value for value in values}))}
            return [order[sign * value] for value in values]
    found = [entry.get("rank", entry.get("score")) for entry in entries]
    raise BadRecord(
        f"column {column!r}: a rank (0 best, equal = tie) or a score for every answer was expected, "
        f"found {show(found)}; complete them or leave the row out"
    )


def _writer(entry: dict) -> str:
    names = (entry.get(name) for name in ("source", "model", "model_name"))
    return text_of(next((name for name in names if isinstance(name, str) and name), "dataset"), "source")


def _first(record: dict, names: tuple[str, ...]) -> str:
    return next(name for name in names if name in record)


def _shared(one: str, other: str) -> str:
    return one[: next((i for i, (a, b) in enumerate(zip(one, other)) if a != b), min(len(one), len(other)))]
