"""What every stage shares: its command line, its errors, its outputs written aside, its records, its locks.

A stage module declares `Params` (its section of params.yaml), `Paths` (what it reads and writes, as in
dvc.yaml) and `run(params, paths, stage)`, and ends in `raise SystemExit(main("sft", Params, Paths, run))`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import ctypes
import errno
import fcntl
import hashlib
import io
import os
import shutil
import signal
import sys
import tempfile
import time
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rankwise import json_text
from rankwise.rows import write_aside, write_json
from rankwise.runtime import keep_freed_memory, spin_briefly
from rankwise.types import Missing, Unavailable, UserError, printable
from tasks import lineage, rounds, tracking
from tasks.params import default_of, read_entry, section_of

REBUILD = "rebuild it with the stage that makes it"
P = TypeVar("P")
# Outside every DVC output, so that nothing computed is lost when DVC clears an output before a run.
HOME = tracking.home()
LEAVING_S = 60.0  # for a step, a checkpoint, and a result that is being put in place


class Stopped(BaseException):
    """SIGTERM arrived: finish the step, write a checkpoint, leave. A BaseException, so nothing swallows it."""


class Stage:
    """A running stage: where records, metrics and progress go. Made by main; tests make their own."""

    def __init__(
        self,
        name: str,
        *,
        tracker: tracking.Tracker,
        report: Path | None,
        params_file: Path = Path("params.yaml"),
        round_: int = 1,
        over: Mapping[str, Any] | None = None,
    ):
        self.name, self.tracker, self._params_file, self._over = name, tracker, params_file, over or {}
        self.round = round_  # 1 is the first, and stands for the only one too
        # Ranks of one launch compute alike; only the first writes what a stage leaves, the others write aside.
        self.report = report if report is None or is_first_rank() else Path(tempfile.mkdtemp(prefix=f"{name}-rank-"))
        self.timings: dict[str, float] = {}
        self._curves: list[dict[str, float]] = []
        self._training: TextIO | None = None  # the lock of its checkpoints
        if self.report is not None:
            # Made even where nothing is drawn (an untrained reward model): DVC wants every declared output to exist.
            self.plots.mkdir(parents=True, exist_ok=True)
        # Not told by their times: a clock may be set back while a stage runs.
        self._earlier = {} if self.report is None else {path: _version(path) for path in self.plots.glob("*")}

    def log(self, text: str) -> None:
        if is_first_rank():
            print(f"[{self.name}] {printable(text)}", flush=True)

    def section(self, name: str, params_type: type[P]) -> P:
        """Another stage's parameters of this run, where two stages must not be told one thing twice."""
        number = self.round if name in rounds.STAGES else None
        return rounds.load(self._params_file, name, params_type, number, self._over)

    def record(self, step: int, values: dict[str, float], speeds: dict[str, float] | None = None) -> None:
        """One point of the curves, at an optimizer step; a second call for the same step adds to it.

        values are results: they go to curves.csv, which DVC hashes, and to the tracker. speeds (tokens/s, …)
        differ from run to run, so only the tracker sees them.
        """
        if self._curves and self._curves[-1]["step"] == step:
            self._curves[-1] |= values
        else:
            self._curves.append({"step": step, **values})
        self.tracker.metrics({**values, **(speeds or {})}, step=step)

    def resume_curves(self, up_to_step: int, points: list[dict[str, float]]) -> None:
        """After a resume, start from the points that the checkpoint carries."""
        self._curves = [point for point in points if point["step"] <= up_to_step]

    @property
    def curves(self) -> list[dict[str, float]]:
        return list(self._curves)

    def finish(self, metrics: dict[str, Any]) -> None:
        """Write metrics.json (and curves.csv) into the stage's report folder; tell the tracker, plots included."""
        assert self.report is not None, f"stage {self.name} declares no report path"
        if self._curves:
            _write_csv(self.plots / "curves.csv", self._curves)
        for path in self.plots.glob("*"):
            if self._earlier.get(path) == _version(path):  # of an earlier run, which drew other things
                path.unlink()
        write_json(self.report / "metrics.json", metrics)
        self.tracker.metrics(_flat_numbers(metrics), step=None)
        for path in sorted(path for path in self.report.rglob("*") if path.is_file()):
            self.tracker.file(path)

    @property
    def plots(self) -> Path:
        """The folder of this stage's plots and curves, one output of DVC, whatever it comes to hold."""
        assert self.report is not None, f"stage {self.name} declares no report path"
        return self.report / "plots"

    def store(self, name: str) -> Path:
        """The file of a row-keyed store; it outlives every run."""
        path = HOME / "stores" / f"{name}.sqlite"
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def checkpoints(self, key: str) -> Path:
        """The folder of this stage's checkpoints under one identity of inputs and params.

        Runs in checkouts of their own share it: while another one trains the very same, this one waits for it.
        """
        path = HOME / "checkpoints" / self.name / key
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_first_rank() and self._training is None:
            # Beside the folder, which goes when training is done; held until this process ends.
            self._training = open(path.with_suffix(".lock"), "a", encoding="utf-8")  # noqa: SIM115
            try:
                fcntl.flock(self._training, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                self.log("another run trains the very same; waiting for it")
                fcntl.flock(self._training, fcntl.LOCK_EX)
                raise Unavailable(
                    "another run has just trained the very same: run this again, DVC takes its result from the cache"
                ) from None
        path.mkdir(exist_ok=True)
        return path


def _version(path: Path) -> tuple[int, int]:
    """What changes when a file is written."""
    about = path.stat()
    return about.st_ino, about.st_mtime_ns


def is_first_rank() -> bool:
    """Whether this process is the one of its launch that writes outputs (torchrun sets RANK)."""
    return int(os.environ.get("RANK", "0")) == 0


@contextlib.contextmanager
def output_folder(path: Path) -> Iterator[Path]:
    """A folder to fill; it takes path's place, whole, when the block ends without an error.

    Ranks beyond the first fill a folder of their own, which is thrown away.
    """
    if not is_first_rank():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    aside, old = path.with_name(f".{path.name}.tmp"), path.with_name(f".{path.name}.old")
    _settle(path, aside, old)
    aside.mkdir()
    try:
        yield aside
        # Moved away before it is deleted: killed in the middle of a deletion, half a model would be left.
        if path.exists():
            os.replace(path, old)
        os.replace(aside, path)
    finally:
        _settle(path, aside, old)


def _settle(path: Path, aside: Path, old: Path) -> None:
    """One folder in path's place, the new one or the old one, and nothing beside it."""
    if old.exists() and not path.exists():
        os.replace(old, path)
    for left in (aside, old):
        shutil.rmtree(left, ignore_errors=True)


def main(name: str, params_type: type, paths_type: type, run: Callable[[Any, Any, Stage], None]) -> int:
    """The command line of a stage; returns the exit status, as exit_status does."""
    arguments = _parse(name, params_type, paths_type, run)
    paths = paths_type(**{f.name: getattr(arguments, f.name) for f in fields(paths_type)})

    def work() -> None:
        over = read_entry(arguments.over) if arguments.over else {}
        params = rounds.load(arguments.params, name, params_type, arguments.round, over)
        number = arguments.round or 1
        if number > 1 and paths == paths_type():
            raise UserError(
                f"--round {number}: without paths of its own it would write over what round 1 left; run it as "
                f"dvc.yaml does: dvc repro --single-item {name}@{number}"
            )
        with only_writer(name, paths):
            _run_tracked(name, params, paths, run, arguments.params, number, over)

    return exit_status(name, work)


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


def _run_tracked(
    name: str,
    params: Any,
    paths: Any,
    run: Callable[[Any, Any, Stage], None],
    params_file: Path,
    number: int,
    over: Mapping[str, Any],
) -> None:
    began = time.monotonic()
    # What points are compared by: not where their files are, nor whole sections.
    plain = {key: value for key, value in over.items() if not isinstance(value, (dict, list))}
    facts = {key: str(value) for key, value in plain.items() if os.sep not in str(value)}
    with tracking.stage_run(name, asdict(params), facts) as tracker:
        report = getattr(paths, "report", None)
        stage = Stage(name, tracker=tracker, report=report, params_file=params_file, round_=number, over=over)
        run(params, paths, stage)
        stage.timings["seconds"] = time.monotonic() - began
        stage.tracker.metrics({f"time/{k}": v for k, v in stage.timings.items()}, step=None)
    # Beside the outputs, not in them: seconds differ from run to run and would change DVC's hashes.
    whose = _name_by_report(name, paths) if over else f"{name}{rounds.ending(number)}"
    write_json(HOME / "timings" / f"{whose}.json", stage.timings)


def _parse(name: str, params_type: type, paths_type: type, run: Callable) -> argparse.Namespace:
    module_doc = sys.modules[run.__module__].__doc__ or ""
    parser = argparse.ArgumentParser(
        prog=f"python -m tasks.{name}",
        description=module_doc,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"parameters (section {name} of params.yaml):\n{describe(params_type)}".replace("%", "%%"),
    )
    parser.add_argument("--params", type=Path, default=Path("params.yaml"), help="params file (%(default)s)")
    parser.add_argument(
        "--over", metavar="FILE:ENTRY", help="sections that stand over those of the params file: a point of a sweep"
    )
    parser.set_defaults(round=None)
    if name in rounds.STAGES:
        parser.add_argument("--round", type=int, metavar="N", default=1, help="which round (%(default)s)")
    for spec in fields(paths_type):
        parser.add_argument(
            f"--{spec.name.replace('_', '-')}",
            dest=spec.name,
            type=Path,
            default=spec.default,
            help="path (%(default)s)",
        )
    return parser.parse_args()


def describe(params_type: type, indent: str = "  ") -> str:
    """The parameters of a section for people, one a line, as --help shows them."""
    lines, hints = [], typing.get_type_hints(params_type)
    for spec in fields(params_type):
        default = default_of(spec)
        doc = spec.metadata["doc"]
        if (section := section_of(hints[spec.name])) is not None:
            rest = " (default: null)" if default is None else ""
            lines += [f"{indent}{spec.name}: {doc}{rest}", describe(section, indent + "  ")]
        else:
            lines.append(f"{indent}{spec.name:<22} {doc} (default: {default})")
    return "\n".join(lines)


@contextlib.contextmanager
def only_writer(name: str, paths: Any) -> Iterator[None]:
    """One process at a time writes a stage's outputs; the kernel frees the lock however its holder dies.

    Several trees may share RANKWISE_HOME (those of `dvc queue` do): their outputs are not each other's.
    """
    tree = hashlib.sha256(os.fsencode(Path.cwd())).hexdigest()[:12]
    path = HOME / "locks" / f"{_name_by_report(name, paths)}-{tree}.lock"
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "a+", encoding="utf-8") as handle:
        # Ranks of one launch share the work: only the first takes the lock.
        if is_first_rank():
            _take(handle, name)
            handle.truncate(0)
            handle.write(f"{os.getpid()} {os.getppid()}" if "DVC_STAGE" in os.environ else str(os.getpid()))
            handle.flush()
        yield


