"""The training loop: one for SFT, preferences and reward models, on one process or many.

An optimizer step takes batch_size rows; they are cut into micro-batches by token budget, and the loss is the
weighted mean over all rows of the step, so neither the cut nor the number of processes changes the result.
A checkpoint holds weights, optimizer, step and curves: killed at any moment, a rerun with the same identity
continues to the same weights.

Run by tasks.sft, tasks.reward_model and tasks.dpo; on several processes through `torchrun -m tasks.NAME`.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from rankwise.batching import micro_batches, steps
from rankwise.checkpoints import Precision, load_state, numerics, save_state
from rankwise.learners import Learner
from rankwise.progress import Progress
from rankwise.rendering import TokenRow
from rankwise.types import UserError

Schedule = Literal["constant", "linear", "cosine"]


@dataclass(frozen=True, kw_only=True)
class Settings:
    """How to optimise; counts are in optimizer steps and rows (prompts)."""

    learning_rate: float
    epochs: int
    batch_size: int  # rows (prompts) an optimizer step, over all processes
    micro_batch_tokens: int  # positions a forward pass; memory grows with it, results do not change
    warmup_share: float = 0.1  # share of all steps over which the learning rate rises
    schedule: Schedule = "cosine"
    weight_decay: float = 0.0
    adam_beta2: float = 0.95  # decay of the second moment
    max_grad_norm: float = 1.0
    precision: Precision = "fp32"
    seed: int = 0
    gradient_checkpointing: bool = False
    checkpoint_every_s: float = 60.0  # seconds between checkpoints; not part of the result


@dataclass(frozen=True, kw_only=True)
class StepRecord:
    """One optimizer step as it is reported."""

    step: int  # optimizer steps done, 1 first
    values: dict[str, float]  # reproducible: loss, learning rate, gradient norm, the learner's stats
    speeds: dict[str, float]  # not reproducible: tokens/s, rows/s


@dataclass
class Hooks:
    """What the caller wants to hear; all optional."""

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_epoch: Callable[[int], None] = lambda epoch: None  # epochs done, 1 first
    on_resume: Callable[[int, list[dict[str, Any]]], None] = lambda step, points: None
    points: Callable[[], list[dict[str, Any]]] = field(default=list)  # curves to keep in a checkpoint


class NonFiniteLoss(UserError):
    """Loss or gradient was NaN or infinite; the message names the rows."""


def train(
    learner: Learner,
    rows: Sequence[TokenRow],
    settings: Settings,
    *,
    what: str,
    checkpoint: Path | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Optimise learner.module on rows; returns the number of optimizer steps.

    Args:
        rows: one entry a prompt; every epoch sees each once.
        what: the name on the progress bar.
        checkpoint: file to continue from and to write to; its identity (inputs, params) is the caller's to keep.

    Raises:
        UserError: no rows. NonFiniteLoss: with the first ten row ids of the offending step.
    """
    if not rows:
        raise UserError(f"{what}: there is no row to train on; look at the report of the stage that made the table")
    return _Run(learner, rows, settings, what=what, checkpoint=checkpoint, hooks=hooks or Hooks()).run()


