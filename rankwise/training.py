"""The training loop: one for SFT, preferences and reward models, on one process or many.

An optimizer step takes batch_size rows; they are cut into micro-batches by token budget, and the loss is the
weighted mean over all rows of the step, so neither the cut nor the number of processes changes the result.
A checkpoint holds weights, optimizer, step, counters and curves: killed at any moment, a rerun with the same identity
continues to the same weights, on as many processes as it likes.

Run by tasks.sft, tasks.reward_model and tasks.dpo; on several processes through `torchrun -m tasks.NAME`.
"""

from __future__ import annotations

import contextlib
import io
import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from rankwise.batching import micro_batches, steps
from rankwise.checkpoints import Precision, numerics
from rankwise.learners import Learner
from rankwise.parallel import accumulating, place, plain, processes, synchronised
from rankwise.progress import Progress
from rankwise.rendering import TokenRow
from rankwise.resuming import DeferredSignals, frozen_digest, load, rows_digest, save
from rankwise.tallies import Tally
from rankwise.types import UserError

LOOK_EVERY_S = 1.0  # seconds between two looks, by several processes together, at whether one is to stop
# Settings that change memory or rounding and no result: a run may be continued with others.
FREE_SETTINGS = ("micro_batch_tokens", "gradient_checkpointing", "checkpoint_every_s")

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
    values: dict[str, float]  # reproducible: loss, learning rate, gradient norm, tokens seen, the learner's stats
    speeds: dict[str, float]  # not reproducible: tokens/s, rows/s, seconds trained


@dataclass
class Hooks:
    """What the caller wants to hear; all optional."""

    on_step: Callable[[StepRecord], None] = lambda record: None
    on_epoch: Callable[[int], None] | None = None  # epochs done, 1 first; may take long, so a checkpoint comes before
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
    identity: Mapping[str, str] | None = None,
    hooks: Hooks | None = None,
) -> int:
    """Optimise learner.module on rows; returns the number of optimizer steps.

    Args:
        rows: one entry a prompt; every epoch sees each once.
        what: the name on the progress bar.
        checkpoint: file to continue from and to write to; only the first process needs to see it.
        identity: what else the result depends on, by name: {"reference": digest, "tokenizer": digest, …}. It is kept
            in the checkpoint beside rows, frozen weights, these settings and the learner's, and a checkpoint of another
            identity is refused. The learner's stored reference log-probabilities are known by it alone.

    Raises:
        UserError: no rows; a checkpoint of another reference, tokenizer, β, rows, …, named; or a damaged one.
        NonFiniteLoss: with the first ten row ids of the offending step.
    """
    if not rows:
        raise UserError(f"{what}: there is no row to train on; look at the report of the stage that made the table")
    run = _Run(learner, rows, settings, what=what, checkpoint=checkpoint, hooks=hooks or Hooks())
    run.resume(dict(identity or {}))
    return run.run()


