"""A few real training steps on random weights, for their time and memory alone."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import dataclass

import torch

from rankwise.checkpoints import device
from rankwise.learners import PreferenceLearner, PreferenceSettings
from rankwise.plan import peak
from rankwise.plan.footprint import Shape, fresh_model
from rankwise.plan.forecast import Work
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
    peak.reset(where.type)
    before = peak.now(where.type)
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
    seconds = times[-1] - times[total // 2 - 1]
    return Rehearsal(seconds=seconds, peak_bytes=peak.highest(where.type) - before)


def _now(where: torch.device) -> float:
    if where.type == "cuda":
        torch.cuda.synchronize(where)
    return time.monotonic()
