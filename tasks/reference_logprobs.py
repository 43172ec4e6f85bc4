"""Stage reference_logprobs: what the frozen reference thinks of every ranked answer; computed once, kept by row.

A change of learning rate, β or loss recomputes nothing. Several processes (torchrun) share the rows. Where answers
carry log-probabilities of their sampling, and the reference is what sampled them, the two must agree: a server that
served other weights is found here.
"""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

import pyarrow as pa

from rankwise.rows import RowTable, table_writer
from rankwise.types import Row, UserError
from tasks.params import param
from tasks.stage import Stage, is_first_rank, main

if TYPE_CHECKING:
    from rankwise.reference import Scored
    from rankwise.rendering import Renderer, TokenRow
    from rankwise.scoring import LogpModel
    from rankwise.sorted_tables import SortedTable

WINDOW_ROWS = 4096  # rows in memory; batches are made within them
COLUMNS = [
    ("id", pa.string()),
    ("key", pa.string()),
    ("logps", pa.list_(pa.float32())),
    ("tokens", pa.list_(pa.int32())),
]

# Nats a token between the sampling engine's log-probabilities and the reference's, over all answers. Chosen to be far
# above an engine's rounding, whatever its precision, and not measured; nearly equal weights pass under it.
MOST_GAP = 0.1


@dataclass(frozen=True, kw_only=True)
class Params:
    max_prompt_tokens: int = param(0, "a longer prompt loses its beginning; 0 is no limit; dpo cuts alike", ge=0)
    max_answer_tokens: int = param(0, "a longer answer loses its end; 0 is no limit; dpo cuts alike", ge=0)
    precision: Literal["fp32", "medium", "bf16"] = param("fp32", "numerics; dpo trains in the same")
    max_tokens: int = param(8192, "token positions a forward pass", ge=1)


@dataclass(frozen=True, kw_only=True)
class Paths:
    preferences: Path = Path("data/preferences.parquet")
    model: Path = Path("models/sft")
    reference: Path = Path("data/reference_logprobs.parquet")
    report: Path = Path("reports/reference_logprobs")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.checkpoints import load_causal_lm, load_tokenizer
    from rankwise.fingerprint import weights_digest
    from rankwise.parallel import place
    from rankwise.rendering import Renderer
    from rankwise.scoring import LogpModel

    ranked = RowTable(paths.preferences)
    if not len(ranked):
        raise UserError(
            f"{paths.preferences}: no ranked row, so there is nothing to score; run stage preferences again"
        )
    renderer = Renderer(
        load_tokenizer(paths.model),
        max_prompt_tokens=params.max_prompt_tokens,
        max_answer_tokens=params.max_answer_tokens,
    )
    weights = weights_digest(paths.model)
    module = place(LogpModel(load_causal_lm(paths.model)), params.precision)
    began = time.monotonic()
    found = Summary(weights)
    with _table(params, paths, weights) as table:
        for rows, tokens, scored in _scored(ranked, renderer, module, weights, params, stage, found):
            if table is not None:
                table.add(_part(scored))
            for row, ids, one in zip(rows, tokens, scored, strict=True):
                found.add(row, ids, one)
    stage.timings["rows_per_second"] = found.computed / (time.monotonic() - began)
    stage.timings["rows_computed"] = found.computed
    stage.log(f"{found.computed} of {len(ranked)} rows computed now, the rest were in the store")
    stage.tracker.dataset(paths.preferences, "preferences")
    metrics = found.as_json()
    stage.finish(metrics)
    if metrics.get("sampling_gap_mean", 0.0) > MOST_GAP:
        raise UserError(
            f"the answers' sampling log-probs and the reference's own differ by {metrics['sampling_gap_mean']:.3g} "
            f"nats a token over {metrics['sampling_gap_answers']} answers (the limit is {MOST_GAP}): what sampled "
            f"them was not {paths.model}. Most likely a server still had other weights: restart it with {paths.model}, "
            "set another rollouts.seed (the store keeps these answers under theirs), and run stage rollouts again"
        )


