"""The table of verdicts: what is written is read, nothing is lost, nothing is made up."""

import pytest

from rankwise.judging import Question, Reply
from rankwise.rows import read_table, write_rows
from rankwise.types import UserError, text_prompt
from rankwise.verdicts import SCHEMA, read_verdicts, write_verdicts


def reply(row_id: str, places: tuple[int, ...], values, *, sample=0, attempt=0, **fields) -> Reply:
    answers = tuple(f"answer {place}" for place in places)
    question = Question(
        row_id=row_id, prompt=text_prompt("p"), answers=answers, places=places, sample=sample, attempt=attempt
    )
    return Reply(question=question, values=values, **fields)


REPLIES = [
    ("words", reply("b", (1, 0), (0.5, -0.25), said="A", mass=0.9, prompt_tokens=7)),
    ("words", reply("b", (0, 1), None, attempt=3, reason="no JSON", raw="[[A]] ü", completion_tokens=9)),
    ("words", reply("a", (2, 0, 1), (0.0, 1.0, 2.0), sample=1, said="C > B > A")),
    ("scores", reply("b", (0,), (-1e-9,), raw='{"score": -1e-09}')),
]


def test_every_reply_is_read_as_it_was_written(tmp_path):
    assert write_verdicts(tmp_path / "v.parquet", REPLIES) == 4
    found = read_verdicts(tmp_path / "v.parquet")
    assert list(found) == ["a", "b"] and [v.judge for v in found["b"]] == ["words", "words", "scores"]
    first, invalid, score = found["b"]
    assert (first.shown, first.values, first.said, first.mass, first.prompt_tokens) == (
        (1, 0),
        (0.5, -0.25),
        "A",
        0.9,
        7,
    )
    assert invalid.values is None and invalid.attempts == 4
    assert (invalid.reason, invalid.raw, invalid.completion_tokens) == ("no JSON", "[[A]] ü", 9)
    assert score.values == (-1e-9,) and score.raw == '{"score": -1e-09}'
    [listed] = found["a"]
    assert (listed.shown, listed.sample, listed.values) == ((2, 0, 1), 1, (0.0, 1.0, 2.0))


def test_the_same_replies_are_the_same_bytes_in_whatever_order_the_rows_came(tmp_path):
    write_verdicts(tmp_path / "one.parquet", REPLIES)
    write_verdicts(tmp_path / "two.parquet", [REPLIES[2], *REPLIES[:2], REPLIES[3]])
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_no_reply_is_a_table_too(tmp_path):
    assert write_verdicts(tmp_path / "v.parquet", []) == 0
    assert read_verdicts(tmp_path / "v.parquet") == {}
    assert read_table(tmp_path / "v.parquet").schema.equals(SCHEMA)


def test_another_table_is_refused_by_its_columns(tmp_path):
    write_rows(tmp_path / "rows.parquet", [])
    with pytest.raises(UserError, match=r"rows\.parquet: columns \['row_id', 'judge'.* are missing.*stage verdicts"):
        read_verdicts(tmp_path / "rows.parquet")
