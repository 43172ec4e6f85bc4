"""What evaluate measures beside win rates: best-of-N and its KL, the data's own answers, perplexity."""

from __future__ import annotations

import math

import pytest
import tiny
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from rankwise.rows import read_rows


@pytest.fixture
def project(tmp_path_factory, tmp_path):
    return tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "project")


def evaluate(project, *options: str, **params):
    project.change({"evaluate": params})
    said = project.run("evaluate@1", *options)
    assert said.status == 0, said.err
    return project.metrics("evaluate"), read_rows(project.root / "data/evaluation.parquet")


OF_SFT = ("--policy", "models/sft", "--training", "reports/sft/metrics.json")


def test_the_model_against_itself_ties_everywhere(project):
    metrics, rows = evaluate(project, *OF_SFT)
    assert metrics["win_rate"]["judge"]["mean"] == 0.5 and metrics["kl"]["mean"] == 0.0
    assert all(row.answers[0].text == row.answers[1].text for row in rows)
    assert metrics["data_perplexity"]["policy"] == metrics["data_perplexity"]["reference"]
    assert "objective_e1" not in metrics, "without a β there is no E1"


def test_the_best_of_n_is_what_the_judge_scores_highest_and_its_kl_the_closed_form(project):
    """KL(best of N ‖ π) = log N − (N − 1)/N for draws of π without ties (Beirami et al. 2024)."""
    plain = evaluate(project, *OF_SFT)[0]
    metrics, rows = evaluate(project, *OF_SFT, best_of=6)
    assert metrics["kl"]["mean"] == pytest.approx(math.log(6) - 5 / 6)
    assert metrics["reward"]["policy"]["mean"] > plain["reward"]["policy"]["mean"]
    assert metrics["reward"]["reference"] == plain["reward"]["reference"], "one draw of the reference, as ever"
    # The draw that the reference answers with is no candidate: best of N would never lose against it.
    assert all(row.answers[0].seed != row.answers[1].seed for row in rows)


def test_the_best_of_more_is_no_worse(project):
    """The first draws of a prompt are the same ones, however many are asked for."""
    rewards = [evaluate(project, *OF_SFT, best_of=n)[0]["reward"]["policy"]["mean"] for n in (2, 4, 8)]
    assert rewards == sorted(rewards)


def test_best_of_n_of_a_trained_policy_adds_to_its_own_kl(project):
    """E[log π/π_ref] over the chosen answers, and log N − (N − 1)/N."""
    metrics, rows = evaluate(project, best_of=3)
    policy, reference = (by_hand(project.root / "models" / name, rows) for name in ("policy", "sft"))
    own = sum(a - b for (a, _), (b, _) in zip(policy, reference)) / len(rows)
    assert metrics["kl"]["mean"] == pytest.approx(own + math.log(3) - 2 / 3, abs=1e-4)


def test_perplexity_is_that_of_the_models_own_logits_on_the_first_tokens_of_the_data(project):
    metrics, _ = evaluate(project)
    prompts = read_rows(project.root / "data/prompts/eval.parquet")
    for name, folder in (("policy", "policy"), ("reference", "sft")):
        found = by_hand(project.root / "models" / folder, prompts, most=12)
        total, tokens = (sum(values) for values in zip(*found))
        assert metrics["data_perplexity"][name] == pytest.approx(math.exp(-total / tokens), rel=1e-4)


def test_both_models_are_compared_with_the_datas_own_text_where_that_is_asked_for(project):
    assert "win_rate_over_data" not in evaluate(project)[0]
    found = evaluate(project, against_data=True)[0]["win_rate_over_data"]
    assert set(found) == {"judge", "gold"} and set(found["gold"]) == {"policy", "reference"}
    same = evaluate(project, *OF_SFT, against_data=True)[0]["win_rate_over_data"]
    assert same["judge"]["policy"] == same["judge"]["reference"] == found["judge"]["reference"]


def test_best_of_n_without_a_judge_says_so(project):
    (project.root / "models/reward_model/config.json").unlink()
    project.change({"evaluate": {"best_of": 2}})
    assert "evaluate.best_of is 2" in project.run("evaluate@1").error


def by_hand(folder, rows, most: int | None = None) -> list[tuple[float, int]]:
    """Σ log p of each row's first answer and its tokens, by transformers alone, one sequence at a time."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)
    found = []
    for row in rows:
        prompt, answer = tokenizer(row.prompt[0].content)["input_ids"], row.answers[0]
        ids = answer.token_ids
        if ids is None:
            ids = [*tokenizer(row.prompt[0].content + answer.text)["input_ids"][len(prompt) :], tokenizer.eos_token_id]
        ids = list(ids[:most])
        with torch.no_grad():
            logp = model(torch.tensor([[*prompt, *ids]])).logits[0].double().log_softmax(-1)
        places = range(len(prompt) - 1, len(prompt) + len(ids) - 1)
        found.append((float(sum(logp[place, token] for place, token in zip(places, ids))), len(ids)))
    return found
