"""The reference's log-probabilities of every answer, computed once and kept row by row.

A row's key is made of what its numbers depend on: the reference's weights, the very token ids, the precision. A
change of learning rate, β, loss or batch size is a hit; other weights, tokenizer, template or length limit is not.
"""

from __future__ import annotations

import io
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from rankwise.batching import micro_batches
from rankwise.checkpoints import Precision, numerics
from rankwise.fingerprint import digest
from rankwise.parallel import Processes, processes
from rankwise.progress import Progress
from rankwise.rendering import TokenRow
from rankwise.scoring import LogpModel
from rankwise.store import Store
from rankwise.types import UserError

NUMERICS = 2  # raise it when the log-probability code gives other numbers than before
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
    store: Store | None,
    max_tokens: int = 16384,
    what: str = "reference log-probs",
) -> tuple[list[Scored], int]:
    """Log-probabilities of all rows' answers, in the rows' order; and how many rows had to be computed.

    Several processes share the rows out and return alike; batches are those of one process, and so are the numbers.

    Args:
        module: in its place (rankwise.parallel.place).
        weights: fingerprint of the module's weights.
        store: asked and filled by the first process alone; the others give None.
        max_tokens: positions a forward pass.
    """
    here = processes()
    keys = {row.id: key_of(row, weights=weights, precision=precision) for row in rows}
    found = _known(rows, keys, store, here)
    missing = [row for row in rows if keys[row.id] not in found]
    parts = micro_batches(missing, max_tokens=max_tokens, cost=module.cost)
    module.eval()
    stream = None if here.first else io.StringIO()
    fresh: dict[str, list[float]] = {}
    # not inference_mode: sharded layers could not be put together again outside of it
    bar = Progress(what, total=len(rows), unit="row", done=len(rows) - len(missing), stream=stream)
    with bar as progress, torch.no_grad(), numerics(precision, here.device):
        for start in range(0, len(parts), here.count):
            together = parts[start : start + here.count]
            fresh |= _score(module, together, keys, here, what=what)
            if len(fresh) >= COMMIT_ROWS:
                found |= _keep(fresh, store)
                fresh = {}
            progress.advance(sum(map(len, together)))
        found |= _keep(fresh, store)
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


def _score(
    module: LogpModel, together: list[list[TokenRow]], keys: dict[str, str], here: Processes, *, what: str
) -> dict[str, list[float]]:
    """Key -> log-probabilities of the rows of one batch a process, known to all of them afterwards."""
    [(mine, _)] = here.deal(together)
    batch = module.batch(mine, 0).to(here.device)
    logp_BK = batch.by_prompt(module(batch).sum_A.float()).cpu()
    widest = max(len(part) * max(len(row.answers_ids) for row in part) for part in together)
    padded = torch.nn.functional.pad(logp_BK.flatten(), (0, widest - logp_BK.numel()))
    fresh: dict[str, list[float]] = {}
    for part, values in zip(together, here.gather(padded)):
        width = max(len(row.answers_ids) for row in part)
        for row, logps in zip(part, values[: len(part) * width].view(len(part), width).tolist()):
            if not all(map(math.isfinite, logps)):
                raise UserError(
                    f"{what}: row {row.id!r} has log-probabilities {logps}; the model's weights or its "
                    "precision are at fault: look at its folder, or use precision fp32"
                )
            fresh[keys[row.id]] = logps[: len(row.answers_ids)]
    return fresh


def _keep(fresh: dict[str, list[float]], store: Store | None) -> dict[str, list[float]]:
    if store is not None:
        store.put_many(fresh)
    return fresh


def _known(
    rows: Sequence[TokenRow], keys: dict[str, str], store: Store | None, here: Processes
) -> dict[str, list[float]]:
    """What the first process's store holds, told to all: another host does not see the file."""
    found = store.get_many(keys.values()) if store is not None else {}
    if here.count == 1:
        return found
    return json.loads(here.spread_text(json.dumps(found)))
