"""Attention over prompt trees on a CPU: a prompt attends to itself, its K answers to it and each to itself.

A dense mask over a row of trees computes every pair of positions and throws most of them away. Here the pairs that
exist are three plain products: prompt to prompt (causal), answers to their prompt, each answer to itself (causal). An
answer's two partial results are joined by their log-sum-exps, as FlashAttention joins blocks of keys; given the joint
output and log-sum-exp, the backward of each part is exactly its share of the whole (Dao et al. 2022,
https://arxiv.org/abs/2205.14135, appendix B; Liu et al. 2023, https://arxiv.org/abs/2310.01889, join over devices).

Registered with transformers under NAME. A call without trees is ordinary scaled-dot-product attention, so a model that
was trained through this still generates.

Letters: L positions of the flat stream, H heads, D head size, T trees of a group, P prompt positions, K answers, N
positions an answer.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

NAME = "rankwise_trees"
# What one more call of the kernel costs, in pairs of positions: trees are padded to a group's size up to that.
CALL_PAIRS = 3000

# What the kernels compute bf16 in: on a CPU their float32 forms are faster on trees of a few hundred positions
# (python -m benchmarks.attention).
KERNEL_DTYPE = torch.float32

_flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
_flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward


@dataclass(frozen=True, kw_only=True)
class Span:
    """A tree in the flat stream: its prompt's positions, then its answers', one behind the other."""

    start: int
    prompt: int  # positions
    answers: tuple[int, ...]  # positions of each, 0 where an answer is one token


@dataclass(frozen=True, kw_only=True)
class Group:
    """Trees computed together, padded to the largest of them; padding points at position 0."""

    prompt_TP: Tensor  # int64 positions in the stream
    answers_TKN: Tensor  # the same; N = 0 where all answers are one token
    prompt_real_TP: Tensor  # bool, False at padding
    answers_real_TKN: Tensor
    even: bool  # no prompt is padded


@dataclass(frozen=True, kw_only=True)
class Trees:
    """Every tree of a flat stream, in groups of like shape."""

    groups: tuple[Group, ...]
    slots_L: Tensor  # int64: where each position stands in the groups' padded positions, laid end to end

    @classmethod
    def of(cls, spans: Sequence[Span]) -> Trees:
        """Plan the groups of spans that fill a stream without a gap."""
        groups = tuple(map(_group, _alike(spans)))
        order = torch.cat([p.flatten() for g in groups for p in (g.prompt_TP, g.answers_TKN)])
        real = torch.cat([p.flatten() for g in groups for p in (g.prompt_real_TP, g.answers_real_TKN)])
        slots_L = torch.empty(int(real.sum()), dtype=torch.int64)
        slots_L[order[real]] = real.nonzero()[:, 0]
        return cls(groups=groups, slots_L=slots_L)


def register() -> None:
    """Make NAME known to transformers; a second time changes nothing."""
    AttentionInterface.register(NAME, attend)
    AttentionMaskInterface.register(NAME, sdpa_mask)


def attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    trees: Trees | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: [1, H, L, D] in, [1, L, H, D] out, in the dtype given or of autocast.

    Raises NotImplementedError where the model asks for what is not here (a cap, sinks, a bias, two-sided attention).
    """
    if trees is None:
        return sdpa_attention_forward(module, query, key, value, attention_mask, **options)
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown or options.get("is_causal") is False:
        raise NotImplementedError(f"attention over trees has no {', '.join(unknown) or 'two-sided form'}")
    scale = options.get("scaling") or query.shape[-1] ** -0.5
    flat = [tensor[0].transpose(0, 1) for tensor in (query, key, value)]
    if torch.is_autocast_enabled("cpu"):  # as autocast does for the library's own attention
        flat = [tensor.to(torch.get_autocast_dtype("cpu")) for tensor in flat]
    return _TreeAttention.apply(*flat, trees, scale)[None], None


@contextlib.contextmanager
def _exact_products() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


