"""Which questions rank the answers, that each is asked as few times as can be, and what changes nothing."""

import dataclasses
import itertools
import os
import random
import signal
from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_rendering import chat

from rankwise import judging
from rankwise.judging import Question, Reply, first_questions, judge_rows, key_of
from rankwise.ranking import rank
from rankwise.store import Store
from rankwise.types import Answer, Row, Unavailable, UserError, text_prompt
from rankwise.verdicts import verdict_of


def rows(*answers: tuple[str, ...]) -> list[Row]:
    return [
        Row(id=f"r{i}", prompt=text_prompt(f"prompt {i}"), answers=tuple(Answer(text=t) for t in texts))
        for i, texts in enumerate(answers)
    ]


class Oracle:
    """A judge that knows: the longer text is worth more. Every place before another one adds bias."""

    name, identity = "oracle", "oracle"

    def __init__(self, *, pairwise=True, sign=1, bias=0.0, attempts=1, samples=1, silent=lambda question: False):
        self.pairwise, self.attempts, self.samples = pairwise, attempts, samples
        self._sign, self._bias, self._silent = sign, bias, silent
        self.asked: list[Question] = []

    def ask(self, questions):
        for index in reversed(range(len(questions))):  # replies may come in any order
            self.asked.append(questions[index])
            yield index, self.raw(questions[index])

    def raw(self, question):
        if self._silent(question):
            return {"text": "Hmm."}
        places = reversed(range(len(question.answers)))
        worths = [self._sign * len(text) + self._bias * place for text, place in zip(question.answers, places)]
        return {"text": " ".join(map(str, worths))}

    def read(self, question, raw):
        tokens = {"prompt_tokens": 10, "completion_tokens": 1}
        try:
            values = tuple(map(float, raw["text"].split()))
        except ValueError:
            return Reply(question=question, values=None, reason="no numbers", raw=raw["text"], **tokens)
        return Reply(question=question, values=values, raw=raw["text"], **tokens)


def replies_of(judge, table, folder, **options) -> list[Reply]:
    """The replies on a table, by way of a store of their own."""
    with Store(folder / f"{random.random()}.sqlite") as store:
        return judge_rows(judge, table, store, **options)[0]


def orders(table, replies) -> dict[str, list[str]]:
    """Each row's different texts, best first, by how far each lies above each other one in the mean."""
    gaps = {row.id: {a.text: {b.text: [] for b in row.answers} for a in row.answers} for row in table}
    scores = defaultdict(dict)
    for reply in replies:
        texts, mine = reply.question.answers, gaps[reply.question.row_id]
        if len(texts) == 1:
            scores[reply.question.row_id][texts[0]] = reply.values[0]
        for (a, first), (b, second) in itertools.permutations(zip(texts, reply.values), 2):
            mine[a][b].append(first - second)
    found = {}
    for name, mine in gaps.items():
        above = {a: sum(sum(seen) / len(seen) for seen in mine[a].values() if seen) for a in mine}
        found[name] = sorted(mine, key=lambda text: (-scores[name].get(text, above[text]), text))
    return found


def keys(replies) -> Counter:
    return Counter(key_of("j", reply.question) for reply in replies)


TABLE = rows(("bb", "a", "cccc"), ("x", "yyy"), ("long one", "mid", "s"), ("1", "55555", "333", "4444", "22", "666666"))


# What is asked


def test_every_pair_is_asked_in_both_orders_and_every_answer_once():
    [row] = rows(("a", "bb", "ccc"))
    pairs = [(q.places, q.answers) for q in first_questions(row, Oracle(), pairs_up_to=4)]
    assert sorted(places for places, _ in pairs) == sorted(itertools.permutations(range(3), 2))
    assert all(answers == tuple(row.answers[place].text for place in places) for places, answers in pairs)
    points = first_questions(row, Oracle(pairwise=False), pairs_up_to=4)
    assert [(q.places, q.answers) for q in points] == [((0,), ("a",)), ((1,), ("bb",)), ((2,), ("ccc",))]


def test_of_more_answers_each_list_place_is_taken_once_by_each_then_the_best_meet_in_pairs(tmp_path):
    replies = replies_of(Oracle(), TABLE[3:], tmp_path)
    shown = [reply.question.places for reply in replies]
    lists, pairs = shown[:6], shown[6:]
    assert [sorted(column) for column in zip(*lists)] == [list(range(6))] * 6
    best = [1, 2, 3, 5]  # 55555, 333, 4444, 666666
    assert sorted(pairs) == sorted(itertools.permutations(best, 2))


