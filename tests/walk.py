"""A walk over all that a result depends on: every parameter, and the files that stages read, changed one at a time.

    python tests/walk.py                    # every parameter: about a quarter of an hour
    python tests/walk.py dpo verdicts       # of these sections

After each change, every stage that DVC would start for it runs twice on the tiny pipeline: warm, beside row stores and
checkpoints that hold what all earlier changes left there, and cold, beside none. Both must make the same files, or end
with the same message: anything else is a wrong hit, a row served for what it is not. Numbers may differ in their last
bits, which are counted: a served row was once computed beside other rows, in batches of other shapes. The table at the
end says of each parameter whether it changed what its stages make.

tests/test_walk.py takes the part of the walk that a suite has the time for.
"""

from __future__ import annotations

import argparse
import csv
import dataclasses
import functools
import importlib
import json
import math
import shutil
import sys
import tempfile
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tiny
import unrolled
import yaml

from rankwise.rows import read_table
from tasks.params import section_of
from tasks.recipe import STAGES

GRAPH = unrolled.one_round()
KEPT = ("stores", "checkpoints")  # what outlives a run and may serve it
# Where a neighbour of the value is no value, or none that the tiny pipeline could go on with.
OTHERS: dict[str, list[Any]] = {
    "source": ["files"],
    "function": ["recipes.judges:dialogue", "rankwise.corpus:ground_truth"],
    "rubric": ["recipes/rubrics/helpfulness.md"],
    "model": ["elsewhere"],
    "verdicts": ["replies.jsonl"],
    "annotator": ["ann"],
    "stop": [["the"]],
    "stop_token_ids": [[7]],
    "targets": [["q_proj"]],
    "order": [["policy"]],
    "panel": [[{"kind": "callable", "function": "recipes.judges:dialogue"}]],
    "teacher": [{"engine": "embedded", "model": "elsewhere"}],
    "at_least": [{"win_rate.gold.low": 0.0}, {}],
    "at_most": [{"kl.mean": 9.0}],
    "revision": ["abc"],
    "name": ["another-name"],
}
LAST_BITS = 2e-6  # of numbers of the size of a log-probability; float32 has 24 bits, and some are lost on the way
SHOWING = (".html", ".md", ".png")
FUNCTION = tiny.JUDGE | {"kind": "callable"}  # a judge that is a function, which one is to be added


@dataclass(frozen=True, kw_only=True)
class Leaf:
    """A parameter, and what else it could be."""

    section: str
    path: tuple[str, ...]  # below the section
    value: Any
    others: tuple[Any, ...]

    def __str__(self) -> str:
        return ".".join((self.section, *self.path))


@dataclass(frozen=True, kw_only=True)
class Step:
    """A change, as one stage took it."""

    change: str
    stage: str
    refused: str  # how it ended, where it did not end well
    changed: tuple[str, ...]  # files that it made otherwise
    rounded: tuple[str, ...]  # files of which warm and cold differ in last bits alone
    wrong: str  # how warm and cold differ otherwise; "" where they do not


def leaves(section: str) -> list[Leaf]:
    """Every parameter of a stage's section, as the tiny pipeline has it."""
    given = yaml.safe_load(tiny.render(tiny.TINY))[section]
    return list(_leaves(section, (), importlib.import_module(f"tasks.{section}").Params, given))


def _leaves(section: str, path: tuple[str, ...], params_type: type, given: dict[str, Any]) -> Iterator[Leaf]:
    hints = typing.get_type_hints(params_type)
    for spec in dataclasses.fields(params_type):
        value, inner = given[spec.name], section_of(hints[spec.name])
        if inner is not None and isinstance(value, dict):
            yield from _leaves(section, (*path, spec.name), inner, value)
        else:
            others = tuple(_others(spec, hints[spec.name], value))
            yield Leaf(section=section, path=(*path, spec.name), value=value, others=others)


