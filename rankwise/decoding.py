"""A causal LM's next-token logits for many answers at once, each prompt computed and kept once for all its answers.

Keys and values of a prompt lie in one place, and the queries of its answers that are still open meet them together;
an answer's own lie in its row. Answers that ended leave, and other prompts' come in their place. This is attention over
prompt trees again (rankwise.attention), a position at a time. Models that cannot be read this way keep the library's
cache, with a copy of the prompt for every answer, and take new prompts when all answers are done.

Letters: S rows, G prompts in flight, K rows a prompt, P positions of a prompt, T of an answer, H heads of keys,
R heads of queries a head of keys, D head size, V vocabulary.
"""

from __future__ import annotations

import inspect
import itertools
import logging
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import AttentionInterface, AttentionMaskInterface, DynamicCache, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from rankwise.attention import joined
from rankwise.draws import NOT_FINITE
from rankwise.types import UserError

log = logging.getLogger(__name__)

NAME = "rankwise_shared_prompts"
STEPS = 16  # at most, between two arrangements
PREFILL_POSITIONS = 8192  # of prompts run together
PARTS = 4  # of sequences, by length: what is read of each is as wide as the longest of its part
PLACES = (3, 2)  # the dimension of positions, in keys and in values
LOW = -1e30  # the score of nothing to look at: finite, so that a part without a weight is a zero


