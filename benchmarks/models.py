"""The model of a case, with random weights that are the same on both sides."""

from __future__ import annotations

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.workload import EOS, PAD, Case


def config_of(case: Case) -> LlamaConfig:
    """The configuration of the case's Llama."""
    shape = case.shape
    return LlamaConfig(
        hidden_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        intermediate_size=shape.intermediate,
        vocab_size=shape.vocabulary,
        max_position_embeddings=shape.context,
        tie_word_embeddings=shape.tied,
        pad_token_id=PAD,
        eos_token_id=EOS,
        bos_token_id=None,
        use_cache=False,
    )


def build(case: Case, *, seed: int) -> LlamaForCausalLM:
    """The Llama on the case's device; the same seed gives the same weights on the same kind of device."""
    torch.manual_seed(seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16 if case.weights == "bf16" else torch.float32)
    try:
        # Made where it is used: 8 billion parameters are not to pass through the host's memory.
        with torch.device(case.device):
            return LlamaForCausalLM(config_of(case))
    finally:
        torch.set_default_dtype(before)
