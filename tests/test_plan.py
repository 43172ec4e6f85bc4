"""The planner: states to the byte, activations as the allocator gives them out, honest where it guesses."""

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from test_scoring import COMMON, tiny, token_rows

from rankwise.batching import micro_batches, steps
from rankwise.checkpoints import numerics
from rankwise.flops import forward_parts, meta_model, step_flops
from rankwise.plan import __main__ as plan
from rankwise.plan import options, table
from rankwise.plan.footprint import Shape, footprint, fresh_model
from rankwise.plan.forecast import Work, forecast, largest_budget, largest_part, peak_memory, remedies, spent_flops
from rankwise.plan.machine import matmul_rate
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel

ROOT = Path(__file__).parent.parent
WIDE = {"hidden_size": 128, "intermediate_size": 256, "vocab_size": 997}
ROWS = token_rows(40, longest=20, prompt=30)


def shape(name: str = "llama", **changes) -> Shape:
    settings = {key: changes.pop(key) for key in list(changes) if key not in Shape.__dataclass_fields__}
    return Shape(config=tiny(name, **settings).config, **changes)


# Memory: what is predicted is what is there


@pytest.mark.parametrize("name", ["llama", "llama-tied", "gpt2", "gemma3"])
@pytest.mark.parametrize("lora_rank", [0, 4])
def test_states_are_predicted_to_the_byte(name, lora_rank):
    """Weights with buffers, gradients, AdamW's state after one real step."""
    told = footprint(shape(name, lora_rank=lora_rank), ROWS[:2])
    model = fresh_model(shape(name, lora_rank=lora_rank))
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        p.grad = torch.zeros_like(p)
    optimizer = torch.optim.AdamW(trained)
    optimizer.step()
    size = lambda tensors: sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())
    assert told.weights == size([*model.parameters(), *model.buffers()])
    assert told.gradients == size(p.grad for p in trained)
    assert told.optimizer == size(value for state in optimizer.state.values() for value in state.values())
    assert (told.parameters, told.trained) == (
        sum(p.numel() for p in model.parameters()),
        sum(p.numel() for p in trained),
    )


def allocated(shape: Shape, part: list[TokenRow], *, accumulates: bool) -> tuple[int, int]:
    """Bytes that torch's allocator gave out for one real micro-batch: after the forward pass, and at the peak."""
    model = fresh_model(shape)
    module = LogpModel(model, layout="auto" if shape.device == "cpu" else "shared").train()
    if shape.gradient_checkpointing:
        model.activation_checkpointing_enable({"use_reentrant": False})
    for p in model.parameters():
        p.grad = torch.zeros_like(p) if accumulates and p.requires_grad else None
    batch = module.batch(part, 0)
    with torch.profiler.profile(profile_memory=True) as profile, numerics(shape.precision, torch.device("cpu")):
        total = module(batch).sum_A.sum()
        with torch.profiler.record_function("forward is over"):
            pass
        total.backward()
    with tempfile.TemporaryDirectory() as folder:
        profile.export_chrome_trace(f"{folder}/trace.json")
        events = json.loads(Path(folder, "trace.json").read_text())["traceEvents"]
    over = next(e["ts"] for e in events if e.get("name") == "forward is over")
    now = kept = peak = 0
    for event in sorted((e for e in events if e.get("name") == "[memory]"), key=lambda e: e["ts"]):
        now += event["args"]["Bytes"]
        peak = max(peak, now)
        kept = now if event["ts"] <= over else kept
    return kept, peak


