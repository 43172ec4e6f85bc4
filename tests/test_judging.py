"""Judges: what they are asked, what is kept, and that their numbers are the model's own."""

import dataclasses
import json
import math

import pytest
import torch
from test_rendering import CHATML, chat, tokenizer
from test_scoring import COMMON, tiny
from transformers import LlamaConfig, LlamaForSequenceClassification

from rankwise.checkpoints import save_model
from rankwise.judging import (
    CallableJudge,
    LocalModelJudge,
    Question,
    Reply,
    RewardModelJudge,
    judge_rows,
    key_of,
    path_within,
    questions_of,
)
from rankwise.ranking import rank
from rankwise.rendering import TokenRow
from rankwise.store import Store
from rankwise.types import Answer, Row, UserError, text_prompt

RUBRIC = "Which answer is kinder? Say A or B."


def rows(*answers: tuple[str, ...]) -> list[Row]:
    return [
        Row(id=f"r{i}", prompt=text_prompt(f"prompt {i}"), answers=tuple(Answer(text=t) for t in texts))
        for i, texts in enumerate(answers)
    ]


class Counting:
    """A judge that prefers longer texts and remembers what it was asked."""

    def __init__(self, *, pairwise: bool, sign: int = 1, fails_after: int = 10**9):
        self.identity, self.pairwise, self.asked = f"counting {sign}", pairwise, []
        self._sign, self._fails_after = sign, fails_after

    def ask(self, questions):
        for index in reversed(range(len(questions))):  # replies may come in any order
            if len(self.asked) >= self._fails_after:
                raise RuntimeError("the judge is away")
            q = questions[index]
            self.asked.append((q.first, q.second))
            yield index, Reply(value=float(self._sign * (len(q.first) - len(q.second or "")) + 0.5 * self.pairwise))


def counted(judge, table, store) -> list:
    """The rankings, and how many questions were asked for them."""
    pairs, asked = judge_rows(judge, table, store)
    replies = {row.id: [(q.i, q.j, r.value) for q, r in pairs if q.row_id == row.id] for row in table}
    return [rank(row, replies[row.id], tie_below=0.0) for row in table], asked


# What is asked


def test_every_pair_is_asked_in_both_orders_and_every_answer_once():
    table = rows(("a", "bb", "ccc"))
    pairs = [(q.i, q.j, q.first, q.second) for q in questions_of(table, pairwise=True)]
    assert len(pairs) == 6 and len(set(pairs)) == 6
    assert {(j, i) for i, j, *_ in pairs} == {(i, j) for i, j, *_ in pairs}
    assert all((a, b) == (table[0].answers[i].text, table[0].answers[j].text) for i, j, a, b in pairs)
    assert [(q.i, q.j, q.first) for q in questions_of(table, pairwise=False)] == [
        (0, None, "a"),
        (1, None, "bb"),
        (2, None, "ccc"),
    ]


@pytest.mark.parametrize("pairwise", [True, False])
@pytest.mark.parametrize("sign", [1, -1])
def test_an_oracle_ranks_all_right_and_its_opposite_all_wrong(tmp_path, pairwise, sign):
    table = rows(("bb", "a", "cccc"), ("x", "yyy"), ("long one", "mid", "s"))
    with Store(tmp_path / "s") as store:
        judged, _ = counted(Counting(pairwise=pairwise, sign=sign), table, store)
    for one in judged:
        lengths = [len(answer.text) for answer in one.row.answers]
        assert lengths == sorted(lengths, reverse=sign == 1) and [a.rank for a in one.row.answers] == list(
            range(len(lengths))
        )
        assert one.position_bias == (0.5,) * len(one.position_bias)


def test_identical_texts_tie_without_a_call(tmp_path):
    judge = Counting(pairwise=True)
    with Store(tmp_path / "s") as store:
        judged, asked = counted(judge, rows(("same", "same"), ("same", "other!", "same")), store)
    assert asked == 2  # "same" against "other!" in both orders, though two answers have that text
    assert [a.rank for a in judged[0].row.answers] == [0, 0]
    assert [(a.text, a.rank) for a in judged[1].row.answers] == [("other!", 0), ("same", 1), ("same", 1)]


# What is kept


