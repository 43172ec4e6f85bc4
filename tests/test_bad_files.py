"""Readable examples of what tests/fuzzing once found: files that a reader failed at, hung on, or took in silence."""

from __future__ import annotations

import gzip
import json
import math
from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from fuzzing import law, octets, params_files

from rankwise import checkpoints, resuming, text_files
from rankwise.parallel import processes
from rankwise.rows import read_rows, read_table, write_rows
from rankwise.store import Store
from rankwise.stored_judge import StoredJudge
from rankwise.types import Answer, Message, Missing, Row, UserError, text_prompt
from tasks import lineage, params, recipe, rounds, weights, yaml_text
from tasks.sources import File, read_examples

# Data files ----------------------------------------------------------------------------------------------------------


def told(path: Path, data: bytes, **how) -> str:
    path.write_bytes(data)
    with pytest.raises(UserError) as error:
        list(read_examples(path, File(path=path.name, **how), opening_words=2, left_out=Counter()))
    return str(error.value)


GOOD = b'{"prompt": "a", "completion": "b"}\n'


@pytest.mark.parametrize(
    ("line", "words"),
    [
        (b"[" * 100_000, "nested more than 64 deep"),
        (b'{"prompt": ' + b"[" * 900 + b"]" * 900 + b"}", "nested more than 64 deep"),
        (b'{"prompt": "a", "n": ' + b"9" * 5000 + b"}", "a number has thousands of digits"),
        (b'{"prompt": "a", "completion": "b", "completion": "c"}', "the name 'completion' stands twice"),
        (b'{"prompt": [{"role": ["user"], "content": "a"}]}', "a role of human, gpt, user, assistant, system"),
        (b'{"id": "\\ud800", "prompt": "a"}', "column 'id': half a character"),
        (b'{"label": "\\ud800", "prompt": "c"}', "column 'label': half a character"),
        (b'{"id": true, "prompt": "a"}', "an id (text or a whole number) was expected, found True (bool)"),
        (b'{"instruction": "a", "input": 0, "output": "b"}', "column 'input': text was expected, found 0 (int)"),
    ],
)
def test_a_line_of_json_that_cannot_be_a_record_is_told_with_its_place(tmp_path, line, words):
    message = told(tmp_path / "a.jsonl", GOOD + line + b"\n", shape="prompt" if b"output" not in line else "auto")
    assert message.startswith(f"{tmp_path / 'a.jsonl'}:2: ") and words in message


def test_whole_numbers_of_any_size_are_scores(tmp_path):
    answers = [{"text": "a", "score": 10**400}, {"text": "b", "score": 1}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"prompt": "p", "answers": answers}))
    [row] = read_examples(tmp_path / "a.jsonl", File(), opening_words=2, left_out=Counter())
    assert [answer.rank for answer in row.answers] == [0, 1]


@pytest.mark.parametrize(
    ("name", "line", "count", "words"),
    [
        ("a.jsonl.gz", b"\0" * 2**20, 48, "a line of more than 16 MiB"),
        ("a.csv.gz", b"x" * 2**20, 48, "a line of more than 16 MiB"),
        ("a.json.gz", b" " * 2**20, 48, "unpacks to more than 32 MiB, 250 times its size"),
    ],
)
def test_a_small_file_that_unpacks_to_a_large_one_is_left_alone(tmp_path, name, line, count, words):
    data = octets.bomb(line, count)
    assert len(data) < 250_000
    assert words in told(tmp_path / name, data)


def test_text_that_repeats_itself_as_text_does_is_read_from_gz(tmp_path):
    lines = "".join(f'{{"prompt": "review {n} of the film", "completion": "it was good"}}\n' for n in range(20_000))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(lines.encode()))
    rows = read_examples(tmp_path / "a.jsonl.gz", File(), opening_words=2, left_out=Counter())
    assert sum(1 for _ in rows) == 20_000


def test_two_columns_with_one_name_are_refused(tmp_path):
    assert "two columns are called 'prompt'" in told(tmp_path / "a.csv", b"prompt,prompt\na,b\n")
    pq.write_table(pa.table([["a"], ["b"]], names=["prompt", "prompt"]), tmp_path / "a.parquet")
    assert "two columns are called 'prompt'" in told(tmp_path / "a.parquet", (tmp_path / "a.parquet").read_bytes())


