"""PostgreSQL's own ways: where its programs are, a user who is not root, a cluster with a password from the start."""

from __future__ import annotations

import glob
import os
import pwd
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import psutil

from infra.stack.processes import as_user
from infra.stack.settings import DATABASE_USER
from rankwise.types import UserError


def program(name: str) -> str:
    """The path of one of PostgreSQL's programs; raises UserError that names the package where there is none."""
    versions = sorted(glob.glob(f"/usr/lib/postgresql/*/bin/{name}"), key=lambda path: int(path.split("/")[4]))
    if found := shutil.which(name) or next(reversed(versions), None):
        return found
    raise UserError(
        f"PostgreSQL's {name} is neither on PATH nor below /usr/lib/postgresql; install it: "
        "apt-get install postgresql (Debian, Ubuntu), dnf install postgresql-server (Fedora, RHEL), "
        "brew install postgresql (macOS)"
    )


def user() -> str | None:
    """Who runs PostgreSQL, which refuses root: `postgres` or `nobody` where this is root, else None, this user."""
    if os.geteuid() != 0:
        return None
    for name in ("postgres", "nobody"):
        try:
            return pwd.getpwnam(name).pw_name
        except KeyError:
            continue
    raise UserError("PostgreSQL refuses to run as root, and this system has no user postgres or nobody; add one")


def wait_for_the_last(data: Path, seconds: float = 10.0) -> None:
    """Return once a postmaster that was killed is gone from the system's table of processes, or the time is over."""
    try:
        last = int((data / "postmaster.pid").read_text(encoding="utf-8").split()[0])
    except (OSError, ValueError, IndexError):
        return
    deadline = time.monotonic() + seconds
    while psutil.pid_exists(last) and time.monotonic() < deadline:
        time.sleep(0.1)


def initialize(data: Path, password: str) -> None:
    """Make the cluster, if it is not there: one user, who needs the password for every connection.

    It is made aside and renamed, so that one that was interrupted is made again.
    """
    if data.exists():
        return
    owner = as_user(user())
    data.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="postgres-", dir=data.parent) as scratch:
        secret, aside = Path(scratch, "password"), Path(scratch, "data")
        secret.touch(mode=0o600)
        secret.write_text(password, encoding="utf-8")
        if owner:
            for path in (secret, Path(scratch)):
                os.chown(path, owner["user"], owner["group"])
            reachable = subprocess.run(["test", "-r", str(secret)], **owner)
            if reachable.returncode != 0:
                raise UserError(
                    f"{data.parent} cannot be reached by the user {user()}, as whom root runs PostgreSQL: a folder "
                    "above is closed to others; let RANKWISE_STACK name an open one, such as /srv/rankwise"
                )
        command = [program("initdb"), f"--pgdata={aside}", f"--username={DATABASE_USER}", f"--pwfile={secret}"]
        made = subprocess.run(
            [*command, "--auth=scram-sha-256", "--encoding=UTF8", "--no-locale"],
            capture_output=True,
            text=True,
            **owner,
        )
        if made.returncode != 0:
            raise UserError(f"initdb failed: {made.stderr.strip() or made.stdout.strip()}")
        aside.rename(data)
