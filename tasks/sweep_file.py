"""A sweep file: what it may say, and what is wrong with it, before anything runs. tasks.sweep makes points of it."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.types import UserError
from tasks.frontier import SFT
from tasks.params import build, merged, param, read_yaml

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")  # of what becomes a folder and a key of DVC's
JUDGE = "judge"  # the reward that is the judge itself


@dataclass(frozen=True, kw_only=True)
class Method:
    """One curve of the figure."""

    label: str = param("", "as the figure calls it")
    data: str = param("", "rankings that stage dpo learns, an entry of the sweep's data")
    reward: str = param("", "reward that a policy gradient climbs: an entry of the sweep's rewards, or judge")
    over: dict[str, dict[str, Any]] = param(dict, "parameters of stages, over those of params.yaml")
    vary: dict[str, list[float]] = param(dict, "the knob and its values: {dpo.beta: [0.1, 0.3]}")


@dataclass(frozen=True, kw_only=True)
class Temperatures:
    """Policies that are evaluated at several sampling temperatures."""

    values: list[float] = param(list, "sampling temperatures")
    of: dict[str, float] = param(dict, "method and the knob's value: {dpo: 0.1}")


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """A sweep file."""

    name: str = param("", "folder of its results below sweeps/")
    needs: dict[str, dict[str, Any]] = param(dict, "parameters that params.yaml has to have: those of its recipe")
    seeds: list[int] = param(list, "seeds of training and of the answers that are evaluated")
    data: dict[str, dict[str, Any]] = param(dict, "parameters of stage preferences for each set of rankings")
    rewards: dict[str, str] = param(dict, "reward models, each by the set of rankings that it is fitted to")
    over: dict[str, dict[str, Any]] = param(dict, "parameters of all points, over those of params.yaml")
    methods: dict[str, dict[str, Any]] = param(dict, "methods by name")
    temperatures: Temperatures = param(Temperatures, "policies evaluated at several sampling temperatures")


def read(source: Path) -> Sweep:
    """A sweep file; raises UserError on keys that nothing knows and on names that cannot be names."""
    given = read_yaml(source)
    sweep = build(Sweep, merged(Sweep(), given), where=str(source))
    for name in ("name", "seeds", "methods"):
        if not getattr(sweep, name):
            raise UserError(f"{source}: {name} is missing or empty; a sweep needs a name, seeds and methods")
    for kind, names in {
        "name": [sweep.name],
        **{k: list(getattr(sweep, k)) for k in ("data", "rewards", "methods")},
    }.items():
        for name in names:
            if not NAME.fullmatch(name) or name in (SFT, JUDGE):
                raise UserError(
                    f"{source}: {kind}: {name!r} cannot be a name; letters, digits, - and _ can, and {SFT!r} and "
                    f"{JUDGE!r} mean something already"
                )
    if len(set(sweep.seeds)) < len(sweep.seeds):
        raise UserError(f"{source}: seeds {sweep.seeds}: one stands twice, and would be one point")
    return sweep


def check_needs(sweep: Sweep, params: Path, source: Path) -> None:
    """Raise UserError where params.yaml is not what a sweep's labels speak of."""
    given = read_yaml(params)
    for section, values in sweep.needs.items():
        for name, value in values.items():
            own = given.get(section)
            found = own.get(name) if isinstance(own, dict) else own
            if found != value:
                raise UserError(
                    f"{params}: {section}.{name} is {found!r}, and {source} is about {value!r}: apply the recipe that "
                    "its head names, or set the parameter"
                )


def methods_of(sweep: Sweep, where: str) -> dict[str, Method]:
    """The methods, checked one by one."""
    found = {}
    for name, given in sweep.methods.items():
        at = f"{where}: methods.{name}"
        method = found[name] = build(Method, merged(Method(), given), where=at)
        _check_own(method.over, f"{at}.over")
        if len(method.vary) > 1 or not all(method.vary.values()):
            raise UserError(f"{at}.vary: one parameter and its values were expected, found {method.vary!r}")
        if method.data and method.reward:
            raise UserError(f"{at}: data means training by stage dpo, reward by policy gradient; name one of them")
        _check_sections({*method.over, *(knob.partition(".")[0] for knob in method.vary)}, _stages(method), at)
        for kind, chosen, known in (
            ("data", method.data, sweep.data),
            ("reward", method.reward, [*sweep.rewards, JUDGE]),
        ):
            if chosen and chosen not in known:
                raise UserError(f"{at}.{kind}: {chosen!r} is none of the sweep's ({', '.join(known)})")
    _check_own(sweep.over, f"{where}: over")
    _check_sections(sweep.over, ["dpo", "policy_gradient", "evaluate"], f"{where}: over")
    for name, data in sweep.rewards.items():
        if data not in sweep.data:
            raise UserError(f"{where}: rewards.{name}: {data!r} is none of the sweep's data ({', '.join(sweep.data)})")
    for name, value in sweep.temperatures.of.items():
        known = [] if name not in found else next(iter(found[name].vary.values()), [])
        if value not in known:
            raise UserError(f"{where}: temperatures.of.{name}: {value} is no value of that method's knob ({known})")
    return found


def _stages(method: Method) -> list[str]:
    """The stages that a point of a method runs."""
    return [*(["dpo"] if method.data else ["policy_gradient"] if method.reward else []), "evaluate"]


def _check_own(over: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise UserError for what a sweep sets itself."""
    for section, values in over.items():
        if "seed" in values:
            raise UserError(f"{where}.{section}.seed: seeds are those of the sweep (seeds: [0, 1, 2])")
    if "temperature" in over.get("evaluate", {}):
        raise UserError(f"{where}.evaluate.temperature: points are drawn at 1; others are told by temperatures")


def _check_sections(sections: Iterable[str], stages: Sequence[str], where: str) -> None:
    for section in sections:
        if section not in stages:
            raise UserError(f"{where}: parameters of {section!r}, and its points run {' and '.join(stages)} alone")
