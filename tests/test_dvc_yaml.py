"""Laws of dvc.yaml and sweeps/dvc.yaml: what a stage runs, reads, writes and is told is what they say of it.

DVC never notices an edited module that a stage imports and dvc.yaml does not list: it says "didn't change" of a
stale result. So the lists are checked here, against the imports and against each stage's own Paths and Params.
"""

from __future__ import annotations

import ast
import functools
import importlib
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field, fields, is_dataclass, replace
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parent.parent
PACKAGES = ("rankwise", "tasks", "flows")


@dataclass(frozen=True, kw_only=True)
class Declared:
    """A stage as DVC reads it, `foreach` unrolled and templates filled in; paths relative to the root."""

    name: str  # "dpo", "dpo@2"
    command: str
    deps: tuple[str, ...]
    writes: tuple[str, ...]  # outs, metrics and plots
    params: tuple[str, ...]  # "dpo", "dpo.beta"
    points: dict = field(default_factory=dict)  # sweeps/params.yaml, for a stage of a sweep

    @property
    def module(self) -> str:
        """The stage's own module: the `tasks.NAME` of its command, empty where it runs something else."""
        found = re.search(r"-m (tasks\.\w+)", self.command)
        return found[1] if found else ""

    def section(self, sections: dict) -> object:
        """The stage's own section of params.yaml; in a sweep, with what its point has over it."""
        own = sections.get(self.module.rpartition(".")[2])
        kind, _, key = next((p for p in self.params if p.partition(".")[0] in self.points), "").partition(".")
        return [own, self.points[kind][key]] if kind else own


def declared(root: Path) -> list[Declared]:
    """The stages of a repository, from DVC's own index."""
    from dvc.dependency import ParamsDependency
    from dvc.repo import Repo

    with Repo(str(root)) as repo:
        return [
            Declared(
                name=stage.addressing,
                command="\n".join(stage.cmd) if isinstance(stage.cmd, list) else stage.cmd,
                deps=tuple(d.def_path for d in stage.deps if not isinstance(d, ParamsDependency)),
                writes=tuple(out.def_path for out in stage.outs),
                params=tuple(key for d in stage.deps if isinstance(d, ParamsDependency) for key in d.params),
            )
            for stage in repo.index.stages
            if stage.cmd
        ]


def imports(root: Path, module: str) -> set[str]:
    """The project's files that running a module may import: directly or not, at the top or inside a function."""
    found: set[str] = set()
    waiting = [module]
    while waiting:
        name = waiting.pop()
        path = _file(root, name)
        if path is None or path in found:
            continue
        found.add(path)
        # Importing a.b runs a/__init__.py first.
        waiting += [name.rpartition(".")[0]] if "." in name else []
        waiting += _named_imports(root, path, name)
    return found


