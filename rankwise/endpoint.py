"""The server engine: K sampled answers a prompt from an OpenAI-compatible server.

The engine looks at which server it has before it asks (rankwise.dialects); a setting that the server lacks is refused
by name. vLLM and SGLang are given token ids and give them back. `transformers serve` and others are given text, and
their count of the prompt's tokens has to be ours: that finds a doubled BOS, another chat template, another tokenizer.

Answer k is drawn with seed s + k, where s is the row's seed cut to 31 bits. vLLM does so for the n choices of one
request; elsewhere each answer is a request of its own. How far a seed determines an answer is the server's affair.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import AsyncGenerator, Iterator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any

from rankwise.client import Client, Endpoint, Malformed, Refused, Unanswered, synchronously
from rankwise.dialects import DIALECTS, Dialect
from rankwise.sampling import Sampled, Sampling, Wanted
from rankwise.types import Unavailable, UserError, printable

SHOWN = 5  # prompts that a message names


@dataclass(frozen=True, kw_only=True)
class _Server:
    """The server as it was found."""

    dialect: Dialect
    model: str
    context: int | None  # tokens, prompt and answer together, where it says so
    takes_ids: bool


class ServerEngine:
    """Answers from a server; implements rankwise.sampling.Engine.

    Args:
        source: what identity() says of the model: digests of its files, or the name that it is served under.
        model: its name there, unless the endpoint names another; None: the only one that the server lists.
        ids: prompt ids are in the served model's tokens. If not, prompts go as text or messages and no ids come back.
    """

    settled = True

    def __init__(
        self, *, endpoint: Endpoint, sampling: Sampling, source: dict[str, Any], model: str | None = None, ids=True
    ):
        self.version = ""
        self._endpoint, self._sampling, self._source, self._ids = endpoint, sampling, source, ids
        self._model = endpoint.model or model

    def identity(self) -> dict[str, Any]:
        return {"engine": "server", "model": self._source, "sampling": self._sampling.identity()}

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, list[Sampled]]]:
        return synchronously(self._answers(wanted))

    async def _answers(self, wanted: Sequence[Wanted]) -> AsyncGenerator[tuple[int, list[Sampled]]]:
        if not wanted:
            return
        async with Client(self._endpoint) as client:
            server = await self._look(client, wanted[0])
            self._check_room(server, wanted)
            alone = server.dialect.one_at_a_time and self._sampling.temperature > 0
            stream = client.each(
                wanted,
                lambda one: self._answer(client, server, one),
                name=lambda one: f"prompt {one.name}",
                at_once=1 if alone else self._endpoint.concurrency,
            )
            async with aclosing(stream):
                async for one in stream:
                    yield one

    # Which server it is

    async def _look(self, client: Client, first: Wanted) -> _Server:
        listed = await self._listed(client)
        names = [str(one.get("id")) for one in listed]
        if self._model is None and len(names) != 1:
            raise UserError(
                f"the server lists {', '.join(names) or 'no model'} at {self._endpoint.url}/models: name the one "
                f"that is meant in {self._endpoint.prefix}_MODEL, or correct the address, which usually ends in /v1"
            )
        model = self._model or names[0]
        about = next((one for one in listed if one.get("id") == model), {})
        dialect = DIALECTS[await self._kind(client, str(about.get("owned_by") or ""))]
        dialect.check(self._sampling, self._endpoint.url)
        if dialect.warning:
            print(f"warning: {self._endpoint.url} ({self.version}): {dialect.warning}", file=sys.stderr, flush=True)
        takes_ids, context = self._ids and dialect.takes_ids, about.get("max_model_len")
        server = _Server(
            dialect=dialect,
            model=model,
            context=context if isinstance(context, int) else None,
            takes_ids=bool(takes_ids),
        )
        return await self._tried(client, server, first) if takes_ids is None else server

    async def _listed(self, client: Client) -> list[dict[str, Any]]:
        """The models that the server says it has; `transformers serve` has status 500 for an empty cache."""
        try:
            page = await client.get("models")
        except Unavailable:
            if self._model is None or not await _is_transformers(client):
                raise
            return []
        listed = page.get("data") if isinstance(page, dict) else None
        return [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []

    async def _kind(self, client: Client, owner: str) -> str:
        """The server's dialect; notes its version."""
        pages = {"vllm": "/version", "sglang": "/get_server_info"}
        if owner in pages:
            told = await client.get(pages[owner])
            self.version = printable(f"{owner} {told.get('version', '') if isinstance(told, dict) else ''}".strip())
            return owner
        if await _is_transformers(client):
            self.version = "transformers serve"
            return "transformers"
        self.version = printable(owner) or "unknown"
        return "plain"

    async def _tried(self, client: Client, server: _Server, first: Wanted) -> _Server:
        """The server, after one token of an answer was asked for in ids: the API has them, many servers have not."""
        body = {"model": server.model, "prompt": list(first.prompt_ids), "max_tokens": 1}
        try:
            found = await client.post("/completions", body, read=lambda reply: _prompt_tokens(_checked(reply, 1)))
        except Refused:
            return server
        except Unanswered as error:
            raise Unavailable(
                f"{self._endpoint.url} lists its models and does not answer: {error}; see its log"
            ) from None
        return _Server(**{**vars(server), "takes_ids": found == len(first.prompt_ids)})

    def _check_room(self, server: _Server, wanted: Sequence[Wanted]) -> None:
        if not (self._ids and server.context):
            return
        long = [one for one in wanted if len(one.prompt_ids) >= server.context]
        if long:
            raise UserError(
                f"{len(long)} prompts leave no room for an answer in a context of {server.context} tokens, as served "
                f"at {self._endpoint.url}: {', '.join(f'{one.name} ({len(one.prompt_ids)})' for one in long[:SHOWN])}; "
                "shorten them (max_prompt_tokens) or drop them in the prompts stage"
            )

    # One prompt

    async def _answer(self, client: Client, server: _Server, one: Wanted) -> list[Sampled]:
        seed, count = one.seeds[0] % 2**31, len(one.seeds)
        # vLLM refuses several greedy answers in one request.
        n = count if server.dialect.n_is_seeds and self._sampling.temperature > 0 else 1
        path, body = self._request(server, one)
        sampled: list[Sampled] = []
        while len(sampled) < count:
            ask = {**body, "seed": seed + len(sampled), **({"n": n} if n > 1 else {})}
            read = functools.partial(self._read, server, one, n, ask["seed"])
            sampled += await client.post(path, ask, read=read)
            n = 1  # fewer came than were asked for: the rest one by one
        return sampled

    def _request(self, server: _Server, one: Wanted) -> tuple[str, dict[str, Any]]:
        """Path and body, without seed and n."""
        most = self._sampling.max_new_tokens
        if self._ids and server.context:
            most = min(most, server.context - len(one.prompt_ids))
        body = {"model": server.model, "max_tokens": most, **server.dialect.options(self._sampling)}
        if server.takes_ids:
            return "/completions", {**body, "prompt": list(one.prompt_ids), **server.dialect.gives}
        if len(one.prompt) == 1 and one.prompt[0].role == "text":
            return "/completions", {**body, "prompt": one.prompt[0].content}
        messages = [{"role": message.role, "content": message.content} for message in one.prompt]
        return "/chat/completions", {**body, "messages": messages}

    def _read(self, server: _Server, one: Wanted, n: int, seed: int, reply: Any) -> list[Sampled]:
        reply = _checked(reply, n)
        counted = _prompt_tokens(reply)
        if self._ids and counted not in (None, len(one.prompt_ids)):
            raise UserError(
                f"the server reads {counted} tokens where our tokenizer makes {len(one.prompt_ids)}: another tokenizer "
                "or chat template, a BOS too many, or a prompt that max_prompt_tokens cut, which only a server that "
                "takes token ids (vLLM) can be given"
            )
        return [self._sampled(server, choice, seed + k) for k, choice in enumerate(reply["choices"])]

    def _sampled(self, server: _Server, choice: dict[str, Any], seed: int) -> Sampled:
        reason = choice.get("finish_reason")
        text = choice["text"] if "text" in choice else (choice.get("message") or {}).get("content")
        if reason not in ("stop", "length") or not isinstance(text, str):
            raise Malformed(f"a choice with finish_reason {reason!r} and {type(text).__name__} for a text")
        ids = choice.get("token_ids") if server.takes_ids else None
        logps = (choice.get("logprobs") or {}).get("token_logprobs") if ids is not None else None
        if ids is not None and not (isinstance(ids, list) and all(type(one) is int for one in ids)):
            raise Malformed(f"token ids that are none: {str(ids)[:100]}")
        if logps is not None and not (isinstance(logps, list) and all(map(_is_number, logps))):
            raise Malformed(f"log-probs that are none: {str(logps)[:100]}")
        if logps is not None and len(logps) != len(ids):
            raise Malformed(f"{len(logps)} log-probs for {len(ids)} tokens")
        ends = [text.find(stop) for stop in self._sampling.stop if stop in text]  # vLLM has cut it, others have not
        # By tokens alone the text is the same with every engine; vLLM's lacks half a character at the end.
        by_tokens = ids is not None and not self._sampling.stop
        return Sampled(
            token_ids=None if ids is None else tuple(ids),
            finish_reason="stop" if ends else reason,
            seed=seed,
            logps=None if logps is None else tuple(logps),
            text=None if by_tokens else text[: min(ends)] if ends else text,
        )


def _checked(reply: Any, n: int) -> dict[str, Any]:
    """The reply with one to n choices, in order; raises Malformed."""
    choices = reply.get("choices") if isinstance(reply, dict) else None
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Malformed(f"no choices in {str(reply)[:100]!r}")
    index = lambda choice: choice.get("index") or 0
    choices = sorted(choices, key=index)
    if [*map(index, choices)] != list(range(len(choices))) or not 1 <= len(choices) <= n:
        raise Malformed(f"{len(choices)} choices where {n} were asked for")
    return {**reply, "choices": choices}


def _prompt_tokens(reply: dict[str, Any]) -> int | None:
    """Tokens of the prompt as the server counts them, if it does."""
    usage = reply.get("usage")
    count = usage.get("prompt_tokens") if isinstance(usage, dict) else None
    return count if isinstance(count, int) else None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) <= sys.float_info.max  # a whole number may be larger


async def _is_transformers(client: Client) -> bool:
    """By its routes: its list of models is what lies in the hub's cache, and it says nothing of itself."""
    page = await client.get("/openapi.json")
    routes = page.get("paths") if isinstance(page, dict) else None
    return isinstance(routes, dict) and {"/load_model", "/v1/completions"} <= set(routes)
