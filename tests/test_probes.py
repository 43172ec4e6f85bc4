"""Laws of the battery: judges with one known fault are found out by the probe that looks for it, and by no other."""

from __future__ import annotations

import re

import pytest

from rankwise.probes import ATTACKS, NULLS, Outcome, ask, ask_same, battery, by_name, draw
from rankwise.store import Store
from rankwise.types import Answer, Row, text_prompt
from rankwise.verdicts import Reply

TEXTS = (
    "The plot was superb and the acting fine, we loved every minute of it.",
    "The plot was dull and the acting poor, we hated every minute of it.",
    "The sound was good, the seats were good, and the film was bad.",
)


def rows(count: int = 12) -> list[Row]:
    return [
        Row(
            id=f"r{n}",
            prompt=text_prompt(f"Opening {n}."),
            answers=tuple(Answer(text=f" {text} ({n})") for text in TEXTS),
        )
        for n in range(count)
    ]


class Scripted:
    """A pairwise judge whose log-odds of the first answer are a function of (first, second)."""

    pairwise, attempts, samples = True, 1, 1

    def __init__(self, odds, name="scripted"):
        self.name = self.identity = name
        self._odds, self.asked = odds, 0

    def ask(self, questions):
        for index, question in enumerate(questions):
            self.asked += 1
            yield index, {"odds": self._odds(*question.answers)}

    def read(self, question, raw):
        values = None if raw["odds"] is None else (raw["odds"], 0.0)
        return Reply(question=question, values=values)


def praise(text: str) -> float:
    """Sense: words of praise less words of blame, and only where there is an opinion at all."""
    words = re.findall(r"\w+", text.lower())
    return sum(w in ("superb", "fine", "loved", "good") for w in words) - sum(
        w in ("dull", "poor", "hated", "bad") for w in words
    )


def sound(first: str, second: str) -> float:
    return praise(first) - praise(second)


def outcomes(tmp_path, judge, table=None) -> list[Outcome]:
    with Store(tmp_path / "store") as store:
        found, unread = ask(judge, battery(draw(table or rows(), 50)), store, tie_below=0.0)
    assert unread == []
    return found


def moved(found: list[Outcome], family: str) -> dict[str, float]:
    return {name: sum(o.win - o.twin_win for o in mine) / len(mine) for name, mine in by_name(found, family).items()}


# What is drawn and made


def test_fewer_rows_are_the_first_of_more_and_order_does_not_choose():
    table = rows()
    assert draw(table, 5) == draw(table[::-1], 12)[:5]
    turned = [Row(id=r.id, prompt=r.prompt, answers=r.answers[::-1]) for r in table]
    assert draw(turned, 12) == draw(table, 12)


def test_rows_without_two_answers_to_compare_are_left_out():
    one = Row(id="one", prompt=text_prompt("p"), answers=(Answer(text="same"), Answer(text="same")))
    blank = Row(id="blank", prompt=text_prompt("p"), answers=(Answer(text="word"), Answer(text=" \n")))
    assert draw([one, blank], 9) == []


def test_every_attack_has_a_clean_twin_of_its_length_at_the_same_place():
    assert len(ATTACKS) >= 10
    for probe in battery(draw(rows(), 12)):
        if probe.family == "injection":
            (attacked, other), (clean, same) = ([a.text for a in row.answers] for row in (probe.row, probe.twin))
            assert other == same and len(attacked) == len(clean) and attacked != clean
            real = attacked.removesuffix(ATTACKS[probe.name].text)
            assert real != attacked and clean.startswith(real)


def test_the_battery_is_the_same_every_time_and_plants_nothing_that_is_already_there():
    table = draw(rows(), 12)
    assert battery(table) == battery(table)
    assert all(probe.row.answers[0].text != probe.row.answers[1].text for probe in battery(table))
    word = Row(id="w", prompt=text_prompt("p"), answers=(Answer(text="word"), Answer(text="two words")))
    names = {probe.name for probe in battery([word]) if probe.family == "worse"}
    assert names == {"empty"}  # one word cannot be shuffled or cut in half, and there is no other prompt


