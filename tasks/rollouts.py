"""Stage rollouts: answers to rank. K a prompt from the policy of the round before, in round 1 the SFT model.

A teacher may add answers of its own, and the data the one that they hold. A rerun pays only for what is missing.
Several processes (torchrun) share the prompts.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rankwise.rows import RowTable, write_rows
from rankwise.types import Row, UserError, show_prompt
from tasks.answers import Summary
from tasks.params import below, param
from tasks.stage import Stage, is_first_rank, main, scratch_folder

if TYPE_CHECKING:
    from rankwise.rollouts import Request

SAMPLE_ROWS = 50  # rows shown in the tracker


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """What answers, and how answers are drawn; shared with evaluate and the teacher."""

    engine: Literal["embedded", "server"] = param(
        "embedded", "embedded: in this process; server: vLLM or another OpenAI-compatible one (docs/servers.md)"
    )
    max_new_tokens: int = param(64, "longest answer, tokens", ge=1)
    max_prompt_tokens: int = param(0, "a longer prompt loses its beginning; 0 is no limit", ge=0)
    temperature: float = param(1.0, "0 is greedy, 1 the model's own distribution", ge=0)
    top_p: float = param(1.0, "smallest set of tokens whose probability reaches this", gt=0, le=1)
    top_k: int = param(0, "this many likeliest tokens; 0 is all", ge=0)
    min_p: float = param(0.0, "tokens at least this share of the likeliest one's probability; 0 is all", ge=0, le=1)
    repetition_penalty: float = param(1.0, "above 1, tokens of the prompt and of the answer so far come less", gt=0)
    stop: list[str] = param(list, "an answer ends where its text holds one of these; the text is cut before it")
    stop_token_ids: list[int] = param(list, "an answer ends with one of these, beside the model's own end tokens")
    seed: int = param(0, "seed of the answers")
    precision: Literal["fp32", "medium", "bf16"] = param("fp32", "numerics of the embedded engine's forward pass")
    batch_sequences: int = param(256, "answers that the embedded engine decodes together", ge=1)


@dataclass(frozen=True, kw_only=True)
class TeacherParams(SamplingParams):
    """A larger model whose answers stand beside the policy's."""

    model: str = param("", "a folder below data/source, or the name that RANKWISE_TEACHER_URL serves it under")
    k: int = param(1, "answers a prompt", ge=1)
    seed: int = param(1, "seed of the answers")


