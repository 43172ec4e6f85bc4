"""The objective's laws: every expected value is a closed form, a sum over all orders, or the paper's own expression."""

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional as F

from rankwise.learners import PreferenceSettings
from rankwise.objectives import (
    implicit_rewards,
    ipo,
    length_normalised,
    margin,
    plackett_luce,
    preference_loss,
    ranking_accuracy,
    sft_loss,
)

# The first example of a cold process may take long; a shared machine is no reason to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")

rewards = st.lists(st.floats(-30, 30), min_size=2, max_size=6)


def row(*values: float, grad: bool = False) -> torch.Tensor:
    return torch.tensor([values], dtype=torch.float64, requires_grad=grad)


def full(s_BK: torch.Tensor) -> torch.Tensor:
    return torch.ones_like(s_BK, dtype=torch.bool)


def strict(s_BK: torch.Tensor) -> torch.Tensor:
    return plackett_luce(s_BK, full(s_BK))


def stagewise(values: list[float]) -> float:
    """−log P(order) by its definition: choose the best, take it away, choose again."""
    total = 0.0
    for k in range(len(values)):
        top = max(values[k:])
        total += top + math.log(sum(math.exp(v - top) for v in values[k:])) - values[k]
    return total


# The golden values


@pytest.mark.parametrize(
    "gap, loss", [(0.0, 0.6931471805599453), (1.0, 0.31326168751822286), (2.0, 0.1269280110429725)]
)
def test_dpo_of_a_gap_is_log_one_plus_exp_of_minus_the_gap(gap, loss):
    """E5: −log σ(g) = log(1 + e^−g)."""
    assert strict(row(gap, 0.0)).item() == pytest.approx(loss, abs=1e-15)
    assert math.log1p(math.exp(-gap)) == pytest.approx(loss, abs=1e-15)
    assert strict(row(gap, 0.0).float()).item() == pytest.approx(loss, abs=1e-6)


@pytest.mark.parametrize(
    "values, loss, gradient",
    [
        ((0.3, 0.1, -0.2), 1.4402945621369825, (-0.5876733144204216, -0.08797294538962447, 0.6756462598100463)),
        (
            (1.0, 0.5, -0.5, -1.0),
            1.6139360304509107,
            (-0.49109313834079804, -0.06280066625379593, -0.03276430163334383, 0.5866581062279376),
        ),
    ],
)
def test_plackett_luce_has_its_golden_values_and_gradients(values, loss, gradient):
    """E6; ∂L/∂s_i = Σ_{k≤i} softmax(s_k…s_K)_i − 1, checked here beside the golden numbers."""
    s = row(*values, grad=True)
    value = strict(s)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-14)
    assert s.grad[0].tolist() == pytest.approx(gradient, abs=1e-14)
    closed = torch.full((len(values),), -1.0, dtype=torch.float64)
    for k in range(len(values)):
        closed[k:] += torch.tensor(values[k:], dtype=torch.float64).softmax(0)
    assert s.grad[0].tolist() == pytest.approx(closed.tolist(), abs=1e-14)
    single = row(*values).float().requires_grad_()
    strict(single).backward()
    assert strict(single).item() == pytest.approx(loss, abs=1e-6)
    assert single.grad[0].tolist() == pytest.approx(gradient, abs=1e-6)


def test_dpo_of_four_pairs_of_log_probabilities():
    policy = torch.tensor([[-3, -5], [-2.5, -3.5], [-4, -6], [-1.5, -2.5]], dtype=torch.float64)
    reference = torch.tensor([[-2.8, -3.2], [-2.3, -2.7], [-3.8, -4.2], [-1.4, -1.8]], dtype=torch.float64)
    s_BK = implicit_rewards(policy, reference, 0.1)
    expected = [0.616343773041, 0.663597113076, 0.616343773041, 0.663597113076]
    assert preference_loss(s_BK, full(s_BK)).tolist() == pytest.approx(expected, abs=1e-12)


# Identities of Plackett-Luce


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_two_answers_are_dpo_bit_for_bit(dtype):
    s_BK = torch.randn(257, 2, generator=torch.Generator().manual_seed(0), dtype=dtype) * 5
    a, b = s_BK.clone().requires_grad_(), s_BK.clone().requires_grad_()
    ours, paper = preference_loss(a, full(a)), -F.logsigmoid(b[:, 0] - b[:, 1])
    ours.sum().backward()
    paper.sum().backward()
    assert torch.equal(ours, paper) and torch.equal(a.grad, b.grad)


