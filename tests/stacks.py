"""The stack of `make up` for tests: a clone of the working tree with tiny params, on free ports, in its own folder.

The fixture `stack` of conftest.py has one that is up, for the tests of a file.
"""

from __future__ import annotations

import contextlib
import shlex
import shutil
import subprocess
import tempfile
import threading
import time
from pathlib import Path

import psutil
import warm
from clones import Repository

from flows.server import free_port
from infra.stack.processes import MARK
from infra.stack.settings import parse


class Stack:
    """A stack that is up, and its clone. Example: stack.run("dvc", "push")"""

    def __init__(self, folder: Path):
        # Not below pytest's own folder, which is closed to others: as root, PostgreSQL runs as another user.
        self.folder = folder
        self.home = folder / "stack"
        self.repository = Repository(folder / "clone")
        self.root = self.repository.root
        self.ports = {f"RANKWISE_{name}_PORT": str(free_port()) for name in ("POSTGRES", "S3", "PREFECT", "MLFLOW")}
        self.seen: set[str] = set()  # command lines of all processes while it came up

    @classmethod
    def start(cls) -> Stack:
        folder = Path(tempfile.mkdtemp(prefix="rankwise-stack-"))
        folder.chmod(0o755)
        stack = cls(folder)
        with stack.watching():
            done = stack.command("up")
        stack.said = done.stdout
        if done.returncode != 0:
            logs = "\n".join(path.read_text()[-2000:] for path in stack.home.glob("logs/*"))
            stack.end()
            raise AssertionError(f"{done.stdout}\n{done.stderr}\n{logs}")
        return stack

    def end(self) -> None:
        self.command("down")
        shutil.rmtree(self.folder)

    def command(self, *words: str, stdin: str = "", **environment: str) -> subprocess.CompletedProcess:
        """`python -m infra.stack ...`"""
        settings = {"RANKWISE_STACK": str(self.home), **self.ports}
        return subprocess.run(
            [warm.folder() / "python", "-m", "infra.stack", *words],
            cwd=self.root,
            env={**self.repository.environment(), "RANKWISE_TRACKING": "on", **settings, **environment},
            input=stdin,
            capture_output=True,
            text=True,
            timeout=400,
        )

    def environment(self) -> dict[str, str]:
        """What `environment` exports, and what commands of the clone need."""
        lines = shlex.split(self.command("environment").stdout)
        exported = dict(word.split("=", 1) for word in lines if word != "export")
        return {
            **self.repository.environment(),
            **exported,
            "RANKWISE_TRACKING": "on",
            "PREFECT_HOME": str(self.folder / "person"),
        }

    def run(self, *words: str, **environment: str) -> str:
        """A command in the clone, as a person who uses the stack; returns what it said."""
        done = subprocess.run(
            words,
            cwd=self.root,
            env={**self.environment(), **environment},
            capture_output=True,
            text=True,
            timeout=400,
        )
        assert done.returncode == 0, f"{' '.join(words)}\n{done.stdout}\n{done.stderr}"
        return done.stdout

    def secrets(self) -> list[str]:
        return [
            text for name, text in parse(self.root / "infra/.env").items() if name.endswith(("WORD", "SECRET", "KEY"))
        ]

    def processes(self) -> dict[str, list[psutil.Process]]:
        """The living processes of each service."""
        found: dict[str, list[psutil.Process]] = {}
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                root, _, name = process.environ().get(MARK, "").rpartition(":")
                if root == str(self.home) and process.status() != psutil.STATUS_ZOMBIE:
                    found.setdefault(name, []).append(process)
        return found

    @contextlib.contextmanager
    def watching(self):
        """Remember the command line of every process that is seen meanwhile."""
        over = threading.Event()

        def look() -> None:
            while not over.is_set():
                for path in Path("/proc").glob("[0-9]*/cmdline"):
                    with contextlib.suppress(OSError):
                        self.seen.add(path.read_bytes().decode(errors="replace"))
                time.sleep(0.05)

        watcher = threading.Thread(target=look)
        watcher.start()
        try:
            yield
        finally:
            over.set()
            watcher.join()
