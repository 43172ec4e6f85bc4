"""TRL's side: its DPOTrainer and SFTTrainer with their own loop, data loader, loss and optimizer, well set.

What is set for it, beyond the setting: a reference computed beforehand, AdamW with our constants, the same clipping,
examples grouped by length, no logging, no checkpoints, no evaluation. Nothing of TRL is replaced.
"""

from __future__ import annotations

import math
import time
from typing import Any

import numpy as np
import torch
from datasets import Dataset, disable_progress_bars
from transformers import Trainer, TrainerCallback
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

from benchmarks.channel import Channel, Pace, Stop
from benchmarks.models import build, text_of, tokenizer_of
from benchmarks.ours import BETA, FOREVER, flat_gradient
from benchmarks.settings import TrlSetting
from benchmarks.workload import Case, Tokens, pairs, rows

PAD_TO = 64  # with torch.compile: few shapes, so few compilations
BY_LENGTH = "tokens"  # column that tells TRL's sampler how long an example is

disable_progress_bars()


def run_steps(case: Case, setting: TrlSetting, channel: Channel, baseline: int, folder: str) -> None:
    """Optimizer steps of TRL's loop, each after a go, until there is none."""
    trainer = make_trainer(case, setting, folder, steps=FOREVER)
    pace = Pace(channel, case.device, baseline)
    trainer.add_callback(_AfterStep(lambda: pace()))
    try:
        trainer.train()
    except Stop:
        return


def run_reference(case: Case, setting: TrlSetting, channel: Channel, baseline: int, folder: str) -> None:
    """precompute_ref_log_probs over the whole table, each time after a go."""
    trainer = make_trainer(case, setting, folder, steps=1)
    if setting.mode == "compile":
        trainer.model.compile()
    table = trainer.train_dataset.remove_columns(["ref_chosen_logps", "ref_rejected_logps"]).sort(BY_LENGTH)
    pace = Pace(channel, case.device, baseline)
    number = 0
    try:
        while True:
            # Another column is another fingerprint: TRL must not find its file of the pass before.
            table_now = table.add_column("pass", [number] * len(table))
            number += 1
            began = time.perf_counter()
            trainer._precompute_ref_logps(table_now, "train", setting.micro)
            pace.finish()
            pace(seconds=time.perf_counter() - began, computed=len(table))
    except Stop:
        return


def gradients(case: Case, setting: TrlSetting, folder: str, *, beta: float = BETA) -> tuple[float, np.ndarray]:
    """Loss and gradient of the first step, policy and reference unlike, as TRL's optimizer sees them."""
    trainer = make_trainer(case, setting, folder, steps=1, policy_seed=case.seed + 1, clip=0.0, beta=beta)
    seen: dict[str, Any] = {}
    trainer.add_callback(_BeforeOptimizer(lambda: seen.update(gradient=flat_gradient(trainer.model))))
    return trainer.train().training_loss, seen["gradient"]


def logps(case: Case, setting: TrlSetting, folder: str) -> np.ndarray:
    """The reference's log-probability of every answer, [B·K], float64, in our order; pairs only."""
    table = make_trainer(case, setting, folder, steps=1).train_dataset
    return np.array([[row["ref_chosen_logps"], row["ref_rejected_logps"]] for row in table]).flatten()


def make_trainer(
    case: Case,
    setting: TrlSetting,
    folder: str,
    *,
    steps: int,
    policy_seed: int | None = None,
    clip: float = 1.0,
    beta: float = BETA,
) -> Trainer:
    """A trainer of the case; for DPO its reference numbers are computed here, before any step."""
    torch.set_float32_matmul_precision("medium" if setting.precision == "medium" else "highest")
    examples = [pair for row in rows(case) for pair in pairs(row)] if case.task == "dpo" else rows(case)
    policy = build(case, seed=case.seed if policy_seed is None else policy_seed)
    common = {**_arguments(case, setting, folder, clip), "max_steps": steps}
    common["gradient_accumulation_steps"] = math.ceil(len(examples) / setting.micro)
    if case.task == "sft":
        return _sft(case, setting, policy, examples, common)
    reference = None if policy_seed is None else build(case, seed=case.seed)
    config = DPOConfig(**common, beta=beta, max_length=None, precompute_ref_log_probs=True)
    return DPOTrainer(
        policy, reference, args=config, train_dataset=_table(examples), processing_class=tokenizer_of(case)
    )


class _AfterStep(TrainerCallback):
    def __init__(self, told):
        self._told = told

    def on_step_end(self, args, state, control, **_):
        self._told()


class _BeforeOptimizer(TrainerCallback):
    def __init__(self, told):
        self._told = told

    def on_pre_optimizer_step(self, args, state, control, **_):
        self._told()


def _sft(case: Case, setting: TrlSetting, policy: torch.nn.Module, examples: list[Tokens], common: dict) -> SFTTrainer:
    config = SFTConfig(**common, max_length=case.shape.context, packing=setting.packed)
    table = Dataset.from_list(
        [
            {"prompt": text_of(one.prompt), "completion": text_of(one.answers[0], lead=" "), BY_LENGTH: _length(one)}
            for one in examples
        ]
    )
    made = SFTTrainer(policy, args=config, train_dataset=table, processing_class=tokenizer_of(case))
    if setting.packed:  # how many rows there are is known only now; a step is all of them
        made.args.gradient_accumulation_steps = math.ceil(len(made.train_dataset) / setting.micro)
    return made


def _arguments(case: Case, setting: TrlSetting, folder: str, clip: float) -> dict[str, Any]:
    return {
        "output_dir": folder,
        "per_device_train_batch_size": setting.micro,
        "learning_rate": 1e-5,
        "lr_scheduler_type": "constant",
        "adam_beta2": 0.95,
        "weight_decay": 0.0,
        "max_grad_norm": clip,
        "bf16": setting.precision == "bf16",
        "torch_compile": setting.mode == "compile",
        "pad_to_multiple_of": PAD_TO if setting.mode == "compile" else None,
        # The sampler reads lengths after columns that the model does not know were dropped, so they must stay.
        "train_sampling_strategy": "random" if setting.packed else "group_by_length",
        "length_column_name": BY_LENGTH,
        "remove_unused_columns": False,
        "gradient_checkpointing": case.checkpointing,
        "use_cpu": case.device == "cpu",
        "dataloader_pin_memory": case.device == "cuda",
        "logging_strategy": "no",
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "seed": case.seed,
    }


def _table(examples: list[Tokens]) -> Dataset:
    return Dataset.from_list(
        [
            {
                "prompt": text_of(one.prompt),
                "chosen": text_of(one.answers[0], lead=" "),
                "rejected": text_of(one.answers[1], lead=" "),
                BY_LENGTH: _length(one),
            }
            for one in examples
        ]
    )


def _length(one: Tokens) -> int:
    return len(one.prompt) + max(map(len, one.answers))
