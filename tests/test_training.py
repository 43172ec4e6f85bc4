"""The loop: the cut, the number of processes and an interruption change nothing; a bad loss changes nothing either."""

import dataclasses
import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from test_scoring import alone, tiny, token_rows

from rankwise.batching import Batch
from rankwise.checkpoints import load_state
from rankwise.learners import PreferenceLearner, PreferenceSettings, RewardLearner, SftLearner
from rankwise.objectives import plackett_luce
from rankwise.rewards import RewardModel
from rankwise.scoring import LogpModel
from rankwise.training import Hooks, NonFiniteLoss, Settings, train
from rankwise.types import UserError

ROWS = token_rows(7)  # in steps of three the last has one row
SETTINGS = Settings(learning_rate=3e-3, epochs=2, batch_size=3, micro_batch_tokens=10_000)


def preferences(rows=ROWS, model=None, **settings) -> PreferenceLearner:
    """A learner whose reference is its own start."""
    module = LogpModel(model or tiny(), layout="shared")
    references = {row.id: [x.item() for x in alone(module.model, [row])] for row in rows}
    return PreferenceLearner(module, 0, references, PreferenceSettings(**{"beta": 0.5, **settings}))


def run(learner, rows=ROWS, settings=SETTINGS, checkpoint=None, **changes) -> tuple[list[dict], torch.Tensor]:
    """The records' values and the trained weights as one vector."""
    records = []
    hooks = Hooks(on_step=lambda record: records.append(record.values))
    settings = dataclasses.replace(settings, **changes)
    train(learner, rows, settings, what="test", checkpoint=checkpoint, hooks=hooks)
    return records, weights(learner)


def weights(learner) -> torch.Tensor:
    return torch.cat([p.detach().flatten().clone() for p in learner.module.parameters()])


def losses(records: list[dict]) -> list[float]:
    return [record["loss"] for record in records]


# The result depends on the rows and the settings alone


def test_the_loss_starts_at_log_k_factorial():
    """K runs over 2, 3, 4: the first step's loss is the mean of log K! over its rows."""
    rows = token_rows(6)
    records, _ = run(preferences(rows), rows, batch_size=6, epochs=1)
    expected = sum(math.lgamma(len(row.answers_ids) + 1) for row in rows) / 6
    assert records[0]["loss"] == pytest.approx(expected, rel=2e-6)
    assert records[0]["kl_from_reference"] == pytest.approx(0, abs=1e-5)


def test_it_learns_the_ranking():
    records, _ = run(preferences(), epochs=12)
    assert records[-1]["loss"] < 0.3 * records[0]["loss"]
    assert records[-1]["accuracy"] == 1 and records[-1]["margin"] > 1


@pytest.mark.parametrize("budget", [1, 25, 60])
def test_micro_batches_do_not_change_the_run(budget):
    """Batch × accumulation: 1 position a pass is one row a pass; the trajectory is that of whole batches."""
    whole, end = run(preferences())
    cut, cut_end = run(preferences(), micro_batch_tokens=budget)
    assert losses(cut) == pytest.approx(losses(whole), rel=2e-5)
    assert (cut_end - end).norm() <= 1e-3 * (end - weights(preferences())).norm()


def test_a_run_repeats_bit_for_bit():
    first, second = run(preferences()), run(preferences())
    assert first[0] == second[0] and torch.equal(first[1], second[1])


def test_accumulated_gradients_are_those_of_the_mean_over_rows():
    """One plain SGD-like look: the gradient norm reported is that of the textbook loss over the step's rows."""
    rows = token_rows(5)
    records, _ = run(preferences(rows), rows, batch_size=5, epochs=1, micro_batch_tokens=20)
    model = tiny()
    logps = alone(model, rows)
    total, start = 0.0, 0
    for row in rows:
        sums = torch.stack(logps[start : start + len(row.answers_ids)])[None]
        s = 0.5 * (sums - sums.detach())
        total = total + plackett_luce(s, torch.ones_like(s, dtype=torch.bool)).sum() / 5
        start += len(row.answers_ids)
    total.backward()
    norm = torch.cat([p.grad.flatten() for p in model.parameters()]).norm()
    assert records[0]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)


def test_sft_is_the_mean_over_tokens_not_over_rows():
    rows = [dataclasses.replace(row, answers_ids=row.answers_ids[:1], ranks=()) for row in token_rows(6)]
    learner = SftLearner(LogpModel(tiny(), layout="shared"), 0)
    expected = -sum(x.item() for x in alone(tiny(), rows)) / sum(len(row.answers_ids[0]) for row in rows)
    records, _ = run(learner, rows, batch_size=6, epochs=1, micro_batch_tokens=15)
    assert records[0]["loss"] == pytest.approx(expected, rel=1e-5)


