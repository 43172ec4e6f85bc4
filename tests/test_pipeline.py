"""Laws of the whole pipeline, on a tiny version of the embedded default; every stage is a process of its own.

What DVC adds (what is rerun, the same lock twice) is at the end, as slow tests in a copy of the repository.
"""

from __future__ import annotations

import csv
import json
import math
import shutil
import signal
import time
from pathlib import Path

import pytest
import tiny
import unrolled
from clones import Repository

from rankwise.evaluation import win_rate
from rankwise.rows import read_rows, read_table
from tasks.recipe import STAGES

ROOT = Path(__file__).parent.parent
MAY_BE_EMPTY = ("preferences",)  # imported ones: the default has none
GRAPH = unrolled.one_round()


@pytest.fixture(scope="module")
def done(tmp_path_factory) -> tiny.Project:
    """The pipeline after one whole run. Copy it, do not change it."""
    return tiny.finished(tmp_path_factory.getbasetemp())


@pytest.fixture
def project(done, tmp_path) -> tiny.Project:
    return done.copy(tmp_path / "copy")


def spoil(project: tiny.Project, stage: str) -> None:
    """Take away what a stage made, its store rows and its checkpoints too, as if it had never run."""
    for path in outputs(stage):
        whole = project.root / path
        shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
    for folder in ("stores", "checkpoints"):
        shutil.rmtree(project.root / ".rankwise" / folder, ignore_errors=True)


