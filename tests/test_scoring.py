"""log π(y|x) by any architecture: shared prompts, padded rows and one sequence at a time give the same numbers.

`tiny` and `token_rows` serve other test files too.
"""

import logging
from dataclasses import replace

import pytest
import torch
import transformers
from transformers import AutoModelForCausalLM

from rankwise.batching import flat_rows, micro_batches, padded_rows, shared_rows
from rankwise.objectives import plackett_luce
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel
from rankwise.types import UserError

# Tensors of a few numbers: threads would only wait for one another.
torch.set_num_threads(1)

VOCABULARY = 61
# Wide initial weights, so that a wrong mask or position moves the numbers far beyond rounding.
COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 128,
    "initializer_range": 0.2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
SHARING = {
    "llama": ("LlamaConfig", COMMON),
    "llama-tied": ("LlamaConfig", {**COMMON, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", COMMON),
    "mistral-window": ("MistralConfig", {**COMMON, "sliding_window": 64}),
    "gemma": ("GemmaConfig", COMMON),
    "gemma2-softcap": ("Gemma2Config", {**COMMON, "final_logit_softcapping": 2.0, "sliding_window": 64}),
    "gemma3": ("Gemma3TextConfig", {**COMMON, "sliding_window": 64}),
    "gpt2": ("GPT2Config", GPT2),
    "phi": ("PhiConfig", {k: v for k, v in COMMON.items() if k != "head_dim"}),  # its head has a bias
    "granite": ("GraniteConfig", {**COMMON, "logits_scaling": 4.0}),
    "cohere": ("CohereConfig", {**COMMON, "logit_scale": 0.25}),
}
DENSE = {"gemma2-softcap"}  # shares prompts under a dense mask only
ALONE = {
    "mamba": (
        "MambaConfig",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": 32,
            "num_hidden_layers": 2,
            "state_size": 4,
            "initializer_range": 0.2,
        },
    ),
    "bloom": (
        "BloomConfig",
        {"vocab_size": VOCABULARY, "hidden_size": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2},
    ),
}


def tiny(name: str = "llama", seed: int = 0, **overrides) -> transformers.PreTrainedModel:
    """A random model of an architecture, a few thousand weights, evaluation mode."""
    kind, settings = {**SHARING, **ALONE}[name]
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**settings, **overrides})).eval()


def token_rows(
    count: int = 6, *, answers=(2, 3, 4), longest: int = 7, prompt: int = 6, seed: int = 0
) -> list[TokenRow]:
    """Rows of random tokens: ragged K, ragged lengths, best answer first."""
    generator = torch.Generator().manual_seed(seed)
    draw = lambda n: tuple(torch.randint(3, VOCABULARY, (n,), generator=generator).tolist())
    size = lambda most: int(torch.randint(1, most + 1, (1,), generator=generator))
    rows = []
    for i in range(count):
        k = answers[i % len(answers)]
        texts = tuple((*draw(size(longest) - 1), 2) for _ in range(k))
        rows.append(
            TokenRow(id=f"row-{i:02}", prompt_ids=(1, *draw(size(prompt))), answers_ids=texts, ranks=tuple(range(k)))
        )
    return rows


def alone(model: torch.nn.Module, rows: list[TokenRow]) -> list[torch.Tensor]:
    """The textbook: one unpadded sequence at a time, all logits, log-softmax, sum over the answer."""
    out = []
    for row in rows:
        for answer in row.answers_ids:
            whole = torch.tensor([[*row.prompt_ids, *answer]])
            logits = model(input_ids=whole, use_cache=False).logits[0].float()
            logps = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            out.append(logps.gather(1, whole[0, len(row.prompt_ids) :, None]).sum())
    return out


def ranking_loss(sum_A: torch.Tensor, rows: list[TokenRow]) -> torch.Tensor:
    """E6 over rows whose answers' log-probabilities lie one after another."""
    losses, start = [], 0
    for row in rows:
        s = 0.3 * sum_A[start : start + len(row.answers_ids)][None]
        losses.append(plackett_luce(s, torch.ones_like(s, dtype=torch.bool)))
        start += len(row.answers_ids)
    return torch.cat(losses).mean()


def gradients(model: torch.nn.Module, loss: torch.Tensor) -> torch.Tensor:
    """All gradients as one vector."""
    model.zero_grad()
    loss.backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])


