"""A judge on a server: every verdict once, whatever fails on the way; no token beyond the budget; no key anywhere."""

import itertools
import json
import logging
import math
import os
import random
import subprocess
import sys
import threading
import time
import traceback
from collections import Counter
from dataclasses import replace
from email.utils import formatdate
from pathlib import Path

import pytest
from fault_server import FaultServer, Judging

from rankwise import client as client_module
from rankwise.budget import Budget
from rankwise.client import Endpoint
from rankwise.judging import judge_rows, key_of
from rankwise.rubrics import Rubric
from rankwise.server_judge import ServerJudge
from rankwise.store import Store
from rankwise.types import Answer, Row, Unavailable, UserError, text_prompt
from rankwise.verdicts import LOG3, Question, read_verdicts, write_verdicts

ROOT = Path(__file__).parent.parent
FAULTS = ("busy", "error", "cut", "not_json", "no_choices", "too_many", "aborted", "reset")
KEY = "sk-canary-e07c1a53"


@pytest.fixture
def rubric(tmp_path) -> Rubric:
    path = tmp_path / "longer.md"
    path.write_text("The longer answer is the better one.")
    return Rubric(path)


def table(count: int, k: int = 2) -> list[Row]:
    """Rows whose later answers are longer, by one letter each."""
    answers = lambda i: tuple(Answer(text=f"answer to {i} " + "x" * (place + 1)) for place in range(k))
    return [Row(id=f"r{i}", prompt=text_prompt(f"question {i}"), answers=answers(i)) for i in range(count)]


def a_judge(server: FaultServer, rubric: Rubric, *, budget: Budget | None = None, model="tiny", **given) -> ServerJudge:
    of_endpoint = {name: given.pop(name) for name in ("key", "retries", "concurrency", "timeout_s") if name in given}
    endpoint = Endpoint(**{"url": server.url, "concurrency": 8, "retries": 6, "prefix": "J", **of_endpoint})
    return ServerJudge("judge", model=model, rubric=rubric, endpoint=endpoint, budget=budget, **given)


def a_server(**dials) -> FaultServer:
    return FaultServer(**{"dialect": "chat", "judge": Judging(), **dials})


def judged(judge: ServerJudge, rows: list[Row], path: Path) -> tuple[list, int]:
    with Store(path) as store:
        return judge_rows(judge, rows, store)


def contents(replies: list) -> list[tuple]:
    """What a table of replies says, without their costs."""
    return [(one.question.row_id, one.question.places, one.values, one.said, one.reason) for one in replies]


@pytest.fixture(autouse=True)
def _short_pauses(monkeypatch):
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 0.02)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", 0.1)


# What is read


def test_a_judge_that_knows_is_right_about_every_pair_in_both_orders(rubric, tmp_path):
    rows = table(20, k=3)
    for form in ("json", "logprobs"):
        with a_server() as server:
            replies, asked = judged(a_judge(server, rubric, reply=form), rows, tmp_path / form)
        assert asked == len(replies) == 20 * 6 == len(server.asked)
        for reply in replies:
            longer = reply.question.places.index(max(reply.question.places))
            assert reply.values[longer] > reply.values[1 - longer] and reply.said == "AB"[longer]


def test_half_the_sum_of_both_orders_is_the_servers_position_bias_and_half_the_difference_its_preference(
    rubric, tmp_path
):
    """The server's log-odds are worth(first) − worth(second) + bias, and longer answers here differ by 1."""
    with a_server(judge=Judging(position_bias=0.7)) as server:
        replies, _ = judged(a_judge(server, rubric, reply="logprobs"), table(3), tmp_path / "store")
    odds = {(one.question.row_id, one.question.places): one.values[0] - one.values[1] for one in replies}
    for i in range(3):
        one, other = odds[f"r{i}", (0, 1)], odds[f"r{i}", (1, 0)]
        assert (one + other) / 2 == pytest.approx(0.7) and (one - other) / 2 == pytest.approx(-1)
    assert all(one.mass == pytest.approx(0.9) for one in replies)