def test_a_file_with_thousands_of_columns_is_told_in_a_few(tmp_path):
    names, values = ",".join(f"column{n}" for n in range(5000)), ",".join(["1"] * 5000)
    message = told(tmp_path / "a.csv", f"{names}\n{values}\n".encode())
    assert "and 4980 more" in message and len(message) < 2000


@pytest.mark.parametrize(
    ("column", "words"),
    [
        (pa.array([2**31 - 1], pa.date32()), "column 'prompt', date32[day]: a value that is none"),
        (pa.array([0], pa.timestamp("us", tz="No/Where")), "column 'prompt', timestamp[us, tz=No/Where]"),
    ],
)
def test_a_value_that_python_cannot_hold_is_told_with_its_column(tmp_path, column, words):
    pq.write_table(pa.table({"prompt": column}), tmp_path / "made.parquet")
    assert words in told(tmp_path / "a.parquet", (tmp_path / "made.parquet").read_bytes())


def test_a_folder_with_the_name_of_a_file_is_not_read_as_one(tmp_path):
    (tmp_path / "data/b.jsonl").mkdir(parents=True)
    (tmp_path / "data/a.jsonl").write_bytes(GOOD)
    assert len([*read_examples(tmp_path / "data", File(), opening_words=2, left_out=Counter())]) == 1


def test_a_damaged_folder_of_datasets_is_told_and_ends_no_process(tmp_path):
    """Its own package maps the file into memory and reads beyond the end: a bus error."""
    from datasets import Dataset

    Dataset.from_list([{"prompt": f"p{n}", "completion": "c"} for n in range(100)]).save_to_disk(tmp_path / "saved")
    [path] = (tmp_path / "saved").glob("*.arrow")
    assert len([*read_examples(tmp_path / "saved", File(), opening_words=2, left_out=Counter())]) == 100
    path.write_bytes(path.read_bytes()[:-900])
    with pytest.raises(UserError, match=r"\.arrow: not a readable Arrow file"):
        list(read_examples(tmp_path / "saved", File(), opening_words=2, left_out=Counter()))


def test_a_folder_of_datasets_cannot_point_out_of_itself(tmp_path):
    (tmp_path / "saved").mkdir()
    (tmp_path / "saved/state.json").write_text(json.dumps({"_data_files": [{"filename": "../secret.arrow"}]}))
    with pytest.raises(UserError, match=r"state\.json: a list of data files was expected"):
        list(read_examples(tmp_path / "saved", File(), opening_words=2, left_out=Counter()))


# YAML ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dpo: {beta: 0.1}\ndpo: {beta: 0.2}\n", "the key 'dpo' stands twice"),
        ("a: {1: x, true: y}\n", "stands twice"),
        ("a: 2026-13-45\n", "'2026-13-45' is no timestamp"),
        ("a: 0x_\n", "'0x_' is no int"),
        ("a: !!bool maybe\n", "'maybe' is no bool"),
        ("a: !!timestamp x\n", "'x' is no timestamp"),
        (f"a: {'9' * 5000}\n", "is no int"),
        (f"a: 0x{'f' * 5000}\n", "more than 64 bits"),
        ('a: "\\ud800"\n', "half a character"),
        ("[" * 3000, "nested more than 64 deep"),
        ("- " * 100 + "a\n", "nested more than 64 deep"),
        ("a: &a [*a]\n", "an alias of itself"),
        (params_files.LAUGHS, "aliases unfold to"),
        (params_files.MERGES, "aliases unfold to"),
        ("a: !!python/object:os.system x\n", "could not determine a constructor"),
    ],
)
def test_yaml_that_no_parameter_file_needs_is_told_with_its_line(tmp_path, text, words):
    (tmp_path / "params.yaml").write_text(text)
    with pytest.raises(UserError) as error:
        params.read_yaml(tmp_path / "params.yaml")
    assert words in str(error.value) and str(tmp_path / "params.yaml") in str(error.value)


def test_yaml_reads_what_it_always_read(tmp_path):
    """Anchors and merges of an ordinary file too; the same as the library does, for every file of the project."""
    text = "base: &base {a: 1, b: [x, 2026-11-28, 1e-3, 0x1F]}\nmore: {<<: *base, a: 2}\nagain: *base\nnone:\n"
    files = [path.read_text() for path in law.ROOT.rglob("*.yaml") if ".venv" not in path.parts]
    assert len(files) > 10
    for one in [text, *files]:
        documents = [*yaml.safe_load_all(one)]
        if len(documents) == 1:
            assert yaml_text.parse(one) == documents[0]


