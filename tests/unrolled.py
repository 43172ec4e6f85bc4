"""dvc.yaml as DVC reads it, without DVC: `foreach` unrolled and names filled in from params.yaml.

tests/test_dvc_yaml.py holds this against DVC's own reading.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parent.parent


def stages(params: dict[str, Any] | None = None) -> dict[str, dict[str, Any]]:
    """Every stage by its address ("sft", "dpo@2"): cmd, deps, outs, metrics, plots, params."""
    params = params or yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))
    found = {}
    for name, stage in yaml.safe_load((ROOT / "dvc.yaml").read_text(encoding="utf-8"))["stages"].items():
        if "foreach" not in stage:
            found[name] = _filled(stage, params)
            continue
        for key, item in _value(stage["foreach"].strip("${}"), params).items():
            found[f"{name}@{key}"] = _filled(stage["do"], {**params, "key": key, "item": item})
    return found


def one_round() -> dict[str, dict[str, Any]]:
    """The stages of the shipped params.yaml, which has one round, by their plain names."""
    return {address.removesuffix("@1"): stage for address, stage in stages().items()}


def _filled(value: Any, known: dict[str, Any]) -> Any:
    if isinstance(value, dict):
        return {_filled(name, known): _filled(item, known) for name, item in value.items()}
    if isinstance(value, list):
        return [_filled(item, known) for item in value]
    if isinstance(value, str):
        return re.sub(r"\$\{([^}]+)\}", lambda found: str(_value(found[1], known)), value)
    return value


def _value(dotted: str, known: dict[str, Any]) -> Any:
    for name in dotted.split("."):
        known = known[name]
    return known
