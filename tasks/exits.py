"""How a command ends: one line for what went wrong, an exit status, and time to leave where it is told to stop."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable

from rankwise.runtime import keep_freed_memory, spin_briefly
from rankwise.types import Missing, Unavailable, UserError
from tasks import lineage


class Stopped(BaseException):
    """SIGTERM arrived: finish the step, write a checkpoint, leave. A BaseException, so nothing swallows it."""


def exit_status(name: str, work: Callable[[], None]) -> int:
    """Do a command's work; returns 0, 2 for a mistake, 75 for trouble that may pass, 143 when it was stopped.

    What went wrong is said in a line; only a defect of ours keeps its traceback.
    """
    _leave_with_parent()
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    keep_freed_memory()
    spin_briefly()
    signal.signal(signal.SIGTERM, _stop)
    try:
        work()
    except UserError as error:
        print(f"error: {error}{_maker(error)}", file=sys.stderr, flush=True)
        return os.EX_TEMPFAIL if isinstance(error, Unavailable) else 2
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES):
            raise
        print(
            f"error: {error.filename or name}: {error.strerror}; row stores and the last checkpoint are kept: "
            "mend that and run the same command again",
            file=sys.stderr,
            flush=True,
        )
        return 2
    except Stopped:
        print(f"[{name}] stopped; run the same command again to continue", file=sys.stderr, flush=True)
        return 143
    return 0


def _maker(error: UserError) -> str:
    """Which stage makes what is missing, as dvc.yaml says; "" where it does not."""
    stage = lineage.maker_of(error.path) if isinstance(error, Missing) else ""
    return stage and f": dvc repro {stage}"


def _leave_with_parent() -> None:
    """Started by DVC, get SIGTERM when DVC dies: an orphan would go on writing beside its successor."""
    if "DVC_STAGE" in os.environ and sys.platform == "linux":
        PR_SET_PDEATHSIG = 1
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)


def _stop(*_: object) -> None:
    # Two may come, the group's and the kernel's when DVC dies: the second must not cut the clean-up of the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Stopped
