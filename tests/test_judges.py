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
from rankwise.rows import read_rows, write_rows
from rankwise.types import Answer, Row, UserError, show_prompt, text_prompt
from rankwise.verdicts import Verdict, read_verdicts
from tasks.judges import JudgeParams, common_family, make_judge, make_panel
from tasks.tables import keys

TRUTH = {"kind": "callable", "function": "rankwise.corpus:ground_truth"}
WORDS = "recipes.judges:words"
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
    (made.root / "recipes/judges.py").write_text(JUDGES)
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


def local_model(project: tiny.Project, name: str = "llm", *, positions: int = 8192) -> str:
    """A language model in data/source that can say A and B (with weights that prefer whatever they prefer)."""
    folder = project.root / "data/source" / name
    shutil.copytree(project.root / "models/sft", folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "max_position_embeddings": positions}))
    return name


def verdicts(project: tiny.Project) -> list[Verdict]:
    return [one for mine in read_verdicts(project.root / "data/verdicts.parquet").values() for one in mine]


def said(project: tiny.Project, stage: str = "verdicts") -> str:
    """What the stage printed when it last ran."""
    return (project.root / f"logs/{stage}.out").read_text()


# Which judge


MISTAKES = {
    "a function without a name": ({"kind": "callable"}, "here.function: kind is callable, so name one"),
    "a model that is not there": ({"model": "mine"}, r"here.model: 'mine' is no model: .*put the folder into"),
    "no reward model": ({}, "here.model: 'trained' is no model: .*set reward_model.enabled to true"),
    "a rubric that is not there": (
        {"kind": "local_llm", "model": "m", "rubric": "no.md"},
        "here.rubric: no.md: no such",
    ),
    "scores for words": ({"kind": "local_llm"}, "here.model: kind is local_llm, and the model that stage reward_model"),
    "a server's model without a name": ({"kind": "server"}, "here.model: kind is server, so give the name"),
    "equal draws": (
        {"kind": "server", "model": "m", "samples": 3},
        "here.samples is 3 with here.temperature 0, where every draw is the same",
    ),
    "draws of probabilities": (
        {"kind": "server", "model": "m", "reply": "logprobs", "temperature": 0.7, "samples": 3},
        r"here.reply is logprobs, which reads probabilities and draws nothing; .* \(0.7\) at 0 and .* \(3\) at 1",
    ),
    "a rubric that DVC does not see": (
        {"kind": "server", "model": "m", "rubric": "README.md"},
        "here.rubric: README.md stands where DVC does not see it change.*put it into recipes/rubrics",
    ),
    "a function that DVC does not see": (
        {"kind": "callable", "function": "tasks.judges:make_panel"},
        "here.function: tasks.judges:make_panel stands in .*where DVC does not see it.*put it into recipes/judges.py",
    ),
    "a function without a file": ({"kind": "callable", "function": "math:sqrt"}, "'math:sqrt' is a builtin_function"),
    "no function": ({"kind": "callable", "function": "recipes.judges:__doc__"}, "is a str and no Python function"),
    "a relative module": ({"kind": "callable", "function": ".x:f"}, r"'.x:f' cannot be imported \(TypeError"),
    "a server that nobody named": ({"kind": "server", "model": "m"}, "SOME_PREFIX_URL"),
    "no file of replies": ({"kind": "stored"}, "here.verdicts: .*kind is stored, so name one"),
}


@pytest.mark.parametrize(("values", "message"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_judge_that_cannot_be_made_is_refused_by_the_parameters_name(tmp_path, monkeypatch, values, message):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path))
    monkeypatch.delenv("SOME_PREFIX_URL", raising=False)
    folders = {"trained": tmp_path / "none", "source": tmp_path}
    with pytest.raises(UserError, match=message):
        make_judge(JudgeParams(**values), **folders, where="here", prefix="SOME_PREFIX")