def letter(rubric: Rubric, *top: tuple[str, float], answers: int = 2):
    """The reply read from these most probable tokens."""
    question = Question(row_id="r", prompt=text_prompt("q"), answers=tuple("uvwxyz"[:answers]), places=(0, 1))
    listed = [{"token": token, "logprob": logp} for token, logp in top]
    choice = {"message": {"content": "A"}, "logprobs": {"content": [{"top_logprobs": listed}]}}
    judge = ServerJudge("j", model="m", rubric=rubric, endpoint=Endpoint(url="http://h/v1"), reply="logprobs")
    return judge.read(question, {"reply": {"choices": [choice]}})


def test_the_tokens_of_a_letter_count_together_whatever_blanks_they_have(rubric):
    found = letter(rubric, ("A", math.log(0.5)), (" A", math.log(0.1)), ("\nB", math.log(0.2)), ("AB", math.log(0.1)))
    assert found.values == pytest.approx((math.log(0.6), math.log(0.2))) and found.mass == pytest.approx(0.8)
    assert found.said == "A" and found.reason == ""


def test_a_letter_that_is_not_told_is_as_probable_as_can_be_and_none_at_all_is_no_verdict(rubric):
    found = letter(rubric, ("B", math.log(0.9)), ("Both", math.log(0.05)), ("?", math.log(0.01)))
    assert found.values == pytest.approx((math.log(0.01), math.log(0.9))) and found.mass == pytest.approx(0.9)
    assert "as probable as can be: A" in found.reason
    for top in ([], [("a", -0.1)], [("A", -9999.0)], [("A", -math.inf)], [("A", math.nan)]):
        assert letter(rubric, *top).values is None


def test_a_server_that_tells_one_token_tells_no_tie(rubric):
    """What the told tokens leave over bounds the letter that is not told; where that is more, nothing is known."""
    found = letter(rubric, ("A", -0.01))
    assert found.values == pytest.approx((-0.01, math.log(-math.expm1(-0.01)))) and found.said == "A"
    assert letter(rubric, ("B", 0.0)).values == pytest.approx((math.log(1e-6), 0.0))
    for top in ([("A", math.log(0.4))], [("The", math.log(0.5)), ("A", math.log(0.1))]):
        assert letter(rubric, *top).values is None and "too few tokens" in letter(rubric, *top).reason


def test_of_a_list_each_letter_has_its_log_prob(rubric):
    found = letter(rubric, *((name, math.log(p)) for name, p in (("C", 0.5), ("A", 0.3), ("B", 0.1))), answers=3)
    assert found.values == pytest.approx((math.log(0.3), math.log(0.1), math.log(0.5)))
    assert found.said == "C > A > B"


def test_lists_come_as_rankings_and_the_best_as_pairs(rubric, tmp_path):
    with a_server() as server:
        replies, _ = judged(a_judge(server, rubric), table(2, k=5), tmp_path / "store")
    lists = [one for one in replies if len(one.question.places) == 5]
    assert len(lists) == 2 * 5 and len(replies) - len(lists) == 2 * 4 * 3
    for reply in lists:
        worth = dict(zip(reply.question.places, reply.values))
        assert [worth[place] for place in range(5)] == pytest.approx([LOG3 * n for n in range(5)])


@pytest.mark.parametrize("dial", ["quoting", "partial", "malformed"])
def test_a_reply_that_is_no_verdict_is_asked_for_again_and_then_is_absent(dial, rubric, tmp_path):
    with a_server(judge=Judging(**{dial: 1.0})) as server:
        replies, asked = judged(a_judge(server, rubric, reasks=2), table(4), tmp_path / "all")
        assert asked == len(server.asked) == 4 * 2 * 3
        assert all(one.values is None and one.said == "" and one.reason for one in replies)
        assert [one.question.attempt for one in replies] == [2] * 8
        again, none = judged(a_judge(server, rubric, reasks=2), table(4), tmp_path / "all")
        assert none == 0 and again == replies
    with a_server(judge=Judging(**{dial: 0.4})) as server:
        replies, _ = judged(a_judge(server, rubric, reasks=9), table(20), tmp_path / "some")
    with a_server() as whole:
        expected, _ = judged(a_judge(whole, rubric), table(20), tmp_path / "whole")
    assert contents(replies) == contents(expected)
    assert len(server.asked) > 50


