"""Files of any format -> raw records, one at a time, each with its place in the file.

What breaks a whole file raises UserError; what breaks one record comes out in its place as a BadRecord, so that the
reader can name several at once. tasks.sources says which formats there are.
"""

from __future__ import annotations

import csv
import difflib
import itertools
import math
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa

from rankwise import json_text, text_files
from rankwise.rows import stream_records
from rankwise.table_checks import records_of
from rankwise.types import UserError

HUB = "hub:"
SPELT = 20  # names in a list of a message


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
    with text_files.opened(path) as handle:
        for number, line in enumerate(text_files.lines(handle, path), 1):
            yield number, _decoded(line, first=number == 1)


def _decoded(line: bytes, *, first: bool) -> str | BadRecord:
    try:
        return line.decode("utf-8-sig" if first else "utf-8")
    except UnicodeDecodeError as error:
        found = f"byte 0x{line[error.start]:02x} at column {error.start + 1}"
        return BadRecord(f"UTF-8 was expected, found {found}; save the file as UTF-8")


def _jsonl(path: Path) -> Iterator[Found]:
    for number, line in _lines(path):
        place = f"{path}:{number}"
        if isinstance(line, BadRecord):
            yield place, line
        elif line.strip():
            try:
                yield place, json_text.parse(line)
            except json_text.NotJson as error:
                yield place, BadRecord(f"one JSON object was expected, found {show(line.strip())}: {error}")


def _json(path: Path) -> Iterator[Found]:
    with text_files.opened(path) as handle:
        data = handle.read()  # a list is often one line, however many records it holds
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        number = data.count(b"\n", 0, error.start) + 1
        bad = _decoded(data.split(b"\n", number)[number - 1], first=number == 1)
        raise UserError(f"{path}:{number}: {bad}") from None
    try:
        value = json_text.parse(text)
    except json_text.NotJson as error:
        raise UserError(f"{path}:{error.line}: not JSON: {error}") from None
    if not isinstance(value, list):
        raise UserError(
            f"{path}: a JSON list of objects was expected, found {show(value)}; one object a line is .jsonl"
        )
    return ((f"{path} row {number}", record) for number, record in enumerate(value, 1))


def _csv(path: Path) -> Iterator[Found]:
    csv.field_size_limit(min(sys.maxsize, 2**31 - 1))
    table = csv.DictReader(_whole_lines(path), strict=True)
    try:
        names = table.fieldnames  # None where the file is empty
        if names == []:
            raise UserError(f"{path}:1: the columns' names were expected in the first line, which is blank; remove it")
        _refuse_repeats(names or (), f"{path}:1")
        for record in table:
            place = f"{path}:{table.line_num}"
            if None in record or None in record.values():
                yield place, BadRecord(f"{len(table.fieldnames)} fields were expected, as in line 1; check the quotes")
            else:
                try:
                    yield place, {name: _unpacked(value) for name, value in record.items()}
                except BadRecord as bad:
                    yield place, bad
    except csv.Error as error:
        raise UserError(f"{path}:{table.line_num}: not CSV: {error}; check the quotes") from None


def _unpacked(value: str) -> Any:
    # CSV has no lists: message lists and answers are written as JSON inside a field.
    if value.startswith(("[{", '{"')):
        try:
            return json_text.parse(value)
        except json_text.NotJson:
            return value
    return value


def _refuse_repeats(names: Iterable[str], place: str) -> None:
    """Of two columns with one name a record would keep the last."""
    seen = set()
    for name in names:
        if name in seen:
            raise UserError(f"{place}: two columns are called {show(name)}; rename one of them")
        seen.add(name)


def _whole_lines(path: Path) -> Iterator[str]:
    for number, line in _lines(path):
        if isinstance(line, BadRecord):
            raise UserError(f"{path}:{number}: {line}")
        yield line


def _parquet(path: Path) -> Iterator[Found]:
    return _numbered(str(path), stream_records(path))


_READERS = {".jsonl": _jsonl, ".json": _json, ".csv": _csv, ".parquet": _parquet}


def _folder(path: Path, split: str) -> Iterator[Found]:
    if (path / "dataset_dict.json").is_file() or (path / "state.json").is_file():
        return _saved(path, split)
    endings = ((p, Path(p.name.removesuffix(".gz")).suffix) for p in path.iterdir() if not p.is_dir())
    parts = sorted(p for p, ending in endings if ending in _READERS)
    if not parts:
        raise UserError(f"{path}: a folder without data: neither {spell(_READERS)} files nor one saved by datasets")
    return itertools.chain.from_iterable(_READERS[_ending(part)](part) for part in parts)


def _saved(path: Path, split: str) -> Iterator[Found]:
    # Not through the package itself: it maps files into memory, and a damaged one then ends the process.
    again = "save it again with `datasets`"
    where = path
    if (path / "dataset_dict.json").is_file():
        listed = json_text.read(path / "dataset_dict.json", again)
        splits = listed.get("splits") if isinstance(listed, dict) else None
        if not isinstance(splits, list) or not all(isinstance(name, str) for name in splits):
            raise UserError(f"{path / 'dataset_dict.json'}: a list of splits was expected; {again}")
        if split not in splits:
            raise UserError(f"{path}: no split {split!r}{near(split, splits)}; found {spell(splits)}")
        where = path / split
    if not (where / "state.json").is_file():
        raise UserError(f"{where}: holds no state.json; {again}")
    state = json_text.read(where / "state.json", again)
    files = state.get("_data_files") if isinstance(state, dict) else None
    names = [one.get("filename") if isinstance(one, dict) else None for one in files] if isinstance(files, list) else []
    if not names or not all(map(_is_plain, names)):
        raise UserError(f"{where / 'state.json'}: a list of data files was expected; {again}")
    if state.get("_indices_files") or state.get("_indices_data_files"):
        raise UserError(f"{where}: saved with a table of indices, as old releases of `datasets` do; {again}")
    records = itertools.chain.from_iterable(_arrow(where / name, again) for name in names)
    return _numbered(str(path), records)


def _is_plain(name: Any) -> bool:
    """Whether it is the name of a file, and no way out of the folder."""
    return isinstance(name, str) and Path(name).name == name


def _arrow(path: Path, mend: str) -> Iterator[dict]:
    """The records of a stream of Arrow batches, each checked before it is looked into."""
    try:
        with pa.OSFile(str(path)) as file, pa.ipc.open_stream(file) as stream:
            for batch in stream:
                batch.validate(full=True)
                yield from records_of(batch)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{path}: not a readable Arrow file ({error}); {mend}") from None


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
    """Names as a message lists them: the first twenty, each cut short."""
    cut = [f"{str(name)[:60]}{'…' if len(str(name)) > 60 else ''}" for name in names]
    rest = f" and {len(cut) - SPELT} more" if len(cut) > SPELT else ""
    return json_text.whole_characters(", ".join(cut[:SPELT]) + rest)


def near(name: str, known: Iterable[str]) -> str:
    """ "; did you mean …?" where a known name is close, else nothing."""
    short = [one for one in map(str, known) if len(one) < 100]
    close = difflib.get_close_matches(str(name)[:100], short, n=1, cutoff=0.5)
    return f"; did you mean {close[0]!r}?" if close else ""


def show(value: Any) -> str:
    """A value as an error message shows it: what it is, cut short."""
    if value is None:
        return "null (a missing value)"
    if isinstance(value, float) and math.isnan(value):
        return "NaN (a missing value)"
    text = repr(value)
    return f"{text if len(text) <= 60 else text[:57] + '…'} ({type(value).__name__})"
