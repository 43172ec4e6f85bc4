"""Models on disk: what is saved loads again; pickles, strangers and mismatches are refused in words."""

import json

import pytest
import torch
from test_rendering import tokenizer
from test_scoring import tiny, token_rows
from transformers import LlamaForSequenceClassification

from rankwise.checkpoints import (
    check_vocabulary,
    load_causal_lm,
    load_reward_model,
    load_state,
    load_tokenizer,
    new_reward_model,
    numerics,
    save_model,
    save_state,
)
from rankwise.scoring import LogpModel
from rankwise.types import UserError


@pytest.fixture
def folder(tmp_path):
    save_model(tiny(), tokenizer(), tmp_path / "model")
    return tmp_path / "model"


def scores(model) -> torch.Tensor:
    module = LogpModel(model.eval())
    return module(module.batch(token_rows(), 0)).sum_A


def test_a_saved_model_gives_the_same_numbers(folder):
    assert torch.equal(scores(load_causal_lm(folder)), scores(tiny()))
    assert load_tokenizer(folder)("abc")["input_ids"] == tokenizer()("abc")["input_ids"]


def test_weights_are_loaded_in_single_precision(folder, tmp_path):
    save_model(tiny().bfloat16(), tokenizer(), tmp_path / "half")
    assert {p.dtype for p in load_causal_lm(tmp_path / "half").parameters()} == {torch.float32}


def test_adapters_are_merged_when_saved(tmp_path):
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj"]))
    for name, p in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.2)
    adapted = scores(model)
    save_model(model, tokenizer(), tmp_path / "merged")
    torch.testing.assert_close(scores(load_causal_lm(tmp_path / "merged")), adapted, rtol=1e-5, atol=1e-4)
    assert (adapted - scores(tiny())).abs().max() > 0.01


def test_pickled_weights_are_refused(folder):
    torch.save(tiny().state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match=r"\.bin files are pickles and are refused"):
        load_causal_lm(folder)


def test_a_folder_that_is_no_model_is_refused(tmp_path, folder):
    with pytest.raises(UserError, match="not a usable model"):
        load_causal_lm(tmp_path)
    with pytest.raises(UserError, match="no usable tokenizer"):
        load_tokenizer(tmp_path)
    (folder / "model.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(UserError, match="not a usable model"):
        load_causal_lm(folder)


def test_weights_of_another_shape_than_the_config_are_refused(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "intermediate_size": 96}))
    with pytest.raises(UserError, match="not a usable model"):
        load_causal_lm(folder)


def test_a_tokenizer_without_eos_is_refused(tmp_path):
    tokenizer(eos=None).save_pretrained(tmp_path / "tokenizer")
    with pytest.raises(UserError, match="no EOS token"):
        load_tokenizer(tmp_path / "tokenizer")


def test_a_vocabulary_larger_than_the_model_is_refused():
    made = tokenizer()
    with pytest.raises(UserError, match=f"the tokenizer has {len(made)} tokens, the model embeds 61"):
        check_vocabulary(tiny(), made, where="here")
    check_vocabulary(tiny(vocab_size=len(made)), made, where="here")
    check_vocabulary(tiny(vocab_size=len(made) + 7), made, where="here")  # rows added for speed are harmless


def test_dropout_is_off_after_loading(tmp_path):
    save_model(tiny("gpt2", resid_pdrop=0.5, attn_pdrop=0.5, embd_pdrop=0.5), tokenizer(), tmp_path / "model")
    model = load_causal_lm(tmp_path / "model").train()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(model(ids).logits, model(ids).logits)
    save_model(tiny(attention_dropout=0.5), tokenizer(), tmp_path / "llama")
    model = load_causal_lm(tmp_path / "llama").train()
    assert torch.equal(model(ids).logits, model(ids).logits)


def test_a_new_reward_model_scores_all_alike_and_has_one_output(folder, tmp_path):
    model = new_reward_model(folder, load_tokenizer(folder), seed=0)
    assert isinstance(model, LlamaForSequenceClassification)
    assert (model(torch.arange(3, 12)[None]).logits == 0).all()
    save_model(model, tokenizer(), tmp_path / "reward")
    assert load_reward_model(tmp_path / "reward").config.num_labels == 1
    with pytest.raises(UserError, match="one output, this one has 2"):
        load_reward_model(folder)


def test_state_comes_back_bit_for_bit(tmp_path):
    tensors = {"w": torch.randn(3, 4).T, "step": torch.tensor(7.0), "h": torch.randn(5).bfloat16()}
    save_state(tmp_path / "s.safetensors", tensors, {"step": 7, "points": [{"loss": 0.1}]})
    back, notes = load_state(tmp_path / "s.safetensors")
    assert all(torch.equal(back[name], tensors[name]) for name in tensors) and set(back) == set(tensors)
    assert notes == {"step": 7, "points": [{"loss": 0.1}]}


def test_precision_is_put_back_even_after_an_error():
    before = torch.get_float32_matmul_precision()
    for precision in ("medium", "bf16", "fp32"):
        with pytest.raises(RuntimeError), numerics(precision, torch.device("cpu")):
            raise RuntimeError
        assert torch.get_float32_matmul_precision() == before and not torch.is_autocast_enabled("cpu")
