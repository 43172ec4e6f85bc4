"""The reference's log-probabilities of every answer, computed once and kept row by row.

A row's key is made of what its numbers depend on: the reference's weights, the very token ids, the precision. A
change of learning rate, β, loss or batch size is a hit; other weights, tokenizer, template or length limit is not.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankwise.batching import micro_batches
from rankwise.checkpoints import Precision, numerics
from rankwise.fingerprint import digest
from rankwise.progress import Progress
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.types import UserError

NUMERICS = 1  # raise it when the log-probability code gives other numbers than before
COMMIT_ROWS = 64  # rows lost at most when killed


@dataclass(frozen=True, kw_only=True)
class Scored:
    """The reference's view of one row."""

    id: str
    key: str
    logps: tuple[float, ...]  # one an answer: Σ log π_ref(token), nats, float32
    tokens: tuple[int, ...]  # answer lengths, so that any objective can use the sums


def key_of(row: TokenRow, *, weights: str, precision: Precision) -> str:
    """The identity of a row's reference log-probabilities."""
    return digest(NUMERICS, weights, precision, row.prompt_ids, row.answers_ids)


def score_rows(
    module: LogpModel,
    rows: Sequence[TokenRow],
    *,
    weights: str,
    precision: Precision,
    store: Store,
    max_tokens: int = 16384,
    what: str = "reference log-probs",
) -> tuple[list[Scored], int]:
    """Log-probabilities of all rows' answers, in the rows' order; and how many rows had to be computed.

    Args:
        weights: fingerprint of the module's weights.
        max_tokens: positions a forward pass.
    """
    keys = {row.id: key_of(row, weights=weights, precision=precision) for row in rows}
    found = store.get_many(keys.values())
    missing = [row for row in rows if keys[row.id] not in found]
    device = next(module.parameters()).device
    module.eval()
    with Progress(what, total=len(rows), unit="row", done=len(rows) - len(missing)) as progress:
        fresh: dict[str, list[float]] = {}
        with torch.inference_mode(), numerics(precision, device):
            for part in micro_batches(missing, max_tokens=max_tokens):
                batch = module.batch(part, 0).to(device)
                logp_BK = batch.by_prompt(module(batch).sum_A.float())
                for row, logps in zip(part, logp_BK.tolist()):
                    if not all(map(math.isfinite, logps)):
                        raise UserError(
                            f"{what}: row {row.id!r} has log-probabilities {logps}; the reference's weights or its "
                            "precision are at fault: look at models/sft, or use precision fp32"
                        )
                    fresh[keys[row.id]] = logps[: len(row.answers_ids)]
                if len(fresh) >= COMMIT_ROWS:
                    store.put_many(fresh)
                    found |= fresh
                    fresh = {}
                progress.advance(len(part))
        store.put_many(fresh)
        found |= fresh
    scored = [
        Scored(
            id=row.id,
            key=keys[row.id],
            logps=tuple(found[keys[row.id]]),
            tokens=tuple(map(len, row.answers_ids)),
        )
        for row in rows
    ]
    return scored, len(missing)
