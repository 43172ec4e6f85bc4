"""Asking an OpenAI-compatible server many things: so many at a time, patiently, each by itself.

The openai package sends and receives; whether to send again is decided here, in one loop, since it cannot know of an
answer that arrives whole and makes no sense, and a budget has to see each sending. What fails for good leaves the
others be.
"""

from __future__ import annotations

import asyncio
import contextlib
import email.utils
import itertools
import json
import math
import random
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rankwise.json_text import whole_characters
from rankwise.types import Unavailable, UserError

T, R = TypeVar("T"), TypeVar("R")
FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.5, 8.0  # between two sendings, doubled each time; less up to JITTER of it
JITTER = 0.25
LONGEST_RETRY_AFTER_S = 120.0  # a server that asks for more is not waited for
CONNECT_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 30.0  # for pages that cost a server nothing
SERVER_IS_GONE = 20  # things given up in a row, at least, before the rest is not tried
TURNED_AWAY = (500, 503, 529)  # the server's own trouble; a gateway's (502, 504) may hide an answer that was computed
SHORTEST_KEY = 8  # characters; a shorter one is no secret, and may be a part of any word or number
LARGEST_NUMBER = 1_000_000  # that the environment may give: eleven days, or more requests than any server takes


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """Where a server is and how it is to be treated. None of it belongs to a recipe: it comes from the environment."""

    url: str  # …/v1
    key: str = field(default="none", repr=False)  # sent as a bearer token; most servers of one's own ask for none
    model: str | None = None  # its name there, where the server need not be asked
    concurrency: int = 64  # requests under way at once
    timeout_s: float = (
        600.0  # longest silence of a connection: until a reply comes that is not streamed, or its next part
    )
    retries: int = 8  # 40 s of pauses, if no Retry-After asks for more; one above two minutes ends the trying
    prefix: str = field(default="RANKWISE_ROLLOUTS", compare=False)  # of the variables that messages name

    @classmethod
    def from_environment(cls, prefix: str, environment: Mapping[str, str], *, url: str | None = None) -> Endpoint:
        """{prefix}_URL (unless url is given), _API_KEY, _MODEL, _CONCURRENCY, _TIMEOUT; raises UserError."""
        return cls(
            url=url or _address(environment, f"{prefix}_URL"),
            key=_key(environment, f"{prefix}_API_KEY") or "none",
            model=environment.get(f"{prefix}_MODEL") or cls.model,
            concurrency=int(_number(environment, f"{prefix}_CONCURRENCY", cls.concurrency)),
            timeout_s=_number(environment, f"{prefix}_TIMEOUT", cls.timeout_s),
            prefix=prefix,
        )


class Malformed(Exception):
    """A whole answer that makes no sense; another may."""


class Unanswered(Exception):
    """Given up after all retries; a later run may get it."""


class Refused(UserError):
    """The server will not have such a request, however often it is sent."""

    def __init__(self, why: str, failure: Failed | None = None):
        super().__init__(why)
        self.failure = failure  # where one request was refused, not the key or the address


class Halt(UserError):
    """Nothing more is to be asked of the server, whatever the request."""


class Failed(Exception):
    """One sending that came to nothing."""

    def __init__(
        self,
        why: str,
        *,
        status: int | None = None,
        again=True,
        after_s: float | None = None,
        taken: bool = True,
        param: str = "",
        message: str = "",
    ):
        super().__init__(why)
        self.status = status  # None: no whole answer came
        self.again = again  # another sending may do
        self.after_s = after_s  # not before, where the server says so
        self.taken = taken  # somebody was there to take the request
        self.param, self.message = param, message  # of the API's error object, where there is one

    @property
    def uncounted(self) -> bool:
        """Nothing was computed: nobody took the request, or it was turned away."""
        return not self.taken or self.status in TURNED_AWAY or (self.status or 0) in range(400, 500)


# Entered before each sending of a request and left when it has ended; may wait, or raise Halt. What it yields is called
# with the parsed answer, if one comes.
Meter = Callable[[], AbstractAsyncContextManager[Callable[[Any], None]]]


