"""Where bytes come from: the git commit, DVC's digest of a file or folder, and what dvc.lock says about a stage.

Digests are computed from the bytes, by DVC's own rule, so they equal the md5 in dvc.lock once DVC has seen the same
bytes, and they never repeat a stale entry of it.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

from rankwise.types import UserError
from tasks import yaml_text

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
    entry = lock_entries(lock).get(stage)
    return hashlib.md5(json.dumps(entry, sort_keys=True, default=str).encode("utf-8")).hexdigest() if entry else ""


def lock_entries(lock: Path = LOCK) -> dict[str, dict]:
    """What dvc.lock says of each stage, none where it is empty; raises UserError where DVC did not write it so."""
    document = yaml_text.read(lock, missing="run the pipeline first: make run") or {}
    stages = document.get("stages") or {} if isinstance(document, dict) else None
    if not isinstance(stages, dict) or not all(isinstance(entry, dict) for entry in stages.values()):
        raise UserError(f"{lock}: not as DVC writes it, an entry for each stage; get it back from git")
    return stages


def maker_of(path: Path, graph: Path = Path("dvc.yaml")) -> str:
    """The stage of dvc.yaml whose output a path is, or lies in, whatever its round; "" where none is."""
    try:
        stages = yaml_text.read(graph, missing="").get("stages", {})
        outputs = [(name, out) for name, entry in stages.items() for out in _outputs(entry)]
    except (UserError, AttributeError, TypeError):  # no project here, or no graph that DVC could read
        return ""
    wanted = os.path.relpath(path)
    fits = lambda out: re.fullmatch(".*".join(map(re.escape, re.split(r"\$\{[^}]*\}", out))) + "(/.*)?", wanted)
    found = [(len(out), name) for name, out in outputs if fits(out)]
    return max(found)[1] if found else ""


def _outputs(entry: dict) -> Iterator[str]:
    for kind in ("outs", "metrics", "plots"):
        for out in entry.get("do", entry).get(kind, []):
            yield from [out] if isinstance(out, str) else out


def _git(*arguments: str) -> str:
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return ""
    return done.stdout.strip()
