"""Laws of the diagnosis: its numbers by hand, its words in both directions, its page of hostile texts."""

from __future__ import annotations

import itertools
import math
import re
from dataclasses import replace
from pathlib import Path

import pytest

from rankwise.diagnosis import (
    UNMOVED,
    Trained,
    broken,
    by_rank,
    contradicted,
    flips,
    quantile_bins,
    sign_bins,
    summary,
)
from rankwise.types import Answer, Row, text_prompt
from tasks import diagnosis_facts, diagnosis_plots, diagnosis_words, dpo
from tasks.diagnosis import Diagnosis, Params, diagnose
from tasks.diagnosis_page import html_page, markdown_page

DPO = vars(dpo.Params())


def trained(id_: str, changes, *, reference=None, tokens=None, ranks=None, beta=1.0, **more) -> Trained:
    """A row of given changes h_k; plain rewards β·h_k, a loss of no interest."""
    reference = tuple(reference or [-10.0] * len(changes))
    return Trained(
        id=id_,
        reference=reference,
        policy=tuple(before + change for before, change in zip(reference, changes)),
        tokens=tuple(tokens or [10] * len(changes)),
        ranks=tuple(ranks or range(len(changes))),
        rewards=tuple(beta * change for change in changes),
        **{"split": "held_out", "loss": 0.5, **more},
    )


TABLE = [
    trained("a", [1, -3], tokens=[2, 4], strengths=(2.0, 0.0)),
    trained("b", [-2, -5, -8], tokens=[4, 5, 8], strengths=(1.0, 0.5, -0.5)),
    trained("c", [-4, -1], tokens=[8, 2], strengths=(0.1, 0.0)),
]


# Numbers


def test_three_rows_by_hand():
    """a: h = (1, −3), b: h = (−2, −5, −8), c: h = (−4, −1).

    Best: (1 − 2 − 4)/3 = −5/3; worst: (−3 − 8 − 1)/3 = −4; margin: (4 + 6 − 3)/3 = 7/3 = −5/3 + 4.
    Common: (−1 − 5 − 2.5)/3; spread: (2 + √6 + 1.5)/3, for b of deviations (3, 0, −3).
    A token: best (1/2 − 2/4 − 4/8)/3 = −1/6, worst (−3/4 − 8/8 − 1/2)/3 = −3/4.
    Pairs ranked rightly: a 1 of 1, b 3 of 3, c 0 of 1.
    """
    found = summary(TABLE)
    moved = found.per_answer
    assert moved.chosen.mean == pytest.approx(-5 / 3) and moved.rejected.mean == pytest.approx(-4)
    assert moved.margin.mean == pytest.approx(7 / 3)
    assert moved.common.mean == pytest.approx(-8.5 / 3)
    assert moved.spread.mean == pytest.approx((3.5 + math.sqrt(6)) / 3)
    assert moved.chosen_share == pytest.approx(-5 / 7)
    assert found.per_token.chosen.mean == pytest.approx(-1 / 6)
    assert found.per_token.rejected.mean == pytest.approx(-3 / 4)
    assert found.accuracy.mean == pytest.approx(2 / 3)
    assert found.chosen_fell.mean == pytest.approx(2 / 3, abs=0.2)
    assert {case: round(share * 3) for case, share in found.cases.items() if share} == {
        "chosen up, rejected down": 1,
        "both down": 2,
    }


def test_the_parts_of_a_margin_add_up_to_it():
    for row in TABLE:
        assert row.changes[0] - row.changes[-1] == pytest.approx(row.reward_margin)
    moved = summary(TABLE).in_loss
    assert moved.chosen.mean - moved.rejected.mean == pytest.approx(moved.margin.mean)
    assert moved.chosen_share + -moved.rejected.mean / moved.margin.mean == pytest.approx(1)


def test_a_policy_that_equals_its_reference_shows_zero_everywhere():
    found = summary([trained(str(n), [0.0] * k, drawn=True) for n, k in enumerate((2, 3, 4))])
    for moved in (found.per_answer, found.per_token, found.in_loss):
        means = (moved.chosen, moved.rejected, moved.margin, moved.common, moved.spread)
        assert [(one.mean, one.low, one.high) for one in means] == [(0, 0, 0)] * 5
        assert moved.chosen_share is None
    assert found.cases[UNMOVED] == 1 and found.accuracy.mean == 0.5 and found.kl.mean == 0


