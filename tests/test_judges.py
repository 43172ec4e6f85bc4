"""Switching judges is a change of params alone: from verdicts to preferences to evaluation, whoever judges."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import tiny

from rankwise.corpus import draft as review
from rankwise.corpus import ground_truth
from rankwise.rows import read_rows, read_table, write_rows
from rankwise.types import Answer, Row, show_prompt, text_prompt
from tasks.tables import keys

TRUTH = {"kind": "callable", "function": "rankwise.corpus:ground_truth"}
# Judges of the user's own, as a file in the project.
JUDGES = """
from rankwise.corpus import ground_truth

def inverted(prompt, answer):
    return -ground_truth(prompt, answer)

def words(prompt, answer):
    return len(answer.split())

def from_data(prompt, answer):
    return weight() * ground_truth(prompt, answer)

def weight():
    return float(open("data/source/weight.txt").read())

from_data.identity = lambda: str(weight())
"""


def judge(**values: object) -> dict:
    """One judge's section of params.yaml."""
    return {**tiny.JUDGE, **values}


@pytest.fixture
def project(tmp_path_factory, tmp_path) -> tiny.Project:
    made = tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")
    (made.root / "recipes/own.py").write_text(JUDGES)
    return made


@pytest.fixture
def written(project) -> tiny.Project:
    """With answers that mean something: reviews of the corpus; the tiny policy's own are babble that truth scores 0."""
    texts = [review(1, index).text for index in range(2000)]
    told = [text for text in texts if ground_truth("", text) != 0]
    rows = [
        replace(row, answers=tuple(Answer(text=f" {told[4 * n + k]}") for k in range(4)))
        for n, row in enumerate(read_rows(project.root / "data/prompts/rollout.parquet"))
    ]
    write_rows(project.root / "data/rollouts.parquet", rows)
    return project


def judged(project: tiny.Project, **values: object) -> list[Row]:
    """The preferences that a judge leads to."""
    project.change({"verdicts": {"judge": judge(**values)}})
    project.run_all(first="verdicts", last="preferences")
    return read_rows(project.root / "data/preferences.parquet")


def pairs_right(rows: list[Row]) -> float:
    """Share of the ranked pairs that ground truth orders alike; pairs that tie for either are left out."""
    outcomes = []
    for row in rows:
        scores = [ground_truth(show_prompt(row.prompt), answer.text) for answer in row.answers]
        for a, first in enumerate(row.answers):
            for b, second in enumerate(row.answers):
                if first.rank < second.rank and scores[a] != scores[b]:
                    outcomes.append(scores[a] > scores[b])
    assert len(outcomes) > 20
    return sum(outcomes) / len(outcomes)


def local_model(project: tiny.Project, name: str = "llm") -> str:
    """A language model in data/source that can say A and B (with weights that prefer whatever they prefer)."""
    shutil.copytree(project.root / "models/sft", project.root / "data/source" / name)
    return name


# From verdicts to preferences


def test_a_judge_that_knows_makes_right_preferences(written):
    assert pairs_right(judged(written, **TRUTH)) == 1.0


def test_a_judge_that_is_wrong_makes_wrong_ones(written):
    """The direction of a score is not lost anywhere on the way."""
    assert pairs_right(judged(written, kind="callable", function="recipes.own:inverted")) == 0.0


def test_answers_are_ranked_by_their_scores_and_equal_scores_tie(project):
    for row in judged(project, kind="callable", function="recipes.own:words"):
        words = [len(answer.text.split()) for answer in row.answers]
        assert words == sorted(words, reverse=True)
        assert [answer.rank for answer in row.answers] == [words.index(count) for count in words]
        mean = sum(words) / len(words)
        assert [answer.strength for answer in row.answers] == pytest.approx([count - mean for count in words])


def test_a_reward_model_of_the_users_own_is_the_same_judge_as_the_trained_one(project):
    expected = project.tree("data/verdicts.parquet", "data/preferences.parquet")
    shutil.copytree(project.root / "models/reward_model", project.root / "data/source/mine")
    told = judged(project, model="mine")
    assert len(told) == 24
    assert project.tree("data/verdicts.parquet", "data/preferences.parquet") == expected
    assert "0 verdicts asked now" in (project.root / "logs/verdicts.out").read_text(), "the same weights: known"


