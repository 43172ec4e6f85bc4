"""Tables of rows: same rows, same bytes; whole or not there; broken ones are named."""

import itertools
import os
import signal
import subprocess
import sys
import textwrap
import time

import pyarrow as pa
import pytest

from rankwise.rows import SCHEMA, read_rows, read_table, write_aside, write_json, write_rows, write_table
from rankwise.types import Answer, Message, Row, UserError, show_prompt, text_prompt

FULL = Row(
    id="b",
    prompt=(Message(role="system", content="Be brief."), Message(role="user", content="Hi\n日本")),
    answers=(
        Answer(
            text="", rank=0, strength=0.1, source="policy", token_ids=(5, 2), finish_reason="stop", logps=(-1.5, 0.0)
        ),
        Answer(text="no", rank=0, seed=2**63 - 1, token_ids=(), logps=(), engine="embedded-9, torch 9"),
        Answer(text="not ranked"),
    ),
    meta={"label": 1, "tags": ["x"], "é": None},
)
ROWS = [FULL, Row(id="a", prompt=text_prompt("")), Row(id="c", prompt=text_prompt("x"), answers=(Answer(text="y"),))]


def test_rows_come_back_as_they_were_sorted_by_id(tmp_path):
    assert write_rows(tmp_path / "t.parquet", ROWS) == 3
    assert read_rows(tmp_path / "t.parquet") == sorted(ROWS, key=lambda row: row.id)


def test_no_rows_are_a_table_too(tmp_path):
    assert write_rows(tmp_path / "t.parquet", []) == 0
    assert read_rows(tmp_path / "t.parquet") == []


def test_the_same_rows_are_the_same_bytes(tmp_path):
    """Whatever their order, and whatever the order of keys in meta."""
    shuffled = [Row(**{**vars(row), "meta": dict(reversed(row.meta.items()))}) for row in ROWS]
    written = set()
    for n, rows in enumerate(itertools.permutations(shuffled)):
        write_rows(tmp_path / f"{n}.parquet", rows)
        written.add((tmp_path / f"{n}.parquet").read_bytes())
    assert len(written) == 1


def test_an_id_that_occurs_twice_is_refused_and_the_old_table_stays(tmp_path):
    write_rows(tmp_path / "t.parquet", ROWS)
    with pytest.raises(UserError, match="'a' occurs twice"):
        write_rows(tmp_path / "t.parquet", [ROWS[1], ROWS[1]])
    assert len(read_rows(tmp_path / "t.parquet")) == 3


def test_a_missing_a_broken_and_a_foreign_table_are_told_apart(tmp_path):
    with pytest.raises(UserError, match="no such table"):
        read_rows(tmp_path / "t.parquet")
    (tmp_path / "t.parquet").write_bytes(b"PAR1 and nothing after")
    with pytest.raises(UserError, match="not a readable Parquet file"):
        read_table(tmp_path / "t.parquet")
    write_table(tmp_path / "t.parquet", pa.table({"id": ["a"], "other": [1]}))
    with pytest.raises(UserError, match=r"\['prompt', 'answers', 'meta'\] are missing"):
        read_rows(tmp_path / "t.parquet")
    older = pa.schema([field for field in SCHEMA if field.name != "answers"])
    older = older.append(pa.field("answers", pa.list_(pa.struct([("text", pa.string())]))))
    write_table(tmp_path / "t.parquet", pa.Table.from_pylist([], schema=older))
    with pytest.raises(UserError, match=r"'answers.rank', .* are missing .* rebuild it"):
        read_rows(tmp_path / "t.parquet")


def test_a_writer_that_fails_leaves_the_old_file_and_no_litter(tmp_path):
    write_json(tmp_path / "m.json", {"loss": 1.5})

    def half(aside):
        aside.write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError):
        write_aside(tmp_path / "m.json", half)
    with pytest.raises(ValueError):
        write_json(tmp_path / "m.json", {"loss": float("nan")})
    assert (tmp_path / "m.json").read_text() == '{\n  "loss": 1.5\n}\n'
    assert [path.name for path in tmp_path.iterdir()] == ["m.json"]


def test_a_killed_writer_leaves_one_table_or_the_other(tmp_path):
    script = textwrap.dedent(
        f"""
        import itertools
        from pathlib import Path
        from rankwise.rows import write_rows
        from rankwise.types import Row, text_prompt
        for n in itertools.count():
            rows = [Row(id=f"{{i:04}}", prompt=text_prompt(str(n))) for i in range(500)]
            write_rows(Path({str(tmp_path / "t.parquet")!r}), rows)
            print(n, flush=True)
        """
    )
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    process.stdout.readline()
    time.sleep(0.05)
    os.kill(process.pid, signal.SIGKILL)
    process.stdout.read()
    process.wait()
    rows = read_rows(tmp_path / "t.parquet")
    assert len(rows) == 500 and len({row.prompt for row in rows}) == 1


def test_ranked_answers_are_best_first_and_ties_keep_their_order():
    row = Row(
        id="a", prompt=text_prompt("p"), answers=tuple(Answer(text=t, rank=r) for t, r in zip("abcd", (2, 0, None, 0)))
    )
    assert [answer.text for answer in row.ranked] == ["b", "d", "a"]


def test_prompts_are_shown_as_a_person_reads_them():
    assert show_prompt(text_prompt("as it is")) == "as it is"
    assert show_prompt(FULL.prompt) == "[system] Be brief.\n[user] Hi\n日本"