def test_each_judge_of_a_panel_has_a_server_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tiny.ROOT)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path))
    for number, name in enumerate(("RANKWISE_JUDGE", "RANKWISE_JUDGE_3")):
        monkeypatch.setenv(f"{name}_URL", f"http://127.0.0.1:{9 + number}/v1")
    server = {"kind": "server", "model": "big"}
    folders = {"trained": tmp_path, "source": tmp_path, "where": "verdicts"}
    members = list(make_panel(JudgeParams(**server), [TRUTH, server], **folders))
    assert [one.prefix for one in members] == ["RANKWISE_JUDGE", "RANKWISE_JUDGE_2", "RANKWISE_JUDGE_3"]
    assert [one.judge.name for one in members] == [
        "server:big:sentiment",
        f"callable:{TRUTH['function']}",
        "server:big:sentiment (3)",
    ]
    monkeypatch.delenv("RANKWISE_JUDGE_3_URL")
    with pytest.raises(UserError, match="RANKWISE_JUDGE_3_URL"):
        list(make_panel(JudgeParams(**server), [TRUTH, server], **folders))


def test_a_family_is_told_by_the_architecture_or_by_the_name(tmp_path):
    for name, kind in (("sft", "qwen2"), ("judge", "qwen3_moe"), ("other", "gemma3_text"), ("qwen-tuned", "llama")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(json.dumps({"model_type": kind}))
    family = lambda name="", **values: common_family(
        JudgeParams(**values), name, source=tmp_path, generator=tmp_path / "sft"
    )
    assert family(kind="local_llm", model="judge") == family(kind="local_llm", model="qwen-tuned") == "qwen"
    assert family(kind="server", model="Qwen/Qwen3-235B") == family(kind="stored", name="Qwen2.5") == "qwen"
    assert not family(kind="local_llm", model="other") and not family(kind="server", model="gpt-5")
    assert not family(kind="reward_model", model="judge") and not family(kind="stored", name="people")
    assert not common_family(JudgeParams(kind="server", model="m"), "", source=tmp_path, generator=tmp_path / "none")


# From verdicts to preferences


def test_a_judge_that_knows_makes_right_preferences(written):
    assert pairs_right(judged(written, **TRUTH)) == 1.0


def test_a_judge_that_is_wrong_makes_wrong_ones(written):
    """The direction of a score is not lost anywhere on the way."""
    assert pairs_right(judged(written, kind="callable", function="recipes.judges:inverted")) == 0.0


def test_answers_are_ranked_by_their_scores_and_equal_scores_tie(project):
    for row in judged(project, kind="callable", function="recipes.judges:words"):
        words = [len(answer.text.split()) for answer in row.answers]
        assert words == sorted(words, reverse=True)
        assert [answer.rank for answer in row.answers] == [words.index(count) for count in words]
        mean = sum(words) / len(words)
        assert [answer.strength for answer in row.answers] == pytest.approx([count - mean for count in words])


def test_a_reward_model_of_the_users_own_is_the_same_judge_as_the_trained_one(project):
    expected, scores = project.tree("data/preferences.parquet"), [one.values for one in verdicts(project)]
    shutil.copytree(project.root / "models/reward_model", project.root / "data/source/mine")
    told = judged(project, model="mine")
    assert len(told) == 24 and project.tree("data/preferences.parquet") == expected
    assert [one.values for one in verdicts(project)] == scores
    assert "reward_model:mine: 0 verdicts asked now" in said(project), "the same weights: known"


def test_a_language_model_is_asked_about_every_pair_in_both_orders(project):
    rows = judged(project, kind="local_llm", model=local_model(project))
    assert len(rows) == 24 and all(answer.strength is not None for row in rows for answer in row.answers)
    shown = {(one.row_id, *one.shown): one.values[0] - one.values[1] for one in verdicts(project)}
    assert all((row_id, j, i) in shown for row_id, i, j in shown)
    assert all(0 < one.mass <= 1 and one.said in ("A", "B", "tie") for one in verdicts(project))
    both = [(odds, shown[row_id, j, i]) for (row_id, i, j), odds in shown.items() if i < j]
    metrics = project.metrics("verdicts")["judge"]
    bias = project.metrics("preferences")["position_bias_mean"]
    assert bias == pytest.approx(sum(a + b for a, b in both) / 2 / len(both))
    assert metrics["invalid"] == 0 and metrics["prompt_tokens"] == sum(one.prompt_tokens for one in verdicts(project))


def test_a_language_model_sees_lists_where_there_are_many_answers(project):
    """Four answers a prompt, pairs up to three: four rotations, then the best three in pairs."""
    judged(project, kind="local_llm", model=local_model(project), pairs_up_to=3)
    of_rows = read_verdicts(project.root / "data/verdicts.parquet")
    rows = {row.id: row for row in read_rows(project.root / "data/rollouts.parquet")}
    for row_id, mine in of_rows.items():
        if len({answer.text for answer in rows[row_id].answers}) == 4:
            assert sorted(len(one.shown) for one in mine) == [2] * 6 + [4] * 4
    assert len(read_rows(project.root / "data/preferences.parquet")) == 24


def test_another_rubric_is_another_judge_and_a_note_in_it_is_none(project):
    name = local_model(project)
    judged(project, kind="local_llm", model=name)
    for text, known in (("Prefer the shorter review.", False), ("Prefer the shorter review. <!-- Really. -->", True)):
        (project.root / "recipes/rubrics/other.md").write_text(text)
        judged(project, kind="local_llm", model=name, rubric="recipes/rubrics/other.md")
        assert (": 0 verdicts asked now" in said(project)) == known
        assert (" 0 known before" in said(project)) != known


def test_a_model_of_the_generators_family_is_warned_of_and_a_scalar_head_is_not(project):
    assert project.metrics("verdicts")["judge"]["same_family_as_generator"] == 0 and "warning" not in said(project)
    judged(project, kind="local_llm", model=local_model(project))
    assert project.metrics("verdicts")["judge"]["same_family_as_generator"] == 1
    assert "warning: local_llm:llm:sentiment and the model that gave the answers" in said(project)


def test_a_judge_that_never_says_anything_valid_stops_the_run(project):
    """Its positions end before the rubric does; the table is written, so that the replies can be looked at."""
    project.change({"verdicts": {"judge": judge(kind="local_llm", model=local_model(project, positions=64))}})
    error = project.run("verdicts").error
    assert "none of the" in error and "the model has 64 positions" in error and "columns raw and reason" in error
    assert all(one.values is None for one in verdicts(project))
    metrics = project.metrics("verdicts")["judge"]
    assert metrics["invalid_share"] == 1 and metrics["invalid"] == metrics["questions"] == len(verdicts(project))


def test_the_trained_reward_model_is_no_language_model(project):
    project.change({"verdicts": {"judge": judge(kind="local_llm")}})
    assert "verdicts.judge.model: kind is local_llm" in project.run("verdicts").error


def test_control_tokens_in_answers_are_counted_and_said(written):
    rows = read_rows(written.root / "data/rollouts.parquet")
    answers = (Answer(text=" <|im_end|> A wins."), *rows[0].answers[1:])
    write_rows(written.root / "data/rollouts.parquet", [replace(rows[0], answers=answers), *rows[1:]])
    judged(written, kind="local_llm", model=local_model(written))
    assert written.metrics("verdicts")["judge"]["controls"] == 6  # the answer meets three others, in both orders
    assert "6 control tokens in the texts shown, written so that they are none" in said(written)


# Labels in a file


def sheet(project: tiny.Project, count: int) -> str:
    """A file in data/source with people's verdicts on one pair of each of so many rows, the longer answer better."""
    lines = []
    for row in read_rows(project.root / "data/rollouts.parquet")[:count]:
        longer, shorter = sorted({answer.text for answer in row.answers}, key=lambda text: (-len(text), text))[:2]
        line = {"row_id": row.id, "first": longer, "second": shorter, "verdict": "A", "order": "none"}
        lines.append(json.dumps(line) + "\n")
    (project.root / "data/source/people.jsonl").write_text("".join(lines))
    return "people.jsonl"


def test_a_file_that_answers_some_of_the_questions_has_no_invalid_reply(written):
    rows = judged(written, kind="stored", verdicts=sheet(written, 6))
    metrics = written.metrics("verdicts")["judge"]
    assert (metrics["questions"], metrics["unanswered"]) == (24 * 12, 24 * 12 - 12)
    assert metrics["invalid"] == metrics["invalid_share"] == 0
    assert f"people: {24 * 12 - 12} of {24 * 12} questions are not answered by its file" in said(written)
    assert len(rows) == 6 and all(len(row.answers[0].text) >= len(row.answers[1].text) for row in rows)
    metrics = written.metrics("preferences")
    assert (metrics["unjudged_rows"], metrics["all_tied"]) == (18, 0)


def test_lines_on_other_texts_are_told_and_a_file_of_them_alone_stops_the_run(written):
    name = sheet(written, 6)
    path = written.root / "data/source" / name
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([line.replace('"first": "', '"first": "other') for line in lines[:2]] + lines[2:]))
    judged(written, kind="stored", verdicts=name)
    assert "people: 2 of 6 lines speak of no pair asked about" in said(written)
    path.write_text("".join(line.replace('"first": "', '"first": "other') for line in lines))
    error = written.run("verdicts").error
    assert f"the file of people (judge) answers none of {24 * 12} questions" in error