@contextlib.asynccontextmanager
async def unmetered() -> AsyncIterator[Callable[[Any], None]]:
    yield lambda answer: None


class Client:
    """One server, for use in one event loop: `async with Client(endpoint) as client`."""

    def __init__(self, endpoint: Endpoint):
        import openai  # here, not above: half a second that only those who use a server pay

        self.endpoint = endpoint
        # A proxy for the world outside is none for a server on this machine.
        near = urlsplit(endpoint.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._places = asyncio.Semaphore(endpoint.concurrency)
        self._openai = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.key,
            timeout=openai.Timeout(endpoint.timeout_s, connect=CONNECT_TIMEOUT_S),
            max_retries=0,  # they are sent again here
            http_client=openai.DefaultAsyncHttpxClient(trust_env=not near),
        )

    async def __aenter__(self) -> Client:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._openai.close()

    async def get(self, path: str) -> Any:
        """A page as parsed JSON; None where the server has no such page.

        A path with / in front is the host's own, which a gateway may keep to itself: any refusal is a None then.

        Raises Unavailable where nothing answers or the server is in trouble, Refused where it will not give the page.
        """
        parts = urlsplit(self.endpoint.url)
        url = f"{parts.scheme}://{parts.netloc}{path}" if path.startswith("/") else path
        try:
            return await self._patiently(lambda: self._send("get", url, timeout=LOOK_TIMEOUT_S), retries=1)
        except Malformed:
            return None
        except Failed as failure:
            if failure.status is None:
                raise Unavailable(
                    f"nothing answers at {self.endpoint.url} ({failure}); start the server there, "
                    "or correct the address"
                ) from None
            if path.startswith("/") or failure.status in (404, 405):
                return None
            raise self._no_page(f"{self.endpoint.url}/{path}", failure) from None

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], R], *, meter: Meter = unmetered) -> R:
        """What `read` makes of the parsed answer; asked again where it raises Malformed.

        Raises Unanswered when all retries are used up, Refused where another try would end alike, and what meter does.
        """

        async def send() -> R:
            async with self._places, meter() as tell:
                answer = await self._send("post", path, body=body)
                tell(answer)
            return _made(read, answer)

        try:
            return await self._patiently(send, retries=self.endpoint.retries)
        except Malformed as error:
            raise Unanswered(f"its answers make no sense: {error}") from None
        except Failed as failure:
            if failure.status is None or _may_pass(failure.status):
                raise Unanswered(str(failure)) from None
            if failure.status == 401:
                raise self._no_page(f"{self.endpoint.url}{path}", failure) from None
            raise Refused(f"{self.endpoint.url}{path} refuses the request: {failure}", failure) from None

    async def _patiently(self, send: Callable[[], Awaitable[R]], *, retries: int) -> R:
        """What send gives; called again, up to so many times, where it raises Malformed or a Failed that may pass."""
        for attempt in itertools.count():
            try:
                return await send()
            except (Malformed, Failed) as error:
                if attempt == retries or not getattr(error, "again", True):
                    raise
                after_s = getattr(error, "after_s", None)
            await asyncio.sleep(_pause_s(attempt, after_s))
        raise AssertionError("unreachable")

    async def _send(self, method: str, path: str, **options: Any) -> Any:
        """The parsed answer to one sending; raises Failed or Malformed. None of them holds the key."""
        import openai

        more = {"timeout": options.pop("timeout")} if "timeout" in options else {}
        try:
            return self._cleaned(await getattr(self._openai, method)(path, cast_to=object, options=more, **options))
        except openai.APIStatusError as error:
            after_s = _retry_after_s(error.response.headers)
            again = _may_pass(error.status_code) and (after_s or 0) <= LONGEST_RETRY_AFTER_S
            why = _quoted(error.status_code, self._without_key(error.response.text))
            raise Failed(why, status=error.status_code, again=again, after_s=after_s, **_named(error.body)) from None
        except openai.APIConnectionError as error:
            taken = type(error.__cause__).__name__ not in ("ConnectError", "ConnectTimeout")
            raise Failed(self._without_key(_cause(error)), taken=taken) from None
        except (ValueError, RecursionError) as error:  # no JSON, no UTF-8, or deeper than anything of this API
            raise Malformed(self._without_key(str(error))) from None

    def _cleaned(self, value: Any) -> Any:
        """A parsed answer whose texts do not hold the key, which some servers quote, and can be written as UTF-8."""
        if isinstance(value, str):
            return self._without_key(whole_characters(value))
        if isinstance(value, dict):
            return {self._cleaned(name): self._cleaned(one) for name, one in value.items()}
        return [self._cleaned(one) for one in value] if isinstance(value, list) else value

    def _without_key(self, text: str) -> str:
        """A text without the key, as it is and as JSON writes it."""
        key = self.endpoint.key
        if len(key) < SHORTEST_KEY:
            return text
        return text.replace(key, "[key]").replace(json.dumps(key)[1:-1], "[key]")

    def _no_page(self, where: str, failure: Failed) -> UserError:
        if failure.status in (401, 403):
            return Refused(f"{where} does not accept the key: {failure}; set {self.endpoint.prefix}_API_KEY")
        if _may_pass(failure.status):
            return Unavailable(f"{where} is in trouble: {failure}; see the server's log, then run this again")
        return Refused(f"{where} is refused: {failure}; correct {self.endpoint.prefix}_URL")

    async def each(
        self, items: Iterable[T], ask: Callable[[T], Awaitable[R]], *, name: Callable[[T], str], at_once: int
    ) -> AsyncGenerator[tuple[int, R]]:
        """(number of the item, its answer), as they come; items are taken as places become free, at_once in all.

        Raises at the end: the UserError of the first item refused, or a Halt, after which no further one is asked; or
        Unavailable, which counts those unanswered, all others having been yielded.
        """
        waiting, under_way = enumerate(items), {}
        unanswered, in_a_row, refusal, reason = [], 0, None, ""
        most_in_a_row = max(SERVER_IS_GONE, at_once)
        answered: list[tuple[int, R]] = []
        try:
            while True:
                for number, item in itertools.islice(waiting, at_once - len(under_way)):
                    under_way[asyncio.ensure_future(ask(item))] = number, item
                # After the places are filled again: the server works on while the caller stores these.
                for one in answered:
                    yield one
                if not under_way:
                    break
                done, _ = await asyncio.wait(under_way, return_when=asyncio.FIRST_COMPLETED)
                answered = []
                for task in done:
                    number, item = under_way.pop(task)
                    try:
                        answered.append((number, task.result()))
                        in_a_row = 0
                    except Unanswered as error:
                        unanswered.append(name(item))
                        in_a_row, reason = in_a_row + 1, str(error)
                    except Halt as halt:
                        refusal = refusal or halt
                    except UserError as error:
                        refusal = refusal or UserError(f"{name(item)}: {error}")
                if refusal or in_a_row >= most_in_a_row:
                    waiting = iter(())
        finally:
            for task in under_way:
                task.cancel()
        if refusal:
            raise refusal
        if unanswered:
            given_up = f", the last {in_a_row} in a row, and no more were tried" if in_a_row >= most_in_a_row else ""
            raise Unavailable(
                f"{len(unanswered)} got no answer from {self.endpoint.url}{given_up}: {', '.join(unanswered[:5])}; "
                f"the last reason: {reason}. All other answers are kept; run this again to ask for the rest alone"
            )