def same(model: torch.nn.Module, rows: list[TokenRow], batch) -> None:
    """A laid-out batch has the loss and the gradients of one sequence at a time."""
    expected = ranking_loss(torch.stack(alone(model, rows)), rows)
    expected_gradient = gradients(model, expected)
    layout = "flat" if batch.trees else "shared" if batch.is_tree else "padded"
    output = LogpModel(model, layout=layout)(batch)
    loss = ranking_loss(output.sum_A, rows)
    gradient = gradients(model, loss)
    assert abs(loss.item() - expected.item()) <= 2e-6 * abs(expected.item())
    assert (gradient - expected_gradient).norm() <= 5e-6 * expected_gradient.norm()
    assert output.tokens_A.tolist() == [len(answer) for row in rows for answer in row.answers_ids]


@pytest.mark.parametrize("layout", [flat_rows, shared_rows, padded_rows])
@pytest.mark.parametrize("name", SHARING)
def test_every_layout_has_the_loss_and_gradients_of_one_sequence_at_a_time(name, layout):
    if name in DENSE and layout is flat_rows:
        pytest.skip("its attention caps scores, which attention over trees refuses")
    rows = token_rows()
    same(tiny(name), rows, layout(rows, 0))


@pytest.mark.parametrize("name", SHARING)
def test_these_architectures_share_their_prompts(name, caplog):
    model = LogpModel(tiny(name))
    assert model.layout == ("shared" if name in DENSE else "flat") and not caplog.records
    assert model.batch(token_rows(), 0).is_tree


@pytest.mark.parametrize("name", ALONE)
def test_a_model_that_cannot_share_pads_says_so_and_is_right(name, caplog):
    model = tiny(name)
    with caplog.at_level(logging.WARNING, logger="rankwise"):
        module = LogpModel(model)
    assert module.layout == "padded"
    assert "cannot share a prompt" in caplog.text and type(model).__name__ in caplog.text
    batch = module.batch(token_rows(), 0)
    assert not batch.is_tree
    same(model, token_rows(), batch)


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("JambaConfig", {}),
        ("Lfm2Config", {"num_hidden_layers": 3, "layer_types": ["conv", "full_attention", "conv"]}),
    ],
)
def test_a_model_that_mixes_neighbours_is_found_before_it_is_trained(kind, settings):
    """With small fresh weights the leak from answer to answer is below any tolerance on sums, and grows later."""
    common = {**{k: v for k, v in COMMON.items() if k != "head_dim"}, "initializer_range": 0.02}
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**{**common, **settings})).eval()
    assert LogpModel(model).layout == "padded"


def scaled(kind: str) -> transformers.PreTrainedModel:
    """A Llama whose rotary table changes beyond 16 positions."""
    rope = {"rope_type": kind, "rope_theta": 1e4, "factor": 8.0}
    if kind == "longrope":
        rope |= {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "original_max_position_embeddings": 16}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**{**COMMON, "max_position_embeddings": 16, "rope_parameters": rope})
    return AutoModelForCausalLM.from_config(config).eval()


def test_a_rotary_table_is_that_of_the_row_whoever_shares_its_batch():
    """Long and short rows go apart, and each row's numbers are those of a batch of its own."""
    module = LogpModel(scaled("longrope"))
    rows = token_rows(longest=4, prompt=4) + [replace(r, id=f"long-{r.id}") for r in token_rows(longest=20, prompt=10)]
    assert len({row.longest_path > 16 for row in rows}) == 2
    with pytest.raises(UserError, match="both sides of 16 positions"):
        module.batch(rows, 0)
    own = {row.id: module(module.batch([row], 0)).sum_A for row in rows}
    parts = micro_batches(rows, max_tokens=10_000, cost=module.cost)
    assert 1 < len(parts) < len(rows)
    for part in parts:
        together = module(module.batch(part, 0)).sum_A
        torch.testing.assert_close(together, torch.cat([own[row.id] for row in part]), rtol=0, atol=2e-5)


def test_a_rotary_table_that_remembers_is_refused():
    module = LogpModel(scaled("dynamic"))
    assert module.batch(token_rows(longest=4, prompt=4), 0)
    long = max(token_rows(longest=20, prompt=10), key=lambda row: row.longest_path)
    with pytest.raises(UserError, match=f"longer than 16 positions: {long.id}"):
        module.batch([long], 0)


def test_another_attention_after_the_choice_is_told():
    model = tiny()
    module = LogpModel(model)
    batch = module.batch(token_rows(), 0)
    model.set_attn_implementation("sdpa")
    with pytest.raises(UserError, match="make a new LogpModel"):
        module(batch)