def test_a_constant_added_to_all_changes_of_a_row_moves_the_common_part_and_no_margin():
    before, after = (summary([_lifted(row, by) for row in TABLE]) for by in (0.0, -7.0))
    assert after.per_answer.common.mean == pytest.approx(before.per_answer.common.mean - 7)
    assert after.per_answer.chosen.mean == pytest.approx(before.per_answer.chosen.mean - 7)
    assert after.per_answer.margin.mean == pytest.approx(before.per_answer.margin.mean)
    assert after.per_answer.spread.mean == pytest.approx(before.per_answer.spread.mean)
    assert after.accuracy == before.accuracy


def _lifted(row: Trained, by: float) -> Trained:
    lift = lambda values: tuple(value + by for value in values)
    return replace(row, policy=lift(row.policy), rewards=lift(row.rewards))


def test_permuting_rows_changes_nothing():
    rows = [trained(f"{n:02}", [math.sin(n), math.cos(3 * n)], strengths=(n % 5, 0.0)) for n in range(40)]
    other = rows[::-1]
    assert summary(rows).cases == summary(other).cases
    assert summary(rows).per_answer.margin.mean == pytest.approx(summary(other).per_answer.margin.mean)
    spans = lambda bins: [(one.low, one.high, one.found.rows) for one in bins]
    gap = lambda row: row.gap
    assert spans(quantile_bins(rows, gap, 4)) == spans(quantile_bins(other, gap, 4))
    assert contradicted(rows) == contradicted(other)
    assert broken(rows, per_token=False) == broken(other, per_token=False)


def test_ties_are_no_pair_and_equal_rewards_are_half_right():
    """Ranks 0, 1, 1: the pairs are (1st, 2nd) and (1st, 3rd); rewards 1, 1, 0 make them half right and right."""
    assert trained("t", [1.0, 1.0, 0.0], ranks=[0, 1, 1]).accuracy == pytest.approx(0.75)


def test_ragged_rows_count_at_every_rank_that_they_have():
    assert by_rank(TABLE) == {
        0: (3, pytest.approx(-5 / 3), pytest.approx(-1 / 6)),
        1: (3, pytest.approx(-3), pytest.approx((-3 / 4 - 5 / 5 - 1 / 2) / 3)),
        2: (1, pytest.approx(-8), pytest.approx(-1)),
    }


def test_bins_hold_every_row_once_and_equal_numbers_share_one():
    rows = [trained(str(n), [0.0, -1.0], strengths=(gap, 0.0)) for n, gap in enumerate([1, 1, 1, 1, 1, 2, 3, 4])]
    bins = quantile_bins(rows, lambda row: row.gap, 4)
    assert sum(one.found.rows for one in bins) == len(rows)
    assert all(one.high < other.low for one, other in itertools.pairwise(bins))
    assert quantile_bins([trained("x", [0, 0])], lambda row: row.gap, 4) == []
    longer = sign_bins(TABLE, lambda row: row.longer_by)
    assert [(one.low, one.high, one.found.rows) for one in longer] == [(-4, -2, 2), (6, 6, 1)]


def test_the_kl_is_of_rows_that_the_reference_drew_alone():
    """Mean of −h over the answers of the drawn row: (2 + 5 + 8) / 3 = 5."""
    assert summary(TABLE).kl is None
    found = summary([replace(TABLE[1], drawn=True), TABLE[0]])
    assert found.kl.mean == pytest.approx(5) and found.drawn == 0.5


# Single rows


def test_contradicted_rows_are_those_of_a_negative_margin_the_surest_first():
    rows = [trained("right", [1, 0]), trained("sure", [-9, 0]), trained("no difference", [0, 0])]
    rows += [trained("b", [-1, 0]), trained("a", [-1, 0])]
    assert [row.id for row in contradicted(rows)] == ["sure", "a", "b"]


