"""Several processes do what one does: with whole copies (DDP) and with sharded weights (FSDP2), on one host or two.

One launch of two processes does nearly all the work (several.all_that); the tests look at what it left.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import several
import torch
from safetensors.torch import load_file
from several import ENGINES, TASKS, made, small, trained
from test_training import ROWS, losses, preferences, weights

from rankwise.checkpoints import load_state
from rankwise.parallel import processes
from rankwise.training import Hooks, train
from rankwise.types import UserError


def end_of(path: Path) -> torch.Tensor:
    return load_file(path)["end"]


def assert_same_path(together: list[dict], one: list[dict], rel: float = 2e-5) -> None:
    """Records of a run by several processes and by one."""
    for mine, theirs in zip(together, one, strict=True):
        assert mine == {name: pytest.approx(value, rel=rel, abs=rel / 10) for name, value in theirs.items()}


def assert_same_end(mine: torch.Tensor, theirs: torch.Tensor, start: torch.Tensor, rel: float = 1e-3) -> None:
    """Weights after training, by what training changed."""
    assert (mine - theirs).norm() <= rel * (theirs - start).norm()


def test_two_processes_follow_the_path_of_one(tmp_path):
    """Micro-batches are dealt out unevenly, and in the last step of an epoch one process has no row at all."""
    several.finished(several.launch(tmp_path, "only_dpo"))
    records, end = trained("dpo")
    assert_same_path(json.loads((tmp_path / "dpo.json").read_text()), records)
    assert_same_end(end_of(tmp_path / "dpo.end"), end, weights(preferences()))


# One launch, looked at from all sides


@pytest.fixture(scope="module")
def launched(tmp_path_factory) -> Path:
    """The folder that two processes filled; a checkpoint of step 3, by one process, was there before."""
    folder = tmp_path_factory.mktemp("launched")
    for engine in ENGINES:
        several.left(folder / f"{engine}-of-one.safetensors", step=4)
    out = several.finished(several.launch(folder, "all_that"))
    assert "weights sharded" in out
    return folder


def found(folder: Path, name: str, rank: int = 0):
    return json.loads((folder / f"found-{rank}.json").read_text())[name]


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("engine", ENGINES)
def test_every_task_gives_the_same_under_every_engine(launched, engine, task):
    """bf16: sharded layers round their gains too, and sums are made in another order, so one bf16 step apart."""
    rel, ends = (5e-2, 0.2) if task == "bf16" else (2e-5, 1e-3)
    records, end = trained(task)
    mine = found(launched, f"{engine}-{task}")
    if task == "bf16":
        assert losses(mine) == pytest.approx(losses(records), rel=rel)
    else:
        assert_same_path(mine, records)
    assert found(launched, f"{engine}-{task}", rank=1) == mine
    assert_same_end(end_of(launched / f"{engine}-{task}.end"), end, weights(made(task)[0]), ends)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_one_process_continues_on_two(launched, engine):
    assert len(found(launched, f"{engine}-of-one")) == 3  # of six steps
    assert_same_end(end_of(launched / f"{engine}-of-one.end"), trained("dpo")[1], weights(preferences()))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["left", "stopped", "within"])
@pytest.mark.parametrize("engine", ENGINES)
def test_a_checkpoint_of_two_processes_continues_on_one(launched, engine, name):
    """What an error left at step 4, and what a stop left; one whole file, weights and optimizer."""
    path = launched / f"{engine}-{name}.safetensors"
    tensors, notes = load_state(path)
    expected = {f"weight/{name}": p.shape for name, p in preferences().module.named_parameters()}
    assert {key: t.shape for key, t in tensors.items() if key.startswith("weight/")} == expected
    assert notes["step"] == {"left": 4, "stopped": 3, "within": 0}[name]
    steps: list[int] = []
    learner = preferences()
    hooks = Hooks(on_step=lambda record: steps.append(record.step))
    train(learner, ROWS, small(), what="test", checkpoint=path, hooks=hooks)
    assert steps == list(range(notes["step"] + 1, 7))
    assert_same_end(weights(learner), trained("dpo")[1], weights(preferences()))


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_a_signal_to_one_process_stops_both_at_the_same_step(launched, engine):
    """After step 2 it is told of in step 3; within the first step, between two micro-batches."""
    for rank in (0, 1):
        assert found(launched, f"{engine}-stopped", rank) == [1, 2, 3]
        assert found(launched, f"{engine}-within", rank) == []


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_every_process_names_the_rows_of_all(launched, engine):
    for rank in (0, 1):
        said = found(launched, f"{engine}-blamed", rank)
        assert "rows: row-03, row-05 (2 in all)" in said or "rows: row-05, row-03 (2 in all)" in said, said


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_held_out_rows_are_measured_between_steps(launched, engine):
    assert found(launched, f"{engine}-held-out") == pytest.approx(several.held_out(), rel=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_the_reference_pass_is_shared_out_and_its_numbers_are_those_of_one(launched, engine, tmp_path):
    """Batches are those of one process, so the numbers are too, bit for bit; rows of the store are not computed."""
    expected, first, then = several.referred(tmp_path / "one.sqlite")
    assert (first, then) == (2, 5)
    for rank in (0, 1):
        assert found(launched, f"{engine}-reference", rank) == [expected, 2, 5]


# Killed


@pytest.fixture(scope="module", params=ENGINES)
def undisturbed(request, tmp_path_factory) -> tuple[Path, dict[str, str]]:
    """A launch of an engine to its end: its folder, and the environment that asked for it."""
    sharded = {"ACCELERATE_USE_FSDP": str(request.param == "fsdp").lower()}
    folder = tmp_path_factory.mktemp("whole")
    several.finished(several.launch(folder, "slow_run", **sharded))
    return folder, sharded


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_killed_launch_continues_to_the_same_weights_bit_for_bit(tmp_path, undisturbed, number):
    """SIGTERM to the launcher leaves a checkpoint within 10 s; after SIGKILL the last one is good."""
    whole, sharded = undisturbed
    every = "1e9" if number == signal.SIGTERM else "0"
    process = several.launch(tmp_path, "slow_run", NAP="0.1", EVERY=every, **sharded)
    deadline = time.monotonic() + 120
    while not (tmp_path / "step").exists() or (tmp_path / "step").read_text() in ("", "1", "2"):
        assert time.monotonic() < deadline and process.poll() is None, process.communicate()
        time.sleep(0.02)
    if number == signal.SIGKILL:
        for child in children(process.pid):
            os.kill(child, number)
    process.send_signal(number)
    process.communicate(timeout=10)
    assert process.returncode != 0
    step = load_state(tmp_path / "c.safetensors")[1]["step"]
    assert 2 <= step < 60
    out = several.finished(several.launch(tmp_path, "slow_run", **sharded))
    assert out.count(f"continuing from step {step} of 60") == 1
    assert torch.equal(end_of(tmp_path / "slow.end"), end_of(whole / "slow.end"))


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


# Launches that are not what they were meant to be


@pytest.mark.parametrize(
    ("environment", "said"),
    [
        # accelerate launch --cpu --num_processes 2 gives its one process these, and no rank
        ({"ACCELERATE_MIXED_PRECISION": "no", "MASTER_PORT": "29500"}, "several processes and started one"),
        ({"ACCELERATE_USE_FSDP": "true"}, "and this launch has one"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "FSDP_VERSION": "1"}, "FSDP_VERSION is 1"),
        ({"ACCELERATE_USE_FSDP": "true", "WORLD_SIZE": "2", "FSDP_OFFLOAD_PARAMS": "true"}, "say false"),
    ],
)
def test_a_launch_that_is_not_what_was_asked_for_is_refused(environment, said):
    with pytest.raises(UserError, match=said):
        processes(environment)


@pytest.mark.slow
def test_accelerate_launch_on_a_cpu_does_not_pass_for_two_processes(tmp_path):
    script = tmp_path / "work.py"
    script.write_text("from rankwise.parallel import processes\nprint(processes())\n")
    launcher = ["accelerate.commands.launch", "--cpu", "--num_processes", "2", str(script)]
    told = subprocess.run(
        [sys.executable, "-m", *launcher],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert told.returncode != 0 and "accelerate launch was asked for several processes and started one" in told.stderr


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddp", "fsdp2"])
def test_the_files_of_infra_launch_what_they_say(tmp_path, name):
    """Started by accelerate, without a GPU too: the file says that there are several processes."""
    config = Path(__file__).parent.parent / f"infra/accelerate/{name}.yaml"
    module = ("accelerate.commands.launch", "--config_file", str(config), "--main_process_port", "0")
    out = several.finished(several.launch(tmp_path, "only_dpo", module=module))
    assert "on 2 process(es)" in out and ("weights sharded" in out) == (name == "fsdp2")


# Two hosts


@pytest.fixture
def hosts():
    """Two network namespaces joined by a cable, each with an address of its own and no way out."""
    names = [f"rankwise-{os.getpid()}-{end}" for end in "ab"]
    cables = [f"rw{os.getpid() % 10**6}{end}" for end in "ab"]
    ip = lambda *words: subprocess.run(["ip", *words], check=True, capture_output=True, text=True)
    try:
        for name in names:
            ip("netns", "add", name)
        ip("link", "add", cables[0], "netns", names[0], "type", "veth", "peer", "name", cables[1], "netns", names[1])
        for number, (name, cable) in enumerate(zip(names, cables), start=1):
            ip("-n", name, "address", "add", f"10.77.0.{number}/24", "dev", cable)
            for link in (cable, "lo"):
                ip("-n", name, "link", "set", link, "up")
        yield list(zip(names, cables))
    except (FileNotFoundError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no network namespaces here: {getattr(error, 'stderr', '') or error}")
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("engine", ENGINES)
def test_two_hosts_follow_the_path_of_one(tmp_path, hosts, engine):
    """Each host has a disk of its own: what the second one writes, the first does not see."""
    options = ("torch.distributed.run", "--nnodes=2", "--nproc-per-node=1", "--master-addr=10.77.0.1")
    started = []
    for number, (name, cable) in enumerate(hosts):
        (disk := tmp_path / name).mkdir()
        environment = {"GLOO_SOCKET_IFNAME": cable, "ACCELERATE_USE_FSDP": str(engine == "fsdp").lower()}
        module = (*options, "--master-port=29511", f"--node-rank={number}")
        prefix = ("ip", "netns", "exec", name)
        started.append(several.launch(disk, "only_dpo", module=module, prefix=prefix, **environment))
    for process in started:
        several.finished(process)
    records, end = trained("dpo")
    assert_same_path(json.loads((tmp_path / hosts[0][0] / "dpo.json").read_text()), records)
    assert_same_end(end_of(tmp_path / hosts[0][0] / "dpo.end"), end, weights(preferences()))
    assert not (tmp_path / hosts[1][0] / "dpo.json").exists()
