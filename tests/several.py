"""What each process of a launch does in tests/test_distributed.py, and how a launch is started.

`all_that` runs everything once with whole copies (DDP) and once sharded (FSDP2), and leaves what came out as files.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
import warm
from safetensors.torch import save_file
from test_scoring import COMMON, tiny, token_rows
from test_training import ROWS, SETTINGS, Away, preferences, until, weights

from rankwise.learners import Learner, RewardLearner, SftLearner, measure
from rankwise.parallel import gather_weights, place, processes
from rankwise.reference import score_rows
from rankwise.rewards import RewardModel
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.training import Hooks, NonFiniteLoss, Settings, train

ENGINES = ("ddp", "fsdp")
TASKS = ("dpo", "sft", "reward", "tied", "adapters", "checkpointing", "bf16", "idle")
# Micro-batches of about one row are dealt out unevenly, and in an epoch's last step one process has no row at all.
SMALL = dataclasses.replace(SETTINGS, micro_batch_tokens=30)


def small(**changes: object) -> Settings:
    return dataclasses.replace(SMALL, **changes)


class Stopped(BaseException):
    """What a stage makes of SIGTERM."""


def made(task: str) -> tuple[Learner, list, Settings]:
    """A fresh learner, its rows and its settings."""
    if task == "sft":
        rows = [dataclasses.replace(row, answers_ids=row.answers_ids[:1], ranks=()) for row in ROWS]
        return SftLearner(LogpModel(tiny(), layout="shared"), 0), rows, SMALL
    if task == "reward":
        from transformers import LlamaConfig, LlamaForSequenceClassification

        torch.manual_seed(0)
        model = LlamaForSequenceClassification(LlamaConfig(**COMMON, num_labels=1))
        return RewardLearner(RewardModel(model), 0), token_rows(7, answers=(2,)), SMALL
    if task == "adapters":
        from peft import LoraConfig, get_peft_model

        torch.manual_seed(0)
        model = get_peft_model(tiny(), LoraConfig(r=4, target_modules=["q_proj", "v_proj"]))
        return preferences(model=model), ROWS, SMALL
    changes = {"checkpointing": {"gradient_checkpointing": True}, "bf16": {"precision": "bf16"}}.get(task, {})
    learner = preferences(model=tiny("llama-tied" if task == "tied" else "llama"))
    if task == "idle":  # as the vision tower of a model that is shown text only: it never gets a gradient
        learner.module.model.tower = torch.nn.Linear(3, 3)
        torch.nn.init.ones_(learner.module.model.tower.weight)
        torch.nn.init.ones_(learner.module.model.tower.bias)
    return learner, ROWS, small(**changes)


def trained(task: str, checkpoint: Path | None = None) -> tuple[list[dict], torch.Tensor]:
    """The records' values, and on the first process the weights as one vector."""
    learner, rows, settings = made(task)
    # Stage dpo looks at its start too, with the model in its place.
    place(learner.module, settings.precision)
    measure(learner, rows[:2], max_tokens=30, precision=settings.precision)
    records: list[dict] = []
    hooks = Hooks(on_step=lambda record: records.append(record.values))
    train(learner, rows, settings, what="test", checkpoint=checkpoint, hooks=hooks)
    gather_weights(learner.module)
    return records, weights(learner) if processes().first else torch.empty(0)


def stopped(path: Path, step: int) -> list[int]:
    """The second process alone gets SIGTERM, after a step, or within the first one (step 0); the steps that ended."""
    learner, rows, _ = made("dpo")
    ended: list[int] = []
    collate, calls = learner.collate, []

    def hit(now: bool) -> None:
        if now and not processes().first:
            os.kill(os.getpid(), signal.SIGTERM)

    def collate_and_hit(rows):
        calls.append(1)
        hit(step == 0 and len(calls) == 1)
        return collate(rows)

    def on_step(record) -> None:
        ended.append(record.step)
        hit(record.step == step)

    learner.collate = collate_and_hit
    try:
        train(learner, rows, small(micro_batch_tokens=1), what="test", checkpoint=path, hooks=Hooks(on_step=on_step))
    except Stopped:
        return ended
    raise AssertionError("nobody stopped")


def left(path: Path, step: int) -> None:
    """Die after a step, with a checkpoint of the step before it."""

    def fail() -> None:
        raise Away

    learner, rows, _ = made("dpo")
    with contextlib.suppress(Away):
        train(learner, rows, small(checkpoint_every_s=0.0), what="test", checkpoint=path, hooks=until(step, fail))


