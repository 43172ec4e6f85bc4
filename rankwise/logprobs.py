"""log softmax of chosen tokens over a large vocabulary, a tile of it at a time.

The full [tokens, vocabulary] matrix of logits never exists: for a tile of the vocabulary all tokens are projected and
their log-sum-exp is kept; the backward pass projects the tile again. A small matrix is kept instead of computed twice.

A token's own logit is computed apart, in float32, and log p = log σ(own − log-sum-exp of the others). So in bf16 a
confident token (p near 1) keeps its small log-probability and gradient, which differences of rounded logits lose.

Letters: N tokens, H hidden size, V vocabulary, T words of a tile.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

# Logits a tile: on a CPU the passes over it stay in the cache (4 MiB), a GPU wants few large launches (128 MiB).
TILE_LOGITS = {"cpu": 2**20, "cuda": 2**25}
KEPT_LOGITS = 2**24  # a matrix up to this size (64 MiB in float32) is not projected a second time


def token_logps(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, *, softcap: float = 0.0
) -> Tensor:
    """log softmax(h W^T + b)[target] of each token, [N], nats; float32 statistics (float64 stays float64).

    The products are made in the dtype of autocast where it is on, else in that of hidden_NH.
    softcap > 0 bounds the logits as Gemma 2 does: softcap · tanh(logits / softcap).
    """
    where = hidden_NH.device.type
    if torch.is_autocast_enabled(where):
        hidden_NH = hidden_NH.to(torch.get_autocast_dtype(where))
    small = hidden_NH.shape[0] * weight_VH.shape[0] <= KEPT_LOGITS
    with torch.autocast(where, enabled=False):
        return _TokenLogps.apply(hidden_NH, weight_VH, bias_V, target_N, softcap, small and torch.is_grad_enabled())


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        hidden_NH: Tensor,
        weight_VH: Tensor,
        bias_V: Tensor | None,
        target_N: Tensor,
        softcap: float,
        keep: bool,
    ):
        low_VH = weight_VH.to(hidden_NH.dtype)
        kept, rest_N = [], None
        for words in _tiles(hidden_NH, weight_VH):
            logits_NT = _project(hidden_NH, low_VH[words], None if bias_V is None else bias_V[words])
            kept += [logits_NT] if keep else []
            others_NT = _without_own(_capped(logits_NT, softcap), target_N, words.start)
            part_N = torch.logsumexp(others_NT, dim=-1)
            rest_N = part_N if rest_N is None else torch.logaddexp(rest_N, part_N)
        own_N = (_wide(hidden_NH) * _wide(low_VH.index_select(0, target_N))).sum(-1)
        own_N = _capped(own_N if bias_V is None else own_N + bias_V.index_select(0, target_N), softcap)
        logp_N = nn.functional.logsigmoid(own_N - rest_N)
        ctx.save_for_backward(hidden_NH, low_VH, bias_V, target_N, own_N, logp_N, *kept)
        ctx.softcap, ctx.weight_dtype = softcap, weight_VH.dtype
        return logp_N

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_N: Tensor):
        """d logp / d logits = one-hot − softmax, times the slope of the cap; own and other words are added apart."""
        hidden_NH, low_VH, bias_V, target_N, own_N, logp_N, *kept = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        where, wide = hidden_NH.device.type, torch.promote_types(hidden_NH.dtype, torch.float32)
        grad_hidden = torch.zeros_like(hidden_NH, dtype=wide) if need_hidden else None
        grad_weight = torch.empty_like(low_VH, dtype=wide) if need_weight else None
        grad_bias = torch.empty_like(bias_V) if need_bias and bias_V is not None else None
        with torch.autocast(where, enabled=False):
            for number, words in enumerate(_tiles(hidden_NH, low_VH)):
                bias_T = None if bias_V is None else bias_V[words]
                raw_NT = kept[number] if kept else _project(hidden_NH, low_VH[words], bias_T)
                logits_NT = _capped(raw_NT, ctx.softcap)
                slope = _slope(logits_NT, ctx.softcap)
                # where capping changed nothing, what was kept lost its own word in the forward pass already
                masked = kept and logits_NT is raw_NT
                others_NT = logits_NT if masked else _without_own(logits_NT, target_N, words.start)
                grad_NT = (others_NT - (own_N - logp_N)[:, None]).exp_().mul_(-grad_N[:, None])
                grad_NT = (grad_NT * slope if ctx.softcap else grad_NT).to(hidden_NH.dtype)
                if grad_hidden is not None:
                    grad_hidden += grad_NT @ low_VH[words]
                if grad_weight is not None:
                    grad_weight[words] = grad_NT.T @ hidden_NH
                if grad_bias is not None:
                    grad_bias[words] = grad_NT.sum(0)
            # 1 − p as a whole: of a confident token it is what is left, and a rounded p would lose it
            own_grad_N = grad_N * -torch.expm1(logp_N) * _slope(own_N, ctx.softcap)
            if grad_hidden is not None:
                grad_hidden += own_grad_N[:, None] * low_VH.index_select(0, target_N)
            if grad_weight is not None:
                grad_weight.index_add_(0, target_N, own_grad_N[:, None] * _wide(hidden_NH))
            if grad_bias is not None:
                grad_bias.index_add_(0, target_N, own_grad_N.to(grad_bias.dtype))
        in_dtype = lambda grad, dtype: None if grad is None else grad.to(dtype)
        return (
            in_dtype(grad_hidden, hidden_NH.dtype),
            in_dtype(grad_weight, ctx.weight_dtype),
            grad_bias,
            *(None, None, None),
        )


def _tiles(hidden_NH: Tensor, weight_VH: Tensor) -> Iterator[slice]:
    logits = TILE_LOGITS["cpu" if hidden_NH.device.type == "cpu" else "cuda"]
    tile = max(1, logits // max(1, hidden_NH.shape[0]))
    for start in range(0, weight_VH.shape[0], tile):
        yield slice(start, start + tile)


def _project(hidden_NH: Tensor, weight_TH: Tensor, bias_T: Tensor | None) -> Tensor:
    return nn.functional.linear(hidden_NH, weight_TH, None if bias_T is None else bias_T.to(hidden_NH.dtype))


def _without_own(logits_NT: Tensor, target_N: Tensor, start: int) -> Tensor:
    """A tile with each token's own word taken out, in place: what it is set against is then free of its rounding."""
    place_N1 = (target_N - start)[:, None]
    inside_N1 = (place_N1 >= 0) & (place_N1 < logits_NT.shape[1])
    place_N1 = place_N1.clamp(0, logits_NT.shape[1] - 1)
    return logits_NT.scatter_(1, place_N1, logits_NT.gather(1, place_N1).masked_fill(inside_N1, -torch.inf))


def _capped(logits: Tensor, softcap: float) -> Tensor:
    logits = _wide(logits)
    return torch.tanh(logits / softcap) * softcap if softcap else logits


def _slope(capped: Tensor, softcap: float) -> Tensor | float:
    """d capped / d logits."""
    return 1 - (capped / softcap).square() if softcap else 1.0


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
