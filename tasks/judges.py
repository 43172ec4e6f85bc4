"""Which judges params.yaml names; shared by verdicts, evaluate and the audit. Switching is a change of params only."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise import json_text
from rankwise.types import UserError
from tasks.params import below, build, param
from tasks.tracking import home

if TYPE_CHECKING:
    from rankwise.judging import Judge

PREFIX = "RANKWISE_JUDGE"  # of the environment's variables about the server of verdicts.judge
FUNCTIONS = Path("recipes/judges.py")  # where the user's own functions stand
RUBRICS = Path("recipes/rubrics")
TRAINED = "trained"  # the model that stage reward_model made


@dataclass(frozen=True, kw_only=True)
class JudgeParams:
    """One judge."""

    kind: Literal["reward_model", "callable", "local_llm", "server", "stored"] = param(
        "reward_model",
        "reward_model: a scalar head; callable: a Python function; local_llm: a language model reads the rubric; "
        "server: one behind an OpenAI-compatible API does; stored: its replies are in a file",
    )
    model: str = param(
        TRAINED,
        'reward_model: "trained" (stage reward_model made it) or a folder below data/source; local_llm: such a folder; '
        "server: the name to ask for",
    )
    function: str = param("", "callable: package.module:function of (prompt, answer), a higher score is better")
    rubric: str = param("recipes/rubrics/sentiment.md", "local_llm, server: file with the criteria")
    max_tokens: int = param(0, "reward_model: longest prompt + answer, tokens; 0 is no limit", ge=0)
    precision: Literal["fp32", "medium", "bf16"] = param(
        "fp32", "reward_model, local_llm: numerics of the forward pass"
    )
    reply: Literal["json", "logprobs"] = param(
        "json", "server: a verdict with a reason, or the probabilities of one letter where the server gives them"
    )
    temperature: float = param(0.0, "server: above 0, replies are drawn", ge=0)
    max_reply_tokens: int = param(256, "server: longest reply, tokens", ge=1)
    samples: int = param(1, "server: draws of each question, for temperatures above 0", ge=1)
    reasks: int = param(3, "server: times a question is asked again when its reply cannot be read", ge=0)
    verdicts: str = param("", "stored: file of replies below data/source")
    annotator: str = param("", "stored: whose replies count; empty: everybody's")
    pairs_up_to: int = param(
        4, "language models compare so many answers pair by pair; of more, lists first and the best pair by pair", ge=2
    )


def make_judge(params: JudgeParams, *, trained: Path, source: Path, where: str, prefix: str = PREFIX) -> Judge:
    """The judge itself.

    Args:
        trained: folder of the project's own reward model.
        where: the parameter's name, for messages.
        prefix: of the environment's variables about its server, should it have one.

    Raises UserError, naming the parameter.
    """
    make = {
        "callable": _callable,
        "reward_model": _reward_model,
        "local_llm": _local_model,
        "server": _server,
        "stored": _stored,
    }
    return make[params.kind](params, trained=trained, source=source, where=where, prefix=prefix)


@dataclass(frozen=True, kw_only=True)
class Member:
    """A judge of a panel, and where it sits."""

    section: str  # of metrics: "judge", "judge_2", …
    params: JudgeParams
    prefix: str  # of the environment's variables about its server: RANKWISE_JUDGE, RANKWISE_JUDGE_2, …
    judge: Judge


def make_panel(
    first: JudgeParams, further: Sequence[dict[str, Any]], *, trained: Path, source: Path, where: str
) -> Iterator[Member]:
    """The judge, and the further ones of a panel as params.yaml has them, each made when its turn comes.

    Names are made unique. Raises UserError, naming the parameter; a wrong key of any before the first is made.
    """
    places = [f"{where}.judge", *(f"{where}.panel[{number}]" for number in range(len(further)))]
    members = [first, *(panel_member(given, where=place) for given, place in zip(further, places[1:]))]
    names = set()
    for number, (params, place) in enumerate(zip(members, places), start=1):
        nth = "" if number == 1 else f"_{number}"
        judge = make_judge(params, trained=trained, source=source, where=place, prefix=f"{PREFIX}{nth}")
        if judge.name in names:
            judge.name = f"{judge.name} ({number})"
        names.add(judge.name)
        yield Member(section=f"judge{nth}", params=params, prefix=f"{PREFIX}{nth}", judge=judge)


def panel_member(given: dict[str, Any], *, where: str) -> JudgeParams:
    """An entry of verdicts.panel; raises UserError, naming the key."""
    return build(JudgeParams, {**asdict(JudgeParams()), **given}, where=where)


def common_family(params: JudgeParams, name: str, *, source: Path, generator: Path) -> str:
    """The family of models that a judge seems to share with the generator's folder; "" where there is no sign of one.

    A sign is the generator's architecture in the judge's own, or in its name: families are named so. A scalar head
    was fitted to labels and writes no answers that it could favour.
    """
    mine = re.match("[a-z]*", _model_type(generator))[0]
    signs = {
        "local_llm": f"{_model_type(source / params.model)} {params.model}",
        "server": params.model,
        "stored": name,
    }
    return mine if mine and mine in signs.get(params.kind, "").lower() else ""


def _model_type(folder: Path) -> str:
    config = folder / "config.json"
    found = json_text.read(config, "take a whole copy of the model") if config.is_file() else {}
    return str(found.get("model_type", "")) if isinstance(found, dict) else ""


def _callable(params: JudgeParams, *, where: str, **_: object) -> Judge:
    from rankwise.judges import CallableJudge

    if not params.function:
        raise UserError(f"{where}.function: kind is callable, so name one: package.module:function")
    judge = CallableJudge(params.function, name=f"callable:{params.function}")
    if not _is_seen(judge.source):
        raise UserError(
            f"{where}.function: {params.function} stands in {judge.source}, where DVC does not see it change, so "
            f"that labels of an edited function would pass for new; put it into {FUNCTIONS}"
        )
    return judge


def _is_seen(source: Path) -> bool:
    """Whether a change of a function's file reaches DVC: the project's own files that the stages name, or packages."""
    path, root = source.resolve(), Path.cwd().resolve()
    own = path.is_relative_to(root) and not path.is_relative_to(Path(sys.prefix).resolve())
    return not own or path == root / FUNCTIONS or path.is_relative_to(root / "rankwise")


def _reward_model(params: JudgeParams, *, trained: Path, source: Path, where: str, **_: object) -> Judge:
    from rankwise.judges import RewardModelJudge

    folder = _folder(params, trained, source, where)
    name = f"reward_model:{params.model}"
    return RewardModelJudge(folder, max_tokens=params.max_tokens, precision=params.precision, name=name)


def _local_model(params: JudgeParams, *, trained: Path, source: Path, where: str, **_: object) -> Judge:
    from rankwise.judges import LocalModelJudge

    rubric = _rubric(params, source, where)
    if params.model == TRAINED:
        raise UserError(
            f"{where}.model: kind is local_llm, and the model that stage reward_model made has a score to give and no "
            f"words; name a folder below {source} with a language model"
        )
    folder = _folder(params, trained, source, where)
    name = f"local_llm:{params.model}:{rubric.name}"
    return LocalModelJudge(folder, rubric, precision=params.precision, name=name)


def _server(params: JudgeParams, *, source: Path, where: str, prefix: str, **_: object) -> Judge:
    from rankwise.budget import Budget
    from rankwise.client import Endpoint
    from rankwise.server_judge import ServerJudge

    if params.model == TRAINED:
        raise UserError(f"{where}.model: kind is server, so give the name that the server knows the judge's model by")
    if params.samples > 1 and params.temperature == 0:
        raise UserError(
            f"{where}.samples is {params.samples} with {where}.temperature 0, where every draw is the same; raise the "
            "temperature, or ask once"
        )
    if params.reply == "logprobs" and (params.temperature, params.samples) != (0, 1):
        raise UserError(
            f"{where}.reply is logprobs, which reads probabilities and draws nothing; leave {where}.temperature "
            f"({params.temperature:g}) at 0 and {where}.samples ({params.samples}) at 1, or set reply to json"
        )
    rubric = _rubric(params, source, where)
    return ServerJudge(
        f"server:{params.model}:{rubric.name}",
        model=params.model,
        rubric=rubric,
        endpoint=Endpoint.from_environment(prefix, os.environ),
        reply=params.reply,
        temperature=params.temperature,
        max_reply_tokens=params.max_reply_tokens,
        reasks=params.reasks,
        samples=params.samples,
        budget=Budget.from_environment(prefix, os.environ, path=home() / "stores" / "spending.sqlite"),
    )


def _stored(params: JudgeParams, *, source: Path, where: str, **_: object) -> Judge:
    from rankwise.stored_judge import StoredJudge

    path = below(source, params.verdicts, where=f"{where}.verdicts")
    if not params.verdicts or not path.is_file():
        raise UserError(f"{where}.verdicts: {path}: no such file; kind is stored, so name one with replies in {source}")
    return StoredJudge(path, annotator=params.annotator)


def _folder(params: JudgeParams, trained: Path, source: Path, where: str) -> Path:
    """The judge's model folder."""
    folder = trained if params.model == TRAINED else below(source, params.model, where=f"{where}.model")
    if not (folder / "config.json").is_file():
        raise UserError(
            f"{where}.model: {params.model!r} is no model: {folder}/config.json is missing; "
            + ("set reward_model.enabled to true" if params.model == TRAINED else f"put the folder into {source}")
        )
    return folder


def _rubric(params: JudgeParams, source: Path, where: str):
    from rankwise.rubrics import Rubric

    if not Path(params.rubric).is_file():
        raise UserError(f"{where}.rubric: {params.rubric}: no such file; name one with the judge's criteria")
    path = Path(params.rubric)
    if not any(Path(os.path.abspath(path)).is_relative_to(folder.absolute()) for folder in (RUBRICS, source)):
        raise UserError(
            f"{where}.rubric: {path} stands where DVC does not see it change, so that labels of an edited one would "
            f"pass for new; put it into {RUBRICS} or {source}"
        )
    return Rubric(path)