def test_a_folder_in_place_of_a_params_file_is_told(tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        params.read_yaml(tmp_path)


def test_keys_that_are_no_text_are_unknown_like_any_other(tmp_path):
    (tmp_path / "recipe.yaml").write_text("1: 2\n")
    with pytest.raises(UserError, match="no stage is called 1"):
        recipe.apply(tmp_path / "recipe.yaml", tmp_path / "params.yaml")
    (tmp_path / "params.yaml").write_text("2026-11-28: {}\n")
    with pytest.raises(UserError, match="section 'dpo' is missing"):
        params.load(tmp_path / "params.yaml", "dpo", object)


def test_rounds_beyond_any_run_are_refused_before_they_are_unrolled():
    with pytest.raises(UserError, match=r"rounds.count: must be at most 1000, found 1000000000"):
        rounds.section({"count": 10**9}, where="params.yaml: rounds")
    with pytest.raises(UserError, match="a round stands there twice"):
        rounds.section({"each": {1: {"dpo": {"beta": 0.2}}, "1": {}}}, where="rounds")
    with pytest.raises(UserError, match=r"rounds.each.1.dpo: a mapping of parameters was expected, found 0"):
        rounds.section({"each": {"1": {"dpo": 0}}}, where="rounds")


@pytest.mark.parametrize("text", ["<<<<<<< HEAD\n", "a: [\n", "stages: [1]\n", "stages: {sft: 1}\n", "\x00"])
def test_a_dvc_lock_that_dvc_did_not_write_is_told(tmp_path, text):
    (tmp_path / "dvc.lock").write_text(text)
    with pytest.raises(UserError, match=r"dvc\.lock: not "):
        lineage.lock_entry_md5("sft", tmp_path / "dvc.lock")


# Tables and stores ---------------------------------------------------------------------------------------------------

ROW = Row(id="a", prompt=text_prompt("The film"), answers=(Answer(text=" was.", rank=0), Answer(text=" is.", rank=1)))


@pytest.mark.parametrize(
    ("column", "value", "words"),
    [
        ("id", pa.array([None, "b"], pa.string()), "id lacks a value"),
        ("id", pa.array(["b", "b"]), "id 'b' occurs twice"),
        ("prompt", pa.array(["text", "text"]), "column 'prompt' is string"),
        ("prompt", pa.array([[{"role": "user", "content": None}]] * 2), "prompt[].content lacks a value"),
        ("answers", pa.array([1, 2]), "columns ['answers.text', 'answers.rank'"),
        ("answers", pa.array([None, None], pa.null()), "columns ['answers.text'"),
        ("meta", pa.array(["{", "{}"]), "row 1: meta is no JSON"),
        ("meta", pa.array(["[]", "{}"]), "row 1: meta is '[]', no JSON object"),
    ],
)
def test_a_table_of_rows_with_other_columns_is_told(tmp_path, column, value, words):
    path = tmp_path / "rows.parquet"
    write_rows(path, [ROW, Row(id="b", prompt=ROW.prompt)])
    table = pq.read_table(path)
    pq.write_table(table.set_column(table.column_names.index(column), column, value), path)
    with pytest.raises(UserError) as error:
        read_rows(path)
    assert str(error.value).startswith(str(path)) and words in str(error.value)


def test_a_file_that_claims_more_rows_than_it_can_hold_is_not_read(tmp_path):
    from rankwise.table_checks import MANY_ROWS

    nulls = pa.nulls(2 * MANY_ROWS, pa.int32())
    pq.write_table(pa.table({"a": nulls}), tmp_path / "a.parquet")
    assert (tmp_path / "a.parquet").stat().st_size < 100_000
    with pytest.raises(UserError, match=r"a\.parquet: claims 33,554,432 rows in "):
        read_table(tmp_path / "a.parquet")


@pytest.mark.parametrize("value", ["[1", "[" * 3000, '{"a": 1, "a": 2}', b"\xff", 7])
def test_a_damaged_value_of_a_store_is_told_with_its_key(tmp_path, value):
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many({"k1": 1})
        store._db.execute("UPDATE rows SET value = ?", (value,))
        if value == 7:  # kept as text, and as good as any
            assert store.get_many(["k1"]) == {"k1": 7}
            return
        with pytest.raises(UserError, match=r"s\.sqlite: row 'k1' is damaged"):
            store.get_many(["k1"])


def test_a_store_whose_own_text_is_damaged_is_told(tmp_path):
    """SQLite quotes it in its error, which Python then cannot read."""
    with Store(tmp_path / "s.sqlite") as store:
        store.put_many({"k": 1})
        store._db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    data = (tmp_path / "s.sqlite").read_bytes()
    (tmp_path / "s.sqlite").write_bytes(data.replace(b"CREATE TABLE rows", b"CREATE TABL\xec rows"))
    with pytest.raises(UserError, match=r"s\.sqlite: not usable as a row store"):
        Store(tmp_path / "s.sqlite")


# Verdicts ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ({"first": "x", "second": "y", "value": 10**400}, "log-odds in nats, a finite number"),
        ({"first": "x", "second": "y", "value": True}, "log-odds in nats, a finite number"),
        ({"first": "x", "second": "y", "verdict": "A", "reason": "\ud800"}, "column reason: half a character"),
        ({"answers": [{"text": "x", "rank": True}, {"text": "y", "rank": 1}]}, "a whole number as its rank"),
        ({"answers": [{"text": "x", "rank": 0}, {"text": "y", "rank": 1}], "verdict": "A"}, "both answers with ranks"),
        ({"answers": "[" * 3000}, "nested more than 64 deep"),
    ],
)
def test_a_stored_verdict_that_cannot_be_one_is_told_with_its_line(tmp_path, line, words):
    (tmp_path / "people.jsonl").write_text(json.dumps({"prompt": "p", **line}))
    with pytest.raises(UserError) as error:
        StoredJudge(tmp_path / "people.jsonl")
    assert "line 1: " in str(error.value) and words in str(error.value)


