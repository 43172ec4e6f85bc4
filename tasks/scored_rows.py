"""The rows that stage dpo trains on, as tokens, with what the reference thinks of each answer; the policy's diagnosis
reads the very same.

Three tables and a model must belong together: the preferences, the reference's log-probabilities of them, and the
reference itself. What does not is refused by name.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from rankwise.fingerprint import weights_digest
from rankwise.rows import read_rows, read_table
from rankwise.table_checks import REBUILD, conform
from rankwise.types import Row, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankwise.rendering import TokenRow

SCHEMA = pa.schema([("id", pa.string()), ("key", pa.string()), ("logps", pa.list_(pa.float32()))])  # what is read of it
LIMITS = ("max_prompt_tokens", "max_answer_tokens")


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Ranked rows with their reference log-probabilities, checked to be of these very rows."""

    texts: dict[str, Row]  # by id, as people read them
    training: list[TokenRow]
    held_out: list[TokenRow]
    references: dict[str, list[float]]  # by id: Σ log π_ref of each answer, nats, best answer first
    reference: str  # digest of the reference's weights


def load(
    preferences: Path,
    reference: Path,
    model: Path,
    tokenizer: PreTrainedTokenizerBase,
    *,
    precision: str,
    soft: bool,
) -> ScoredRows:
    """Training rows, held-out rows, and each row's reference log-probabilities.

    Args:
        model: the reference's folder.
        precision: dpo.precision.
        soft: whether the loss needs the judge's strengths.

    Raises UserError where the tables, the weights or the precision do not belong together.
    """
    from rankwise.reference import key_of
    from rankwise.rendering import Renderer

    meta, known = read_reference(reference)
    weights = weights_digest(model)
    _check_origin(meta, reference, model, weights, precision)
    # The same limits as the reference pass had, or the keys below would not be those of the same tokens.
    renderer = Renderer(tokenizer, **{name: meta[name] for name in LIMITS})
    rows = read_rows(preferences)
    if soft:
        _check_strengths(rows, preferences)
    rendered = {row.id: renderer.render(row) for row in rows}
    wrong = [
        row.id
        for row in rendered.values()
        if row.id not in known or known[row.id]["key"] != key_of(row, weights=weights, precision=precision)
    ]
    if wrong:
        raise UserError(
            f"{reference}: {len(wrong)} of {len(rendered)} rows have no reference log-probability for their "
            f"tokens: {', '.join(wrong[:10])}{' …' if len(wrong) > 10 else ''}; run stage reference_logprobs again"
        )
    split = {row.id: row.meta.get("split", "train") for row in rows}
    return ScoredRows(
        texts={row.id: row for row in rows},
        training=[row for row in rendered.values() if split[row.id] == "train"],
        held_out=[row for row in rendered.values() if split[row.id] == "held_out"],
        references={row_id: record["logps"] for row_id, record in known.items()},
        reference=weights,
    )


def read_reference(path: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """What a table of reference log-probabilities is of, and its records by the row's id: {"id", "key", "logps"}.

    Raises UserError where the file is missing or is no such table.
    """
    table = read_table(path)
    text = lambda data: data.decode("utf-8", "replace")
    meta: dict[str, Any] = {text(name): text(value) for name, value in (table.schema.metadata or {}).items()}
    lacking = [name for name in ("reference", "precision", *LIMITS) if name not in meta]
    lacking += [name for name in SCHEMA.names if name not in table.column_names]
    if lacking or not all(re.fullmatch("[0-9]{1,9}", meta[name]) for name in LIMITS):
        why = f"it lacks {', '.join(lacking)}" if lacking else "its limits are no numbers"
        raise UserError(f"{path}: no table of reference log-probabilities ({why}); {REBUILD}")
    records = conform(path, table, SCHEMA, may_be_null=()).to_pylist()
    known = {record["id"]: record for record in records}
    if len(known) < len(records):
        raise UserError(f"{path}: an id occurs twice; {REBUILD}")
    return {**meta, **{name: int(meta[name]) for name in LIMITS}}, known


def _check_origin(meta: dict[str, Any], reference: Path, model: Path, weights: str, precision: str) -> None:
    """Raises UserError where the table is of other weights, or was computed in another precision."""
    if meta.get("reference") != weights:
        raise UserError(
            f"{reference}: its log-probabilities are of weights {meta.get('reference')}, but {model} holds "
            f"{weights}; run stage reference_logprobs again (dvc repro dpo does)"
        )
    if meta["precision"] != precision:
        raise UserError(
            f"dpo.precision is {precision!r}, the reference was computed in {meta['precision']!r}; their "
            "difference would be noise in every margin: set both alike"
        )


def _check_strengths(rows: Sequence[Row], path: Path) -> None:
    """Raises UserError where answers have no strength: a label without a probability cannot be soft."""
    without = [row.id for row in rows if any(answer.strength is None for answer in row.answers)]
    if without:
        raise UserError(
            f"{path}: {len(without)} of {len(rows)} rows have answers without a strength: {', '.join(without[:10])}"
            f"{' …' if len(without) > 10 else ''}; dpo.loss soft_plackett_luce learns a judge's probabilities, and "
            "imported rankings have none: set dpo.loss to plackett_luce, or have a judge rank these answers"
        )
