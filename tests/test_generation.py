"""The embedded engine: the distribution is the model's, an answer depends on its seed alone, log-probs are exact."""

import dataclasses

import numpy as np
import pytest
import torch
import transformers
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare, kstest
from test_rendering import tokenizer
from test_scoring import ALONE, COMMON, SHARING, alone, tiny
from transformers import AutoModelForCausalLM
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from rankwise.checkpoints import numerics, save_model
from rankwise.decoding import STEPS, LibraryCache, Memory, SharedPrompts, decoder_for
from rankwise.draws import NUCLEUS, draw, invert
from rankwise.generation import EmbeddedEngine, end_tokens, sample, text_stops
from rankwise.rendering import Renderer, TokenRow
from rankwise.sampling import Sampling, Wanted, seed_of
from rankwise.scoring import LogpModel
from rankwise.types import UserError

PROMPTS = [[1, 5, 9], [1, 7], [1, 20, 30, 40, 50], [1, 8, 8], [1, 33, 2, 4]]


def seeds(prompts=PROMPTS, k=3, seed=0) -> list[list[int]]:
    return [[seed_of(seed, f"prompt-{i}", 0, n) for n in range(k)] for i in range(len(prompts))]


def answers(model, prompts=PROMPTS, k=3, *, ends=(2,), given=None, batch=256, ended=None, **sampling) -> list:
    """Answers in the prompts' order."""
    sampling = Sampling(**{"max_new_tokens": 12, **sampling})
    given = given or seeds(prompts, k)
    out = dict(sample(model, prompts, given, sampling, ends=ends, batch_sequences=batch, ended=ended))
    assert sorted(out) == list(range(len(prompts)))
    return [out[i] for i in range(len(prompts))]


def by_the_library(logits: np.ndarray, sampling: Sampling, seen: list[int]) -> np.ndarray:
    """The distribution that transformers' own warpers leave, float64."""
    steps = []
    if sampling.repetition_penalty != 1:
        steps.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature != 1:
        steps.append(TemperatureLogitsWarper(sampling.temperature))
    steps += [TopKLogitsWarper(sampling.top_k)] if sampling.top_k else []
    steps += [TopPLogitsWarper(sampling.top_p)] if sampling.top_p < 1 else []
    steps += [MinPLogitsWarper(sampling.min_p)] if sampling.min_p else []
    scores = torch.from_numpy(logits)[None]
    for step in steps:
        scores = step(torch.tensor([seen]), scores)
    return scores[0].softmax(-1).numpy()


OPTIONS = {
    "plain": {},
    "cool": {"temperature": 0.7},
    "top-k": {"top_k": 4},
    "top-p": {"top_p": 0.8},
    "min-p": {"min_p": 0.2},
    "penalty": {"repetition_penalty": 1.8},
    "top-k, top-p, warm": {"temperature": 1.3, "top_k": 6, "top_p": 0.6},
    "all": {"temperature": 1.4, "top_k": 7, "top_p": 0.95, "min_p": 0.1, "repetition_penalty": 1.3},
}


@pytest.mark.parametrize("words", [9, 700, 3 * NUCLEUS])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_tokens_are_drawn_from_the_librarys_distribution(options, words):
    """Chi-square over 20,000 draws; tokens that the options exclude never come."""
    sampling, draws, seen = Sampling(max_new_tokens=1, **options), 20_000, [1, 3, 5]
    logits = np.random.default_rng(4).normal(size=words)
    tokens = []
    for part in np.array_split(np.random.default_rng(5).random(draws), 20):
        raw = torch.from_numpy(logits).float().expand(len(part), words)
        mask = torch.zeros(raw.shape, dtype=torch.bool).index_fill(1, torch.tensor(seen), True)
        token, logp = draw(raw, torch.from_numpy(part), sampling, mask if sampling.repetition_penalty != 1 else None)
        tokens.append(token.numpy())
        exact = logits - np.log(np.exp(logits).sum())  # of the whole vocabulary, no option applied
        np.testing.assert_allclose(logp.numpy(), exact[token.numpy()], atol=1e-5)
    counts = np.bincount(np.concatenate(tokens), minlength=words)
    expected = by_the_library(logits, sampling, seen)
    assert (counts[expected == 0] == 0).all()
    # rare words together, so that every cell expects some
    order = np.argsort(expected)
    cells = np.cumsum(expected[order]) * draws // 20
    gathered = lambda x: np.bincount(cells.astype(int), x[order])
    got, want = gathered(counts), draws * gathered(expected)
    assert chisquare(got[want > 0], want[want > 0] * got.sum() / want.sum()).pvalue > 1e-3


