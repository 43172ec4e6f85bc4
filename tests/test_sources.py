"""Any format and shape becomes rows; a bad record is named, never skipped."""

import gzip
import json
import math
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.types import Message, UserError, show_prompt
from tasks.sources import File, read_examples


def rows_of(path, *, opening_words=2, left_out=None, **options):
    counts = Counter() if left_out is None else left_out
    return list(read_examples(path, File(path=str(path), **options), opening_words=opening_words, left_out=counts))


@pytest.fixture
def jsonl(tmp_path):
    def write(*records, name="data.jsonl"):
        path = tmp_path / name
        lines = (record if isinstance(record, str) else json.dumps(record) for record in records)
        path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
        return path

    return write


def error_of(path, **options):
    with pytest.raises(UserError) as caught:
        rows_of(path, **options)
    return str(caught.value)


def texts(row):
    return [(answer.text, answer.rank) for answer in row.answers]


PAIR = {"id": "p1", "prompt": "Say hi.", "chosen": " Hi!", "rejected": " No.", "label": 3}


# Formats -------------------------------------------------------------------------------------------------------------


def write_jsonl_gz(path, records):
    with gzip.open(path, "wt", encoding="utf-8") as handle:
        handle.writelines(json.dumps(record) + "\n" for record in records)


def write_csv(path, records):
    import csv

    with open(path, "w", encoding="utf-8-sig", newline="") as handle:
        writer = csv.DictWriter(handle, list(records[0]))
        writer.writeheader()
        writer.writerows(records)


def write_saved(path, records):
    import datasets

    datasets.DatasetDict({"train": datasets.Dataset.from_list(records)}).save_to_disk(path)


def write_folder(path, records):
    path.mkdir()
    for index, record in enumerate(records):
        pq.write_table(pa.Table.from_pylist([record]), path / f"part-{index}.parquet")


FORMATS = {
    "data.jsonl.gz": write_jsonl_gz,
    "data.json": lambda path, records: path.write_text(json.dumps(records), encoding="utf-8"),
    "data.csv": write_csv,
    "data.parquet": lambda path, records: pq.write_table(pa.Table.from_pylist(records), path),
    "saved": write_saved,
    "shards": write_folder,
}


@pytest.mark.parametrize("name", FORMATS)
def test_every_format_gives_the_same_rows(name, tmp_path, jsonl):
    records = [PAIR, {**PAIR, "id": "p2", "chosen": ' "Hé,\nyou!"'}]
    FORMATS[name](tmp_path / name, records)
    reference = rows_of(jsonl(*records))
    found = rows_of(tmp_path / name)
    assert [(row.id, row.prompt, row.answers) for row in found] == [(r.id, r.prompt, r.answers) for r in reference]


def test_a_csv_field_may_hold_messages_as_json(tmp_path):
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    write_csv(tmp_path / "chat.csv", [{"messages": json.dumps(turns)}])
    (row,) = rows_of(tmp_path / "chat.csv")
    assert (row.prompt, texts(row)) == ((Message(role="user", content="Hi"),), [("Hello", None)])


# Shapes --------------------------------------------------------------------------------------------------------------

USER, SYSTEM = {"role": "user", "content": "Q"}, {"role": "system", "content": "S"}
GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}
TURN = {"from": "human", "value": "Q"}
TALK = "\n\nHuman: Q\n\nAssistant:"
BOTH = [("good", 0), ("bad", 1)]

