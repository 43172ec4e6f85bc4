"""The model of a case, with random weights that are the same on both sides."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from benchmarks.workload import EOS, PAD, Case

_WORDS = {PAD: "<pad>", EOS: "</s>"}
LIVELIER = 3.0  # times the scale that weights begin with, for rollouts


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


@torch.no_grad()
def save(case: Case, folder: str | Path) -> None:
    """A model folder to roll out from: the case's Llama and its tokenizer.

    Weights as they begin make all tokens about as likely after any context, so that greedy answers would tell little of
    what an engine does with it. Scaled up, what follows depends on what came before, with logits of about one nat.
    """
    model = build(case, seed=case.seed)
    for weight in model.model.layers.parameters():
        if weight.dim() == 2:
            weight.mul_(LIVELIER)
    model.model.norm.weight.mul_(LIVELIER)
    # Trainers keep no cache; without one generate() would run the whole sequence again for every token.
    model.config.use_cache = model.generation_config.use_cache = True
    model.save_pretrained(folder)
    tokenizer_of(case).save_pretrained(folder)


def text_of(ids: Sequence[int], lead: str = "") -> str:
    """Token ids as text that tokenizer_of reads back."""
    return lead + " ".join(_WORDS.get(i, str(i)) for i in ids)


def tokenizer_of(case: Case) -> PreTrainedTokenizerFast:
    """A word a token, so that the tokenization of others gives back the very ids that we drew."""
    words = {_WORDS.get(i, str(i)): i for i in range(case.shape.vocabulary)}
    made = Tokenizer(WordLevel(words, unk_token="<pad>"))
    made.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=made, pad_token="<pad>", eos_token="</s>")
