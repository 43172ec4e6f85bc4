"""Bad input gets one clear message and exit status 2, without a traceback, and destroys nothing that was computed."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny
import yaml

from rankwise.rows import read_rows, write_rows
from rankwise.store import Store
from tasks.tables import TABLES


@pytest.fixture
def project(tmp_path_factory, tmp_path) -> tiny.Project:
    return tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")


def kept(project: tiny.Project) -> dict[str, object]:
    """All that was computed: outputs by their bytes, row stores by how many rows they hold."""
    stores = {}
    for path in (project.root / ".rankwise/stores").glob("*.sqlite"):
        with Store(path) as store:
            stores[path.name] = len(store)
    return project.tree() | stores


def refused(project: tiny.Project, stage: str, *words: str, before: Callable[[], object] | None = None) -> None:
    """The stage ends with status 2 and one message that holds these words; all that was computed is as it was."""
    had = kept(project)
    error = project.run(stage, before=before).error
    assert all(word in error for word in words), f"expected {words}, found {error!r}"
    assert kept(project) == had


# Parameters


def edit(project: tiny.Project, change: Callable[[dict], object]) -> None:
    path = project.root / "params.yaml"
    params = yaml.safe_load(path.read_text())
    change(params)
    path.write_text(yaml.safe_dump(params))


PARAMETERS = {  # what is done to params.yaml, the stage that is run, words of its message
    "misspelt": (lambda p: p["dpo"].update(betta=0.1), "dpo", ("dpo.betta: no such parameter", "did you mean 'beta'?")),
    "misspelt, nested": (
        lambda p: p["evaluate"]["judge"].update(knd="callable"),
        "evaluate",
        ("evaluate.judge.knd", "did you mean 'kind'?"),
    ),
    "missing key": (lambda p: p["dpo"].pop("beta"), "dpo", ("dpo.beta: missing", "add `beta: 0.2`")),
    "missing section": (lambda p: p.pop("dpo"), "dpo", ("section 'dpo' is missing",)),
    "misspelt section": (
        lambda p: p.update(rolouts=p.pop("rollouts")),
        "rollouts",
        ("section 'rollouts' is missing", "did you mean 'rolouts'?"),
    ),
    "section of nothing": (lambda p: p.update(dpo=None), "dpo", ("dpo: a mapping was expected, found None",)),
    "wrong type": (lambda p: p["sft"].update(epochs="three"), "sft", ("sft.epochs: int was expected, found 'three'",)),
    "a fraction of an epoch": (lambda p: p["sft"].update(epochs=1.5), "sft", ("sft.epochs: int was expected",)),
    "yes is no number": (lambda p: p["dpo"].update(beta=True), "dpo", ("dpo.beta: float was expected, found True",)),
    "a number that YAML reads as text": (
        lambda p: p["dpo"].update(learning_rate="5e-7"),
        "dpo",
        ("dpo.learning_rate: float was expected, found '5e-7'", "write it with a point: 5.0e-07"),
    ),
    "out of range": (lambda p: p["dpo"].update(beta=0), "dpo", ("dpo.beta: must be greater than 0",)),
    "not a number": (lambda p: p["dpo"].update(beta=float("nan")), "dpo", ("dpo.beta", "nan")),
    "infinite": (lambda p: p["sft"].update(learning_rate=float("inf")), "sft", ("sft.learning_rate", "inf")),
    "no such choice": (
        lambda p: p["dpo"].update(loss="plackett-luce"),
        "dpo",
        ("dpo.loss: one of 'plackett_luce', 'soft_plackett_luce', 'pairwise', 'ipo', 'likelihood' was expected",),
    ),
    "unlikelihood in a loss without it": (
        lambda p: p["dpo"].update(unlikelihood=0.1),
        "dpo",
        ("dpo.unlikelihood is 0.1, which has no part in dpo.loss 'plackett_luce'",),
    ),
    "smoothing in a loss without it": (
        lambda p: p["dpo"].update(loss="ipo", label_smoothing=0.1),
        "dpo",
        ("dpo.label_smoothing is 0.1, which has no part in dpo.loss 'ipo'",),
    ),
    "K = 1": (lambda p: p["rollouts"].update(k=1), "rollouts", ("rollouts.k is 1 and there is no teacher",)),
    "a stop of nothing": (lambda p: p["rollouts"].update(stop=[""]), "rollouts", ('stop: "" is in every text',)),
    "a teacher without a name": (
        lambda p: p["rollouts"].update(teacher=tiny.TEACHER),
        "rollouts",
        ("rollouts.teacher.model: '' is no model", "RANKWISE_TEACHER_URL"),
    ),
    "a teacher whose tokens nobody knows, and their limit": (
        lambda p: p["rollouts"].update(
            teacher=tiny.TEACHER | {"engine": "server", "model": "big", "max_prompt_tokens": 9}
        ),
        "rollouts",
        ("rollouts.teacher.max_prompt_tokens is 9", "known to its server alone"),
    ),
    "a judge without a name": (
        lambda p: p["verdicts"]["judge"].update(kind="callable", function=""),
        "verdicts",
        ("verdicts.judge.function", "package.module:function"),
    ),
    "a misspelt judge": (
        lambda p: p["verdicts"]["judge"].update(kind="callable", function="recipes.judges:dialog"),
        "verdicts",
        ("judge 'recipes.judges:dialog' cannot be imported", "dialog"),
    ),
    "a judge of no module": (
        lambda p: p["evaluate"]["gold"].update(function="recipes.juges:dialogue"),
        "evaluate",
        ("judge 'recipes.juges:dialogue' cannot be imported",),
    ),
    "a judge model that is not there": (
        lambda p: p["verdicts"]["judge"].update(model="my-judge"),
        "verdicts",
        ("verdicts.judge.model: 'my-judge' is no model", "put the folder into data/source"),
    ),
    "a rubric that is not there": (
        lambda p: p["verdicts"]["judge"].update(kind="local_llm", rubric="recipes/rubrics/none.md"),
        "verdicts",
        ("recipes/rubrics/none.md",),
    ),
    "a gate on no metric": (
        lambda p: p["register"].update(at_least={"win_rate.juge.low": 0.5}),
        "register",
        ("win_rate.juge.low", "did you mean 'win_rate.judge.low'?"),
    ),
    "adapters for no module": (
        lambda p: p["dpo"]["lora"].update(rank=4, targets=["q_prj"]),
        "dpo",
        ("lora.targets ['q_prj']",),
    ),
    "an adapter on the output head": (
        lambda p: p["dpo"]["lora"].update(rank=4, targets=["q_proj", "lm_head"]),
        "dpo",
        ("lm_head is the output head",),
    ),
    "nothing to train on after holding out": (
        lambda p: p["sft"].update(held_out=120),
        "sft",
        ("120 rows, of which sft.held_out keeps 120",),
    ),
}


@pytest.mark.parametrize("mistake", PARAMETERS)
def test_a_mistake_in_params(project, mistake):
    change, stage, words = PARAMETERS[mistake]
    edit(project, change)
    refused(project, stage, *words)


def test_no_params_file(project):
    (project.root / "params.yaml").unlink()
    refused(project, "sft", "params.yaml: no such file")


def test_params_that_are_no_yaml(project):
    (project.root / "params.yaml").write_text("dpo:\n  beta: 0.1\n bad: [\n")
    refused(project, "dpo", "params.yaml: not readable as YAML", "line 3")


# Tables


READ_BY = {  # a table, and a stage that reads it
    "data/prompts/sft.parquet": "sft",
    "data/prompts/labelled.parquet": "reward_model",
    "data/prompts/eval.parquet": "evaluate",
    "data/rollouts.parquet": "verdicts",
    "data/verdicts.parquet": "preferences",
    "data/preferences.parquet": "reference_logprobs",
    "data/reference_logprobs.parquet": "dpo",
}


@pytest.mark.parametrize("table", READ_BY)
def test_a_missing_table(project, table):
    (project.root / table).unlink()
    refused(project, READ_BY[table], f"{table}: no such table; run the stage that makes it first")


@pytest.mark.parametrize("table", READ_BY)
def test_a_table_cut_short(project, table):
    path = project.root / table
    path.write_bytes(path.read_bytes()[:-100])
    refused(project, READ_BY[table], f"{table}: not a readable Parquet file")


@pytest.mark.parametrize("table", [table for table in READ_BY if "verdicts" not in table and "logprobs" not in table])
def test_an_empty_table(project, table):
    """Rollouts may be empty, for imported preferences: then it is what follows that has nothing to do."""
    write_rows(project.root / table, [])
    stage = READ_BY[table]
    if stage == "verdicts":
        assert project.run("verdicts").status == 0
        stage = "preferences"
    refused(project, stage, table)


def test_a_table_of_something_else(project):
    shutil.copy(project.root / "data/verdicts.parquet", project.root / "data/preferences.parquet")
    refused(project, "reference_logprobs", "data/preferences.parquet: columns", "not a table of rows")


def test_verdicts_of_other_rollouts(project):
    """Answers without a verdict are counted, never taken for ties or for the worst."""
    table = pq.read_table(project.root / "data/verdicts.parquet")
    pq.write_table(table.slice(0, 8), project.root / "data/verdicts.parquet")
    refused(project, "preferences", "22 of 24 rows")


def test_all_answers_tied(project):
    (project.root / "recipes/judges.py").write_text("def score(prompt, answer):\n    return 0.0\n")
    project.change({"verdicts": {"judge": tiny.JUDGE | {"kind": "callable", "function": "recipes.judges:score"}}})
    assert project.run("verdicts").status == 0
    refused(project, "preferences", "all answers tie in 24 of 24 rows", "a tie teaches nothing")


@pytest.mark.parametrize("reply", ["float('nan')", "None", "'good'", "1 / 0"])
def test_a_judge_function_that_gives_no_score(project, reply):
    (project.root / "recipes/judges.py").write_text(f"def score(prompt, answer):\n    return {reply}\n")
    project.change({"verdicts": {"judge": tiny.JUDGE | {"kind": "callable", "function": "recipes.judges:score"}}})
    refused(project, "verdicts", "nan" if "nan" in reply else "judge 'recipes.judges:score' gave no score", "'review-")


# Sources


def from_file(project: tiny.Project, name: str, text: str) -> None:
    (project.root / "data/source" / name).write_text(text)
    project.change({"prompts": {"source": "files", "files": {role: {} for role in TABLES} | {"sft": {"path": name}}}})


def test_a_broken_json_line(project):
    from_file(project, "mine.jsonl", '{"prompt": "a", "completion": "b"}\n{"prompt": "c", "completion": \n')
    refused(project, "prompts", "data/source/mine.jsonl:2: one JSON object was expected", "at column")


def test_a_source_that_is_not_there(project):
    from_file(project, "mine.jsonl", "")
    edit(project, lambda p: p["prompts"]["files"].update(sft={"path": "mein.jsonl"}))
    refused(project, "prompts", "data/source/mein.jsonl: no such file or folder", "did you mean 'mine.jsonl'?")


def test_an_empty_source(project):
    from_file(project, "mine.jsonl", "")
    refused(project, "prompts", "data/source/mine.jsonl: empty")


def test_columns_of_no_shape(project):
    from_file(project, "mine.jsonl", '{"promt": "a", "completon": "b"}\n')
    refused(project, "prompts", "fit no known shape", "did you mean columns: {promt: prompt")


# Models and tokenizers


def offered(project: tiny.Project) -> Path:
    """A model in data/source, ready to be spoilt, that base_model is told to take."""
    folder = project.root / "data/source/mine"
    shutil.copytree(project.root / "models/base", folder)
    project.change({"base_model": {"source": "mine"}})
    return folder


def edit_json(path: Path, **values: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


def test_a_model_that_is_not_there(project):
    project.change({"base_model": {"source": "mine"}})
    refused(project, "base_model", "'mine' is neither a folder below data/source nor a hub id")


def test_a_model_of_the_hub_without_the_network(project):
    project.change({"base_model": {"source": "someone/model"}})
    refused(project, "base_model", "base_model.source: 'someone/model'", "the hub did not give it")


def test_a_tokenizer_without_eos(project):
    edit_json(offered(project) / "tokenizer_config.json", eos_token=None)
    refused(project, "base_model", "the tokenizer has no EOS token", "tokenizer_config.json")


def test_a_pad_token_that_is_eos_is_harmless(project):
    edit_json(offered(project) / "tokenizer_config.json", pad_token="</s>")
    project.run_all(first="base_model")
    assert project.metrics("doctor")["tokenizer"]["pad_is_eos"] is True
    assert project.metrics("dpo")["start_loss"] == pytest.approx(project.metrics("dpo")["start_loss_expected"])


def test_a_tokenizer_of_another_model(project):
    config = json.loads((path := offered(project) / "tokenizer.json").read_text())
    more = {**config["added_tokens"][-1], "id": 400, "content": "<more>"}
    path.write_text(json.dumps({**config, "added_tokens": [*config["added_tokens"], more]}))
    refused(project, "base_model", "the tokenizer has 401 tokens, the model embeds 400")


def test_weights_as_a_pickle(project):
    import torch
    from safetensors.torch import load_file

    folder = offered(project)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    refused(project, "base_model", ".bin files are pickles and are refused: convert them to safetensors")


@pytest.mark.parametrize("spoil", ["weights", "config", "tokenizer"])
def test_a_model_folder_cut_short(project, spoil):
    folder = offered(project)
    path = folder / {"weights": "model.safetensors", "config": "config.json", "tokenizer": "tokenizer.json"}[spoil]
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    refused(project, "base_model", "data/source/mine: ")


def test_a_missing_model(project):
    shutil.rmtree(project.root / "models/sft")
    for stage in ("reward_model", "rollouts", "reference_logprobs", "dpo"):
        error = project.run(stage).error
        assert "models/sft" in error and "hub" not in error.split(";")[0], error


def test_a_prompt_longer_than_the_context_stops_at_the_doctor(project):
    edit_json(project.root / "models/base/config.json", max_position_embeddings=16)
    error = project.run("doctor").error
    assert "prompt_over_context in rollout" in error and "first rows: review-" in error


def test_a_prompt_longer_than_the_context_is_named_by_rollouts_too(project):
    edit_json(project.root / "models/sft/config.json", max_position_embeddings=16)
    refused(project, "rollouts", "cannot be answered by a model with a context of 16 tokens", "review-")


# Answers that are not worth a judge's time


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"temperature": 0.0}, ("100.0% of 96 answers by the policy, the first of each", "Raise rollouts.temperature")),
        ({"stop": [*map(chr, range(32, 127))]}, ("empty or blank, more than rollouts.max_empty_share = 5.0%", ".stop")),
        ({"max_cut_share": 0.1}, ("were cut at rollouts.max_new_tokens = 12", "Raise max_new_tokens")),
    ],
    ids=["all alike", "empty", "cut"],
)
def test_answers_that_nobody_can_rank_stop_the_run_once_they_are_reported(project, change, words):
    project.change({"rollouts": change})
    error = project.run("rollouts").error
    assert all(word in error for word in words), error
    told = project.metrics("rollouts")
    assert max(told[f"{name}_share"] for name in ("duplicate", "empty", "cut")) > 0.5


# Servers


def served(project: tiny.Project, **environment: str) -> tiny.Said:
    project.change({"rollouts": {"engine": "server"}})
    environment = {f"RANKWISE_ROLLOUTS_{name}": value for name, value in environment.items()}
    return project.run("rollouts", before=tiny.told_that(**environment))


def test_a_server_that_is_away_is_worth_another_try(project):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        told = served(project, URL=f"http://127.0.0.1:{closed.getsockname()[1]}/v1")
    assert told.status == os.EX_TEMPFAIL and told.err.count("\nerror: nothing answers at http://127.0.0.1:") == 1
    assert "Traceback" not in told.out + told.err


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"URL": "http://HOST:PORT/v1"}, "RANKWISE_ROLLOUTS_URL is 'http://HOST:PORT/v1'"),
        ({"URL": "http://127.0.0.1:9/v1", "CONCURRENCY": "inf"}, "RANKWISE_ROLLOUTS_CONCURRENCY is 'inf'"),
    ],
)
def test_a_server_that_is_told_of_wrongly_is_a_mistake(project, environment, words):
    assert words in served(project, **environment).error


# What belongs together


def test_a_reference_of_another_model(project):
    project.change({"sft": {"learning_rate": 0.02}})
    assert project.run("sft").status == 0
    refused(project, "dpo", "data/reference_logprobs.parquet: its log-probabilities are of weights", "run stage")


def test_a_reference_in_another_precision(project):
    project.change({"dpo": {"precision": "bf16"}})
    refused(project, "dpo", "dpo.precision is 'bf16', the reference was computed in 'fp32'")


def test_a_reference_of_other_rows(project):
    project.change({"preferences": {"tie_below": 0.02}})
    assert project.run("preferences").status == 0
    path = project.root / "data/reference_logprobs.parquet"
    pq.write_table(pq.read_table(path).slice(3), path)
    refused(project, "dpo", "3 of 24 rows have no reference log-probability", "review-")


def sampled_elsewhere(project: tiny.Project, nats: float, **meta: str) -> None:
    """Preferences as if the log-probs of their sampling had been others."""
    path = project.root / "data/preferences.parquet"
    other = lambda a: replace(a, logps=tuple(logp + nats for logp in a.logps))
    rows = [replace(r, answers=tuple(map(other, r.answers)), meta={**r.meta, **meta}) for r in read_rows(path)]
    write_rows(path, rows)


@pytest.mark.parametrize("nats", [-0.2, 0.2])
def test_answers_of_other_weights_than_the_reference_they_claim(project, nats):
    """A server that was not restarted after SFT: its log-probs are not the reference's."""
    sampled_elsewhere(project, nats)
    error = project.run("reference_logprobs").error
    assert "differ by 0.2 nats a token over " in error and "what sampled them was not models/sft" in error
    assert project.metrics("reference_logprobs")["sampling_gap_max"] == pytest.approx(0.2, abs=1e-3)


