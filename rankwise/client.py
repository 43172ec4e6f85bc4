"""Asking an OpenAI-compatible server many things: so many at a time, patiently, each by itself.

The openai package does the waiting: connections, timeouts, retries with growing pauses, Retry-After. Added here is what
it lacks: an answer that arrives whole and makes no sense is asked for again; what fails for good leaves the others be.
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import json
import threading
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeVar
from urllib.parse import urlsplit

from rankwise.types import Unavailable, UserError

T, R = TypeVar("T"), TypeVar("R")
LONGEST_PAUSE_S = 8.0  # between two askings; as the openai package has it
CONNECT_TIMEOUT_S = 10.0
LOOK_TIMEOUT_S = 30.0  # for pages that cost a server nothing
SERVER_IS_GONE = 20  # things given up in a row, at least, before the rest is not tried
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


class Client:
    """One server, for use in one event loop: `async with Client(endpoint) as client`."""

    def __init__(self, endpoint: Endpoint):
        import openai  # here, not above: half a second that only those who use a server pay

        self.endpoint = endpoint
        # A proxy for the world outside is none for a server on this machine.
        near = urlsplit(endpoint.url).hostname in ("127.0.0.1", "localhost", "::1")
        self._openai = openai.AsyncOpenAI(
            base_url=endpoint.url,
            api_key=endpoint.key,
            timeout=openai.Timeout(endpoint.timeout_s, connect=CONNECT_TIMEOUT_S),
            max_retries=endpoint.retries,
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
        import openai

        parts = urlsplit(self.endpoint.url)
        url = f"{parts.scheme}://{parts.netloc}{path}" if path.startswith("/") else path
        client = self._openai.with_options(max_retries=1, timeout=LOOK_TIMEOUT_S)
        try:
            return await client.get(url, cast_to=object)
        except openai.APIConnectionError as error:
            raise Unavailable(
                f"nothing answers at {self.endpoint.url} ({_cause(error)}); start the server there, "
                "or correct the address"
            ) from None
        except openai.APIStatusError as error:
            if path.startswith("/") or error.status_code in (404, 405):
                return None
            raise self._no_page(path, error) from None
        except ValueError:
            return None

    def _no_page(self, path: str, error: Any) -> UserError:
        where = f"{self.endpoint.url}/{path}"
        if error.status_code in (401, 403):
            return Refused(f"{where} does not accept the key: {_quoted(error)}; set {self.endpoint.prefix}_API_KEY")
        if _may_pass(error):
            return Unavailable(f"{where} is in trouble: {_quoted(error)}; see the server's log, then run this again")
        return Refused(f"{where} is refused: {_quoted(error)}; correct {self.endpoint.prefix}_URL")

    async def post(self, path: str, body: dict[str, Any], read: Callable[[Any], R]) -> R:
        """What `read` makes of the parsed answer; asked again where it raises Malformed.

        Raises Unanswered when all retries are used up, Refused where another try would end alike.
        """
        import openai

        for attempt in itertools.count():
            try:
                return _made(read, await self._openai.post(path, body=body, cast_to=object))
            except openai.APIStatusError as error:
                if _may_pass(error):
                    raise Unanswered(str(error)) from None
                raise Refused(f"{self.endpoint.url}{path} refuses the request: {_quoted(error)}") from None
            except openai.APIConnectionError as error:
                raise Unanswered(_cause(error)) from None
            except (Malformed, UnicodeError, json.JSONDecodeError) as error:
                if attempt == self.endpoint.retries:
                    raise Unanswered(f"its answers make no sense: {error}") from None
            await asyncio.sleep(min(0.5 * 2**attempt, LONGEST_PAUSE_S))
        raise AssertionError("unreachable")

    async def each(
        self, items: Iterable[T], ask: Callable[[T], Awaitable[R]], *, name: Callable[[T], str], at_once: int
    ) -> AsyncGenerator[tuple[int, R]]:
        """(number of the item, its answer), as they come; items are taken as places become free, at_once in all.

        Raises at the end: the UserError of the first item refused, after which no further one is asked; or
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


def synchronously(stream: AsyncGenerator[T]) -> Iterator[T]:
    """The items of an asynchronous generator, on an event loop in a thread, where it works on between items.

    In the caller's thread asyncio would swallow what a signal's handler raises inside one of its callbacks.
    """
    loop, end = asyncio.new_event_loop(), object()
    thread = threading.Thread(target=loop.run_forever, name="requests", daemon=True)
    thread.start()

    async def following() -> Any:
        return await anext(stream, end)

    async def leave() -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await stream.aclose()

    def wait_for(coroutine: Coroutine[Any, Any, Any]) -> Any:
        return asyncio.run_coroutine_threadsafe(coroutine, loop).result()

    try:
        while (item := wait_for(following())) is not end:
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


def _may_pass(error: Any) -> bool:
    """Whether a status is one that the same request may not meet again."""
    return error.status_code >= 500 or error.status_code in (408, 409, 429)


def _quoted(error: Any) -> str:
    return f"status {error.status_code}, {error.response.text[:500].strip() or 'without a word'}"


def _cause(error: BaseException) -> str:
    """The innermost cause: the openai package says 'Connection error.' of all."""
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