def test_two_answers_given_ranks_agree_with_dpo():
    s_BK = torch.randn(50, 2, dtype=torch.float64)
    given_ranks = plackett_luce(s_BK, full(s_BK), torch.tensor([0, 1]).expand(50, 2))
    torch.testing.assert_close(given_ranks, -F.logsigmoid(s_BK[:, 0] - s_BK[:, 1]), rtol=1e-14, atol=1e-14)


@given(rewards)
def test_the_loss_is_the_choice_of_the_best_again_and_again(values):
    assert strict(row(*values)).item() == pytest.approx(stagewise(values), rel=1e-12, abs=1e-12)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=5))
@settings(max_examples=30)
def test_the_probabilities_of_all_orders_sum_to_one(values):
    orders = torch.tensor(list(itertools.permutations(values)), dtype=torch.float64)
    assert strict(orders).neg().exp().sum().item() == pytest.approx(1, abs=1e-12)


@given(rewards, st.floats(-1e3, 1e3))
def test_adding_a_constant_changes_nothing(values, constant):
    a, b = row(*values, grad=True), row(*(v + constant for v in values), grad=True)
    strict(a).backward()
    strict(b).backward()
    assert strict(a).item() == pytest.approx(strict(b).item(), rel=1e-9, abs=1e-9)
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-9, atol=1e-9)


@given(rewards)
def test_gradients_of_a_row_sum_to_zero(values):
    """The loss depends on differences only, so its gradient has no component along a constant."""
    s = row(*values, grad=True)
    strict(s).backward()
    assert s.grad.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("count, log_factorial", [(2, 0.6931471805599453), (3, 1.791759469228055), (7, math.lgamma(8))])
def test_equal_rewards_lose_log_k_factorial(count, log_factorial):
    s_BK = torch.full((1, count), 3.7)
    assert strict(s_BK).item() == pytest.approx(log_factorial, rel=1e-6)
    assert plackett_luce(torch.zeros_like(s_BK), full(s_BK)).item() == pytest.approx(log_factorial, rel=1e-6)


@pytest.mark.parametrize("ranks", [None, [0, 0, 2, 3], [0, 1, 1, 1]])
@pytest.mark.parametrize("values", [(1e4, 5e3, -5e3, -1e4), (-1e4, -5e3, 5e3, 1e4), (1e4, 1e4, -1e4, -1e4)])
def test_rewards_of_ten_thousand_stay_finite(values, ranks):
    """A wrong order costs the gap itself: exp of it, taken before the logarithm, would be infinite."""
    s = torch.tensor([values], requires_grad=True)
    ranks = None if ranks is None else torch.tensor([ranks])
    loss = plackett_luce(s, full(s), ranks)
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(s.grad).all()
    if ranks is None:
        assert loss.item() == pytest.approx(stagewise(list(values)), rel=1e-6, abs=1e-6)


def test_half_precision_rewards_are_computed_in_single():
    s = torch.tensor([[0.5, 0.25, -1.0]], dtype=torch.bfloat16)
    assert strict(s).dtype == torch.float32
    assert strict(s).item() == pytest.approx(stagewise([0.5, 0.25, -1.0]), rel=1e-6)


# E7


def test_gradient_of_dpo_is_its_closed_form():
    """E7: ∇L = −β σ(s_l − s_w)(∇log π(y_w) − ∇log π(y_l)), for a softmax policy over five answers."""
    generator = torch.Generator().manual_seed(1)
    features = torch.randn(5, 4, generator=generator, dtype=torch.float64)
    reference = torch.randn(5, generator=generator, dtype=torch.float64).log_softmax(0)
    theta = torch.randn(4, generator=generator, dtype=torch.float64, requires_grad=True)
    beta, best, worst = 0.3, 2, 4
    logp = (features @ theta).log_softmax(0)
    s = implicit_rewards(logp[None, [best, worst]], reference[None, [best, worst]], beta)
    preference_loss(s, full(s)).sum().backward()
    p = logp.detach().exp()
    score = lambda y: features[y] - p @ features  # ∇ log π(y)
    closed = -beta * torch.sigmoid(s[0, 1] - s[0, 0]).detach() * (score(best) - score(worst))
    torch.testing.assert_close(theta.grad, closed, rtol=1e-13, atol=1e-15)