def test_ties_come_as_often_as_the_server_says_them(rubric, tmp_path):
    with a_server(judge=Judging(ties=0.3)) as server:
        replies, _ = judged(a_judge(server, rubric), table(100), tmp_path / "store")
    ties = [one for one in replies if one.said == "tie"]
    assert 0.2 < len(ties) / 200 < 0.4 and all(one.values == (0.0, 0.0) for one in ties)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"finish_reason": "length"}, "cut at max_reply_tokens"),
        ({"finish_reason": "content_filter"}, "filter took it back"),
        ({"message": {"content": None, "refusal": "I will not"}}, "will not say: I will not"),
        ({"message": {"content": None}}, "ended with 'stop'"),
    ],
)
def test_a_reply_that_the_server_ended_is_none_and_says_why(change, why, rubric, tmp_path):
    with a_server(odd=lambda choice: choice.update(change)) as server:
        replies, _ = judged(a_judge(server, rubric, reasks=0), table(1), tmp_path / "store")
    assert all(one.values is None and why in one.reason for one in replies)


# Under faults


def test_with_faults_of_every_kind_each_verdict_is_there_once_and_is_the_faultless_servers(rubric, tmp_path):
    rows = table(150)
    with a_server() as whole, a_server(faults=dict.fromkeys(FAULTS, 0.02), judge=Judging(partial=0.03)) as faulty:
        expected, _ = judged(a_judge(whole, rubric), rows, tmp_path / "whole")
        found, _ = judged(a_judge(faulty, rubric, concurrency=50), rows, tmp_path / "faulty")
    assert contents(found) == contents(expected)
    assert set(faulty.given) == {*FAULTS, "partial"} and faulty.too_early == 0
    assert Counter((one.question.row_id, one.question.places) for one in found).most_common(1)[0][1] == 1


def test_a_reply_that_comes_too_late_is_asked_for_again(rubric, tmp_path):
    with a_server(faults={"slow": 0.1}, slow_s=1.5) as server:
        replies, _ = judged(a_judge(server, rubric, timeout_s=0.5), table(20), tmp_path / "store")
    assert server.given["slow"] and all(one.values for one in replies)


def test_what_was_answered_is_kept_when_the_rest_is_given_up(rubric, tmp_path):
    never = lambda body: "question 3" in body["messages"][-1]["content"]
    with a_server(never=never) as server:
        judge = a_judge(server, rubric, retries=1)
        with pytest.raises(Unavailable, match=r"2 got no answer .*row 'r3', answers"):
            judged(judge, table(8), tmp_path / "store")
        asked = len(server.asked)
        server.never = lambda body: False
        replies, again = judged(judge, table(8), tmp_path / "store")
        assert again == 2 == len(server.asked) - asked and len(replies) == 16


def test_a_question_that_waits_to_be_sent_again_keeps_no_place(rubric, tmp_path, monkeypatch):
    """Four requests may be under way, and four are, while the first question waits a second and more for its turn."""
    monkeypatch.setattr(client_module, "FIRST_PAUSE_S", 2.0)
    monkeypatch.setattr(client_module, "LONGEST_PAUSE_S", 2.0)
    together, seen = threading.Barrier(4), Counter()

    def fails(body: dict) -> bool:
        seen[json.dumps(body)] += 1
        first = len(seen) == 1
        if not first and len(seen) <= 5:
            together.wait(timeout=1.2)
        return first and seen.total() == 1

    with a_server(never=fails) as server:
        judged(a_judge(server, rubric, concurrency=4), table(6), tmp_path / "store")
    assert not together.broken and server.most_at_once == 4 and len(server.asked) == 13


def test_retry_after_is_read_as_seconds_milliseconds_or_a_date():
    date = lambda seconds: formatdate(time.time() + seconds, usegmt=True)
    read = client_module._retry_after_s
    assert [read({"retry-after": text}) for text in ("7", "0.25", "soon", "nan", "0")] == [7, 0.25, None, None, None]
    assert read({"retry-after-ms": "1500", "retry-after": "9"}) == 1.5 and read({}) is None
    assert read({"retry-after": date(7230), "date": date(7200)}) == 30, "of a server whose clock is two hours ahead"
    assert read({"retry-after": date(30)}) == pytest.approx(30, abs=2) and read({"retry-after": date(-30)}) == 0
    assert all(7 <= client_module._pause_s(0, 7) <= 7 * 1.25 for _ in range(20))


