"""Laws of the statistics by which judges are measured, and parity with other people's implementations of them."""

from __future__ import annotations

import itertools
import math
import random
from dataclasses import replace

import numpy as np
import pytest
from sklearn.calibration import calibration_curve
from sklearn.metrics import cohen_kappa_score

from rankwise.agreement import (
    LABELS,
    Pair,
    by_row,
    calibration,
    calibration_error,
    clustered_kappa,
    clustered_mean,
    clustered_share,
    cohen_kappa,
    confusion,
    either_way,
    first_share,
    flip_rate,
    krippendorff_alpha,
    label,
    paired_shift,
    pairs_of,
    position_bias,
    prefers_longer,
    prefers_longer_by_quartile,
    ranked_pairs,
    tie_rate,
    win,
)
from rankwise.evaluation import mean, share
from rankwise.types import Answer, Row, text_prompt
from rankwise.verdicts import Verdict


def row_of(*texts: str, ranks: tuple[int, ...] = ()) -> Row:
    ranked = ranks or (None,) * len(texts)
    return Row(id="r", prompt=text_prompt("p"), answers=tuple(Answer(text=t, rank=k) for t, k in zip(texts, ranked)))


def verdict(shown: tuple[int, ...], *values: float) -> Verdict:
    empty = {"said": "", "reason": "", "raw": "", "prompt_tokens": 0, "completion_tokens": 0}
    return Verdict(row_id="r", judge="j", shown=shown, sample=0, attempts=1, values=values or None, mass=1.0, **empty)


def pair(first: float, second: float, *, row_id: str = "r", longer: int = 0) -> Pair:
    """A pair by its log-odds for the first answer, shown first and shown second."""
    return Pair(row_id=row_id, places=(0, 1), preference=(first + second) / 2, orders=(first, second), longer=longer)


def simulated(n: int, agreement: float, seed: int) -> tuple[list[int], list[int]]:
    rng = random.Random(seed)
    first = rng.choices(LABELS, (5, 2, 3), k=n)
    return first, [one if rng.random() < agreement else rng.choice(LABELS) for one in first]


# Pairs


def test_a_pair_in_both_orders_is_half_the_difference_and_its_bias_half_the_sum():
    (one,) = pairs_of(row_of("a", "bb"), [verdict((0, 1), 3.0, 0.0), verdict((1, 0), 0.0, -1.0)])
    # Shown first the answer has log-odds 3; in the other order the log-odds of the other one, shown first, are 1.
    assert one.preference == 1.0 and one.orders == (3.0, -1.0) and one.bias == 2.0 and one.longer == -1


def test_one_order_alone_an_invalid_reply_and_one_text_twice_make_no_pair():
    assert pairs_of(row_of("a", "b"), [verdict((0, 1), 3.0, 0.0)]) == []
    assert pairs_of(row_of("a", "b"), [verdict((0, 1), 3.0, 0.0), verdict((1, 0))]) == []
    assert pairs_of(row_of("a", "a"), [verdict((0,), 1.0), verdict((1,), 1.0)]) == []


def test_scores_make_pairs_without_orders():
    (one,) = pairs_of(row_of("a", "b"), [verdict((0,), 2.0), verdict((1,), 0.5)])
    assert one.preference == 1.5 and one.orders is None


def test_ranks_are_labels_and_equal_ranks_ties():
    found = {one.places: one.preference for one in ranked_pairs(row_of("a", "b", "c", ranks=(1, 0, 1)))}
    assert found == {(0, 1): -1.0, (0, 2): 0.0, (1, 2): 1.0}


def test_a_pair_is_known_by_its_texts_wherever_they_stand():
    (one,) = ranked_pairs(row_of("a", "b", ranks=(0, 1)))
    (other,) = ranked_pairs(row_of("b", "a", ranks=(1, 0)))
    assert one.about == other.about and one.preference * one.side == other.preference * other.side == 1
    assert {pair.about for pair in ranked_pairs(row_of("a", "b", "a", ranks=(0, 1, 0)))} == {one.about}
    elsewhere = replace(row_of("a", "b", ranks=(0, 1)), prompt=text_prompt("another"))
    assert ranked_pairs(elsewhere)[0].about != one.about


