"""Four ways from hidden states to log-probabilities of chosen tokens, and how far each is from float64.

Letters: N tokens, H hidden size, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.channel import Channel, Pace
from rankwise.logprobs import token_logps
from rankwise.plan import peak

EXACT_TOKENS = 256  # tokens on which errors are measured: float64 logits of all would not fit
CONFIDENT = slice(1, None, 2)  # every second token: the model is the surer of its target the later it comes
SURE = 1 - 1e-5  # about the probability of the surest
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
Head = Callable[[Tensor, Tensor, Tensor], Tensor]  # hidden_NH, weight_VH, target_N -> logp_N


def run(spec: dict[str, Any], channel: Channel) -> None:
    """Forward and backward of one head, once a go; the first reply also tells its errors."""
    head, device = HEADS[spec["head"]](), spec["device"]
    hidden_NH, weight_VH, target_N = inputs(spec)
    few_NH, few_N = hidden_NH[:EXACT_TOKENS], target_N[:EXACT_TOKENS]
    errors = errors_of(head, few_NH, weight_VH, few_N)
    if len(few_N) > 1:
        confident = errors_of(head, few_NH[CONFIDENT], weight_VH, few_N[CONFIDENT].contiguous())
        errors |= {f"confident_{name}": error for name, error in confident.items()}
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    peak.reset(device)
    pace = Pace(channel, device, peak.now(device))
    while True:
        head(hidden_NH, weight_VH, target_N).sum().backward()
        pace(**errors)
        hidden_NH.grad = weight_VH.grad = None


def inputs(spec: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Random hidden states, a weight whose logits spread as a trained model's do, and targets.

    Half of the hidden states lean towards their target, from not at all to SURE: a trained model is sure of most of its
    tokens, and there a target's logit that is rounded otherwise than its share of the sum does not cancel.
    """
    dice = torch.Generator(device=spec["device"]).manual_seed(spec["seed"])
    at = {"device": spec["device"], "generator": dice}
    n, h, v = spec["tokens"], spec["hidden"], spec["vocabulary"]
    hidden_NH = torch.randn(n, h, **at)
    # Logits of standard deviation 2, so that their log-sum-exp is log V + 2² / 2.
    weight_VH = torch.randn(v, h, **at) * 2 / h**0.5
    target_N = torch.randint(v, (n,), **at)
    surest = math.log(v) + 2 + math.log(SURE / (1 - SURE))  # nats that a target's logit must gain
    surest += surest**2 / (2 * h)  # the others', which then spread more, rise by this
    gain_N = surest * (torch.arange(n, device=spec["device"]) % EXACT_TOKENS) / max(1, min(n, EXACT_TOKENS) - 1)
    own_NH = weight_VH[target_N]
    boost_N = gain_N / own_NH.square().sum(-1)
    hidden_NH[CONFIDENT] += (boost_N[:, None] * own_NH)[CONFIDENT]
    # Rounded once here, so that every head multiplies the same numbers.
    return hidden_NH.to(DTYPES[spec["dtype"]]), weight_VH.to(DTYPES[spec["dtype"]]), target_N


def errors_of(head: Head, hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> dict[str, float]:
    """Against float64: the largest error of a log-probability, nats, and relative errors of both gradients."""
    found = _with_gradients(head, hidden_NH.clone(), weight_VH.clone(), target_N)
    exact = _with_gradients(_full, hidden_NH.double(), weight_VH.double(), target_N)
    apart = [(a.double() - b).norm().item() / b.norm().item() for a, b in zip(found, exact)]
    return {
        "logp_error": (found[0].double() - exact[0]).abs().max().item(),
        "hidden_gradient_error": apart[1],
        "weight_gradient_error": apart[2],
    }


def _with_gradients(head: Head, hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> tuple[Tensor, ...]:
    hidden_NH.requires_grad_()
    weight_VH.requires_grad_()
    logp_N = head(hidden_NH, weight_VH, target_N)
    logp_N.sum().backward()
    return logp_N.detach(), hidden_NH.grad, weight_VH.grad


def _full(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    logits_NV = F.linear(hidden_NH, weight_VH)
    return logits_NV.log_softmax(-1).gather(1, target_N[:, None]).squeeze(1)


def _ours() -> Head:
    return lambda hidden_NH, weight_VH, target_N: token_logps(hidden_NH, weight_VH, None, target_N)


def _full_by_trl() -> Head:
    from trl.trainer.utils import selective_log_softmax

    return lambda hidden_NH, weight_VH, target_N: selective_log_softmax(F.linear(hidden_NH, weight_VH), target_N)


def _fused_by_trl() -> Head:
    from trl.kernels import ChunkedLogProbFunction

    # As DPOTrainer calls it: chunks of 32,768 words, and the numbers that its metrics are made of.
    more = (1.0, 32_768, None, 1.0, ("log_probs", "entropy", "mean_logits", "is_top1"))
    return lambda hidden_NH, weight_VH, target_N: ChunkedLogProbFunction.apply(
        hidden_NH, weight_VH, None, target_N, *more
    )[0]


# What makes each head; imports of TRL wait until it is asked for.
HEADS: dict[str, Callable[[], Head]] = {
    "ours": _ours,
    "full": lambda: _full,
    "trl_full": _full_by_trl,
    "trl_fused": _fused_by_trl,
}