# Ragged rows and ties


@pytest.mark.parametrize(
    "variant",
    [
        *[{}, {"label_smoothing": 0.2}, {"loss": "ipo", "beta": 0.5}],
        *[{"loss": "soft_plackett_luce"}, {"loss": "soft_plackett_luce", "label_smoothing": 0.2}],
    ],
)
@pytest.mark.parametrize("ties", [False, True])
def test_a_padded_batch_equals_its_rows_one_by_one(variant, ties):
    """Whatever stands in the padding, loss and gradients of a row are those of the row alone."""
    generator = torch.Generator().manual_seed(2)
    sizes = [2, 5, 3, 4, 2]
    values = [torch.randn(n, generator=generator, dtype=torch.float64) for n in sizes]
    ranks = [[0, *range(n - 1)] if ties and n > 2 else list(range(n)) for n in sizes]
    strengths = [torch.randn(n, generator=generator, dtype=torch.float64).sort(descending=True).values for n in sizes]
    s, t = (torch.full((5, 5), 7.5, dtype=torch.float64) for _ in "st")
    mask, ranks_BK = torch.zeros(5, 5, dtype=torch.bool), torch.full((5, 5), 10**6)
    for b, n in enumerate(sizes):
        s[b, :n], mask[b, :n], ranks_BK[b, :n], t[b, :n] = values[b], True, torch.tensor(ranks[b]), strengths[b]
    s.requires_grad_()
    batch = preference_loss(s, mask, ranks_BK if ties else None, t, **variant)
    batch.sum().backward()
    for b, n in enumerate(sizes):
        alone = values[b][None].clone().requires_grad_()
        own_ranks = torch.tensor([ranks[b]]) if ties else None
        loss = preference_loss(alone, full(alone), own_ranks, strengths[b][None], **variant)
        loss.sum().backward()
        torch.testing.assert_close(batch[b], loss[0], rtol=1e-13, atol=1e-13)
        torch.testing.assert_close(s.grad[b, :n], alone.grad[0], rtol=1e-12, atol=1e-13)
        assert (s.grad[b, n:] == 0).all()


def test_tied_answers_are_exchangeable():
    a = plackett_luce(row(0.4, -0.3, 1.2, 0.1), full(row(0, 0, 0, 0)), torch.tensor([[0, 1, 1, 3]]))
    b = plackett_luce(row(0.4, 1.2, -0.3, 0.1), full(row(0, 0, 0, 0)), torch.tensor([[0, 1, 1, 3]]))
    assert a.item() == pytest.approx(b.item(), abs=1e-14)


def test_a_tie_at_the_bottom_is_the_choice_of_the_top_alone():
    """P(y_1 first) = softmax(s)_1: nothing is said about the order of the rest."""
    s = row(0.4, -0.3, 1.2)
    loss = plackett_luce(s, full(s), torch.tensor([[0, 1, 1]]))
    assert loss.item() == pytest.approx(-s[0].log_softmax(0)[0].item(), abs=1e-14)


def test_a_tie_at_the_top_is_each_against_the_rest():
    """Two winners over one loser: −log σ(s_1 − s_3) − log σ(s_2 − s_3)."""
    s = row(0.4, -0.3, 1.2)
    loss = plackett_luce(s, full(s), torch.tensor([[0, 0, 2]]))
    pairs = -F.logsigmoid(s[0, 0] - s[0, 2]) - F.logsigmoid(s[0, 1] - s[0, 2])
    assert loss.item() == pytest.approx(pairs.item(), abs=1e-14)


def test_ranks_need_not_be_consecutive():
    s = row(0.4, -0.3, 1.2)
    assert plackett_luce(s, full(s), torch.tensor([[2, 5, 40]])).item() == pytest.approx(strict(s).item(), abs=1e-14)


@pytest.mark.parametrize("loss", ["plackett_luce", "ipo"])
def test_all_tied_teaches_nothing(loss):
    s = row(0.4, -0.3, 1.2, grad=True)
    value = preference_loss(s, full(s), torch.tensor([[1, 1, 1]]), loss=loss)
    value.backward()
    assert value.item() == 0 and (s.grad == 0).all()


