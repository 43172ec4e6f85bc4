"""A few real training steps on random weights, for their time and memory alone."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from rankwise.checkpoints import device
from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.plan.footprint import Shape, fresh_model
from rankwise.plan.forecast import Work
from rankwise.plan.machine import status_bytes
from rankwise.scoring import LogpModel
from rankwise.training import Hooks, Settings, train

STEPS = 2


@dataclass(frozen=True, kw_only=True)
class Rehearsal:
    """What an epoch over the rows took once it was warm."""

    seconds: float  # of the second of two epochs
    peak_bytes: int  # beyond what the process held before there was a model; on the CPU resident memory


def rehearse(shape: Shape, work: Work) -> Rehearsal:
    """Two epochs of preference training over work's rows, on this machine's device; what training prints is lost.

    Raises UserError as training does.
    """
    where = device()
    _forget_peak(where)
    before = status_bytes("VmRSS")
    torch.manual_seed(work.seed)
    module = LogpModel(fresh_model(shape).to(where))
    references = {row.id: [0.0] * len(row.answers_ids) for row in work.rows}
    learner = PreferenceLearner(module, 0, references, PreferenceSettings())
    settings = Settings(
        learning_rate=1e-6,
        epochs=2,
        batch_size=work.batch_size,
        micro_batch_tokens=work.micro_batch_tokens,
        precision=shape.precision,
        gradient_checkpointing=shape.gradient_checkpointing,
        seed=work.seed,
    )
    times: list[float] = []
    hooks = Hooks(on_step=lambda record: times.append(_now(where)))
    with contextlib.redirect_stdout(sys.stderr):
        total = train(learner, work.rows, settings, what="rehearsal", hooks=hooks)
    peak = torch.cuda.max_memory_allocated(where) if where.type == "cuda" else status_bytes("VmHWM") - before
    return Rehearsal(seconds=times[-1] - times[total // 2 - 1], peak_bytes=peak)


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.monotonic()


def _forget_peak(where: torch.device) -> None:
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)
        return
    with contextlib.suppress(OSError):  # a kernel that has no such file, or a sandbox that forbids it
        Path("/proc/self/clear_refs").write_text("5")
