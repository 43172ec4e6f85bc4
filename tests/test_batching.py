"""How rows are cut, ordered and packed changes neither loss nor gradient; every row is seen once an epoch."""

import itertools
import math
import random
from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_scoring import gradients, tiny, token_rows

from rankwise.batching import PROMPT, answer_grid, micro_batches, padded_rows, shared_rows, steps, strength_grid
from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.objectives import length_normalised, preference_loss
from rankwise.rendering import TokenRow
from rankwise.rewards import RewardModel
from rankwise.scoring import LogpModel
from rankwise.types import UserError


def token_row(name="r", prompt=3, answers=(2, 4), ranks=None) -> TokenRow:
    texts = tuple(tuple(range(10, 10 + n)) for n in answers)
    ranks = tuple(range(len(answers))) if ranks is None else ranks
    return TokenRow(id=name, prompt_ids=tuple(range(3, 3 + prompt)), answers_ids=texts, ranks=ranks)


def learner(model, rows, layout="auto", **settings) -> PreferenceLearner:
    """Preferences against made-up reference numbers, so that losses differ from log K!."""
    references = {row.id: [-3.0 - k - len(row.prompt_ids) for k in range(len(row.answers_ids))] for row in rows}
    return PreferenceLearner(LogpModel(model, layout=layout), 0, references, PreferenceSettings(beta=0.3, **settings))


def total(teacher, parts) -> torch.Tensor:
    count = sum(map(len, parts))
    return sum(teacher.losses(teacher.module(b), b).loss_B.sum() for b in map(teacher.collate, parts)) / count


# The same result


@pytest.mark.parametrize("layout", ["flat", "shared", "padded"])
def test_cut_and_order_change_neither_loss_nor_gradient(layout):
    rows = token_rows(9)
    model = tiny()
    teacher = learner(model, rows, layout)
    whole = total(teacher, [rows])
    expected = gradients(model, whole)
    shuffled = random.Random(3).sample(rows, len(rows))
    for parts in ([[row] for row in rows], [shuffled], micro_batches(shuffled, max_tokens=40), [rows[:7], rows[7:]]):
        loss = total(teacher, parts)
        assert abs(loss.item() - whole.item()) <= 2e-6 * whole.item()
        assert (gradients(model, loss) - expected).norm() <= 5e-6 * expected.norm()


def test_prompts_weigh_alike_whatever_their_tokens():
    """The mean over a short and a long prompt is the mean of their two losses, not one weighted by tokens."""
    rows = [token_row("short", 2, (1, 1)), token_row("long", 9, (14, 17))]
    teacher = learner(tiny(), rows)
    apart = [total(teacher, [[row]]).item() for row in rows]
    assert total(teacher, [rows]).item() == pytest.approx(sum(apart) / 2, rel=1e-6)


def test_losses_come_back_under_their_own_ids():
    rows = token_rows(7)
    teacher = learner(tiny(), rows)
    of = lambda part: (lambda r: dict(zip(r.ids, r.loss_B.tolist())))(teacher.losses(teacher.module(part), part))
    alone = {row.id: of(teacher.collate([row]))[row.id] for row in rows}
    assert of(teacher.collate(rows[::-1])) == pytest.approx(alone, rel=1e-5)


def test_the_settings_reach_the_loss():
    """ε, IPO and length normalisation through the learner equal the pure functions on the same log-ratios."""
    rows = token_rows(4)
    model = tiny()
    plain = learner(model, rows, length_normalised=False)
    batch = plain.collate(rows)
    output = plain.module(batch)
    ratio = batch.by_prompt(output.sum_A) - plain.reference_logps(batch)
    tokens = batch.by_prompt(output.tokens_A)
    for settings, s in (
        ({"label_smoothing": 0.2}, 0.3 * ratio),
        ({"loss": "ipo"}, 0.3 * ratio),
        ({"length_normalised": True}, 0.3 * length_normalised(ratio, tokens, batch.mask_BK)),
    ):
        keywords = {key: value for key, value in settings.items() if key != "length_normalised"}
        expected = preference_loss(s, batch.mask_BK, beta=0.3, **keywords)
        got = learner(model, rows, **settings).losses(output, batch).loss_B
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-6)


