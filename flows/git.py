"""git as a command."""

import subprocess
from pathlib import Path

from rankwise.types import UserError


def git(*words: str, where: str | Path = ".", check: bool = True) -> subprocess.CompletedProcess[str]:
    """Run git in a folder; raises UserError with its last words where it fails, unless check is False."""
    command = ["git", "-C", str(where), *words]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if check and done.returncode != 0:
        raise UserError(f"git {words[0]}: {last_line(done.stderr)}")
    return done


def last_line(text: str, nothing: str = "it said nothing") -> str:
    """The last line that says something."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else nothing
