"""Laws of the toy world: training ends where enumeration says, and with any equation bent it does not.

The world here is smaller than the command's: 2 prompts, 7 answers (strings of at most two of two letters).
"""

import copy
import itertools
import json
from dataclasses import replace

import pytest
import torch

from benchmarks import toy_runs, toy_training, toy_world
from benchmarks.toy_space import END, Listed, make, measures, optimum, score_measures, strings
from benchmarks.toy_training import (
    Rankings,
    by_policy_gradient,
    by_the_training_loop,
    converge,
    dpo_loss,
    drawn,
    gradient_gap,
    minimise,
    minus_e1,
    policy_of,
    ranking_loss,
    rankings,
    rloo_loss,
    scores_of,
)
from rankwise.objectives import implicit_rewards, preference_loss

TABLE = 1e-6  # total variation that a table reaches in float64
LLAMA = 1e-4  # and a Llama, whose norms are computed in float32


@pytest.fixture(scope="module")
def world():
    return make(seed=1, letters=2, longest=2, prompts=2)


def by_dpo(world, kind, beta, given, *, steps=300):
    first = 60 if kind == "llama" else 0
    loss = lambda logp: dpo_loss(logp, world.reference_XY, beta, given)
    return converge(policy_of(kind, world), loss, first=first, steps=steps)


def end_of(policy, world, beta):
    return measures(policy().detach(), world, beta)


# The world


def test_every_string_is_listed_once_and_ends_or_is_cut():
    """1 + 2 + 4 strings of at most two of two letters."""
    assert strings(2, 2) == ((0,), (1, 0), (2, 0), (1, 1), (1, 2), (2, 1), (2, 2))


def test_the_probabilities_of_all_answers_sum_to_one(world):
    torch.testing.assert_close(world.reference_XY.exp().sum(1), torch.ones(2).double(), rtol=0, atol=1e-6)
    assert world.reference_XY.exp().max() > 0.25  # far from uniform, or the reference could be left out


def test_the_reference_is_the_models_own_logits(world):
    """log π(y|x) of an answer by the model's softmax, token by token."""
    for x, y in ((0, 0), (1, 3)):
        row = world.rows[x]
        whole = torch.tensor([[*row.prompt_ids, *row.answers_ids[y]]])
        with torch.no_grad():
            logp = world.model(input_ids=whole).logits[0].log_softmax(-1)
        start = len(row.prompt_ids)
        alone = sum(logp[at - 1, whole[0, at]].item() for at in range(start, whole.shape[1]))
        assert alone == pytest.approx(world.reference_XY[x, y].item(), abs=1e-6)


# E1, E2, E3


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_any_policy_falls_short_of_the_optimum_by_beta_kl(world, beta):
    """E1(π) = β log Z − β KL(π‖π*), so nothing is better than π*."""
    random = torch.randn(2, 7, generator=torch.Generator().manual_seed(0)).double().log_softmax(1)
    for logp in (random, world.reference_XY, optimum(world.reference_XY, world.reward_XY, beta)[0]):
        found = measures(logp, world, beta)
        assert found["e1"] == pytest.approx(found["e1_best"] - beta * found["kl"], abs=1e-6)
        assert found["e1"] <= found["e1_best"] + 1e-6


def test_the_optimum_is_the_best_of_a_fine_grid():
    """Two answers, π_ref even, rewards 1 and 0: E1 over p is largest at σ(1/β)."""
    reference, reward, beta = torch.tensor([[0.5, 0.5]]).double().log(), torch.tensor([[1.0, 0.0]]).double(), 0.7
    p = torch.linspace(1e-6, 1 - 1e-6, 200_001).double()
    both = torch.stack([p, 1 - p], 1).log()
    e1 = (both.exp() * (reward - beta * (both - reference))).sum(1)
    best = optimum(reference, reward, beta)[0].exp()[0, 0].item()
    assert p[e1.argmax()].item() == pytest.approx(best, abs=1e-5)
    assert best == pytest.approx(torch.sigmoid(torch.tensor(1 / beta)).item(), abs=1e-6)


def test_the_reward_is_the_log_ratio_of_the_optimum_with_its_constant(world):
    best, _ = optimum(world.reference_XY, world.reward_XY, 0.3)
    found = measures(best, world, 0.3)
    assert found["reward_error"] < 1e-12 and found["rank_correlation"] == pytest.approx(1)
    assert found["total_variation"] == 0 and found["kl"] == pytest.approx(0, abs=1e-12)


