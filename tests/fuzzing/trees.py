"""Whole values -> odd values: a list or mapping in which some part is missing, twice, elsewhere or of another type."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from random import Random
from typing import Any

# What no Python value writes by itself; put into the text in place of these.
_RAW = {
    "@@many digits@@": "9" * 5000,
    "@@deep list@@": "[" * 60 + "]" * 60,
    "@@deeper list@@": "[" * 700 + "]" * 700,
    "@@deepest list@@": "[" * 20000 + "]" * 20000,
    "@@deep object@@": '{"a":' * 300 + "1" + "}" * 300,
    "@@large exponent@@": "1e400",
    "@@minus zero@@": "-0",
}
TEXTS = (
    *("", " ", "\n", "\t\r\n", "\x00", "\x7f", "\u2028", "\ufeff", "é", "漢字", "🙂", "\ud800", "a\udc80b", "e\u0301"),
    *("a, b", 'say "hi"', "it's", "#no", "- no", "{no}", "[no]", "no: no", "*no", "&no", "!no", "%no", "@no", "`no`"),
    *(
        "null",
        "true",
        "no",
        "1",
        "1.0",
        "1e3",
        "5e-7",
        "0x1F",
        "0o17",
        "1_000",
        "1:30",
        "2026-11-28",
        ".inf",
        "nan",
        "~",
    ),
    *("=1+1", "A", "tie", "A > B", "stop", "<|im_start|>", "</s>", "<!-- -->", "../../etc/passwd", "\n\nHuman: hi"),
    *("x" * 5000, "word " * 300, '[{"role": "user", "content": "hi"}]', '{"a": ' * 300, "[" * 3000),
)
NUMBERS = (
    0,
    1,
    -1,
    2,
    7,
    255,
    2**31,
    2**63,
    -(2**63),
    10**400,
    0.0,
    -0.0,
    0.5,
    1e-320,
    1e308,
    float("nan"),
    float("inf"),
)


def odd(random: Random) -> Any:
    """A value that few readers wait for."""
    kind = random.randrange(9)
    if kind < 3:
        return random.choice(TEXTS)
    if kind < 5:
        return random.choice(NUMBERS)
    if kind == 5:
        return random.choice((None, True, False))
    if kind == 6:
        return random.choice(
            ([], {}, [[]], [{}], {"": {}}, [None], {"a": [1, {"b": None}]}, ["x"] * 300, {"x": "y" * 900})
        )
    if kind == 7:
        return random.choice([*_RAW])
    return [odd(random) for _ in range(random.randrange(4))]


def changed(random: Random, value: Any) -> Any:
    """The value after one or a few changes, each somewhere in it; shares parts with the original, which stays."""
    for _ in range(random.choice((1, 1, 1, 2, 5))):
        value = _once(random, value)
    return value


def _once(random: Random, value: Any) -> Any:
    if isinstance(value, dict) and value and random.random() < 0.85:
        key = random.choice([*value])
        if random.random() < 0.6:
            return {**value, key: _once(random, value[key])}
        return random.choice(_OF_MAPPINGS)(random, value, key)
    if isinstance(value, list) and value and random.random() < 0.85:
        at = random.randrange(len(value))
        if random.random() < 0.6:
            return [*value[:at], _once(random, value[at]), *value[at + 1 :]]
        return random.choice(_OF_LISTS)(random, value, at)
    return random.choice(_OF_ANY)(random, value)


_OF_MAPPINGS: tuple[Callable[[Random, dict, Any], Any], ...] = (
    lambda random, value, key: {name: one for name, one in value.items() if name != key},
    lambda random, value, key: {**value, random.choice(TEXTS): value[key]},
    lambda random, value, key: {(random.choice(TEXTS) if name == key else name): one for name, one in value.items()},
    lambda random, value, key: {**value, key: value[random.choice([*value])]},
    lambda random, value, key: {name: value[name] for name in random.sample([*value], len(value))},
    lambda random, value, key: [value],
    lambda random, value, key: {**value, f"{key}s": odd(random)},
)
_OF_LISTS: tuple[Callable[[Random, list, int], Any], ...] = (
    lambda random, value, at: value[:at] + value[at + 1 :],
    lambda random, value, at: [*value, value[at]],
    lambda random, value, at: [*value[:at], odd(random), *value[at:]],
    lambda random, value, at: value[::-1],
    lambda random, value, at: value[at],
    lambda random, value, at: {str(number): one for number, one in enumerate(value)},
    lambda random, value, at: [],
)
_OF_ANY: tuple[Callable[[Random, Any], Any], ...] = (
    lambda random, value: odd(random),
    lambda random, value: odd(random),
    lambda random, value: [value],
    lambda random, value: {"a": value},
    lambda random, value: str(value) if not isinstance(value, (dict, list)) else None,
    lambda random, value: -value if isinstance(value, (int, float)) else f"{value} "[:2000],
    lambda random, value: random.choice((value, not value)),
)


def as_json(random: Random, value: Any) -> str:
    """JSON text of a value, with what Python cannot write itself; now and then a name that stands twice."""
    text = json.dumps(value, ensure_ascii=random.random() < 0.5)
    return _with_raw(random, text)


def _with_raw(random: Random, text: str) -> str:
    for mark, raw in _RAW.items():
        if mark in text:
            text = text.replace(json.dumps(mark), raw)
    if random.random() < 0.03 and (names := [*re.finditer(r'(?<=[{,])\s*"\w+": ', text)]):
        name = random.choice(names)
        text = text[: name.start()] + name[0] + "null, " + text[name.start() :]
    return text


def octets(text: str) -> bytes:
    """A text's bytes; half a character as the bytes that no UTF-8 has."""
    return text.encode("utf-8", "surrogatepass")
