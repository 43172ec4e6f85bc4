"""A language model behind an OpenAI-compatible server as a judge.

It is asked in one of two ways. "logprobs": one letter, and the probabilities of the letters count, from the twenty most
probable tokens that the server tells. "json": a verdict with its reason, as one JSON object that is read whole or not
at all (rankwise.rubrics). What the server says is kept as it is; reading it is a function of that alone.

Every sending is charged to a budget before it leaves. Whose replies they are is what the server says in them: one from
another model than the first ends the asking, since a name may come to stand for another model.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import aclosing
from typing import Any

from rankwise.budget import Budget, Spending
from rankwise.client import Client, Endpoint, Failed, Halt, Refused, synchronously, with_silences
from rankwise.fingerprint import digest
from rankwise.rubrics import Form, Rubric, count_controls
from rankwise.server_replies import read_json, read_letter, read_refusal, usage_of, whole
from rankwise.types import UserError
from rankwise.verdicts import Question, Reply

ASKING = 1  # raise it when other things are sent than before
TOP = 20  # most probable tokens that are asked for; no server of those known gives more
# Tokens of a chat template and of what a server puts before a conversation by itself. All else is told by its bytes,
# since a token is at least one.
OVERHEAD = 256
SPARE = 4  # one more question for so many places is ready to be sent, while others wait to be sent again
SILENCE_S = 0.25  # after so long without a reply whoever keeps them may look at the clock
FIRST_REFUSED = 20  # first questions which, all refused, tell of the recipe or the server and not of themselves
OF_A_QUESTION = (400, 413, 422)  # statuses by which a server refuses one request: too long, a content filter
LATER_NAME = "max_completion_tokens"  # of max_tokens, for models that reason before they reply


class ServerJudge:
    """A judge that a server has; implements rankwise.judging.Judge.

    Args:
        name: what tables call it.
        model: whose verdicts they are, and the name asked for unless the endpoint has one; both are in the identity.
        reply: "json" or "logprobs".
        temperature: of "json"; log-probs are those of temperature 1, whatever is drawn.
        max_reply_tokens: of "json", a reasoning model's thoughts included.
        reasks: times that a question is asked again when its reply cannot be read.
        samples: draws of each question.
        budget: what it may cost; a limit of none, and nothing kept, where none is given.
    """

    pairwise = True

    def __init__(
        self,
        name: str,
        *,
        model: str,
        rubric: Rubric,
        endpoint: Endpoint,
        reply: Form = "json",
        temperature: float = 0.0,
        max_reply_tokens: int = 256,
        reasks: int = 3,
        samples: int = 1,
        budget: Budget | None = None,
    ):
        self.name, self._rubric, self._endpoint, self._form = name, rubric, endpoint, reply
        self.budget = budget or Budget(account=endpoint.prefix)
        letter = reply == "logprobs"
        self.attempts, self.samples = (1, 1) if letter else (reasks + 1, samples)
        self._settings = (
            {"temperature": 0.0, "max_tokens": 1, "logprobs": True, "top_logprobs": TOP}
            if letter
            else {"temperature": temperature, "max_tokens": max_reply_tokens}
        )
        self._model, self._later_name = endpoint.model or model, False
        self._first: str | None = None  # the model that answered first, of all runs
        self.identity = digest("server", ASKING, model, self._model, rubric.version, reply, self._settings)

    def ask(self, questions: Sequence[Question]) -> Iterator[tuple[int, dict[str, Any]] | None]:
        """As Judge.ask; also raises UserError where the budget ends, another model answers, or all is refused.

        A question that the server refuses by itself has the raw reply {"refused": its words}.
        """
        return synchronously(self._answers(questions))

    def read(self, question: Question, raw: Mapping[str, Any]) -> Reply:
        prompt, completion = usage_of(raw.get("reply")) or (0, 0)
        if "refused" in raw:
            read, text = read_refusal(raw["refused"])
        else:
            read, text = (read_letter if self._form == "logprobs" else read_json)(question, raw["reply"]["choices"][0])
        return Reply(
            question=question,
            raw=text,
            prompt_tokens=prompt,
            completion_tokens=completion,
            controls=count_controls(question),
            **read,
        )

    def spent(self) -> Spending:
        """What this judge's asking has cost in this process."""
        return self.budget.spent(now=True)

    async def _answers(self, questions: Sequence[Question]) -> AsyncGenerator[tuple[int, dict[str, Any]] | None]:
        if not questions:
            return
        purse, came = _Purse(self.budget), 0
        refused = self._refused(questions)
        async with Client(self._endpoint) as client:
            root = await self._root(client)
            stream = client.each(
                questions,
                lambda question: self._answer(client, purse, question, root),
                name=_shown,
                at_once=self._endpoint.concurrency + self._endpoint.concurrency // SPARE,
            )
            try:
                async with aclosing(with_silences(stream, SILENCE_S)) as replies:
                    async for one in replies:
                        for kept in refused.after(one) if one else [None]:
                            came += kept is not None
                            yield kept
            except Spent:
                raise self._used_up(purse.used, came, len(questions) - came) from None
        if purse.above:
            print(
                f"warning: {self._endpoint.url} counts up to {purse.above} tokens more a request than its bytes and "
                f"{OVERHEAD} more; a budget may be exceeded by so many for each request under way",
                file=sys.stderr,
                flush=True,
            )

    async def _root(self, client: Client) -> str:
        """What the server says that it has under the model's name: vLLM names a folder, whose last part is told.

        A key may be good for questions and not for this list; whatever is wrong comes out when the first is asked.
        """
        try:
            page = await client.get("models")
        except Refused:
            return ""
        listed = page.get("data") if isinstance(page, dict) else None
        listed = [one for one in listed if isinstance(one, dict)] if isinstance(listed, list) else []
        about = next((one for one in listed if one.get("id") == self._model), {})
        return str(about.get("root") or "").rstrip("/").rpartition("/")[2]

    async def _answer(self, client: Client, purse: _Purse, question: Question, root: str) -> dict[str, Any]:
        body = self._body(question)
        sendings = _Sendings(purse, body)
        try:
            reply = await client.post("/chat/completions", body, whole, meter=sendings.one)
        except Refused as refusal:
            if _wants_later_name(refusal, body):
                self._later_name = True
                return await self._answer(client, purse, question, root)
            if refusal.failure is None or refusal.failure.status not in OF_A_QUESTION:
                raise
            return {"refused": str(refusal.failure), **sendings.told}
        self._check_model(str(reply.get("model") or ""), root)
        return {"reply": reply, **sendings.told, **({"root": root} if root else {})}

    def _refused(self, questions: Sequence[Question]) -> _Refusals:
        # What is asked again was asked with others before. A few questions may be what an earlier run has left over.
        few = len(questions) < FIRST_REFUSED
        known = questions[0].attempt > 0 or self._first or (few and self.budget.has_seen(self.identity))
        return _Refusals(f"{self.name}: {self._endpoint.url}", len(questions), known=bool(known))

    def _body(self, question: Question) -> dict[str, Any]:
        body = {
            "model": self._model,
            "messages": self._rubric.messages(question, reply=self._form),
            **self._settings,
        }
        if self._later_name:
            body[LATER_NAME] = body.pop("max_tokens")
        if self._form == "json":
            schema = {"name": "verdict", "strict": True, "schema": self._rubric.schema(question)}
            body["response_format"] = {"type": "json_schema", "json_schema": schema}
        if self._settings["temperature"] > 0:
            body["seed"] = int(digest(question.sample, question.attempt)[:7], 16)
        return body

    def _check_model(self, model: str, root: str) -> None:
        now = f"{model} ({root})" if root and root != model else model
        if self._first is None:
            self._first = self.budget.first_seen(self.identity, now)
        if now != self._first:
            raise Halt(
                f"{self.name}: {self._endpoint.url} now answers as {now!r}, and the first reply of this judge came "
                f"from {self._first!r}; verdicts of two models are not mixed. Ask for the first one by a name that "
                "stands for it alone, or give the judge's parameter `model` another name, under which all is asked anew"
            )

    def _used_up(self, used: int, came: int, missing: int) -> UserError:
        spent, prefix = self.budget.spent(), self._endpoint.prefix
        more = f", by this run's mean {missing * used / came:,.0f} tokens" if came else ""
        money = f", {spent.money:,.2f} at the prices given" if spent.money else ""
        return UserError(
            f"{self.name}: {prefix}_BUDGET_TOKENS is {self.budget.limit:,}; {spent.tokens:,} are spent over all runs "
            f"({spent.charged:,} of them charged for requests whose cost was never told{money}), and the next request "
            f"might go beyond. {came:,} replies of this run are kept; {missing:,} are missing{more}. Raise "
            f"{prefix}_BUDGET_TOKENS and run this again: it asks for the missing ones alone"
        )


