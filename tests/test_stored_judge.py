"""A stored judge says what its file says, to exactly the questions that the file answers, in the order it was said."""

from __future__ import annotations

import csv
import gzip
import json
import math
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from rankwise.judging import judge_rows
from rankwise.ranking import rank
from rankwise.store import Store
from rankwise.stored_judge import StoredJudge, pooled
from rankwise.stored_lines import question_key
from rankwise.types import Answer, Message, Row, UserError, text_prompt
from rankwise.verdicts import LOG3, Question, Reply, verdict_of

PROMPT = text_prompt("Which is it?")


def row(*texts: str, prompt=PROMPT, row_id: str = "r1") -> Row:
    return Row(id=row_id, prompt=prompt, answers=tuple(Answer(text=text) for text in texts))


def stored(folder: Path, *lines: dict, annotator: str = "") -> StoredJudge:
    path = folder / "people.jsonl"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return StoredJudge(path, annotator=annotator)


def said(judge: StoredJudge, *texts: str, prompt=PROMPT, row_id: str = "r1") -> Reply:
    question = Question(row_id=row_id, prompt=prompt, answers=texts, places=tuple(range(len(texts))))
    ((_, raw),) = judge.ask([question])
    json.dumps(raw)
    return judge.read(question, raw)


def odds(reply: Reply) -> float | None:
    return None if reply.values is None else reply.values[0] - reply.values[1]


def verdict(first: str, second: str, said: str = "A", **more: object) -> dict:
    return {"prompt": "Which is it?", "first": first, "second": second, "verdict": said, **more}


# Orders


def test_a_verdict_holds_for_the_order_in_which_it_was_given_and_no_other(tmp_path):
    judge = stored(tmp_path, verdict("x", "y"))
    assert odds(said(judge, "x", "y")) == pytest.approx(LOG3)
    other = said(judge, "y", "x")
    assert other.values is None and "only in the other one" in other.reason


@pytest.mark.parametrize(("letter", "expected"), [("A", LOG3), ("B", -LOG3), ("tie", 0.0)])
def test_a_verdict_without_an_order_holds_for_both_where_the_file_says_so(tmp_path, letter, expected):
    judge = stored(tmp_path, verdict("x", "y", letter, order="none"))
    assert odds(said(judge, "x", "y")) == pytest.approx(expected)
    assert odds(said(judge, "y", "x")) == pytest.approx(-expected)
    assert said(judge, "y", "x").said == {"A": "B", "B": "A", "tie": "tie"}[letter]


def test_log_odds_are_taken_as_they_are_and_turned_with_the_order(tmp_path):
    line = {**verdict("x", "y", order="none"), "verdict": None, "value": 1.25}
    judge = stored(tmp_path, line)
    assert odds(said(judge, "x", "y")) == 1.25 and odds(said(judge, "y", "x")) == -1.25


def test_a_reply_is_orderless_where_every_vote_behind_it_holds_for_both_orders(tmp_path):
    """Whichever way round the lines are written: ann's and bob's stand for both orders, eve saw one."""
    both = [
        verdict("x", "y", "A", order="none", annotator="ann"),
        verdict("y", "x", "B", order="none", annotator="bob"),
    ]
    judge = stored(tmp_path, *both, {**ranking(v=0, w=1), "annotator": "cy"})
    assert all(said(judge, *texts).orderless for texts in (("x", "y"), ("y", "x"), ("v", "w"), ("w", "v")))
    judge = stored(tmp_path, *both, verdict("x", "y", "A", annotator="eve"))
    assert not said(judge, "x", "y").orderless and said(judge, "y", "x").orderless


def test_lines_that_speak_of_nothing_asked_about_are_counted(tmp_path):
    judge = stored(tmp_path, verdict("x", "y"), verdict("y", "z"), verdict("u", "v"), ranking(x=0, y=1))
    asked = [Question(row_id="r1", prompt=PROMPT, answers=("y", "x"), places=(1, 0))]
    for question in asked:
        judge.notice(question)
    assert judge.idle() == (2, 4)


# What is answered


@pytest.mark.parametrize("first", ["x ", "X", "x\n", "another"])
def test_texts_match_to_the_character(tmp_path, first):
    reply = said(stored(tmp_path, verdict("x", "y")), first, "y")
    assert reply.values is None and "no verdict" in reply.reason


