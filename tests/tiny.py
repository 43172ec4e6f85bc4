"""A tiny version of the embedded default in a folder of its own, and its stages run there as a user runs them.

A stage runs in a process forked from one that has torch imported already: all that `python -m tasks.NAME` does, seconds
cheaper. Every test file gets the same finished run (`finished`) to copy and spoil.
"""

from __future__ import annotations

import fcntl
import functools
import hashlib
import importlib
import json
import multiprocessing
import os
import runpy
import shlex
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import unrolled
import yaml

from tasks import rounds
from tasks.audit_judge import Gates
from tasks.judges import JudgeParams
from tasks.recipe import STAGES, render
from tasks.rollouts import TeacherParams

ROOT = Path(__file__).parent.parent
MADE = ("data", "models", "reports")

# As the default, but seconds long: what it learns is of no interest here.
TINY = {
    "prompts": {"embedded": {"sft": 120, "rollout": 24, "eval": 12, "labelled": 30, "labelled_test": 12}},
    "base_model": {"embedded": {"vocabulary": 400, "hidden": 32, "layers": 1, "heads": 2, "context": 192}},
    "sft": {"epochs": 1, "held_out": 16, "learning_rate": 0.01, "max_answer_tokens": 64},
    "reward_model": {"epochs": 2, "batch_size": 6, "learning_rate": 0.005},
    "rollouts": {"max_new_tokens": 12, "max_cut_share": 1.0, "batch_sequences": 16},
    # A judge that has learnt nothing would rightly stop the run.
    "audit_judge": {"probes": 2, "labelled": 4, "gates": dict.fromkeys(vars(Gates()))},
    "preferences": {"tie_below": 0.0, "held_out_share": 0.25},
    "reference_logprobs": {"max_tokens": 256},
    "dpo": {"batch_size": 4},
    "policy_gradient": {"steps": 3, "prompts_per_step": 4, "micro_batch_answers": 8, "max_new_tokens": 12},
    "evaluate": {"max_new_tokens": 12},
    "doctor": {"stop_above": {"row_over_context": 1.0}},
}

JUDGE = vars(JudgeParams())  # the default judge, as a section of params.yaml
TEACHER = vars(TeacherParams()) | {"max_new_tokens": 12}

