"""Where bytes come from: the git commit, DVC's digest of a file or folder, and what dvc.lock says about a stage.

Digests are computed from the bytes, by DVC's own rule, so they equal the md5 in dvc.lock once DVC has seen the same
bytes, and they never repeat a stale entry of it.
"""

from __future__ import annotations

import hashlib
import json
import subprocess
from pathlib import Path

import yaml

from rankwise.types import UserError

LOCK = Path("dvc.lock")


def md5_of(path: Path) -> str:
    """DVC's md5 of a file, or of a folder ("….dir": the md5 of its sorted listing).

    Raises UserError where there is nothing at path.
    """
    path = Path(path)
    if path.is_file():
        with open(path, "rb") as handle:
            return hashlib.file_digest(handle, "md5").hexdigest()
    if not path.is_dir():
        raise UserError(f"{path}: no such file or folder; run the stage that makes it, or fetch it with `dvc pull`")
    files = (file for file in path.rglob("*") if file.is_file() and file.name != ".gitignore")
    listing = [{"md5": md5_of(file), "relpath": file.relative_to(path).as_posix()} for file in files]
    listing.sort(key=lambda entry: entry["relpath"])
    return hashlib.md5(json.dumps(listing, sort_keys=True).encode("utf-8")).hexdigest() + ".dir"


def git_commit() -> str:
    """The commit of the working folder, with "+dirty" where tracked files differ from it; "" outside git."""
    commit = _git("rev-parse", "HEAD")
    dirty = commit and _git("status", "--porcelain", "--untracked-files=no")
    return f"{commit}+dirty" if dirty else commit


def lock_md5(lock: Path = LOCK) -> str:
    """The md5 of dvc.lock itself, "" where there is none: one word for every input and output of the pipeline."""
    return md5_of(lock) if Path(lock).is_file() else ""


def lock_entry_md5(stage: str, lock: Path = LOCK) -> str:
    """The md5 of a stage's entry in dvc.lock (command, inputs, params, outputs), "" where it has none."""
    if not Path(lock).is_file():
        return ""
    stages = (yaml.safe_load(Path(lock).read_text(encoding="utf-8")) or {}).get("stages", {})
    entry = stages.get(stage)
    return hashlib.md5(json.dumps(entry, sort_keys=True).encode("utf-8")).hexdigest() if entry else ""


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
