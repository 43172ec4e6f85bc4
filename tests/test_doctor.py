"""The data doctor: each finding on a row that has it and on one that lacks it; thresholds that stop; the report."""

import json
from dataclasses import asdict, replace

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast

from rankwise.rendering import Renderer
from rankwise.rows import write_rows
from rankwise.types import Answer, Message, Row, UserError, text_prompt
from tasks.doctor import MENDS, Params, Paths, Stops, run
from tasks.findings import Case, Limits, examine, length_bias, shared_with_eval
from tasks.stage import Stage
from tasks.tables import TABLES

WORDS = "the cat sat on the mat and the dog sat on the log while they all ate rice"
REPORT_ONLY = Stops(**{name: 1.0 for name in asdict(Stops())})


def tokenizer_with(*, bos=True, template=None):
    """A byte-level BPE tokenizer of about 300 tokens that knows the words above; with bos it opens texts with <s>."""
    core = Tokenizer(BPE())
    core.pre_tokenizer = ByteLevel(add_prefix_space=False)
    core.decoder = ByteLevelDecoder()
    alphabet = ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=300, initial_alphabet=alphabet, special_tokens=["<s>", "</s>"], show_progress=False)
    core.train_from_iterator([WORDS] * 5, trainer)
    if bos:
        core.post_processor = TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token="</s>", pad_token="</s>")
    tokenizer.chat_template = template
    return tokenizer


def row(row_id="r", prompt="the cat", answers=(" sat on the mat", " ate rice"), ranks=(0, 1), **meta):
    written = tuple(Answer(text=text, rank=rank) for text, rank in zip(answers, ranks))
    return Row(id=row_id, prompt=text_prompt(prompt), answers=written, meta=meta)


def examined(*rows, prompt=0, answer=0, context=0, tokenizer=None):
    limits = Limits(prompt=prompt, answer=answer, context=context)
    return examine(rows, Renderer(tokenizer or tokenizer_with()), limits, tick=lambda: None)


# Findings ------------------------------------------------------------------------------------------------------------

ROWS = {
    "boundary_merges": (row("x", prompt="the ca", answers=("t", " sat")), {}),
    "double_bos": (row("x", prompt="<s>the cat"), {}),
    "double_eos": (Row(id="x", prompt=text_prompt("the"), answers=(Answer(text=" a", token_ids=(70, 1, 1)),)), {}),
    "control_tokens": (row("x", answers=(" sat <|im_end|>", " ate")), {}),
    "empty_answers": (row("x", answers=(" ", " ate")), {}),
    "identical_answers": (row("x", answers=(" sat", "sat ")), {}),
    "identical_after_cut": (row("x", answers=(f" {WORDS} a", f" {WORDS} b")), {"answer": 12}),
    "cut_prompts": (row("x", prompt="the cat sat on the mat"), {"prompt": 4}),
    "cut_answers": (row("x", answers=(" the cat sat on the mat and the dog", " ate")), {"answer": 7}),
    "prompt_over_context": (row("x", prompt=WORDS), {"context": 16}),
    "row_over_context": (row("x", answers=(" " + WORDS, " ate")), {"context": 16}),
}


@pytest.mark.parametrize("name", ROWS)
def test_a_finding_names_the_row_that_has_it_and_no_other(name):
    bad, limits = ROWS[name]
    found = examined(row("healthy"), bad, **limits)
    assert (found[name].ids, found[name].count, found[name].share) == (["x"], 1, 0.5)
    assert all("healthy" not in finding.ids for finding in found.values())


def chat(row_id="x"):
    prompt = (Message(role="user", content="the cat"),)
    return Row(id=row_id, prompt=prompt, answers=(Answer(text="sat", rank=0), Answer(text="ate", rank=1)))


def test_a_chat_template_that_forgets_bos_or_eos_is_found():
    turns = "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}{% if add_generation_prompt %}[assistant]"
    bare = examined(chat(), tokenizer=tokenizer_with(template=turns + "{% endif %}"))
    assert (bare["missing_bos"].ids, bare["missing_eos"].ids) == (["x"], ["x"])
    whole = "<s>" + turns + "{% else %}</s>{% endif %}"
    good = examined(chat(), tokenizer=tokenizer_with(template=whole))
    assert (good["missing_bos"].ids, good["missing_eos"].ids) == ([], [])