def test_an_answer_without_a_token_is_named():
    row = TokenRow(id="row-7", prompt_ids=(1, 2), answers_ids=((), (4, 5)), ranks=(0, 1))
    for layout in (flat_rows, shared_rows, padded_rows):
        with pytest.raises(UserError, match="row-7"):
            layout([row], 0)


def test_asking_leaves_the_mode_of_the_model_alone():
    for training in (True, False):
        model = tiny().train(training)
        LogpModel(model)
        assert model.training is training and all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_is_right(implementation):
    model = tiny(attn_implementation=implementation)
    module = LogpModel(model)
    same(model, token_rows(), module.batch(token_rows(), 0))


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-softcap", "gemma3"])
def test_rows_longer_than_the_window_are_padded_and_right(name):
    """The model's own mask hides what is out of the window; rows within it go on sharing."""
    model = tiny(name, sliding_window=12)
    module = LogpModel(model)
    long, short = token_rows(longest=20, prompt=10), token_rows(longest=4, prompt=4)
    assert max(row.longest_path for row in long) > 12 >= max(row.longest_path for row in short)
    assert not module.batch(long, 0).is_tree and module.batch(short, 0).is_tree
    same(model, long, module.batch(long, 0))
    same(model, short, module.batch(short, 0))
    windowless = tiny(name, sliding_window=128)
    far = ranking_loss(torch.stack(alone(windowless, long)), long) - ranking_loss(torch.stack(alone(model, long)), long)
    assert abs(far.item()) > 1e-4  # the window does matter here


def test_a_window_counted_in_places_of_the_row_limits_the_whole_tree():
    """GPT-Neo hides what is 16 places back in the tensor row, whatever the position ids say."""
    config = transformers.GPTNeoConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        num_layers=2,
        num_heads=4,
        attention_types=[[["global", "local"], 1]],
        window_size=16,
        max_position_embeddings=128,
        initializer_range=0.2,
    )
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config).eval()
    module = LogpModel(model)
    rows = token_rows(answers=(4,), longest=8, prompt=6)
    assert max(row.longest_path for row in rows) <= 16 < max(row.positions for row in rows)
    assert not module.batch(rows, 0).is_tree and module.batch(token_rows(longest=3, prompt=4), 0).is_tree
    same(model, rows, module.batch(rows, 0))


def test_adapters_are_part_of_the_model():
    """LoRA through peft: numbers and gradients are those of the adapted model, and its frozen weights get none."""
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"]))
    plain = alone(tiny(), token_rows())
    torch.manual_seed(1)
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    module = LogpModel(model)
    assert module.layout == "flat"
    same(model, token_rows(), module.batch(token_rows(), 0))
    adapted = module(module.batch(token_rows(), 0)).sum_A
    assert (adapted - torch.stack(plain)).abs().max() > 0.01
    assert all(("lora_" in name) == (p.grad is not None) for name, p in model.named_parameters())


def test_gradient_checkpointing_changes_nothing():
    rows = token_rows()
    model = tiny().train()
    module = LogpModel(model)
    without = gradients(model, ranking_loss(module(module.batch(rows, 0)).sum_A, rows))
    model.activation_checkpointing_enable({"use_reentrant": False})
    torch.testing.assert_close(
        gradients(model, ranking_loss(module(module.batch(rows, 0)).sum_A, rows)), without, rtol=0, atol=0
    )


def test_the_pad_token_never_shows():
    module = LogpModel(tiny())
    rows = token_rows()
    for layout in (shared_rows, padded_rows):
        assert torch.equal(module(layout(rows, 0)).sum_A, module(layout(rows, 2)).sum_A)


def test_under_autocast_the_sums_are_single_precision_and_near():
    module = LogpModel(tiny(), layout="shared")
    batch = module.batch(token_rows(), 0)
    exact = module(batch).sum_A
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rounded = module(batch).sum_A
    assert rounded.dtype == torch.float32
    per_token = (rounded - exact).abs() / batch.answer_tokens
    assert 0 < per_token.max() < 0.2


def test_a_model_whose_logits_are_made_otherwise_is_refused():
    """Not even padded rows would be right: a head scaled in a way that the configuration does not tell."""
    model = tiny()
    own = model.forward
    model.forward = lambda *given, **named: _scaled(own(*given, **named))
    with pytest.raises(UserError, match="differ from those of its own logits"):
        LogpModel(model)


def _scaled(output):
    output.logits = output.logits * 0.5
    return output