class Spent(Halt):
    """The next request might exceed the budget."""

    def __init__(self):
        super().__init__("the budget is spent")


class _Refusals:
    """Replies in the order in which they may be kept: refusals once the server has taken any question.

    Where it refuses all of the first, the trouble is the recipe's or the server's; what was kept then would stay.
    """

    def __init__(self, where: str, count: int, *, known: bool):
        self._where, self._taken = where, known
        self._open = set(range(min(count, FIRST_REFUSED)))  # numbers of the first that are not refused so far
        self._held: list[tuple[int, dict[str, Any]]] = []

    def after(self, one: tuple[int, dict[str, Any]]) -> list[tuple[int, dict[str, Any]]]:
        """What may be kept now that this one has come; raises UserError where all of the first are refused."""
        number, raw = one
        self._taken = self._taken or "refused" not in raw
        self._held.append(one)
        self._open.discard(number)
        if not self._taken:
            if not self._open:
                raise UserError(
                    f"{self._where} refuses the first {min(len(self._held), FIRST_REFUSED)} questions, so no more are "
                    f"asked and none of this is kept: {raw['refused']}; correct the judge's parameters or the server, "
                    "or give it shorter rows, then run this again"
                )
            return []
        held, self._held = self._held, []
        return held


class _Purse:
    """The budget, for requests under way at once in one event loop."""

    def __init__(self, budget: Budget):
        self._budget, self._under_way, self._ended = budget, 0, False
        self._freed = asyncio.Event()
        self.used = 0  # tokens that the server told
        self.above = 0  # most tokens by which a request came to more than it was charged with

    async def take(self, tokens: int) -> int:
        """Charge a request, and wait while those under way may still leave room for it; gives the charge.

        Raises Spent where there is no room, from then on for every request.
        """
        charge = tokens + self.above
        while self._ended or not self._budget.reserve(charge):
            if self._ended or not self._under_way:
                self._ended = True
                self._freed.set()
                raise Spent
            self._freed.clear()
            await self._freed.wait()
        self._under_way += 1
        return charge

    def give_back(self, charge: int, used: tuple[int, int] | None) -> None:
        """The request has ended; used: its tokens, None where they were never told and the charge stays."""
        if used is not None:
            self._budget.settle(charge, prompt=used[0], completion=used[1])
            self.used += sum(used)
            self.above = max(self.above, sum(used) - charge)
        self._under_way -= 1
        self._freed.set()


