"""What training did to each ranked row: whether the best answer rose or the worst fell, and which labels it resisted.

Of every answer the change h_k = log π(y_k) − log π_ref(y_k) is known, nats, best answer first. The margin of a row is
h_1 − h_K: what the best answer rose by, plus what the worst fell by. Mean and spread of all K changes tell apart what
the loss cannot see, a constant added to each (E3, E6), from what it can.

Numbers in, numbers out: no model, no text.

Example:
    found = summary([row for row in rows if row.split == "held_out"])
    found.per_answer.chosen.mean  # nats; below 0: the best answers' log-probability fell
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass

import numpy as np

from rankwise.evaluation import Estimate, mean, share

CASES = {  # direction of the best answer's and of the worst answer's change
    (1, -1): "chosen up, rejected down",
    (1, 1): "both up",
    (-1, -1): "both down",
    (-1, 1): "chosen down, rejected up",
}
UNMOVED = "unmoved"  # one of the two did not change at all


@dataclass(frozen=True, kw_only=True)
class Trained:
    """A ranked row, best answer first, before and after training; tuples hold one number an answer."""

    id: str
    split: str  # "train" | "held_out"
    reference: tuple[float, ...]  # Σ log π_ref(token), nats
    policy: tuple[float, ...]  # Σ log π(token), nats
    tokens: tuple[int, ...]  # length, end token included
    ranks: tuple[int, ...]  # 0 is best; equal numbers tie
    rewards: tuple[float, ...]  # implicit rewards as the loss compares them, β · nats
    loss: float  # nats
    strengths: tuple[float, ...] = ()  # the judge's log-strengths, nats; () where some answer has none
    drawn: bool = False  # whether the reference itself drew all these answers

    @property
    def changes(self) -> tuple[float, ...]:
        """h_k, nats."""
        return tuple(after - before for after, before in zip(self.policy, self.reference))

    @property
    def changes_per_token(self) -> tuple[float, ...]:
        """h_k / n_k, nats a token."""
        return tuple(change / tokens for change, tokens in zip(self.changes, self.tokens))

    @property
    def case(self) -> str:
        """Which way the best and the worst answer went."""
        return CASES.get((int(np.sign(self.changes[0])), int(np.sign(self.changes[-1]))), UNMOVED)

    @property
    def reward_margin(self) -> float:
        """Implicit reward of the best answer over the worst, β · nats; below 0 the policy contradicts the label."""
        return self.rewards[0] - self.rewards[-1]

    @property
    def gap(self) -> float | None:
        """The judge's log-odds for the best answer over the worst, nats; None where it gave none."""
        return self.strengths[0] - self.strengths[-1] if self.strengths else None

    @property
    def mean_tokens(self) -> float:
        return sum(self.tokens) / len(self.tokens)

    @property
    def longer_by(self) -> int:
        """Tokens of the best answer minus those of the worst."""
        return self.tokens[0] - self.tokens[-1]

    @property
    def accuracy(self) -> float:
        """Share of ranked pairs that the implicit rewards order rightly; equal rewards, as at the start, one half."""
        pairs = [(i, j) for i, a in enumerate(self.ranks) for j, b in enumerate(self.ranks) if a < b]
        signs = [np.sign(self.rewards[i] - self.rewards[j]) for i, j in pairs]
        return float(np.mean([(1 + sign) / 2 for sign in signs]))

    def likelier(self, logps: Sequence[float], *, per_token: bool) -> bool:
        """Whether a model gives the best answer more log-probability than the worst, in sum or a token."""
        best, worst = ((logps[k] / self.tokens[k] if per_token else logps[k]) for k in (0, -1))
        return best > worst

    def flip(self, *, per_token: bool) -> str:
        """What training did to the order of best and worst by likelihood: kept, "mended" or "broken"."""
        before, after = (self.likelier(logps, per_token=per_token) for logps in (self.reference, self.policy))
        if before == after:
            return "kept right" if after else "kept wrong"
        return "mended" if after else "broken"


