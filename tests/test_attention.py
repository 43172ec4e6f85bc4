"""Attention over trees is attention under the dense tree mask: values and gradients, ragged trees, any grouping."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_scoring import tiny, token_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM

from rankwise import attention
from rankwise.attention import Span, Trees, _TreeAttention
from rankwise.batching import flat_rows
from rankwise.checkpoints import numerics
from rankwise.scoring import LogpModel

SHAPES = {
    "one tree": [(5, (3, 4))],
    "ragged": [(5, (3, 4)), (9, (1, 0, 7)), (2, (0, 0))],
    "paths": [(7, ()), (12, ())],
    "far apart": [(2, (1, 1)), (150, (90, 70, 3)), (30, (120,)), (31, (2, 110))],
}


def stream(shapes) -> tuple[list[Span], int]:
    spans, end = [], 0
    for prompt, answers in shapes:
        spans.append(Span(start=end, prompt=prompt, answers=tuple(answers)))
        end += prompt + sum(answers)
    return spans, end


def mask(spans: list[Span], length: int) -> torch.Tensor:
    """[L, L] True where a position may attend, from the definition."""
    allowed = torch.zeros(length, length, dtype=torch.bool)
    for span in spans:
        prompt = range(span.start, span.start + span.prompt)
        allowed[span.start : prompt.stop, span.start : prompt.stop] = torch.ones(span.prompt, span.prompt).tril().bool()
        start = prompt.stop
        for n in span.answers:
            allowed[start : start + n, span.start : prompt.stop] = True
            allowed[start : start + n, start : start + n] = torch.ones(n, n).tril().bool()
            start += n
    return allowed


def dense(q, k, v, spans, scale):
    repeat = lambda x: x.repeat_interleave(q.shape[1] // x.shape[1], 1).transpose(0, 1)
    allowed = mask(spans, len(q))
    return F.scaled_dot_product_attention(
        q.transpose(0, 1), repeat(k), repeat(v), attn_mask=allowed, scale=scale
    ).transpose(0, 1)


def tensors(length: int, *, heads=4, groups=2, size=8, dtype=torch.float64):
    generator = torch.Generator().manual_seed(length)
    draw = lambda h: torch.randn(length, h, size, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()
    return draw(heads), draw(groups), draw(groups)


def close_to_dense(spans, length, tolerance, **kind) -> None:
    q, k, v = tensors(length, **kind)
    ours, expected = _TreeAttention.apply(q, k, v, Trees.of(spans), 0.3), dense(q, k, v, spans, 0.3)
    upstream = torch.randn(expected.shape, generator=torch.Generator().manual_seed(1)).to(expected.dtype)
    got = [ours, *torch.autograd.grad(ours, (q, k, v), upstream)]
    wanted = [expected, *torch.autograd.grad(expected, (q, k, v), upstream)]
    for mine, theirs in zip(got, wanted, strict=True):
        assert (mine - theirs).norm() <= tolerance * theirs.norm().clamp(min=1)


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("shapes", SHAPES.values(), ids=SHAPES)
def test_it_is_attention_under_the_dense_mask(shapes, groups):
    close_to_dense(*stream(shapes), 1e-14, groups=groups)
    close_to_dense(*stream(shapes), 1e-6, groups=groups, dtype=torch.float32)


@pytest.mark.parametrize("call_pairs", [0, 10**9])
def test_how_trees_are_grouped_changes_nothing(monkeypatch, call_pairs):
    monkeypatch.setattr(attention, "CALL_PAIRS", call_pairs)
    spans, length = stream(SHAPES["far apart"])
    assert len(Trees.of(spans).groups) == (1 if call_pairs else len(spans))
    close_to_dense(spans, length, 1e-14)


trees = st.tuples(st.integers(1, 12), st.lists(st.integers(0, 9), max_size=4).map(tuple))


@settings(max_examples=60, deadline=None)
@given(st.lists(trees, min_size=1, max_size=6), st.sampled_from([0, 50, 3000]))
def test_any_trees_in_any_groups(shapes, call_pairs):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "CALL_PAIRS", call_pairs)
        close_to_dense(*stream(shapes), 1e-13)


@settings(max_examples=60, deadline=None)
@given(st.lists(trees, min_size=1, max_size=9))
def test_every_position_has_one_slot(shapes):
    spans, length = stream(shapes)
    planned = Trees.of(spans)
    order = torch.cat([p.flatten() for g in planned.groups for p in (g.prompt_TP, g.answers_TKN)])
    assert planned.slots_L.shape == (length,)
    assert torch.equal(order[planned.slots_L], torch.arange(length))


def test_a_flat_batch_has_the_mask_of_its_trees():
    """The dense mask that a batch describes is the one that its spans mean."""
    rows = token_rows(5)
    batch = flat_rows(rows, 0)
    shapes = [(len(row.prompt_ids), [len(answer) - 1 for answer in row.answers_ids]) for row in rows]
    assert torch.equal(batch.attention_mask()[0, 0], mask(*stream(shapes)))
    assert batch.padding_fraction == 0 and batch.input_ids.shape == (1, sum(row.positions for row in rows))


def test_what_it_does_not_know_it_refuses():
    """A cap or a sink would be left out in silence; the model then takes the dense mask."""
    for option in ({"softcap": 2.0}, {"s_aux": torch.zeros(4)}, {"is_causal": False}):
        with pytest.raises(NotImplementedError):
            attention.attend(
                None, *[torch.zeros(1, 4, 5, 8)] * 3, None, Trees.of([Span(start=0, prompt=5, answers=())]), **option
            )


def test_a_model_that_learned_through_it_still_generates_and_is_saved_without_it(tmp_path):
    model, untouched = tiny().eval(), tiny().eval()
    LogpModel(model)
    prompt = torch.tensor([[5, 6, 7, 8], [0, 0, 9, 3]])
    inputs = {"input_ids": prompt, "attention_mask": (prompt != 0).long(), "max_new_tokens": 6, "do_sample": False}
    assert torch.equal(model.generate(**inputs), untouched.generate(**inputs))
    model.save_pretrained(tmp_path)
    assert attention.NAME not in (tmp_path / "config.json").read_text()
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config._attn_implementation == "sdpa"


@pytest.mark.parametrize("precision", ["medium", "bf16"])
def test_in_low_precision_it_is_as_near_as_the_dense_mask(precision):
    """Root mean square error against float32, over ten models: rounding differs, its size does not."""
    rows = token_rows(6)
    error = {"flat": 0.0, "shared": 0.0}
    for seed in range(10):
        model = lambda: tiny(seed=seed, hidden_size=64, head_dim=16)  # noqa: B023
        truth = LogpModel(model(), layout="padded")
        with torch.no_grad():
            exact = truth(truth.batch(rows, 0)).sum_A
            with numerics(precision, torch.device("cpu")):
                for layout in error:
                    module = LogpModel(model(), layout=layout)
                    error[layout] += float((module(module.batch(rows, 0)).sum_A - exact).square().sum())
    assert error["shared"] > 0 and error["flat"] ** 0.5 <= 1.2 * error["shared"] ** 0.5