# Variants


@given(st.floats(-20, 20), st.floats(0, 0.5))
def test_label_smoothing_of_a_pair_is_conservative_dpo(gap, epsilon):
    """−(1 − ε) log σ(g) − ε log σ(−g)."""
    s = row(gap, 0.0)
    g = torch.tensor(gap, dtype=torch.float64)
    closed = -(1 - epsilon) * F.logsigmoid(g) - epsilon * F.logsigmoid(-g)
    value = preference_loss(s, full(s), label_smoothing=epsilon)
    assert value.item() == pytest.approx(closed.item(), rel=1e-12, abs=1e-12)


def test_label_smoothing_of_a_ranking_mixes_it_with_its_reverse():
    values = [0.3, -1.0, 0.8]
    value = preference_loss(row(*values), full(row(*values)), label_smoothing=0.1).item()
    assert value == pytest.approx(0.9 * stagewise(values) + 0.1 * stagewise(values[::-1]), abs=1e-13)


# Soft labels


def soft(s_BK: torch.Tensor, *strengths: float, ranks: list[int] | None = None, **variant) -> torch.Tensor:
    ranks_BK = None if ranks is None else torch.tensor([ranks])
    return preference_loss(s_BK, full(s_BK), ranks_BK, row(*strengths), loss="soft_plackett_luce", **variant)


@given(st.floats(-20, 20), st.floats(-15, 15), st.floats(-5, 5))
def test_a_soft_label_of_a_pair_is_the_cross_entropy_of_its_probability(h, gap, constant):
    """−p log σ(h) − (1 − p) log σ(−h), p = σ(difference of strengths), whatever is added to both strengths."""
    p, h_ = 1 / (1 + math.exp(-gap)), torch.tensor(h, dtype=torch.float64)
    closed = -p * F.logsigmoid(h_) - (1 - p) * F.logsigmoid(-h_)
    assert soft(row(h, 0.0), gap + constant, constant).item() == pytest.approx(closed.item(), rel=1e-11, abs=1e-11)


@given(st.floats(-20, 20), st.floats(0.01, 0.5))
def test_a_soft_label_that_is_wrong_with_probability_epsilon_is_label_smoothing(h, epsilon):
    """So one p for all rows is conservative DPO with ε = 1 − p."""
    value = soft(row(h, 0.0), math.log((1 - epsilon) / epsilon), 0.0)
    smoothed = preference_loss(row(h, 0.0), full(row(h, 0.0)), label_smoothing=epsilon)
    assert value.item() == pytest.approx(smoothed.item(), rel=1e-11, abs=1e-11)


def choices(values: tuple[float, ...], strengths: tuple[float, ...]) -> float:
    """Soft Plackett-Luce by its definition: at each choice the judge's distribution over those left, and ours."""
    total = 0.0
    for k in range(len(values)):
        q, p = (torch.tensor(v[k:], dtype=torch.float64) for v in (strengths, values))
        total -= float((q.softmax(0) * p.log_softmax(0)).sum())
    return total


@pytest.mark.parametrize(
    "values, strengths, loss, gradient",
    [
        (
            (0.3, 0.1, -0.2),
            (1.0, 0.0, -1.0),
            1.6149379693441313,
            (-0.25291427019524354, -0.06375999507442712, 0.3166742652696707),
        ),
        (
            (1.0, 0.5, -0.5, -1.0),
            (0.4, 0.3, 0.1, -0.8),
            3.106079395074283,
            (0.16956144174028306, 0.16537689350819557, -0.37562857199689814, 0.04069023674841953),
        ),
    ],
)
def test_soft_labels_have_their_golden_values_and_gradients(values, strengths, loss, gradient):
    """Computed with 50 digits from the definition. ∂L/∂s_i = Σ_{k≤i} softmax(s_k…s_K)_i − softmax(t_k…t_K)_i."""
    s = row(*values, grad=True)
    value = soft(s, *strengths)
    value.backward()
    assert value.item() == pytest.approx(loss, abs=1e-14) and choices(values, strengths) == pytest.approx(loss)
    assert s.grad[0].tolist() == pytest.approx(gradient, abs=1e-14)
    closed = torch.zeros(len(values), dtype=torch.float64)
    for k in range(len(values)):
        ours, judges = (torch.tensor(v[k:], dtype=torch.float64).softmax(0) for v in (values, strengths))
        closed[k:] += ours - judges
    assert s.grad[0].tolist() == pytest.approx(closed.tolist(), abs=1e-14)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=6), st.floats(-100, 100))
