"""Verdicts to rankings: position cancels, ties are ties, circles are seen, nothing is invented for what is missing."""

import itertools
import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rankwise.ranking import all_tied, compare, rank
from rankwise.strengths import bradley_terry
from rankwise.types import Answer, Row, text_prompt
from rankwise.verdicts import LOG3, Verdict

# The first example of a cold process may take long; a shared machine is no reason to fail.
settings.register_profile("patient", deadline=None)
settings.load_profile("patient")


def row(*texts: str) -> Row:
    return Row(id="r", prompt=text_prompt("p"), answers=tuple(Answer(text=text) for text in texts))


def verdict(shown: tuple[int, ...], values, *, judge: str = "judge", sample: int = 0) -> Verdict:
    words = {"said": "", "reason": "", "raw": "", "prompt_tokens": 0, "completion_tokens": 0}
    values = None if values is None else tuple(values)
    return Verdict(row_id="r", judge=judge, shown=shown, sample=sample, attempts=1, values=values, mass=1.0, **words)


def pair(i: int, j: int, odds: float | None, **rest) -> Verdict:
    return verdict((i, j), None if odds is None else (odds, 0.0), **rest)


def pointwise(*scores: float | None, **rest) -> list[Verdict]:
    return [verdict((i,), None if score is None else (score,), **rest) for i, score in enumerate(scores)]


def both_orders(odds: dict[tuple[int, int], float], bias: float = 0.0, **rest) -> list[Verdict]:
    """What a judge with log-odds and a liking for the first place says."""
    return [
        said for (i, j), v in odds.items() for said in (pair(i, j, v + bias, **rest), pair(j, i, -v + bias, **rest))
    ]


def rotations(worths: list[float], liking: list[float] | None = None, **rest) -> list[Verdict]:
    """What a judge says of a list in all its rotations; liking: nats that it adds by place."""
    places = list(range(len(worths)))
    liking = liking or [0.0] * len(worths)
    turns = [tuple(places[start:] + places[:start]) for start in places]
    return [verdict(turn, [worths[k] + liking[n] for n, k in enumerate(turn)], **rest) for turn in turns]


def order(judged) -> list[str]:
    return [answer.text for answer in judged.row.answers]


def ranks(judged) -> list[int]:
    return [answer.rank for answer in judged.row.answers]


def by_text(judged, name: str = "strength") -> dict[str, float]:
    return {answer.text: getattr(answer, name) for answer in judged.row.answers}


# Scores


def test_scores_rank_by_size_and_strength_is_the_score_without_its_mean():
    judged = rank(row("low", "high", "mid"), pointwise(-1.0, 3.0, 1.0), tie_below=0.0)
    assert order(judged) == ["high", "mid", "low"] and ranks(judged) == [0, 1, 2]
    assert [a.strength for a in judged.row.answers] == pytest.approx([2.0, 0.0, -2.0])
    assert [a.strength_se for a in judged.row.answers] == [None] * 3, "nobody compared them"
    assert judged.position_bias == () and judged.circular_triads == judged.unjudged == judged.invalid == 0
    assert judged.smallest_gap == pytest.approx(2.0) and judged.most_circular_triads == 1


@pytest.mark.parametrize("scale", [1.0, 1e3])
def test_scores_of_any_size_keep_their_order(scale):
    """A function's score is no log-odds: its differences may be thousands."""
    judged = rank(row(*"abcd"), pointwise(*(scale * s for s in (3.0, -7.0, 3.5, 900.0))), tie_below=0.0)
    assert order(judged) == ["d", "c", "a", "b"] and ranks(judged) == [0, 1, 2, 3]


def test_an_answer_without_a_valid_score_is_left_out_and_counted():
    judged = rank(row("x", "y", "z"), pointwise(1.0, None, 2.0), tie_below=0.0)
    assert order(judged) == ["z", "x"] and ranks(judged) == [0, 1] and judged.unjudged == judged.invalid == 1