def test_a_question_that_the_file_does_not_answer_is_absent_and_never_guessed(tmp_path):
    """Of three pairs one is answered: the third answer stays unjudged, and nobody is given a half."""
    judge = stored(tmp_path, verdict("x", "y", "B", order="none"))
    rows = [row("x", "y", "z")]
    with Store(tmp_path / "store.sqlite") as store:
        replies, asked = judge_rows(judge, rows, store)
    assert asked == len(replies) == 6
    assert sum(reply.values is None for reply in replies) == 4
    judged = rank(rows[0], [verdict_of(judge.name, judge.identity, reply) for reply in replies], tie_below=0.05)
    assert [answer.text for answer in judged.row.answers] == ["y", "x"]
    assert (judged.unjudged, judged.invalid) == (1, 0)
    assert sum(reply.answered for reply in replies) == 2


@pytest.mark.parametrize("unanswered", ["", "  ", None])
def test_a_line_without_a_verdict_answers_nothing(tmp_path, unanswered):
    judge = stored(tmp_path, verdict("x", "y", unanswered), verdict("x", "z"))
    assert said(judge, "x", "y").values is None


CHAT = (Message(role="user", content="Which is it?"),)
TURNS = (*CHAT, Message(role="assistant", content="This."), Message(role="user", content="Sure?"))


@pytest.mark.parametrize(
    ("about", "prompt"),
    [
        ({"prompt": "Which is it?"}, PROMPT),
        ({"prompt": "Which is it?"}, CHAT),
        ({"prompt": [{"role": "user", "content": "Which is it?"}]}, CHAT),
        ({"prompt": [{"role": turn.role, "content": turn.content} for turn in TURNS]}, TURNS),
        ({"row_id": "r1"}, TURNS),
        ({"row_id": "r1", "prompt": ""}, PROMPT),
    ],
    ids=["text", "text of one turn", "turn", "turns", "row", "row, no prompt"],
)
def test_a_prompt_may_be_text_or_turns_or_the_id_of_its_row(tmp_path, about, prompt):
    judge = stored(tmp_path, {"first": "x", "second": "y", "verdict": "A", **about})
    assert odds(said(judge, "x", "y", prompt=prompt)) == pytest.approx(LOG3)
    elsewhere = (Message(role="user", content="And this?"),)
    assert said(judge, "x", "y", prompt=elsewhere, row_id="r2").values is None


def test_a_pair_may_be_named_by_the_key_of_its_question(tmp_path):
    judge = stored(tmp_path, {"pair": question_key(TURNS, ["x", "y"]), "verdict": "B", "order": "none"})
    assert said(judge, "x", "y", prompt=TURNS).said == "B"
    assert said(judge, "y", "x", prompt=TURNS).said == "A"
    assert said(judge, "x", "y", prompt=CHAT).values is None


# Rankings


def ranking(**ranks: int) -> dict:
    return {"prompt": "Which is it?", "answers": [{"text": text, "rank": place} for text, place in ranks.items()]}


def test_a_ranking_answers_every_pair_and_every_list_of_its_answers_in_any_order(tmp_path):
    judge = stored(tmp_path, ranking(x=2, y=0, z=1, w=1))
    assert said(judge, "x", "y").said == "B" and said(judge, "y", "x").said == "A"
    assert said(judge, "z", "w").said == "tie"
    assert said(judge, "x", "y", "z").said == "B > C > A"
    assert said(judge, "w", "x", "z", "y").values == pytest.approx((LOG3, 0.0, LOG3, 2 * LOG3))
    assert said(judge, "x", "v").values is None


@pytest.mark.parametrize("count", [2, 3, 4, 5, 7])
def test_a_ranking_comes_out_of_the_whole_path_as_it_went_in(tmp_path, count):
    """By pairs up to four answers; by lists, and pairs of the best four, beyond."""
    order = [(3 * n) % 7 for n in range(7)][:count]
    ranks = {f"answer {n}": sorted(order).index(place) for n, place in enumerate(order)}
    judge, rows = stored(tmp_path, ranking(**ranks)), [row(*ranks)]
    with Store(tmp_path / "store.sqlite") as store:
        replies, _ = judge_rows(judge, rows, store)
    judged = rank(rows[0], [verdict_of(judge.name, judge.identity, reply) for reply in replies], tie_below=0.05)
    assert [ranks[answer.text] for answer in judged.row.answers] == list(range(count))
    assert judged.circular_triads == judged.invalid == 0


def test_a_list_asked_of_a_file_of_pairs_says_what_to_set(tmp_path):
    with pytest.raises(UserError, match=r"row 'r1' is asked about as a list of 3 answers.*pairs_up_to be 3"):
        said(stored(tmp_path, verdict("x", "y")), "x", "y", "z")


# Several annotators