class Decoder(Protocol):
    """What generation asks of a model. A row holds one answer; the first token it reads is its prompt's last."""

    refills: bool  # whether prompts can come while answers are under way

    def arrange(self, keep: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
        """Go on with the rows `keep`, in that order, longest answer first; behind them come rows of new prompts.

        Args:
            prompts: token ids; all but the last are run here, once a prompt.
            answers: rows of each.
        """
        ...

    def step(self, token_S: Tensor, position_S: Tensor) -> Tensor:
        """Logits [S, V] after one more token a row, at the given position of its sequence; STEPS times at most."""
        ...


class Memory:
    """Keys and values of N sequences, the longest first, in parts of like length, each as wide as its longest.

    Args:
        growth: places that every part has beyond its longest sequence.
    """

    def __init__(self, where: torch.device, *, growth: int):
        self.growth = growth
        self.length_N = torch.zeros(0, dtype=torch.int64, device=where)  # positions of each
        self.parts: list[tuple[slice, int]] = []  # which sequences, and how wide
        # layer -> keys [n, H, D, P] (so a product reads them as they lie) and values [n, H, P, D] of each part
        self.layers: dict[int, list[list[Tensor]]] = {}

    def rebuild(self, order: Tensor, length_N: Tensor, fresh: Sequence[dict[int, list[Tensor]]] = ()) -> None:
        """Lay sequences out anew: `order` counts those that are here, then those of `fresh`, then any number of empty
        ones; length_N are their lengths in that order, falling."""
        here = [part for part, _ in self.parts]
        bounds = torch.linspace(0, len(order), PARTS + 1).long().tolist()
        self.parts = [(slice(a, b), max(1, int(length_N[a]))) for a, b in itertools.pairwise(bounds) if a < b]
        self.length_N = length_N
        for layer in {*self.layers, *(layer for one in fresh for layer in one)}:
            held = self.layers.get(layer, [])
            given = [*zip([part.start for part in here], held)]
            start = here[-1].stop if here else 0
            for one in fresh:
                given.append((start, one[layer]))
                start += len(one[layer][0])
            self.layers[layer] = [_gathered(order[part], width, self.growth, given) for part, width in self.parts]

    def grow(self) -> None:
        """One more position a sequence."""
        self.length_N = self.length_N + 1
        self.parts = [(part, width + 1) for part, width in self.parts]

    def note(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the last position's keys and values [N, H, 1, D] where they belong."""
        new = _kept(key, value)
        if layer not in self.layers:
            self.layers[layer] = [
                _room(*new, part.stop - part.start, width + self.growth) for part, width in self.parts
            ]
        for (part, _), (keys, values) in zip(self.parts, self.layers[layer]):
            every, at = torch.arange(len(keys), device=keys.device), self.length_N[part] - 1
            keys[every, :, :, at] = new[0][part, :, :, 0]
            values[every, :, at] = new[1][part, :, 0]

    def biases(self, first_NM: Tensor | None) -> list[Tensor]:
        """[n, 1, M or 1, P] of each part, added to scores: 0 from place first to a sequence's end, −∞ elsewhere."""
        found = []
        for part, width in self.parts:
            place_P = torch.arange(width, device=self.length_N.device)
            seen = place_P < self.length_N[part, None, None]
            if first_NM is not None:
                seen = seen & (place_P >= first_NM[part, :, None])
            found.append(torch.zeros(seen.shape, device=seen.device).masked_fill(~seen, -torch.inf)[:, None])
        return found

    def look(self, layer: int, query: Tensor, biases: Sequence[Tensor], cap: float | None) -> tuple[Tensor, Tensor]:
        """Attention of queries [N, H, M, D] to what is held: output, and log-sum-exp of the scores [N, H, M]."""
        outs, lses = [], []
        for (part, width), bias, (keys, values) in zip(self.parts, biases, self.layers[layer]):
            scores = (query[part] @ keys[..., :width]).float()
            scores = (torch.tanh(scores / cap) * cap if cap else scores) + bias
            top = scores.amax(-1, keepdim=True).clamp(min=LOW)
            weights = (scores - top).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=1 / -LOW)
            outs.append(weights.to(values.dtype) @ values[:, :, :width] / total)
            lses.append((top + total.log())[..., 0])
        return torch.cat(outs), torch.cat(lses)


def _gathered(order: Tensor, width: int, growth: int, given: Sequence[tuple[int, list[Tensor]]]) -> list[Tensor]:
    """Keys and values of the sequences `order` of what is given, each with the number of its first one."""
    keys, values = given[0][1]
    made = _room(keys, values, len(order), width + growth)
    for start, pair in given:
        to = ((order >= start) & (order < start + len(pair[0]))).nonzero()[:, 0]
        if len(to):
            for old, new, places in zip(pair, made, PLACES):
                common = min(old.shape[places], new.shape[places])
                new.narrow(places, 0, common)[to] = old.narrow(places, 0, common)[order[to] - start]
    return made


def _room(keys: Tensor, values: Tensor, count: int, positions: int) -> list[Tensor]:
    """Zeros for sequences such as [n, H, D, P] and [n, H, P, D]: what no one looks at must be finite all the same."""
    return [
        keys.new_zeros(count, *keys.shape[1:3], positions),
        values.new_zeros(count, values.shape[1], positions, values.shape[3]),
    ]


class SharedPrompts:
    """Prompts once, answers beside them."""

    refills = True

    def __init__(self, model: PreTrainedModel):
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
        self.model = model
        self.anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # a 4-D mask is let through
        self.prompts, self.own = Memory(model.device, growth=0), Memory(model.device, growth=STEPS)
        self.prompt_S = torch.zeros(0, dtype=torch.int64, device=model.device)  # which of prompts is a row's
        self.fresh: dict[int, list[Tensor]] | None = None  # while prompts are run: their keys and values

    def arrange(self, keep: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
        still, owner = torch.unique(self.prompt_S[keep], return_inverse=True)
        count = torch.tensor(answers, dtype=torch.int64, device=keep.device)
        numbers = torch.arange(len(prompts), device=keep.device) + len(still)
        owner = torch.cat([owner, numbers.repeat_interleave(count)])
        if prompts or len(still) < len(self.prompts.length_N):
            owner = self._change_prompts(still, [list(p[:-1]) for p in prompts])[owner]
        self.prompt_S = owner
        came = torch.arange(len(owner) - len(keep), device=keep.device) + len(self.own.length_N)
        self.own.rebuild(torch.cat([keep, came]), pad(self.own.length_N[keep], (0, len(came))))
        self._seat()

    def _change_prompts(self, still: Tensor, prompts: list[list[int]]) -> Tensor:
        """Keep these, run those behind them; where each of all these stands now."""
        longest = max(map(len, prompts), default=0)
        size = max(1, PREFILL_POSITIONS // max(1, longest))
        fresh = [self._run(prompts[first : first + size]) for first in range(0, len(prompts), size)]
        here, more = len(self.prompts.length_N), torch.tensor([len(p) for p in prompts], dtype=torch.int64)
        length_N = torch.cat([self.prompts.length_N[still], more.to(still.device)])
        order = length_N.argsort(descending=True, stable=True)
        came = torch.arange(len(prompts), device=still.device) + here
        self.prompts.rebuild(torch.cat([still, came])[order], length_N[order], fresh)
        return order.argsort()

    def _run(self, prompts: list[list[int]]) -> dict[int, list[Tensor]]:
        """Keys and values of prompts by layer; padding stands behind a prompt, where causal attention does not look."""
        longest = max(1, *map(len, prompts))
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=self.model.device)
        position_ids = torch.arange(longest, device=ids.device).expand_as(ids)
        self.fresh = {}
        self.model(input_ids=ids, position_ids=position_ids, use_cache=False, logits_to_keep=1, slots=self)
        fresh, self.fresh = self.fresh, None
        return fresh

    def _seat(self) -> None:
        """Lay rows out in a grid of prompts: grid_GK names the row of a cell, cell_S the cell of a row."""
        rows = self.prompt_S.argsort(stable=True)
        owner = self.prompt_S[rows]
        count_G = torch.bincount(owner, minlength=len(self.prompts.length_N))
        widest = int(count_G.max())
        seat = torch.arange(len(rows), device=rows.device) - (count_G.cumsum(0) - count_G)[owner]
        # Empty cells ask what row 0 asks, and nobody reads it.
        self.grid_GK = torch.zeros(len(count_G), widest, dtype=torch.int64, device=rows.device)
        self.grid_GK[owner, seat] = rows
        self.cell_S = torch.empty_like(rows).index_put((rows,), owner * widest + seat)

    def step(self, token_S: Tensor, position_S: Tensor) -> Tensor:
        self.own.grow()
        self.biases: dict[int | None, tuple[list[Tensor], list[Tensor]]] = {}
        output = self.model(
            input_ids=token_S[:, None],
            position_ids=position_S[:, None],
            attention_mask=self.anything,
            use_cache=False,
            slots=self,
        )
        return output.logits[:, -1]

    def attend(self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, **options: Any) -> Tensor:
        """One new position a row: [S, H·R, 1, D] in, [S, 1, H·R, D] out; two sets of keys joined by log-sum-exp."""
        self.own.note(layer, key, value)
        heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        query_SHRD = query.view(len(query), heads, repeats, -1).to(_stored(query)) * scale
        to_prompt, to_own = self._biases(options.get("sliding_window"), repeats)
        cap = options.get("softcap")
        grid = query_SHRD[self.grid_GK].transpose(1, 2).flatten(2, 3)  # [G, H, K·R, D]
        out, lse = (self._by_row(x, repeats) for x in self.prompts.look(layer, grid, to_prompt, cap))
        mixed, _ = joined(out, lse, *self.own.look(layer, query_SHRD, to_own, cap))
        return mixed.view(len(query), 1, heads * repeats, -1)

    def _by_row(self, grid: Tensor, repeats: int) -> Tensor:
        """[G, H, K·R, …] of cells as [S, H, R, …] of rows."""
        return grid.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)[self.cell_S]

    def _biases(self, window: int | None, repeats: int) -> tuple[list[Tensor], list[Tensor]]:
        """For prompts and for answers' own; a window ends at the position that is being computed."""
        if window not in self.biases:
            first_S = self.own.length_N - window if window else None
            own_S1 = None if first_S is None else first_S[:, None]
            if first_S is not None:
                first_S = (first_S + self.prompts.length_N[self.prompt_S])[self.grid_GK].repeat_interleave(repeats, 1)
            self.biases[window] = (self.prompts.biases(first_S), self.own.biases(own_S1))
        return self.biases[window]


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    slots: SharedPrompts | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface; a call without slots is ordinary scaled-dot-product attention."""
    if slots is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if unknown or options.get("is_causal") is False:
        raise NotImplementedError(f"attention over shared prompts has no {', '.join(unknown) or 'two-sided form'}")
    if _hides_by_mask(module) and not options.get("sliding_window"):
        raise NotImplementedError("attention over shared prompts is not told how far this layer looks back")
    scale = options.pop("scaling", None) or query.shape[-1] ** -0.5
    if slots.fresh is None:
        with torch.autocast(query.device.type, enabled=False):  # or it would cast all that is kept, at every step
            out = slots.attend(module.layer_idx, query, key, value, scale, **options)
        return out.to(query.dtype), None
    slots.fresh[module.layer_idx] = _kept(key, value)
    if options.get("softcap"):
        return _capped(query, key, value, attention_mask, scale, options["softcap"]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **options)


def _hides_by_mask(module: nn.Module) -> bool:
    """Whether a layer sees a part of the past only: some architectures say so in their mask and nowhere else."""
    config = module.config
    kinds = set(getattr(config, "layer_types", None) or ["full_attention"])
    if kinds != {"full_attention"}:
        return config.layer_types[module.layer_idx] != "full_attention"
    return bool(getattr(config, "sliding_window", None)) and getattr(config, "use_sliding_window", True) is not False


def _capped(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float, cap: float) -> Tensor:
    """Causal attention whose scores are bounded, which the library's kernel leaves out; [B, L, H·R, D]."""
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, 1) for x in (key, value))
    scores = torch.tanh((query * scale @ key.transpose(2, 3)).float() / cap) * cap
    if mask is None:
        mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    return (scores.masked_fill(~mask, -torch.inf).softmax(-1).to(value.dtype) @ value).transpose(1, 2)