def test_draws_of_one_question_count_as_their_mean():
    draws = [*pointwise(1.0, 3.0), *pointwise(2.0, None, sample=1), *pointwise(6.0, 4.0, sample=2)]
    assert by_text(rank(row("x", "y"), draws, tie_below=0.0)) == pytest.approx({"x": -0.25, "y": 0.25})
    asked = [pair(0, 1, 2.0), pair(0, 1, 4.0, sample=1), pair(1, 0, -1.0), pair(1, 0, None, sample=1)]
    compared = compare(row("x", "y"), asked)
    assert compared.odds_KK[0, 1] == pytest.approx((3.0 + 1.0) / 2) and compared.replies_KK[0, 1] == 3


# Pairs


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-20, 20))
def test_position_bias_cancels(a, b, bias):
    """Half the difference of the two orders is the preference, half the sum is the bias."""
    replies = both_orders({(0, 1): a, (0, 2): b, (1, 2): b - a}, bias)
    judged = rank(row("x", "y", "z"), replies, tie_below=0.0)
    fair = rank(row("x", "y", "z"), both_orders({(0, 1): a, (0, 2): b, (1, 2): b - a}), tie_below=0.0)
    assert judged.position_bias == pytest.approx([bias] * 3, abs=1e-9)
    assert by_text(judged) == pytest.approx(by_text(fair), abs=1e-7)


def test_a_judge_that_sees_only_the_place_calls_a_tie():
    judged = rank(row("x", "y"), [pair(0, 1, 4.0), pair(1, 0, 4.0)], tie_below=1e-9)
    assert ranks(judged) == [0, 0] and all_tied(judged.row)


def test_one_order_alone_tells_nothing():
    compared = compare(row("x", "y"), [pair(0, 1, 3.0)])
    assert np.isnan(compared.odds_KK[0, 1]) and compared.position_bias == ()
    judged = rank(row("x", "y", "z"), [pair(0, 1, 3.0), *both_orders({(0, 2): 1.0})], tie_below=0.0)
    assert order(judged) == ["x", "z"] and judged.unjudged == 1


def test_an_invalid_reply_is_no_tie_and_no_loss():
    judged = rank(row("x", "y"), [pair(0, 1, 3.0), pair(1, 0, None)], tie_below=0.0)
    assert judged.row.answers == () and judged.unjudged == 2 and judged.invalid == 1 and all_tied(judged.row)
    assert judged.smallest_gap is None


def test_the_strengths_of_pairs_are_the_bradley_terry_fit_and_carry_its_errors():
    """Verdicts without probabilities, each pair in both orders: log 3 for two alike, 0 for two that contradict."""
    odds = {(0, 1): LOG3, (0, 2): LOG3, (1, 2): 0.0}
    judged = rank(row(*"abc"), both_orders(odds), tie_below=0.0)
    wins = np.array([[0, 1.5, 1.5], [0.5, 0, 1.0], [0.5, 1.0, 0]])  # 2 replies a pair: p = ¾ are 1.5 wins
    fit = bradley_terry(wins)
    assert [a.strength for a in judged.row.answers] == pytest.approx(fit.strengths_M.tolist(), abs=1e-9)
    assert [a.strength_se for a in judged.row.answers] == pytest.approx(fit.errors_M.tolist(), abs=1e-9)
    assert ranks(judged) == [0, 1, 1]


def test_incomplete_comparisons_rank_the_largest_group_that_chains_join():
    pairs = both_orders({(0, 1): 1.0, (1, 2): 0.5, (3, 4): 9.0})
    judged = rank(row(*"abcdef"), pairs, tie_below=0.0)
    assert order(judged) == ["a", "b", "c"] and judged.unjudged == 3 and judged.most_circular_triads == 0
    assert [a.strength for a in judged.row.answers] == pytest.approx([5 / 6, -1 / 6, -4 / 6], abs=1e-9)