class _TreeAttention(torch.autograd.Function):
    @staticmethod
    @_exact_products()
    def forward(ctx, q_LHD: Tensor, k_LHD: Tensor, v_LHD: Tensor, trees: Trees, scale: float) -> Tensor:
        outs, lses = [], []
        for group in trees.groups:
            q, k, v = (_Gathered(x, group, heads=q_LHD.shape[1]) for x in (q_LHD, k_LHD, v_LHD))
            for out, lse in _forward(q, k, v, _bias(group, q.prompt.dtype), scale):
                outs.append(out.to(q_LHD.dtype))
                lses.append(lse)
        out_LHD = torch.cat(outs).index_select(0, trees.slots_L)
        ctx.save_for_backward(q_LHD, k_LHD, v_LHD, out_LHD, *lses)
        ctx.trees, ctx.scale = trees, scale
        return out_LHD

    @staticmethod
    @_exact_products()
    def backward(ctx, grad_LHD: Tensor):
        q_LHD, k_LHD, v_LHD, out_LHD, *saved = ctx.saved_tensors
        remaining = iter(saved)
        grads: list[tuple[Tensor, ...]] = []
        for group in ctx.trees.groups:
            x = [_Gathered(x, group, heads=q_LHD.shape[1]) for x in (q_LHD, k_LHD, v_LHD, out_LHD)]
            grad = _Gathered(grad_LHD, group, heads=q_LHD.shape[1], zero_padding=True)
            lse = [next(remaining) for _ in range(2 if grad.width else 1)]
            grads += _backward(grad, *x, lse, _bias(group, grad.prompt.dtype), ctx.scale)
        flat = (torch.cat(parts).to(q_LHD.dtype).index_select(0, ctx.trees.slots_L) for parts in zip(*grads))
        return *(_summed(g, x.shape[1]) for g, x in zip(flat, (q_LHD, k_LHD, v_LHD))), None, None