def _take(handle: TextIO, name: str) -> None:
    """Lock a file; waits for a holder whose DVC has died, since it leaves by itself (_leave_with_parent)."""
    told, until = False, time.monotonic() + LEAVING_S
    while True:
        try:
            return fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            handle.seek(0)
            holder, *parent = handle.read().split() or ["?"]
        if not parent or not _is_orphan(holder, parent[0]) or time.monotonic() > until:
            raise UserError(
                f"stage {name} is already being run here by process {holder}; wait for it, or stop it, then run this "
                "again"
            )
        if not told:
            print(f"[{name}] process {holder}, of a run that was killed, is leaving; waiting for it", flush=True)
            told = True
        time.sleep(0.1)


def _is_orphan(pid: str, parent: str) -> bool:
    """Whether a process has lost its parent, or is gone itself; Linux alone can tell, and sends it SIGTERM then."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return sys.platform == "linux"
    return stat.rpartition(")")[2].split()[1] != parent


def _name_by_report(name: str, paths: Any) -> str:
    """A name for what a stage writes: rounds and points of a sweep write elsewhere, and may do so at once."""
    return f"{name}-{getattr(paths, 'report', '')}".replace(os.sep, "-")


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


def _write_csv(path: Path, points: list[dict[str, float]]) -> None:
    columns = list(dict.fromkeys(key for point in points for key in point))
    text = io.StringIO()
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(points)
    # Never in place: the file there may be a hard link into DVC's cache.
    write_aside(path, lambda aside: aside.write_text(text.getvalue(), encoding="utf-8"))


def _flat_numbers(value: dict[str, Any], prefix: str = "") -> dict[str, float]:
    flat: dict[str, float] = {}
    for key, item in value.items():
        if isinstance(item, dict):
            flat |= _flat_numbers(item, f"{prefix}{key}/")
        elif isinstance(item, (int, float)):
            flat[f"{prefix}{key}"] = float(item)
    return flat


def read_json(path: Path) -> Any:
    """A JSON file that a stage wrote; raises UserError where it is missing or broken."""
    if not Path(path).exists():
        raise Missing(path, "file")
    return json_text.read(path, REBUILD)