def test_a_server_that_asks_for_more_than_two_minutes_is_not_waited_for(rubric, tmp_path):
    with a_server(faults={"busy": 1.0}, retry_after_s=121) as server:
        with pytest.raises(Unavailable, match="status 429"):
            judged(a_judge(server, rubric), table(1), tmp_path / "store")
        assert len(server.asked) == 2


def test_pauses_grow_and_are_never_the_same(monkeypatch):
    monkeypatch.undo()
    for attempt, most in enumerate((0.5, 1, 2, 4, 8, 8)):
        drawn = [client_module._pause_s(attempt, None) for _ in range(50)]
        assert 0.75 * most <= min(drawn) < max(drawn) <= most and len(set(drawn)) == 50


def test_models_that_reason_are_given_the_limit_by_its_later_name(rubric, tmp_path):
    with a_server(later_name=True) as server:
        replies, _ = judged(a_judge(server, rubric, max_reply_tokens=99), table(10), tmp_path / "store")
        assert all(one.values for one in replies)
        assert all(body["max_completion_tokens"] == 99 and "max_tokens" not in body for body in server.asked)


# Questions that the server will not have


def of_row(name: str):
    """Whether a request is about this row of a table, or shows its text."""
    return lambda body: f'"question {name}"' in body["messages"][1]["content"]


def test_a_question_that_is_refused_leaves_the_others_be_and_is_absent_with_the_servers_words(rubric, tmp_path):
    with a_server(refuse=of_row("3"), latency_s=0.05) as server:
        replies, _ = judged(a_judge(server, rubric, reasks=1), table(30), tmp_path / "store")
        refused = [one for one in replies if one.values is None]
        assert {one.question.row_id for one in refused} == {"r3"} and len(refused) == 2 and len(replies) == 60
        assert all("status 400" in one.reason and "this one I will not have" in one.reason for one in refused)
        assert judged(a_judge(server, rubric, reasks=1), table(30), tmp_path / "store") == (replies, 0)


def test_where_the_first_questions_are_all_refused_the_server_is_to_blame_and_nothing_is_kept(rubric, tmp_path):
    for count in (3, 50):
        with a_server(refuse=lambda body: True) as server:
            with pytest.raises(UserError, match=rf"refuses the first {min(count * 2, 20)} questions.*will not have"):
                judged(a_judge(server, rubric), table(count), tmp_path / "store")
            assert len(server.asked) == 0  # of those that it took
        with Store(tmp_path / "store") as store:
            assert len(store) == 0


def test_a_few_refused_questions_that_are_left_over_of_an_earlier_run_are_kept(rubric, tmp_path):
    budget = lambda: Budget(tmp_path / "spending")
    with a_server(refuse=of_row("3")) as server:
        judged(a_judge(server, rubric, budget=budget()), table(3), tmp_path / "store")
        replies, asked = judged(a_judge(server, rubric, budget=budget(), reasks=0), table(4), tmp_path / "store")
    assert asked == 2 and sum(one.values is None for one in replies) == 2


def test_a_refusal_that_quotes_the_later_name_from_an_answer_changes_no_other_request(rubric, tmp_path):
    rows = table(12)
    evil = Answer(text="EVIL max_completion_tokens")
    rows[3] = replace(rows[3], answers=(rows[3].answers[0], evil))
    with a_server(refuse=lambda body: "EVIL" in body["messages"][1]["content"], why=evil.text) as server:
        replies, _ = judged(a_judge(server, rubric, reasks=0, concurrency=2), rows, tmp_path / "store")
    assert sum(one.values is None for one in replies) == 2 and server.asked
    assert not any("max_completion_tokens" in body for body in server.asked)


# What is asked


