"""Replies to rankings: position cancels, ties are ties, circles are seen, nothing is invented for what is missing."""

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rankwise.ranking import all_tied, log_odds, rank
from rankwise.types import Answer, Row, text_prompt


def row(*texts: str) -> Row:
    return Row(id="r", prompt=text_prompt("p"), answers=tuple(Answer(text=text) for text in texts))


def pointwise(*scores: float) -> list:
    return [(i, None, score) for i, score in enumerate(scores)]


def both_orders(odds: dict[tuple[int, int], float], bias: float = 0.0) -> list:
    """What a judge with log-odds and a liking for the first place says."""
    return [(i, j, v + bias) for (i, j), v in odds.items()] + [(j, i, -v + bias) for (i, j), v in odds.items()]


def order(judged) -> list[str]:
    return [answer.text for answer in judged.row.answers]


def ranks(judged) -> list[int]:
    return [answer.rank for answer in judged.row.answers]


def test_scores_rank_by_size_and_strength_is_the_score_without_its_mean():
    judged = rank(row("low", "high", "mid"), pointwise(-1.0, 3.0, 1.0), tie_below=0.0)
    assert order(judged) == ["high", "mid", "low"] and ranks(judged) == [0, 1, 2]
    assert [a.strength for a in judged.row.answers] == pytest.approx([2.0, 0.0, -2.0])
    assert judged.position_bias == () and not judged.circular and judged.unjudged == 0


@given(st.floats(-5, 5), st.floats(-5, 5), st.floats(-20, 20))
def test_position_bias_cancels(a, b, bias):
    """Half the difference of the two orders is the preference, half the sum is the bias."""
    replies = both_orders({(0, 1): a, (0, 2): b, (1, 2): b - a}, bias)
    judged = rank(row("x", "y", "z"), replies, tie_below=0.0)
    fair = rank(row("x", "y", "z"), both_orders({(0, 1): a, (0, 2): b, (1, 2): b - a}), tie_below=0.0)
    assert judged.position_bias == pytest.approx([bias] * 3, abs=1e-9)
    mine, theirs = ({a.text: a.strength for a in j.row.answers} for j in (judged, fair))
    assert mine == pytest.approx(theirs, abs=1e-9)


def test_a_judge_that_sees_only_the_place_calls_a_tie():
    judged = rank(row("x", "y"), [(0, 1, 4.0), (1, 0, 4.0)], tie_below=1e-9)
    assert ranks(judged) == [0, 0] and all_tied(judged.row)


def test_one_order_alone_tells_nothing():
    odds, biases = log_odds([(0, 1, 3.0)], 2)
    assert np.isnan(odds[0, 1]) and biases == []
    judged = rank(row("x", "y", "z"), [(0, 1, 3.0), *both_orders({(0, 2): 1.0})], tie_below=0.0)
    assert order(judged) == ["x", "z"] and judged.unjudged == 1


@pytest.mark.parametrize("tie_below, expected", [(0.0, [0, 1, 2, 3]), (0.05, [0, 0, 2, 3]), (0.5, [0, 0, 2, 2])])
def test_neighbours_closer_than_the_limit_tie(tie_below, expected):
    """Scores 2.04, 2.0, 1.0, 0.6; a tie takes the places that it fills."""
    assert ranks(rank(row(*"abcd"), pointwise(2.04, 2.0, 1.0, 0.6), tie_below=tie_below)) == expected


def test_answers_with_one_text_tie_whatever_was_said_of_them():
    judged = rank(row("same", "other", "same"), both_orders({(0, 1): 2.0, (2, 1): 2.0}), tie_below=0.0)
    assert order(judged) == ["same", "same", "other"] and ranks(judged) == [0, 0, 2]
    assert all_tied(rank(row("same", "same"), [], tie_below=0.0).row)


@pytest.mark.parametrize("bad", [float("nan")])
def test_an_answer_without_a_valid_score_is_left_out_and_counted(bad):
    judged = rank(row("x", "y", "z"), pointwise(1.0, bad, 2.0), tie_below=0.0)
    assert order(judged) == ["z", "x"] and ranks(judged) == [0, 1] and judged.unjudged == 1


def test_three_that_beat_each_other_in_a_circle_are_seen():
    circle = rank(row(*"abc"), both_orders({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 1.0}), tie_below=0.1)
    assert circle.circular
    assert not rank(row(*"abc"), both_orders({(0, 1): 1.0, (1, 2): 1.0, (0, 2): 1.0}), tie_below=0.1).circular
    weak = both_orders({(0, 1): 1.0, (1, 2): 1.0, (2, 0): 0.05})
    assert not rank(row(*"abc"), weak, tie_below=0.1).circular  # its last link is a tie


@given(st.lists(st.integers(-4, 4), min_size=2, max_size=6), st.booleans())
def test_an_oracle_is_always_right_and_its_opposite_always_wrong(worths, pairwise):
    """Pointwise or pairwise, every two answers of unequal worth come out in the order of their worths."""
    texts = row(*(str(i) for i in range(len(worths))))
    for sign in (1, -1):
        if pairwise:
            pairs = itertools.combinations(range(len(worths)), 2)
            replies = both_orders({(i, j): sign * float(worths[i] - worths[j]) for i, j in pairs}, bias=0.7)
        else:
            replies = pointwise(*(sign * float(w) for w in worths))
        answers = rank(texts, replies, tie_below=0.0).row.answers
        found = {int(answer.text): answer.rank for answer in answers}
        for i, j in itertools.combinations(range(len(worths)), 2):
            right = np.sign(found[j] - found[i]) * np.sign(worths[i] - worths[j])
            assert right == (0 if worths[i] == worths[j] else sign)
