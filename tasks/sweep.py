"""Sweeps: many points of a few methods over one SFT model, one set of rollouts and one reference pass.

    python -m tasks.sweep recipes/sweeps/frontier.yaml      writes sweeps/params.yaml, which sweeps/dvc.yaml unrolls
    dvc repro sweeps/dvc.yaml                               runs what is stale of it (python -m flows.frontier: a flow)

A sweep file names methods. A method varies one parameter, its knob; each value and seed is a point. What a method has
says how it is trained: `data`, by stage dpo on these rankings; `reward`, by policy gradient on that reward; neither,
not at all. A point is a policy and at least one evaluation, under one name: METHOD-VALUE-SEED.
"""

from __future__ import annotations

import argparse
import functools
import importlib
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml

from rankwise.fingerprint import digest
from rankwise.rows import write_aside
from rankwise.types import UserError
from tasks import rounds
from tasks.frontier import SFT
from tasks.judges import JudgeParams
from tasks.params import build, merged
from tasks.sweep_file import Method, Sweep, check_needs, methods_of, read

FOLDER = Path("sweeps")
FILE = FOLDER / "params.yaml"
DEFAULT = Path("recipes/sweeps/frontier.yaml")
HEAD = """\
# The points of a sweep, which sweeps/dvc.yaml unrolls. `python -m tasks.sweep FILE` writes this file, from
# {source}; parameters here stand over those of the project's params.yaml.
"""
KINDS = ("data", "rewards", "policies", "gradients", "evaluations")


def apply(source: Path, *, file: Path = FILE, params: Path = Path("params.yaml")) -> dict[str, Any]:
    """Write sweeps/params.yaml for a sweep file; returns what it holds.

    Raises UserError on a key, value or name that nothing knows; the file is then left as it was.
    """
    sweep = read(source)
    check_needs(sweep, params, source)
    document = points(sweep, where=str(source), judge=_judge(params))
    _check_parameters(document, params)
    text = HEAD.format(source=source) + "\n" + yaml.safe_dump(document, sort_keys=False, width=10**6)
    write_aside(file, lambda aside: aside.write_text(text, encoding="utf-8"))
    return document


def points(sweep: Sweep, *, where: str, judge: Mapping[str, Any]) -> dict[str, Any]:
    """The document that sweeps/dvc.yaml unrolls: what is trained on, policies, and evaluations, each by its name.

    Args:
        judge: the parameters of the judge that made the labels.
    """
    methods = methods_of(sweep, where)
    document: dict[str, Any] = {
        "sweep": sweep.name,
        "labels": {SFT: "SFT"} | {name: method.label or name for name, method in methods.items()},
        "knobs": {name: next(iter(method.vary), "") for name, method in methods.items()},
        "data": {name: {"rows": name, "preferences": over} for name, over in sweep.data.items()},
        "rewards": {name: {"data": data, "reward_model": {"enabled": True}} for name, data in sweep.rewards.items()},
        "policies": {},
        "gradients": {},
        "evaluations": dict(_of_sft(sweep)),
        "figures": {sweep.name: {}},
    }
    for name, method in methods.items():
        for value, seed, over in _settings(sweep, method):
            key, facts = key_of(name, value, seed), {"method": name, "value": value, "seed": seed}
            if key in document["evaluations"]:
                raise UserError(f"{where}: two points would be called {key!r}; rename a method, or round its values")
            if method.data:
                trained = {"dpo": {**over.get("dpo", {}), "seed": seed}}
                document["policies"][key] = {**facts, "data": method.data, **trained}
            elif method.reward:
                document["gradients"][key] = {**facts, **_climbed(sweep, method, over, judge, seed)}
            document["evaluations"][key] = {**facts, **_places(sweep, method, key), **_evaluate(over, seed)}
            if sweep.temperatures.of.get(name) == value and value is not None:
                document["evaluations"] |= _at_temperatures(sweep, key, document["evaluations"][key])
    _refuse_twins(document["policies"], where)
    return document


def _refuse_twins(policies: Mapping[str, Mapping[str, Any]], where: str) -> None:
    """Raise UserError where two points would train the very same policy, and write one checkpoint at once."""
    known: dict[str, str] = {}
    for key, point in policies.items():
        first = known.setdefault(digest(point["data"], point["dpo"]), key)
        if first != key:
            raise UserError(f"{where}: {first} and {key} would train the same policy; leave one of them out")


def key_of(method: str, value: float | None, seed: int) -> str:
    """A point's name. DVC reads a dot in a parameter's name as a level, so numbers have none: pl-dpo-0_1-0."""
    return "-".join([method, *([] if value is None else [f"{value:g}".replace(".", "_")]), str(seed)])


