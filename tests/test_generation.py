"""Sampling: the distribution is the model's, an answer depends on its own seed alone, and its log-prob is exact."""

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from test_rendering import tokenizer
from test_scoring import tiny

from rankwise.checkpoints import save_model
from rankwise.generation import Sampling, _draw, end_tokens, sample, seed_of
from rankwise.rendering import TokenRow
from rankwise.rollouts import Request, sample_rows
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.types import Row, UserError, text_prompt

PROMPTS = [[1, 5, 9], [1, 7], [1, 20, 30, 40, 50], [1, 8, 8], [1, 33, 2, 4]]


def seeds(prompts=PROMPTS, k=3, seed=0) -> list[list[int]]:
    return [[seed_of(seed, f"prompt-{i}", 0, n) for n in range(k)] for i in range(len(prompts))]


def answers(model, prompts=PROMPTS, k=3, *, ends=(2,), given=None, batch=256, **sampling) -> list:
    """Answers in the prompts' order."""
    sampling = Sampling(**{"max_new_tokens": 12, **sampling})
    out = dict(sample(model, prompts, given or seeds(prompts, k), sampling, ends=ends, batch_sequences=batch))
    assert sorted(out) == list(range(len(prompts)))
    return [out[i] for i in range(len(prompts))]


def allowed(logits: np.ndarray, temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Temperature, then top-k, then the smallest set that reaches top-p; straight from their definitions."""
    p = np.exp((logits - logits.max()) / temperature)
    p /= p.sum()
    order = np.argsort(-p)
    kept = order[: top_k or len(p)]
    p = np.where(np.isin(np.arange(len(p)), kept), p, 0.0)
    p /= p.sum()
    chosen, reached = [], 0.0
    for token in order:
        if reached >= top_p:
            break
        chosen.append(token)
        reached += p[token]
    p = np.where(np.isin(np.arange(len(p)), chosen), p, 0.0)
    return p / p.sum()


@pytest.mark.parametrize(
    "temperature, top_k, top_p", [(1.0, 0, 1.0), (0.7, 0, 1.0), (1.0, 4, 1.0), (1.0, 0, 0.8), (1.3, 6, 0.6)]
)
def test_tokens_are_drawn_from_the_filtered_distribution(temperature, top_k, top_p):
    """Chi-square over 40,000 draws; tokens that the filters exclude never come."""
    logits = np.random.default_rng(4).normal(size=9).astype(np.float64)
    uniform = torch.from_numpy(np.random.default_rng(5).random(40_000, dtype=np.float32))
    sampling = Sampling(max_new_tokens=1, temperature=temperature, top_k=top_k, top_p=top_p)
    tokens, logps = _draw(torch.from_numpy(logits).float().expand(40_000, 9), uniform, sampling)
    expected = allowed(logits, temperature, top_k, top_p)
    counts = np.bincount(tokens.numpy(), minlength=9)
    assert (counts[expected == 0] == 0).all()
    assert chisquare(counts[expected > 0], 40_000 * expected[expected > 0]).pvalue > 1e-3
    exact = logits - np.log(np.exp(logits).sum())  # the log-prob is of the whole vocabulary at temperature 1
    np.testing.assert_allclose(logps.numpy(), exact[tokens.numpy()], atol=1e-5)


def test_sampled_first_tokens_are_distributed_as_the_models():
    """The whole engine, seeds included: 4,000 answers of one token against the softmax of the model's logits."""
    model = tiny(vocab_size=8, eos_token_id=7)
    prompt = [1, 5, 3]
    given = [[seed_of(3, "p", 0, k) for k in range(4000)]]
    got = [a.token_ids[0] for a in answers(model, [prompt], given=given, ends=(7,), batch=4000, max_new_tokens=1)[0]]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    assert chisquare(np.bincount(got, minlength=8), 4000 * expected / expected.sum()).pvalue > 1e-3


def test_a_uniform_number_of_nearly_one_never_leaves_the_vocabulary():
    top = torch.tensor([1 - 2**-24, 0.0])
    logits = torch.tensor([[0.0, 0.0, -torch.inf]]).expand(2, 3)
    assert _draw(logits, top, Sampling(max_new_tokens=1))[0].tolist() == [1, 0]


# An answer depends on its prompt and seed alone


def test_batch_size_changes_no_answer():
    model = tiny()
    whole = answers(model)
    assert len({a.token_ids for part in whole for a in part}) > 10
    for batch in (1, 3, 7):
        for mine, theirs in zip(answers(model, batch=batch), whole):
            same(mine, theirs)


def same(mine, theirs) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert dataclasses.replace(a, logp=0.0) == dataclasses.replace(b, logp=0.0)
        assert a.logp == pytest.approx(b.logp, abs=1e-4)


def test_order_and_subset_change_no_answer():
    model = tiny()
    whole = answers(model)
    picked = [3, 0, 2]
    again = answers(model, [PROMPTS[i] for i in picked], given=[seeds()[i] for i in picked])
    for mine, i in zip(again, picked):
        same(mine, whole[i])


def test_fewer_answers_are_the_first_of_more():
    model = tiny()
    for mine, theirs in zip(answers(model, k=1), answers(model, k=3)):
        same(mine, theirs[:1])


def test_neighbours_near_the_end_of_the_context_change_no_answer():
    """A long prompt leaves itself little room; a short one beside it keeps its own."""
    model = tiny(max_position_embeddings=16)
    prompts = [[1, 5], [1, *range(10, 23)]]
    together, apart = answers(model, prompts, ends=()), [answers(model, [p], ends=())[0] for p in prompts[:1]]
    assert [len(a.token_ids) for a in together[0]] == [12] * 3
    assert [len(a.token_ids) for a in together[1]] == [2] * 3  # 14 + 2 = 16 positions
    same(together[0], apart[0])


def test_seeds_are_functions_of_prompt_round_and_number():
    made = {seed_of(s, p, r, k) for s in (0, 1) for p in ("a", "b") for r in (0, 1) for k in (0, 1)}
    assert len(made) == 16 and all(0 <= s < 2**63 for s in made)
    assert seed_of(0, "a", 0, 1) == seed_of(0, "a", 0, 1)


# What comes out


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2-softcap", "mistral-window"])
def test_greedy_is_the_librarys_own(name):
    model = tiny(name)
    for prompt, (mine,) in zip(PROMPTS, answers(model, k=1, temperature=0.0)):
        theirs = model.generate(
            torch.tensor([prompt]), do_sample=False, max_new_tokens=12, eos_token_id=2, pad_token_id=0
        )[0, len(prompt) :]
        assert list(mine.token_ids) == theirs.tolist()


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_logp_of_an_answer_is_what_a_scoring_pass_gives(temperature):
    model = tiny()
    sampled = answers(model, temperature=temperature, top_k=20)
    rows = [
        TokenRow(id=str(i), prompt_ids=tuple(p), answers_ids=tuple(a.token_ids for a in part))
        for i, (p, part) in enumerate(zip(PROMPTS, sampled))
    ]
    module = LogpModel(model)
    scored = module(module.batch(rows, 0)).sum_A.tolist()
    assert [a.logp for part in sampled for a in part] == pytest.approx(scored, abs=2e-4)


@pytest.mark.parametrize("k", [3, 40])
def test_an_answer_stops_at_its_first_end_token_and_the_rest_goes_on(k):
    """Forty answers a prompt are enough that some that ended stay in the batch for a while."""
    sampled = [a for part in answers(tiny(), k=k, ends=(2, 3, 4, 5, 6)) for a in part]
    for a in sampled:
        stops = [t in (2, 3, 4, 5, 6) for t in a.token_ids]
        assert not any(stops[:-1]) and stops[-1] == (a.finish_reason == "stop")
        assert len(a.token_ids) == 12 or a.finish_reason == "stop"
    assert {a.finish_reason for a in sampled} == {"stop", "length"}


def test_answers_that_ended_leave_the_batch(monkeypatch):
    """No forward pass runs once all have ended, and none carries more than a few that have."""
    model, sizes = tiny(), []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: sizes.append(k["input_ids"].shape) or forward(**k), raising=True)
    sampled = answers(model, k=40, ends=(2, 3, 4, 5, 6), max_new_tokens=40)
    longest = max(len(a.token_ids) for part in sampled for a in part)
    decoding = [rows for rows, width in sizes if width == 1]
    assert len(decoding) == longest - 1
    open_ = [sum(len(a.token_ids) > step for part in sampled for a in part) for step in range(1, longest)]
    assert all(rows <= 8 / 7 * still + 1 for rows, still in zip(decoding, open_, strict=True))