def test_what_is_sent_is_the_rubrics_conversation_and_the_form_of_the_reply(rubric, tmp_path):
    with a_server() as server:
        judged(a_judge(server, rubric), table(1), tmp_path / "json")
        judged(a_judge(server, rubric, reply="logprobs"), table(1), tmp_path / "letter")
    first, letters = server.asked[0], server.asked[-1]
    assert [message["role"] for message in first["messages"]] == ["system", "user"]
    assert "answer to 0" not in first["messages"][0]["content"]
    schema = first["response_format"]["json_schema"]
    assert schema["strict"] and schema["schema"]["properties"]["verdict"]["enum"] == ["A", "B", "tie"]
    assert first.items() >= {"model": "tiny", "temperature": 0.0, "max_tokens": 256}.items() and "seed" not in first
    assert letters.items() >= {"max_tokens": 1, "logprobs": True, "top_logprobs": 20, "temperature": 0.0}.items()


def test_draws_are_told_apart_by_their_seeds(rubric, tmp_path):
    with a_server(judge=Judging(noise=3.0)) as server:
        replies, _ = judged(a_judge(server, rubric, temperature=1.0, samples=3), table(10), tmp_path / "store")
    assert len(replies) == 60 == len({json.dumps(body) for body in server.asked})
    assert len({(one.question.row_id, one.question.places, one.said) for one in replies}) > 20


def test_the_identity_is_what_replies_depend_on_and_nothing_else(rubric, tmp_path):
    def identity(model="m", text=None, url="http://a/v1", called=None, **given) -> str:
        other = rubric
        if text:
            (tmp_path / "other.md").write_text(text)
            other = Rubric(tmp_path / "other.md")
        return ServerJudge("n", model=model, rubric=other, endpoint=Endpoint(url=url, model=called), **given).identity

    same = {identity(), identity(url="http://b/v1"), identity(samples=3, temperature=0.0), identity(reasks=0)}
    assert same == {identity(budget=Budget(limit=5)), identity(called="m")}
    other = [{"model": "m2"}, {"text": "The shorter one."}, {"reply": "logprobs"}, {"called": "m2"}]
    other += [{"temperature": 0.5}, {"max_reply_tokens": 9}]
    assert len({identity(**one) for one in other} - same) == len(other)
    letters = {"reply": "logprobs"}
    assert identity(**letters) == identity(**letters, temperature=1.0, max_reply_tokens=9)


def test_the_endpoints_name_for_a_model_is_asked_for(rubric, tmp_path):
    with a_server() as server:
        endpoint = Endpoint(url=server.url, model="as it is called here")
        judge = ServerJudge("j", model="as the recipe calls it", rubric=rubric, endpoint=endpoint)
        judged(judge, table(1), tmp_path / "store")
    assert {body["model"] for body in server.asked} == {"as it is called here"}


# Which model it was


def test_a_reply_of_another_model_than_the_first_ends_the_asking_and_names_both(rubric, tmp_path):
    with a_server(served=lambda number: "tiny-may" if number < 9 else "tiny-june") as server:
        budget = Budget(tmp_path / "spending")
        judge = a_judge(server, rubric, budget=budget, concurrency=1)
        with pytest.raises(UserError, match=r"answers as 'tiny-june', and the first .* from 'tiny-may'") as error:
            judged(judge, table(50), tmp_path / "store")
        assert not isinstance(error.value, Unavailable) and len(server.asked) < 15
        with Store(tmp_path / "store") as store:
            assert len(store) == 8
        # A later run has not forgotten, and under another name all is asked anew.
        asked = len(server.asked)
        with pytest.raises(UserError, match=r"'tiny-june'.*'tiny-may'"):
            judged(a_judge(server, rubric, budget=Budget(tmp_path / "spending")), table(50), tmp_path / "store")
        assert len(server.asked) - asked <= 20
        renamed = a_judge(server, rubric, budget=Budget(tmp_path / "spending"), model="tiny-june")
        assert judged(renamed, table(5), tmp_path / "store")[1] == 10


def test_another_folder_under_the_same_name_is_another_model_and_a_moved_one_is_not(rubric, tmp_path):
    run = lambda count: judged(
        a_judge(server, rubric, budget=Budget(tmp_path / "spending")), table(count), tmp_path / "store"
    )
    with a_server(root="/models/one") as server:
        run(1)
        server.root = "/elsewhere/one/"
        assert run(2)[1] == 2
        server.root = "/models/two"
        with pytest.raises(UserError, match=r"'tiny \(two\)'.*'tiny \(one\)'"):
            run(3)


