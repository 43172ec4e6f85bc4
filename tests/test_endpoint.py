"""The server engine: every answer once and as the server gave it, whatever fails on the way; nothing dropped unsaid."""

import os
import signal
import socket
import threading
import time
import tracemalloc
from collections import Counter
from dataclasses import replace

import pytest
from fault_server import FAULTS, FaultServer

from rankwise.client import Endpoint
from rankwise.endpoint import ServerEngine
from rankwise.sampling import Sampling, Wanted, seed_of
from rankwise.types import Message, Unavailable, UserError, text_prompt

SAMPLING = Sampling(max_new_tokens=8)


def wanted(count: int, k: int = 3) -> list[Wanted]:
    """Prompts whose words are their tokens, as the fault server counts them."""
    return [
        Wanted(
            name=f"p{i}",
            prompt=text_prompt(f"say {i} please"),
            prompt_ids=(1, 10 + i, 5),
            seeds=tuple(seed_of(0, f"p{i}", 0, n) for n in range(k)),
        )
        for i in range(count)
    ]


def engine(server: FaultServer, sampling: Sampling = SAMPLING, *, ids: bool = True, **endpoint) -> ServerEngine:
    endpoint = Endpoint(**{"url": server.url, "concurrency": 8, "retries": 6, **endpoint})
    return ServerEngine(endpoint=endpoint, sampling=sampling, source={"served": "tiny"}, ids=ids)


def answers(server: FaultServer, prompts: list[Wanted], *arguments, **named) -> list:
    """Answers in the prompts' order, each there once."""
    got = list(engine(server, *arguments, **named).answers(prompts))
    assert sorted(index for index, _ in got) == list(range(len(prompts)))
    return [sampled for _, sampled in sorted(got, key=lambda one: one[0])]


# Under faults


def test_with_faults_of_every_kind_each_answer_comes_once_and_is_the_faultless_servers():
    prompts = wanted(150)
    with FaultServer() as whole, FaultServer(faults=dict.fromkeys(FAULTS, 0.012), slow_s=0.3) as faulty:
        expected = answers(whole, prompts)
        assert answers(faulty, prompts, concurrency=50) == expected
    assert set(faulty.given) == set(FAULTS) and 0.05 < sum(faulty.given.values()) / len(faulty.asked) < 0.2
    assert faulty.too_early == 0


@pytest.mark.parametrize("fault", [fault for fault in FAULTS if fault != "too_few"])
def test_a_fault_that_never_ends_is_named_with_its_prompts(fault):
    named = r"2 got no answer .*prompt p[01], prompt p[01]; the last reason: \S.* run this again"
    with FaultServer(faults={fault: 1.0}, slow_s=0.4) as server:
        with pytest.raises(Unavailable, match=named):
            answers(server, wanted(2), retries=1, timeout_s=0.2)
        # Asked again by us or by the package, and never by both.
        assert all(count == 2 for count in Counter(str(body) for body in server.asked).values())


def test_where_fewer_choices_come_than_were_asked_for_the_rest_is_asked_for_one_by_one():
    with FaultServer(faults={"too_few": 1.0}) as server, FaultServer() as whole:
        assert answers(server, wanted(1)) == answers(whole, wanted(1))
        assert [body.get("n", 1) for body in server.asked] == [3, 1]


def test_a_prompt_given_up_leaves_all_others_answered():
    prompts = wanted(40)
    with FaultServer(never=lambda body: body["prompt"][1] == 17) as server:
        stream, got = engine(server, retries=0).answers(prompts), []
        with pytest.raises(UserError, match=r"1 got no answer .*: prompt p7; the last reason: .*broken inside"):
            got.extend(stream)
    assert sorted(index for index, _ in got) == [i for i in range(40) if i != 7]


def test_a_server_that_is_gone_is_not_asked_for_all_the_rest():
    with (
        FaultServer(never=lambda body: body["prompt"][1] >= 110) as server,
        pytest.raises(UserError, match=r"2\d in a row, and no more were tried"),
    ):
        answers(server, wanted(1000), retries=0)
    assert 120 <= len(server.asked) <= 150  # those under way when it is given up


def test_retry_after_is_respected():
    with FaultServer(faults={"busy": 0.5}, retry_after_s=0.8) as server:
        answers(server, wanted(6))
    assert server.given["busy"] > 1 and server.too_early == 0


