"""Stage preferences: what the verdicts were worth is counted, what labels may owe to length stands beside them."""

import itertools
import math
from dataclasses import replace

import pytest

from rankwise.rows import read_rows, write_rows
from rankwise.types import Answer, Row, UserError, text_prompt
from rankwise.verdicts import LOG3, Question, Reply, write_verdicts
from tasks.preferences import Params, Paths, run
from tasks.selection import SelectParams
from tasks.stage import Stage, read_json

PROMPT = text_prompt("p")


class Silent:
    """A tracker that hears nothing."""

    def metrics(self, *_, **__): ...
    def table(self, *_): ...
    def file(self, *_): ...


def rollout(name: str, *texts: str) -> Row:
    return Row(id=name, prompt=PROMPT, answers=tuple(Answer(text=text) for text in texts))


def said(row: Row, places: tuple[int, ...], values) -> Reply:
    texts = tuple(row.answers[k].text for k in places)
    question = Question(row_id=row.id, prompt=PROMPT, answers=texts, places=places)
    return Reply(question=question, values=None if values is None else tuple(values))


def scores(row: Row, *values: float) -> list[Reply]:
    return [said(row, (k,), (value,)) for k, value in enumerate(values)]


def pairs(row: Row, wins: dict[tuple[int, int], float], bias: float = 0.0) -> list[Reply]:
    forth = [said(row, (i, j), (odds + bias, 0.0)) for (i, j), odds in wins.items()]
    return forth + [said(row, (j, i), (bias - odds, 0.0)) for (i, j), odds in wins.items()]


