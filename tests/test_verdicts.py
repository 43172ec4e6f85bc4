"""The table of verdicts: what is written is read, nothing is lost, nothing is made up."""

import pyarrow.parquet as pq
import pytest

from rankwise.judging import Question, Reply
from rankwise.rows import read_table, write_rows
from rankwise.types import Answer, Row, UserError, text_prompt
from rankwise.verdicts import SCHEMA, joined, read_verdicts, write_verdicts


def reply(row_id: str, places: tuple[int, ...], values, *, sample=0, attempt=0, **fields) -> Reply:
    answers = tuple(f"answer {place}" for place in places)
    question = Question(
        row_id=row_id, prompt=text_prompt("p"), answers=answers, places=places, sample=sample, attempt=attempt
    )
    return Reply(question=question, values=values, **fields)


REPLIES = [
    ("words", "identity", reply("b", (1, 0), (0.5, -0.25), said="A", mass=0.9, prompt_tokens=7)),
    ("words", "identity", reply("b", (0, 1), None, attempt=3, reason="no JSON", raw="[[A]] ü", completion_tokens=9)),
    ("words", "identity", reply("a", (2, 0, 1), (0.0, 1.0, 2.0), sample=1, said="C > B > A")),
    ("scores", "other identity", reply("b", (0,), (-1e-9,), raw='{"score": -1e-09}')),
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
    assert (score.identity, score.answered, score.orderless) == ("other identity", True, False)
    [listed] = found["a"]
    assert (listed.shown, listed.sample, listed.values) == ((2, 0, 1), 1, (0.0, 1.0, 2.0))


def test_the_same_replies_are_the_same_bytes_in_whatever_order_the_rows_came(tmp_path):
    write_verdicts(tmp_path / "one.parquet", REPLIES)
    write_verdicts(tmp_path / "two.parquet", [REPLIES[2], *REPLIES[:2], REPLIES[3]])
    assert (tmp_path / "one.parquet").read_bytes() == (tmp_path / "two.parquet").read_bytes()


def test_a_table_out_of_order_is_told_as_that(tmp_path):
    """One that was made elsewhere: rows and verdicts are read side by side."""
    replies = [("words", "", reply(row_id, (0,), (1.0,))) for row_id in "ab"]
    write_verdicts(tmp_path / "v.parquet", replies)
    table = read_table(tmp_path / "v.parquet")
    pq.write_table(table.take([1, 0]), tmp_path / "v.parquet")
    rows = [Row(id=row_id, prompt=text_prompt("p"), answers=(Answer(text="answer 0", source="s"),)) for row_id in "ab"]
    with pytest.raises(UserError, match=r"v.parquet: row 'a' stands behind row 'b'"):
        list(joined(tmp_path / "v.parquet", rows))


def test_no_reply_is_a_table_too(tmp_path):
    assert write_verdicts(tmp_path / "v.parquet", []) == 0
    assert read_verdicts(tmp_path / "v.parquet") == {}
    assert read_table(tmp_path / "v.parquet").schema.equals(SCHEMA)


def test_what_nobody_answered_and_what_has_no_order_is_told(tmp_path):
    given = [{"answered": False}, {"orderless": True}, {}]
    replies = [("j", "i", reply("a", (0, n), None if one else (1.0, 0.0), **one)) for n, one in enumerate(given, 1)]
    write_verdicts(tmp_path / "v.parquet", replies)
    found = read_verdicts(tmp_path / "v.parquet")["a"]
    assert [(v.answered, v.orderless) for v in found] == [(False, False), (True, True), (True, False)]


def judged_row(row_id: str, *texts: str, prompt: str = "p") -> Row:
    return Row(id=row_id, prompt=text_prompt(prompt), answers=tuple(Answer(text=text) for text in texts))


def test_verdicts_are_read_beside_the_rows_that_they_are_on_and_no_others(tmp_path):
    """Texts, their order and the prompt count; answers that nobody was shown may differ."""
    write_verdicts(tmp_path / "v.parquet", [("j", "i", reply("a", (2, 0), (1.0, 0.0)))])
    mine = read_verdicts(tmp_path / "v.parquet", {"a": judged_row("a", "answer 0", "unseen", "answer 2")})
    assert [v.shown for v in mine["a"]] == [(2, 0)]
    for row, why in [
        (judged_row("b", "answer 0", "answer 1", "answer 2"), "no row has this id"),
        (judged_row("a", "answer 0", "answer 1"), r"it is on places \[2, 0\], and the row has 2 answers"),
        (judged_row("a", "answer 2", "answer 1", "answer 0"), "it is on other texts"),
        (judged_row("a", "answer 0", "answer 1", "answer 2", prompt="q"), "it is on other texts"),
    ]:
        with pytest.raises(UserError, match=rf"v\.parquet: row 'a', a verdict of j: {why}.*; the tables do not belong"):
            read_verdicts(tmp_path / "v.parquet", {row.id: row})


def test_another_table_is_refused_by_its_columns(tmp_path):
    write_rows(tmp_path / "rows.parquet", [])
    with pytest.raises(UserError, match=r"rows\.parquet: columns \['row_id', 'judge'.* are missing.*stage verdicts"):
        read_verdicts(tmp_path / "rows.parquet")
