"""The embedded engine: K sampled answers a prompt from any Hugging Face causal LM, plain torch, no server.

Each prompt is run once for its K answers, and an answer that ends makes room for another prompt's. Every answer draws
from a stream of its own, seeded by (seed, prompt id, round, k): the same answer comes out whatever the batch size, the
order, the number of processes or a restart in between, as long as the model's forward pass rounds alike. On a
CPU it does where the same answers are computed together. So there, where runs are compared bit for bit, prompts are
answered a part at a time, and a part that was broken off is answered again as a whole. A part's end, with few answers
under way, costs little on a CPU; a GPU would stand idle.
"""

from __future__ import annotations

import contextlib
import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import transformers
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.checkpoints import Precision, check_vocabulary, device, load_causal_lm, load_tokenizer, numerics
from rankwise.decoding import STEPS, Decoder, decoder_for
from rankwise.draws import draw
from rankwise.fingerprint import sampling_digests
from rankwise.rendering import Renderer
from rankwise.sampling import Sampled, Sampling, Wanted
from rankwise.scoring import rotary_limits
from rankwise.types import UserError

log = logging.getLogger(__name__)

BATCHES = 2  # of answers in a part, on a CPU
ENGINE = "embedded-2"  # raise the number when the same inputs would give other answers
Ended = Callable[[Sequence[int], Sequence[int]], bool]  # (prompt ids, answer ids) -> the answer's text holds a stop


class EmbeddedEngine:
    """rankwise.sampling.Engine over a model's folder, which is read at the first prompt.

    Args:
        batch_sequences: answers decoded together.
    """

    version = f"{ENGINE}, torch {torch.__version__}, transformers {transformers.__version__}"

    def __init__(
        self, folder: str | Path, sampling: Sampling, *, precision: Precision = "fp32", batch_sequences: int = 256
    ):
        self.folder, self.sampling = Path(folder), sampling
        self.precision, self.batch_sequences = precision, batch_sequences
        self.settled = True
        self._model: PreTrainedModel | None = None

    def identity(self) -> dict[str, Any]:
        return {
            "engine": ENGINE,
            "model": sampling_digests(self.folder),
            "sampling": self.sampling.identity(),
            "precision": self.precision,
        }

    def close(self) -> None:
        """Let the model go."""
        self._model = None

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, list[Sampled]]]:
        tokenizer = load_tokenizer(self.folder)
        if self._model is None:
            self._model = load_causal_lm(self.folder).to(device())
            check_vocabulary(self._model, tokenizer, where=self.folder)
        if special := sorted(set(self.sampling.stop) & set(tokenizer.all_special_tokens)):
            raise UserError(
                f"stop: {', '.join(special)}: special tokens are no part of an answer's text, so it would never hold "
                f"them; put their ids into stop_token_ids: {tokenizer.convert_tokens_to_ids(special)}"
            )
        part = _part([one.seeds for one in wanted], self.batch_sequences) if device().type == "cpu" else None
        answers = sample(
            self._model,
            [one.prompt_ids for one in wanted],
            [one.seeds for one in wanted],
            self.sampling,
            ends=end_tokens(self._model, tokenizer.eos_token_id),
            batch_sequences=self.batch_sequences,
            precision=self.precision,
            names=[one.name for one in wanted],
            ended=text_stops(Renderer(tokenizer), self.sampling.stop) if self.sampling.stop else None,
            part=part,
        )
        for count, answer in enumerate(answers, 1):
            self.settled = part is None or count % part == 0 or count == len(wanted)
            yield answer