def test_answers_that_do_not_claim_to_be_the_references_are_not_held_against_it(project):
    """Another round's policy, a teacher, a prompt cut elsewhere; and what an engine's rounding explains."""
    sampled_elsewhere(project, 0.2, sampled_from="other weights, or after another prompt")
    assert project.run("reference_logprobs").status == 0
    assert "sampling_gap_mean" not in project.metrics("reference_logprobs")
    assert project.run("preferences").status == 0
    sampled_elsewhere(project, 0.05)
    assert project.run("reference_logprobs").status == 0


def test_a_policy_that_is_not_its_reference_at_the_start(project):
    path = project.root / "data/reference_logprobs.parquet"
    table = pq.read_table(path)
    records = [{**record, "logps": [logp - 1.0 for logp in record["logps"]]} for record in table.to_pylist()]
    pq.write_table(pa.Table.from_pylist(records, schema=table.schema), path)
    refused(project, "dpo", "the policy is not its reference at step 0", "nats a token")


def checkpointed(project: tiny.Project) -> Path:
    """The checkpoint of an sft run that was killed."""
    death = tiny.killed_at("rankwise.training:_Run._step", 5, first=tiny.checkpoint_before(4))
    assert project.run("sft", before=death).status < 0
    [path] = (project.root / ".rankwise/checkpoints/sft").glob("*/state.safetensors")
    return path


