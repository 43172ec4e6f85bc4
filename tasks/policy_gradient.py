"""Stage policy_gradient: RLHF, the baseline of DPO: the policy climbs a judge's reward by policy gradient (E10).

Answers are drawn anew in every step for the prompts that DPO's were drawn for and scored by a pointwise judge; the
policy starts as the SFT model and is held to it by β. TRL's RLOOTrainer trains (extra `rlhf`), as `tasks.rloo` sets it.
No part of dvc.yaml: run it by hand or from a sweep. A run that was killed begins anew.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

from rankwise.rows import read_rows
from rankwise.types import Row, UserError
from tasks.judges import JudgeParams, make_judge
from tasks.params import param
from tasks.stage import Stage, main
from tasks.training import save_trained

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankwise.judging import Judge
    from rankwise.progress import Progress

POINTWISE = ("reward_model", "callable")  # kinds of judge that give an answer a number by itself
# Largest mean KL before the first step, nats an answer. Both models are run by one code on one batch, so that even bf16
# rounds alike; another reference differs by far more.
START_TOLERANCE = 1e-3


@dataclass(frozen=True, kw_only=True)
class Params:
    judge: JudgeParams = param(JudgeParams, "what gives the reward: a pointwise judge (reward_model, callable)")
    beta: float = param(0.2, "weight of the KL: units of the judge's score a nat of KL(policy‖SFT) an answer", gt=0)
    steps: int = param(60, "optimizer steps", ge=1)
    prompts_per_step: int = param(16, "prompts an optimizer step", ge=1)
    samples: int = param(4, "answers drawn a prompt; each is compared with the mean of the others (RLOO)", ge=2)
    micro_batch_answers: int = param(64, "answers a forward pass: memory grows with it; divides those of a step", ge=1)
    max_new_tokens: int = param(64, "longest answer, tokens", ge=1)
    max_prompt_tokens: int = param(0, "a longer prompt loses its beginning; 0 is no limit", ge=0)
    learning_rate: float = param(3e-4, "peak learning rate of AdamW", gt=0)
    schedule: Literal["constant", "linear", "cosine"] = param("linear", "how the learning rate falls after warm-up")
    warmup_share: float = param(0.05, "share of all steps over which the learning rate rises", ge=0, le=1)
    adam_beta2: float = param(0.95, "decay of AdamW's second moment", ge=0, le=1)
    max_grad_norm: float = param(1.0, "gradients are clipped to this norm; 0 is no clipping", ge=0)
    precision: Literal["fp32", "medium", "bf16"] = param(
        "fp32", "fp32: exact; medium: fp32 with bf16 products inside matmuls; bf16: autocast"
    )
    seed: int = param(0, "seed of the prompts' order and of the answers")


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    source: Path = Path("data/source")
    sft: Path = Path("models/sft")  # where the policy starts, and its reference
    reward_model: Path = Path("models/reward_model")  # what judge.model "trained" means
    policy: Path = Path("models/policy-rlhf")
    report: Path = Path("reports/policy_gradient")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    _check_params(params)
    rloo = _rloo()
    from rankwise.checkpoints import device, load_causal_lm, load_tokenizer, numerics
    from rankwise.progress import Progress
    from rankwise.rendering import Renderer
    from tasks.plots import training_curves

    rows = _prompts(paths.prompts / "rollout.parquet", params)
    tokenizer = load_tokenizer(paths.sft)
    renderer = Renderer(tokenizer, max_prompt_tokens=params.max_prompt_tokens)
    kept = [renderer.render(row, ()).prompt_ids for row in rows]
    _check_room(kept, params, paths.sft)
    judge = make_judge(
        params.judge, trained=paths.reward_model, source=paths.source, where="policy_gradient.judge", prefix=""
    )
    with tempfile.TemporaryDirectory() as folder, Progress("policy gradient", total=params.steps, unit="step") as bar:
        told = _Recorder(stage, bar)
        trainer = rloo.make_trainer(
            paths.sft,
            tokenizer,
            rloo.as_given(rows, kept, tokenizer),
            rewards(judge, rows, kept, tokenizer),
            params,
            folder=Path(folder),
            told=told,
        )
        with numerics("fp32" if params.precision == "bf16" else params.precision, device()):  # autocast is TRL's
            trainer.train()
    # Into a model read anew: TRL writes pad tokens and sampling options into the configs of its own.
    policy = load_causal_lm(paths.sft)
    policy.load_state_dict(trainer.model.state_dict())
    save_trained(policy, load_tokenizer(paths.sft), paths.policy)
    training_curves(stage.curves, stage.plots / "curves.png", title="Policy gradient")
    stage.tracker.dataset(paths.prompts / "rollout.parquet", "prompts")
    stage.finish({"rows": len(rows), **summary(stage.curves, params)})


def rewards(
    judge: Judge, rows: Sequence[Row], kept: Sequence[Sequence[int]], tokenizer: PreTrainedTokenizerBase
) -> Callable[[Sequence[int], Sequence[Sequence[int]]], list[float]]:
    """The judge's score of each completion, as stage verdicts gives it to an answer with the same tokens.

    Args:
        kept: each row's prompt tokens, as the policy is given them.
    """
    from rankwise.rendering import Renderer
    from rankwise.verdicts import Question

    renderer = Renderer(tokenizer)

    def score(numbers: Sequence[int], completions: Sequence[Sequence[int]]) -> list[float]:
        questions = [
            Question(
                row_id=rows[number].id,
                prompt=rows[number].prompt,
                answers=(renderer.answer_text(kept[number], ids),),
                places=(0,),
            )
            for number, ids in zip(numbers, completions)
        ]
        found = {index: judge.read(questions[index], raw).values[0] for index, raw in judge.ask(questions)}
        if wrong := [index for index, value in found.items() if not math.isfinite(value)]:
            raise UserError(
                f"policy_gradient.judge: the score of an answer to row {questions[wrong[0]].row_id!r} is "
                f"{found[wrong[0]]}, which no policy can climb; a finite number is needed: look at the judge's weights "
                "or function"
            )
        return [found[index] for index in range(len(questions))]

    return score


def summary(curves: Sequence[dict[str, float]], params: Params) -> dict[str, Any]:
    """What metrics.json tells of a run: its counts, where it started, and means over its last tenth of steps."""
    last = curves[-max(1, len(curves) // 10) :]
    mean = lambda name: sum(point[name] for point in last) / len(last)
    return {
        "prompts_seen": params.steps * params.prompts_per_step,
        "samples": params.steps * params.prompts_per_step * params.samples,
        "tokens": int(curves[-1]["tokens"]),
        "beta": params.beta,
        "start_kl": curves[0]["kl"],
        "start_reward": curves[0]["reward"],
        **{name: mean(name) for name in ("reward", "kl", "objective_e1", "entropy", "length", "cut_share")},
    }


class _Recorder:
    """Takes each step's values; stops a run whose policy is not its reference before the first."""

    def __init__(self, stage: Stage, bar: Progress):
        self._stage, self._bar, self._began = stage, bar, time.monotonic()

    def __call__(self, step: int, values: dict[str, float]) -> None:
        # The first step's answers were drawn and measured before anything was learnt.
        if step == 1 and not abs(values["kl"]) <= START_TOLERANCE:
            raise UserError(
                f"the policy is not its reference at step 0: the KL is {values['kl']:.2g} nats an answer (numerics "
                f"explain {START_TOLERANCE:.0e}); has the SFT model changed? Run it again"
            )
        seconds = time.monotonic() - self._began
        self._stage.record(step, values, {"seconds_per_step": seconds / step})
        self._stage.timings["train_seconds"] = seconds
        self._bar.advance(1, reward=values["reward"], kl=values["kl"])