class _Gathered:
    """One tensor's positions of a group, in the shapes that the three products take; [batch, H, positions, D]."""

    def __init__(self, x_LHD: Tensor, group: Group, *, heads: int, zero_padding: bool = False):
        trees, answers, self.width = group.answers_TKN.shape
        prompt = x_LHD.index_select(0, group.prompt_TP.flatten())
        own = x_LHD.index_select(0, group.answers_TKN.flatten())
        if x_LHD.dtype == torch.bfloat16:
            prompt, own = prompt.to(KERNEL_DTYPE), own.to(KERNEL_DTYPE)
        if zero_padding:
            prompt = prompt * group.prompt_real_TP.flatten()[:, None, None]
            own = own * group.answers_real_TKN.flatten()[:, None, None]
        if (repeats := heads // x_LHD.shape[1]) > 1:  # grouped queries: each key and value head serves several
            prompt, own = prompt.repeat_interleave(repeats, 1), own.repeat_interleave(repeats, 1)
        self.prompt = _batched(prompt, trees)
        self.by_tree = _batched(own, trees) if self.width else None
        self.by_answer = _batched(own, trees * answers) if self.width else None


def _batched(tokens_MHD: Tensor, batch: int) -> Tensor:
    """[batch, H, positions, D] as a view."""
    return tokens_MHD.view(batch, -1, *tokens_MHD.shape[1:]).transpose(1, 2)


def _tokens(x: Tensor) -> Tensor:
    """Back from [batch, H, positions, …] to [batch · positions, H, …]."""
    return x.transpose(1, 2).flatten(0, 1)


def _forward(
    q: _Gathered, k: _Gathered, v: _Gathered, bias: Tensor | None, scale: float
) -> list[tuple[Tensor, Tensor]]:
    """(output [M, H, D], log-sum-exp [M, H]) of the prompts, then of the answers."""
    out, lse = _flash(q.prompt, k.prompt, v.prompt, 0.0, True, scale=scale)
    parts = [(_tokens(out), _tokens(lse))]
    if q.width:
        across = _flash(q.by_tree, k.prompt, v.prompt, 0.0, False, attn_mask=bias, scale=scale)
        own = _flash(q.by_answer, k.by_answer, v.by_answer, 0.0, True, scale=scale)
        parts.append(joined(*map(_tokens, across), *map(_tokens, own)))
    return parts


def joined(out: Tensor, lse: Tensor, other: Tensor, other_lse: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over the union of two sets of keys, from the output [..., D] and log-sum-exp [...] over each."""
    joint = torch.logaddexp(lse, other_lse)
    mixed = out * (lse - joint).exp()[..., None] + other * (other_lse - joint).exp()[..., None]
    return mixed.to(out.dtype), joint


def _backward(
    grad: _Gathered,
    q: _Gathered,
    k: _Gathered,
    v: _Gathered,
    out: _Gathered,
    lses: Sequence[Tensor],
    bias,
    scale: float,
) -> list[tuple[Tensor, ...]]:
    """Gradients of (q, k, v), [M, H, D] each: of the prompts, then of the answers."""
    lse = _batched(lses[0], len(q.prompt))
    at_prompt = _flash_backward(grad.prompt, q.prompt, k.prompt, v.prompt, out.prompt, lse, 0.0, True, scale=scale)
    if not q.width:
        return [tuple(map(_tokens, at_prompt))]
    lse = _batched(lses[1], len(q.by_tree))
    across = _flash_backward(
        grad.by_tree, q.by_tree, k.prompt, v.prompt, out.by_tree, lse, 0.0, False, attn_mask=bias, scale=scale
    )
    lse = _batched(lses[1], len(q.by_answer))
    own = _flash_backward(
        grad.by_answer, q.by_answer, k.by_answer, v.by_answer, out.by_answer, lse, 0.0, True, scale=scale
    )
    prompt = (at_prompt[0], at_prompt[1] + across[1], at_prompt[2] + across[2])
    answers = (_tokens(across[0]) + _tokens(own[0]), _tokens(own[1]), _tokens(own[2]))
    return [tuple(map(_tokens, prompt)), answers]


def _summed(grad_LHD: Tensor, heads: int) -> Tensor:
    """The gradient of a key or value head is the sum over the query heads that it serves."""
    return grad_LHD.unflatten(1, (heads, -1)).sum(2) if grad_LHD.shape[1] != heads else grad_LHD


def _bias(group: Group, dtype: torch.dtype) -> Tensor | None:
    """[T, 1, 1, P] added to the scores of answers: padding of a prompt is no key."""
    if group.even:
        return None
    zeros = torch.zeros(group.prompt_TP.shape, dtype=dtype, device=group.prompt_TP.device)
    return zeros.masked_fill(~group.prompt_real_TP, -torch.inf)[:, None, None]


def _alike(spans: Sequence[Span]) -> list[list[Span]]:
    """Spans in groups: a tree joins the group before it where the padding costs less than calls of its own."""
    groups: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.prompt, max(s.answers, default=0))):
        if groups and _pairs([*groups[-1], span]) <= _pairs(groups[-1]) + _pairs([span]) + CALL_PAIRS:
            groups[-1].append(span)
        else:
            groups.append([span])
    return groups


def _shape(spans: Sequence[Span]) -> tuple[int, int, int]:
    """P, K and N of a group."""
    answers = [n for span in spans for n in span.answers]
    return max(s.prompt for s in spans), max(len(s.answers) for s in spans), max(answers, default=0)


def _pairs(spans: Sequence[Span]) -> float:
    """Pairs of positions that a group computes, padding included; half of a causal square."""
    prompt, answers, width = _shape(spans)
    return len(spans) * (prompt**2 / 2 + answers * width * (prompt + width / 2))


def _group(spans: Sequence[Span]) -> Group:
    prompt, answers, width = _shape(spans)
    prompt_TP = torch.tensor([_line(s.start, s.prompt, prompt) for s in spans])
    lines = []
    for span in spans:
        start = span.start + span.prompt
        for length in [*span.answers, *[0] * (answers - len(span.answers))]:
            lines += _line(start, length, width)
            start += length
    answers_TKN = torch.tensor(lines, dtype=torch.int64).view(len(spans), answers, width)
    return Group(
        prompt_TP=prompt_TP.clamp(min=0),
        answers_TKN=answers_TKN.clamp(min=0),
        prompt_real_TP=prompt_TP >= 0,
        answers_real_TKN=answers_TKN >= 0,
        even=bool((prompt_TP >= 0).all()),
    )


def _line(start: int, length: int, width: int) -> list[int]:
    return [*range(start, start + length), *[-1] * (width - length)]
