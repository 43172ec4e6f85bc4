"""Whatever the bytes, a reader gives a well-formed value or says what is wrong and where; nothing else, and at once.

The first law holds every reader of the project to it, with files that are made at random from whole ones
(tests/fuzzing; `python -m tests.fuzzing` makes a million). What it found is in tests/test_bad_files.py, by example.
"""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from fuzzing import law
from fuzzing.table import READERS
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rankwise import json_text
from rankwise.rows import read_rows, write_rows
from rankwise.stored_judge import StoredJudge
from rankwise.types import Answer, Message, Row, UserError, text_prompt
from tasks import label_sheet, recipe, yaml_text

CASES = 40  # of each reader, by weight up to thrice as many


@pytest.mark.parametrize("name", READERS)
def test_every_reader_reads_or_tells_why_not(name, tmp_path):
    cases = max(8, math.ceil(CASES * min(3.0, READERS[name].weight)))
    endings = ((number, law.judge(name, number, tmp_path / "c")) for number in range(cases))
    bad = [(number, ending) for number, ending in endings if not ending.lawful]
    assert not bad, f"python -m tests.fuzzing --replay {name}:{bad[0][0]}\n{bad[0][1].kind}\n{bad[0][1].detail}"


def test_the_law_sees_what_it_forbids(tmp_path):
    """A reader that fails, one that tells no place, one that never ends: each is caught."""

    def endless(folder: Path) -> None:
        while True:
            pass

    def told(folder: Path) -> None:
        raise UserError("something is wrong")

    found = {}
    for name, read in {"fails": lambda folder: 1 / 0, "placeless": told, "endless": endless}.items():
        READERS[name] = law.Reader(name=name, make=lambda random: {"a.txt": b"x"}, read=read)
        try:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(law, "LONGEST_S", 0.2)
                found[name] = law.judge(name, 0, tmp_path / name)
        finally:
            del READERS[name]
    assert found["fails"].kind.startswith("crash: ZeroDivisionError")
    assert found["placeless"].kind == "unlawful: the message names no place"
    assert found["endless"].kind == "hang" and not any(ending.lawful for ending in found.values())


# Round trips ---------------------------------------------------------------------------------------------------------

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
TURNS = st.lists(st.builds(Message, role=st.sampled_from(["user", "assistant"]), content=TEXT), min_size=1, max_size=3)
ANSWERS = st.lists(
    st.builds(
        Answer,
        text=TEXT,
        rank=st.none() | st.integers(0, 9),
        strength=st.none() | st.floats(allow_nan=False),
        token_ids=st.none() | st.lists(st.integers(0, 2**31 - 1), max_size=3).map(tuple),
        seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    ),
    max_size=3,
).map(tuple)
META = st.dictionaries(TEXT, st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT, max_size=3)
ROWS = st.lists(
    st.builds(Row, id=TEXT, prompt=TURNS.map(tuple) | TEXT.map(text_prompt), answers=ANSWERS, meta=META),
    max_size=4,
    unique_by=lambda row: row.id,
)
quickly = settings(
    max_examples=60, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


@quickly
@given(rows=ROWS)
def test_rows_are_the_same_when_written_and_read(tmp_path, rows):
    write_rows(tmp_path / "rows.parquet", rows)
    assert read_rows(tmp_path / "rows.parquet") == sorted(rows, key=lambda row: row.id)


@quickly
@given(value=st.lists(META, max_size=3) | st.dictionaries(TEXT, META, max_size=3))
def test_json_that_the_project_writes_is_read_as_it_was(value):
    assert json_text.parse(json.dumps(value)) == value


@settings(quickly, max_examples=20)
@given(words=st.lists(TEXT, max_size=3), beta=st.floats(1e-12, 1e9), where=st.dictionaries(TEXT, st.integers() | TEXT))
def test_any_text_and_number_of_a_recipe_comes_back_from_the_params_file(words, beta, where):
    where = {name: value for name, value in where.items() if isinstance(value, str) or abs(value) < 2**63}
    files = {"sft": {"path": "a.jsonl", "where": where}}
    text = recipe.render({"rollouts": {"stop": words}, "dpo": {"beta": beta}, "prompts": {"files": files}})
    read = yaml_text.parse(text)
    assert read["rollouts"]["stop"] == words and read["dpo"]["beta"] == beta
    assert read["prompts"]["files"]["sft"]["where"] == where


@quickly
@given(rows=ROWS, seed=st.integers(0, 99), end=st.sampled_from([",", ";", "\t"]), data=st.data())
def test_a_sheet_that_comes_back_answers_the_questions_that_it_asked(tmp_path, rows, seed, end, data):
    import csv
    import io

    pairs = [pair for row in rows for pair in label_sheet._pairs(row, seed, label_sheet.NO_LIMIT)]
    if not pairs:
        return
    lines = [*csv.reader(io.StringIO(label_sheet.as_csv(pairs).removeprefix("\ufeff")))]
    said = [data.draw(st.sampled_from(["A", "B", "tie"])) for _ in pairs]
    at = lines[0].index("verdict")
    filled = [[*line[:at], verdict, *line[at + 1 :]] for line, verdict in zip(lines[1:], said)]
    with open(tmp_path / "sheet.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file, delimiter=end).writerows([lines[0], *filled])
    judge = StoredJudge(tmp_path / "sheet.csv")
    answered = {name: votes[0].said for name, votes in judge._votes.items()}
    assert answered == {pair.key: verdict for pair, verdict in zip(pairs, said)}