def test_a_label_within_the_tie_limit_is_a_tie_and_sides_are_symmetric():
    assert [label(x, 0.5) for x in (0.6, 0.5, -0.5, -0.6)] == [1, 0, 0, -1]
    assert all(win(x, 0.5) + win(-x, 0.5) == 1 for x in (-2, -0.5, 0, 0.1, 3))


# Intervals


def test_with_one_value_a_row_intervals_are_the_ordinary_ones():
    values = [random.Random(1).gauss(0, 1) for _ in range(30)]
    ours, theirs = clustered_mean([(value, 1) for value in values]), mean(values)
    assert ours.as_dict() == pytest.approx(theirs.as_dict())
    hits = [1.0] * 12 + [0.0] * 28
    assert clustered_share([(hit, 1) for hit in hits]).as_dict() == pytest.approx(share(12, 40).as_dict())


def test_repeating_every_value_of_a_row_says_nothing_new():
    """Ten pairs that all say what their row says are one row's worth: no interval gets narrower."""
    values = [0.0, 1.0, 1.0, 0.0, 1.0, 0.0, 0.0]
    for of in (clustered_mean, clustered_share):
        once, often = of([(value, 1) for value in values]), of([(10 * value, 10) for value in values])
        assert often.as_dict() == pytest.approx(once.as_dict())


def test_rows_that_all_say_the_same_leave_an_interval():
    found = clustered_share([(6.0, 6)] * 20)
    assert found.mean == 1.0 and found.low == pytest.approx(share(20, 20).low) and found.low < 0.9


def test_one_row_tells_nothing_of_others_whatever_it_says():
    """So no gate fails, or passes, on it."""
    assert clustered_mean([(0.3, 1)], span=(0.0, 1.0)).as_dict() == {"mean": 0.3, "low": 0.0, "high": 1.0}
    assert clustered_share([(0.0, 4)]).as_dict() == {"mean": 0.0, "low": 0.0, "high": 1.0}
    whole = {"low": -1.0, "high": 1.0}
    assert clustered_kappa(np.array([either_way(confusion([1], [-1]))])).as_dict() == {"mean": -1.0, **whole}
    alpha = krippendorff_alpha([[1, -1], [-1, 1]], rows=["r", "r"])
    assert (alpha.low, alpha.high) == (-1.0, 1.0) and alpha.mean < 0
    assert position_bias([pair(1.0, -1.0)]) is None


def test_a_shift_that_never_happens_still_has_an_interval():
    found = paired_shift([1.0, 0.0, 0.5] * 30, [1.0, 0.0, 0.5] * 30)
    assert found.mean == 0 and found.low < -0.005 and found.high > 0.005


def test_a_shift_is_antisymmetric_and_wider_where_many_hold_together():
    before, after = [0.0] * 40 + [1.0] * 20, [1.0] * 25 + [0.0] * 25 + [1.0] * 10
    there, back = paired_shift(before, after), paired_shift(after, before)
    assert (there.mean, there.low, there.high) == pytest.approx((-back.mean, -back.high, -back.low))
    wide = paired_shift(before, after, together=14)
    assert wide.mean == there.mean and wide.low < there.low and wide.high > there.high


def test_the_interval_of_a_shift_holds_the_truth_19_times_of_20():
    """Up with 0.15, down with 0.05: a shift of 0.1. 600 tables of 60 rows; Wald's own interval misses more often."""
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(600):
        steps = rng.choice([1.0, -1.0, 0.0], p=[0.15, 0.05, 0.8], size=60)
        before = np.where(steps > 0, 0.0, 1.0)
        found = paired_shift(before, before + steps)
        held += found.low <= 0.1 <= found.high
    assert 0.93 <= held / 600 <= 0.985


# Order and length


def test_a_judge_that_takes_the_first_always_flips_and_one_that_reads_never_does():
    first = [pair(1.0, -1.0, row_id=str(n)) for n in range(20)]
    assert flip_rate(first, tie_below=0.0).mean == 1 and first_share(first, tie_below=0.0).mean == 1
    assert position_bias(first).mean == 1 and tie_rate(first, tie_below=0.0).mean == 1
    reads = [pair(2.0, 2.0, row_id=str(n)) for n in range(20)]
    assert flip_rate(reads, tie_below=0.0).mean == 0 and first_share(reads, tie_below=0.0).mean == 0.5
    assert position_bias(reads).mean == 0


