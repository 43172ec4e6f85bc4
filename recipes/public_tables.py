"""Leaderboards of models and the tables of recipes.public_numbers: strengths, win rates, and text in columns."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from rankwise.evaluation import Estimate, share
from rankwise.strengths import davidson

GHOST = 0.5  # where somebody may have lost to the baseline always

Lines = Iterable[
    Mapping[str, Any]
]  # as rankwise.stored_lines reads them, with `models`: whose answers first and second are
Grid = list[list[str]]  # a head and rows


def board(judges: Mapping[str, Sequence[Mapping[str, Any]]]) -> Grid:
    """Models by Davidson strength (nats, mean zero) with its standard error, and by win rate; judge: its lines."""
    models = sorted({model for lines in judges.values() for line in lines for model in line["models"]})
    columns, head = [], ["model"]
    for name, lines in judges.items():
        wins_MM, ties_MM = tournament(lines, models)
        fit = davidson(wins_MM, ties_MM, ghost=GHOST)
        games_M = (wins_MM + wins_MM.T + ties_MM).sum(axis=1)
        rates_M = (wins_MM.sum(axis=1) + ties_MM.sum(axis=1) / 2) / np.maximum(games_M, 1)
        head += [f"{name}: strength", "error", "win rate", "verdicts"]
        columns.append((fit.strengths_M, fit.errors_M, rates_M, games_M))
    cells = lambda n: [
        cell
        for s, e, r, g in columns
        for cell in ([f"{s[n]:+.3f}", f"{e[n]:.3f}", f"{r[n]:.3f}", f"{g[n]:.0f}"] if g[n] else ["", "", "", "0"])
    ]
    return [head, *([models[n], *cells(n)] for n in np.argsort(-columns[0][0]))]


def tournament(lines: Lines, models: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """[M, M] wins of i over j (of a probability, that share), and ties.

    Of models, not of texts: two models may have given the same answer.
    """
    wins_MM, ties_MM = (np.zeros((len(models), len(models))) for _ in range(2))
    for line in lines:
        i, j = map(models.index, line["models"])
        if line.get("verdict") == "tie":
            ties_MM[i, j] += 1
            ties_MM[j, i] += 1
        else:
            wins_MM[i, j] += won(line)
            wins_MM[j, i] += 1 - won(line)
    return wins_MM, ties_MM


def win_rates(lines: Lines) -> dict[str, float]:
    """Of each model that stands first, over its verdicts; a tie is half a win."""
    outcomes: dict[str, list[float]] = defaultdict(list)
    for line in lines:
        outcomes[line["models"][0]].append(won(line))
    return {model: sum(mine) / len(mine) for model, mine in outcomes.items()}


def won(line: Mapping[str, Any]) -> float:
    """What the first answer got: 1, 0, of a tie one half, of log-odds the probability."""
    if "value" in line:
        return 1 / (1 + math.exp(-line["value"]))
    return {"A": 1.0, "tie": 0.5, "B": 0.0}[line["verdict"]]


# Text ----------------------------------------------------------------------------------------------------------------


def grid(rows: Grid) -> str:
    """Columns under one another, a line below the head."""
    widths = [max(len(row[n]) for row in rows) for n in range(len(rows[0]))]
    spaced = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows]
    return "\n".join([spaced[0], "  ".join("-" * width for width in widths), *spaced[1:]])


def share_of(hits: float, count: int) -> str:
    """Three decimals; "none" of nothing."""
    return f"{hits / count:.3f}" if count else "none"


def percents(shares: Sequence[str]) -> str:
    """Whole percents, from the smallest to the greatest of shares."""
    found = sorted(round(100 * float(share)) for share in shares if share != "none")
    return f"{found[0]}–{found[-1]} %" if found else "none"


def proportion(hits: float, count: int) -> str:
    """A share and its 95 % interval; "none" of nothing."""
    return estimate(share(hits, count) if count else None)


def estimate(found: Estimate | None) -> str:
    """A mean and its 95 % interval; "none" where there is nothing to take it of."""
    return "none" if found is None else f"{found.mean:.3f} {interval(found)}"


def interval(found: Estimate) -> str:
    """Of 95 %."""
    return f"[{found.low:.3f}, {found.high:.3f}]"