def test_the_gradient_of_soft_labels_vanishes_at_the_judges_strengths_and_nowhere_else(strengths, constant):
    strengths = sorted(strengths, reverse=True)
    s = row(*(t + constant for t in strengths), grad=True)
    soft(s, *strengths).backward()
    assert s.grad[0].tolist() == pytest.approx([0.0] * len(strengths), abs=1e-12)
    for k in range(len(strengths)):
        moved = torch.zeros(1, len(strengths), dtype=torch.float64)
        moved[0, k] = 0.5
        assert soft(s.detach() + moved, *strengths) > soft(s.detach(), *strengths)


@given(rewards, st.sampled_from([None, "top", "bottom"]))
def test_hard_labels_are_the_limit_of_certain_strengths(values, tie):
    """Ties too: tied answers are compared with later ones only, by soft labels as by hard ones."""
    count = len(values)
    ranks = {None: list(range(count)), "top": [0, 0, *range(2, count)], "bottom": [*range(count - 1), count - 2]}[tie]
    hard = plackett_luce(row(*values), full(row(*values)), torch.tensor([ranks]))
    near, certain = (soft(row(*values), *(-size * rank for rank in ranks), ranks=ranks) for size in (40.0, 1e4))
    assert near.item() == pytest.approx(hard.item(), rel=1e-12, abs=1e-9)
    assert torch.equal(certain, hard)


def test_equal_strengths_ask_for_equal_rewards():
    """Every choice is among equals: the least loss is log K! at equal rewards, and soft labels start there."""
    assert soft(row(0.0, 0.0, 0.0), 0.0, 0.0, 0.0).item() == pytest.approx(math.log(6), abs=1e-14)
    assert soft(row(0.0, 0.0, 0.0), 3.0, 1.0, -1.0).item() == pytest.approx(math.log(6), abs=1e-14)
    assert soft(row(1.0, 0.0, 0.0), 0.0, 0.0, 0.0).item() > math.log(6)


def test_softly_tied_answers_are_exchangeable():
    """Answers 2 and 3 tie at strengths 0.31 and 0.29; which of them comes first is of no account."""
    a = soft(row(0.4, -0.3, 1.2, 0.1), 1.0, 0.31, 0.29, -1.6, ranks=[0, 1, 1, 3])
    b = soft(row(0.4, 1.2, -0.3, 0.1), 1.0, 0.29, 0.31, -1.6, ranks=[0, 1, 1, 3])
    assert a.item() == pytest.approx(b.item(), abs=1e-14)


def test_all_tied_teaches_nothing_softly_either():
    s = row(0.4, -0.3, 1.2, grad=True)
    value = soft(s, 0.02, 0.0, -0.02, ranks=[0, 0, 0])
    value.backward()
    assert value.item() == 0 and (s.grad == 0).all()


def test_soft_labels_smoothed_are_the_mixture_with_the_inverted_judge():
    values, strengths = (0.3, -1.0, 0.8), (0.9, 0.2, -1.1)
    value = soft(row(*values), *strengths, label_smoothing=0.1).item()
    turned = choices(values[::-1], tuple(-t for t in strengths[::-1]))
    assert value == pytest.approx(0.9 * choices(values, strengths) + 0.1 * turned, abs=1e-13)
    p = 0.9 / (1 + math.exp(-1.3)) + 0.1 / (1 + math.exp(1.3))  # of a pair: with the smoothed probability
    of_pair = soft(row(0.6, 0.0), 1.3, 0.0, label_smoothing=0.1).item()
    assert of_pair == pytest.approx(soft(row(0.6, 0.0), math.log(p / (1 - p)), 0.0).item(), abs=1e-14)


def test_soft_labels_without_strengths_are_refused():
    with pytest.raises(ValueError, match="need the judge's strengths"):
        preference_loss(row(0.3, 0.1), full(row(0.3, 0.1)), loss="soft_plackett_luce")


