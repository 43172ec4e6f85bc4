"""What sampled answers are like, counted as they pass: lengths, ends, diversity, duplicates."""

from __future__ import annotations

from array import array
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.evaluation import NGrams
from rankwise.types import Row


class Summary:
    """Lengths, finish reasons, diversity, duplicates, and what engines left out; some bytes an answer in memory.

    Args:
        eos: the end token of the tokenizer that the answers' ids are of; None where that is not known.
    """

    def __init__(self, *, eos: int | None):
        self._eos = eos
        self._answers, self._k = 0, 0
        self._reasons, self._engines, self._counts = Counter(), Counter(), Counter()
        self._lengths: dict[str | None, array] = defaultdict(lambda: array("i"))  # tokens, by finish reason
        self._different = array("i")  # how many of a row's answers differ, blanks at their ends aside
        self._grams = {n: NGrams(n) for n in (1, 2)}

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows as they are, counted."""
        for row in rows:
            self._add(row)
            yield row

    def _add(self, row: Row) -> None:
        self._k = self._k or len(row.answers)
        self._answers += len(row.answers)
        different = len({answer.text.strip() for answer in row.answers})
        self._different.append(different)
        self._counts["rows_with_duplicates"] += different < len(row.answers)
        self._counts["rows_all_alike"] += different == 1 < len(row.answers)
        for answer in row.answers:
            self._reasons[answer.finish_reason] += 1
            self._engines[answer.engine] += 1
            self._counts["eos"] += bool(answer.token_ids) and answer.token_ids[-1] == self._eos
            self._counts["empty"] += not answer.text.strip()
            self._counts["without_logps"] += answer.logps is None
            self._counts["without_token_ids"] += answer.token_ids is None
            if answer.token_ids is not None:
                self._lengths[answer.finish_reason].append(len(answer.token_ids))
            for grams in self._grams.values():
                grams.add(answer.text)

    def as_json(self) -> dict[str, Any]:
        lengths = np.sort(np.concatenate([np.array([], dtype=np.int32), *map(np.asarray, self._lengths.values())]))
        rows, different = len(self._different), sum(self._different)
        return {
            "prompts": rows,
            "answers": self._answers,
            "finish_reasons": dict(sorted(self._reasons.items())),
            "cut_share": self._reasons["length"] / self._answers,
            "eos_share": self._counts["eos"] / self._answers,
            "empty_share": self._counts["empty"] / self._answers,
            # Of the answers after the first of their row: 0 where all differ, 1 where each row says one thing.
            "duplicate_share": (self._answers - different) / max(1, self._answers - rows),
            "rows_with_duplicates": self._counts["rows_with_duplicates"],
            "rows_all_alike": self._counts["rows_all_alike"],
            "tokens_mean": int(lengths.sum()) / len(lengths) if len(lengths) else 0.0,
            "tokens_p95": int(lengths[int(0.95 * (len(lengths) - 1))]) if len(lengths) else 0,
            "distinct_1": self._grams[1].distinct,
            "distinct_2": self._grams[2].distinct,
            "without_token_ids": self._counts["without_token_ids"],
            "without_logps": self._counts["without_logps"],
            "engines": dict(sorted(self._engines.items())),
        }

    def draw(self, path: Path, *, title: str) -> None:
        """The figure; none where a server gave text alone."""
        from tasks import plots

        if any(self._lengths.values()):
            ended, cut = self._lengths["stop"], self._lengths["length"]
            plots.answers(ended, cut, self._different, path, k=self._k, title=title)