def test_a_gap_of_the_median_or_more_is_a_large_one_and_unknown_gaps_are_neither():
    gaps = {"small": 1.0, "median": 2.0, "large": 3.0}
    rows = [trained(name, [-1, 0], split="train", strengths=(gap, 0.0)) for name, gap in gaps.items()]
    assert {row.id for row in diagnose(rows, Params(), per_token=False).sure} == {"median", "large"}
    mixed = diagnose([*rows, trained("imported", [-1, 0], split="train")], Params(), per_token=False)
    assert mixed.sure_gap == 2 and {row.id for row in mixed.sure} == {"median", "large"}
    unknown = diagnose([replace(row, strengths=()) for row in rows], Params(), per_token=False)
    assert unknown.sure_gap is None and unknown.sure == [] and len(unknown.contradicted) == 3


FLIPS = {  # log π_ref and log π of best and worst, both of 10 tokens
    "kept right": ((-10, -12), (-11, -14)),
    "mended": ((-12, -10), (-12, -13)),
    "broken": ((-10, -12), (-13, -12)),
    "kept wrong": ((-12, -10), (-13, -11)),
}


@pytest.mark.parametrize("flip", FLIPS)
def test_a_row_flips_where_the_order_by_likelihood_is_another_one_than_before(flip):
    reference, policy = FLIPS[flip]
    row = trained("r", [after - before for before, after in zip(reference, policy)], reference=reference)
    assert row.flip(per_token=False) == row.flip(per_token=True) == flip
    assert flips([row], per_token=True) == {kind: int(kind == flip) for kind in FLIPS}
    assert broken([row], per_token=True) == [row] * (flip == "broken")


def test_a_token_and_in_sum_the_order_may_differ():
    """−10 nats of 20 tokens is less in sum, and more a token, than −8 of 8."""
    row = trained("r", [0, 0], reference=(-10, -8), tokens=(20, 8))
    assert row.likelier(row.reference, per_token=True) and not row.likelier(row.reference, per_token=False)


# Words


def told(rows: list[Trained], *, per_token: bool = False, **changed) -> tuple[str, str, dict[str, str]]:
    """Kind and line of the answer, and what each rule that speaks says: name -> "kind: text"."""
    facts = diagnosis_facts.facts_of(diagnose(rows, Params(bins=2), per_token=per_token))
    training = DPO | changed
    said = diagnosis_words.findings(facts, training)
    by_rule = {rule.__name__: rule(facts, training) for rule in diagnosis_words.RULES}
    spoken = {name.strip("_"): f"{one.kind}: {one.text} {one.todo}" for name, one in by_rule.items() if one}
    return *diagnosis_words.answer(facts, said), spoken


def many(changes, *, count=30, **more) -> list[Trained]:
    """Rows alike; every other one a nat further, so that intervals have a width."""
    return [
        trained(f"{more.get('split', 'h')}{n:03}", [c - 0.1 * (n % 2) for c in changes], **more) for n in range(count)
    ]


def test_a_fall_of_answers_that_the_reference_drew_is_normal_and_of_others_it_must_be_small():
    kind, line, spoken = told(many([-4, -9], tokens=[10, 10], drawn=True))
    assert kind == "pass" and "has to fall" in line and "KL" in spoken["expected"]
    kind, line, spoken = told(many([-4, -9], tokens=[10, 10]))
    assert kind == "fail" and spoken["expected"].startswith("concern") and "dpo.beta (now 0.2)" in spoken["expected"]
    kind, line, spoken = told(many([-0.4, -9], tokens=[10, 10]))
    assert kind == "pass" and "the fall is small" in line and spoken["expected"].startswith("said")


def test_best_answers_that_became_likelier_are_said_to_have_risen():
    kind, line, spoken = told(many([2, -3]))
    assert kind == "pass" and "does not fall" in line and "expected" not in spoken


def test_a_policy_that_did_not_move_is_said_to_have_learnt_nothing():
    kind, line, _ = told([trained(str(n), [0.0, 0.0]) for n in range(30)])
    assert kind == "none" and "Nothing has moved" in line


def test_a_fall_by_more_than_half_a_token_is_a_concern_and_less_is_none():
    assert "depth" not in told(many([-6, -9], drawn=True))[2]
    kind, _, spoken = told(many([-8, -9], drawn=True))
    assert kind == "fail" and spoken["depth"].startswith("concern")
    assert "dpo.loss to ipo" in spoken["depth"] and "dpo.epochs" not in spoken["depth"]
    again = told(many([-8, -9], drawn=True), loss="ipo", epochs=3)[2]["depth"]
    assert "ipo" not in again and "dpo.epochs (now 3)" in again


