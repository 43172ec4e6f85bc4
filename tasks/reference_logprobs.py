"""Stage reference_logprobs: what the frozen reference thinks of every ranked answer; computed once, kept by row.

A change of learning rate, β or loss recomputes nothing. Several processes (torchrun) share the rows. Where answers
carry log-probabilities of their sampling, and the reference is what sampled them, the two must agree: a server that
served other weights is found here.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankwise.rows import read_rows, write_table
from rankwise.types import Row, UserError
from tasks.params import param
from tasks.stage import Stage, is_first_rank, main

if TYPE_CHECKING:
    from rankwise.reference import Scored
    from rankwise.rendering import TokenRow

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
    import pyarrow as pa

    from rankwise.checkpoints import load_causal_lm, load_tokenizer
    from rankwise.fingerprint import weights_digest
    from rankwise.parallel import place
    from rankwise.reference import score_rows
    from rankwise.rendering import Renderer
    from rankwise.scoring import LogpModel
    from rankwise.store import Store

    ranked = read_rows(paths.preferences)
    if not ranked:
        raise UserError(
            f"{paths.preferences}: no ranked row, so there is nothing to score; run stage preferences again"
        )
    renderer = Renderer(
        load_tokenizer(paths.model),
        max_prompt_tokens=params.max_prompt_tokens,
        max_answer_tokens=params.max_answer_tokens,
    )
    rows = [renderer.render(row) for row in ranked]
    weights = weights_digest(paths.model)
    module = place(LogpModel(load_causal_lm(paths.model)), params.precision)
    began = time.monotonic()
    # Numbers come to the first process, which alone writes: another host may see another disk.
    with Store(stage.store("reference_logprobs")) if is_first_rank() else nullcontext() as store:
        scored, computed = score_rows(
            module, rows, weights=weights, precision=params.precision, store=store, max_tokens=params.max_tokens
        )
    stage.timings["rows_per_second"] = computed / (time.monotonic() - began)
    stage.timings["rows_computed"] = computed
    stage.log(f"{computed} of {len(rows)} rows computed now, the rest were in the store")
    table = pa.table(
        {
            "id": pa.array([one.id for one in scored], pa.string()),
            "key": pa.array([one.key for one in scored], pa.string()),
            "logps": pa.array([one.logps for one in scored], pa.list_(pa.float32())),
            "tokens": pa.array([one.tokens for one in scored], pa.list_(pa.int32())),
        }
    )
    # What the numbers belong to travels with them: dpo refuses another reference, and cuts rows at the same lengths.
    meta = {
        "reference": weights,
        "precision": params.precision,
        "max_prompt_tokens": str(params.max_prompt_tokens),
        "max_answer_tokens": str(params.max_answer_tokens),
    }
    if is_first_rank():
        write_table(paths.reference, table.replace_schema_metadata(meta))
    tokens = sum(sum(one.tokens) for one in scored)
    gaps = _sampling_gaps(ranked, rows, scored, weights)
    stage.tracker.dataset(paths.preferences, "preferences")
    stage.finish(
        {
            "rows": len(rows),
            "answers": sum(len(one.logps) for one in scored),
            "answer_tokens": tokens,
            "logp_per_token": sum(sum(one.logps) for one in scored) / tokens,
            "cut_tokens": sum(row.cut_tokens for row in rows),
            "boundary_merges": sum(row.boundary_merges for row in rows),
            **gaps,
        }
    )
    if gaps and gaps["sampling_gap_mean"] > MOST_GAP:
        raise UserError(
            f"the answers' sampling log-probs and the reference's own differ by {gaps['sampling_gap_mean']:.3g} nats a "
            f"token over {gaps['sampling_gap_answers']} answers (the limit is {MOST_GAP}): what sampled "
            f"them was not {paths.model}. Most likely a server still had other weights: restart it with {paths.model}, "
            "set another rollouts.seed (the store keeps these answers under theirs), and run stage rollouts again"
        )


def _sampling_gaps(
    ranked: Sequence[Row], rows: Sequence[TokenRow], scored: Sequence[Scored], weights: str
) -> dict[str, float]:
    """|Σ log π_sampling − Σ log π_ref| a token; empty where no answer can be compared.

    Compared are answers that were drawn after these very prompt tokens from a model folder with these very weights (so
    not those of another round's policy, of a teacher, or of a prompt cut elsewhere), and that the reference saw whole.
    Both sides are at temperature 1 over the whole vocabulary, whatever the answers were drawn with.
    """
    from rankwise.fingerprint import sampled_from

    gaps: list[tuple[float, int]] = []
    for row, tokens, one in zip(ranked, rows, scored, strict=True):
        if row.meta.get("sampled_from") != sampled_from(weights, tokens.prompt_ids):
            continue
        for answer, ids, logp in zip(row.answers, tokens.answers_ids, one.logps, strict=True):
            if answer.source == "policy" and answer.logps and answer.token_ids == ids:
                gaps.append((abs(sum(answer.logps) - logp), len(ids)))
    if not gaps:
        return {}
    return {
        "sampling_gap_mean": sum(gap for gap, _ in gaps) / sum(count for _, count in gaps),
        "sampling_gap_max": max(gap / count for gap, count in gaps),
        "sampling_gap_answers": len(gaps),
    }


if __name__ == "__main__":
    raise SystemExit(main("reference_logprobs", Params, Paths, run))