def test_the_raw_reply_keeps_model_usage_time_and_sendings(rubric, tmp_path):
    with a_server(faults={"error": 0.5}, latency_s=0.02) as server:
        judge, rows = a_judge(server, rubric), table(5)
        replies, _ = judged(judge, rows, tmp_path / "store")
    with Store(tmp_path / "store") as store:
        raws = list(store.get_many(key_of(judge.identity, one.question) for one in replies).values())
    assert {raw["reply"]["model"] for raw in raws} == {"tiny"}
    assert all(raw["seconds"] >= 0.02 and raw["reply"]["usage"]["prompt_tokens"] > 0 for raw in raws)
    assert sum(raw["sendings"] for raw in raws) == len(server.asked) > 10


# The budget


@pytest.mark.parametrize("limit", [2_500, 5_000, 9_999])
def test_the_server_never_counts_a_token_beyond_the_budget_and_more_of_it_goes_on(limit, rubric, tmp_path):
    rows, faults = table(40), dict.fromkeys(FAULTS, 0.02)
    with a_server(faults=faults, judge=Judging(partial=0.05)) as server:
        run = lambda limit: judged(
            a_judge(
                server, rubric, max_reply_tokens=40, budget=Budget(tmp_path / "spending", limit=limit, price_in=2.0)
            ),
            rows,
            tmp_path / "store",
        )
        with pytest.raises(UserError, match=rf"J_BUDGET_TOKENS is {limit:,}; .* kept; \d+ are missing") as error:
            run(limit)
        assert not isinstance(error.value, Unavailable)
        spent = Budget(tmp_path / "spending").spent()
        assert server.used.total() <= spent.tokens <= limit
        with Store(tmp_path / "store") as store:
            kept = len(store)
        before = len(server.asked)
        with pytest.raises(UserError, match="BUDGET_TOKENS"):
            run(limit)  # nothing more is sent
        assert len(server.asked) == before
        replies, asked = run(None)
        assert asked >= 80 - kept and all(one.values for one in replies)
        spent = Budget(tmp_path / "spending").spent()
        assert spent.prompt + spent.completion == server.whole.total() and server.used.total() <= spent.tokens


def test_without_faults_the_account_is_the_servers_to_the_token(rubric, tmp_path):
    with a_server() as server:
        judge = a_judge(server, rubric, budget=Budget(tmp_path / "spending", price_in=3.0, price_out=15.0))
        replies, _ = judged(judge, table(30), tmp_path / "store")
    spent = judge.spent()
    assert (spent.prompt, spent.completion) == (server.used["prompt_tokens"], server.used["completion_tokens"])
    assert (spent.prompt, spent.completion) == tuple(
        sum(getattr(one, f"{kind}_tokens") for one in replies) for kind in ("prompt", "completion")
    )
    assert spent.charged == 0 and spent.requests == 60
    assert spent.money == pytest.approx((3 * spent.prompt + 15 * spent.completion) / 1e6)


def test_a_budget_that_fits_is_used_to_its_end_although_requests_are_charged_with_more(rubric, tmp_path):
    """Eight at once are charged with eight times the most; what they leave is there for the ninth."""
    with a_server(latency_s=0.01) as server:
        judge = a_judge(server, rubric)
        judged(judge, table(20), tmp_path / "free")
        most = max(len(json.dumps(body, ensure_ascii=False)) + 256 + 256 for body in server.asked)
        enough = judge.spent().tokens + most
        replies, _ = judged(a_judge(server, rubric, budget=Budget(limit=enough)), table(20), tmp_path / "bounded")
    assert len(replies) == 40


def test_what_was_under_way_when_a_process_died_stays_charged(tmp_path):
    dead = Budget(tmp_path / "spending", limit=1000)
    assert dead.reserve(400) and dead.reserve(300)
    dead.settle(300, prompt=40, completion=10)
    after = Budget(tmp_path / "spending", limit=1000)
    assert after.spent().tokens == 450 and after.spent().charged == 400
    assert not after.reserve(551) and after.reserve(550)
    assert after.spent(now=True).tokens == 550