def blamed() -> str:
    """What is said of two rows without a finite loss, each in another process."""
    learner, rows, _ = made("dpo")
    learner._references["row-03"][1] = learner._references["row-05"][0] = math.nan
    try:
        train(learner, rows, small(batch_size=7), what="test")
    except NonFiniteLoss as error:
        return str(error)
    return ""


def held_out() -> list[float]:
    """The loss of some rows after each epoch, measured between two steps of training."""
    learner, rows, _ = made("dpo")
    found: list[float] = []
    look = lambda epoch: found.append(measure(learner, ROWS[:3], max_tokens=30, precision="fp32")["loss"])
    train(learner, rows, SMALL, what="test", hooks=Hooks(on_epoch=look))
    return found


def referred(path: Path) -> tuple[list[list[float]], int, int]:
    """The reference pass over two rows, then over all; the log-probabilities, and how many rows each computed."""
    module = place(LogpModel(tiny(), layout="shared"), "fp32")
    with Store(path) if processes().first else contextlib.nullcontext() as store:
        _, first = score_rows(module, ROWS[:2], weights="w", precision="fp32", store=store, max_tokens=30)
        scored, then = score_rows(module, ROWS, weights="w", precision="fp32", store=store, max_tokens=30)
    return [list(one.logps) for one in scored], first, then


def all_that(folder: Path, engines: tuple[str, ...] = ENGINES) -> None:
    """Everything, in every process of a launch."""

    def stop(*_: object) -> None:
        raise Stopped

    signal.signal(signal.SIGTERM, stop)
    found: dict = {}
    for engine in engines:
        os.environ["ACCELERATE_USE_FSDP"] = "true" if engine == "fsdp" else "false"
        for task in TASKS:
            found[f"{engine}-{task}"], end = trained(task)
            keep(folder / f"{engine}-{task}.end", end)
        found[f"{engine}-of-one"], end = trained("dpo", folder / f"{engine}-of-one.safetensors")
        keep(folder / f"{engine}-of-one.end", end)
        found[f"{engine}-stopped"] = stopped(folder / f"{engine}-stopped.safetensors", step=2)
        found[f"{engine}-within"] = stopped(folder / f"{engine}-within.safetensors", step=0)
        left(folder / f"{engine}-left.safetensors", step=5)
        found[f"{engine}-blamed"] = blamed()
        found[f"{engine}-held-out"] = held_out()
        found[f"{engine}-reference"] = referred(folder / f"{engine}.sqlite")
    (folder / f"found-{processes().rank}.json").write_text(json.dumps(found))


def only_dpo(folder: Path) -> None:
    """One short run; for launches whose subject is the launch."""
    records, end = trained("dpo")
    keep(folder / "dpo.end", end)
    if processes().first:
        (folder / "dpo.json").write_text(json.dumps(records))


def slow_run(folder: Path) -> None:
    """A run that the test has the time to kill: every step takes a tenth of a second."""
    learner, rows, _ = made("dpo")

    def on_step(record) -> None:
        if processes().first:
            (folder / "step").write_text(str(record.step))
        time.sleep(float(os.environ.get("NAP", "0")))

    every = float(os.environ.get("EVERY", "1e9"))
    settings = small(epochs=20, checkpoint_every_s=every)
    train(learner, rows, settings, what="test", checkpoint=folder / "c.safetensors", hooks=Hooks(on_step=on_step))
    gather_weights(learner.module)
    if processes().first:
        keep(folder / "slow.end", weights(learner))


def keep(path: Path, end: torch.Tensor) -> None:
    if processes().first:
        save_file({"end": end}, path)


def launch(
    folder: Path,
    call: str,
    *,
    of: str = "several",
    module: tuple[str, ...] = (),
    prefix: tuple[str, ...] = (),
    **environment: str,
) -> subprocess.Popen:
    """A launcher's processes, each calling a function of a test module on a folder; both streams in one pipe.

    module: the launcher and its options; two processes of torchrun where none is given, forked ones (tests/warm.py).
    """
    two_here = ("torch.distributed.run", "--standalone", "--nproc-per-node", "2", "--no-python")
    module = module or (*two_here, str(warm.folder() / "python"))
    script = folder / f"{call}.py"
    script.write_text(f"from pathlib import Path\nimport {of}\n{of}.{call}(Path({str(folder)!r}))\n")
    here = str(Path(__file__).parent)
    path = os.pathsep.join([here, str(Path(here).parent), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [*prefix, sys.executable, "-m", *module, str(script)],
        env={**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1", **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finished(process: subprocess.Popen, seconds: float = 240) -> str:
    """What a launch printed, once it has ended well."""
    out, _ = process.communicate(timeout=seconds)
    assert process.returncode == 0, out[-6000:]
    return out
