"""Stage dpo: the policy learns the rankings against the stored reference (E6; K = 2 is DPO).

A policy that equals its reference has the loss log K!: a run whose reference does not is refused. It starts from the
reference's own weights, or in a later round from those that the round before ended with.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankwise.fingerprint import file_digest, tokenizer_digest, weights_digest
from rankwise.rows import write_json
from rankwise.types import UserError
from tasks.params import param
from tasks.scored_rows import load
from tasks.stage import Stage, is_first_rank, main
from tasks.training import LoraParams, TrainingParams, drop_checkpoints, fit, last_epoch, save_trained, with_adapters

if TYPE_CHECKING:
    from rankwise.learners import PreferenceLearner, PreferenceSettings
    from rankwise.rendering import TokenRow

START_ROWS = 64  # rows on which "policy = reference" is checked before the first step
# Largest difference a token, nats, that numerics alone explain; another reference differs by far more.
START_TOLERANCE = {"fp32": 2e-4, "medium": 5e-3, "bf16": 5e-2}


@dataclass(frozen=True, kw_only=True)
class Params(TrainingParams):
    beta: float = param(0.2, "strength of the KL term; higher keeps the policy closer to the reference", gt=0)
    loss: Literal["plackett_luce", "soft_plackett_luce", "pairwise", "ipo", "likelihood"] = param(
        "plackett_luce",
        "plackett_luce: E6, DPO at K = 2; soft_plackett_luce: by the judge's probabilities; pairwise: E5 over all "
        "pairs of a ranking; ipo: squared; likelihood: of the best answer alone (preferred fine-tuning), no reference",
    )
    label_smoothing: float = param(
        0.0, "probability that a ranking is the wrong way round, for the Plackett-Luce losses", ge=0, le=0.5
    )
    unlikelihood: float = param(0.0, "weight of the worse answers' log-probability in the loss likelihood", ge=0)
    length_normalised: bool = param(True, "log-ratios per token (times the mean length): length alone earns no margin")
    epochs: int = param(1, "passes over the ranked rows", ge=1)
    learning_rate: float = param(6e-4, "peak learning rate of AdamW", gt=0)
    batch_size: int = param(16, "rows (prompts) an optimizer step, over all processes", ge=1)
    schedule: Literal["constant", "linear", "cosine"] = param("linear", "how the learning rate falls after warm-up")
    lora: LoraParams = param(LoraParams, "adapters instead of all weights")


@dataclass(frozen=True, kw_only=True)
class Paths:
    preferences: Path = Path("data/preferences.parquet")
    reference: Path = Path("data/reference_logprobs.parquet")
    model: Path = Path("models/sft")  # the reference
    start: Path = Path("models/sft")  # whose weights the policy starts from
    policy: Path = Path("models/policy")
    report: Path = Path("reports/dpo")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.checkpoints import load_causal_lm, load_tokenizer
    from rankwise.learners import PreferenceLearner
    from rankwise.parallel import place
    from rankwise.scoring import LogpModel
    from tasks.plots import training_curves

    _check_loss(params)
    tokenizer = load_tokenizer(paths.model)
    soft = params.loss == "soft_plackett_luce"
    scored = load(paths.preferences, paths.reference, paths.model, tokenizer, precision=params.precision, soft=soft)
    rows, held_out = scored.training, scored.held_out
    settings = settings_of(params)

    def learner_from(folder: Path) -> PreferenceLearner:
        module = LogpModel(with_adapters(load_causal_lm(folder), params.lora, seed=params.seed))
        return PreferenceLearner(place(module, params.precision), 0, scored.references, settings)

    learner = learner_from(paths.model)
    start = _check_start(learner, rows, params)
    stage.log(f"loss at the start {start['loss']:.6f}, expected {start['expected']:.6f} (log K! averaged over rows)")
    identity = {
        "reference": scored.reference,
        "start": weights_digest(paths.start),
        "tokenizer": tokenizer_digest(paths.model),
        "preferences": file_digest(paths.preferences),
        "reference_logprobs": file_digest(paths.reference),
    }
    if identity["start"] != identity["reference"]:
        del learner  # two models at once may be more than memory holds
        learner = learner_from(paths.start)
        stage.log(f"that is the loss of {paths.model}, the reference; training starts from {paths.start}")
    measured = fit(stage, learner, rows, params, identity=identity, held_out=held_out)
    save_trained(learner.module.model, tokenizer, paths.policy)
    last = last_epoch(stage.curves)
    stage.tracker.dataset(paths.preferences, "preferences")
    if is_first_rank():
        weights = {
            "reference": identity["reference"],
            "start": identity["start"],
            "policy": weights_digest(paths.policy),
        }
        write_json(stage.report / "weights.json", weights)
        stage.tracker.tags({f"{model}_weights": digest for model, digest in weights.items()})
    training_curves(stage.curves, stage.plots / "curves.png", start_loss=start["expected"])
    stage.finish(
        {
            "rows": len(rows),
            "held_out_rows": len(held_out),
            **({"beta": params.beta} if params.loss != "likelihood" else {}),  # there is none in that loss
            "start_loss": start["loss"],
            "start_loss_expected": start["expected"],
            **{
                name: last[name]
                for name in ("loss", "margin", "accuracy", "chosen_logp_change", "rejected_logp_change")
            },
            **measured,
        }
    )
    drop_checkpoints(stage, params, identity)


def settings_of(params: Params) -> PreferenceSettings:
    """How log-ratios become a loss under these parameters."""
    from rankwise.learners import PreferenceSettings

    return PreferenceSettings(**{name: getattr(params, name) for name in PreferenceSettings.__dataclass_fields__})


def _check_loss(params: Params) -> None:
    """Raises UserError where a parameter is set that has no part in the loss."""
    if params.unlikelihood and params.loss != "likelihood":
        raise UserError(
            f"dpo.unlikelihood is {params.unlikelihood}, which has no part in dpo.loss {params.loss!r}; set it to 0, "
            "or the loss to likelihood"
        )
    if params.label_smoothing and params.loss not in ("plackett_luce", "soft_plackett_luce"):
        raise UserError(
            f"dpo.label_smoothing is {params.label_smoothing}, which has no part in dpo.loss {params.loss!r}; set it "
            "to 0, or the loss to plackett_luce"
        )


def _check_start(learner: PreferenceLearner, rows: list[TokenRow], params: Params) -> dict[str, float]:
    """Loss before the first step; raises UserError where the policy is not the reference."""
    import torch

    from rankwise.batching import micro_batches
    from rankwise.checkpoints import device, numerics

    loss = expected = worst = 0.0
    some = rows[:START_ROWS]
    learner.module.eval()
    # not inference_mode: sharded layers could not be put together again outside of it
    with torch.no_grad(), numerics(params.precision, device()):
        for part in micro_batches(some, max_tokens=params.micro_batch_tokens, cost=learner.cost):
            batch = learner.collate(part).to(device())
            output = learner.module(batch)
            gap_BK = (batch.by_prompt(output.sum_A) - learner.reference_logps(batch)).abs()
            gap = float((gap_BK / batch.by_prompt(output.tokens_A).clamp(min=1)).max())
            worst = gap if not gap <= worst else worst  # a NaN stays
            loss += float(learner.losses(output, batch).loss_B.sum())
            expected += float(learner.loss_at_start(batch).sum())
    if not worst <= START_TOLERANCE[params.precision]:
        raise UserError(
            f"the policy is not its reference at step 0: log-probabilities differ by up to {worst:.2g} nats a token "
            f"(numerics explain {START_TOLERANCE[params.precision]:.0e}); the reference pass saw other weights, "
            "another tokenizer or precision. Delete data/reference_logprobs.parquet and run dvc repro dpo"
        )
    return {"loss": loss / len(some), "expected": expected / len(some)}


if __name__ == "__main__":
    raise SystemExit(main("dpo", Params, Paths, run))
