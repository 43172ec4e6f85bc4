"""Models of common sizes, as the configurations that transformers makes them from."""

from __future__ import annotations

from typing import Any

_LLAMA = {"model_type": "llama", "max_position_embeddings": 8192}
_QWEN = {"model_type": "qwen2", "max_position_embeddings": 32768, "tie_word_embeddings": True, "vocab_size": 151936}
_SIZES = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
PRESETS: dict[str, dict[str, Any]] = {
    "llama-15m": {**_LLAMA, **dict(zip(_SIZES, (288, 768, 6, 6, 6))), "vocab_size": 32000, "tie_word_embeddings": True},
    "qwen-0.5b": {**_QWEN, **dict(zip(_SIZES, (896, 4864, 24, 14, 2)))},
    "qwen-1.5b": {**_QWEN, **dict(zip(_SIZES, (1536, 8960, 28, 12, 2)))},
    "llama-8b": {**_LLAMA, **dict(zip(_SIZES, (4096, 14336, 32, 32, 8))), "vocab_size": 128256},
}