@pytest.mark.parametrize("pairwise", [True, False])
def test_nothing_is_asked_twice(tmp_path, pairwise):
    judge, table = Counting(pairwise=pairwise), rows(("a", "bb", "a"), ("ccc", "d"))
    with Store(tmp_path / "s") as store:
        first, asked = counted(judge, table, store)
        assert asked == len(judge.asked) == len(set(judge.asked)) == 4
        assert counted(judge, table, store) == (first, 0) and len(judge.asked) == 4
        more = [*table, dataclasses.replace(table[0], id="new", answers=(Answer(text="a"), Answer(text="eeeee")))]
        _, asked = counted(judge, more, store)
        assert asked == (2 if pairwise else 1)


def test_a_judge_that_fails_midway_is_asked_for_the_rest_only(tmp_path, monkeypatch):
    monkeypatch.setattr("rankwise.judging.COMMIT_REPLIES", 2)
    table = rows(*((f"{i}a", f"{i}b") for i in range(4)))
    with Store(tmp_path / "s") as store:
        with pytest.raises(RuntimeError):
            judge_rows(Counting(pairwise=False, fails_after=5), table, store)
        assert len(store) == 4  # the fifth was in flight
        judge = Counting(pairwise=False)
        assert judge_rows(judge, table, store)[1] == len(judge.asked) == 4


def test_the_key_of_a_reply_depends_on_everything_that_is_shown():
    question = Question(row_id="r", prompt=text_prompt("p"), first="a", second="b", i=0, j=1)
    change = lambda **fields: key_of("judge", dataclasses.replace(question, **fields))
    keys = [
        key_of("judge", question),
        key_of("other judge", question),
        change(prompt=text_prompt("q")),
        change(prompt=chat(("user", "p"))),
        change(first="b", second="a"),
        change(second="c"),
        change(second=None),
    ]
    assert len(set(keys)) == len(keys)
    assert change(row_id="elsewhere", i=3, j=7) == keys[0]  # where it stands is not shown


# A function


