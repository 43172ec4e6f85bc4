"""Stage doctor: what is wrong with the data, in counts and row ids, before anything is computed from it.

Looks at every table of stage prompts as the base model's tokenizer sees it, writes reports/doctor/doctor.md and
metrics.json, and then stops the run where a finding exceeds its threshold (stop_above).

    python -m tasks.doctor
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING

from rankwise.json_text import as_written
from rankwise.progress import Progress
from rankwise.rows import RowTable, write_aside
from rankwise.types import UserError
from tasks.findings import Finding, Limits, examine, shared_with_eval
from tasks.params import param
from tasks.stage import Stage, main, read_json
from tasks.tables import JUDGED, TABLES, TRAINED

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankwise.rendering import Renderer, TokenRow

CONTEXT_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
)  # of config.json, the first that is there
EXAMPLES = ("sft", "preferences", "rollout", "labelled")  # tables whose first row is shown token by token
EXAMPLE_TOKENS = 60  # shown of each prompt and answer


@dataclass(frozen=True, kw_only=True)
class Stops:
    """Shares of a table's rows; a finding with a larger share stops the run. 1.0: report only."""

    boundary_merges: float = param(0.05, "tokenizer would merge prompt and answer into one token", ge=0, le=1)
    double_bos: float = param(0.0, "prompt starts with BOS twice", ge=0, le=1)
    missing_bos: float = param(0.0, "prompt lacks the BOS that the tokenizer adds elsewhere", ge=0, le=1)
    double_eos: float = param(0.0, "an answer holds EOS more than once", ge=0, le=1)
    missing_eos: float = param(0.0, "an answer never ends in EOS", ge=0, le=1)
    control_tokens: float = param(0.0, "an answer's text holds special tokens or turn markers", ge=0, le=1)
    empty_answers: float = param(0.0, "an answer is empty or blank", ge=0, le=1)
    identical_answers: float = param(0.01, "two answers of a row are the same", ge=0, le=1)
    identical_after_cut: float = param(0.01, "two answers of a row are the same once cut", ge=0, le=1)
    cut_prompts: float = param(0.05, "prompt longer than max_prompt_tokens: its beginning is lost", ge=0, le=1)
    cut_answers: float = param(0.2, "an answer longer than max_answer_tokens: its end is lost", ge=0, le=1)
    prompt_over_context: float = param(0.0, "prompt alone fills the model's positions", ge=0, le=1)
    row_over_context: float = param(0.0, "prompt and longest answer exceed the model's positions", ge=0, le=1)
    duplicate_prompts: float = param(0.5, "prompt of an earlier row of the table", ge=0, le=1)
    contradictions: float = param(0.01, "two answers ordered one way here and the other way in another row", ge=0, le=1)
    shared_with_eval: float = param(0.0, "prompt or group of a table that trains is in eval", ge=0, le=1)
    length_bias: float = param(
        0.9, "share of pairs whose better answer is longer; its 95-in-100 interval must lie above", ge=0, le=1
    )


@dataclass(frozen=True, kw_only=True)
class Params:
    """Lengths to check against, and when to stop."""

    max_prompt_tokens: int = param(0, "tokens kept of a prompt (its end); 0: all", ge=0)
    max_answer_tokens: int = param(0, "tokens kept of an answer (its beginning); 0: all", ge=0)
    stop_above: Stops = param(Stops, "largest share of a table's rows with each finding")


@dataclass(frozen=True, kw_only=True)
class Paths:
    prompts: Path = Path("data/prompts")
    base: Path = Path("models/base")
    report: Path = Path("reports/doctor")


Findings = dict[str, dict[str, Finding]]  # table -> finding


def run(params: Params, paths: Paths, stage: Stage) -> None:
    from rankwise.rendering import Renderer

    renderer = Renderer(load_tokenizer(paths.base))
    facts = _tokenizer_facts(renderer.tokenizer, paths.base)
    tables = {name: rows for name in TABLES if len(rows := RowTable(paths.prompts / f"{name}.parquet"))}
    findings = _examine(tables, renderer, params, facts["context"])
    stops = [*_vocabulary_stop(facts), *_stops(findings, params.stop_above)]

    text = _page(facts, findings, params.stop_above, stops, _examples(tables, renderer))
    write_aside(paths.report / "doctor.md", lambda aside: aside.write_text(text, encoding="utf-8"))
    stage.finish({"tokenizer": facts, **{t: {n: f.as_json() for n, f in v.items()} for t, v in findings.items()}})
    _print(findings, params.stop_above)
    if stops:
        raise UserError("\n  ".join([f"doctor: the data stops the run (report: {paths.report}/doctor.md)", *stops]))


