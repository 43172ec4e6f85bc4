"""Stage frontier: the points of a sweep side by side: what reward each method buys for how much KL.

Reads the evaluation of every point that sweeps/params.yaml names. Seeds of one setting become one row with an interval;
rows of one method become a curve, and curves are compared where they have spent the same KL.
"""

from __future__ import annotations

import csv
import io
import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from rankwise.evaluation import Estimate, over_seeds
from rankwise.json_text import as_written
from rankwise.rows import write_aside
from rankwise.types import UserError
from tasks.params import param, read_yaml
from tasks.stage import Stage, main, read_json

_ESTIMATE = ("mean", "low", "high")
NEAR = 2.0  # a point says something about KLs so many times larger or smaller
SFT = "sft"  # the method that is no method: the model that all others start from
KL_GRID = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)  # nats a sequence, at which curves are compared
MEASURES = {  # name -> (dotted name in an evaluation's metrics, heading)
    "kl": ("kl", "KL, nats"),
    "gold_reward": ("gold_reward.policy", "gold reward"),
    "reward": ("reward.policy", "judge's reward"),
    "positive_share": ("positive_share.policy", "positive (gold)"),
    "win_rate_gold": ("win_rate.gold", "win rate (gold)"),
    "win_rate_judge": ("win_rate.judge", "win rate (judge)"),
    "win_rate_gold_at_equal_length": ("win_rate_length_controlled.gold", "at equal length (gold)"),
    "win_rate_gold_over_data": ("win_rate_over_data.gold.policy", "win rate over the data (gold)"),
    "win_rate_judge_over_data": ("win_rate_over_data.judge.policy", "win rate over the data (judge)"),
    "preference_accuracy": ("preference_accuracy", "preference accuracy"),
    "words": ("length.policy", "words"),
    "distinct_2": ("distinct_2", "distinct-2 over SFT's"),
    "data_perplexity": ("data_perplexity.policy", "perplexity of the data"),
}
SHARES = {name for name in MEASURES if name.startswith(("win_rate", "positive", "preference"))}


@dataclass(frozen=True, kw_only=True)
class Params:
    reward: Literal["gold_reward", "positive_share", "reward"] = param(
        "gold_reward", "what the figure sets against KL: gold's mean score, its share of positives, the judge's score"
    )


@dataclass(frozen=True, kw_only=True)
class Paths:
    sweep: Path = Path("sweeps/params.yaml")
    evaluations: Path = Path("sweeps/frontier/evaluations")
    report: Path = Path("sweeps/frontier/frontier")


@dataclass(frozen=True, kw_only=True)
class Setting:
    """One value of a method's knob (or none) at one sampling temperature, over its seeds."""

    method: str
    value: float | None
    temperature: float
    seeds: int
    found: Mapping[str, Estimate]  # by the names of MEASURES, those that the evaluations hold


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from tasks import frontier_plots as plots

    sweep = read_yaml(paths.sweep)
    every, missing = settings(sweep, paths.evaluations)
    if missing:
        stage.log(f"{len(missing)} points have no evaluation and are left out: {', '.join(missing[:10])}")
    if not every:
        raise UserError(
            f"{paths.evaluations}: none of the points of {paths.sweep} is evaluated; run them: python -m flows.frontier"
        )
    own = [one for one in every if one.temperature == _own_temperature(sweep)]
    _check_reward(params.reward, own)
    labels = sweep["labels"]
    equal = at_equal_kl(own, params.reward)
    heading = MEASURES[params.reward][1]
    _write(paths.report / "points.csv", _csv(every))
    _write(paths.report / "frontier.md", _markdown(sweep, own, equal, heading, missing))
    plots.frontier(own, labels, params.reward, heading, stage.plots / "frontier.png")
    if len({one.temperature for one in every}) > 1:
        plots.temperatures(every, labels, stage.plots / "temperatures.png")
    stage.tracker.table("points", _records(every))
    stage.finish(
        {
            "points": sum(one.seeds for one in every),
            "missing": len(missing),
            "reward_at_kl": {
                name: {f"{kl:g}": one.as_dict() for kl, one in found.items()} for name, found in equal.items() if found
            },
        }
    )