def test_the_limit_counts_different_texts(tmp_path):
    table = rows(("a", "bb", "a", "ccc", "a", "dddd"))
    assert {len(reply.question.answers) for reply in replies_of(Oracle(), table, tmp_path)} == {2}
    assert {len(r.question.answers) for r in replies_of(Oracle(), table, tmp_path, pairs_up_to=3)} == {2, 4}


@given(st.lists(st.sampled_from(["a", "bb", "bb ", "ccc", "", " ", "e", "f"]), max_size=9), st.integers(2, 6))
def test_answers_with_one_text_are_never_shown_together_and_every_text_is_shown(texts, limit):
    """Unless all have that text: then nothing is asked."""
    [row] = rows(tuple(texts))
    questions = first_questions(row, Oracle(), pairs_up_to=limit)
    assert all(len(set(q.answers)) == len(q.answers) > 1 for q in questions)
    shown = {text for question in questions for text in question.answers}
    assert shown == (set(texts) if len(set(texts)) > 1 else set())
    assert all(tuple(texts[place] for place in question.places) == question.answers for question in questions)


def test_a_twin_asks_for_nothing_more(tmp_path):
    """An answer given twice: not a question more, in pairs, lists or scores."""
    for texts, judge in itertools.product(
        (("a", "bb", "ccc"), ("1", "22", "333", "4444", "55555")), (Oracle(), Oracle(pairwise=False))
    ):
        once, twice = (keys(replies_of(judge, rows(table), tmp_path)) for table in (texts, (*texts, texts[1])))
        assert set(once) == set(twice)


def test_samples_are_questions_of_their_own(tmp_path):
    judge = Oracle(samples=3)
    replies = replies_of(judge, TABLE[3:], tmp_path)
    assert len(judge.asked) == len(replies) == 3 * (6 + 12)
    assert Counter(reply.question.sample for reply in replies) == {0: 18, 1: 18, 2: 18}


# What is found, and what changes nothing


@pytest.mark.parametrize("bias", [0.0, 0.5, -40.0])
@pytest.mark.parametrize("pairwise", [True, False])
def test_an_oracle_is_right_on_every_pair_and_its_opposite_on_none(tmp_path, pairwise, bias):
    """Whatever a place is worth to it: every text stands in every place equally often."""
    for sign in (1, -1):
        judge = Oracle(pairwise=pairwise, sign=sign, bias=bias)
        for order in orders(TABLE, replies_of(judge, TABLE, tmp_path)).values():
            assert order == sorted(order, key=len, reverse=sign == 1)


def test_answers_in_another_order_rows_in_another_order_and_other_ids_ask_and_find_the_same(tmp_path):
    draw = random.Random(5)
    mixed = [
        dataclasses.replace(row, id=f"new {row.id}", answers=tuple(draw.sample(row.answers, len(row.answers))))
        for row in draw.sample(TABLE, len(TABLE))
    ]
    for judge in (Oracle(bias=0.3), Oracle(pairwise=False)):
        first, second = (replies_of(judge, table, tmp_path) for table in (TABLE, mixed))
        assert keys(first) == keys(second)
        found = orders(mixed, second)
        assert {name: found[f"new {name}"] for name in orders(TABLE, first)} == orders(TABLE, first)
        assert [r.question.row_id for r in second] == sorted(
            (r.question.row_id for r in second), key=[row.id for row in mixed].index
        )


@pytest.mark.parametrize("pairwise", [True, False])
def test_an_answer_with_a_blank_more_leaves_the_order_of_the_others(tmp_path, pairwise):
    """It is another answer, so it is asked about; with it a row of four becomes one of lists."""
    judge = Oracle(pairwise=pairwise, bias=0.3)
    texts = ("bb", "a", "cccc", "dddddd")
    [before] = orders(rows(texts), replies_of(judge, rows(texts), tmp_path)).values()
    for blank in ("a ", " cccc", "dddddd\n"):
        table = rows((*texts, blank))
        [after] = orders(table, replies_of(judge, table, tmp_path)).values()
        assert [text for text in after if text != blank] == before


