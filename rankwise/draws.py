"""A token for each sequence, from its logits and one uniform number, by inverting the cumulative distribution.

So a sequence's draws depend on its own stream of numbers alone, not on its neighbours or their order.

Letters: S sequences, V vocabulary, C candidates, B blocks, W words of a block.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.sampling import Sampling
from rankwise.types import UserError

BLOCK = 256  # words added up before a draw looks among them: sums in float64 over a whole vocabulary cost too much
NUCLEUS = 1024  # likeliest words that top-p looks at first; the whole vocabulary is sorted only where they fall short
NOT_FINITE = (
    "the model's logits are not finite numbers, so nothing can be drawn from them: its weights or its precision are at "
    "fault; look at the training that made it (reports), or use precision fp32"
)


def draw(logits_SV: Tensor, uniform_S: Tensor, sampling: Sampling, seen_SV: Tensor | None) -> tuple[Tensor, Tensor]:
    """Tokens [S], int64, and their log-probabilities under the model itself [S], float32, nats.

    Args:
        logits_SV: of any floating dtype; not changed.
        uniform_S: float64 in [0, 1).
        seen_SV: bool, the words that the repetition penalty is for; None without one.

    Of words that tie at the last place of top-k, as many stay as there is room for. Raises UserError on logits that are
    not numbers.
    """
    raw_SV = logits_SV.float()
    top_S1 = raw_SV.amax(-1, keepdim=True)
    weight_SV = (raw_SV - top_S1).exp_()
    logsum_S = weight_SV.sum(-1).log_() + top_S1[:, 0]
    if not bool(logsum_S.isfinite().all()):
        raise UserError(NOT_FINITE)
    shaped_SV = raw_SV if seen_SV is None else _penalised(raw_SV, seen_SV, sampling.repetition_penalty)
    if sampling.temperature == 0:
        token_S = shaped_SV.argmax(-1)
    else:
        if shaped_SV is not raw_SV or sampling.temperature != 1:
            # The likeliest word weighs 1, so whatever the temperature, something is left to draw from.
            weight_SV = (shaped_SV - shaped_SV.amax(-1, keepdim=True)).div_(sampling.temperature).exp_()
        token_S = _chosen(weight_SV, uniform_S, sampling)
    return token_S, raw_SV.gather(1, token_S[:, None])[:, 0] - logsum_S


def _penalised(logits_SV: Tensor, seen_SV: Tensor, penalty: float) -> Tensor:
    """Keskar et al. 2019 (https://arxiv.org/abs/1909.05858, section 4.1), negative logits multiplied."""
    return torch.where(seen_SV, torch.where(logits_SV > 0, logits_SV / penalty, logits_SV * penalty), logits_SV)


def _chosen(weight_SV: Tensor, uniform_S: Tensor, sampling: Sampling) -> Tensor:
    """A word of each row by its weight, of those that top-k, top-p and min-p leave; weights may be overwritten."""
    top_k = min(sampling.top_k, weight_SV.shape[1])
    if not top_k and sampling.top_p >= 1:
        if sampling.min_p > 0:
            weight_SV.masked_fill_(weight_SV < sampling.min_p, 0)
        return invert(weight_SV, uniform_S)
    sorted_SC, word_SC = _likeliest(weight_SV, top_k, sampling.top_p)
    if sampling.top_p < 1:
        # A word stays while what comes before it has not reached top_p, so the likeliest always stays.
        total_S1 = (sorted_SC if top_k else weight_SV).sum(-1, keepdim=True, dtype=torch.float64)
        before_SC = sorted_SC.double().cumsum(-1) - sorted_SC
        sorted_SC = sorted_SC.masked_fill(before_SC >= sampling.top_p * total_S1, 0)
    sorted_SC = sorted_SC.masked_fill(sorted_SC < sampling.min_p, 0)
    return word_SC.gather(1, invert(sorted_SC, uniform_S)[:, None])[:, 0]


def _likeliest(weight_SV: Tensor, top_k: int, top_p: float) -> tuple[Tensor, Tensor]:
    """Weights of the likeliest words, falling, and the words: enough of them for top-k and top-p."""
    if top_k:
        return weight_SV.topk(top_k, dim=-1)
    if weight_SV.shape[1] > NUCLEUS:
        sorted_SC, word_SC = weight_SV.topk(NUCLEUS, dim=-1)
        if bool((sorted_SC.sum(-1) >= top_p * weight_SV.sum(-1) * (1 + 1e-5)).all()):
            return sorted_SC, word_SC
    return weight_SV.sort(dim=-1, descending=True)


def invert(weight_SV: Tensor, uniform_S: Tensor) -> Tensor:
    """The word [S] at which a share uniform_S of each row's weight is passed; never one of weight 0."""
    words = weight_SV.shape[1]
    blocks = torch.nn.functional.pad(weight_SV, (0, -words % BLOCK)).unflatten(1, (-1, BLOCK))
    sum_SB = blocks.sum(-1)
    block_S, share_S = _passed(sum_SB, uniform_S)
    place_S, _ = _passed(blocks[torch.arange(len(blocks), device=blocks.device), block_S], share_S)
    return block_S * BLOCK + place_S


def _passed(weight_SB: Tensor, share_S: Tensor) -> tuple[Tensor, Tensor]:
    """Where the share of a row's weight falls, and what share of that place's own weight it has used up."""
    sum_SB = weight_SB.double().cumsum(-1)
    # Below the sum itself, which a share of 1 - 2^-53 would round to: no place lies behind it.
    goal_S1 = share_S.clamp(max=1 - 2**-52)[:, None] * sum_SB[:, -1:]
    place_S1 = torch.searchsorted(sum_SB, goal_S1, right=True)
    own_S1 = weight_SB.gather(1, place_S1).double()
    used_S1 = (goal_S1 - sum_SB.gather(1, place_S1) + own_S1) / own_S1
    return place_S1[:, 0], used_S1[:, 0].clamp(min=0)
