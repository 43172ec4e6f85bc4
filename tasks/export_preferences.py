"""Rankings for other programs: the preferences as pairs or as whole rankings, as JSON lines or Parquet.

    python -m tasks.export_preferences --format pairs pairs.jsonl
    python -m tasks.export_preferences --format rankings --split held_out rankings.parquet

pairs: prompt, chosen, rejected, as TRL's DPOTrainer and RewardTrainer take them (a plain prompt is text, a chat is a
list of messages), one record for every two answers of a row of which one ranks above the other; beside them row_id,
strength_gap (nats; null where no judge gave one) and longer_by (words of chosen minus those of rejected).
rankings: prompt and answers, best first, each {text, rank, strength, strength_se}: equal ranks are a tie. The shape
`ranking` of prompts.files reads this file again.

Held-out rows are a file of their own (--split held_out): whoever trains on them has nothing left to measure on.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from rankwise.rows import read_rows, write_aside, write_table
from rankwise.types import Row, UserError, show_prompt


def pairs(row: Row) -> Iterator[dict[str, Any]]:
    """Every two answers of which one ranks above the other, the better one chosen."""
    for better, worse in itertools.combinations(row.ranked, 2):
        if better.rank == worse.rank:
            continue
        known = better.strength is not None and worse.strength is not None
        yield {
            "row_id": row.id,
            "prompt": _prompt(row),
            "chosen": _turn(row, better.text),
            "rejected": _turn(row, worse.text),
            "strength_gap": better.strength - worse.strength if known else None,
            "longer_by": len(better.text.split()) - len(worse.text.split()),
        }


def rankings(row: Row) -> Iterator[dict[str, Any]]:
    """The row itself: its prompt, and its answers best first."""
    names = ("text", "rank", "strength", "strength_se")
    answers = [{name: getattr(answer, name) for name in names} for answer in row.ranked]
    yield {"id": row.id, "prompt": _prompt(row), "answers": answers}


FORMATS = {"pairs": pairs, "rankings": rankings}


def export(preferences: Path, out: Path, *, format: str, split: str) -> int:
    """Write out, .jsonl or .parquet; returns how many records.

    Raises UserError where out has another ending or is the table itself, or where no row is of this split.
    """
    if out.suffix not in (".jsonl", ".parquet"):
        raise UserError(f"{out}: name a file that ends in .jsonl or .parquet; the ending says what is written")
    if out.exists() and out.samefile(preferences):
        raise UserError(f"{out}: is the table that is exported, and would be lost; name another file")
    rows = [row for row in read_rows(preferences) if row.meta.get("split", "train") == split]
    if not rows:
        raise UserError(f"{preferences}: no row of split {split!r}; preferences.held_out_share says how many there are")
    records = [record for row in rows for record in FORMATS[format](row)]
    if out.suffix == ".jsonl":
        lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)
        write_aside(out, lambda aside: aside.write_text(lines, encoding="utf-8"))
    else:
        write_table(out, _table(preferences, records))
    return len(records)


def _table(preferences: Path, records: list[dict[str, Any]]):
    import pyarrow as pa

    if len({type(record["prompt"]) for record in records}) > 1:
        raise UserError(f"{preferences} holds plain prompts and chats, which no column can hold together: use .jsonl")
    return pa.Table.from_pylist(records)


def _is_text(row: Row) -> bool:
    return len(row.prompt) == 1 and row.prompt[0].role == "text"


def _prompt(row: Row) -> str | list[dict[str, str]]:
    if _is_text(row):
        return show_prompt(row.prompt)
    return [{"role": message.role, "content": message.content} for message in row.prompt]


def _turn(row: Row, text: str) -> str | list[dict[str, str]]:
    return text if _is_text(row) else [{"role": "assistant", "content": text}]


def main(argv: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m tasks.export_preferences",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("out", type=Path, help="file to write, .jsonl or .parquet")
    parser.add_argument("--format", choices=FORMATS, required=True)
    parser.add_argument("--split", choices=("train", "held_out"), default="train", help="(%(default)s)")
    parser.add_argument(
        "--preferences", type=Path, default=Path("data/preferences.parquet"), help="table to read (%(default)s)"
    )
    arguments = parser.parse_args(argv)
    try:
        count = export(arguments.preferences, arguments.out, format=arguments.format, split=arguments.split)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{arguments.out}: {count} {arguments.format} of split {arguments.split}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