@pytest.mark.parametrize("accumulates", [True, False])
@pytest.mark.parametrize(
    "changes",
    [{}, {"precision": "bf16"}, {"gradient_checkpointing": True}, {"lora_rank": 4}, {"device": "cuda"}],
    ids=str,
)
@pytest.mark.parametrize("name", ["llama", "gemma2-softcap", "gpt2"])
def test_activations_and_peak_are_those_of_the_allocator(name, changes, accumulates):
    """Within 1 %: the CPU's own allocator, asked by torch's profiler, against a run without storage.

    What the trace cannot see is random-number states that checkpointing keeps, and scalars.
    """
    changed = shape(name, **(WIDE if name != "gpt2" else {"n_embd": 128, "vocab_size": 997}), **changes)
    told = footprint(changed, ROWS[:12], accumulates=accumulates)
    kept, peak = allocated(changed, ROWS[:12], accumulates=accumulates)
    before = told.weights + told.optimizer + (told.gradients if accumulates else 0)
    states = 5056 * (1 + changed.config.num_hidden_layers) if changed.gradient_checkpointing else 0
    assert abs(told.activations - kept) <= 0.01 * kept + states
    if told.peak > told.weights + told.optimizer + told.gradients:  # else the optimizer's step is the peak
        assert abs(told.peak - before - peak) <= 0.01 * peak + states


def test_less_is_kept_by_checkpointing_and_by_smaller_parts():
    full, some = footprint(shape(**WIDE), ROWS[:12]), footprint(shape(**WIDE), ROWS[:4])
    checkpointed = footprint(shape(**WIDE, gradient_checkpointing=True), ROWS[:12])
    assert checkpointed.activations < 0.5 * full.activations and some.activations < 0.5 * full.activations
    assert checkpointed.weights == full.weights == some.weights


def test_shards_divide_states_and_copies_add_buckets():
    alone = footprint(shape(**WIDE), ROWS[:4])
    sharded = footprint(shape(**WIDE, processes=4, sharding="fsdp"), ROWS[:4])
    copied = footprint(shape(**WIDE, processes=4), ROWS[:4])
    assert [4 * sharded.weights, 4 * sharded.gradients] == pytest.approx([alone.weights, alone.gradients], abs=8)
    assert sharded.communication >= alone.weights // 2  # embedding, head and two blocks of two: nearly all
    assert copied.communication == alone.gradients and copied.peak == alone.peak + alone.gradients


# Work


def test_an_epoch_counts_every_row_once():
    work = Work(rows=ROWS, batch_size=16, micro_batch_tokens=100)
    told = forecast(shape(), work, flops_per_second=1e9, process_bytes=7)
    assert told.steps == 3 and told.positions == sum(row.positions for row in ROWS)
    assert told.flops == step_flops(shape().config, ROWS)
    assert told.seconds == pytest.approx(told.spent_flops / 1e9)
    assert told.total_bytes == told.memory.peak + 7


def test_what_is_computed_twice_costs_time_and_no_model_flops():
    """Forward, its recomputation, and two gradients a product; of frozen weights one."""
    parts, work = forward_parts(shape().config, ROWS), Work(rows=ROWS)
    assert spent_flops(shape(), work) == 3 * parts.total == step_flops(shape().config, ROWS)
    again = spent_flops(shape(gradient_checkpointing=True), work)
    assert again == 4 * (parts.linear + parts.attention) + 3 * parts.head
    frozen = spent_flops(shape(lora_rank=4), work)
    assert frozen == 2 * parts.linear + 3 * parts.attention + 2 * parts.head


def test_the_head_runs_twice_where_a_micro_batch_has_more_logits_than_are_kept(monkeypatch):
    """One row alone has too many: its share of the head's products is done once more."""
    config, work = shape().config, Work(rows=ROWS, batch_size=1)
    tokens = [sum(map(len, row.answers_ids)) for row in ROWS]
    monkeypatch.setattr("rankwise.plan.forecast.KEPT_LOGITS", (max(tokens) - 1) * config.vocab_size)
    longest = sum(n for n in tokens if n == max(tokens))
    again = 2 * longest * config.vocab_size * config.hidden_size
    assert spent_flops(shape(), work) == step_flops(config, ROWS) + again
    monkeypatch.setattr("rankwise.plan.forecast.KEPT_LOGITS", max(tokens) * config.vocab_size)
    assert spent_flops(shape(), work) == step_flops(config, ROWS)


