"""Exported preferences: every ranked pair once, no tie, whole rankings as they are, held-out rows by themselves."""

import json
import subprocess
import sys

import pyarrow.parquet as pq
import pytest

from rankwise.rows import write_rows
from rankwise.types import Answer, Message, Row, UserError, text_prompt
from tasks.export_preferences import export, main
from tasks.shapes import SHAPES


def row(name: str, *ranked: tuple[str, int], split: str = "train", prompt=None) -> Row:
    answers = tuple(Answer(text=text, rank=rank, strength=-1.5 * rank, strength_se=0.5) for text, rank in ranked)
    return Row(id=name, prompt=prompt or text_prompt(f"of {name}"), answers=answers, meta={"split": split})


ROWS = [
    row("a", ("best of all", 0), ("good", 1), ("good too", 1), ("bad", 3)),
    row("b", ("yes", 0), ("no", 1)),
    row("c", ("kept", 0), ("back", 1), split="held_out"),
]


@pytest.fixture
def table(tmp_path):
    write_rows(tmp_path / "preferences.parquet", ROWS)
    return tmp_path / "preferences.parquet"


def records(table, name: str, **options) -> list[dict]:
    out = table.parent / name
    count = export(table, out, **({"split": "train"} | options))
    parquet = name.endswith("parquet")
    found = pq.read_table(out).to_pylist() if parquet else list(map(json.loads, out.read_text().splitlines()))
    assert count == len(found)
    return found


@pytest.mark.parametrize("name", ["pairs.jsonl", "pairs.parquet"])
def test_pairs_are_every_two_answers_of_which_one_is_above_the_other(table, name):
    found = records(table, name, format="pairs")
    assert [(r["row_id"], r["chosen"], r["rejected"]) for r in found] == [
        *[("a", "best of all", "good"), ("a", "best of all", "good too"), ("a", "best of all", "bad")],
        *[("a", "good", "bad"), ("a", "good too", "bad"), ("b", "yes", "no")],
    ]
    assert found[0]["prompt"] == "of a"
    assert [r["strength_gap"] for r in found] == [1.5, 1.5, 4.5, 3.0, 3.0, 1.5]
    assert [r["longer_by"] for r in found] == [2, 1, 2, 0, 1, 0]


@pytest.mark.parametrize("name", ["rankings.jsonl", "rankings.parquet"])
def test_rankings_are_read_again_as_the_shape_of_that_name(table, name):
    found = records(table, name, format="rankings")
    assert [r["id"] for r in found] == ["a", "b"]
    assert [(a["text"], a["rank"], a["strength"]) for a in found[0]["answers"]] == [
        *[("best of all", 0, 0.0), ("good", 1, -1.5), ("good too", 1, -1.5), ("bad", 3, -4.5)]
    ]
    _, answers = SHAPES["ranking"].read(found[0], 0)
    assert [(a.text, a.rank) for a in answers] == [*zip(("best of all", "good", "good too", "bad"), (0, 1, 1, 2))]


def test_held_out_rows_are_exported_by_themselves(table):
    train, held_out = (records(table, "r.jsonl", format="rankings", split=s) for s in ("train", "held_out"))
    assert [r["id"] for r in train] == ["a", "b"] and [r["id"] for r in held_out] == ["c"]


def test_a_chat_is_a_list_of_messages(tmp_path):
    prompt = (Message(role="system", content="Be brief."), Message(role="user", content="Why?"))
    write_rows(tmp_path / "p.parquet", [row("a", ("So.", 0), ("No.", 1), prompt=prompt)])
    for name in ("pairs.jsonl", "pairs.parquet"):
        [found] = records(tmp_path / "p.parquet", name, format="pairs")
        assert found["prompt"] == [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Why?"}]
        assert found["chosen"] == [{"role": "assistant", "content": "So."}]


def test_imported_rankings_have_no_strengths(tmp_path):
    answers = (Answer(text="yes", rank=0), Answer(text="no", rank=1))
    write_rows(tmp_path / "p.parquet", [Row(id="a", prompt=text_prompt("p"), answers=answers)])
    [found] = records(tmp_path / "p.parquet", "pairs.jsonl", format="pairs")
    assert found["strength_gap"] is None and found["chosen"] == "yes"


def test_what_cannot_be_exported_is_said(table, tmp_path, capsys):
    with pytest.raises(UserError, match=r"ends in \.jsonl or \.parquet"):
        export(table, tmp_path / "pairs.csv", format="pairs", split="train")
    chats = tmp_path / "mixed.parquet"
    write_rows(chats, [*ROWS, row("d", ("x", 0), ("y", 1), prompt=(Message(role="user", content="Why?"),))])
    with pytest.raises(UserError, match="plain prompts and chats"):
        export(chats, tmp_path / "pairs.parquet", format="pairs", split="train")
    assert export(chats, tmp_path / "pairs.jsonl", format="pairs", split="train") == 7
    write_rows(tmp_path / "few.parquet", ROWS[:1])
    few = ["--preferences", str(tmp_path / "few.parquet"), "--format", "pairs"]
    assert main([*few, "--split", "held_out", str(tmp_path / "x.jsonl")]) == 2
    assert "no row of split 'held_out'" in capsys.readouterr().err and not (tmp_path / "x.jsonl").exists()


def test_it_is_a_command(table):
    words = [sys.executable, "-m", "tasks.export_preferences", "--format", "pairs", "--preferences", str(table)]
    done = subprocess.run([*words, str(table.parent / "p.jsonl")], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "6 pairs of split train" in done.stdout, done.stderr


def test_the_table_is_not_overwritten_by_its_own_export(table):
    before = table.read_bytes()
    with pytest.raises(UserError, match="is the table that is exported, and would be lost"):
        export(table, table.parent / "." / table.name, format="rankings", split="train")
    assert table.read_bytes() == before