def test_several_who_spend_at_once_stay_within_one_budget(tmp_path):
    one, other = (Budget(tmp_path / "spending", limit=100_000) for _ in range(2))
    draw, used = random.Random(0), 0
    for _ in range(300):
        budget, charge = draw.choice([one, other]), draw.randint(1, 2000)
        if budget.reserve(charge):
            used += charge
    assert 98_000 < used == one.spent().tokens <= 100_000


def test_accounts_are_apart(tmp_path):
    one, other = (Budget(tmp_path / "spending", account=name, limit=100) for name in ("A", "B"))
    assert one.reserve(100) and other.reserve(100) and not one.reserve(1)


def test_a_server_that_counts_more_than_bytes_is_warned_of(rubric, tmp_path, capfd):
    with a_server(extra_tokens=5000) as server:
        judge = a_judge(server, rubric, concurrency=1)
        judged(judge, table(3), tmp_path / "store")
    assert judge.spent().tokens == server.used.total()
    assert "tokens more a request than its bytes" in capfd.readouterr().err


def test_a_budget_comes_from_the_environment(tmp_path):
    told = {"J_BUDGET_TOKENS": "2_000", "J_PRICE_IN": "2", "J_PRICE_OUT": "0.5"}
    budget = Budget.from_environment("J", told, path=tmp_path / "a")
    assert budget.limit == 2000 and budget.reserve(2000) and not budget.reserve(1)
    budget.settle(2000, prompt=1000, completion=100)
    assert budget.spent().money == pytest.approx(0.00205)
    assert Budget.from_environment("J", {}, path=tmp_path / "b").limit is None
    for name, value in (("J_BUDGET_TOKENS", "many"), ("J_PRICE_IN", "-1"), ("J_PRICE_OUT", "inf")):
        with pytest.raises(UserError, match=f"{name} is '{value}'"):
            Budget.from_environment("J", {name: value}, path=tmp_path / "c")


# The key


def files_with_the_key(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file() and KEY.encode() in path.read_bytes()]


@pytest.mark.parametrize("trouble", ["none", "faults", "wrong", "refused"])
def test_a_key_is_in_no_file_log_exception_or_table_even_where_the_server_quotes_it(
    trouble, rubric, tmp_path, caplog, capfd
):
    dials = {
        "none": {},
        "faults": {"faults": {"error": 0.6, "busy": 0.1, "reset": 0.2}},
        "wrong": {"key": "another"},
        "refused": {"refuse": lambda body: True},
    }[trouble]
    caplog.set_level(logging.DEBUG)
    told = ""
    with a_server(**{"key": KEY, "echo": True, **dials}) as server:
        judge = a_judge(server, rubric, key=KEY, retries=1, budget=Budget(tmp_path / "spending"))
        try:
            replies, _ = judged(judge, table(10), tmp_path / "store")
            write_verdicts(tmp_path / "verdicts.parquet", [("judge", judge.identity, one) for one in replies])
            assert len(read_verdicts(tmp_path / "verdicts.parquet")) == 10
        except UserError as error:
            told = "".join(traceback.TracebackException.from_exception(error, capture_locals=False).format())
        raw = (tmp_path / "store").read_bytes()
    assert (trouble == "none") == (not told) and (not told or "[key]" in told or trouble == "faults")
    assert trouble != "none" or b"[key]" in raw  # it was quoted, and is gone
    out, err = capfd.readouterr()
    assert caplog.text and KEY not in told + caplog.text + out + err + repr(judge.__dict__) + repr(vars(judge.budget))
    assert (tmp_path / "spending").exists() and not files_with_the_key(tmp_path)


