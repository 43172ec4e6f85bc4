"""Laws of rounds: what a round reads, draws, ranks and is held to; what a change or a kill in one costs the others.

Stages are run by hand here, with the commands of dvc.yaml. What DVC and the flow make of rounds is at the end.
"""

from __future__ import annotations

import itertools
import json
import math
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import unrolled
import yaml
from clones import Repository

from rankwise.fingerprint import weights_digest
from rankwise.given import rank_by_source
from rankwise.rows import read_rows, read_table
from rankwise.types import Answer, Row, UserError, text_prompt
from tasks import recipe, rounds

ROOT = Path(__file__).parent.parent
METHODS = {
    name: yaml.safe_load((ROOT / f"recipes/{name}.yaml").read_text()) for name in ("spin", "asft", "iterated-dpo")
}


def shortened(name: str, **more) -> dict:
    """A shipped recipe with two rounds, and more changes over it."""
    return tiny.over(tiny.over(METHODS[name], {"rounds": {"count": 2}}), more)


@pytest.fixture(scope="module")
def before_rounds(tmp_path_factory) -> tiny.Project:
    """The tiny pipeline up to its reward model. Copy it, do not change it."""
    project = tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path_factory.mktemp("before") / "project")
    for path in (path for stage in rounds.STAGES for path in written(unrolled.one_round()[stage])):
        whole = project.root / path
        shutil.rmtree(whole) if whole.is_dir() else whole.unlink()
    shutil.rmtree(project.root / ".rankwise/stores")
    return project


def written(stage: dict) -> list[str]:
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in stage.get(kind, [])]
    return [entry if isinstance(entry, str) else next(iter(entry)) for entry in entries]


@pytest.fixture(scope="module")
def one_of_two(before_rounds, tmp_path_factory) -> tiny.Project:
    """SPIN after the first of two rounds. Copy it, do not change it."""
    project = before_rounds.copy(tmp_path_factory.mktemp("one") / "project")
    project.apply(shortened("spin"))
    project.run_rounds(last="evaluate@1")
    return project


@pytest.fixture(scope="module")
def spin(one_of_two, tmp_path_factory) -> tiny.Project:
    """Two rounds of SPIN. Copy it, do not change it."""
    project = one_of_two.copy(tmp_path_factory.mktemp("spin") / "project")
    project.run_rounds(first="rollouts@2")
    return project


@pytest.fixture(scope="module")
def iterated(before_rounds, tmp_path_factory) -> tiny.Project:
    """Two rounds of iterated DPO, held to SFT, each started from the last policy. Copy it, do not change it."""
    project = before_rounds.copy(tmp_path_factory.mktemp("iterated") / "project")
    project.apply(shortened("iterated-dpo"))
    project.run_rounds()
    return project


# Names


@pytest.mark.parametrize("start", ["reference", "last"])
@pytest.mark.parametrize("reference", ["sft", "last"])
def test_a_round_reads_what_the_one_before_wrote(reference, start):
    each = unrolled.stages(
        yaml.safe_load(recipe.render({"rounds": {"count": 4, "reference": reference, "start": start}}))
    )
    for number in range(2, 5):
        made = {path for stage in rounds.STAGES for path in written(each[f"{stage}@{number - 1}"])}
        policy = next(path for path in made if path.startswith("models/"))
        assert policy in each[f"rollouts@{number}"]["deps"]
        held_to, begun = each[f"reference_logprobs@{number}"]["deps"], each[f"dpo@{number}"]["deps"]
        assert (policy in held_to) == (reference == "last") and ("models/sft" in held_to) == (reference == "sft")
        assert (policy in begun) == ("last" in (reference, start))
        assert made & set(each[f"preferences@{number}"]["deps"]) == {
            f"data/preferences{rounds.ending(number - 1)}.parquet"
        }
        assert f"reports/evaluate{rounds.ending(number - 1)}/metrics.json" in each[f"evaluate@{number}"]["deps"]
    assert (
        "models/policy-4" in each["register"]["deps"] and "reports/evaluate-4/metrics.json" in each["register"]["deps"]
    )