def _part(seeds: Sequence[Sequence[int]], batch_sequences: int) -> int:
    """Prompts of a part: a few batches of answers."""
    return max(1, BATCHES * batch_sequences // max(map(len, seeds), default=1))


def end_tokens(model: PreTrainedModel, eos_token_id: int) -> tuple[int, ...]:
    """Token ids that end an answer: the tokenizer's EOS and whatever the model's generation_config adds."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    extra = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return tuple(sorted({eos_token_id, *extra}))


def text_stops(renderer: Renderer, stops: Sequence[str]) -> Ended:
    """Whether the text of an answer holds one of stops, looked for in its last tokens only."""
    reach = 4 * max(map(len, stops)) + 1  # tokens: a character is up to four bytes, a token at least one

    def ended(prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> bool:
        before = [*prompt_ids[-8:], *answer_ids[:-reach]][-8:]
        text = renderer.answer_text(before, answer_ids[-reach:])
        return any(stop in text for stop in stops)

    return ended


def sample(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    seeds: Sequence[Sequence[int]],
    sampling: Sampling,
    *,
    ends: tuple[int, ...],
    batch_sequences: int = 256,
    precision: Precision = "fp32",
    names: Sequence[str] | None = None,
    ended: Ended | None = None,
    part: int | None = None,
) -> Iterator[tuple[int, list[Sampled]]]:
    """Yield (index of the prompt, its K answers), each when its last answer ends; shortest prompts are begun first.

    Args:
        prompts: token ids of each prompt, at least one token.
        seeds: K seeds a prompt.
        ends: token ids that end an answer, besides the sampling's own.
        batch_sequences: answers decoded together.
        names: what messages call the prompts; their numbers, where there are none.
        ended: asked after every token whether the answer's text ends it.
        part: so many prompts are answered before others are begun; None: as many as there are.

    Raises UserError before anything is answered where prompts leave no room in the model's context, and where logits
    are no numbers.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    _check_room(model, prompts, names or [str(number) for number in range(len(prompts))], limit, sampling)
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    if not prompts:
        return
    model.eval()
    make, before = decoder_for(model), model.config._attn_implementation
    if not make.refills:
        log.warning("%s: every answer keeps a copy of its prompt, prompts wait in line", type(model).__name__)
    stops = torch.tensor(sorted({*ends, *sampling.stop_token_ids}), device=model.device)
    words = model.get_output_embeddings().weight.shape[0]
    with torch.inference_mode(), numerics(precision, model.device), _cast_once(model, precision):
        try:
            for first in range(0, len(order), part or len(order)):
                run = _Run(make(model), prompts, seeds, sampling, stops, limit, ended, words)
                yield from run.answers(order[first:][:part], max(*map(len, seeds), batch_sequences))
        finally:
            model.config._attn_implementation = before


def _check_room(
    model: PreTrainedModel,
    prompts: Sequence[Sequence[int]],
    names: Sequence[str],
    limit: int | None,
    sampling: Sampling,
) -> None:
    several = lambda numbers: ", ".join(f"{names[n]} ({len(prompts[n])})" for n in numbers[:10])
    told = lambda numbers: f"{several(numbers)}; {len(numbers)} in all"
    if empty := [n for n, prompt in enumerate(prompts) if not prompt]:
        raise UserError(
            f"prompts of no token cannot be answered: {told(empty)}; the tokenizer has no BOS to begin with: drop them "
            "in the prompts stage"
        )
    if long := [n for n, prompt in enumerate(prompts) if limit and len(prompt) >= limit]:
        raise UserError(
            f"prompts that cannot be answered by a model with a context of {limit} tokens: {told(long)}; shorten them "
            "(max_prompt_tokens) or drop them in the prompts stage"
        )
    for kind, most in rotary_limits(model):
        if long := [n for n, prompt in enumerate(prompts) if len(prompt) + sampling.max_new_tokens > most]:
            raise UserError(
                f"{type(model).__name__}: prompts that with max_new_tokens = {sampling.max_new_tokens} pass {most} "
                f"positions: {told(long)}. There its rotary table ({kind}) changes for a whole batch, so answers would "
                "depend on their neighbours; shorten them (max_prompt_tokens, max_new_tokens) or use engine: server"
            )


@contextlib.contextmanager
def _cast_once(model: nn.Module, precision: Precision) -> Iterator[None]:
    """With bf16, linear layers' weights are cast for the block, as autocast would cast them at every step."""
    linear = [m for m in model.modules() if isinstance(m, (nn.Linear, Conv1D)) and m.weight.dtype == torch.float32]
    before = [module.weight for module in linear] if precision == "bf16" else []
    for module, weight in zip(linear, before):
        module.weight = nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
    try:
        yield
    finally:
        for module, weight in zip(linear, before):
            module.weight = weight


class _Rows(NamedTuple):
    """Answers on their way, one a row."""

    prompt_S: Tensor  # int64: the prompt's number
    k_S: Tensor  # int64: which of its answers
    open_S: Tensor  # bool: not ended yet
    token_S: Tensor  # int64: what the model reads next
    position_S: Tensor  # int64: where that stands in its sequence
    made_S: Tensor  # int64: tokens of the answer so far
    room_S: Tensor  # int64: tokens of the answer at most
    uniform_ST: Tensor  # float64: one number a draw
    history_ST: Tensor  # int64: the answer
    logps_ST: Tensor  # float32
    seen_SV: Tensor  # bool: words of the prompt and the answer, where the repetition penalty asks; else [S, 0]

    def select(self, rows: Tensor) -> _Rows:
        return _Rows(*(x[rows] for x in self))

    def joined(self, parts: Sequence[_Rows]) -> _Rows:
        return _Rows(*map(torch.cat, zip(self, *parts)))


class _Run:
    """Prompts on their way through the rows of a decoder."""

    def __init__(
        self,
        decoder: Decoder,
        prompts: Sequence[Sequence[int]],
        seeds: Sequence[Sequence[int]],
        sampling: Sampling,
        stops: Tensor,
        limit: int | None,
        ended: Ended | None,
        vocabulary: int,
    ):
        self.decoder, self.prompts, self.seeds, self.sampling = decoder, prompts, seeds, sampling
        self.stops, self.limit, self.ended = stops, limit, ended
        self.penalised = vocabulary if sampling.repetition_penalty != 1 else 0  # words to remember
        self.rows = self._seated(0, [])
        self.done: dict[int, dict[int, Sampled]] = {}

    def answers(self, order: Sequence[int], most: int) -> Iterator[tuple[int, list[Sampled]]]:
        waiting = deque(order)
        while waiting or bool(self.rows.open_S.any()):
            self._arrange(waiting, most)
            for _ in range(STEPS):
                rows = self.rows
                logits_SV = self.decoder.step(rows.token_S, rows.position_S)
                yield from self._finished(self._advance(logits_SV))
                if not bool(self.rows.open_S.any()):
                    break

    def _arrange(self, waiting: deque[int], most: int) -> None:
        """Let answers that ended go and prompts come, as many as there is room for; longest answers first."""
        keep = self.rows.open_S.nonzero()[:, 0]
        keep = keep[self.rows.made_S[keep].argsort(descending=True, stable=True)]
        came: list[int] = []
        free = most - len(keep) if self.decoder.refills or not len(keep) else 0
        while waiting and len(self.seeds[waiting[0]]) <= free:
            came.append(waiting.popleft())
            free -= len(self.seeds[came[-1]])
        self.decoder.arrange(keep, [self.prompts[i] for i in came], [len(self.seeds[i]) for i in came])
        self.rows = self.rows.select(keep).joined([self._seated(i, self.seeds[i]) for i in came])

    def _seated(self, prompt: int, seeds: Sequence[int]) -> _Rows:
        """Rows of a prompt's answers, before their first token."""
        ids, most, where, count = self.prompts[prompt], self.sampling.max_new_tokens, self.stops.device, len(seeds)
        # The context may be shorter than prompt + answer: then the answer is cut there, as by any length limit.
        room = min(most, self.limit - len(ids)) if self.limit else most
        full = lambda value, *shape: torch.full((count, *shape), value, device=where)
        streams = [np.random.Generator(np.random.Philox(key=seed)).random(most) for seed in seeds]
        seen_SV = full(False, self.penalised)
        if self.penalised:
            seen_SV[:, list(ids)] = True
        return _Rows(
            prompt_S=full(prompt),
            k_S=torch.arange(count, device=where),
            open_S=full(True),
            token_S=full(ids[-1]),
            position_S=full(len(ids) - 1),
            made_S=full(0),
            room_S=full(room),
            uniform_ST=torch.from_numpy(np.array(streams).reshape(count, most)).to(where),
            history_ST=full(0, most),
            logps_ST=full(0.0, most),
            seen_SV=seen_SV,
        )

    def _advance(self, logits_SV: Tensor) -> list[int]:
        """Draw a token a row and note it; the rows whose answers it ended."""
        rows = self.rows
        # An ended row is drawn for again, at its end, until it leaves; what it said has been taken.
        last = self.sampling.max_new_tokens - 1
        at = (torch.arange(len(rows.open_S), device=rows.open_S.device), rows.made_S.clamp(max=last))
        token_S, logp_S = draw(logits_SV, rows.uniform_ST[at], self.sampling, rows.seen_SV if self.penalised else None)
        rows.history_ST[at], rows.logps_ST[at] = token_S, logp_S
        if self.penalised:
            rows.seen_SV[at[0], token_S] = True
        over_S = torch.isin(token_S, self.stops) | (rows.made_S + 1 >= rows.room_S)
        go_S = (rows.open_S & ~over_S).long()
        made_S, ended = rows.made_S + rows.open_S, (rows.open_S & over_S).nonzero()[:, 0].tolist()
        self.rows = rows._replace(token_S=token_S, made_S=made_S, position_S=rows.position_S + go_S)
        if self.ended:
            still = go_S.nonzero()[:, 0].tolist()
            ended += [n for n in still if self.ended(self.prompts[int(rows.prompt_S[n])], self._ids(n))]
        return ended

    def _ids(self, row: int) -> list[int]:
        return self.rows.history_ST[row, : self.rows.made_S[row]].tolist()

    def _finished(self, ended: Sequence[int]) -> Iterator[tuple[int, list[Sampled]]]:
        """Close rows; the prompts of which that was the last answer."""
        for row in ended:
            prompt, k, ids = int(self.rows.prompt_S[row]), int(self.rows.k_S[row]), self._ids(row)
            stopped = ids[-1] in self.stops or (self.ended is not None and self.ended(self.prompts[prompt], ids))
            mine = self.done.setdefault(prompt, {})
            mine[k] = Sampled(
                token_ids=tuple(ids),
                finish_reason="stop" if stopped else "length",
                seed=self.seeds[prompt][k],
                logps=tuple(self.rows.logps_ST[row, : len(ids)].tolist()),
            )
            self.rows.open_S[row] = False
            if len(mine) == len(self.seeds[prompt]):
                del self.done[prompt]
                yield prompt, [mine[k] for k in sorted(mine)]
