"""Tiled log-probabilities against the full log-softmax, values and gradients."""

import pytest
import torch

from rankwise import logprobs
from rankwise.logprobs import token_logps


def case(tokens=13, hidden=7, vocabulary=11, *, bias=True, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    h = torch.randn(tokens, hidden, generator=generator, dtype=torch.float64)
    w = torch.randn(vocabulary, hidden, generator=generator, dtype=torch.float64)
    b = torch.randn(vocabulary, generator=generator, dtype=torch.float64) if bias else None
    target = torch.randint(vocabulary, (tokens,), generator=generator)
    leaf = lambda t: None if t is None else t.to(dtype).requires_grad_()
    return leaf(h), leaf(w), leaf(b), target


def tiles(monkeypatch, logits: int, kept: int = 0) -> None:
    """So many logits a tile; logits beyond `kept` are projected twice."""
    monkeypatch.setattr(logprobs, "TILE_LOGITS", {"cpu": logits, "cuda": logits})
    monkeypatch.setattr(logprobs, "KEPT_LOGITS", kept)


def full(h, w, b, target, softcap=0.0):
    """The textbook: all logits, log-softmax, pick."""
    logits = h @ w.T + (0 if b is None else b)
    logits = softcap * torch.tanh(logits / softcap) if softcap else logits
    return logits.log_softmax(-1).gather(1, target[:, None]).squeeze(1)


@pytest.mark.parametrize("kept", [0, 2**24])
@pytest.mark.parametrize("words_a_tile", [1, 4, 5, 11, 100])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("softcap", [0.0, 2.0])
def test_values_and_gradients_are_those_of_the_full_softmax(monkeypatch, words_a_tile, kept, bias, softcap):
    tiles(monkeypatch, words_a_tile * 13, kept)
    h, w, b, target = case(bias=bias)
    upstream = torch.randn(13, generator=torch.Generator().manual_seed(5), dtype=torch.float64)
    ours = token_logps(h, w, b, target, softcap=softcap)
    ours.backward(upstream)
    got = [t.grad.clone() for t in (h, w, b) if t is not None]
    h, w, b, target = case(bias=bias)
    expected = full(h, w, b, target, softcap)
    expected.backward(upstream)
    torch.testing.assert_close(ours, expected, rtol=1e-13, atol=1e-13)
    for mine, theirs in zip(got, [t.grad for t in (h, w, b) if t is not None], strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("softcap", [0.0, 1.5])
def test_gradients_are_those_of_finite_differences(monkeypatch, softcap):
    tiles(monkeypatch, 2 * 5)
    h, w, b, target = case(tokens=5, hidden=3, vocabulary=5)
    assert torch.autograd.gradcheck(lambda *x: token_logps(*x, target, softcap=softcap), (h, w, b))


def test_a_tile_smaller_than_the_tokens_goes_word_by_word(monkeypatch):
    tiles(monkeypatch, 3)
    h, w, b, target = case()
    torch.testing.assert_close(token_logps(h, w, b, target), full(h, w, b, target))


@pytest.mark.parametrize("frozen", ["hidden", "weight", "bias"])
def test_what_is_frozen_gets_no_gradient(frozen):
    """With adapters the head is frozen, and a frozen body needs no gradient of its hidden states."""
    tensors = dict(zip(("hidden", "weight", "bias"), case()[:3]))
    tensors[frozen] = tensors[frozen].detach()
    token_logps(*tensors.values(), case()[3]).sum().backward()
    assert {name for name, t in tensors.items() if t.grad is not None} == set(tensors) - {frozen}


def test_logits_a_thousand_apart_stay_finite():
    h, w, b, target = case(dtype=torch.float32)
    value = token_logps(h * 1000, w, b, target)
    value.sum().backward()
    assert torch.isfinite(value).all() and torch.isfinite(w.grad).all()


def in_bf16(boost: float, tokens: int, hidden: int, vocabulary: int):
    """bf16 states whose target's logit is raised, the weight and the targets."""
    h, w, _, target = case(tokens, hidden, vocabulary, bias=False, dtype=torch.float32, seed=3)
    w = w.detach()
    return (h.detach() / hidden**0.5 + boost * w[target] / hidden).bfloat16(), w, target


def errors(function, h, weight, target) -> list[float]:
    """Relative distances from float64 on the same rounded numbers: mean over tokens, gradient of states, of weight."""
    exact_h, exact_w = h.double().requires_grad_(), weight.detach().bfloat16().double().requires_grad_()
    exact = full(exact_h, exact_w, None, target)
    exact.sum().backward()
    state = h.clone().requires_grad_()
    value = function(state, weight)
    value.float().sum().backward()
    far = lambda a, b: ((a.double() - b).norm() / b.norm()).item()
    return [far(value, exact), far(state.grad, exact_h.grad), far(weight.grad, exact_w.grad)]


@pytest.mark.parametrize("boost", [0, 4, 8, 12, 16])
@pytest.mark.parametrize("tokens, hidden, vocabulary", [(7, 16, 33), (64, 48, 257), (129, 64, 1000)])
def test_error_in_bf16_stays_within_the_naive_one(monkeypatch, tokens, hidden, vocabulary, boost):
    """From tokens as unlikely as any (boost 0) to p near 1, where a difference of rounded logits is all rounding."""
    tiles(monkeypatch, 32 * vocabulary)
    h, w, target = in_bf16(boost, tokens, hidden, vocabulary)
    ours = errors(lambda s, weight: token_logps(s, weight, None, target), h, w.clone().requires_grad_(), target)
    naive = errors(
        lambda s, weight: (s @ weight.T).log_softmax(-1).gather(1, target[:, None]).squeeze(1),
        h,
        w.bfloat16().requires_grad_(),
        target,
    )
    for mine, theirs in zip(ours, naive):
        assert mine <= 1.1 * theirs
    if boost == 0:
        assert ours[0] < 5e-3


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_no_log_probability_is_positive(softcap):
    h, w, target = in_bf16(16, 64, 48, 257)
    assert token_logps(h, w, None, target).exp().median() > 0.99
    assert (token_logps(h, w, None, target, softcap=softcap) <= 0).all()


def test_nothing_is_kept_where_no_gradient_is_asked_for():
    h, w, _, target = case()
    with torch.no_grad():
        assert token_logps(h, w, None, target).grad_fn is None
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        token_logps(h, w, None, target)
    assert (13, 11) in [tuple(shape) for shape in kept]
