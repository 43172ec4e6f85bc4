"""Files of many records, as a user would import them; written a few at a time."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import Any

SOURCES = ("jsonl", "parquet", "corpus")  # where a million prompts come from; corpus: no file, the embedded one
WORDS = [
    "river",
    "lamp",
    "quiet",
    "seven",
    "harbour",
    "iron",
    "maple",
    "corner",
    "paper",
    "winter",
    "signal",
    "garden",
    "copper",
    "letter",
    "morning",
]
PART = 10_000  # records in memory


def write_records(path: Path, count: int) -> None:
    """A file of records with an id, a prompt of its own and a completion; the ending says the format."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    path.parent.mkdir(parents=True, exist_ok=True)
    found = _records(count)
    if path.suffix == ".jsonl":
        with open(path, "w", encoding="utf-8") as handle:
            handle.writelines(json.dumps(one) + "\n" for one in found)
        return
    schema = pa.schema([(name, pa.string()) for name in ("id", "prompt", "completion")])
    with pq.ParquetWriter(path, schema) as writer:
        while part := list(islice(found, PART)):
            writer.write_table(pa.Table.from_pylist(part, schema=schema))


def _records(count: int) -> Iterator[dict[str, Any]]:
    """Ids in no order, as those of data sets are."""
    rng = random.Random(0)
    for number in range(count):
        say = lambda words: " ".join(rng.choices(WORDS, k=words))
        prompt = f"{say(rng.randint(8, 30))}, number {number}"
        yield {"id": f"{rng.getrandbits(64):016x}", "prompt": prompt, "completion": f" {say(rng.randint(10, 60))}."}