def test_a_fall_that_bought_no_order_is_a_concern():
    assert told(many([-4, -9], drawn=True))[2]["learnt"].startswith("said")
    rows = [trained(str(n), [-4, -9] if n % 2 else [-9, -4], drawn=True) for n in range(30)]
    kind, _, spoken = told(rows)
    assert kind == "fail" and spoken["learnt"].startswith("concern") and "origin" not in spoken


@pytest.mark.parametrize(
    ("changes", "where"),
    [
        ((2, -3), "from both"),
        ((-2, -3), "wholly from pushing the worst down"),
        ((3, 2), "wholly from lifting the best"),
    ],
)
def test_the_margin_is_said_to_come_from_where_it_comes(changes, where):
    assert where in told(many(changes))[2]["origin"]


def test_the_unseen_part_is_told_in_the_unit_of_the_loss():
    """h = (−4.05, −9.15) on average, over 10 and 20 tokens: −6.6 an answer; (−0.405 − 0.4575)/2 = −0.43 a token."""
    rows = many([-4, -9.1], tokens=[10, 20])
    assert "−6.6 nats an answer" in told(rows)[2]["unseen"]
    assert "−0.43 nats a token" in told(rows, per_token=True)[2]["unseen"]


def test_training_rows_much_better_than_held_out_ones_are_said_to_be_learnt_by_heart():
    """Held out, three rows in four are right; of the training rows all, or three in four too."""
    some = lambda split: [
        trained(f"{split}{n}", [0, -1] if n % 4 else [-1, 0], split=split, drawn=True) for n in range(40)
    ]
    spoken = told(some("held_out") + many([0, -1], split="train"), epochs=2)[2]
    assert spoken["by_heart"].startswith("watch") and "dpo.epochs (now 2)" in spoken["by_heart"]
    assert "by_heart" not in told(some("held_out") + some("train"))[2]


@pytest.mark.parametrize(
    ("per_token", "todo"), [(False, "dpo.length_normalised to true"), (True, "audit of the judge")]
)
def test_an_order_that_hangs_on_length_is_told_with_its_mend(per_token, todo):
    longer = many([-1, -5], tokens=[20, 10])
    wrong = [replace(row, id=f"s{row.id}") for row in many([-5, -1], tokens=[10, 20])]
    assert todo in told(longer + wrong, per_token=per_token)[2]["length"]
    right = [replace(row, id=f"s{row.id}") for row in many([-1, -5], tokens=[10, 20])]
    assert told(longer + right)[2]["length"].startswith("said: Length hardly matters")


def test_a_policy_is_to_be_righter_where_the_judge_was_surer():
    sure = lambda changes: [replace(row, id=f"s{row.id}") for row in many(changes, strengths=(5.0, 0.0))]
    unsure = lambda changes: many(changes, strengths=(1.0, 0.0))
    assert told(sure([-1, -5]) + unsure([-5, -1]))[2]["gap"].startswith("said")
    spoken = told(sure([-5, -1]) + unsure([-1, -5]), loss="soft_plackett_luce")[2]["gap"]
    assert spoken.startswith("watch") and "plackett_luce" in spoken
    assert "gap" not in told(many([-1, -5]))[2]


def test_many_near_ties_ask_for_a_higher_tie_limit():
    near = many([-1, -5], strengths=(1.0, 0.0), split="train")
    assert "preferences.tie_below" in told(near)[2]["near_ties"]
    assert "soft_plackett_luce" in told(near)[2]["near_ties"]
    assert "soft_plackett_luce" not in told(near, loss="ipo")[2]["near_ties"]
    assert "near_ties" not in told(many([-1, -5], strengths=(2.0, 0.0), split="train"))[2]


def test_contradictions_are_counted_and_none_is_said_to_be_none():
    rows = many([-1, -5], split="train", strengths=(2.0, 0.0))
    assert "in 0 of 30 training rows" in told(rows)[2]["contradicted"]
    odd = trained("odd", [-5, -1], split="train", strengths=(2.0, 0.0))
    assert "in 1 of 31 training rows (3 %), in 1 of them" in told([*rows, odd])[2]["contradicted"]
    assert "contradicted" not in told(many([-1, -5]))[2], "no training row, no word of them"


