"""Stage rollouts: K answers a prompt, sampled from the SFT model; a rerun pays only for what is missing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from rankwise.rows import read_rows, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks.params import param
from tasks.stage import Stage, main

if TYPE_CHECKING:
    from rankwise.rollouts import Request

SAMPLE_ROWS = 50  # rows shown in the tracker


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How answers are drawn; shared with evaluate."""

    max_new_tokens: int = param(64, "longest answer, tokens", ge=1)
    max_prompt_tokens: int = param(0, "a longer prompt loses its beginning; 0 is no limit", ge=0)
    temperature: float = param(1.0, "0 is greedy, 1 the model's own distribution", ge=0)
    top_p: float = param(1.0, "smallest set of tokens whose probability reaches this", gt=0, le=1)
    top_k: int = param(0, "this many likeliest tokens; 0 is all", ge=0)
    seed: int = param(0, "seed of the answers")
    precision: Literal["fp32", "medium", "bf16"] = param("fp32", "numerics of the forward pass")
    batch_sequences: int = param(256, "answers decoded together", ge=1)


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams):
    k: int = param(4, "answers a prompt", ge=2)
    max_cut_share: float = param(0.2, "stop when more than this share of answers hit max_new_tokens", ge=0, le=1)


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    model: Path = Path("models/sft")
    rollouts: Path = Path("data/rollouts.parquet")
    report: Path = Path("reports/rollouts")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.rollouts import sample_rows
    from rankwise.store import Store
    from tasks.plots import length_histogram

    table = paths.prompts / "rollout.parquet"
    prompts = read_rows(table)
    if not prompts:
        write_rows(paths.rollouts, [])
        stage.log(f"{table} holds no prompt: the preferences are imported, nothing is sampled")
        stage.finish({"prompts": 0})
        return
    with Store(stage.store("rollouts")) as store:
        rows, work = sample_rows(prompts, request(paths.model, params, k=params.k), store)
    stage.timings["tokens_per_second"] = work.tokens_per_second
    stage.log(f"{work.computed} of {len(rows)} prompts answered now, the rest were in the store")
    metrics = summary(rows)
    write_rows(paths.rollouts, rows)
    stage.tracker.dataset(table, "prompts")
    stage.tracker.table("rollouts", [_shown(row) for row in rows[:SAMPLE_ROWS]])
    length_histogram(_lengths(rows), None, stage.plots / "lengths.png", title="Lengths of the sampled answers")
    stage.finish(metrics)
    if metrics["cut_share"] > params.max_cut_share:
        raise UserError(
            f"{metrics['cut_share']:.1%} of the answers were cut at rollouts.max_new_tokens = {params.max_new_tokens}, "
            f"more than rollouts.max_cut_share = {params.max_cut_share:.1%} allows; a judge would rank fragments. "
            "Raise max_new_tokens, see in reports/doctor whether the SFT data ends in EOS, or raise the threshold"
        )


def request(folder: Path, params: SamplingParams, *, k: int, source: str = "policy") -> Request:
    """These parameters as a request to one model."""
    from rankwise.generation import Sampling
    from rankwise.rollouts import Request

    return Request(
        folder=folder,
        sampling=Sampling(
            max_new_tokens=params.max_new_tokens,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=params.top_k,
        ),
        k=k,
        seed=params.seed,
        max_prompt_tokens=params.max_prompt_tokens,
        precision=params.precision,
        source=source,
        batch_sequences=params.batch_sequences,
    )


def summary(rows: Sequence[Row]) -> dict[str, float]:
    """Lengths, finish reasons, diversity and duplicates of the answers."""
    from rankwise.evaluation import distinct_n

    answers = [answer for row in rows for answer in row.answers]
    texts, lengths = [answer.text for answer in answers], sorted(_lengths(rows))
    return {
        "prompts": len(rows),
        "answers": len(answers),
        "cut_share": sum(answer.finish_reason == "length" for answer in answers) / len(answers),
        "empty_share": sum(not text.strip() for text in texts) / len(texts),
        "rows_with_duplicates": sum(len({a.text for a in row.answers}) < len(row.answers) for row in rows),
        "tokens_mean": sum(lengths) / len(lengths),
        "tokens_p95": lengths[int(0.95 * (len(lengths) - 1))],
        "distinct_1": distinct_n(texts, 1),
        "distinct_2": distinct_n(texts, 2),
    }


def _lengths(rows: Sequence[Row]) -> list[int]:
    return [len(answer.token_ids) for row in rows for answer in row.answers]


def _shown(row: Row) -> dict[str, str]:
    return {"prompt": show_prompt(row.prompt), **{f"answer {n}": a.text for n, a in enumerate(row.answers)}}


if __name__ == "__main__":
    raise SystemExit(main("rollouts", Params, Paths, run))
