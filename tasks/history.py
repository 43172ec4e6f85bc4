"""The headline numbers of every round so far: each evaluation takes over those of the one before and adds its own.

So the last round's report shows them all, and one more round evaluates one more policy. Round 0 is the SFT model, which
every round is compared with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from rankwise.json_text import as_written
from tasks.stage import REBUILD, read_json

EVEN = {"mean": 0.5, "low": 0.5, "high": 0.5}  # a model against itself
NONE = {"mean": 0.0, "low": 0.0, "high": 0.0}


def rounds_so_far(metrics: dict[str, Any], round_: int, earlier: Path) -> dict[str, dict[str, Any]]:
    """Numbers by round, {"0": …, "1": …}, the last one from metrics, the others from the report of the round before."""
    before = read_json(earlier)
    with as_written(earlier, REBUILD):
        known = dict(before.get("rounds") or {"0": _of_the_reference(before), "1": _of(before)})
    return {**known, str(round_): _of(metrics)}


def _of(metrics: dict[str, Any]) -> dict[str, Any]:
    found = {
        "win_rate": metrics.get("win_rate"),
        "kl": {name: metrics["kl"][name] for name in ("mean", "low", "high")},
        "length": metrics["length"]["policy"],
        "preference_accuracy": metrics.get("preference_accuracy"),
    }
    return {name: value for name, value in found.items() if value is not None}


def _of_the_reference(metrics: dict[str, Any]) -> dict[str, Any]:
    judged = {"win_rate": dict.fromkeys(metrics["win_rate"], EVEN)} if "win_rate" in metrics else {}
    return {**judged, "kl": NONE, "length": metrics["length"]["reference"]}