def test_memory_is_that_of_the_largest_micro_batch():
    work = Work(rows=ROWS, batch_size=8, micro_batch_tokens=200)
    part, accumulates = largest_part(work)
    cuts = [
        micro_batches([ROWS[i] for i in indices], max_tokens=200)
        for indices in steps(len(ROWS), batch_size=8, epochs=1, seed=0)
    ]
    positions = lambda part: sum(row.positions for row in part)
    assert positions(part) == max(positions(other) for parts in cuts for other in parts) <= 200
    assert accumulates
    assert not largest_part(dataclasses.replace(work, micro_batch_tokens=10_000))[1]


def test_the_largest_budget_fits_and_a_larger_one_does_not():
    work = Work(rows=ROWS, batch_size=40)
    wide = shape(**WIDE)
    peak = lambda budget: peak_memory(wide, dataclasses.replace(work, micro_batch_tokens=budget)).peak
    limit = (peak(200) + peak(1000)) // 2
    budget = largest_budget(wide, work, limit)
    assert 200 <= budget < 1000 and peak(budget) <= limit < peak(int(1.2 * budget) + 64)
    assert largest_budget(wide, work, 2**50) == sum(row.positions for row in ROWS)
    assert largest_budget(wide, work, 1000) is None


def test_remedies_fit():
    """A limit below the states of a whole copy: adapters or shards help, smaller parts do not."""
    wide, work = shape(**WIDE), Work(rows=ROWS, batch_size=40)
    limit = int(0.9 * footprint(wide, ROWS[:1]).peak)
    changes = [remedy.change for remedy in remedies(wide, work, limit)]
    assert not any("smaller" in change for change in changes)
    assert any("LoRA" in change for change in changes) and any("FSDP2 over" in change for change in changes)


# The command


@pytest.fixture
def folder(tmp_path) -> Path:
    tiny().config.save_pretrained(tmp_path)
    return tmp_path


def told(capsys, *arguments: str) -> dict:
    assert plan.main([*map(str, arguments), "--json"]) == 0
    return json.loads(capsys.readouterr().out)


GIVEN = ("--device-memory", "64", "--tflops", "0.1", "--rows", "20", "--prompt-tokens", "20", "--answer-tokens", "8")


def test_a_config_is_enough(folder, capsys):
    out = told(capsys, folder, *GIVEN, "--k", 3)
    assert out["fits"] and out["whole_step_positions"] == out["largest_micro_batch_tokens"] == 16 * (20 + 3 * 7)
    assert out["forecast"]["positions"] == 20 * (20 + 3 * 7) and out["forecast"]["steps"] == 2
    assert out["forecast"]["memory"]["parameters"] == sum(p.numel() for p in tiny().parameters())


def test_the_table_says_what_it_would_take(capsys):
    """Half a billion weights in float32 with gradients and two moments need 16 bytes each: 7.4 GiB."""
    options = ("--device", "cuda", "--device-memory", "8", "--tflops", "400", "--rows", "2", "--precision", "bf16")
    assert plan.main(["qwen-0.5b", *options]) == 0
    words = " ".join(capsys.readouterr().out.split())
    assert "494,032,768 weights" in words and "It does not fit. It would with" in words and "FSDP2 over" in words


@pytest.mark.parametrize("largest, words", [(900, "micro_batch_tokens that does: 900"), (1000, "whole step")])
def test_a_whole_step_that_fits_is_called_so(largest, words):
    """There is no largest budget then: whatever is asked for fits."""
    assert words in table._verdict({"fits": True, "largest_micro_batch_tokens": largest, "whole_step_positions": 1000})


def test_real_rows_are_read_with_their_tokenizer(capsys, tmp_path):
    from test_rendering import tokenizer

    from rankwise.rows import write_rows
    from rankwise.types import Answer, Row, text_prompt

    made = tokenizer(bos=True)
    made.save_pretrained(tmp_path)
    tiny(vocab_size=len(made)).config.save_pretrained(tmp_path)
    answers = (Answer(text=" a superb chase.", rank=0), Answer(text=" a yawn.", rank=1))
    rows = [Row(id=f"{i}", prompt=text_prompt("The film opens with"), answers=answers) for i in range(3)]
    write_rows(tmp_path / "p.parquet", [*rows, Row(id="alone", prompt=text_prompt("Two"), answers=answers[:1])])
    out = told(capsys, tmp_path, *GIVEN, "--preferences", tmp_path / "p.parquet")
    length = lambda text: len(made(text)["input_ids"])
    paths = [length("The film opens with" + a.text) for a in answers]  # EOS is a target, and no position
    assert out["forecast"]["positions"] == 3 * (sum(paths) - length("The film opens with"))


