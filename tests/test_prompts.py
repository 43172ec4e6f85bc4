"""Stage prompts: six tables, always the same layout; what is held out shares nothing with what trains."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from rankwise.rows import read_rows
from rankwise.types import UserError, show_prompt
from tasks.prompts import Files, Params, Paths, Sizes, run
from tasks.stage import Stage
from tasks.tables import TABLES, keys

SMALL = Sizes(sft=60, rollout=20, eval=10, labelled=15, labelled_test=5)


class Silent:
    """A tracker that hears nothing."""

    def metrics(self, *_, **__): ...
    def file(self, *_): ...


@pytest.fixture
def prompts(tmp_path):
    """Run the stage in tmp_path and return its tables and metrics."""

    def make(name="out", **params):
        paths = Paths(source=tmp_path / "source", prompts=tmp_path / name, report=tmp_path / "report")
        run(Params(**params), paths, Stage("prompts", tracker=Silent(), report=paths.report))
        tables = {table: read_rows(paths.prompts / f"{table}.parquet") for table in TABLES}
        return tables, json.loads((paths.report / "metrics.json").read_text())

    return make


@pytest.fixture
def source(tmp_path):
    def write(name, records):
        (tmp_path / "source").mkdir(exist_ok=True)
        text = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / "source" / name).write_text(text, encoding="utf-8")

    return write


def pairs(n, **more):
    return [{"id": f"r{i}", "prompt": f"Q {i}", "chosen": f"yes {i}", "rejected": "no", **more} for i in range(n)]


def texts(n, start=0):
    return [
        {
            "id": f"t{i}",
            "text": f"opening {i} of a text that is {'good' if i % 2 else 'bad'} from its first word to its last",
            "label": i % 2,
        }
        for i in range(start, start + n)
    ]


def bytes_of(folder: Path):
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


# The embedded corpus -------------------------------------------------------------------------------------------------


def test_the_embedded_corpus_fills_each_table_to_its_size(prompts):
    tables, metrics = prompts(embedded=SMALL)
    assert {name: len(rows) for name, rows in tables.items()} == {
        "sft": 60,
        "rollout": 20,
        "eval": 10,
        "labelled": 15,
        "labelled_test": 5,
        "preferences": 0,
    }
    assert metrics["labelled"]["rows_by_answers"] == {"2": 15}
    assert metrics["rollout"]["distinct_prompts"] == 20


def test_no_opening_of_eval_is_seen_in_training(prompts):
    tables, _ = prompts(embedded=replace(SMALL, sft=400, eval=60), opening_words=4)
    held = {show_prompt(row.prompt) for row in tables["eval"]}
    assert len(held) == 60
    for name in ("sft", "rollout"):
        assert held.isdisjoint(show_prompt(row.prompt) for row in tables[name])
    judged = [answer.text for row in tables["labelled"] for answer in row.answers]
    assert not any(text.startswith(tuple(f"{prompt} " for prompt in held)) for text in judged)


def test_more_prompts_than_openings_is_refused_with_what_to_change(prompts):
    with pytest.raises(UserError, match=r"too few different openings of 1 words.*raise prompts.opening_words"):
        prompts(embedded=replace(SMALL, rollout=200), opening_words=1)


def test_the_same_params_give_the_same_bytes_and_another_seed_others(prompts, tmp_path):
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prompts(name, embedded=SMALL, seed=seed)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")
    assert bytes_of(tmp_path / "a")["sft.parquet"] != bytes_of(tmp_path / "c")["sft.parquet"]


# Files ---------------------------------------------------------------------------------------------------------------


def test_the_order_of_a_file_does_not_change_the_tables(prompts, source, tmp_path):
    files = Files(preferences={"path": "p.jsonl", "limit": 20}, labelled={"path": "t.jsonl"})
    for name, order in (("a", 1), ("b", -1)):
        source("p.jsonl", pairs(40)[::order])
        source("t.jsonl", texts(30)[::order])
        prompts(name, source="files", files=files)
    assert bytes_of(tmp_path / "a") == bytes_of(tmp_path / "b")


def test_a_held_out_share_is_exact_and_every_row_is_accounted_for(prompts, source):
    source("p.jsonl", pairs(50))
    files = Files(sft={"path": "p.jsonl"}, preferences={"path": "p.jsonl"})
    tables, metrics = prompts(source="files", files=files, eval_share=0.2)
    assert (len(tables["eval"]), len(tables["preferences"]), len(tables["sft"])) == (10, 40, 40)
    assert sum(metrics["sft"]["left_out"].values()) == 10
    assert [[a.rank for a in row.answers] for row in tables["eval"]] == [[0, 1]] * 10


def test_no_group_and_no_prompt_straddles_train_and_eval(prompts, source):
    records = [{**record, "tree": i // 4, "prompt": f"Q {i % 70}"} for i, record in enumerate(pairs(80))]
    source("p.jsonl", records)
    entry = {"path": "p.jsonl", "group": "tree"}
    tables, _ = prompts(source="files", files=Files(sft=entry, rollout=entry, preferences=entry), eval_share=0.25)
    held = {key for row in tables["eval"] for key in keys(row)}
    assert held
    for name in ("sft", "rollout", "preferences"):
        assert tables[name]
        assert all(held.isdisjoint(keys(row)) for row in tables[name])


def test_a_role_takes_from_ranked_rows_what_it_needs(prompts, source):
    record = {"prompt": "Q", "answers": [{"text": "b", "rank": 1}, {"text": "a", "rank": 0}, {"text": "c", "rank": 1}]}
    source("k.jsonl", [record])
    entry = {"path": "k.jsonl"}
    tables, metrics = prompts(source="files", files=Files(sft=entry, rollout=entry, preferences=entry), eval_share=0.0)
    for name in ("sft", "rollout"):
        assert [(a.text, a.rank, a.source) for a in tables[name][0].answers] == [("a", None, "dataset")]
    assert [a.rank for a in tables["preferences"][0].answers] == [1, 0, 1]
    assert metrics["preferences"]["rows_by_answers"] == {"3": 1}
    assert metrics["preferences"]["rows_with_ties"] == 1


def test_labelled_texts_become_pairs_of_whole_texts_without_a_prompt(prompts, source):
    source("t.jsonl", texts(41))
    source("test.jsonl", texts(10, start=100))
    files = Files(labelled={"path": "t.jsonl"}, labelled_test={"path": "test.jsonl"})
    tables, metrics = prompts(source="files", files=files)
    whole = {record["text"]: record["label"] for record in texts(41)}
    used = [answer.text for row in tables["labelled"] for answer in row.answers]
    assert len(used) == len(set(used)) == 40
    assert all([whole[a.text] for a in row.answers] == [1, 0] for row in tables["labelled"])
    assert all(show_prompt(row.prompt) == "" and [a.rank for a in row.answers] == [0, 1] for row in tables["labelled"])
    assert metrics["labelled"]["left_out"] == {"text without a partner of the other label": 1}


def test_labels_that_do_not_occur_are_named(prompts, source):
    source("t.jsonl", texts(6))
    with pytest.raises(UserError, match=r"positive: 'pos'.*found \['0', '1'\]"):
        prompts(source="files", files=Files(labelled={"path": "t.jsonl", "positive": "pos"}), eval_share=0.0)


def test_rows_that_are_all_tied_are_counted_not_written(prompts, source):
    tied = {"id": "tie", "prompt": "T", "answers": [{"text": "a", "rank": 3}, {"text": "b", "rank": 3}]}
    good = {"id": "ok", "prompt": "G", "answers": [{"text": "a", "rank": 0}, {"text": "b", "rank": 1}]}
    source("k.jsonl", [tied, good])
    files = Files(preferences={"path": "k.jsonl"})
    tables, metrics = prompts(source="files", files=files, eval_share=0.0)
    assert [row.id for row in tables["preferences"]] == ["ok"]
    assert metrics["preferences"]["left_out"] == {"all answers tied": 1}
    source("k.jsonl", [tied])
    with pytest.raises(UserError, match=r"preferences would be empty .1 left out: all answers tied"):
        prompts(source="files", files=files, eval_share=0.0)


def test_a_limit_takes_rows_at_random_and_counts_the_others(prompts, source):
    source("p.jsonl", pairs(60))
    entry = {"path": "p.jsonl", "limit": 15}
    tables, metrics = prompts(source="files", files=Files(sft=entry, preferences=entry), eval_share=0.0)
    assert metrics["sft"]["left_out"] == {"over the limit": 45}
    assert {row.id for row in tables["sft"]} != {f"r{i}" for i in range(15)}


def test_a_killed_or_failed_run_leaves_the_old_tables(prompts, source, tmp_path):
    source("p.jsonl", pairs(10))
    files = Files(preferences={"path": "p.jsonl"})
    prompts(source="files", files=files)
    before = bytes_of(tmp_path / "out")
    source("p.jsonl", [*pairs(9), {"prompt": "broken"}])
    with pytest.raises(UserError):
        prompts(source="files", files=files)
    assert bytes_of(tmp_path / "out") == before


MISTAKES = {
    "no role": (Files(), "no role has a file"),
    "misspelt entry": (Files(sft={"path": "p.jsonl", "limits": 3}), "prompts.files.sft.limits.*did you mean 'limit'"),
    "no path": (Files(sft={"limit": 3}), "prompts.files.sft: path is missing"),
    "absolute path": (Files(sft={"path": "/p.jsonl"}), "is absolute"),
    "unanswered": (Files(sft={"path": "q.jsonl"}), "row .* is a prompt without an answer"),
    "unranked": (Files(preferences={"path": "q.jsonl"}), "nothing to rank"),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_in_files_says_what_to_change(name, prompts, source):
    source("p.jsonl", pairs(3))
    source("q.jsonl", [{"prompt": "Q"}, {"prompt": "R"}])
    files, message = MISTAKES[name]
    with pytest.raises(UserError, match=message):
        prompts(source="files", files=files)
