"""K answers to each prompt of a table, from the row store where they are there already.

The processes of a launch share out the prompts that no store of theirs holds. Each keeps what it sampled in the store
of its own machine, and at the end the first one fetches what its store lacks. So a launch that was killed, in part or
whole, is continued by one of any other size.
"""

from __future__ import annotations

import contextlib
import io
import itertools
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from rankwise.checkpoints import Precision, load_tokenizer
from rankwise.fingerprint import digest, sampled_from, tokenizer_digest, weights_digest
from rankwise.parallel import Processes, processes
from rankwise.progress import Progress
from rankwise.rendering import Renderer
from rankwise.rows import RowTable
from rankwise.sampling import Engine, Sampled, Sampling, Wanted, seed_of
from rankwise.store import Store
from rankwise.types import Answer, Row, Unavailable, UserError

COMMIT_ROWS = 64  # rows that the engine lets go are put into the store by so many …
COMMIT_S = 1.0  # … or when one comes and the last time was so long ago; a kill loses those in between
CHUNK_ROWS = 256  # rows in a message to the first process, or taken from the store at once
WINDOW_ROWS = 8192  # prompts in memory; the shortest of them are begun first
LOGP_DIGITS = 6  # decimals of a log-probability that are kept: a millionth of a nat is below any rounding of a model


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample, and from which model."""

    folder: Path | None  # the model; None: only a server knows it, by its name
    sampling: Sampling
    k: int  # answers a prompt
    engine: Literal["embedded", "server"] = "embedded"
    seed: int = 0
    round: int = 0
    max_prompt_tokens: int = 0  # a longer prompt loses its beginning; 0 is no limit
    precision: Precision = "fp32"  # of the embedded engine; a server has its own
    source: str = "policy"  # who the answers are said to be from
    name: str | None = None  # what the model is served as, where there is no folder
    prefix: str = "RANKWISE_ROLLOUTS"  # of the environment's variables that say where its server is; no result's affair
    batch_sequences: int = 256  # answers that the embedded engine decodes together; no answer depends on it


@dataclass(kw_only=True)
class Work:
    """What was to be done; complete once the rows are read."""

    computed: int = 0  # prompts answered now, by all processes
    tokens_per_second: float = 0.0  # of all processes together; 0 when nothing was computed


def sample_rows(
    prompts: Sequence[Row], request: Request, store: Store, *, engine: Engine | None = None
) -> tuple[list[Row], Work]:
    """All rows of sampled at once."""
    work = Work()
    return list(sampled(prompts, request, store, work, engine=engine)), work


def sampled(
    prompts: RowTable | Sequence[Row], request: Request, store: Store, work: Work, *, engine: Engine | None = None
) -> Iterator[Row]:
    """Rows with K unranked answers each, in the prompts' order; killed anywhere, a rerun asks for the rest only.

    Prompts are answered WINDOW_ROWS at a time, and no more of them are in memory. Several processes share the work,
    each with the store of its machine. The first gets all rows; the others none, and have to ask for them all the same.

    Args:
        engine: what answers; the request's own where none is given.

    Raises UserError where prompts cannot be answered, after all others of their window were and are kept.
    """
    here = processes()
    _same_for_all(str(len(prompts)), here)
    renderer, weights = None, None
    if request.folder is not None:
        renderer = Renderer(load_tokenizer(request.folder), max_prompt_tokens=request.max_prompt_tokens)
        weights = weights_digest(request.folder)
    tokens, seconds = 0, 0.0
    with contextlib.ExitStack() as stack:
        if engine is None:
            engine = engine_of(request)
            stack.callback(engine.close)
        identity, rows = engine.identity(), iter(prompts)
        while window := list(itertools.islice(rows, WINDOW_ROWS)):
            wanted = [_wanted(row, renderer, request) for row in window]
            keys = [digest("rollout", identity, one.prompt_ids or _plain(one), one.seeds) for one in wanted]
            missing = _missing(keys, wanted, store, here)
            mine = missing[here.rank :: here.count]
            more, took, trouble = _fill(
                store, engine, [keys[i] for i in mine], [wanted[i] for i in mine], request, here
            )
            here.meet()
            _raise(trouble, here)
            _collect(keys, store, here)
            work.computed, tokens, seconds = work.computed + len(missing), tokens + more, seconds + took
            if here.first:
                yield from _answered(window, wanted, keys, store, renderer, request, weights)
    speed = tokens / seconds if seconds else 0.0
    work.tokens_per_second = here.total(torch.tensor([speed])).item()


def _answered(
    window: Sequence[Row],
    wanted: Sequence[Wanted],
    keys: Sequence[str],
    store: Store,
    renderer: Renderer | None,
    request: Request,
    weights: str | None,
) -> Iterator[Row]:
    for start in range(0, len(window), CHUNK_ROWS):
        part = slice(start, start + CHUNK_ROWS)
        found = store.get_many(keys[part])
        for row, one, key in zip(window[part], wanted[part], keys[part]):
            yield _row(row, one, found[key], renderer, request, weights=weights)


def engine_of(request: Request) -> Engine:
    """The engine that a request names; nothing is loaded or started yet."""
    if request.engine == "server":
        from rankwise.serving import ServedEngine

        return ServedEngine(folder=request.folder, name=request.name, sampling=request.sampling, prefix=request.prefix)
    from rankwise.generation import EmbeddedEngine

    assert request.folder is not None, "the embedded engine wants a folder"
    return EmbeddedEngine(
        request.folder, request.sampling, precision=request.precision, batch_sequences=request.batch_sequences
    )


def with_teacher(rows: Iterable[Row], taught: Iterable[Row], *, same_tokenizer: bool) -> Iterator[Row]:
    """Rows with the teacher's answers behind the policy's; ids of another tokenizer would be other words, and go."""
    kept = (lambda a: a) if same_tokenizer else (lambda a: replace(a, token_ids=None, logps=None))
    return (
        replace(row, answers=(*row.answers, *map(kept, other.answers))) for row, other in zip(rows, taught, strict=True)
    )


def same_tokenizer(folder: Path, other: Path) -> bool:
    """Whether the token ids of two model folders mean the same."""
    return tokenizer_digest(folder) == tokenizer_digest(other)


def _wanted(row: Row, renderer: Renderer | None, request: Request) -> Wanted:
    return Wanted(
        name=row.id,
        prompt=row.prompt,
        prompt_ids=() if renderer is None else renderer.render(row, ()).prompt_ids,
        seeds=tuple(seed_of(request.seed, row.id, request.round, k) for k in range(request.k)),
    )


def _plain(wanted: Wanted) -> list[list[str]]:
    """A prompt whose tokens are not known."""
    return [[message.role, message.content] for message in wanted.prompt]


def _length(wanted: Wanted) -> int:
    return len(wanted.prompt_ids) or sum(len(message.content) for message in wanted.prompt)


def _missing(keys: Sequence[str], wanted: Sequence[Wanted], store: Store, here: Processes) -> list[int]:
    """Prompts that no process of the launch has answers to, shortest first; all get the same list."""
    _same_for_all(digest(keys), here)
    held = store.held(keys)
    known = here.total(torch.tensor([float(key in held) for key in keys])).tolist()
    return sorted((i for i, count in enumerate(known) if not count), key=lambda i: (_length(wanted[i]), i))


def _same_for_all(identity: str, here: Processes) -> None:
    here.meet()  # each may have read weights for minutes
    asked = here.gather(torch.tensor([int(digest(identity)[:15], 16)]))
    if len({int(one) for one in asked}) > 1:
        raise UserError(
            "the processes of this launch do not want the same answers: prompts, models or params differ between "
            "their machines; copy data/prompts, the model's folder and params.yaml from the first one to the others"
        )


def _fill(
    store: Store, engine: Engine, keys: Sequence[str], wanted: Sequence[Wanted], request: Request, here: Processes
) -> tuple[int, float, UserError | None]:
    """Sample one process's share into its store; tokens, seconds, and what could not be answered."""
    if not wanted:
        return 0, 0.0, None
    fresh: dict[str, Any] = {}
    began = committed = time.monotonic()
    part: dict[str, Any] = {}  # what the engine does not let go yet
    tokens, trouble = 0, None

    def commit() -> None:
        nonlocal committed
        store.put_many(fresh)
        fresh.clear()
        committed = time.monotonic()

    what = f"answers of {request.folder or request.name}" + (f", share 1 of {here.count}" if here.count > 1 else "")
    stream = None if here.first else io.StringIO()
    with (
        Progress(what, total=len(wanted) * request.k, unit="answer", stream=stream) as progress,
        contextlib.closing(engine.answers(wanted)) as answers,
    ):
        try:
            for index, sampled in answers:
                part[keys[index]] = {"engine": engine.version, "answers": [_kept(one) for one in sampled]}
                if engine.settled:
                    fresh.update(part)
                    part.clear()
                tokens += sum(len(one.token_ids or ()) for one in sampled)
                progress.advance(request.k, **{"tokens/s": tokens / (time.monotonic() - began)})
                if fresh and (len(fresh) >= COMMIT_ROWS or time.monotonic() - committed >= COMMIT_S):
                    commit()
        except UserError as error:
            trouble = error
        finally:
            commit()
    return tokens, time.monotonic() - began, trouble


