"""Learning in the toy world: preferences that its rewards give, the losses of the methods, and what minimises them.

A loss over all comparisons with their exact probabilities is the limit of endlessly many preferences; the same loss
over how often each came out in N draws is what N preferences say. Policies are a table (one number an answer, no
limit of capacity) or a Llama; whatever is not a policy gradient goes through rankwise.objectives.preference_loss.

Letters: X prompts, Y answers, C comparisons, K answers compared, S sets of K answers, O orders of a set, G samples.
"""

from __future__ import annotations

import copy
import itertools
import math
import random
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import LlamaForSequenceClassification

from benchmarks.toy_space import END, Listed, World
from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.objectives import implicit_rewards, preference_loss
from rankwise.rendering import TokenRow
from rankwise.rewards import RewardModel
from rankwise.scoring import LogpModel
from rankwise.training import Settings, train

# Preferences


@dataclass(frozen=True, kw_only=True)
class Rankings:
    """Outcomes of comparisons, and the share of all comparisons that came out so."""

    place_CK: Tensor  # int64, flat index into X·Y of each answer, best first
    ranks_K: tuple[int, ...] | None  # equal numbers tie; None: a strict order
    share_C: Tensor  # float64, sums to one


def rankings(reward_XY: Tensor, k: int, *, best_only: bool = False, most_sets: int = 4000, seed: int = 0) -> Rankings:
    """Every outcome of comparing k answers with its probability under the rewards (E4 at k = 2, Plackett-Luce above).

    Every set of k answers counts alike; where there are more than most_sets, that many are drawn. Which sets are
    compared has no bearing on the optimum as long as they connect all answers.

    Args:
        best_only: the judge names the best of the k and nothing else; the others tie.
    """
    prompts, answers = reward_XY.shape
    orders = [(i, *(j for j in range(k) if j != i)) for i in range(k)]
    orders = torch.tensor(orders if best_only else list(itertools.permutations(range(k))))
    order_CK = answer_sets(answers, k, most_sets, seed)[:, orders].flatten(0, 1)
    place_CK = (order_CK + answers * torch.arange(prompts)[:, None, None]).flatten(0, 1)
    reward_CK = reward_XY.flatten()[place_CK]
    # Each choice is among the answers that are left: a softmax over itself and all later ones.
    left_CK = torch.stack([reward_CK[:, place:].logsumexp(1) for place in range(k)], 1)
    log_p_C = (reward_CK - left_CK)[:, : 1 if best_only else k].sum(1)
    share_C = log_p_C.exp() * len(orders) / len(place_CK)
    return Rankings(place_CK=place_CK, ranks_K=(0, *[1] * (k - 1)) if best_only else None, share_C=share_C)


def answer_sets(answers: int, k: int, most: int, seed: int) -> Tensor:
    """[S, k] all sets of k answers, or `most` different ones of them."""
    if math.comb(answers, k) <= most:
        return torch.tensor(list(itertools.combinations(range(answers), k)))
    draw, found = random.Random(seed), set()
    while len(found) < most:
        found.add(tuple(sorted(draw.sample(range(answers), k))))
    return torch.tensor(sorted(found))


def picks(every: Rankings, count: int, *, seed: int) -> Tensor:
    """[N] indices of the outcomes of `count` comparisons drawn at random."""
    return torch.multinomial(every.share_C, count, replacement=True, generator=torch.Generator().manual_seed(seed))


def drawn(every: Rankings, count: int, *, seed: int) -> Rankings:
    """How often each came out in `count` comparisons."""
    times_C = torch.bincount(picks(every, count, seed=seed), minlength=len(every.share_C))
    seen = times_C > 0
    return replace(every, place_CK=every.place_CK[seen], share_C=times_C[seen].double() / count)


# Losses


