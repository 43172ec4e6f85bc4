"""What DVC says: the graph of stages from its own index, what is stale, and how one stage's run ended.

Nothing here knows a stage by name, so the flow cannot drift from dvc.yaml.
"""

from __future__ import annotations

import contextlib
import difflib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flows.summary import Outcome
from rankwise.types import UserError

# Lines of dvc that help a person at a prompt and only repeat themselves in a log of many stages.
_HINTS = (
    "Running stage ",
    "Updating lock file",
    "Generating lock file",
    "To track the changes with git",
    "\tgit add",
    "To enable auto staging",
    "\tdvc config core.autostage",
    "Use `dvc push`",
    "Data and pipelines are up to date",
)

ROOT = "dvc.yaml"


@dataclass(frozen=True, kw_only=True)
class Node:
    """A stage of the graph.

    Example:
        Node(name="dpo", upstream=("preferences", "reference_logprobs"))
    """

    # as `dvc repro` takes it: "dpo", "dpo@2" (a round), "data/x.csv.dvc" (an added file), "sweeps/dvc.yaml:dpo@x"
    name: str
    upstream: tuple[str, ...]  # the stages whose outputs it reads, sorted
    accelerated: bool = False  # `meta: {accelerated: true}` in dvc.yaml: it uses a GPU where there is one


def plan(target: str | None = None, *, file: str = ROOT) -> list[Node]:
    """The stages to run, in the order in which `dvc repro` would run them.

    target ends the plan at that stage; the name of a `foreach` group means all of its stages. Without one, all stages
    of a file are wanted, with what they need of others. Raises UserError where the target is unknown or DVC cannot
    read the graph.
    """
    try:
        return _plan(target, file)
    except UserError:
        if not _set_aside_cut_locks():
            raise
        return _plan(target, file)


def _plan(target: str | None, file: str) -> list[Node]:
    with _repository() as repo:
        graph = repo.index.graph
        if target is not None:
            _refuse_unknown(target, {stage.addressing for stage in graph if not of_another_file(stage.addressing)})
            ends = [stage for stage in graph if _is(target, stage.addressing)]
        elif file == ROOT:
            ends = [stage for stage in graph if not of_another_file(stage.addressing)]
        else:
            ends = [stage for stage in graph if stage.addressing.startswith(f"{file}:")]
        # DVC's own planner: the same order gives a dvc.lock with the same lines in the same places.
        from dvc.repo.reproduce import get_active_graph, plan_repro

        steps = plan_repro(get_active_graph(graph), ends)
        return [
            Node(
                name=stage.addressing,
                upstream=tuple(sorted(up.addressing for up in graph.successors(stage))),
                accelerated=bool((stage.meta or {}).get("accelerated")),
            )
            for stage in steps
        ]


def of_another_file(stage: str) -> bool:
    """Whether a stage is one of another dvc.yaml than the root's."""
    return ":" in stage


def stale(names: Iterable[str]) -> dict[str, Any] | None:
    """What `dvc status` says of these stages: an empty dict when nothing would run; None when DVC cannot say.

    It cannot while another DVC process holds the repository.
    """
    from dvc.lock import LockError
    from dvc.rwlock import RWLockFileCorruptedError

    with _repository() as repo:
        stages = {stage.addressing: stage for stage in repo.index.stages}
        found: dict[str, Any] = {}
        try:
            with repo.lock:
                for name in names:  # repo.status(targets) reads dvc.yaml and dvc.lock anew for each of them
                    found |= stages[name].status()
        except (LockError, RWLockFileCorruptedError):
            return None
        return found


def check_known(names: Iterable[str], nodes: list[Node]) -> None:
    """Raise UserError for the first name that is no stage of the plan."""
    for name in names:
        _refuse_unknown(name, {node.name for node in nodes})


def matches(names: Iterable[str], stage: str) -> bool:
    """Whether a stage is one of those named, by itself or through its `foreach` group."""
    return any(_is(name, stage) for name in names)


