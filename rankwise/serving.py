"""A server for as long as it is asked: the one that runs already, or one started for it and stopped after it."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rankwise.client import Endpoint
from rankwise.endpoint import ServerEngine
from rankwise.fingerprint import sampling_digests
from rankwise.sampling import Sampled, Sampling, Wanted
from rankwise.types import Unavailable, UserError

VLLM = "vllm serve {model} --host 127.0.0.1 --port {port}"
START_LIMIT_S = 1800.0  # tens of GB from a slow disk, then compilation
STOP_LIMIT_S = 5.0  # before the server is killed; it has nothing to save
SAY_EVERY_S = 10.0
TAIL_LINES = 15  # of the log, in a message


class ServedEngine:
    """The server engine; where no server runs already, one is started for the first answers and runs until close.

    Args:
        folder: the model; None: only a server that runs knows it, as `name`.
        prefix: of the environment's variables that say where its server is.
    """

    version = ""
    settled = True

    def __init__(self, *, folder: Path | None, name: str | None, sampling: Sampling, prefix: str):
        self._folder, self._name, self._sampling, self._prefix = folder, name, sampling, prefix
        self._source = {"name": name} if folder is None else {"files": sampling_digests(folder)}
        self._server, self._endpoint = contextlib.ExitStack(), None

    def identity(self) -> dict[str, Any]:
        return self._engine(Endpoint(url="")).identity()  # where the server is, is no part of it

    def answers(self, wanted: Sequence[Wanted]) -> Iterator[tuple[int, list[Sampled]]]:
        environment, log = server_environment(os.environ)
        if self._folder is None and not environment.get(f"{self._prefix}_URL"):
            raise UserError(
                f"{self._name!r} is no folder that a server could be started for; set {self._prefix}_URL to one that "
                "serves a model of this name (http://HOST:PORT/v1), or put the model's folder into data/source"
            )
        if self._endpoint is None:
            opened = serving(self._folder or Path(), environment, prefix=self._prefix, log=log)
            self._endpoint = self._server.enter_context(opened)
        engine = self._engine(self._endpoint)
        try:
            with contextlib.closing(engine.answers(wanted)) as answers:
                for index, sampled in answers:
                    self.version = engine.version
                    yield index, sampled
        except UserError:
            self._endpoint = None
            with self._server:  # which tells what became of the server
                raise

    def close(self) -> None:
        """Stop the server that was started."""
        self._endpoint = None
        self._server.close()

    def _engine(self, endpoint: Endpoint) -> ServerEngine:
        known = self._folder is not None
        return ServerEngine(
            endpoint=endpoint, sampling=self._sampling, source=self._source, model=self._name, ids=known
        )


def server_environment(environment: Mapping[str, str]) -> tuple[dict[str, str], Path]:
    """The environment and log of a server that this process starts: its own GPU beside others, not of their launch.

    Raises UserError where CUDA_VISIBLE_DEVICES names fewer GPUs than this machine has processes.
    """
    launch = ("LOCAL_", "GROUP_", "ROLE_", "MASTER_", "TORCHELASTIC_")
    whose = lambda name: name in ("RANK", "WORLD_SIZE") or name.startswith(launch)
    own = {name: value for name, value in environment.items() if not whose(name)}
    local, count = int(environment.get("LOCAL_RANK", "0")), int(environment.get("LOCAL_WORLD_SIZE", "1"))
    log = Path(environment.get("RANKWISE_HOME", ".rankwise")) / "logs" / f"server-{local}.log"
    named = environment.get("CUDA_VISIBLE_DEVICES")
    if count > 1 and named != "":
        own["CUDA_VISIBLE_DEVICES"] = str(local) if named is None else _devices(named, count)[local]
    return own, log


def _devices(named: str, count: int) -> list[str]:
    """The GPUs that CUDA_VISIBLE_DEVICES names, as CUDA reads it: -1 ends the list."""
    devices = [*itertools.takewhile(lambda one: one != "-1", map(str.strip, named.split(",")))]
    if len(devices) < count:
        raise UserError(
            f"CUDA_VISIBLE_DEVICES is {named!r}: {len(devices)} GPU(s) for {count} processes that start a server each; "
            "name one for each, lower --nproc-per-node, or set it empty for servers without a GPU"
        )
    return devices


@contextlib.contextmanager
def serving(
    folder: Path,
    environment: Mapping[str, str],
    *,
    prefix: str = "RANKWISE_ROLLOUTS",
    log: Path = Path(".rankwise/logs/server.log"),
    start_limit_s: float = START_LIMIT_S,
) -> Iterator[Endpoint]:
    """Where the model in `folder` is served while the block runs.

    {prefix}_URL names a server that runs already. Without it RANKWISE_SERVE starts one, or `vllm` where it is on PATH:
    on a free port of this machine, its output in `log`. It ends with the block, and with this process however that
    ends (Linux).

    Raises UserError where there is nothing to start, or what was started does not answer in time; Unavailable where it
    dies.
    """
    if environment.get(f"{prefix}_URL"):
        yield Endpoint.from_environment(prefix, environment)
        return
    port, model = _free_port(), str(folder.resolve())
    words = [word.replace("{model}", model).replace("{port}", str(port)) for word in _command(environment, prefix)]
    endpoint = Endpoint.from_environment(prefix, environment, url=f"http://127.0.0.1:{port}/v1")
    process = _start(words, environment, log)
    try:
        _await(process, endpoint.url, log, start_limit_s)
        yield replace(endpoint, model=endpoint.model or model)
    except UserError as error:
        if process.poll() is None:
            raise
        raise type(error)(f"{error}\nthe server ended with status {process.returncode}; {_tail(log)}") from error
    finally:
        _stop(process)


def _command(environment: Mapping[str, str], prefix: str) -> list[str]:
    command = environment.get("RANKWISE_SERVE", "")
    if not command and shutil.which("vllm", path=environment.get("PATH")):
        command = VLLM
    if not command:
        raise UserError(
            f"engine: server, and there is none: set {prefix}_URL to one that runs (http://HOST:PORT/v1), or "
            f"RANKWISE_SERVE to a command that starts one, such as '{VLLM}', or put vllm on PATH; "
            "engine: embedded needs no server"
        )
    if "{model}" not in command or "{port}" not in command:
        raise UserError(f"RANKWISE_SERVE is {command!r}; it has to hold {{model}} and {{port}}, as in '{VLLM}'")
    return shlex.split(command)


def _start(words: list[str], environment: Mapping[str, str], log: Path) -> subprocess.Popen:
    log.parent.mkdir(parents=True, exist_ok=True)
    prctl = getattr(ctypes.CDLL(None), "prctl", None) if sys.platform == "linux" else None
    PR_SET_PDEATHSIG = 1

    def leave_with_parent() -> None:
        prctl(PR_SET_PDEATHSIG, signal.SIGTERM)

    with log.open("wb") as out:
        try:
            # A session of its own: ctrl-C at the terminal is for us, who then stop the server and all its workers.
            return subprocess.Popen(
                words,
                env=dict(environment),
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                preexec_fn=leave_with_parent if prctl else None,
            )
        except OSError as error:
            raise UserError(
                f"the server cannot be started: {words[0]}: {error.strerror}; check RANKWISE_SERVE"
            ) from None


def _await(process: subprocess.Popen, url: str, log: Path, limit_s: float) -> None:
    began = spoke = time.monotonic()
    while not _answers(url):
        now = time.monotonic()
        if process.poll() is not None:
            raise Unavailable("the server died before it answered")
        if now - began > limit_s:
            raise UserError(f"the server did not answer within {limit_s:.0f} s; {_tail(log)}")
        if now - spoke >= SAY_EVERY_S:
            print(f"server: starting, {now - began:.0f} s so far, log in {log}", file=sys.stderr, flush=True)
            spoke = now
        time.sleep(0.1)
    print(f"server: ready after {time.monotonic() - began:.0f} s at {url}", file=sys.stderr, flush=True)


def _answers(url: str) -> bool:
    """Whether the list of models, or a complaint about it, comes; `transformers serve` has 500 for an empty cache."""
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        opener.open(f"{url}/models", timeout=5).close()
    except urllib.error.HTTPError as error:
        return error.code != 503
    except OSError:
        return False
    return True


def _stop(process: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_LIMIT_S)
        os.killpg(process.pid, signal.SIGKILL)  # the server itself, or workers that outlived it
    process.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _tail(log: Path) -> str:
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-TAIL_LINES:]
    return "\n".join([f"the end of {log}:", *lines])
