"""A scalar reward for whole answers: any sequence-classification checkpoint over prompt + answer tokens.

Letters: A answers, L positions, B prompts, K answers a prompt.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from rankwise.batching import AnswerBatch, answer_grid, strength_grid
from rankwise.rendering import TokenRow


@dataclass(frozen=True, kw_only=True)
class ScoreBatch(AnswerBatch):
    """Answers as padded rows of prompt + answer tokens."""

    input_ids: Tensor  # [A, L] int64, padded on the right
    attention_mask: Tensor  # [A, L] int64

    @property
    def padding_fraction(self) -> float:
        return 1.0 - float(self.attention_mask.float().mean())


class RewardModel(nn.Module):
    """r(x, y) of each answer of a batch, [A] float32."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def batch(self, rows: Sequence[TokenRow], pad_id: int) -> ScoreBatch:
        """Each answer behind its prompt, whole, padded on the right."""
        paths = [[*row.prompt_ids, *answer] for row in rows for answer in row.answers_ids]
        longest = max(map(len, paths))
        mask_BK, ranks_BK = answer_grid(rows)
        return ScoreBatch(
            ids=tuple(row.id for row in rows),
            input_ids=torch.tensor([path + [pad_id] * (longest - len(path)) for path in paths]),
            attention_mask=torch.tensor([[1] * len(path) + [0] * (longest - len(path)) for path in paths]),
            answer_rows=torch.tensor([b for b, row in enumerate(rows) for _ in row.answers_ids]),
            answer_slots=torch.tensor([k for row in rows for k in range(len(row.answers_ids))]),
            ranks_BK=ranks_BK,
            mask_BK=mask_BK,
            strengths_BK=strength_grid(rows),
        )

    def cost(self, rows: Sequence[TokenRow]) -> int:
        """Positions that a forward pass over rows computes: every answer whole, padded to the longest."""
        return sum(len(row.answers_ids) for row in rows) * (max(row.longest_path for row in rows) + 1)

    def forward(self, batch: ScoreBatch) -> Tensor:
        """Scores, [A]: of a decoder, read at each answer's last token; of an encoder, as its own head pools them."""
        if not hasattr(self.model, "score"):
            return self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits[:, 0].float()
        # The mask says where an answer ends; looking for the pad token, as the library does, fails when pad = EOS.
        hidden_ALH = getattr(self.model, self.model.base_model_prefix)(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
        last_A = batch.attention_mask.sum(1) - 1
        hidden_AH = hidden_ALH[torch.arange(len(last_A), device=last_A.device), last_A]
        # A copy: FSDP2 hangs its backward on what comes out, and warns of a view.
        return self.model.score(hidden_AH)[:, 0].float().clone()
