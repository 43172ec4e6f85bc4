"""Laws of a stage as a command: outputs whole or not at all, locks that die with their holder, options that work."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import warm
import yaml
from fault_server import FaultServer

from rankwise.checkpoints import load_causal_lm
from rankwise.rows import read_rows, write_aside, write_rows
from rankwise.types import Unavailable, UserError
from tasks.locks import only_writer
from tasks.stage import Stage, _flat_numbers, output_folder
from tasks.tracking import Tracker


@pytest.fixture
def project(tmp_path_factory, tmp_path) -> tiny.Project:
    return tiny.finished(tmp_path_factory.getbasetemp()).copy(tmp_path / "copy")


ROOT = Path(__file__).parent.parent


def command(project: tiny.Project, *words: str, python: str = sys.executable, **environment: str) -> subprocess.Popen:
    """python -m WORDS as a user starts it, both streams in one pipe."""
    return subprocess.Popen(
        [python, "-m", *words],
        cwd=project.root,
        env={**os.environ, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def launched(project: tiny.Project, stage: str, *options: str, **environment: str) -> subprocess.Popen:
    """A stage in two processes of torchrun, all of them forked (tests/warm.py)."""
    torchrun = ["torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python"]
    python = str(warm.folder() / "python")
    words = [*torchrun, python, "-m", f"tasks.{stage}", *options]
    return command(project, *words, python=python, CUDA_VISIBLE_DEVICES="", PYTHONPATH=str(ROOT), **environment)


# Outputs


def test_a_folder_is_replaced_whole(tmp_path):
    path = tmp_path / "models/policy"
    for name in ("first", "second"):
        with output_folder(path) as folder:
            (folder / name).write_text(name)
            assert not (path / name).exists(), "seen before it was whole"
        assert [file.name for file in path.iterdir()] == [name]
    assert [file.name for file in path.parent.iterdir()] == ["policy"]


def test_a_folder_that_fails_leaves_the_old_one_and_no_litter(tmp_path):
    path = tmp_path / "policy"
    with output_folder(path) as folder:
        (folder / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), output_folder(path) as folder:
        (folder / "weights").write_text("half")
        raise ZeroDivisionError
    assert (path / "weights").read_text() == "old"
    assert [file.name for file in tmp_path.iterdir()] == ["policy"]


def test_a_folder_whose_writer_died_between_its_two_renames_is_put_back(tmp_path):
    path, old = tmp_path / "policy", tmp_path / ".policy.old"
    old.mkdir()
    (old / "weights").write_text("old")
    with pytest.raises(ZeroDivisionError), output_folder(path):
        raise ZeroDivisionError
    assert (path / "weights").read_text() == "old" and not old.exists()


def test_what_dead_writers_left_is_removed_and_what_living_ones_write_is_not(tmp_path):
    done = subprocess.Popen(["true"])
    done.wait()
    dead, living, other = (tmp_path / f".m[1].json.{who}.tmp" for who in (done.pid, os.getppid(), "someone"))
    for path in (dead, living, other):
        path.write_text("half")
    write_aside(tmp_path / "m[1].json", lambda aside: aside.write_text("whole"))
    assert not dead.exists() and living.exists() and other.exists()


# The command


def test_a_lock_dies_with_its_holder(project):
    assert project.run("sft", before=tiny.killed_at("rankwise.checkpoints:load_causal_lm", 1)).status == -signal.SIGKILL
    assert project.run("sft").status == 0


HOLDER = """
import fcntl, os, sys, time
with open(sys.argv[1], "a") as handle:
    fcntl.flock(handle, fcntl.LOCK_EX)
    handle.write(f"{os.getpid()} {os.getppid() + int(sys.argv[2])}")
    handle.flush()
    print("held", flush=True)
    time.sleep(1.0)