def test_a_refused_request_stops_the_asking_and_quotes_the_server():
    with FaultServer(refuse=lambda body: body["prompt"][1] == 30, latency_s=0.005) as server:
        stream, got = engine(server).answers(wanted(400)), []
        with pytest.raises(UserError, match=r"prompt p20: .* refuses .*400.*this one I will not have") as refusal:
            got.extend(stream)
    assert not isinstance(refusal.value, Unavailable)  # it would be refused again
    assert len(got) == len(server.asked) < 60  # and what was under way is not lost


def test_a_wrong_key_is_refused_and_the_right_one_is_sent():
    with FaultServer(key="open sesame") as server:
        with pytest.raises(UserError, match=r"401.*this key is not known here"):
            answers(server, wanted(3))
        assert answers(server, wanted(3), key="open sesame")


def test_a_server_that_is_down_is_told_before_anything_is_asked():
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{closed.getsockname()[1]}/v1"
        endpoint = Endpoint(url=url)
        with pytest.raises(Unavailable, match=f"nothing answers at {url} .*start the server"):
            list(ServerEngine(endpoint=endpoint, sampling=SAMPLING, source={}).answers(wanted(1)))


def test_a_server_that_lists_models_and_answers_nothing_is_told():
    """A plain server is asked for one token first, to see whether it takes ids."""
    with (
        FaultServer(dialect="ids", never=lambda body: True) as server,
        pytest.raises(Unavailable, match=r"lists its models and does not answer: .*broken inside"),
    ):
        answers(server, wanted(1), retries=0)


def test_an_address_of_no_api_is_named():
    with (
        FaultServer() as server,
        pytest.raises(UserError, match=r"lists no model at .*/elsewhere/models: .* in J_MODEL, .* usually ends in /v1"),
    ):
        answers(server, wanted(1), url=server.url.replace("/v1", "/elsewhere"), prefix="J")


@pytest.mark.parametrize(
    ("status", "kind", "said"),
    [
        (401, UserError, "does not accept the key: status 401, .*no list today.*; set J_API_KEY"),
        (403, UserError, "does not accept the key: status 403, .*no list today.*; set J_API_KEY"),
        (400, UserError, "is refused: status 400, .*no list today.*; correct J_URL"),
        (429, Unavailable, "is in trouble: status 429, .*no list today"),
        (500, Unavailable, "is in trouble: status 500, .*no list today"),
    ],
)
def test_a_list_of_models_that_is_not_given_is_told_by_its_status(status, kind, said):
    """And never as a server that lists no model, or one of another kind."""
    with FaultServer(models_status=status) as server:
        for model in (None, "tiny"):
            with pytest.raises(UserError, match=f"{server.url}/models {said}") as told:
                answers(server, wanted(1), prefix="J", model=model)
            assert isinstance(told.value, Unavailable) == (kind is Unavailable)
        assert not server.asked


def test_the_environments_name_for_a_model_wins():
    with FaultServer(dialect="text") as server:
        endpoint = Endpoint(url=server.url, model="as it is called here")
        asking = ServerEngine(endpoint=endpoint, sampling=SAMPLING, source={}, model="as the recipe calls it")
        list(asking.answers(wanted(1)))
        assert {body["model"] for body in server.asked} == {"as it is called here"}


ODD = {  # what is done to a choice of a whole reply
    "a list for log-probs": lambda choice: choice.update(logprobs=[-1.0]),
    "no number among the log-probs": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, None),
    "a log-prob that is not finite": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, float("nan")),
    "a log-prob that no float holds": lambda choice: choice["logprobs"]["token_logprobs"].__setitem__(0, -(10**400)),
    "a text for ids": lambda choice: choice.update(token_ids="abc", logprobs=None),
    "texts for ids": lambda choice: choice.update(token_ids=["1", "2"], logprobs=None),
    "ids that are no list": lambda choice: choice.update(token_ids=7),
    "no index": lambda choice: choice.update(index=None),
    "a word for an index": lambda choice: choice.update(index="first"),
    "a text for a message": lambda choice: choice.pop("text") and choice.update(message="hello"),
}


@pytest.mark.parametrize("odd", ODD)
def test_a_reply_of_an_odd_shape_is_asked_for_again_and_then_named(odd):
    with FaultServer(odd=ODD[odd]) as server:
        with pytest.raises(Unavailable, match=r"1 got no answer .*prompt p0; .*its answers make no sense: "):
            answers(server, wanted(1), retries=1)
        assert len(server.asked) == 2


