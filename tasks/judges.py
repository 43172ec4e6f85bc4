"""Which judge params.yaml names; shared by verdicts and evaluate. Switching judges is a change of params only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankwise.types import UserError
from tasks.params import param

if TYPE_CHECKING:
    from rankwise.judging import Judge


@dataclass(frozen=True, kw_only=True)
class JudgeParams:
    """One judge."""

    kind: Literal["reward_model", "callable", "local_llm"] = param(
        "reward_model",
        "reward_model: a scalar head; callable: a Python function; local_llm: a language model reads the rubric",
    )
    model: str = param(
        "trained", 'reward_model, local_llm: "trained" (stage reward_model made it) or a folder below data/source'
    )
    function: str = param("", "callable: package.module:function of (prompt, answer), a higher score is better")
    rubric: str = param("recipes/rubrics/sentiment.md", "local_llm: file with the instructions")
    max_tokens: int = param(0, "reward_model: longest prompt + answer, tokens; 0 is no limit", ge=0)
    precision: Literal["fp32", "medium", "bf16"] = param("fp32", "numerics of the forward pass")


def make_judge(params: JudgeParams, *, trained: Path, source: Path, where: str) -> Judge:
    """The judge itself; where is the parameter's name, for messages."""
    from rankwise import judging

    if params.kind == "callable":
        if not params.function:
            raise UserError(f"{where}.function: kind is callable, so name one: package.module:function")
        return judging.CallableJudge(params.function)
    folder = trained if params.model == "trained" else source / params.model
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{where}.model: {params.model!r} is no model: {folder}/config.json is missing; "
            + ("set reward_model.enabled to true" if params.model == "trained" else f"put the folder into {source}")
        )
    if params.kind == "reward_model":
        return judging.RewardModelJudge(folder, max_tokens=params.max_tokens, precision=params.precision)
    if not Path(params.rubric).is_file():
        raise UserError(f"{where}.rubric: {params.rubric}: no such file; name one with the judge's instructions")
    return judging.LocalModelJudge(folder, Path(params.rubric), precision=params.precision)