def test_an_order_by_likelihood_that_broke_more_than_it_mended_is_a_concern():
    mended = many([-1, -5], reference=(-10, -9))
    assert told(mended)[2]["order"].startswith("said") and "mended 30, broken 0" in told(mended)[2]["order"]
    kind, _, spoken = told(many([-5, -1], reference=(-9, -10)))
    assert kind == "fail" and spoken["order"].startswith("concern")


def test_held_out_rows_speak_where_there_are_enough_of_them():
    training = many([-1, -5], split="train")
    few, enough = (many([-2, -5], count=n) for n in (diagnosis_facts.ENOUGH_ROWS - 1, diagnosis_facts.ENOUGH_ROWS))
    assert "On training rows" in told(training + few)[2]["fell"]
    assert "On held-out rows" in told(training + enough)[2]["fell"]
    assert "On training rows" in told(training)[2]["fell"]


# Pages


HOSTILE = '<script>alert("1")</script> <img src=x onerror=alert(2)> <|im_end|> | `x` [y](z)'


@pytest.fixture
def hostile(tmp_path) -> tuple[Diagnosis, dict[str, Row], dict[str, Path]]:
    """A diagnosis in which every text, and an id, is an attack on the page."""
    name = "<b onclick=alert(3)>"
    rows = many([-1, -5], split="train", strengths=(2.0, 0.0))
    rows.append(trained(name, [-5, -1, -1], split="train", ranks=[0, 1, 1], strengths=(3.0, 0.0, 0.0)))
    found = diagnose(rows, Params(), per_token=False)
    answers = (Answer(text=HOSTILE, rank=0), Answer(text=HOSTILE, rank=1))
    texts = {row.id: Row(id=row.id, prompt=text_prompt(HOSTILE), answers=answers) for row in rows}
    return found, texts, diagnosis_plots.draw(found, tmp_path)


def page_of(page, hostile) -> str:
    found, texts, pictures = hostile
    said = diagnosis_words.findings(diagnosis_facts.facts_of(found), DPO)
    return page(found, said, texts, pictures, listed=5)


def test_a_hostile_text_leaves_no_live_tag_in_the_page(hostile):
    text = page_of(html_page, hostile)
    assert "&lt;script&gt;" in text and "<mark" in text, "it is there, as data"
    assert not re.search(r"<script>alert|<img src=x|<b onclick", text)
    assert re.findall(r"<script[^>]*>[^<]+", text) == [], "the only script element is empty"


def test_a_hostile_text_stays_in_its_cell_of_markdown(hostile):
    text = page_of(markdown_page, hostile)
    (line,) = [line for line in text.splitlines() if "onclick" in line]
    assert len(re.findall(r"(?<!\\)\|", line)) == 7, "six cells"
    assert not re.search(r"(?<!\\)<(?:script|img|b )", text)


def test_the_answer_stands_first_and_the_rows_to_look_at_are_shown(hostile):
    for page in (html_page, markdown_page):
        text = page_of(page, hostile)
        places = [text.index(part) for part in ("Is that normal?", "reason for concern", "What to do", "Definitions")]
        assert places == sorted(places)
        assert "1 of 1" in text and "look at it: a large gap" in text


def test_the_same_numbers_draw_the_same_pictures(hostile, tmp_path):
    found, _, pictures = hostile
    (tmp_path / "again").mkdir()
    again = diagnosis_plots.draw(found, tmp_path / "again")
    assert [path.read_bytes() for path in pictures.values()] == [path.read_bytes() for path in again.values()]


def test_a_policy_that_did_not_move_can_be_drawn_and_told(tmp_path):
    found = diagnose([trained(str(n), [0.0, 0.0]) for n in range(3)], Params(), per_token=True)
    texts = {str(n): Row(id=str(n), prompt=text_prompt("p"), answers=()) for n in range(3)}
    text = page_of(html_page, (found, texts, diagnosis_plots.draw(found, tmp_path)))
    assert "Nothing has moved" in text