@pytest.mark.parametrize("options", [{"top_p": 0.999}, {"top_p": 0.3}, {"top_p": 0.9, "min_p": 0.01}])
def test_a_flat_distribution_needs_more_than_the_likeliest_words(options):
    """Where a thousand words do not reach top-p, all are looked at."""
    words = 4 * NUCLEUS
    logits = np.random.default_rng(1).normal(size=words) * 0.1
    uniform = torch.from_numpy(np.random.default_rng(2).random(3000))
    sampling = Sampling(max_new_tokens=1, **options)
    token, _ = draw(torch.from_numpy(logits).float().expand(3000, words), uniform, sampling, None)
    expected = by_the_library(logits, sampling, [])
    assert (expected[token.numpy()] > 0).all()
    # A share u of the mass lies among words at least as likely as the one drawn: of uniform u, uniform again.
    rank = np.cumsum(np.sort(expected)[::-1])[np.argsort(np.argsort(-expected))]
    assert kstest(rank[token.numpy()], "uniform").pvalue > 1e-3


def test_sampled_first_tokens_are_distributed_as_the_models():
    """The whole engine, seeds included: 4,000 answers of one token against the softmax of the model's logits."""
    model = tiny(vocab_size=8, eos_token_id=7)
    prompt = [1, 5, 3]
    given = [[seed_of(3, "p", 0, k) for k in range(4000)]]
    got = [a.token_ids[0] for a in answers(model, [prompt], given=given, ends=(7,), batch=4000, max_new_tokens=1)[0]]
    with torch.no_grad():
        expected = model(torch.tensor([prompt])).logits[0, -1].double().softmax(-1).numpy()
    assert chisquare(np.bincount(got, minlength=8), 4000 * expected / expected.sum()).pvalue > 1e-3


@given(st.integers(1, 700), st.integers(0, 2**32), st.sampled_from([0.0, 0.5, 1 - 2**-24, 1 - 2**-53]))
def test_no_number_draws_a_word_of_no_weight(words, seed, uniform):
    dice = np.random.default_rng(seed)
    weight = torch.from_numpy(np.where(dice.random((3, words)) < 0.7, 0, dice.random((3, words)))).float()
    weight[:, dice.integers(words)] = 1e-30
    token = invert(weight, torch.full((3,), uniform, dtype=torch.float64))
    assert (weight.gather(1, token[:, None]) > 0).all()


# An answer depends on its prompt and seed alone


def test_batch_size_changes_no_answer():
    model = tiny()
    whole = answers(model)
    assert len({a.token_ids for part in whole for a in part}) > 10
    for batch in (1, 3, 7):
        for mine, theirs in zip(answers(model, batch=batch), whole):
            same(mine, theirs)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bloom"])
def test_the_mix_of_lengths_changes_no_answer(name):
    """Prompts of 1 to 30 tokens, answers of 1 to 60, through eight rows: short ones outlive long ones."""
    model, dice = tiny(name), np.random.default_rng(0)
    prompts = [dice.integers(3, 60, size=n).tolist() for n in dice.integers(1, 30, size=24)]
    ends, given = (2, 3, 4), seeds(prompts, 3)
    together = answers(model, prompts, given=given, ends=ends, max_new_tokens=60, batch=8)
    for prompt, mine, theirs in zip(prompts, given, together):
        same(theirs, answers(model, [prompt], given=[mine], ends=ends, max_new_tokens=60)[0])


def same(mine, theirs) -> None:
    for a, b in zip(mine, theirs, strict=True):
        assert dataclasses.replace(a, logps=None) == dataclasses.replace(b, logps=None)
        assert a.logps == pytest.approx(b.logps, abs=1e-4)


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


