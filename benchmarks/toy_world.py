"""Does training reach the policy that theory says is best? A world whose answers can be listed, so that it is known.

    python -m benchmarks.toy_world
    python -m benchmarks.toy_world --figure docs/figures/toy_world.png

E2 by enumeration against what DPO, Plackett-Luce DPO and policy gradients end at, all from the reference, each at
several β; how far implicit rewards and reward models recover the true rewards (E3, E4); autograd against E7; and how
the distance falls with the number of sampled preferences. Policies: a table, and a Llama of about 5,000 weights.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks import cli, report
from benchmarks.arguments import place

COLUMNS = ("policy", "method", "β", "total variation", "KL(π‖π*)", "E1", "below its best", "reward error", "Spearman")


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.toy_world", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--json", nargs="?", const="-", type=place, metavar="FILE", help="the record as JSON: to stdout, or to FILE"
    )
    parser.add_argument("--figure", type=place, metavar="FILE", help="draw the figure, a PNG")
    parser.add_argument("--quick", action="store_true", help="a smaller world, little training: to see that it runs")
    parser.add_argument("--seed", type=int, default=0, help="of rewards, reference and draws (0)")
    options = parser.parse_args(arguments)
    from benchmarks import toy_figure, toy_runs

    options.device = "cpu"
    machine = cli.machine(options, ceiling=False)
    found = toy_runs.everything(toy_runs.QUICK if options.quick else toy_runs.Effort(), seed=options.seed)
    record = {"benchmark": "toy_world", "options": cli.told(options), "machine": machine, **found}
    if options.figure:
        toy_figure.draw(record, Path(options.figure))
    report.emit(record, _title(record), COLUMNS, [_line(one) for one in record["results"]], options.json)
    for line in _further(record):
        report.say(line)


def _title(record: dict[str, Any]) -> str:
    world = record["world"]
    return (
        f"toy world: {world['prompts']} prompts × {world['answers']} answers, a Llama of {world['weights']:,} weights"
    )


def _line(one: dict[str, Any]) -> list[str]:
    return [
        one["policy"],
        one["method"],
        f"{one['beta']:g}",
        f"{one['total_variation']:.1e}",
        f"{one['kl']:.1e}",
        f"{one['e1']:.5f}",
        f"{one['e1_best'] - one['e1']:.1e}",
        f"{one['reward_error']:.1e}",
        f"{one['rank_correlation']:.4f}",
    ]


def _further(record: dict[str, Any]) -> list[str]:
    """Reward models, E7 and sampled preferences, a line each."""
    lines = [
        f"reward model (E4), {one['policy']}, K = {one['k']}: off by {one['reward_error']:.1e} at most, "
        f"Spearman {one['rank_correlation']:.4f}"
        for one in record["reward_models"]
    ]
    lines += [f"E7 against autograd, {kind}: {gap:.1e}" for kind, gap in record["gradients"].items()]
    for one in record["sampled"]:
        lines.append(
            f"sampled, K = {one['k']}, β = {one['beta']:g}, {one['comparisons']:,} comparisons: total variation "
            f"{fmean(one['total_variation']):.1e}, KL {fmean(one['kl']):.1e}"
        )
    return lines


if __name__ == "__main__":
    cli.command(main)
