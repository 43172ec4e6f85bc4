"""Identities: a short hash of exactly the bytes that a result depends on.

Keys of the row stores are built from these, so a hit under other weights, another tokenizer or another setting is
impossible. Nothing here depends on a path, a time or a machine.
"""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rankwise.types import UserError

CHUNK_BYTES = 1 << 20
WEIGHT_FILES = ("*.safetensors", "config.json")
TOKENIZER_FILES = (
    *("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "special_tokens_map.json"),
    *("tokenizer.model", "*.spm", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json"),  # older layouts
)


def digest(*parts: Any) -> str:
    """Hash of JSON-able parts, 32 hex digits (128 bits); lists and tuples are alike, dicts ignore order."""
    text = json.dumps(parts, sort_keys=True, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def file_digest(path: Path) -> str:
    """Hash of a file's bytes; within a process a file that was not touched since is not read again."""
    about = path.stat()
    return _bytes_digest(path.resolve(), about.st_ino, about.st_size, about.st_mtime_ns, about.st_ctime_ns)


@functools.lru_cache(maxsize=4096)
def _bytes_digest(path: Path, *_: int) -> str:
    hasher = hashlib.sha256()
    with open(path, "rb") as handle:
        while chunk := handle.read(CHUNK_BYTES):
            hasher.update(chunk)
    return hasher.hexdigest()[:32]


def weights_digest(folder: Path) -> str:
    """Identity of a model folder's weights and architecture; renaming the folder changes nothing."""
    return _files_digest(folder, WEIGHT_FILES)


def tokenizer_digest(folder: Path) -> str:
    """Identity of a model folder's tokenizer and chat template."""
    return _files_digest(folder, TOKENIZER_FILES)


def sampling_digests(folder: Path) -> list[str]:
    """Identity of a model folder as a source of answers."""
    # generation_config.json may name further end tokens; code of a folder's own is run where the user trusts it.
    more = sorted([*Path(folder).glob("generation_config.json"), *Path(folder).glob("*.py")])
    return [weights_digest(folder), tokenizer_digest(folder), *map(file_digest, more)]


def sampled_from(weights: str, prompt_ids: Sequence[int]) -> str:
    """What a row of sampled answers keeps of its origin: a model with other weights, or one that reads other prompt
    tokens, is not what sampled them."""
    return digest("sampled from", weights, prompt_ids)


def _files_digest(folder: Path, patterns: tuple[str, ...]) -> str:
    files = sorted({path for pattern in patterns for path in Path(folder).glob(pattern)})
    if not files:
        raise UserError(f"{folder}: holds none of {', '.join(patterns)}; a model folder is expected")
    return digest([(path.name, file_digest(path)) for path in files])
