"""The embedded engine: K sampled answers a prompt from any Hugging Face causal LM, plain torch, no server.

Each prompt is run once and its cache is shared out to its K answers. Answers that end leave the batch. Every answer
draws from a stream of its own, seeded by (seed, prompt id, round, k): the same answer comes out whatever the batch
size, the order, or a restart in between, as long as the numerics of the model's forward pass are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from rankwise.checkpoints import Precision, numerics
from rankwise.types import UserError

ENGINE = "embedded-1"  # raise the number when the same inputs would give other answers


@dataclass(frozen=True, kw_only=True)
class Sampling:
    """How answers are drawn."""

    max_new_tokens: int  # longest answer, tokens, its end token included
    temperature: float = 1.0  # 0 is greedy
    top_p: float = 1.0  # smallest set of tokens whose probability reaches this
    top_k: int = 0  # this many likeliest tokens; 0 is all

    def identity(self) -> dict:
        return {"engine": ENGINE, **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class Sampled:
    """One sampled answer."""

    token_ids: tuple[int, ...]  # the end token included, if it came
    finish_reason: str  # "stop" | "length"
    seed: int
    logp: float  # Σ log π(token) at temperature 1 over the whole vocabulary, nats


def seed_of(seed: int, prompt_id: str, round_: int, k: int) -> int:
    """The seed of answer k to a prompt in a round: 63 bits, a function of nothing else."""
    text = f"{seed}/{prompt_id}/{round_}/{k}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1


def end_tokens(model: PreTrainedModel, eos_token_id: int) -> tuple[int, ...]:
    """Token ids that end an answer: the tokenizer's EOS and whatever the model's generation_config adds."""
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    extra = configured if isinstance(configured, list) else [configured] if configured is not None else []
    return tuple(sorted({eos_token_id, *extra}))


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
) -> Iterator[tuple[int, list[Sampled]]]:
    """Yield (index of the prompt, its K answers) as batches finish, shortest prompts first.

    Args:
        prompts: token ids of each prompt, at least one token.
        seeds: K seeds a prompt, from seed_of.
        ends: token ids that end an answer.
        batch_sequences: answers decoded together.
        names: what messages call the prompts; their numbers, where there are none.

    Raises UserError where a prompt leaves no room in the model's context.
    """
    limit = getattr(model.config, "max_position_embeddings", None)
    for number, prompt in enumerate(prompts):
        if not prompt or (limit and len(prompt) >= limit):
            raise UserError(
                f"prompt {names[number] if names else number} of {len(prompt)} tokens cannot be answered by a model "
                f"with a context of {limit} tokens; shorten it (max_prompt_tokens) or drop it in the prompts stage"
            )
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    answers = max((len(s) for s in seeds), default=1)
    size = max(1, batch_sequences // answers)
    model.eval()
    with torch.inference_mode(), numerics(precision, model.device):
        for start in range(0, len(order), size):
            part = order[start : start + size]
            done = _Decoder(model, [prompts[i] for i in part], [seeds[i] for i in part], sampling, ends, limit).run()
            yield from zip(part, done)


class _Decoder:
    """One batch of prompts on its way: S sequences still open, of S0 = prompts × K in all."""

    def __init__(self, model, prompts, seeds, sampling: Sampling, ends: tuple[int, ...], limit: int | None):
        self.model, self.prompts, self.sampling = model, prompts, sampling
        self.k = [len(s) for s in seeds]
        self.seeds = [seed for s in seeds for seed in s]
        # The context may be shorter than prompt + answer: then the answer is cut there, as by any length limit.
        most = sampling.max_new_tokens
        rooms = [min(most, limit - len(p)) if limit else most for p in prompts]
        self.rooms = [room for room, k in zip(rooms, self.k) for _ in range(k)]
        self.steps = max(self.rooms)
        self.ends = torch.tensor(ends, device=model.device)
        uniform = [
            np.random.Generator(np.random.Philox(key=s)).random(self.steps, dtype=np.float32) for s in self.seeds
        ]
        self.uniform = torch.from_numpy(np.stack(uniform)).to(model.device)
        self.tokens: list[list[int]] = [[] for _ in self.seeds]
        self.logps = [0.0] * len(self.seeds)
        self.reasons = ["length"] * len(self.seeds)
        self.closed = [False] * len(self.seeds)

    def run(self) -> list[list[Sampled]]:
        logits, cache, mask, position = self._prefill()
        open_ = torch.arange(len(self.seeds), device=logits.device)
        for step in range(self.steps):
            token_S, logp_S = _draw(logits, self.uniform[open_, step], self.sampling)
            rows = open_.tolist()
            self._note(rows, token_S.tolist(), logp_S.tolist(), torch.isin(token_S, self.ends).tolist())
            ended_S = torch.tensor([self.closed[row] for row in rows], device=logits.device)
            if bool(ended_S.all()):
                break
            # Rows that ended are dropped once they are an eighth of the batch: dropping copies the cache.
            if int(ended_S.sum()) * 8 >= len(open_) or (bool(ended_S.any()) and len(open_) <= 32):
                keep = (~ended_S).nonzero().squeeze(1)
                cache.batch_select_indices(keep)
                open_, token_S, mask, position = open_[keep], token_S[keep], mask[keep], position[keep]
            mask = torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1)
            output = self.model(
                input_ids=token_S[:, None],
                attention_mask=mask,
                position_ids=position[:, None],
                past_key_values=cache,
                use_cache=True,
            )
            logits, position = output.logits[:, -1].float(), position + 1
        return self._answers()

    def _prefill(self):
        """Run every prompt once, padded on the left; give each of its K answers a copy of the cache."""
        device, longest = self.model.device, max(map(len, self.prompts))
        ids = torch.tensor([[0] * (longest - len(p)) + list(p) for p in self.prompts], device=device)
        mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in self.prompts], device=device)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        output = self.model(
            input_ids=ids, attention_mask=mask, position_ids=position_ids, use_cache=True, logits_to_keep=1
        )
        owner = torch.tensor([i for i, k in enumerate(self.k) for _ in range(k)], device=device)
        cache = output.past_key_values
        cache.batch_select_indices(owner)
        return output.logits[:, -1].float()[owner], cache, mask[owner], mask[owner].sum(1)

    def _note(self, rows: list[int], tokens: list[int], logps: list[float], ended: list[bool]) -> None:
        for row, token, logp, end in zip(rows, tokens, logps, ended):
            if self.closed[row]:
                continue  # ended earlier, still in the batch until the next drop
            self.tokens[row].append(token)
            self.logps[row] += logp
            if end:
                self.reasons[row] = "stop"
            self.closed[row] = end or len(self.tokens[row]) == self.rooms[row]

    def _answers(self) -> list[list[Sampled]]:
        flat = [
            Sampled(token_ids=tuple(self.tokens[i]), finish_reason=self.reasons[i], seed=seed, logp=self.logps[i])
            for i, seed in enumerate(self.seeds)
        ]
        out, start = [], 0
        for k in self.k:
            out.append(flat[start : start + k])
            start += k
        return out


def _draw(logits_SV: Tensor, uniform_S: Tensor, sampling: Sampling) -> tuple[Tensor, Tensor]:
    """A token for each sequence and its log-probability at temperature 1.

    Sampling inverts the cumulative distribution at one uniform number, so a sequence's draws depend on its own
    stream alone.
    """
    logps_SV = logits_SV.log_softmax(-1)
    if sampling.temperature == 0:
        token_S = logps_SV.argmax(-1)
    else:
        token_S = _invert(_filtered(logits_SV / sampling.temperature, sampling), uniform_S)
    return token_S, logps_SV.gather(1, token_S[:, None]).squeeze(1)


def _filtered(logits_SV: Tensor, sampling: Sampling) -> Tensor:
    """Probabilities after top-k, then top-p, renormalised."""
    if 0 < sampling.top_k < logits_SV.shape[1]:
        least_S1 = logits_SV.topk(sampling.top_k, dim=-1).values[:, -1:]
        logits_SV = logits_SV.masked_fill(logits_SV < least_S1, -torch.inf)
    probs_SV = logits_SV.softmax(-1)
    if sampling.top_p < 1:
        sorted_SV, order_SV = probs_SV.sort(dim=-1, descending=True)
        # A token stays when what comes before it has not reached top_p yet, so the likeliest always stays.
        drop_SV = sorted_SV.cumsum(-1) - sorted_SV >= sampling.top_p
        probs_SV = probs_SV.masked_fill(drop_SV.scatter(1, order_SV, drop_SV), 0.0)
    return probs_SV


def _invert(probs_SV: Tensor, uniform_S: Tensor) -> Tensor:
    cumulative_SV = probs_SV.double().cumsum(-1)
    target_S1 = uniform_S.double()[:, None] * cumulative_SV[:, -1:]
    return torch.searchsorted(cumulative_SV, target_S1, right=True).squeeze(1).clamp(max=probs_SV.shape[1] - 1)
