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

log = logging.getLogger(__name__)

NAME = "rankwise_shared_prompts"
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
        """Logits [S, V] after one more token a row, at the given position of its sequence."""
        ...


class Memory:
    """Keys and values of N sequences, the longest first; a product reads each as wide as its part needs."""

    def __init__(self, where: torch.device):
        self.layers: dict[int, list[Tensor]] = {}  # keys [N, H, D, P], as a product reads them, and values [N, H, P, D]
        self.length_N = torch.zeros(0, dtype=torch.int64, device=where)  # positions of each
        self.parts: list[tuple[slice, int]] = []  # sequences of like length, and how wide they are

    def cut(self) -> None:
        """Find the parts anew, after sequences came or went."""
        bounds = torch.linspace(0, len(self.length_N), PARTS + 1).long().tolist()
        self.parts = [(slice(a, b), max(1, int(self.length_N[a]))) for a, b in itertools.pairwise(bounds) if a < b]

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
        keys, values = self.layers[layer]
        outs, lses = [], []
        for (part, width), bias in zip(self.parts, biases):
            scores = (query[part] @ keys[part, :, :, :width]).float()
            scores = (torch.tanh(scores / cap) * cap if cap else scores) + bias
            top = scores.amax(-1, keepdim=True).clamp(min=LOW)
            weights = (scores - top).exp_()
            total = weights.sum(-1, keepdim=True).clamp(min=1 / -LOW)
            outs.append(weights.to(values.dtype) @ values[part, :, :width] / total)
            lses.append((top + total.log())[..., 0])
        return torch.cat(outs), torch.cat(lses)