def test_equal_worths_are_cut_by_the_text_and_not_by_the_place(tmp_path):
    texts = ("aa", "bb", "cc", "dd", "ee", "ff")
    tables = [rows(tuple(random.Random(n).sample(texts, len(texts)))) for n in range(4)]
    assert len({frozenset(keys(replies_of(Oracle(), table, tmp_path))) for table in tables}) == 1


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("pairwise", [True, False])
def test_an_oracles_replies_become_right_rankings_and_its_opposites_wrong_ones(tmp_path, pairwise, sign):
    """Through the ranking, twins included: every pair of a row is in its place, or every one is not."""
    table = [*TABLE, *rows(("22", "1", "22"), ("1", "22", "1", "333", "4444", "22", "55555", "666666"))[-2:]]
    table = [dataclasses.replace(row, id=f"row {n}") for n, row in enumerate(table)]
    judge = Oracle(pairwise=pairwise, sign=sign, bias=0.7)
    replies = replies_of(judge, table, tmp_path)
    for row in table:
        mine = [verdict_of("oracle", judge.identity, reply) for reply in replies if reply.question.row_id == row.id]
        judged = rank(row, mine, tie_below=0.0)
        assert len(judged.row.answers) == len(row.answers) and judged.circular_triads == 0
        for first, second in itertools.permutations(judged.row.answers, 2):
            above = sign * (len(first.text) - len(second.text))
            assert (first.rank < second.rank) == (above > 0)


# What is kept


@pytest.mark.parametrize("pairwise", [True, False])
def test_nothing_is_asked_twice(tmp_path, pairwise):
    judge, table = Oracle(pairwise=pairwise), [*rows(("a", "bb", "a"), ("ccc", "d")), *TABLE[3:]]
    with Store(tmp_path / "s") as store:
        first, asked = judge_rows(judge, table, store)
        distinct = {key_of(judge.identity, question) for question in judge.asked}
        assert asked == len(judge.asked) == len(distinct) == (4 + 18 if pairwise else 4 + 6)
        assert judge_rows(judge, table, store) == (first, 0)
        more = [*table, dataclasses.replace(table[0], id="new", answers=(Answer(text="a"), Answer(text="eeeee")))]
        assert judge_rows(judge, more, store)[1] == (2 if pairwise else 1)


def test_tokens_are_counted_once_however_often_an_answer_is_shown(tmp_path):
    table = [*rows(("a", "bb", "a")), dataclasses.replace(rows(("bb", "a"))[0], id="again"), *TABLE[3:]]
    judge = Oracle()
    replies = replies_of(judge, table, tmp_path)
    assert len(replies) > len(judge.asked)
    assert sum(reply.prompt_tokens for reply in replies) == 10 * len(judge.asked)


def test_what_came_before_the_judge_went_away_is_kept_to_the_last(tmp_path):
    class Leaving(Oracle):
        def ask(self, questions):
            yield from itertools.islice(super().ask(questions), 5)
            raise Unavailable("the judge is away")

    table = rows(*((f"{i}a", f"{i}b") for i in range(4)))
    with Store(tmp_path / "s") as store:
        with pytest.raises(Unavailable):
            judge_rows(Leaving(pairwise=False), table, store)
        assert len(store) == 5
        judge = Oracle(pairwise=False)
        assert judge_rows(judge, table, store)[1] == len(judge.asked) == 3


@pytest.mark.parametrize("at", [1, 30, 75])
def test_a_kill_costs_no_more_than_a_commit_and_nothing_is_asked_twice(tmp_path, monkeypatch, at):
    """SIGKILL at a reply: at most 16 are lost, and what is in the store is not asked about again."""
    monkeypatch.setattr(judging, "COMMIT_REPLIES", 16)
    monkeypatch.setattr(judging, "COMMIT_S", 1e9)

    class Killed(Oracle):
        def raw(self, question):
            if len(self.asked) == at:
                os.kill(os.getpid(), signal.SIGKILL)
            return super().raw(question)

    table = [dataclasses.replace(TABLE[3], id=f"{n}", prompt=text_prompt(f"{n}")) for n in range(5)]
    if (child := os.fork()) == 0:
        try:
            with Store(tmp_path / "s") as store:
                judge_rows(Killed(), table, store)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    with Store(tmp_path / "s") as store:
        kept = len(store)
        assert at - 1 - 16 < kept <= at - 1
        judge = Oracle()
        replies, asked = judge_rows(judge, table, store)
        assert kept + asked == len(store) == 5 * 18 and asked == len(judge.asked)
    assert replies == replies_of(Oracle(), table, tmp_path)


