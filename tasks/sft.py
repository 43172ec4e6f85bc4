"""Stage sft: supervised fine-tuning on prompt + completion rows (E11). Its result is the reference model."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from rankwise.fingerprint import file_digest, tokenizer_digest, weights_digest
from rankwise.rows import RowTable
from rankwise.types import UserError
from tasks.params import param
from tasks.stage import Stage, main
from tasks.training import LoraParams, TrainingParams, drop_checkpoints, fit, last_epoch, save_trained, with_adapters


@dataclass(frozen=True, kw_only=True)
class Params(TrainingParams):
    epochs: int = param(3, "passes over the rows; 0 keeps the base model as it is", ge=0)
    learning_rate: float = param(1.5e-3, "peak learning rate of AdamW", gt=0)
    batch_size: int = param(16, "rows (prompts) an optimizer step, over all processes", ge=1)
    held_out: int = param(200, "rows kept out of training to measure the loss on", ge=0)
    max_prompt_tokens: int = param(0, "a longer prompt loses its beginning; 0 is no limit", ge=0)
    max_answer_tokens: int = param(0, "a longer answer loses its end; 0 is no limit", ge=0)
    lora: LoraParams = param(LoraParams, "adapters instead of all weights")


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    base: Path = Path("models/base")
    doctor: Path = Path("reports/doctor/metrics.json")
    model: Path = Path("models/sft")
    report: Path = Path("reports/sft")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.checkpoints import load_causal_lm, load_tokenizer
    from rankwise.learners import SftLearner
    from rankwise.parallel import place
    from rankwise.rendering import Renderer
    from rankwise.scoring import LogpModel
    from tasks.plots import training_curves

    table = paths.prompts / "sft.parquet"
    tokenizer, model = load_tokenizer(paths.base), load_causal_lm(paths.base)
    metrics: dict = {"steps": 0}
    if params.epochs > 0:
        renderer = Renderer(
            tokenizer, max_prompt_tokens=params.max_prompt_tokens, max_answer_tokens=params.max_answer_tokens
        )
        rows = [renderer.render(row) for row in RowTable(table)]
        if len(rows) <= params.held_out:
            raise UserError(
                f"{table}: {len(rows)} rows, of which sft.held_out keeps {params.held_out} out of training; "
                "give more rows, or lower sft.held_out"
            )
        held_out, training = rows[: params.held_out], rows[params.held_out :]
        module = LogpModel(with_adapters(model, params.lora, seed=params.seed))
        place(module, params.precision)
        identity = {
            "base": weights_digest(paths.base),
            "tokenizer": tokenizer_digest(paths.base),
            "examples": file_digest(table),
        }
        learner = SftLearner(module, 0)
        measured = fit(stage, learner, training, params, identity=identity, held_out=held_out)
        model = module.model
        metrics = {"steps": stage.curves[-1]["step"], "loss": last_epoch(stage.curves)["loss"], **measured}
        if measured:
            metrics["held_out_perplexity"] = math.exp(measured["held_out_loss"])
    save_trained(model, tokenizer, paths.model)
    stage.tracker.dataset(table, "sft")
    if stage.curves:
        training_curves(stage.curves, stage.plots / "curves.png")
    stage.finish(metrics)
    if params.epochs > 0:
        drop_checkpoints(stage, params, identity)


if __name__ == "__main__":
    raise SystemExit(main("sft", Params, Paths, run))
