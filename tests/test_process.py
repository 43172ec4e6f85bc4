"""Laws of a child process: its lines come as they are printed, and whatever ends the wait, nothing survives."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flows import process

# A stage in small: a child under a child, which notes its id and, on SIGTERM, writes a checkpoint.
CHILD = """
import os, pathlib, signal, sys, time
def stop(*_):
    time.sleep(0.3); pathlib.Path("checkpoint").write_text(""); print("checkpoint written", flush=True); sys.exit(143)
signal.signal(signal.SIGTERM, stop)
pathlib.Path("pid").write_text(str(os.getpid()))
print("ready", flush=True)
time.sleep(60)
"""
# dvc in small: it starts the stage and dies of SIGTERM at once.
PARENT = "import subprocess, sys; subprocess.run([sys.executable, 'child.py'])"


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(process, "stopping", type(process.stopping)())
    Path("child.py").write_text(CHILD)
    Path("parent.py").write_text(PARENT)


def alive(pid: int) -> bool:
    """Whether a process runs; a zombie does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone_within(pid: int, seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < deadline:
        time.sleep(0.05)
    return not alive(pid)


class Stop(BaseException):
    pass


def stop_when_ready(line: str) -> None:
    if line == "ready":
        raise Stop


def test_lines_come_while_the_command_runs():
    code = "import time; print('first', flush=True); time.sleep(0.5); print('last')"
    times = {}
    assert process.run([sys.executable, "-c", code], lambda line: times.setdefault(line, time.monotonic())) == 0
    assert times["last"] - times["first"] > 0.4


def test_the_exit_status_is_the_commands():
    assert process.run([sys.executable, "-c", "raise SystemExit(7)"], print) == 7
    assert process.run([sys.executable, "-c", "import os; os.kill(os.getpid(), 9)"], print) == -9


def test_output_that_is_not_utf8_and_bars_become_lines():
    lines = []
    code = r"import os; os.write(1, b'a\rb\r\n\xff\nno end')"
    process.run([sys.executable, "-c", code], lines.append)
    assert lines == ["a", "b", "�", "no end"]


def test_the_command_has_a_session_of_its_own():
    lines = []
    process.run([sys.executable, "-c", "import os; print(os.getsid(0) == os.getpid() != os.getppid())"], lines.append)
    assert lines == ["True"]


def test_an_interrupted_wait_leaves_time_for_a_checkpoint_and_no_process():
    """dvc is gone at once; the stage under it is waited for, and its last line is still passed on."""
    lines = []

    def take(line: str) -> None:
        lines.append(line)
        stop_when_ready(line)

    with pytest.raises(Stop):
        process.run([sys.executable, "parent.py"], take)
    assert Path("checkpoint").exists() and lines[-1] == "checkpoint written"
    assert gone_within(int(Path("pid").read_text()), 1)
    assert process.stopping.is_set()


def test_a_child_deaf_to_sigterm_is_killed_after_the_grace(monkeypatch):
    monkeypatch.setattr(process, "GRACE_S", 0.5)
    Path("child.py").write_text(CHILD.replace("signal.SIGTERM, stop", "signal.SIGTERM, signal.SIG_IGN"))
    with pytest.raises(Stop):
        process.run([sys.executable, "parent.py"], stop_when_ready)
    assert gone_within(int(Path("pid").read_text()), 1)


def test_what_a_dead_command_leaves_behind_is_stopped():
    """kill -9 of dvc: the stage holds the pipe on; it gets SIGTERM, its time, and the wait ends."""

    def kill_parent(line: str) -> None:
        if line == "ready":
            os.kill(int(subprocess.check_output(["ps", "-o", "ppid=", "-p", Path("pid").read_text()])), signal.SIGKILL)

    assert process.run([sys.executable, "parent.py"], kill_parent) == -9
    assert Path("checkpoint").exists()
    assert gone_within(int(Path("pid").read_text()), 1)


@pytest.mark.skipif(sys.platform != "linux", reason="the parent-death signal is Linux's")
def test_killing_the_caller_outright_stops_the_command():
    caller = "from flows import process; process.run([__import__('sys').executable, 'child.py'], print)"
    running = subprocess.Popen([sys.executable, "-c", caller], stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 20
    while not (Path("pid").exists() and Path("pid").read_text()) and time.monotonic() < deadline:
        time.sleep(0.05)
    time.sleep(0.2)
    running.kill()
    running.wait()
    assert gone_within(int(Path("pid").read_text()), 5) and Path("checkpoint").exists()


def test_a_command_that_does_not_exist_is_an_error_line():
    lines = []
    assert process.run(["no-such-command"], lines.append) == 127
    assert lines == ["error: no-such-command: No such file or directory"]
