"""What every stage shares: its command line, its outputs written aside, its records.

A stage module declares `Params` (its section of params.yaml), `Paths` (what it reads and writes, as in
dvc.yaml) and `run(params, paths, stage)`, and ends in `raise SystemExit(main("sft", Params, Paths, run))`.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import fcntl
import io
import os
import shutil
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
from rankwise.types import Missing, Unavailable, UserError, printable
from tasks import rounds, tracking
from tasks.exits import exit_status
from tasks.locks import only_writer
from tasks.params import default_of, read_entry, section_of

REBUILD = "rebuild it with the stage that makes it"
P = TypeVar("P")
# Outside every DVC output, so that nothing computed is lost when DVC clears an output before a run.
HOME = tracking.home()


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


@contextlib.contextmanager
def scratch_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside path, gone when the block ends; a killed run's goes when the next one begins.

    Ranks beyond the first get a folder of their own.
    """
    if not is_first_rank():
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
        return
    scratch = path.with_name(f".{path.name}.scratch")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    try:
        yield scratch
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


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
        # Ranks of one launch share the work: only the first takes the lock.
        alone = only_writer(name, _name_by_report(name, paths), HOME) if is_first_rank() else contextlib.nullcontext()
        with alone:
            _run_tracked(name, params, paths, run, arguments.params, number, over)

    return exit_status(name, work)


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


def _name_by_report(name: str, paths: Any) -> str:
    """A name for what a stage writes: rounds and points of a sweep write elsewhere, and may do so at once."""
    return f"{name}-{getattr(paths, 'report', '')}".replace(os.sep, "-")


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
