"""Readers of data sets: tasks.sources, formats and shapes. Every record comes out, is told of or is counted."""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import warnings
from collections import Counter
from pathlib import Path
from random import Random
from typing import Any

import pyarrow.parquet as pq

from rankwise.rows import read_rows, write_rows
from rankwise.types import Row, UserError
from tasks.sources import SHOWN, File, read_examples

from . import arrow, octets, records, trees
from .law import Files, holds, reader

HOW = "how.json"  # how the file of the case is read


def _with_how(random: Random, name: str, data: bytes, columns: list[str]) -> Files:
    return {name: data, HOW: json.dumps(records.how(random, columns)).encode()}


def _made(random: Random) -> tuple[list[Any], list[str]]:
    whole = records.records(random)
    return [trees.changed(random, one) if random.random() < 0.3 else one for one in whole], [*whole[0]]


def jsonl(random: Random) -> tuple[bytes, list[str]]:
    made, columns = _made(random)
    end = random.choice(("\n", "\n", "\r\n", "\n\n"))
    data = trees.octets("".join(trees.as_json(random, one) + end for one in made))
    return (octets.spoilt(random, data, data) if random.random() < 0.4 else data), columns


def as_list(random: Random) -> tuple[bytes, list[str]]:
    made, columns = _made(random)
    data = trees.octets(trees.as_json(random, trees.changed(random, made) if random.random() < 0.1 else made))
    return (octets.spoilt(random, data, data) if random.random() < 0.4 else data), columns


def table(random: Random) -> tuple[bytes, list[str]]:
    made, columns = _made(random)
    made = [one for one in made if isinstance(one, dict)]
    names = [str(name) for one in made for name in one]
    names = [*dict.fromkeys(names)] if random.random() < 0.95 else names
    out = io.StringIO()
    writer = csv.writer(out, quoting=random.choice((csv.QUOTE_MINIMAL, csv.QUOTE_ALL)))
    writer.writerow(names)
    cell = lambda value: trees.as_json(random, value) if isinstance(value, (list, dict)) else value
    for one in made:
        row = [cell(one.get(name, "")) for name in names]
        try:
            writer.writerow(row if random.random() < 0.95 else row[:-1])
        except ValueError:  # a whole number that Python does not write
            continue
    data = trees.octets(random.choice(("", "", "\ufeff")) + out.getvalue())
    return (octets.spoilt(random, data, data) if random.random() < 0.4 else data), columns


def _text_file(random: Random, name: str, make) -> Files:
    data, columns = make(random)
    return _with_how(random, name, data, columns)


def _zipped(random: Random) -> Files:
    name, make = random.choice((("data.jsonl.gz", jsonl), ("data.json.gz", as_list), ("data.csv.gz", table)))
    if random.random() < 0.002:  # dear, so seldom: 48 MiB in 48 KiB
        line = random.choice((b"\0" * 2**20, b"[" * 2**20, b" " * (2**20 - 1) + b"\n"))
        return _with_how(random, name, octets.bomb(line, 48), [])
    data, columns = make(random)
    return _with_how(random, name, octets.zipped(random, data), columns)


def _parquet(random: Random) -> Files:
    made, columns = _made(random)
    return _with_how(random, "data.parquet", arrow.parquet(random, made), columns)


def _folder(random: Random) -> Files:
    parts = random.sample([("a.jsonl", jsonl), ("b.json", as_list), ("c.csv", table), ("d.jsonl.gz", None)], 2)
    made = {name: octets.zipped(random, jsonl(random)[0]) if make is None else make(random)[0] for name, make in parts}
    if random.random() < 0.1:
        made["e.jsonl/inside.txt"] = b"a folder with a file's name"
    more = {"README.md": b"", "notes.txt": b"\xff"} if random.random() < 0.3 else {}
    return {f"data/{name}": data for name, data in (made | more).items()} | {HOW: b"{}"}


def _read(folder: Path) -> None:
    [path] = (path for path in folder.iterdir() if path.name not in (HOW, "rows.parquet"))
    file = File(path=path.name, **json.loads((folder / HOW).read_bytes()))
    left_out: Counter[str] = Counter()
    rows: list[Row] = []
    try:
        for row in read_examples(path, file, opening_words=2, left_out=left_out):
            rows.append(row)
    except UserError as error:
        _check_told(str(error), path, len(rows) + sum(left_out.values()))
        raise
    if (count := _count(path)) is not None:
        holds(len(rows) + sum(left_out.values()) == count, "records came to nothing")
    _check_rows(rows)
    if len(rows) % 3 == 1:  # the dearest part of the law
        _check_same_again(rows, folder)