@pytest.mark.parametrize("batch", [3, 256])
@pytest.mark.parametrize("name", [*SHARING, *ALONE])
def test_greedy_is_the_librarys_own(name, batch):
    model = tiny(name)
    alone = [generated(model, prompt) for prompt in PROMPTS]
    for theirs, mine in zip(alone, answers(model, temperature=0.0, batch=batch)):
        assert [list(a.token_ids) for a in mine] == [theirs] * 3


def generated(model, prompt: list[int], **options) -> list[int]:
    whole = torch.tensor([prompt])
    known = {"do_sample": False, "max_new_tokens": 12, "eos_token_id": 2, "pad_token_id": 0, **options}
    return model.generate(whole, attention_mask=torch.ones_like(whole), **known)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("name", ["mistral-window", "gemma2-softcap", "gemma3"])
def test_a_window_shorter_than_the_prompt_is_the_librarys_own(name):
    model = tiny(name, sliding_window=4)
    prompts = [[1, *range(10, 20)], [1, 7], [1, 20, 30, 40, 50]]
    assert decoder_for(model) is SharedPrompts
    alone = [generated(model, prompt) for prompt in prompts]
    for theirs, (mine,) in zip(alone, answers(model, prompts, k=1, temperature=0.0)):
        assert list(mine.token_ids) == theirs


def test_a_greedy_penalty_is_the_librarys_own():
    model = tiny()
    alone = [generated(model, prompt, repetition_penalty=1.7) for prompt in PROMPTS]
    for batch in (2, 256):
        got = answers(model, k=2, temperature=0.0, repetition_penalty=1.7, batch=batch)
        assert [[list(a.token_ids) for a in mine] for mine in got] == [[theirs] * 2 for theirs in alone]
    assert alone != [generated(model, prompt) for prompt in PROMPTS]


@pytest.mark.parametrize("name", SHARING)
def test_every_ordinary_architecture_shares_its_prompts(name):
    assert decoder_for(tiny(name)) is SharedPrompts