# How much at once


def test_no_more_than_the_given_number_is_under_way_and_as_many_as_that():
    with FaultServer(latency_s=0.02) as server:
        answers(server, wanted(60), concurrency=7)
    assert server.most_at_once == 7


def test_a_slow_reader_holds_the_asking_back_and_memory_stays_flat():
    with FaultServer() as server:
        stream = engine(server, concurrency=4).answers(wanted(2000, k=1))
        for _ in range(10):
            next(stream)
        time.sleep(0.2)
        assert len(server.asked) <= 10 + 2 * 4
        before = threading.active_count()
        stream.close()
        assert threading.active_count() < before


class Prompts:
    """Many prompts, none of them kept."""

    def __init__(self, count: int):
        self.count, (self.one,) = count, wanted(1, k=1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Wanted:
        if index >= self.count:
            raise IndexError
        return replace(self.one, name=f"p{index}")


def test_prompts_not_yet_asked_cost_no_memory():
    """Open requests take kilobytes each: 20,000 of them, tens of megabytes."""
    with FaultServer() as server:
        stream = engine(server).answers(Prompts(20_000))
        tracemalloc.start()
        for _ in range(20):
            next(stream)
        assert tracemalloc.get_traced_memory()[1] < 5e6
        tracemalloc.stop()
        stream.close()


class Stopped(BaseException):
    """As tasks.stage raises it in the main thread at SIGTERM."""


@pytest.mark.parametrize("times", range(3))
def test_a_signal_ends_the_waiting_at_once(times):
    def stop(*_: object) -> None:
        raise Stopped

    before = signal.signal(signal.SIGTERM, stop)
    try:
        with FaultServer(latency_s=3) as server:
            timer = threading.Timer(0.3 + times / 10, os.kill, (os.getpid(), signal.SIGTERM))
            began = time.monotonic()
            timer.start()
            with pytest.raises(Stopped):
                answers(server, wanted(20))
            assert time.monotonic() - began < 1.5
            assert not [thread for thread in threading.enumerate() if thread.name == "requests"]
    finally:
        signal.signal(signal.SIGTERM, before)


# What is asked and what comes back


def test_ids_go_in_and_come_out_with_their_logps_and_seeds():
    prompts = wanted(5)
    with FaultServer() as server:
        got = answers(server, prompts)
        assert sorted(tuple(body["prompt"]) for body in server.asked) == [one.prompt_ids for one in prompts]
        for one, sampled in zip(prompts, got):
            first = one.seeds[0] % 2**31
            assert [a.seed for a in sampled] == [first, first + 1, first + 2]
            told = server.choices({**server.asked[0], "prompt": list(one.prompt_ids), "seed": first})
            assert [list(a.token_ids) for a in sampled] == [choice["token_ids"] for choice in told]
            assert [list(a.logps) for a in sampled] == [choice["logprobs"]["token_logprobs"] for choice in told]
            assert [a.finish_reason for a in sampled] == [choice["finish_reason"] for choice in told]


def test_the_text_of_ids_is_what_the_tokens_say_unless_a_stop_string_may_have_cut_it():
    with FaultServer() as server:
        assert all(a.text is None for a in answers(server, wanted(1))[0])
        assert all(a.text for a in answers(server, wanted(1), Sampling(max_new_tokens=8, stop=("never",)))[0])


def test_the_version_is_known_once_the_server_has_answered():
    with FaultServer() as server:
        asking = engine(server)
        assert asking.version == ""
        list(asking.answers(wanted(1)))
        assert asking.version == "vllm 9.9"


def test_the_identity_holds_model_and_sampling_and_no_address():
    one, other = (
        ServerEngine(endpoint=Endpoint(url=url), sampling=Sampling(max_new_tokens=8, top_k=5), source={"w": "1"})
        for url in ("http://a/v1", "http://b/v1")
    )
    assert one.identity() == other.identity()
    assert one.identity() == {"engine": "server", "model": {"w": "1"}, "sampling": {"max_new_tokens": 8, "top_k": 5}}


def test_every_setting_is_sent_at_rest_too():
    """vLLM fills in what is left out from the model's generation_config.json."""
    with FaultServer() as server:
        answers(server, wanted(1))
    rest = {"temperature": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
    assert server.asked[0].items() >= {**rest, "stop": [], "stop_token_ids": [], "max_tokens": 8, "n": 3}.items()


def test_several_greedy_answers_are_asked_for_one_by_one():
    """vLLM refuses n > 1 at temperature 0."""
    with FaultServer() as server:
        answers(server, wanted(2), Sampling(max_new_tokens=8, temperature=0))
    assert len(server.asked) == 6 and not any("n" in body for body in server.asked)


def test_where_n_does_not_count_seeds_up_each_answer_is_a_request():
    with FaultServer(dialect="sglang") as sglang, FaultServer() as vllm:
        one_by_one, together = answers(sglang, wanted(2)), answers(vllm, wanted(2))
        assert len(sglang.asked) == 6 and len(vllm.asked) == 2
    assert [[a.token_ids for a in s] for s in one_by_one] == [[a.token_ids for a in s] for s in together]
    assert all(a.logps is None for s in one_by_one for a in s)  # SGLang's are of another distribution


def test_an_answer_is_kept_within_the_context_that_the_server_tells():
    with FaultServer(context=8) as server:
        answers(server, wanted(1), Sampling(max_new_tokens=100))
        assert server.asked[0]["max_tokens"] == 5  # 3 + 5 = 8
    with FaultServer(context=3) as server:
        with pytest.raises(UserError, match=r"2 prompts leave no room .* of 3 tokens.*p0 \(3\), p1 \(3\)"):
            answers(server, wanted(2))
        assert not server.asked


# Servers of other kinds


def test_a_text_server_is_given_text_and_gives_text():
    with FaultServer(dialect="text") as server:
        got = answers(server, wanted(3))
    assert sorted({body["prompt"] for body in server.asked}) == [f"say {i} please" for i in range(3)]
    assert all(a.token_ids is None and a.logps is None and a.text for sampled in got for a in sampled)
    assert len({a.text for sampled in got for a in sampled}) > 5  # one a seed


def test_a_plain_server_that_takes_ids_is_given_ids():
    with FaultServer(dialect="ids") as server:
        got = answers(server, wanted(2))
    assert all(isinstance(body["prompt"], list) for body in server.asked)
    assert got[0][0].token_ids is None


@pytest.mark.parametrize("dialect", ["text", "chat"])
def test_a_chat_goes_as_messages_where_ids_are_refused(dialect):
    chat = (Message(role="system", content="be short"), Message(role="user", content="hello"))
    prompts = [replace(one, prompt=chat) for one in wanted(1)]
    with FaultServer(dialect=dialect) as server:
        (sampled,) = answers(server, prompts)
        assert server.asked[-1]["messages"][1] == {"role": "user", "content": "hello"}
    assert len(sampled) == 3 and all(a.text for a in sampled)


def test_a_plain_text_at_a_chat_server_is_refused():
    with FaultServer(dialect="chat") as server, pytest.raises(UserError, match=r"404.*only chat here"):
        answers(server, wanted(1))


def test_another_models_tokens_are_neither_sent_nor_kept():
    with FaultServer(extra_tokens=4, context=2) as server:
        got = answers(server, wanted(2), ids=False)
    assert {body["prompt"] for body in server.asked} == {"say 0 please", "say 1 please"}
    assert all(a.token_ids is None and a.text for sampled in got for a in sampled)


def test_a_server_that_reads_the_text_as_other_tokens_is_found_out():
    with (
        FaultServer(dialect="text", extra_tokens=1) as server,
        pytest.raises(UserError, match=r"prompt p\d: the server reads 4 tokens where our tokenizer makes 3: .*BOS"),
    ):
        answers(server, wanted(2))


@pytest.mark.parametrize(
    "dialect, settings, named",
    [
        ("text", {"top_k": 40}, "top_k = 40"),
        ("text", {"min_p": 0.1}, "min_p = 0.1"),
        ("chat", {"repetition_penalty": 1.2}, "repetition_penalty = 1.2"),
        ("ids", {"stop_token_ids": (7,)}, r"stop_token_ids = \(7,\)"),
        ("vllm", {"min_p": 0.1, "top_p": 0.9}, "min_p = 0.1 with top_p = 0.9"),
        ("sglang", {"top_k": 40, "top_p": 0.9}, "top_k = 40 with top_p = 0.9"),
    ],
)
def test_a_setting_that_a_server_lacks_is_refused_by_name(dialect, settings, named):
    with FaultServer(dialect=dialect) as server:
        with pytest.raises(UserError, match=f"^{named} cannot be had from the server at {server.url}: "):
            answers(server, wanted(1), Sampling(max_new_tokens=8, **settings))
        assert not server.asked


def test_a_text_is_cut_before_its_first_stop_string():
    def says(body: dict, seed: int) -> str:
        return "one two END three STOP four"

    with FaultServer(dialect="text", answer=says) as server:
        for answer, *_ in answers(server, wanted(2), Sampling(max_new_tokens=1, stop=("STOP", "END"))):
            assert (answer.text, answer.finish_reason) == ("one two ", "stop")


# The environment


def test_a_server_whose_defaults_cannot_be_seen_is_warned_of_once_a_run(capfd):
    for dialect, times in (("vllm", 0), ("text", 1)):
        with FaultServer(dialect=dialect) as server:
            answers(server, wanted(4))
        assert capfd.readouterr().err.count(f"warning: {server.url} ({dialect}): top_k, min_p and penalties") == times


def test_an_endpoint_comes_from_the_environment():
    told = {"J_URL": "https://host/v1", "J_API_KEY": "k", "J_CONCURRENCY": "5", "J_TIMEOUT": "9.5", "J_MODEL": "m"}
    assert Endpoint.from_environment("J", told) == Endpoint(
        url="https://host/v1", key="k", concurrency=5, timeout_s=9.5, model="m"
    )
    assert Endpoint.from_environment("J", {"J_URL": "http://h/v1"}) == Endpoint(url="http://h/v1")
    assert Endpoint.from_environment("J", {"J_URL": "http://[::1]:8/v1\n", "J_API_KEY": " k\n"}).key == "k"


@pytest.mark.parametrize(
    "told, message",
    [
        ({}, "J_URL is ''.*has to be an address"),
        ({"J_URL": "localhost:8000"}, "J_URL is 'localhost:8000'"),
        ({"J_URL": "http://HOST:PORT/v1"}, "J_URL is 'http://HOST:PORT/v1' .*has to be an address"),
        ({"J_URL": "http://h:99999/v1"}, "J_URL is 'http://h:99999/v1' .*has to be an address"),
        ({"J_URL": "http://[::1/v1"}, r"J_URL is 'http://\[::1/v1' .*has to be an address"),
        ({"J_URL": "http:///v1"}, "J_URL is 'http:///v1'; it has to be an address"),
        ({"J_URL": "http://h/v 1"}, "J_URL is 'http://h/v 1'; it has to be an address"),
        ({"J_URL": "http://h/v1", "J_CONCURRENCY": "many"}, "J_CONCURRENCY is 'many'.*number from 1 to 1000000"),
        ({"J_URL": "http://h/v1", "J_CONCURRENCY": "0"}, "J_CONCURRENCY is '0'"),
        ({"J_URL": "http://h/v1", "J_CONCURRENCY": "inf"}, "J_CONCURRENCY is 'inf'"),
        ({"J_URL": "http://h/v1", "J_TIMEOUT": "nan"}, "J_TIMEOUT is 'nan'"),
    ],
)
def test_a_wrong_environment_is_named(told, message):
    with pytest.raises(UserError, match=message):
        Endpoint.from_environment("J", told)


@pytest.mark.parametrize(
    ("told", "message"),
    [
        ({"J_URL": "http://h/v1", "J_API_KEY": "sk-secret\nsk-other"}, "J_API_KEY holds a space, a line break"),
        ({"J_URL": "http://h/v1", "J_API_KEY": "sk-secret other"}, "J_API_KEY holds a space"),
        ({"J_URL": "http://h/v1", "J_API_KEY": "sk-sécret"}, "J_API_KEY holds .* outside ASCII"),
        ({"J_URL": "http://me:sk-secret@h/v1"}, "J_URL holds a user name or a password.*J_API_KEY"),
        ({"J_URL": "http://me:sk-secret@h:PORT/v1"}, "J_URL is no address that can be used; it has to be"),
        ({"J_URL": "http://me:sk-secret@[::1/v1"}, "J_URL is no address that can be used; it has to be"),
    ],
)
def test_what_is_secret_is_in_no_message(told, message):
    with pytest.raises(UserError, match=message) as error:
        Endpoint.from_environment("J", told)
    assert "sk-" not in str(error.value)