def test_votes_are_pooled_to_the_empirical_logit(tmp_path):
    """Anscombe: of n votes w for the first, log((w + 1/2) / (n - w + 1/2)); a tie is half a vote for each."""
    votes = [verdict("x", "y", letter, annotator=name) for name, letter in zip("abcd", ["A", "A", "tie", "B"])]
    reply = said(stored(tmp_path, *votes), "x", "y")
    assert odds(reply) == pytest.approx(math.log((2.5 + 0.5) / (1.5 + 0.5)))
    assert reply.said == "A"


def test_three_to_nothing_weighs_more_than_two_to_one_and_that_more_than_a_tie():
    pool = lambda letters: pooled([{"said": letter, "value": None} for letter in letters], "AB")[0]
    assert pool("AAA") > pool("A") > pool("AAB") > pool("AB") == 0.0
    assert pool("BBA") == pytest.approx(-pool("AAB"))


def test_log_odds_of_several_are_pooled_as_a_panel_does():
    votes = [{"said": "", "value": value} for value in (2.0, -0.5)]
    mean = (1 / (1 + math.exp(-2.0)) + 1 / (1 + math.exp(0.5))) / 2
    assert pooled(votes, "AB")[0] == pytest.approx(math.log(mean / (1 - mean)))
    assert math.isfinite(pooled([{"said": "", "value": value} for value in (800.0, 900.0)], "AB")[0])


def test_one_annotator_alone_is_another_judge(tmp_path):
    lines = [verdict("x", "y", "A", annotator="ann"), verdict("x", "y", "B", judge="bob")]
    both, ann, bob = (
        stored(tmp_path, *lines),
        *(StoredJudge(tmp_path / "people.jsonl", annotator=n) for n in ("ann", "bob")),
    )
    assert [said(judge, "x", "y").said for judge in (both, ann, bob)] == ["tie", "A", "B"]
    assert len({judge.identity for judge in (both, ann, bob)}) == 3
    assert [judge.name for judge in (both, ann, bob)] == ["people", "ann", "bob"]
    with pytest.raises(UserError, match=r"no line of annotator 'eve'; found: ann, bob"):
        StoredJudge(tmp_path / "people.jsonl", annotator="eve")


def test_an_annotator_who_says_two_things_of_one_question_is_an_error(tmp_path):
    lines = [
        verdict("x", "y", "A", annotator="ann", order="none"),
        verdict("y", "x", "A", annotator="ann", order="none"),
    ]
    with pytest.raises(
        UserError, match=r"line 1 and line 2: annotator 'ann' says 'A' and 'B' of one question of row 'r1'"
    ):
        said(stored(tmp_path, *lines), "x", "y")


def test_both_orders_judged_differently_are_no_contradiction_but_position_bias(tmp_path):
    judge = stored(tmp_path, verdict("x", "y", "A"), verdict("y", "x", "A"))
    assert said(judge, "x", "y").said == said(judge, "y", "x").said == "A"


def test_a_line_that_is_there_twice_counts_once(tmp_path):
    judge = stored(tmp_path, *[verdict("x", "y", "A", annotator="ann")] * 3)
    assert odds(said(judge, "x", "y")) == pytest.approx(LOG3)


def test_reasons_and_votes_stay_beside_the_reply(tmp_path):
    reply = said(stored(tmp_path, verdict("x", "y", annotator="ann", reason="warmer")), "x", "y")
    assert reply.reason == "warmer"
    vote = {"annotator": "ann", "place": "line 1", "reason": "warmer", "said": "A", "value": None, "orderless": False}
    assert json.loads(reply.raw) == {"votes": [vote]}


# Identity


def test_another_file_is_another_judge_and_another_name_is_not(tmp_path):
    one = stored(tmp_path, verdict("x", "y"))
    (tmp_path / "copy.jsonl").write_bytes((tmp_path / "people.jsonl").read_bytes())
    assert StoredJudge(tmp_path / "copy.jsonl").identity == one.identity
    assert stored(tmp_path, verdict("x", "y"), verdict("x", "z")).identity != one.identity


def test_what_was_unanswered_is_asked_again_once_the_file_answers_it(tmp_path):
    rows = [row("x", "y")]
    with Store(tmp_path / "store.sqlite") as store:
        before, _ = judge_rows(stored(tmp_path, verdict("x", "z")), rows, store)
        after, _ = judge_rows(stored(tmp_path, verdict("x", "z"), verdict("x", "y", order="none")), rows, store)
    assert [reply.values is None for reply in before + after] == [True, True, False, False]


# Files

DIRTY = ' "quoted", a comma; a\ttab\nand two lines\u2028é = 1 '