def test_end_tokens_join_the_tokenizers_and_the_generation_configs():
    model = tiny()
    model.generation_config.eos_token_id = [9, 2]
    assert end_tokens(model, 2) == (2, 9)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, 2) == (2,)


@pytest.mark.parametrize("prompt", [[], [1] * 16, [1] * 40])
def test_a_prompt_without_room_is_refused(prompt):
    with pytest.raises(UserError, match=f"{len(prompt)} tokens cannot be answered"):
        answers(tiny(max_position_embeddings=16), [prompt])


def test_bf16_stays_near():
    model = tiny()
    out = dict(sample(model, PROMPTS, seeds(), Sampling(max_new_tokens=6), ends=(2,), precision="bf16"))
    assert all(np.isfinite(a.logp) for part in out.values() for a in part)
    assert not torch.is_autocast_enabled("cpu")


# Rows of answers, kept


def prompt_rows(count=5) -> list[Row]:
    return [Row(id=f"p{i}", prompt=text_prompt("word " * (i + 1)), meta={"n": i}) for i in range(count)]


@pytest.fixture
def request_(tmp_path):
    made = tokenizer(bos=True)
    save_model(tiny(vocab_size=len(made), pad_token_id=0), made, tmp_path / "model")
    return Request(folder=tmp_path / "model", sampling=Sampling(max_new_tokens=6), k=3, batch_sequences=6)