def _others(spec: dataclasses.Field, hint: Any, value: Any) -> Iterator[Any]:
    literal = next((one for one in (hint, *typing.get_args(hint)) if typing.get_origin(one) is typing.Literal), None)
    if spec.name in OTHERS:
        yield from (other for other in OTHERS[spec.name] if other != value)
    elif hint is dict:  # what a role of prompts.files is read from
        yield {"path": "elsewhere.jsonl"}
    elif literal is not None:
        yield from (option for option in typing.get_args(literal) if option != value)
    elif isinstance(value, bool):
        yield not value
    elif isinstance(value, int) and int in (hint, *typing.get_args(hint)):
        yield value + 1
    elif isinstance(value, (int, float)):
        top = spec.metadata["le"]
        yield value + 0.25 if top is None or value + 0.25 <= top else value - 0.25
    elif value is None and float in typing.get_args(hint):
        yield 0.5
    elif value is None and int in typing.get_args(hint):
        yield 3


def dependants(section: str) -> list[str]:
    """Stages that DVC starts when a parameter of this section changes, in order."""
    return [stage for stage in STAGES if any(key.split(".")[0] == section for key in GRAPH[stage].get("params", ()))]


def made_by(stage: str) -> list[str]:
    """What dvc.yaml says that a stage makes: outs, metrics, plots."""
    entries = [entry for kind in ("outs", "metrics", "plots") for entry in GRAPH[stage].get(kind, [])]
    return [next(iter(entry)) if isinstance(entry, dict) else entry for entry in entries]


class Walk:
    """Two copies of a finished run, changed alike; one keeps its stores and checkpoints, the other has none.

    Example:
        steps = walk.step("hot", ["rollouts"], lambda project: project.change({"rollouts": {"temperature": 2.0}}))
        assert not any(step.wrong for step in steps)
    """

    def __init__(self, finished: tiny.Project, folder: Path):
        self.finished = finished
        self.warm, self.cold = (finished.copy(folder / name) for name in ("warm", "cold"))

    def step(
        self,
        name: str,
        stages: Sequence[str],
        change: Callable[[tiny.Project], object],
        *,
        before: Callable[[], object] | None = None,
    ) -> list[Step]:
        """Change both copies, run the stages in both one after another, compare; put all back but what is kept.

        before: see tiny.Project.run; called in each stage's process.
        """
        for project in (self.warm, self.cold):
            change(project)
        for kept in KEPT:
            shutil.rmtree(self.cold.root / ".rankwise" / kept, ignore_errors=True)
        steps = []
        for stage in stages:
            had = self.warm.tree(*made_by(stage))
            warm, cold = (_ended(project.run(stage, before=before)) for project in (self.warm, self.cold))
            left, right = (project.tree(*made_by(stage)) for project in (self.warm, self.cold))
            other = _differing(left, right)
            rounded = [path for path in other if _alike(self.warm.root / path, self.cold.root / path)]
            if rounded:  # pages and pictures show these numbers
                rounded += [path for path in other if path.endswith(SHOWING)]
            wrong = [path for path in other if path not in rounded]
            if warm != cold:
                wrong = [f"warm: {warm}", f"cold: {cold}"]
            steps.append(
                Step(
                    change=name,
                    stage=stage,
                    refused=cold,
                    changed=_differing(had, right),
                    rounded=tuple(rounded),
                    wrong=", ".join(wrong),
                )
            )
            if cold:
                break  # DVC would stop here too
        for project in (self.warm, self.cold):
            self._put_back(project)
        return steps

    def _put_back(self, project: tiny.Project) -> None:
        for name in (*tiny.MADE, "recipes", "params.yaml"):
            path, source = project.root / name, self.finished.root / name
            if path.is_dir():
                shutil.rmtree(path)
                shutil.copytree(source, path, symlinks=True)
            else:
                shutil.copy(source, path)


def _ended(said: tiny.Said) -> str:
    """How a stage ended, speeds left aside; "" where it ended well."""
    return f"status {said.status}: {said.err.partition('error: ')[2].strip()}" if said.status else ""