def test_a_function_judges_by_its_name_and_file(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    source = "def score(prompt, answer):\n    return len(answer) - len(prompt)\n"
    (tmp_path / "my_judge.py").write_text(source)
    judge = CallableJudge("my_judge:score")
    question = Question(row_id="r", prompt=text_prompt("four"), first="sixsix", i=0)
    assert [(i, r.value) for i, r in judge.ask([question])] == [(0, 2.0)]
    (tmp_path / "my_judge.py").write_text(source + "# changed\n")
    assert CallableJudge("my_judge:score").identity != judge.identity


@pytest.mark.parametrize("name", ["no_such_module:f", "json:no_such", "json", ":"])
def test_a_judge_that_cannot_be_imported_is_named(name):
    with pytest.raises(UserError, match="cannot be imported"):
        CallableJudge(name)


# A reward model


def reward_folder(folder, *, pad="<pad>", seed=0):
    made = tokenizer(bos=True, pad=pad)
    torch.manual_seed(seed)
    config = LlamaConfig(**{**COMMON, "vocab_size": len(made), "pad_token_id": made.pad_token_id}, num_labels=1)
    save_model(LlamaForSequenceClassification(config), made, folder)
    return made, LlamaForSequenceClassification.from_pretrained(folder).eval()


@pytest.mark.parametrize("pad", ["<pad>", "<eos>"])
def test_rewards_are_read_at_the_last_token_of_each_answer_whatever_the_padding(tmp_path, pad):
    """Batched, padded on the right, with pad = EOS or not: the score of each sequence alone, EOS included."""
    made, model = reward_folder(tmp_path, pad=pad)
    judge = RewardModelJudge(tmp_path, max_tokens=0)
    table = rows(("short", "a much longer answer", ""), ("mid one", "x"))
    questions = questions_of(table, pairwise=False)
    got = dict(judge.ask(questions))
    for i, question in enumerate(questions):
        ids = [*made(question.prompt[0].content + question.first)["input_ids"], made.eos_token_id]
        with torch.no_grad():
            hidden = model.model(torch.tensor([ids])).last_hidden_state[0, -1]
            expected = model.score(hidden).item()
        assert got[i].value == pytest.approx(expected, abs=1e-5)
    assert len({round(r.value, 6) for r in got.values()}) == len(questions)


def test_the_library_agrees_where_the_pad_token_is_no_token_of_the_text(tmp_path):
    made, model = reward_folder(tmp_path)
    question = questions_of(rows(("an answer",)), pairwise=False)
    ids = torch.tensor([[*made("prompt 0an answer")["input_ids"], made.eos_token_id]])
    with torch.no_grad():
        expected = model(ids).logits.item()
    assert dict(RewardModelJudge(tmp_path, max_tokens=0).ask(question))[0].value == pytest.approx(expected, abs=1e-5)


def test_batches_do_not_change_rewards(tmp_path):
    reward_folder(tmp_path)
    questions = questions_of(rows(*((f"text {i}" * i, f"{i}") for i in range(1, 9))), pairwise=False)
    one = dict(RewardModelJudge(tmp_path, max_tokens=0, batch_tokens=1).ask(questions))
    many = dict(RewardModelJudge(tmp_path, max_tokens=0).ask(questions))
    for i in range(len(questions)):
        assert one[i].value == pytest.approx(many[i].value, abs=1e-5)


def test_a_limit_keeps_the_answer_whole_and_the_end_of_the_prompt():
    row = TokenRow(id="r", prompt_ids=(1, 2, 3, 4), answers_ids=((5, 6, 7),))
    assert path_within(row, 0) is row and path_within(row, 7) is row
    cut = path_within(row, 5)
    assert cut.prompt_ids == (3, 4) and cut.answers_ids == ((5, 6, 7),)
    cut = path_within(row, 2)
    assert cut.prompt_ids == () and cut.answers_ids == ((5, 6),)


def test_the_identity_of_a_reward_judge_is_weights_tokenizer_and_limits(tmp_path):
    reward_folder(tmp_path / "a")
    reward_folder(tmp_path / "b", seed=1)
    reward_folder(tmp_path / "c", pad="<eos>")
    made = [
        RewardModelJudge(tmp_path / "a", max_tokens=0),
        RewardModelJudge(tmp_path / "b", max_tokens=0),
        RewardModelJudge(tmp_path / "c", max_tokens=0),
        RewardModelJudge(tmp_path / "a", max_tokens=9),
        RewardModelJudge(tmp_path / "a", max_tokens=0, precision="bf16"),
    ]
    assert len({judge.identity for judge in made}) == len(made)
    assert RewardModelJudge(tmp_path / "a", max_tokens=0, batch_tokens=7).identity == made[0].identity


# A language model


@pytest.mark.parametrize("template", [None, CHATML])
def test_a_language_models_reply_is_its_log_odds_of_the_two_verdicts(tmp_path, template):
    """Both orders, computed here from the full logits after the very prompt; mass is P(A) + P(B)."""
    made = tokenizer(bos=True, template=template)
    model = tiny(vocab_size=len(made), max_position_embeddings=512)
    save_model(model, made, tmp_path / "judge")
    (tmp_path / "rubric.txt").write_text(RUBRIC)
    judge = LocalModelJudge(tmp_path / "judge", tmp_path / "rubric.txt")
    table = rows(("kind words", "no"), ("x", "y and more", "z"))
    questions = questions_of(table, pairwise=True)
    got = dict(judge.ask(questions))
    a, b = made.convert_tokens_to_ids(["A", "B"])
    for i, q in enumerate(questions):
        block = json.dumps({"prompt": q.prompt[0].content, "answer_A": q.first, "answer_B": q.second})
        if template:
            text = f"<|start|>system\n{RUBRIC}<|end|><|start|>user\n{block}<|end|><|start|>assistant\n"
            ids = made(text, add_special_tokens=False)["input_ids"]
        else:
            ids = made(f"{RUBRIC}\n\n{block}\n\nVerdict:")["input_ids"]
        with torch.no_grad():
            logps = model(torch.tensor([ids])).logits[0, -1].log_softmax(-1)
        assert got[i].value == pytest.approx((logps[a] - logps[b]).item(), abs=1e-4)
        assert got[i].mass == pytest.approx(math.exp(logps[a]) + math.exp(logps[b]), rel=1e-4)
    with Store(tmp_path / "s") as store:
        judged, asked = counted(judge, table, store)
    assert asked == len(questions) == 8
    half = lambda i, j: (got[i].value - got[j].value) / 2
    best = judged[0].row.answers[0]
    assert best.text == ("kind words" if half(0, 1) > 0 else "no")
    assert judged[0].position_bias == pytest.approx([(got[0].value + got[1].value) / 2], abs=1e-4)


def test_the_rubric_is_part_of_a_language_judges_identity(tmp_path):
    made = tokenizer(bos=True)
    save_model(tiny(vocab_size=len(made)), made, tmp_path / "judge")
    identities = set()
    for text in (RUBRIC, RUBRIC + " "):
        (tmp_path / "rubric.txt").write_text(text)
        identities.add(LocalModelJudge(tmp_path / "judge", tmp_path / "rubric.txt").identity)
    assert len(identities) == 2