class SharedPrompts:
    """Prompts once, answers beside them.

    Args:
        room: tokens of the longest answer.
    """

    refills = True

    def __init__(self, model: PreTrainedModel, *, room: int):
        AttentionInterface.register(NAME, _attend)
        AttentionMaskInterface.register(NAME, sdpa_mask)
        model.config._attn_implementation = NAME
        self.model, self.room = model, room
        self.anything = torch.ones(1, 1, 1, 1, dtype=torch.bool, device=model.device)  # a 4-D mask is let through
        self.prompts, self.own = Memory(model.device), Memory(model.device)
        self.prompt_S = torch.zeros(0, dtype=torch.int64, device=model.device)  # which of prompts is a row's
        self.spare: list[Tensor] = []  # where a layer's own are put when rows move
        self.fresh: dict[int, list[Tensor]] | None = None  # while prompts are run: their keys and values

    def arrange(self, keep: Tensor, prompts: Sequence[Sequence[int]], answers: Sequence[int]) -> None:
        still, owner = torch.unique(self.prompt_S[keep], return_inverse=True)
        count = torch.tensor(answers, dtype=torch.int64, device=keep.device)
        numbers = torch.arange(len(prompts), device=keep.device) + len(still)
        owner = torch.cat([owner, numbers.repeat_interleave(count)])
        if prompts or len(still) < len(self.prompts.length_N):
            self._change_prompts(still, [list(p[:-1]) for p in prompts])
        order = self.prompts.length_N.argsort(descending=True, stable=True)
        self._sort_prompts(order)
        self.prompt_S = order.argsort()[owner]
        self.own.length_N = pad(self.own.length_N[keep], (0, len(owner) - len(keep)))
        self.own.cut()
        self._move(keep)
        self._seat()

    def _change_prompts(self, still: Tensor, prompts: list[list[int]]) -> None:
        """Keep these, run those; new ones stand behind the others."""
        for layer, kept in self.prompts.layers.items():
            self.prompts.layers[layer] = [x[still] for x in kept]
        self.prompts.length_N = self.prompts.length_N[still]
        longest = max(map(len, prompts), default=0)
        for first in range(0, len(prompts), size := max(1, PREFILL_POSITIONS // max(1, longest))):
            self._run(prompts[first : first + size])

    def _run(self, prompts: list[list[int]]) -> None:
        """Padding stands behind a prompt, where causal attention does not look."""
        longest = max(1, *map(len, prompts))
        where = self.model.device
        ids = torch.tensor([p + [0] * (longest - len(p)) for p in prompts], device=where)
        self.fresh = {}
        position_ids = torch.arange(longest, device=where).expand_as(ids)
        self.model(input_ids=ids, position_ids=position_ids, use_cache=False, logits_to_keep=1, slots=self)
        lengths = torch.tensor([len(p) for p in prompts], device=where)
        self.prompts.length_N = torch.cat([self.prompts.length_N, lengths])
        widest = max(1, int(self.prompts.length_N.max()))
        for layer, fresh in self.fresh.items():
            pairs = zip(self.prompts.layers.get(layer, [x[:0] for x in fresh]), fresh)
            joined = [[_wide(x, widest, places) for x in pair] for pair, places in zip(pairs, PLACES)]
            self.prompts.layers[layer] = [torch.cat(pair) for pair in joined]
        self.fresh = None

    def _sort_prompts(self, order: Tensor) -> None:
        if not bool((order == torch.arange(len(order), device=order.device)).all()):
            self.prompts.length_N = self.prompts.length_N[order]
            for layer, kept in self.prompts.layers.items():
                self.prompts.layers[layer] = [x[order] for x in kept]
        self.prompts.cut()

    def _move(self, keep: Tensor) -> None:
        """Answers' own keys and values into their new rows; what stood there before is finite, and never looked at."""
        rows = len(self.own.length_N)
        for layer, own in self.own.layers.items():
            if not self.spare or len(self.spare[0]) < rows:
                self.spare = [x.new_zeros(rows, *x.shape[1:]) for x in own]
            for part, width in self.own.parts:
                came = keep[part]
                for old, new, places in zip(own, self.spare, PLACES):
                    new.narrow(places, 0, width)[part][: len(came)] = old.narrow(places, 0, width)[came]
            self.own.layers[layer], self.spare = self.spare, own

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
        # Rows that ended wait at the end of their room for the next arrangement.
        self.made_S, self.own.length_N = self.own.length_N, (self.own.length_N + 1).clamp(max=self.room)
        self.own.parts = [(part, min(width + 1, self.room)) for part, width in self.own.parts]
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
        self._note(layer, key, value)
        heads, repeats = key.shape[1], query.shape[1] // key.shape[1]
        query_SHRD = query.view(len(query), heads, repeats, -1).to(_stored(query)) * scale
        to_prompt, to_own = self._biases(options.get("sliding_window"), repeats)
        cap = options.get("softcap")
        grid = query_SHRD[self.grid_GK].transpose(1, 2).flatten(2, 3)  # [G, H, K·R, D]
        out, lse = (self._by_row(x, repeats) for x in self.prompts.look(layer, grid, to_prompt, cap))
        other, other_lse = self.own.look(layer, query_SHRD, to_own, cap)
        joint = torch.logaddexp(lse, other_lse)
        mixed = out * (lse - joint).exp()[..., None] + other * (other_lse - joint).exp()[..., None]
        return mixed.view(len(query), 1, heads * repeats, -1)

    def _note(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Put the new position's keys and values into their rows."""
        rows, heads, _, size = key.shape
        if layer not in self.own.layers:
            empty = lambda x, *shape: torch.zeros(rows, heads, *shape, dtype=_stored(x), device=x.device)
            self.own.layers[layer] = [empty(key, size, self.room), empty(value, self.room, value.shape[3])]
        every, at = torch.arange(rows, device=key.device), self.made_S.clamp(max=self.room - 1)
        keys, values = self.own.layers[layer]
        keys[every, :, :, at] = key[:, :, 0].to(keys.dtype)
        values[every, :, at] = value[:, :, 0].to(values.dtype)

    def _by_row(self, grid: Tensor, repeats: int) -> Tensor:
        """[G, H, K·R, …] of cells as [S, H, R, …] of rows."""
        return grid.unflatten(2, (-1, repeats)).transpose(1, 2).flatten(0, 1)[self.cell_S]

    def _biases(self, window: int | None, repeats: int) -> tuple[list[Tensor], list[Tensor]]:
        """For prompts and for answers' own; a window ends at the position that is being computed."""
        if window not in self.biases:
            first_S = self.prompts.length_N[self.prompt_S] + self.made_S - window + 1 if window else None
            first_GM = first_S[self.grid_GK].repeat_interleave(repeats, 1) if window else None
            own_S1 = (self.made_S - window + 1)[:, None] if window else None
            self.biases[window] = (self.prompts.biases(first_GM), self.own.biases(own_S1))
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
    scale = options.pop("scaling", None) or query.shape[-1] ** -0.5
    if slots.fresh is None:
        with torch.autocast(query.device.type, enabled=False):  # or it would cast all that is kept, at every step
            out = slots.attend(module.layer_idx, query, key, value, scale, **options)
        return out.to(query.dtype), None
    slots.fresh[module.layer_idx] = [x.to(_stored(x)) for x in (key.transpose(2, 3).contiguous(), value)]
    if options.get("softcap"):
        return _capped(query, key, value, attention_mask, scale, options["softcap"]), None
    return sdpa_attention_forward(module, query, key, value, attention_mask, scaling=scale, **options)


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


def _wide(x: Tensor, positions: int, places: int) -> Tensor:
    """With so many places along a dimension, 2 or 3: zeros behind what there is, or what is too much left out."""
    more = positions - x.shape[places]
    return pad(x, (0, more) if places == 3 else (0, 0, 0, more))


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
        longest, where = max(map(len, prompts)) - 1, self.model.device
        real = torch.tensor([[0] * (longest + 1 - len(p)) + [1] * (len(p) - 1) for p in prompts], device=where)
        owner_S = torch.arange(len(prompts), device=where).repeat_interleave(torch.tensor(answers, device=where))
        self.mask, self.cache = real[owner_S], DynamicCache(config=self.model.config)
        if longest:
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
def can_share(model: PreTrainedModel) -> bool:
    """Whether SharedPrompts gives the model's own logits, asked by a small batch with a prompt added on its way."""
    before = model.config._attn_implementation
    vocabulary = model.config.get_text_config().vocab_size
    ids = [(n * 7919 % max(vocabulary - 1, 1) + 1) % vocabulary for n in range(1, 24)]
    first, second, late = ids[:6], ids[6:9], ids[9:10]
    paths = [[*first, *ids[10:14]], [*first, *ids[14:18]], [*second, *ids[18:20]], [*late, *ids[20:22]]]
    places = [[5, 5, 2], [6, 6, 3], [7, 7, 0], [8, 8, 1]]  # of what is read at each step; then late takes the third row
    read = [[0, 1, 2], [0, 1, 2], [1, 0, 3], [1, 0, 3]]  # and the first two change places
    tolerance = 1e-4 if model.dtype in (torch.float32, torch.float64) else 5e-2
    tensor = lambda values: torch.tensor(values, dtype=torch.int64, device=model.device)
    try:
        alone = [model(input_ids=tensor([path])).logits[0] for path in paths]
        shared = SharedPrompts(model, room=4)
        shared.arrange(tensor([]), [first, second], [2, 1])
        for step, (now, at) in enumerate(zip(read, places)):
            if step == 2:
                shared.arrange(tensor([1, 0]), [late], [1])
            got = shared.step(tensor([paths[n][place] for n, place in zip(now, at)]), tensor(at))
            own = torch.stack([alone[n][place] for n, place in zip(now, at)])
            if not torch.allclose(got.float().log_softmax(-1), own.float().log_softmax(-1), rtol=0, atol=tolerance):
                return False
        return True
    except Exception as error:  # any refusal of the arguments or of the attention means the same
        log.info("%s cannot share prompts: %s", type(model).__name__, error)
        return False
    finally:
        model.config._attn_implementation = before
