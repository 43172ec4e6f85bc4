"""A clone of the working tree in a folder of its own, under git and DVC, with tiny params: as a user has it."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import tiny
import warm

ROOT = Path(__file__).parent.parent

QUIET = {
    "DVC_NO_ANALYTICS": "1",
    "RANKWISE_TRACKING": "off",
    "OMP_NUM_THREADS": "1",
    **{f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")},
}


class Repository:
    """A clone of this working tree with tiny params, under git and DVC.

    warm: its stages are forked (tests/warm.py); False where they are to be killed.
    """

    def __init__(self, root: Path, recipe: dict[str, Any] | None = None, *, warm: bool = True):
        self.root, self.warm = root, warm
        listed = subprocess.run(
            ["git", "ls-files", "--cached", "--others", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
        )
        for name in listed.stdout.splitlines():
            if (ROOT / name).is_file() and not name.startswith((".dvc/", "dvc.lock")):
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        self.apply(recipe or {})
        self.command("git", "init", "-q", ".")
        self.command("dvc", "init", "-q")
        self.command("dvc", "config", "core.analytics", "false")
        self.command("git", "add", "-A")
        self.command("git", "commit", "-q", "-m", "tiny")

    @classmethod
    def at(cls, root: Path) -> Repository:
        """One that is there."""
        repository = object.__new__(cls)
        repository.root, repository.warm = root, True
        return repository

    def apply(self, recipe: dict[str, Any]) -> None:
        """Write params.yaml anew: tiny, with a recipe over it."""
        (self.root / "params.yaml").write_text(tiny.render(tiny.over(tiny.TINY, recipe)))

    def command(self, *words: str, **environment: str) -> str:
        environment = {**self.environment(), **environment}
        done = subprocess.run(words, cwd=self.root, env=environment, capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    def environment(self) -> dict[str, str]:
        first = [str(warm.folder())] if self.warm else []
        path = os.pathsep.join([*first, str(Path(sys.executable).parent), os.environ["PATH"]])
        # This copy's own modules, not those of the installed tree.
        return {**os.environ, **QUIET, "PATH": path, "PYTHONPATH": str(self.root)}

    def ran(self, said: str) -> list[str]:
        """Stages that DVC started, in order; those of the only round by their plain names."""
        started = [line.split("'")[1] for line in said.splitlines() if line.startswith("Running stage '")]
        return [address.removesuffix("@1") for address in started]