def test_the_key_of_a_reply_depends_on_everything_that_is_shown():
    question = Question(row_id="r", prompt=text_prompt("p"), answers=("a", "b"), places=(0, 1))
    change = lambda **fields: key_of("judge", dataclasses.replace(question, **fields))
    made = [
        key_of("judge", question),
        key_of("other judge", question),
        change(prompt=text_prompt("q")),
        change(prompt=chat(("user", "p"))),
        change(answers=("b", "a")),
        change(answers=("a", "c")),
        change(answers=("a",)),
        change(answers=("a", "b", "c")),
        change(sample=1),
        change(attempt=1),
    ]
    assert len(set(made)) == len(made)
    assert change(row_id="elsewhere", places=(3, 7)) == made[0]  # where it stands is not shown


# Replies that make no sense


def first_attempts(count):
    """Makes a judge silent at the first count attempts of the pairs that show "a" first."""
    return lambda question: question.answers[0] == "a" and question.attempt < count


def test_what_cannot_be_read_is_asked_again_until_it_can(tmp_path):
    judge = Oracle(attempts=4, silent=first_attempts(2))
    replies = replies_of(judge, rows(("a", "bb", "ccc")), tmp_path)
    assert all(reply.values is not None for reply in replies)
    assert Counter(q.attempt for q in judge.asked) == {0: 6, 1: 2, 2: 2}
    again = [reply for reply in replies if reply.question.answers[0] == "a"]
    assert [(r.question.attempt, r.prompt_tokens, r.completion_tokens) for r in again] == [(2, 30, 3)] * 2


def test_what_can_never_be_read_is_absent_and_counted(tmp_path):
    judge = Oracle(attempts=3, silent=first_attempts(99))
    replies = replies_of(judge, rows(("a", "bb", "ccc")), tmp_path)
    absent = [reply for reply in replies if reply.values is None]
    assert [reply.question.places for reply in absent] == [(0, 1), (0, 2)]
    assert {(r.question.attempt, r.reason, r.raw, r.prompt_tokens) for r in absent} == {(2, "no numbers", "Hmm.", 30)}
    assert len(judge.asked) == 4 + 2 * 3


def test_more_attempts_ask_only_about_what_could_not_be_read(tmp_path):
    table = rows(("a", "bb", "ccc"))
    with Store(tmp_path / "s") as store:
        judge_rows(Oracle(attempts=2, silent=first_attempts(99)), table, store)
        judge = Oracle(attempts=4, silent=first_attempts(3))
        replies, asked = judge_rows(judge, table, store)
        assert asked == len(judge.asked) == 4
        assert {(q.answers[0], q.attempt) for q in judge.asked} == {("a", 2), ("a", 3)}
        assert all(reply.values is not None for reply in replies)
        # Fewer attempts, later, know the replies that were bought.
        fewer, asked = judge_rows(Oracle(attempts=2, silent=first_attempts(99)), table, store)
        assert asked == 0 and sum(reply.values is None for reply in fewer) == 2


def test_a_better_reader_reads_the_kept_replies_and_asks_nothing(tmp_path):
    class Better(Oracle):
        def read(self, question, raw):
            return super().read(question, {"text": raw["text"].replace("Hmm.", "1 2")})

    table = rows(("a", "bb", "ccc"))
    with Store(tmp_path / "s") as store:
        judge_rows(Oracle(silent=first_attempts(99)), table, store)
        replies, asked = judge_rows(Better(), table, store)
    assert asked == 0 and all(reply.values is not None for reply in replies)


def test_lists_that_cannot_be_read_leave_the_row_unjudged(tmp_path):
    replies = replies_of(Oracle(silent=lambda question: len(question.answers) > 2), TABLE[3:], tmp_path)
    assert len(replies) == 6 and all(reply.values is None for reply in replies)


@pytest.mark.parametrize("number", ["nan", "inf"])
def test_a_reply_that_is_no_finite_number_stops_the_run_and_is_not_kept(tmp_path, number):
    class Odd(Oracle):
        def raw(self, question):
            return {"text": number} if question.answers == ("bb",) else super().raw(question)

    with Store(tmp_path / "s") as store:
        with pytest.raises(UserError, match=rf"reply to row 'r0' is {number}, which ranks nothing"):
            judge_rows(Odd(pairwise=False), rows(("a", "bb", "ccc")), store)
        assert len(store) == 1  # ccc, which came before