def test_a_checkpoint_of_another_model(project):
    from rankwise.checkpoints import load_state, save_state

    path = checkpointed(project)
    tensors, notes = load_state(path)
    save_state(path, {name: tensor[..., :1].clone() for name, tensor in tensors.items() if tensor.dim()}, notes)
    refused(project, "sft", str(path.relative_to(project.root)), "the checkpoint is of another model", "delete it")


def test_a_damaged_checkpoint(project):
    path = checkpointed(project)
    path.write_bytes(path.read_bytes()[:1000])
    refused(project, "sft", str(path.relative_to(project.root)), "not a readable checkpoint", "delete it and run again")


def test_a_damaged_store(project):
    (project.root / ".rankwise/stores/rollouts.sqlite").write_bytes(b"no database" * 100)
    had = project.tree()
    assert "rollouts.sqlite: not usable as a row store" in project.run("rollouts").error
    assert project.tree() == had


# The machine


@contextlib.contextmanager
def small_disk(project: tiny.Project, name: str, options: str) -> Iterator[Path]:
    """A folder of the project on a disk of its own, with all that is in it."""
    folder = project.root / name
    moved = folder.with_name(f"{folder.name}-before")
    folder.rename(moved)
    folder.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", options, "tmpfs", folder], capture_output=True).returncode:
        pytest.skip("no permission to mount a small disk here")
    try:
        shutil.copytree(moved, folder, dirs_exist_ok=True, symlinks=True)
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Take the free space of a disk, but for some bytes."""
    stats = os.statvfs(folder)
    (folder / "ballast").write_bytes(b"\0" * (stats.f_bavail * stats.f_frsize - leave))


FULL = [("sft", "models"), ("rollouts", "data"), ("rollouts", ".rankwise"), ("rollouts", "reports")]


@pytest.mark.parametrize(("stage", "folder"), FULL)
def test_a_full_disk(project, stage, folder):
    project.change({stage: {"seed": 7}})
    with small_disk(project, folder, "size=3m") as disk:
        fill(disk, leave=8192)
        had = project.tree("data", "models")
        error = project.run(stage).error
        assert "space" in error.lower() or "full" in error, error
        assert project.tree("data", "models").items() >= had.items() or stage == "rollouts"
        (disk / "ballast").unlink()
        assert project.run(stage).status == 0, "mended, the same command goes on"


@pytest.mark.parametrize(("stage", "folder"), FULL[:3])
def test_a_disk_that_may_not_be_written(project, stage, folder):
    project.change({stage: {"seed": 7}})
    with small_disk(project, folder, "size=3m") as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        had = project.tree("data", "models")
        error = project.run(stage).error
        assert "ead-only" in error or "readonly" in error, error
        assert project.tree("data", "models") == had


def test_a_second_process_of_the_same_stage(project):
    tree = hashlib.sha256(os.fsencode(project.root)).hexdigest()[:12]
    with open(project.root / f".rankwise/locks/sft-reports-sft-{tree}.lock", "w") as handle:
        fcntl.flock(handle, fcntl.LOCK_EX)
        handle.write("4321")
        handle.flush()
        refused(project, "sft", "stage sft is already being run here by process 4321")


def test_a_loss_that_is_not_finite_names_its_rows(project):
    project.change({"sft": {"learning_rate": 1e30, "max_grad_norm": 0.0}})
    refused(project, "sft", "not finite at step", "rows: review-", "a lower learning_rate")


def test_an_own_defect_keeps_its_traceback(project):
    """The other side: what no user can mend is not dressed up as a mistake of theirs."""
    told = project.run("sft", before=functools.partial(tiny.broken, "tasks.training:fit"))
    assert told.status == 1 and "Traceback" in told.err and "ZeroDivisionError" in told.err
