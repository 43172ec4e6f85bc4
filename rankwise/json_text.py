"""JSON text -> a value, as strictly as data deserve: the one way in for every file, line and field of JSON.

Python's own reader takes the last of two values under one name without a word, fails in ways of its own on deep nesting
and long numbers, and hands on nesting that whatever walks the value later cannot take.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rankwise.types import UserError

DEEPEST = 64  # lists and objects inside one another
_HALVES = re.compile("[\ud800-\udfff]")


class NotJson(ValueError):
    """Why a text is no JSON, or none that can be used, and in which of its lines, from 1."""

    def __init__(self, why: str, line: int = 1):
        super().__init__(why)
        self.line = line


def parse(text: str) -> Any:
    """The value; raises NotJson, also where a name stands twice in one object or nesting is deeper than DEEPEST."""
    try:
        value = json.loads(text, object_pairs_hook=_named_once)
    except NotJson:
        raise
    except json.JSONDecodeError as error:
        raise NotJson(f"{error.msg} at column {error.colno}", error.lineno) from None
    except RecursionError:
        raise NotJson(_TOO_DEEP) from None
    except ValueError:  # Python's guard against numbers that take it long to read
        raise NotJson("a number has thousands of digits") from None
    if text.count("[") + text.count("{") > DEEPEST and _is_deep(value):
        raise NotJson(_TOO_DEEP)
    return value


def read(path: Path, mend: str) -> Any:
    """The value in a file that a stage or another program wrote.

    Raises UserError where the file is missing or broken; mend: what to do then, for the message.
    """
    try:
        return parse(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; {mend}") from None
    except NotJson as error:
        raise UserError(f"{path}:{error.line}: not JSON ({error}); {mend}") from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: no UTF-8 text ({error}); {mend}") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); {mend}") from None


@contextlib.contextmanager
def as_written(path: Path, mend: str) -> Iterator[None]:
    """A block that looks for what a program of the project wrote into a file, and tells where it is not there.

    Raises UserError with the file's name in place of what a value of another form brings about.
    """
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, AttributeError, ValueError, ArithmeticError) as error:
        said = f"{type(error).__name__}: {whole_characters(str(error))[:200]}"
        raise UserError(f"{path}: not what the project writes there ({said}); {mend}") from error


def whole_characters(text: str) -> str:
    """A text with U+FFFD for each half of a surrogate pair: JSON can write one alone, and UTF-8 cannot."""
    return _HALVES.sub("\ufffd", text)


_TOO_DEEP = f"lists and objects are nested more than {DEEPEST} deep"


def _named_once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise NotJson(f"the name {twice[:60]!r} stands twice in one object")
    return found


def _is_deep(value: Any) -> bool:
    level = [value] if type(value) in (dict, list) else []
    for _ in range(DEEPEST):
        parts = itertools.chain.from_iterable(one.values() if type(one) is dict else one for one in level)
        level = [part for part in parts if type(part) in (dict, list)]
        if not level:
            return False
    return True