def test_a_reward_model_starts_at_log_two_and_learns():
    from test_scoring import COMMON
    from transformers import LlamaConfig, LlamaForSequenceClassification

    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=1))
    torch.nn.init.zeros_(model.score.weight)
    rows = token_rows(6, answers=(2,))
    records, _ = run(RewardLearner(RewardModel(model), 0), rows, epochs=15)
    assert records[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert records[-1]["loss"] < 0.2 and records[-1]["accuracy"] == 1


@pytest.mark.parametrize("change", [{"gradient_checkpointing": True}, {"checkpoint_every_s": 0.0}])
def test_what_saves_memory_or_work_changes_nothing(change, tmp_path):
    assert torch.equal(run(preferences(), **change, checkpoint=tmp_path / "c.safetensors")[1], run(preferences())[1])


def test_adapters_train_and_the_base_stays():
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    records, _ = run(preferences(model=model), epochs=20, batch_size=7, learning_rate=1e-2)
    assert records[-1]["loss"] < 0.8 * records[0]["loss"]
    for name, p in model.named_parameters():
        assert "lora_" in name or torch.equal(p, before[name])


# The learning rate


def test_the_schedule_rises_then_falls_to_zero():
    """Four of 20 steps of warm-up: 1/4 … 4/4; then, over 16 steps, the closed forms."""
    rate = lambda **changes: [
        round(r["learning_rate"], 9) for r in run(preferences(rows), rows, batch_size=1, epochs=10, **changes)[0]
    ]
    rows = ROWS[:2]
    common = {"learning_rate": 1e-3, "warmup_share": 0.2}
    rise = [2.5e-4, 5e-4, 7.5e-4, 1e-3]
    assert rate(**common, schedule="constant") == pytest.approx(rise + [1e-3] * 16)
    assert rate(**common, schedule="linear") == pytest.approx(rise + [1e-3 * (1 - i / 16) for i in range(16)], abs=1e-9)
    cosine = [1e-3 * (1 + math.cos(math.pi * i / 16)) / 2 for i in range(16)]
    assert rate(**common, schedule="cosine") == pytest.approx(rise + cosine, abs=1e-9)


def test_weight_decay_leaves_gains_and_biases_alone():
    """With no gradient to follow (all rewards tie), decay alone moves the matrices: w ← w (1 − lr·λ) a step."""
    rows = [dataclasses.replace(row, ranks=(0,) * len(row.ranks)) for row in ROWS[:3]]
    learner = preferences(rows)
    before = {name: p.detach().clone() for name, p in learner.module.named_parameters()}
    run(learner, rows, epochs=1, weight_decay=0.1, learning_rate=0.1, warmup_share=0, schedule="constant")
    for name, p in learner.module.named_parameters():
        torch.testing.assert_close(p.detach(), before[name] * (0.99 if p.dim() >= 2 else 1), rtol=1e-6, atol=1e-7)


def test_clipping_bounds_what_is_applied_and_reports_what_was():
    unbounded = run(preferences(), max_grad_norm=0.0)[0][0]["grad_norm"]
    assert run(preferences(), max_grad_norm=1e-3)[0][0]["grad_norm"] == pytest.approx(unbounded, rel=1e-6)


# Interruptions


class Away(Exception):
    pass


def until(step: int, act) -> Hooks:
    return Hooks(on_step=lambda record: act() if record.step == step else None)


def test_an_error_and_a_rerun_give_the_weights_of_an_undisturbed_run(tmp_path):
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=0.0)

    def fail():
        raise Away

    with pytest.raises(Away):
        train(preferences(), ROWS, settings, what="test", checkpoint=tmp_path / "c.safetensors", hooks=until(4, fail))
    records, end = run(preferences(), settings=settings, checkpoint=tmp_path / "c.safetensors")
    undisturbed, expected = run(preferences(), settings=settings)
    assert torch.equal(end, expected)
    assert records == undisturbed[3:]  # step 4 was not saved, so it is done again


def scene(folder: str, number: int) -> None:
    """A child process that is hit by a signal after its third step."""
    hooks = until(3, lambda: os.kill(os.getpid(), number))
    every = 0.0 if number == signal.SIGKILL else 1e9
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=every)
    train(preferences(), ROWS, settings, what="test", checkpoint=Path(folder, "c.safetensors"), hooks=hooks)