def test_three_that_beat_each_other_in_a_circle_are_counted_and_told_apart_by_nothing():
    circle = rank(row(*"abc"), both_orders({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}), tie_below=0.1)
    assert circle.circular_triads == circle.most_circular_triads == 1
    assert ranks(circle) == [0, 0, 0] and all_tied(circle.row), "their place in the row would be their rank"
    straight = rank(row(*"abc"), both_orders({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 1.0}), tie_below=0.1)
    assert straight.circular_triads == 0 and ranks(straight) == [0, 1, 2]
    weak = both_orders({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 0.05})
    assert rank(row(*"abc"), weak, tie_below=0.1).circular_triads == 0  # its last link is a tie


# Lists


def test_in_all_rotations_of_a_list_a_liking_for_places_cancels():
    worths, liking = [0.5, 2.0, -1.0, 0.0, 3.0], [4.0, 1.0, 0.0, -1.0, 2.0]
    judged = rank(row(*"abcde"), rotations(worths, liking), tie_below=0.0)
    assert order(judged) == ["e", "b", "a", "d", "c"]
    assert by_text(judged) == pytest.approx({t: w - 0.9 for t, w in zip("abcde", worths)})
    assert all(answer.strength_se > 0 for answer in judged.row.answers)


@pytest.mark.parametrize("missing", range(5))
def test_a_list_that_lacks_a_rotation_tells_nothing(missing):
    said = rotations([0.5, 2.0, -1.0, 0.0, 3.0])
    said[missing] = verdict(said[missing].shown, None)
    judged = rank(row(*"abcde"), said, tie_below=0.0)
    assert judged.row.answers == () and judged.unjudged == 5 and judged.invalid == 1
    both = rank(row(*"abcde"), [*said, *both_orders({(0, 1): 1.0})], tie_below=0.0)
    assert order(both) == ["a", "b"] and both.unjudged == 3


def test_a_pair_asked_by_itself_overrides_the_lists():
    lists = rotations([4.0, 3.0, 2.0, 1.0, 0.0])
    compared = compare(row(*"abcde"), [*lists, *both_orders({(0, 1): -0.5}, bias=0.2)])
    assert compared.odds_KK[0, 1] == pytest.approx(-0.5) and compared.odds_KK[0, 2] == pytest.approx(2.0)
    assert compared.replies_KK[0, 1] == 2 and compared.replies_KK[0, 2] == 5
    assert compared.position_bias == pytest.approx([0.2])
    judged = rank(row(*"abcde"), [*lists, *both_orders({(0, 1): -3.0})], tie_below=0.0)
    assert order(judged)[:2] == ["b", "a"]


# Ties, and texts that are the same


@pytest.mark.parametrize("tie_below, expected", [(0.0, [0, 1, 2, 3]), (0.05, [0, 0, 2, 3]), (0.5, [0, 0, 2, 2])])
def test_neighbours_closer_than_the_limit_tie(tie_below, expected):
    """Scores 2.04, 2.0, 1.0, 0.6; a tie takes the places that it fills."""
    assert ranks(rank(row(*"abcd"), pointwise(2.04, 2.0, 1.0, 0.6), tie_below=tie_below)) == expected


def test_a_chain_of_near_neighbours_does_not_tie_its_ends():
    """Each is 0.04 above the next; judges that said so of six answers would else have ranked none of them."""
    assert ranks(rank(row(*"abcdef"), pointwise(0.2, 0.16, 0.12, 0.08, 0.04, 0.0), tie_below=0.05)) == [
        0,
        0,
        2,
        2,
        4,
        4,
    ]
    undecided = both_orders({(0, 1): 0.0, (1, 2): 0.0, (0, 2): 1.1})  # the first beats the third; else ties
    assert ranks(rank(row(*"abc"), undecided, tie_below=0.05)) == [0, 0, 2]