@pytest.mark.parametrize("loss", ["plackett_luce", "ipo"])
def test_hard_labels_do_not_look_at_strengths(loss):
    s = row(0.4, -0.3, 1.2)
    assert torch.equal(
        preference_loss(s, full(s), None, row(9.0, 5.0, 1.0), loss=loss), preference_loss(s, full(s), loss=loss)
    )


@pytest.mark.parametrize("values", [(1e4, 5e3, -5e3, -1e4), (-1e4, -5e3, 5e3, 1e4)])
def test_soft_labels_of_rewards_of_ten_thousand_stay_finite(values):
    s = torch.tensor([values], requires_grad=True)
    loss = preference_loss(s, full(s), None, torch.tensor([[900.0, 1.0, 0.0, -901.0]]), loss="soft_plackett_luce")
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(s.grad).all()


# IPO, length, SFT


def test_ipo_of_a_pair_is_its_squared_distance_from_the_target():
    """(h_w − h_l − 1/(2τ))², h the log-ratio without β; at its minimum the gap is 1/(2τ)."""
    beta, h = 0.25, row(1.3, -0.4)
    loss = preference_loss(beta * h, full(h), loss="ipo", beta=beta)
    assert loss.item() == pytest.approx((1.7 - 2.0) ** 2, abs=1e-14)
    assert ipo(row(2.0, 0.0), full(h), None, tau=beta).item() == pytest.approx(0, abs=1e-15)


def test_ipo_of_a_ranking_is_the_mean_over_its_pairs():
    h = row(1.0, 0.5, -2.0)
    gaps = [0.5, 3.0, 2.5]
    assert ipo(h, full(h), None, tau=1.0).item() == pytest.approx(sum((g - 0.5) ** 2 for g in gaps) / 3, abs=1e-14)


def test_length_normalised_is_the_mean_over_tokens_at_the_rows_mean_length():
    ratio, tokens = row(-6.0, -9.0), torch.tensor([[4, 2]])  # mean length 3: -6/4·3 and -9/2·3
    assert length_normalised(ratio, tokens, full(ratio))[0].tolist() == [-4.5, -13.5]
    padded = row(-6.0, -9.0, 0.0), torch.tensor([[4, 2, 0]]), torch.tensor([[True, True, False]])
    assert length_normalised(*padded)[0].tolist() == [-4.5, -13.5, 0.0]


def test_length_normalised_changes_nothing_among_answers_of_one_length():
    ratio = row(-6.0, -9.0)
    assert length_normalised(ratio, torch.tensor([[5, 5]]), full(ratio))[0].tolist() == [-6.0, -9.0]


def test_sft_loss_is_minus_the_sum_over_existing_answers():
    logp, mask = row(-6.0, -9.0), torch.tensor([[True, False]])
    assert sft_loss(logp, torch.tensor([[3, 0]]), mask).item() == 6


# What is reported


def test_accuracy_counts_pairs_and_a_tie_of_rewards_is_one_half():
    s = row(2.0, 1.0, 1.0)  # pairs: right, right, equal
    assert ranking_accuracy(s, full(s)).item() == pytest.approx(2.5 / 3)
    assert ranking_accuracy(s.flip(1), full(s)).item() == pytest.approx(0.5 / 3)
    assert ranking_accuracy(torch.zeros(1, 4), torch.ones(1, 4, dtype=torch.bool)).item() == 0.5


def test_accuracy_leaves_tied_and_missing_answers_out():
    s, mask = row(2.0, 3.0, 1.0, 99.0), torch.tensor([[True, True, True, False]])
    assert ranking_accuracy(s, mask, torch.tensor([[0, 0, 2, 10**6]])).item() == 1.0


def test_margin_is_the_best_above_the_mean_of_the_others():
    mask = torch.tensor([[True, True, True, False]])
    assert margin(row(2.0, 1.0, -2.0, 50.0), mask).item() == pytest.approx(2.5)
    assert margin(row(2.0, 1.5), torch.ones(1, 2, dtype=torch.bool)).item() == pytest.approx(0.5)


# Wrong in public code