# The layout


def test_a_tree_computes_each_prompt_once():
    rows = [token_row("a", 5, (3, 3, 3)), token_row("b", 5, (3, 3, 3))]
    assert rows[0].positions == 5 + 3 * 2  # the last token of an answer predicts nothing
    assert shared_rows(rows, 0).input_ids.numel() == 2 * rows[0].positions
    assert padded_rows(rows, 0).input_ids.numel() == 6 * rows[0].longest_path


def test_answers_continue_from_the_end_of_their_prompt():
    batch = shared_rows([token_row(prompt=3, answers=(3, 2))], 0)
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 3]]
    assert batch.branch.tolist() == [[PROMPT] * 3 + [0, 0, 1]]
    assert batch.source_index.tolist() == [2, 3, 4, 2, 5]  # both answers are predicted from the prompt's end
    assert batch.target_ids.tolist() == [10, 11, 12, 10, 11]


def test_a_position_sees_its_prompt_and_its_own_answer_so_far():
    """Two trees in one row; each position's view is listed by hand."""
    rows = [token_row("a", 2, (2, 3)), token_row("b", 1, (2, 1))]
    batch = shared_rows([*rows, token_row("c", 7, (1, 1))], 0)  # c makes the row long enough for a and b together
    r = next(r for r in range(2) if {0, 1} <= set(batch.tree[r].tolist()))
    seen = [mask.nonzero().flatten().tolist() for mask in batch.attention_mask()[r, 0]]
    assert seen[:7] == [[0], [0, 1], [0, 1, 2], [0, 1, 3], [0, 1, 3, 4], [5], [5, 6]]


def test_packing_wastes_no_room_that_fits():
    rows = [token_row("big", 10, (1, 1)), token_row("half", 5, (1, 1)), token_row("other", 5, (1, 1))]
    batch = shared_rows(rows, 0)
    assert batch.input_ids.shape == (2, 10) and batch.padding_fraction == 0
    assert padded_rows(rows, 0).padding_fraction == pytest.approx(20 / 60)


def test_an_answer_of_one_token_needs_no_place_of_its_own():
    row = token_row(prompt=4, answers=(1, 1))
    assert row.positions == 4 and shared_rows([row], 0).source_index.tolist() == [3, 3]


def test_a_prompt_without_tokens_is_refused():
    """Its first token would be predicted from whatever lies before it in the row."""
    for layout in (shared_rows, padded_rows):
        with pytest.raises(UserError, match="without a prompt token: x"):
            layout([token_row(), TokenRow(id="x", prompt_ids=(), answers_ids=((5, 2), (6, 2)), ranks=(0, 1))], 0)


def test_ranks_are_given_only_where_the_order_does_not_say_it_all():
    strict = [token_row("a"), token_row("b", answers=(1, 1, 1))]
    mask_BK, ranks_BK = answer_grid(strict)
    assert ranks_BK is None and mask_BK.tolist() == [[True, True, False], [True, True, True]]
    _, ranks_BK = answer_grid([token_row("a", answers=(1, 1, 1), ranks=(0, 0, 2)), token_row("b")])
    assert ranks_BK[0].tolist() == [0, 0, 2] and ranks_BK[1, :2].tolist() == [0, 1]
    _, ranks_BK = answer_grid([token_row("a", ranks=(1, 0))])  # best last: the order alone would mislead
    assert ranks_BK.tolist() == [[1, 0]]


def test_strengths_are_given_where_every_answer_has_one():
    pair, three = replace(token_row("a"), strengths=(0.5, -0.5)), token_row("b", answers=(1, 1, 1))
    assert strength_grid([pair, replace(three, strengths=(1.0, 0.25, -1.25))]).tolist() == [
        [0.5, -0.5, 0.0],
        [1.0, 0.25, -1.25],
    ]
    assert strength_grid([pair, three]) is None