async def with_silences(stream: AsyncGenerator[T], every_s: float) -> AsyncGenerator[T | None]:
    """The items of a stream, and None whenever so many seconds have passed without one."""
    end = object()
    following = lambda: asyncio.ensure_future(_next(stream, end))
    coming = following()
    try:
        while True:
            while not (await asyncio.wait({coming}, timeout=every_s))[0]:
                yield None
            if (item := coming.result()) is end:
                return
            yield item
            coming = following()
    finally:
        coming.cancel()
        await asyncio.gather(coming, return_exceptions=True)
        await stream.aclose()


def synchronously(stream: AsyncGenerator[T]) -> Iterator[T]:
    """The items of an asynchronous generator, on an event loop in a thread, where it works on between items.

    In the caller's thread asyncio would swallow what a signal's handler raises inside one of its callbacks.
    """
    loop, end = asyncio.new_event_loop(), object()
    thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
    thread.start()

    async def leave() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await stream.aclose()

    def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        while (item := wait_for(_next(stream, end))) is not end:
            yield item
    finally:
        wait_for(leave())
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        loop.close()


def _address(environment: Mapping[str, str], name: str) -> str:
    """A server's address; a wrong one is quoted unless a password may be in it."""
    url = environment.get(name, "").strip()
    given = f"{name} is {url!r}" if "@" not in url else f"{name} is no address that can be used"
    example = "it has to be an address such as http://127.0.0.1:8000/v1"
    try:
        parts = urlsplit(url)
        user, _ = parts.username, parts.port  # a port that is none raises
    except ValueError as error:
        why = "" if "@" in url else f" ({error})"
        raise UserError(f"{given}{why}; {example}") from None
    if user is not None:
        raise UserError(
            f"{name} holds a user name or a password, which logs and messages would show; leave it out, and give the "
            f"server's key in {name.removesuffix('_URL')}_API_KEY"
        )
    if parts.scheme not in ("http", "https") or not parts.hostname or not url.isprintable() or " " in url:
        raise UserError(f"{given}; {example}")
    return url