def test_a_tokenizer_that_never_adds_bos_misses_none():
    assert examined(row(), tokenizer=tokenizer_with(bos=False))["missing_bos"].count == 0


def test_the_doctor_cuts_as_the_renderer_cuts():
    tokenizer = tokenizer_with()
    long = row(prompt=WORDS, answers=(" " + WORDS, " ate"))
    whole, cut = Renderer(tokenizer), Renderer(tokenizer, max_prompt_tokens=5, max_answer_tokens=4)
    case = Case(row=long, tokens=whole.render(long), limits=Limits(prompt=5, answer=4, context=0))
    assert case.kept_prompt_tokens == len(cut.render(long).prompt_ids)
    assert tuple(case.kept_answers) == cut.render(long).answers_ids


def test_contradictions_name_both_rows_and_agreement_names_none():
    pair = row("a", answers=("A", "B"))
    found = examined(pair, row("b", answers=("B", "A")), row("c", answers=("A", "B")), row("d", prompt="the dog"))
    assert found["contradictions"].ids == ["a", "b", "c"]
    assert not examined(pair, row("b", answers=("A", "B")), row("t", answers=("B", "A"), ranks=(0, 0)))[
        "contradictions"
    ].ids


def test_duplicate_prompts_count_from_the_second_and_not_where_there_is_no_prompt():
    found = examined(row("a"), row("b"), row("c", prompt=""), row("d", prompt=""))
    assert found["duplicate_prompts"].ids == ["b"]


def test_a_train_row_shares_a_prompt_or_a_group_with_eval():
    held = [row("e", prompt="the cat  sat", group="g")]
    train = [row("p", prompt="the cat sat"), row("g", prompt="new", group="g"), row("free", prompt="other", group="h")]
    assert shared_with_eval(train, held).ids == ["p", "g"]


def test_length_bias_counts_strict_pairs_and_half_a_pair_for_equal_lengths():
    """Longer better, shorter better, equal: 1 + 0 + 0.5 of 3 pairs; the tied pair says nothing."""
    found = examined(
        row("longer"),
        row("shorter", answers=(" ate rice", " sat on the mat")),
        row("equal", answers=(" cat", " cat")),
        row("tied", ranks=(0, 0)),
    )
    assert (found["length_bias"].count, found["length_bias"].of) == (1.5, 3)


def test_the_interval_of_length_bias_is_wilsons_and_rankings_count_as_rows():
    """40 of 100: Wilson's 95 % interval is [0.3094, 0.4980]; the same pairs in rows of ten alike are ten looks."""
    single = length_bias({(1.0, 1): 40, (0.0, 1): 60})
    assert single.interval == pytest.approx((0.3094, 0.4980), abs=1e-3)
    clustered = length_bias({(10.0, 10): 4, (0.0, 10): 6})
    assert clustered.interval == pytest.approx((0.1682, 0.6873), abs=1e-3)
    one_ranking = length_bias({(45.0, 45): 1})
    assert one_ranking.interval == pytest.approx((1 / (1 + 1.96**2), 1.0), abs=1e-3)


# The stage -----------------------------------------------------------------------------------------------------------


class Silent:
    """A tracker that hears nothing."""

    def metrics(self, *_, **__): ...
    def file(self, *_): ...


@pytest.fixture
def doctor(tmp_path):
    """Write tables and a base model's folder, run the stage, return its metrics and its page."""

    def examine_tables(params=None, *, vocabulary=400, context=512, tokenizer=None, **tables):
        paths = Paths(prompts=tmp_path / "prompts", base=tmp_path / "base", report=tmp_path / "report")
        for name in TABLES:
            write_rows(paths.prompts / f"{name}.parquet", tables.get(name, []))
        (tokenizer or tokenizer_with()).save_pretrained(paths.base)
        config = {"vocab_size": vocabulary, "max_position_embeddings": context}
        (paths.base / "config.json").write_text(json.dumps(config))
        run(params or Params(), paths, Stage("doctor", tracker=Silent(), report=paths.report))
        return json.loads((paths.report / "metrics.json").read_text()), (paths.report / "doctor.md").read_text()

    return examine_tables


