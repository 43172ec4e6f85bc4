"""Files of any format -> raw records, one at a time, each with its place in the file.

What breaks a whole file raises UserError; what breaks one record comes out in its place as a BadRecord, so that the
reader can name several at once. tasks.sources says which formats there are.
"""

from __future__ import annotations

import csv
import difflib
import gzip
import itertools
import json
import math
import sys
import zlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from rankwise.types import UserError

HUB = "hub:"


class BadRecord(ValueError):
    """What is wrong with one record and how to mend it; the reader adds the file, the line and the id."""


Found = tuple[str, dict | BadRecord]  # a place ("file:line" or "file row n", from 1), and what is there


def records(path: Path | str, *, split: str, subset: str) -> Iterator[Found]:
    """The raw records of a source. split and subset choose within a datasets folder or a hub id.

    Raises UserError where the source is missing or cannot be read at all.
    """
    if str(path).startswith(HUB):
        return _hub(str(path).removeprefix(HUB), split, subset)
    path = Path(path)
    if not path.exists():
        beside = sorted(p.name for p in path.parent.iterdir()) if path.parent.is_dir() else []
        raise UserError(
            f"{path}: no such file or folder{near(path.name, beside)} "
            f"(found there: {spell(beside[:20]) or 'nothing'}); a data set of the hub is written hub:org/name@revision"
        )
    if path.is_dir():
        return _folder(path, split)
    return _READERS[_ending(path)](path)


def _ending(path: Path) -> str:
    ending = Path(path.name.removesuffix(".gz")).suffix
    if ending not in _READERS:
        raise UserError(f"{path}: unknown format {ending!r}; known: {spell(_READERS)} (text also as .gz), or a folder")
    return ending


def _lines(path: Path) -> Iterator[tuple[int, str | BadRecord]]:
    try:
        with gzip.open(path) if path.suffix == ".gz" else open(path, "rb") as handle:
            for number, line in enumerate(handle, 1):
                try:
                    yield number, line.decode("utf-8-sig" if number == 1 else "utf-8")
                except UnicodeDecodeError as error:
                    found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
                    yield number, BadRecord(f"UTF-8 was expected, found {found}; save the file as UTF-8")
    except (gzip.BadGzipFile, EOFError, zlib.error) as error:
        raise UserError(f"{path}: not a whole gzip file ({error}); fetch it again") from None


def _jsonl(path: Path) -> Iterator[Found]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if isinstance(line, BadRecord):
            yield place, line
        elif line.strip():
            try:
                yield place, json.loads(line)
            except json.JSONDecodeError as error:
                why = f"found {show(line.strip())}: {error.msg} at column {error.colno}"
                yield place, BadRecord(f"one JSON object was expected, {why}")


def _json(path: Path) -> Iterator[Found]:
    text = "".join(_whole_lines(path))
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: not JSON: {error.msg} at column {error.colno}") from None
    if not isinstance(value, list):
        raise UserError(
            f"{path}: a JSON list of objects was expected, found {show(value)}; one object a line is .jsonl"
        )
    return ((f"{path} row {number}", record) for number, record in enumerate(value, 1))


def _csv(path: Path) -> Iterator[Found]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    table = csv.DictReader(_whole_lines(path), strict=True)
    try:
        for record in table:
            place = f"{path}:{table.line_num}"
            if None in record or None in record.values():
                yield place, BadRecord(f"{len(table.fieldnames)} fields were expected, as in line 1; check the quotes")
            else:
                yield place, {name: _unpacked(value) for name, value in record.items()}
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: not CSV: {error}; check the quotes") from None


def _unpacked(value: str) -> Any:
    # CSV has no lists: message lists and answers are written as JSON inside a field.
    if value.startswith(("[{", '{"')):
        try:
            return json.loads(value)
        except json.JSONDecodeError:
            return value
    return value


def _whole_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if isinstance(line, BadRecord):
            raise UserError(f"{path}:{number}: {line}")
        yield line


def _parquet(path: Path) -> Iterator[Found]:
    try:
        batches = pq.ParquetFile(path).iter_batches(1024)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in batches)
        for number, record in enumerate(rows, 1):
            yield f"{path} row {number}", record
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a readable Parquet file ({error}); fetch or write it again") from None


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _folder(path: Path, split: str) -> Iterator[Found]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    parts = sorted(p for p in path.iterdir() if Path(p.name.removesuffix(".gz")).suffix in _READERS)
    if not parts:
        raise UserError(f"{path}: a folder without data: neither {spell(_READERS)} files nor one saved by datasets")
    return itertools.chain.from_iterable(_READERS[_ending(part)](part) for part in parts)


def _saved(path: Path, split: str) -> Iterator[Found]:
    from datasets import DatasetDict, load_from_disk  # heavy, and only this format needs it

    try:
        data = load_from_disk(str(path))
    except (OSError, ValueError, KeyError, TypeError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable datasets folder ({error}); save it again") from None
    if isinstance(data, DatasetDict):
        if split not in data:
            raise UserError(f"{path}: no split {split!r}{near(split, data)}; found {spell(data)}")
        data = data[split]
    return _numbered(str(path), data)


def _hub(name: str, split: str, subset: str) -> Iterator[Found]:
    import httpx
    from datasets import load_dataset  # heavy, and only this format needs it
    from datasets.exceptions import DatasetsError

    repository, _, revision = name.partition("@")
    try:
        data = load_dataset(repository, subset or None, split=split, revision=revision or None)
    except (OSError, ValueError, RuntimeError, DatasetsError, httpx.HTTPError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise UserError(
            f"{HUB}{name} (subset {subset or 'default'!r}, split {split!r}): could not be read: {reason}; "
            "check the name, the split and the network, or download it and give its folder"
        ) from None
    return _numbered(f"{HUB}{name}", data)


def _numbered(name: str, data: Iterable[dict]) -> Iterator[Found]:
    return ((f"{name} row {number}", record) for number, record in enumerate(data, 1))


def spell(names: Iterable[str]) -> str:
    """Names as a message lists them."""
    return ", ".join(map(str, names))


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" where a known name is close, else nothing."""
    close = difflib.get_close_matches(str(name), list(known), n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def show(value: Any) -> str:
    """A value as an error message shows it: what it is, cut short."""
    if value is None:
        return "null (a missing value)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN (a missing value)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"
