"""What the training stages (sft, reward_model, dpo) share: their optimisation params and the run of the loop."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise.fingerprint import digest
from tasks.params import param
from tasks.stage import Stage, is_first_rank, output_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from rankwise.learners import Learner
    from rankwise.rendering import TokenRow
    from rankwise.training import StepRecord


@dataclass(frozen=True, kw_only=True)
class TrainingParams:
    """Optimisation, alike in every training stage. Counts are optimizer steps and rows (prompts)."""

    epochs: int = param(1, "passes over the rows", ge=1)
    learning_rate: float = param(1e-3, "peak learning rate of AdamW", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = param("cosine", "how the learning rate falls after warm-up")
    warmup_share: float = param(0.05, "share of all steps over which the learning rate rises", ge=0, le=1)
    batch_size: int = param(32, "rows (prompts) an optimizer step, over all processes", ge=1)
    micro_batch_tokens: int = param(2048, "token positions a forward pass: memory grows with it, results do not", ge=1)
    weight_decay: float = param(0.0, "AdamW weight decay, on matrices only", ge=0)
    adam_beta2: float = param(
        0.95, "decay of AdamW's second moment; 0.999 averages over more steps than short runs have", ge=0, le=1
    )
    max_grad_norm: float = param(1.0, "gradients are clipped to this norm; 0 is no clipping", ge=0)
    precision: Literal["fp32", "medium", "bf16"] = param(
        "fp32", "fp32: exact; medium: fp32 with bf16 products inside matmuls; bf16: autocast"
    )
    gradient_checkpointing: bool = param(False, "compute activations twice instead of keeping them")
    seed: int = param(0, "seed of the shuffle and of new weights")


@dataclass(frozen=True, kw_only=True)
class LoraParams:
    """Low-rank adapters; merged into the weights when the stage ends."""

    rank: int = param(0, "rank of the adapters; 0 trains all weights", ge=0)
    alpha: float = param(16.0, "scale of the adapters: their update is multiplied by alpha / rank", gt=0)
    targets: list[str] = param(
        lambda: ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        "modules that get an adapter, by the end of their names",
    )


def with_adapters(model: PreTrainedModel, lora: LoraParams, *, seed: int) -> Any:
    """The model itself, or the model with trainable adapters and frozen weights."""
    if lora.rank == 0:
        return model
    from peft import LoraConfig, get_peft_model

    from rankwise.types import UserError

    tied = [model.get_input_embeddings()] if model.config.tie_word_embeddings else []
    fixed = [
        n for n, module in model.named_modules() if any(module is m for m in (model.get_output_embeddings(), *tied))
    ]
    if wrong := [n for n in fixed if any(f".{n}".endswith(f".{target}") for target in lora.targets)]:
        raise UserError(
            f"lora.targets {lora.targets}: {wrong[0]} is the output head (or the embedding tied to it), whose weight "
            "is read in chunks past any adapter; leave it out"
        )
    import torch

    torch.manual_seed(seed)
    config = LoraConfig(r=lora.rank, lora_alpha=lora.alpha, target_modules=lora.targets, task_type="CAUSAL_LM")
    try:
        return get_peft_model(model, config)
    except ValueError as error:
        raise UserError(f"lora.targets {lora.targets}: {error}; name modules of {type(model).__name__}") from error


def fit(
    stage: Stage,
    learner: Learner,
    rows: Sequence[TokenRow],
    params: TrainingParams,
    *,
    identity: Mapping[str, str],
    held_out: Sequence[TokenRow],
) -> dict[str, float]:
    """Run the loop with this stage's checkpoint, curves and tracker; returns the last held-out measurement.

    Held-out rows are measured when an epoch ends; the names then begin with "held_out_". The checkpoint stays until
    drop_checkpoints: the stage's result is not in place yet.

    Args:
        identity: fingerprints of everything beside params that the weights depend on, by name.
    """
    from rankwise.learners import measure
    from rankwise.parallel import gather_weights
    from rankwise.training import Hooks, Settings, train

    names = Settings.__dataclass_fields__.keys() & asdict(params).keys()
    settings = Settings(**{name: getattr(params, name) for name in names})
    checkpoint = stage.checkpoints(checkpoint_key(params, identity)) / "state.safetensors"
    values = {name: str(value) for name, value in asdict(params).items()}
    _tell_of_others(stage, checkpoint, {**identity, **values})
    # The loop knows its own settings; what else shapes the result (β, loss, adapters) is told to it.
    identity = {**identity, **{name: value for name, value in values.items() if name not in names}}
    last = {"step": 0}
    measured: dict[str, float] = {}

    def record(step_record: StepRecord) -> None:
        last["step"] = step_record.step
        stage.record(step_record.step, step_record.values, step_record.speeds)
        stage.timings["train_seconds"] = step_record.speeds["train_seconds"]

    def resume(step: int, points: list[dict[str, float]]) -> None:
        last["step"] = step
        stage.resume_curves(step, points)

    def look(epoch: int) -> None:
        found = measure(learner, held_out, max_tokens=params.micro_batch_tokens, precision=params.precision)
        measured.update({f"held_out_{name}": value for name, value in found.items()})
        stage.log(f"epoch {epoch}: " + ", ".join(f"{name} {value:.4g}" for name, value in measured.items()))
        stage.record(last["step"], measured)

    hooks = Hooks(on_step=record, on_epoch=look if held_out else None, on_resume=resume, points=lambda: stage.curves)
    train(learner, rows, settings, what=stage.name, checkpoint=checkpoint, identity=identity, hooks=hooks)
    gather_weights(learner.module)
    return measured


def save_trained(model: Any, tokenizer: PreTrainedTokenizerBase, path: Path) -> None:
    """A model folder in path's place, by the first process: after fit it alone has all weights."""
    from rankwise.checkpoints import save_model

    if is_first_rank():
        with output_folder(path) as folder:
            save_model(model, tokenizer, folder)