def child(call: str, *launcher: str, **environment: str) -> subprocess.CompletedProcess:
    command = [*launcher, "-c", f"import test_training as t; t.{call}"] if not launcher else [*launcher]
    return subprocess.run(
        [sys.executable, *command],
        cwd=Path(__file__).parent,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), **environment},
        capture_output=True,
        text=True,
        timeout=120,
    )


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_run_continues_to_the_same_weights(number, tmp_path):
    """SIGTERM is held until the step is whole and then saves; SIGKILL costs the steps since the last checkpoint."""
    told = child(f"scene({str(tmp_path)!r}, {int(number)})")
    assert told.returncode == -number, told.stderr
    steps = []
    hooks = Hooks(on_resume=lambda step, points: steps.append(step))
    learner = preferences()
    train(learner, ROWS, SETTINGS, what="test", checkpoint=tmp_path / "c.safetensors", hooks=hooks)
    assert steps == [3 if number == signal.SIGTERM else 2]
    assert torch.equal(weights(learner), run(preferences())[1])


def test_a_checkpoint_keeps_the_curves(tmp_path):
    kept = []
    hooks = Hooks(points=lambda: [{"step": 1, "loss": 0.5}], on_resume=lambda step, points: kept.append((step, points)))
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=0.0)
    for _ in range(2):
        train(preferences(), ROWS, settings, what="test", checkpoint=tmp_path / "c.safetensors", hooks=hooks)
    assert kept == [(6, [{"step": 1, "loss": 0.5}])]


def killed_while_measuring(folder: Path, epoch: int) -> None:
    """SIGTERM comes while held-out rows are measured: it acts at once, as a checkpoint has just been written."""

    def measure(done: int) -> None:
        if done == epoch:
            os.kill(os.getpid(), signal.SIGTERM)
            raise AssertionError("not stopped")

    hooks = Hooks(on_epoch=measure)
    train(preferences(), ROWS, SETTINGS, what="test", checkpoint=folder / "c.safetensors", hooks=hooks)


@pytest.mark.parametrize("epoch", [1, 2])
def test_killed_while_held_out_rows_are_measured_no_step_is_lost_and_they_are_measured_again(epoch, tmp_path):
    told = child(f"killed_while_measuring(t.Path({str(tmp_path)!r}), {epoch})")
    assert told.returncode == -signal.SIGTERM, told.stderr
    epochs, steps, learner = [], [], preferences()
    hooks = Hooks(on_epoch=epochs.append, on_step=lambda record: steps.append(record.step))
    train(learner, ROWS, SETTINGS, what="test", checkpoint=tmp_path / "c.safetensors", hooks=hooks)
    assert epochs == [1, 2][epoch - 1 :] and steps == [4, 5, 6][3 * (epoch - 1) :]
    assert torch.equal(weights(learner), run(preferences())[1])


def test_counters_go_on_after_a_rerun(tmp_path):
    """Positions computed, rows seen and seconds trained count from the first step on, whoever took it."""
    path = tmp_path / "c.safetensors"
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=0.0)
    seen: list = []

    def fail():
        raise Away

    with pytest.raises(Away):
        train(preferences(), ROWS, settings, what="test", checkpoint=path, hooks=until(5, fail))
    kept = load_state(path)[1]["counters"]
    train(preferences(), ROWS, settings, what="test", checkpoint=path, hooks=Hooks(on_step=seen.append))
    assert seen[0].step == 5 and kept["seconds"] > 0
    assert seen[0].speeds["train_seconds"] > kept["seconds"]
    assert seen[-1].values["tokens_seen"] == 2 * sum(row.positions for row in ROWS)
    assert seen[-1].speeds["rows_seen"] == 2 * len(ROWS)
    assert run(preferences())[0][4:] == [record.values for record in seen]


IDENTITY = {"reference": "r1", "tokenizer": "t1"}