class _Sendings:
    """The sendings of one request: what each may cost, how many they were, how long the last one took."""

    def __init__(self, purse: _Purse, body: Mapping[str, Any]):
        reply = body.get("max_tokens") or body.get(LATER_NAME)
        self._purse = purse
        self._most = len(json.dumps(body, ensure_ascii=False).encode("utf-8", "surrogatepass")) + OVERHEAD + reply
        self.count, self.seconds = 0, 0.0

    @property
    def told(self) -> dict[str, Any]:
        return {"seconds": round(self.seconds, 3), "sendings": self.count}

    @contextlib.asynccontextmanager
    async def one(self) -> AsyncIterator[Callable[[Any], None]]:
        """A rankwise.client.Meter."""
        charge = await self._purse.take(self._most)
        used: tuple[int, int] | None = None

        def tell(answer: Any) -> None:
            nonlocal used
            used = usage_of(answer)

        began = time.monotonic()
        self.count += 1
        try:
            yield tell
        except Failed as failure:
            used = (0, 0) if failure.uncounted else None
            raise
        finally:
            self.seconds = time.monotonic() - began
            self._purse.give_back(charge, used)


def _wants_later_name(refusal: Refused, body: Mapping[str, Any]) -> bool:
    """Whether max_tokens is refused in favour of its later name; a filter may quote that from an answer."""
    failure = refusal.failure
    if failure is None or LATER_NAME in body or LATER_NAME not in failure.message + failure.param:
        return False
    return failure.param == "max_tokens" or LATER_NAME not in json.dumps(body["messages"])


def _shown(question: Question) -> str:
    return f"row {question.row_id!r}, answers {', '.join(map(str, question.places))}"