# The simulator of preferences (E4)


def test_preferences_are_bradley_terry(world):
    every = rankings(world.reward_XY, 2)
    assert len(every.place_CK) == 2 * 7 * 6  # 2 prompts, each pair in both orders
    better, worse = world.reward_XY.flatten()[every.place_CK].T
    pairs = 2 * 7 * 6 / 2
    torch.testing.assert_close(every.share_C, torch.sigmoid(better - worse) / pairs, rtol=1e-12, atol=0)


@pytest.mark.parametrize("k, best_only", [(2, False), (3, False), (4, False), (4, True)])
def test_the_outcomes_of_all_comparisons_sum_to_one(world, k, best_only):
    assert rankings(world.reward_XY, k, best_only=best_only).share_C.sum().item() == pytest.approx(1, abs=1e-12)


def test_rankings_are_those_of_rewards_with_gumbel_noise(world):
    """Plackett-Luce by its other definition: sort rewards plus independent Gumbel noise."""
    three = world.reward_XY[0, :3]
    every = rankings(three[None], 3)
    noise = -torch.empty(400_000, 3, dtype=torch.float64).exponential_(generator=torch.Generator().manual_seed(0)).log()
    orders = (three + noise).argsort(1, descending=True)
    for order, share in zip(every.place_CK, every.share_C):
        seen = (orders == order).all(1).double().mean()
        assert seen.item() == pytest.approx(share.item(), abs=0.004)  # five standard errors


# Training reaches the optimum


METHODS = {"pairs": (2, False), "rankings of 4": (4, False), "best of 4": (4, True)}


@pytest.mark.parametrize("beta", [0.1, 0.3, 1.0, 3.0])
@pytest.mark.parametrize("method", METHODS)
def test_dpo_ends_at_the_optimum(world, method, beta):
    k, best_only = METHODS[method]
    found = end_of(by_dpo(world, "table", beta, rankings(world.reward_XY, k, best_only=best_only)), world, beta)
    assert found["total_variation"] < TABLE and found["kl"] < TABLE
    assert found["reward_error"] < 1e-4 and found["rank_correlation"] == pytest.approx(1)


@pytest.mark.parametrize("method", METHODS)
def test_a_llama_ends_there_too(world, method):
    """Through the project's own log-probabilities, prompts shared by their answers."""
    k, best_only = METHODS[method]
    found = end_of(by_dpo(world, "llama", 0.3, rankings(world.reward_XY, k, best_only=best_only)), world, 0.3)
    assert found["total_variation"] < LLAMA and found["reward_error"] < 1e-3


@pytest.mark.parametrize("k", [2, 4])
def test_soft_labels_of_a_judge_that_knows_the_rewards_end_there_without_noise(world, k):
    """Each set of answers once, in one order, with the rewards as strengths: the targets are the probabilities."""
    one_order = rankings(world.reward_XY, k).place_CK.sort(1).values.unique(dim=0)
    reward = world.reward_XY.flatten()[one_order]
    places = one_order.gather(1, reward.argsort(1, descending=True))
    strengths = world.reward_XY.flatten()[places]

    def loss(logp):
        s = implicit_rewards(logp, world.reference_XY, 0.3).flatten()[places]
        mask = torch.ones_like(s, dtype=torch.bool)
        return preference_loss(s, mask, None, strengths, loss="soft_plackett_luce").mean()

    assert end_of(minimise(policy_of("table", world), loss, steps=500), world, 0.3)["total_variation"] < TABLE


def test_it_does_not_matter_which_pairs_are_compared(world):
    """A chain of pairs says as much as all of them: every answer is connected with every other."""
    every = rankings(world.reward_XY, 2)
    neighbours = (every.place_CK[:, 0] - every.place_CK[:, 1]).abs() == 1
    share = every.share_C[neighbours]
    chain = Rankings(place_CK=every.place_CK[neighbours], ranks_K=None, share_C=share / share.sum())
    assert len(share) == 2 * 2 * 6
    assert end_of(by_dpo(world, "table", 0.3, chain), world, 0.3)["total_variation"] < TABLE


