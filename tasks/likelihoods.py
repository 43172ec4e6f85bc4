"""What two models think of the same answers: KL from the policy's own, perplexity of the data's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rankwise.types import Row

if TYPE_CHECKING:
    from rankwise.checkpoints import Precision

MAX_TOKENS = 8192  # token positions a forward pass


@dataclass(frozen=True, kw_only=True)
class Likelihoods:
    """Log-probabilities under one model."""

    logps: list[float]  # Σ log-probs of each row's answer, nats
    tokens: int  # of all answers together, end tokens included

    @property
    def perplexity(self) -> float:
        """A token's, over all answers."""
        return math.exp(-sum(self.logps) / self.tokens)


def likelihoods(
    tables: Sequence[Sequence[Row]], folder: Path, *, max_prompt_tokens: int, precision: Precision
) -> list[Likelihoods]:
    """The first answer of each row of several tables under one model, which is loaded once."""
    import torch

    from rankwise.batching import micro_batches
    from rankwise.checkpoints import device, load_causal_lm, load_tokenizer, numerics
    from rankwise.rendering import Renderer
    from rankwise.scoring import LogpModel

    renderer = Renderer(load_tokenizer(folder), max_prompt_tokens=max_prompt_tokens)
    module = LogpModel(load_causal_lm(folder).to(device())).eval()
    results = []
    for rows in tables:
        rendered, found = [renderer.render(row) for row in rows], {}
        with torch.inference_mode(), numerics(precision, device()):
            for part in micro_batches(rendered, max_tokens=MAX_TOKENS, cost=module.cost):
                sums = module(module.batch(part, 0).to(device())).sum_A.tolist()
                found |= dict(zip((row.id for row in part), sums))
        tokens = sum(len(row.answers_ids[0]) for row in rendered)
        results.append(Likelihoods(logps=[found[row.id] for row in rendered], tokens=tokens))
    return results


def kl(policy: Likelihoods, reference: Likelihoods, *, best_of: int) -> dict[str, Any]:
    """KL(π‖π_ref) a sequence, nats: mean of log π − log π_ref over answers drawn from the policy.

    Choosing the best of N draws has itself a KL to drawing one of at most log N − (N − 1)/N, with equality where no two
    answers tie (Beirami et al. 2024, https://arxiv.org/abs/2401.01879): that much is added to the chosen ones' mean.
    """
    from rankwise.evaluation import mean

    more = math.log(best_of) - (best_of - 1) / best_of
    gaps = [p - r + more for p, r in zip(policy.logps, reference.logps, strict=True)]
    return {**mean(gaps).as_dict(), "per_token": sum(gaps) / policy.tokens}