@dataclass(frozen=True, kw_only=True)
class Params(SamplingParams):
    k: int = param(4, "answers a prompt", ge=1)
    data_answers: bool = param(False, "the prompt's own answer, from the data, stands beside the others (SPIN, aSFT)")
    teacher: TeacherParams | None = param(None, "a larger model that answers too (aSFT); null: none")
    max_cut_share: float = param(0.2, "stop when more than this share of answers hit max_new_tokens", ge=0, le=1)
    max_empty_share: float = param(0.05, "stop when more than this share of answers are empty or blank", ge=0, le=1)
    max_duplicate_share: float = param(
        0.5, "stop when more than this share of answers, first ones left out, repeat one of their row", ge=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    source: Path = Path("data/source")
    model: Path = Path("models/sft")
    rollouts: Path = Path("data/rollouts.parquet")
    report: Path = Path("reports/rollouts")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    table = paths.prompts / "rollout.parquet"
    prompts = RowTable(table)
    if not len(prompts):
        if is_first_rank():
            write_rows(paths.rollouts, [])
        stage.log(f"{table} holds no prompt: the preferences are imported, nothing is sampled")
        stage.finish({"prompts": 0})
        return
    requests = _requests(params, paths, stage.round)
    if params.data_answers:
        _check_own_answers(prompts, table)
    summaries = {source: _summary(asked) for source, asked in requests.items()}
    with _sampled(prompts, requests, summaries, stage, paths.rollouts) as answered:
        rows = _together(answered, requests, prompts if params.data_answers else None)
        if not is_first_rank():
            for _ in rows:  # shares the work, and gets none
                raise AssertionError
            return
        write_rows(paths.rollouts, rows)
    metrics = _report(summaries, stage)
    stage.tracker.dataset(table, "prompts")
    stage.tracker.table("rollouts", [_shown(row) for row in itertools.islice(RowTable(paths.rollouts), SAMPLE_ROWS)])
    stage.finish(metrics)
    _check(metrics, params, "rollouts")
    if params.teacher is not None:
        _check(metrics["teacher"], params, "rollouts.teacher")


def request(
    folder: Path | None,
    params: SamplingParams,
    *,
    k: int,
    source: str,
    prefix: str,
    name: str | None = None,
    round_: int = 1,
) -> Request:
    """These parameters as a request to one model; prefix is that of the variables that say where its server is.

    Raises UserError on a stop string without a character, which every answer would hold.
    """
    from rankwise.rollouts import Request
    from rankwise.sampling import Sampling

    if "" in params.stop:
        raise UserError('stop: "" is in every text, so every answer would be empty; remove it')
    named = {spec.name: getattr(params, spec.name) for spec in fields(Sampling)}
    return Request(
        engine=params.engine,
        folder=folder,
        sampling=Sampling(**{name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}),
        k=k,
        seed=params.seed,
        round=round_ - 1,  # seeds count rounds from 0
        max_prompt_tokens=params.max_prompt_tokens,
        precision=params.precision,
        source=source,
        prefix=prefix,
        name=name,
        batch_sequences=params.batch_sequences,
    )


def _requests(params: Params, paths: Paths, round_: int) -> dict[str, Request]:
    """The policy's request, and the teacher's where there is one."""
    teacher = params.teacher
    if params.k + (teacher.k if teacher else 0) + params.data_answers < 2:
        raise UserError(
            f"rollouts.k is {params.k} and there is no teacher: one answer a prompt cannot be ranked; set rollouts.k "
            "to at least 2, name a rollouts.teacher, or set rollouts.data_answers to true"
        )
    asked = request(paths.model, params, k=params.k, source="policy", prefix="RANKWISE_ROLLOUTS", round_=round_)
    found = {"policy": asked}
    if teacher is not None:
        folder = _teacher(teacher, paths)
        name = teacher.model if folder is None else None
        # Of no round: it stays what it is, so its answers are asked for once and kept.
        found["teacher"] = request(folder, teacher, k=teacher.k, source="teacher", prefix="RANKWISE_TEACHER", name=name)
    return found


def _teacher(teacher: TeacherParams, paths: Paths) -> Path | None:
    """The teacher's folder; None where a server knows it by its name alone."""
    folder = below(paths.source, teacher.model, where="rollouts.teacher.model")
    if teacher.model and (folder / "config.json").is_file():
        return folder
    if not teacher.model or teacher.engine != "server":
        raise UserError(
            f"rollouts.teacher.model: {teacher.model!r} is no model: {folder}/config.json is missing. Put the folder "
            f"into {paths.source}, or set rollouts.teacher.engine to server and RANKWISE_TEACHER_URL to one that "
            "serves a model of this name"
        )
    if teacher.max_prompt_tokens:
        raise UserError(
            f"rollouts.teacher.max_prompt_tokens is {teacher.max_prompt_tokens}, and the tokens of {teacher.model!r} "
            f"are known to its server alone: set it to 0, or put the model's folder into {paths.source}"
        )
    return None


@contextlib.contextmanager
def _sampled(
    prompts: RowTable, requests: dict[str, Request], summaries: dict[str, Summary], stage: Stage, table: Path
) -> Iterator[dict[str, Iterable[Row]]]:
    """Rows of answers for each source; none on all processes of a launch but the first.

    With two sources, the first one's rows are on disk, beside table, until the second has answered: no two models are
    in memory.
    """
    from rankwise.rollouts import Work, sampled
    from rankwise.store import Store

    def rows_of(source: str) -> Iterator[Row]:
        work = Work()
        yield from summaries[source].of(sampled(prompts, requests[source], store, work))
        whose = "" if source == "policy" else f" by the {source}"
        stage.log(f"{work.computed} of {len(prompts)} prompts answered now{whose}, the rest were in the store")
        stage.timings[f"{source}_prompts_computed"] = work.computed
        stage.timings[f"{source}_tokens_per_second"] = work.tokens_per_second

    *others, last = requests
    with (
        Store(stage.store("rollouts")) as store,
        scratch_folder(table) as scratch,
    ):
        answered: dict[str, Iterable[Row]] = {}
        for source in others:
            write_rows(scratch / source, rows_of(source), key=None)
            answered[source] = RowTable(scratch / source, key=None)
        yield answered | {last: rows_of(last)}


def _check_own_answers(prompts: RowTable, table: Path) -> None:
    """Raises UserError where a prompt has no answer of the data."""
    count, first = 0, []
    for row in prompts:
        if not row.answers:
            count += 1
            first += [row.id] if len(first) < 10 else []
    if count:
        raise UserError(
            f"rollouts.data_answers: {count} of {len(prompts)} prompts of {table} have no answer in the data: "
            f"{', '.join(first)}{' …' if count > 10 else ''}; name a file with answers in "
            "prompts.files.rollout, or set it to false"
        )


def _together(answered: dict[str, Iterable[Row]], requests: dict[str, Request], own: RowTable | None) -> Iterable[Row]:
    """One row a prompt: the policy's answers, then the teacher's, then the data's, those that there are."""
    from rankwise.rollouts import same_tokenizer, with_teacher

    rows = answered["policy"]
    if "teacher" in requests:
        theirs = requests["teacher"].folder
        same = theirs is not None and same_tokenizer(requests["policy"].folder, theirs)
        rows = with_teacher(rows, answered["teacher"], same_tokenizer=same)
    if own is None or not is_first_rank():
        return rows
    return (replace(row, answers=(*row.answers, prompt.answers[0])) for row, prompt in zip(rows, own))


def _report(summaries: dict[str, Summary], stage: Stage) -> dict[str, Any]:
    """Figures, and the numbers of metrics.json: the policy's, and in a section of its own the teacher's."""
    for source, found in summaries.items():
        found.draw(stage.plots / f"{source}.png", title=f"The {source}'s answers")
    metrics = {source: found.as_json() for source, found in summaries.items()}
    return {**metrics.pop("policy"), **metrics}


def _summary(asked: Request) -> Summary:
    from rankwise.checkpoints import load_tokenizer

    return Summary(eos=asked.folder and load_tokenizer(asked.folder).eos_token_id)


def _check(metrics: dict[str, Any], params: Params, section: str) -> None:
    """Raise UserError where answers are not worth a judge's time."""
    asked = params if section == "rollouts" else params.teacher
    many = f"of {metrics['answers']} answers by the {'policy' if asked is params else 'teacher'}"
    if metrics["cut_share"] > params.max_cut_share:
        raise UserError(
            f"{metrics['cut_share']:.1%} {many} were cut at {section}.max_new_tokens = {asked.max_new_tokens}, more "
            f"than rollouts.max_cut_share = {params.max_cut_share:.1%} allows; a judge would rank fragments. Raise "
            "max_new_tokens, see in reports/doctor whether the SFT data ends in EOS, or raise the threshold"
        )
    if metrics["empty_share"] > params.max_empty_share:
        raise UserError(
            f"{metrics['empty_share']:.1%} {many} are empty or blank, more than rollouts.max_empty_share = "
            f"{params.max_empty_share:.1%} allows. Look for empty answers in the SFT data (reports/doctor), for stop "
            f"strings and tokens that come at once ({section}.stop, .stop_token_ids), or raise the threshold"
        )
    if metrics["duplicate_share"] > params.max_duplicate_share:
        raise UserError(
            f"{metrics['duplicate_share']:.1%} {many}, the first of each prompt left out, repeat another one to the "
            f"same prompt, more than rollouts.max_duplicate_share = {params.max_duplicate_share:.1%} allows; equal "
            f"answers tie and teach nothing. Raise {section}.temperature ({asked.temperature:g}), loosen top_p, top_k "
            f"or min_p, lower {section}.k ({asked.k}), or raise the threshold"
        )


def _shown(row: Row) -> dict[str, str]:
    return {"prompt": show_prompt(row.prompt), **{f"answer {n}": a.text for n, a in enumerate(row.answers)}}


if __name__ == "__main__":
    raise SystemExit(main("rollouts", Params, Paths, run))