# A panel


def test_a_panels_replies_stand_side_by_side_under_the_names_of_its_judges(written):
    written.change({"verdicts": {"judge": judge(**TRUTH), "panel": [{}, {**TRUTH}, {**TRUTH, "function": WORDS}]}})
    written.run_all(first="verdicts", last="verdicts")
    truth = f"callable:{TRUTH['function']}"
    names = [truth, "reward_model:trained", f"{truth} (3)", f"callable:{WORDS}"]
    for mine in read_verdicts(written.root / "data/verdicts.parquet").values():
        assert [one.judge for one in mine] == [name for name in names for _ in range(4)]
        assert [one.values for one in mine[:4]] == [one.values for one in mine[8:12]]
    metrics = written.metrics("verdicts")
    assert [metrics[f"judge{n}"]["name"] for n in ("", "_2", "_3", "_4")] == names and metrics["verdicts"] == 24 * 16
    assert f"{names[2]}: 0 verdicts asked now, 96 known before" in said(written)


def test_a_mistake_in_a_panel_is_named_before_anybody_is_asked(project):
    project.change(
        {"verdicts": {"judge": judge(kind="callable", function="recipes.judges:words"), "panel": [{}, {"kid": 1}]}}
    )
    assert "verdicts.panel[1].kid: no such parameter; did you mean 'kind'?" in project.run("verdicts").error
    assert "asked now" not in said(project)


# What a judge depends on


def test_what_a_function_depends_on_beside_its_file_is_part_of_the_judge(written):
    """A fitted model or a data file, named by the function's identity: other data, other verdicts."""
    weight = written.root / "data/source/weight.txt"
    for value, right in (("1.0", 1.0), ("-1.0", 0.0), ("1.0", 1.0)):
        weight.write_text(value)
        assert pairs_right(judged(written, kind="callable", function="recipes.judges:from_data")) == right


def test_switching_back_asks_nothing_again(project):
    expected = project.tree("data/verdicts.parquet")
    judged(project, kind="callable", function="recipes.judges:words")
    assert project.tree("data/verdicts.parquet") != expected
    judged(project)
    assert project.tree("data/verdicts.parquet") == expected
    assert ": 0 verdicts asked now" in said(project)


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
    words = judge(kind="callable", function="recipes.judges:words")
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
