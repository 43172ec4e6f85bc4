"""Our side: rankwise's own training loop and reference pass, as a stage runs them, with a stop watch between steps."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from benchmarks.channel import Channel, Pace, Stop
from benchmarks.models import build, config_of
from benchmarks.settings import OurSetting
from benchmarks.workload import PAD, Case, rows
from rankwise.checkpoints import without_dropout
from rankwise.fingerprint import digest
from rankwise.flops import step_flops
from rankwise.learners import Learner, PreferenceLearner, PreferenceSettings, SftLearner
from rankwise.reference import score_rows
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.training import Hooks, Settings, train

BETA = 0.1
FOREVER = 2000  # epochs of one step each; the clock's process says when it is enough


def token_rows(case: Case) -> list[TokenRow]:
    """The case's rows as rankwise takes them; an SFT row has one answer and no rank."""
    return [
        TokenRow(
            id=f"{number:06}",
            prompt_ids=row.prompt,
            answers_ids=row.answers,
            ranks=tuple(range(len(row.answers))) if case.task == "dpo" else (),
        )
        for number, row in enumerate(rows(case))
    ]


def learner(case: Case, setting: OurSetting, *, policy_seed: int, beta: float = BETA) -> Learner:
    """What is trained; the reference is the model of case.seed, its numbers computed beforehand as a stage does."""
    model = without_dropout(build(case, seed=policy_seed))
    module = LogpModel(model)
    if case.task == "sft":
        return SftLearner(module, PAD)
    reference = module if policy_seed == case.seed else LogpModel(without_dropout(build(case, seed=case.seed)))
    known = {one.id: one.logps for one in score(case, setting, reference)[0]}
    return PreferenceLearner(module, PAD, known, PreferenceSettings(beta=beta))


def score(case: Case, setting: OurSetting, module: LogpModel, folder: Path | None = None) -> tuple[list, int]:
    """The reference's log-probabilities through a row store, in folder or in one that is thrown away."""
    with tempfile.TemporaryDirectory() as made, Store((folder or Path(made)) / "reference.sqlite") as store:
        return score_rows(
            module,
            token_rows(case),
            weights=digest("random", case.spec()),
            precision=setting.precision,
            store=store,
            max_tokens=setting.budget,
        )


def run_steps(case: Case, setting: OurSetting, channel: Channel, baseline: int) -> None:
    """Optimizer steps of the real loop, each after a go, until there is none."""
    taught = learner(case, setting, policy_seed=case.seed)
    flops = step_flops(config_of(case), token_rows(case))
    pace = Pace(channel, case.device, baseline)
    try:
        _train(taught, case, setting, lambda record: pace(loss=record.values["loss"], flops=flops), epochs=FOREVER)
    except Stop:
        return


def run_reference(case: Case, setting: OurSetting, channel: Channel, baseline: int) -> None:
    """Reference passes, each into a new store after a go; with every one a second pass through the same store.

    Neither learning rate nor β is among what score_rows is given, so the second pass is what follows a change of them.
    """
    module = LogpModel(without_dropout(build(case, seed=case.seed)))
    pace = Pace(channel, case.device, baseline)
    try:
        while True:
            with tempfile.TemporaryDirectory() as made:
                passes = [_timed(pace, lambda: score(case, setting, module, Path(made))[1]) for _ in range(2)]
            (seconds, computed), (again_seconds, again) = passes
            pace(seconds=seconds, computed=computed, again=again, again_seconds=again_seconds)
    except Stop:
        return


def _timed(pace: Pace, work: Callable[[], int]) -> tuple[float, int]:
    began = time.perf_counter()
    result = work()
    pace.finish()
    return time.perf_counter() - began, result


def gradients(case: Case, setting: OurSetting, *, beta: float = BETA) -> tuple[float, np.ndarray]:
    """Loss and gradient of the first step, policy and reference unlike, seen where the optimizer sees them."""
    taught = learner(case, setting, policy_seed=case.seed + 1, beta=beta)
    seen: dict[str, Any] = {}

    def note(*_: object) -> None:
        seen["gradient"] = flat_gradient(taught.module.model)

    handle = register_optimizer_step_pre_hook(note)
    try:
        _train(taught, case, setting, lambda record: seen.update(loss=record.values["loss"]), epochs=1, clip=0.0)
    finally:
        handle.remove()
    return seen["loss"], seen["gradient"]


def logps(case: Case, setting: OurSetting) -> np.ndarray:
    """The reference's log-probability of every answer, [B·K], float64."""
    module = LogpModel(without_dropout(build(case, seed=case.seed)))
    scored, _ = score(case, setting, module)
    return np.array([logp for one in scored for logp in one.logps])


def flat_gradient(model: torch.nn.Module) -> np.ndarray:
    """All gradients in the order of named_parameters, float32; raises where one is missing."""
    missing = [name for name, p in model.named_parameters() if p.grad is None]
    if missing:
        raise RuntimeError(f"no gradient at the optimizer's step for {', '.join(missing[:5])}")
    return torch.cat([p.grad.detach().float().flatten() for p in model.parameters()]).cpu().numpy()


def _train(
    taught: Learner, case: Case, setting: OurSetting, on_step: Callable, *, epochs: int, clip: float = 1.0
) -> None:
    settings = Settings(
        learning_rate=1e-5,
        epochs=epochs,
        batch_size=case.batch,
        micro_batch_tokens=setting.budget,
        warmup_share=0.0,
        schedule="constant",
        max_grad_norm=clip,
        precision=setting.precision,
        gradient_checkpointing=case.checkpointing,
    )
    train(taught, token_rows(case), settings, what="ours", hooks=Hooks(on_step=on_step))