def ranking_loss(s_XY: Tensor, given: Rankings) -> Tensor:
    """E6 of scores or implicit rewards, averaged over comparisons: a reward model's loss (E4), or DPO's."""
    s_CK = s_XY.flatten().index_select(0, given.place_CK.flatten()).view(given.place_CK.shape)
    ranks_CK = None if given.ranks_K is None else torch.tensor(given.ranks_K).expand(s_CK.shape)
    loss_C = preference_loss(s_CK, torch.ones_like(s_CK, dtype=torch.bool), ranks_CK)
    return (given.share_C * loss_C).sum()


def dpo_loss(logp_XY: Tensor, reference_XY: Tensor, beta: float, given: Rankings) -> Tensor:
    """E5 at K = 2, E6 above."""
    return ranking_loss(implicit_rewards(logp_XY, reference_XY, beta), given)


def minus_e1(logp_XY: Tensor, reference_XY: Tensor, reward_XY: Tensor, beta: float) -> Tensor:
    """β KL − expected reward, exactly; its gradient is what a sampled policy gradient estimates (E10)."""
    value_XY = reward_XY - beta * (logp_XY - reference_XY)
    return -(logp_XY.exp() * value_XY).sum(1).mean()


def rloo_loss(logp_XY: Tensor, reference_XY: Tensor, reward_XY: Tensor, beta: float, sample_XG: Tensor) -> Tensor:
    """REINFORCE on sampled answers, each against the mean of the other samples of its prompt.

    Ahmadian et al. 2024, "Back to basics", https://arxiv.org/abs/2402.14740, eq. 5, with the KL term inside the reward.
    """
    value_XG = (reward_XY - beta * (logp_XY.detach() - reference_XY)).gather(1, sample_XG)
    others_XG = (value_XG.sum(1, keepdim=True) - value_XG) / (sample_XG.shape[1] - 1)
    return -((value_XG - others_XG) * logp_XY.gather(1, sample_XG)).mean()


# What is trained


class Table(nn.Module):
    """A policy with a number of its own for every answer; starts at a given one. log π(y|x), [X, Y]."""

    def __init__(self, start_XY: Tensor):
        super().__init__()
        self.logits_XY = nn.Parameter(start_XY.clone())

    def forward(self) -> Tensor:
        return self.logits_XY.log_softmax(1)


class Scores(nn.Module):
    """A reward for every answer, zero at first, [X, Y]."""

    def __init__(self, like_XY: Tensor):
        super().__init__()
        self.score_XY = nn.Parameter(torch.zeros_like(like_XY))

    def forward(self) -> Tensor:
        return self.score_XY


class ListedScores(nn.Module):
    """A reward model over listed answers, [X, Y]: the reference's body with a new head, zero at first."""

    def __init__(self, world: World):
        super().__init__()
        config = copy.deepcopy(world.model.config)
        config.num_labels = 1
        model = LlamaForSequenceClassification(config)
        model.model.load_state_dict(world.model.model.state_dict())
        nn.init.zeros_(model.score.weight)
        self.scorer = RewardModel(model.double())
        self.batch = self.scorer.batch(world.rows, END)

    def forward(self) -> Tensor:
        return self.batch.by_prompt(self.scorer(self.batch))


def policy_of(kind: str, world: World) -> nn.Module:
    """A policy that is the reference still: "table" or "llama"."""
    return Table(world.reference_XY) if kind == "table" else Listed(copy.deepcopy(world.model), world.rows)


def scores_of(kind: str, world: World) -> nn.Module:
    """A reward model that knows nothing yet: "table" or "llama"."""
    return Scores(world.reward_XY) if kind == "table" else ListedScores(world)


# What trains it


def minimise(module: nn.Module, loss: Callable[[Tensor], Tensor], *, steps: int) -> nn.Module:
    """L-BFGS on the whole loss to the end: no step size to choose, and no noise left to average out."""
    optimizer = torch.optim.LBFGS(
        module.parameters(),
        max_iter=steps,
        max_eval=2 * steps,
        history_size=50,
        tolerance_grad=1e-11,
        tolerance_change=1e-15,
        line_search_fn="strong_wolfe",
    )

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = loss(module())
        value.backward()
        return value

    optimizer.step(closure)
    return module


