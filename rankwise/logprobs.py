"""log softmax of chosen tokens over a large vocabulary, without ever holding the logits.

The full [tokens, vocabulary] matrix never exists: a chunk of positions is projected, its log-sum-exp and its
target's logit are kept, and the backward pass projects the chunk again.

Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

# 1024 positions × 32k vocabulary in float32 is 128 MiB: large enough for full speed, small beside the model.
CHUNK_LOGITS = 32 * 2**20


def token_logps(
    hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, *, softcap: float = 0.0
) -> Tensor:
    """log softmax(h W^T + b)[target] of each token, [N], nats; float32 statistics (float64 stays float64).

    softcap > 0 bounds the logits as Gemma 2 does: softcap · tanh(logits / softcap).
    """
    return _TokenLogps.apply(hidden_NH, weight_VH, bias_V, target_N, softcap)


class _TokenLogps(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden_NH: Tensor, weight_VH: Tensor, bias_V: Tensor | None, target_N: Tensor, softcap: float):
        chunk = max(1, CHUNK_LOGITS // weight_VH.shape[0])
        logps, lses = [], []
        for start in range(0, len(target_N), chunk):
            part = slice(start, start + chunk)
            logits = _project(hidden_NH[part], weight_VH, bias_V, softcap)
            lse = torch.logsumexp(logits, dim=-1)
            logps.append(logits.gather(1, target_N[part, None]).squeeze(1) - lse)
            lses.append(lse)
        ctx.save_for_backward(hidden_NH, weight_VH, bias_V, target_N, torch.cat(lses))
        ctx.softcap, ctx.chunk = softcap, chunk
        return torch.cat(logps)

    @staticmethod
    def backward(ctx, grad_N: Tensor):
        hidden_NH, weight_VH, bias_V, target_N, lse_N = ctx.saved_tensors
        need_hidden, need_weight, need_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.empty_like(hidden_NH) if need_hidden else None
        wide = torch.float64 if weight_VH.dtype == torch.float64 else torch.float32
        grad_weight = torch.zeros(weight_VH.shape, dtype=wide, device=weight_VH.device) if need_weight else None
        grad_bias = torch.zeros_like(bias_V) if need_bias and bias_V is not None else None
        for start in range(0, len(target_N), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            logits = _project(hidden_NH[part], weight_VH, bias_V, ctx.softcap)
            grad = torch.exp(logits - lse_N[part, None]).neg_()  # d logp / d logits = one-hot − softmax
            grad.scatter_add_(1, target_N[part, None], torch.ones_like(grad[:, :1]))
            grad *= grad_N[part, None]
            if ctx.softcap:
                grad *= 1 - (logits / ctx.softcap).square()
            grad = grad.to(hidden_NH.dtype)
            if grad_hidden is not None:
                grad_hidden[part] = grad @ weight_VH.to(hidden_NH.dtype)
            if grad_weight is not None:
                grad_weight += grad.T @ hidden_NH[part]
            if grad_bias is not None:
                grad_bias += grad.sum(0)
        return grad_hidden, None if grad_weight is None else grad_weight.to(weight_VH.dtype), grad_bias, None, None


def _project(hidden: Tensor, weight_VH: Tensor, bias_V: Tensor | None, softcap: float) -> Tensor:
    logits = nn.functional.linear(
        hidden, weight_VH.to(hidden.dtype), None if bias_V is None else bias_V.to(hidden.dtype)
    )
    logits = logits if logits.dtype == torch.float64 else logits.float()
    return torch.tanh(logits / softcap) * softcap if softcap else logits