@pytest.mark.parametrize("key", [KEY, 'sk-canary-"e07\\c1a53'])
@pytest.mark.parametrize("reply", [{"error": "bad key KEY"}, {"choices": [{"message": None, "x": "KEY"}]}])
def test_a_whole_answer_that_is_no_verdict_does_not_tell_the_key(reply, key, rubric):
    quoting = json.loads(json.dumps(reply).replace("KEY", json.dumps(key)[1:-1]))
    with a_server(whole_reply=lambda whole: quoting) as server, pytest.raises(Unavailable, match=r"\[key\]") as error:
        list(a_judge(server, rubric, key=key, retries=0).ask(a_question()))
    assert not any(form in str(error.value) for form in (key, json.dumps(key)[1:-1]))


def test_a_short_key_is_no_secret_and_leaves_numbers_and_names_as_they_are(rubric):
    with a_server(whole_reply=lambda whole: {**whole, "created": 1732123456}) as server:
        for key in ("123", "token"):
            _, raw = next(a_judge(server, rubric, key=key).ask(a_question()))
            assert raw["reply"]["created"] == 1732123456 and raw["reply"]["usage"]["prompt_tokens"] > 0


# Odd replies


def a_question() -> list[Question]:
    return [Question(row_id="r", prompt=text_prompt("q"), answers=("a", "bb"), places=(0, 1))]


@pytest.mark.parametrize("inner", [True, False], ids=["in the reason", "in the reply"])
def test_half_a_surrogate_pair_in_a_reply_loses_nothing(inner, rubric, tmp_path):
    def odd(choice: dict) -> None:
        text = choice["message"]["content"]
        choice["message"]["content"] = text.replace("It", "\\ud83d") if inner else text.replace("It", "\ud83d")

    with a_server(odd=odd) as server:
        judge = a_judge(server, rubric)
        replies, _ = judged(judge, table(5), tmp_path / "store")
    assert len(replies) == 10 and all(one.values and "\ufffd says" in one.reason for one in replies)
    write_verdicts(tmp_path / "verdicts.parquet", [("judge", judge.identity, one) for one in replies])


@pytest.mark.parametrize("count", [2**31, 2**63, 10**30])
def test_counts_of_tokens_that_cannot_be_true_are_not_told(count, rubric, tmp_path):
    usage = {"prompt_tokens": count, "completion_tokens": 1}
    with a_server(whole_reply=lambda whole: {**whole, "usage": usage}) as server:
        judge = a_judge(server, rubric)
        replies, _ = judged(judge, table(1), tmp_path / "store")
    assert [one.prompt_tokens for one in replies] == [0, 0]
    assert judge.spent().prompt == 0 and judge.spent().charged > 0


# Killed


def test_replies_are_kept_although_none_follows(rubric, tmp_path):
    """Of 8 questions 7 are answered at once and the last after long: meanwhile the 7 are in the store."""
    last, kept = threading.Event(), []

    def odd(whole: dict) -> dict:
        with lock:
            number = next(numbers)
        if number == 7:
            last.wait(timeout=20)
        return whole

    lock, numbers = threading.Lock(), itertools.count()
    with a_server(whole_reply=odd) as server, Store(tmp_path / "store") as store:
        asking = threading.Thread(target=judged, args=(a_judge(server, rubric), table(4), tmp_path / "store"))
        asking.start()
        deadline = time.monotonic() + 10
        while len(store) < 7 and time.monotonic() < deadline:
            time.sleep(0.05)
        kept.append(len(store))
        last.set()
        asking.join()
        assert kept == [7] and len(store) == 8


def test_killed_twice_every_verdict_is_there_once_and_nothing_kept_is_asked_again(tmp_path):
    """The load test of benchmarks.judge_load, short; how fast it is counts there alone."""
    told = subprocess.run(
        [sys.executable, "-m", "benchmarks.judge_load", "--quick", "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=200,
    )
    assert told.returncode == 0, told.stdout + told.stderr
    figures = json.loads(told.stdout)["figures"]
    assert figures["kills"]["value"] == 2 and figures["verdicts there once"]["value"] == 400
    assert figures["kept verdicts asked again"]["value"] == 0


def test_questions_of_equal_texts_are_asked_once(rubric, tmp_path):
    rows = [*table(3), *(replace(row, id=f"twin-{row.id}") for row in table(3))]
    with a_server() as server:
        replies, asked = judged(a_judge(server, rubric), rows, tmp_path / "store")
    assert asked == 6 == len(server.asked) and len(replies) == 12
