"""Counted FLOPs are those that torch counts while it runs, and closed forms where it counts otherwise."""

import itertools

import pytest
import torch
import transformers
from test_scoring import COMMON, SHARING, tiny, token_rows
from torch.utils.flop_counter import FlopCounterMode

from rankwise.batching import shared_rows
from rankwise.flops import attended_pairs, forward_flops, forward_parts, step_flops
from rankwise.rendering import TokenRow
from rankwise.types import UserError

SIZES = {k: v for k, v in COMMON.items() if k != "head_dim"}
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 99}


def one_answer(prompt: int, answer: int) -> TokenRow:
    return TokenRow(id="one", prompt_ids=(1,) * prompt, answers_ids=((2,) * answer,))


def torch_counts(run) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@pytest.mark.parametrize("name", SHARING)
def test_one_sequence_costs_what_torch_counts(name):
    """Without sharing: one prompt, one answer, the model's own forward.

    Torch multiplies every pair of the L × L attention matrix and every position by the head; what a causal model
    with its head at answer tokens cannot do without is less, by terms known exactly.
    """
    model = tiny(name, attn_implementation="eager")
    prompt, answer = 9, 6
    length = prompt + answer - 1
    parts = forward_parts(model.config, [one_answer(prompt, answer)])
    square = parts.attention * 2 * length // (length + 1)  # L² pairs instead of L(L+1)/2
    everywhere = parts.head * length // answer
    counted = torch_counts(lambda: model(input_ids=torch.ones(1, length, dtype=torch.int64), use_cache=False))
    assert counted == parts.linear + square + everywhere


@pytest.mark.parametrize("name", ["llama", "gemma3", "gpt2"])
def test_a_step_is_three_forward_passes(name):
    """Each product has two gradients of its own cost: torch counts them in the backward pass too.

    The first layer's input needs none where nothing below it is a product, so torch counts no less than three times.
    """
    model = tiny(name, attn_implementation="eager")
    ids = torch.ones(1, 14, dtype=torch.int64)
    forward = torch_counts(lambda: model(input_ids=ids, use_cache=False))
    both = torch_counts(lambda: model(input_ids=ids, use_cache=False).logits.sum().backward())
    assert both == 3 * forward
    rows = token_rows()
    assert step_flops(model.config, rows) == 3 * forward_flops(model.config, rows)


def test_rows_cost_what_their_layout_computes():
    """Positions are those of the shared layout, and pairs are the True entries of its mask."""
    config = transformers.LlamaConfig(**COMMON)
    rows = token_rows(9)
    batch = shared_rows(rows, 0)
    seen = int((batch.attention_mask() & (batch.tree >= 0)[:, None, :, None]).sum())
    assert sum(map(attended_pairs, rows)) == seen
    parts = forward_parts(config, rows)
    heads, head_dim, layers = 4, 8, 2
    assert parts.attention == 4 * heads * head_dim * layers * seen
    assert parts.linear % int((batch.tree >= 0).sum()) == 0
    assert parts.head == 2 * config.vocab_size * config.hidden_size * len(batch.target_ids)
    assert parts.total == sum(forward_flops(config, [row]) for row in rows)


@pytest.mark.parametrize("window", [1, 3, 8, 100])
def test_a_window_hides_what_lies_before_it(window):
    """Against a count by hand over every pair of every path; the prompt's own pairs count once."""
    row = token_rows(1, answers=(3,), longest=9, prompt=7)[0]
    prompt = len(row.prompt_ids)

    def pairs(places) -> int:
        return sum(q - window < k <= q for q, k in itertools.product(places, range(prompt + 9)))

    by_hand = pairs(range(prompt)) + sum(pairs(range(prompt, prompt + len(a) - 1)) for a in row.answers_ids)
    assert attended_pairs(row, window) == by_hand


def test_layers_with_a_window_cost_less():
    settings = {**COMMON, "sliding_window": 4, "num_hidden_layers": 6}
    local = transformers.Gemma3TextConfig(**settings)  # five local layers, then a global one
    row = one_answer(10, 5)
    everywhere, near = attended_pairs(row), attended_pairs(row, 4)
    assert forward_parts(local, [row]).attention == 4 * 4 * 8 * (5 * near + everywhere)


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda: transformers.MixtralConfig(**SIZES, num_local_experts=4), "dense transformers only"),
        (
            lambda: transformers.MambaConfig(**SMALL),
            "dense transformers only",
        ),
        (
            lambda: transformers.RwkvConfig(**SMALL),
            "dense transformers only",
        ),
        (lambda: transformers.BertConfig(**SIZES), "no causal LM"),
        (lambda: transformers.T5Config(), "no causal LM"),
    ],
    ids=["experts", "state space", "recurrent", "encoder", "encoder and decoder"],
)
def test_an_architecture_that_cannot_be_counted_is_refused(make, words):
    with pytest.raises(UserError, match=words):
        forward_flops(make(), token_rows())


def test_an_encoder_configured_as_a_decoder_is_counted():
    assert forward_flops(transformers.BertConfig(**SIZES, is_decoder=True), token_rows()) > 0