def _check_reward(reward: str, own: Sequence[Setting]) -> None:
    """Raises UserError where no evaluation holds what the figure is to show."""
    present = [name for name in ("gold_reward", "positive_share", "reward") if any(name in one.found for one in own)]
    if reward not in present:
        raise UserError(
            f"frontier.reward is {reward!r}, and the evaluations hold {', '.join(present) or 'no score at all'} "
            "(evaluate.gold may be null, or a judge compares and does not score); "
            + ("set it to one of these" if present else "name a judge that scores answers in evaluate.judge or gold")
        )


def settings(sweep: Mapping[str, Any], evaluations: Path) -> tuple[list[Setting], list[str]]:
    """Every setting of the sweep in its order, seeds together; and the names of points without an evaluation."""
    groups: dict[tuple, list[dict[str, Any]]] = defaultdict(list)
    missing = []
    for key, point in sweep["evaluations"].items():
        metrics = evaluations / key / "metrics.json"
        if metrics.is_file():
            groups[point["method"], point["value"], point["temperature"]].append(read_json(metrics))
        else:
            missing.append(key)
    with as_written(evaluations, "evaluate the points again: python -m flows.frontier"):
        return [_setting(*group, reports) for group, reports in groups.items()], missing


def _setting(method: str, value: float | None, temperature: float, reports: Sequence[dict[str, Any]]) -> Setting:
    found = {}
    for name, (dotted, _) in MEASURES.items():
        values = [estimate for report in reports if (estimate := _estimate(report, dotted)) is not None]
        if len(values) == len(reports):
            one = over_seeds(values)
            found[name] = clipped(one) if name in SHARES else one
    return Setting(method=method, value=value, temperature=temperature, seeds=len(reports), found=found)


def clipped(share: Estimate) -> Estimate:
    """A share is never below 0 or above 1, whatever a normal interval says."""
    return Estimate(mean=share.mean, low=max(0.0, share.low), high=min(1.0, share.high))


def _estimate(report: Mapping[str, Any], dotted: str) -> Estimate | None:
    value: Any = report
    for name in dotted.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    if dotted == "distinct_2" and value is not None:
        # Both models' texts are cut to one length there, another one in each report: only the ratio is comparable.
        value = value["policy"] / value["reference"] if value["reference"] else None
    if isinstance(value, Mapping):
        return Estimate(**{name: value[name] for name in ("mean", "low", "high")})
    return None if value is None else Estimate(mean=value, low=value, high=value)


def at_equal_kl(every: Sequence[Setting], reward: str) -> dict[str, dict[float, Estimate]]:
    """Each method's reward where it has spent KL_GRID nats, between its two nearest points, linear in the root of KL.

    Reward grows about as that root, so a straight line in KL would call every method poor that has no point near by. A
    method's curve begins with the SFT model at KL 0. Nothing is said beyond its farthest point, nor where none of its
    own points is within a factor of two.
    """
    start = [one for one in every if one.method == SFT and reward in one.found]
    found = {}
    for method in dict.fromkeys(one.method for one in every if one.method != SFT):
        curve = sorted(
            (one for one in [*start, *every] if one.method in (method, SFT) and {"kl", reward} <= one.found.keys()),
            key=lambda one: one.found["kl"].mean,
        )
        found[method] = {kl: point for kl in KL_GRID if (point := _between(curve, kl, reward)) is not None}
    return found


def _between(curve: Sequence[Setting], kl: float, reward: str) -> Estimate | None:
    for left, right in itertools.pairwise(curve):
        a, b = (max(0.0, one.found["kl"].mean) for one in (left, right))
        if a <= kl <= b and b > a and any(other / NEAR <= kl <= other * NEAR for other in (a, b)):
            share = (math.sqrt(kl) - math.sqrt(a)) / (math.sqrt(b) - math.sqrt(a))
            ends = left.found[reward], right.found[reward]
            return Estimate(**{n: (1 - share) * getattr(ends[0], n) + share * getattr(ends[1], n) for n in _ESTIMATE})
    return None


