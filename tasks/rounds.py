"""Rounds: how often answers are drawn, ranked and trained on, and what the policy of each round is held to.

Section `rounds` of params.yaml belongs to the graph: dvc.yaml unrolls `rounds.each` (foreach). DVC cannot count, so
every round names the one before it, and `python -m tasks.recipe FILE` writes these names from count, reference and
start. params.yaml is such a FILE itself: change `rounds.count` in it, then `python -m tasks.recipe params.yaml`.

Round 1 has the plain names (models/policy), round 2 ends them in -2 (models/policy-2). What stands for a round before
the first: the SFT model, its report, and the imported preferences.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar

from rankwise.types import UserError
from tasks import params
from tasks.params import build, merged, param

T = TypeVar("T")

# The stages of a round, in order; an entry of rounds.each may change parameters of each.
STAGES = (
    *("rollouts", "verdicts", "audit_judge", "preferences", "reference_logprobs"),
    *("dpo", "diagnosis", "evaluate"),
)
WRITTEN = {  # what follows from the parameters, as people read it
    "last": "ending of the last round's files; register takes that policy",
    "each": "what dvc.yaml unrolls; `python -m tasks.recipe params.yaml` writes it anew, parameters are kept",
}
ENTRY = {  # what an entry of rounds.each says beside its stages
    "files": "ending of this round's files",
    "last": "what the round before left",
    "reference": "model that the policy is held to",
    "start": "model whose weights it starts from",
}


@dataclass(frozen=True, kw_only=True)
class Params:
    """What people choose; `last` and `each` follow from it."""

    count: int = param(1, "rounds of rollouts, ranking and training", ge=1, le=1000)
    reference: Literal["sft", "last"] = param(
        "sft", "what a round's policy is held to: the SFT model, or the policy of the round before"
    )
    start: Literal["reference", "last"] = param(
        "reference", "weights that a round's policy starts from: its reference, or the policy of the round before"
    )


def ending(number: int) -> str:
    """How the names of a round's files end."""
    return "" if number == 1 else f"-{number}"


def stage_files(address: str) -> str:
    """A stage's name in the names of its files: "dpo" of "dpo@1", "dpo-2" of "dpo@2"."""
    name, _, number = address.partition("@")
    return f"{name}{ending(int(number))}" if number.isdigit() else address


def unrolled(chosen: Params, own: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """The entries of rounds.each; own: parameters of single rounds, {"2": {"dpo": {"beta": 0.5}}}."""
    return {str(number): _entry(number, chosen, own.get(str(number), {})) for number in range(1, chosen.count + 1)}


def _entry(number: int, chosen: Params, own: Mapping[str, Any]) -> dict[str, Any]:
    before = ending(number - 1)
    last = {"model": "sft", "preferences": "prompts/preferences", "report": "sft"}
    if number > 1:
        last = {"model": f"policy{before}", "preferences": f"preferences{before}", "report": f"evaluate{before}"}
    reference = "sft" if chosen.reference == "sft" else last["model"]
    return {
        "files": ending(number),
        "last": last,
        "reference": reference,
        "start": reference if chosen.start == "reference" else last["model"],
        **{stage: own.get(stage) or {} for stage in STAGES},
    }


def section(overlay: Mapping[str, Any], *, where: str) -> dict[str, Any]:
    """The whole section for a recipe's overlay; names that the overlay holds are written anew.

    Raises UserError on keys that nothing knows, and on parameters of a round that there is not.
    """
    given = {name: value for name, value in overlay.items() if name not in ("last", "each")}
    chosen = build(Params, merged(Params(), given), where=where)
    own = _own(overlay.get("each") or {}, where=f"{where}.each")
    each = unrolled(chosen, own)
    if extra := [number for number, entry in own.items() if number not in each and any(entry.values())]:
        raise UserError(
            f"{where}.each.{extra[0]} has parameters of its own, and rounds.count is {chosen.count}: raise the count, "
            "or remove them"
        )
    return {**asdict(chosen), "last": ending(chosen.count), "each": each}


def _own(each: Any, *, where: str) -> dict[str, dict[str, Any]]:
    """The parameters of single rounds in entries of rounds.each, whose names are left aside."""
    if not isinstance(each, Mapping) or not all(isinstance(entry, Mapping) for entry in each.values()):
        raise UserError(f"{where}: rounds with parameters of their own were expected, such as {{2: {{dpo: {{…}}}}}}")
    own = {str(n): {name: value for name, value in entry.items() if name not in ENTRY} for n, entry in each.items()}
    if len(own) < len(each):
        raise UserError(f"{where}: a round stands there twice, as a number and as text; leave one of them out")
    for number, entry in own.items():
        if strange := [name for name, values in entry.items() if not (values is None or isinstance(values, Mapping))]:
            raise UserError(
                f"{where}.{number}.{strange[0]}: a mapping of parameters was expected, found "
                f"{repr(entry[strange[0]])[:200]}"
            )
        if unknown := [name for name in entry if name not in STAGES]:
            raise UserError(
                f"{where}.{number}.{unknown[0]}: no stage of a round is called so (stages: {', '.join(STAGES)})"
            )
    return own


def check(document: Mapping[str, Any], where: str) -> None:
    """Raise UserError where the names in rounds.each are not those that count, reference and start ask for."""
    given = document.get("rounds")
    if not isinstance(given, Mapping):
        raise UserError(f"{where}: section 'rounds' is missing; write it: python -m tasks.recipe {where}")
    if section(given, where=f"{where}: rounds") != given:
        raise UserError(
            f"{where}: rounds.last and rounds.each, which dvc.yaml unrolls, are not those of rounds.count, reference "
            f"and start; write them anew (parameters of single rounds are kept): python -m tasks.recipe {where}"
        )


def load(path: Path, name: str, params_type: type[T], number: int | None, over: Mapping[str, Any] | None = None) -> T:
    """A stage's section of params.yaml; in a round, what the round has of its own over it.

    Args:
        number: the round; None for a stage outside of rounds.
        over: sections whose parameters stand over all of these, as those of a sweep's points do.

    Raises UserError that names the file, the key and the mend.
    """
    plain, document = params.load(path, name, params_type), params.read_yaml(path)
    check(document, str(path))
    if number is not None:
        each = document["rounds"]["each"]
        if str(number) not in each:
            raise UserError(f"--round {number}: {path} has {len(each)} (rounds.count)")
        own = merged(plain, each[str(number)][name])
        plain = build(params_type, own, where=f"{path}: rounds.each.{number}.{name}")
    own = (over or {}).get(name) or {}
    return build(params_type, merged(plain, own), where=f"--over: {name}") if own else plain