def _check_params(params: Params) -> None:
    answers = params.prompts_per_step * params.samples
    if params.judge.kind not in POINTWISE:
        raise UserError(
            f"policy_gradient.judge.kind is {params.judge.kind!r}, which compares answers or knows those of a file; a "
            f"policy gradient needs a number for each new answer: use {' or '.join(POINTWISE)} (a reward model can be "
            "fitted to that judge's rankings: python -m tasks.reward_model --labelled data/preferences.parquet)"
        )
    if answers % params.micro_batch_answers:
        raise UserError(
            f"policy_gradient.micro_batch_answers is {params.micro_batch_answers}, and a step has {answers} answers "
            "(prompts_per_step × samples); set it to a divisor of that"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise UserError("stage policy_gradient runs on one process; start it without torchrun")


def _rloo() -> ModuleType:
    """tasks.rloo; raises UserError where TRL is not installed."""
    try:
        from tasks import rloo
    except ModuleNotFoundError as error:
        if error.name != "trl":
            raise
        raise UserError(
            "stage policy_gradient trains with TRL, which is not installed: pip install -e '.[rlhf]'"
        ) from error
    return rloo


def _prompts(table: Path, params: Params) -> list[Row]:
    rows = read_rows(table)
    if len(rows) < params.prompts_per_step:
        raise UserError(
            f"{table}: {len(rows)} prompts, and policy_gradient.prompts_per_step is {params.prompts_per_step}; name "
            "prompts in prompts.files.rollout (imported preferences are not sampled for), or lower prompts_per_step"
        )
    return rows


def _check_room(kept: Sequence[Sequence[int]], params: Params, sft: Path) -> None:
    from transformers import AutoConfig

    from rankwise.runtime import remote_code_allowed

    config = AutoConfig.from_pretrained(sft, trust_remote_code=remote_code_allowed())
    positions = getattr(config.get_text_config(), "max_position_embeddings", None)
    longest = max(map(len, kept)) + params.max_new_tokens
    if positions is not None and longest > positions:
        raise UserError(
            f"the longest prompt and policy_gradient.max_new_tokens = {params.max_new_tokens} make {longest} tokens, "
            f"and {sft} has {positions} positions; lower max_new_tokens or max_prompt_tokens"
        )


if __name__ == "__main__":
    raise SystemExit(main("policy_gradient", Params, Paths, run))