def test_naming_a_pair_the_other_way_round_changes_no_measure():
    pairs = [
        pair(random.Random(n).gauss(0.5, 2), random.Random(-n - 1).gauss(-0.5, 2), longer=n % 5 - 2) for n in range(50)
    ]
    swapped = [
        Pair(
            row_id=p.row_id,
            places=(1, 0),
            preference=-p.preference,
            orders=(-p.orders[1], -p.orders[0]),
            longer=-p.longer,
        )
        for p in pairs
    ]
    for measure in (flip_rate, first_share, tie_rate, prefers_longer):
        assert measure(pairs, tie_below=0.1) == measure(swapped, tie_below=0.1)
    assert position_bias(pairs) == position_bias(swapped)


def test_a_tie_in_one_order_is_no_flip():
    assert flip_rate([pair(2.0, 0.0), pair(0.0, -1.0, row_id="s")], tie_below=0.0).mean == 0


@pytest.mark.parametrize(("sign", "expected"), [(1, 1.0), (-1, 0.0)])
def test_a_judge_of_length_alone_is_found_out_in_every_quartile(sign, expected):
    pairs = [pair(sign * d, sign * d, row_id=str(n), longer=d) for n, d in enumerate([*range(-20, 0), *range(1, 21)])]
    pairs += [pair(1.0, 1.0, row_id="equal", longer=0), pair(0.0, 0.0, row_id="tied", longer=9)]
    assert prefers_longer(pairs, tie_below=0.0).mean == expected
    quarters = prefers_longer_by_quartile(pairs, tie_below=0.0)
    assert [(least, most) for least, most, _ in quarters] == [(1, 5), (6, 10), (11, 15), (16, 20)]
    assert {found.mean for *_, found in quarters} == {expected}


def test_without_two_lengths_there_is_no_preference_for_the_longer():
    assert prefers_longer([pair(1.0, 1.0)], tie_below=0.0) is None
    assert prefers_longer_by_quartile([], tie_below=0.0) == []


# Agreement


@pytest.mark.parametrize("seed", range(5))
def test_kappa_is_scikit_learns(seed):
    first, second = simulated(200, 0.6, seed)
    assert cohen_kappa(confusion(first, second)).mean == pytest.approx(cohen_kappa_score(first, second))


def test_kappa_and_its_interval_on_the_table_of_fleiss_cohen_and_everitt():
    """Their example (1969): 200 cases, kappa 0.429; the standard error against 4,000 resamples of the table."""
    table = np.array([[106, 10, 4], [22, 28, 10], [2, 12, 6]])
    found = cohen_kappa(table)
    assert found.mean == pytest.approx(0.429, abs=5e-4)
    rng = np.random.default_rng(0)
    drawn = rng.multinomial(200, table.ravel() / 200, size=4000).reshape(-1, 3, 3)
    spread = np.std([cohen_kappa(one).mean for one in drawn])
    assert (found.high - found.low) / (2 * 1.96) == pytest.approx(spread, rel=0.05)


def test_kappa_of_rows_counts_rows_and_not_pairs():
    """With one pair a row its interval is that of independent things; pairs repeated within a row change nothing."""
    tables = np.array([confusion([one], [other]) for one, other in zip(*simulated(300, 0.5, 7))])
    alone, independent = clustered_kappa(tables), cohen_kappa(tables.sum(axis=0))
    assert alone.mean == independent.mean
    assert alone.high - alone.low == pytest.approx(independent.high - independent.low, rel=0.03)
    assert clustered_kappa(5 * tables).as_dict() == pytest.approx(alone.as_dict())


def test_kappa_of_one_label_for_everything_is_nothing():
    assert cohen_kappa(confusion([1] * 9, [1] * 9)).mean == 0