def load_tokenizer(base: Path) -> PreTrainedTokenizerBase:
    """The tokenizer of a model folder; raises UserError where there is none."""
    from rankwise import checkpoints

    tokenizer = checkpoints.load_tokenizer(base)
    # Lengths are the doctor's own subject: the tokenizer need not warn of them.
    tokenizer.model_max_length = 10**30
    return tokenizer


def _tokenizer_facts(tokenizer: PreTrainedTokenizerBase, base: Path) -> dict:
    config = read_json(base / "config.json")
    with as_written(base / "config.json", "take a whole copy of the model"):
        config = {**config, **config.get("text_config", {})}
        sizes = {name: operator.index(config.get(name) or 0) for name in ("vocab_size", *CONTEXT_NAMES)}
    return {
        "class": type(tokenizer).__name__,
        "bos": tokenizer.bos_token,
        "eos": tokenizer.eos_token,
        "pad": tokenizer.pad_token,
        "pad_is_eos": tokenizer.pad_token_id == tokenizer.eos_token_id,
        "chat_template": tokenizer.chat_template is not None,
        "vocabulary": len(tokenizer),
        "model_vocabulary": sizes["vocab_size"],
        "context": next((sizes[name] for name in CONTEXT_NAMES if sizes[name]), 0),
    }


def _examine(tables: dict[str, RowTable], renderer: Renderer, params: Params, context: int) -> Findings:
    # A judge has length limits of its own.
    policy = Limits(prompt=params.max_prompt_tokens, answer=params.max_answer_tokens, context=context)
    judge = Limits(prompt=0, answer=0, context=0)
    findings: Findings = {}
    with Progress("doctor", total=sum(map(len, tables.values())), unit="row") as progress:
        for name, rows in tables.items():
            limits = judge if name in JUDGED else policy
            findings[name] = examine(rows, renderer, limits, tick=progress.advance)
            if name in TRAINED:
                findings[name]["shared_with_eval"] = shared_with_eval(rows, tables.get("eval", []))
    return findings


# Stopping ------------------------------------------------------------------------------------------------------------


def _vocabulary_stop(facts: dict) -> list[str]:
    if not 0 < facts["model_vocabulary"] < facts["vocabulary"]:
        return []
    return [
        f"vocabulary: the tokenizer has {facts['vocabulary']} tokens, the model's embedding only "
        f"{facts['model_vocabulary']}; use the tokenizer that the model was trained with, or resize the embedding"
    ]


def _stops(findings: Findings, limits: Stops) -> list[str]:
    return [
        f"{name} in {table}: {finding.count:g} of {finding.of} ({finding.share:.2%}), "
        f"above doctor.stop_above.{name} = {limit:g}{_first(finding)}; {MENDS[name]}, or raise the threshold"
        for table, of_table in findings.items()
        for name, finding in of_table.items()
        if finding.sure_share > (limit := getattr(limits, name))
    ]


MENDS = {
    "boundary_merges": "let the answer, not the prompt, hold the space between them",
    "double_bos": "remove the BOS token from the text or from the chat template",
    "missing_bos": "add the BOS token to the chat template",
    "double_eos": "see the chat template, which may close a turn twice, and ids that came with the answers",
    "missing_eos": "let the chat template end an assistant's turn in EOS",
    "control_tokens": "remove such markers from the answers, or leave those rows out (prompts.files.*.leave_out_ids)",
    "empty_answers": "leave those rows out (prompts.files.*.leave_out: [empty_answers])",
    "identical_answers": "leave those rows out (prompts.files.*.leave_out: [identical_answers])",
    "identical_after_cut": "raise doctor.max_answer_tokens or leave those rows out (leave_out_ids)",
    "cut_prompts": "raise doctor.max_prompt_tokens or lower prompts.files.*.max_words",
    "cut_answers": "raise doctor.max_answer_tokens or lower prompts.files.*.max_words",
    "prompt_over_context": "set doctor.max_prompt_tokens below the context or lower prompts.files.*.max_words",
    "row_over_context": "set max_prompt_tokens and max_answer_tokens so that their sum fits the context",
    "duplicate_prompts": "merge those rows into rankings or raise prompts.opening_words",
    "contradictions": "merge those rows into one ranking (a tie where the votes are even)",
    "shared_with_eval": "give prompts.files.*.group the column that ties those rows together",
    "length_bias": "balance the pairs, or use a length-normalised loss",
}