def _differing(one: dict[str, str], other: dict[str, str]) -> tuple[str, ...]:
    return tuple(sorted(path for path in {**one, **other} if one.get(path) != other.get(path)))


def _alike(one: Path, other: Path) -> bool:
    """Whether two files of numbers hold the same, up to the last bits of a float32."""
    readers = {
        ".parquet": lambda path: read_table(path).to_pylist(),
        ".json": lambda path: json.loads(path.read_text()),
        ".csv": lambda path: list(csv.reader(path.open())),
    }
    read = readers.get(one.suffix)
    return read is not None and one.exists() and other.exists() and _near(read(one), read(other))


def _near(one: Any, other: Any) -> bool:
    if isinstance(one, dict) and isinstance(other, dict):
        return one.keys() == other.keys() and all(_near(one[key], other[key]) for key in one)
    if isinstance(one, list) and isinstance(other, list):
        return len(one) == len(other) and all(map(_near, one, other))
    if one == other:
        return True
    try:
        return math.isclose(float(one), float(other), rel_tol=LAST_BITS, abs_tol=LAST_BITS)
    except (TypeError, ValueError):
        pass
    try:  # a column of a table may hold JSON
        return isinstance(one, str) and _near(json.loads(one), json.loads(other))
    except (TypeError, ValueError):
        return False


def set_to(leaf: Leaf, value: Any) -> Callable[[tiny.Project], None]:
    """The change of one parameter."""

    def change(project: tiny.Project) -> None:
        path = project.root / "params.yaml"
        params = yaml.safe_load(path.read_text())
        place = functools.reduce(dict.__getitem__, leaf.path[:-1], params[leaf.section])
        place[leaf.path[-1]] = value
        path.write_text(yaml.safe_dump(params))

    return change


def main() -> int:
    known = [section for section in STAGES if dependants(section)]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sections", nargs="*", metavar="SECTION", help=f"of {', '.join(known)}; all")
    parser.add_argument("--json", type=Path, help="write every step to this file")
    arguments = parser.parse_args()
    if unknown := [section for section in arguments.sections if section not in known]:
        parser.error(f"no such section: {', '.join(unknown)} (known: {', '.join(known)})")
    steps: list[Step] = []
    with tempfile.TemporaryDirectory() as folder:
        walk = Walk(tiny.finished(Path(folder)), Path(folder))
        for section in arguments.sections or known:
            for leaf in leaves(section):
                for value in leaf.others:
                    taken = walk.step(f"{leaf}: {leaf.value!r} -> {value!r}", dependants(section), set_to(leaf, value))
                    print(*map(_line, taken), sep="\n", flush=True)
                    steps += taken
    _tell(steps)
    if arguments.json:
        arguments.json.write_text(json.dumps([dataclasses.asdict(step) for step in steps], indent=1))
    return 1 if any(step.wrong for step in steps) else 0


def _line(step: Step) -> str:
    what = f"{len(step.changed)} files are other ones" if step.changed else "the same"
    what = f"WRONG: {step.wrong}" if step.wrong else f"refused, {step.refused}" if step.refused else what
    return f"{step.change:<72} {step.stage:<20} {what[:160]}"


def _tell(steps: list[Step]) -> None:
    made = [step for step in steps if not step.refused]
    print(f"\n{len({step.change for step in steps})} changes, {len(steps)} runs of a stage, each warm and cold:")
    print(f"  {sum(bool(step.changed) for step in made):>5} made other files")
    print(f"  {sum(not step.changed for step in made):>5} made the same files")
    print(f"  {len(steps) - len(made):>5} were refused, with one message")
    print(f"  {sum(bool(step.rounded) for step in steps):>5} differed in last bits, served or computed")
    print(f"  {sum(bool(step.wrong) for step in steps):>5} were wrong hits")


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    raise SystemExit(main())
