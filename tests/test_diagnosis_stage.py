"""Laws of stage diagnosis, on the tiny pipeline: its numbers are those of the models, and of stage dpo."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import tiny

from rankwise.rows import read_rows, read_table, write_rows

PAGES = ("diagnosis.md", "diagnosis.html")


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tiny.Project:
    """The pipeline after one whole run. Copy it, do not change it."""
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture
def project(done, tmp_path) -> tiny.Project:
    return done.copy(tmp_path / "copy")


def logps(model, tokenizer, row) -> list[float]:
    """Σ log π of each answer of a row, by transformers' own logits, one sequence at a time."""
    import torch

    prompt = tokenizer(row.prompt[0].content)["input_ids"]
    found = []
    for answer in row.answers:
        ids = list(answer.token_ids)
        logits = model(torch.tensor([[*prompt, *ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        found.append(logits[range(len(ids)), ids].sum().item())
    return found


def test_its_numbers_are_those_of_the_models_own_logits(done):
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    models = done.root / "models"
    tokenizer = AutoTokenizer.from_pretrained(models / "sft")
    rows = read_rows(done.root / "data/preferences.parquet")
    with torch.inference_mode():
        policy, reference = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("policy", "sft"))
        changes = {row.id: np.subtract(logps(policy, tokenizer, row), logps(reference, tokenizer, row)) for row in rows}
    metrics = done.metrics("diagnosis")
    assert metrics["rows"] == len(rows)
    for split in ("train", "held_out"):
        mine = [row for row in rows if row.meta["split"] == split]
        h = [changes[row.id] for row in mine]
        n = [np.array([len(answer.token_ids) for answer in row.answers]) for row in mine]
        s = [0.2 * h_K * n_K.mean() / n_K for h_K, n_K in zip(h, n)]  # dpo.length_normalised
        found = metrics[split]
        close = lambda value: pytest.approx(value, abs=2e-4)
        for unit, values in (("per_answer", h), ("per_token", [a / b for a, b in zip(h, n)]), ("in_loss", s)):
            told = {name: one["mean"] for name, one in found[unit].items() if isinstance(one, dict)}
            assert told["chosen"] == close(np.mean([v[0] for v in values]))
            assert told["rejected"] == close(np.mean([v[-1] for v in values]))
            assert told["margin"] == close(np.mean([v[0] - v[-1] for v in values]))
            assert told["common"] == close(np.mean([v.mean() for v in values]))
            assert told["spread"] == close(np.mean([v.std() for v in values]))
        assert found["kl"]["mean"] == close(-np.mean([v.mean() for v in h])) and found["drawn"] == 1
        both_down = np.mean([v[0] < 0 and v[-1] < 0 for v in h])
        assert found["cases"]["both down"] == pytest.approx(both_down, abs=1 / len(h))


def test_on_held_out_rows_it_says_what_stage_dpo_measured(done):
    dpo, found = done.metrics("dpo"), done.metrics("diagnosis")["held_out"]
    close = lambda value: pytest.approx(value, abs=1e-4)
    assert found["rows"] == dpo["held_out_rows"]
    assert found["per_answer"]["chosen"]["mean"] == close(dpo["held_out_chosen_logp_change"])
    assert found["per_answer"]["rejected"]["mean"] == close(dpo["held_out_rejected_logp_change"])
    assert found["kl"]["mean"] == close(dpo["held_out_kl_from_reference"])
    assert found["accuracy"]["mean"] == close(dpo["held_out_accuracy"])


def test_a_policy_that_is_its_reference_moved_nothing(project):
    shutil.rmtree(project.root / "models/policy")
    shutil.copytree(project.root / "models/sft", project.root / "models/policy")
    assert project.run("diagnosis").status == 0
    found = project.metrics("diagnosis")["train"]
    assert abs(found["per_token"]["common"]["mean"]) < 1e-5
    assert "Nothing has moved" in (project.root / "reports/diagnosis/diagnosis.md").read_text()


def test_the_pages_are_whole_and_name_the_rows(done):
    rows = {row.id for row in read_rows(done.root / "data/preferences.parquet")}
    listed = done.metrics("diagnosis")["contradicted"]
    for name in PAGES:
        text = (done.root / "reports/diagnosis" / name).read_text()
        assert "Is that normal?" in text and "Definitions" in text
        assert sum(row in text for row in rows) >= min(listed, 12)


SETTINGS = {
    "ipo": {"loss": "ipo"},
    "soft labels": {"loss": "soft_plackett_luce", "label_smoothing": 0.1},
    "plain sums": {"length_normalised": False},
}


@pytest.mark.parametrize("setting", SETTINGS)
def test_every_loss_can_be_diagnosed(project, setting):
    """Weights are those of the default: what is asked is that the settings are read, not what they learn."""
    project.change({"dpo": SETTINGS[setting]})
    told = project.run("diagnosis")
    assert told.status == 0, told.err
    assert "Warning" not in told.err


def test_ragged_rows_without_strengths_or_held_out_ones(project):
    """As offline preferences are: two or three answers a row, tied at the bottom, ranked by nobody known."""
    rows = read_rows(project.root / "data/preferences.parquet")
    changed = []
    for number, row in enumerate(rows):
        some = row.answers[: 2 + number % 2]
        plain = tuple(replace(a, rank=min(n, 1), strength=None, strength_se=None) for n, a in enumerate(some))
        changed.append(replace(row, answers=plain, meta={"split": "train"}))
    write_rows(project.root / "data/preferences.parquet", changed)
    project.run_all(first="reference_logprobs", last="diagnosis")
    found = project.metrics("diagnosis")
    assert "held_out" not in found and found["by_gap"] == {} and found["train"]["drawn"] == 0
    assert set(found["change_by_rank"]) == {"0", "1"}
    assert "By the judge" not in (project.root / "reports/diagnosis/diagnosis.md").read_text()


def test_fewer_training_rows_may_be_looked_at(project):
    held_out = project.metrics("diagnosis")["held_out"]
    project.change({"diagnosis": {"training_rows": 5}})
    assert project.run("diagnosis").status == 0
    found = project.metrics("diagnosis")
    assert found["train"]["rows"] == 5 and found["held_out"]["rows"] == held_out["rows"]


# Bad input


def test_a_reference_table_of_other_weights_is_refused(project):
    shutil.rmtree(project.root / "models/sft")
    shutil.copytree(project.root / "models/policy", project.root / "models/sft")
    said = project.run("diagnosis").error
    assert "data/reference_logprobs.parquet: its log-probabilities are of weights" in said and "run stage" in said


def test_a_policy_with_another_vocabulary_is_refused(project):
    path = project.root / "models/policy/tokenizer.json"
    tokenizer = json.loads(path.read_text(encoding="utf-8"))
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary |= {"a": vocabulary["b"], "b": vocabulary["a"]}
    path.write_text(json.dumps(tokenizer), encoding="utf-8")
    said = project.run("diagnosis").error
    assert "models/policy has another vocabulary than its reference models/sft" in said and "dvc repro dpo" in said


def test_a_missing_policy_is_named(project):
    shutil.rmtree(project.root / "models/policy")
    assert "models/policy" in project.run("diagnosis").error


def test_rows_that_the_reference_never_saw_are_refused(project):
    rows = read_rows(project.root / "data/preferences.parquet")
    turned = replace(rows[0], answers=rows[0].answers[::-1])
    write_rows(project.root / "data/preferences.parquet", [turned, *rows[1:]])
    assert f"1 of {len(rows)} rows have no reference log-probability" in project.run("diagnosis").error


def test_weights_that_are_no_numbers_are_refused(project):
    import torch
    from safetensors.torch import load_file, save_file

    path = project.root / "models/policy/model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = torch.full_like(weights["model.norm.weight"], float("nan"))
    save_file(weights, path, metadata={"format": "pt"})
    said = project.run("diagnosis").error
    assert "models/policy: its log-probabilities are no finite numbers" in said and "train it again" in said


def test_a_table_of_no_rows_is_refused(project):
    table = read_table(project.root / "data/preferences.parquet")
    assert table.num_rows
    write_rows(project.root / "data/preferences.parquet", [])
    assert "data/preferences.parquet" in project.run("diagnosis").error