@given(st.integers(0, 10**6))
@settings(max_examples=150)
def test_verdicts_without_probabilities_rank_alike_in_whatever_order_the_answers_stand(seed):
    """Equal strengths are common there, and the place of an answer must not decide between them."""
    draw = random.Random(seed)
    odds = {p: draw.choice([-LOG3, 0.0, LOG3]) for p in itertools.combinations(range(5), 2)}
    before = rank(row(*"abcde"), both_orders(odds), tie_below=0.05)
    to = draw.sample(range(5), 5)
    moved = [verdict(tuple(to[k] for k in v.shown), v.values) for v in both_orders(odds)]
    after = rank(row(*(text for _, text in sorted(zip(to, "abcde")))), moved, tie_below=0.05)
    assert by_text(after, "rank") == by_text(before, "rank")
    for i, j in itertools.combinations(before.row.answers, 2):
        if i.rank == j.rank:
            known = odds["abcde".index(i.text), "abcde".index(j.text)] if i.text < j.text else 0.0
            assert abs(known) <= 0.05 or abs(i.strength - j.strength) <= 0.05


def test_answers_with_one_text_tie_whatever_was_said_of_them():
    judged = rank(row("same", "other", "same"), both_orders({(0, 1): 2.0, (2, 1): 2.0}), tie_below=0.0)
    assert order(judged) == ["same", "same", "other"] and ranks(judged) == [0, 0, 2] and judged.smallest_gap == 0
    assert all_tied(rank(row("same", "same"), [], tie_below=0.0).row)
    asked_anyway = [*both_orders({(0, 1): 5.0}), *pointwise(None, None)]
    assert all_tied(rank(row("same", "same"), asked_anyway, tie_below=0.0).row)


def test_a_copy_of_an_answer_changes_nothing_for_the_others():
    odds = {(0, 1): 1.0, (0, 2): 0.3, (1, 2): -2.0}
    without = rank(row(*"abc"), both_orders(odds), tie_below=0.05)
    copies = {(i, j): odds[min(i % 3, j % 3), max(i % 3, j % 3)] * (1 if i % 3 < j % 3 else -1)
              for i, j in itertools.combinations(range(6), 2) if i % 3 != j % 3}  # fmt: skip
    with_them = rank(row(*"abcabc"), both_orders(copies), tie_below=0.05)
    assert by_text(with_them) == pytest.approx(by_text(without))
    assert by_text(with_them, "strength_se") == pytest.approx(by_text(without, "strength_se"))
    assert order(with_them) == [text for text in order(without) for _ in range(2)]


def test_copies_that_take_turns_in_lists_are_one_answer():
    worths = [0.5, 2.0, -1.0, 0.0, 3.0]
    first = rotations(worths)
    second = [verdict(tuple(5 if k == 1 else k for k in said.shown), said.values) for said in first]
    judged = rank(row(*"abcdeb"), [*first, *second], tie_below=0.0)
    assert order(judged) == ["e", "b", "b", "a", "d", "c"] and ranks(judged) == [0, 1, 1, 3, 4, 5]
    assert compare(row(*"abcdeb"), [*first, *second]).replies_KK[0, 1] == 5, "a copy is no further reply"


def test_a_single_answer_is_first_among_itself():
    judged = rank(row("x"), pointwise(1.0), tie_below=0.0)
    assert ranks(judged) == [0] and judged.unjudged == 0 and judged.smallest_gap is None
    assert rank(row(), [], tie_below=0.0).row.answers == ()


# A panel


def test_a_panel_prefers_by_the_mean_of_its_judges_probabilities():
    verdicts = [*both_orders({(0, 1): 2.0}, judge="a"), *both_orders({(0, 1): -0.5}, judge="b")]
    mean = (1 / (1 + math.exp(-2.0)) + 1 / (1 + math.exp(0.5))) / 2
    assert compare(row("x", "y"), verdicts).odds_KK[0, 1] == pytest.approx(math.log(mean / (1 - mean)))
    assert compare(row("x", "y"), verdicts).replies_KK[0, 1] == 4