def _check_told(message: str, path: Path, taken: int) -> None:
    """Where all records were looked at, each is a row, was counted, or is told of."""
    head, *problems = message.split(f"\n  {path}")
    if head != f"{path}: bad records":
        return
    stopped = message.endswith(f"reading stopped at the first {SHOWN}")
    holds(len(problems) == SHOWN if stopped else len(problems) < SHOWN, "bad records are told wrongly")
    if not stopped and (count := _count(path)) is not None:
        holds(taken + len(problems) == count, "records came to nothing beside bad ones")


def _count(path: Path) -> int | None:
    """Records of a file, counted by other means; None where that is not to be had."""
    if path.is_dir():
        if (path / "state.json").exists() or (path / "dataset_dict.json").exists():
            return None
        counts = [_count(part) for part in path.iterdir() if part.suffix not in (".md", ".txt")]
        return None if None in counts else sum(counts)
    data = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending == ".jsonl":
        lines = data.removeprefix(b"\xef\xbb\xbf").split(b"\n")
        return sum(bool(line.decode("utf-8", "replace").strip()) for line in lines)
    if ending == ".json":
        return len(json.loads(data.decode("utf-8-sig")))
    if ending == ".parquet":
        return pq.ParquetFile(io.BytesIO(data)).metadata.num_rows
    if ending != ".csv":
        return None
    lines = re.findall(r"[^\n]*\n|[^\n]+\Z", data.decode("utf-8-sig"))
    return max(0, sum(map(bool, csv.reader(lines))) - 1)


def _check_rows(rows: list[Row]) -> None:
    """Rows that any table can hold."""
    holds(len({row.id for row in rows}) == len(rows), "an id occurs twice")
    for row in rows:
        holds(isinstance(row.id, str) and row.id.strip() and row.prompt, "a row without an id or a prompt")
        holds(all(m.role in ("text", "user", "assistant", "system") for m in row.prompt), "a role that is none")
        texts = [row.id, *(a.source for a in row.answers), *map(str, row.meta.values())]
        "".join([*texts, *(m.content for m in row.prompt), *(a.text for a in row.answers)]).encode("utf-8")


def _check_same_again(rows: list[Row], folder: Path) -> None:
    write_rows(folder / "rows.parquet", rows)
    again = {row.id: row for row in read_rows(folder / "rows.parquet")}
    holds(again == {row.id: row for row in rows}, "rows are others when written and read again")


def _saved(random: Random) -> Files:
    whole = random.choice(_saved_folders())
    files = dict(whole)
    spoilt = random.choice([*files])
    if random.random() < 0.9:
        if spoilt.endswith(".json") and random.random() < 0.6:
            value = trees.changed(random, json.loads(files[spoilt]))
            files[spoilt] = trees.octets(trees.as_json(random, value))
        else:
            files[spoilt] = octets.spoilt(random, files[spoilt], random.choice([*files.values()]))
    if random.random() < 0.1:
        del files[random.choice([*files])]
    return {f"data/{name}": data for name, data in files.items()} | {HOW: b"{}"}


_SAVED: list[Files] = []


def _saved_folders() -> list[Files]:
    """Folders as `datasets` saves them: one table, and a dictionary of splits."""
    if not _SAVED:
        import tempfile

        from datasets import Dataset, DatasetDict, disable_progress_bars

        disable_progress_bars()
        one = Dataset.from_list([{"id": f"r{n}", "prompt": "a b", "chosen": " c", "rejected": " d"} for n in range(3)])
        for value in (one, DatasetDict({"train": one, "test": one})):
            with tempfile.TemporaryDirectory() as made:
                value.save_to_disk(made)
                root = Path(made)
                files = sorted(path for path in root.rglob("*") if path.is_file())
                _SAVED.append({str(path.relative_to(root)): path.read_bytes() for path in files})
    return _SAVED


def _read_saved(folder: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        _read(folder)


reader(name="jsonl", make=lambda r: _text_file(r, "data.jsonl", jsonl), read=_read, weight=4.0)
reader(name="json", make=lambda r: _text_file(r, "data.json", as_list), read=_read, weight=2.0)
reader(name="csv", make=lambda r: _text_file(r, "data.csv", table), read=_read, weight=3.0)
reader(name="gz", make=_zipped, read=_read, weight=2.0)
reader(name="parquet", make=_parquet, read=_read, weight=1.2)
reader(name="folder", make=_folder, read=_read, weight=0.5, places=("data",))
reader(name="datasets", make=_saved, read=_read_saved, weight=0.2, places=("data",))