class _Run:
    """One training run: its model, optimizer, place in the data, and checkpoint."""

    def __init__(self, learner, rows, settings: Settings, *, what: str, checkpoint: Path | None, hooks: Hooks):
        self.learner, self.rows, self.settings = learner, rows, settings
        self.what, self.checkpoint, self.hooks = what, checkpoint, hooks
        self.accelerator = Accelerator()
        torch.manual_seed(settings.seed)
        self.plan = list(steps(len(rows), batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed))
        self.steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
        module = learner.module
        if settings.gradient_checkpointing:
            module.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        # The bare module keeps the learner's methods; the wrapped one synchronises gradients.
        self.wrapped = self.accelerator.prepare(module)
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parameters, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
        )
        self.done = 0
        self.saved_at = time.monotonic()

    def run(self) -> int:
        self._resume()
        self.learner.module.train()
        total = len(self.plan)
        device = self.accelerator.device
        # The arithmetic, aloud: what one step of this run is made of.
        if self.accelerator.is_main_process:
            print(
                f"{self.what}: {len(self.rows)} rows × {self.settings.epochs} epochs / {self.settings.batch_size} rows "
                f"a step = {total} steps on {self.accelerator.num_processes} process(es), {device}, "
                f"{self.settings.precision}",
                flush=True,
            )
        with Progress(self.what, total=total, unit="step", done=self.done) as progress, _DeferredSignals() as signals:
            while self.done < total:
                record = self._step(self.plan[self.done], signals)
                if record is None:
                    self._save()
                    signals.deliver()
                    continue
                self.done += 1
                self.hooks.on_step(record)
                progress.advance(1, loss=record.values["loss"], **{"tokens/s": record.speeds["tokens_per_second"]})
                if self.done % self.steps_per_epoch == 0:
                    self.learner.module.eval()
                    self.hooks.on_epoch(self.done // self.steps_per_epoch)
                    self.learner.module.train()
                if time.monotonic() - self.saved_at > self.settings.checkpoint_every_s:
                    self._save()
            if signals.arrived:  # in the last step, or while held-out rows were measured
                self._save()
                signals.deliver()
        self.learner.module.eval()
        return total

    def _step(self, indices: list[int], signals: _DeferredSignals) -> StepRecord | None:
        """One optimizer step; None if a signal to stop came first, with weights and optimizer untouched."""
        began = time.monotonic()
        members = [self.rows[i] for i in indices]
        total_weight = sum(map(self.learner.weight, members))
        parts = _share(
            micro_batches(members, max_tokens=self.settings.micro_batch_tokens),
            rank=self.accelerator.process_index,
            ranks=self.accelerator.num_processes,
        )
        lr = self.settings.learning_rate * _schedule(self.done, len(self.plan), self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = _Sums()
        for number, part in enumerate(parts):
            if signals.arrived:
                self.optimizer.zero_grad(set_to_none=True)
                return None
            self._backward(part, total_weight, sums, last=number == len(parts) - 1)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)
        values = sums.gathered(self.accelerator, total_weight=total_weight, rows=len(members))
        if not (math.isfinite(values["loss"]) and math.isfinite(float(norm))):
            self._save()
            raise NonFiniteLoss(self._blame(members, sums, float(norm)))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        seconds = time.monotonic() - began
        tokens = sum(row.positions for row in members)
        return StepRecord(
            step=self.done + 1,
            values={
                **values,
                "learning_rate": lr,
                "grad_norm": float(norm),
                "epoch": (self.done + 1) / self.steps_per_epoch,
            },
            speeds={"tokens_per_second": tokens / seconds, "rows_per_second": len(members) / seconds},
        )

    def _backward(self, part: tuple[list[TokenRow], float], total_weight: float, sums: _Sums, *, last: bool) -> None:
        rows, keep = part
        sync = self.accelerator.no_sync(self.wrapped) if not last else contextlib.nullcontext()
        with sync, numerics(self.settings.precision, self.accelerator.device):
            batch = self.learner.collate(rows).to(self.accelerator.device)
            result = self.learner.losses(self.wrapped(batch), batch)
            # Gradients are averaged over processes, so each one's share is scaled back up.
            scale = keep * self.accelerator.num_processes / total_weight
            self.accelerator.backward(result.loss_B.sum() * scale)
        sums.add(result, keep=keep, padding=batch.padding_fraction)

    def _blame(self, members: list[TokenRow], sums: _Sums, norm: float) -> str:
        bad = [row_id for row_id, loss in sums.losses.items() if not math.isfinite(loss)]
        bad = bad or [row.id for row in members]
        return (
            f"{self.what}: loss or gradient is not finite at step {self.done + 1} (gradient norm {norm}); "
            f"rows: {', '.join(bad[:10])}{' …' if len(bad) > 10 else ''} ({len(bad)} in all). The weights of step "
            f"{self.done} are in the checkpoint. Look at these rows; with other parameters (a lower "
            "learning_rate, precision fp32) training begins anew"
        )

    def _save(self) -> None:
        if self.checkpoint is None or not self.accelerator.is_main_process:
            return
        tensors = {f"weight/{name}": p for name, p in self.parameters.items()}
        names = {id(p): name for name, p in self.parameters.items()}
        for p, state in self.optimizer.state.items():
            tensors |= {f"optimizer/{names[id(p)]}/{key}": torch.as_tensor(value) for key, value in state.items()}
        aside = self.checkpoint.with_suffix(".tmp")
        save_state(aside, tensors, {"step": self.done, "points": self.hooks.points()})
        os.replace(aside, self.checkpoint)
        self.saved_at = time.monotonic()

    def _resume(self) -> None:
        if self.checkpoint is None or not self.checkpoint.exists():
            return
        tensors, notes = load_state(self.checkpoint)
        with torch.no_grad():
            for name, p in self.parameters.items():
                if f"weight/{name}" not in tensors or tensors[f"weight/{name}"].shape != p.shape:
                    raise UserError(
                        f"{self.checkpoint}: the checkpoint is of another model ({name} differs); "
                        "delete it to begin anew"
                    )
                p.copy_(tensors[f"weight/{name}"])
                prefix = f"optimizer/{name}/"
                state = {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}
                if state:
                    self.optimizer.state[p] = {k: v.to(p.device) if v.dim() else v for k, v in state.items()}
        self.done = notes["step"]
        self.hooks.on_resume(self.done, notes["points"])
        print(f"{self.what}: continuing from step {self.done} of {len(self.plan)}", flush=True)


class _Sums:
    """Losses and stats of one step, summed over its micro-batches."""

    def __init__(self) -> None:
        self.losses: dict[str, float] = {}
        self._stats: dict[str, float] = {}
        self._padding: list[float] = []

    def add(self, result: Any, *, keep: float, padding: float) -> None:
        self._padding.append(padding)
        if keep:
            self.losses |= dict(zip(result.ids, result.loss_B.detach().double().tolist()))
        # A process without a row of its own in this step still brings every name to the common sum.
        for name, values_B in result.stats.items():
            self._stats[name] = self._stats.get(name, 0.0) + (float(values_B.double().sum()) if keep else 0.0)

    def gathered(self, accelerator: Accelerator, *, total_weight: float, rows: int) -> dict[str, float]:
        """Means over the whole step, all processes together."""
        names = sorted(self._stats)
        local = torch.tensor([sum(self.losses.values()), *(self._stats[name] for name in names)], dtype=torch.float64)
        if accelerator.num_processes > 1:
            local = accelerator.reduce(local.to(accelerator.device), reduction="sum").cpu()
        values = {"loss": local[0].item() / total_weight}
        values |= {name: value / rows for name, value in zip(names, local[1:].tolist())}
        return values | {"padding_fraction": sum(self._padding) / len(self._padding)}


class _DeferredSignals:
    """Holds SIGTERM and SIGINT back until the run is between two steps, where weights and optimizer agree."""

    def __enter__(self) -> Self:
        self.arrived: int | None = None
        self._previous: dict[int, Any] = {}
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGTERM, signal.SIGINT):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def deliver(self) -> None:
        """Let the held signal do what it would have done."""
        number, self.arrived = self.arrived, None
        self.__exit__()
        if number is not None:
            signal.raise_signal(number)

    def _note(self, number: int, _frame: object) -> None:
        self.arrived = number


def _share(parts: list[list[TokenRow]], *, rank: int, ranks: int) -> list[tuple[list[TokenRow], float]]:
    """This rank's micro-batches with their weight; short ranks repeat one at weight 0, since all must keep step."""
    rounds = math.ceil(len(parts) / ranks)
    mine = [(part, 1.0) for part in parts[rank::ranks]]
    return mine + [(parts[0][:1], 0.0)] * (rounds - len(mine))


def _decay_groups(parameters: dict[str, nn.Parameter], weight_decay: float) -> list[dict[str, Any]]:
    """Weight decay on matrices only; gains and biases are left alone."""
    matrices: list[Tensor] = [p for p in parameters.values() if p.dim() >= 2]
    vectors: list[Tensor] = [p for p in parameters.values() if p.dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]


def _schedule(step: int, total: int, settings: Settings) -> float:
    """Factor on the learning rate at a step, 0 first: linear rise, then constant, linear or cosine fall to zero."""
    warmup = round(total * settings.warmup_share)
    if step < warmup:
        return (step + 1) / warmup
    if settings.schedule == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1 - progress if settings.schedule == "linear" else 0.5 * (1 + math.cos(math.pi * progress))