@pytest.fixture
def stage(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    paths = Paths()

    def make(rows: list[Row], replies: list[tuple[str, Reply]], imported: tuple[Row, ...] = (), **params):
        write_rows(paths.rollouts, rows)
        write_rows(paths.prompts / "preferences.parquet", imported)
        write_rows(paths.prompts / "eval.parquet", [])
        write_verdicts(paths.verdicts, [(judge, "identity", reply) for judge, reply in replies])
        run(Params(**params), paths, Stage("preferences", tracker=Silent(), report=paths.report))
        return {row.id: row for row in read_rows(paths.preferences)}, read_json(paths.report / "metrics.json")

    return make


def test_the_summary_counts_what_the_verdicts_were_worth(stage):
    """Four rows: one in order, one whose three answers go in a circle, one with a reply that nobody can read, a tie."""
    rows = [rollout(name, "one", "two words", "three words here", "f o u r") for name in "abcd"]
    every = list(itertools.combinations(range(4), 2))
    straight = pairs(rows[0], dict.fromkeys(every, LOG3), bias=0.4)
    circle = pairs(rows[1], dict.fromkeys(every, LOG3) | {(0, 2): -LOG3}, bias=0.2)  # 0 > 1 > 2 > 0, all above 3
    broken = [said(rows[2], (0, 1), None), *pairs(rows[2], {(1, 2): LOG3})]
    tied = pairs(rows[3], dict.fromkeys(every, 0.0))
    replies = [("j", reply) for reply in (*straight, *circle, *broken, *tied)]
    found, metrics = stage(rows, replies, held_out_share=0.0)
    assert sorted(found) == ["a", "b", "c"]
    assert [answer.rank for answer in found["a"].answers] == [0, 1, 2, 3]
    assert [answer.rank for answer in found["b"].answers] == [0, 0, 0, 3]
    assert [answer.text for answer in found["c"].answers] == ["two words", "three words here"]
    expected = {"rows": 3, "all_tied": 1, "rows_with_ties": 1, "invalid_verdicts": 1, "unjudged_answers": 2}
    assert {name: metrics[name] for name in expected} == expected
    assert metrics["circular_triads"] == 1 and metrics["k"] == {"2": 1, "4": 2}
    assert metrics["consistency"] == pytest.approx(1 - 1 / 6)  # three complete rows of 4, each of 2 at most
    assert metrics["position_bias_mean"] == pytest.approx((6 * 0.4 + 6 * 0.2) / 19)


def test_lengths_and_gaps_stand_beside_each_label(stage):
    rows = [
        rollout("a", "short", "a much longer one"),
        rollout("b", "of a length", "to this one"),
        rollout("c", "x y", "z"),
    ]
    replies = [reply for row, v in zip(rows, ((0.0, 2.0), (1.0, 0.5), (3.0, 0.0))) for reply in scores(row, *v)]
    found, metrics = stage(rows, [("j", reply) for reply in replies], held_out_share=0.0)
    assert {name: row.meta["longer_by"] for name, row in found.items()} == {"a": 3, "b": 0, "c": 1}
    assert {name: row.meta["smallest_gap"] for name, row in found.items()} == {"a": 2.0, "b": 0.5, "c": 3.0}
    longer = metrics["better_is_longer"]  # of the two rows whose answers differ in length
    assert longer["mean"] == 1.0 and 0.2 < longer["low"] < longer["high"] == 1.0
    assert metrics["longer_by"]["mean"] == pytest.approx(4 / 3)
    assert metrics["strength_gap_mean"] == pytest.approx((2.0 + 0.5 + 3.0) / 3)


def test_strengths_and_errors_are_in_the_table_and_scores_have_no_errors(stage):
    rows = [rollout(name, "one", "two") for name in "ab"]
    replies = [*pairs(rows[0], {(0, 1): LOG3}), *scores(rows[1], 0.0, 4.0)]
    found, _ = stage(rows, [("j", reply) for reply in replies], held_out_share=0.0)
    assert [a.strength for a in found["a"].answers] == pytest.approx([LOG3 / 2, -LOG3 / 2])
    # one gap of log 3 from two replies: variance 1 / (2 · ¾ · ¼) of the gap, a quarter of it for each half
    assert [a.strength_se for a in found["a"].answers] == pytest.approx([(1 / 0.375 / 4) ** 0.5] * 2)
    assert [a.strength_se for a in found["b"].answers] == [None, None]


def test_a_panel_is_heard_together(stage):
    row = rollout("a", "one", "two")
    first, second = pairs(row, {(0, 1): 3.0}), pairs(row, {(0, 1): -1.0})
    found, _ = stage([row], [*(("j", r) for r in first), *(("k", r) for r in second)], held_out_share=0.0)
    assert [answer.text for answer in found["a"].answers] == ["one", "two"]
    alone, _ = stage([row], [("k", reply) for reply in second], held_out_share=0.0)
    assert [answer.text for answer in alone["a"].answers] == ["two", "one"]


def test_imported_rankings_have_lengths_and_no_strengths(stage):
    answers = (Answer(text="worse and longer", rank=1), Answer(text="better", rank=0))
    found, metrics = stage([], [], imported=(Row(id="i", prompt=PROMPT, answers=answers),), held_out_share=0.0)
    assert found["i"].meta["longer_by"] == -2 and "smallest_gap" not in found["i"].meta
    assert metrics["strength_gap_mean"] == 0.0 and "consistency" not in metrics


def test_rows_without_a_valid_verdict_are_no_ties_to_train_on(stage):
    rows = [rollout(name, "one", "two") for name in "ab"]
    broken = [said(row, places, None) for row in rows for places in ((0, 1), (1, 0))]
    with pytest.raises(UserError, match="none of the 2 rows has two answers that verdicts compare"):
        stage(rows, [("j", reply) for reply in broken])


def test_rows_that_nobody_judged_are_counted_apart_from_ties(stage):
    """A sheet on one row of four: three are left out, and none of them ties."""
    rows = [rollout(name, "one", "two") for name in "abcd"]
    silent = [replace(said(row, places, None), answered=False) for row in rows[1:] for places in ((0, 1), (1, 0))]
    replies = [*pairs(rows[0], {(0, 1): LOG3}), *silent]
    found, metrics = stage(rows, [("people", reply) for reply in replies], held_out_share=0.0)
    assert list(found) == ["a"]
    assert (metrics["unjudged_rows"], metrics["all_tied"], metrics["invalid_verdicts"]) == (3, 0, 0)


def test_verdicts_on_other_texts_are_refused_by_the_row(stage):
    """The answers sampled anew, under the same ids: in another order, other ones, fewer; another prompt; rows more."""
    row = rollout("a", "one", "two", "three")
    replies = [("j", reply) for reply in pairs(row, dict.fromkeys([(0, 1), (1, 2), (0, 2)], LOG3))]
    others = [
        rollout("a", "three", "two", "one"),
        rollout("a", "one", "two", "3"),
        rollout("a", "one", "two"),
        replace(row, prompt=text_prompt("q")),
    ]
    for other in others:
        with pytest.raises(UserError, match=r"verdicts\.parquet: row 'a', a verdict of j: .* do not belong together"):
            stage([other], replies)
    with pytest.raises(UserError, match="no judge was asked about 1 of 2 rows, 'b' first; the tables do not belong"):
        stage([row, rollout("b", "one", "two")], replies)


# A part of the rows


@pytest.fixture
def many(stage):
    """200 prompts with four answers each, the last one best by the judge's scores."""
    rows = [rollout(f"r{n}", "one", "two words", "three words here", "f o u r") for n in range(200)]
    replies = [("j", reply) for row in rows for reply in scores(row, 1.0, 2.0, 3.0, 4.0)]
    return lambda **select: stage(rows, replies, held_out_share=0.2, select=SelectParams(**select))


def split_of(rows: dict[str, Row], split: str) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if row.meta["split"] == split}


