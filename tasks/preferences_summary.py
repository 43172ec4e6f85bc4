"""What stage preferences found and made of it, counted as rows pass."""

from __future__ import annotations

from array import array
from collections import Counter
from typing import TYPE_CHECKING, Any

import numpy as np

from rankwise.types import Row
from tasks.selection import SelectParams

if TYPE_CHECKING:
    from rankwise.ranking import Judged


class Summary:
    """What rows were found and what became of them; eight bytes a row in memory."""

    def __init__(self, select: SelectParams):
        self._select = select
        self.rows = self.unjudged_rows = self.tied = self.left_out = self.earlier = 0  # rows that are no ranking, …
        self.kept = self.held_out = 0
        self._counts, self._k = Counter(), Counter()
        self._bias, self._biases, self._gap, self._gaps = 0.0, 0, 0.0, 0
        self._longer_by = array("q")

    def add_judged(self, one: Judged) -> None:
        for bias in one.position_bias:
            self._bias, self._biases = self._bias + bias, self._biases + 1
        self._counts["invalid"] += one.invalid
        self._counts["unjudged"] += one.unjudged
        if one.most_circular_triads:  # of rows whose pairs are all known
            self._counts["circular"] += one.circular_triads
            self._counts["most_circular"] += one.most_circular_triads

    def add(self, row: Row, before: Row) -> None:
        """A row that is kept, and what it was before its part was selected."""
        answers = row.answers
        self.kept += 1
        self._k[len(answers)] += 1
        self._counts["with_ties"] += len({answer.rank for answer in answers}) < len(answers)
        self._longer_by.append(row.meta["longer_by"])
        if row.meta["split"] == "held_out":
            self.held_out += 1
        if row.meta["split"] == "train":
            self._counts["trained_answers"] += len(answers)
        self._counts["tops_changed"] += answers[0].text != before.answers[0].text
        if answers[0].strength is not None:
            self._gap += answers[0].strength - answers[-1].strength
            self._gaps += 1

    def as_json(self) -> dict[str, Any]:
        from rankwise.evaluation import mean, share

        counts = self._counts
        found = {
            "rows": self.kept,
            "held_out": self.held_out,
            "all_tied": self.tied,
            "unjudged_rows": self.unjudged_rows,
            "rows_with_ties": counts["with_ties"],
            "invalid_verdicts": counts["invalid"],
            "unjudged_answers": counts["unjudged"],
            "circular_triads": counts["circular"],
            "position_bias_mean": self._bias / self._biases if self._biases else 0.0,
            "strength_gap_mean": self._gap / self._gaps if self._gaps else 0.0,
            "k": {str(k): count for k, count in sorted(self._k.items())},
        }
        if counts["most_circular"]:
            # Kendall's coefficient of consistency over all of them
            found["consistency"] = 1 - counts["circular"] / counts["most_circular"]
        if any(self._longer_by):
            # Best against worst, one number a row: the pairs of a row are not independent.
            words = np.array(self._longer_by)
            found["better_is_longer"] = share(int((words > 0).sum()), int((words != 0).sum())).as_dict()
            found["longer_by"] = mean(words).as_dict()
        if self._select != SelectParams():
            found["selected"] = {
                "rows_left_out": self.left_out,
                "answers": counts["trained_answers"],
                "tops_changed": counts["tops_changed"],
            }
        return found