def test_a_language_model_is_asked_about_every_pair_in_both_orders(project):
    rows = judged(project, kind="local_llm", model=local_model(project))
    asked = read_table(project.root / "data/verdicts.parquet").to_pylist()
    shown = {(verdict["row_id"], verdict["i"], verdict["j"]) for verdict in asked}
    assert all((row_id, j, i) in shown for row_id, i, j in shown)
    assert all(0 < verdict["mass"] <= 1 for verdict in asked)
    assert len(rows) == 24 and all(answer.strength is not None for row in rows for answer in row.answers)
    biases = [
        (one["value"] + other["value"]) / 2
        for one in asked
        for other in asked
        if one["row_id"] == other["row_id"] and (one["i"], one["j"]) == (other["j"], other["i"]) and one["i"] < one["j"]
    ]
    assert project.metrics("preferences")["position_bias_mean"] == pytest.approx(sum(biases) / len(biases))


def test_another_rubric_is_another_judge(project):
    name = local_model(project)
    judged(project, kind="local_llm", model=name)
    (project.root / "recipes/rubrics/other.md").write_text("Prefer the shorter review. Say A or B.")
    judged(project, kind="local_llm", model=name, rubric="recipes/rubrics/other.md")
    assert " 0 known before" in (project.root / "logs/verdicts.out").read_text()


def test_what_a_function_depends_on_beside_its_file_is_part_of_the_judge(written):
    """A fitted model or a data file, named by the function's identity: other data, other verdicts."""
    weight = written.root / "data/source/weight.txt"
    for value, right in (("1.0", 1.0), ("-1.0", 0.0), ("1.0", 1.0)):
        weight.write_text(value)
        assert pairs_right(judged(written, kind="callable", function="recipes.own:from_data")) == right


def test_switching_back_asks_nothing_again(project):
    expected = project.tree("data/verdicts.parquet")
    judged(project, kind="callable", function="recipes.own:words")
    assert project.tree("data/verdicts.parquet") != expected
    judged(project)
    assert project.tree("data/verdicts.parquet") == expected
    assert "0 verdicts asked now" in (project.root / "logs/verdicts.out").read_text()


# To the evaluation


def evaluated(project: tiny.Project, **changes: object) -> dict:
    project.change({"evaluate": changes})
    told = project.run("evaluate")
    assert told.status == 0, told.err
    return project.metrics("evaluate")


def test_without_gold_there_are_no_gold_numbers(project):
    metrics = evaluated(project, gold=None)
    assert set(metrics["win_rate"]) == {"judge"} and "reward" in metrics
    assert not {"gold_reward", "positive_share", "judge_agrees_with_gold"} & set(metrics)


def test_a_pairwise_judge_gives_a_win_rate_and_no_reward(project):
    metrics = evaluated(project, judge=judge(kind="local_llm", model=local_model(project)))
    assert set(metrics["win_rate"]) == {"judge", "gold"}
    assert "reward" not in metrics and "objective_e1" not in metrics
    assert set(metrics["judge_agrees_with_gold"]) == {"pairs"}


def test_a_judge_that_is_gold_agrees_with_itself(project):
    words = judge(kind="callable", function="recipes.own:words")
    metrics = evaluated(project, judge=words, gold=words)
    assert metrics["win_rate"]["judge"] == metrics["win_rate"]["gold"]
    assert metrics["judge_agrees_with_gold"] == {"pairs": 1.0, "correlation": pytest.approx(1.0)}


def test_a_policy_that_is_its_reference_wins_half_and_has_no_kl(project):
    shutil.rmtree(project.root / "models/policy")
    shutil.copytree(project.root / "models/sft", project.root / "models/policy")
    metrics = evaluated(project)
    assert metrics["kl"]["mean"] == 0
    assert {name: found["mean"] for name, found in metrics["win_rate"].items()} == {"judge": 0.5, "gold": 0.5}
    assert metrics["reward"]["policy"] == metrics["reward"]["reference"]