class Reading:
    """Reads the output of `dvc repro --single-item STAGE`, line by line, and says in the end what happened."""

    def __init__(self, stage: str):
        self.stage = stage
        self._skipped = ""
        self._ran = False
        self._status: int | None = None  # of the stage's own command
        self._reason = self._last = self._dvc_error = ""

    def take(self, line: str) -> str | None:
        """Note a line; returns it as it should be shown (the log names the stage already), None for a mere hint."""
        if line.startswith("Running stage "):
            self._ran = True
        elif not self._ran and (found := re.match(r"(?:Stage )?'(.+?)' (didn't change|is cached)", line)):
            self._skipped = {"didn't change": "didn't change", "is cached": "restored from DVC's cache"}[found[2]]
        elif line.startswith("ERROR: "):
            self._dvc_error = line.removeprefix("ERROR: ")
            if found := re.search(r"exited with (-?\d+)", line):
                self._status = int(found[1])
        elif line.startswith("error: "):
            self._reason = line.removeprefix("error: ")
        elif line.strip() and not line.startswith(("[", ">")) and not line.startswith(_HINTS):
            self._last = line.strip()
        if not line.strip() or line.startswith(_HINTS):
            return None
        name = self.stage.rpartition(":")[2].partition("@")[0]  # a stage's own lines do not say the round
        return line.removeprefix(f"[{name}] ").removeprefix(f"{name}: ")

    def outcome(self, status: int, seconds: float) -> Outcome:
        """How it ended, given dvc's exit status."""
        if status == 0:
            state = "cached" if self._skipped and not self._ran else "ran"
            return Outcome(stage=self.stage, state=state, note=self._skipped, seconds=seconds)
        own = self._status if self._status is not None else status
        if self._status is None and "missing data 'source'" in self._dvc_error:
            own = 2  # a file that the user was to bring
        return Outcome(stage=self.stage, state="failed", note=self._why(own), seconds=seconds, status=own)

    def _why(self, status: int) -> str:
        if self._reason:
            return self._reason
        if status < 0:
            memory = " (SIGKILL: often the machine ran out of memory)" if status == -9 else ""
            return f"killed by signal {-status}{memory}"
        # The last line of a traceback says more than dvc's summary of the exit status.
        return (self._status is not None and self._last) or self._dvc_error or self._last or f"exit status {status}"


def _is(name: str, stage: str) -> bool:
    return stage == name or stage.startswith(f"{name}@")


def _refuse_unknown(name: str, known: set[str]) -> None:
    if any(_is(name, stage) for stage in known):
        return
    near = difflib.get_close_matches(name, sorted(known), n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    raise UserError(f"no stage {name!r} in dvc.yaml{hint} (stages: {', '.join(sorted(known))})")


def _set_aside_cut_locks() -> bool:
    """Whether there were lock files that DVC was killed over: it empties one before it writes it, and cannot read it
    any more. Any other fault is a person's to mend."""
    from dvc.lock import LockError
    from dvc.repo import Repo

    graphs = (Path(ROOT), *Path().glob(f"*/{ROOT}"))
    locks = [lock for graph in graphs if (lock := graph.with_suffix(".lock")).exists()]
    try:
        with Repo(".") as repo, repo.lock:  # or a DVC that runs would be writing one
            cut = [lock for lock in locks if _is_cut(lock.read_bytes())]
            for lock in cut:
                lock.replace(lock.with_name(f"{lock.name}.cut"))
    except LockError:
        return False
    for lock in cut:
        print(
            f"{lock} ends in the middle: DVC was killed while it wrote it. It is {lock}.cut now; what was done comes "
            "from DVC's run cache",
            flush=True,
        )
    return bool(cut)


def _is_cut(lock: bytes) -> bool:
    """Whether it is the beginning of a lock file as DVC writes it, which ends in a line's end."""
    return not lock or (lock.startswith(b"schema: '2.0'\n") and not lock.endswith(b"\n"))


@contextlib.contextmanager
def _repository() -> Iterator[Any]:
    from dvc.exceptions import DvcException
    from dvc.repo import Repo

    try:
        with Repo(".") as repo:
            yield repo
    except DvcException as error:
        # DVC's messages carry the file and the line; its causes carry the rest.
        causes = [str(error)]
        while (error := error.__cause__) is not None:
            causes.append(str(error))
        raise UserError("DVC cannot read the graph here: " + ": ".join(dict.fromkeys(causes))) from None