# Summaries -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Moved:
    """How far answers moved, means over rows in one unit."""

    chosen: Estimate  # change of the best answer
    rejected: Estimate  # change of the worst
    margin: Estimate  # their difference
    common: Estimate  # mean change of all K answers
    spread: Estimate  # standard deviation of the K changes about their mean

    @property
    def chosen_share(self) -> float | None:
        """The best answer's signed part of the margin; the worst's is one minus it. None where there is no margin."""
        return self.chosen.mean / self.margin.mean if self.margin.mean else None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All rows of a split, or of a bin."""

    rows: int
    per_answer: Moved  # nats
    per_token: Moved  # nats a token
    in_loss: Moved  # β · nats: implicit rewards as the loss compares them
    cases: dict[str, float]  # share of rows
    chosen_fell: Estimate  # share of rows
    rejected_fell: Estimate
    accuracy: Estimate  # of ranked pairs, by implicit reward; 0.5 while policy = reference
    kl: Estimate | None  # KL(π_ref‖π), nats an answer, over rows that the reference drew; None where there is none
    drawn: float  # share of rows that the reference drew


def summary(rows: Sequence[Trained]) -> Summary:
    """Means over rows; raises ValueError where there is no row."""
    drawn = [row for row in rows if row.drawn]
    cases = [row.case for row in rows]
    return Summary(
        rows=len(rows),
        per_answer=_moved([row.changes for row in rows]),
        per_token=_moved([row.changes_per_token for row in rows]),
        in_loss=_moved([row.rewards for row in rows]),
        cases={case: cases.count(case) / len(rows) for case in (*CASES.values(), UNMOVED)},
        chosen_fell=share(sum(row.changes[0] < 0 for row in rows), len(rows)),
        rejected_fell=share(sum(row.changes[-1] < 0 for row in rows), len(rows)),
        accuracy=mean([row.accuracy for row in rows]),
        # E_{y~π_ref}[log π_ref − log π], the mean over the answers that π_ref drew
        kl=mean([-float(np.mean(row.changes)) for row in drawn]) if drawn else None,
        drawn=len(drawn) / len(rows),
    )


def _moved(values: Sequence[Sequence[float]]) -> Moved:
    return Moved(
        chosen=mean([row[0] for row in values]),
        rejected=mean([row[-1] for row in values]),
        margin=mean([row[0] - row[-1] for row in values]),
        common=mean([float(np.mean(row)) for row in values]),
        spread=mean([float(np.std(row)) for row in values]),
    )


def by_rank(rows: Sequence[Trained]) -> dict[int, tuple[int, float, float]]:
    """Rank -> how many answers have it, their mean change in nats and in nats a token; ties share a rank."""
    found: dict[int, list[tuple[float, float]]] = {}
    for row in rows:
        for rank, *change in zip(row.ranks, row.changes, row.changes_per_token):
            found.setdefault(rank, []).append(tuple(change))
    return {rank: (len(found[rank]), *map(float, np.mean(found[rank], axis=0))) for rank in sorted(found)}


# Bins ----------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Bin:
    """Rows alike in one respect."""

    low: float  # least and largest value of that respect among them
    high: float
    found: Summary


def quantile_bins(rows: Sequence[Trained], key: Callable[[Trained], float | None], count: int) -> list[Bin]:
    """Rows cut into at most count bins of about equal size by a number; rows without one are left out.

    Equal numbers share a bin, so there are fewer bins where many rows are alike.
    """
    known = [(key(row), row) for row in rows if key(row) is not None]
    if not known:
        return []
    values = np.array([value for value, _ in known], dtype=np.float64)
    inner = np.unique(np.quantile(values, np.arange(1, count) / count))
    places = np.searchsorted(inner, values, side="right")
    return [_bin([known[n] for n in np.flatnonzero(places == place)]) for place in np.unique(places)]


def sign_bins(rows: Sequence[Trained], key: Callable[[Trained], float]) -> list[Bin]:
    """Rows whose number is below, at and above zero; bins without a row are left out."""
    signs = [[(key(row), row) for row in rows if np.sign(key(row)) == sign] for sign in (-1, 0, 1)]
    return [_bin(known) for known in signs if known]


def _bin(known: Sequence[tuple[float, Trained]]) -> Bin:
    values = [value for value, _ in known]
    return Bin(low=min(values), high=max(values), found=summary([row for _, row in known]))


# Single rows ---------------------------------------------------------------------------------------------------------


def contradicted(rows: Sequence[Trained]) -> list[Trained]:
    """Rows whose best answer the policy still holds below the worst, the surest first."""
    return sorted((row for row in rows if row.reward_margin < 0), key=lambda row: (row.reward_margin, row.id))


def flips(rows: Sequence[Trained], *, per_token: bool) -> dict[str, int]:
    """How many rows training mended, broke, or left as the reference had them; by likelihood."""
    told = [row.flip(per_token=per_token) for row in rows]
    return {kind: told.count(kind) for kind in ("kept right", "mended", "broken", "kept wrong")}


def broken(rows: Sequence[Trained], *, per_token: bool) -> list[Trained]:
    """Rows that the reference had in the label's order and the policy has not, the surest first."""
    return sorted(
        (row for row in rows if row.flip(per_token=per_token) == "broken"), key=lambda row: (row.reward_margin, row.id)
    )


def as_numbers(found: Summary) -> dict[str, object]:
    """A summary as a report keeps it."""
    told = asdict(found)
    for unit in ("per_answer", "per_token", "in_loss"):
        told[unit]["chosen_share"] = getattr(found, unit).chosen_share
    return {name: value for name, value in told.items() if value is not None}