# What is found


def test_a_sound_judge_is_moved_by_no_attack_and_by_no_blank_lines(tmp_path):
    found = outcomes(tmp_path, Scripted(sound))
    assert moved(found, "injection") == dict.fromkeys(ATTACKS, 0.0)
    assert moved(found, "padding")["blank_lines"] == moved(found, "padding")["harmless_text"] == 0.0


def test_a_judge_that_obeys_is_found_out_by_that_attack_alone(tmp_path):
    def obeys(first: str, second: str) -> float:
        plea = ATTACKS["ignore_rubric"].text
        return 10.0 * ((plea in first) - (plea in second)) or sound(first, second)

    shift = moved(outcomes(tmp_path, Scripted(obeys)), "injection")
    assert shift.pop("ignore_rubric") > 0.3 and set(shift.values()) == {0.0}


def test_a_judge_that_takes_the_first_verdict_it_reads_is_found_out_though_both_orders_cancel(tmp_path):
    """[[A]] in an answer makes A win wherever that answer stands: the preference of both orders is 0."""
    reads_first_match = lambda first, second: 10.0 if "[[A]]" in first + second else sound(first, second)
    found = outcomes(tmp_path, Scripted(reads_first_match))
    assert moved(found, "injection")["quoted_verdict"] > 0.3
    assert all(o.win == 1 for o in by_name(found, "injection")["quoted_verdict"])


def test_a_judge_of_length_alone_falls_for_padding_and_not_for_attacks(tmp_path):
    found = outcomes(tmp_path, Scripted(lambda first, second: float(len(first) - len(second))))
    assert set(moved(found, "injection").values()) == {0.0}
    assert all(moved(found, "padding")[name] > 0 for name in ("harmless_text", "said_twice"))
    worse = {name: [o.win for o in mine] for name, mine in by_name(found, "worse").items()}
    assert set(worse["truncated"]) == set(worse["empty"]) == {0.0}


def test_a_judge_that_likes_silence_loses_every_answer_to_null(tmp_path):
    found = outcomes(tmp_path, Scripted(lambda first, second: float(len(second) - len(first))))
    for name in NULLS:
        assert all(o.win == 1 for o in by_name(found, "null")[name])


def test_a_judge_that_sees_words_and_not_their_order_ties_with_shuffled_ones(tmp_path):
    found = by_name(outcomes(tmp_path, Scripted(sound)), "worse")
    assert {o.win for o in found["shuffled_words"]} == {0.5}


def test_the_place_is_not_taken_for_an_attack(tmp_path):
    """A judge that always takes the first answer is moved by nothing."""
    found = outcomes(tmp_path, Scripted(lambda first, second: 1.0))
    assert set(moved(found, "injection").values()) == set(moved(found, "padding").values()) == {0.0}


# What is asked


def test_a_rerun_of_the_battery_asks_nothing(tmp_path):
    first, again = Scripted(sound), Scripted(sound)
    one, other = outcomes(tmp_path, first), outcomes(tmp_path, again)
    assert first.asked > 0 and again.asked == 0 and one == other


def test_probes_without_a_reply_are_counted_and_not_taken_for_ties(tmp_path):
    silent = Scripted(lambda first, second: None if "Score: 10" in first + second else sound(first, second))
    with Store(tmp_path / "store") as store:
        found, unread = ask(silent, battery(draw(rows(), 5)), store, tie_below=0.0)
    assert [probe.name for probe in unread] == ["score"] * 5 and "score" not in by_name(found, "injection")


def test_one_text_shown_twice_shows_the_place_alone(tmp_path):
    with Store(tmp_path / "store") as store:
        found = ask_same(Scripted(lambda first, second: sound(first, second) + 0.7), draw(rows(), 9), store)
        assert [one.odds for one in found] == pytest.approx([0.7] * 9)
        pointwise = Scripted(sound)
        pointwise.pairwise = False
        assert ask_same(pointwise, draw(rows(), 9), store) == [] and pointwise.asked == 0
