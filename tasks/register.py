"""Stage register: hold the policy against its gates and register it in MLflow with its lineage.

registration.json is the record: what was registered, under which digests, which gates it passed. It depends on the
inputs alone, so the same policy gives the same bytes. The version in MLflow is a view of it: with MLflow down, the
stage still succeeds, and `python -m tasks.register` later registers the version, once however often it runs.
"""

from __future__ import annotations

import difflib
import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rankwise.json_text import as_written
from rankwise.rows import write_json
from rankwise.types import UserError
from tasks import lineage
from tasks.params import param
from tasks.stage import REBUILD, Stage, main, read_json


@dataclass(frozen=True, kw_only=True)
class Params:
    name: str = param("rankwise-policy", "name of the registered model")
    at_least: dict[str, float] = param(
        lambda: {"win_rate.judge.low": 0.5},
        "gates: metrics of the evaluation (dotted) and the least that each may be",
    )
    at_most: dict[str, float] = param(dict, "gates: metrics of the evaluation (dotted) and the most that each may be")
    log_weights: bool = param(False, "copy the weights into MLflow too; they are in DVC in any case")


@dataclass(frozen=True, kw_only=True)
class Paths:
    policy: Path = Path("models/policy")
    sft: Path = Path("models/sft")
    judge: Path = Path("models/reward_model")
    evaluation: Path = Path("reports/evaluate")
    report: Path = Path("reports/register")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    metrics = flatten(read_json(paths.evaluation / "metrics.json"))
    gates = check_gates(metrics, at_least=params.at_least, at_most=params.at_most)
    # A judge behind an API has no weights here; its replies are in the verdicts.
    digests = {
        "policy": lineage.md5_of(paths.policy),
        "sft": lineage.md5_of(paths.sft),
        "judge": lineage.md5_of(paths.judge) if paths.judge.exists() else None,
    }
    passed = all(gate["passed"] for gate in gates)
    record = {"name": params.name, "md5": digests, "metrics": metrics, "gates": gates, "passed": passed}
    write_json(paths.report / "registration.json", record)
    stage.finish({"gates": len(gates), "gates_passed": sum(gate["passed"] for gate in gates), "passed": int(passed)})
    shown = [show_gate(gate) for gate in gates]
    for line in shown:
        stage.log(f"gate {line}")
    stage.tracker.tags(lineage_tags(record))
    stage.tracker.note("\n".join(f"- {line}" for line in shown))
    _register(params, paths, record, stage)


def _register(params: Params, paths: Paths, record: dict[str, Any], stage: Stage) -> None:
    answer = stage.tracker.model(
        paths.policy,
        params.name,
        md5=record["md5"]["policy"],
        tags=lineage_tags(record),
        gates=[show_gate(gate) for gate in record["gates"]],
        metrics=record["metrics"],
        passed=record["passed"],
        copy_weights=params.log_weights,
    )
    if answer is None:
        print(
            f"warning: {params.name} is not in MLflow's registry (no tracking); {paths.report}/registration.json has "
            "everything; to register it later: python -m tasks.register",
            file=sys.stderr,
            flush=True,
        )
        return
    alias = f" as {answer['alias']}" if answer["alias"] else ", without an alias: a gate failed"
    said = f"{params.name} version {answer['version']} {'registered' if answer['new'] else 'was known'}{alias}"
    stage.log(said)
    stage.tracker.note(said)


def check_gates(
    metrics: dict[str, float], *, at_least: dict[str, float], at_most: dict[str, float]
) -> list[dict[str, Any]]:
    """Every gate with its metric's value and whether it holds; a bound itself passes.

    Raises UserError on a metric that the evaluation does not have.
    """
    gates = []
    for rule, bounds in (("at_least", at_least), ("at_most", at_most)):
        for name, bound in sorted(bounds.items()):
            if name not in metrics:
                close = difflib.get_close_matches(name, metrics, n=1, cutoff=0.5)
                hint = f"; did you mean {close[0]!r}?" if close else ""
                raise UserError(
                    f"register.{rule}.{name}: the evaluation has no such metric{hint} (it has {', '.join(metrics)})"
                )
            value = metrics[name]
            passed = value >= bound if rule == "at_least" else value <= bound
            gates.append({"metric": name, "rule": rule, "bound": bound, "value": value, "passed": passed})
    return gates


def failed_gates(report: Path = Paths.report) -> list[str]:
    """The gates that the registered policy failed, each in a line; none before there is one."""
    path = report / "registration.json"
    if not path.exists():
        return []
    found = read_json(path)
    with as_written(path, REBUILD):
        return [show_gate(gate) for gate in found["gates"] if not gate["passed"]]


def flatten(value: dict[str, Any], prefix: str = "") -> dict[str, float]:
    """The numbers of a metrics file under dotted names; what is no number is left out."""
    flat: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= flatten(item, f"{prefix}{key}.")
        elif isinstance(item, (int, float)) and not isinstance(item, bool):
            flat[f"{prefix}{key}"] = item
    return flat


def lineage_tags(record: dict[str, Any]) -> dict[str, str]:
    """What a version carries to be traced and rebuilt: commit, dvc.lock, and the md5 of every model involved."""
    tags = {
        "git.commit": lineage.git_commit(),
        "git.branch": os.environ.get("RANKWISE_BRANCH", ""),  # where a run in a checkout of its own leaves dvc.lock
        "dvc.lock_md5": lineage.lock_md5(),
        **{f"{model}_md5": md5 or "" for model, md5 in record["md5"].items()},
    }
    return {key: value for key, value in tags.items() if value}


def show_gate(gate: dict[str, Any]) -> str:
    """One gate on one line, as "win_rate.judge.low = 0.81, at least 0.5: passed"."""
    rule = gate["rule"].replace("_", " ")
    return (
        f"{gate['metric']} = {gate['value']:.4g}, {rule} {gate['bound']:g}: {'passed' if gate['passed'] else 'failed'}"
    )


if __name__ == "__main__":
    raise SystemExit(main("register", Params, Paths, run))