def test_it_is_none_of_the_wrong_formulas():
    s = torch.tensor([0.3, 0.1, -0.2], dtype=torch.float64)
    ours = strict(s[None]).item()
    unflipped = (s.logcumsumexp(0) - s).sum().item()  # rivals are the better answers, not the worse
    assert abs(ours - unflipped) > 0.1
    flipped = (s.flip(0).logcumsumexp(0).flip(0) - s).sum().item()
    assert ours == pytest.approx(flipped, abs=1e-14)
    # −log σ of a difference of two log-likelihoods of the whole order: log 2 at equality, whatever K.
    reference = torch.zeros(3, dtype=torch.float64)
    of_difference = -F.logsigmoid(-strict(s[None]) + strict(reference[None])).item()
    assert abs(ours - of_difference) > 0.1
    assert (
        plackett_luce(torch.zeros(1, 3), torch.ones(1, 3, dtype=torch.bool)).item()
        > 1.79
        > -F.logsigmoid(torch.tensor(0.0)).item()
    )


def test_a_gap_of_nine_hundred_needs_the_log_sum_exp():
    """exp(900) overflows in double precision, so a sum of exponentials before the logarithm would be infinite."""
    s = row(-900.0, 0.0, 1.0)
    assert torch.isinf((s - s[:, :1]).exp().sum().log())
    assert strict(s).item() == pytest.approx(stagewise([-900.0, 0.0, 1.0]), rel=1e-12)


# All pairs of a ranking, and the baselines that look at the likelihood alone


@given(rewards)
def test_all_pairs_are_the_mean_of_dpo_over_pairs(values):
    """Σ_{i<j} −log σ(s_i − s_j) / C(K, 2), each pair written out."""
    pairs = [math.log1p(math.exp(-(a - b))) for a, b in itertools.combinations(values, 2)]
    found = preference_loss(row(*values), full(row(*values)), loss="pairwise")
    assert found.item() == pytest.approx(sum(pairs) / len(pairs), rel=1e-12, abs=1e-12)


def test_all_pairs_of_two_are_dpo_bit_for_bit():
    s = row(0.7, -0.4)
    assert torch.equal(preference_loss(s, full(s), loss="pairwise"), strict(s))


def test_tied_and_absent_answers_are_in_no_pair():
    """Ranks 0, 1, 1 and one answer that does not exist: two pairs are left, 1 > 2 and 1 > 3."""
    s, ranks = row(0.5, 0.1, -0.3, 9.0), torch.tensor([[0, 1, 1, 10**6]])
    mask = torch.tensor([[True, True, True, False]])
    expected = (math.log1p(math.exp(-0.4)) + math.log1p(math.exp(-0.8))) / 2
    assert preference_loss(s, mask, ranks, loss="pairwise").item() == pytest.approx(expected, rel=1e-12)


def test_preferred_fine_tuning_raises_the_best_answer_and_touches_no_other():
    """−log π(y_1) counted from the reference: 0 at the start, gradient −1 in log π of the best alone, whatever β."""
    for beta in (0.1, 3.0):
        h = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
        loss = preference_loss(beta * h, full(h), loss="likelihood", beta=beta)
        loss.sum().backward()
        assert loss.item() == 0.0
        assert h.grad.flatten().tolist() == pytest.approx([-1.0, 0.0, 0.0])


def test_unlikelihood_lowers_the_mean_of_the_worse():
    """−h_1 + α mean(h_2, h_3); of ranks 0, 0, 1 the best are two and the worse is one."""
    h = torch.tensor([[0.2, -0.4, 1.0]], dtype=torch.float64, requires_grad=True)
    loss = preference_loss(h, full(h), loss="likelihood", unlikelihood=0.5)
    assert loss.item() == pytest.approx(-0.2 + 0.5 * 0.3)
    tied = preference_loss(h, full(h), torch.tensor([[0, 0, 1]]), loss="likelihood", unlikelihood=0.5)
    tied.sum().backward()
    assert tied.item() == pytest.approx(0.1 + 0.5 * 1.0)
    assert h.grad.flatten().tolist() == pytest.approx([-0.5, -0.5, 0.5])


def test_the_likelihood_of_an_answer_is_a_sum_however_log_ratios_are_compared():
    """dpo.length_normalised weighs log-ratios by length; E11 on the best answer has no such weight."""
    policy, reference, tokens = row(-10.0, -50.0), row(-12.0, -45.0), torch.tensor([[10, 50]])
    found = [
        PreferenceSettings(beta=0.3, loss="likelihood", length_normalised=normalised).rewards(
            policy, reference, tokens, full(policy)
        )
        for normalised in (False, True)
    ]
    assert torch.equal(*found)