@pytest.mark.timeout(120)
def test_a_rehearsal_measures_what_was_predicted(folder, capsys):
    out = told(capsys, folder, *GIVEN, "--batch-size", "4", "--measure")
    seen = out["measured"]
    assert seen["steps"] == 2 and seen["measured_bytes"] >= 0 and seen["measured_seconds_per_step"] > 0
    assert seen["predicted_bytes"] == out["forecast"]["memory"]["peak"]  # the largest micro-batch is among them


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["nowhere"], "no model"),
        (["llama-15m", "--device", "cuda", "--tflops", "5"], "give --device-memory"),
        (["llama-15m", "--preferences", "nothing.parquet"], "has no tokenizer"),
        (["llama-15m", *GIVEN, "--processes", "2", "--measure"], "runs one process"),
        (["llama-15m", "--device-memory", "0.01", "--tflops", "1", "--rows", "2", "--measure"], "does not fit"),
    ],
)
def test_a_mistake_is_told_in_a_line(arguments, words, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert plan.main(arguments) == 2
    said = capsys.readouterr()
    assert said.err.startswith("error: ") and words in said.err and "Traceback" not in said.err and not said.out


@pytest.mark.parametrize(
    "name, words", [("Mixtral", "dense transformers only"), ("Mamba", "dense transformers only"), ("Bert", "causal LM")]
)
def test_an_architecture_that_cannot_be_planned_is_told(name, words, capsys, tmp_path):
    made = getattr(transformers, f"{name}Config")(**{k: v for k, v in COMMON.items() if k != "head_dim"})
    made.save_pretrained(tmp_path)
    assert plan.main([str(tmp_path), *GIVEN]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "option, value, words",
    [
        ("--rows", "abc", "a whole number of at least 1 is expected, found abc"),
        ("--rows", "0", "a whole number of at least 1 is expected, found 0"),
        ("--lora-rank", "-3", "a whole number of at least 0 is expected, found -3"),
        ("--tflops", "fast", "a number above 0 is expected, found fast"),
        ("--device-memory", "inf", "a number above 0 is expected, found inf"),
        ("--efficiency", "1.5", "a share of a rate is at most 1, found 1.5"),
    ],
)
def test_a_value_that_cannot_be_is_refused_with_what_is_expected(option, value, words, capsys):
    with pytest.raises(SystemExit) as stop:
        options.parser().parse_args(["llama-15m", option, value])
    assert stop.value.code == 2 and f"argument {option}: {words}" in capsys.readouterr().err


def test_help_says_shares_in_words():
    said = " ".join(options.parser().format_help().split())
    assert "0.7 on a CPU in fp32, 0.4 in bf16; 0.4 on a GPU" in said and "{'" not in said


@pytest.mark.parametrize("precision", ["fp32", "medium", "bf16"])
def test_a_matmul_rate_is_found_in_every_precision(precision):
    assert matmul_rate(precision, torch.device("cpu"), side=64) > 0


def test_help_needs_no_torch():
    probe = (
        "import runpy, sys; sys.argv = ['plan', '--help']\n"
        "try: runpy.run_module('rankwise.plan', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "sys.exit('imported: torch' if 'torch' in sys.modules else 0)"
    )
    done = subprocess.run(
        [sys.executable, "-c", probe], cwd=ROOT, env=os.environ, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0 and "--micro-batch-tokens" in done.stdout, done.stderr


def test_every_preset_has_the_size_that_it_is_named_for():
    sizes = {name: sum(p.numel() for p in meta_model(plan._config(name)).parameters()) for name in plan.PRESETS}
    assert {name: f"{size:.1e}" for name, size in sizes.items()} == {
        "llama-15m": "1.5e+07",
        "qwen-0.5b": "4.9e+08",
        "qwen-1.5b": "1.5e+09",
        "llama-8b": "8.0e+09",
    }