def write_as(path: Path, line: dict) -> None:
    if path.name.endswith(".parquet"):
        pq.write_table(pa.Table.from_pylist([line]), path)
        return
    opened = gzip.open if path.suffix == ".gz" else open
    with opened(path, "wt", encoding="utf-8", newline="") as handle:
        if ".jsonl" in path.name:
            handle.write(json.dumps(line, ensure_ascii=False) + "\n")
        else:
            delimiter = ";" if "semicolon" in path.name else ","
            writer = csv.DictWriter(handle, list(line), delimiter=delimiter)
            writer.writeheader()
            writer.writerow({name: json.dumps(v) if isinstance(v, list) else v for name, v in line.items()})


NAMES = ("a.jsonl", "a.jsonl.gz", "a.csv", "a.csv.gz", "semicolon.csv", "a.parquet")


@pytest.mark.parametrize("name", NAMES)
def test_every_format_says_the_same_of_texts_with_anything_in_them(tmp_path, name):
    turns = [{"role": "user", "content": DIRTY}]
    line = {"prompt": turns, "first": DIRTY, "second": f"=1{DIRTY}", "verdict": "B", "order": "none"}
    write_as(tmp_path / name, line)
    prompt = (Message(role="user", content=DIRTY),)
    assert said(StoredJudge(tmp_path / name), DIRTY, f"=1{DIRTY}", prompt=prompt).said == "B"


@pytest.mark.parametrize("name", NAMES)
def test_every_format_holds_rankings(tmp_path, name):
    write_as(tmp_path / name, ranking(x=1, y=0))
    assert said(StoredJudge(tmp_path / name), "x", "y").said == "B"


@pytest.mark.parametrize(("written", "letter"), [(" a ", "A"), ("b", "B"), ("TIE", "tie")])
def test_a_verdict_may_be_written_by_hand(tmp_path, written, letter):
    assert said(stored(tmp_path, verdict("x", "y", written)), "x", "y").said == letter


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (verdict("x", "y", "C"), r"line 1: verdict is 'C'; A, B or tie was expected"),
        (verdict("x", "y", "A", value=1.0), r"line 1: both a verdict and a value"),
        ({"prompt": "p", "first": "x", "second": "y", "value": "much"}, r"line 1: value is 'much'; log-odds"),
        ({"prompt": "p", "first": "x", "second": "y", "value": "inf"}, r"line 1: value is 'inf'"),
        (verdict("x", "y", order="both"), r"line 1: order is 'both'; shown or none"),
        ({"first": "x", "second": "y", "verdict": "A"}, r"line 1: neither prompt nor row_id nor pair"),
        ({"prompt": "p", "first": "x", "verdict": "A"}, r"line 1: column second: an answer's text"),
        ({"prompt": 3, "first": "x", "second": "y", "verdict": "A"}, r"line 1: prompt is '3'; text or a list"),
        ({"prompt": "p", "answers": [{"text": "x"}]}, r"line 1: answers is .* a list of \{text, rank\}"),
        ({"prompt": "p", "answers": [{"text": "x", "rank": 0}]}, r"line 1: answers: at least two"),
        (
            {"prompt": "p", "answers": [{"text": "x", "rank": 0}, {"text": "x", "rank": 1}]},
            r"line 1: answers: one text has two ranks",
        ),
        (verdict("x", "y", ""), r"no line gives a verdict"),
    ],
)
def test_a_line_that_makes_no_sense_is_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message) as caught:
        stored(tmp_path, line)
    assert str(tmp_path / "people.jsonl") in str(caught.value)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", r"unknown format; known: \.jsonl and \.csv"),
        ("a.csv", "verdict,reason\nA,caf\xe9\n".encode("latin-1"), r"no UTF-8 text .*CSV UTF-8"),
        ("a.csv", b"pair,verdict\nq1,A,B\n", r"line 2: 2 fields were expected"),
        ("a.csv", b'pair,verdict\nq1,"A\n', r"not CSV"),
        ("a.jsonl", b'{"pair": "q1"\n', r"line 1: not JSON"),
        ("a.jsonl", b"[1]\n", r"line 1: an object with named columns"),
        ("a.jsonl.gz", b"no gzip", r"not a whole gzip file"),
        ("a.csv.gz", b"\x1f\x8b\x08\x00\x00\x00\x00\x00\x00\x03" + b"\xff" * 50, r"not a whole gzip file"),
        ("a.jsonl", b"[" * 100_000, r"line 1: not JSON: lists and objects are nested more than 64 deep"),
        ("a.jsonl", b"", r"no line gives a verdict"),
    ],
)
def test_a_file_that_cannot_be_read_says_why(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message):
        StoredJudge(tmp_path / name)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(UserError, match=r"gone\.jsonl: no such file"):
        StoredJudge(tmp_path / "gone.jsonl")