def test_no_two_stages_write_one_file_and_a_further_round_renames_none():
    by_count = {n: unrolled.stages(yaml.safe_load(recipe.render({"rounds": {"count": n}}))) for n in (1, 2, 3)}
    every = [path for stage in by_count[3].values() for path in written(stage)]
    assert len(every) == len(set(every))
    for fewer, more in itertools.pairwise(by_count.values()):
        assert {name: stage for name, stage in fewer.items() if name != "register"}.items() <= more.items()


def test_a_stage_of_a_round_depends_on_its_own_parameters_of_that_round_alone():
    each = unrolled.stages(yaml.safe_load(recipe.render({"rounds": {"count": 3}})))
    for stage, number in itertools.product(rounds.STAGES, (1, 2, 3)):
        # The audit asks the judge of verdicts; the diagnosis is of the loss that dpo trained on.
        read = (stage, *{"audit_judge": ["verdicts"], "diagnosis": ["dpo"]}.get(stage, []))
        own = [f"rounds.each.{number}.{section}" for section in read]
        assert each[f"{stage}@{number}"]["params"] == [*read, *own]


def test_params_yaml_is_a_recipe_of_itself():
    """So a count that was changed in it is followed by one command, and parameters of single rounds stay."""
    document = yaml.safe_load(recipe.render({"rounds": {"count": 2, "each": {2: {"dpo": {"beta": 0.5}}}}}))
    assert yaml.safe_load(recipe.render(document)) == document
    document["rounds"]["count"] = 3
    again = yaml.safe_load(recipe.render(document))["rounds"]
    assert again["last"] == "-3" and again["each"]["3"]["last"]["model"] == "policy-2"
    assert [entry["dpo"] for entry in again["each"].values()] == [{}, {"beta": 0.5}, {}]