@pytest.mark.parametrize("select", [{"prompts": 0.3}, {"answers": 2}, {"ends": True}, {"top_noise": 0.5}])
def test_whatever_is_selected_held_out_rows_stay(many, select):
    whole, part = many()[0], many(**select)[0]
    assert split_of(part, "held_out") == split_of(whole, "held_out")
    assert split_of(part, "train") != split_of(whole, "train")


def test_taken_whole_nothing_is_said_of_a_selection(many):
    rows, metrics = many()
    assert "selected" not in metrics and len(rows) == 200
    assert all(len(row.answers) == 4 for row in rows.values())


def test_a_smaller_share_of_prompts_is_part_of_a_larger_one(many):
    half, third = (set(split_of(many(prompts=share)[0], "train")) for share in (0.5, 0.3))
    assert third < half
    assert len(half) == pytest.approx(80, abs=25), "half of 160, within four standard deviations"


def test_the_answers_that_are_kept_are_those_drawn_first_and_ranked_among_themselves(many):
    rows, metrics = many(answers=2)
    for row in split_of(rows, "train").values():
        assert [(answer.text, answer.rank) for answer in row.answers] == [("two words", 0), ("one", 1)]
    assert metrics["selected"]["answers"] == 2 * len(split_of(rows, "train"))


def test_the_ends_are_the_best_and_the_worst(many):
    for row in split_of(many(ends=True)[0], "train").values():
        assert [answer.text for answer in row.answers] == ["f o u r", "one"]
        assert row.meta["longer_by"] == 3


def test_noise_puts_another_answer_on_top_at_its_rate_and_keeps_strengths_in_order(many):
    rows, metrics = many(top_noise=0.3)
    train = split_of(rows, "train").values()
    changed = [row for row in train if row.answers[0].text != "f o u r"]
    assert len(changed) == metrics["selected"]["tops_changed"]
    assert len(changed) / len(train) == pytest.approx(0.3, abs=4 * math.sqrt(0.3 * 0.7 / len(train)))
    for row in train:
        assert sorted(answer.text for answer in row.answers) == sorted(
            ["one", "two words", "three words here", "f o u r"]
        )
        assert [answer.rank for answer in row.answers] == [0, 1, 2, 3]
        assert [answer.strength for answer in row.answers] == sorted((a.strength for a in row.answers), reverse=True)