@pytest.mark.parametrize(
    ("part", "value"), [("top_logprobs", 5), ("top_logprobs", True), ("finish_reason", {}), ("finish_reason", ["stop"])]
)
def test_a_reply_with_parts_of_another_type_is_unreadable_and_no_failure(part, value):
    from fuzzing.replies import QUESTIONS, _judge

    choice = {"message": {"content": "A"}, "finish_reason": "stop", "logprobs": {"content": [{"token": "A"}]}}
    place = choice if part in choice else choice["logprobs"]["content"][0]
    place[part] = value
    form = "json" if part in choice else "logprobs"
    assert _judge(form).read(QUESTIONS[0], {"reply": {"choices": [choice]}}).values is None


# Models --------------------------------------------------------------------------------------------------------------


def folder_of_a_model(tmp_path: Path) -> Path:
    from fuzzing.models import _folder

    law.put({f"model/{name}": data for name, data in _folder().items()}, tmp_path)
    return tmp_path / "model"


@pytest.mark.parametrize("load", [checkpoints.load_tokenizer, checkpoints.load_causal_lm])
def test_a_model_folder_that_is_not_there_is_told_as_that_and_not_looked_for_on_the_hub(tmp_path, monkeypatch, load):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(Missing, match=r"^models/sft: no such model folder; run the stage that makes it first$"):
        load(Path("models/sft"))


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("models/sft", "sft"),
        ("models/policy-2", "dpo"),
        ("data/rollouts.parquet", "rollouts"),
        ("data/prompts/sft.parquet", "prompts"),
        ("reports/evaluate-3/metrics.json", "evaluate"),
        ("data/source/mine.jsonl", ""),
    ],
)
def test_what_is_missing_is_told_with_the_stage_that_makes_it(path, stage):
    assert lineage.maker_of(Path(path), law.ROOT / "dvc.yaml") == stage


def test_weights_that_lack_a_tensor_are_refused_and_never_made_up(tmp_path):
    """The library draws random numbers in its place, and says so in a line of a log."""
    from safetensors.torch import load_file, save_file

    folder = folder_of_a_model(tmp_path)
    tensors = load_file(folder / "model.safetensors")
    gone = next(name for name in tensors if name.endswith("o_proj.weight"))
    save_file({name: t for name, t in tensors.items() if name != gone}, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=r"its files lack 1 of the model's weights: .*o_proj\.weight"):
        checkpoints.load_causal_lm(folder)


