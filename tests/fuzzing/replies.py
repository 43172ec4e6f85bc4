"""Readers of what servers say: replies of judges, sampled answers, the bytes of HTTP, and a rubric's text."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from random import Random
from typing import Any

import httpx

from rankwise.client import Client, Endpoint, Malformed, Refused, Unanswered
from rankwise.dialects import DIALECTS
from rankwise.endpoint import ServerEngine, _Server
from rankwise.rubrics import Rubric, count_controls, data_block
from rankwise.sampling import Sampling, Wanted
from rankwise.server_judge import ServerJudge
from rankwise.server_replies import usage_of, whole
from rankwise.types import Unavailable, text_prompt
from rankwise.verdicts import Question, Reply

from . import octets, trees
from .law import ROOT, Files, holds, reader

CASE = "reply.json"
QUESTIONS = [
    Question(row_id="r1", prompt=text_prompt("Which?"), answers=answers, places=tuple(range(len(answers))))
    for answers in (("x", "y"), ("x", "y", "z"))
]
ENDPOINT = Endpoint(url="http://127.0.0.1:9/v1", key="a-secret-key", retries=0, prefix="RANKWISE_JUDGE")
_TOP = [{"token": token, "logprob": logp} for token, logp in (("A", -0.1), (" B", -2.5), ("C", -3.0), ("x", -9.0))]
_SAID = ('{"verdict": "A", "reason": "It is."}', '{"ranking": ["B", "A", "C"], "reason": ""}', "A", "tie", "")


def _chat(random: Random) -> dict[str, Any]:
    said = random.choice(_SAID)
    if random.random() < 0.4 and said.startswith("{"):
        said = trees.as_json(random, trees.changed(random, json.loads(said)))
    choice = {"index": 0, "message": {"role": "assistant", "content": said}, "finish_reason": "stop"}
    choice |= {"logprobs": {"content": [{"token": "A", "top_logprobs": _TOP}]}} if random.random() < 0.5 else {}
    usage = {"prompt_tokens": 11, "completion_tokens": 5, "total_tokens": 16}
    return {"id": "1", "model": "m", "choices": [choice], "usage": usage}


def _completion() -> dict[str, Any]:
    logps = {"token_logprobs": [-0.5, -1.0]}
    choices = [
        {"index": n, "text": " a b", "finish_reason": "stop", "token_ids": [4, 5], "logprobs": logps} for n in range(2)
    ]
    return {"id": "1", "model": "m", "choices": choices, "usage": {"prompt_tokens": 2}}


def _spoilt_reply(random: Random, value: Any) -> bytes:
    value = trees.changed(random, value) if random.random() < 0.9 else value
    data = trees.octets(trees.as_json(random, value))
    return octets.spoilt(random, data, data) if random.random() < 0.3 else data


_CLIENT = Client(ENDPOINT)


def _parsed(folder: Path) -> Any:
    """As the client parses what it receives; None of what is no JSON."""
    try:
        return _CLIENT._cleaned(json.loads((folder / CASE).read_bytes()))
    except (ValueError, RecursionError):
        return None


_JUDGES: dict[str, ServerJudge] = {}


def _judge(form: str) -> ServerJudge:
    if form not in _JUDGES:
        rubric = Rubric(ROOT / "recipes/rubrics/template.md")
        _JUDGES[form] = ServerJudge("judge", model="m", rubric=rubric, endpoint=ENDPOINT, reply=form)
    return _JUDGES[form]


def _read_verdict(folder: Path) -> None:
    reply = _parsed(folder)
    try:
        reply = whole(reply)
    except Malformed:
        return
    usage = usage_of(reply)
    holds(usage is None or all(type(count) is int and 0 <= count <= 2**24 for count in usage), "tokens that are none")
    for form in ("json", "logprobs"):
        for question in QUESTIONS:
            _check_reply(_judge(form).read(question, {"reply": reply}))


def _check_reply(reply: Reply) -> None:
    """Well-formed: the tables can hold it, and its values are one finite number an answer."""
    texts = (reply.said, reply.reason, reply.raw)
    holds(all(isinstance(one, str) for one in texts), "a text that is none")
    "".join(texts).encode("utf-8")
    holds(0 <= reply.mass <= 1, "a mass that is no probability")
    if reply.values is None:
        holds(reply.reason and not reply.said, "no verdict and no reason why")
    else:
        holds(len(reply.values) == len(reply.question.answers), "values of other answers")
        holds(all(type(one) is float and math.isfinite(one) for one in reply.values), "values that are no numbers")


_ONE = Wanted(name="r1", prompt=text_prompt("a b"), prompt_ids=(1, 2), seeds=(7, 8))
_ENGINE = ServerEngine(endpoint=ENDPOINT, sampling=Sampling(max_new_tokens=4, stop=("b",)), source={}, model="m")
_SERVER = _Server(dialect=DIALECTS["vllm"], model="m", context=8, takes_ids=True)


def _read_sampled(folder: Path) -> None:
    from rankwise.client import _made

    reply = _parsed(folder)
    try:
        sampled = _made(lambda found: _ENGINE._read(_SERVER, _ONE, 2, 7, found), reply)
    except Malformed:
        return
    for one in sampled:
        holds(isinstance(one.text, str) and one.finish_reason in ("stop", "length"), "an answer that is none")
        holds(one.token_ids is None or all(type(i) is int for i in one.token_ids), "token ids that are none")
        holds(one.logps is None or len(one.logps) == len(one.token_ids), "log-probs of other tokens")
        one.text.encode("utf-8")


def _http(random: Random) -> Files:
    status = random.choice((200, 200, 200, 400, 401, 404, 422, 429, 500, 503))
    error = {"error": {"message": "max_completion_tokens", "param": "max_tokens", "code": "a-secret-key"}}
    body = _spoilt_reply(random, _chat(random) if status == 200 else error)
    kinds = ("application/json", "application/json; charset=utf-16", "text/html", "", "application/json; charset=nope")
    after = (
        "1",
        "-1",
        "nan",
        "inf",
        "1e999",
        "Fri, 31 Dec 9999 23:59:59 GMT",
        "Mon, 1 Jan 0001 00:00:00 -0000",
        "soon",
    )
    after += ("Fri, 31 Dec 9999 23:59:59 -2359", "9" * 400, "Thu, 99 Foo 2026 99:99:99 +9999")
    headers = {
        "content-type": random.choice(kinds),
        "content-encoding": random.choice(("", "", "gzip", "br", "deflate")),
    }
    headers |= {"retry-after": random.choice(after)} if random.random() < 0.5 else {}
    if headers["content-encoding"] == "gzip":
        body = octets.zipped(random, body)
    if not headers["content-encoding"]:
        del headers["content-encoding"]
    return {CASE: body, "head.json": json.dumps([status, headers]).encode()}


def _read_http(folder: Path) -> None:
    status, headers = json.loads((folder / "head.json").read_bytes())
    body = (folder / CASE).read_bytes()
    told = lambda request: httpx.Response(status, headers=headers, stream=httpx.ByteStream(body))

    async def both() -> None:
        async with Client(ENDPOINT) as client:
            client._openai._client = httpx.AsyncClient(transport=httpx.MockTransport(told), base_url=ENDPOINT.url)
            try:
                reply = await client.post("/chat/completions", {"messages": []}, whole)
                holds(ENDPOINT.key not in json.dumps(reply), "the key is in what is kept")
            except (Unanswered, Refused, Unavailable) as error:
                holds(ENDPOINT.key not in str(error), "the key is in a message")
            try:
                await client.get("/version")
            except (Refused, Unavailable) as error:
                holds(ENDPOINT.key not in str(error), "the key is in a message")

    asyncio.run(both())


def _read_rubric(folder: Path) -> None:
    path = folder / "rubric.md"
    rubric = Rubric(path)
    text = path.read_text(encoding="utf-8", errors="replace")
    for question in QUESTIONS:
        said = Question(**{**vars(question), "prompt": text_prompt(text), "answers": (text, *question.answers[1:])})
        shown = rubric.messages(said)[1]["content"]
        holds(json.loads(shown)["answer_A"] == text, "a judge is shown another text")
        holds(not count_controls(Question(**{**vars(said), "answers": (data_block(said), "", "")})) or True, "")


def _rubric(random: Random) -> Files:
    paths = sorted((ROOT / "recipes/rubrics").glob("*.md"))
    return {"rubric.md": octets.one_of(random, [path.read_bytes() for path in paths])}


reader(name="verdict", make=lambda r: {CASE: _spoilt_reply(r, _chat(r))}, read=_read_verdict, weight=24.0)
reader(
    name="sampled",
    make=lambda r: {CASE: _spoilt_reply(r, _completion())},
    read=_read_sampled,
    weight=8.0,
    places=("the server reads",),
)
reader(name="http", make=_http, read=_read_http, weight=0.03, places=("http://127.0.0.1:9",))
reader(name="rubric", make=_rubric, read=_read_rubric, weight=1.0)
