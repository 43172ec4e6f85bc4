"""What a model learns from a batch: SFT, preferences, or a reward; three small learners for one training loop.

Each names its module (what runs under autograd, and what distributed wrappers wrap), lays rows out, and turns
the module's output into one loss a row. All ranking losses are objectives.preference_loss.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from rankwise.batching import Batch, micro_batches
from rankwise.checkpoints import Precision, numerics
from rankwise.objectives import (
    Loss,
    implicit_rewards,
    length_normalised,
    margin,
    preference_loss,
    ranking_accuracy,
    sft_loss,
)
from rankwise.rendering import TokenRow
from rankwise.rewards import RewardModel, ScoreBatch
from rankwise.scoring import AnswerLogps, LogpModel


@dataclass(frozen=True, kw_only=True)
class RowLosses:
    """What a batch's rows lost, [B] each, in the batch's order."""

    ids: tuple[str, ...]
    loss_B: Tensor
    stats: Mapping[str, Tensor]  # name -> [B], for the records; averaged over prompts


class Learner(Protocol):
    """What the training loop needs to know."""

    module: nn.Module

    @property
    def identity(self) -> Mapping[str, str]:
        """Settings on which the loss depends, by name; a checkpoint of others is not continued."""

    def collate(self, rows: list[TokenRow]) -> Any: ...

    def cost(self, rows: list[TokenRow]) -> float:
        """Positions that the module computes for rows that are collated together, padding included."""

    def weight(self, row: TokenRow) -> float:
        """How much a row counts in the mean: tokens for SFT, one a prompt for preferences."""

    def losses(self, output: Any, batch: Any) -> RowLosses: ...


def measure(learner: Learner, rows: Sequence[TokenRow], *, max_tokens: int, precision: Precision) -> dict[str, float]:
    """Loss (a weighted mean, as in training) and stats (means over rows) of rows that are not trained on."""
    losses = weight = 0.0
    stats: dict[str, float] = {}
    where = next(learner.module.parameters()).device
    # not inference_mode: sharded layers could not be put together again outside of it
    with torch.no_grad(), numerics(precision, where):
        for part in micro_batches(rows, max_tokens=max_tokens, cost=learner.cost):
            batch = learner.collate(part).to(where)
            result = learner.losses(learner.module(batch), batch)
            losses += float(result.loss_B.double().sum())
            weight += sum(map(learner.weight, part))
            for name, values_B in result.stats.items():
                stats[name] = stats.get(name, 0.0) + float(values_B.double().sum())
    return {"loss": losses / weight, **{name: value / len(rows) for name, value in stats.items()}}


class SftLearner:
    """Supervised fine-tuning on answers (E11): the token mean of −log π(y|x)."""

    identity: Mapping[str, str] = {}

    def __init__(self, model: LogpModel, pad_id: int):
        self.module, self._pad_id = model, pad_id

    def collate(self, rows: list[TokenRow]) -> Batch:
        return self.module.batch(rows, self._pad_id)

    def cost(self, rows: list[TokenRow]) -> float:
        return self.module.cost(rows)

    def weight(self, row: TokenRow) -> float:
        return float(sum(map(len, row.answers_ids)))

    def losses(self, output: AnswerLogps, batch: Batch) -> RowLosses:
        logp_BK, tokens_BK = batch.by_prompt(output.sum_A), batch.by_prompt(output.tokens_A)
        return RowLosses(ids=batch.ids, loss_B=sft_loss(logp_BK, tokens_BK, batch.mask_BK), stats={})


@dataclass(frozen=True, kw_only=True)
class PreferenceSettings:
    """How log-ratios become a loss."""

    beta: float = 0.1  # strength of the KL term; higher keeps the policy closer to the reference
    loss: Loss = "plackett_luce"
    label_smoothing: float = 0.0  # probability that a ranking is the wrong way round
    unlikelihood: float = 0.0  # weight of the worse answers in the loss "likelihood"
    length_normalised: bool = False  # log-ratios per token, so that longer answers earn no margin by length

    def rewards(self, policy_BK: Tensor, reference_BK: Tensor, tokens_BK: Tensor, mask_BK: Tensor) -> Tensor:
        """The implicit rewards that the loss compares, [B, K], β·nats, of summed log-probabilities."""
        # The likelihood of an answer is a sum, whatever log-ratios are compared by.
        if self.length_normalised and self.loss != "likelihood":
            return self.beta * length_normalised(policy_BK - reference_BK, tokens_BK, mask_BK)
        return implicit_rewards(policy_BK, reference_BK, self.beta)

    def losses(self, s_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None, strengths_BK: Tensor | None) -> Tensor:
        """The loss of each row, [B], nats (of IPO: nats squared)."""
        return preference_loss(
            s_BK,
            mask_BK,
            ranks_BK,
            strengths_BK,
            loss=self.loss,
            label_smoothing=self.label_smoothing,
            beta=self.beta,
            unlikelihood=self.unlikelihood,
        )


class PreferenceLearner:
    """Plackett-Luce DPO (E6) against stored reference log-probabilities; K = 2 is DPO (E5)."""

    def __init__(
        self, model: LogpModel, pad_id: int, references: Mapping[str, Sequence[float]], settings: PreferenceSettings
    ):
        self.module, self._pad_id = model, pad_id
        self._references, self._settings = references, settings
        self.identity = {name: str(value) for name, value in asdict(settings).items()}

    def collate(self, rows: list[TokenRow]) -> Batch:
        return self.module.batch(rows, self._pad_id)

    def cost(self, rows: list[TokenRow]) -> float:
        return self.module.cost(rows)

    def weight(self, row: TokenRow) -> float:
        return 1.0

    def losses(self, output: AnswerLogps, batch: Batch) -> RowLosses:
        policy_BK, reference_BK = batch.by_prompt(output.sum_A), self.reference_logps(batch)
        tokens_BK = batch.by_prompt(output.tokens_A)
        s_BK = self._settings.rewards(policy_BK, reference_BK, tokens_BK, batch.mask_BK)
        ratio_BK = (policy_BK - reference_BK).detach()
        return RowLosses(
            ids=batch.ids, loss_B=self._loss(s_BK, batch), stats=self._stats(s_BK.detach(), ratio_BK, batch)
        )

    def loss_at_start(self, batch: Batch) -> Tensor:
        """The loss of each row while policy = reference, [B]: log K! for a strict ranking without smoothing."""
        return self._loss(torch.zeros(batch.mask_BK.shape, device=batch.mask_BK.device), batch)

    def _loss(self, s_BK: Tensor, batch: Batch) -> Tensor:
        return self._settings.losses(s_BK, batch.mask_BK, batch.ranks_BK, batch.strengths_BK)

    def reference_logps(self, batch: Batch) -> Tensor:
        """[B, K] float32 reference log-probabilities, zero where no answer exists."""
        width, device = batch.mask_BK.shape[1], batch.mask_BK.device
        padded = [[*self._references[i], *[0.0] * (width - len(self._references[i]))] for i in batch.ids]
        return torch.tensor(padded, dtype=torch.float32, device=device)

    def _stats(self, s_BK: Tensor, ratio_BK: Tensor, batch: Batch) -> dict[str, Tensor]:
        last_B1 = batch.mask_BK.sum(1, keepdim=True) - 1
        return {
            "margin": margin(s_BK, batch.mask_BK),
            "accuracy": ranking_accuracy(s_BK, batch.mask_BK, batch.ranks_BK),
            "chosen_logp_change": ratio_BK[:, 0],
            "rejected_logp_change": ratio_BK.gather(1, last_B1)[:, 0],
            # E_{y~π_ref} log(π_ref/π): a KL where the answers were drawn from the reference, as rollouts are
            "kl_from_reference": -(ratio_BK * batch.mask_BK).sum(1) / batch.mask_BK.sum(1),
        }


class RewardLearner:
    """A reward model from ranked answers: Bradley-Terry (E4) at K = 2, Plackett-Luce above."""

    identity: Mapping[str, str] = {}

    def __init__(self, model: RewardModel, pad_id: int):
        self.module, self._pad_id = model, pad_id

    def collate(self, rows: list[TokenRow]) -> ScoreBatch:
        return self.module.batch(rows, self._pad_id)

    def cost(self, rows: list[TokenRow]) -> float:
        return self.module.cost(rows)

    def weight(self, row: TokenRow) -> float:
        return 1.0

    def losses(self, output: Tensor, batch: ScoreBatch) -> RowLosses:
        score_BK = batch.by_prompt(output)
        stats = {
            "margin": margin(score_BK.detach(), batch.mask_BK),
            "accuracy": ranking_accuracy(score_BK.detach(), batch.mask_BK, batch.ranks_BK),
        }
        return RowLosses(ids=batch.ids, loss_B=preference_loss(score_BK, batch.mask_BK, batch.ranks_BK), stats=stats)