"""


@pytest.mark.parametrize("orphan", [True, False])
def test_a_lock_is_waited_for_where_its_holder_is_leaving_and_only_then(tmp_path, monkeypatch, capsys, orphan):
    """DVC was killed and run again at once: the stage that it left behind still writes its checkpoint."""
    monkeypatch.setenv("DVC_STAGE", "sft")
    with only_writer("sft", "model", tmp_path):
        [lock] = tmp_path.glob("locks/*")
        assert lock.read_text().split() == [str(os.getpid()), str(os.getppid())]
    lock.write_text("")
    words = [sys.executable, "-c", HOLDER, str(lock), str(int(orphan))]
    with subprocess.Popen(words, stdout=subprocess.PIPE) as holder:
        holder.stdout.readline()
        if orphan:
            with only_writer("sft", "model", tmp_path):
                assert holder.wait(5) == 0
            assert capsys.readouterr().out.count(f"process {holder.pid}, of a run that was killed, is leaving") == 1
        else:
            with pytest.raises(UserError, match=f"by process {holder.pid};"), only_writer("sft", "model", tmp_path):
                pass
            holder.terminate()


def test_trees_that_share_what_outlives_a_run_do_not_refuse_each_other(tmp_path, monkeypatch):
    """RANKWISE_HOME for the trees of `dvc queue`: the same stage runs in each, on outputs of its own."""
    for tree in ("a", "b"):
        (tmp_path / tree).mkdir()
    with contextlib.ExitStack() as running:
        for tree in ("a", "b"):
            monkeypatch.chdir(tmp_path / tree)
            running.enter_context(only_writer("dpo", "model", tmp_path / "home"))
        with pytest.raises(UserError, match=f"already being run here by process {os.getpid()}"):
            running.enter_context(only_writer("dpo", "model", tmp_path / "home"))


def test_two_trees_do_not_write_one_checkpoint(tmp_path, monkeypatch, capsys):
    """The very same training in both: the second waits until the first is gone, and is to be run again: DVC then has
    the result."""
    monkeypatch.setattr("tasks.stage.HOME", tmp_path)
    first, second = (Stage("sft", tracker=Tracker(), report=None) for _ in range(2))
    assert first.checkpoints("key") == first.checkpoints("key") == tmp_path / "checkpoints/sft/key"
    ends = []

    def train() -> None:
        with pytest.raises(Unavailable, match="DVC takes its result from the cache"):
            second.checkpoints("key")
        ends.append("again")

    waiting = threading.Thread(target=train, daemon=True)
    waiting.start()
    waiting.join(0.5)
    assert waiting.is_alive() and "another run trains the very same" in capsys.readouterr().out
    first.__dict__.clear()  # as if its process had ended
    waiting.join(10)
    assert ends == ["again"]


def test_paths_and_the_params_file_can_be_named(project):
    (project.root / "params.yaml").rename(project.root / "mine.yaml")
    told = project.run("preferences", "--params", "mine.yaml", "--preferences", "elsewhere/p.parquet")
    assert told.status == 0, told.err
    assert len(read_rows(project.root / "elsewhere/p.parquet")) == 24


def test_an_unknown_option_is_refused(project):
    told = project.run("dpo", "--beta", "0.3")
    assert told.status == 2 and "unrecognized arguments: --beta 0.3" in told.err and "Traceback" not in told.err


@pytest.mark.parametrize("hours", [-3, 3])
def test_a_clock_that_is_set_takes_no_plot_away_and_leaves_none_of_an_earlier_run(tmp_path, hours):
    """The stage begins; the clock is set by hours; what it draws then has times of before, or long after, its start."""
    plots = tmp_path / "reports/dpo/plots"
    plots.mkdir(parents=True)
    (plots / "margin.png").write_text("of an earlier run")
    (plots / "loss.png").write_text("of an earlier run")
    stage = Stage("dpo", tracker=Tracker(), report=plots.parent)
    (plots / "loss.png").write_text("of this run")
    (plots / "new.png").write_text("of this run")
    for name in ("loss.png", "new.png"):
        os.utime(plots / name, (time.time() + hours * 3600,) * 2)
    stage.finish({})
    assert sorted(path.name for path in plots.iterdir()) == ["loss.png", "new.png"]


def test_seconds_are_kept_apart_from_results(project):
    assert project.timings("dpo")["seconds"] > 0
    assert "second" not in (project.root / "reports/dpo/metrics.json").read_text()
    assert "second" not in (project.root / "reports/dpo/plots/curves.csv").read_text()


def test_what_outlives_a_run_can_live_elsewhere(project, tmp_path):
    """RANKWISE_HOME: a larger or a shared disk."""
    shutil.rmtree(project.root / ".rankwise")
    out, _ = command(project, "tasks.preferences", RANKWISE_HOME=str(tmp_path / "home")).communicate(timeout=60)
    assert (tmp_path / "home/timings/preferences.json").exists(), out
    assert not (project.root / ".rankwise").exists()


# Options


OPTIONS = {  # parameters, and the stages that run under them
    "ipo": ({"dpo": {"loss": "ipo"}}, ["dpo"]),
    "all pairs": ({"dpo": {"loss": "pairwise"}}, ["dpo"]),
    "preferred fine-tuning": ({"dpo": {"loss": "likelihood", "length_normalised": False}}, ["dpo"]),
    "unlikelihood": ({"dpo": {"loss": "likelihood", "unlikelihood": 0.1}}, ["dpo"]),
    "best of four, and the data beside": ({"evaluate": {"best_of": 4, "against_data": True}}, ["evaluate"]),
    "soft labels": ({"dpo": {"loss": "soft_plackett_luce"}}, ["dpo"]),
    "label smoothing": ({"dpo": {"label_smoothing": 0.1}}, ["dpo"]),
    "plain sums": ({"dpo": {"length_normalised": False}}, ["dpo"]),
    "no checkpointing of gradients, small parts": ({"dpo": {"micro_batch_tokens": 1, "batch_size": 1}}, ["dpo"]),
    "gradient checkpointing": (
        {"sft": {"gradient_checkpointing": True}, "dpo": {"gradient_checkpointing": True}},
        ["dpo", "sft"],
    ),
    "adapters": (
        {name: {"lora": {"rank": 4, "alpha": 16.0, "targets": ["q_proj", "v_proj"]}} for name in ("dpo", "sft")},
        ["dpo", "sft"],
    ),
    "medium": (
        {name: {"precision": "medium"} for name in ("reference_logprobs", "dpo")},
        ["reference_logprobs", "dpo"],
    ),
    "bf16": ({name: {"precision": "bf16"} for name in ("reference_logprobs", "dpo")}, ["reference_logprobs", "dpo"]),
    "the base model as it is": ({"sft": {"epochs": 0}}, ["sft"]),
    "nothing held out": ({"sft": {"held_out": 0}, "preferences": {"held_out_share": 0.0}}, ["sft", "preferences"]),
    "constant rate, no clipping": (
        {"dpo": {"schedule": "constant", "warmup_share": 0.0, "max_grad_norm": 0.0}},
        ["dpo"],
    ),
    "nucleus": ({"rollouts": {"top_p": 0.9, "top_k": 50, "temperature": 0.7}}, ["rollouts"]),
    "min-p, penalty, stops": (
        {"rollouts": {"min_p": 0.01, "repetition_penalty": 1.2, "stop": [" the"], "stop_token_ids": [7]}},
        ["rollouts", "verdicts", "preferences", "reference_logprobs", "dpo"],
    ),
    "greedy evaluation": ({"evaluate": {"temperature": 0.0}}, ["evaluate"]),
    "K = 8": ({"rollouts": {"k": 8}}, ["rollouts", "verdicts", "preferences", "reference_logprobs", "dpo"]),
    "short prompts": (
        {name: {"max_prompt_tokens": 8} for name in ("rollouts", "reference_logprobs", "evaluate")},
        ["rollouts", "verdicts", "preferences", "reference_logprobs", "dpo", "evaluate"],
    ),
    "short answers": (
        {"reference_logprobs": {"max_answer_tokens": 5}},
        ["reference_logprobs", "dpo"],
    ),
    "a judge that reads less": (
        {"verdicts": {"judge": {**tiny.JUDGE, "max_tokens": 12}}},
        ["verdicts", "preferences"],
    ),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_every_option_works(project, option):
    changes, stages = OPTIONS[option]
    project.change(changes)
    for stage in stages:
        told = project.run(stage)
        assert told.status == 0, told.out + told.err
        assert "UserWarning" not in told.err and "RuntimeWarning" not in told.err, told.err
    if "dpo" in stages:
        metrics = project.metrics("dpo")
        assert metrics["start_loss"] == pytest.approx(
            metrics["start_loss_expected"], abs=2e-2 if option == "bf16" else 1e-4
        )
        assert all(math.isfinite(value) for value in metrics.values())


def test_without_a_held_out_row_there_is_no_preference_accuracy(project):
    project.change({"preferences": {"held_out_share": 0.0}})
    project.run_all(first="preferences", last="evaluate")
    assert "preference_accuracy" not in project.metrics("evaluate")
    assert project.metrics("dpo")["held_out_rows"] == 0


def test_everything_held_out_leaves_nothing_to_train_on(project):
    """With few prompts a share may take them all."""
    rows = read_rows(project.root / "data/prompts/rollout.parquet")
    write_rows(project.root / "data/prompts/rollout.parquet", rows[:1])
    for stage in ("rollouts", "verdicts"):
        assert project.run(stage).status == 0
    for share, enough in ((0.9, False), (0.0, True)):
        project.change({"preferences": {"held_out_share": share}})
        told = project.run("preferences")
        assert told.status == 0 if enough else "preferences.held_out_share" in told.error


# Rollouts: who answers


def test_a_teacher_answers_beside_the_policy(project):
    """Its ids stay where its tokenizer is the policy's; another one's, here by one byte of a file, go.

    What a run that was killed between the two had put aside goes too.
    """
    teacher = project.root / "data/source/big"
    shutil.copytree(project.root / "models/policy", teacher)
    project.change({"rollouts": {"k": 1, "teacher": tiny.TEACHER | {"model": "big", "k": 2}}})
    stages = ("rollouts", "verdicts", "preferences", "reference_logprobs", "dpo")
    killed = project.run("rollouts", before=tiny.killed_at("rankwise.rollouts:with_teacher", 1))
    assert killed.status == -signal.SIGKILL and list(project.root.glob("data/.*.scratch/*"))
    for same in (True, False):
        for stage in stages if same else stages[:1]:
            told = project.run(stage)
            assert told.status == 0, told.out + told.err
        assert not list(project.root.glob("data/.*"))
        rows = read_rows(project.root / "data/rollouts.parquet")
        assert {tuple(a.source for a in row.answers) for row in rows} == {("policy", "teacher", "teacher")}
        assert all((a.token_ids is not None) == (same or a.source == "policy") for row in rows for a in row.answers)
        with open(teacher / "tokenizer_config.json", "a") as config:
            config.write("\n")
    assert project.metrics("rollouts")["teacher"]["answers"] == 48
    # Its log-probs are its own: those of the policy's answers alone are held against the reference.
    assert project.metrics("reference_logprobs")["sampling_gap_answers"] <= 24


def test_a_server_answers_in_place_of_the_embedded_engine(project):
    """It makes up words and log-probs: all goes through, until the reference finds that it is not what sampled them."""
    project.change({"rollouts": {"engine": "server", "max_cut_share": 1.0}})
    with FaultServer(context=192) as server:
        told = project.run("rollouts", before=tiny.told_that(RANKWISE_ROLLOUTS_URL=server.url))
        assert told.status == 0, told.err
        assert all(body["n"] == 4 for body in server.asked) and len(server.asked) == 24
    assert project.metrics("rollouts")["engines"] == {"vllm 9.9": 96}
    assert "0 of 24 prompts answered now" in project.run("rollouts").out, "without the server"
    for stage in ("verdicts", "preferences"):
        assert project.run(stage).status == 0
    assert "Most likely a server still had other weights" in project.run("reference_logprobs").error


def test_answers_without_token_ids_are_tokenized_like_any_text(project):
    project.change({"rollouts": {"engine": "server"}})
    with FaultServer(dialect="ids", context=192) as server:
        told = project.run("rollouts", before=tiny.told_that(RANKWISE_ROLLOUTS_URL=server.url))
    assert told.status == 0, told.err
    metrics = project.metrics("rollouts")
    assert metrics["without_token_ids"] == metrics["without_logps"] == metrics["answers"] == 96
    for stage in ("verdicts", "preferences", "reference_logprobs", "dpo"):
        assert project.run(stage).status == 0
    assert "sampling_gap_mean" not in project.metrics("reference_logprobs")


def test_engine_server_without_a_server_says_what_to_set(project):
    project.change({"rollouts": {"engine": "server", "seed": 9}})
    error = project.run("rollouts").error
    assert "RANKWISE_ROLLOUTS_URL" in error and "RANKWISE_SERVE" in error


# Checkpoints of other runs


def test_an_interrupted_run_stands_in_nobodys_way_and_is_continued_when_its_inputs_are_back(project):
    """With another seed the stage begins anew and says why; with the first one it continues."""
    seed = yaml.safe_load((project.root / "params.yaml").read_text())["sft"]["seed"]
    stop = tiny.killed_at("rankwise.training:_Run._step", 4, by=signal.SIGTERM)
    assert project.run("sft", before=stop).status == 143
    project.change({"sft": {"seed": 7}})
    told = project.run("sft")
    assert told.status == 0 and f"of another seed: it says {seed}, this run has 7. It is kept" in told.out, told.out
    project.change({"sft": {"seed": seed, "micro_batch_tokens": 1024}})  # memory, not a result: the same run
    told = project.run("sft")
    assert told.status == 0 and "continuing from step" in told.out and "beginning anew" not in told.out, told.out


# As real processes


@pytest.mark.slow
@pytest.mark.parametrize("seconds", [1.0, 3.0, 4.5])
def test_killed_at_any_time_a_rerun_gives_the_same_bytes(project, seconds):
    project.change({"sft": {"epochs": 30}})
    assert project.run("sft").status == 0
    expected = project.tree("models/sft", "reports/sft")
    process = command(project, "tasks.sft")
    time.sleep(seconds)
    process.kill()
    process.communicate()
    assert project.run("sft").status == 0
    assert project.tree("models/sft", "reports/sft") == expected


@pytest.mark.slow
@pytest.mark.parametrize("sharded", ["false", "true"])
def test_two_processes_do_what_one_does(project, sharded):
    """torchrun, whole copies and sharded weights: the same rows, the same mean, written once."""
    stages = ("sft", "reward_model", "reference_logprobs", "dpo")
    one = {stage: project.metrics(stage) for stage in stages}
    shutil.rmtree(project.root / ".rankwise/stores")
    shutil.rmtree(project.root / "models/policy")
    # Every stage begins from the models that one process made: rounding does not add up from stage to stage.
    for stage in stages:
        options = {"sft": ["--model", "elsewhere/sft"], "reward_model": ["--model", "elsewhere/reward"]}.get(stage, [])
        process = launched(project, stage, *options, ACCELERATE_USE_FSDP=sharded)
        out, _ = process.communicate(timeout=240)
        assert process.returncode == 0, out
        assert stage == "reference_logprobs" or ("weights sharded" in out) == (sharded == "true"), out
        two = json.loads((project.root / f"reports/{stage}/metrics.json").read_text())
        assert _flat(two) == {
            name: pytest.approx(value, abs=2e-4, rel=1e-3) for name, value in _flat(one[stage]).items()
        }
    load_causal_lm(project.root / "models/policy")
    assert [path for path in project.tree() if ".tmp" in path or "rank" in Path(path).name] == []


@pytest.mark.slow
@pytest.mark.parametrize("stage", ["rollouts", "evaluate"])
def test_two_processes_answer_what_one_does(project, stage):
    """The same answers and numbers, whoever sampled them; log-probs up to the rounding of other batches."""
    table = project.root / {"rollouts": "data/rollouts.parquet", "evaluate": "data/evaluation.parquet"}[stage]
    rows, metrics = read_rows(table), project.metrics(stage)
    shutil.rmtree(project.root / ".rankwise/stores")
    table.unlink()
    process = launched(project, stage)
    out, _ = process.communicate(timeout=240)
    assert process.returncode == 0, out
    assert "share 1 of 2" in out and out.count("24 of 24 prompts answered now") == (stage == "rollouts"), out
    again = read_rows(table)
    bare = lambda rows: [[replace(a, logps=None) for a in row.answers] for row in rows]
    assert bare(again) == bare(rows)
    assert _flat_numbers(project.metrics(stage)) == pytest.approx(_flat_numbers(metrics), abs=1e-4)
    for mine, theirs in zip(again, rows):
        assert [a.logps for a in mine.answers] == [pytest.approx(a.logps, abs=1e-4) for a in theirs.answers]


def _flat(metrics: dict) -> dict[str, float]:
    """Numbers of a report, those of an interval by name."""
    return {
        f"{name}/{inner}": number
        for name, value in metrics.items()
        for inner, number in (value.items() if isinstance(value, dict) else [("", value)])
    }