def _stored(x: Tensor) -> torch.dtype:
    """What keys and values are kept in: a CPU multiplies many small matrices faster in float32."""
    return torch.float32 if x.device.type == "cpu" else x.dtype


def _kept(key: Tensor, value: Tensor) -> list[Tensor]:
    """Keys [N, H, P, D] as [N, H, D, P], values as they are, in the dtype that they are kept in."""
    return [key.transpose(2, 3).contiguous().to(_stored(key)), value.to(_stored(value))]


class LibraryCache:
    """The library's own cache, every row with a copy of its prompt; prompts come when all answers are done."""

    refills = False

    def __init__(self, model: PreTrainedModel):
        self.model = model
        # State-space models have another name for it, and take a mask with their prompts alone.
        self.recurrent = "cache_params" in inspect.signature(model.forward).parameters
        self.name = "cache_params" if self.recurrent else "past_key_values"

    def arrange(self, keep: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
        if not prompts:
            self.mask = self.mask[keep]
            self.cache.reorder_cache(keep)
            return
        # Two places at least: state-space models heed a mask from there on.
        longest, where = max(2, max(map(len, prompts)) - 1), self.model.device
        real = torch.tensor([[0] * (longest + 1 - len(p)) + [1] * (len(p) - 1) for p in prompts], device=where)
        owner_S = torch.arange(len(prompts), device=where).repeat_interleave(torch.tensor(answers, device=where))
        self.mask, self.cache = real[owner_S], DynamicCache(config=self.model.config)
        ids = torch.tensor([[0] * (longest + 1 - len(p)) + list(p[:-1]) for p in prompts], device=where)
        self._forward(ids, real, (real.cumsum(1) - 1).clamp(min=0))
        self.cache.reorder_cache(owner_S)

    def step(self, token_S: Tensor, position_S: Tensor) -> Tensor:
        self.mask = torch.cat([self.mask, self.mask.new_ones(len(self.mask), 1)], dim=1)
        return self._forward(token_S[:, None], None if self.recurrent else self.mask, position_S[:, None])

    def _forward(self, ids: Tensor, mask: Tensor | None, position_ids: Tensor) -> Tensor:
        output = self.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=position_ids,
            use_cache=True,
            logits_to_keep=1,
            **{self.name: self.cache},
        )
        return output.logits[:, -1]


