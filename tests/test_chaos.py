"""Laws of `python -m benchmarks.chaos` and `benchmarks.faults`: kills happen, and what they spoil is found."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from benchmarks import chaos, disturbed, faults, ledger, witness
from benchmarks.disturbed import Disturbed
from benchmarks.kills import Kill, plan
from benchmarks.ledger import Event, Phase
from rankwise.types import UserError

ROOT = Path(__file__).parent.parent

# A stage of twenty rows, each safe when it is done. Its store is rankwise's own, so that the witness sees it.
STAGE = """
import sys, time
from pathlib import Path
import rankwise.judging as judging, rankwise.store as store

class Judge:
    def ask(self, questions):
        for index, _ in enumerate(questions):
            time.sleep(0.05)
            yield index, {"score": 1.0}
    def read(self, question, raw):
        return type("Reply", (), {"values": (1.0,)})

class Bar:
    def advance(self, *_, **__): ...

with store.Store(Path(".rankwise/stores/verdicts.sqlite")) as rows:
    names = [f"row {n}" for n in range(20)]
    held = rows.held(names) if not FORGETS else ()
    for key, raw in judging._asked(Judge(), {n: n for n in names if n not in held}, "toy", Bar()):
        rows.put_many({key: raw})
    time.sleep(1.0)
    Path("data").mkdir(exist_ok=True)
    Path("data/rows.txt").write_text("".join(sorted(rows.held(names))) + str(FORGETS and len(held)))
"""


def event(name: str, at: float, *keys: str, stage: str = "toy", pid: int = 1, kind: str = "verdict") -> Event:
    return Event(event=name, stage=stage, pid=pid, at=at, kind=kind, keys=list(keys))


def toy(root: Path, *, forgets: bool) -> SimpleNamespace:
    """What Disturbed wants of a copy, with one stage, in a package that stands before this one's."""
    for folder in ("work/tasks", "work/.rankwise/stores", "witness"):
        (root / folder).mkdir(parents=True)
    (root / "work/tasks/__init__.py").write_text("")
    (root / "work/tasks/toy.py").write_text(STAGE.replace("FORGETS", str(forgets)))
    (root / "witness/sitecustomize.py").write_text(Path(witness.__file__).read_text())
    paths = [root / "witness", root / "work", ROOT]
    return SimpleNamespace(root=root / "work", environment={"PYTHONPATH": ":".join(map(str, paths)), "PATH": ""})


def kill(phase: str, share: float, target: str = "everything") -> Kill:
    return Kill(stage="toy", phase=phase, delay_s=0.0, share=share, target=target, at_once=True)


@pytest.mark.parametrize("forgets", [False, True])
def test_a_stage_that_is_killed_ends_and_one_that_asks_again_for_what_it_has_is_found(tmp_path, forgets):
    copy = toy(tmp_path, forgets=forgets)
    kills = [kill("start-up", 0.0), kill("work", 0.1), kill("work", 0.5, "group"), kill("writing", 0.0)]
    command = (sys.executable, "-m", "tasks.toy")
    run = Disturbed(copy, "stage", [command], {"toy": kills}, {"toy": 20})
    told = run.run()
    assert told.defects == [] and told.attempts == 5
    assert [one.hit_phase for one in told.kills][:2] == ["start-up", "work"], (
        "the others may come late, and hit what is"
    )
    assert (tmp_path / "work/data/rows.txt").exists()
    asked_again = ledger.done_though_safe(run.ledger.events)["verdict"]
    assert asked_again >= 20 if forgets else asked_again == 0
    assert all(one.lost_s < 30 for one in told.kills)


def test_a_command_that_fails_by_itself_is_told_of_and_not_run_for_ever(tmp_path):
    copy = toy(tmp_path, forgets=False)
    told = Disturbed(copy, "stage", [(sys.executable, "-c", "exit('broken')")], {}, {}).run()
    assert told.attempts == 1 and "status 1: broken" in told.defects[0]


def test_every_stage_is_hit_in_several_phases_and_a_seed_draws_the_same_kills():
    names = ("start-up", "work", "writing", "between")
    phases = [Phase(stage=stage, name=name, seconds=2.0) for stage in ("sft", "dpo") for name in names]
    drawn = [plan(phases, 9, "flow", random.Random(5)) for _ in range(2)]
    assert drawn[0] == drawn[1] != plan(phases, 9, "flow", random.Random(6))
    assert sorted(map(len, drawn[0].values())) == [4, 5]
    assert all({one.phase for one in kills} == set(names) for kills in drawn[0].values())
    bare = plan(phases, 9, "stage", random.Random(5))
    assert not {one.phase for kills in bare.values() for one in kills} & {"between"}
    assert not {one.target for kills in bare.values() for one in kills} & {"driver"}


