"""Laws of the flow promote: a person sees the facts, has time, is asked once, and silence changes nothing."""

from __future__ import annotations

import json
import threading
import time

import pytest

from flows import promote as module
from rankwise.types import UserError
from tasks.promote import _asked

RECORD = {
    "name": "rankwise-policy",
    "verdict": "keep",
    "why": "win rate (judge), lower bound: 0.4, above 0.5 is asked for",
    "champion": {"version": "1", "md5": "a.dir", "commit": ""},
    "challenger": {"version": "2", "md5": "b.dir", "commit": ""},
    "checks": [],
    "pages": {"champion": "http://m/1", "challenger": "http://m/2", "model": "http://m"},
    "decision": None,
}


@pytest.fixture
def asked(api, tmp_path, monkeypatch):
    """What the flow asks of tasks.promote, whose part is played here; within a project and a server."""
    from prefect.settings import PREFECT_API_URL, temporary_settings

    told: list[tuple[str, ...]] = []

    def play(*words: str) -> dict:
        told.append(words)
        if not any(words):
            return RECORD
        what = {"--approve": "promoted", "--reject": "rejected", "--apply": "promoted"}[words[0].partition("=")[0]]
        return RECORD | {"decision": {"what": what, "by": "Ada", "reason": "read them", "at": "2026-11-28T10:00:00"}}

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RANKWISE_HOME", str(tmp_path / ".rankwise"))
    monkeypatch.setattr(module, "_run_task", play)
    with temporary_settings({PREFECT_API_URL: api}):
        yield told


def answer_when_paused(api: str, said: dict, found: dict) -> threading.Thread:
    """As a person does who opens the paused run: looks at its artifact, fills in the form."""

    def wait() -> None:
        from prefect.client.orchestration import get_client
        from prefect.client.schemas.filters import FlowRunFilter
        from prefect.settings import PREFECT_API_URL, temporary_settings

        paused = FlowRunFilter.model_validate({"state": {"type": {"any_": ["PAUSED"]}}})
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            deadline = time.monotonic() + 60
            while not (runs := client.read_flow_runs(flow_run_filter=paused)) and time.monotonic() < deadline:
                time.sleep(0.2)
            found["artifacts"] = [one.data for one in client.read_artifacts() if one.flow_run_id == runs[0].id]
            found["bad"] = client.resume_flow_run(runs[0].id, run_input={"approve": True, "by": "", "reason": ""})
            found["good"] = client.resume_flow_run(runs[0].id, run_input=said)

    thread = threading.Thread(target=wait)
    thread.start()
    return thread


@pytest.mark.slow
def test_a_person_sees_the_facts_and_the_word_is_carried_out_on_that_pair(api, asked):
    for approve, verb in ((True, "--approve"), (False, "--reject")):
        found: dict = {}
        person = answer_when_paused(api, {"approve": approve, "by": "Ada", "reason": "read them"}, found)
        state = module.promote(approval=True, wait_hours=0.05, return_state=True)
        person.join()
        assert any("stays champion" in text for text in found["artifacts"]), "the facts are there before the question"
        assert found["bad"].status.value == "REJECT", "a name and a reason are needed"
        assert state.is_completed() and "Decided by Ada" in state.message
        assert asked == [("",), (f"{verb}=Ada", "--reason=read them", "--versions=1,2")]
        said = _asked(asked[1])
        assert (said.verb, said.by, said.reason, said.versions) == (verb[2:], "Ada", "read them", "1,2")
        asked.clear()


@pytest.mark.slow
def test_silence_moves_nothing_and_the_run_says_so(asked):
    state = module.promote(approval=True, wait_hours=0.001, return_state=True)
    assert state.is_failed() and "undecided and never resumed" in state.message
    assert asked == [("",)]


@pytest.mark.slow
def test_the_rule_alone_asks_nobody(asked):
    state = module.promote(apply=True, return_state=True)
    assert state.is_completed() and asked == [("--apply",)]
    (outcome,) = state.result()
    assert json.loads(json.dumps(outcome))["stage"] == "promote"


def test_words_that_look_like_options_are_a_name_a_reason_and_a_pair():
    said = _asked(["--approve=-x", "--reason=--nice", "--versions=-,1"])
    assert (said.verb, said.by, said.reason, said.versions) == ("approve", "-x", "--nice", "-,1")


def test_a_person_and_the_rule_do_not_decide_together():
    with pytest.raises(UserError, match="either a person decides or the rule does"):
        module.prepare(approval=True, apply=True, wait_hours=1)
    with pytest.raises(UserError, match="more than 0"):
        module.prepare(approval=True, apply=False, wait_hours=0)