def test_judges_who_are_certain_and_contradict_one_another_make_a_tie():
    verdicts = [*pointwise(900.0, 0.0, judge="a"), *pointwise(0.0, 900.0, judge="b")]
    assert compare(row("x", "y"), verdicts).odds_KK[0, 1] == pytest.approx(0.0, abs=1e-12)
    agreed = [*pointwise(900.0, 0.0, judge="a"), *pointwise(800.0, 0.0, judge="b")]
    # mean of 1 − e^−900 and 1 − e^−800
    assert compare(row("x", "y"), agreed).odds_KK[0, 1] == pytest.approx(800 + math.log(2))


def test_of_a_panel_those_decide_who_know_the_pair():
    one = both_orders({(0, 1): 2.0}, judge="a")
    other = [pair(0, 1, 3.0, judge="b"), pair(1, 0, None, judge="b")]
    assert compare(row("x", "y"), [*one, *other]).odds_KK[0, 1] == 2.0


@given(st.lists(st.floats(-20, 20), min_size=1, max_size=4))
def test_a_panel_of_one_opinion_has_that_opinion(scores):
    one = compare(row(*"abcd"[: len(scores)]), pointwise(*scores, judge="a"))
    many = compare(row(*"abcd"[: len(scores)]), [v for name in "abc" for v in pointwise(*scores, judge=name)])
    assert many.odds_KK == pytest.approx(one.odds_KK, abs=1e-9)


# What must not matter


@given(st.integers(0, 10**6))
@settings(max_examples=40)
def test_shuffled_answers_renamed_judges_and_shuffled_verdicts_change_nothing(seed):
    draw = random.Random(seed)
    odds = {p: draw.choice([-LOG3, 0.0, LOG3]) for p in itertools.combinations(range(4), 2)}
    verdicts = [*both_orders(odds, bias=0.3), *pointwise(*(draw.gauss(0, 1) for _ in range(4)), judge="second")]
    before = rank(row(*"abcd"), verdicts, tie_below=0.1)
    to = draw.sample(range(4), 4)
    moved = [
        verdict(tuple(to[k] for k in v.shown), v.values, judge={"judge": "x", "second": "a"}[v.judge]) for v in verdicts
    ]
    draw.shuffle(moved)
    after = rank(row(*(text for _, text in sorted(zip(to, "abcd")))), moved, tie_below=0.1)
    assert by_text(after) == pytest.approx(by_text(before), abs=1e-8)
    assert by_text(after, "rank") == by_text(before, "rank")
    assert after.circular_triads == before.circular_triads


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=6), st.sampled_from(["scores", "pairs", "lists"]))
def test_an_oracle_is_always_right_and_its_opposite_always_wrong(worths, how):
    """By scores, pairs or lists, every two answers of unequal worth come out in the order of their worths."""
    texts = row(*(str(i) for i in range(len(worths))))
    for sign in (1, -1):
        signed = [sign * float(w) for w in worths]
        if how == "scores":
            verdicts = pointwise(*signed)
        elif how == "lists" and len(worths) > 2:
            verdicts = rotations(signed, [0.7] + [0.0] * (len(worths) - 1))
        else:
            pairs = itertools.combinations(range(len(worths)), 2)
            verdicts = both_orders({(i, j): signed[i] - signed[j] for i, j in pairs}, bias=0.7)
        found = {int(answer.text): answer.rank for answer in rank(texts, verdicts, tie_below=0.0).row.answers}
        for i, j in itertools.combinations(range(len(worths)), 2):
            right = np.sign(found[j] - found[i]) * np.sign(worths[i] - worths[j])
            assert right == (0 if worths[i] == worths[j] else sign)