def in_short(sweep: Mapping[str, Any], every: Sequence[Setting], reward: str) -> str:
    """A line a setting under its method's name, within 80 columns: what it cost, what it brought."""
    wins = next((n for n in ("win_rate_gold", "win_rate_judge") if any(n in one.found for one in every)), "")
    shown = [name for name in ("kl", reward, wins, "words") if any(name in one.found for one in every)]
    own = [one for one in every if one.temperature == _own_temperature(sweep)]
    rows = [("", ["", *(MEASURES[name][1] for name in shown)])]
    for one in own:
        knob = "" if one.value is None else f"{sweep['knobs'][one.method].rpartition('.')[2]} {one.value:g}"
        rows.append((sweep["labels"][one.method], [knob, *(_briefly(one.found.get(name)) for name in shown)]))
    widths = [max(len(cells[n]) for _, cells in rows) for n in range(len(shown) + 1)]
    lines, last = [], ""
    for label, cells in rows:
        if label != last:
            lines.append(f"  {label}")
            last = label
        knob, *values = cells
        lines.append("    " + "  ".join([knob.ljust(widths[0]), *(v.rjust(w) for v, w in zip(values, widths[1:]))]))
    return "\n".join(lines)


def _own_temperature(sweep: Mapping[str, Any]) -> float:
    """The temperature of the points that are no part of a curve over temperatures: each setting's first."""
    return next(iter(sweep["evaluations"].values()))["temperature"]


def _records(every: Sequence[Setting]) -> list[dict[str, Any]]:
    records = []
    for one in every:
        record = {"method": one.method, "value": one.value, "temperature": one.temperature, "seeds": one.seeds}
        for name, estimate in one.found.items():
            record |= {name: estimate.mean, f"{name}_low": estimate.low, f"{name}_high": estimate.high}
        records.append(record)
    return records


def _csv(every: Sequence[Setting]) -> str:
    records, text = _records(every), io.StringIO()
    columns = list(dict.fromkeys(name for record in records for name in record))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(records)
    return text.getvalue()


def _markdown(
    sweep: Mapping[str, Any], own: Sequence[Setting], equal: Mapping, heading: str, missing: Sequence[str]
) -> str:
    """Two tables: every setting, and the curves where they have spent the same KL."""
    names = [name for name in MEASURES if any(name in one.found for one in own)]
    lines = [f"# Sweep {sweep['sweep']}", "", "Means over seeds and prompts with 95 % intervals.", ""]
    lines += _table(["method", "knob", "value", "seeds", *(MEASURES[name][1] for name in names)])
    for one in own:
        cells = [_shown(one.found.get(name)) for name in names]
        value = "" if one.value is None else f"{one.value:g}"
        knob = sweep["knobs"].get(one.method, "")
        lines.append(_line([sweep["labels"][one.method], knob, value, str(one.seeds), *cells]))
    grid = [kl for kl in KL_GRID if any(kl in found for found in equal.values())]
    lines += ["", f"## {heading[:1].upper()}{heading[1:]} at equal KL", ""]
    lines += _table(["method", *(f"{kl:g} nats" for kl in grid)])
    for method, found in equal.items():
        lines.append(_line([sweep["labels"][method], *(_shown(found.get(kl)) for kl in grid)]))
    if missing:
        lines += ["", f"Without an evaluation: {', '.join(missing)}."]
    return "\n".join(lines) + "\n"


def _table(columns: Sequence[str]) -> list[str]:
    return [_line(columns), "|" + "---|" * len(columns)]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _shown(estimate: Estimate | None) -> str:
    if estimate is None:
        return ""
    if estimate.low == estimate.high:
        return f"{estimate.mean:.3g}"
    return f"{estimate.mean:.3g} [{estimate.low:.3g}, {estimate.high:.3g}]"


def _briefly(estimate: Estimate | None) -> str:
    """4.2 ± 0.6: means over seeds have intervals that are even to both sides."""
    if estimate is None:
        return ""
    half = (estimate.high - estimate.low) / 2
    return f"{estimate.mean:.3g} ± {half:.2g}" if half else f"{estimate.mean:.3g}"


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_aside(path, lambda aside: aside.write_text(text, encoding="utf-8"))


if __name__ == "__main__":
    raise SystemExit(main("frontier", Params, Paths, run))