def test_kappa_either_way_does_not_depend_on_how_pairs_were_written_down():
    """Gold tables often hold the better answer first, and then chance would agree always."""
    gold, judge = [1] * 100, [1] * 88 + [-1] * 12
    turned = [1 if n % 2 else -1 for n in range(100)]
    written = confusion([j * t for j, t in zip(judge, turned)], [g * t for g, t in zip(gold, turned)])
    one, other = cohen_kappa(either_way(confusion(judge, gold))), cohen_kappa(either_way(written))
    assert one == other and one.mean == pytest.approx(2 * 0.88 - 1)  # chance is a half
    assert cohen_kappa(confusion(judge, gold)).mean == 0


def test_alpha_on_krippendorffs_own_example():
    """Computing Krippendorff's Alpha-Reliability (2011), part A: two observers, ten units, two labels: 0.095."""
    meg, owen = (0, 1, 0, 0, 0, 0, 0, 0, 1, 0), (1, 1, 1, 0, 0, 1, 0, 0, 0, 0)
    assert krippendorff_alpha(list(zip(meg, owen))).mean == pytest.approx(0.095, abs=5e-4)


def test_alpha_is_one_minus_the_disagreement_of_pairs_over_that_of_all_labels():
    """From the definition, over all pairs of labels, with a third of them missing."""
    rng = random.Random(3)
    table = [[rng.choice([*LABELS, None, 1]) for _ in range(4)] for _ in range(40)]
    kept = [[v for v in unit if v is not None] for unit in table]
    kept = [unit for unit in kept if len(unit) > 1]
    within = sum(sum(a != b for a, b in itertools.permutations(unit, 2)) / (len(unit) - 1) for unit in kept)
    values = [v for unit in kept for v in unit]
    beyond = sum(a != b for a, b in itertools.permutations(values, 2)) / (len(values) - 1)
    assert krippendorff_alpha(table).mean == pytest.approx(1 - within / beyond)


def test_alpha_is_one_where_judges_agree_and_has_rows_for_its_interval():
    agreed = [[one, one] for one in simulated(60, 1.0, 1)[0]]
    assert krippendorff_alpha(agreed).as_dict() == {"mean": 1.0, "low": 1.0, "high": 1.0}
    table = [list(two) for two in zip(*simulated(60, 0.5, 2))]
    alone = krippendorff_alpha(table)
    copied = krippendorff_alpha(table * 5, rows=[str(n) for n in range(60)] * 5)
    assert copied.high - copied.low == pytest.approx(alone.high - alone.low, rel=0.03)
    assert krippendorff_alpha([[1, None], [None, 0]]) is None and krippendorff_alpha([]) is None


# Calibration


def test_the_calibration_curve_is_scikit_learns():
    rng = random.Random(8)
    preferences = [rng.gauss(0, 2) for _ in range(500)]
    gold = [rng.choice((1, 1, -1, 0)) for _ in preferences]
    ours = calibration(preferences, gold)
    sure = [(1 / (1 + math.exp(-abs(p))), p * g > 0) for p, g in zip(preferences, gold) if g]
    right, confidence = calibration_curve([r for _, r in sure], [c for c, _ in sure], n_bins=20)
    assert [b.right for b in ours] == pytest.approx(list(right))
    assert [b.confidence for b in ours] == pytest.approx(list(confidence))
    assert sum(b.count for b in ours) == len(sure)


def test_a_judge_that_means_its_probabilities_is_calibrated_and_one_that_doubles_them_is_not():
    rng = np.random.default_rng(4)
    preferences = rng.normal(0, 1.5, 20000)
    gold = np.where(rng.random(20000) < 1 / (1 + np.exp(-preferences)), 1, -1).tolist()
    assert calibration_error(calibration(preferences.tolist(), gold)) < 0.02
    assert calibration_error(calibration((4 * preferences).tolist(), gold)) > 0.1


def test_a_bin_of_the_curve_knows_how_many_rows_it_is_of():
    assert [(b.count, b.rows) for b in calibration([1.0] * 6, [1] * 6, ["a", "a", "a", "a", "b", "b"])] == [(6, 2)]
    assert [(b.count, b.rows) for b in calibration([1.0] * 6, [1, 1, 1, 0, 0, 0])] == [(3, 3)]


def test_by_row_keeps_sums_and_counts():
    assert by_row([("a", 1.0), ("b", 0.5), ("a", 2.0)]) == [(3.0, 2), (0.5, 1)]