def outputs(stage: str) -> list[str]:
    """What dvc.yaml says that a stage makes: outs, metrics, plots."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in GRAPH[stage].get(kind, [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


# What a run leaves


@pytest.mark.parametrize("stage", STAGES)
def test_a_stage_makes_what_dvc_yaml_says_and_nothing_beside(done, stage):
    readers = {
        ".json": lambda path: json.loads(path.read_text()),
        ".parquet": lambda path: read_table(path).num_rows or path.stem in MAY_BE_EMPTY,
        ".png": lambda path: path.read_bytes()[:4] == b"\x89PNG" or pytest.fail(f"{path} is no PNG"),
        ".csv": lambda path: list(csv.DictReader(path.open())) or pytest.fail(f"{path} is empty"),
        ".md": lambda path: path.read_text(),
    }
    for path in map(done.root.joinpath, outputs(stage)):
        for file in path.iterdir() if path.is_dir() else [path]:
            assert readers.get(file.suffix, Path.read_bytes)(file)
    reports = done.tree(f"reports/{stage}")
    assert [path for path in reports if not path.startswith(tuple(outputs(stage)))] == [], "unknown to DVC"


def test_every_file_of_data_and_models_belongs_to_a_stage(done):
    made = [path for stage in STAGES for path in outputs(stage)]
    strays = [path for path in done.tree("data", "models") if not any(path.startswith(out) for out in made)]
    assert strays == []


def test_preference_training_starts_at_the_loss_of_no_preference(done):
    """log K! a row: K = 4 answers without ties, so log 24, whatever the weights and whatever β."""
    metrics = done.metrics("dpo")
    assert metrics["start_loss"] == pytest.approx(math.log(24), abs=1e-5)
    first = next(csv.DictReader((done.root / "reports/dpo/plots/curves.csv").open()))
    assert float(first["loss"]) == pytest.approx(math.log(24), abs=1e-4)
    assert float(first["margin"]) == pytest.approx(0, abs=1e-4)


def test_evaluation_has_the_documented_numbers(done):
    metrics = done.metrics("evaluate")
    assert set(metrics) == {
        *("prompts", "win_rate", "reward", "gold_reward", "positive_share", "kl", "length", "distinct_1"),
        *("distinct_2", "cut_share", "objective_e1", "judge_agrees_with_gold", "preference_accuracy", "start_loss"),
        *("win_rate_length_controlled", "data_perplexity"),
    }
    estimate = {"mean", "low", "high"}
    assert set(metrics["win_rate"]) == {"judge", "gold"} and set(metrics["win_rate"]["gold"]) == estimate
    assert set(metrics["kl"]) == {*estimate, "per_token"}
    for name in ("reward", "gold_reward", "positive_share"):
        assert {model: set(found) for model, found in metrics[name].items()} == {
            "policy": estimate,
            "reference": estimate,
        }


def test_evaluation_is_what_its_samples_say(done):
    """Win rate, gold, lengths and KL again, from data/evaluation.parquet, the judges and the models themselves."""
    import torch
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    from rankwise.corpus import ground_truth

    metrics, rows = done.metrics("evaluate"), read_rows(done.root / "data/evaluation.parquet")
    models = done.root / "models"
    tokenizer = AutoTokenizer.from_pretrained(models / "sft")

    def score(model, row, answer):
        prompt, whole = (
            tokenizer(text)["input_ids"] for text in (row.prompt[0].content, row.prompt[0].content + answer.text)
        )
        if whole[: len(prompt)] != prompt:  # the tokenizer would merge across the boundary
            whole = prompt + tokenizer(answer.text, add_special_tokens=False)["input_ids"]
        ids = [*whole, tokenizer.eos_token_id]
        return model.score(model.model(torch.tensor([ids])).last_hidden_state[0, -1]).item()

    def logp(model, row, answer):
        prompt = tokenizer(row.prompt[0].content)["input_ids"]
        logps = model(torch.tensor([[*prompt, *answer.token_ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        return logps[range(len(answer.token_ids)), list(answer.token_ids)].sum().item()

    mean = lambda values: sum(values) / len(values)
    with torch.inference_mode():
        judge = AutoModelForSequenceClassification.from_pretrained(models / "reward_model").eval()
        scores = {n: [score(judge, row, row.answers[n]) for row in rows] for n in (0, 1)}
        policy, reference = (AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("policy", "sft"))
        kl = mean([logp(policy, row, row.answers[0]) - logp(reference, row, row.answers[0]) for row in rows])
    gold = {n: [ground_truth(row.prompt[0].content, row.answers[n].text) for row in rows] for n in (0, 1)}
    assert metrics["prompts"] == len(rows) == 12
    for n, model in enumerate(("policy", "reference")):
        assert metrics["reward"][model]["mean"] == pytest.approx(mean(scores[n]), abs=1e-5)
        assert metrics["gold_reward"][model]["mean"] == pytest.approx(mean(gold[n]), abs=1e-9)
        assert metrics["positive_share"][model]["mean"] == pytest.approx(mean([score > 0 for score in gold[n]]))
        assert metrics["length"][model] == pytest.approx(mean([len(row.answers[n].text.split()) for row in rows]))
        assert metrics["cut_share"][model] == mean([row.answers[n].finish_reason == "length" for row in rows])
    assert metrics["win_rate"]["judge"] == pytest.approx(win_rate(scores[0], scores[1]).as_dict())
    assert metrics["win_rate"]["gold"] == pytest.approx(win_rate(gold[0], gold[1]).as_dict())
    assert metrics["kl"]["mean"] == pytest.approx(kl, abs=1e-4)
    beta = done.metrics("dpo")["beta"]
    assert metrics["objective_e1"]["policy"] == pytest.approx(mean(scores[0]) - beta * kl, abs=1e-4)


def test_the_policy_has_moved_and_the_reference_has_not(done):
    weights = lambda name: done.tree(f"models/{name}")[f"models/{name}/model.safetensors"]
    assert len({weights(name) for name in ("base", "sft", "policy")}) == 3


# The same again


def test_the_same_parameters_give_the_same_bytes(done, tmp_path):
    """In another folder, at another time: what `dvc repro` in a second clone compares."""
    again = tiny.Project(tmp_path / "elsewhere")
    again.run_all()
    first, second = done.tree(), again.tree()
    assert set(first) == set(second)
    assert [path for path in first if first[path] != second[path]] == []


def test_a_stage_run_again_over_its_own_outputs_changes_no_byte(project):
    before = project.tree()
    project.run_all()
    assert project.tree() == before


def test_other_dpo_parameters_ask_nothing_again(project):
    """Reference rows, rollouts and verdicts depend on neither β nor the learning rate."""
    project.change({"dpo": {"beta": 0.3, "learning_rate": 1e-4}})
    before = project.tree()
    told = project.run_all(first="rollouts")
    assert "0 of 24 prompts answered now" in told["rollouts"].out
    assert "0 verdicts asked now" in told["verdicts"].out
    assert "0 of 24 rows computed now" in told["reference_logprobs"].out
    assert project.timings("reference_logprobs")["rows_computed"] == 0
    changed = {path for path, digest in project.tree().items() if before.get(path) != digest}
    assert all(path.startswith(("models/policy", "data/evaluation", "reports/")) for path in changed)
    assert {path.split("/")[1] for path in changed if path.startswith("reports/")} == {
        *("dpo", "diagnosis", "evaluate", "register")
    }


def test_other_weights_are_asked_anew(project):
    """The other side of the law above: nothing stale is served."""
    project.change({"sft": {"learning_rate": 0.02}})
    told = project.run_all(first="sft", last="reference_logprobs")
    assert "24 of 24 prompts answered now" in told["rollouts"].out
    assert "24 of 24 rows computed now" in told["reference_logprobs"].out


# Killed


def small_commits() -> None:
    """Stores are filled every few rows, so that a tiny run has a middle."""
    import rankwise.judging
    import rankwise.reference
    import rankwise.rollouts

    rankwise.judging.COMMIT_REPLIES, rankwise.judging.COMMIT_S = 16, 1e9
    rankwise.reference.COMMIT_ROWS = 4
    rankwise.rollouts.COMMIT_ROWS, rankwise.rollouts.COMMIT_S = 4, 1e9


KILLED = {  # stage: where it dies, and what its rerun says about what was there
    "rollouts": (
        # of three parts, 8 prompts each (rankwise.generation), as the last one is whole and not yet kept
        tiny.killed_at("rankwise.store:Store.put_many", 3, setup=small_commits),
        "8 of 24 prompts answered now",
    ),
    "verdicts": (tiny.killed_at("rankwise.store:Store.put_many", 3, setup=small_commits), None),
    "reference_logprobs": (tiny.killed_at("rankwise.store:Store.put_many", 3, setup=small_commits), None),
    "sft": (
        tiny.killed_at("rankwise.training:_Run._step", 5, first=tiny.checkpoint_before(4)),
        "continuing from step 3",
    ),
    "reward_model": (
        tiny.killed_at("rankwise.training:_Run._step", 8, first=tiny.checkpoint_before(6)),
        "continuing from step 5",
    ),
    "dpo": (
        tiny.killed_at("rankwise.training:_Run._step", 4, first=tiny.checkpoint_before(3)),
        "continuing from step 2",
    ),
}


@pytest.mark.parametrize("stage", KILLED)
def test_killed_midway_a_rerun_gives_the_same_bytes_and_pays_only_for_the_rest(project, stage):
    death, said = KILLED[stage]
    expected = project.tree(*outputs(stage))
    spoil(project, stage)
    assert project.run(stage, before=death).status == -signal.SIGKILL
    assert project.tree(*outputs(stage)) == {}, "half an output"
    told = project.run(stage)
    assert told.status == 0, told.err
    assert project.tree(*outputs(stage)) == expected
    if said is not None:
        assert said in told.out
    if stage == "verdicts":
        asked = int(told.out.partition(" verdicts asked now")[0].split()[-1])
        assert asked == 96 - 2 * 16
    if stage == "reference_logprobs":
        assert 0 < project.timings(stage)["rows_computed"] <= 24 - 2 * 4
    assert not list((project.root / ".rankwise").glob(f"checkpoints/{stage}/*/*")), "a checkpoint that nobody needs"


@pytest.mark.parametrize("rename", [1, 2])
@pytest.mark.parametrize("stage", ["rollouts", "sft"])
def test_killed_while_putting_its_output_in_place_it_leaves_no_half(project, stage, rename):
    """The last moment: all is computed, the new file or folder is being renamed into place."""
    [output] = GRAPH[stage]["outs"]
    old = project.tree(output)
    project.change({stage: {"seed": 7}})
    earlier = 1 if stage == "sft" else 0  # its last checkpoint is renamed into place first
    assert project.run(stage, before=tiny.killed_at("os:replace", earlier + rename)).status == -signal.SIGKILL
    left = project.tree(output)
    if rename == 1:
        assert left == old
    else:
        assert not left or (set(left) == set(old) and left != old), "neither the old one nor the new one, but a mix"
    assert project.run(stage).status == 0
    assert set(project.tree(output)) == set(old) and project.tree(output) != old
    assert [path for path in project.tree() if ".tmp" in path or ".old" in path] == [], "left-overs of the killed run"


def test_sigterm_writes_a_checkpoint_and_a_rerun_continues_to_the_same_bytes(project):
    expected = project.tree(*outputs("sft"))
    spoil(project, "sft")
    told = project.run("sft", before=tiny.killed_at("rankwise.training:_Run._step", 4, by=signal.SIGTERM))
    assert told.status == 143 and "stopped; run the same command again to continue" in told.err
    assert "Traceback" not in told.err
    told = project.run("sft")
    assert "continuing from step" in told.out
    assert project.tree(*outputs("sft")) == expected


# Through DVC


@pytest.fixture(scope="module")
def repository(tmp_path_factory) -> Repository:
    made = Repository(tmp_path_factory.mktemp("repository") / "clone")
    assert sorted(made.ran(made.command("dvc", "repro"))) == sorted(STAGES)
    made.command("git", "add", "-A")
    made.command("git", "commit", "-q", "-m", "run")
    return made


@pytest.mark.slow
def test_dvc_makes_the_bytes_that_the_stages_make_by_hand(repository, done):
    by_hand = done.tree()
    by_dvc = {path: digest for path, digest in _tree(repository.root).items() if not path.endswith(".gitignore")}
    assert {path for path in by_hand if by_hand[path] != by_dvc.get(path)} == set()


@pytest.mark.slow
def test_nothing_changed_nothing_runs(repository):
    began = time.monotonic()
    said = repository.command("dvc", "repro")
    assert repository.ran(said) == [] and "up to date" in said
    assert time.monotonic() - began < 30
    assert repository.command("git", "status", "--porcelain").strip() == ""


@pytest.mark.slow
def test_another_clone_leaves_the_same_lock(repository, tmp_path):
    other = Repository(tmp_path / "clone")
    other.command("dvc", "repro")
    assert (other.root / "dvc.lock").read_bytes() == (repository.root / "dvc.lock").read_bytes()


@pytest.mark.slow
def test_an_experiment_with_another_beta_runs_dpo_and_what_follows_and_no_reference_row(repository):
    timings = repository.root / ".rankwise/timings/reference_logprobs.json"
    before = timings.stat().st_mtime_ns
    said = repository.command("dvc", "exp", "run", "-S", "dpo.beta=0.3")
    assert repository.ran(said) == ["dpo", "diagnosis", "evaluate", "register"]
    assert timings.stat().st_mtime_ns == before
    assert json.loads((repository.root / "reports/dpo/metrics.json").read_text())["beta"] == 0.3
    shown = repository.command("dvc", "metrics", "diff", "HEAD")
    assert "beta" in shown and "reports/evaluate/metrics.json" in shown
    repository.command("dvc", "plots", "diff", "HEAD", "-o", "plots")
    repository.command("git", "checkout", "-q", "--", ".")
    repository.command("dvc", "checkout", "-q")


def _tree(root: Path) -> dict[str, str]:
    return tiny.Project.at(root).tree()