@torch.no_grad()
def decoder_for(model: PreTrainedModel) -> type[SharedPrompts | LibraryCache]:
    """The first decoder that gives the model's own logits, asked by a small batch; raises UserError where none does."""
    text = model.config.get_text_config()
    if not bool(_alone(model, [1], model.config._attn_implementation).isfinite().all()):
        raise UserError(NOT_FINITE)
    if not getattr(text, "attention_chunk_size", None):  # longer than any probe, and wrong beyond it
        for decoder in (SharedPrompts, LibraryCache):
            if _agrees(model, decoder):
                return decoder
    raise UserError(
        f"{type(model).__name__}: decoded with a cache, its logits are not those of the model itself, so answers would "
        "come from another distribution; use engine: server, with a server that knows this architecture (vLLM)"
    )


def _agrees(model: PreTrainedModel, make: type[SharedPrompts | LibraryCache]) -> bool:
    """Answers under way while others leave and prompts come; then a prompt of one token beside a longer one."""
    before = model.config._attn_implementation
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(n * 7919 % max(vocabulary - 1, 1) + 1) % vocabulary for n in range(1, 60)]
    first, second, pair, single = ids[:6], ids[6:9], ids[9:11], ids[11:12]
    tails = iter([ids[at : at + 4] for at in range(12, 52, 4)])
    plan = [
        ([], [first, second], [2, 1]),
        ([1, 0], [single] if make.refills else [], [1]),
        ([], [pair, single], [1, 1]),
    ]
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=model.device)
    rows: list[tuple[list[int], Tensor]] = []  # a prompt with an answer, and its logits in one go
    places: list[int] = []  # of what each reads next
    try:
        decoder = make(model)
        for keep, prompts, answers in plan:
            decoder.arrange(tensor(keep), prompts, answers[: len(prompts)])
            rows, places = [rows[n] for n in keep], [places[n] for n in keep]
            for prompt, count in zip(prompts, answers):
                for path in [[*prompt, *next(tails)] for _ in range(count)]:
                    rows.append((path, _alone(model, path, before)))
                    places.append(len(prompt) - 1)
            for _ in range(2):
                tokens = [path[at] for (path, _), at in zip(rows, places)]
                got = decoder.step(tensor(tokens), tensor(places)).float().log_softmax(-1)
                own = torch.stack([logps[at] for (_, logps), at in zip(rows, places)])
                if not torch.allclose(got, own, rtol=0, atol=tolerance):
                    return False
                places = [at + 1 for at in places]
        return True
    except Exception as error:  # any refusal of the arguments, of the attention or of the cache means the same
        log.info("%s: no %s: %s", type(model).__name__, make.__name__, error)
        return False
    finally:
        model.config._attn_implementation = before


def _alone(model: PreTrainedModel, path: list[int], implementation: str) -> Tensor:
    """Log-probabilities [L, V] of a sequence by itself, as the model attends by itself."""
    mine, model.config._attn_implementation = model.config._attn_implementation, implementation
    try:
        whole = torch.tensor([path], device=model.device)
        return model(input_ids=whole, use_cache=False).logits[0].float().log_softmax(-1)
    finally:
        model.config._attn_implementation = mine
