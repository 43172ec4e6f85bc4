"""TRL's RLOOTrainer, set so that its steps climb E1 and nothing else; the one module of tasks that imports TRL.

RLOO (Ahmadian et al. 2024, arXiv 2402.14740): K completions a prompt, each with the value v = r − β log(π/π_ref), the
log-ratio summed over the completion; its advantage is v less the mean v of the K − 1 others, and the gradient is
advantage · ∇ log π of the whole completion. What RLOOTrainer offers beside that is turned off here.
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from datasets import Dataset
from transformers import GenerationConfig, PreTrainedTokenizerBase, PrinterCallback, TrainerCallback
from trl import RLOOConfig, RLOOTrainer

from rankwise.checkpoints import device, load_causal_lm
from rankwise.generation import end_tokens
from rankwise.rendering import Renderer
from rankwise.runtime import remote_code_allowed
from rankwise.types import Message, Row, UserError

if TYPE_CHECKING:
    from tasks.policy_gradient import Params

Prompt = str | list[dict[str, str]]  # a text to continue, or messages
Reward = Callable[[Sequence[int], Sequence[Sequence[int]]], list[float]]  # (numbers of prompts, completions' tokens)
Told = Callable[[int, dict[str, float]], None]  # (optimizer step, its values)
NEVER = 1e9  # a clip range that no ratio of probabilities leaves
SCHEDULES = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine"}

# What the libraries tell of one another: TRL sets an option that transformers has renamed, and transformers puts the
# tokenizer's special tokens into the config of a model that is not what is saved.
warnings.filterwarnings("ignore", ".*gradient_checkpointing.* is deprecated", FutureWarning)
logging.getLogger("transformers.trainer").setLevel(logging.ERROR)


def as_given(rows: Sequence[Row], kept: Sequence[tuple[int, ...]], tokenizer: PreTrainedTokenizerBase) -> list[Prompt]:
    """The prompts as TRL takes them, whose tokens it makes itself.

    Args:
        kept: each row's prompt tokens, as every stage gives them to a model.

    Raises UserError where TRL would make other tokens.
    """
    renderer = Renderer(tokenizer)
    given = [_as_given(row.prompt, ids, renderer) for row, ids in zip(rows, kept)]
    if len({type(one) for one in given}) > 1:
        raise UserError(
            "some prompts to answer are plain text and some have roles; TRL takes one kind at a time: give "
            "prompts.files.rollout one of them"
        )
    if wrong := [row.id for row, ids, one in zip(rows, kept, given) if tokens_of(one, tokenizer) != ids]:
        raise UserError(
            f"{len(wrong)} of {len(rows)} prompts would reach the model as other tokens than in the other stages: "
            f"{', '.join(wrong[:10])}{' …' if len(wrong) > 10 else ''}. TRL tokenizes texts itself; set "
            "policy_gradient.max_prompt_tokens to 0 (a cut can fall where no text has these tokens), or use a "
            "tokenizer that does not close texts with EOS"
        )
    return given


def _as_given(prompt: Sequence[Message], kept: Sequence[int], renderer: Renderer) -> Prompt:
    if len(prompt) > 1 or prompt[0].role != "text":
        return [{"role": message.role, "content": message.content} for message in prompt]
    whole = len(kept) == len(renderer.prompt_ids(prompt))
    return prompt[0].content if whole else renderer.text(kept)


def tokens_of(given: Prompt, tokenizer: PreTrainedTokenizerBase) -> tuple[int, ...]:
    """The tokens that RLOOTrainer makes of a prompt (trl 1.16, `_tokenize_prompts`)."""
    if isinstance(given, str):
        return tuple(tokenizer(text=given)["input_ids"])
    made = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=True)
    return tuple(made["input_ids"])


def make_trainer(
    sft: Path,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Prompt],
    reward: Reward,
    params: Params,
    *,
    folder: Path,
    told: Told,
) -> RLOOTrainer:
    """A trainer whose policy starts as the model in folder sft, and whose reference is that model.

    Args:
        prompts: from as_given.
        folder: for whatever the library writes; nothing in it is read.
        told: called after each optimizer step.

    Raises UserError where the reference that TRL loaded is not the model in sft.
    """
    policy = load_causal_lm(sft)
    # A model's own sampling options (top-p, a repetition penalty) would fill in what TRL leaves open, and the answers
    # would then be no draws from π.
    policy.generation_config = GenerationConfig(
        eos_token_id=list(end_tokens(policy, tokenizer.eos_token_id)),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )

    def scores(prompts, completions, completion_ids, number, **_: object) -> list[float]:
        return reward(number, completion_ids)

    trainer = RLOOTrainer(
        model=policy,
        reward_funcs=scores,
        args=_config(params, folder),
        train_dataset=Dataset.from_list([{"prompt": prompt, "number": n} for n, prompt in enumerate(prompts)]),
        processing_class=tokenizer,
        callbacks=[_Tell(told, params.beta)],
    )
    trainer.remove_callback(PrinterCallback)
    _check_reference(trainer, sft)
    return trainer


def _config(params: Params, folder: Path) -> RLOOConfig:
    answers = params.prompts_per_step * params.samples
    return RLOOConfig(
        output_dir=str(folder),
        # The objective: E1 on fresh samples, every completion counting as it is.
        beta=params.beta,
        num_generations=params.samples,
        max_completion_length=params.max_new_tokens,
        temperature=1.0,  # at another one the samples would not be π's, nor log π the model's
        top_p=1.0,
        top_k=0,
        repetition_penalty=1.0,
        num_iterations=1,  # each sample is used for one step, so the ratio π/π_old is 1 …
        epsilon=NEVER,  # … up to rounding, which is not to be clipped
        normalize_advantages=False,  # divided by their spread, they would weigh β and the reward anew in each batch
        reward_clip_range=None,
        mask_truncated_completions=False,  # a cut completion has its reward too, and the judge sees it as it is
        disable_dropout=True,
        sync_ref_model=False,  # π_ref stays the SFT model
        # The optimizer, as in our own loop.
        max_steps=params.steps,
        per_device_train_batch_size=params.micro_batch_answers,
        gradient_accumulation_steps=answers // params.micro_batch_answers,
        learning_rate=params.learning_rate,
        lr_scheduler_type=SCHEDULES[params.schedule],
        warmup_steps=round(params.warmup_share * params.steps),
        adam_beta2=params.adam_beta2,
        weight_decay=0.0,
        max_grad_norm=params.max_grad_norm,
        seed=params.seed,
        # The machine.
        bf16=params.precision == "bf16",
        use_cpu=device().type == "cpu",
        gradient_checkpointing=False,
        dataloader_pin_memory=device().type == "cuda",
        trust_remote_code=remote_code_allowed(),
        # No files, no bars, no trackers but ours.
        logging_steps=1,
        save_strategy="no",
        eval_strategy="no",
        report_to="none",
        disable_tqdm=True,
        push_to_hub=False,
    )


def _check_reference(trainer: RLOOTrainer, sft: Path) -> None:
    """The reference is loaded by the name in the policy's config: look at what that was."""
    expected = load_causal_lm(sft).state_dict()
    found = trainer.ref_model.state_dict()
    if wrong := [n for n, weight in expected.items() if n not in found or not torch.equal(found[n].cpu(), weight)]:
        raise UserError(
            f"{sft}: TRL loaded another reference than this folder ({trainer.model.config.name_or_path}); "
            f"{len(wrong)} of its weights differ: {', '.join(wrong[:5])}. Has the folder changed? Run it again"
        )


class _Tell(TrainerCallback):
    """What TRL logs after a step, in this project's names and units."""

    def __init__(self, told: Told, beta: float):
        self._told, self._beta = told, beta

    def on_log(self, args: Any, state: Any, control: Any, logs: dict[str, float] | None = None, **_: Any) -> None:
        if not logs or "reward" not in logs:  # the summary at the end
            return
        # TRL's is a mean over tokens; times tokens a completion, it is the mean over completions of their sums.
        length = logs["completions/mean_length"]
        kl = logs["kl"] * length
        values = {
            "reward": logs["reward"],
            "kl": kl,
            "objective_e1": logs["reward"] - self._beta * kl,
            "entropy": logs["entropy"],
            "length": length,
            "cut_share": logs["completions/clipped_ratio"],
            "grad_norm": float(logs["grad_norm"]),
            "learning_rate": logs["learning_rate"],
            "tokens": logs["num_tokens"],
        }
        self._told(state.global_step, values)