class _Run:
    """One training run: its model, optimizer, place in the data, counters and checkpoint."""

    def __init__(self, learner, rows, settings: Settings, *, what: str, checkpoint: Path | None, hooks: Hooks):
        self.learner, self.rows, self.settings = learner, rows, settings
        self.what, self.checkpoint, self.hooks = what, checkpoint, hooks
        self.processes = processes()
        torch.manual_seed(settings.seed)
        self.plan = list(steps(len(rows), batch_size=settings.batch_size, epochs=settings.epochs, seed=settings.seed))
        self.steps_per_epoch = math.ceil(len(rows) / settings.batch_size)
        module = place(learner.module, settings.precision)
        if settings.gradient_checkpointing:
            module.model.activation_checkpointing_enable({"use_reentrant": False})
        self.wrapped = module  # the bare module keeps the learner's methods; the wrapped one synchronises gradients
        self.parameters = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            _decay_groups(self.parameters, settings.weight_decay),
            lr=settings.learning_rate,
            betas=(0.9, settings.adam_beta2),
            fused=True,  # one pass over weights, gradients and moments instead of a dozen
        )
        self.identity: dict[str, str] = {}
        self.done = self.told = 0  # optimizer steps; epochs that on_epoch was told of
        self.tokens = self.seen = 0  # positions computed and rows seen, since the first step
        self.seconds, self.counted_at = 0.0, time.monotonic()  # spent in this run, all its lives together
        self.saved_step, self.saved_at = -1, time.monotonic()
        self.look_every = 1  # micro-batches

    def run(self) -> int:
        self.learner.module.train()
        total = len(self.plan)
        # The arithmetic, aloud: what one step of this run is made of.
        if self.processes.first:
            print(
                f"{self.what}: {len(self.rows)} rows × {self.settings.epochs} epochs / {self.settings.batch_size} rows "
                f"a step = {total} steps on {self.processes.count} process(es), {self.processes.device}, "
                f"{self.settings.precision}{', weights sharded' if self.processes.sharded else ''}",
                flush=True,
            )
        stream = None if self.processes.first else io.StringIO()
        bar = Progress(self.what, total=total, unit="step", done=self.done, stream=stream)
        with bar as progress, DeferredSignals() as signals:
            self.wrapped = synchronised(self.learner.module, idle=self._leaves_some_idle())
            self._end_epoch(signals)  # of a run that was killed while its held-out rows were measured
            while self.done < total:
                record, stop, due = self._step(self.plan[self.done], signals)
                if record is not None:
                    self.hooks.on_step(record)
                    speed = record.speeds["tokens_per_second"]
                    progress.advance(1, loss=record.values["loss"], **{"tokens/s": speed})
                stop = stop or (self.processes.count == 1 and signals.arrived is not None)
                if stop or due:
                    self._save()
                if stop:
                    signals.deliver()
                self._end_epoch(signals)
        self.learner.module.eval()
        return total

    def _end_epoch(self, signals: DeferredSignals) -> None:
        """Tell of an epoch that is over and was not told of; nothing is lost by a kill from here to the stage's end."""
        epoch = self.done // self.steps_per_epoch
        if self.told == epoch or self.done % self.steps_per_epoch:
            return
        if self.hooks.on_epoch or self.done == len(self.plan):
            self._save()
        if self.hooks.on_epoch:
            with signals.released():
                self.learner.module.eval()
                self.hooks.on_epoch(epoch)
                self.learner.module.train()
        self.told = epoch

    def _step(self, indices: list[int], signals: DeferredSignals) -> tuple[StepRecord | None, bool, bool]:
        """One optimizer step; its record, whether to stop, whether a checkpoint is due: alike in all processes.

        No record: a wish to stop came first, and weights and optimizer are untouched.
        """
        began = time.monotonic()
        members = [self.rows[i] for i in indices]
        total_weight = sum(map(self.learner.weight, members))
        budget = self.settings.micro_batch_tokens
        parts = self.processes.deal(micro_batches(members, max_tokens=budget, cost=self.learner.cost))
        lr = self.settings.learning_rate * _schedule(self.done, len(self.plan), self.settings)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        sums = Tally()
        for number, part in enumerate(parts):
            # Several processes also look when the step ends, in the sum that they make there anyway.
            look = self.processes.count == 1 or (number and number % self.look_every == 0)
            if look and self.processes.agree(signals.arrived is not None):
                self.optimizer.zero_grad(set_to_none=True)
                return None, True, False
            self._backward(part, total_weight, sums, last=number == len(parts) - 1)
        norm = torch.nn.utils.clip_grad_norm_(self.parameters.values(), self.settings.max_grad_norm or math.inf)
        norm = plain(norm).item()
        due = self.processes.first and time.monotonic() - self.saved_at > self.settings.checkpoint_every_s
        told = [signals.arrived is not None, due, (time.monotonic() - began) / len(parts)]
        values, (stop, due, pace) = sums.total(self.processes, told, total_weight=total_weight, rows=len(members))
        if not (math.isfinite(values["loss"]) and math.isfinite(norm)):
            self._save()
            raise NonFiniteLoss(self._blame(members, sums, norm))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.look_every = max(1, int(LOOK_EVERY_S * self.processes.count / max(pace, 1e-9)))
        return self._count(members, values | {"learning_rate": lr, "grad_norm": norm}, began), stop > 0, due > 0

    def _count(self, members: list[TokenRow], values: dict[str, float], began: float) -> StepRecord:
        """Move on by one step, and say what it was."""
        tokens, now = sum(row.positions for row in members), time.monotonic()
        self.done, self.tokens, self.seen = self.done + 1, self.tokens + tokens, self.seen + len(members)
        return StepRecord(
            step=self.done,
            values={**values, "epoch": self.done / self.steps_per_epoch, "tokens_seen": self.tokens},
            speeds={
                "tokens_per_second": tokens / (now - began),
                "rows_per_second": len(members) / (now - began),
                "rows_seen": self.seen,
                "train_seconds": self._seconds(),
            },
        )

    def _seconds(self) -> float:
        now = time.monotonic()
        self.seconds, self.counted_at = self.seconds + now - self.counted_at, now
        return self.seconds

    def _backward(self, part: tuple[list[TokenRow], float], total_weight: float, sums: Tally, *, last: bool) -> None:
        rows, keep = part
        where = self.processes.device
        sync = contextlib.nullcontext() if last else accumulating(self.wrapped)
        with sync, numerics(self.settings.precision, where):
            batch = self.learner.collate(rows)
            padding = batch.padding_fraction  # counted here: on a GPU the count would wait for all that is queued
            batch = batch.to(where)
            result = self.learner.losses(self.wrapped(batch), batch)
            # Gradients are averaged over processes, so each one's share is scaled back up.
            (result.loss_B.sum() * (keep * self.processes.count / total_weight)).backward()
        sums.add(result, keep=keep, padding=padding)

    def _leaves_some_idle(self) -> bool:
        """Whether backward leaves a weight of whole copies without a gradient: an expert that no token chose, or the
        vision tower of a model that is shown text only. The shortest row tells."""
        if self.processes.count == 1 or self.processes.sharded:
            return False  # nobody waits for its gradient
        with numerics(self.settings.precision, self.processes.device):
            shortest = min(self.rows, key=lambda row: row.positions)
            batch = self.learner.collate([shortest]).to(self.processes.device)
            self.learner.losses(self.learner.module(batch), batch).loss_B.sum().backward()
        idle = any(p.grad is None for p in self.parameters.values())
        self.optimizer.zero_grad(set_to_none=True)
        return self.processes.agree(idle)

    def _blame(self, members: list[TokenRow], sums: Tally, norm: float) -> str:
        losses = sums.losses()
        mine = [float(row.id in losses and not math.isfinite(losses[row.id])) for row in members]
        found = self.processes.total(torch.tensor(mine)).tolist()
        bad = [row.id for row, count in zip(members, found) if count] or [row.id for row in members]
        where = f"are in {self.checkpoint}" if self.checkpoint else "are those of the model, unchanged"
        return (
            f"{self.what}: loss or gradient is not finite at step {self.done + 1} (gradient norm {norm}); "
            f"rows: {', '.join(bad[:10])}{' …' if len(bad) > 10 else ''} ({len(bad)} in all). The weights of step "
            f"{self.done} {where}. Look at these rows; with other parameters (a lower learning_rate, precision fp32) "
            "training begins anew"
        )

    def _save(self) -> None:
        if self.checkpoint is None or self.saved_step == self.done:
            return
        notes = {
            "identity": self.identity,
            "step": self.done,
            "epochs_told": self.told,
            "counters": {"tokens": self.tokens, "seen": self.seen, "seconds": self._seconds()},
            "points": self.hooks.points(),
        }
        save(self.checkpoint, self.parameters, self.optimizer, notes, self.processes)
        self.saved_step, self.saved_at = self.done, time.monotonic()

    def resume(self, identity: dict[str, str]) -> None:
        """Continue from the checkpoint where there is one; refuse one of another identity."""
        if self.checkpoint is None:
            return
        settings = {name: str(value) for name, value in asdict(self.settings).items() if name not in FREE_SETTINGS}
        self.identity = {**identity, **self.learner.identity, "rows": rows_digest(self.rows), **settings}
        if frozen := frozen_digest(self.learner.module):
            self.identity["frozen weights"] = frozen
        notes = load(self.checkpoint, self.parameters, self.optimizer, self.identity, self.processes)
        if notes is None:
            return
        self.done = self.saved_step = notes["step"]
        self.told = notes["epochs_told"]
        for name, value in notes["counters"].items():
            setattr(self, name, value)
        self.hooks.on_resume(self.done, notes["points"])
        if self.processes.first:
            print(f"{self.what}: continuing from step {self.done} of {len(self.plan)}", flush=True)


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
