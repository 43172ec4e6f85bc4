"""The rows that stage dpo trains on, as tokens, with what the reference thinks of each answer; the policy's diagnosis
reads the very same.

Three tables and a model must belong together: the preferences, the reference's log-probabilities of them, and the
reference itself. What does not is refused by name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.arrow_rows import values
from rankwise.fingerprint import weights_digest
from rankwise.rows import RowTable, read_parts, readable
from rankwise.table_checks import REBUILD
from rankwise.types import Row, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from rankwise.rendering import TokenRow

SCHEMA = pa.schema([("id", pa.string()), ("key", pa.string()), ("logps", pa.list_(pa.float32()))])  # what is read of it
LIMITS = ("max_prompt_tokens", "max_answer_tokens")


@dataclass(frozen=True, kw_only=True)
class ScoredRows:
    """Ranked rows with their reference log-probabilities, checked to be of these very rows."""

    texts: dict[str, Row]  # by id, as people read them; empty where they were not asked for
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
    texts: bool = False,
) -> ScoredRows:
    """Training rows, held-out rows, and each row's reference log-probabilities.

    Args:
        model: the reference's folder.
        precision: dpo.precision.
        soft: whether the loss needs the judge's strengths.
        texts: whether the rows' texts are kept too, which take most of the memory.

    Raises UserError where the tables, the weights or the precision do not belong together.
    """
    from rankwise.reference import key_of
    from rankwise.rendering import Renderer

    meta, known = read_reference(reference)
    weights = weights_digest(model)
    _check_origin(meta, reference, model, weights, precision)
    # The same limits as the reference pass had, or the keys below would not be those of the same tokens.
    renderer = Renderer(tokenizer, **{name: meta[name] for name in LIMITS})
    found = ScoredRows(texts={}, training=[], held_out=[], references={}, reference=weights)
    wrong, without, table = _Named(), _Named(), RowTable(preferences)
    for row in table:
        tokens = renderer.render(row)
        key, logps = known.pop(row.id, ("", []))
        if key != key_of(tokens, weights=weights, precision=precision):
            wrong.add(row.id)
        if soft and any(answer.strength is None for answer in row.answers):
            without.add(row.id)
        found.references[row.id] = logps
        if texts:
            found.texts[row.id] = row
        split = row.meta.get("split", "train")
        if split in ("train", "held_out"):
            (found.training if split == "train" else found.held_out).append(tokens)
    if without.count:
        raise UserError(
            f"{preferences}: {without} of {len(table)} rows have answers without a strength: {without.first}; "
            "dpo.loss soft_plackett_luce learns a judge's probabilities, and imported rankings have none: set dpo.loss "
            "to plackett_luce, or have a judge rank these answers"
        )
    if wrong.count:
        raise UserError(
            f"{reference}: {wrong} of {len(table)} rows have no reference log-probability for their "
            f"tokens: {wrong.first}; run stage reference_logprobs again"
        )
    return found


class _Named:
    """Rows that something is wrong with: how many, and the first of them."""

    def __init__(self) -> None:
        self.count, self._ids = 0, []

    def add(self, row_id: str) -> None:
        self.count += 1
        if len(self._ids) < 10:
            self._ids.append(row_id)

    def __str__(self) -> str:
        return str(self.count)

    @property
    def first(self) -> str:
        return ", ".join(self._ids) + (" …" if self.count > len(self._ids) else "")


def read_reference(path: Path) -> tuple[dict[str, Any], dict[str, tuple[str, list[float]]]]:
    """What a table of reference log-probabilities is of, and by the row's id its key and log-probabilities.

    Raises UserError where the file is missing or is no such table.
    """
    with readable(path):
        schema = pq.read_schema(path)
    text = lambda data: data.decode("utf-8", "replace")
    meta: dict[str, Any] = {text(name): text(value) for name, value in (schema.metadata or {}).items()}
    lacking = [name for name in ("reference", "precision", *LIMITS) if name not in meta]
    lacking += [name for name in SCHEMA.names if name not in schema.names]
    if lacking or not all(re.fullmatch("[0-9]{1,9}", meta[name]) for name in LIMITS):
        why = f"it lacks {', '.join(lacking)}" if lacking else "its limits are no numbers"
        raise UserError(f"{path}: no table of reference log-probabilities ({why}); {REBUILD}")
    known: dict[str, tuple[str, list[float]]] = {}
    for part in read_parts(path, SCHEMA, may_be_null=()):
        for row_id, key, logps in zip(*map(values, part.columns)):
            if row_id in known:
                raise UserError(f"{path}: an id occurs twice; {REBUILD}")
            known[row_id] = (key, logps)
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