def test_dpo_is_the_optimum_for_the_reward_fitted_to_the_same_preferences(world):
    """With whatever N preferences happened to say, π = π_ref exp(r̂/β) / Z: E3 put into E4, and no approximation."""
    given = drawn(rankings(world.reward_XY, 2), 5_000, seed=3)
    fitted = minimise(scores_of("table", world), lambda s: ranking_loss(s, given), steps=500)().detach()
    assert score_measures(fitted, world.reward_XY)["reward_error"] > 0.02  # not the true one
    for beta in (0.1, 1.0):
        policy = by_dpo(world, "table", beta, given)
        torch.testing.assert_close(
            policy().detach().exp(), optimum(world.reference_XY, fitted, beta)[0].exp(), rtol=0, atol=1e-5
        )


def test_the_distance_falls_with_the_root_of_the_number_of_preferences(world):
    """A hundred times as many: a tenth of the total variation, a hundredth of the KL; means over 10 draws."""
    every, mean = rankings(world.reward_XY, 2), {}
    for count in (2_000, 200_000):
        ends = [end_of(by_dpo(world, "table", 1.0, drawn(every, count, seed=s)), world, 1.0) for s in range(10)]
        mean[count] = {name: sum(one[name] for one in ends) / 10 for name in ("total_variation", "kl")}
    assert 6 < mean[2_000]["total_variation"] / mean[200_000]["total_variation"] < 16
    assert 40 < mean[2_000]["kl"] / mean[200_000]["kl"] < 250


def test_the_training_loop_ends_near(world):
    """2,048 rankings as rows of tokens, in float32, as stage dpo runs it: what is left is chance."""
    policy = by_the_training_loop(world, rankings(world.reward_XY, 4), 2_048, 1.0, epochs=3, rate=0.01, seed=0)
    start = end_of(policy_of("llama", world), world, 1.0)
    found = end_of(policy, world, 1.0)
    assert found["total_variation"] < 0.05 and found["total_variation"] < start["total_variation"] / 4
    assert found["rank_correlation"] > 0.95


# Policy gradients (E10)


@pytest.mark.parametrize("kind, bound", [("table", TABLE), ("llama", LLAMA)])
def test_the_exact_policy_gradient_ends_at_the_optimum(world, kind, bound):
    policy = minimise(
        policy_of(kind, world), lambda logp: minus_e1(logp, world.reference_XY, world.reward_XY, 0.3), steps=1000
    )
    assert end_of(policy, world, 0.3)["total_variation"] < bound


def test_the_sampled_gradient_is_the_exact_one_on_average(world):
    """Over all 49 pairs of samples for a prompt, weighted with their probabilities."""
    reference, reward, beta = world.reference_XY[:1], world.reward_XY[:1], 0.5
    logits = torch.randn(1, 7, generator=torch.Generator().manual_seed(2)).double().requires_grad_()
    logp = logits.log_softmax(1)
    (exact,) = torch.autograd.grad(minus_e1(logp, reference, reward, beta), logits, retain_graph=True)
    p, mean = logp.detach().exp()[0], torch.zeros_like(exact)
    for pair in itertools.product(range(7), repeat=2):
        loss = rloo_loss(logp, reference, reward, beta, torch.tensor([pair]))
        (grad,) = torch.autograd.grad(loss, logits, retain_graph=True)
        mean += p[pair[0]] * p[pair[1]] * grad
    torch.testing.assert_close(mean, exact, rtol=1e-10, atol=1e-12)


def test_the_sampled_policy_gradient_ends_near(world):
    policy = policy_of("table", world)
    by_policy_gradient(policy, world, world.reward_XY, 0.3, samples=16, steps=600, rate=0.05, seed=0)
    assert end_of(policy, world, 0.3)["total_variation"] < 0.01


# E7 and reward models


@pytest.mark.parametrize("kind", ["table", "llama"])
def test_the_gradient_is_e7_in_every_weight(world, kind):
    policy = by_dpo(world, kind, 0.5, rankings(world.reward_XY, 2), steps=3)
    for pair in ((0, 1, 4), (1, 6, 0)):
        assert gradient_gap(policy, world.reference_XY, 0.5, pair) < (1e-12 if kind == "table" else 5e-6)