def _key(environment: Mapping[str, str], name: str) -> str:
    """A key without the newline that its file ended in; no message ever quotes it."""
    key = environment.get(name, "").strip()
    if not key.isascii() or not key.isprintable() or " " in key:
        raise UserError(f"{name} holds a space, a line break or a letter outside ASCII, as no key does; copy it again")
    return key


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name) or str(default)
    with contextlib.suppress(ValueError):
        if 1 <= float(text) <= LARGEST_NUMBER:
            return float(text)
    raise UserError(f"{name} is {text!r}; it has to be a number from 1 to {LARGEST_NUMBER}")


def _made(read: Callable[[Any], R], reply: Any) -> R:
    try:
        return read(reply)
    except UserError:
        raise
    except (AttributeError, TypeError, LookupError, ValueError) as error:  # of another shape than the API's
        raise Malformed(f"{type(error).__name__}: {error}, in {str(reply)[:100]!r}") from error


def _may_pass(status: int) -> bool:
    """Whether a status is one that the same request may not meet again."""
    return status >= 500 or status in (408, 409, 429)


def _pause_s(attempt: int, after_s: float | None) -> float:
    """Seconds before the next sending: as the server asks, or twice the last pause. Drawn, or all come at once."""
    if after_s is not None:
        return after_s * (1 + JITTER * random.random())
    return min(FIRST_PAUSE_S * 2**attempt, LONGEST_PAUSE_S) * (1 - JITTER * random.random())


def _retry_after_s(headers: Mapping[str, str]) -> float | None:
    """Seconds that a server asks to wait, given as milliseconds, seconds or a date (RFC 9110, 10.2.3)."""
    for name, unit in (("retry-after-ms", 1000), ("retry-after", 1)):
        with contextlib.suppress(ValueError, KeyError):
            seconds = float(headers[name]) / unit
            return seconds if 0 < seconds < math.inf else None
    with contextlib.suppress(ValueError, TypeError, KeyError, OverflowError):
        read = lambda text: email.utils.parsedate_to_datetime(text).timestamp()
        now = read(headers["date"]) if "date" in headers else time.time()  # by its own clock: ours may be hours off
        return max(0.0, read(headers["retry-after"]) - now)
    return None


async def _next(stream: AsyncGenerator[T], end: Any) -> Any:
    return await anext(stream, end)


def _named(error: Any) -> dict[str, str]:
    """Parameter and message of the API's error object, or of what some give in its place."""
    if isinstance(error, dict):
        return {
            "param": str(error.get("param") or ""),
            "message": str(error.get("message") or error.get("detail") or ""),
        }
    return {"message": error} if isinstance(error, str) else {}


def _quoted(status: int, text: str) -> str:
    return f"status {status}, {text[:500].strip() or 'without a word'}"


def _cause(error: BaseException) -> str:
    """The innermost cause: the openai package says 'Connection error.' of all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