def test_reports_of_an_earlier_judge_do_not_linger(project):
    """Plots of a judge that is gone would be read as those of this run."""
    plots = project.root / "reports/evaluate/plots"
    assert (plots / "gold_rewards.png").exists()
    evaluated(project, gold=None)
    assert not (plots / "gold_rewards.png").exists() and (plots / "judge_rewards.png").exists()


# Offline: no rollouts, no judge


def offline(root: Path, records: list[dict], **changes: dict) -> tiny.Project:
    """A project that trains on given preferences alone."""
    overlay = {
        **tiny.TINY,
        "prompts": {
            "source": "files",
            "eval_share": 0.2,
            "files": {role: {"path": "mine.jsonl"} for role in ("sft", "preferences")},
        },
        "sft": {**tiny.TINY["sft"], "held_out": 2},
        "reward_model": {"enabled": False},
        "evaluate": {"max_new_tokens": 8, "gold": None},
        "register": {"at_least": {"preference_accuracy": 0.0}},
        "doctor": {"stop_above": {"duplicate_prompts": 1.0, "length_bias": 1.0}},
        **changes,
    }
    project = tiny.Project(root, overlay)
    lines = "\n".join(json.dumps(record) for record in records)
    (project.root / "data/source/mine.jsonl").write_text(lines + "\n")
    return project


def test_pairs_go_straight_into_training(tmp_path):
    """K = 2: the loss starts at log 2, and the evaluation rests on preference accuracy."""
    records = [
        {"id": f"p{n}", "prompt": f"Question {n}: what is {n} and {n}?", "chosen": f" {2 * n}.", "rejected": f" {n}?"}
        for n in range(40)
    ]
    project = offline(tmp_path / "offline", records)
    told = project.run_all()
    assert "the preferences are imported" in told["rollouts"].out
    assert project.metrics("preferences")["k"] == {"2": project.metrics("preferences")["rows"]}
    assert project.metrics("dpo")["start_loss"] == pytest.approx(0.693147, abs=1e-5)
    metrics = project.metrics("evaluate")
    assert "win_rate" not in metrics and 0 <= metrics["preference_accuracy"] <= 1
    assert project.metrics("register")["passed"] == 1


def test_rankings_of_any_k_with_ties_go_straight_into_training(tmp_path):
    """Each row starts at its own loss: log K! without ties, log of the orders that fit its ties otherwise."""
    texts = [" fine.", " so so.", " bad.", " awful."]
    records = [
        {
            "id": f"r{n}",
            "prompt": f"Film {n} was",
            "answers": [{"text": text, "rank": min(k, 1 + n % 3)} for k, text in enumerate(texts[: 2 + n % 3])],
        }
        for n in range(45)
    ]
    project = offline(tmp_path / "offline", records)
    project.run_all()
    assert set(project.metrics("preferences")["k"]) == {"2", "3", "4"}
    metrics = project.metrics("dpo")
    assert metrics["start_loss"] == pytest.approx(metrics["start_loss_expected"], abs=1e-5)


def test_no_group_and_no_prompt_straddles_training_and_held_out(project):
    """Rows that hang together are measured together, or the accuracy would be one of memory."""
    rows = [
        Row(
            id=f"row-{n:03}",
            prompt=text_prompt(f"Prompt {n % 60}"),
            answers=(Answer(text=f" good {n}", rank=0), Answer(text=f" bad {n}", rank=1)),
            meta={"group": f"g{n % 20}"} if n < 120 else {},
        )
        for n in range(240)
    ]
    write_rows(project.root / "data/prompts/preferences.parquet", rows)
    write_rows(project.root / "data/rollouts.parquet", [])
    project.run_all(first="verdicts", last="preferences")
    kept = read_rows(project.root / "data/preferences.parquet")
    splits: dict[str, set[str]] = {}
    for row in kept:
        splits.setdefault(keys(row)[0], set()).add(row.meta["split"])
    assert len(splits) == 20 + 60 and all(len(found) == 1 for found in splits.values())
    held = sum(row.meta["split"] == "held_out" for row in kept)
    assert 0.1 < held / len(kept) < 0.4  # preferences.held_out_share is 0.25