def _settings(sweep: Sweep, method: Method) -> Iterator[tuple[float | None, int, dict[str, dict[str, Any]]]]:
    """Value, seed and parameters of each point of a method."""
    for knob, values in (method.vary or {"": [None]}).items():
        section, _, name = knob.partition(".")
        for value in values:
            for seed in sweep.seeds:
                over = _merge(sweep.over, method.over)
                yield value, seed, _merge(over, {section: {name: value}} if knob else {})


def _merge(*overlays: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for overlay in overlays:
        for section, values in overlay.items():
            found[section] = {**found.get(section, {}), **values}
    return found


def _climbed(
    sweep: Sweep, method: Method, over: Mapping[str, Mapping[str, Any]], judge: Mapping[str, Any], seed: int
) -> dict[str, Any]:
    """What a policy gradient climbs: a reward model of the sweep, or the judge that made the labels."""
    own = {**over.get("policy_gradient", {}), "seed": seed}
    if method.reward in sweep.rewards:
        fitted = {"kind": "reward_model", "model": "trained"}
        return {"model": _below(sweep, "rewards", method.reward), "policy_gradient": {"judge": fitted, **own}}
    climbed = {**judge, **own.get("judge", {})}
    if climbed["kind"] not in ("reward_model", "callable"):
        raise UserError(
            f"reward: judge means verdicts.judge, whose kind is {climbed['kind']!r}: it compares answers, and a policy "
            "gradient climbs a score; name one of the sweep's rewards instead"
        )
    return {"model": "models/reward_model", "policy_gradient": {**own, "judge": climbed}}


def _judge(params: Path) -> dict[str, Any]:
    """verdicts.judge of params.yaml; where nobody is asked, the reward model."""
    return asdict(_stage_params("verdicts", params).judge or JudgeParams())


def _of_sft(sweep: Sweep) -> Iterator[tuple[str, dict[str, Any]]]:
    """The SFT model against itself: the point at KL 0, and its own curve over temperatures."""
    for seed in sweep.seeds:
        key, facts = key_of(SFT, None, seed), {"method": SFT, "value": None, "seed": seed}
        place = {"policy": "models/sft", "training": "reports/sft/metrics.json"}
        one = {**facts, **place, **_evaluate(sweep.over, seed)}
        yield key, one
        yield from _at_temperatures(sweep, key, one).items()


def _places(sweep: Sweep, method: Method, key: str) -> dict[str, str]:
    """Where an evaluation finds the policy and the report of its training."""
    if not (method.data or method.reward):
        return {"policy": "models/sft", "training": "reports/sft/metrics.json"}
    return {"policy": _below(sweep, "policies", key), "training": f"{_below(sweep, 'reports', key)}/metrics.json"}


def _evaluate(over: Mapping[str, Mapping[str, Any]], seed: int) -> dict[str, Any]:
    # Not the seed that the rollouts were drawn with, or a point would answer as it was trained to.
    evaluate = {"temperature": 1.0, **over.get("evaluate", {}), "seed": 1 + seed}
    return {"temperature": evaluate["temperature"], "evaluate": evaluate}


def _at_temperatures(sweep: Sweep, key: str, point: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """The same policy's evaluations at other temperatures than its own."""
    return {
        f"{key}-t{f'{value:g}'.replace('.', '_')}": {
            **point,
            "temperature": value,
            "evaluate": {**point["evaluate"], "temperature": value},
        }
        for value in sweep.temperatures.values
        if value != point["temperature"]
    }


def _below(sweep: Sweep, kind: str, name: str) -> str:
    return f"{FOLDER}/{sweep.name}/{kind}/{name}"


def _check_parameters(document: Mapping[str, Any], params: Path) -> None:
    """Raise UserError for the first parameter of a point that its stage does not know."""
    plain = functools.cache(lambda section: _stage_params(section, params))
    for kind in KINDS:
        for name, entry in document[kind].items():
            for section, values in entry.items():
                if isinstance(values, dict):
                    whole = merged(plain(section), values)
                    build(type(plain(section)), whole, where=f"{FILE}: {kind}.{name}.{section}")


def _stage_params(section: str, params: Path) -> Any:
    params_type = importlib.import_module(f"tasks.{section}").Params
    return rounds.load(params, section, params_type, 1 if section in rounds.STAGES else None)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sweep", nargs="?", type=Path, default=DEFAULT, help="a sweep file (%(default)s)")
    try:
        document = apply(parser.parse_args(argv).sweep)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    counted = ", ".join(f"{len(document[kind])} {kind}" for kind in KINDS)
    print(f"{FILE}: {counted}; run them: dvc repro {FOLDER}/dvc.yaml, or python -m flows.frontier")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
