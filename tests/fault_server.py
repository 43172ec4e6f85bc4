"""An OpenAI-compatible server on loopback that fails as servers do, in the shares asked for, the same way every time.

What it says is a function of prompt and seed, so that a client's answers under faults can be held against those of a
server without. It keeps all that it was asked.

Example:
    with FaultServer(faults={"busy": 0.1, "cut": 0.1}) as server:
        client = openai.OpenAI(base_url=server.url, api_key="none")
    server.given["busy"], len(server.asked)
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import socket
import struct
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


@dataclass(kw_only=True)
class FaultServer:
    """Dials, and then what was seen."""

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

    asked: list[dict] = field(default_factory=list, init=False)  # bodies, in order of arrival
    given: Counter = field(default_factory=Counter, init=False)  # faults
    most_at_once: int = field(default=0, init=False)
    too_early: int = field(default=0, init=False)  # requests that came again before Retry-After had passed

    def __enter__(self) -> FaultServer:
        self._lock, self._tries, self._not_before, self._at_once = threading.Lock(), Counter(), {}, 0
        handler = type("Handler", (_Handler,), {"owner": self})
        self._http = _Http(("127.0.0.1", 0), handler)
        threading.Thread(target=self._http.serve_forever, args=(0.02,), daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._http.shutdown()
        self._http.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def draw(self, body: dict) -> str | None:
        """The fault that this request meets: a function of seed, request, and how often it has come."""
        name = json.dumps(body, sort_keys=True)
        with self._lock:
            self.asked.append(body)
            self._tries[name] += 1
            again = self._tries[name]
            self.too_early += time.monotonic() < self._not_before.get(name, 0)
        if self.never(body):
            return "error"
        number = _hash(self.seed, name, again) / 2**64
        for fault in FAULTS:
            number -= self.faults.get(fault, 0.0)
            if number < 0:
                if fault == "too_few" and body.get("n", 1) == 1:
                    return None
                with self._lock:
                    self.given[fault] += 1
                    if fault == "busy":
                        self._not_before[name] = time.monotonic() + self.retry_after_s
                return fault
        return None

    @contextlib.contextmanager
    def counted(self) -> Iterator[None]:
        with self._lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1

    def refusal(self, body: dict) -> str | None:
        if self.dialect not in ("vllm", "sglang") and (more := set(body) - PLAIN_FIELDS):
            return f"Unrecognized request argument: {sorted(more)[0]}"
        if self.dialect == "text" and isinstance(body.get("prompt"), list):
            return "prompt must be a string"
        return "this one I will not have" if self.refuse(body) else None

    def choices(self, body: dict) -> list[dict]:
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
            self._json(200, {"data": [model]})
        elif self.path in ("/version", "/get_server_info") and self.owner.dialect in ("vllm", "sglang"):
            self._json(200, {"version": "9.9"})
        else:
            self._json(404, {"error": {"message": "no such page"}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.owner.counted():
            self._reply(body)

    def _reply(self, body: dict) -> None:
        owner = self.owner
        if owner.key and self.headers.get("Authorization") != f"Bearer {owner.key}":
            return self._json(401, {"error": {"message": "this key is not known here"}})
        if owner.dialect == "chat" and self.path == "/v1/completions":
            return self._json(404, {"error": {"message": "only chat here"}})
        if refusal := owner.refusal(body):
            return self._json(400, {"error": {"message": refusal}})
        fault = owner.draw(body)
        time.sleep(owner.latency_s + (owner.slow_s if fault == "slow" else 0))
        if fault == "busy":
            return self._json(429, {"error": {"message": "busy"}}, {"Retry-After": str(owner.retry_after_s)})
        if fault == "error":
            return self._json(500, {"error": {"message": "broken inside"}})
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.close_connection = True
            return self.connection.close()
        return self._answer(body, fault)

    def _answer(self, body: dict, fault: str | None) -> None:
        choices, tokens = self.owner.choices(body), self.owner.prompt_tokens(body)
        if fault == "too_many":
            choices.append({**choices[-1], "index": len(choices)})
        if fault == "too_few":
            choices.pop()
        if fault == "aborted":
            choices[-1]["finish_reason"] = "abort"
        reply: dict[str, Any] = {"id": "x", "choices": choices, "usage": {"prompt_tokens": tokens}}
        if fault == "no_choices":
            del reply["choices"]
        if fault == "not_json":
            return self._bytes(200, b"<html>one moment, please</html>", {})
        if fault == "cut":
            whole = json.dumps(reply).encode()
            self.close_connection = True
            return self._bytes(200, whole[: len(whole) // 2], {"Content-Length": str(len(whole))})
        return self._json(200, reply)

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
