"""Stage prompts: the data of a run, generated or imported, as six tables of rows.

    sft            prompt + 1 answer: what supervised fine-tuning imitates
    rollout        prompts to answer; a prompt's own answer, where known, has source "dataset" (SPIN, aSFT)
    eval           held-out prompts, each once, with the answers and ranks that the data gave
    labelled       ranked rows that a reward model is trained on
    labelled_test  ranked rows that it is measured on
    preferences    imported ranked rows: offline preferences

All six are always written; one that a run does not use is empty. No prompt and no group of eval is in a table that
trains; no opening and no group of labelled_test is in labelled.

    python -m tasks.prompts
"""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from rankwise.rows import write_rows
from rankwise.seen import Distinct
from rankwise.types import Row, UserError, show_prompt
from tasks.mixing import Counts, Tables, from_corpus, from_files
from tasks.params import param
from tasks.stage import Stage, main, output_folder
from tasks.tables import TABLES


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """Rows a table of the embedded corpus."""

    sft: int = param(6000, "reviews to imitate", ge=1)
    rollout: int = param(2000, "prompts to answer, no two alike", ge=1)
    eval: int = param(300, "held-out prompts, no two alike", ge=1)
    labelled: int = param(2000, "pairs of reviews with different ratings, to train the judge on", ge=1)
    labelled_test: int = param(300, "pairs to measure the judge on", ge=1)


@dataclass(frozen=True, kw_only=True)
class Files:
    """One mapping a role, {} where the run has none: {path: …} and any entry of tasks.sources.File."""

    sft: dict = param(dict, "prompt + answer; of ranked rows the best answer")
    rollout: dict = param(dict, "prompts to answer")
    eval: dict = param(dict, "held-out prompts; {}: eval_share of rollout, or else of preferences")
    labelled: dict = param(dict, "ranked rows, or texts with labels (paired at random by seed)")
    labelled_test: dict = param(dict, "the same, to measure the judge on; {}: eval_share of labelled")
    preferences: dict = param(dict, "pairs or rankings that go straight into preference training")


@dataclass(frozen=True, kw_only=True)
class Params:
    """The data of a run."""

    source: Literal["embedded", "files"] = param("embedded", "embedded: the generated corpus; files: data/source")
    seed: int = param(1, "draws the corpus, the samples (limit), the pairs and the held-out share")
    opening_words: int = param(8, "words of a plain text that make its prompt; 0: the whole text is an answer", ge=0)
    eval_share: float = param(0.1, "share of groups (or prompts) held out where no eval file is given", ge=0, le=0.9)
    embedded: Sizes = param(Sizes, "rows a table, for source: embedded")
    files: Files = param(Files, "what is read for each role, for source: files")


@dataclass(frozen=True, kw_only=True)
class Paths:
    source: Path = Path("data/source")
    prompts: Path = Path("data/prompts")
    report: Path = Path("reports/prompts")


def run(params: Params, paths: Paths, stage: Stage) -> None:
    measured = {name: Measures() for name in TABLES}
    with output_folder(paths.prompts) as folder, tempfile.TemporaryDirectory(dir=folder) as scratch:
        tables, left_out = _tables(params, paths, Path(scratch), stage)
        for name, rows in tables:
            write_rows(folder / f"{name}.parquet", measured[name].of(rows))
        _refuse_empty(measured, left_out)
        for name in TABLES:
            if name not in left_out:
                write_rows(folder / f"{name}.parquet", [])
    for name, counts in left_out.items():
        notes = "".join(f"; left out {count}: {reason}" for reason, count in sorted(counts.items()))
        stage.log(f"{name}: {measured[name].rows} rows{notes}")
    stage.finish({name: measured[name].as_json(left_out.get(name, Counter())) for name in TABLES})


def _tables(params: Params, paths: Paths, scratch: Path, stage: Stage) -> tuple[Tables, Counts]:
    if params.source == "embedded":
        return from_corpus(asdict(params.embedded), seed=params.seed, opening_words=params.opening_words)
    given = {role: entry for role, entry in asdict(params.files).items() if entry}
    return from_files(
        given,
        paths.source,
        scratch,
        seed=params.seed,
        opening_words=params.opening_words,
        eval_share=params.eval_share,
        log=stage.log,
    )


def _refuse_empty(measured: dict[str, Measures], left_out: Counts) -> None:
    for name, counts in left_out.items():
        if not measured[name].rows:
            why = ", ".join(f"{count} left out: {reason}" for reason, count in sorted(counts.items()))
            raise UserError(
                f"prompts: table {name} would be empty ({why or 'nothing was read for it'}); "
                f"change prompts.files.{name}, or the limits, eval_share or labels named there"
            )


class Measures:
    """Counts of one table: rows, how many rows have K answers, words (mean) a prompt and an answer."""

    def __init__(self) -> None:
        self.rows = self._answers = self._tied = self._prompt_words = self._answer_words = 0
        self._by_answers: Counter[int] = Counter()
        self._prompts = Distinct()

    def of(self, rows: Iterable[Row]) -> Iterator[Row]:
        """The rows as they are, counted."""
        for row in rows:
            prompt, ranked = show_prompt(row.prompt), row.ranked
            self.rows += 1
            self._by_answers[len(row.answers)] += 1
            self._tied += len({answer.rank for answer in ranked}) < len(ranked)
            self._prompts.add(prompt)
            self._prompt_words += len(prompt.split())
            self._answers += len(row.answers)
            self._answer_words += sum(len(answer.text.split()) for answer in row.answers)
            yield row

    def as_json(self, left_out: Counter[str]) -> dict:
        return {
            "rows": self.rows,
            "rows_by_answers": {str(k): n for k, n in sorted(self._by_answers.items())},
            "rows_with_ties": self._tied,
            "distinct_prompts": len(self._prompts),
            "words_per_prompt": round(self._prompt_words / self.rows, 2) if self.rows else 0.0,
            "words_per_answer": round(self._answer_words / self._answers, 2) if self._answers else 0.0,
            "left_out": dict(left_out),
        }


if __name__ == "__main__":
    raise SystemExit(main("prompts", Params, Paths, run))