@pytest.mark.parametrize("kind, bound", [("table", 1e-5), ("llama", 1e-3)])
@pytest.mark.parametrize("k", [2, 4])
def test_a_reward_model_recovers_the_rewards_up_to_a_constant(world, kind, bound, k):
    model = minimise(scores_of(kind, world), lambda s: ranking_loss(s, rankings(world.reward_XY, k)), steps=500)
    assert score_measures(model().detach().double(), world.reward_XY)["reward_error"] < bound


# With an equation bent it does not end there


def without_reference(policy, reference, beta):
    return beta * policy


def without_beta(policy, reference, beta):
    return policy - reference


def beta_divides(policy, reference, beta):
    return (policy - reference) / beta


def worst_first(s, mask, ranks=None):
    return preference_loss(s.flip(1), mask, ranks)


def ties_as_an_order(s, mask, ranks=None):
    return preference_loss(s, mask)


def rivals_are_the_better_ones(s, mask, ranks=None):
    return (s.logcumsumexp(1) - s).sum(1)


def neighbours_only(s, mask, ranks=None):
    return -torch.nn.functional.logsigmoid(s[:, :-1] - s[:, 1:]).sum(1)


BENT = {
    "reference dropped": ("implicit_rewards", without_reference, "pairs"),
    "β left out": ("implicit_rewards", without_beta, "pairs"),
    "β divides": ("implicit_rewards", beta_divides, "rankings of 4"),
    "order turned round": ("preference_loss", worst_first, "rankings of 4"),
    "ties read as an order": ("preference_loss", ties_as_an_order, "best of 4"),
    "rivals are the better answers": ("preference_loss", rivals_are_the_better_ones, "rankings of 4"),
    "neighbours compared only": ("preference_loss", neighbours_only, "rankings of 4"),
}


@pytest.mark.parametrize("name", BENT)
def test_a_bent_equation_ends_elsewhere(world, name, monkeypatch):
    """The bounds above are no empty ones: each of these misses them ten thousand times over."""
    what, bent, method = BENT[name]
    monkeypatch.setattr(toy_training, what, bent)
    k, best_only = METHODS[method]
    found = end_of(
        by_dpo(world, "table", 0.3, rankings(world.reward_XY, k, best_only=best_only), steps=100), world, 0.3
    )
    assert found["total_variation"] > 1e4 * TABLE


@pytest.mark.parametrize("wrong", ["end token left out", "mean over tokens"])
def test_wrong_log_probabilities_end_elsewhere(world, wrong):
    """A Llama trained by something else than the sums over its answers' tokens, the end included."""
    policy, tokens = policy_of("llama", world), 1
    if wrong == "end token left out":
        cut = tuple(answer[:-1] if answer[1:] and answer[-1] == END else answer for answer in world.rows[0].answers_ids)
        policy = Listed(policy.scorer.model, tuple(replace(row, answers_ids=cut) for row in world.rows))
    else:
        tokens = torch.tensor([len(answer) for answer in world.rows[0].answers_ids])
    with torch.no_grad():
        reference = policy() / tokens
    given = rankings(world.reward_XY, 2)
    minimise(policy, lambda logp: dpo_loss(logp / tokens, reference, 0.3, given), steps=100)
    found = end_of(Listed(policy.scorer.model, world.rows), world, 0.3)
    assert found["total_variation"] > 200 * LLAMA


# The command


@pytest.mark.slow
def test_the_command_ends_with_a_table_and_draws_its_figure(tmp_path, capsys):
    record, figure = tmp_path / "record.json", tmp_path / "figure.png"
    toy_world.main(["--quick", "--json", str(record), "--figure", str(figure)])
    said = capsys.readouterr()
    assert "total variation" in said.out and "E7 against autograd" in said.err
    told = json.loads(record.read_text())
    assert {one["method"] for one in told["results"] if one["policy"] == "llama"} >= {
        "DPO, pairs",
        "DPO, sampled",
    }
    assert figure.read_bytes().startswith(b"\x89PNG") and set(told["gradients"]) == set(toy_runs.POLICIES)


def test_training_leaves_the_reference_as_it_was(world):
    before = world.reference_XY.clone()
    by_dpo(world, "llama", 0.3, rankings(world.reward_XY, 2), steps=3)
    with torch.no_grad():
        assert torch.equal(Listed(copy.deepcopy(world.model), world.rows)(), before)
