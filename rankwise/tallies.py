"""What an optimizer step comes to: losses and stats summed over its micro-batches and over all processes.

Letters: B prompts of a micro-batch.
"""

from __future__ import annotations

import torch
from torch import Tensor

from rankwise.learners import RowLosses
from rankwise.parallel import Processes


class Tally:
    """Losses and stats of one step, summed over its micro-batches; on the device, so that no micro-batch waits."""

    def __init__(self) -> None:
        self._rows: list[tuple[tuple[str, ...], Tensor]] = []
        self._sums: dict[str, Tensor] = {}
        self._padding: list[float] = [0.0, 0.0]  # summed, and over how many micro-batches

    def add(self, result: RowLosses, *, keep: float, padding: float) -> None:
        # A process without a row of its own in this step still brings every name to the common sum, with nothing.
        for name, values_B in {"loss": result.loss_B.detach(), **result.stats}.items():
            mine = values_B.double().sum() if keep else values_B.new_zeros((), dtype=torch.float64)
            self._sums[name] = self._sums[name] + mine if name in self._sums else mine
        if keep:
            self._rows.append((result.ids, result.loss_B.detach()))
            self._padding = [self._padding[0] + padding, self._padding[1] + 1]

    def losses(self) -> dict[str, float]:
        """Row id -> loss, of this process's rows."""
        return {row_id: loss for ids, loss_B in self._rows for row_id, loss in zip(ids, loss_B.tolist())}

    def total(
        self, here: Processes, told: list[float], *, total_weight: float, rows: int
    ) -> tuple[dict[str, float], list[float]]:
        """Means over the whole step, and what the processes told one another, summed: one exchange for both."""
        names = sorted(self._sums)
        sums = torch.stack([self._sums[name] for name in names]).cpu()
        extra = torch.tensor([*self._padding, *map(float, told)], dtype=torch.float64)
        values = here.total(torch.cat([sums, extra])).tolist()
        means = {name: value / (total_weight if name == "loss" else rows) for name, value in zip(names, values)}
        padding, parts, *told = values[len(names) :]
        return means | {"padding_fraction": padding / parts}, told