def test_a_config_with_more_layers_than_tensors_is_refused_before_they_are_built(tmp_path):
    folder = folder_of_a_model(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 10**9}))
    with pytest.raises(UserError, match=r"config\.json says 1000000000 layers, and the weights are \d+ tensors"):
        checkpoints.load_causal_lm(folder)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"identity": []}, "identity"),
        ({"step": "4"}, "step"),
        ({"counters": {"processes": 5}}, "counters"),
        ({"points": None}, "points"),
    ],
)
def test_a_checkpoint_with_other_notes_than_training_keeps_is_refused(tmp_path, change, words):
    module = torch.nn.Linear(2, 2)
    named, optimizer = dict(module.named_parameters()), torch.optim.AdamW(module.parameters())
    notes = {"identity": {}, "step": 4, "epochs_told": 0, "counters": {"seen": 1}, "points": [], **change}
    resuming.save(tmp_path / "state.safetensors", named, optimizer, notes, processes())
    with pytest.raises(UserError, match=f"in its notes, {words} are missing or no such thing"):
        resuming.load(tmp_path / "state.safetensors", named, optimizer, {}, processes())


def test_a_checkpoint_in_another_precision_or_with_half_an_optimizer_is_refused(tmp_path):
    module = torch.nn.Linear(2, 2)
    named, optimizer = dict(module.named_parameters()), torch.optim.AdamW(module.parameters())
    notes = {"identity": {}, "step": 4, "epochs_told": 0, "counters": {}, "points": []}
    tensors = {f"weight/{name}": p.detach() for name, p in named.items()}
    for more in ({"weight/bias": named["bias"].detach().half()}, {"optimizer/bias/step": torch.tensor(4.0)}):
        checkpoints.save_state(tmp_path / "state.safetensors", {**tensors, **more}, notes)
        with pytest.raises(UserError, match="the checkpoint is of another model"):
            resuming.load(tmp_path / "state.safetensors", named, optimizer, {}, processes())


def test_a_chat_template_that_will_not_have_a_row_is_told_with_its_words(tmp_path):
    from rankwise.rendering import Renderer

    renderer = Renderer(checkpoints.load_tokenizer(folder_of_a_model(tmp_path)))
    with pytest.raises(
        UserError, match=r"template does not take turns of \['system'\], the first 'Be brief'.*no system"
    ):
        renderer.prompt_ids((Message(role="system", content="Be brief"),))


# Notes ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["../out", "/etc/out", "a/../../out"])
def test_a_listing_of_the_cache_writes_nothing_outside_of_its_folder(tmp_path, monkeypatch, name):
    monkeypatch.setattr(weights, "_dvc", lambda *_: str(tmp_path / "cache"))
    for md5, data in {"aa1": "w", "bb2.dir": json.dumps([{"md5": "aa1", "relpath": name}])}.items():
        place = weights._object(tmp_path / "cache/files/md5", md5)
        place.parent.mkdir(parents=True)
        place.write_text(data)
    with pytest.raises(UserError, match="names a file outside its folder"):
        weights._from_cache("bb2.dir", tmp_path / "aside")
    assert not (tmp_path / "out").exists() and not (tmp_path / "aside").exists()


@pytest.mark.parametrize("hours", [math.nan, math.inf, 0, -1, 1e9])
def test_hours_that_nobody_can_wait_are_refused(hours):
    from flows.promote import prepare

    with pytest.raises(UserError, match="a person needs some time"):
        prepare(approval=True, apply=False, wait_hours=hours)


def test_a_line_is_as_long_as_a_record_can_be(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"x" * text_files.LONGEST_LINE + b"\n" + b"y\n")
    with text_files.opened(tmp_path / "a.txt") as file, pytest.raises(UserError, match=r"a\.txt:1: a line of more"):
        list(text_files.lines(file, tmp_path / "a.txt"))
    (tmp_path / "a.txt").write_bytes(b"x" * (text_files.LONGEST_LINE - 1) + b"\n" + b"y\n")
    with text_files.opened(tmp_path / "a.txt") as file:
        assert len([*text_files.lines(file, tmp_path / "a.txt")]) == 2
