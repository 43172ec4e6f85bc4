"""A copy of this checkout with a pipeline of a few rows, for measuring what runs it; commands in it, and their cost."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks import report
from rankwise.types import UserError

ROOT = Path(__file__).parent.parent
START_S = 180.0  # a new Prefect server, on a busy machine
GATES = (
    "agreement",
    "kappa",
    "calibration_error",
    "position_bias",
    "flip_rate",
    "tie_rate",
    "invalid_share",
    "verdict_mass",
    "prefers_longer",
    "padding",
    "injection",
    "null_wins",
    "beats_truncated",
    "beats_shuffled",
    "beats_empty",
    "beats_other_prompt",
    "same_text_decided",
    "panel_alpha",
)

# A few rows and steps: what is learnt is of no interest. A judge that learnt nothing would rightly stop the run.
RECIPE = {
    "prompts": {"embedded": {"sft": 120, "rollout": 24, "eval": 12, "labelled": 30, "labelled_test": 12}},
    "base_model": {"embedded": {"vocabulary": 400, "hidden": 32, "layers": 1, "heads": 2, "context": 192}},
    "sft": {"epochs": 1, "held_out": 16, "max_answer_tokens": 64},
    "reward_model": {"epochs": 1},
    "rollouts": {"max_new_tokens": 12, "max_cut_share": 1.0},
    "audit_judge": {
        "probes": 2,
        "labelled": 4,
        "gates": dict.fromkeys(GATES),
    },
    "preferences": {"tie_below": 0.0},
    "dpo": {"batch_size": 4},
    "evaluate": {"max_new_tokens": 12},
    "doctor": {"stop_above": {"row_over_context": 1.0}},
}


@dataclass(frozen=True, kw_only=True)
class Cost:
    """Of one command."""

    wall_s: float
    cpu_s: float
    peak_bytes: int = 0  # resident, of the largest of its processes


class Copy:
    """A copy of this checkout under git and DVC.

    Args:
        recipe: what of the default is changed; None: the checkout's own params.yaml.
        overrides: "SECTION.KEY=VALUE", over the recipe.
    """

    def __init__(self, root: Path, recipe: dict | None = RECIPE, *, overrides: Sequence[str] = ()):
        self.root = root
        listed = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
        done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
        if done.returncode:
            raise UserError(
                f"{ROOT} is no git checkout, and dvc.yaml and the tasks are read from one: clone the project"
            )
        for name in done.stdout.splitlines():
            if (ROOT / name).is_file() and name != "dvc.lock":
                (root / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / name, root / name)
        outside = ("MLFLOW_", "PREFECT_", "RANKWISE_", "DVC_")
        kept = {name: value for name, value in os.environ.items() if not name.startswith(outside)}
        path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        quiet = {"HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "true", "DVC_NO_ANALYTICS": "1", "OMP_NUM_THREADS": "1"}
        author = {f"GIT_{who}_{what}": "a@b.c" for who in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
        self.environment = {**kept, **quiet, **author, "PATH": path, "PYTHONPATH": str(root)}
        self.run("git", "init", "-q", ".")
        if recipe is not None:
            (root / "tiny.json").write_text(json.dumps(recipe), encoding="utf-8")  # JSON is YAML
            changed = [word for one in overrides for word in ("--set", one)]
            self.run("python", "-m", "tasks.recipe", "tiny.json", *changed)
        self.run("git", "add", "-A")
        self.run("git", "commit", "-q", "-m", "as it is")

    def run(self, *words: str, **environment: str) -> Cost:
        """A command to its end; raises AssertionError with its last lines where it fails."""
        return self._run(words, environment)[0]

    def output(self, *words: str) -> str:
        return self._run(words, {})[1]

    def _run(self, words: tuple[str, ...], environment: dict[str, str]) -> tuple[Cost, str]:
        with tempfile.TemporaryFile("w+", encoding="utf-8") as log:
            began = time.perf_counter()
            child = subprocess.Popen(
                words,
                cwd=self.root,
                env={**self.environment, **environment},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
            )
            _, status, used = os.wait4(child.pid, 0)
            wall_s = time.perf_counter() - began
            child.returncode = os.waitstatus_to_exitcode(status)
            log.seek(0)
            said = log.read()
        if child.returncode:
            raise AssertionError(f"{' '.join(words)} ended with status {child.returncode}:\n{said[-2000:]}")
        cpu_s = used.ru_utime + used.ru_stime
        return Cost(wall_s=wall_s, cpu_s=cpu_s, peak_bytes=used.ru_maxrss * 1024), said


@contextlib.contextmanager
def scratch_copy(recipe: dict | None = RECIPE, *, where: Path | None = None) -> Iterator[Copy]:
    """A copy that is gone afterwards; where: the folder that it is made in, for what takes much room."""
    with tempfile.TemporaryDirectory(dir=where) as folder:
        yield Copy(Path(folder), recipe)


@contextlib.contextmanager
def open_server(copy: Copy) -> Iterator[str]:
    """A Prefect server that the copy's flows find open; its API address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}/api"
    report.say("a Prefect server")
    words = ("python", "-m", "flows.server", "--port", str(port))
    with subprocess.Popen(words, cwd=copy.root, env=copy.environment, stdout=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + START_S
            while not (copy.root / ".rankwise/prefect/server.json").exists():
                if process.poll() is not None or time.monotonic() > deadline:
                    raise AssertionError("the Prefect server did not start")
                time.sleep(0.2)
            yield url
        finally:
            process.send_signal(signal.SIGTERM)
            process.wait(60)
