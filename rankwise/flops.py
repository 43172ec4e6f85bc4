"""Model FLOPs: the matrix products that a pass over token rows cannot do without, counted, not measured.

A multiply-add is 2 FLOPs. Counted are the linear layers of the body at every position (a prompt once, each answer
without its last token, as batching.shared_rows lays them), attention's two products at every pair of positions that
see one another, and the head at every answer token. Softmax, norms and activations are left out, and so is whatever
a layout or activation checkpointing computes twice: divided by time and by the machine's matmul rate this is model
FLOP utilisation as in PaLM (Chowdhery et al. 2022, appendix B, arxiv.org/abs/2204.02311). Counting weights times
positions, and the backward pass as twice the forward, follows Kaplan et al. 2020 (arxiv.org/abs/2001.08361, 2.1).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from rankwise.rendering import TokenRow
from rankwise.types import UserError

BACKWARD = 2  # a product's two gradients, one for each factor, cost as much as itself


@dataclass(frozen=True, kw_only=True)
class ForwardFlops:
    """FLOPs of one forward pass, by what does them."""

    linear: int  # linear layers of the body
    attention: int  # queries × keys and weights × values
    head: int  # the vocabulary at answer tokens

    @property
    def total(self) -> int:
        return self.linear + self.attention + self.head


def step_flops(config: PreTrainedConfig, rows: Sequence[TokenRow]) -> int:
    """FLOPs of forward and backward over rows, every weight trained; nothing for recomputed activations.

    Raises UserError as forward_parts does.
    """
    return (1 + BACKWARD) * forward_flops(config, rows)


def forward_flops(config: PreTrainedConfig, rows: Sequence[TokenRow]) -> int:
    """FLOPs of one forward pass over rows; raises UserError as forward_parts does."""
    return forward_parts(config, rows).total


def forward_parts(config: PreTrainedConfig, rows: Sequence[TokenRow]) -> ForwardFlops:
    """FLOPs of one forward pass over rows, by part.

    Raises UserError as meta_model does, and for an architecture whose body multiplies by other weights than those of
    linear layers or does not attend (mixtures of experts, state spaces): the count would be wrong in silence.
    """
    model = meta_model(config)
    weights = linear_weights(model)
    text = config.get_text_config()
    if not hasattr(text, "num_attention_heads"):
        raise UserError(
            f"{type(model).__name__}: its configuration names no attention heads, so this is no transformer; FLOPs are "
            "counted for dense transformers only"
        )
    head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    pairs = sum(attended_pairs(row, window) for window in _windows(text) for row in rows)
    head = model.get_output_embeddings().weight.numel()
    return ForwardFlops(
        linear=2 * weights * sum(row.positions for row in rows),
        attention=2 * 2 * text.num_attention_heads * head_dim * pairs,
        head=2 * head * sum(len(answer) for row in rows for answer in row.answers_ids),
    )


def meta_model(config: PreTrainedConfig) -> PreTrainedModel:
    """The model of a configuration without storage: shapes and names, no numbers, no memory.

    Raises UserError where the configuration is not one of a causal LM.
    """
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
    except ValueError as error:
        reason = str(error).strip().splitlines()[0][:200]
        raise UserError(f"{config.model_type}: no causal LM can be made of this configuration ({reason})") from error
    if not _is_causal(model):
        raise UserError(
            f"{config.model_type}: in {type(model).__name__} of this configuration a position sees those after it, so "
            "it is an encoder and no causal LM; give the configuration of a causal LM"
        )
    return model


def _is_causal(model: PreTrainedModel) -> bool:
    """Whether any attention layer looks back only; where none says so, whether the configuration calls it a decoder."""
    said = [module.is_causal for module in model.modules() if hasattr(module, "is_causal")]
    return any(said) if said else getattr(model.config, "is_decoder", None) is not False


def linear_weights(model: PreTrainedModel) -> int:
    """Weights of the body's linear layers, the output head left out; raises UserError where others multiply too."""
    head = model.get_output_embeddings()
    known, count = set(), 0
    for module in model.modules():
        if isinstance(module, nn.Linear | Conv1D | nn.Embedding):
            known.add(id(module.weight))
            if not isinstance(module, nn.Embedding) and module is not head:
                count += module.weight.numel()
    others = [name for name, p in model.named_parameters() if p.dim() >= 2 and id(p) not in known]
    if others:
        raise UserError(
            f"{type(model).__name__}: {others[0]} ({len(others)} such) is no weight of a linear layer, so how often it "
            "multiplies cannot be told from its shape; FLOPs are counted for dense transformers only"
        )
    return count


def attended_pairs(row: TokenRow, window: int | None = None) -> int:
    """Pairs (position, position that it sees) of a row: a prompt sees itself, an answer its prompt and itself.

    window: how many positions, its own included, a position sees at most; None: all before it.
    """
    prompt = _causal(len(row.prompt_ids), window)
    return prompt + sum(
        _causal(len(row.prompt_ids) + len(answer) - 1, window) - prompt for answer in row.answers_ids if answer
    )


def _causal(length: int, window: int | None) -> int:
    beyond = max(0, length - window) if window else 0
    return (length * (length + 1) - beyond * (beyond + 1)) // 2


def _windows(text: PreTrainedConfig) -> list[int | None]:
    """How far each layer sees."""
    window = getattr(text, "sliding_window", None)
    kinds = getattr(text, "layer_types", None) or ["sliding_attention" if window else "full_attention"] * (
        text.num_hidden_layers
    )
    return [window if kind == "sliding_attention" else None for kind in kinds]