def test_phases_are_those_of_the_ledger():
    told = [
        event("start", 0.0),
        event("work", 3.0, "a"),
        event("work", 5.0, "b"),
        event("end", 6.0),
        event("start", 8.0, stage="next"),
        event("end", 9.0, stage="next"),
    ]
    found = [(one.stage, one.name, one.seconds) for one in ledger.phases(told)]
    assert found == [
        ("toy", "start-up", 3.0),
        ("toy", "work", 2.0),
        ("toy", "writing", 1.0),
        ("toy", "between", 2.0),
        ("next", "whole", 1.0),
        ("next", "between", 1.0),
    ]


def test_work_is_lost_since_it_was_safe_and_a_checkpoint_after_the_kill_loses_none():
    told = [event("start", 0.0), event("work", 4.0, "a"), event("safe", 5.0, "a"), event("work", 7.0, "b")]
    assert ledger.lost_s(told, 1, 8.0) == 3.0
    assert ledger.lost_s([*told, event("safe", 8.5, "b")], 1, 8.0) == 0.0
    over = [event("start", 0.0), event("safe", 5.0, "5", kind="checkpoint"), event("end", 6.0)]
    assert ledger.lost_s(over, 1, 7.0) == 7.0, "a checkpoint that went with the end of its training saves nothing"


def test_what_is_done_twice_is_counted_by_kind():
    once = [event("work", 1.0, "a"), event("work", 2.0, "b")]
    twice = [*once, event("work", 3.0, "b", pid=2), event("work", 3.0, "s", kind="step")]
    assert ledger.repeated(twice, once) == Counter({"verdict": 1, "step": 1})
    assert ledger.done_though_safe([*once, event("safe", 2.5, "b", kind="rows"), *twice[2:]]) == {"verdict": 1}


@pytest.mark.parametrize("how", ["a byte", "a file less", "a file more", "a row"])
def test_whatever_differs_from_the_undisturbed_run_is_named(tmp_path, how):
    reference = SimpleNamespace(tree={"data/a": "x", "models/b": "y"}, stores={"verdicts": {"k": "v"}}, lock=b"")
    mine, stores = dict(reference.tree), {"verdicts": dict(reference.stores["verdicts"])}
    if how == "a row":
        stores["verdicts"]["other"] = "v"
    else:
        mine |= {"a byte": {"models/b": "z"}, "a file more": {"models/b.tmp": "y"}}.get(how, {})
        mine = {path: digest for path, digest in mine.items() if how != "a file less" or path != "models/b"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chaos, "tree", lambda root: mine)
        patch.setattr(chaos, "stores", lambda root: stores)
        [wrong] = chaos.differences(reference, SimpleNamespace(root=tmp_path), lock=False)
    assert ("verdicts" if how == "a row" else "models/b") in wrong


@pytest.mark.parametrize("seen, outcome", [("went on", "holds"), (faults.Skipped("no root"), "skipped")])
def test_a_scenario_that_cannot_be_tried_is_not_told_as_passed(seen, outcome):
    def work() -> str:
        if isinstance(seen, str):
            return seen
        raise seen

    assert faults._tried("disk", "full", work).outcome == outcome
    assert faults._tried("disk", "full", lambda: exec("raise AssertionError('no')")).outcome == "FAILS"


def test_a_killed_process_is_found_by_its_mark_and_only_by_it():
    assert disturbed.marked("no such attempt") == {}


@pytest.mark.parametrize("options", [["--kills", "0"], ["--drivers", "make"], ["--rows", "many"]])
def test_what_cannot_be_done_is_refused_before_anything_runs(options, monkeypatch, capsys):
    monkeypatch.setattr(chaos, "Reference", lambda *_, **__: pytest.fail("ran in spite of it"))
    with pytest.raises((SystemExit, UserError)):
        chaos.main(options)


@pytest.mark.slow
def test_killed_again_and_again_the_first_stages_leave_the_bytes_of_an_undisturbed_run(tmp_path):
    found = tmp_path / "found.json"
    words = ["--rows", "tiny", "--target", "sft", "--kills", "4", "--drivers", "dvc", "--json", str(found)]
    command = [sys.executable, "-m", "benchmarks.chaos", *words]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    [run] = json.loads(found.read_text())["runs"]
    assert run["wrong"] == [] and len(run["kills"]) >= 2, "a stage that was quicker than before may have missed one"
    assert "same bytes" in done.stdout