MASKED = {  # these say how far a layer looks back in their mask alone
    "qwen2-moe": (
        "Qwen2MoeConfig",
        {**COMMON, "sliding_window": 16, "use_sliding_window": True, "max_window_layers": 0},
    ),
    "phimoe": ("PhimoeConfig", {**COMMON, "sliding_window": 16}),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_window_that_only_the_mask_knows_is_kept(name):
    """Prompt and answer are longer than the window, and the probe is not."""
    kind, settings = MASKED[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    assert decoder_for(model) is LibraryCache
    prompts = [list(range(3, 20)), [1, 7], list(range(30, 52))]
    alone_ = [generated(model, prompt, max_new_tokens=12) for prompt in prompts]
    for theirs, mine in zip(alone_, answers(model, prompts, k=2, temperature=0.0)):
        assert [list(a.token_ids) for a in mine] == [theirs] * 2


@pytest.mark.parametrize(
    "kind, settings",
    [
        ("RwkvConfig", {"vocab_size": 61, "hidden_size": 32, "num_hidden_layers": 2, "attention_hidden_size": 32}),
        (
            "Llama4TextConfig",
            {**COMMON, "attention_chunk_size": 8, "num_local_experts": 2, "intermediate_size_mlp": 48},
        ),
    ],
)
def test_a_model_that_no_cache_serves_rightly_is_refused(kind, settings):
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(getattr(transformers, kind)(**settings)).eval()
    with pytest.raises(UserError, match="use engine: server"):
        answers(model)


def test_prompts_beyond_the_first_rotary_table_are_refused():
    """Phi-3's longrope takes the table of the longest row for the whole batch."""
    rope = {"rope_type": "longrope", "short_factor": [1.0] * 4, "long_factor": [4.0] * 4, "rope_theta": 1e4}
    rope |= {"original_max_position_embeddings": 16, "factor": 4.0}
    model = tiny(rope_parameters=rope, max_position_embeddings=64)
    answers(model, max_new_tokens=8)
    with pytest.raises(UserError, match=r"2 \(5\); 1 in all.*longrope"):
        answers(model)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_model_that_has_diverged_is_said_to_have(temperature):
    model = tiny()
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        answers(model, temperature=temperature)


def test_a_head_wider_than_the_config_says_takes_a_penalty():
    model = tiny()
    model.config.vocab_size = 40
    assert answers(model, repetition_penalty=1.5) != answers(model)


@pytest.mark.parametrize("name", ALONE)
def test_others_keep_a_copy_a_row_and_say_so(name, caplog):
    answers(tiny(name))
    assert "every answer keeps a copy of its prompt" in caplog.text


@pytest.mark.parametrize("places", [1, -1])
def test_a_wrong_mask_is_found_out(monkeypatch, places):
    """The probe must notice answers that see a place too many of their prompt, or one too few."""
    biases = Memory.biases

    def wrong(self, first_NM):
        keep = self.length_N
        self.length_N = keep + places * (self.growth == 0)
        try:
            return biases(self, first_NM)
        finally:
            self.length_N = keep

    monkeypatch.setattr(Memory, "biases", wrong)
    assert decoder_for(tiny()) is not SharedPrompts


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
    assert [sum(a.logps) for part in sampled for a in part] == pytest.approx(scored, abs=2e-4)
    assert all(len(a.logps) == len(a.token_ids) for part in sampled for a in part)


@pytest.mark.parametrize("k", [3, 40])
def test_an_answer_stops_at_its_first_end_token_and_the_rest_goes_on(k):
    """Forty answers a prompt are enough that some that ended stay in the batch for a while."""
    sampled = [a for part in answers(tiny(), k=k, ends=(2, 3, 4, 5, 6)) for a in part]
    for a in sampled:
        stops = [t in (2, 3, 4, 5, 6) for t in a.token_ids]
        assert not any(stops[:-1]) and stops[-1] == (a.finish_reason == "stop")
        assert len(a.token_ids) == 12 or a.finish_reason == "stop"
    assert {a.finish_reason for a in sampled} == {"stop", "length"}


def shapes(model, monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every forward pass from now on."""
    seen = []
    forward = model.forward
    monkeypatch.setattr(model, "forward", lambda **k: seen.append(tuple(k["input_ids"].shape)) or forward(**k))
    return seen


def counted(model, monkeypatch) -> list[tuple[int, int]]:
    """(rows, positions) of every forward pass of the run itself."""
    monkeypatch.setattr("rankwise.generation.decoder_for", lambda model: SharedPrompts)  # its passes are not counted
    return shapes(model, monkeypatch)


def test_answers_that_ended_make_room_for_the_next_prompts(monkeypatch):
    """Forty prompts through ten rows take few more passes than their tokens fill."""
    model, prompts = tiny(), [[1, 5 + i % 40] for i in range(40)]
    seen = counted(model, monkeypatch)
    sampled = answers(model, prompts, k=2, ends=(2, 3, 4, 5, 6), max_new_tokens=400, batch=10)
    tokens = sum(len(a.token_ids) for part in sampled for a in part)
    passed = sum(rows for rows, _ in seen)
    assert tokens < passed < tokens + (STEPS + 1) * 80
    assert all(rows <= 10 for rows, _ in seen)


def test_an_answer_that_ended_is_carried_for_a_few_steps_at_most(monkeypatch):
    model = tiny()
    seen = counted(model, monkeypatch)
    sampled = answers(model, k=40, ends=(2, 3), max_new_tokens=100)
    lengths = [len(a.token_ids) for part in sampled for a in part]
    decoding = [rows for rows, width in seen if width == 1 and rows != len(PROMPTS)]
    assert len(decoding) == max(lengths)
    assert decoding == [sum(n > step // STEPS * STEPS for n in lengths) for step in range(max(lengths))]


def test_each_prompt_is_run_once(monkeypatch):
    model = tiny()
    seen = counted(model, monkeypatch)
    answers(model, [[1, 5, 9, 11], [1, 7, 8, 9]], k=16)
    assert [shape for shape in seen if shape[1] > 1] == [(2, 3)]  # all but the last token, which every answer reads


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_is_given_back_as_it_was(precision):
    model = tiny("gemma2-softcap")
    before = model(torch.tensor([PROMPTS[0]])).logits
    for _ in range(2):
        dict(sample(model, PROMPTS, seeds(), Sampling(max_new_tokens=6), ends=(2,), precision=precision))
        assert torch.equal(model(torch.tensor([PROMPTS[0]])).logits, before)


# Where an answer ends


def test_an_answer_ends_where_its_text_first_holds_a_stop():
    made = tokenizer()
    model = tiny(vocab_size=len(made), pad_token_id=0)
    renderer = Renderer(made)
    free = [a for part in answers(model, k=6, ends=()) for a in part]
    text = renderer.answer_text(PROMPTS[0], free[0].token_ids)
    stop = text[3:6]
    ended = text_stops(renderer, [stop])
    cut = [a for part in answers(model, k=6, ends=(), ended=ended) for a in part]
    assert cut[0].finish_reason == "stop" and len(cut[0].token_ids) < len(free[0].token_ids)
    for whole, mine, prompt in zip(free, cut, np.repeat(np.arange(len(PROMPTS)), 6)):
        assert whole.token_ids[: len(mine.token_ids)] == mine.token_ids
        found = [stop in renderer.answer_text(PROMPTS[prompt], mine.token_ids[:n]) for n in range(len(mine.token_ids))]
        assert not any(found)
        has = stop in renderer.answer_text(PROMPTS[prompt], mine.token_ids)
        assert has == (mine.finish_reason == "stop")


def test_a_stop_that_begins_in_the_prompt_is_none():
    made = tokenizer()
    ids = made("a b a b", add_special_tokens=False)["input_ids"]
    ended = text_stops(Renderer(made), ["b a"])
    at = next(n for n in range(len(ids)) if "b" in made.decode(ids[:n]))
    assert not ended(ids[:at], ids[at : at + 2])  # " a": its "b" is the prompt's
    assert ended(ids[: at - 1], ids[at - 1 : at + 2])


def test_a_special_token_is_no_stop_string(tmp_path):
    made = tokenizer()
    save_model(tiny(vocab_size=len(made), pad_token_id=0), made, tmp_path)
    engine = EmbeddedEngine(tmp_path, Sampling(max_new_tokens=4, stop=("<|end|>",)))
    with pytest.raises(UserError, match=r"stop_token_ids: \[4\]"):
        list(engine.answers([Wanted(name="a", prompt=(), prompt_ids=(1,), seeds=(0,))]))


def test_stop_tokens_end_an_answer_like_end_tokens():
    model = tiny()
    assert answers(model, ends=(2,), stop_token_ids=(3, 4, 5)) == answers(model, ends=(2, 3, 4, 5))


def test_end_tokens_join_the_tokenizers_and_the_generation_configs():
    model = tiny()
    model.generation_config.eos_token_id = [9, 2]
    assert end_tokens(model, 2) == (2, 9)
    model.generation_config.eos_token_id = None
    assert end_tokens(model, 2) == (2,)


@pytest.mark.parametrize("prompt", [[], [1] * 16, [1] * 40])
def test_prompts_without_room_are_refused_all_at_once(prompt):
    with pytest.raises(UserError, match=rf"1 \({len(prompt)}\), 2 \({len(prompt)}\); 2 in all"):
        answers(tiny(max_position_embeddings=16), [[1], prompt, prompt])


def test_bf16_stays_within_the_error_of_a_scoring_pass_in_bf16():
    """Log-probs kept at sampling against float64, and those that scoring the same answers in bf16 gives."""
    model = tiny()
    out = dict(sample(model, PROMPTS, seeds(), Sampling(max_new_tokens=12), ends=(2,), precision="bf16"))
    rows = [
        TokenRow(id=str(i), prompt_ids=tuple(p), answers_ids=tuple(a.token_ids for a in out[i]))
        for i, p in enumerate(PROMPTS)
    ]
    kept = torch.tensor([sum(a.logps) for i in range(len(PROMPTS)) for a in out[i]])
    module = LogpModel(model)
    with numerics("bf16", torch.device("cpu")), torch.no_grad():
        scored = module(module.batch(rows, 0)).sum_A
    model.config._attn_implementation = "sdpa"
    exact = torch.stack(alone(model.double(), rows))
    far = lambda logps: (logps - exact).abs().mean().item()
    assert far(kept) < 3 * far(scored) + 1e-3
    assert not torch.is_autocast_enabled("cpu")
