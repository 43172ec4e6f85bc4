"""Tests run without the network and without a tracker unless one asks for it."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import textwrap
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
import warm

os.environ["HF_HUB_OFFLINE"] = "1"
# Tiny tensors gain nothing from threads, and two of them spinning for each other on a busy machine cost minutes.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ.setdefault("RANKWISE_TRACKING", "off")

pytest_plugins = ["suite_report"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files with slow tests first: one that begins last would keep the other processes waiting."""
    slow = Counter(item.path for item in items if item.get_closest_marker("slow"))
    items.sort(key=lambda item: -slow[item.path])


class Toy:
    """A DVC project of four small stages in a folder of its own, to run flows and dvc on.

    Example:
        toy.run("--target", "sft").returncode
    """

    # What a stage does is asked of it through files, so that nothing of it is in dvc.yaml: TOY_FAIL names the
    # stage that ends with an error, TOY_NAP the seconds that a stage takes.
    STAGE = """
        import json, os, pathlib, signal, sys, time
        name = sys.argv[1]
        def stop(*_):
            print(f"[{name}] checkpoint written", flush=True)
            pathlib.Path(f"{name}.checkpoint").write_text("")
            sys.exit(143)
        signal.signal(signal.SIGTERM, stop)
        pathlib.Path(f"{name}.pid").write_text(str(os.getpid()))
        print(f"[{name}] started", flush=True)
        with open("attempts.log", "a") as log:
            log.write(name + "\\n")
        time.sleep(float(os.environ.get("TOY_NAP", 0)))
        if os.environ.get("TOY_FAIL") == name:
            print("error: row 7: no prompt; add one", file=sys.stderr)
            sys.exit(2)
        if os.environ.get("TOY_CRASH") == name:
            raise RuntimeError("the judge is away")
        if os.environ.get("TOY_AWAY") == name:
            print("error: the server is away", file=sys.stderr)
            sys.exit(75)
        report = pathlib.Path("reports", name)
        report.mkdir(parents=True, exist_ok=True)
        report.joinpath("metrics.json").write_text(json.dumps({"loss": 0.25, "kl": {"mean": 1.5}}))
        pathlib.Path(f"{name}.txt").write_text(name)
    """
    ORDER = ("prompts", "sft", "verdicts", "evaluate")

    def __init__(self, root: Path):
        self.root = root
        root.mkdir()
        (root / "stage.py").write_text(textwrap.dedent(self.STAGE))
        stages, before = [], "stage.py"
        for name in self.ORDER:
            stages.append(
                f"  {name}:\n    cmd: exec python stage.py {name}\n    deps: [stage.py, {before}]\n"
                f"    outs: [{name}.txt]\n    metrics: [reports/{name}/metrics.json]\n"
            )
            before = f"{name}.txt"
        (root / "dvc.yaml").write_text("stages:\n" + "".join(stages).replace("[stage.py, stage.py]", "[stage.py]"))
        (root / ".gitignore").write_text("/.rankwise/\n/attempts.log\n*.pid\n*.checkpoint\n")
        self.command("git", "init", "-q", ".")
        self.command("dvc", "init", "-q")
        self.command("dvc", "config", "core.analytics", "false")

    def copy(self, root: Path) -> "Toy":
        """The same project elsewhere, with what it has computed so far."""
        shutil.copytree(self.root, root)
        other = object.__new__(Toy)
        other.root = root
        return other

    def command(self, *words: str, **environment: str) -> subprocess.CompletedProcess:
        """Run a command of this environment in the project; raises if it fails."""
        path = os.pathsep.join([str(warm.folder()), str(Path(sys.executable).parent), os.environ["PATH"]])
        return subprocess.run(
            words, cwd=self.root, env={**os.environ, "PATH": path, **environment}, check=True, capture_output=True
        )

    def start(self, *options: str, **environment: str) -> subprocess.Popen:
        """The flow as a process, its output in one pipe."""
        return subprocess.Popen(
            [sys.executable, "-m", "flows.align", *options],
            cwd=self.root,
            env={**os.environ, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            # Run in the background of a shell, the tests inherit an ignored ctrl-C; a terminal's program does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )

    def run(self, *options: str, **environment: str) -> subprocess.CompletedProcess:
        """The flow to its end; stdout holds both streams."""
        process = self.start(*options, **environment)
        out, _ = process.communicate(timeout=180)
        return subprocess.CompletedProcess(process.args, process.returncode, out)

    def attempts(self) -> list[str]:
        """The stages that really ran, in order, oldest first."""
        path = self.root / "attempts.log"
        return path.read_text().split() if path.exists() else []


@contextlib.contextmanager
def prefect_server(folders: pytest.TempPathFactory, *, lean: bool) -> Iterator[str]:
    """A Prefect server; gives its API address. lean: without schedules and workers."""
    from flows import server

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server, "HOME", folders.mktemp("server") / "prefect")
        running = server.Server(server.free_port(), lean=lean)
    try:
        running.wait()
        yield running.url
    finally:
        running.stop()


@pytest.fixture(scope="session")
def api(tmp_path_factory):
    """A Prefect server for the flows of all tests that need not start their own; gives its API address."""
    with prefect_server(tmp_path_factory, lean=True) as url:
        yield url


@pytest.fixture
def client(api):
    """A client of the server whose address the fixture `api` gives."""
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings

    with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
        yield client


@pytest.fixture
def toy(tmp_path) -> Toy:
    return Toy(tmp_path / "toy")


@pytest.fixture(scope="module")
def stack():
    """The services of `make up` on free ports, for the tests of a file (tests/stacks.py)."""
    from stacks import Stack

    running = Stack.start()
    yield running
    running.end()