@pytest.mark.parametrize(
    ("identity", "rows", "changes", "said"),
    [
        ({"reference": "r2"}, ROWS, {}, "of another reference: it says r1, this run has r2"),
        ({"tokenizer": "t2"}, ROWS, {}, "of another tokenizer: it says t1, this run has t2"),
        ({"judge": "j"}, ROWS, {}, "of another judge: it says nothing, this run has j"),
        ({}, ROWS[::-1], {}, "of another rows: it says"),  # the same rows in another order
        ({}, [dataclasses.replace(ROWS[0], answers_ids=ROWS[0].answers_ids[::-1]), *ROWS[1:]], {}, "another rows"),
        ({}, ROWS, {"seed": 1}, "of another seed: it says 0, this run has 1"),
        ({}, ROWS, {"learning_rate": 1e-3}, "of another learning_rate: it says 0.003, this run has 0.001"),
        ({"reference": "r2"}, ROWS, {"seed": 1}, "of another reference: .*; of another seed: "),
    ],
)
def test_a_checkpoint_of_another_run_is_refused_by_name(identity, rows, changes, said, tmp_path):
    path = tmp_path / "c.safetensors"
    train(preferences(), ROWS, SETTINGS, what="test", checkpoint=path, identity=IDENTITY)
    settings = dataclasses.replace(SETTINGS, **changes)
    with pytest.raises(UserError, match=said) as told:
        train(preferences(), rows, settings, what="test", checkpoint=path, identity=IDENTITY | identity)
    assert str(path) in str(told.value) and "delete the file to begin anew" in str(told.value)


@pytest.mark.parametrize(
    ("settings", "said"),
    [({"beta": 0.1}, "beta: it says 0.5, this run has 0.1"), ({"loss": "ipo"}, "loss: it says plackett_luce")],
)
def test_the_learner_says_itself_what_its_loss_depends_on(settings, said, tmp_path):
    path = tmp_path / "c.safetensors"
    run(preferences(), checkpoint=path)
    with pytest.raises(UserError, match=f"of another {said}"):
        run(preferences(**settings), checkpoint=path)


def test_adapters_are_not_continued_on_another_base(tmp_path):
    """No checkpoint holds the frozen base, so the digest of it does; the same base is continued on."""
    from peft import LoraConfig, get_peft_model

    def adapted(seed: int) -> PreferenceLearner:
        torch.manual_seed(0)
        config = LoraConfig(r=4, target_modules=["q_proj", "v_proj"])
        return preferences(model=get_peft_model(tiny(seed=seed), config))

    path = tmp_path / "c.safetensors"
    run(adapted(0), checkpoint=path)
    assert run(adapted(0), checkpoint=path)[0] == []
    with pytest.raises(UserError, match="of another frozen weights: it says"):
        run(adapted(1), checkpoint=path)


def test_padding_is_counted_before_the_batch_travels(monkeypatch):
    """On a GPU the count would wait for all that is queued there, at every micro-batch."""

    class Far(Batch):
        @property
        def padding_fraction(self) -> float:
            raise AssertionError("counted on the device")

    monkeypatch.setattr(Batch, "to", lambda batch, where: Far(**vars(batch)))
    assert 0 < run(preferences(), epochs=1)[0][0]["padding_fraction"] < 1


def test_a_run_that_was_too_large_continues_with_smaller_micro_batches(tmp_path):
    path = tmp_path / "c.safetensors"
    settings = dataclasses.replace(SETTINGS, checkpoint_every_s=0.0)

    def fail():
        raise Away

    with pytest.raises(Away):
        train(preferences(), ROWS, settings, what="test", checkpoint=path, hooks=until(4, fail))
    records, end = run(preferences(), checkpoint=path, micro_batch_tokens=30, gradient_checkpointing=True)
    expected = run(preferences())[1]
    assert len(records) == 3 and (end - expected).norm() <= 1e-3 * (expected - weights(preferences())).norm()


def test_a_checkpoint_of_another_model_is_refused(tmp_path):
    run(preferences(), checkpoint=tmp_path / "c.safetensors", checkpoint_every_s=0.0)
    other = preferences(model=tiny(hidden_size=64))
    with pytest.raises(UserError, match="of another model"):
        run(other, checkpoint=tmp_path / "c.safetensors")


def test_a_damaged_checkpoint_is_named(tmp_path):
    (tmp_path / "c.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0 not a header")
    with pytest.raises(UserError, match="not a readable checkpoint"):
        run(preferences(), checkpoint=tmp_path / "c.safetensors")


def test_no_row_is_an_error_of_the_user():
    with pytest.raises(UserError, match="no row to train on"):
        run(preferences(), rows=[])


# A loss that is not finite


def test_a_bad_loss_names_its_rows_and_leaves_the_weights():
    learner = preferences()
    learner._references["row-03"][1] = math.nan
    learner._references["row-05"][0] = math.inf
    before = weights(learner)
    with pytest.raises(NonFiniteLoss) as told:
        run(learner, batch_size=7)
    assert "row-03" in str(told.value) and "row-05" in str(told.value) and "row-01" not in str(told.value)
    assert "(2 in all)" in str(told.value) and "those of the model, unchanged" in str(told.value)
    assert torch.equal(weights(learner), before)