@functools.cache
def _named_imports(root: Path, path: str, name: str) -> list[str]:
    """What a file's import statements may mean, module or attribute, wherever they stand."""
    named: list[str] = []
    for node in ast.walk(ast.parse((root / path).read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            named += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            package = _absolute(name, path, node)
            named += [package, *(f"{package}.{alias.name}" for alias in node.names)]
    return named


def _absolute(name: str, path: str, node: ast.ImportFrom) -> str:
    """The module that `from … import` names, relative dots resolved."""
    if not node.level:
        return node.module or ""
    parts = name.split(".") if path.endswith("/__init__.py") else name.split(".")[:-1]
    return ".".join([*parts[: len(parts) - node.level + 1], *([node.module] if node.module else [])])


def _file(root: Path, name: str) -> str | None:
    if name.split(".")[0] not in PACKAGES:
        return None
    base = Path(*name.split("."))
    for path in (base.with_suffix(".py"), base / "__init__.py"):
        if (root / path).is_file():
            return path.as_posix()
    return None


def used_modules(root: Path, stage: Declared, params: object = None) -> set[str]:
    """The files that a stage may import, those included that its parameters name ("package.module:function")."""
    named = {text.partition(":")[0] for text in _texts(params) if re.fullmatch(r"[\w.]+:\w+", text)}
    return set().union(*(imports(root, module) for module in {stage.module, *named}))


def unlisted_modules(root: Path, stage: Declared, params: object = None) -> list[str]:
    """Files that the stage may import and that none of its deps covers; one with no code changes nothing."""
    return sorted(
        path for path in used_modules(root, stage, params) if _has_code(root / path) and not _covered(path, stage.deps)
    )


def _has_code(path: Path) -> bool:
    """Whether a module holds more than its docstring."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    return any(not (isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)) for node in body)


def _covered(path: str, by: tuple[str, ...] | list[str]) -> bool:
    """Whether a path is one of these, or inside one of these folders."""
    return any(path == other or path.startswith(other.rstrip("/") + "/") for other in by)


def given_paths(stage: Declared, defaults: dict[str, Path]) -> dict[str, str]:
    """Where a stage reads and writes: the defaults of its Paths, with what its command line says instead."""
    paths = {name: Path(path).as_posix() for name, path in defaults.items()}
    words = shlex.split(stage.command)
    for word, value in zip(words, [*words[1:], ""]):
        name, _, attached = word.removeprefix("--").partition("=")
        if word.startswith("--") and name.replace("-", "_") in paths:
            paths[name.replace("-", "_")] = attached or value
    return paths


def path_gaps(stage: Declared, defaults: dict[str, Path], params: object = None) -> list[str]:
    """Differences between what dvc.yaml says a stage reads and writes and what its Paths say.

    A file that a parameter names (a rubric) is no path of the stage, and DVC has to watch it all the same.
    """
    paths = given_paths(stage, defaults)
    data = [dep for dep in stage.deps if not dep.endswith(".py") and not _covered(dep, PACKAGES)]
    said = [*data, *stage.writes]
    gaps = [
        f"Paths.{name} = {path} is in neither deps, outs, metrics nor plots"
        for name, path in paths.items()
        if not _covered(path, said) and not any(_covered(other, [path]) for other in said)
    ]
    known = [*paths.values(), *_texts(params)]
    gaps += [f"{path} is in dvc.yaml, but no path of Paths leads there" for path in said if not _near(path, known)]
    return gaps


def _near(path: str, known: list[str]) -> bool:
    return _covered(path, known) or any(_covered(other, [path]) for other in known)


def _texts(value: object) -> list[str]:
    """Every text in a section of params.yaml, or in several."""
    if isinstance(value, (dict, list)):
        return [text for item in (value.values() if isinstance(value, dict) else value) for text in _texts(item)]
    return [value] if isinstance(value, str) else []


def key_gaps(given: object, params_type: type, where: str) -> list[str]:
    """Differences between the keys of a params.yaml section and the fields of its dataclass, at any depth."""
    from tasks.params import default_of

    if not isinstance(given, dict):
        return [f"{where}: a mapping was expected"]
    known = {spec.name: spec for spec in fields(params_type)}
    gaps = [f"{where}.{key}: no such field of {params_type.__name__}" for key in given if key not in known]
    for name, spec in known.items():
        if name not in given:
            gaps.append(f"{where}.{name}: missing from params.yaml")
        elif is_dataclass(inner := default_of(spec)):
            gaps += key_gaps(given[name], type(inner), f"{where}.{name}")
    return gaps


SWEEP = """
name: small
seeds: [0]
data: {rankings: {}}
rewards: {fitted: rankings}
methods:
  dpo: {data: rankings, vary: {dpo.beta: [0.1]}}
  rlhf: {reward: fitted, vary: {policy_gradient.beta: [0.1]}}
  truth:
    reward: judge
    over: {policy_gradient: {judge: {kind: callable, function: "rankwise.corpus:ground_truth"}}}
"""


@pytest.fixture(scope="module")
def stages(tmp_path_factory) -> list[Declared]:
    """The stages of the pipeline, and those of a small sweep: the one that is shipped has no points."""
    from tasks import sweep

    root = tmp_path_factory.mktemp("graph")
    for name in ("dvc.yaml", "params.yaml", "sweeps/dvc.yaml", "sweep.yaml"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text(SWEEP if name == "sweep.yaml" else (ROOT / name).read_text(encoding="utf-8"))
    sweep.apply(root / "sweep.yaml", file=root / "sweeps/params.yaml", params=root / "params.yaml")
    subprocess.run(["git", "init", "-q", "."], cwd=root, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=root, check=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(root)  # stages are called by their file, seen from here
        points = yaml.safe_load((root / "sweeps/params.yaml").read_text())
        found = [
            replace(stage, points={kind: points[kind] for kind in sweep.KINDS} if ":" in stage.name else {})
            for stage in declared(root)
            if stage.module
        ]
    assert {stage.module for stage in found} > {"tasks.sft", "tasks.policy_gradient", "tasks.frontier"}
    return found


@pytest.fixture(scope="module")
def sections() -> dict:
    return yaml.safe_load((ROOT / "params.yaml").read_text(encoding="utf-8"))


def test_deps_list_every_module_that_a_stage_imports(stages, sections):
    told = []
    for stage in stages:
        if missing := unlisted_modules(ROOT, stage, stage.section(sections)):
            told.append(f"add to deps of stage {stage.name} in dvc.yaml:")
            told += [f"      - {path}" for path in missing]
    assert not told, "\n" + "\n".join(told)


def test_deps_list_no_module_that_a_stage_does_not_import(stages, sections):
    told = []
    for stage in stages:
        used = used_modules(ROOT, stage, stage.section(sections))
        if any("import_module(" in (ROOT / path).read_text(encoding="utf-8") for path in used):
            continue  # a recipe may name functions that the default does not
        idle = [d for d in stage.deps if _covered(d, PACKAGES) and d.endswith(".py") and d not in used]
        told += [f"stage {stage.name}: {path} is not imported: an edit would rerun it for nothing" for path in idle]
    assert not told, "\n" + "\n".join(told)


def test_paths_of_a_stage_are_those_in_dvc_yaml(stages, sections):
    told = []
    for stage in stages:
        paths_type = importlib.import_module(stage.module).Paths
        defaults = {spec.name: spec.default for spec in fields(paths_type)}
        read = [sections.get(key.partition(".")[0]) for key in stage.params]
        gaps = path_gaps(stage, defaults, read)
        told += [f"stage {stage.name}: {gap}" for gap in gaps]
    assert not told, "\n" + "\n".join(told)


def test_params_yaml_has_exactly_the_keys_that_stages_declare(stages, sections):
    template = (ROOT / "dvc.yaml").read_text(encoding="utf-8")
    told, known = [], set()
    # tasks.promote is no stage: its result depends on the registry, which DVC does not version.
    for module in sorted({stage.module for stage in stages} | {"tasks.promote"}):
        section = module.rpartition(".")[2]
        params_type = importlib.import_module(module).Params
        if fields(params_type):
            known.add(section)
            told += key_gaps(sections.get(section, {}), params_type, section)
    # A section that dvc.yaml unrolls (`foreach: ${rounds}`) belongs to the graph, not to a stage.
    told += [
        f"{name}: no stage has this section" for name in sections if name not in known and f"${{{name}" not in template
    ]
    assert not told, "\n" + "\n".join(told)


def test_a_stage_depends_on_its_own_section_of_params_yaml(stages):
    told = []
    for stage in stages:
        section = stage.module.rpartition(".")[2]
        has_params = bool(fields(importlib.import_module(stage.module).Params))
        if has_params and not any(key.split(".")[0] == section for key in stage.params):
            told.append(f"stage {stage.name}: add `params: [{section}]`")
    assert not told, "\n" + "\n".join(told)


def test_a_stage_command_replaces_its_shell(stages):
    """With /bin/sh left between dvc and the stage, the death of dvc leaves the stage writing alone."""
    bad = [stage.name for stage in stages if not stage.command.startswith("exec ")]
    assert not bad, f"write `cmd: exec …` for: {', '.join(bad)}"


# The laws themselves can fail: each is broken here once, on a project of a few lines.


@pytest.fixture
def small(tmp_path):
    """A project whose stage imports one module lazily, one through another, and lists neither."""
    for path, text in {
        "tasks/__init__.py": "",
        "tasks/sft.py": "from tasks import common\n\ndef run():\n    from rankwise.late import x\n",
        "tasks/common.py": "from .deep import y\nimport json\n",
        "tasks/deep.py": "y = 1\n",
        "tasks/other.py": "",
        "rankwise/__init__.py": "",
        "rankwise/late.py": "x = 1\n",
        "dvc.yaml": "stages:\n  sft:\n    cmd: exec python -m tasks.sft --model models/other\n"
        "    deps: [tasks/sft.py, data/in]\n    outs: [models/other]\n",
    }.items():
        (tmp_path / path).parent.mkdir(exist_ok=True)
        (tmp_path / path).write_text(text)
    subprocess.run(["git", "init", "-q", "."], cwd=tmp_path, check=True)
    subprocess.run([sys.executable, "-m", "dvc", "init", "-q"], cwd=tmp_path, check=True)
    return tmp_path


def test_lazy_relative_and_indirect_imports_are_found(small):
    [stage] = declared(small)
    assert unlisted_modules(small, stage) == ["rankwise/late.py", "tasks/common.py", "tasks/deep.py"]


def test_a_module_that_a_parameter_names_is_found(small):
    [stage] = declared(small)
    (small / "rankwise/judge.py").write_text("def gold(): ...")
    assert "rankwise/judge.py" in unlisted_modules(small, stage, {"judge": {"function": "rankwise.judge:gold"}})


def test_a_listed_folder_covers_the_modules_in_it(small):
    [stage] = declared(small)
    wide = Declared(**{**stage.__dict__, "deps": ("tasks", "rankwise/")})
    assert unlisted_modules(small, wide) == []


def test_paths_on_the_command_line_stand_for_the_defaults(small):
    [stage] = declared(small)
    assert path_gaps(stage, {"data": Path("data/in"), "model": Path("models/sft")}) == []


def test_a_path_missing_on_either_side_is_a_gap(small):
    [stage] = declared(small)
    gaps = path_gaps(stage, {"model": Path("models/sft"), "report": Path("reports/sft")})
    assert [gap.split()[0] for gap in gaps] == ["Paths.report", "data/in"]