def _tell_of_others(stage: Stage, checkpoint: Path, identity: Mapping[str, str]) -> None:
    """Say why an interrupted run is not continued: one that lies here is of something else, by name."""
    from rankwise.checkpoints import load_state
    from rankwise.resuming import differences
    from rankwise.types import UserError

    if checkpoint.exists() or not is_first_rank():
        return
    for other in sorted(checkpoint.parent.parent.glob("*/state.safetensors")):
        try:
            notes = load_state(other)[1]
        except UserError:  # damaged, and of another run: no concern of this one
            continue
        theirs = {name: value for name, value in notes.get("identity", {}).items() if name in identity}
        found = differences(theirs, {name: identity[name] for name in theirs})
        stage.log(
            f"beginning anew: {other} (step {notes['step']}) is of another {'; of another '.join(found)}. It is kept, "
            "and continued when what it was made with is given back"
        )


def last_epoch(curves: Sequence[dict[str, float]]) -> dict[str, float]:
    """Means of the curves' columns over the last epoch's steps: one step alone is noise."""
    points = [point for point in curves if point["epoch"] > curves[-1]["epoch"] - 1]
    return {name: sum(point[name] for point in points) / len(points) for name in points[0]}


def checkpoint_key(params: TrainingParams, identity: Mapping[str, str]) -> str:
    """The folder of a run's checkpoints: a run with other params or inputs begins anew beside it.

    Params that change memory and no result are left out: a run that was too large continues with a smaller one.
    """
    from rankwise.training import FREE_SETTINGS

    return digest({k: v for k, v in asdict(params).items() if k not in FREE_SETTINGS}, dict(identity))[:16]


def drop_checkpoints(stage: Stage, params: TrainingParams, identity: Mapping[str, str]) -> None:
    """The result is in place: its checkpoint is of no more use."""
    if is_first_rank():
        shutil.rmtree(stage.checkpoints(checkpoint_key(params, identity)), ignore_errors=True)