MISTAKES = {
    "a round that there is not": (
        {"each": {2: {"dpo": {"beta": 1.0}}}},
        "each.2 has parameters of its own, and rounds.count is 1",
    ),
    "a stage of no round": ({"each": {1: {"sft": {}}}}, "each.1.sft: no stage of a round is called so"),
    "a parameter that is none": (
        {"each": {1: {"dpo": {"betta": 1.0}}}},
        "each.1.dpo.betta: no such parameter; did you mean 'beta'",
    ),
    "a word for a count": ({"count": "three"}, "rounds.count: int was expected, found 'three'"),
    "no reference": ({"reference": "base"}, "rounds.reference: one of 'sft', 'last' was expected, found 'base'"),
    "a misspelt key": ({"number": 3}, "rounds.number: no such parameter"),
    "entries that are none": ({"each": ["dpo"]}, "rounds with parameters of their own were expected"),
    "no mapping": (3, "rounds: a mapping was expected"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_the_section_is_named(mistake):
    given, message = MISTAKES[mistake]
    with pytest.raises(UserError) as error:
        recipe.render({"rounds": given})
    assert message in str(error.value)


@pytest.mark.parametrize("stage", ["prompts", "dpo@1", "register"])
def test_a_count_that_was_changed_by_hand_alone_is_refused(spin, tmp_path, stage):
    project = spin.copy(tmp_path / "copy")
    project.change({"rounds": {"count": 3}})
    assert "write them anew" in project.run(stage).error
    assert "python -m tasks.recipe params.yaml" in project.run(stage).error


def test_a_later_round_without_paths_of_its_own_is_refused(spin, tmp_path):
    """By hand, `--round 2` alone would read and write what is round 1's."""
    project = spin.copy(tmp_path / "copy")
    before = project.tree()
    assert "dvc repro --single-item dpo@2" in project.run("dpo", "--round", "2").error
    assert "params.yaml has 2 (rounds.count)" in project.run("dpo", "--round", "3").error
    assert project.tree() == before


# Given orders


def row(*answers: tuple[str, str]) -> Row:
    return Row(
        id="r", prompt=text_prompt("p"), answers=tuple(Answer(text=text, source=source) for source, text in answers)
    )


def test_a_source_says_where_its_answers_stand():
    ranked = rank_by_source(row(("policy", "a"), ("teacher", "b"), ("dataset", "c")), ["dataset", "teacher", "policy"])
    assert [(a.source, a.text, a.rank) for a in ranked.answers] == [
        ("dataset", "c", 0),
        ("teacher", "b", 1),
        ("policy", "a", 2),
    ]


def test_answers_of_one_source_tie():
    ranked = rank_by_source(row(("policy", "a"), ("policy", "b"), ("dataset", "c")), ["dataset", "policy"])
    assert [(a.text, a.rank) for a in ranked.answers] == [("c", 0), ("a", 1), ("b", 1)]


def test_one_text_of_two_sources_ties_where_the_better_one_stands():
    ranked = rank_by_source(row(("policy", "a"), ("teacher", "b"), ("dataset", "a")), ["dataset", "teacher", "policy"])
    assert [(a.source, a.rank) for a in ranked.answers] == [("policy", 0), ("dataset", 0), ("teacher", 2)]


def test_a_source_that_the_order_lacks_is_named():
    with pytest.raises(UserError, match="row r: an answer is from 'teacher'"):
        rank_by_source(row(("teacher", "a"), ("dataset", "b")), ["dataset", "policy"])


# SPIN


def recorded(project: tiny.Project, number: int) -> dict[str, str]:
    return json.loads((project.root / f"reports/dpo{rounds.ending(number)}/weights.json").read_text())


def table(project: tiny.Project, name: str, number: int) -> list[Row]:
    return read_rows(project.root / f"data/{name}{rounds.ending(number)}.parquet")


@pytest.mark.parametrize("number", [1, 2])
def test_the_table_of_spin_is_exactly_data_above_policy(spin, number):
    """E8: K = 2, y_1 the data's own answer to that prompt, y_2 drawn from the last policy; no prompt is lost."""
    own = {row.id: row for row in read_rows(spin.root / "data/prompts/rollout.parquet")}
    drawn = {row.id: row.answers[0] for row in table(spin, "rollouts", number)}
    found = table(spin, "preferences", number)
    assert {row.id for row in found} == {name for name in own if drawn[name].text != own[name].answers[0].text}
    for row in found:
        best, worst = row.answers
        assert (best.source, best.rank, best.text) == ("dataset", 0, own[row.id].answers[0].text)
        assert (worst.source, worst.rank, worst.text) == ("policy", 1, drawn[row.id].text)
    assert read_table(spin.root / f"data/verdicts{rounds.ending(number)}.parquet").num_rows == 0


def test_each_round_of_spin_draws_from_the_last_policy_with_seeds_of_its_own(spin):
    first, second = ({row.id: row for row in table(spin, "rollouts", n)} for n in (1, 2))
    assert {row.answers[0].seed for row in first.values()}.isdisjoint(row.answers[0].seed for row in second.values())
    assert all(first[name].meta["sampled_from"] != second[name].meta["sampled_from"] for name in first)


def test_the_reference_of_a_round_is_the_policy_of_the_one_before(spin):
    """Where `reference: last` says so; recorded with the table of its log-probabilities, and in the report."""
    weights = {name: weights_digest(spin.root / "models" / name) for name in ("sft", "policy", "policy-2")}
    assert len(set(weights.values())) == 3
    for number, held_to, made in ((1, "sft", "policy"), (2, "policy", "policy-2")):
        meta = read_table(spin.root / f"data/reference_logprobs{rounds.ending(number)}.parquet").schema.metadata
        assert meta[b"reference"].decode() == weights[held_to]
        assert recorded(spin, number) == {
            "reference": weights[held_to],
            "start": weights[held_to],
            "policy": weights[made],
        }
        assert spin.metrics(f"dpo@{number}")["start_loss"] == pytest.approx(math.log(2), abs=1e-5)


def test_a_round_of_rows_may_join_the_next_once(spin, tmp_path):
    """The published SPIN trains on rounds t and t - 1, Algorithm 1 (the default) on t alone."""
    alone = {row.id for row in table(spin, "preferences", 2)}
    project = spin.copy(tmp_path / "copy")
    project.apply(shortened("spin", rounds={"count": 3}, preferences={"earlier_rounds": 1}))
    assert project.run("preferences@2").status == 0
    assert project.metrics("preferences@2")["rows_of_earlier_rounds"] > 0
    found = table(project, "preferences", 2)
    trained = {f"{row.id}@1" for row in table(project, "preferences", 1) if row.meta["split"] == "train"}
    assert {row.id for row in found} == alone | trained
    assert {row.meta.get("round") for row in found} == {None, 1}
    for stage in ("reference_logprobs@2", "dpo@2", "rollouts@3", "verdicts@3", "preferences@3"):
        assert project.run(stage).status == 0
    third = [row.id for row in table(project, "preferences", 3)]
    assert len(third) == len(set(third))
    assert {name.rpartition("@")[2] for name in third if "@" in name} == {"2"}, "round 1 is two rounds ago"


def test_nothing_to_rank_by_is_a_mistake_that_names_the_mend(spin, tmp_path):
    project = spin.copy(tmp_path / "copy")
    project.apply(shortened("spin", preferences={"order": []}))
    assert "preferences.order is empty" in project.run("preferences@1").error
    project.apply(shortened("spin", preferences={"order": ["dataset", "teacher", "policy"]}))
    assert "the answers are from dataset, policy" in project.run("preferences@1").error
    project.apply(shortened("spin", rollouts={"data_answers": False}))
    assert "one answer a prompt cannot be ranked" in project.run("rollouts@1").error


def test_prompts_without_an_answer_in_the_data_are_named(spin, tmp_path):
    from rankwise.rows import write_rows

    project = spin.copy(tmp_path / "copy")
    path = project.root / "data/prompts/rollout.parquet"
    first, *others = read_rows(path)
    write_rows(path, [Row(id=first.id, prompt=first.prompt, meta=first.meta), *others])
    assert (
        f"1 of 24 prompts of data/prompts/rollout.parquet have no answer in the data: {first.id}"
        in project.run("rollouts@1").error
    )


# aSFT


def test_asft_ranks_data_above_teacher_above_policy_and_asks_the_teacher_once(before_rounds, tmp_path):
    project = before_rounds.copy(tmp_path / "asft")
    shutil.copytree(project.root / "models/base", project.root / "data/source/teacher")
    project.apply(shortened("asft", rollouts={"teacher": {"max_new_tokens": 12}}))
    told = project.run_rounds()
    assert "24 of 24 prompts answered now by the teacher" in told["rollouts@1"].out
    assert "0 of 24 prompts answered now by the teacher" in told["rollouts@2"].out
    assert "24 of 24 prompts answered now, " in told["rollouts@2"].out
    for number in (1, 2):
        strict = [row for row in table(project, "preferences", number) if len({a.text for a in row.answers}) == 3]
        assert strict
        assert {tuple((a.source, a.rank) for a in row.answers) for row in strict} == {
            (("dataset", 0), ("teacher", 1), ("policy", 2))
        }
        metrics = project.metrics(f"dpo@{number}")
        assert metrics["start_loss"] == pytest.approx(metrics["start_loss_expected"], abs=1e-5)
    # Ranked by the judge instead: the same three candidates, other ranks.
    project.apply(
        shortened(
            "asft",
            rollouts={"teacher": {"max_new_tokens": 12}},
            preferences={"order": []},
            verdicts={"judge": tiny.JUDGE},
        )
    )
    for stage in project.round_stages(last="preferences@1"):
        assert project.run(stage).status == 0
    first = {tuple(a.source for a in row.answers) for row in table(project, "preferences", 1)}
    assert len(first) > 1 and set().union(*first) == {"dataset", "teacher", "policy"}


# Iterated DPO


def test_the_first_of_several_rounds_is_the_only_round_of_the_default(iterated, tmp_path_factory):
    """Byte for byte: what a round makes does not depend on those that follow."""
    alone = tiny.finished(tmp_path_factory.getbasetemp())
    made = [path for stage in rounds.STAGES for path in written(unrolled.one_round()[stage])]
    assert iterated.tree(*made) == alone.tree(*made)


def test_a_policy_may_start_from_the_last_one_and_be_held_to_the_sft_model(iterated):
    sft, first = (weights_digest(iterated.root / "models" / name) for name in ("sft", "policy"))
    second = recorded(iterated, 2)
    assert (second["reference"], second["start"]) == (sft, first)
    assert iterated.metrics("dpo@2")["start_loss"] == pytest.approx(math.log(24), abs=1e-5), (
        "the check is the reference's"
    )


def test_new_answers_are_judged_anew(iterated):
    first, second = ({a.text for row in table(iterated, "rollouts", n) for a in row.answers} for n in (1, 2))
    assert first != second
    assert iterated.metrics("verdicts@2")["verdicts"] == 96


def test_the_last_evaluation_shows_every_round_and_register_takes_it(iterated):
    last = iterated.metrics("evaluate@2")
    assert set(last["rounds"]) == {"0", "1", "2"} and "rounds" not in iterated.metrics("evaluate@1")
    for number in ("1", "2"):
        own = iterated.metrics(f"evaluate@{number}")
        assert last["rounds"][number]["win_rate"] == own["win_rate"]
        assert last["rounds"][number]["length"] == own["length"]["policy"]
        assert last["rounds"][number]["kl"].items() <= own["kl"].items()
    assert last["rounds"]["0"]["length"] == last["length"]["reference"] and last["rounds"]["0"]["kl"]["mean"] == 0
    assert (iterated.root / "reports/evaluate-2/plots/rounds.png").is_file()
    record = json.loads((iterated.root / "reports/register/registration.json").read_text())
    from tasks.lineage import md5_of

    assert record["md5"]["policy"] == md5_of(iterated.root / "models/policy-2")
    assert record["metrics"]["rounds.1.win_rate.gold.mean"] == last["rounds"]["1"]["win_rate"]["gold"]["mean"]


def test_parameters_of_one_round_are_of_no_other(iterated, tmp_path):
    project = iterated.copy(tmp_path / "copy")
    project.apply(shortened("iterated-dpo", rounds={"count": 2, "each": {"2": {"dpo": {"beta": 0.7}}}}))
    for stage in ("dpo@1", "dpo@2"):
        assert project.run(stage).status == 0
    assert [project.metrics(stage)["beta"] for stage in ("dpo@1", "dpo@2")] == [0.2, 0.7]
    changed = {path for path, digest in project.tree("models").items() if iterated.tree("models").get(path) != digest}
    assert changed == {"models/policy-2/model.safetensors"}


# Killed


KILLED = {
    "rollouts@2": tiny.killed_at("rankwise.store:Store.put_many", 1),
    "dpo@2": tiny.killed_at("rankwise.training:_Run._step", 3, first=tiny.checkpoint_before(2)),
}


@pytest.mark.parametrize("stage", KILLED)
def test_killed_in_round_two_and_continued_it_ends_as_if_undisturbed(one_of_two, spin, tmp_path, stage):
    project = one_of_two.copy(tmp_path / "copy")
    for earlier in project.round_stages(first="rollouts@2", last=stage)[:-1]:
        assert project.run(earlier).status == 0
    assert project.run(stage, before=KILLED[stage]).status == -signal.SIGKILL
    told = project.run_rounds(first=stage)
    assert stage != "dpo@2" or "continuing from step" in told[stage].out
    assert project.tree() == spin.tree()


# Through DVC and the flow


def test_dvc_reads_rounds_as_these_tests_do(tmp_path, monkeypatch):
    """tests/unrolled.py fills in what DVC does."""
    from test_dvc_yaml import declared

    for name in ("dvc.yaml", "params.yaml"):
        shutil.copy(ROOT / name, tmp_path / name)
    params = recipe.render({"rounds": {"count": 3, "reference": "last"}})
    (tmp_path / "params.yaml").write_text(params)
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    monkeypatch.chdir(tmp_path)  # DVC names stages as seen from here
    read = {stage.name: stage for stage in declared(tmp_path)}
    filled = unrolled.stages(yaml.safe_load(params))
    assert read.keys() == filled.keys()
    for address, stage in filled.items():
        assert read[address].command == stage["cmd"] and list(read[address].params) == stage["params"]
        assert sorted(read[address].deps) == sorted(stage["deps"])
        assert sorted(read[address].writes) == sorted(written(stage))


@pytest.fixture(scope="module")
def clean(tmp_path_factory) -> Repository:
    """Two rounds of SPIN by `dvc repro`, committed."""
    made = Repository(tmp_path_factory.mktemp("repository") / "clone", shortened("spin"))
    made.command("dvc", "repro")
    made.command("git", "add", "-A")
    made.command("git", "commit", "-q", "-m", "run")
    return made


@pytest.fixture
def repository(clean) -> Iterator[Repository]:
    """The same, and so again after the test."""
    yield clean
    clean.command("git", "checkout", "-q", "--", ".")
    clean.command("dvc", "checkout", "-q")


@pytest.mark.slow
def test_a_further_round_runs_it_alone(repository):
    repository.apply(shortened("spin", rounds={"count": 3}))
    ran = repository.ran(repository.command("dvc", "repro"))
    assert sorted(ran) == sorted([*(f"{stage}@3" for stage in rounds.STAGES), "register"])


@pytest.mark.slow
def test_a_parameter_of_round_two_reruns_from_there(repository):
    repository.apply(shortened("spin", rounds={"each": {"2": {"dpo": {"beta": 0.7}}}}))
    assert repository.ran(repository.command("dvc", "repro")) == ["dpo@2", "diagnosis@2", "evaluate@2", "register"]


@pytest.mark.slow
def test_a_count_changed_by_hand_stops_dvc_and_the_flow(repository):
    text = (repository.root / "params.yaml").read_text()
    (repository.root / "params.yaml").write_text(text.replace("  count: 2 ", "  count: 3 "))
    for words in (["dvc", "repro"], ["python", "-m", "flows.align"]):
        done = subprocess.run(words, cwd=repository.root, env=repository.environment(), capture_output=True, text=True)
        assert done.returncode != 0 and "python -m tasks.recipe params.yaml" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_flow_leaves_the_lock_that_dvc_leaves(api, repository, tmp_path):
    other = Repository(tmp_path / "clone", shortened("spin"))
    said = other.command("python", "-m", "flows.align", PREFECT_API_URL=api)
    assert "round by round" in said
    assert (other.root / "dvc.lock").read_bytes() == (repository.root / "dvc.lock").read_bytes()


@pytest.mark.slow
def test_killed_in_round_two_dvc_continues_to_the_same_lock(repository, tmp_path):
    other = Repository(tmp_path / "clone", shortened("spin"))
    other.command("dvc", "repro", "reference_logprobs@2")
    other.warm = False  # a stage that is killed is a process of its own
    dvc = subprocess.Popen(
        ["dvc", "repro"],
        cwd=other.root,
        env=other.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    for line in dvc.stdout:
        if line.startswith("Running stage 'dpo@2'"):
            break
    os.killpg(dvc.pid, signal.SIGKILL)
    dvc.communicate()
    other.warm = True
    ran = other.ran(other.command("dvc", "repro"))
    assert ran == ["dpo@2", "diagnosis", "diagnosis@2", "evaluate", "evaluate@2", "register"], (
        "DVC diagnoses and evaluates last, round 1 (plainly named here) too"
    )
    assert (other.root / "dvc.lock").read_bytes() == (repository.root / "dvc.lock").read_bytes()
