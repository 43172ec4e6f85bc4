"""All runs of the toy world, as plain numbers: methods at every β, reward models, E7, sampled preferences."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import toy_training as training
from benchmarks.report import say
from benchmarks.toy_space import World, make, measures, optimum, score_measures
from benchmarks.toy_training import Rankings, rankings

POLICIES = ("table", "llama")


@dataclass(frozen=True, kw_only=True)
class Effort:
    """How large the world is and how long is trained; steps are optimizer steps."""

    betas: tuple[float, ...] = (0.1, 0.3, 1.0, 3.0)
    letters: int = 4
    longest: int = 3  # letters of an answer at most
    sets: int = 150  # sets of 4 answers that are compared, of each prompt
    steps: int = 250  # of L-BFGS, at most; a table is done earlier
    first_steps: int = 400  # of Adam before it, for a Llama
    gradient_steps: int = 800  # of Adam, by a policy gradient
    samples: int = 32  # answers a prompt and step
    drawn: int = 8192  # rankings of 4, as a user has them
    epochs: int = 12  # over these, by the training loop
    counts: tuple[int, ...] = (1_000, 4_000, 16_000, 64_000, 256_000, 1_024_000)  # comparisons
    repeats: int = 5  # draws of as many comparisons


QUICK = Effort(
    betas=(0.3, 1.0),
    letters=2,
    longest=2,
    sets=20,
    steps=50,
    first_steps=20,
    gradient_steps=100,
    drawn=256,
    epochs=1,
    counts=(1_000, 16_000),
    repeats=2,
)


def everything(effort: Effort, *, seed: int) -> dict[str, Any]:
    """The record: every number of the table and of the figure."""
    torch.set_num_threads(1)  # tensors of a few thousand numbers: threads would only wait for one another
    world = make(seed=seed, letters=effort.letters, longest=effort.longest)
    runs = [_Runs(kind, world, effort) for kind in POLICIES]
    prompts, answers = world.reward_XY.shape
    return {
        "world": {"prompts": prompts, "answers": answers, "weights": sum(p.numel() for p in world.model.parameters())},
        "effort": asdict(effort),
        "rewards": world.reward_XY.tolist(),
        "reward_models": [one for run in runs for one in run.reward_models()],
        "results": [one for run in runs for one in run.results()],
        "gradients": {run.kind: run.gradients() for run in runs},
        "sampled": runs[0].sampled_preferences(),
        "front": _front(world, effort),
    }


class _Runs:
    """All methods on one kind of policy, "table" or "llama"."""

    def __init__(self, kind: str, world: World, effort: Effort):
        self.kind, self.world, self.effort = kind, world, effort
        self.first = effort.first_steps if kind == "llama" else 0
        self.rate = 0.05 if kind == "table" else 0.005  # learning rate of policy gradients
        self.pairs = rankings(world.reward_XY, 2)
        self.fours = rankings(world.reward_XY, 4, most_sets=effort.sets)
        self.best_of_four = rankings(world.reward_XY, 4, best_only=True, most_sets=effort.sets)
        self.fitted_XY = torch.zeros_like(world.reward_XY)  # the reward model's scores, once it is fitted

    def reward_models(self) -> list[dict[str, Any]]:
        """E4 and its K-way form on exact preferences; policy gradients then climb the one of the pairs."""
        found = []
        for k, every in ((4, self.fours), (2, self.pairs)):
            model = self._converged(training.scores_of(self.kind, self.world), training.ranking_loss, every)
            self.fitted_XY = model().detach().double()
            found.append({"policy": self.kind, "k": k, **score_measures(self.fitted_XY, self.world.reward_XY)})
            say(f"{self.kind}, reward model, K = {k}: off by {found[-1]['reward_error']:.1e}")
        return found

    def results(self) -> list[dict[str, Any]]:
        """Where every method ends at every β, and the implicit reward of every answer there, E3's constant added."""
        found = []
        for beta in self.effort.betas:
            for method, trained in self._methods().items():
                began = time.process_time()
                logp_XY = trained(beta)().detach().double()
                seconds = time.process_time() - began
                told = measures(logp_XY, self.world, beta)
                log_z_X = optimum(self.world.reference_XY, self.world.reward_XY, beta)[1]
                recovered_XY = beta * (logp_XY - self.world.reference_XY + log_z_X[:, None])
                one = {"policy": self.kind, "method": method, "beta": beta, "cpu_seconds": seconds, **told}
                found.append({**one, "recovered": recovered_XY.tolist()})
                distance = told["total_variation"]
                say(f"{self.kind}, β = {beta:g}, {method}: total variation {distance:.1e}, {seconds:.1f} s")
        return found

    def gradients(self) -> float:
        """The largest gap between autograd and E7 over pairs of each prompt, at a policy on its way."""
        policy, beta = self._policy(), self.effort.betas[0]
        training.minimise(policy, lambda logp: self._dpo_loss(logp, beta, self.pairs), steps=5)
        prompts, answers = self.world.reward_XY.shape
        some = [(x, y, answers - 1 - y) for x in range(prompts) for y in range(0, answers // 2, 7)]
        return max(training.gradient_gap(policy, self.world.reference_XY, beta, pair) for pair in some)

    def sampled_preferences(self) -> list[dict[str, Any]]:
        """How near N sampled comparisons come by DPO; an entry for each K, β and N, with all repeats."""
        found = []
        for k, every in ((2, self.pairs), (4, self.fours)):
            for beta in self.effort.betas:
                for count in self.effort.counts:
                    given = [training.drawn(every, count, seed=seed) for seed in range(self.effort.repeats)]
                    ends = [measures(self._dpo(beta, one)().detach(), self.world, beta) for one in given]
                    both = {name: [one[name] for one in ends] for name in ("total_variation", "kl")}
                    found.append({"k": k, "beta": beta, "comparisons": count, **both})
                say(f"sampled preferences, K = {k}, β = {beta:g}: done")
        return found

    def _methods(self) -> dict[str, Callable[[float], nn.Module]]:
        """Functions of β that train a policy."""
        return {
            "DPO, pairs": lambda beta: self._dpo(beta, self.pairs),
            "DPO, rankings of 4": lambda beta: self._dpo(beta, self.fours),
            "DPO, best of 4": lambda beta: self._dpo(beta, self.best_of_four),
            "DPO, sampled": self._sampled_dpo,
            "policy gradient, exact": self._exact_gradient,
            "policy gradient, sampled": self._sampled_gradient,
        }

    def _policy(self) -> nn.Module:
        return training.policy_of(self.kind, self.world)

    def _dpo_loss(self, logp_XY: Tensor, beta: float, given: Rankings) -> Tensor:
        return training.dpo_loss(logp_XY, self.world.reference_XY, beta, given)

    def _dpo(self, beta: float, given: Rankings) -> nn.Module:
        return self._converged(self._policy(), lambda logp_XY, one: self._dpo_loss(logp_XY, beta, one), given)

    def _exact_gradient(self, beta: float) -> nn.Module:
        """As the sampled one but for the samples, then to the end: begun by L-BFGS it would jump to a flat corner."""
        loss = lambda logp_XY: training.minus_e1(logp_XY, self.world.reference_XY, self.fitted_XY, beta)
        policy = training.descend(self._policy(), loss, steps=self.effort.gradient_steps, learning_rate=self.rate)
        return training.minimise(policy, loss, steps=self.effort.steps)

    def _converged(self, module: nn.Module, loss: Callable[[Tensor, Any], Tensor], given: Any) -> nn.Module:
        return training.converge(module, lambda out: loss(out, given), first=self.first, steps=self.effort.steps)

    def _sampled_gradient(self, beta: float) -> nn.Module:
        return training.by_policy_gradient(
            self._policy(),
            self.world,
            self.fitted_XY,
            beta,
            samples=self.effort.samples,
            steps=self.effort.gradient_steps,
            rate=self.rate,
            seed=0,
        )

    def _sampled_dpo(self, beta: float) -> nn.Module:
        """On drawn rankings: a Llama as stage dpo trains it; a table to the end, which is as near as they can lead."""
        if self.kind == "table":
            return self._dpo(beta, training.drawn(self.fours, self.effort.drawn, seed=0))
        with contextlib.redirect_stdout(sys.stderr):  # stdout is the record's
            return training.by_the_training_loop(
                self.world, self.fours, self.effort.drawn, beta, epochs=self.effort.epochs, rate=0.005, seed=0
            )


def _front(world: World, effort: Effort) -> list[dict[str, float]]:
    """Expected reward and KL to the reference of the optimum, over a range of β: no policy lies above."""
    low, high = min(effort.betas) / 2, max(effort.betas) * 4
    found = []
    for step in range(60):
        beta = low * (high / low) ** (step / 59)
        one = measures(optimum(world.reference_XY, world.reward_XY, beta)[0], world, beta)
        found.append({"beta": beta, "reward": one["reward"], "kl_to_reference": one["kl_to_reference"]})
    return found