def descend(module: nn.Module, loss: Callable[[Tensor], Tensor], *, steps: int, learning_rate: float) -> nn.Module:
    """Adam with a cosine to zero, for losses that are samples."""
    optimizer = torch.optim.Adam(module.parameters(), lr=learning_rate)
    fall = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(module()).backward()
        optimizer.step()
        fall.step()
    return module


def converge(module: nn.Module, loss: Callable[[Tensor], Tensor], *, first: int = 0, steps: int) -> nn.Module:
    """To the end of a loss without noise: `first` steps of Adam, which a network needs, then L-BFGS."""
    if first:
        descend(module, loss, steps=first, learning_rate=0.01)
    return minimise(module, loss, steps=steps)


def by_policy_gradient(
    policy: nn.Module, world: World, reward_XY: Tensor, beta: float, *, samples: int, steps: int, rate: float, seed: int
) -> nn.Module:
    """RLOO: `samples` answers a prompt and step, drawn from the policy as it is."""
    generator = torch.Generator().manual_seed(seed)

    def loss(logp_XY: Tensor) -> Tensor:
        sample_XG = torch.multinomial(logp_XY.detach().exp(), samples, replacement=True, generator=generator)
        return rloo_loss(logp_XY, world.reference_XY, reward_XY, beta, sample_XG)

    return descend(policy, loss, steps=steps, learning_rate=rate)


def by_the_training_loop(
    world: World, every: Rankings, count: int, beta: float, *, epochs: int, rate: float, seed: int
) -> Listed:
    """DPO as stage `dpo` runs it, in float32: `count` rankings as rows of tokens, through rankwise.training.train."""
    policy = Listed(copy.deepcopy(world.model).float(), world.rows)
    with torch.no_grad():
        reference_XY = policy().flatten().tolist()
    picked_N = picks(every, count, seed=seed)
    rows, references = [], {}
    for number, places in enumerate(every.place_CK[picked_N].tolist()):
        prompt, answers = places[0] // world.reward_XY.shape[1], [place % world.reward_XY.shape[1] for place in places]
        row = world.rows[prompt]
        rows.append(
            TokenRow(
                id=str(number),
                prompt_ids=row.prompt_ids,
                answers_ids=tuple(row.answers_ids[answer] for answer in answers),
                ranks=every.ranks_K or tuple(range(len(answers))),
            )
        )
        references[str(number)] = [reference_XY[place] for place in places]
    learner = PreferenceLearner(LogpModel(policy.scorer.model), END, references, PreferenceSettings(beta=beta))
    settings = Settings(
        learning_rate=rate, epochs=epochs, batch_size=64, micro_batch_tokens=10**6, max_grad_norm=100.0, seed=seed
    )
    train(learner, rows, settings, what=f"toy world, β = {beta}")
    return policy


# E7


def gradient_gap(policy: nn.Module, reference_XY: Tensor, beta: float, pair: tuple[int, int, int]) -> float:
    """Autograd of a pair's loss against E7 in all weights: largest difference, over the largest of the gradient.

    pair: the prompt, the better answer, the worse one.
    """
    weights, (x, better, worse) = list(policy.parameters()), pair
    logp_XY = policy()
    s_XY = implicit_rewards(logp_XY, reference_XY, beta)
    loss = preference_loss(s_XY[x, [better, worse]][None], torch.ones(1, 2, dtype=torch.bool)).sum()
    auto = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss, weights, retain_graph=True)])
    with torch.no_grad():
        ratio_Y = (logp_XY - reference_XY)[x]
        weight = -beta * torch.sigmoid(beta * (ratio_Y[worse] - ratio_Y[better]))
    apart = torch.autograd.grad(logp_XY[x, better] - logp_XY[x, worse], weights)
    closed = weight * torch.cat([grad.flatten() for grad in apart])
    return ((auto - closed).abs().max() / closed.abs().max()).item()