def _kept(sampled: Sampled) -> dict[str, Any]:
    logps = None if sampled.logps is None else [round(logp, LOGP_DIGITS) for logp in sampled.logps]
    return {**asdict(sampled), "logps": logps}


def _raise(trouble: UserError | None, here: Processes) -> None:
    """A process's trouble is raised once the others have done their share; the first speaks for those without."""
    told = here.to_first(None if trouble is None else [str(trouble), isinstance(trouble, Unavailable)])
    if trouble is not None:
        raise trouble
    for rank, (text, may_pass) in enumerate(one or ("", False) for one in told):
        if text:
            raise (Unavailable if may_pass else UserError)(f"process {rank} of this launch: {text}")


def _collect(keys: Sequence[str], store: Store, here: Processes) -> None:
    """Bring what only other machines' stores hold into the first process's, a bounded message at a time."""
    if here.count == 1:
        return
    held = store.held(keys)
    by_rank = [mask.tolist() for mask in here.gather(torch.tensor([int(key in held) for key in keys]))]
    lacking = [i for i in range(len(keys)) if not by_rank[0][i]]
    for start in range(0, len(lacking), CHUNK_ROWS):
        part = lacking[start : start + CHUNK_ROWS]
        mine = [keys[i] for i in part if [mask[i] for mask in by_rank].index(1) == here.rank]
        for values in here.to_first(store.get_many(mine)):
            store.put_many(values)


def _row(
    row: Row, wanted: Wanted, value: dict, renderer: Renderer | None, request: Request, *, weights: str | None
) -> Row:
    answers = tuple(
        Answer(
            text=cut(_text(one, wanted, renderer), request.sampling.stop),
            source=request.source,
            token_ids=_tuple(one["token_ids"]),
            finish_reason=one["finish_reason"],
            seed=one["seed"],
            logps=_tuple(one["logps"]),
            engine=value["engine"],
        )
        for one in value["answers"]
    )
    known = {} if weights is None else {"sampled_from": sampled_from(weights, wanted.prompt_ids)}
    return Row(id=row.id, prompt=row.prompt, answers=answers, meta={**row.meta, **known})


def _text(one: dict, wanted: Wanted, renderer: Renderer | None) -> str:
    """What the tokens say, whichever engine they are from; where there are none, what the engine said."""
    if renderer is None or one["token_ids"] is None:
        return one["text"]
    return renderer.answer_text(wanted.prompt_ids, one["token_ids"])


def _tuple(values: list | None) -> tuple | None:
    return None if values is None else tuple(values)


def cut(text: str, stops: Iterable[str]) -> str:
    """Text before the first stop string in it."""
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))]
