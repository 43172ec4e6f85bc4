"""K answers to each prompt of a table, from the row store where they are there already."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rankwise.checkpoints import Precision, device, load_causal_lm, load_tokenizer
from rankwise.fingerprint import digest, file_digest, tokenizer_digest, weights_digest
from rankwise.generation import Sampling, end_tokens, sample, seed_of
from rankwise.progress import Progress
from rankwise.rendering import Renderer
from rankwise.store import Store
from rankwise.types import Answer, Row


@dataclass(frozen=True, kw_only=True)
class Request:
    """What to sample, and from which model; together with a prompt it is the key of a row."""

    folder: Path  # the model
    sampling: Sampling
    k: int  # answers a prompt
    seed: int = 0
    round: int = 0
    max_prompt_tokens: int = 0  # a longer prompt loses its beginning; 0 is no limit
    precision: Precision = "fp32"
    source: str = "policy"  # who the answers are said to be from
    batch_sequences: int = 256  # answers decoded together; not part of the key


@dataclass(frozen=True, kw_only=True)
class Work:
    """What a call had to do."""

    computed: int  # prompts answered now
    tokens_per_second: float  # 0 when nothing was computed


def sample_rows(prompts: Sequence[Row], request: Request, store: Store) -> tuple[list[Row], Work]:
    """Rows with K unranked answers each, in the prompts' order; killed anywhere, a rerun asks for the rest only."""
    renderer = Renderer(load_tokenizer(request.folder), max_prompt_tokens=request.max_prompt_tokens)
    prompt_ids = [list(renderer.render(row, ()).prompt_ids) for row in prompts]
    seeds = [[seed_of(request.seed, row.id, request.round, n) for n in range(request.k)] for row in prompts]
    model = [weights_digest(request.folder), tokenizer_digest(request.folder)]
    # It may name further end tokens (generation.end_tokens).
    model += [file_digest(path) for path in Path(request.folder).glob("generation_config.json")]
    identity = [*model, request.sampling.identity(), request.precision]
    keys = [digest("rollout", identity, ids, mine) for ids, mine in zip(prompt_ids, seeds)]
    found = store.get_many(keys)
    missing = [i for i, key in enumerate(keys) if key not in found]
    work = Work(computed=len(missing), tokens_per_second=0.0)
    if missing:
        wanted = {keys[i]: (prompts[i].id, prompt_ids[i], seeds[i]) for i in missing}
        tokens_per_second = _fill(store, request, renderer, wanted)
        found = store.get_many(keys)
        work = Work(computed=len(missing), tokens_per_second=tokens_per_second)
    rows = [_row(row, ids, found[key], renderer, request) for row, ids, key in zip(prompts, prompt_ids, keys)]
    return rows, work


def _fill(
    store: Store, request: Request, renderer: Renderer, wanted: dict[str, tuple[str, list[int], list[int]]]
) -> float:
    """Sample what is wanted into the store; returns tokens a second."""
    model = load_causal_lm(request.folder).to(device())
    keys = list(wanted)
    names, prompts, seeds = zip(*wanted.values())
    fresh: dict[str, list[dict]] = {}
    began, tokens = time.monotonic(), 0
    with Progress(f"answers of {request.folder}", total=len(keys) * request.k, unit="answer") as progress:
        for index, sampled in sample(
            model,
            prompts,
            seeds,
            request.sampling,
            ends=end_tokens(model, renderer.tokenizer.eos_token_id),
            batch_sequences=request.batch_sequences,
            precision=request.precision,
            names=names,
        ):
            fresh[keys[index]] = [asdict(one) for one in sampled]
            tokens += sum(len(one.token_ids) for one in sampled)
            progress.advance(request.k, **{"tokens/s": tokens / (time.monotonic() - began)})
            if len(fresh) * request.k >= request.batch_sequences:
                store.put_many(fresh)
                fresh = {}
        store.put_many(fresh)
    return tokens / (time.monotonic() - began)


def _row(prompt: Row, prompt_ids: list[int], sampled: list[dict], renderer: Renderer, request: Request) -> Row:
    answers = tuple(
        Answer(
            text=renderer.answer_text(prompt_ids, one["token_ids"]),
            source=request.source,
            token_ids=tuple(one["token_ids"]),
            finish_reason=one["finish_reason"],
            seed=one["seed"],
            logp=one["logp"],
        )
        for one in sampled
    )
    return Row(id=prompt.id, prompt=prompt.prompt, answers=answers, meta=prompt.meta)