def test_strengths_reach_the_loss_of_soft_labels():
    """It starts at log K! as that of hard labels does, then differs, and is the same where strengths are certain."""
    rows = [replace(row, strengths=tuple(-0.1 * k for k in range(len(row.answers_ids)))) for row in token_rows(3)]
    soft = learner(tiny(), rows, loss="soft_plackett_luce")
    batch = soft.collate(rows)
    factorials = [math.lgamma(len(row.answers_ids) + 1) for row in rows]
    assert soft.loss_at_start(batch).tolist() == pytest.approx(factorials, rel=1e-6)
    certain = replace(batch, strengths_BK=1e4 * batch.strengths_BK)
    hard = learner(soft.module.model, rows)
    loss_B = hard.losses(hard.module(batch), batch).loss_B
    assert torch.equal(soft.losses(soft.module(batch), certain).loss_B, loss_B)
    assert not torch.allclose(soft.losses(soft.module(batch), batch).loss_B, loss_B)


def test_values_go_back_to_their_prompt_and_carry_gradients():
    batch = shared_rows([token_row("a", answers=(1, 2)), token_row("b", answers=(1, 1, 2))], 0)
    values = torch.arange(1.0, 6.0, requires_grad=True)
    grid = batch.by_prompt(values)
    assert grid.tolist() == [[1, 2, 0], [3, 4, 5]]
    (grid * torch.tensor([[1.0, 2, 9], [3, 4, 5]])).sum().backward()
    assert values.grad.tolist() == [1, 2, 3, 4, 5]


# Steps and micro-batches


@given(st.integers(1, 40), st.integers(1, 12), st.integers(1, 4), st.integers(0, 5))
def test_every_epoch_sees_each_row_once(count, batch_size, epochs, seed):
    plan = list(steps(count, batch_size=batch_size, epochs=epochs, seed=seed))
    a_pass = -(-count // batch_size)
    assert len(plan) == a_pass * epochs
    for epoch in range(epochs):
        part = plan[epoch * a_pass : (epoch + 1) * a_pass]
        assert sorted(i for step in part for i in step) == list(range(count))
        assert all(len(step) == batch_size for step in part[:-1])
    assert plan == list(steps(count, batch_size=batch_size, epochs=epochs, seed=seed))


def test_epochs_and_seeds_shuffle_differently():
    order = lambda seed: [i for step in steps(50, batch_size=8, epochs=2, seed=seed) for i in step]
    assert order(0)[:50] != order(0)[50:] and order(0) != order(1)


@given(st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=30), st.integers(1, 80))
def test_micro_batches_keep_the_budget_and_every_row(shapes, budget):
    rows = [token_row(f"r{i}", prompt, (answer, answer)) for i, (prompt, answer) in enumerate(shapes)]
    parts = micro_batches(rows, max_tokens=budget)
    # As many rows to a part as fit: one row more from the next part is too many.
    assert all(
        sum(row.positions for row in part) + after[0].positions > budget for part, after in itertools.pairwise(parts)
    )
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in rows)
    assert all(len(part) == 1 or sum(row.positions for row in part) <= budget for part in parts)
    assert [[r.id for r in p] for p in parts] == [
        [r.id for r in p] for p in micro_batches(rows[::-1], max_tokens=budget)
    ]


LONG = [token_row(f"r{i}", 9 + i % 3, (2,) * (4 + i % 2)) for i in range(12)]  # K copies of a prompt where it is padded


@pytest.mark.parametrize(
    "module",
    [
        LogpModel(tiny(), layout="flat"),
        LogpModel(tiny(), layout="padded"),
        LogpModel(tiny("mistral-window", sliding_window=10), layout="flat"),  # a batch pads as a whole, or not at all
        RewardModel(tiny()),
    ],
    ids=["flat", "padded", "window", "reward"],
)
@pytest.mark.parametrize("budget", [1, 100, 250])
def test_the_budget_counts_the_places_that_a_forward_pass_computes(module, budget):
    parts = micro_batches(LONG, max_tokens=budget, cost=module.cost)
    computed = [module.batch(part, 0).input_ids.numel() for part in parts]
    assert computed == [module.cost(part) for part in parts]
    assert all(len(part) == 1 or places <= budget for part, places in zip(parts, computed))
    assert sorted(row.id for part in parts for row in part) == sorted(row.id for row in LONG)
    assert budget == 1 or len(parts) < len(LONG)
