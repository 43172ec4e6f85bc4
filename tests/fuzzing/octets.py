"""Whole bytes -> spoilt bytes: what disks, editors, transfers and other programs do to a file."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Sequence
from random import Random

# What means something to a parser of text, each with what is easily got wrong about it.
WORDS = (
    *(b"{", b"}", b"[", b"]", b'"', b"'", b":", b",", b"\\", b"#", b"&a ", b"*a", b"!!", b"<<: ", b"- ", b"? ", b"|\n"),
    *(b"\n", b"\r", b"\r\n", b"\t", b"\x00", b"\x0b", b"\xef\xbb\xbf", b"\xff\xfe", b"\xed\xa0\x80", b"\xc3", b"\x85"),
    *(b"\xe2\x80\xa8", b"\\ud800", b"\\u0000", b"null", b"true", b"NaN", b"-Infinity", b"1e999", b"-0.0", b"1e-7"),
    *(b"0x_", b"0x" + b"f" * 5000, b"9" * 5000, b"2026-13-45", b"2026-11-28", b"1:99", b"!!timestamp x", b"!!bool x"),
    *(b"[" * 2000, b'{"a":' * 2000, b'{"a": 1, "a": 2}', b"x" * 3000, b"=1+1", b"---\n", b"...\n", b"%YAML 9.9\n"),
    *(b"{% for a in range(9) %}", b"{{ a.b.c }}", b"{{ 1 / 0 }}", b"{{ raise_exception('no') }}", b"{% endif %}"),
)


def spoilt(random: Random, data: bytes, other: bytes = b"") -> bytes:
    """The bytes after one to four small accidents."""
    for _ in range(random.choice((1, 1, 1, 2, 4))):
        data = random.choice(ACCIDENTS)(random, data, other)
    return data


def _flip(random: Random, data: bytes, _: bytes) -> bytes:
    if not data:
        return data
    out = bytearray(data)
    for _ in range(random.choice((1, 1, 3, 20))):
        out[random.randrange(len(out))] ^= 1 << random.randrange(8)
    return bytes(out)


def _set(random: Random, data: bytes, _: bytes) -> bytes:
    """A run of one byte, as zeroed blocks are."""
    at, size = _span(random, data)
    return data[:at] + bytes([random.choice((0, 0xFF, 0x20, random.randrange(256)))]) * size + data[at + size :]


def _cut(random: Random, data: bytes, _: bytes) -> bytes:
    return data[: random.randrange(len(data) + 1)]


def _drop(random: Random, data: bytes, _: bytes) -> bytes:
    at, size = _span(random, data)
    return data[:at] + data[at + size :]


def _repeat(random: Random, data: bytes, _: bytes) -> bytes:
    at, size = _span(random, data)
    return data[: at + size] + data[at : at + size] * random.choice((1, 1, 2, 30)) + data[at + size :]


def _move(random: Random, data: bytes, _: bytes) -> bytes:
    at, size = _span(random, data)
    rest = data[:at] + data[at + size :]
    to = random.randrange(len(rest) + 1)
    return rest[:to] + data[at : at + size] + rest[to:]


def _insert(random: Random, data: bytes, _: bytes) -> bytes:
    at = random.choice((0, len(data), random.randrange(len(data) + 1)))
    return data[:at] + random.choice(WORDS) + data[at:]


def _over(random: Random, data: bytes, _: bytes) -> bytes:
    at, word = random.randrange(len(data) + 1), random.choice(WORDS)
    return data[:at] + word + data[at + len(word) :]


def _splice(random: Random, data: bytes, other: bytes) -> bytes:
    """The head of one file and the tail of another, as an unfinished copy over an older file has."""
    return data[: random.randrange(len(data) + 1)] + other[random.randrange(len(other) + 1) :]


def _noise(random: Random, data: bytes, _: bytes) -> bytes:
    at = random.randrange(len(data) + 1)
    return data[:at] + random.randbytes(random.choice((1, 4, 64, 600))) + data[at:]


def _span(random: Random, data: bytes) -> tuple[int, int]:
    at = random.randrange(len(data) + 1)
    return at, min(len(data) - at, random.choice((1, 2, 8, 60, 400)))


ACCIDENTS = (_flip, _flip, _set, _cut, _drop, _repeat, _move, _insert, _insert, _over, _splice, _noise)


def zipped(random: Random, data: bytes) -> bytes:
    """The bytes in a gzip file: whole, in two parts, with something after them, spoilt, or no gzip at all."""
    whole = gzip.compress(data, compresslevel=1, mtime=0)
    kind = random.randrange(8)
    if kind < 2:
        return whole
    if kind == 2:
        at = random.randrange(len(data) + 1)
        return gzip.compress(data[:at], mtime=0) + gzip.compress(data[at:], mtime=0)
    if kind == 3:
        return whole + random.choice((b"\0" * 32, b"tail", whole[:10]))
    if kind == 4:
        return random.choice((data, zlib.compress(data), b""))
    return spoilt(random, whole, whole)


def bomb(line: bytes, count: int) -> bytes:
    """A gzip file of so many times the same bytes, made without them all in memory."""
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    return b"".join([*(packer.compress(line) for _ in range(count)), packer.flush()])


def one_of(random: Random, whole: Sequence[bytes]) -> bytes:
    """A whole file, now and then as it is, most often spoilt."""
    data = random.choice(whole)
    return data if random.random() < 0.1 else spoilt(random, data, random.choice(whole))
