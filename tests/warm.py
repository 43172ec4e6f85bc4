"""A `python` that need not import PyTorch, MLflow or DVC: it forks from a process that has.

Most of a tiny stage's seconds are imports, and a test that runs the pipeline through DVC starts dozens. The folder of
`folder()`, with a `dvc` too, goes first in PATH; it is that of a virtual environment with the packages of this one, so
that what its `python` runs starts the same: a worker a flow, a flow DVC, DVC a stage, a stage its tracker. Forked are
scripts and the modules of FORKED; the rest runs as ever.

Such a process has the command, environment, folder, descriptors, signals and status that it would have. But it is of
another process group, is killed a moment after its caller, and DVC is not its parent: tests that kill DVC or a flow use
the real one. And what is settled at Python's start or an import (PYTHONHASHSEED, paths below HOME) was settled before.
"""

from __future__ import annotations

import atexit
import contextlib
import fcntl
import functools
import importlib
import json
import os
import runpy
import select
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

# Others' packages alone: the project's own modules are those of the folder that a stage is run in.
PRELOADED = (
    *("torch", "transformers.models.llama.modeling_llama", "transformers.models.auto.modeling_auto"),
    *("transformers.models.auto.tokenization_auto", "torch.distributed.tensor", "safetensors.torch", "peft", "pandas"),
    *("pyarrow.parquet", "pyarrow.dataset", "matplotlib.figure", "matplotlib.backends.backend_agg", "yaml", "tqdm"),
    *("matplotlib.font_manager", "rich.table", "rich.console"),
    *("mlflow.tracking", "mlflow.store.tracking.sqlalchemy_store", "mlflow.store.model_registry.sqlalchemy_store"),
    *("mlflow.system_metrics.system_metrics_monitor", "dvc.cli", "dvc.repo.reproduce", "dvc.repo.experiments"),
)
# Not flows: Prefect reads the environment as it is imported.
FORKED = ("tasks.", "benchmarks.", "flows.guarded_dvc", "dvc", "torch.distributed.run")
CALLER = """#!{python} -IS
import json, os, signal, socket, sys
words = sys.argv[1:]
if not (words[:1] == ["-m"] and words[1].startswith({forked}) or "".join(words[:1]).endswith(".py")):
    os.execv("{python}", ["{here}", *words])
streams = [n for n in map(int, os.listdir("/proc/self/fd")) if os.path.exists(f"/proc/self/fd/{{n}}")]
server = socket.socket(socket.AF_UNIX)
server.connect("{address}")
asked = json.dumps([words, os.getcwd(), dict(os.environ), streams]).encode()
socket.send_fds(server, [len(asked).to_bytes(8, "big")], streams)
server.sendall(asked)
answers = server.makefile()
pid = int(answers.readline())
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: os.kill(pid, number))
sys.exit(int(answers.readline() or 137))
"""


@functools.cache
def folder() -> Path:
    """The folder with this `python`; what stands behind it ends with the process that asked."""
    made = Path(tempfile.mkdtemp(prefix="warm-"))
    address, python = made / "socket", made / "bin/python"
    python.parent.mkdir()
    shutil.copy(Path(sys.prefix) / "pyvenv.cfg", made)
    (made / "lib").symlink_to(Path(sys.prefix) / "lib")
    python.write_text(CALLER.format(python=sys.executable, here=python, address=address, forked=FORKED))
    (dvc := python.with_name("dvc")).write_text(f'#!/bin/sh\nexec {python} -m dvc "$@"\n')
    for command in (python, dvc):
        command.chmod(0o755)
    for command in Path(sys.executable).parent.iterdir():
        if not (mine := python.with_name(command.name)).exists():
            mine.symlink_to(command)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "MLFLOW_DISABLE_TELEMETRY": "true"}
    _KEPT.append(subprocess.Popen([sys.executable, __file__, address], stdin=subprocess.PIPE, env=environment))
    while not address.exists():
        time.sleep(0.05)
    return python.parent


_KEPT: list[subprocess.Popen] = []  # its stdin closes with this process, which tells it to end


def _serve(address: str) -> None:
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(address)
    listener.listen(64)  # callers wait while it imports
    for name in PRELOADED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # nobody waits for these children
    while listener in select.select([listener, sys.stdin], [], [])[0]:
        caller, _ = listener.accept()
        if os.fork() == 0:
            listener.close()
            sys.executable = str(Path(address).with_name("bin") / "python")
            os._exit(_run(caller))
        caller.close()
    shutil.rmtree(Path(address).parent)


def _run(caller: socket.socket) -> int:
    """In a process of its own: what the caller asked for; tells it the process and, at the end, the status."""
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    atexit._clear()  # what was imported so far ends with the process that imported it
    importlib.import_module("numpy").random.seed()  # else all of them draw the same numbers
    caller = socket.socket(fileno=_out_of_the_way(caller.detach()))
    words, where, environment = _asked(caller)
    sys.stdin, sys.stdout, sys.stderr = (os.fdopen(n, mode, buffering=1) for n, mode in enumerate("rww"))
    os.chdir(where)
    os.environ.clear()
    os.environ.update(environment)
    module = words[1] if words[0] == "-m" else ""
    sys.argv = words[1:] if module else words
    first = where if module else str(Path(words[0]).parent)
    sys.path[:1] = [first, *filter(None, environment.get("PYTHONPATH", "").split(os.pathsep))]
    caller.sendall(f"{os.getpid()}\n".encode())
    threading.Thread(target=_die_with, args=(caller,), daemon=True).start()
    status = _status_of(module)
    caller.sendall(f"{status}\n".encode())
    return status


def _asked(caller: socket.socket) -> tuple[list[str], str, dict[str, str]]:
    """Words, folder and environment; the caller's descriptors are put where it has them."""
    size, streams, *_ = socket.recv_fds(caller, 8, 64)
    asked = b""
    while len(asked) < int.from_bytes(size, "big"):
        asked += caller.recv(1 << 16)
    *rest, numbers = json.loads(asked)
    # All are moved before the first is placed: where it belongs, another may have arrived.
    for number, stream in zip(numbers, [_out_of_the_way(stream) for stream in streams], strict=True):
        os.dup2(stream, number)
        os.close(stream)
    return tuple(rest)


def _out_of_the_way(descriptor: int) -> int:
    """The same one above the numbers that callers use."""
    moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, 900)
    os.close(descriptor)
    return moved


def _die_with(caller: socket.socket) -> None:
    """Killed as soon as the caller is gone: it sends nothing more, so recv returns at its end."""
    with contextlib.suppress(OSError):
        caller.recv(1)
    os.kill(os.getpid(), signal.SIGKILL)


def _status_of(module: str) -> int:
    """What a module, or the script in sys.argv, ends with."""
    try:
        if module:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
        else:
            runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as end:
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        threading._shutdown()  # threads that are no daemons are waited for, as at the end of any program
        atexit._run_exitfuncs()
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
    return 0


if __name__ == "__main__":
    _serve(sys.argv[1])