_FORKS = multiprocessing.get_context("forkserver")
_FORKS.set_forkserver_preload(
    [
        *("rankwise.training", "rankwise.rollouts", "rankwise.judges", "rankwise.reference", "tasks.plots"),
        *("transformers.models.llama.modeling_llama", "matplotlib.backends.backend_agg", "matplotlib.figure"),
        *(f"tasks.{stage}" for stage in STAGES),
        *("tasks.recipe", "pytest", "pyarrow.dataset", "matplotlib.font_manager"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class Said:
    """How a stage ended."""

    status: int  # exit status; negative: the signal that killed it
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one message of a mistake: exit status 2, no traceback, nothing said twice."""
        assert self.status == 2, f"status {self.status}\n{self.out}\n{self.err}"
        assert "Traceback" not in self.out + self.err, self.err
        _, start, message = f"\n{self.err}".partition("\nerror: ")
        assert start and "\nerror: " not in message and "error: " not in self.out, self.err
        return message.strip()


class Project:
    """A folder in which stages are run.

    Example:
        project.change({"dpo": {"beta": 0.3}})
        assert project.run("dpo").status == 0
    """

    def __init__(self, root: Path, recipe: dict[str, Any] | None = None):
        self.root = root
        (root / "data/source").mkdir(parents=True)
        shutil.copytree(ROOT / "recipes", root / "recipes")
        (root / "params.yaml").write_text(render(TINY if recipe is None else recipe))

    def copy(self, root: Path) -> Project:
        """The same project elsewhere, with all that it has computed."""
        shutil.copytree(self.root, root, symlinks=True)
        return Project.at(root)

    @classmethod
    def at(cls, root: Path) -> Project:
        """One that is there."""
        project = object.__new__(cls)
        project.root = root
        return project

    def change(self, values: dict[str, Any]) -> None:
        """Set parameters: {"dpo": {"beta": 0.3}}."""
        path = self.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        for section, changed in values.items():
            params[section] |= changed
        path.write_text(yaml.safe_dump(params))

    def apply(self, recipe: dict[str, Any]) -> None:
        """Write params.yaml anew: tiny, with a recipe over it."""
        (self.root / "params.yaml").write_text(render(over(TINY, recipe)))

    def round_stages(self, *, first: str = "rollouts@1", last: str = "register") -> list[str]:
        """Addresses of the stages that follow the reward model, from one to another, as DVC may order them."""
        params = yaml.safe_load((self.root / "params.yaml").read_text())
        every = [f"{stage}@{number}" for number in params["rounds"]["each"] for stage in rounds.STAGES] + ["register"]
        return every[every.index(first) : every.index(last) + 1]

    def run_rounds(self, *, first: str = "rollouts@1", last: str = "register") -> dict[str, Said]:
        """The stages that follow the reward model, from one to another; all must succeed."""
        told = {}
        for address in self.round_stages(first=first, last=last):
            told[address] = self.run(address)
            assert told[address].status == 0, f"{address}: {told[address].out}\n{told[address].err}"
        return told

    def run(self, stage: str, *options: str, before: Callable[[], object] | None = None) -> Said:
        """One stage ("dpo"; in a round: "dpo@2") to its end. before is called first, in the stage's process."""
        process, logs = self.start(stage, *options, before=before)
        process.join(120)
        assert process.exitcode is not None, f"{stage} does not end"
        return Said(status=process.exitcode, out=logs[0].read_text(), err=logs[1].read_text())

    def start(self, stage: str, *options: str, before: Callable[[], object] | None = None):
        """One stage as a process, and the files that it prints into."""
        (self.root / "logs").mkdir(exist_ok=True)
        if "@" in stage or stage == "register":
            params = yaml.safe_load((self.root / "params.yaml").read_text())
            options = (*shlex.split(unrolled.stages(params)[stage]["cmd"])[4:], *options)
        logs = tuple(self.root / "logs" / f"{stage}.{stream}" for stream in ("out", "err"))
        name = stage.partition("@")[0]
        process = _FORKS.Process(target=_as_command, args=(name, options, self.root, logs, before))
        process.start()
        return process, logs

    def run_all(self, *, first: str = STAGES[0], last: str = STAGES[-1]) -> dict[str, Said]:
        """Stages in order; all must succeed."""
        told = {}
        for stage in STAGES[STAGES.index(first) : STAGES.index(last) + 1]:
            told[stage] = self.run(stage)
            assert told[stage].status == 0, f"{stage}: {told[stage].out}\n{told[stage].err}"
        return told

    def tree(self, *names: str) -> dict[str, str]:
        """Digest of every file below these folders (all outputs, if none is named), by path."""
        files = (file for name in names or MADE for file in [self.root / name, *(self.root / name).rglob("*")])
        return {str(f.relative_to(self.root)): hashlib.md5(f.read_bytes()).hexdigest() for f in files if f.is_file()}

    def metrics(self, stage: str) -> dict[str, Any]:
        return json.loads((self.root / "reports" / rounds.stage_files(stage) / "metrics.json").read_text())

    def timings(self, stage: str) -> dict[str, float]:
        return json.loads((self.root / ".rankwise/timings" / f"{stage}.json").read_text())


def over(recipe: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """A recipe with another one over it."""
    merge = lambda old, new: over(old, new) if isinstance(old, dict) and isinstance(new, dict) else new
    return {**recipe, **{name: merge(recipe.get(name), value) for name, value in other.items()}}


@functools.cache
def finished(root: Path) -> Project:
    """The tiny pipeline after one whole run; made once in a test session, whose processes share it. Copy it, do not
    change it.

    root: a folder of this process, beside those of the session's others.
    """
    made = root.parent / "tiny-pipeline" if "PYTEST_XDIST_WORKER" in os.environ else root / "tiny-pipeline"
    with open(made.with_suffix(".lock"), "a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if made.exists():
            return Project.at(made)
        aside = Project(made.with_suffix(".new"))
        aside.run_all()
        aside.root.rename(made)
        return Project.at(made)


def killed_at(
    target: str,
    call: int,
    *,
    by: int = signal.SIGKILL,
    first: Callable[..., object] | None = None,
    setup: Callable[[], object] | None = None,
) -> Callable[[], None]:
    """A `before` that sends the process a signal when target ("module:Class.method") is called for the call-th time.

    first: called with (number of the call, *arguments) before each call; setup: called once.
    """
    return functools.partial(_kill_at, target, call, by, first, setup)


def told_that(**environment: str) -> Callable[[], None]:
    """A `before` that sets variables of the environment."""
    return functools.partial(_set, environment)


def without(module: str) -> Callable[[], None]:
    """A `before` that makes a package look as if it were not installed."""
    return functools.partial(_hide, module)


def _hide(module: str) -> None:
    sys.modules[module] = None


def _set(environment: dict[str, str]) -> None:
    os.environ.update(environment)


def checkpoint_before(step: int) -> Callable[..., None]:
    """For killed_at on a training step: a checkpoint is written before this step and no other."""
    return functools.partial(_checkpoint_before, step)


def _kill_at(target: str, call: int, by: int, first, setup) -> None:
    if setup is not None:
        setup()
    module, _, path = target.partition(":")
    *owners, name = path.split(".")
    owner = functools.reduce(getattr, owners, importlib.import_module(module))
    real, calls = getattr(owner, name), 0

    def counting(*arguments, **named):
        nonlocal calls
        calls += 1
        if calls == call:
            os.kill(os.getpid(), by)
        if first is not None:
            first(calls, *arguments)
        return real(*arguments, **named)

    setattr(owner, name, counting)


def _checkpoint_before(step: int, call: int, run, *_: object) -> None:
    if call == step:
        run._save()


def _as_command(stage: str, options, root: Path, logs, before) -> None:
    """python -m tasks.STAGE OPTIONS, run in root."""
    os.chdir(root)
    os.environ["RANKWISE_TRACKING"] = "off"
    for number, log in zip((1, 2), logs):
        os.dup2(os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdout, sys.stderr = (os.fdopen(number, "w", buffering=1) for number in (1, 2))
    sys.path.insert(0, str(root))
    sys.argv = [f"tasks.{stage}", *options]
    status = 1
    try:
        if before is not None:
            before()
        sys.modules.pop(f"tasks.{stage}", None)  # imported ahead, but not as a command
        runpy.run_module(f"tasks.{stage}", run_name="__main__", alter_sys=True)
    except SystemExit as end:
        status = end.code
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    os._exit(status)


def broken(target: str) -> None:
    """A `before` that puts a defect into target."""
    module, _, name = target.partition(":")
    setattr(importlib.import_module(module), name, lambda *_, **__: 1 / 0)