def test_healthy_data_pass_and_the_page_shows_the_tokens_trained(doctor):
    metrics, page = doctor(sft=[row("s", answers=(" sat on the mat",), ranks=(None,))], eval=[row("e", prompt="a dog")])
    assert "Nothing stops the run." in page
    shown = next(line for line in page.splitlines() if "‖" in line and line.startswith("<s>·"))
    prompt, answer = shown.split(" ‖ ")
    assert (prompt.replace("·", ""), answer.replace("·", "")) == ("<s>the cat", " sat on the mat</s>")
    tokens = Renderer(tokenizer_with()).render(row(answers=(" sat on the mat",)))
    assert shown.count("·") == len(tokens.prompt_ids) - 1 + len(tokens.answers_ids[0]) - 1
    assert metrics["tokenizer"]["pad_is_eos"] is True
    assert metrics["tokenizer"]["context"] == 512
    assert metrics["sft"]["cut_answers"] == {"count": 0, "of": 1, "share": 0.0, "first_ids": []}


def test_a_finding_above_its_threshold_stops_after_the_report_is_written(doctor, tmp_path):
    bad = [row(f"b{i:02d}", prompt=f"the cat {i}", answers=("", " ate")) for i in range(12)]
    with pytest.raises(UserError) as caught:
        doctor(preferences=[*bad, row("ok")])
    message = str(caught.value)
    assert "empty_answers in preferences: 12 of 13 (92.31%), above doctor.stop_above.empty_answers = 0" in message
    assert "b09" in message and "b10" not in message
    assert "empty_answers in preferences" in (tmp_path / "report" / "doctor.md").read_text()
    metrics = json.loads((tmp_path / "report" / "metrics.json").read_text())
    assert metrics["preferences"]["empty_answers"]["count"] == 12


def test_length_bias_stops_only_once_its_whole_interval_is_above(doctor):
    """Wilson's lower bound at n of n is n / (n + 3.84): 0.565 of 5, 0.912 of 40."""
    pairs = [row(f"l{i}", prompt=f"the cat {i}") for i in range(40)]
    doctor(preferences=pairs[:5])
    with pytest.raises(UserError, match="length_bias in preferences: 40 of 40"):
        doctor(preferences=pairs)


def test_a_share_at_its_threshold_passes(doctor):
    stops = replace(REPORT_ONLY, empty_answers=0.5)
    doctor(Params(stop_above=stops), preferences=[row("b", answers=("", " ate")), row("ok", prompt="a dog")])


def test_a_vocabulary_larger_than_the_models_always_stops(doctor):
    with pytest.raises(UserError, match="the model's embedding only 10"):
        doctor(Params(stop_above=REPORT_ONLY), sft=[row()], vocabulary=10)


def test_eval_leaking_into_training_stops(doctor):
    with pytest.raises(UserError, match="shared_with_eval in sft: 1 of 1"):
        doctor(sft=[row("s")], eval=[row("e")])


def test_length_limits_are_the_policys_and_not_the_judges(doctor):
    params = Params(max_answer_tokens=2)
    judged = [row("j", prompt="")]
    doctor(params, labelled=judged)
    with pytest.raises(UserError, match="cut_answers in preferences"):
        doctor(params, preferences=judged)


def test_a_tokenizer_without_eos_or_a_missing_one_is_a_user_error(doctor, tmp_path):
    tokenizer = tokenizer_with()
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no EOS token"):
        doctor(sft=[row()], tokenizer=tokenizer)
    with pytest.raises(UserError, match="no such model folder"):
        run(Params(), Paths(base=tmp_path / "none"), Stage("doctor", tracker=Silent(), report=tmp_path))


def test_every_threshold_has_a_check_and_a_mend(doctor):
    metrics, _ = doctor(Params(stop_above=REPORT_ONLY), sft=[row("s")], eval=[row("e", prompt="a dog")])
    assert set(metrics["sft"]) == set(asdict(Stops())) == set(MENDS)
