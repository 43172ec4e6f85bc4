"""A world small enough to list: every answer to every prompt, what each is worth, and the policy that is best.

Answers are the strings of at most so many letters. A shorter one is closed by the end token, a longest one is cut, as
the length limit of rollouts cuts. The vocabulary holds the letters and the end token and nothing else, so that the
probabilities of all answers sum to one under any causal LM, and its exact distribution is one scoring pass.

Letters: X prompts, Y answers (the same ones to every prompt). Everything is float64.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel

END = 0  # the letters are 1, 2, …
LIVELIER = 0.3  # standard deviation of the reference's first weights, so that it is far from uniform


@dataclass(frozen=True, kw_only=True)
class World:
    """Prompts, answers, and the truth about them.

    Example:
        world = make(seed=0)
        logp_XY, log_z_X = optimum(world.reference_XY, world.reward_XY, beta=0.3)
    """

    rows: tuple[TokenRow, ...]  # one a prompt, with all answers
    reward_XY: Tensor  # r(x, y)
    model: LlamaForCausalLM  # the reference; copy it to train it
    reference_XY: Tensor  # its log π_ref(y|x), nats


class Listed(nn.Module):
    """A causal LM as a policy over listed answers: log π(y|x) of all of them, [X, Y] nats."""

    def __init__(self, model: LlamaForCausalLM, rows: tuple[TokenRow, ...]):
        super().__init__()
        self.scorer = LogpModel(model)
        self.batch = self.scorer.batch(list(rows), END)

    def forward(self) -> Tensor:
        return self.batch.by_prompt(self.scorer(self.batch).sum_A)


def make(*, seed: int, letters: int = 4, longest: int = 3, prompts: int = 3) -> World:
    """Rewards drawn from a standard normal, without any pattern to be guessed; the reference is a random Llama."""
    answers = strings(letters, longest)
    rows = tuple(
        TokenRow(id=f"x{x}", prompt_ids=(END, *(1 + (x + i) % letters for i in range(1 + x)), END), answers_ids=answers)
        for x in range(prompts)
    )
    reward_XY = torch.randn(prompts, len(answers), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    model = tiny_llama(letters, seed=seed)
    with torch.no_grad():
        reference_XY = Listed(model, rows)()
    return World(rows=rows, reward_XY=reward_XY, model=model, reference_XY=reference_XY)


def strings(letters: int, longest: int) -> tuple[tuple[int, ...], ...]:
    """Token ids of every answer, the shortest first; those below the limit end in END."""
    return tuple(
        (*word, *((END,) if length < longest else ()))
        for length in range(longest + 1)
        for word in itertools.product(range(1, letters + 1), repeat=length)
    )


def tiny_llama(letters: int, *, seed: int) -> LlamaForCausalLM:
    """A Llama of about 5,000 weights in float64, whose vocabulary is the letters and the end."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=letters + 1,
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        max_position_embeddings=32,
        initializer_range=LIVELIER,
        tie_word_embeddings=False,
        pad_token_id=END,
        eos_token_id=END,
        bos_token_id=None,
        use_cache=False,
    )
    return LlamaForCausalLM(config).double()


def optimum(reference_XY: Tensor, reward_XY: Tensor, beta: float) -> tuple[Tensor, Tensor]:
    """log π*(y|x), [X, Y], and log Z(x), [X] (E2): the policy that maximises reward − β KL, by enumeration."""
    tilted_XY = reference_XY + reward_XY / beta
    log_z_X = tilted_XY.logsumexp(1)
    return tilted_XY - log_z_X[:, None], log_z_X


@torch.no_grad()
def measures(logp_XY: Tensor, world: World, beta: float) -> dict[str, float]:
    """How far a policy is from the optimum; means over prompts, but for the error of the rewards, a maximum.

    total_variation: ½ Σ |π − π*|, 0 to 1
    kl: KL(π‖π*), nats
    reward, kl_to_reference, e1, e1_best: E[r], KL(π‖π_ref), E1 = reward − β kl_to_reference, and its optimum β log Z
    reward_error: largest |β log(π/π_ref) + β log Z − r|: E3 with its own constant, none is fitted
    rank_correlation: Spearman's, of implicit and true rewards
    """
    best_XY, log_z_X = optimum(world.reference_XY, world.reward_XY, beta)
    p_XY, ratio_XY = logp_XY.exp(), logp_XY - world.reference_XY
    expected = lambda value_XY: (p_XY * value_XY).sum(1).mean().item()
    reward, kl_to_reference = expected(world.reward_XY), expected(ratio_XY)
    return {
        "total_variation": 0.5 * (p_XY - best_XY.exp()).abs().sum(1).mean().item(),
        "kl": expected(logp_XY - best_XY),
        "reward": reward,
        "kl_to_reference": kl_to_reference,
        "e1": reward - beta * kl_to_reference,
        "e1_best": beta * log_z_X.mean().item(),
        "reward_error": (beta * ratio_XY + beta * log_z_X[:, None] - world.reward_XY).abs().max().item(),
        "rank_correlation": rank_correlation(ratio_XY, world.reward_XY),
    }


@torch.no_grad()
def score_measures(score_XY: Tensor, reward_XY: Tensor) -> dict[str, float]:
    """How well scores recover the rewards up to a constant a prompt, which comparisons cannot tell: its mean."""
    centred = lambda value_XY: value_XY - value_XY.mean(1, keepdim=True)
    return {
        "reward_error": (centred(score_XY) - centred(reward_XY)).abs().max().item(),
        "rank_correlation": rank_correlation(score_XY, reward_XY),
    }


def rank_correlation(a_XY: Tensor, b_XY: Tensor) -> float:
    """Spearman's correlation within each prompt, averaged; values are taken to be distinct."""
    ranks = lambda value_XY: value_XY.argsort(1).argsort(1).double()
    both_XY2 = torch.stack([ranks(a_XY), ranks(b_XY)], -1)
    return sum(torch.corrcoef(one_Y2.T)[0, 1].item() for one_Y2 in both_XY2) / len(both_XY2)