def test_rows_are_answered_once_and_the_same_whatever_was_there(tmp_path, request_):
    with Store(tmp_path / "a") as whole, Store(tmp_path / "b") as bit_by_bit:
        rows, work = sample_rows(prompt_rows(), request_, whole)
        assert work.computed == 5 and [len(row.answers) for row in rows] == [3] * 5
        assert [(row.id, row.meta) for row in rows] == [(f"p{i}", {"n": i}) for i in range(5)]
        sample_rows(prompt_rows(2), request_, bit_by_bit)
        again, work = sample_rows(prompt_rows(), dataclasses.replace(request_, batch_sequences=100), bit_by_bit)
        assert work.computed == 3
        assert [[a.token_ids for a in row.answers] for row in again] == [
            [a.token_ids for a in row.answers] for row in rows
        ]
        assert sample_rows(prompt_rows(), request_, whole)[1].computed == 0
    for row in rows:
        for answer in row.answers:
            assert answer.logp < 0 and answer.source == "policy" and answer.finish_reason in ("stop", "length")


@pytest.mark.parametrize(
    "change", [{"seed": 1}, {"round": 1}, {"k": 2}, {"max_prompt_tokens": 1}, {"precision": "bf16"}]
)
def test_what_would_change_an_answer_is_in_its_key(tmp_path, request_, change):
    with Store(tmp_path / "a") as store:
        sample_rows(prompt_rows(), request_, store)
        assert sample_rows(prompt_rows(), dataclasses.replace(request_, **change), store)[1].computed == 5


def test_other_end_tokens_are_other_answers(tmp_path, request_):
    """generation_config.json may name further end tokens: rows of the old ones must not be taken for the new."""
    with Store(tmp_path / "a") as store:
        sample_rows(prompt_rows(), request_, store)
        config = request_.folder / "generation_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "eos_token_id": list(range(2, 100))}))
        rows, work = sample_rows(prompt_rows(), request_, store)
    assert work.computed == 5
    assert any(a.finish_reason == "stop" and a.token_ids[-1] != 2 for row in rows for a in row.answers)
