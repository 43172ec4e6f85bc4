"""The objective: Plackett-Luce DPO over K ranked answers (E6); K = 2 is DPO. Pure functions of tensors.

Shapes: B prompts, K answers at most (ragged rows are padded, mask_BK says which answers exist).
Answers come best first. Everything is computed in the dtype given, statistics in float32 at least.

References
    E5  Rafailov et al. 2023, "Direct Preference Optimization", eq. 7           https://arxiv.org/abs/2305.18290
    E6  the same, appendix A.3 (Plackett-Luce)
    IPO Azar et al. 2023, eq. 17                                                https://arxiv.org/abs/2310.12036
    label smoothing: Mitchell 2023, "A note on DPO with noisy preferences" (conservative DPO)
    all pairs: Ouyang et al. 2022, eq. 1                                        https://arxiv.org/abs/2203.02155
    likelihood: preferred fine-tuning and unlikelihood, the baselines of E5's paper (its section 6)
    soft labels: Cao et al. 2007, "Learning to rank: from pairwise approach to listwise approach" (the first choice)
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

Loss = Literal["plackett_luce", "soft_plackett_luce", "pairwise", "ipo", "likelihood"]


def implicit_rewards(policy_logp_BK: Tensor, reference_logp_BK: Tensor, beta: float) -> Tensor:
    """s_k = β (log π_θ(y_k|x) − log π_ref(y_k|x)), nats; up to a per-prompt constant, the reward (E3)."""
    return beta * (policy_logp_BK - reference_logp_BK)


def preference_loss(
    s_BK: Tensor,
    mask_BK: Tensor,
    ranks_BK: Tensor | None = None,
    strengths_BK: Tensor | None = None,
    *,
    loss: Loss = "plackett_luce",
    label_smoothing: float = 0.0,
    beta: float = 1.0,
    unlikelihood: float = 0.0,
) -> Tensor:
    """The loss of each prompt, [B]; the one entry for every method.

    Args:
        s_BK: implicit rewards (or a reward model's scores), best answer first.
        mask_BK: True where an answer exists; each row needs at least two.
        ranks_BK: int, equal numbers are ties; None means the order is strict.
        strengths_BK: the judge's log-strengths, nats; soft labels need them, the others do not look at them.
        loss: "plackett_luce" (E6), "soft_plackett_luce" (E6 with the judge's probabilities as targets), "pairwise" (E5
            over all ranked pairs), "ipo" or "likelihood" (the last two undo beta, the scale already inside s_BK).
        label_smoothing: ε, the probability that a ranking is the wrong way round; of Plackett-Luce losses.
        unlikelihood: weight of the worse answers' log-probability in "likelihood".
    """
    if loss == "ipo":
        return ipo(s_BK / beta, mask_BK, ranks_BK, tau=beta)
    if loss == "likelihood":
        return likelihood(s_BK / beta, mask_BK, ranks_BK, unlikelihood=unlikelihood)
    if loss == "pairwise":
        return pairwise(s_BK, mask_BK, ranks_BK)
    if loss == "soft_plackett_luce" and strengths_BK is None:
        raise ValueError("soft labels need the judge's strengths, and some answer of this batch has none")
    strengths_BK = strengths_BK if loss == "soft_plackett_luce" else None
    loss_B = plackett_luce(s_BK, mask_BK, ranks_BK, strengths_BK)
    if label_smoothing:
        turned_B = plackett_luce(*_reversed(s_BK, mask_BK, ranks_BK, strengths_BK))
        loss_B = (1 - label_smoothing) * loss_B + label_smoothing * turned_B
    return loss_B


def plackett_luce(
    s_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None = None, strengths_BK: Tensor | None = None
) -> Tensor:
    """−log P(order), E6: Σ_k [ logsumexp_{j≥k} s_j − s_k ], [B].

    K = 2 is computed as −log σ(s_1 − s_2), the very expression of DPO (E5), so the two are equal bit for bit.
    Tied answers form a group. Its members are not compared with one another: each is chosen among itself and the
    answers of later groups (a composite likelihood: exact for a tie at the bottom, and no tie parameter to tune).

    With strengths t the labels are soft: choice k is not answer k for certain, but answer j with the probability
    q_kj = softmax_{j≥k}(t)_j that the judge gives it. The loss is the cross-entropy of the choices,
    Σ_k [ logsumexp_{j≥k} s_j − Σ_{j≥k} q_kj s_j ], which is least where s = t up to a constant; the larger the
    differences of strength, the nearer it is to the hard labels' loss.
    """
    s_BK = s_BK if s_BK.dtype == torch.float64 else s_BK.float()
    if s_BK.shape[1] == 2 and ranks_BK is None and strengths_BK is None:
        return -F.logsigmoid(s_BK[:, 0] - s_BK[:, 1])
    if ranks_BK is None:
        ranks_BK = torch.arange(s_BK.shape[1], device=s_BK.device).expand_as(s_BK)
    own_BKK = torch.eye(s_BK.shape[1], dtype=torch.bool, device=s_BK.device)
    later_BKK = ranks_BK[:, None, :] > ranks_BK[:, :, None]
    # Its own rival even where no answer exists: an empty logsumexp would give NaN gradients.
    rivals_BKK = (later_BKK & mask_BK[:, None, :]) | own_BKK
    # Differences first: a constant added to a row's rewards cancels exactly, and ±1e4 stays finite.
    gaps_BKK = s_BK[:, None, :] - s_BK[:, :, None]
    stage_BK = torch.logsumexp(gaps_BKK.masked_fill(~rivals_BKK, -math.inf), dim=-1)
    if strengths_BK is not None:
        t_BK = strengths_BK.to(s_BK.dtype)
        q_BKK = t_BK[:, None, :].expand_as(gaps_BKK).masked_fill(~rivals_BKK, -math.inf).softmax(-1)
        stage_BK = stage_BK - (q_BKK * gaps_BKK).sum(-1)
    return stage_BK.masked_fill(~mask_BK, 0.0).sum(-1)


def pairwise(s_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None) -> Tensor:
    """E5 on every ranked pair of a prompt, their mean: −log σ(s_i − s_j) over i before j, [B]."""
    s_BK = s_BK if s_BK.dtype == torch.float64 else s_BK.float()
    better_BKK = _pairs(mask_BK, ranks_BK)
    losses_BKK = -F.logsigmoid(s_BK[:, :, None] - s_BK[:, None, :]) * better_BKK
    return losses_BKK.sum((1, 2)) / better_BKK.sum((1, 2)).clamp(min=1)


def likelihood(h_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None, *, unlikelihood: float) -> Tensor:
    """−log π(best) + α · log π(worse), each counted from the reference, [B].

    h is the log-ratio log π_θ/π_ref without β: the reference's part has no gradient, and with it the loss begins at 0.
    Without unlikelihood this is preferred fine-tuning, E11 as a sum over the best answer; several best answers, and
    several worse ones, count by their mean. Nothing holds log π(worse) from below: a large α ends in noise.
    """
    if ranks_BK is None:
        ranks_BK = torch.arange(mask_BK.shape[1], device=mask_BK.device).expand_as(mask_BK)
    best_BK = mask_BK & (ranks_BK == ranks_BK[:, :1])
    worse_BK = mask_BK & ~best_BK
    mean = lambda of_BK: (h_BK * of_BK).sum(1) / of_BK.sum(1).clamp(min=1)
    return unlikelihood * mean(worse_BK) - mean(best_BK)


def ipo(h_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None, *, tau: float) -> Tensor:
    """Identity preference optimisation: mean over ranked pairs of (h_i − h_j − 1/(2τ))², [B].

    h is the log-ratio log π_θ/π_ref without β. The square keeps a margin finite where preferences are certain.
    """
    better_BKK = _pairs(mask_BK, ranks_BK)
    gaps_BKK = h_BK[:, :, None] - h_BK[:, None, :]
    squared_BKK = (gaps_BKK - 1 / (2 * tau)).square() * better_BKK
    return squared_BKK.sum((1, 2)) / better_BKK.sum((1, 2)).clamp(min=1)


def ranking_accuracy(s_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None = None) -> Tensor:
    """Share of a prompt's ranked pairs that the rewards order rightly, equal rewards count one half, [B]."""
    better_BKK = _pairs(mask_BK, ranks_BK)
    gaps_BKK = s_BK[:, :, None] - s_BK[:, None, :]
    right_BKK = (gaps_BKK > 0).float() + 0.5 * (gaps_BKK == 0).float()
    return (right_BKK * better_BKK).sum((1, 2)) / better_BKK.sum((1, 2)).clamp(min=1)


def margin(s_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Reward of the best answer minus the mean reward of the others, [B]; at K = 2 DPO's margin."""
    others_BK = mask_BK.clone()
    others_BK[:, 0] = False
    return s_BK[:, 0] - (s_BK * others_BK).sum(1) / others_BK.sum(1).clamp(min=1)


def sft_loss(logp_BK: Tensor, tokens_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """−Σ log π(y|x) of a row, [B] (E11). Divide the sum over rows by the sum of tokens for the token mean."""
    assert logp_BK.shape == tokens_BK.shape
    return -(logp_BK * mask_BK).sum(1)


def length_normalised(logratio_BK: Tensor, tokens_BK: Tensor, mask_BK: Tensor) -> Tensor:
    """Log-ratios per token, times the mean length of the prompt's answers, so that β keeps its scale, [B, K].

    A sum over tokens lets a policy widen a margin by writing longer answers; a mean does not (Meng et al. 2024, SimPO,
    https://arxiv.org/abs/2405.14734, and the length-normalised DPO of Lambert et al. 2024, Tulu 3,
    https://arxiv.org/abs/2411.15124).
    """
    mean_B1 = (tokens_BK * mask_BK).sum(1, keepdim=True) / mask_BK.sum(1, keepdim=True)
    return logratio_BK * mean_B1 / tokens_BK.clamp(min=1)


def _pairs(mask_BK: Tensor, ranks_BK: Tensor | None) -> Tensor:
    if ranks_BK is None:
        ranks_BK = torch.arange(mask_BK.shape[1], device=mask_BK.device).expand_as(mask_BK)
    both_BKK = mask_BK[:, :, None] & mask_BK[:, None, :]
    return (ranks_BK[:, :, None] < ranks_BK[:, None, :]) & both_BKK


def _reversed(
    s_BK: Tensor, mask_BK: Tensor, ranks_BK: Tensor | None, strengths_BK: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The same rows worst first; existing answers stay at the front of no row in particular: the mask moves along."""
    ranks_BK = None if ranks_BK is None else (ranks_BK.amax(1, keepdim=True) - ranks_BK).flip(1)
    strengths_BK = None if strengths_BK is None else -strengths_BK.flip(1)
    return s_BK.flip(1), mask_BK.flip(1), ranks_BK, strengths_BK
