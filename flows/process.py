"""One command as a child process: a session of its own, its lines as they come, and no survivors.

The child and all that it starts form one process group. Whatever ends the wait (ctrl-C, SIGTERM, a Prefect
cancellation, an error of ours), the group gets SIGTERM, time for a checkpoint, then SIGKILL. If this process
is killed outright, the kernel sends the child SIGTERM (Linux).
"""

import codecs
import contextlib
import math
import os
import selectors
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator

# Seconds between SIGTERM and SIGKILL, for a checkpoint. Below the 30 that a Prefect worker gives a flow.
GRACE_S = float(os.environ.get("RANKWISE_GRACE_S", "20"))

# Set when a child was told to stop, or when all are to: children that other threads wait for stop too, none is started
# any more, and no retry revives the stage that a person has just stopped.
stopping = threading.Event()


class Stopped(Exception):
    """The child was told to stop, because `stopping` was set."""


class TookTooLong(Exception):
    """The child was told to stop, because its time was over."""


def run(
    command: list[str],
    on_line: Callable[[str], None],
    *,
    env: dict[str, str] | None = None,
    limit_s: float | None = None,
) -> int:
    """Run a command to its end, passing each line of its output on as it comes; returns its exit status.

    A negative status is the signal that killed it. When this returns or raises, no process of the group is
    left. Raises Stopped where `stopping` is set, TookTooLong after limit_s seconds; both leave it time for a
    checkpoint. The kernel ties the parent-death signal to the calling thread, which waits here; it ends with this
    process.
    """
    if stopping.is_set():
        raise Stopped
    child = subprocess.Popen(
        bound_to_this(command),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        env=env,
    )
    assert child.stdout is not None
    limit = math.inf if limit_s is None else time.monotonic() + limit_s
    try:
        for line in _lines(child, limit=limit):
            on_line(line)
        if stopping.is_set():
            raise Stopped
        if time.monotonic() > limit and child.poll() is None:
            raise TookTooLong
        return child.wait()
    except BaseException as reason:
        if not isinstance(reason, TookTooLong):  # that is this child's affair alone
            stopping.set()
        _stop(child, on_line)
        raise
    finally:
        _signal_group(child, signal.SIGKILL)  # what closed its output and stayed
        child.wait()
        child.stdout.close()


def bound_to_this(command: list[str]) -> list[str]:
    """The command, started so that the kernel sends it SIGTERM when the thread that starts it ends (Linux).

    A small process asks for that and then becomes the command: code between fork and exec in a process with
    threads can deadlock.
    """
    return [sys.executable, "-I", "-S", os.path.abspath(__file__), str(os.getpid()), *command]


def _stop(child: subprocess.Popen, on_line: Callable[[str], None]) -> None:
    """SIGTERM, and up to GRACE_S seconds in which its lines are still shown; a second ctrl-C cuts that short."""
    _signal_group(child, signal.SIGTERM)
    for line in _lines(child, deadline=time.monotonic() + GRACE_S):
        on_line(line)
    _signal_group(child, signal.SIGKILL)
    for _ in _lines(child, deadline=time.monotonic() + 2):  # until the last of them is really gone
        pass


def _lines(child: subprocess.Popen, *, limit: float = math.inf, deadline: float | None = None) -> Iterator[str]:
    """Lines until every process that can write to the pipe is gone, or until a time (monotonic seconds).

    limit is that of a child at work, deadline that of one which was told to stop. The pipe's end, not the child's, is
    what is waited for: dvc dies at once of SIGTERM while the stage under it still writes its checkpoint. What a child
    that has ended leaves behind is told to stop.
    """
    pipe = child.stdout.fileno()
    decode = codecs.getincrementaldecoder("utf-8")(errors="replace").decode
    rest = ""
    with selectors.DefaultSelector() as selector:
        selector.register(pipe, selectors.EVENT_READ)
        while deadline is None or time.monotonic() < deadline:
            if deadline is None and (stopping.is_set() or time.monotonic() > limit):
                return
            if not selector.select(0.5):
                if deadline is None and child.poll() is not None:
                    _signal_group(child, signal.SIGTERM)
                    deadline = time.monotonic() + GRACE_S
                continue
            chunk = os.read(pipe, 65536)
            if not chunk:
                break
            # A bar drawn with carriage returns is as many lines.
            *whole, rest = (rest + decode(chunk)).replace("\r\n", "\n").replace("\r", "\n").split("\n")
            yield from whole
    if rest:
        yield rest


def _signal_group(child: subprocess.Popen, number: int) -> None:
    # Gone already; macOS says PermissionError of a group of zombies.
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(child.pid, number)


def _become(parent: int, command: list[str]) -> None:
    """In the new process: die with the parent, then turn into the command."""
    if sys.platform == "linux":
        import ctypes

        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != parent:  # it died before we asked
            os._exit(128 + signal.SIGTERM)
    try:
        os.execvp(command[0], command)
    except OSError as error:
        print(f"error: {command[0]}: {error.strerror}", file=sys.stderr, flush=True)
        os._exit(127)


if __name__ == "__main__":
    _become(int(sys.argv[1]), sys.argv[2:])