def _table(params: Params, paths: Paths, weights: str) -> AbstractContextManager[SortedTable | None]:
    """The table to add to; None on all processes but the first."""
    # What the numbers belong to travels with them: dpo refuses another reference, and cuts rows at the same lengths.
    meta = {
        "reference": weights,
        "precision": params.precision,
        "max_prompt_tokens": str(params.max_prompt_tokens),
        "max_answer_tokens": str(params.max_answer_tokens),
    }
    schema = pa.schema(COLUMNS).with_metadata(meta)
    return table_writer(paths.reference, schema, key="id", unique=True) if is_first_rank() else nullcontext()


def _scored(
    ranked: RowTable,
    renderer: Renderer,
    module: LogpModel,
    weights: str,
    params: Params,
    stage: Stage,
    found: Summary,
) -> Iterator[tuple[list[Row], list[TokenRow], list[Scored]]]:
    """The rows by windows, as text, as tokens and as the reference sees them."""
    from rankwise.reference import score_rows
    from rankwise.store import Store

    rows, number = iter(ranked), 0
    # Numbers come to the first process, which alone writes: another host may see another disk.
    with Store(stage.store("reference_logprobs")) if is_first_rank() else nullcontext() as store:
        while window := list(itertools.islice(rows, WINDOW_ROWS)):
            several = f", rows {number + 1} to {number + len(window)} of {len(ranked)}"
            number += len(window)
            tokens = [renderer.render(row) for row in window]
            scored, computed = score_rows(
                module,
                tokens,
                weights=weights,
                precision=params.precision,
                store=store,
                max_tokens=params.max_tokens,
                what="reference log-probs" + (several if len(ranked) > WINDOW_ROWS else ""),
            )
            found.computed += computed
            yield window, tokens, scored


def _part(scored: Sequence[Scored]) -> pa.Table:
    columns = [pa.array([getattr(one, name) for one in scored], kind) for name, kind in COLUMNS]
    return pa.Table.from_arrays(columns, schema=pa.schema(COLUMNS))


class Summary:
    """Sums over the rows, as they pass; and how far the answers' sampling log-probs are from the reference's own.

    |Σ log π_sampling − Σ log π_ref| a token. Compared are answers that were drawn after these very prompt tokens from a
    model folder with these very weights (so not those of another round's policy, of a teacher, or of a prompt cut
    elsewhere), and that the reference saw whole. Both sides are at temperature 1 over the whole vocabulary, whatever
    the answers were drawn with.
    """

    def __init__(self, weights: str):
        self.computed = 0  # rows
        self._weights = weights
        self._counts: Counter[str] = Counter()
        self._logps, self._gap, self._largest = 0.0, 0.0, 0.0

    def add(self, row: Row, tokens: TokenRow, one: Scored) -> None:
        from rankwise.fingerprint import sampled_from

        counts = self._counts
        counts["rows"] += 1
        counts["answers"] += len(one.logps)
        counts["answer_tokens"] += sum(one.tokens)
        counts["cut_tokens"] += tokens.cut_tokens
        counts["boundary_merges"] += tokens.boundary_merges
        self._logps += sum(one.logps)
        if row.meta.get("sampled_from") != sampled_from(self._weights, tokens.prompt_ids):
            return
        for answer, ids, logp in zip(row.answers, tokens.answers_ids, one.logps, strict=True):
            if answer.source == "policy" and answer.logps and answer.token_ids == ids:
                gap = abs(sum(answer.logps) - logp)
                self._gap += gap
                self._largest = max(self._largest, gap / len(ids))
                counts["compared"] += 1
                counts["compared_tokens"] += len(ids)

    def as_json(self) -> dict[str, float]:
        counts = self._counts
        names = ("rows", "answers", "answer_tokens", "cut_tokens", "boundary_merges")
        found = {name: counts[name] for name in names} | {"logp_per_token": self._logps / counts["answer_tokens"]}
        if counts["compared"]:
            found |= {
                "sampling_gap_mean": self._gap / counts["compared_tokens"],
                "sampling_gap_max": self._largest,
                "sampling_gap_answers": counts["compared"],
            }
        return found


if __name__ == "__main__":
    raise SystemExit(main("reference_logprobs", Params, Paths, run))
