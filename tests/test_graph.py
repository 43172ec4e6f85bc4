"""Laws of the graph: it is DVC's, and so is what DVC says of each run."""

from __future__ import annotations

import pytest

from flows import graph
from rankwise.types import UserError


@pytest.fixture
def here(toy, monkeypatch):
    monkeypatch.chdir(toy.root)
    return toy


def names(nodes: list[graph.Node]) -> list[str]:
    return [node.name for node in nodes]


def test_the_plan_is_the_order_in_which_dvc_runs_stages(here):
    here.command("dvc", "repro")
    assert names(graph.plan()) == here.attempts() == list(here.ORDER)


def test_each_stage_knows_the_stages_that_it_reads_from(here):
    assert {node.name: node.upstream for node in graph.plan()} == {
        "prompts": (),
        "sft": ("prompts",),
        "verdicts": ("sft",),
        "evaluate": ("verdicts",),
    }


def test_a_target_ends_the_plan(here):
    assert names(graph.plan("sft")) == ["prompts", "sft"]


def test_a_group_name_means_all_of_its_rounds(here):
    text = (
        "stages:\n  dpo:\n    foreach: [1, 2]\n    do:\n"
        "      cmd: echo ${item} > dpo${item}\n      outs:\n      - dpo${item}\n"
        "  last:\n    cmd: cat dpo1 > last\n    deps: [dpo1]\n    outs: [last]\n"
    )
    (here.root / "dvc.yaml").write_text(text)
    assert sorted(names(graph.plan("dpo"))) == ["dpo@1", "dpo@2"]
    assert graph.matches(["dpo"], "dpo@2") and not graph.matches(["dpo"], "dpo2")


def test_a_misspelt_target_gets_the_near_name(here):
    with pytest.raises(UserError, match="did you mean 'verdicts'"):
        graph.plan("verdict")


def test_a_broken_dvc_yaml_is_a_user_error_that_names_the_file(here):
    (here.root / "dvc.yaml").write_text("stages: [")
    with pytest.raises(UserError, match=r"dvc\.yaml"):
        graph.plan()


def test_stale_is_what_dvc_status_says(here):
    everything = list(here.ORDER)
    assert set(graph.stale(everything)) == set(everything)
    here.command("dvc", "repro")
    assert graph.stale(everything) == {}
    (here.root / "verdicts.txt").unlink()
    assert set(graph.stale(everything)) == {"verdicts", "evaluate"}  # evaluate reads what is gone


def read(stage: str, text: str, status: int) -> graph.Outcome:
    reading = graph.Reading(stage)
    for line in text.splitlines():
        reading.take(line)
    return reading.outcome(status, 1.0)


@pytest.mark.parametrize("how", ["didn't change", "is cached", "ran"])
def test_dvc_itself_says_whether_a_stage_ran(here, how):
    here.command("dvc", "repro")
    if how == "is cached":
        (here.root / "sft.txt").unlink()
    force = ["--force"] if how == "ran" else []
    told = here.command("dvc", "repro", "--single-item", *force, "sft")
    outcome = read("sft", told.stdout.decode() + told.stderr.decode(), 0)
    assert (outcome.state, outcome.note) == {
        "didn't change": ("cached", "didn't change"),
        "is cached": ("cached", "restored from DVC's cache"),
        "ran": ("ran", ""),
    }[how]


def test_a_stage_cannot_talk_itself_into_being_cached():
    text = "Running stage 'sft':\n> exec x\nStage 'sft' didn't change, skipping"
    assert read("sft", text, 0).state == "ran"


@pytest.mark.parametrize(
    ("text", "status", "note"),
    [
        ("error: row 7: no prompt\nERROR: failed to run: x, exited with 2", 2, "row 7: no prompt"),
        ("Traceback\nValueError: boom\nERROR: failed to run: x, exited with 1", 1, "ValueError: boom"),
        ("ERROR: failed to run: x, exited with -9", -9, "killed by signal 9"),
        ("ERROR: failed to reproduce 'sft': missing data 'source': data/x", 2, "missing data 'source'"),
        ("ERROR: failed to reproduce 'sft': output 'y' does not exist", 255, "output 'y' does not exist"),
    ],
)
def test_a_failure_carries_the_stage_status_and_the_best_reason(text, status, note):
    outcome = read("sft", text, 255)
    assert outcome.state == "failed" and outcome.status == status and note in outcome.note


def test_a_shown_line_does_not_name_the_stage_again():
    reading = graph.Reading("sft")
    assert reading.take("[sft] 3 epochs") == "3 epochs"
    assert reading.take("sft: 10/20 steps") == "10/20 steps"
    assert reading.take("Updating lock file 'dvc.lock'") is None