SHAPES = {
    "prompt": ({"prompt": "Q"}, "Q", []),
    "instruction": ({"instruction": "Q"}, "[user] Q", []),
    "completion": ({"prompt": "Q", "completion": " A"}, "Q", [(" A", None)]),
    "alpaca": ({"instruction": "Do", "input": "x", "output": "A"}, "[user] Do\n\nx", [("A", None)]),
    "alpaca without input": ({"instruction": "Do", "input": None, "output": "A"}, "[user] Do", [("A", None)]),
    "messages": ({"messages": [SYSTEM, USER, GOOD]}, "[system] S\n[user] Q", [("good", None)]),
    "messages without answer": ({"messages": [SYSTEM, USER]}, "[system] S\n[user] Q", []),
    "sharegpt": ({"conversations": [TURN, {"from": "gpt", "value": "A"}]}, "[user] Q", [("A", None)]),
    "sharegpt pair": (
        {"conversations": [TURN], "chosen": {"from": "gpt", "value": "good"}, "rejected": GOOD | {"content": "bad"}},
        "[user] Q",
        BOTH,
    ),
    "pair": ({"prompt": "Q", "chosen": "good", "rejected": "bad"}, "Q", BOTH),
    "pair of lists": ({"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]}, "[user] Q", BOTH),
    "pair that repeats its prompt": (
        {"prompt": "Q", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        "[user] Q",
        BOTH,
    ),
    "implicit lists": ({"chosen": [SYSTEM, USER, GOOD], "rejected": [SYSTEM, USER, BAD]}, "[system] S\n[user] Q", BOTH),
    "implicit text": ({"chosen": TALK + " goes", "rejected": TALK + " gone"}, TALK, [(" goes", 0), (" gone", 1)]),
    "ranking with ties": (
        {"prompt": "Q", "answers": [{"text": "b", "rank": 5}, {"text": "a", "rank": 2}, {"text": "c", "rank": 5}]},
        "Q",
        [("b", 1), ("a", 0), ("c", 1)],
    ),
    "scores": (
        {"prompt_messages": [USER], "responses": [{"text": "b", "score": 0.1}, {"text": "a", "score": 7}]},
        "[user] Q",
        [("b", 1), ("a", 0)],
    ),
}


@pytest.mark.parametrize("name", SHAPES)
def test_every_shape_is_known_by_its_columns(name, jsonl):
    record, prompt, answers = SHAPES[name]
    (row,) = rows_of(jsonl(record))
    assert (show_prompt(row.prompt), texts(row)) == (prompt, answers)


def test_prompt_and_rest_make_the_text_and_the_space_belongs_to_the_rest(jsonl):
    left_out = Counter()
    path = jsonl({"text": "One two\n three four", "label": 1}, {"text": "Only two"})
    (row,) = rows_of(path, opening_words=2, left_out=left_out)
    assert (row.prompt[0], row.answers[0].text, row.meta) == (
        Message(role="text", content="One two"),
        "\n three four",
        {"label": 1},
    )
    assert left_out == {"no words after the opening": 1}


def test_no_opening_leaves_the_whole_text_to_the_answer(jsonl):
    (row,) = rows_of(jsonl({"text": "One two"}), opening_words=0)
    assert (show_prompt(row.prompt), texts(row)) == ("", [("One two", None)])


def test_turns_and_transcripts_are_two_spellings_of_one_chat(jsonl):
    turns = {"prompt": [USER, GOOD, USER], "chosen": "good", "rejected": "bad"}
    (text,) = rows_of(jsonl(turns), chat="text")
    assert show_prompt(text.prompt) == "\n\nHuman: Q\n\nAssistant: good\n\nHuman: Q\n\nAssistant:"
    assert texts(text) == [(" good", 0), (" bad", 1)]
    spelt = {"prompt": show_prompt(text.prompt), "chosen": " good", "rejected": " bad"}
    (roles,) = rows_of(jsonl(spelt), chat="roles")
    assert (roles.prompt, roles.answers) == (rows_of(jsonl(turns))[0].prompt, rows_of(jsonl(turns))[0].answers)


def test_own_columns_are_mapped_and_take_the_place_of_standard_ones(jsonl):
    record = {"question": "Q", "prompt": "other", "responses": [{"text": "a", "p": 0.2}, {"text": "b", "p": 0.9}]}
    (row,) = rows_of(jsonl(record), columns={"question": "prompt", "responses.p": "score"})
    assert (show_prompt(row.prompt), texts(row)) == ("Q", [("a", 1), ("b", 0)])


# Ids, meta and filters -----------------------------------------------------------------------------------------------


def test_an_id_is_the_records_own_or_else_its_content(jsonl):
    one, two = rows_of(jsonl({"prompt": "a", "id": 7}, {"prompt": "b", "prompt_id": "x"}))
    assert (one.id, two.id) == ("7", "x")
    first = rows_of(jsonl({"prompt": "a"}, {"prompt": "b"}))
    second = rows_of(jsonl({"prompt": "b"}, {"prompt": "a", "label": 1}))
    assert [row.id for row in first] == [row.id for row in reversed(second)]
    assert first[0].id != first[1].id


def test_what_the_settings_leave_out_is_counted_by_reason(jsonl):
    left_out = Counter()
    rows = rows_of(
        jsonl(
            PAIR,
            {**PAIR, "id": "b", "label": "other"},
            {**PAIR, "id": "c", "chosen": " "},
            {**PAIR, "id": "d", "chosen": " many words here"},
            {**PAIR, "id": "e"},
        ),
        where={"label": ["3", "x"]},
        leave_out=["empty_answers"],
        leave_out_ids=["e"],
        max_words=4,
        left_out=left_out,
    )
    assert [row.id for row in rows] == ["p1"]
    assert sorted(left_out.values()) == [1, 1, 1, 1]


def test_exact_duplicates_without_ids_are_counted(jsonl):
    left_out = Counter()
    assert len(rows_of(jsonl({"prompt": "a"}, {"prompt": "a"}), left_out=left_out)) == 1
    assert left_out == {"exact duplicate": 1}


def test_meta_keeps_labels_groups_and_what_is_asked_for(jsonl):
    record = {"prompt": "a", "label": 1, "movie": 17, "sha": "ff", "score": math.nan, "split": "train"}
    (row,) = rows_of(jsonl(record), group="movie", keep=["score"])
    assert row.meta == {"label": 1, "group": "17", "split": "train"}


# Bad input -----------------------------------------------------------------------------------------------------------

BAD_RECORDS = {
    "broken JSON": ('{"prompt": "a"', ':2: one JSON object was expected, found \'{"prompt": "a"\''),
    "no object": ("[1]", ":2: an object with named columns was expected, found [1] (list)"),
    "missing column": ({"prompt": "a", "chosen": "b", "refused": "c"}, "shape 'pair' needs column rejected"),
    "wrong type": ({**PAIR, "id": "z", "chosen": 3}, ":2: (id 'z') column 'chosen': text was expected, found 3 (int)"),
    "NaN": ({**PAIR, "id": "z", "chosen": math.nan}, "(id 'z') column 'chosen': text was expected, found NaN"),
    "null": ({**PAIR, "id": "z", "chosen": None}, "text was expected, found null"),
    "half a character": ({**PAIR, "id": "z", "chosen": "\ud83d"}, "half a character"),
    "empty prompt": ({**PAIR, "id": "z", "prompt": " "}, "column 'prompt' is empty"),
    "repeated id": (PAIR, ":2: id 'p1' occurs twice, first at"),
    "no id": ({**PAIR, "id": 1.5}, "an id (text or a whole number) was expected, found 1.5"),
}


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_a_bad_record_is_named_by_file_line_and_id(name, jsonl):
    record, message = BAD_RECORDS[name]
    path = jsonl(PAIR, record)
    assert message in error_of(path)
    assert str(path) in error_of(path)


BAD_RANKINGS = {
    "one answer": ([{"text": "a", "rank": 0}], "at least 2 answers, found 1"),
    "no rank": (
        [{"text": "a", "rank": 0}, {"text": "b", "rank": None}],
        "for every answer was expected, found [0, None]",
    ),
    "no list": ("a", "a list of {text, rank} was expected"),
    "no text": ([{"rank": 0}, {"text": "b", "rank": 1}], "column 'answers.text': text was expected, found null"),
}


@pytest.mark.parametrize("name", BAD_RANKINGS)
def test_a_ranking_that_ranks_nothing_is_refused(name, jsonl):
    answers, message = BAD_RANKINGS[name]
    assert message in error_of(jsonl({"prompt": "Q", "answers": answers}))


BAD_CHATS = {
    "unknown role": ({"messages": [{"role": "tool", "content": "x"}]}, "a role of"),
    "no turn": ({"messages": []}, "a list of {role, content} was expected"),
    "ends with the user": ({"chosen": [USER], "rejected": [USER, BAD]}, "the last turn is the user's"),
    "differ earlier": ({"chosen": [USER, GOOD], "rejected": [SYSTEM, BAD]}, "differ from turn 1"),
    "share no turn": ({"chosen": "yes", "rejected": "no"}, "share no turns"),
}


@pytest.mark.parametrize("name", BAD_CHATS)
def test_a_chat_without_a_shared_prompt_or_an_answer_is_refused(name, jsonl):
    record, message = BAD_CHATS[name]
    assert message in error_of(jsonl(record))


def test_unknown_columns_get_a_mapping_to_try(jsonl):
    assert "did you mean columns: {promt_: prompt, choosen: chosen}" in error_of(jsonl({"promt_": "a", "choosen": "b"}))


def test_invalid_utf8_is_named_by_its_line(tmp_path):
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "caf\xe9"}\n')
    assert "latin.jsonl:2: UTF-8 was expected, found byte 0xe9 at column 16" in error_of(tmp_path / "latin.jsonl")


def test_reading_stops_at_the_tenth_bad_record_and_names_all_ten(jsonl):
    message = error_of(jsonl(PAIR, *["{"] * 30))
    assert message.count("one JSON object was expected") == 10


def test_missing_files_near_names_and_empty_files_are_told_apart(jsonl, tmp_path):
    jsonl({"prompt": "a"}, name="reviews.jsonl")
    assert "did you mean 'reviews.jsonl'?" in error_of(tmp_path / "review.jsonl")
    assert "empty: at least one record" in error_of(jsonl(name="none.jsonl"))
    (tmp_path / "x.xlsx").touch()
    assert "unknown format '.xlsx'" in error_of(tmp_path / "x.xlsx")
    (tmp_path / "bare").mkdir()
    assert "a folder without data" in error_of(tmp_path / "bare")


def test_broken_containers_are_user_errors(tmp_path):
    (tmp_path / "a.parquet").write_bytes(b"not parquet")
    assert "not a readable Parquet file" in error_of(tmp_path / "a.parquet")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(b'{"prompt": "a"}\n' * 999)[:40])
    assert "not a whole gzip file" in error_of(tmp_path / "a.jsonl.gz")
    (tmp_path / "a.csv").write_text("prompt,label\na\n", encoding="utf-8")
    assert "a.csv:2: 2 fields were expected" in error_of(tmp_path / "a.csv")


def test_a_missing_split_is_named(tmp_path):
    write_saved(tmp_path / "saved", [PAIR])
    assert "no split 'trian'; did you mean 'train'?" in error_of(tmp_path / "saved", split="trian")


def test_a_hub_id_without_network_is_a_user_error():
    assert "hub:no-such-org/no-such-set" in error_of("hub:no-such-org/no-such-set@main")
