"""An OpenAI-compatible server on loopback that fails as servers do, in the shares asked for, the same way every time.

What it says is a function of prompt and seed, so that a client's answers under faults can be held against those of a
server without. It keeps all that it was asked.

With `judge` it is a judge: it compares the answers in the data block that rankwise.rubrics makes. It counts tokens of
all that it computed, whether or not a client ever hears of it.

Example:
    with FaultServer(faults={"busy": 0.1, "cut": 0.1}) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
    server.given["busy"], len(server.asked)

python tests/fault_server.py '{"latency_s": 0.5, "judge": {"ties": 0.1}}' prints its address, and what it has seen for
every line that it reads.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import socket
import struct
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

# 429 with Retry-After; 500; half a body; a whole body that is no JSON; JSON without choices; a choice too many and,
# where several were asked for, one too few; a choice that ended for a reason of the server's; no reply at all; late
FAULTS = ("busy", "error", "cut", "not_json", "no_choices", "too_many", "too_few", "aborted", "reset", "slow")
PLAIN_FIELDS = {"model", "prompt", "messages", "n", "seed", "max_tokens", "temperature", "top_p", "stop"}
JUDGE_FIELDS = {"response_format", "logprobs", "top_logprobs", "max_completion_tokens"}


@dataclass(frozen=True, kw_only=True)
class Judging:
    """How a judge compares; shares are of verdicts, drawn by the request and how often it has come."""

    worth: Callable[[str], float] = len  # log-worth of an answer's text, nats
    position_bias: float = 0.0  # nats that the first place is worth
    noise: float = 0.0  # standard deviation that is added to each log-worth, nats
    ties: float = 0.0  # share that says tie
    quoting: float = 0.0  # share that quotes verdicts around the JSON: "I considered [[A]] … {…}"
    partial: float = 0.0  # share whose JSON stops in the middle, as at a limit of tokens
    malformed: float = 0.0  # share with JSON of another kind

    def values(self, body: dict) -> dict[str, float]:
        """Log-worth of each answer in the data block, by letter."""
        data = json.loads(body["messages"][-1]["content"])
        answers = {name[-1]: text for name, text in data.items() if name.startswith("answer_")}
        found = {letter: self.worth(text) for letter, text in answers.items()}
        for letter, text in answers.items():
            found[letter] += self.noise * _gauss(data["prompt"], text, body.get("seed"))
        found["A"] += self.position_bias
        return found

    def text(self, body: dict, again: int) -> tuple[str, str | None]:
        """The verdict as JSON, or what is given in its place and what is wrong with that."""
        values, number = self.values(body), _hash("verdict", body["messages"], body.get("seed"), again) / 2**64
        order = sorted(values, key=lambda letter: -values[letter])
        best = "tie" if number >= 1 - self.ties else order[0]
        reply = {"verdict": best} if len(order) == 2 else {"ranking": order}
        whole = json.dumps({**reply, "reason": "It says more [[B]]."})
        quoted = f'I considered [[A]], then {{"verdict": "A", "reason": ""}}, and [[B]]. {whole}'
        for name, text in (
            ("quoting", quoted),
            ("partial", whole[: len(whole) // 2]),
            ("malformed", json.dumps({**reply, "verdict": "first", "reason": 1})),
        ):
            number -= getattr(self, name)
            if number < 0:
                return text, name
        return whole, None

    def logprobs(self, body: dict) -> dict:
        """The most probable first tokens, the letters with 0.9 of the mass, some of it behind a blank."""
        values = self.values(body)
        total = math.log(sum(math.exp(value - max(values.values())) for value in values.values()))
        top = [{"token": "The", "logprob": math.log(0.05)}]
        for letter, value in values.items():
            logp = value - max(values.values()) - total
            top.append({"token": letter, "logprob": logp + math.log(0.6)})
            top.append({"token": f" {letter}", "logprob": logp + math.log(0.3)})
        top = sorted(top, key=lambda one: -one["logprob"])[: body["top_logprobs"]]
        return {"content": [{**top[0], "top_logprobs": top}]}


@dataclass(kw_only=True)
class FaultServer:
    """Dials, and then what was seen."""

    port: int = 0  # on loopback; 0: a free one
    dialect: str = "vllm"  # "vllm" and "sglang" take token ids and give them; "text"; "ids": text out; "chat"
    faults: dict[str, float] = field(default_factory=dict)  # share of requests that meet each of FAULTS
    seed: int = 0  # of the faults
    latency_s: float = 0.0  # of every reply
    slow_s: float = 1.0
    retry_after_s: float = 0.05
    key: str | None = None  # without it, 401
    context: int = 4096  # tokens
    extra_tokens: int = 0  # that its tokenizer makes of a prompt, a BOS for one
    never: Callable[[dict], bool] = lambda body: False  # requests that always get 500
    refuse: Callable[[dict], bool] = lambda body: False  # requests that always get 400
    answer: Callable[[dict, int], str] | None = None  # (body, seed) to text, in place of what it makes up
    odd: Callable[[dict], object] | None = None  # changes every choice before it is given
    models_status: int = 200  # of the list of models
    why: str = "this one I will not have"  # of refuse
    whole_reply: Callable[[dict], dict] = lambda reply: reply  # changes every reply before it is given
    judge: Judging | None = None  # in place of all that makes answers up
    served: Callable[[int], str] = lambda number: "tiny"  # the model that the reply of this number says it is from
    root: str | None = None  # what the list of models says that "tiny" is
    echo: bool = False  # errors and replies quote the key that came
    later_name: bool = False  # refuses max_tokens, as for models that reason

    asked: list[dict] = field(default_factory=list, init=False)  # bodies, in order of arrival
    given: Counter = field(default_factory=Counter, init=False)  # faults
    most_at_once: int = field(default=0, init=False)
    too_early: int = field(default=0, init=False)  # requests that came again before Retry-After had passed
    used: Counter = field(default_factory=Counter, init=False)  # tokens of prompt and completion that were computed
    whole: Counter = field(default_factory=Counter, init=False)  # those that a whole reply told of in time

    def __enter__(self) -> FaultServer:
        self._lock, self._tries, self._not_before, self._at_once = threading.Lock(), Counter(), {}, 0
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Http(("127.0.0.1", self.port), handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def draw(self, body: dict) -> tuple[str | None, int]:
        """The fault that this request meets, by seed, request, and how often it has come; and that."""
        name = json.dumps(body, sort_keys=True)
        with self._lock:
            self.asked.append(body)
            self._tries[name] += 1
            again = self._tries[name]
            self.too_early += time.monotonic() < self._not_before.get(name, 0)
        if self.never(body):
            return "error", again
        number = _hash(self.seed, name, again) / 2**64
        for fault in FAULTS:
            number -= self.faults.get(fault, 0.0)
            if number < 0:
                if fault == "too_few" and body.get("n", 1) == 1:
                    return None, again
                with self._lock:
                    self.given[fault] += 1
                    if fault == "busy":
                        self._not_before[name] = time.monotonic() + self.retry_after_s
                return fault, again
        return None, again

    def count(self, usage: dict[str, int], *, told: bool) -> None:
        with self._lock:
            self.used.update(usage)
            self.whole.update(usage if told else {})

    @contextlib.contextmanager
    def counted(self) -> Iterator[Callable[[], None]]:
        """Counts a request as under way, until what this yields is called: one that is late may have been given up."""
        ended = False

        def leave() -> None:
            nonlocal ended
            with self._lock:
                self._at_once -= not ended
                ended = True

        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield leave
        finally:
            leave()

    def refusal(self, body: dict) -> str | None:
        if self.later_name and "max_tokens" in body:
            return "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens' instead."
        known = PLAIN_FIELDS | (JUDGE_FIELDS if self.judge else set())
        if self.dialect not in ("vllm", "sglang") and (more := set(body) - known):
            return f"Unrecognized request argument: {sorted(more)[0]}"
        if self.dialect == "text" and isinstance(body.get("prompt"), list):
            return "prompt must be a string"
        return self.why if self.refuse(body) else None

    def choices(self, body: dict, again: int = 1) -> list[dict]:
        if self.judge:
            return [self._verdict(body, again)]
        return [self._choice(body, k, body.get("seed", 0) + k) for k in range(body.get("n", 1))]

    def _choice(self, body: dict, index: int, seed: int) -> dict:
        prompt = body.get("prompt", body.get("messages"))
        length = 1 + _hash(prompt, seed) % min(body["max_tokens"], 6)
        ids = [3 + _hash(prompt, seed, n) % 90 for n in range(length)]
        text = self.answer(body, seed) if self.answer else "".join(f" t{i}" for i in ids)
        reason = "length" if length == body["max_tokens"] else "stop"
        choice: dict[str, Any] = {"index": index, "finish_reason": reason}
        choice |= {"message": {"role": "assistant", "content": text}} if "messages" in body else {"text": text}
        if body.get("return_token_ids"):
            choice["token_ids"] = ids
        if body.get("logprobs") is not None:
            choice["logprobs"] = {"token_logprobs": [-0.01 * i for i in ids]}
        if self.odd is not None:
            self.odd(choice)
        return choice

    def _verdict(self, body: dict, again: int) -> dict:
        letter = bool(body.get("logprobs"))
        text, fault = ("A", None) if letter else self.judge.text(body, again)
        if fault:
            with self._lock:
                self.given[fault] += 1
        choice = {"index": 0, "finish_reason": "length" if letter else "stop"}
        choice["message"] = {"role": "assistant", "content": text}
        if letter:
            choice["logprobs"] = self.judge.logprobs(body)
        if self.odd is not None:
            self.odd(choice)
        return choice

    def usage(self, body: dict, choices: list[dict]) -> dict[str, int]:
        """Tokens of what was computed; a reply's are its words and what stands between them."""
        said = [str(choice.get("text") or choice.get("message")) for choice in choices]
        return {"prompt_tokens": self.prompt_tokens(body), "completion_tokens": sum(len(one) // 4 + 1 for one in said)}

    def prompt_tokens(self, body: dict) -> int:
        prompt = body.get("prompt")
        if isinstance(prompt, list):
            return len(prompt)
        texts = [prompt] if prompt is not None else [message["content"] for message in body["messages"]]
        return sum(len(text.split()) for text in texts) + self.extra_tokens


class _Http(ThreadingHTTPServer):
    request_queue_size = 256

    def handle_error(self, *_: object) -> None:
        pass  # clients that leave are what the tests are about


class _Handler(BaseHTTPRequestHandler):
    owner: FaultServer
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        if self.path == "/v1/models" and self.owner.models_status != 200:
            self._json(self.owner.models_status, {"error": {"message": "no list today"}})
        elif self.path == "/v1/models":
            model = {"id": "tiny", "owned_by": self.owner.dialect, "max_model_len": self.owner.context}
            model |= {"root": self.owner.root} if self.owner.root else {}
            self._json(200, {"data": [model]})
        elif self.path in ("/version", "/get_server_info") and self.owner.dialect in ("vllm", "sglang"):
            self._json(200, {"version": "9.9"})
        else:
            self._json(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.owner.counted() as leave:
            self._reply(body, leave)

    def _reply(self, body: dict, leave: Callable[[], None]) -> None:
        owner = self.owner
        key = self.headers.get("Authorization", "")
        if owner.key and key != f"Bearer {owner.key}":
            return self._json(401, {"error": {"message": f"this key is not known here{key * owner.echo}"}})
        if owner.dialect == "chat" and self.path == "/v1/completions":
            return self._json(404, {"error": {"message": "only chat here"}})
        if refusal := owner.refusal(body):
            return self._json(400, {"error": {"message": f"{refusal}{key * owner.echo}"}})
        fault, again = owner.draw(body)
        time.sleep(owner.latency_s)
        if fault == "slow":
            leave()
            time.sleep(owner.slow_s)
        if fault == "busy":
            return self._json(429, {"error": {"message": "busy"}}, {"Retry-After": str(owner.retry_after_s)})
        if fault == "error":
            return self._json(500, {"error": {"message": f"broken inside{key * owner.echo}"}})
        choices = owner.choices(body, again)
        usage = owner.usage(body, choices)
        owner.count(usage, told=fault in (None, "no_choices", "too_many", "too_few", "aborted"))
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        return self._answer(choices, usage, fault, key * owner.echo)

    def _answer(self, choices: list[dict], usage: dict[str, int], fault: str | None, quoted: str) -> None:
        if fault == "too_many":
            choices.append({**choices[-1], "index": len(choices)})
        if fault == "too_few":
            choices.pop()
        if fault == "aborted":
            choices[-1]["finish_reason"] = "abort"
        model = self.owner.served(len(self.owner.asked))
        reply: dict[str, Any] = {"id": f"x{quoted}", "model": model, "choices": choices, "usage": usage}
        if fault == "no_choices":
            del reply["choices"]
        if fault == "not_json":
            return self._bytes(200, b"<html>one moment, please</html>", {})
        if fault == "cut":
            whole = json.dumps(reply).encode()
            self.close_connection = True
            return self._bytes(200, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
        return self._json(200, self.owner.whole_reply(reply))

    def _json(self, status: int, content: object, headers: dict[str, str] | None = None) -> None:
        self._bytes(status, json.dumps(content).encode(), headers or {})

    def _bytes(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _hash(*parts: object) -> int:
    return int.from_bytes(hashlib.sha256(json.dumps(parts).encode()).digest()[:8], "big")


def _gauss(*parts: object) -> float:
    """A draw from the normal distribution (Box and Muller), the same for the same parts."""
    one, other = ((1 + _hash(*parts, n)) / (2**64 + 1) for n in range(2))
    return math.sqrt(-2 * math.log(one)) * math.cos(2 * math.pi * other)


def _serve(dials: dict) -> None:
    judge = Judging(**dials.pop("judge")) if "judge" in dials else None
    with FaultServer(judge=judge, **dials) as server:
        print(server.url, flush=True)
        for _ in sys.stdin:
            asked = [body["messages"][-1]["content"] for body in server.asked]
            seen = {"asked": asked, "used": server.used, "whole": server.whole, "given": server.given}
            print(json.dumps({**seen, "most_at_once": server.most_at_once}), flush=True)


if __name__ == "__main__":
    _serve(json.loads(sys.argv[1]))