def _first(finding: Finding) -> str:
    return f"; first rows: {', '.join(finding.ids)}" if finding.ids else ""


# Reporting -----------------------------------------------------------------------------------------------------------


def _cell(finding: Finding | None) -> str:
    if finding is None or not finding.of:
        return ""
    interval = f" [{finding.interval[0]:.1%}, {finding.interval[1]:.1%}]" if finding.interval else ""
    return f"{finding.count:g} ({finding.share:.1%}){interval}" if finding.count or interval else "0"


def _page(facts: dict, findings: Findings, limits: Stops, stops: list[str], examples: list[str]) -> str:
    """The report as Markdown."""
    tables = list(findings)
    sizes = [f"{name} ({next(iter(findings[name].values())).of})" for name in tables]
    lines = ["# Data doctor", ""]
    lines += ["**Stops the run:**", "", *[f"- {stop}" for stop in stops]] if stops else ["Nothing stops the run."]
    lines += ["", "Rows with each finding, by table (rows). Length bias counts pairs, with its 95 % interval.", ""]
    lines += [f"| finding | {' | '.join(sizes)} | stops above |", "|---" * (len(tables) + 2) + "|"]
    for name, limit in asdict(limits).items():
        cells = " | ".join(_cell(findings[table].get(name)) for table in tables)
        lines.append(f"| {name} | {cells} | {limit:g} |")
    lines += ["", "## First rows", ""]
    lines += [
        f"- {name} in {table}: {', '.join(f'`{row}`' for row in finding.ids)}"
        for table in tables
        for name, finding in findings[table].items()
        if finding.ids
    ] or ["None."]
    lines += ["", "## Tokenizer", "", "| fact | value |", "|---|---|"]
    lines += [f"| {name} | `{value}` |" for name, value in facts.items()]
    lines += ["", "## Tokens that are trained", ""]
    lines += ["`·` is a token boundary, `‖` the prompt's end; only what follows it is trained.", "", *examples]
    return "\n".join(lines) + "\n"


def _examples(tables: dict[str, RowTable], renderer: Renderer) -> list[str]:
    lines = []
    for name in EXAMPLES:
        row = next((row for row in tables.get(name, []) if row.answers), None)
        if row:
            lines += [
                f"{name}, row `{row.id}`:",
                "",
                "```text",
                *_token_lines(renderer, renderer.render(row)),
                "```",
                "",
            ]
    return lines


def _token_lines(renderer: Renderer, tokens: TokenRow) -> list[str]:
    prompt = _pieces(renderer, tokens.prompt_ids, ())
    shown = ("… " if len(prompt) > EXAMPLE_TOKENS else "") + "·".join(prompt[-EXAMPLE_TOKENS:])
    lines = []
    for ids in tokens.answers_ids:
        answer = _pieces(renderer, ids, tokens.prompt_ids)
        half = EXAMPLE_TOKENS // 2
        long = len(answer) > EXAMPLE_TOKENS
        cut = [*answer[:half], f" … {len(answer) - 2 * half} tokens … ", *answer[-half:]] if long else answer
        lines.append(f"{shown} ‖ {'·'.join(cut)}")
    return lines


def _pieces(renderer: Renderer, ids: Sequence[int], before: Sequence[int]) -> list[str]:
    """Each token as the text it adds to those before it: a token alone may lose its space or half a character."""
    decode = renderer.tokenizer.decode
    texts = [decode([*before, *ids[:n]], skip_special_tokens=False) for n in range(len(ids) + 1)]
    return [_spell(after[len(start) :]) for start, after in pairwise(texts)]


def _spell(text: str) -> str:
    return text.replace("\n", "\\n").replace("\t", "\\t").replace("`", "'") or "∅"


def _print(findings: Findings, limits: Stops) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(title="data doctor: rows with each finding", show_header=True)
    for column in ("finding", *findings, "stops above"):
        table.add_column(column)
    for name, limit in asdict(limits).items():
        found = [of_table.get(name) for of_table in findings.values()]
        if any(finding and finding.count for finding in found):
            table.add_row(name, *map(_cell, found), f"{limit:g}")
    Console(width=140).print(table)


if __name__ == "__main__":
    raise SystemExit(main("doctor", Params, Paths, run))
